"""Splits of one data set: every row exactly once, and seeded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfed.client.partition import Rows, by_key, by_size, dirichlet, iid
from seqfed.common.errors import DataError


def check_whole(parts: list[Rows], size: int) -> None:
    """Every unit at exactly one client, in rising order, and nobody without."""
    assert sorted(row for part in parts for row in part.tolist()) == list(range(size))
    assert all(len(part) and part.tolist() == sorted(part.tolist()) for part in parts)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 9))
def test_iid_parts_are_even_and_cover_every_row(size: int, clients: int, seed: int) -> None:
    if size < clients:
        with pytest.raises(DataError, match=f"{size} sequences cannot be split among {clients} clients"):
            iid(size, clients, np.random.default_rng(seed))
        return
    parts = iid(size, clients, np.random.default_rng(seed))
    check_whole(parts, size)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=40, max_size=80), st.integers(1, 4), st.floats(0.5, 100), st.integers(0, 9))
def test_dirichlet_parts_cover_every_row(labels: list[int], clients: int, alpha: float, seed: int) -> None:
    parts = dirichlet(np.array(labels), clients, alpha, np.random.default_rng(seed), smallest=3)
    check_whole(parts, len(labels))
    assert min(map(len, parts)) >= 3
    again = dirichlet(np.array(labels), clients, alpha, np.random.default_rng(seed), smallest=3)
    assert [part.tolist() for part in parts] == [part.tolist() for part in again]


def test_a_smaller_alpha_is_more_uneven() -> None:
    labels = np.arange(4000) % 4

    def spread(alpha: float) -> float:
        """Standard deviation of the clients' shares of each label."""
        parts = dirichlet(labels, 4, alpha, np.random.default_rng(0), smallest=1)
        return float(np.std([np.mean(labels[part] == label) for part in parts for label in range(4)]))

    assert spread(1e6) < 0.01 < spread(5.0) < spread(0.2)


@pytest.mark.parametrize(("clients", "alpha", "smallest"), [(5, 1.0, 3), (10, 1e-3, 1)])
def test_what_does_not_come_about_is_said(clients: int, alpha: float, smallest: int) -> None:
    with pytest.raises(DataError, match="use fewer clients, a larger alpha, or an even split"):
        dirichlet(np.zeros(10, np.int64), clients, alpha, np.random.default_rng(0), smallest)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=60), st.integers(1, 12), st.integers(0, 9))
def test_a_key_is_never_split(keys: list[int], clients: int, seed: int) -> None:
    if len(set(keys)) < clients:
        with pytest.raises(DataError, match="different values cannot be split among"):
            by_key(np.array(keys), clients, np.random.default_rng(seed))
        return
    parts = by_key(np.array(keys), clients, np.random.default_rng(seed))
    check_whole(parts, len(keys))
    held = [{keys[row] for row in part.tolist()} for part in parts]
    assert sum(map(len, held)) == len(set(keys))
    # Graham's bound of list scheduling: an even share and one whole key more at most
    assert max(map(len, parts)) <= len(keys) / clients + max(keys.count(key) for key in keys)


def test_as_many_clients_as_keys_have_one_each() -> None:
    parts = by_key(np.array([7, 7, 3, 5, 5, 5]), 3, np.random.default_rng(0))
    assert sorted(part.tolist() for part in parts) == [[0, 1], [2], [3, 4, 5]]


@given(st.integers(1, 80), st.integers(1, 20), st.floats(0, 4), st.integers(0, 9))
def test_sizes_follow_the_power_law(size: int, clients: int, exponent: float, seed: int) -> None:
    if size < clients:
        with pytest.raises(DataError, match=f"{size} sequences cannot be split"):
            by_size(size, clients, exponent, np.random.default_rng(seed))
        return
    parts = by_size(size, clients, exponent, np.random.default_rng(seed))
    check_whole(parts, size)
    shares = [(k + 1) ** -exponent for k in range(clients)]
    wanted = sorted(1 + (size - clients) * share / sum(shares) for share in shares)
    assert np.abs(np.array(sorted(map(len, parts))) - wanted).max() <= 1


@pytest.mark.parametrize(
    "split",
    [
        lambda draw: iid(100, 7, draw),
        lambda draw: by_size(100, 7, 1.5, draw),
        lambda draw: by_key(np.arange(100) % 13, 7, draw),
        lambda draw: dirichlet(np.arange(100) % 3, 7, 0.5, draw, 1),
    ],
    ids=["iid", "size", "key", "dirichlet"],
)
def test_the_seed_decides(split: Callable[[np.random.Generator], list[Rows]]) -> None:
    def parts(seed: int) -> list[list[int]]:
        return [part.tolist() for part in split(np.random.default_rng(seed))]

    assert parts(1) == parts(1) != parts(2)
