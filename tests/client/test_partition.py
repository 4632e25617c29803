"""Splits of one data set: every row exactly once, and seeded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfed.client.partition import dirichlet, iid
from seqfed.common.errors import DataError


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 9))
def test_iid_parts_are_even_and_cover_every_row(size: int, clients: int, seed: int) -> None:
    if size < clients:
        with pytest.raises(DataError, match=f"{size} sequences cannot be split among {clients} clients"):
            iid(size, clients, np.random.default_rng(seed))
        return
    parts = iid(size, clients, np.random.default_rng(seed))
    assert sorted(row for part in parts for row in part.tolist()) == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=40, max_size=80), st.integers(1, 4), st.floats(0.5, 100), st.integers(0, 9))
def test_dirichlet_parts_cover_every_row(labels: list[int], clients: int, alpha: float, seed: int) -> None:
    parts = dirichlet(np.array(labels), clients, alpha, np.random.default_rng(seed), smallest=3)
    assert sorted(row for part in parts for row in part.tolist()) == list(range(len(labels)))
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
