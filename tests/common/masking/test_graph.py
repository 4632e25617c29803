"""The graph's parameters against the bounds written out in fractions, and the graph itself."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfed.common.masking.graph import neighbours, parameters

rosters = st.integers(0, 1 << 32).map(lambda number: hashlib.sha256(str(number).encode()).digest())


@cache
def at_least(x: int, k: int, marked: int, others: int) -> Fraction:
    """P[x or more of k are marked], k drawn from the others."""
    ways = sum(math.comb(marked, y) * math.comb(others - marked, k - y) for y in range(max(x, 0), k + 1))
    return Fraction(ways, math.comb(others, k))


def does(n: int, k: int, t: int, malicious: bool, drop: float) -> bool:
    """Whether k and t keep to all bounds."""
    colluding, leaving = math.floor(n / 5), math.ceil(n * drop)
    if malicious:
        private = n * at_least(2 * t - k, k, colluding, n - 1) <= Fraction(1, 1 << 80) and 3 * t > 2 * (k + 1)
    else:
        private = n * at_least(t, k, colluding, n - 1) <= Fraction(1, 1 << 40) and 2 * t > k + 1
    return private and n * at_least(k - t + 1, k, leaving, n - 1) <= Fraction(1, 1 << 20)


@pytest.mark.parametrize(
    ("malicious", "drop", "expected"),
    [
        (False, 0.05, (52, 37)),
        (False, 0.3, (174, 88)),
        (True, 0.05, (118, 96)),
        (True, 0.3, (999, 667)),
    ],
)
def test_a_thousand_clients(malicious: bool, drop: float, expected: tuple[int, int]) -> None:
    assert parameters(1000, malicious, drop) == expected


@pytest.mark.parametrize("n", [2, 3, 10, 100, 128])
def test_few_clients_have_the_complete_graph(n: int) -> None:
    for drop in (0.0, 0.4):
        assert parameters(n, True, drop) == (n - 1, math.floor(2 * n / 3) + 1)
        assert parameters(n, False, drop) == (n - 1, math.floor(n / 2) + 1)


def test_nobody_is_summed_alone() -> None:
    with pytest.raises(ValueError, match="of 1 clients"):
        parameters(1, True, 0.0)


@settings(max_examples=6, deadline=None)
@given(st.integers(129, 260), st.booleans(), st.sampled_from([0.0, 0.05, 0.1, 0.2]))
def test_they_are_the_smallest_that_keep_to_the_bounds(n: int, malicious: bool, drop: float) -> None:
    k, t = parameters(n, malicious, drop)
    most = (n - 1) // 2
    if k < n - 1:
        assert k <= most
        assert does(n, k, t, malicious, drop)
        assert not does(n, k, t - 1, malicious, drop)
        most = k - 2
    else:
        assert t == (2 * n // 3 if malicious else n // 2) + 1
    # far below the found k nothing changes, and fractions are slow
    for smaller in range(max(2, most - 8) // 2 * 2, most + 1, 2):
        assert not any(does(n, smaller, other, malicious, drop) for other in range(1, smaller + 1))


@settings(max_examples=30, deadline=None)
@given(st.integers(129, 20_000), st.booleans(), st.floats(0, 0.49))
def test_a_threshold_is_a_majority_that_can_be_met(n: int, malicious: bool, drop: float) -> None:
    k, t = parameters(n, malicious, drop)
    assert 1 <= t <= k + 1 <= n
    assert (3 * t > 2 * (k + 1)) if malicious else (2 * t > k + 1)
    assert k == n - 1 or (k % 2 == 0 and k <= (n - 1) // 2)


def apart(n: int, k: int, gone: int) -> float:
    """A bound of the chance that the clients that are not gone (left or colluding) fall into parts without an edge between.

    Who is gone does not depend on the graph, and its cycles are taken as independent. In a random cycle those gone lie between
    the others, with a gap after each; some and the rest have no edge in common just if no gap holds of both. Summed over all
    sets of some, for k / 2 cycles. Few with k neighbours each have no room for these but among the rest.
    """
    left, total = n - gone, 0.0
    for some in range(max(k + 1 - gone, 1), left // 2 + 1):
        rest = left - some
        ways = sum(
            math.comb(gone, gaps) * math.comb(some - 1, gaps - 1) * math.comb(gone - gaps + rest - 1, rest)
            for gaps in range(1, min(gone - 1, some) + 1)
        )
        cycles = math.comb(n - 1, some) * math.comb(n - 1 - some, rest)
        total += 2 ** (math.log2(math.comb(left, some)) + k / 2 * (math.log2(ways) - math.log2(cycles)))
    return total


@pytest.mark.parametrize("n", [129, 300, 1000])
@pytest.mark.parametrize("malicious", [False, True])
@pytest.mark.parametrize("drop", [0.05, 0.2])
def test_the_honest_who_stay_hang_together(n: int, malicious: bool, drop: float) -> None:
    # else the sum of each part would lie open
    k, _ = parameters(n, malicious, drop)
    assert apart(n, k, n // 5 + math.ceil(n * drop)) <= 2.0 ** -(80 if malicious else 40)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 200), st.data(), rosters)
def test_a_graph_is_regular_and_mutual(n: int, data: st.DataObject, roster: bytes) -> None:
    even = list(range(2, (n - 1) // 2 + 1, 2))
    k = data.draw(st.sampled_from([*even, n - 1]))
    found = neighbours(n, k, roster)
    assert len(found) == n
    for own, others in enumerate(found):
        assert len(others) == len(set(others)) == k
        assert list(others) == sorted(others)
        assert own not in others
        assert all(own in found[other] for other in others)
    reached, new = {0}, [0]
    while new:
        new = [other for one in new for other in found[one] if other not in reached and not reached.add(other)]  # type: ignore[func-returns-value]
    assert len(reached) == n


def test_the_roster_draws_the_graph() -> None:
    graphs = {neighbours(200, 4, bytes([number]) + bytes(31)) for number in range(20)}
    assert len(graphs) == 20
    assert neighbours(200, 4, bytes(32)) in graphs


def test_every_two_are_neighbours_about_as_often() -> None:
    n, k, graphs = 21, 6, 1500
    counts = [[0] * n for _ in range(n)]
    for number in range(graphs):
        for own, others in enumerate(neighbours(n, k, number.to_bytes(32, "big"))):
            for other in others:
                counts[own][other] += 1
    expected = graphs * k / (n - 1)
    spread = math.sqrt(expected * (1 - k / (n - 1)))
    assert all(
        abs(counts[one][other] - expected) < 5 * spread for one in range(n) for other in range(n) if one != other
    )


@pytest.mark.parametrize(("n", "k"), [(200, 3), (200, 0), (200, 100), (200, 198)])
def test_graphs_that_there_are_not_are_refused(n: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"{k} neighbours for each of {n}"):
        neighbours(n, k, bytes(32))
