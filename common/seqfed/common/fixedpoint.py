"""Fixed-point integers: float32 numbers as int64 counts of 2^-30, so that sums do not depend on their order.

Floating-point addition does not commute with rounding; integer addition does. A weighted delta is rounded once, to the
nearest multiple of 2^-30 (half to even), and from then on everything is exact. (With weights above 2^29 the product has
more than a float64's 53 bits and is rounded to those first; still the same way for everybody.) 2^-30 is an eighth of
float32's spacing between 1/16 and 1/8, where a network's weights mostly lie, and leaves 32 bits above the point for
weight x delta summed over the cohort.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

FRACTION_BITS: Final = 30
SCALE: Final = float(1 << FRACTION_BITS)
PIECE: Final = 1 << 14  # numbers converted at once: the float64 and int64 copies (256 KiB) stay in a core's cache
LIMIT: Final = float(1 << (62 - FRACTION_BITS))  # of |sum of weight x delta|: one bit below int64's own, for rounding


def accumulate(total: NDArray[np.int64], numbers: NDArray[np.float32], weight: float, *, first: bool = False) -> None:
    """total += round(weight x numbers x 2^30), in place; both of one shape (n,). The first overwrites what `total` held.

    Precondition: weight x max|numbers| <= LIMIT, also for the sum of all that is accumulated.
    """
    scaled, whole = np.empty(PIECE), np.empty(PIECE, np.int64)
    for start in range(0, len(numbers), PIECE):
        part, sums = numbers[start : start + PIECE], total[start : start + PIECE]
        reals, integers = scaled[: len(part)], whole[: len(part)]
        np.multiply(part, weight * SCALE, out=reals, dtype=np.float64)
        np.rint(reals, out=reals)
        np.copyto(sums if first else integers, reals, casting="unsafe")
        if not first:
            sums += integers


def mean(total: NDArray[np.int64], weight: int) -> NDArray[np.float64]:
    """total / (weight x 2^30), same shape: the weighted mean. Precondition: weight >= 1."""
    return np.divide(total, weight * SCALE, dtype=np.float64)
