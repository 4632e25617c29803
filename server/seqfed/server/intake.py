"""Updates on their way in: each is received into a file in pieces, checked while it comes, and kept at a break.

Nothing of an update is held in memory beyond a chunk, and nothing of it counts before all of it has been checked. A chunk is
taken on the event loop itself, in a third of a millisecond: handing each to a thread and back took more than the work.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import numpy as np

from seqfed.common.errors import (
    BrokenTransfer,
    LayoutMismatch,
    Overloaded,
    RateLimited,
    TooLarge,
    UpdateOutOfRange,
    storage_error,
)
from seqfed.common.layout import BYTES_PER_PARAMETER, Layout
from seqfed.common.loop import whole
from seqfed.common.metrics import TRAINED
from seqfed.common.spec import AggregationSpec
from seqfed.common.transfer import Reassembly
from seqfed.common.views import UpdateHeader
from seqfed.server import fedavg
from seqfed.server.payloads import Packing

MAX_TOTAL: Final = 1 << 62  # of a cohort's tallies: they travel on as 64-bit integers
UNBOUNDED: Final = AggregationSpec()
MIN_CHUNK_BYTES: Final = 4 << 10  # but for the last one; smaller ones would cost more than they bring
_GIVEN_UP: Final = "this upload was given up: its round is over, or another one took its place"


@dataclass(frozen=True)
class Patience:
    """How slow an upload may be: seconds without a chunk, and bytes a second over so many seconds; 0: any."""

    stall_s: float
    bytes_per_s: int = 0


class Part:
    """An update that is not complete yet. packing: what its bytes are a payload of, if they are."""

    def __init__(self, header: UpdateHeader, path: Path, rule: AggregationSpec, packing: Packing | None = None) -> None:
        self.header = header
        self.path = path
        self._packing = packing
        self.reassembly = Reassembly(header.nbytes, header.digest, self._sink)
        self.highest = 0.0  # max |delta| so far
        self._clip, self._bound = rule.clips_at, rule.refuses_above
        self._norm = self._new_norm()
        self._masked = header.masked_number > 0  # then it looks like noise, and any would
        self.lock = asyncio.Lock()
        self.dropped = False
        self.placed: Path | None = None  # where the whole of it lies
        self.done = False
        self._file: IO[bytes] | None = None

    def _new_norm(self) -> fedavg.Norm | None:
        return None if self._bound is None else fedavg.Norm()

    def expect(self, offset: int) -> None:
        """Raise BrokenTransfer unless the upload goes on at this byte."""
        if self.dropped:
            raise BrokenTransfer(_GIVEN_UP)
        if offset != self.reassembly.received:
            raise BrokenTransfer(f"byte {self.reassembly.received:,} is next, the upload began at {offset:,}")

    def take(self, offset: int, data: bytes, weight: int, cohort: int, final: Path) -> None:
        """Add the next chunk; after the last one check the whole and put it in place. Raises what is wrong.

        Of a payload, which takes longer than a chunk to check, that is left to `unpack` and `finish`.
        """
        if self.dropped:
            raise BrokenTransfer(_GIVEN_UP)
        require_size(self.reassembly, data)
        self.reassembly.add(offset, data)
        if self.packed:
            return
        if self.reassembly.received == self.header.nbytes:
            self.finish(weight, cohort, final)

    @property
    def packed(self) -> bool:
        """Whether it is a payload that has yet to be checked."""
        return self._packing is not None and not self.done

    def unpack(self) -> None:
        """Look at all the numbers that a whole payload stands for; raises what is wrong with them."""
        assert self._packing is not None
        self.reassembly.finish()
        highest, norm = 0.0, self._new_norm()
        for numbers in self._packing.parts(self.path):
            highest = max(highest, fedavg.peak(numbers))
            if norm is not None:
                norm.add(numbers)
        self.highest, self._norm = highest, norm

    def _sink(self, _: int, data: bytes) -> None:
        if not self._masked and self._packing is None:
            self._look(data)
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("xb", buffering=0)
            self._file.write(data)
        except OSError as error:
            raise storage_error(error, "receiving an update") from error

    def _look(self, data: bytes) -> None:
        if len(data) % BYTES_PER_PARAMETER:
            raise BrokenTransfer(f"a chunk has {len(data):,} bytes, not whole float32 numbers")
        numbers = np.frombuffer(data, "<f4")
        self.highest = max(self.highest, fedavg.peak(numbers))
        if self._norm is not None:
            self._norm.add(numbers)

    def finish(self, weight: int, cohort: int, final: Path) -> None:
        """Check the whole and put it in place."""
        self.reassembly.finish()
        self.check(weight, cohort)
        assert self._file is not None  # a layout has at least one parameter, so at least one chunk came
        try:
            self.close()
            self.path.replace(final)
            self.placed = final
        except OSError as error:
            raise storage_error(error, "keeping an update") from error
        self.done = True

    def check(self, weight: int, cohort: int) -> None:
        """Raise UpdateOutOfRange unless the whole update, so weighted and scaled to the run's norm, fits its sum."""
        if self._masked:
            return
        if self._norm is not None and self._bound is not None and self._norm.value > self._bound:
            raise UpdateOutOfRange(
                f"an update has the norm {self._norm.value:.6g}; the run takes {self._bound:.6g} at most "
                "(aggregation.max_norm); lower the learning rate, or train for fewer steps"
            )
        fedavg.check(weight, self.highest if self._clip is None else min(self.highest, self._clip), cohort)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def drop(self) -> None:
        """Give the upload up; what has come is removed at once, or by whoever is at it when that is done."""
        self.dropped = True
        if not self.lock.locked():
            self.remove()
            if self.placed is not None:  # whole, and its call cut off before it counted
                with contextlib.suppress(OSError):
                    self.placed.unlink(missing_ok=True)

    def remove(self) -> None:
        self.close()
        with contextlib.suppress(OSError):  # a leftover that cannot be removed goes with its round's folder
            self.path.unlink(missing_ok=True)


class Intake:
    """The incomplete updates of all clients, at most `in_flight` of them moving at the same time.

    One that is slower than `patience` has it is broken off, as by a lost connection: it keeps others waiting, of which there
    are at most `waiting`. One client has at most `each`, so that it cannot take all places.
    """

    def __init__(self, in_flight: int, waiting: int, patience: Patience, each: int = 4) -> None:
        self._moving = asyncio.Semaphore(in_flight)
        self._patience = patience
        self._each = each
        self._of: Counter[str] = Counter()  # uploads that move or wait, by client
        self._most = in_flight + waiting
        self._here = 0  # uploads that move or wait
        # In the names of parts: a daemon that has lost its lease unawares may still be writing beside this one.
        self._own = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self._parts: dict[tuple[str, str], Part] = {}  # by (run, client): a client works on one update at a time

    def received(self, client: str, run: str, digest: bytes) -> int:
        """Bytes already here of the update with this BLAKE3 digest; 0 if there are none."""
        part = self._parts.get((run, client))
        return part.reassembly.received if part is not None and part.header.digest == digest else 0

    async def receive(
        self,
        client: str,
        header: UpdateHeader,
        layout: Layout,
        weight: int,
        cohort: int,
        final: Path,
        chunks: AsyncIterator[tuple[int, bytes]],
        meter: Callable[[int], None],
        rule: AggregationSpec = UNBOUNDED,
        vector_bytes: int = 0,
        packing: Packing | None = None,
    ) -> None:
        """Take the chunks of one update until it is whole, checked, and in its place, `final`.

        `weight`: what it will be folded with, as one of `cohort`. `meter` hears of the bytes of each chunk. `rule`: what
        the run allows an update. `vector_bytes`: of a masked vector, which comes instead; `packing`: of a payload, likewise.
        Raises the typed error for whatever is wrong, Overloaded if too many wait; after a mere break what has come is kept,
        after anything else it is dropped.
        """
        check_header(header, layout, cohort, vector_bytes, packing)
        if self._here >= self._most:
            raise Overloaded(f"{self._here:,} uploads wait for room (uploads_waiting); try again later")
        if self._of[client] >= self._each:
            raise RateLimited(
                f"client '{client}' has {self._each:,} uploads under way, the limit (uploads_per_client); broken ones end soon"
            )
        self._here += 1
        self._of[client] += 1
        try:
            part = self._continue((header.key.run, client), header, final, rule, packing)
            await self._receive((header.key.run, client), part, header.offset, weight, cohort, final, chunks, meter)
        finally:
            self._here -= 1
            self._of[client] -= 1
            if not self._of[client]:
                del self._of[client]

    async def _receive(
        self,
        place: tuple[str, str],
        part: Part,
        offset: int,
        weight: int,
        cohort: int,
        final: Path,
        chunks: AsyncIterator[tuple[int, bytes]],
        meter: Callable[[int], None],
    ) -> None:
        # In this order: while one stream of an update moves, a second one of it takes no place.
        async with part.lock, self._moving:
            try:
                if not part.done:  # it is if an earlier call was cut off between the last byte and its answer
                    part.expect(offset)
                    async for start, data in _unstalled(chunks, self._patience):
                        meter(len(data))
                        part.take(start, data, weight, cohort, final)
                if part.packed and part.reassembly.received == part.header.nbytes:
                    await whole(asyncio.to_thread(part.unpack))
                    part.expect(part.header.nbytes)  # unless it was given up meanwhile
                    part.finish(weight, cohort, final)
                if not part.done:
                    raise BrokenTransfer(
                        f"the stream ended at byte {part.reassembly.received:,} of {part.header.nbytes:,}; go on from there"
                    )
                part.check(weight, cohort)
            except (BrokenTransfer, asyncio.CancelledError):
                raise
            except BaseException:
                part.drop()
                raise
            finally:
                if part.dropped:
                    part.remove()
                    self._let_go(place, part)
            self._let_go(place, part)

    def _continue(
        self,
        place: tuple[str, str],
        header: UpdateHeader,
        final: Path,
        rule: AggregationSpec,
        packing: Packing | None,
    ) -> Part:
        part = self._parts.get(place)
        if part is None or part.header.digest != header.digest or part.header.key.round != header.key.round:
            if part is not None:
                part.drop()
            # one that is given up may still be at work on its own file, and reads it mapped: another never takes its name
            beside = final.with_name(f"{final.name}.{next(self._numbers)}.{self._own}.part")
            part = self._parts[place] = Part(header, beside, rule, packing)
        return part

    def _let_go(self, place: tuple[str, str], part: Part) -> None:
        if self._parts.get(place) is part:
            del self._parts[place]

    def forget(self, run: str, but: Collection[str] = ()) -> None:
        """Drop what is incomplete of this run, `but` of these clients: its round is over."""
        for place in [place for place in self._parts if place[0] == run and place[1] not in but]:
            self._parts.pop(place).drop()


async def _unstalled(chunks: AsyncIterator[tuple[int, bytes]], patience: Patience) -> AsyncIterator[tuple[int, bytes]]:
    """The chunks; raises BrokenTransfer when none comes for too long, or too little in all."""
    clock, stall_s = asyncio.get_running_loop().time, patience.stall_s
    began, came = clock(), 0
    while True:
        try:
            async with asyncio.timeout(stall_s):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise BrokenTransfer(
                f"nothing came for {stall_s:g} s; go on with the upload when the line carries it"
            ) from None
        came += len(chunk[1])
        if (passed := clock() - began) >= stall_s:
            if came < patience.bytes_per_s * passed:
                raise BrokenTransfer(
                    f"{came:,} bytes came in {passed:.1f} s, less than {patience.bytes_per_s:,} a second "
                    "(upload_bytes_per_s); go on with the upload when the line carries it"
                )
            began, came = clock(), 0
        yield chunk


def require_size(into: Reassembly, data: bytes) -> None:
    """Raise BrokenTransfer if this chunk is not worth its message: a billion of one byte would be a model too."""
    if len(data) < min(MIN_CHUNK_BYTES, into.total - into.received):
        raise BrokenTransfer(
            f"a chunk of {len(data):,} bytes came at byte {into.received:,} of {into.total:,}; "
            f"all but the last have {MIN_CHUNK_BYTES:,} at least"
        )


def check_header(
    header: UpdateHeader, layout: Layout, cohort: int, vector_bytes: int = 0, packing: Packing | None = None
) -> None:
    """Raise TooLarge, LayoutMismatch, MalformedPayload or UpdateOutOfRange unless an update so announced could be one of this
    layout.

    `vector_bytes`: of a masked vector, which comes instead of the update, and without its weight and tally. `packing`: of a
    payload, which comes instead, and is as long as it happens to be.
    """
    due = vector_bytes or layout.nbytes
    if packing is not None:
        packing.check_size(header.nbytes)
        due = header.nbytes
    if header.nbytes > due:
        raise TooLarge(f"an update of {header.nbytes:,} bytes came; one of this run has {due:,}")
    if header.layout_digest != layout.digest or header.nbytes != due:
        raise LayoutMismatch(
            f"the update's layout ({header.layout_digest.hex()[:12]}, {header.nbytes:,} bytes) is not the run's "
            f"({layout.digest.hex()[:12]}, {due:,} bytes); do both sides run the same version of seqfed?"
        )
    if vector_bytes:
        if header.weight or header.tally:
            raise UpdateOutOfRange("a masked vector came with a weight or a tally in the clear; those are masked, too")
    else:
        fedavg.check(header.weight, 0.0, 1)
        check_tally(header.tally, cohort, TRAINED)
    if not 0 <= header.training_seconds < math.inf:
        raise UpdateOutOfRange(f"an update took {header.training_seconds} s; it must be 0 s or more, and finite")


def check_tally(tally: Mapping[str, int], cohort: int, names: Collection[str]) -> None:
    """Raise UpdateOutOfRange unless `cohort` tallies like this one, of these names, can be added up and sent on."""
    limit = MAX_TOTAL // max(cohort, 1)
    for name, value in tally.items():
        if name not in names:
            raise UpdateOutOfRange(
                f"a tally has a sum {name[:64]!r}, which this run has not; do both sides run the same version of seqfed?"
            )
        if abs(value) > limit:
            raise UpdateOutOfRange(
                f"a tally's sum '{name}' is {value:,}; in a cohort of {cohort:,} it may be {limit:,} at most"
            )


async def receive_file(
    path: Path, total: int, digest: bytes, chunks: AsyncIterator[tuple[int, bytes]], patience: Patience
) -> None:
    """Receive a whole file; raises the typed error for whatever is wrong with it. The caller removes it."""
    with path.open("wb", buffering=0) as file:

        def sink(_: int, data: bytes) -> None:
            try:
                file.write(data)
            except OSError as error:
                raise storage_error(error, "receiving a checkpoint") from error

        reassembly = Reassembly(total, digest, sink)
        async for offset, data in _unstalled(chunks, patience):
            require_size(reassembly, data)
            reassembly.add(offset, data)
        reassembly.finish()
