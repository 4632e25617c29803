"""FedAvg's server side, the whole arithmetic (McMahan et al. 2017, "Communication-efficient learning of deep networks from
decentralized data", Algorithm 1): the new global model is the old one plus the weighted mean of the clients' deltas,

    w_(t+1) = w_t + sum_k n_k (w_k - w_t) / sum_k n_k,        n_k = 1 for the uniform mean.

The sum is kept in integers (`seqfed.common.fixedpoint`), so the result is the same to the last bit whatever order the
updates arrive in. Each update is checked wholly before it is folded, and folded in pieces, so that memory is one int64
vector, however many clients there are; the first update is written over whatever that vector held.

Where a run bounds the norm of an update, d_k = w_k - w_t counts as d_k min(1, C / |d_k|) with the bound C: however far one
client goes, it moves the sum by n_k C at most (Sun et al. 2019, "Can you really backdoor federated learning?").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from seqfed.common.errors import EmptyRound, LayoutMismatch, NonFiniteUpdate, UpdateOutOfRange
from seqfed.common.fixedpoint import LIMIT, PIECE, accumulate, mean
from seqfed.common.layout import Flat

MAX_WEIGHT: Final = 1 << 40  # examples (or tokens) behind one update: weight x 2^30 stays exact in a float64's exponent


@dataclass
class WeightedSum:
    """sum_k n_k delta_k in units of 2^-30, and sum_k n_k, of one round."""

    total: NDArray[np.int64]  # shape (parameters,); anything while weight is 0
    weight: int = 0


def empty(size: int, used: WeightedSum | None = None) -> WeightedSum:
    """The sum of no updates, for a model of `size` parameters; in the memory of a sum that is no longer needed, if given."""
    return WeightedSum(np.empty(size, np.int64) if used is None else used.total)


def peak(numbers: Flat) -> float:
    """max |numbers|; raises NonFiniteUpdate if any is NaN or infinite."""
    # Two plain reductions: |numbers| would be a copy. A NaN wins either.
    highest = max(float(np.max(numbers, initial=0.0)), -float(np.min(numbers, initial=0.0)))
    if not np.isfinite(highest):
        place = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise NonFiniteUpdate(
            f"an update holds {numbers[place]}; lower the learning rate or look for missing values in the data"
        )
    return highest


def check(weight: int, highest: float, cohort: int) -> None:
    """Raise UpdateOutOfRange unless `cohort` updates like this one (weight, max |delta|) fit the sum together.

    The bound depends on no other update, so who is refused does not depend on who came first.
    """
    if not 1 <= weight <= MAX_WEIGHT:
        raise UpdateOutOfRange(f"an update's weight is {weight:,}; it must be from 1 to {MAX_WEIGHT:,} examples")
    if weight * highest * cohort > LIMIT:
        raise UpdateOutOfRange(
            f"an update changes a parameter by {highest:.3g} with weight {weight:,}; in a cohort of {cohort:,} the product "
            f"of the two may be at most {LIMIT / cohort:.3g}; lower the learning rate"
        )


class Norm:
    """The L2 norm of a vector that comes in parts: the same bits however it is cut, since it is summed in pieces of its own."""

    def __init__(self) -> None:
        self._squares = 0.0  # of all whole pieces
        self._rest = np.empty(0, np.float32)  # of a piece that is not whole yet

    def add(self, numbers: Flat) -> None:
        """The vector's next numbers, finite."""
        if len(self._rest):
            numbers = np.concatenate((self._rest, numbers))
        whole = len(numbers) - len(numbers) % PIECE
        for start in range(0, whole, PIECE):
            self._squares += _squares(numbers[start : start + PIECE])
        self._rest = numbers[whole:].copy()

    @property
    def value(self) -> float:
        return math.sqrt(self._squares + _squares(self._rest))


def _squares(numbers: Flat) -> float:
    """Their squares' sum in float64; not a dot product, whose order is the BLAS library's and the processor's."""
    return float(np.add.reduce(np.square(numbers, dtype=np.float64)))


def norm(delta: Iterable[Flat]) -> float:
    """The L2 norm of the vector in these parts."""
    found = Norm()
    for part in delta:
        found.add(part)
    return found.value


def shrink(length: float, bound: float) -> float:
    """What to multiply a vector of this length with so that it is `bound` long at most."""
    return bound / length if length > bound else 1.0


def fold(sum_: WeightedSum, weight: int, delta: Iterable[Flat], scale: float = 1.0) -> None:
    """Add one checked update, times `scale`: `delta` yields consecutive parts of its flat vector, float32.

    Precondition: `check` passed for it. Raises LayoutMismatch if the parts are too few or too many; the sum is then void.
    """
    share = weight * scale
    start = 0
    for part in delta:
        if start + len(part) > len(sum_.total):
            raise LayoutMismatch(f"an update has more than the model's {len(sum_.total):,} parameters")
        accumulate(sum_.total[start : start + len(part)], part, share, first=sum_.weight == 0)
        start += len(part)
    if start != len(sum_.total):
        raise LayoutMismatch(f"an update has {start:,} of the model's {len(sum_.total):,} parameters")
    sum_.weight += weight


def finish(sum_: WeightedSum, model: Iterable[Flat]) -> Iterator[Flat]:
    """The new global model in parts, from consecutive parts of the old one; raises EmptyRound if nothing was folded."""
    if sum_.weight < 1:
        raise EmptyRound("no update was folded in this round, so it has no mean")
    start = 0
    for part in model:
        fresh = np.empty(len(part), np.float32)
        for at in range(0, len(part), PIECE):
            old = part[at : at + PIECE]
            change = mean(sum_.total[start + at : start + at + len(old)], sum_.weight)
            np.add(old, change, out=fresh[at : at + PIECE], dtype=np.float64, casting="same_kind")
        start += len(part)
        yield fresh
