"""Fixed-point integers: float32 numbers as int64 counts of 2^-30, so that sums do not depend on their order.

Floating-point addition does not commute with rounding; integer addition does. A weighted delta is rounded once, to the
nearest multiple of 2^-30 (half to even), and from then on everything is exact. 2^-30 is an eighth of float32's spacing
between 1/16 and 1/8, where a network's weights mostly lie, and leaves 32 bits above the point for weight x delta summed
over the cohort.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

FRACTION_BITS: Final = 30
SCALE: Final = float(1 << FRACTION_BITS)
LIMIT: Final = float(1 << (62 - FRACTION_BITS))  # of |sum of weight x delta|: one bit below int64's own, for rounding


def encode(numbers: NDArray[np.float32], weight: int) -> NDArray[np.int64]:
    """round(weight x numbers x 2^30) as int64, same shape. Precondition: weight x max|numbers| <= LIMIT."""
    scaled = numbers.astype(np.float64)
    scaled *= weight * SCALE
    np.rint(scaled, out=scaled)
    return scaled.astype(np.int64)


def decode(total: NDArray[np.int64], weight: int) -> NDArray[np.float64]:
    """total / (weight x 2^30) as float64, same shape: the weighted mean. Precondition: weight >= 1."""
    mean = total.astype(np.float64)
    mean /= weight * SCALE
    return mean
