"""Integers of b bits as bytes: one after the other, little-endian, without a gap; the last byte is filled up with zeros.

Bit k of number i is bit (i b + k) mod 8 of byte (i b + k) // 8. Eight numbers always end with a byte, so a vector may be packed
and unpacked in pieces of any multiple of eight numbers.

Small groups of numbers fill whole words of 16 bits (of 5 bits sixteen numbers five of them); each word is made of the one or
more numbers that reach into it, for all groups at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from seqfed.common.errors import MaskingRefused
from seqfed.common.masking.terms import WIDTHS

WORD: Final = 16  # bits
PIECE: Final = 1 << 14  # numbers at once, so that they stay in a core's cache


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that so many numbers take."""
    return (count * bits + 7) // 8


def pack(values: NDArray[Any], bits: int) -> bytes:
    """The numbers modulo 2^bits, packed; unsigned, one axis. Precondition: bits is one of `terms.WIDTHS`."""
    memory = np.dtype(WIDTHS[bits])
    if bits == 8 * memory.itemsize:
        return values.astype(memory.newbyteorder("<"), copy=False).tobytes()
    numbers, words = _group(bits)
    wide = np.result_type(memory, np.uint16)
    out = np.empty((-(-len(values) // numbers), words), "<u2")
    step = PIECE // numbers
    for first in range(0, len(out), step):
        part: NDArray[Any] = values[first * numbers : (first + step) * numbers] & memory.type((1 << bits) - 1)
        room = out[first : first + step]
        if part.size < room.shape[0] * numbers:
            part = np.concatenate([part, np.zeros(room.shape[0] * numbers - part.size, part.dtype)])
        columns: NDArray[Any] = part.reshape(-1, numbers).astype(wide, copy=False)
        for word in range(words):
            found: NDArray[Any] | None = None
            for number, shift in _reaching(bits, word):
                moved = columns[:, number] << shift if shift >= 0 else columns[:, number] >> -shift
                found = moved if found is None else np.bitwise_or(found, moved, out=found)
            assert found is not None
            np.copyto(room[:, word], found, casting="unsafe")
    return out.tobytes()[: packed_bytes(len(values), bits)]


def unpack(data: bytes | memoryview, bits: int, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The `count` numbers that were packed, as a new array of an unsigned type of at least so many bits.

    Raises MaskingRefused if the bytes are not as many as that, or the bits that fill up the last are not 0.
    """
    if len(data) != (due := packed_bytes(count, bits)):
        raise MaskingRefused(f"{count} numbers of {bits} bits are {due} bytes, and there are {len(data)}")
    spare = 8 * due - count * bits
    if spare and data[-1] >> (8 - spare):
        raise MaskingRefused(f"the last {spare} bits of {count} packed numbers of {bits} bits are not 0")
    memory = np.dtype(WIDTHS[bits])
    if bits == 8 * memory.itemsize:
        return np.frombuffer(data, memory.newbyteorder("<")).astype(dtype)
    numbers, words = _group(bits)
    groups = -(-count // numbers)
    if len(data) < groups * words * 2:
        data = bytes(data) + bytes(groups * words * 2 - len(data))
    columns = np.frombuffer(data, "<u2").reshape(groups, words)
    out = np.empty((groups, numbers), dtype)
    wide = np.result_type(memory, np.uint16)
    step = PIECE // numbers
    for first in range(0, groups, step):
        part = columns[first : first + step].astype(wide)
        room = np.zeros((len(part), numbers), wide)
        for word in range(words):
            for number, shift in _reaching(bits, word):
                room[:, number] |= part[:, word] >> shift if shift >= 0 else part[:, word] << -shift
        room &= wide.type((1 << bits) - 1)
        np.copyto(out[first : first + step], room, casting="unsafe")
    return out.reshape(-1)[:count]


def _group(bits: int) -> tuple[int, int]:
    """The smallest group of numbers that fills whole words: how many numbers, and how many words."""
    common = gcd(bits, WORD)
    return WORD // common, bits // common


def _reaching(bits: int, word: int) -> Iterator[tuple[int, int]]:
    """The numbers of a group that have bits in this word, and by how far each is to be shifted left to come to its place."""
    first, last = word * WORD // bits, (word * WORD + WORD - 1) // bits
    return ((number, number * bits - word * WORD) for number in range(first, last + 1))
