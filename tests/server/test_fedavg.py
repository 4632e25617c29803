"""FedAvg's arithmetic against numbers worked by hand and against an oracle in Python's own integers and fractions."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqfed.common.errors import EmptyRound, LayoutMismatch, NonFiniteUpdate, UpdateOutOfRange
from seqfed.common.fixedpoint import PIECE
from seqfed.common.layout import Flat
from seqfed.server.fedavg import MAX_WEIGHT, Norm, check, empty, finish, fold, norm, peak, shrink

SCALE = 1 << 30
INT64_END = 1 << 63
NUMBERS = st.floats(width=32, min_value=-1000, max_value=1000)
WEIGHTS = st.integers(1, 10_000)


def flat(*numbers: float) -> Flat:
    return np.array(numbers, np.float32)


def new_model(model: Flat, updates: Sequence[tuple[int, Flat]]) -> Flat:
    """One round of the code under test, everything in one part."""
    total = empty(len(model))
    for weight, delta in updates:
        fold(total, weight, [delta])
    return np.concatenate(list(finish(total, [model])))


def fixed(number: float, weight: int) -> int:
    """weight x number in units of 2^-30: one rounding to a double, one to the nearest integer, halves to even."""
    return round(float(Fraction(number) * weight * SCALE))


def oracle(model: Flat, updates: Sequence[tuple[int, Flat]]) -> Flat:
    """The same in Python's integers and fractions, number by number; only the last steps round, as doubles do."""
    weight = sum(one for one, _ in updates)
    fresh = []
    for place, old in enumerate(model.tolist()):
        total = sum(fixed(delta.tolist()[place], one) for one, delta in updates)
        mean = float(Fraction(float(total)) / (weight * SCALE))
        fresh.append(float(Fraction(old) + Fraction(mean)))
    return np.array(fresh, np.float64).astype(np.float32)


@st.composite
def rounds(draw: st.DrawFn) -> tuple[Flat, list[tuple[int, Flat]]]:
    """A model and some updates of it."""
    size = draw(st.integers(1, 6))
    vector = st.lists(NUMBERS, min_size=size, max_size=size).map(lambda numbers: flat(*numbers))
    return draw(vector), draw(st.lists(st.tuples(WEIGHTS, vector), min_size=1, max_size=6))


def cut(numbers: Flat, places: Sequence[int]) -> Iterator[Flat]:
    edges = [0, *sorted(place % (len(numbers) + 1) for place in places), len(numbers)]
    return (numbers[start:stop] for start, stop in itertools.pairwise(edges))


def test_the_weighted_mean_by_hand() -> None:
    # 3 examples say +1 and -2, 1 example says +5 and +2: (3x1 + 1x5) / 4 = 2 and (3x-2 + 1x2) / 4 = -1
    assert new_model(flat(10, 10), [(3, flat(1, -2)), (1, flat(5, 2))]).tolist() == [12, 9]


def test_the_uniform_mean_by_hand() -> None:
    assert new_model(flat(0, 1), [(1, flat(1, -2)), (1, flat(5, 2))]).tolist() == [3, 1]


def test_one_update_is_its_own_mean() -> None:
    assert new_model(flat(0.5), [(7, flat(0.25))]).tolist() == [0.75]


def test_a_delta_is_rounded_to_the_nearest_unit_and_halves_to_even() -> None:
    units = [0.49, 0.5, 0.51, 1.5, 2.5, -0.5, -1.5]
    total = empty(len(units))
    fold(total, 1, [flat(*(unit / SCALE for unit in units))])
    assert total.total.tolist() == [0, 0, 1, 2, 2, 0, -2]


def test_opposite_updates_cancel_exactly() -> None:
    delta = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    model = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    assert (new_model(model, [(3, delta), (3, -delta)]) == model).all()


@given(rounds())
def test_equals_the_oracle_bit_for_bit(case: tuple[Flat, list[tuple[int, Flat]]]) -> None:
    model, updates = case
    assert new_model(model, updates).tobytes() == oracle(model, updates).tobytes()


@given(rounds())
def test_is_the_true_mean_to_float32s_precision(case: tuple[Flat, list[tuple[int, Flat]]]) -> None:
    model, updates = case
    weight = sum(one for one, _ in updates)
    for place, found in enumerate(new_model(model, updates).tolist()):
        mean = sum((Fraction(delta.tolist()[place]) * one for one, delta in updates), Fraction(0)) / weight
        exact = Fraction(model.tolist()[place]) + mean
        assert abs(Fraction(found) - exact) <= abs(exact) * Fraction(1, 1 << 24) + Fraction(len(updates), SCALE)


@given(rounds(), st.randoms(use_true_random=False))
def test_any_order_of_updates_gives_the_same_bits(
    case: tuple[Flat, list[tuple[int, Flat]]], shuffler: random.Random
) -> None:
    model, updates = case
    shuffled = list(updates)
    shuffler.shuffle(shuffled)
    assert new_model(model, updates).tobytes() == new_model(model, shuffled).tobytes()


@given(rounds(), st.lists(st.integers(0, 100), max_size=5), st.lists(st.integers(0, 100), max_size=5))
def test_any_splitting_into_parts_gives_the_same_bits(
    case: tuple[Flat, list[tuple[int, Flat]]], of_updates: list[int], of_model: list[int]
) -> None:
    model, updates = case
    total = empty(len(model))
    for weight, delta in updates:
        fold(total, weight, cut(delta, of_updates))
    fresh = np.concatenate(list(finish(total, cut(model, of_model))))
    assert fresh.tobytes() == new_model(model, updates).tobytes()


def test_long_vectors_are_folded_in_pieces_without_a_seam() -> None:
    size = 200_001  # more than one piece of any size that fits a cache, and no multiple of one
    draw = np.random.default_rng(2)
    model, *deltas = (draw.normal(size=size).astype(np.float32) for _ in range(4))
    fresh = new_model(model, [(weight, delta) for weight, delta in zip((5, 1, 9), deltas, strict=True)])
    total = sum(
        np.rint(delta.astype(np.float64) * (weight * SCALE)).astype(np.int64)
        for weight, delta in zip((5, 1, 9), deltas, strict=True)
    )
    assert (fresh == (model + total / (15.0 * SCALE)).astype(np.float32)).all()


def test_a_used_sums_memory_begins_at_zero_again() -> None:
    used = empty(3)
    fold(used, 2, [flat(1, 2, 3)])
    again = empty(3, used)
    assert again.total is used.total
    fold(again, 1, [flat(4, 5, 6)])
    assert list(again.total) == [n * 2**30 for n in (4, 5, 6)]
    assert (used.weight, again.weight) == (2, 1)


def test_a_round_without_updates_has_no_mean() -> None:
    with pytest.raises(EmptyRound, match="no update was folded"):
        next(finish(empty(2), [flat(1, 2)]))


@pytest.mark.parametrize("parts", [[flat(1, 2)], [flat(1), flat(2)], []])
def test_too_few_numbers_are_refused(parts: list[Flat]) -> None:
    with pytest.raises(LayoutMismatch, match="of the model's 3 parameters"):
        fold(empty(3), 1, parts)


@pytest.mark.parametrize("parts", [[flat(1, 2, 3, 4)], [flat(1, 2), flat(3, 4)], [flat(1, 2, 3), flat(4)]])
def test_too_many_numbers_are_refused(parts: list[Flat]) -> None:
    with pytest.raises(LayoutMismatch, match="more than the model's 3 parameters"):
        fold(empty(3), 1, parts)


def test_a_refused_update_has_no_weight() -> None:
    total = empty(3)
    with pytest.raises(LayoutMismatch):
        fold(total, 5, [flat(1)])
    assert total.weight == 0


@given(st.lists(NUMBERS, max_size=20))
def test_the_peak_is_the_largest_magnitude(numbers: list[float]) -> None:
    assert peak(flat(*numbers)) == max((abs(number) for number in numbers), default=0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 4])
def test_a_number_that_is_not_finite_is_named(bad: float, place: int) -> None:
    numbers = np.ones(5, np.float32)
    numbers[place] = bad
    with pytest.raises(NonFiniteUpdate, match=f"holds {bad};"):
        peak(numbers)


@pytest.mark.parametrize("weight", [0, -1, MAX_WEIGHT + 1])
def test_a_weight_out_of_range_is_refused(weight: int) -> None:
    with pytest.raises(UpdateOutOfRange, match="weight"):
        check(weight, 0.0, 1)


def test_the_bound_by_hand() -> None:
    check(1, float(1 << 32), 1)
    check(1 << 20, float(1 << 10), 4)
    check(MAX_WEIGHT, 0.0, 1_000_000)
    with pytest.raises(UpdateOutOfRange, match="lower the learning rate"):
        check(1, float(np.nextafter(np.float32(1 << 32), np.float32(np.inf))), 1)
    with pytest.raises(UpdateOutOfRange):
        check(1 << 20, float(1 << 10), 5)


def fits(weight: int, highest: float, cohort: int) -> bool:
    try:
        check(weight, highest, cohort)
    except UpdateOutOfRange:
        return False
    return True


@given(st.integers(1, MAX_WEIGHT), st.floats(0, width=32, allow_infinity=False), st.integers(1, 1_000_000))
def test_what_the_check_lets_pass_cannot_leave_int64(weight: int, highest: float, cohort: int) -> None:
    if fits(weight, highest, cohort):
        assert cohort * fixed(highest, weight) < INT64_END


@given(st.integers(1, MAX_WEIGHT), st.integers(1, 1_000_000))
def test_the_largest_update_that_passes_uses_the_room_there_is(weight: int, cohort: int) -> None:
    highest = np.float32((1 << 32) / (weight * cohort))
    while not fits(weight, float(highest), cohort):
        highest = np.nextafter(highest, np.float32(0))
    assert cohort * fixed(float(highest), weight) < INT64_END
    # no more than one bit of int64 is left unused, but for the units that each update is rounded to
    assert cohort * (fixed(float(highest), weight) + 1) * (1 + 2**-22) >= INT64_END // 2


@given(
    st.integers(1, 50),
    st.lists(st.tuples(st.integers(1, MAX_WEIGHT), st.floats(0, 1)), min_size=50, max_size=50),
)
def test_a_whole_cohort_of_the_largest_updates_is_summed_exactly(cohort: int, members: list[tuple[int, float]]) -> None:
    total, exact = empty(2), 0
    for weight, share in members[:cohort]:
        highest = np.float32(share * (1 << 32) / (weight * cohort))
        if fits(weight, float(highest), cohort):
            fold(total, weight, [np.array([highest, -highest])])
            exact += fixed(float(highest), weight)
    assert total.total.tolist() == [exact, -exact]


# How long an update may be ---------------------------------------------------------------------------------------------


def length(numbers: Flat) -> float:
    """The L2 norm in Python's fractions, rounded once at the end."""
    return math.sqrt(sum(Fraction(number) ** 2 for number in numbers.tolist()))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=30), st.data())
def test_a_norm_is_that_of_the_oracle_however_the_vector_is_cut(numbers: list[float], data: st.DataObject) -> None:
    vector = flat(*numbers)
    places = data.draw(st.lists(st.integers(0, 100), max_size=5))
    found = norm(cut(vector, places))
    assert found == norm([vector])
    assert found == pytest.approx(length(vector), rel=1e-14)


@pytest.mark.parametrize("size", [1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5])
def test_the_cuts_of_a_long_vector_change_no_bit_of_its_norm(size: int) -> None:
    vector = np.random.default_rng(size).normal(0, 1, size).astype(np.float32)
    whole = norm([vector])
    assert whole == pytest.approx(math.sqrt(math.fsum(float(one) ** 2 for one in vector)), rel=1e-12)
    for step in (1, 1000, PIECE, PIECE + 1, size):
        if size // step <= PIECE:
            assert norm(vector[start : start + step] for start in range(0, size, step)) == whole


def test_a_norm_may_be_read_before_its_end() -> None:
    found = Norm()
    assert found.value == 0.0
    for numbers, value in ((flat(3), 3.0), (flat(4), 5.0), (flat(), 5.0), (flat(12), 13.0)):
        found.add(numbers)
        assert found.value == value


def test_the_longest_vector_has_a_norm() -> None:
    assert norm([np.full(4, np.finfo(np.float32).max)]) == 2 * float(np.finfo(np.float32).max)


@given(st.floats(0, 1e40), st.floats(1e-30, 1e30))
def test_nothing_is_longer_than_the_bound_once_it_is_scaled(long: float, bound: float) -> None:
    scale = shrink(long, bound)
    assert 0 < scale <= 1.0
    assert long * scale <= bound * (1 + 1e-15)
    assert (scale == 1.0) == (long <= bound) or long == pytest.approx(bound, rel=1e-15)


def test_a_bound_by_hand() -> None:
    total = empty(2)
    fold(total, 3, [flat(0.25, 0.5)])  # short enough
    fold(total, 1, [flat(3, -4)], shrink(norm([flat(3, -4)]), 2.5))  # 5 long: half of it counts
    assert np.concatenate(list(finish(total, [flat(0, 0)]))).tolist() == [(0.75 + 1.5) / 4, (1.5 - 2) / 4]


@given(rounds(), st.floats(2.0**-10, 1000))
def test_bounded_updates_are_the_same_in_any_order_and_near_the_oracles(
    given_round: tuple[Flat, list[tuple[int, Flat]]], bound: float
) -> None:
    model, updates = given_round
    results = set()
    for order in (updates, updates[::-1]):
        total = empty(len(model))
        for weight, delta in order:
            fold(total, weight, [delta], shrink(norm([delta]), bound))
        results.add(np.concatenate(list(finish(total, [model]))).tobytes())
    (result,) = results
    exact = [min(1.0, bound / (length(delta) or 1.0)) for _, delta in updates]
    whole = sum(weight for weight, _ in updates)
    for place, fresh in enumerate(np.frombuffer(result, np.float32).tolist()):
        change = sum(w * s * d.tolist()[place] for (w, d), s in zip(updates, exact, strict=True)) / whole
        assert fresh == pytest.approx(model.tolist()[place] + change, rel=1e-6, abs=1e-8 + len(updates) / SCALE)


@given(rounds())
def test_a_bound_that_nobody_reaches_changes_no_bit(given_round: tuple[Flat, list[tuple[int, Flat]]]) -> None:
    model, updates = given_round
    total = empty(len(model))
    for weight, delta in updates:
        fold(total, weight, [delta], shrink(norm([delta]), 1e30))
    assert np.concatenate(list(finish(total, [model]))).tobytes() == new_model(model, updates).tobytes()
