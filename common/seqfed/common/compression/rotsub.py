"""An update as few whole numbers whose sum modulo 2^bits is that of the updates: the same random part of the rotated
coordinates for all clients, so that it composes with secure aggregation. As `seqfed.common.quantising`, but for that part:

    clip to C; times the weight share u; rotate; take the part; q = x / step rounded at random; clamp to -L..L; modulo 2^bits.

The mean's estimate is 1 / fraction times the part's, rotated back: unbiased, with (1 / fraction - 1) |mean|^2 of noise, which
all clients share and more clients do not lessen. Groups with a part each do (`groups` in docs/compression.md).

Two ways to choose L and the step. `bounded`: L = (2^(bits-1) - 1) / n_max, so that no sum ever wraps. `tuned`: over n clients
numbers of random signs add up to sqrt(n), not n, times their size (Bonawitz et al. 2019, "Federated learning with autotuned
communication-efficient secure aggregation"); the step is such that the sum, of the deviation that the last round's had,
wraps beyond z deviations. Each number then wraps with the probability `wrap` = erfc(z / sqrt(2)), 6e-5 at z = 4, if the sum is
normal and its deviation the last one's; `decode` refuses a sum that is far from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Final

import numpy as np

from seqfed.common.compression.pieces import drawn, gather, places, require_finite, scatter
from seqfed.common.errors import ConfigError, MaskingFailed
from seqfed.common.layout import Flat
from seqfed.common.masking.terms import WIDTHS
from seqfed.common.quantising import FLOAT32, PIECE, Residues
from seqfed.common.rotation import rotate, span, unrotate

CODEC: Final = "rotsub-1"
ROOM: Final = 3.5  # deviations that a step leaves room for where L is small (privacy papers' z)
WRAP: Final = 6.3e-5  # of a number of a tuned sum: four deviations
WILD: Final = (
    0.5  # of half the modulus: a sum whose root mean square is above is noise, or far from what it was tuned for
)


@dataclass(frozen=True)
class Part:
    """The whole numbers that stand for a part of an update of `dim` numbers with an L2 norm of at most `clip`.

    Attributes:
        dim: Numbers of an update.
        fraction: Share of the rotated ones that is sent.
        bits: The sum is modulo 2^bits; 2 to 32.
        levels: Numbers are in -levels..levels.
        clip: The longest update, C.
        step: What one stands for.
        wrap: With which probability a number of the sum wraps, if that is as it was tuned for; 0: none ever does.
    """

    dim: int
    fraction: float
    bits: int
    levels: int
    clip: float
    step: float
    wrap: float = 0.0

    @cached_property
    def size(self) -> int:
        """Numbers that are sent: `Terms.dim`."""
        run, _, sent = drawn(self.dim, self.fraction)
        return run * sent

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest native unsigned integers of at least `bits` bits."""
        return np.dtype(np.uint8 if self.bits <= 8 else np.uint16 if self.bits <= 16 else np.uint32)


def bounded(dim: int, fraction: float, bits: int, n_max: int, clip: float) -> Part:
    """No sum of n_max clients wraps; raises ConfigError if they are too many for `bits`."""
    levels = _half(bits) // n_max
    if levels < 1:
        raise ConfigError(
            f"a sum of {bits} bits is for {_half(bits):,} clients at most, a round may have {n_max:,}; use more bits"
        )
    room = max(ROOM, 2 * math.sqrt(math.log(2 * levels)))
    return Part(dim, fraction, bits, levels, clip, room * clip / (math.sqrt(span(dim)) * levels))


def tuned(
    dim: int, fraction: float, bits: int, n_max: int, clip: float, deviation: float | None = None, wrap: float = WRAP
) -> Part:
    """The sum of up to n_max clients is of this standard deviation (in the update's units, times weight shares).

    deviation: of a number of the last round's sum (`deviation_of`); None before there is one: that of n_max updates of length C
    in the same direction. Raises ConfigError if rounding alone would make the sum wrap.
    """
    if deviation is None:
        deviation = n_max * clip / math.sqrt(dim)
    if not 0 < deviation < math.inf:
        raise ConfigError(f"a tuned sum of deviation {deviation:g}; it must be above 0")
    return Part(dim, fraction, bits, _half(bits), clip, deviation / _span_of(bits, n_max, wrap), wrap)


def bits_of(n_max: int, wrap: float = WRAP) -> int:
    """The width with which a tuned sum of so many bytes has the least noise. With p = bytes / bits of the numbers it is
    (1 + r) / p - 1 of the mean, and of that r is the rounding's: a variance of step^2 / 6 a client.

    >>> [bits_of(n) for n in (3, 10, 30, 100)]
    [4, 5, 6, 8]
    """

    def cost(bits: int) -> float:
        try:
            return bits * (1 + n_max / 6 / _span_of(bits, n_max, wrap) ** 2)
        except ConfigError:
            return math.inf

    return min(WIDTHS, key=cost)


def _span_of(bits: int, n_max: int, wrap: float) -> float:
    """Steps of a tuned sum that one deviation has: 2^(bits-1) - 1 >= z sqrt(span^2 + n / 4), since rounding adds a variance of
    at most step^2 / 4 a client. Raises ConfigError if that alone is too much.
    """
    # Rounded, since another machine's may differ in the last bit.
    z = round(NormalDist().inv_cdf(1 - wrap / 2), 2)
    rest = float(_half(bits)) ** 2 - z * z * n_max / 4
    if rest <= 0:
        raise ConfigError(
            f"privacy.b = {bits}: a tuned sum of {bits} bits over {n_max:,} clients wraps by rounding alone; use more bits"
        )
    return math.sqrt(rest) / z


def quantise(update: Flat, share: float, part: Part, seed: int, rounding: np.random.Generator) -> tuple[Residues, bool]:
    """`share` times the update, clipped, as residues modulo 2^bits, (part.size,), and whether it was longer than part.clip.

    update: float32 (part.dim,), left as it is. share: in (0, 1]. seed: of rotation and part, the same for all of a round's
    clients. rounding: the same state gives the same bits. Raises NonFiniteUpdate, UpdateOutOfRange.
    """
    require_finite(update)
    length = _length(update)
    clipped = length > part.clip
    turned = np.multiply(
        update, part.clip / length if clipped else 1.0, dtype=np.float64, casting="same_kind", out=np.empty_like(update)
    )
    rotate(turned, seed)
    chosen = gather(turned, places(part.dim, part.fraction, seed))
    found = np.empty(part.size, part.dtype)
    for start in range(0, part.size, PIECE):
        real = chosen[start : start + PIECE] * (share / part.step)
        real = np.floor(real + rounding.random(len(real)))
        np.clip(real, -part.levels, part.levels, out=real)
        found[start : start + PIECE] = real.astype(np.int64) & ((1 << part.bits) - 1)
    return found, clipped


def decode(total: Residues, part: Part, seed: int, *, clients: int, weight: int, max_weight: int) -> Flat:
    """The estimate of the weighted mean of `clients` updates from the sum of their residues: float32 (part.dim,).

    As `quantising.decode`. Raises MaskingFailed if no honest updates have such a sum.
    """
    whole = _signed(total, part)
    unit = part.step * max_weight / weight
    mean = (whole * unit).astype(np.float32)
    highest = int(np.abs(whole).max(initial=0))
    length = _length(mean)
    if part.wrap:
        longest = WILD * (1 << part.bits - 1) * unit * math.sqrt(part.size)
        most = 1 << part.bits - 1
    else:
        longest = FLOAT32 * part.clip + clients * unit * math.sqrt(part.size)
        most = clients * part.levels
    # Of few numbers the root mean square says little, and a tuned sum has no other bound.
    if highest > most or (length > longest and (part.size >= 64 or not part.wrap)):
        raise MaskingFailed(
            f"the sum of {clients:,} updates is {length:.3g} long with a number of {highest:,}; at most {longest:.3g} and "
            f"{most:,} are expected: a client sent something else, or the updates have grown beyond what the step was tuned for"
        )
    _, runs, sent = drawn(part.dim, part.fraction)
    mean *= np.float32(runs / sent)
    turned = scatter(mean, places(part.dim, part.fraction, seed), part.dim)
    unrotate(turned, seed)
    return turned


def deviation_of(total: Residues, part: Part, clients: int) -> float:
    """The deviation of a number of the sum without its rounding, for the next round's `tuned`; rather too much than too little.

    In steps the sum's square is s^2 and what rounding adds: |x| (1 - |x|) for each client's x between two levels, in the mean
    1 / 6 over many of them. Where all x are far below one it is |x|: of n normal ones 0.8 s if they are alike, and more if not.
    """
    whole = _signed(total, part)
    square = float(np.add.reduce(np.square(whole, dtype=np.float64))) / max(1, part.size)
    below = (math.sqrt(0.64 + 4 * square) - 0.8) / 2
    return part.step * math.sqrt(max(square - clients / 6, below * below, 1.0 / part.size))


def tuned_for(part: Part, n_max: int) -> float:
    """The deviation that it was tuned for. After a sum that `decode` refused the next one is tuned for twice as much."""
    return part.step * _span_of(part.bits, n_max, part.wrap)


def _signed(total: Residues, part: Part) -> np.ndarray[tuple[int, ...], np.dtype[np.signedinteger]]:
    unused = 8 * part.dtype.itemsize - part.bits
    found: np.ndarray[tuple[int, ...], np.dtype[np.signedinteger]]
    found = (total << unused).view(np.dtype(f"i{part.dtype.itemsize}")) >> unused
    return found


def _half(bits: int) -> int:
    if not 2 <= bits <= 32:
        raise ConfigError(f"a masked sum of {bits} bits; it must be 2 to 32")
    return (1 << bits - 1) - 1


def _length(numbers: Flat) -> float:
    """The L2 norm, summed in float64 in a fixed order."""
    squares = 0.0
    for start in range(0, len(numbers), PIECE):
        squares += float(np.add.reduce(np.square(numbers[start : start + PIECE], dtype=np.float64)))
    return math.sqrt(squares)
