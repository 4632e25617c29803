"""Batches of overlapping stretches of rows, against a loop that cuts and pads each by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from seqfed.client.data import Sequences

ROWS = 30


@st.composite
def stretches(draw: st.DrawFn) -> tuple[Any, Any, Any]:
    """Starts and lengths that leave at least two rows behind each stretch, and some indices."""
    count = draw(st.integers(1, 6))
    starts = draw(st.lists(st.integers(0, ROWS - 6), min_size=count, max_size=count))
    lengths = [draw(st.integers(1, ROWS - 3 - start)) for start in starts]
    which = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=8))
    return np.array(starts), np.array(lengths), np.array(which)


@given(stretches())
def test_a_batch_holds_each_stretch_and_zeros_behind_it(case: tuple[Any, Any, Any]) -> None:
    starts, lengths, which = case
    rows = np.random.default_rng(0).standard_normal((ROWS, 3)).astype(np.float32) + 10
    y = np.arange(len(starts))
    batch = Sequences(rows, starts, lengths, y).batch(which)
    steps = max(lengths[i] for i in which)
    assert batch.x.shape == (len(which), steps, 3)
    assert batch.x.dtype == np.float32
    for place, i in enumerate(which):
        wanted = np.zeros((steps, 3), np.float32)
        wanted[: lengths[i]] = rows[starts[i] : starts[i] + lengths[i]]
        assert (batch.x[place] == wanted).all()
    assert (batch.y == y[which]).all()
    if batch.lengths is None:
        assert (lengths[which] == steps).all()
    else:
        assert (batch.lengths == lengths[which]).all()


@given(stretches())
def test_tokens_are_foretold_by_the_ones_before_them(case: tuple[Any, Any, Any]) -> None:
    starts, lengths, which = case
    rows = np.arange(1, ROWS + 1, dtype=np.int32)
    data = Sequences(rows, starts, lengths, target="next token")
    assert data.weight == lengths.sum()
    batch = data.batch(which)
    assert batch.x.dtype == batch.y.dtype == np.int64
    for place, i in enumerate(which):
        assert (batch.x[place, : lengths[i]] + 1 == batch.y[place, : lengths[i]]).all()
        assert (batch.x[place, lengths[i] :] == 0).all()
        assert (batch.y[place, lengths[i] :] == -1).all()


@given(stretches(), st.booleans())
def test_the_rows_ahead_are_the_targets_and_missing_ones_are_nan(case: tuple[Any, Any, Any], masks: bool) -> None:
    starts, lengths, which = case
    draw = np.random.default_rng(1)
    rows = draw.standard_normal((ROWS, 5)).astype(np.float32)  # two numbers, two masks, one category
    rows[:, 2:4] = draw.integers(0, 2, (ROWS, 2))
    data = Sequences(rows, starts, lengths, target="rows ahead", horizon=2, numbers=2, masks=masks)
    batch = data.batch(which)
    assert batch.y.shape == (len(which), 4)
    for place, i in enumerate(which):
        end = starts[i] + lengths[i]
        wanted = [
            np.nan if masks and rows[end + step, 2 + number] == 0 else rows[end + step, number]
            for step in range(2)
            for number in range(2)
        ]
        np.testing.assert_array_equal(batch.y[place], np.array(wanted, np.float32))


def test_arrays_become_stretches_and_taking_some_leaves_the_rows() -> None:
    x = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    data = Sequences.of(x, np.array([0, 1, 2, 3]), np.array([3, 1, 2, 3]))
    assert (data.weight, len(data)) == (4, 4)
    some = data.take(np.array([2, 1]))
    assert some.rows is data.rows
    batch = some.batch(np.array([0, 1]))
    assert batch.x.tolist() == [x[2, :2].tolist(), [x[1, 0].tolist(), [0.0, 0.0]]]
    assert (batch.lengths.tolist() if batch.lengths is not None else None) == [2, 1]
    assert batch.y.tolist() == [2, 1]


def test_a_batch_without_labels_has_none() -> None:
    data = Sequences(np.zeros((4, 2), np.float32), np.array([0, 2]), np.array([2, 2]))
    assert data.batch(np.array([1, 0])).y.shape == (2, 0)


def test_memory_mapped_rows_give_the_same_batches(tmp_path: Any) -> None:
    rows = np.random.default_rng(2).standard_normal((ROWS, 3)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    starts, lengths, y = np.array([0, 5, 9]), np.array([7, 4, 20]), np.array([1, 0, 1])
    mapped = Sequences(np.load(tmp_path / "rows.npy", mmap_mode="r"), starts, lengths, y)
    one, other = (data.batch(np.array([2, 0, 1])) for data in (mapped, Sequences(rows, starts, lengths, y)))
    assert one.x.tobytes() == other.x.tobytes()
