"""Matrix rows that are wholly zero, such as those of an embedding's tokens that a client has not seen: they cost a bit each.

In a body: one bit a tensor of the layout, whether it has such rows; then for each that has, one bit a row, 1 for those that
are sent. Bits as of numpy's packbits, each list filled up with zeros to whole bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from seqfed.common.compression.pieces import PIECE
from seqfed.common.errors import BrokenTransfer
from seqfed.common.layout import Flat, Layout


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows are sent, of those tensors of a layout, by their number, of which not all are."""

    layout: Layout
    kept: dict[int, NDArray[np.bool_]]

    @cached_property
    def sent(self) -> int:
        """Numbers that are left."""
        shapes = [shape for _, shape in self.layout.tensors]
        gone = sum((len(one) - int(one.sum())) * math.prod(shapes[at][1:]) for at, one in self.kept.items())
        return self.layout.size - gone

    def pack(self) -> bytes:
        """As it stands in a body."""
        flags = np.array([at in self.kept for at in range(len(self.layout.tensors))])
        return b"".join(np.packbits(one).tobytes() for one in (flags, *self.kept.values()))

    def compact(self, vector: Flat) -> Flat:
        """The vector without the rows that are left out: a copy, or itself if there are none."""
        if not self.kept:
            return vector
        found = []
        for at, (_, shape, part) in enumerate(self.layout.parts()):
            numbers = vector[part]
            found.append(numbers.reshape(shape[0], -1)[self.kept[at]].reshape(-1) if at in self.kept else numbers)
        return np.concatenate(found)

    def expand(self, parts: Iterator[Flat]) -> Iterator[Flat]:
        """The whole vector in parts, from consecutive parts of the compact one."""
        if not self.kept:
            yield from parts
            return
        source = _Source(parts)
        for at, (_, shape, part) in enumerate(self.layout.parts()):
            if at not in self.kept:
                yield from source.pass_on(part.stop - part.start)
                continue
            width, kept = math.prod(shape[1:]), self.kept[at]
            step = max(1, PIECE // width)
            for first in range(0, len(kept), step):
                which = kept[first : first + step]
                block = np.zeros((len(which), width), np.float32)
                block[which] = source.take(int(which.sum()) * width).reshape(-1, width)
                yield block.reshape(-1)


def find(layout: Layout, vector: Flat) -> Rows:
    """The rows worth leaving out: more numbers than bits to say so."""
    kept = {}
    for at, (_, shape, part) in enumerate(layout.parts()):
        if not _fits(shape):
            continue
        matrix = vector[part].reshape(shape[0], -1)
        maybe = np.flatnonzero(matrix[:, 0] == 0)  # few in any dense one, so that it is not read
        gone = maybe[~matrix[maybe].any(axis=1)]
        if len(gone) * matrix.shape[1] > shape[0]:
            kept[at] = np.ones(shape[0], np.bool_)
            kept[at][gone] = False
    return Rows(layout, kept)


def read(layout: Layout, body: memoryview) -> tuple[Rows, memoryview]:
    """What `pack` wrote, and the rest of the body; raises BrokenTransfer."""
    flags, body = _bits(body, len(layout.tensors))
    kept = {}
    for at in map(int, np.flatnonzero(flags)):
        name, shape = layout.tensors[at]
        if not _fits(shape):
            raise BrokenTransfer(f"a payload leaves out rows of tensor '{name}' {shape}, which has none")
        kept[at], body = _bits(body, shape[0])
    return Rows(layout, kept), body


def most(layout: Layout) -> int:
    """Bytes that `pack` writes at most."""
    counts = [len(layout.tensors), *(shape[0] for _, shape in layout.tensors if _fits(shape))]
    return sum((count + 7) // 8 for count in counts)


def _fits(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and math.prod(shape) > 0


def _bits(body: memoryview, count: int) -> tuple[NDArray[np.bool_], memoryview]:
    size = (count + 7) // 8
    if len(body) < size:
        raise BrokenTransfer(f"a payload ends within the {size:,} bytes that say which rows it leaves out")
    found = np.unpackbits(np.frombuffer(body[:size], np.uint8))
    if found[count:].any():
        raise BrokenTransfer("a payload's list of rows is filled up with bits that are not 0")
    return found[:count].astype(np.bool_), body[size:]


class _Source:
    """Parts of a vector, read on in other lengths."""

    def __init__(self, parts: Iterator[Flat]) -> None:
        self._parts = parts
        self._rest = np.empty(0, np.float32)

    def pass_on(self, count: int) -> Iterator[Flat]:
        while count > 0:
            if not len(self._rest):
                self._rest = next(self._parts)
            part, self._rest = self._rest[:count], self._rest[count:]
            count -= len(part)
            yield part

    def take(self, count: int) -> Flat:
        return np.concatenate([np.empty(0, np.float32), *self.pass_on(count)])
