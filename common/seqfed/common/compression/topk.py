"""The largest numbers of a vector, with error feedback: what is left out is added to the next vector (Stich et al. 2018,
"Sparsified SGD with memory").

Body: one scale (float32); the distances between the places as Rice codes with r low bits (Rice and Plaunt 1971): all the high
parts in unary, zeros closed by a one, filled up with zeros to whole bytes; all the low parts of r bits each; then the numbers,
as signs (the scale is their mean size) or in bytes (-127 to 127 times the scale). Which numbers are the largest is settled for
equal ones by their order.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from seqfed.common.compression.pieces import cut, require_finite, scales_of
from seqfed.common.errors import BrokenTransfer
from seqfed.common.layout import Flat

Places = NDArray[np.int64]


def sent_of(size: int, fraction: float) -> int:
    """How many of `size` numbers are sent."""
    return max(1, min(size, round(fraction * size)))


def body_bytes(size: int, sent: int, bits: int) -> int:
    """Of a body at most."""
    low = _low_bits(size, sent)
    unary = sent + (size - sent >> low)
    return 4 + (unary + 7) // 8 + (sent * low + 7) // 8 + (sent * bits + 7) // 8


def encode(vector: Flat, fraction: float, bits: int) -> tuple[bytes, Flat]:
    """A body, and what it leaves out; `vector` is that plus what the last one left out. Raises NonFiniteUpdate."""
    require_finite(vector)
    sent = sent_of(len(vector), fraction)
    sizes = np.abs(vector)
    bound = np.partition(sizes, len(sizes) - sent)[len(sizes) - sent]
    chosen = np.flatnonzero(sizes > bound)
    equal = np.flatnonzero(sizes == bound)[: sent - len(chosen)]
    places = np.sort(np.concatenate((chosen, equal))).astype(np.int64)
    numbers = vector[places]
    if bits == 1:
        scale = np.float32(np.add.reduce(sizes[places], dtype=np.float64) / sent)
        values = np.packbits(numbers >= 0).tobytes()
        decoded = np.where(numbers >= 0, scale, -scale)
    else:
        scale = np.float32(sizes[places].max() / 127)
        whole = np.rint(numbers / scale if scale > 0 else numbers).clip(-127, 127).astype(np.int8)
        values = whole.tobytes()
        decoded = whole * scale
    residual = vector.copy()
    residual[places] -= decoded.astype(np.float32)
    return np.array([scale], "<f4").tobytes() + _to_rice(places, len(vector)) + values, residual


def decode(body: memoryview, size: int, fraction: float, bits: int) -> Iterator[Flat]:
    """What `encode` sent, piece by piece; raises BrokenTransfer, UpdateOutOfRange before the first of them."""
    sent = sent_of(size, fraction)
    ending = (sent * bits + 7) // 8
    if len(body) < 4 + ending:
        raise BrokenTransfer(f"a payload of {sent:,} numbers ends after {len(body):,} bytes")
    scale = scales_of(body[:4])[0]
    places = _from_rice(body[4 : len(body) - ending], size, sent)
    rest = np.frombuffer(body[len(body) - ending :], np.uint8)
    signs = np.array([-scale, scale], np.float32)
    numbers = signs[_unpack(rest, sent)] if bits == 1 else rest.view(np.int8) * scale
    return _spread(places, numbers.astype(np.float32), size)


def _spread(places: Places, numbers: Flat, size: int) -> Iterator[Flat]:
    for _, part in cut(size):
        first, last = np.searchsorted(places, [part.start, part.stop])
        found = np.zeros(part.stop - part.start, np.float32)
        found[places[first:last] - part.start] = numbers[first:last]
        yield found


def _low_bits(size: int, sent: int) -> int:
    """r: near log2 of the mean distance times ln 2 (Gallager and van Voorhis 1975)."""
    return max(0, ((size - sent) * 693 // (1000 * sent)).bit_length() - 1)


def _to_rice(places: Places, size: int) -> bytes:
    low = _low_bits(size, len(places))
    gaps = np.diff(places, prepend=-1) - 1
    ones = np.cumsum((gaps >> low) + 1) - 1
    unary = np.zeros(int(ones[-1]) + 1, np.uint8)
    unary[ones] = 1
    lows = (gaps[:, None] >> np.arange(low)) & 1
    return np.packbits(unary).tobytes() + np.packbits(lows.astype(np.uint8)).tobytes()


def _from_rice(data: memoryview, size: int, sent: int) -> Places:
    low = _low_bits(size, sent)
    ending = (sent * low + 7) // 8
    unary = np.unpackbits(np.frombuffer(data[: max(0, len(data) - ending)], np.uint8))
    ones = np.flatnonzero(unary)
    if len(ones) != sent or len(unary) - int(ones[-1]) > 8:
        raise BrokenTransfer(f"a payload has {len(ones):,} places for {sent:,} numbers, or bytes without any")
    lows = _unpack(np.frombuffer(data[len(data) - ending :], np.uint8), sent * low).reshape(sent, low).astype(np.int64)
    gaps = (np.diff(ones, prepend=-1) - 1 << low) + (lows << np.arange(low)).sum(axis=1)
    places: Places = np.cumsum(gaps + 1) - 1
    if places[-1] >= size:
        raise BrokenTransfer(f"a payload has a number at place {int(places[-1]):,} of {size:,}")
    return places


def _unpack(data: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """So many bits; raises BrokenTransfer if what fills up the last byte is not 0."""
    found = np.unpackbits(data)
    if found[count:].any():
        raise BrokenTransfer("a payload's last byte is filled up with bits that are not 0")
    return found[:count]
