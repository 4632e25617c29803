"""Federated mean and scale against fractions over the pooled numbers: the same whatever the partition."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from seqfed.common import metrics
from seqfed.common.errors import ConfigError, DataError
from seqfed.common.metrics import CARRY
from seqfed.common.seeds import generator
from seqfed.common.spec import RunSpec
from seqfed.common.statistics import LIMBS, LIMIT, Statistics, Sums, applied, names, statistics_of

CLIENTS = 100_000  # of which each sum must fit 64 bits
Block = NDArray[np.float32]
numbers = st.floats(-LIMIT, LIMIT, width=32, exclude_min=True, exclude_max=True) | st.floats(-10, 10, width=32)
rows = st.lists(st.tuples(*[numbers | st.just(math.nan)] * 2), min_size=1, max_size=20)
cuts = st.lists(st.integers(0, 20), max_size=4)


def run_of(columns: int, **data: Any) -> RunSpec:
    named = {} if "features" in data else {"columns": tuple(f"c{place}" for place in range(columns))}
    wanted = {**named, "normalise": "federated", "classes": 2, **data}
    return RunSpec.model_validate({"data": wanted})


def tally_of(*blocks: Block) -> dict[str, int]:
    sums = Sums(blocks[0].shape[1])
    for block in blocks:
        sums.add(block)
    return sums.tally()


def exact(column: Block) -> tuple[Fraction, Fraction]:
    """Mean and variance of the numbers that are there, each to the nearest 2^-60."""
    units = [Fraction(round(Fraction(float(one)) * 2**60), 2**60) for one in column if not np.isnan(one)]
    mean = sum(units, Fraction(0)) / len(units)
    return mean, sum(((one - mean) ** 2 for one in units), Fraction(0)) / len(units)


def root(value: Fraction) -> float:
    """The square root, from whole numbers of far more digits than a float has."""
    scaled = math.isqrt((value.numerator << 2000) // value.denominator)
    return float(Fraction(scaled, 1 << 1000))


@given(rows, cuts, cuts)
def test_any_partition_has_the_statistics_of_the_pooled_numbers(
    table: list[tuple[float, ...]], clients: list[int], blocks: list[int]
) -> None:
    pooled = np.array(table, np.float32)
    parts = [np.split(part, sorted(blocks)) for part in np.split(pooled, sorted(clients))]
    total = metrics.add(tally_of(*part) for part in parts)
    assert total == metrics.add([total, tally_of(pooled[:0])])
    assert statistics_or_error(total) == statistics_or_error(tally_of(pooled))
    if np.isnan(pooled).all(axis=0).any():
        return
    found = statistics_of(total, run_of(2))
    for column in range(2):
        mean, variance = exact(pooled[:, column])
        assert found.mean[column] == float(mean)
        if variance == 0:
            assert found.scale[column] == 1
        else:
            assert math.isclose(found.scale[column], root(variance), rel_tol=1e-15)


def statistics_or_error(tally: dict[str, int]) -> Statistics | str:
    try:
        return statistics_of(tally, run_of(2))
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("magnitude", [1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("offset", [0.0, 1.0, 1000.0])
def test_six_digits_are_kept(magnitude: float, offset: float) -> None:
    """Of numbers as float32 has them; those far from 0 included, where sums of squares in float64 would lose them."""
    drawn = generator(1, "column").standard_normal((5000, 1))
    column = (magnitude * (drawn / max(offset, 1.0) + offset / max(offset, 1.0))).astype(np.float32)
    found = statistics_of(tally_of(column), run_of(1))
    reals = column[:, 0].astype(np.float64)
    mean = math.fsum(reals) / len(reals)
    assert math.isclose(found.mean[0], mean, rel_tol=1e-6, abs_tol=1e-6 * float(reals.std()))
    assert math.isclose(found.scale[0], math.sqrt(math.fsum((reals - mean) ** 2) / len(reals)), rel_tol=1e-6)


@given(st.lists(numbers, min_size=1, max_size=5))
def test_every_sum_of_very_many_clients_fits_64_bits(values: list[float]) -> None:
    tally = tally_of(np.array(values, np.float32)[:, None])
    assert set(tally) == set(names(run_of(1)))
    for name, value in tally.items():
        assert abs(value) < (1 << 63) // CLIENTS, name
        assert value >= 0 or name == "sum.0.3"


def test_the_last_limbs_have_room_for_2_to_the_40_rows_of_the_largest_numbers() -> None:
    largest = np.array([[np.nextafter(np.float32(LIMIT), np.float32(0))], [-1]], np.float32)
    tally = tally_of(largest)
    for kind, limbs in LIMBS.items():
        total = sum(tally[f"{kind}.0.{limb}"] * CARRY**limb for limb in range(limbs))
        assert 0 < total << 40 < CARRY**limbs


def test_a_client_without_rows_sends_zeros() -> None:
    assert set(tally_of(np.empty((0, 3), np.float32)).values()) == {0}


def test_names_are_those_of_the_tally_and_not_too_many() -> None:
    spec = run_of(3)
    assert tuple(sorted(names(spec))) == tuple(sorted(tally_of(np.zeros((1, 3), np.float32))))
    assert names(spec)[:3] == ("count.0", "sum.0.0", "sum.0.1")
    assert len(names(run_of(0, features=10_000))) == 120_000
    with pytest.raises(ConfigError, match="10,000 columns at most, these are 10,001; give mean and scale"):
        names(run_of(0, features=10_001))


def test_a_constant_column_has_scale_1() -> None:
    found = statistics_of(tally_of(np.full((7, 1), 0.1, np.float32)), run_of(1))
    assert found == Statistics(mean=(float(np.float32(0.1)),), scale=(1.0,))


def test_a_column_without_numbers_is_refused() -> None:
    block = np.array([[1, math.nan], [2, math.nan]], np.float32)
    with pytest.raises(DataError, match="column 'c1': no client has a number in it.*leave it out"):
        statistics_of(tally_of(block), run_of(2))
    with pytest.raises(DataError, match="feature 1: no client"):
        statistics_of({}, run_of(0, features=2))


@pytest.mark.parametrize(
    "change",
    [
        {"count.0": -3},
        {"count.0": 0},
        {"square.0.3": 0},
        {"square.0.6": -1},
        {"square.0.6": 1 << 40},
        {"sum.0.3": 1 << 62},
        {"sum.0.3": -(1 << 62), "square.0.6": (1 << 62)},
    ],
)
def test_sums_of_no_numbers_are_refused(change: dict[str, int]) -> None:
    tally = tally_of(np.array([[1], [2], [4]], np.float32))
    with pytest.raises(DataError, match="not those of any numbers"):
        statistics_of({**tally, **change}, run_of(1))


@given(st.dictionaries(st.sampled_from(names(run_of(1))), st.integers(-(1 << 63), (1 << 63) - 1)))
def test_whatever_came_the_statistics_are_finite_or_refused(tally: dict[str, int]) -> None:
    try:
        found = statistics_of(tally, run_of(1))
    except DataError:
        return
    assert abs(found.mean[0]) <= LIMIT
    assert 0 < found.scale[0] <= LIMIT


def test_applied_is_the_run_as_if_mean_and_scale_were_given() -> None:
    spec = run_of(2, missing="mean")
    found = applied(spec, Statistics(mean=(1.0, -2.0), scale=(0.5, 3.0)))
    wanted = run_of(2, missing="mean", normalise="given", mean=(1.0, -2.0), scale=(0.5, 3.0))
    assert found == wanted
    assert found.digest == wanted.digest != spec.digest
    assert applied(spec, Statistics(mean=(1.0, -2.0), scale=(0.5, 3.0))) is found
    travelled = RunSpec.model_validate_json(spec.canonical)
    sent = Statistics.model_validate_json(Statistics(mean=(1.0, -2.0), scale=(0.5, 3.0)).model_dump_json())
    assert applied(travelled, sent) is found
    assert applied(spec, Statistics(mean=(1.0, -2.0), scale=(0.5, 3.5))) != found
    with pytest.raises(ConfigError, match=r"data\.mean has 1 numbers where 2 are due"):
        applied(spec, Statistics(mean=(1.0,), scale=(1.0,)))


@pytest.mark.parametrize(
    "bad", ['{"mean":[1.0],"scale":[0.0]}', '{"mean":[1.0],"scale":[1.0,1.0]}', '{"mean":[NaN],"scale":[1.0]}']
)
def test_statistics_that_nothing_can_be_divided_by_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="mean|scale"):
        Statistics.model_validate_json(bad)
