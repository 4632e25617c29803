"""One masked sum at the server: the clients' calls that wait, the sum of their vectors, and the clock, around a pure half that
decides everything: `seqfed.common.masking.server`, or `seqfed.common.homomorphic.server` (see `seqfed.server.encrypted`).

A vector is received into a file, like a plain update, and is added to the sum when its client's scalars and signature come:
from then on the client is in the sum. Nothing here outlives the daemon: after a restart the clients are asked anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

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
from seqfed.common.homomorphic.messages import Encrypted, Fetch, Opened, Piece, Ready
from seqfed.common.layout import Flat
from seqfed.common.loop import whole
from seqfed.common.masking import packing, prg, server
from seqfed.common.masking.agreed import (
    known_of,
    largest_weight,
    lattice_of,
    mechanism_of,
    part_of,
    rotation_seed,
    scalar_names,
    side_of,
)
from seqfed.common.masking.checks import check_advert
from seqfed.common.masking.messages import Advert, Confirm, KeyShares, MaskedInput, Opening
from seqfed.common.masking.server import Step
from seqfed.common.masking.terms import Purpose, Terms
from seqfed.common.masking.unmasking import check_sums, scalar_totals, unmasking
from seqfed.common.spec import RunSpec
from seqfed.common.wire_masking import Reply, Request
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


Hello = Advert | Ready  # a client's first message
Totals = tuple[NDArray[Any], Sequence[int]]  # the sum of the vectors, modulo 2^bits or more, and those of the scalars
Vectors = Mapping[tuple[str, Step], Vector]


class Way(Protocol):
    """How a sum is hidden, and how it comes to be known: `Masks`, or `seqfed.server.encrypted.Ciphertexts`.

    It has the pure half's state, None before `begin`.
    """

    @property
    def state(self) -> View | None: ...
    @property
    def names(self) -> tuple[str, ...]:
        """The roster's; empty before it has begun."""
        ...

    def greet(self, client: str, hello: Hello, others: Mapping[str, Hello]) -> None:
        """Raise what is wrong with a client's first message, beside those of others."""
        ...

    def begin(self, hellos: Mapping[str, Hello]) -> tuple[server.Effect, ...]:
        """Begin with these clients; raises MaskingFailed."""
        ...

    def event(self, client: str, message: Request) -> Any:
        """The pure half's event that this message is; raises MaskingRefused if it is none."""
        ...

    def on(self, event: Any, *, trying: bool = False) -> tuple[server.Effect, ...]:
        """Take an event of the pure half; raises what is wrong with it. trying: and do no more than that."""
        ...

    def answer(self, client: str) -> Reply | None:
        """The reply to the client's last message, None if it is not due yet; raises MaskingFailed, what is wrong with the
        client.
        """
        ...

    def refuse(self, client: str) -> None:
        """Raise what is wrong with a client without which it has begun, if anything is."""
        ...

    def fetch(self, client: str, start: int) -> Piece:
        """Some of the sum, for a client that is to open it; raises WrongRound for any other."""
        ...

    def due(self, client: str) -> Step | None:
        """The step for which a vector of this client is awaited, if any is."""
        ...

    def vector_bytes(self, step: Step) -> int:
        """Of a vector of this step."""
        ...

    def fold(self, path: Path, *, back: bool = False) -> None:
        """Add a whole vector of the step MASKING to the sum, or take it out again. Raises MaskingRefused, OSError."""
        ...

    def open(self, vectors: Vectors) -> Totals | server.Fail:
        """What the sum comes to, once the pure half has finished."""
        ...


class View(Protocol):
    """What the two pure halves' states have in common."""

    @property
    def step(self) -> Step: ...
    @property
    def awaited(self) -> tuple[str, ...]: ...


class MaskedSum:
    """Made when a phase asks its clients, so that who is ready can say so; begun when the phase is over.

    way: how it is hidden. here: whether a client is connected. tell: hears of the end.
    size: numbers of an update. Of a private run, target: what the sum is divided by; noise: key and tree round of what the
    server adds, None if nothing.
    """

    def __init__(
        self,
        spec: RunSpec,
        terms: Terms,
        way: Way,
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
        self._way, self._here, self._tell = way, here, tell
        self._size, self._target, self._noise = size, target, noise
        self._away_s = AWAY_S + 2 * spread_s
        self._adverts: dict[str, Hello] = {}
        self._changed = asyncio.Event()  # replaced at every change
        self._over = ""  # why no call is answered any more
        self._timers: list[asyncio.TimerHandle] = []
        self._work: asyncio.Future[None] | None = None
        self._folding = asyncio.Lock()
        self._vectors: dict[tuple[str, Step], Vector] = {}  # by client, and the step that it is of
        self._folded: set[str] = set()
        self._delivered = False  # who knows who has shared may send its input, and has noted it before that comes
        self.tally: dict[str, int] = {}  # the sums of the scalars, once they are known
        self.change: Flat | None = None  # the weighted mean of the updates, likewise
        self.known = b""  # what it tells of how the next one is made, where that matters

    @property
    def step(self) -> str:
        """What it is at, in a word; empty before it has begun."""
        state = self._way.state
        return "" if state is None else state.step.name.lower()

    @property
    def names(self) -> tuple[str, ...]:
        """The roster's; empty before it has begun."""
        return self._way.names

    @property
    def seconds(self) -> float:
        """The slowest client's training."""
        return max((one.training_seconds for one in self._vectors.values()), default=0.0)

    # What clients say -------------------------------------------------------------------------------------------------

    def advert(self, client: str, advert: Hello) -> None:
        """Take a client's keys; until the sum has begun, newer ones take the place of older ones.

        Raises MaskingRefused or what `trust` does, WrongRound if it has begun without this client, DuplicateUpdate if with
        other keys.
        """
        self._require_open()
        if self._way.state is not None:
            if client not in self.names:
                self._way.refuse(client)
                raise WrongRound(f"masked sum {self.terms.number} has begun without client '{client}'")
            if self._adverts[client] != advert:
                raise DuplicateUpdate(
                    f"client '{client}' has already sent other keys for masked sum {self.terms.number}"
                )
            return
        if self._adverts.get(client) != advert:
            self._way.greet(client, advert, {name: one for name, one in self._adverts.items() if name != client})
            self._adverts[client] = advert

    async def say(self, client: str, message: Request) -> Reply:
        """Take a client's message and wait for the answer to it.

        Raises what is wrong with it; WrongRound if the sum is over for this client.
        """
        if isinstance(message, Fetch):
            self._require_open()
            return await asyncio.to_thread(self._way.fetch, client, message.start)
        if isinstance(message, Advert | Ready):
            self.advert(client, message)
        elif isinstance(message, MaskedInput | Encrypted):
            await self._take_input(client, message)
        else:
            if isinstance(message, Opened) and self.terms.dim:
                self._require_sent(client, Step.OPENING, message.digest)
            self._take(self._way.event(client, message))
        while True:
            self._require_open()
            if self._way.state is not None:
                try:
                    reply = self._way.answer(client)
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
        known = [one for (name, _), one in self._vectors.items() if name == client]
        if any(one.digest == digest for one in known):
            return False
        due = self._way.due(client)
        if (client, due) in self._vectors or (known and due is None):
            raise DuplicateUpdate(f"client '{client}' has already sent another vector for masked sum {number}")
        if due is None:
            raise WrongRound(f"masked sum {number} takes no vector of client '{client}' now")
        return True

    def received(self, client: str, vector: Vector) -> None:
        """A client's vector is whole. Precondition: it was expected, and nothing has happened since."""
        due = self._way.due(client)
        assert due is not None
        self._vectors.setdefault((client, due), vector)

    def left_over(self, client: str, path: Path) -> None:
        """Remove a vector's file unless it is one that is still of use."""
        known = any(one.path == path for (name, _), one in self._vectors.items() if name == client)
        folded = client in self._folded and path == self._vectors[client, Step.MASKING].path
        if self._over or not known or folded:
            _remove(path)

    def vector_bytes(self, client: str) -> int:
        """Of the vector that is awaited of this client. Precondition: it is expected."""
        due = self._way.due(client)
        assert due is not None
        return self._way.vector_bytes(due)

    async def _take_input(self, client: str, message: MaskedInput | Encrypted) -> None:
        event = self._way.event(client, message)
        if not self._way.vector_bytes(Step.MASKING):
            self._take(event)
            return
        async with self._folding:
            self._require_open()
            if client in self._folded:
                self._take(event)
                return
            self._require_begun()
            self._way.on(event, trying=True)
            await whole(self._count(client, event, self._require_sent(client, Step.MASKING, message.digest).path))

    def _require_sent(self, client: str, step: Step, digest: bytes) -> Vector:
        vector = self._vectors.get((client, step))
        if vector is None or vector.digest != digest:
            raise MaskingRefused(f"client '{client}' speaks of a vector that it has not sent")
        return vector

    async def _count(self, client: str, event: Any, path: Path) -> None:
        """Add the vector to the sum, and have its client in it; all of that or nothing, whoever breaks the call off."""
        try:
            await asyncio.to_thread(self._way.fold, path)
            try:
                self._take(event)
            except SeqfedError:  # its step has ended meanwhile
                await asyncio.to_thread(self._way.fold, path, back=True)
                raise
        except OSError as error:  # some of it may be in the sum
            broken = storage_error(error, "adding up masked vectors")
            self._end(MaskingEnded(self.terms.number, str(broken)))
            raise broken from error
        self._folded.add(client)
        _remove(path)

    # The course -------------------------------------------------------------------------------------------------------

    def begin(self, clients: tuple[str, ...]) -> None:
        """Begin with these, who are all ready."""
        try:
            effects = self._way.begin({name: self._adverts[name] for name in clients})
        except (MaskingFailed, KeyError) as error:
            self._end(MaskingEnded(self.terms.number, str(error)))
            return
        self._perform(effects)
        self._tell_all()

    def leave(self, client: str, why: str) -> None:
        """This client does no more."""
        if self._way.state is not None and not self._over:
            self._take(server.Left(client, why))

    def away(self, client: str) -> None:
        """This client has lost its connection."""

        def gone() -> None:
            if not self._here(client):
                self.leave(client, "it lost its connection")

        if self._way.state is not None and client in self._way.state.awaited:
            self._timers.append(asyncio.get_running_loop().call_later(self._away_s, gone))

    def close(self, why: str = "") -> None:
        """Answer no more."""
        self._over = self._over or why or f"masked sum {self.terms.number} is over"
        for timer in self._timers:
            timer.cancel()
        for vector in self._vectors.values():
            _remove(vector.path)
        self._tell_all()

    def _require_begun(self) -> View:
        if self._way.state is None:
            raise WrongRound(f"masked sum {self.terms.number} has not begun")
        return self._way.state

    def _require_open(self) -> None:
        if self._over:
            raise WrongRound(self._over)

    def _take(self, event: Any) -> None:
        self._require_open()
        self._require_begun()
        self._perform(self._way.on(event))

    def _perform(self, effects: tuple[server.Effect, ...]) -> None:
        for effect in effects:
            match effect:
                case server.Answer():
                    self._tell_all()
                case server.StartStep(step, clients):
                    self._delivered = self._delivered or step is not Step.SHARING
                    later = asyncio.get_running_loop().call_later
                    self._timers.append(later(self._spec.privacy.step_s, self._late, step, clients))
                    for client in clients or self._require_begun().awaited:
                        if not self._here(client):
                            self.away(client)
                case server.Finish(survivors):
                    self._work = asyncio.ensure_future(self._finish(survivors))
                case server.Fail(why, missed):
                    self._end(MaskingEnded(self.terms.number, why, missed))

    def _late(self, step: Step, clients: tuple[str, ...]) -> None:
        if not self._over:
            self._take(server.StepDeadline(step, clients))

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

    async def _finish(self, survivors: tuple[str, ...]) -> None:
        number = self.terms.number
        try:
            async with self._folding:  # a vector that came too late is still being taken out again
                failed = await asyncio.to_thread(self._open, survivors)
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

    def _decoded(self, total: NDArray[Any], clients: int, weight: int, most: int) -> Flat:
        """What the opened sum of the vectors says of the model; with noise, if the server is to add it."""
        seed, mechanism = rotation_seed(self._spec, self.terms.round), mechanism_of(self._spec, self.terms)
        part = part_of(self._spec, self.terms, self._size)
        if part is not None:
            return self._decoded_part(total, part, seed, clients=clients, weight=weight, most=most)
        if mechanism is None:
            lattice = lattice_of(self._spec, self.terms)
            found = quantising.decode(total, lattice, seed, clients=clients, weight=weight, max_weight=most)
            side = side_of(self._spec, self.terms)
            if side is None:
                return found
            self.known = found[: side.factor].astype("<f4", copy=False).tobytes()
            return side.rebuild(found)
        if self._noise is None:
            return skellam.decode(total, mechanism, seed, clients=clients, target=self._target)
        multiplier = accounting.noise_multiplier(self._spec)
        assert multiplier is not None
        key, tree_round = self._noise
        return private.decode(
            total,
            mechanism,
            seed,
            clients=clients,
            target=self._target,
            multiplier=multiplier,
            key=key,
            tree_round=tree_round,
        )

    def _decoded_part(
        self, total: NDArray[Any], part: rotsub.Part, seed: int, *, clients: int, weight: int, most: int
    ) -> Flat:
        """The same of a part. A sum for which the step was too small leaves the model as it is, and makes the next one larger: of
        the same updates nobody gives another.
        """
        n_max = self.terms.n_max
        try:
            change = rotsub.decode(total, part, seed, clients=clients, weight=weight, max_weight=most)
        except MaskingFailed as error:
            if not part.wrap:
                raise
            log.warning("masked sum %d: %s; the model stays as it is", self.terms.number, error)
            self.known = known_of(2 * rotsub.tuned_for(part, n_max), n_max)
            return np.zeros(self._size, np.float32)
        if part.wrap:
            self.known = known_of(rotsub.deviation_of(total, part, clients), n_max)
        return change

    def _open(self, survivors: tuple[str, ...]) -> server.Fail | None:
        """Have both sums, and see that they can be sums of what they should be."""
        found = self._way.open(self._vectors)
        if isinstance(found, server.Fail):
            return found
        total, scalars = found
        tally = dict(zip(scalar_names(self._spec, self.terms.purpose), scalars, strict=True))
        if self.terms.purpose is Purpose.TRAIN:
            count, most, weight = len(survivors), largest_weight(self._spec), tally["weight"]
            check_sums(tally, count, {"weight": most, "clipped": 1, "clients": 1})
            if weight < count:
                raise MaskingFailed(f"{count} clients are in the sum, and their weights are {weight} together")
            self.change = self._decoded(total, count, weight, most)
        self.tally = tally
        return None


class Masks:
    """Masks that cancel out in the sum (`seqfed.common.masking`).

    trust: raises what is wrong with whom an advert says it is of.
    """

    def __init__(self, terms: Terms, trust: Callable[[Advert], None]) -> None:
        self._terms, self._trust = terms, trust
        self._total = np.zeros(terms.dim, terms.dtype)
        self.state: server.State | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return () if self.state is None else self.state.roster.names

    def greet(self, client: str, hello: Hello, others: Mapping[str, Hello]) -> None:
        if not isinstance(hello, Advert):
            raise MaskingRefused(
                f"client '{client}' encrypts for a masked sum; run the same version of seqfed on both sides"
            )
        if hello.client != client:
            raise MaskingRefused(f"client '{client}' sent the keys of '{hello.client[:64]}'")
        check_advert(self._terms, hello, self._trust)
        own = {hello.encryption_key, hello.mask_key, hello.identity_key}
        for one in others.values():
            if isinstance(one, Advert) and own & {one.encryption_key, one.mask_key, one.identity_key}:
                raise MaskingRefused(f"client '{client}' advertises a key that another client has")

    def begin(self, hellos: Mapping[str, Hello]) -> tuple[server.Effect, ...]:
        self.state = server.begin(self._terms, [one for one in hellos.values() if isinstance(one, Advert)])
        return (server.StartStep(self.state.step),)

    def event(self, client: str, message: Request) -> server.Event:
        match message:
            case KeyShares():
                return server.Shared(client, message)
            case MaskedInput():
                return server.Masked(client, message)
            case Confirm():
                return server.Confirming(client, message)
            case Opening():
                return server.Opened(client, message)
            case _:
                raise MaskingRefused(f"client '{client}': a {type(message).__name__} is nothing to a masked sum")

    def on(self, event: server.Event, *, trying: bool = False) -> tuple[server.Effect, ...]:
        assert self.state is not None
        state, effects = server.on(self.state, event)
        if trying:
            return ()
        self.state = state
        return effects

    def answer(self, client: str) -> Reply | None:
        assert self.state is not None
        return server.answer(self.state, client)

    def refuse(self, client: str) -> None:
        """Nothing is: it came too late."""

    def fetch(self, client: str, start: int) -> Piece:
        raise WrongRound(
            f"masked sum {self._terms.number} shows itself to no client, so not to '{client}' from {start} on"
        )

    def due(self, client: str) -> Step | None:
        state = self.state
        return Step.MASKING if state is not None and state.step is Step.MASKING and client in state.members else None

    def vector_bytes(self, step: Step) -> int:
        return packing.packed_bytes(self._terms.dim, self._terms.bits) if step is Step.MASKING else 0

    def fold(self, path: Path, *, back: bool = False) -> None:
        start, into, terms = 0, np.subtract if back else np.add, self._terms
        with path.open("rb", buffering=0) as file:
            while start < terms.dim:
                count = min(PIECE, terms.dim - start)
                data = file.read(packing.packed_bytes(count, terms.bits))
                part = self._total[start : start + count]
                into(part, packing.unpack(data, terms.bits, count, terms.dtype), out=part)
                start += count

    def open(self, vectors: Vectors) -> Totals | server.Fail:
        """Take the masks off both sums."""
        assert self.state is not None
        found = unmasking(self.state)
        if isinstance(found, server.Fail):
            return found
        for holder, owner in found.disputes:
            log.warning(
                "masked sum %d: client '%s' holds another share of '%s' than that one has committed to",
                self._terms.number,
                holder,
                owner,
            )
        prg.threads(self._total, found.plus, found.minus, os.cpu_count() or 1)
        return self._total, scalar_totals(self.state, found)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
