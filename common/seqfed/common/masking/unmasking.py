"""The end of a masked sum at the server: from the shares that were opened to the masks that come off, and the sums.

Every secret is held against what its owner has committed to before anything is made of it. Heavy for many clients (key
agreements and interpolation); nothing of it touches the event loop's state, so it may run in a thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from seqfed.common.errors import MaskingFailed
from seqfed.common.masking import keys, prg, shamir
from seqfed.common.masking.checks import kind_of
from seqfed.common.masking.messages import OF_KEY, OF_SELF, SALT
from seqfed.common.masking.server import Fail, State

TRIES: Final = 8  # sets of shares, where the first does not give what the owner committed to


@dataclass(frozen=True)
class Unmasking:
    """The keys of the masks to add to (plus), and to take from (minus), the sum of the masked vectors, and of the scalars.

    Attributes:
        disputes: (holder, owner) whose share is not the one committed to; one of the two lied. The others sufficed.
    """

    plus: Sequence[bytes] = field(repr=False)
    minus: Sequence[bytes] = field(repr=False)
    scalar_plus: Sequence[bytes] = field(repr=False)
    scalar_minus: Sequence[bytes] = field(repr=False)
    disputes: tuple[tuple[str, str], ...]


def unmasking(state: State) -> Unmasking | Fail:
    """What takes the masks off the sum. Precondition: the step is DONE.

    Fail if a secret cannot be opened: `missed` are its owner and the holders who dispute it.
    """
    plan, disputes = state.plan, list[tuple[str, str]]()
    minus: tuple[list[bytes], list[bytes]] = [], []  # of the vector, of the scalars
    plus: tuple[list[bytes], list[bytes]] = [], []
    publics = {advert.client: advert.mask_key for advert in plan.roster.adverts}
    for owner in sorted(state.shared):
        partners = [name for name in plan.neighbours(owner) if name in state.masked]
        if owner not in state.masked and not partners:
            continue
        secret, wrong = _opened(state, owner)
        disputes.extend((holder, owner) for holder in wrong)
        if secret is None:
            holders = sum(owner in message.shares for message in state.opened.values())
            missed = tuple(sorted({owner, *wrong}))  # nobody can tell which of them lies
            why = f"masked sum {state.terms.number}: the shares of '{owner}' do not give what it has committed to"
            return Fail(f"{why}; {len(wrong)} of the {holders} that came are disputed", missed)
        if owner in state.masked:
            for place, label in enumerate(("vector", "scalars")):
                minus[place].append(keys.self_key(secret, plan.hash, label))
            continue
        agreed = keys.agreeing(secret)
        for name in partners:
            shared = agreed(publics[name])
            for place, label in enumerate(("vector", "scalars")):
                # of two clients the first has added the mask
                key = keys.mask_key(shared, plan.hash, owner, name, label)
                (minus if name < owner else plus)[place].append(key)
    return Unmasking(plus[0], minus[0], plus[1], minus[1], tuple(disputes))


def _opened(state: State, owner: str) -> tuple[bytes | None, tuple[str, ...]]:
    """The owner's secret that is due, None if there is none to be had; and the holders whose shares are not as committed."""
    plan, kind = state.plan, kind_of(owner, state.masked)
    committed = state.shared[owner].commitments
    half = slice(0, 32) if kind == OF_SELF else slice(32, 64)
    good, wrong = list[tuple[str, bytes]](), list[tuple[str, bytes]]()
    for holder in plan.circle(owner):
        opening = state.opened.get(holder)
        share = opening.shares.get(owner) if opening is not None else None
        if share is not None:
            right = plan.commit(kind, owner, holder, share[1:]) == committed[holder][half]
            (good if right else wrong).append((holder, share[1 + SALT :]))
    for some in _choices([*good, *wrong], plan.threshold):
        weights = shamir.weights([plan.point(holder) for holder, _ in some])
        try:
            secret = shamir.recover(weights, [share for _, share in some])
        except MaskingFailed:
            continue
        if _is_due(state, owner, kind, secret):
            return secret, tuple(holder for holder, _ in wrong)
    return None, tuple(holder for holder, _ in wrong)


def _choices(shares: list[tuple[str, bytes]], count: int) -> Iterator[list[tuple[str, bytes]]]:
    """Some sets of so many shares, the first of the first ones."""
    if len(shares) >= count:
        for start in range(min(TRIES, len(shares) - count + 1)):
            yield shares[start : start + count]


def _is_due(state: State, owner: str, kind: int, secret: bytes) -> bool:
    plan = state.plan
    if kind == OF_KEY:
        return keys.public_of(secret) == plan.roster.adverts[plan.roster.index(owner)].mask_key
    return plan.commit_own(owner, secret) == state.shared[owner].self_commitment


def scalar_totals(state: State, unmasked: Unmasking) -> tuple[int, ...]:
    """The sums of the survivors' scalars."""
    total = np.zeros(state.terms.scalars, np.uint64)
    for message in state.masked.values():
        total += np.frombuffer(message.scalars, "<u8")
    prg.add_masks(total, unmasked.scalar_plus, unmasked.scalar_minus)
    return tuple(total.view(np.int64).tolist())


def check_sums(totals: Mapping[str, int], survivors: int, most: Mapping[str, int]) -> None:
    """Raise MaskingFailed for sums that no clients keeping to the rules can have: one of them sent garbage.

    Args:
        totals: The sums by name.
        survivors: Clients in them.
        most: What each client may have contributed at most, by name; the least is 0, but of "clients" it is 1, too.
    """
    for name, each in most.items():
        low, high = survivors * (name == "clients"), survivors * each
        if not low <= totals[name] <= high:
            raise MaskingFailed(
                f"the sum of '{name}' over {survivors} clients is {totals[name]}, which must be {low} to {high}: "
                "a client sent garbage, and nobody can tell which"
            )
