"""Updates on their way in: each is received into a file in pieces, checked while it comes, and kept at a break.

Nothing of an update is held in memory beyond a chunk, and nothing of it counts before all of it has been checked.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO

import numpy as np

from seqfed.common.errors import BrokenTransfer, LayoutMismatch, TooLarge, storage_error
from seqfed.common.layout import BYTES_PER_PARAMETER, Layout
from seqfed.common.transfer import Reassembly
from seqfed.common.views import UpdateHeader
from seqfed.server import fedavg


class Part:
    """An update that is not complete yet."""

    def __init__(self, header: UpdateHeader, path: Path) -> None:
        self.header = header
        self.path = path
        self.reassembly = Reassembly(header.nbytes, header.sha256, self._sink)
        self.highest = 0.0  # max |delta| so far
        self.lock = asyncio.Lock()
        self.dropped = False
        self.done = False
        self._file: IO[bytes] | None = None

    def take(self, offset: int, data: bytes, cohort: int, final: Path) -> None:
        """Add the next chunk; after the last one check the whole and put it in place, durably. Raises what is wrong."""
        self.reassembly.add(offset, data)
        if self.reassembly.received == self.header.nbytes:
            self._finish(cohort, final)
            self.done = True

    def _sink(self, _: int, data: bytes) -> None:
        if self.dropped:
            raise BrokenTransfer("this upload was given up: its round is over, or another one took its place")
        if len(data) % BYTES_PER_PARAMETER:
            raise BrokenTransfer(f"a chunk has {len(data):,} bytes, not whole float32 numbers")
        self.highest = max(self.highest, fedavg.peak(np.frombuffer(data, "<f4")))
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("wb", buffering=0)
            self._file.write(data)
        except OSError as error:
            raise storage_error(error, "receiving an update") from error

    def _finish(self, cohort: int, final: Path) -> None:
        self.reassembly.finish()
        fedavg.check(self.header.weight, self.highest, cohort)
        assert self._file is not None  # a layout has at least one parameter, so at least one chunk came
        try:
            os.fsync(self._file.fileno())
            self.close()
            self.path.replace(final)
        except OSError as error:
            raise storage_error(error, "keeping an update") from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Intake:
    """The incomplete updates of all clients, at most `in_flight` of them moving at the same time."""

    def __init__(self, in_flight: int) -> None:
        self._moving = asyncio.Semaphore(in_flight)
        self._parts: dict[tuple[str, str], Part] = {}  # by (run, client): a client works on one update at a time

    def received(self, client: str, run: str, sha256: bytes) -> int:
        """Bytes already here of the update with this SHA-256; 0 if there are none."""
        part = self._parts.get((run, client))
        return part.reassembly.received if part is not None and part.header.sha256 == sha256 else 0

    async def receive(
        self,
        client: str,
        header: UpdateHeader,
        layout: Layout,
        cohort: int,
        final: Path,
        chunks: AsyncIterator[tuple[int, bytes]],
        meter: Callable[[int], None],
    ) -> None:
        """Take the chunks of one update until it is whole, checked, and durable at `final`.

        `meter` hears of the bytes of each chunk. Raises the typed error for whatever is wrong; after a mere break what
        has come is kept, after anything else it is dropped.
        """
        check_header(header, layout)
        async with self._moving:
            part = self._continue(client, header, final)
            async with part.lock:
                try:
                    async for offset, data in chunks:
                        meter(len(data))
                        await asyncio.to_thread(part.take, offset, data, cohort, final)
                    if not part.done:
                        raise BrokenTransfer(
                            f"the stream ended at byte {part.reassembly.received:,} of {header.nbytes:,}; go on from there"
                        )
                except (BrokenTransfer, asyncio.CancelledError):
                    raise
                except BaseException:
                    self._drop(client, header.key.run)
                    raise
                self._parts.pop((header.key.run, client), None)

    def _continue(self, client: str, header: UpdateHeader, final: Path) -> Part:
        place = (header.key.run, client)
        part = self._parts.get(place)
        if part is None or part.header.sha256 != header.sha256 or part.header.key.round != header.key.round:
            self._drop(client, header.key.run)
            part = self._parts[place] = Part(header, final.with_suffix(".part"))
        if header.offset != part.reassembly.received:
            raise BrokenTransfer(f"byte {part.reassembly.received:,} is next, the upload began at {header.offset:,}")
        return part

    def _drop(self, client: str, run: str) -> None:
        part = self._parts.pop((run, client), None)
        if part is not None:
            part.dropped = True
            part.close()
            part.path.unlink(missing_ok=True)

    def forget(self, run: str) -> None:
        """Drop what is incomplete of this run: its round is over."""
        for one, client in [place for place in self._parts if place[0] == run]:
            self._drop(client, one)


def check_header(header: UpdateHeader, layout: Layout) -> None:
    """Raise TooLarge or LayoutMismatch unless an update so announced could be one of this layout."""
    if header.nbytes > layout.nbytes:
        raise TooLarge(f"an update of {header.nbytes:,} bytes came; the run's model has {layout.nbytes:,}")
    if header.layout_digest != layout.digest or header.nbytes != layout.nbytes:
        raise LayoutMismatch(
            f"the update's layout ({header.layout_digest.hex()[:12]}, {header.nbytes:,} bytes) is not the run's "
            f"({layout.digest.hex()[:12]}, {layout.nbytes:,} bytes); do both sides run the same version of seqfed?"
        )
    fedavg.check(header.weight, 0.0, 1)


async def receive_file(path: Path, total: int, sha256: bytes, chunks: AsyncIterator[tuple[int, bytes]]) -> None:
    """Receive a whole file; raises the typed error for whatever is wrong with it. The caller removes it."""
    with path.open("wb", buffering=0) as file:

        def sink(_: int, data: bytes) -> None:
            try:
                file.write(data)
            except OSError as error:
                raise storage_error(error, "receiving a checkpoint") from error

        reassembly = Reassembly(total, sha256, sink)
        async for offset, data in chunks:
            await asyncio.to_thread(reassembly.add, offset, data)
        reassembly.finish()
