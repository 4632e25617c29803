"""Seeds: the same labels give the same draws for ever, and different labels never share a generator."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqfed.common.seeds import derive, generator

labels = st.lists(st.integers() | st.text(max_size=5), max_size=4).map(tuple)
seeds = st.integers(0, (1 << 63) - 1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0,), 1999793380834467432),
        ((1, "initial"), 8666829704472162487),
        ((7, 3, "hospital-a", "batches"), 4563980494035525764),
        (((1 << 63) - 1, "é", -1), 8232893007245134326),
    ],
)
def test_derived_seeds_stay_what_they_were(arguments: tuple[int, ...], expected: int) -> None:
    assert derive(*arguments) == expected


def test_the_stream_stays_what_it_was() -> None:
    assert generator(7, "x").integers(0, 1 << 32, 4).tolist() == [2121236614, 218864456, 4042994800, 2318747482]
    assert generator(7, "x").permutation(8).tolist() == [3, 1, 4, 5, 2, 7, 0, 6]
    numbers = generator(7, "x").random(3, dtype=np.float32)
    assert numbers.tolist() == [0.49388885498046875, 0.050958335399627686, 0.9413330554962158]


@given(seeds, labels, seeds, labels)
def test_other_seeds_or_labels_derive_another_seed(
    seed: int, mine: tuple[int | str, ...], other_seed: int, other: tuple[int | str, ...]
) -> None:
    found = derive(seed, *mine)
    assert 0 <= found < 1 << 63
    assert (found == derive(other_seed, *other)) == ((seed, mine) == (other_seed, other))


def test_labels_do_not_run_together() -> None:
    lists: list[tuple[int | str, ...]] = [("ab",), ("a", "b"), ("a,b",), ('a","b',), (1, 2), (12,), ("1", 2), (1, "2")]
    assert len({derive(0, *one) for one in lists}) == len(lists)


def test_a_generator_does_not_depend_on_who_drew_before() -> None:
    first = generator(1, "a")
    first.random(100)
    assert generator(1, "b").random(5).tolist() == generator(1, "b").random(5).tolist()
    assert generator(1, "a").random(5).tolist() != first.random(5).tolist()
