"""One masked sum at the server: the clients' calls that wait, the sum of their vectors, and the clock, around the pure
`seqfed.common.masking.server`, which decides everything.

A vector is received into a file, like a plain update, and is added to the sum when its client's scalars and signature come:
from then on the client is in the sum. Nothing here outlives the daemon: after a restart the clients are asked anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from seqfed.common import quantising
from seqfed.common.compression import rotsub
from seqfed.common.dp import accounting, skellam
from seqfed.common.errors import (
    DuplicateUpdate,
    MaskingFailed,
    MaskingRefused,
    SeqfedError,
    WrongRound,
    storage_error,
)
from seqfed.common.layout import Flat
from seqfed.common.loop import whole
from seqfed.common.masking import packing, prg, server
from seqfed.common.masking.agreed import (
    largest_weight,
    lattice_of,
    mechanism_of,
    part_of,
    rotation_seed,
    scalar_names,
)
from seqfed.common.masking.checks import check_advert
from seqfed.common.masking.messages import Advert, Confirm, KeyShares, MaskedInput, Opening, Reply, Request
from seqfed.common.masking.server import Step
from seqfed.common.masking.terms import Purpose, Terms
from seqfed.common.masking.unmasking import check_sums, scalar_totals, unmasking
from seqfed.common.spec import RunSpec
from seqfed.server import private
from seqfed.server.round import MaskingEnded, Unmasked

log = logging.getLogger("seqfed.server")

AWAY_S: Final = 2.0  # and twice the clients' spread: so long has who lost its connection to come back
PIECE: Final = 1 << 18  # numbers unpacked at once


@dataclass(frozen=True, eq=False)
class Vector:
    """A client's masked vector in its file."""

    path: Path
    digest: bytes
    training_seconds: float


class MaskedSum:
    """Made when a phase asks its clients, so that who is ready can say so; begun when the phase is over.

    trust: raises what is wrong with whom an advert says it is of. here: whether a client is connected. tell: hears of the end.
    size: numbers of an update. Of a private run, target: what the sum is divided by; noise: key and tree round of what the
    server adds, None if nothing.
    """

    def __init__(
        self,
        spec: RunSpec,
        terms: Terms,
        trust: Callable[[Advert], None],
        here: Callable[[str], bool],
        tell: Callable[[Unmasked | MaskingEnded], None],
        *,
        size: int,
        target: int = 0,
        noise: tuple[bytes, int | None] | None = None,
        spread_s: float = 0.0,
    ) -> None:
        self.terms = terms
        self._spec = spec
        self._trust, self._here, self._tell = trust, here, tell
        self._size, self._target, self._noise = size, target, noise
        self._away_s = AWAY_S + 2 * spread_s
        self._adverts: dict[str, Advert] = {}
        self._state: server.State | None = None
        self._changed = asyncio.Event()  # replaced at every change
        self._over = ""  # why no call is answered any more
        self._timers: list[asyncio.TimerHandle] = []
        self._work: asyncio.Future[None] | None = None
        self._folding = asyncio.Lock()
        self._vectors: dict[str, Vector] = {}
        self._folded: set[str] = set()
        self._delivered = False  # who knows who has shared may send its input, and has noted it before that comes
        self._total = np.zeros(terms.dim, terms.dtype)
        self.tally: dict[str, int] = {}  # the sums of the scalars, once they are known
        self.change: Flat | None = None  # the weighted mean of the updates, likewise

    @property
    def step(self) -> str:
        """What it is at, in a word; empty before it has begun."""
        return "" if self._state is None else self._state.step.name.lower()

    @property
    def names(self) -> tuple[str, ...]:
        """The roster's; empty before it has begun."""
        return () if self._state is None else self._state.roster.names

    @property
    def seconds(self) -> float:
        """The slowest client's training."""
        return max((one.training_seconds for one in self._vectors.values()), default=0.0)

    # What clients say -------------------------------------------------------------------------------------------------

    def advert(self, client: str, advert: Advert) -> None:
        """Take a client's keys; until the sum has begun, newer ones take the place of older ones.

        Raises MaskingRefused or what `trust` does, WrongRound if it has begun without this client, DuplicateUpdate if with
        other keys.
        """
        self._require_open()
        if advert.client != client:
            raise MaskingRefused(f"client '{client}' sent the keys of '{advert.client[:64]}'")
        if self._state is not None:
            if client not in self._state.roster:
                raise WrongRound(f"masked sum {self.terms.number} has begun without client '{client}'")
            if self._adverts[client] != advert:
                raise DuplicateUpdate(
                    f"client '{client}' has already sent other keys for masked sum {self.terms.number}"
                )
            return
        if self._adverts.get(client) != advert:
            check_advert(self.terms, advert, self._trust)
            own = {advert.encryption_key, advert.mask_key, advert.identity_key}
            others = (one for name, one in self._adverts.items() if name != client)
            if any(own & {one.encryption_key, one.mask_key, one.identity_key} for one in others):
                raise MaskingRefused(f"client '{client}' advertises a key that another client has")
            self._adverts[client] = advert

    async def say(self, client: str, message: Request) -> Reply:
        """Take a client's message and wait for the answer to it.

        Raises what is wrong with it; WrongRound if the sum is over for this client.
        """
        if isinstance(message, Advert):
            self.advert(client, message)
        elif isinstance(message, MaskedInput):
            await self._take_input(client, message)
        else:
            self._take(_event(client, message))
        while True:
            self._require_open()
            if self._state is not None:
                try:
                    reply = server.answer(self._state, client)
                except MaskingFailed as error:
                    raise WrongRound(str(error)) from None
                if reply is not None:
                    return reply
            await self._changed.wait()

    def expects(self, client: str, number: int, digest: bytes) -> bool:
        """Whether this client's vector is to come; False if just this one is here. Raises WrongRound or DuplicateUpdate."""
        self._require_open()
        if number != self.terms.number:
            raise WrongRound(f"masked sum {number} is over; {self.terms.number} is under way")
        known = self._vectors.get(client)
        if known is not None and known.digest != digest:
            raise DuplicateUpdate(f"client '{client}' has already sent another vector for masked sum {number}")
        if known is not None:
            return False
        if self._state is None or self._state.step is not Step.MASKING or client not in self._state.members:
            raise WrongRound(f"masked sum {number} takes no vector of client '{client}' now")
        return True

    def received(self, client: str, vector: Vector) -> None:
        """A client's vector is whole."""
        self._vectors.setdefault(client, vector)

    def left_over(self, client: str, path: Path) -> None:
        """Remove a vector's file unless it is the one that is still to be added."""
        known = self._vectors.get(client)
        if self._over or known is None or known.path != path or client in self._folded:
            _remove(path)

    @property
    def vector_bytes(self) -> int:
        return packing.packed_bytes(self.terms.dim, self.terms.bits)

    async def _take_input(self, client: str, message: MaskedInput) -> None:
        if not self.terms.dim:
            self._take(server.Masked(client, message))
            return
        async with self._folding:
            if client in self._folded:
                self._take(server.Masked(client, message))
                return
            vector = self._vectors.get(client)
            server.on(self._begun(), server.Masked(client, message))  # raises what is wrong with it
            if vector is None or vector.digest != message.digest:
                raise MaskingRefused(f"client '{client}' speaks of a vector that it has not sent")
            await whole(self._count(client, message, vector.path))

    async def _count(self, client: str, message: MaskedInput, path: Path) -> None:
        """Add the vector to the sum, and have its client in it; all of that or nothing, whoever breaks the call off."""
        try:
            await asyncio.to_thread(self._fold, path, np.add)
            try:
                self._take(server.Masked(client, message))
            except SeqfedError:  # its step has ended meanwhile
                await asyncio.to_thread(self._fold, path, np.subtract)
                raise
        except OSError as error:  # some of it may be in the sum
            broken = storage_error(error, "adding up masked vectors")
            self._end(MaskingEnded(self.terms.number, str(broken)))
            raise broken from error
        self._folded.add(client)
        _remove(path)

    def _fold(self, path: Path, into: np.ufunc) -> None:
        start = 0
        with path.open("rb", buffering=0) as file:
            while start < self.terms.dim:
                count = min(PIECE, self.terms.dim - start)
                data = file.read(packing.packed_bytes(count, self.terms.bits))
                part = self._total[start : start + count]
                into(part, packing.unpack(data, self.terms.bits, count, self.terms.dtype), out=part)
                start += count

    # The course -------------------------------------------------------------------------------------------------------

    def begin(self, clients: tuple[str, ...]) -> None:
        """Begin with these, who are all ready."""
        try:
            self._state = server.begin(self.terms, [self._adverts[name] for name in clients])
        except (MaskingFailed, KeyError) as error:
            self._end(MaskingEnded(self.terms.number, str(error)))
            return
        self._perform((server.StartStep(self._state.step),))
        self._tell_all()

    def leave(self, client: str, why: str) -> None:
        """This client does no more."""
        if self._state is not None and not self._over:
            self._take(server.Left(client, why))

    def away(self, client: str) -> None:
        """This client has lost its connection."""

        def gone() -> None:
            if not self._here(client):
                self.leave(client, "it lost its connection")

        if self._state is not None and client in self._state.awaited:
            self._timers.append(asyncio.get_running_loop().call_later(self._away_s, gone))

    def close(self, why: str = "") -> None:
        """Answer no more."""
        self._over = self._over or why or f"masked sum {self.terms.number} is over"
        for timer in self._timers:
            timer.cancel()
        for vector in self._vectors.values():
            _remove(vector.path)
        self._tell_all()

    def _begun(self) -> server.State:
        if self._state is None:
            raise WrongRound(f"masked sum {self.terms.number} has not begun")
        return self._state

    def _require_open(self) -> None:
        if self._over:
            raise WrongRound(self._over)

    def _take(self, event: server.Event) -> None:
        self._require_open()
        self._state, effects = server.on(self._begun(), event)
        self._perform(effects)

    def _perform(self, effects: tuple[server.Effect, ...]) -> None:
        for effect in effects:
            match effect:
                case server.Answer():
                    self._tell_all()
                case server.StartStep(step):
                    self._delivered = self._delivered or step is not Step.SHARING
                    later = asyncio.get_running_loop().call_later
                    self._timers.append(later(self._spec.privacy.step_s, self._late, step))
                    for client in self._begun().awaited:
                        if not self._here(client):
                            self.away(client)
                case server.Finish(survivors):
                    self._work = asyncio.ensure_future(self._finish(self._begun(), survivors))
                case server.Fail(why, missed):
                    self._end(MaskingEnded(self.terms.number, why, missed))

    def _late(self, step: Step) -> None:
        if not self._over:
            self._take(server.StepDeadline(step))

    def _tell_all(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _end(self, event: Unmasked | MaskingEnded) -> None:
        if self._over:
            return
        if isinstance(event, MaskingEnded):
            event = replace(event, given=self._delivered)
            self.close(f"masked sum {self.terms.number} came to nothing: {event.why}")
        self._tell(event)

    async def _finish(self, state: server.State, survivors: tuple[str, ...]) -> None:
        number = self.terms.number
        try:
            async with self._folding:  # a vector that came too late is still being taken out again
                failed = await asyncio.to_thread(self._open, state, survivors)
        except SeqfedError as error:
            self._end(MaskingEnded(number, str(error)))
        except Exception:  # the run goes on with the next attempt
            log.exception("masked sum %d could not be opened", number)
            self._end(MaskingEnded(number, "internal error; see the log"))
        else:
            if failed is not None:
                self._end(MaskingEnded(number, failed.why, failed.missed))
            else:
                self._end(Unmasked(number, survivors, tuple(sorted(self.tally.items()))))

    def _decoded(self, clients: int, weight: int, most: int) -> Flat:
        """What the opened sum of the vectors says of the model; with noise, if the server is to add it."""
        seed, mechanism = rotation_seed(self._spec, self.terms.round), mechanism_of(self._spec, self.terms)
        part = part_of(self._spec, self.terms, self._size)
        if part is not None:
            return rotsub.decode(self._total, part, seed, clients=clients, weight=weight, max_weight=most)
        if mechanism is None:
            lattice = lattice_of(self._spec, self.terms)
            return quantising.decode(self._total, lattice, seed, clients=clients, weight=weight, max_weight=most)
        if self._noise is None:
            return skellam.decode(self._total, mechanism, seed, clients=clients, target=self._target)
        multiplier = accounting.noise_multiplier(self._spec)
        assert multiplier is not None
        key, tree_round = self._noise
        return private.decode(
            self._total,
            mechanism,
            seed,
            clients=clients,
            target=self._target,
            multiplier=multiplier,
            key=key,
            tree_round=tree_round,
        )

    def _open(self, state: server.State, survivors: tuple[str, ...]) -> server.Fail | None:
        """Take the masks off both sums, and see that they can be sums of what they should be."""
        found = unmasking(state)
        if isinstance(found, server.Fail):
            return found
        for holder, owner in found.disputes:
            log.warning(
                "masked sum %d: client '%s' holds another share of '%s' than that one has committed to",
                self.terms.number,
                holder,
                owner,
            )
        names = scalar_names(self._spec, self.terms.purpose)
        tally = dict(zip(names, scalar_totals(state, found), strict=True))
        if self.terms.purpose is Purpose.TRAIN:
            count, most, weight = len(survivors), largest_weight(self._spec), tally["weight"]
            check_sums(tally, count, {"weight": most, "clipped": 1, "clients": 1})
            if weight < count:
                raise MaskingFailed(f"{count} clients are in the sum, and their weights are {weight} together")
            prg.threads(self._total, found.plus, found.minus, os.cpu_count() or 1)
            self.change = self._decoded(count, weight, most)
        self.tally = tally
        return None


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _event(client: str, message: KeyShares | Confirm | Opening) -> server.Event:
    match message:
        case KeyShares():
            return server.Shared(client, message)
        case Confirm():
            return server.Confirming(client, message)
        case Opening():
            return server.Opened(client, message)
