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
BITS: Final = 16  # log2 of the numbers worked on at once: two buffers of 256 KiB stay in a core's cache
FAR: Final = 8  # stages over numbers that lie further apart than that, at once: runs of 2^8 numbers are moved


def span(size: int) -> int:
    """s, the largest power of two that is at most `size`; precondition: size >= 1.

    >>> span(1), span(7), span(8)
    (1, 4, 8)
    """
    return 1 << (size.bit_length() - 1)


def rotate(numbers: Flat, seed: int) -> None:
    """Rotate a contiguous float32 vector of at least one number, in place."""
    for nth, part in _parts(numbers):
        _flip(part, seed, nth)
        _transform(part)


def unrotate(numbers: Flat, seed: int) -> None:
    """The inverse of `rotate` with the same seed, in place; what comes back differs by float32's rounding."""
    for nth, part in reversed(_parts(numbers)):
        _transform(part)
        _flip(part, seed, nth)


def _parts(numbers: Flat) -> list[tuple[int, Flat]]:
    size = span(len(numbers))
    return [(0, numbers[:size])] + ([(1, numbers[-size:])] if size < len(numbers) else [])


def _flip(numbers: Flat, seed: int, nth: int) -> None:
    """Times a random sign each, and times the factor that makes the transform orthonormal; len(numbers) is a power of two."""
    # The raw stream: numpy promises that one, for all its versions.
    signs = generator(seed, "signs", nth).bit_generator
    factor = np.float32(1 / math.sqrt(len(numbers)))
    for start in range(0, len(numbers), 1 << BITS):
        part = numbers[start : start + (1 << BITS)]
        part *= factor
        raw: NDArray[np.uint64] = signs.random_raw(-(-len(part) // 64))
        bits = np.unpackbits(raw.astype("<u8").view(np.uint8), count=len(part))
        part.view(np.uint32)[:] ^= bits.astype(np.uint32) << np.uint32(31)


def _transform(numbers: Flat) -> None:
    """The Walsh-Hadamard transform in Sylvester's order, not scaled, in place; len(numbers) is a power of two.

    The matrix for 2^k is the Kronecker product of k of [[1, 1], [1, -1]], one stage each; any order of stages gives it.
    Neighbours' stages are done on the transposed square, so that numpy always adds long rows.
    """
    stages = len(numbers).bit_length() - 1
    near = min(stages, BITS)
    one, other = np.empty(1 << near, np.float32), np.empty(1 << near, np.float32)
    rows, columns = 1 << near // 2, 1 << near - near // 2
    for square in numbers.reshape(-1, rows, columns):
        np.copyto(one.reshape(rows, columns), square)
        one, other = _down(one, other, columns)
        np.copyto(other.reshape(columns, rows), one.reshape(rows, columns).T)
        one, other = _down(other, one, rows)
        np.copyto(square, one.reshape(columns, rows).T)
    done = near
    while done < stages:
        count = min(FAR, stages - done)
        width = 1 << near - count
        for far in numbers.reshape(-1, 1 << count, 1 << done):
            for first in range(0, 1 << done, width):
                strip = far[:, first : first + width]
                np.copyto(one.reshape(-1, width), strip)
                one, other = _down(one, other, width)
                np.copyto(strip, one.reshape(-1, width))
        done += count


def _down(one: Flat, other: Flat, width: int) -> tuple[Flat, Flat]:
    """The transform of each column of a (2^k, width) array, flat, and a spare one: in the memory of these two, of one size."""
    half = len(one) // 2
    while half >= width:
        old, new = one.reshape(-1, 2, half), other.reshape(-1, 2, half)
        np.add(old[:, 0], old[:, 1], out=new[:, 0])
        np.subtract(old[:, 0], old[:, 1], out=new[:, 1])
        one, other = other, one
        half //= 2
    return one, other
