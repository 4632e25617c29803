"""A client's half of one masked sum: five steps, each once and in order, by a party that trusts no server.

SecAgg+ (Bell et al. 2020) with the double mask and the consistency round of Bonawitz et al. 2017, and keys signed by enrolled
identities. A `Client` is one sum's. It draws fresh secrets, and forgets them with its opening or with the first step that
it refuses:

- share: itself as it advertised and nobody twice in the roster; enough for its floor; each advert signed over these same terms
  by an identity that it trusts; a threshold of more than two thirds of a circle (half, against a server that only looks);
  a number that its replay log has not seen;
- mask: who has shared is of the roster, itself among them, enough for the floor, and the threshold's number of its circle. A
  share that it cannot decrypt counts as missing;
- confirm: the survivors are of those, itself among them, and enough again. It signs one set of survivors, ever;
- open: more than two thirds of the roster (half) have signed the same roster, sharers and survivors.

What it opens follows from the survivors alone: of each in its circle a share of its own mask's seed if it survives, of its mask
key's seed if not, so never of both.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import IntEnum
from itertools import islice
from typing import Any, Final

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from seqfed.common.errors import MaskingRefused
from seqfed.common.masking import keys, packing, prg, shamir
from seqfed.common.masking.messages import (
    OF_KEY,
    OF_SELF,
    SALT,
    Advert,
    Confirm,
    Confirmed,
    Delivery,
    KeyShares,
    MaskedInput,
    Opening,
    Roster,
    Survivors,
)
from seqfed.common.masking.plan import Plan, advert_statement
from seqfed.common.masking.terms import Terms

SECRET: Final = 32  # bytes
SALTED: Final = SALT + shamir.SHARE_BYTES


class _Next(IntEnum):
    """The one step that a client will take."""

    ADVERTISE = 0
    SHARE = 1
    MASK = 2
    CONFIRM = 3
    OPEN = 4
    NONE = 5


@dataclass(repr=False)
class _Secrets:
    """What nobody else may learn. No repr: it must not come into a log."""

    encryption: bytes = field(default_factory=lambda: secrets.token_bytes(SECRET))
    mask: bytes = field(default_factory=lambda: secrets.token_bytes(SECRET))
    own: bytes = field(default_factory=lambda: secrets.token_bytes(SECRET))  # of its own mask
    boxes: dict[str, bytes] = field(default_factory=dict)  # by neighbour: what the encryption keys agree on
    pairs: dict[str, bytes] = field(default_factory=dict)  # and the mask keys
    held: dict[str, bytes] = field(default_factory=dict)  # by owner: its two salted shares

    def forget_shared(self) -> None:
        """All but what is held for the opening."""
        self.encryption = self.mask = self.own = b""
        self.boxes, self.pairs = {}, {}

    def forget(self) -> None:
        """All: who still has this record, a traceback say, has it empty."""
        self.forget_shared()
        self.held = {}


class Client:
    """One masked sum at one client.

    Args:
        terms: What this client itself knows the sum to be of.
        name: Its own.
        signer: Its masking identity.
        floor: The fewest clients in whose sum it lets itself be.
        trust: Raises if an advert's identity is not one of this federation's clients.
        begin: Notes (run, number) durably; raises MaskingRefused unless the number is higher than any before.
        binding: Of the signer's key, for the others' trust stores.
        certificate: For the same.
    """

    def __init__(
        self,
        terms: Terms,
        name: str,
        signer: keys.Signer,
        floor: int,
        trust: Callable[[Advert], None],
        begin: Callable[[str, int], None],
        *,
        binding: bytes = b"",
        certificate: bytes = b"",
    ) -> None:
        terms.check()
        self.terms: Final = terms
        self.name: Final = name
        self._signer = signer
        self._floor = max(floor, terms.min_survivors)
        self._trust, self._begin = trust, begin
        self._binding, self._certificate = binding, certificate
        self._next = _Next.ADVERTISE
        self._secrets: _Secrets | None = _Secrets()  # None while a step has them
        self._ended = False
        self._advert: Advert | None = None
        self._plan: Plan  # since `share`
        self._sharers: frozenset[str] = frozenset()
        self._survivors: frozenset[str] = frozenset()
        self._agreed = b""  # of both

    def wipe(self) -> None:
        """Forget the secrets, at the end of the step if one is under way in another thread; every further step is refused."""
        self._ended, self._next = True, _Next.NONE
        if self._secrets is not None:
            self._secrets.forget()

    # Step 0 ----------------------------------------------------------------------------------------------------------

    def advertise(self) -> Advert:
        """Its keys for this sum."""
        with self._step(_Next.ADVERTISE) as own:
            blank = Advert(
                client=self.name,
                encryption_key=keys.public_of(own.encryption),
                mask_key=keys.public_of(own.mask),
                identity_key=self._signer.public,
                binding=self._binding,
                certificate=self._certificate,
                signature=b"",
            )
            self._advert = replace(blank, signature=self._signer.sign(*advert_statement(self.terms, blank)))
            return self._advert

    # Step 1 ----------------------------------------------------------------------------------------------------------

    def share(self, roster: Roster) -> KeyShares:
        """The seeds of its own mask and of its mask key, split among its circle."""
        with self._step(_Next.SHARE) as own:
            plan = self._planned(roster)
            for advert in roster.adverts:
                if advert.client != self.name:
                    self._check_advert(advert)
            byname = dict(zip(roster.names, roster.adverts, strict=True))
            box, pair = keys.agreeing(own.encryption), keys.agreeing(own.mask)
            for name in plan.neighbours(self.name):
                own.boxes[name] = box(byname[name].encryption_key)
                own.pairs[name] = pair(byname[name].mask_key)
            self._begin(self.terms.run, self.terms.number)
            self._plan = plan
            return self._split(own, plan)

    def _planned(self, roster: Roster) -> Plan:
        """Raises MaskingRefused for a roster that this client would not be in, or whose threshold is too low for it."""
        names, terms = roster.names, self.terms
        if list(names) != sorted(set(names)):
            raise self._refuse("the roster names a client twice, or not in ascending order")
        if self._advert not in roster.adverts:
            raise self._refuse("the roster does not hold the keys that this client has advertised")
        if not self._floor <= len(names) <= terms.n_max:
            raise self._refuse(f"the roster has {len(names)} clients; {self._floor} to {terms.n_max} may be in it")
        every = [key for one in roster.adverts for key in (one.encryption_key, one.mask_key, one.identity_key)]
        if len(set(every)) != len(every):
            raise self._refuse("two keys of the roster are the same; every client must have its own")
        plan = Plan(terms, roster)
        circle, threshold = len(plan.circle(self.name)), plan.threshold
        enough = 3 * threshold > 2 * circle if terms.malicious else 2 * threshold > circle
        if not enough or threshold > circle:
            raise self._refuse(f"{threshold} of {circle} shares would open a secret; that is too few or too many")
        return plan

    def _check_advert(self, advert: Advert) -> None:
        if not keys.verify(advert.identity_key, advert.signature, *advert_statement(self.terms, advert)):
            raise self._refuse(f"client '{advert.client}' has not signed its keys for these terms of the sum")
        self._trust(advert)

    def _split(self, own: _Secrets, plan: Plan) -> KeyShares:
        name, circle = self.name, plan.circle(self.name)
        points = [plan.point(holder) for holder in circle]
        split = [shamir.split(secret, points, plan.threshold) for secret in (own.own, own.mask)]
        sealed, commitments = {}, {}
        for holder, of_self, of_key in zip(circle, *split, strict=True):
            texts = secrets.token_bytes(SALT) + of_self, secrets.token_bytes(SALT) + of_key
            commitments[holder] = plan.commit(OF_SELF, name, holder, texts[0]) + plan.commit(
                OF_KEY, name, holder, texts[1]
            )
            text = texts[0] + texts[1]
            if holder == name:
                own.held[name] = text
            else:
                sealed[holder] = keys.seal(own.boxes[holder], plan.hash, self.terms.digest, name, holder, text)
        blank = KeyShares(sealed, plan.commit_own(name, own.own), commitments, b"")
        return replace(blank, signature=self._signer.sign(*plan.shares_statement(name, blank)))

    # Step 2 ----------------------------------------------------------------------------------------------------------

    def mask(
        self, delivery: Delivery, vector: NDArray[Any] | None, scalars: Sequence[int], *, workers: int = 1
    ) -> tuple[bytes, MaskedInput]:
        """The vector, packed (b"" if the sum has none), and what makes it count.

        Args:
            delivery: Who has shared, and what its neighbours have sealed for this client.
            vector: `terms.dim` numbers of `terms.dtype`, modulo 2^bits; masked in place. None if the sum has none.
            scalars: `terms.scalars` of them, each of at most (2^63 - 1) / n_max, so that their sums are below 2^63.
            workers: Threads.
        """
        with self._step(_Next.MASK) as own:
            plan = self._plan
            self._check_members(delivery.members, plan.roster.names, "have shared")
            others = [name for name in plan.neighbours(self.name) if name in delivery.members]
            if not delivery.sealed.keys() <= set(others):
                raise self._refuse("shares were delivered of clients that have none for this one")
            self._check_input(vector, scalars)
            self._sharers = delivery.members
            for owner, box in delivery.sealed.items():
                text = self._unsealed(own, plan, owner, box)
                if len(text) == 2 * SALTED:
                    own.held[owner] = text
            # two vectors under labels of their own: no mask is ever used twice
            small = np.array([int(value) % (1 << 64) for value in scalars], np.uint64)
            prg.add_masks(small, *self._masks(own, plan, others, "scalars"))
            packed = b""
            if vector is not None:
                prg.threads(vector, *self._masks(own, plan, others, "vector"), workers)
                packed = packing.pack(vector, self.terms.bits)
            own.forget_shared()
            digest = blake3(packed).digest() if vector is not None else b""
            blank = MaskedInput(small.astype("<u8").tobytes(), digest, b"")
            statement = plan.input_statement(self.name, blank, self._sharers)
            return packed, replace(blank, signature=self._signer.sign(*statement))

    def _check_input(self, vector: NDArray[Any] | None, scalars: Sequence[int]) -> None:
        terms, most = self.terms, ((1 << 63) - 1) // self.terms.n_max
        if (0 if vector is None else len(vector)) != terms.dim or (vector is not None) != (terms.dim > 0):
            raise self._refuse(
                f"a vector of {0 if vector is None else len(vector)} numbers; the sum's have {terms.dim}"
            )
        if vector is not None and vector.dtype != terms.dtype:
            raise self._refuse(f"a vector of {vector.dtype}; the sum's is of {terms.dtype}")
        if len(scalars) != terms.scalars:
            raise self._refuse(f"{len(scalars)} scalars; the sum has {terms.scalars}")
        if not all(-most <= value <= most for value in scalars):
            raise self._refuse(f"a scalar is beyond {most}: the sum of {terms.n_max} clients' could wrap")

    def _unsealed(self, own: _Secrets, plan: Plan, owner: str, box: bytes) -> bytes:
        try:
            return keys.open_(own.boxes[owner], plan.hash, self.terms.digest, owner, self.name, box)
        except MaskingRefused:
            return b""

    def _masks(self, own: _Secrets, plan: Plan, others: Collection[str], label: str) -> tuple[list[bytes], list[bytes]]:
        """The keys of the masks that this client adds, and of those that it subtracts: of two clients the first adds."""
        minus: list[bytes] = []
        plus = [keys.self_key(own.own, plan.hash, label)]
        for other in others:
            key = keys.mask_key(own.pairs[other], plan.hash, self.name, other, label)
            (plus if self.name < other else minus).append(key)
        return plus, minus

    # Steps 3 and 4 ---------------------------------------------------------------------------------------------------

    def confirm(self, survivors: Survivors) -> Confirm:
        """Its signature of the survivors."""
        with self._step(_Next.CONFIRM):
            plan = self._plan
            self._check_members(survivors.members, self._sharers, "are in the sum")
            self._survivors = survivors.members
            self._agreed = plan.agreed(self._sharers, self._survivors)
            return Confirm(self._signer.sign(*plan.survivors_statement(self.name, self._agreed)))

    def open(self, confirmed: Confirmed) -> Opening:
        """What takes the masks off the sum; then it knows no secret any more."""
        with self._step(_Next.OPEN) as own:
            plan = self._plan
            holding = (one for one in confirmed.signatures.items() if self._has_signed(plan, *one))
            signed = len(list(islice(holding, plan.quorum)))
            if signed < plan.quorum:
                raise self._refuse(
                    f"{signed} clients have signed these survivors, and {plan.quorum} of {len(plan.roster.names)} must: "
                    "the others were told something else, or nothing"
                )
            return Opening(
                {
                    owner: bytes([OF_SELF]) + text[:SALTED]
                    if owner in self._survivors
                    else bytes([OF_KEY]) + text[SALTED:]
                    for owner, text in own.held.items()
                }
            )

    def _has_signed(self, plan: Plan, name: str, signature: bytes) -> bool:
        if name not in self._survivors:
            return False
        public = plan.roster.adverts[plan.roster.index(name)].identity_key
        return keys.verify(public, signature, *plan.survivors_statement(name, self._agreed))

    # Every step ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _step(self, step: _Next) -> Iterator[_Secrets]:
        """The secrets, which are this step's alone; whatever goes wrong in it ends the sum at this client."""
        due, own = self._next, self._secrets
        self._next, self._secrets = _Next.NONE, None
        try:
            if own is None or due is not step:
                raise self._refuse(f"step '{step.name.lower()}' when '{due.name.lower()}' is due; each comes once")
            yield own
            if self._ended:
                raise self._refuse(f"it was ended in the course of step '{step.name.lower()}'")
        except BaseException:
            self._ended = True
            if own is not None:
                own.forget()
            raise
        self._next, self._secrets = _Next(step + 1), own
        if step is _Next.OPEN:
            self.wipe()

    def _check_members(self, members: frozenset[str], among: Collection[str], what: str) -> None:
        if not members.issubset(among):
            raise self._refuse("clients " + what + " that cannot be")
        if self.name not in members:
            raise self._refuse(f"this client is not among those that {what}")
        if len(members) < self._floor:
            raise self._refuse(f"only {len(members)} clients {what}; this one wants {self._floor} or more")
        if not self._plan.supported(self.name, members):
            raise self._refuse(f"of this client's circle fewer than {self._plan.threshold} {what}")

    def _refuse(self, why: str) -> MaskingRefused:
        return MaskingRefused(f"masked sum {self.terms.number} of run {self.terms.run}: {why}")
