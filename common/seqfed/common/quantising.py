"""An update as a vector of small whole numbers whose sum modulo 2^bits is that of the updates: what secure aggregation masks.

    clip to C; times the weight share u; rotate (`rotation`); q = x / step rounded up or down at random, so that its
    expectation is x / step; clamp to -L..L; modulo 2^bits.

Rotation and stochastic rounding: Suresh et al. 2017, "Distributed mean estimation with limited communication". C, L and the
step are fixed before the round and public, so they say nothing of a client's data. With L = (2^(bits-1) - 1) / n_max, rounded
down, a sum over n_max clients never wraps.

The step leaves room for z deviations: a rotated number of an update of norm C is beyond z C / sqrt(s) with probability
2 exp(-z^2 / 2) at most (s = `rotation.span`). z = 2 sqrt(ln 2L) makes that 2 / (2L)^2, so that clamping, the only bias, stays
below the rounding's noise: 3.6 at L = 12 (8 bits, 10 clients), 5.9 at L = 3276 (16 bits, 10 clients).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from seqfed.common.errors import ConfigError, MaskingFailed, NonFiniteUpdate
from seqfed.common.rotation import Flat, rotate, span, unrotate

CODEC: Final = "rotq-1"  # of both modules: another transform, order of steps or z is another codec
LEAST: Final = 2  # levels: with one, nearly all of a rotated update's numbers are rounded from below half a step
PIECE: Final = 1 << 14  # numbers converted at once: their float64 and int64 copies (256 KiB) stay in a core's cache
FLOAT32: Final = 1.001  # by which a rotated vector in float32 may be longer: 1e-6 were seen
FINE: Final = (
    1 << 16
)  # parts of a step that rounding tells apart: 16 random bits a number, whose odds are right to 2^-16
Residues = NDArray[np.unsignedinteger[Any]]


def levels(bits: int, n_max: int) -> int:
    """L, such that n_max clients' numbers from -L to L have a sum within 2^bits; raises ConfigError if L < 2.

    >>> levels(16, 10), levels(8, 63)
    (3276, 2)
    """
    found = ((1 << bits - 1) - 1) // n_max
    if found < LEAST:
        most = ((1 << bits - 1) - 1) // LEAST
        raise ConfigError(
            f"privacy.b = {bits}: a sum of {bits} bits is for {most:,} clients at most, a round of this run may have "
            f"{n_max:,}; raise privacy.b, or have fewer clients in a round (cohort.min_clients, count, over_select)"
        )
    return found


@dataclass(frozen=True)
class Lattice:
    """The whole numbers that stand for an update of `dim` numbers with an L2 norm of at most `clip`."""

    dim: int
    bits: int
    levels: int
    clip: float

    @cached_property
    def step(self) -> float:
        """What one stands for."""
        room = 2 * math.sqrt(math.log(2 * self.levels))
        return room * self.clip / (math.sqrt(span(self.dim)) * self.levels)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """The smallest native unsigned integers of at least `bits` bits."""
        return np.dtype(np.uint8 if self.bits <= 8 else np.uint16 if self.bits <= 16 else np.uint32)


def quantise(
    update: Flat, share: float, lattice: Lattice, seed: int, rounding: np.random.Generator
) -> tuple[Residues, bool]:
    """`share` times the update, clipped, as residues modulo 2^bits, and whether it was longer than lattice.clip.

    update: float32 (dim,), left as it is. share: in (0, 1]. seed: of the rotation, the same for all of a round's clients.
    rounding: the same state gives the same bits. Holds one more float32 vector. Raises NonFiniteUpdate.
    """
    turned, clipped = shortened(update, lattice.clip)
    rotate(turned, seed)
    found = np.empty(lattice.dim, lattice.dtype)
    reals, whole, draws = np.empty(PIECE), np.empty(PIECE, np.int64), rounding.bit_generator
    reach, mask = float(FINE * lattice.levels), (1 << lattice.bits) - 1
    for start in range(0, lattice.dim, PIECE):
        part = turned[start : start + PIECE]
        count = len(part)
        real, ints = reals[:count], whole[:count]
        np.multiply(part, FINE * share / lattice.step, out=real, dtype=np.float64)
        np.clip(real, -reach, reach, out=real)
        np.floor(real, out=real)
        np.copyto(ints, real, casting="unsafe")
        ints += draws.random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")[:count]
        ints >>= 16
        ints &= mask
        np.copyto(found[start : start + count], ints, casting="unsafe")
    return found, clipped


def shortened(update: Flat, clip: float) -> tuple[Flat, bool]:
    """The update scaled down to this norm, anew, and whether it was longer. Raises NonFiniteUpdate."""
    length = _length(update)
    if not math.isfinite(length):
        place = int(np.flatnonzero(~np.isfinite(update))[0])
        raise NonFiniteUpdate(
            f"an update holds {update[place]}; lower the learning rate or look for missing values in the data"
        )
    clipped = length > clip
    found = np.empty(len(update), np.float32)
    np.multiply(update, clip / length if clipped else 1.0, dtype=np.float64, casting="same_kind", out=found)
    return found, clipped


def decode(total: Residues, lattice: Lattice, seed: int, *, clients: int, weight: int, max_weight: int) -> Flat:
    """The weighted mean of `clients` updates from the sum of their residues: float32 (dim,), sum(w x) / sum(w).

    total: (dim,) of lattice.dtype, modulo 2^bits or more. weight: the sum of min(w, max_weight), above 0; a share was
    min(w, max_weight) / max_weight. Raises MaskingFailed if no honest updates have such a sum: a number beyond
    clients x L, or a vector that is longer than clipped ones, each rounded by less than a step a number, can make it.
    """
    unused = 8 * lattice.dtype.itemsize - lattice.bits
    signed = np.dtype(f"i{lattice.dtype.itemsize}")
    unit = lattice.step * max_weight / weight
    found = np.empty(lattice.dim, np.float32)
    highest = 0
    for start in range(0, lattice.dim, PIECE):
        part = (total[start : start + PIECE] << unused).view(signed) >> unused
        highest = max(highest, int(part.max()), -int(part.min()))
        np.multiply(part, unit, out=found[start : start + PIECE], dtype=np.float64, casting="same_kind")
    length = _length(found)
    longest = FLOAT32 * lattice.clip + clients * unit * math.sqrt(lattice.dim)
    if highest > clients * lattice.levels or not length <= longest:
        raise MaskingFailed(
            f"the sum of {clients:,} updates is {length:.3g} long with a number of {highest:,}; at most {longest:.3g} and "
            f"{clients * lattice.levels:,} can come of updates that keep to the settings: a client sent something else"
        )
    unrotate(found, seed)
    return found


def _length(numbers: Flat) -> float:
    """The L2 norm, summed in float64 in a fixed order; not a dot product, whose order is the BLAS library's."""
    squares = 0.0
    for start in range(0, len(numbers), PIECE):
        squares += float(np.add.reduce(np.square(numbers[start : start + PIECE], dtype=np.float64)))
    return math.sqrt(squares)
