"""Fixed point against the arithmetic of fractions: nothing is lost, whatever the order."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from seqfed.common.fixedpoint import FRACTION_BITS, LIMIT, decode, encode

UNIT = Fraction(1, 1 << FRACTION_BITS)
numbers = st.floats(-4096, 4096, width=32)
weights = st.integers(1, 1 << 20)  # 4096 x 2^20 is LIMIT
updates = st.lists(st.tuples(weights, st.lists(numbers, min_size=3, max_size=3)), min_size=1, max_size=5)


def exact(values: list[float], weight: int) -> list[int]:
    """The nearest counts of 2^-30, half to even."""
    return [round(Fraction(value) * weight / UNIT) for value in values]


@given(weights, st.lists(numbers, max_size=8))
def test_encode_rounds_the_product_to_the_nearest_unit(weight: int, values: list[float]) -> None:
    assert encode(np.array(values, np.float32), weight).tolist() == exact(values, weight)


@given(updates, st.randoms(use_true_random=False))
def test_sums_are_those_of_fractions_in_any_order(updates: list[tuple[int, list[float]]], random: object) -> None:
    encoded = [encode(np.array(values, np.float32), weight) for weight, values in updates]
    forwards = np.sum(encoded, axis=0, dtype=np.int64)
    backwards = np.sum(encoded[::-1], axis=0, dtype=np.int64)
    expected = [sum(column) for column in zip(*(exact(values, weight) for weight, values in updates), strict=True)]
    assert forwards.tolist() == backwards.tolist() == expected


@given(updates)
def test_the_mean_is_that_of_fractions_within_float64(updates: list[tuple[int, list[float]]]) -> None:
    total = np.zeros(3, np.int64)
    for weight, values in updates:
        total += encode(np.array(values, np.float32), weight)
    weight = sum(one for one, _ in updates)
    for found, count in zip(decode(total, weight).tolist(), total.tolist(), strict=True):
        mean = count * UNIT / weight
        assert abs(Fraction(found) - mean) <= abs(mean) / (1 << 52)  # the count's and the quotient's rounding


@given(numbers, weights)
def test_a_single_update_comes_back(value: float, weight: int) -> None:
    (found,) = decode(encode(np.array([value], np.float32), weight), weight).tolist()
    assert abs(found - value) <= float(UNIT) / weight / 2 + abs(value) * 2**-52


def test_the_limit_is_representable_on_both_sides() -> None:
    ends = encode(np.array([LIMIT, -LIMIT], np.float32), 1)
    assert ends.tolist() == [1 << 62, -(1 << 62)]


def test_halves_go_to_the_even_unit() -> None:
    halves = np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32) * np.float32(UNIT)
    assert encode(halves, 1).tolist() == [0, 2, 2, 0, -2]
