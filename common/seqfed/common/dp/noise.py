"""Noise for privacy: whole numbers of the discrete Gaussian or the Skellam law, from a stream of AES-256-CTR.

Noise in floating point gives data away: which numbers noise can make, and so which sums, depends on what it is added to
(Mironov 2012; Holohan and Braghin 2021, "Secure random sampling in differential privacy"). Here the numbers to hide are whole
multiples of a unit before any noise comes, the noise is whole too, and every sum can come of every data: there is no
floating point left to look at. The discrete Gaussian is as private as the continuous one (Canonne, Kamath and Steinke 2020,
"The discrete Gaussian for differential privacy", theorem 4 and 7; no difference is left at 10 units and more).

A number is drawn by inverting a table with thresholds of 64 bits. Where the law is too wide for a table of all its numbers,
the table is of ranges, within which a number is drawn at random and kept with its probability beside the range's largest. What is
cut off has a probability below 2^-64. Both laws are symmetric and fall to both sides, which is all that is asked of them.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

KEY_BYTES: Final = 32
TABLE: Final = 4096  # ranges at most: with the guide they stay in a core's second-level cache
GUIDE: Final = 16  # bits of a draw that lead to its place in the table
PIECE: Final = 1 << 13  # numbers at once
CHUNK: Final = 1 << 18  # numbers of one counter of the stream, whatever the threads
CUT: Final = 9.4  # standard deviations: a Gaussian is beyond with a probability of 2^-67
SMALL: Final = 1e4  # variance up to which a Skellam law is of its recurrence, and above of its expansion
KEEP: Final = 24  # bits of a draw that decide whether a number is kept
WIDEST: Final = 2.0**47  # standard deviation: a number's place in its range has the other 39 bits
GRID: Final = 36  # bits of a standard deviation in `released`
ROUNDED: Final = 1 + 2.0**-12  # by how much what was clipped may be too long: floating point, and the grid
Floats = NDArray[np.float64]
Words = NDArray[np.uint64]
Whole = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Law:
    """A symmetric law of whole numbers, ready to be drawn from.

    Its absolute values are cut into ranges of 2^shift numbers, of which number 0 lies farthest out, where the thresholds are
    the smallest and so most exact.
    """

    std: float
    shift: int
    log: Callable[[Floats], Floats] = field(repr=False)  # of the probability of each |number|, but for a constant
    first: Whole = field(repr=False)  # of each range
    thresholds: Words = field(repr=False)  # range i: thresholds[i - 1] <= draw < thresholds[i]
    sure: Words = field(repr=False)  # of 2^24: below it, any number of the range is kept
    guide: NDArray[np.uint16] = field(repr=False)  # by a draw's first bits, the first range that it can be in
    crowded: NDArray[np.bool_] = field(repr=False)  # whether more than two ranges begin there


def fresh_key() -> bytes:
    """A key of the operating system's randomness: for one vector of noise."""
    return os.urandom(KEY_BYTES)


def derived(key: bytes, *labels: int | str) -> bytes:
    """Another key, of this one and these labels (HMAC-SHA-256)."""
    return hmac.digest(key, repr(labels).encode(), hashlib.sha256)


@lru_cache(maxsize=16)
def gaussian(std: float) -> Law:
    """The discrete Gaussian with this parameter: P(k) ~ exp(-k^2 / (2 std^2)); raises ValueError unless 0 < std <= 2^47."""
    _require(std)
    return _law(std, math.ceil(CUT * std), lambda k: -0.5 * np.square(k / std))


@lru_cache(maxsize=16)
def skellam(variance: float) -> Law:
    """The difference of two Poisson numbers of half this variance each: P(k) ~ I_k(variance)."""
    _require(math.sqrt(variance))
    std = math.sqrt(variance)
    # For a small variance the tails are Poisson's: P(|k| >= n) <= (e variance / n)^n, 2^-64 and less at 60 + 10 std.
    farthest = math.ceil(10 * std + 60)
    if variance > SMALL:
        return _law(std, farthest, lambda k: _expansion(k, variance))
    logs = _recurrence(farthest, variance)
    return _law(std, farthest, lambda k: logs[k.astype(np.int64)])


def add(out: NDArray[Any], law: Law, key: bytes, *, negative: bool = False, workers: int = 1) -> None:
    """out += one draw each, or -= if negative; modulo 2^(bits of out's type), in place.

    The same key gives the same draws, by however many threads: so it is for one vector only, or for taking its noise away
    again. out: integers, contiguous, one axis.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key of noise has {len(key)} bytes instead of {KEY_BYTES}")
    if out.dtype.kind not in "iu" or out.ndim != 1 or not out.flags.c_contiguous:
        raise ValueError(f"noise is added to contiguous integers, not to {out.dtype} of shape {out.shape}")

    def chunk(start: int) -> None:
        stream = Stream(key, start // CHUNK)
        for first in range(start, min(start + CHUNK, len(out)), PIECE):
            part = out[first : min(first + PIECE, start + CHUNK)]
            drawn = _draw(law, stream, len(part)).astype(out.dtype, copy=False)
            (np.subtract if negative else np.add)(part, drawn, out=part)

    starts = range(0, len(out), CHUNK)
    if min(workers, len(starts)) < 2:
        for start in starts:
            chunk(start)
        return
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(chunk, starts):
            pass


def released(numbers: NDArray[np.floating[Any]], std: float, key: bytes, workers: int = 1) -> NDArray[np.float32]:
    """The numbers with Gaussian noise: float32, same shape (n,).

    They are first rounded to whole multiples of std / 2^36, which may take two vectors from distance C to C + sqrt(n) std / 2^36:
    have `std` ROUNDED times as large as for C alone.
    Raises ValueError for numbers beyond 2^20 standard deviations, which no noise of that size hides.
    """
    unit = std / (1 << GRID)
    highest = float(np.max(np.abs(numbers), initial=0.0))
    if not highest <= std * (1 << 20):
        raise ValueError(f"a number of {highest:.3g} and noise of {std:.3g}: more than 2^20 standard deviations")
    whole = np.rint(np.divide(numbers, unit, dtype=np.float64)).astype(np.int64)
    add(whole, gaussian(float(1 << GRID)), key, workers=workers)
    found: NDArray[np.float32] = np.multiply(whole, unit, dtype=np.float64).astype(np.float32)
    return found


class Stream:
    """The keystream of AES-256-CTR as words of 64 bits, from a counter of its own for each `part`."""

    def __init__(self, key: bytes, part: int = 0) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        counter = modes.CTR(part.to_bytes(8, "big") + bytes(8))
        self._into = Cipher(algorithms.AES256(key), counter).encryptor().update_into
        self._zeros = bytes(16 * PIECE)
        self._made = np.empty(16 * PIECE + 16, np.uint8)

    def words(self, count: int) -> Words:
        """The next ones, at most 2 PIECE; they hold until the next call."""
        self._into(memoryview(self._zeros)[: 8 * count], self._made.data)
        return self._made[: 8 * count].view("<u8").astype(np.uint64, copy=False)

    def uniform(self, out: Floats) -> Floats:
        """Numbers in [0, 1) of 53 bits, into `out`: at most 2 PIECE."""
        np.multiply(self.words(len(out)) >> np.uint64(11), 2.0**-53, out=out)
        return out


def _draw(law: Law, stream: Stream, count: int) -> Whole:
    words = stream.words(2 * count)
    draw, bits = words[:count], words[count:]
    place = (draw >> np.uint64(64 - GUIDE)).view(np.int64)
    found = law.guide.take(place).astype(np.int64)
    found += draw >= law.thresholds.take(found)
    far = np.flatnonzero(law.crowded.take(place))
    if len(far):
        found[far] = np.searchsorted(law.thresholds, draw[far], side="right")
    # From the top: the sign, 24 bits that decide whether the number is kept, and the number's place in its range.
    number = law.first.take(found)
    number += (bits & np.uint64((1 << law.shift) - 1)).view(np.int64)
    keep = bits >> np.uint64(63 - KEEP)
    keep &= np.uint64((1 << KEEP) - 1)
    sign = bits.view(np.int64) >> 63
    unsure = keep >= law.sure.take(found)
    unsure |= number == 0
    number ^= sign
    number -= sign
    doubtful = np.flatnonzero(unsure)
    if len(doubtful):
        found, sign, keep = found[doubtful], sign[doubtful], keep[doubtful]
        size, first = np.abs(number[doubtful]).astype(np.float64), law.first[found].astype(np.float64)
        share = np.exp(law.log(size) - law.log(first))
        drawn = (keep + stream.uniform(np.empty(len(doubtful)))) * 2.0**-KEEP
        # 0 has no sign, or it would come twice as often
        again = doubtful[(drawn >= share) | ((size == 0) & (sign < 0))]
        if len(again):
            number[again] = _draw(law, stream, len(again))
    return number


def _law(std: float, farthest: int, log: Callable[[Floats], Floats]) -> Law:
    shift = max(0, (farthest // TABLE).bit_length())
    first = (np.arange(farthest >> shift, -1, -1) << shift).astype(np.int64)
    near, far = log(first.astype(np.float64)), log((first + (1 << shift) - 1).astype(np.float64))
    weight = np.exp(near - near[-1])
    share = np.rint(weight / weight.sum() * 2.0**64).astype(np.uint64)[:-1]
    thresholds = np.append(np.cumsum(share, dtype=np.uint64), np.uint64(2**64 - 1))
    # one less than it is, for the rounding of exp
    sure = np.maximum(np.floor(np.exp(far - near) * 2.0**KEEP - (shift > 0)), 0).astype(np.uint64)
    cells = np.arange(1 << GUIDE, dtype=np.uint64) << np.uint64(64 - GUIDE)
    guide = np.searchsorted(thresholds, cells, side="right")
    ends = np.append(guide[1:], len(first) - 1)
    # one range more, for the draw 2^64 - 1
    first, sure = np.append(first, first[-1]), np.append(sure, sure[-1])
    return Law(std, shift, log, first, thresholds, sure, guide.astype(np.uint16), ends - guide > 1)


def _recurrence(farthest: int, x: float) -> Floats:
    """log(I_k(x) / I_0(x)) for k = 0 to farthest, of I_(k-1) = I_(k+1) + (2 k / x) I_k from far beyond inwards (Miller's way)."""
    ratios, ratio = np.zeros(farthest + 1), 0.0
    for k in range(2 * farthest, 0, -1):
        ratio = 1 / (2 * k / x + ratio)
        if k <= farthest:
            ratios[k] = math.log(ratio)
    return np.cumsum(ratios)


def _expansion(k: Floats, x: float) -> Floats:
    """log(I_k(x)) but for a constant, of Debye's uniform expansion (Abramowitz and Stegun 9.7.7), written so that k may be 0."""
    slope = k / x
    root = np.sqrt(1 + slope * slope)
    p2, r = np.square(slope / root), x * root
    terms = (3 - 5 * p2) / (24 * r)
    terms += (81 + p2 * (-462 + p2 * 385)) / (1152 * r * r)
    terms += (30375 + p2 * (-369603 + p2 * (765765 - p2 * 425425))) / (414720 * r * r * r)
    found: Floats = x * slope * (slope / (1 + root) - np.arcsinh(slope)) - 0.5 * np.log(root) + np.log1p(terms)
    return found


def _require(std: float) -> None:
    if not 0 < std <= WIDEST:
        raise ValueError(f"noise of a standard deviation of {std:g} units; it must be above 0 and at most 2^47")
