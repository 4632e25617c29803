"""The arithmetic of sequences against slow loops over the same rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from seqfed.client.data.windows import (
    MOST_BINS,
    bin_means,
    cut,
    cut_tokens,
    forward_fill,
    grid_steps,
    held_out,
    held_out_rows,
    normalised,
    one_hot,
)

sizes = st.lists(st.integers(0, 12), min_size=1, max_size=6)


def edges(lengths: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    ends = np.cumsum(lengths, dtype=np.int64)
    return ends - np.array(lengths, np.int64), ends


def found(made: tuple[NDArray[np.int64], ...]) -> list[tuple[int, ...]]:
    return list(zip(*(one.tolist() for one in made), strict=True))


@given(sizes, st.none() | st.integers(1, 6), st.none() | st.integers(1, 5), st.integers(0, 3))
def test_windows(lengths: list[int], steps: int | None, stride: int | None, ahead: int) -> None:
    expected = []
    begin = 0
    for entity, length in enumerate(lengths):
        usable = length - ahead
        if usable >= 1 and (steps is None or stride is None or usable < steps):
            size = usable if steps is None else min(steps, usable)
            expected.append((begin + usable - size, size, entity))
        elif steps is not None and stride is not None:
            expected += [(begin + at, steps, entity) for at in range(0, usable - steps + 1, stride)]
        begin += length
    assert found(cut(*edges(lengths), steps, stride, ahead)) == expected


@given(sizes, st.integers(1, 5), st.none() | st.integers(1, 6))
def test_windows_of_tokens(lengths: list[int], steps: int, stride: int | None) -> None:
    made = found(cut_tokens(*edges(lengths), steps, stride))
    begin = 0
    for document, length in enumerate(lengths):
        mine = [(start - begin, size) for start, size, whose in made if whose == document]
        held = {token for start, size in mine for token in range(start, start + size)}
        assert all(start >= 0 and size >= 1 and start + size <= length - 1 for start, size in mine)
        assert all(size == steps for _, size in mine[:-1])
        assert [start for start, _ in mine] == [place * (stride or steps) for place in range(len(mine))]
        if stride is None or stride <= steps:
            assert held == set(range(max(0, length - 1)))  # every token with a successor, and with no stride each once
        if stride is None:
            assert sum(size for _, size in mine) == max(0, length - 1)
        begin += length


numbers = st.floats(-100, 100, width=32) | st.just(math.nan)


@given(st.lists(st.tuples(st.booleans(), numbers, numbers), min_size=1, max_size=20), st.integers(1, 20))
def test_forward_fill_block_by_block(rows: list[tuple[bool, float, float]], size: int) -> None:
    block = np.array([row[1:] for row in rows], np.float32)
    firsts = np.array([row[0] for row in rows])
    expected, last = np.empty_like(block), [math.nan, math.nan]
    for place, (first, *values) in enumerate(rows):
        for column, value in enumerate(values):
            last[column] = value if first or not math.isnan(value) else last[column]
            expected[place, column] = last[column]
    carry, filled = np.full(2, np.nan, np.float32), []
    for at in range(0, len(rows), size):
        part, carry = forward_fill(block[at : at + size], firsts[at : at + size], carry)
        filled.append(part)
    np.testing.assert_array_equal(np.concatenate(filled), expected)


@given(st.lists(st.integers(-1, 3), max_size=10), st.lists(st.sampled_from("abcde"), min_size=1, unique=True))
def test_one_hot(codes: list[int], categories: list[str]) -> None:
    values = ["a", "c", "e", "z"]
    made = one_hot(np.array(codes, np.int32), values, categories)
    assert made.tolist() == [[float(code >= 0 and values[code] == one) for one in categories] for code in codes]


def test_normalised() -> None:
    block = np.array([[1, np.nan], [3, 10]], np.float32)
    assert normalised(block, None, None) is block
    made = normalised(block, (1.0, 2.0), (2.0, 4.0))
    np.testing.assert_array_equal(made, np.array([[0, np.nan], [1, 2]], np.float32))
    assert np.isinf(normalised(block, None, (1e-39, 1.0))[0, 0])


entities = st.lists(
    st.lists(st.tuples(st.integers(-40, 60), st.integers(-1, 2), numbers), min_size=1, max_size=12),
    min_size=1,
    max_size=4,
)


@given(entities, st.sampled_from((0.5, 1.0, 3.0, 7.5)))
def test_binning(given: list[list[tuple[int, int, float]]], grid: float) -> None:
    ordered = [sorted(one, key=lambda row: row[0]) for one in given]
    expected: list[list[float]] = []  # of each entity's bins, of each column
    for one in ordered:
        first, last = (math.floor(one[place][0] / grid) for place in (0, -1))
        for step in range(first, last + 1):
            inside = [row for row in one if step * grid <= row[0] < (step + 1) * grid]
            cells = [[row[2] for row in inside if row[1] == k and not math.isnan(row[2])] for k in range(3)]
            expected.append([sum(cell) / len(cell) if cell else math.nan for cell in cells])
    begins, ends = edges([len(one) for one in ordered])
    flat = [row for one in ordered for row in one]
    times = np.array([row[0] for row in flat], np.float64)
    steps, counts = grid_steps(times, begins, ends, grid)
    firsts = np.cumsum(counts) - counts
    rows = steps + np.repeat(firsts, ends - begins)
    columns = np.array([row[1] for row in flat], np.int64)
    values = np.array([row[2] for row in flat], np.float32)
    made = bin_means(rows, columns, values, (int(counts.sum()), 3))
    np.testing.assert_allclose(made, np.array(expected, np.float32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("last", "grid", "entity"),
    [(float(MOST_BINS), 1.0, 1), (1e300, 1.0, 1), (1.0, 1e-320, 0)],  # the last: no cell of the first one has a number
)
def test_too_many_steps(last: float, grid: float, entity: int) -> None:
    begins, ends = np.array([0, 1]), np.array([1, 3])
    with pytest.raises(ValueError, match=f"^{entity}$"):
        grid_steps(np.array([5.0, 0.0, last]), begins, ends, grid)


@given(st.lists(st.text(), min_size=1, max_size=20, unique=True), st.floats(0, 1, exclude_max=True), st.integers(0, 9))
def test_the_split_goes_by_name_and_seed(names: list[str], fraction: float, seed: int) -> None:
    out = held_out(names, fraction, seed)
    assert out.sum() == min(int(fraction * len(names)), len(names) - 1)
    backwards = held_out(names[::-1], fraction, seed)
    assert backwards.tolist() == out.tolist()[::-1]
    assert held_out_rows(len(names), fraction, seed).sum() == out.sum()


def test_another_seed_holds_out_others() -> None:
    names = [str(one) for one in range(100)]
    assert held_out(names, 0.5, 0).tolist() != held_out(names, 0.5, 1).tolist()
