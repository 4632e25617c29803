"""Metrics as exact sums: a tally of integers that adds up over batches, clients and rounds in any order.

An average of averages is wrong when clients differ in size, and a sum of floats depends on its order; a tally is neither.
Real-valued sums (a loss) are counted in units of 2^-20.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

Tally = Mapping[str, int]

UNIT: Final = float(1 << 20)  # of a real-valued sum: 1e-6 of resolution, and 2^43 of room below int64's end
REAL: Final = frozenset({"loss", "squared_error", "absolute_error"})  # the sums that are counted in units
MEANS: Final = {  # metric -> (its sum, what it is divided by)
    "loss": ("loss", "examples"),
    "accuracy": ("correct", "examples"),
    "mse": ("squared_error", "examples"),
    "mae": ("absolute_error", "examples"),
}
SMALLER_IS_BETTER: Final = frozenset({"loss", "mse", "mae", "rmse"})


def units(value: float) -> int:
    """A real-valued sum in whole units of 2^-20, rounded to the nearest."""
    return round(value * UNIT)


def add(tallies: Iterable[Tally]) -> dict[str, int]:
    """The sum, name by name; a name that a tally lacks counts as 0.

    >>> add([{"examples": 2, "correct": 1}, {"examples": 3, "correct": 3}])
    {'examples': 5, 'correct': 4}
    """
    total: dict[str, int] = {}
    for tally in tallies:
        for name, value in tally.items():
            total[name] = total.get(name, 0) + value
    return total


def summary(tally: Tally) -> dict[str, float]:
    """The metrics that this tally can tell; empty if it counts no examples.

    >>> summary({"examples": 4, "correct": 3, "loss": 1 << 20})
    {'loss': 0.25, 'accuracy': 0.75}
    """
    found: dict[str, float] = {}
    for metric, (name, per) in MEANS.items():
        count = tally.get(per, 0)
        if name in tally and count > 0:
            found[metric] = tally[name] / (UNIT if name in REAL else 1) / count
    if "mse" in found:
        found["rmse"] = max(found["mse"], 0.0) ** 0.5
    return found
