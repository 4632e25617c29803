"""Distributed noise: updates as whole numbers, each with its share of Skellam noise, whose masked sum is all that anybody sees.

    clip to C; rotate; divide by the step; round at random, until the norm is D2 at most; add Skellam noise; modulo 2^bits.

Agarwal, Kairouz and Liu 2021, "The Skellam mechanism for differentially private federated learning"; conditional rounding and
its D2 are from Kairouz, Liu and Steinke 2021, "The distributed discrete Gaussian mechanism", proposition 26. Skellam noise is
closed under addition: the sum over n clients has Skellam noise of n times one's variance. That of n_min, who are the fewest
that a sum may be of, less those who might tell the server theirs, is what is counted on; more clients make more noise.

A vector D2 long at most is taken away or put in: D2 is exact, whatever floating point does before, since it is checked on whole
numbers. The remainder modulo 2^bits comes after all noise, so a sum that wraps is as private as another, only useless.

Central noise on a masked sum goes the same way, but that the clients add none and whoever opens the sum adds it all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from seqfed.common.dp import noise
from seqfed.common.errors import ConfigError, MaskingFailed, NonFiniteUpdate
from seqfed.common.rotation import Flat, rotate, span, unrotate

CODEC: Final = "dpq-1"
PIECE: Final = 1 << 13  # numbers converted at once
FINE: Final = (
    64.0  # C / step is at most so many sqrt(dim): rounding then adds 1e-4 to the noise, and finer adds nothing
)
COARSE: Final = 2.0  # D2 is at most so many C / step: beyond it most of the noise would hide the rounding
WRAPS: Final = 1e-3  # numbers of a round's sum expected to wrap, at most
GARBAGE: Final = 40.0  # -log of the probability that a sum of honest updates is held for one that is not
Residues = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Mechanism:
    """What clients do, what the server does, and what the accountant counts on. Raises ConfigError if bits are too few.

    Attributes:
        dim: Numbers in an update.
        bits: b, of each number of an upload.
        clip: C, the L2 norm of an update.
        n_max: The most clients in a sum.
        n_min: How many clients' noise is counted on; n_max if it is the server that adds it.
        multiplier: Of the noise: its standard deviation / D2, at n_min clients.
    """

    dim: int
    bits: int
    clip: float
    n_max: int
    n_min: int
    multiplier: float

    def __post_init__(self) -> None:
        if self.n_min < 1:
            raise ConfigError(
                "distributed noise is counted on from privacy.min_survivors less privacy.dp.colluding clients, and that is "
                f"{self.n_min}; raise the one or lower the other"
            )
        if self.bound2 > COARSE * self.scale:
            raise ConfigError(
                f"privacy.b = {self.bits}: a sum of {self.dim:,} numbers over {self.n_max:,} clients leaves {self.scale:.3g} "
                f"steps for an update of norm {self.clip:g}, and rounding alone may add {self.bound2 - self.scale:.3g}; raise "
                "privacy.b, or privacy.min_survivors"
            )

    @cached_property
    def scale(self) -> float:
        """C / step: how long an update may be in steps, before it is rounded."""
        # deviations: a number is beyond with a probability of 2 exp(-far^2 / 2)
        far = math.sqrt(2 * math.log(2 * self.dim / WRAPS))
        room = (2 ** (self.bits - 1) - 1) / far
        low, high = 0.0, FINE * math.sqrt(self.dim)
        if self._spread(high) > room:
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if self._spread(middle) <= room else (low, middle)
            high = low
        # 10 bits of it, so that another machine's logarithm makes no other step
        mantissa, exponent = math.frexp(high)
        return math.ldexp(math.floor(mantissa * 1024), exponent - 10)

    def _spread(self, scale: float) -> float:
        """A standard deviation of a number of the sum, at n_max clients with the same update."""
        mean = (self.n_max * scale) ** 2 / span(self.dim)
        noise_variance = self.multiplier**2 * _square_bound(scale, self.dim) * self.n_max / self.n_min
        return math.sqrt(mean + self.n_max / 4 + noise_variance)

    @property
    def step(self) -> float:
        """What one stands for."""
        return self.clip / self.scale

    @cached_property
    def square(self) -> int:
        """D2^2, a whole number."""
        return math.floor(_square_bound(self.scale, self.dim))

    @property
    def bound2(self) -> float:
        """D2: the L2 norm of an update in steps, after rounding."""
        return math.sqrt(self.square)

    @property
    def bound1(self) -> float:
        """D1: the L1 norm of whole numbers with that L2 norm, at most."""
        return min(math.sqrt(self.dim) * self.bound2, float(self.square))

    @property
    def variance(self) -> float:
        """mu: of the noise on each number of a sum over n_min clients, in steps squared."""
        return self.multiplier**2 * self.square

    @property
    def client_variance(self) -> float:
        """Of one client's noise."""
        return self.variance / self.n_min

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """The smallest native unsigned integers of at least `bits` bits, as `Terms.dtype`."""
        return np.dtype(np.uint8 if self.bits <= 8 else np.uint16 if self.bits <= 16 else np.uint32)

    def noise_norm(self, clients: int) -> float:
        """The expected norm of the noise on the sum of so many clients' updates, in the updates' unit."""
        return self.step * math.sqrt(self.dim * self.client_variance * clients)


def encode(
    update: Flat, mechanism: Mechanism, seed: int, key: bytes, *, noisy: bool = True, workers: int = 1
) -> tuple[Residues, bool]:
    """The update, clipped, as residues modulo 2^bits with this client's noise, and whether it was longer than the clip.

    update: float32 (dim,), left as it is. seed: of the rotation, the same for all of a round's clients. key: secret, and fresh
    (`noise.fresh_key`): the same vector with other noise is another release. noisy: False leaves the noise to the server.
    Holds one more float32 vector. Raises NonFiniteUpdate.
    """
    length = _length(update)
    if not math.isfinite(length):
        place = int(np.flatnonzero(~np.isfinite(update))[0])
        raise NonFiniteUpdate(
            f"an update holds {update[place]}; lower the learning rate or look for missing values in the data"
        )
    clipped = length > mechanism.clip
    factor = mechanism.clip / length if clipped else 1.0
    turned = np.multiply(update, factor, dtype=np.float64, casting="same_kind", out=np.empty(mechanism.dim, np.float32))
    rotate(turned, seed)
    # the rotation's own rounding may have made it longer
    factor = mechanism.scale / max(_length(turned), mechanism.clip)
    found = np.empty(mechanism.dim, mechanism.dtype)
    stream = noise.Stream(noise.derived(key, "rounding"))
    while _round(turned, factor, stream, found) > mechanism.square:
        pass
    if noisy:
        noise.add(found, noise.skellam(mechanism.client_variance), noise.derived(key, "noise"), workers=workers)
    found &= mechanism.dtype.type((1 << mechanism.bits) - 1)
    return found, clipped


def decode(total: Residues, mechanism: Mechanism, seed: int, *, clients: int, target: int) -> Flat:
    """The sum of `clients` updates with its noise, divided by `target`: float32 (dim,).

    total: (dim,) of mechanism.dtype, modulo 2^bits or more, with all noise in it. Raises MaskingFailed if it is longer than the
    sum of so many clipped updates and their noise can be.
    """
    unused = 8 * mechanism.dtype.itemsize - mechanism.bits
    signed = np.dtype(f"i{mechanism.dtype.itemsize}")
    found = np.empty(mechanism.dim, np.float32)
    for start in range(0, mechanism.dim, PIECE):
        part = (total[start : start + PIECE] << unused).view(signed) >> unused
        found[start : start + PIECE] = part
    # of the chi-square law: Laurent and Massart 2000, lemma 1
    numbers = mechanism.dim + 2 * math.sqrt(mechanism.dim * GARBAGE) + 2 * GARBAGE
    spread = mechanism.client_variance * max(clients, mechanism.n_min)
    longest = 1.001 * clients * mechanism.bound2 + math.sqrt(numbers * spread)
    if not (length := _length(found)) <= longest:
        raise MaskingFailed(
            f"the sum of {clients:,} updates is {length:.3g} steps long; at most {longest:.3g} can come of updates that keep "
            "to the settings and of their noise: a client sent something else"
        )
    found *= np.float32(mechanism.step / target)
    unrotate(found, seed)
    return found


def _square_bound(scale: float, dim: int) -> float:
    """D2^2 of an update of norm `scale` after rounding: met with a probability of 1 - exp(-1/2) or more."""
    root = math.sqrt(dim)
    return min(scale * scale + dim / 4 + scale + root / 2, (scale + root) ** 2)


def _round(turned: Flat, factor: float, stream: noise.Stream, out: Residues) -> int:
    """Round turned x factor into `out`, modulo 2^(its bits); the square of the rounded vector's norm, exactly."""
    reals, draws, square = np.empty(PIECE), np.empty(PIECE), 0
    for start in range(0, len(turned), PIECE):
        part = turned[start : start + PIECE]
        real = reals[: len(part)]
        np.multiply(part, factor, out=real, dtype=np.float64)
        real += stream.uniform(draws[: len(part)])
        np.floor(real, out=real)
        whole = real.astype(np.int64)
        square += int(np.add.reduce(whole * whole))
        out[start : start + PIECE] = whole.astype(out.dtype)
    return square


def _length(numbers: Flat) -> float:
    """The L2 norm, summed in float64."""
    squares = 0.0
    for start in range(0, len(numbers), PIECE):
        squares += float(np.add.reduce(np.square(numbers[start : start + PIECE], dtype=np.float64)))
    return math.sqrt(squares)
