"""Fixed point against the arithmetic of fractions: nothing is lost, whatever the order."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqfed.common.fixedpoint import FRACTION_BITS, LIMIT, PIECE, accumulate, mean

UNIT = Fraction(1, 1 << FRACTION_BITS)
numbers = st.floats(-4096, 4096, width=32)
weights = st.integers(1, 1 << 20)  # 4096 x 2^20 is LIMIT
updates = st.lists(st.tuples(weights, st.lists(numbers, min_size=3, max_size=3)), min_size=1, max_size=5)


def exact(values: list[float], weight: int) -> list[int]:
    """The nearest counts of 2^-30, half to even."""
    return [round(Fraction(value) * weight / UNIT) for value in values]


def summed(updates: list[tuple[int, list[float]]], size: int) -> list[int]:
    total = np.zeros(size, np.int64)
    for weight, values in updates:
        accumulate(total, np.array(values, np.float32), weight)
    return total.tolist()


@given(weights, st.lists(numbers, max_size=8))
def test_one_update_is_rounded_to_the_nearest_unit(weight: int, values: list[float]) -> None:
    assert summed([(weight, values)], len(values)) == exact(values, weight)


@given(updates, st.permutations(range(5)))
def test_sums_are_those_of_fractions_in_any_order(updates: list[tuple[int, list[float]]], order: list[int]) -> None:
    shuffled = [updates[place] for place in order if place < len(updates)]
    expected = [sum(column) for column in zip(*(exact(values, weight) for weight, values in updates), strict=True)]
    assert summed(updates, 3) == summed(shuffled, 3) == expected


@given(updates)
def test_the_mean_is_that_of_fractions_within_float64(updates: list[tuple[int, list[float]]]) -> None:
    total = summed(updates, 3)
    weight = sum(one for one, _ in updates)
    for found, count in zip(mean(np.array(total, np.int64), weight).tolist(), total, strict=True):
        expected = count * UNIT / weight
        assert abs(Fraction(found) - expected) <= abs(expected) / (1 << 52)  # the count's and the quotient's rounding


@given(numbers, weights)
def test_a_single_update_comes_back(value: float, weight: int) -> None:
    (found,) = mean(np.array(summed([(weight, [value])], 1), np.int64), weight).tolist()
    assert abs(found - value) <= float(UNIT) / weight / 2 + abs(value) * 2**-52


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5])
def test_long_vectors_are_summed_like_short_ones(size: int) -> None:
    values = np.random.default_rng(size).normal(size=size).astype(np.float32)
    total = np.arange(size)
    accumulate(total, values, 7)
    assert total.tolist() == [place + count for place, count in enumerate(exact(values.tolist(), 7))]


def test_the_limit_is_representable_on_both_sides() -> None:
    assert summed([(1, [LIMIT, -LIMIT])], 2) == [1 << 62, -(1 << 62)]


def test_halves_go_to_the_even_unit() -> None:
    halves = [float(UNIT) * one for one in (0.5, 1.5, 2.5, -0.5, -1.5)]
    assert summed([(1, halves)], 5) == [0, 2, 2, 0, -2]
