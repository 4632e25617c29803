"""Vectors in pieces, each rotated on its own and sent by a few bits a number: to a grid (rotq, delta), or by sign (eden1).

A piece is 2^16 numbers, so that its transform stays in a core's cache, and has a step or scale of its own (float32), so that
layers whose numbers are of different size do not spoil each other's. The last one is shorter, never filled up.

Grid of b bits: from -m to m, m the largest number of the rotated piece, in 2^b - 1 steps. Rounded up or down at random, such
that the expectation is the number itself (Suresh et al. 2017, "Distributed mean estimation with limited communication"; to
2^-17 of a step), or to the nearest.

eden1 (Vargaftik et al. 2022, "EDEN: communication-efficient and robust distributed mean estimation for federated learning",
with 1 bit; its section on a random part of the coordinates): of the n rotated numbers y the client sends the signs of a random
part of which each has the same chance m / n, and the scale (n / m) sum y^2 / sum |y| over that part, with which the estimate is
unbiased if the rotation is uniform among all. With signs and Hadamard it leans by what the rotated numbers differ from normal
ones: nothing that could be measured for a dense update, but by up to its own length for one of two numbers.
What is drawn are runs of 64 neighbours: enough of them for the noise to spread evenly, and few enough to cost nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from seqfed.common.compression.codec import Key
from seqfed.common.errors import BrokenTransfer, NonFiniteUpdate, UpdateOutOfRange
from seqfed.common.layout import Flat
from seqfed.common.rotation import rotate, unrotate
from seqfed.common.seeds import generator

PIECE: Final = 1 << 16
LIMIT: Final = 1e30  # of a number or scale: sums of a piece of such are within float32
LEAST: Final = 1e-30  # the largest number of a piece below which it counts as zeros: a step must be within float32, too
RUN: Final = 64  # neighbours that are drawn together
RUNS: Final = 64  # into which a piece is divided at least, where its numbers suffice
FED: Final = 1 << 16  # bytes given to the decompressor at once: it copies what it does not need yet
Read = Callable[[int], NDArray[np.uint8]]  # the next so many bytes; raises BrokenTransfer if there are fewer


def count(size: int) -> int:
    """Pieces of a vector of `size` numbers."""
    return -(-size // PIECE)


def cut(size: int) -> Iterator[tuple[int, slice]]:
    """The pieces by number."""
    return ((nth, slice(nth * PIECE, min(size, (nth + 1) * PIECE))) for nth in range(count(size)))


# To a grid ------------------------------------------------------------------------------------------------------------


def grid_bytes(size: int, bits: int) -> int:
    """Of the symbols of so many numbers."""
    return sum(_symbol_bytes(part.stop - part.start, bits) for _, part in cut(size))


def to_grid(
    vector: Flat, bits: int, key: Key, section: str, nearest: bool, found: Flat | None = None
) -> tuple[bytes, bytes]:
    """Scales, and symbols, of a vector; what they decode to goes to `found`, if given. bits: 4 or 8.

    Raises NonFiniteUpdate, UpdateOutOfRange.
    """
    scales, symbols = np.empty(count(len(vector)), "<f4"), []
    top = (1 << bits) - 1
    for nth, part in cut(len(vector)):
        require_finite(vector[part], part.start)
        seed = key.draw(section, nth)
        turned = vector[part].copy()
        rotate(turned, seed)
        highest = scales[nth] = max(float(turned.max()), -float(turned.min()))
        if highest < LEAST:
            highest = scales[nth] = 0.0
        else:
            turned *= np.float32(top / (2 * highest))
            turned += np.float32(top / 2 + 0.5) if nearest else _dither(len(turned), seed, top / 2)
            np.clip(turned, 0, top, out=turned)
        whole = turned.astype(np.uint8)
        symbols.append(_pair(whole).tobytes() if bits == 4 else whole.tobytes())
        if found is not None:
            found[part] = _from_grid(whole, float(scales[nth]), bits, seed)
    return scales.tobytes(), b"".join(symbols)


def from_grid(read: Read, scales: Flat, size: int, bits: int, key: Key, section: str) -> Iterator[Flat]:
    """The vector that `to_grid` was given, piece by piece; scales: as `scales_of` has checked them."""
    for nth, part in cut(size):
        numbers = part.stop - part.start
        symbols = read(_symbol_bytes(numbers, bits))
        whole = symbols if bits == 8 else _unpair(symbols, numbers)
        yield _from_grid(whole, float(scales[nth]), bits, key.draw(section, nth))


def scales_of(data: memoryview) -> Flat:
    """The scales in these bytes, float32; raises UpdateOutOfRange if one is not 0 to LIMIT."""
    scales = np.frombuffer(data, "<f4").astype(np.float32)
    good = (scales >= 0) & (scales <= LIMIT)
    if not good.all():
        raise UpdateOutOfRange(f"a payload has the scale {scales[~good][0]}; it must be 0 to {LIMIT:g}")
    return scales


def require_finite(numbers: Flat, start: int = 0) -> None:
    """Raise NonFiniteUpdate for a NaN or infinity, UpdateOutOfRange for a number above LIMIT."""
    highest = max(float(np.max(numbers, initial=0.0)), -float(np.min(numbers, initial=0.0)))
    if not highest <= LIMIT:
        place = int(np.flatnonzero(~(np.abs(numbers) <= LIMIT))[0])
        value = numbers[place]
        if np.isfinite(value):
            raise UpdateOutOfRange(f"number {start + place:,} is {value}; it may be {LIMIT:g} at most to be compressed")
        raise NonFiniteUpdate(
            f"number {start + place:,} is {value}; lower the learning rate or look for missing values"
        )


def _from_grid(whole: NDArray[np.uint8], highest: float, bits: int, seed: int) -> Flat:
    top = (1 << bits) - 1
    turned: Flat = whole.astype(np.float32)
    turned -= np.float32(top / 2)
    turned *= np.float32(2 * highest / top)
    unrotate(turned, seed)
    return turned


def _dither(numbers: int, seed: int, middle: float) -> Flat:
    """Uniform in [0, 1) by 16 bits each, plus `middle`; the raw stream, which numpy promises for all its versions."""
    raw: NDArray[np.uint64] = generator(seed, "rounding").bit_generator.random_raw(-(-numbers // 4))
    found: Flat = raw.astype("<u8").view("<u2")[:numbers].astype(np.float32)
    found *= np.float32(2**-16)
    found += np.float32(middle + 2**-17)
    return found


def _symbol_bytes(numbers: int, bits: int) -> int:
    return numbers if bits == 8 else (numbers + 1) // 2


def _pair(whole: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two of 4 bits in a byte, the first one low."""
    found = whole[::2].copy()
    found[: len(whole) // 2] |= whole[1::2] << 4
    return found


def _unpair(symbols: NDArray[np.uint8], numbers: int) -> NDArray[np.uint8]:
    found = np.empty(2 * len(symbols), np.uint8)
    np.bitwise_and(symbols, 15, out=found[::2])
    np.right_shift(symbols, 4, out=found[1::2])
    if numbers % 2 and found[-1]:
        raise BrokenTransfer("a payload's last half byte is filled up with bits that are not 0")
    return found[:numbers]


# By sign --------------------------------------------------------------------------------------------------------------


def drawn(size: int, fraction: float) -> tuple[int, int, int]:
    """Of `size` numbers: how many neighbours make a run, how many runs there are, how many of them are sent.

    >>> drawn(1 << 16, 0.16), drawn(100, 0.16)
    ((64, 1024, 164), (1, 100, 16))
    """
    run = min(RUN, 1 << max(0, (size // RUNS).bit_length() - 1))
    runs = -(-size // run)
    return run, runs, max(1, min(runs, round(fraction * runs)))


def places(size: int, fraction: float, seed: int) -> NDArray[np.intp]:
    """Where the numbers that are sent stand, in order; of the last run, which may reach beyond the vector, all of it."""
    run, runs, sent = drawn(size, fraction)
    raw: NDArray[np.uint64] = generator(seed, "part").bit_generator.random_raw(runs)
    chosen = np.sort(np.argpartition(raw, sent - 1)[:sent])
    found: NDArray[np.intp] = (chosen[:, None] * run + np.arange(run)).reshape(-1)
    return found


def gather(numbers: Flat, where: NDArray[np.intp]) -> Flat:
    """The numbers at these places, 0 beyond the end."""
    if where[-1] < len(numbers):
        return np.asarray(numbers[where])
    found = np.zeros(len(where), np.float32)
    inside = int(np.searchsorted(where, len(numbers)))
    found[:inside] = numbers[where[:inside]]
    return found


def scatter(numbers: Flat, where: NDArray[np.intp], size: int) -> Flat:
    """The inverse: zeros but at these places."""
    found = np.zeros(max(size, int(where[-1]) + 1), np.float32)
    found[where] = numbers
    return found[:size]


def sign_bytes(size: int, fraction: float) -> int:
    """Of the signs of so many numbers."""
    return sum((run * sent + 7) // 8 for run, _, sent in (drawn(p.stop - p.start, fraction) for _, p in cut(size)))


def sent_signs(size: int, fraction: float) -> int:
    """Numbers whose signs are sent."""
    return sum(run * sent for run, _, sent in (drawn(p.stop - p.start, fraction) for _, p in cut(size)))


def to_signs(vector: Flat, fraction: float, key: Key) -> tuple[bytes, bytes]:
    """Scales, and signs, of a vector. Raises NonFiniteUpdate, UpdateOutOfRange."""
    scales, signs = np.empty(count(len(vector)), "<f4"), []
    for nth, part in cut(len(vector)):
        require_finite(vector[part], part.start)
        seed = key.draw("eden", nth)
        turned = vector[part].copy()
        rotate(turned, seed)
        _, runs, sent = drawn(len(turned), fraction)
        chosen = gather(turned, places(len(turned), fraction, seed))
        total = float(np.add.reduce(np.abs(chosen), dtype=np.float64))
        squares = float(np.add.reduce(np.square(chosen, dtype=np.float64)))
        scales[nth] = (runs / sent) * (squares / total) if total > 0 else 0.0
        signs.append(np.packbits(chosen >= 0).tobytes())
    return scales.tobytes(), b"".join(signs)


def from_signs(data: memoryview, scales: Flat, size: int, fraction: float, key: Key) -> Iterator[Flat]:
    """The estimate of the vector, piece by piece."""
    start = 0
    for nth, part in cut(size):
        numbers, seed = part.stop - part.start, key.draw("eden", nth)
        where = places(numbers, fraction, seed)
        stop = start + (len(where) + 7) // 8
        bits = np.unpackbits(np.frombuffer(data[start:stop], np.uint8), count=len(where))
        start = stop
        turned = scatter(np.array([-scales[nth], scales[nth]], np.float32)[bits], where, numbers)
        unrotate(turned, seed)
        yield turned


# Huffman's code -------------------------------------------------------------------------------------------------------


def deflate(symbols: bytes) -> bytes:
    """Symbols by their frequency alone (rotated numbers are near normal, and nothing in them repeats): a raw deflate stream."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return packer.compress(symbols) + packer.flush()


class Inflating:
    """Reads a raw deflate stream on; never holds more of it than is asked for."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0
        self._packer = zlib.decompressobj(-zlib.MAX_WBITS)

    def __call__(self, size: int) -> NDArray[np.uint8]:
        found = []
        left = size
        while left > 0:
            part = self._some(left)
            if not part:
                raise BrokenTransfer(f"a payload's symbols end {left:,} bytes too early")
            found.append(part)
            left -= len(part)
        return np.frombuffer(b"".join(found), np.uint8)

    def finish(self) -> None:
        """Raise BrokenTransfer unless the stream ends here."""
        if self._some(1) or not self._packer.eof or self._packer.unused_data or self._at < len(self._data):
            raise BrokenTransfer("a payload has more symbols than numbers")

    def _some(self, most: int) -> bytes:
        """From 1 to `most` bytes; none at the end."""
        while not self._packer.eof:
            given: Any = self._packer.unconsumed_tail
            if not given:
                given = self._data[self._at : self._at + FED]
                self._at += len(given)
            try:
                found = self._packer.decompress(given, most)
            except zlib.error as error:
                raise BrokenTransfer(f"a payload's symbols cannot be unpacked: {error}") from error
            if found or not given:
                return found
        return b""


class Plain:
    """Reads bytes on."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def __call__(self, size: int) -> NDArray[np.uint8]:
        found = np.frombuffer(self._data[self._at : self._at + size], np.uint8)
        self._at += size
        return found

    def finish(self) -> None:
        """Nothing: the length was checked before."""
