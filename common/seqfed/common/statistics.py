"""Mean and scale of each number column over all clients' training data: `data.normalise = "federated"`.

Each client sends sums over its own values, of which those of the pooled values follow exactly: a number is counted in whole
units of 2^-60, its square in units of 2^-120, and whole numbers add up to the same in any order and any partition. float32
holds nothing between 2^-36 and 2^60 (1e-11 and 1e18) that this rounds, so neither a large mean nor many rows cost a digit of
the standard deviation. A sum travels in limbs of 40 bits (as `metrics.CARRY`), each of which adds up over 2^23 clients.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, Any, Final, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from seqfed.common.config import validate
from seqfed.common.errors import ConfigError, DataError
from seqfed.common.metrics import CARRY, Tally
from seqfed.common.spec import DataSpec, RunSpec, Settings

UNIT_BITS: Final = 60  # a number is counted in units of 2^-60
LIMIT: Final = float(1 << 60)  # of a number's size
LIMBS: Final = {"sum": 4, "square": 7}  # of 40 bits: 120 and 240 for one number, and 40 for as many rows
MOST_COLUMNS: Final = 10_000  # 12 sums each: 3 MB, a message may have 4
PIECE: Final = 1 << 15  # numbers worked on at once: their copies (256 KiB each) stay in a core's cache
MANTISSA: Final = 24  # bits of a float32
SHIFTS: Final = 2 * UNIT_BITS - MANTISSA + 1  # places at which a number below LIMIT can have its mantissa


class Statistics(Settings):
    """What a run subtracts and divides by, one a number column."""

    mean: tuple[float, ...] = Field(strict=False)
    scale: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        strict=False, description="standard deviation; 1 if it is 0"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.mean) != len(self.scale):
            raise ValueError(f"mean has {len(self.mean)} numbers, scale {len(self.scale)}; one of each a column is due")
        return self


def names(spec: RunSpec) -> tuple[str, ...]:
    """Every sum of this run's columns, in a fixed order; raises ConfigError if they are too many for one message.

    `count.c`: numbers of column c that are there; `sum.c.i`, `square.c.i`: the i-th limb, lowest first, of the sum of those
    numbers and of their squares. The last limb has the sign.
    """
    columns = spec.data.numbers
    if columns > MOST_COLUMNS:
        raise ConfigError(
            f"data.normalise = 'federated' is for {MOST_COLUMNS:,} columns at most, these are {columns:,}; give mean and "
            "scale, or numbers that need neither"
        )
    limbs = [(kind, limb) for kind, count in LIMBS.items() for limb in range(count)]
    return tuple(
        name for c in range(columns) for name in (f"count.{c}", *(f"{kind}.{c}.{limb}" for kind, limb in limbs))
    )


class Sums:
    """The sums over rows that come block by block."""

    def __init__(self, columns: int) -> None:
        self._counts = np.zeros(columns, np.int64)
        # By column and place: of the mantissas, and of the higher and lower 24 bits of their squares.
        self._mantissas, self._highs, self._lows = (np.zeros((columns, SHIFTS), np.int64) for _ in range(3))

    def add(self, block: NDArray[np.float32]) -> None:
        """More rows, float32 (R, columns), NaN where missing.

        Preconditions: numbers below LIMIT in size; 2^39 rows in all.
        """
        # No fewer rows than places: each time all places are gone through.
        rows = max(PIECE // len(self._counts), SHIFTS)
        for start in range(0, len(block), rows):
            self._add(block[start : start + rows])

    def _add(self, block: NDArray[np.float32]) -> None:
        there = ~np.isnan(block)
        self._counts += there.sum(axis=0)
        whole = np.rint(np.ldexp(np.where(there, block, 0).astype(np.float64), UNIT_BITS))  # exact above 2^-36
        shifts = np.maximum(np.frexp(whole)[1] - MANTISSA, 0)
        mantissas = np.ldexp(whole, -shifts)
        squares = (mantissas * mantissas).astype(np.int64)
        places = (shifts + SHIFTS * np.arange(block.shape[1])).ravel()
        for total, parts in (
            (self._mantissas, mantissas),
            (self._highs, squares >> MANTISSA),
            (self._lows, squares & ((1 << MANTISSA) - 1)),
        ):
            # Whole numbers of 24 bits, added as float64: exact for 2^28 of them and more.
            found = np.bincount(places, parts.ravel().astype(np.float64), total.size)
            total[:] += found.astype(np.int64).reshape(total.shape)

    def tally(self) -> dict[str, int]:
        """The sums under their names (see `names`)."""
        found: dict[str, int] = {}
        parts = zip(self._counts, self._mantissas, self._highs, self._lows, strict=True)
        for column, (count, mantissas, highs, lows) in enumerate(parts):
            found[f"count.{column}"] = int(count)
            total = sum(int(one) << shift for shift, one in enumerate(mantissas))
            squares = sum(
                (int(high) << MANTISSA) + int(low) << 2 * shift
                for shift, (high, low) in enumerate(zip(highs, lows, strict=True))
            )
            for kind, value in (("sum", total), ("square", squares)):
                rest = value
                for limb in range(LIMBS[kind] - 1):
                    rest, found[f"{kind}.{column}.{limb}"] = divmod(rest, CARRY)
                found[f"{kind}.{column}.{LIMBS[kind] - 1}"] = rest
        return found


def statistics_of(tally: Tally, spec: RunSpec) -> Statistics:
    """Mean and standard deviation (that of the population) of each column of the pooled values, rounded once.

    Names that the tally lacks count as 0. Raises DataError for a column without a number, and for sums that no numbers have.
    """
    mean, scale = [], []
    for column in range(spec.data.numbers):
        count = tally.get(f"count.{column}", 0)
        total, squares = (
            sum(tally.get(f"{kind}.{column}.{limb}", 0) * CARRY**limb for limb in range(limbs))
            for kind, limbs in LIMBS.items()
        )
        named = f"column '{spec.data.columns[column]}'" if spec.data.columns is not None else f"feature {column + 1}"
        if count == 0 and not total and not squares:
            raise DataError(
                f"{named}: no client has a number in it to train on, so it has no mean; leave it out of data.columns"
            )
        spread = count * squares - total * total  # variance, times count^2, in units of 2^-120
        if count <= 0 or spread < 0 or squares >> 4 * UNIT_BITS >= count:
            raise DataError(
                f"{named}: a client's sums are not those of any numbers; find the one whose software differs"
            )
        mean.append(total / (count << UNIT_BITS))
        scale.append(math.sqrt(spread / (count * count << 2 * UNIT_BITS)) or 1.0)
    return Statistics(mean=tuple(mean), scale=tuple(scale))


def applied(spec: RunSpec, statistics: Statistics) -> RunSpec:
    """The run as it trains: with these for data.mean and data.scale, as if given. The same object for equal arguments.

    Precondition: spec.data.normalise is "federated". Raises ConfigError if there is not one of each a column.
    """
    return _applied(spec.canonical, statistics.mean, statistics.scale)


@lru_cache(maxsize=64)
def _applied(canonical: bytes, mean: tuple[float, ...], scale: tuple[float, ...]) -> RunSpec:
    spec = RunSpec.model_validate_json(canonical)
    found = {"normalise": "given", "mean": mean, "scale": scale}
    data = validate(DataSpec, {**_fields(spec.data), **found}, "the run's statistics")
    return RunSpec.model_validate({**_fields(spec), "data": data})


def _fields(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in type(settings).model_fields}
