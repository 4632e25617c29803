"""Tallies: integers that add up the same over any partition, and the metrics they tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqfed.common.metrics import MEANS, SMALLER_IS_BETTER, UNIT, add, summary, units

tallies = st.lists(st.dictionaries(st.sampled_from(["examples", "loss", "correct"]), st.integers()), max_size=8)


@given(tallies, st.integers(0, 8))
def test_add_does_not_depend_on_the_partition_or_the_order(found: list[dict[str, int]], cut: int) -> None:
    names = {name for tally in found for name in tally}
    slow = {name: sum(tally.get(name, 0) for tally in found) for name in names}
    assert add(found) == slow
    assert add([add(found[:cut]), add(found[cut:])]) == slow
    assert add(reversed(found)) == slow


@given(st.floats(-1e9, 1e9))
def test_units_are_the_nearest(value: float) -> None:
    assert abs(Fraction(units(value)) - Fraction(value) * int(UNIT)) <= Fraction(1, 2)


@pytest.mark.parametrize(
    ("tally", "expected"),
    [
        ({}, {}),
        ({"examples": 0, "loss": 0, "correct": 0}, {}),
        ({"loss": 5}, {}),
        ({"examples": 4, "correct": 3, "loss": 1 << 20}, {"loss": 0.25, "accuracy": 0.75}),
        ({"examples": 2, "squared_error": 9 << 21, "absolute_error": 3 << 20}, {"mse": 9.0, "rmse": 3.0, "mae": 1.5}),
        ({"examples": 2, "something_new": 7}, {}),
    ],
)
def test_summary_by_hand(tally: Mapping[str, int], expected: dict[str, float]) -> None:
    assert summary(tally) == expected


def test_a_mean_of_unequal_parts_is_the_mean_of_the_whole() -> None:
    parts = [{"examples": 1, "correct": 1}, {"examples": 99, "correct": 0}]
    assert summary(add(parts)) == {"accuracy": 0.01}


def test_every_metric_has_a_direction() -> None:
    assert SMALLER_IS_BETTER - {"rmse"} <= MEANS.keys()
    assert "accuracy" not in SMALLER_IS_BETTER
    assert math.log2(UNIT) == 20  # tallies of other versions are in these units
