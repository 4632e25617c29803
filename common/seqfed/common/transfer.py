"""Chunks: how a long vector of bytes crosses the wire, in order, resumable, and checked as a whole.

Both directions use the same reassembly; where the bytes go (a file, a buffer) is the caller's sink. Whole vectors are named
and checked by their BLAKE3 digest: as strong as SHA-256, and at 3 GB/s on one core no longer a part of a round worth noticing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Final

from blake3 import blake3

from seqfed.common.errors import BrokenTransfer, ChecksumMismatch

CHUNK_BYTES: Final = 512 << 10  # one Python gRPC stream moves twice as much a second at 512 KiB as at 64 KiB or 16 MiB
SMALLEST_CHUNK: Final = (
    16 << 10
)  # half a second at 256 kbit/s: what a break costs there; below it the overhead grows instead
GRAIN: Final = 4  # bytes of a float32: chunks never cut one
DIGEST_BYTES: Final = 32

TELLING_S: Final = 0.5  # what takes longer is mostly the way's width, what is shorter may be its length
TRUST: Final = 1.25  # how much more a way is thought to carry after each short upload: so a larger one is tried again

Sink = Callable[[int, bytes], None]  # (offset of the first byte, bytes)


def split(data: memoryview, start: int, size: int | None = None) -> Iterator[tuple[int, bytes]]:
    """The (offset, bytes) of each chunk of `data` from byte `start` on: `size` bytes each, or what is left in the last."""
    size = CHUNK_BYTES if size is None else size
    for offset in range(start, len(data), size):
        yield offset, bytes(data[offset : offset + size])


class Pace:
    """How large the chunks to and from a peer are: about a second's worth, halved by each break, at most doubled by each
    transfer that came to its end.

    A chunk counts when it has come whole, so on a link that breaks every few seconds large ones would never get anywhere;
    and what is on its way delays whatever else the link should carry, such as the signs of life.
    """

    def __init__(self) -> None:
        self.size = CHUNK_BYTES
        self.bytes_per_s = math.inf  # that the way up carries; infinity as long as nothing was slow
        self._uploaded = False

    def broken(self) -> None:
        self.size = max(self.size // 2, min(SMALLEST_CHUNK, CHUNK_BYTES))

    def whole(self) -> None:
        self.size = min(2 * self.size, CHUNK_BYTES)

    def timed(self, nbytes: int, seconds: float) -> None:
        """So many bytes came in so long, and waited for nothing but the link."""
        if not self._uploaded:
            self._learn(nbytes, seconds)
        while self.size > SMALLEST_CHUNK and self.size * seconds > nbytes:
            self.size //= 2

    def carried(self, nbytes: int, seconds: float) -> None:
        """An upload of so many bytes took so long."""
        self._uploaded = True
        self._learn(nbytes, seconds)

    def _learn(self, nbytes: int, seconds: float) -> None:
        if nbytes > 0 and seconds > 0:
            found = nbytes / seconds
            self.bytes_per_s = found if seconds >= TELLING_S else max(found, TRUST * self.bytes_per_s)


class Reassembly:
    """Puts chunks together again; raises at the first that does not fit, and nothing is lost of what fitted.

    `total`: bytes of the whole; `digest`: of the whole, 32 bytes; `sink` is called once for each chunk in order. After
    a break the same object goes on: `received` tells the peer where.
    """

    def __init__(self, total: int, digest: bytes, sink: Sink) -> None:
        if len(digest) != DIGEST_BYTES:
            raise BrokenTransfer(f"a BLAKE3 digest has {DIGEST_BYTES} bytes, {len(digest)} came")
        self.total = total
        self.digest = digest
        self.received = 0
        self._sink = sink
        self._hasher = blake3()

    def add(self, offset: int, data: bytes) -> None:
        """Take the next chunk; raises BrokenTransfer if it is not the next one, empty, too large, or cuts a number in two."""
        if offset != self.received:
            raise BrokenTransfer(f"a chunk at byte {offset:,} came where byte {self.received:,} was next")
        left = self.total - offset
        most = min(CHUNK_BYTES, left)
        if not 0 < len(data) <= most or (len(data) % GRAIN and len(data) != left):
            raise BrokenTransfer(
                f"a chunk of {len(data):,} bytes came at byte {offset:,}, where a multiple of {GRAIN} up to {most:,} was due"
            )
        self._sink(offset, data)
        self._hasher.update(data)
        self.received += len(data)

    def finish(self) -> None:
        """Raise BrokenTransfer if bytes are missing, ChecksumMismatch if they are not the ones announced."""
        if self.received != self.total:
            raise BrokenTransfer(f"the stream ended at byte {self.received:,} of {self.total:,}")
        if self._hasher.digest() != self.digest:
            raise ChecksumMismatch(f"{self.total:,} bytes came, but their BLAKE3 digest is not the announced one")
