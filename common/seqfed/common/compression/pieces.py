"""Vectors in pieces, each rotated on its own and sent by a few bits a number: to a grid (rotq, delta), or by sign (eden1).

A piece is 2^16 numbers, so that its transform stays in a core's cache, and has a step or scale of its own (float32), so that
layers whose numbers are of different size do not spoil each other's. The last one is shorter, never filled up.

Grid of b bits: from -m to m, m the largest number of the rotated piece, in 2^b - 1 steps. Rounded up or down at random, such
that the expectation is the number itself (Suresh et al. 2017, "Distributed mean estimation with limited communication"; to
2^-16 of a step), or to the nearest.

eden1 (Vargaftik et al. 2022, "EDEN: communication-efficient and robust distributed mean estimation for federated learning",
with 1 bit; its section on a random part of the coordinates): of the n rotated numbers y the client sends the signs of a random
part of which each has the same chance m / n, and the scale (n / m) sum y^2 / sum |y| over that part, with which the estimate is
unbiased if the rotation is uniform among all. With signs and Hadamard it leans by what the rotated numbers differ from normal
ones: nothing that could be measured for an update of many numbers alike, but by up to a third of its length where one number
has most of a piece's squared length, and by up to all of it where there are two or three numbers at all. The fewer numbers, the
sooner one has most: so there is no short last piece (the last two share), and a short vector is rotated twice. Of a piece
whose length is no power of two the first numbers have their own scale, since the rotation does not mix them with the last ones.
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
from seqfed.common.rotation import aligned, rotate, span, unrotate
from seqfed.common.seeds import generator

PIECE: Final = 1 << 16
LIMIT: Final = 1e30  # of a number or scale: sums of a piece of such are within float32
LEAST: Final = 1e-30  # the largest number of a piece below which it counts as zeros: a step must be within float32, too
SHORT: Final = 1 << 12  # numbers of a piece below which it is rotated twice, which costs nothing there
RUN: Final = 64  # neighbours that are drawn together
RUNS: Final = 64  # into which a piece is divided at least, where its numbers suffice
FED: Final = 1 << 16  # bytes given to the decompressor at once: it copies what it does not need yet
# log2 of the parts of a step that rounding tells apart: with a byte's steps they fill a float32's 23 bits.
FINE: Final = 15
# From here to its double float32 has the whole numbers and no others, and counts them in its low bits.
WHOLE: Final = 1 << 23
Read = Callable[[int], NDArray[np.uint8]]  # the next so many bytes; raises BrokenTransfer if there are fewer
Found = Callable[[slice, Flat], object]


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
    vector: Flat, bits: int, key: Key, section: str, nearest: bool, found: Found | None = None
) -> tuple[bytes, bytes]:
    """Scales, and symbols, of a vector. bits: 4 or 8. found: is told of each piece what it decodes to; a copy has to be made.

    Raises NonFiniteUpdate, UpdateOutOfRange.
    """
    scales, symbols = np.empty(count(len(vector)), "<f4"), []
    room = aligned(min(PIECE, len(vector)))
    for nth, part in cut(len(vector)):
        turned, seed = room[: part.stop - part.start], key.draw(section, nth)
        np.copyto(turned, vector[part])
        require_finite(turned, part.start)
        rotate(turned, seed)
        highest = max(float(turned.max()), -float(turned.min()))
        scales[nth] = highest if highest >= LEAST else 0
        whole = _rounded(turned, float(scales[nth]), bits, None if nearest else seed)
        symbols.append(_pair(whole).tobytes() if bits == 4 else whole.tobytes())
        if found is not None:
            found(part, _from_grid(whole, float(scales[nth]), bits, seed, turned))
    return scales.tobytes(), b"".join(symbols)


def from_grid(read: Read, scales: Flat, size: int, bits: int, key: Key, section: str) -> Iterator[Flat]:
    """The vector that `to_grid` was given, piece by piece; scales: as `scales_of` has checked them."""
    for nth, part in cut(size):
        numbers = part.stop - part.start
        symbols = read(_symbol_bytes(numbers, bits))
        whole = symbols if bits == 8 else _unpair(symbols, numbers)
        yield _from_grid(whole, float(scales[nth]), bits, key.draw(section, nth), np.empty(numbers, np.float32))


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


def _from_grid(whole: NDArray[np.uint8], highest: float, bits: int, seed: int, found: Flat) -> Flat:
    """The numbers of these symbols: `found`, where they are written to."""
    top = (1 << bits) - 1
    np.copyto(found, whole)
    found -= np.float32(top / 2)
    found *= np.float32(2 * highest / top)
    unrotate(found, seed)
    return found


def _rounded(turned: Flat, highest: float, bits: int, seed: int | None) -> NDArray[np.uint8]:
    """The symbols of these numbers, which are lost; by chance with a seed, else the nearest."""
    top = (1 << bits) - 1
    if not highest:
        return np.zeros(len(turned), np.uint8)
    # Fixed-point numbers as the low bits of floats from WHOLE on, to which floats add up in one rounding. The largest number
    # comes out as (top << FINE) / 2 within a quarter, since it has been rounded twice before; only half a part were too far.
    turned *= np.float32((top << FINE) / (2 * highest))
    if seed is None:
        turned += np.float32(WHOLE + (top + 1 << FINE - 1))
    else:
        draws = _draws(len(turned), seed)
        draws += np.float32(WHOLE + (top << FINE - 1)).view(np.uint32)
        turned += draws.view(np.float32)
    fixed = turned.view(np.uint32)
    fixed >>= np.uint32(FINE)
    return fixed.astype(np.uint8)  # without the exponent's bits, which are above


def _draws(numbers: int, seed: int) -> NDArray[np.uint32]:
    """So many numbers, uniform in 0 to 2^FINE - 1; of the raw stream, which numpy promises for all its versions."""
    raw: NDArray[np.uint64] = generator(seed, "rounding").bit_generator.random_raw(-(-numbers // 4))
    words = raw.astype("<u8", copy=False).view("<u4")
    found = aligned(2 * len(words)).view(np.uint32)
    np.bitwise_and(words, np.uint32((1 << FINE) - 1), out=found[: len(words)])
    np.right_shift(words, np.uint32(32 - FINE), out=found[len(words) :])
    return found[:numbers]


def _symbol_bytes(numbers: int, bits: int) -> int:
    return numbers if bits == 8 else (numbers + 1) // 2


def _pair(whole: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two of 4 bits in a byte, the first one low; of those of 8 bits the low halves."""
    twos = np.append(whole, np.uint8(0)) if len(whole) % 2 else whole
    low = twos.view("<u2") & np.uint16(0x0F0F)
    low |= low >> np.uint16(4)
    return low.astype(np.uint8)


def _unpair(symbols: NDArray[np.uint8], numbers: int) -> NDArray[np.uint8]:
    if numbers % 2 and symbols[-1] > 15:
        raise BrokenTransfer("a payload's last half byte is filled up with bits that are not 0")
    found = symbols.astype("<u2")
    found |= found << np.uint16(4)
    found &= np.uint16(0x0F0F)
    return found.view(np.uint8)[:numbers]


# By sign --------------------------------------------------------------------------------------------------------------


def shared(size: int) -> Iterator[tuple[int, slice]]:
    """The pieces by number; what the last two have is shared evenly."""
    first = max(0, count(size) - 2)
    middle = first * PIECE + (size - first * PIECE + 1) // 2
    for nth, part in cut(size):
        if count(size) == 1 or nth < first:
            yield nth, part
        else:
            yield nth, slice(part.start, middle) if nth == first else slice(middle, size)


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


def sign_scales(size: int) -> int:
    """Scales of so many numbers: one for each group of numbers that the rotation has made alike."""
    return sum(1 if span(p.stop - p.start) == p.stop - p.start else 2 for _, p in shared(size))


def sign_bytes(size: int, fraction: float) -> int:
    """Of the signs of so many numbers."""
    return sum((run * sent + 7) // 8 for run, _, sent in (drawn(p.stop - p.start, fraction) for _, p in shared(size)))


def sent_signs(size: int, fraction: float) -> int:
    """Numbers whose signs are sent."""
    return sum(run * sent for run, _, sent in (drawn(p.stop - p.start, fraction) for _, p in shared(size)))


def to_signs(vector: Flat, fraction: float, key: Key) -> tuple[bytes, bytes]:
    """Scales, and signs, of a vector. Raises NonFiniteUpdate, UpdateOutOfRange."""
    scales, signs = list[float](), list[bytes]()
    room = aligned(min(PIECE, len(vector)))
    for nth, part in shared(len(vector)):
        turned, seed = room[: part.stop - part.start], key.draw("eden", nth)
        np.copyto(turned, vector[part])
        require_finite(turned, part.start)
        rotate(turned, seed)
        if len(turned) < SHORT:
            rotate(turned, key.draw("eden", nth, "again"))
        _, runs, sent = drawn(len(turned), fraction)
        where = places(len(turned), fraction, seed)
        chosen = gather(turned, where)
        for group in _alike(len(turned), where):
            total = float(np.add.reduce(np.abs(chosen[group]), dtype=np.float64))
            squares = float(np.add.reduce(np.square(chosen[group], dtype=np.float64)))
            scales.append((runs / sent) * (squares / total) if total > 0 else 0.0)
        signs.append(np.packbits(chosen >= 0).tobytes())
    return np.array(scales, "<f4").tobytes(), b"".join(signs)


def _alike(size: int, where: NDArray[np.intp]) -> tuple[slice, ...]:
    """The places by groups: of a length that is no power of two the first numbers are not mixed with the last ones."""
    apart = size - span(size)
    if not apart:
        return (slice(len(where)),)
    middle = int(np.searchsorted(where, apart))
    return slice(middle), slice(middle, len(where))


def from_signs(data: memoryview, scales: Flat, size: int, fraction: float, key: Key) -> Iterator[Flat]:
    """The estimate of the vector, piece by piece."""
    start, at = 0, 0
    for nth, part in shared(size):
        numbers, seed = part.stop - part.start, key.draw("eden", nth)
        where = places(numbers, fraction, seed)
        stop = start + (len(where) + 7) // 8
        bits = np.unpackbits(np.frombuffer(data[start:stop], np.uint8), count=len(where))
        start = stop
        found = np.empty(len(where), np.float32)
        for group in _alike(numbers, where):
            np.take(np.array([-scales[at], scales[at]], np.float32), bits[group], out=found[group])
            at += 1
        turned = scatter(found, where, numbers)
        if numbers < SHORT:
            unrotate(turned, key.draw("eden", nth, "again"))
        unrotate(turned, seed)
        yield turned


# Huffman's code -------------------------------------------------------------------------------------------------------


def deflate(symbols: bytes, bits: int) -> bytes:
    """Symbols by their frequency alone (rotated numbers are near normal, and nothing in them repeats): a raw deflate stream.

    Of those of 8 bits only the high halves, two in a byte; the low ones, in which there is nothing to be saved, come before.
    """
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    if bits == 4:
        return packer.compress(symbols) + packer.flush()
    whole, lows, highs = np.frombuffer(symbols, np.uint8), list[bytes](), list[bytes]()
    for _, part in cut(len(whole)):
        lows.append(_pair(whole[part]).tobytes())
        highs.append(packer.compress(_pair(whole[part] >> np.uint8(4)).tobytes()))
    return b"".join((*lows, *highs, packer.flush()))


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


class Halves:
    """Reads symbols of 8 bits on, as `deflate` has halved them; raises BrokenTransfer if even the low halves are not there."""

    def __init__(self, data: memoryview, size: int) -> None:
        lows = grid_bytes(size, 4)
        if len(data) < lows:
            raise BrokenTransfer(f"a payload of {size:,} symbols ends after {len(data):,} bytes of them")
        self._lows, self._highs = Plain(data[:lows]), Inflating(data[lows:])

    def __call__(self, size: int) -> NDArray[np.uint8]:
        lows, highs = self._lows(_symbol_bytes(size, 4)), self._highs(_symbol_bytes(size, 4))
        found = _unpair(highs, size)
        found <<= 4
        found |= _unpair(lows, size)
        return found

    def finish(self) -> None:
        """Raise BrokenTransfer unless the stream ends here."""
        self._highs.finish()


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
