"""A rotation that makes any vector's numbers alike in size, so that one step of a fixed-point grid suits them all: random
signs, then the orthonormal Walsh-Hadamard transform (Ailon and Chazelle 2009, "The fast Johnson-Lindenstrauss transform";
before rounding: Suresh et al. 2017, "Distributed mean estimation with limited communication", section 3).

The transform exists for powers of two. Filling a vector up with zeros would as much as double an upload. Instead the first
s = 2^k numbers are rotated and then the last s, s being the largest power of two that fits; both together hold every number.
The result is as long as the vector, and each of its numbers is a sum with random signs of squares' sum |x|^2 / s at most
(Hoeffding: beyond z |x| / sqrt(s) with probability 2 exp(-z^2 / 2) at most), wherever in x the large numbers lie.

Whoever has the seed draws the same signs. Additions and products in a fixed order only, no BLAS: the same bits everywhere.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from seqfed.common.seeds import generator

Flat = NDArray[np.float32]
BITS: Final = 16  # log2 of the numbers worked on at once: three buffers of 256 KiB stay in a core's cache
FAR: Final = 8  # stages over numbers that lie further apart than that, at once: runs of 2^8 numbers are moved
LINE: Final = 16  # numbers of a cache line: over memory that begins within one, additions take twice as long
# Numbers of a row; shorter ones numpy may copy into a buffer before it adds them. By default it does so up to thousands, which
# makes a stage four times as slow.
APART: Final = 64
SIGNS: Final = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1), -1, 1).astype(np.float32)


def span(size: int) -> int:
    """s, the largest power of two that is at most `size`; precondition: size >= 1.

    >>> span(1), span(7), span(8)
    (1, 4, 8)
    """
    return 1 << (size.bit_length() - 1)


def rotate(numbers: Flat, seed: int) -> None:
    """Rotate a contiguous float32 vector of at least one number, in place."""
    room = aligned(_room(len(numbers)))
    for nth, part in _parts(numbers):
        _flip(part, seed, nth, room)
        _transform(part, room)


def unrotate(numbers: Flat, seed: int) -> None:
    """The inverse of `rotate` with the same seed, in place; what comes back differs by float32's rounding."""
    room = aligned(_room(len(numbers)))
    for nth, part in reversed(_parts(numbers)):
        _transform(part, room)
        _flip(part, seed, nth, room)


def aligned(size: int) -> Flat:
    """Room for so many numbers, from the beginning of a cache line."""
    found = np.empty(size + LINE, np.float32)
    return found[-(int(found.__array_interface__["data"][0]) // 4) % LINE :][:size]


def _parts(numbers: Flat) -> list[tuple[int, Flat]]:
    size = span(len(numbers))
    return [(0, numbers[:size])] + ([(1, numbers[-size:])] if size < len(numbers) else [])


def _square(size: int) -> tuple[int, int]:
    """Rows and columns of what is worked on at once of so many numbers, a power of two."""
    stages = min(size.bit_length() - 1, BITS)
    return 1 << stages // 2, 1 << stages - stages // 2


def _room(size: int) -> int:
    """Numbers of the memory for that: as many again, and a square whose rows have a cache line more."""
    _, columns = _square(span(size))
    return max(64, columns * columns) + columns * (columns + LINE)


def _flip(numbers: Flat, seed: int, nth: int, room: Flat) -> None:
    """Times a random sign each, and times the factor that makes the transform orthonormal; len(numbers) is a power of two."""
    # The raw stream: numpy promises that one, for all its versions.
    draws = generator(seed, "signs", nth).bit_generator
    signs = SIGNS * np.float32(1 / math.sqrt(len(numbers)))
    for start in range(0, len(numbers), 1 << BITS):
        part = numbers[start : start + (1 << BITS)]
        raw: NDArray[np.uint64] = draws.random_raw(-(-len(part) // 64))
        turns = room[: 64 * len(raw)]
        # "clip", since numpy writes to `turns` itself only if it has not to look for bad indices first; bytes are none.
        signs.take(raw.astype("<u8", copy=False).view(np.uint8), 0, turns.reshape(-1, 8), "clip")
        part *= turns[: len(part)]


def _transform(numbers: Flat, room: Flat) -> None:
    """The Walsh-Hadamard transform in Sylvester's order, not scaled, in place; len(numbers) is a power of two.

    The matrix for 2^k is the Kronecker product of k of [[1, 1], [1, -1]], one stage each; any order of stages gives it.
    Neighbours' stages are done on the transposed square, so that numpy always adds long rows.
    """
    rows, columns = _square(len(numbers))
    size = rows * columns
    spare = room[:size], room[-columns * (columns + LINE) :]
    # Rows of what is transposed lie a line further apart than they are long, lest a column's numbers share few cache sets.
    wide = spare[1].reshape(columns, columns + LINE)
    before = np.setbufsize(APART)
    try:
        for square in numbers.reshape(-1, size):
            for high, long in ((rows, columns), (columns, rows)):
                found = wide[:high, :long]
                _down(square.reshape(high, long), found, spare)
                np.copyto(square.reshape(long, high), found.T)
        done = size
        while done < len(numbers):
            count = min(1 << FAR, len(numbers) // done)
            width = size // count
            found = spare[1][:size].reshape(count, width)
            for far in numbers.reshape(-1, count, done):
                for first in range(0, done, width):
                    strip = far[:, first : first + width]
                    _down(strip, found, spare)
                    np.copyto(strip, found)
            done *= count
    finally:
        np.setbufsize(before)


def _down(source: Flat, target: Flat, spare: tuple[Flat, Flat]) -> None:
    """The transform of each column of `source` to `target`, both (2^k, width), by turns in two spare arrays; the second of
    them may be the target's memory.
    """
    rows, width = source.shape
    if rows == 1:
        np.copyto(target, source)
    while rows > 1:
        rows //= 2
        found = spare[rows.bit_length() % 2][: source.size].reshape(-1, width) if rows > 1 else target
        old, new = source.reshape(-1, 2, rows, width), found.reshape(-1, 2, rows, width)
        np.add(old[:, 0], old[:, 1], out=new[:, 0])
        np.subtract(old[:, 0], old[:, 1], out=new[:, 1])
        source = found
