"""The tree's noise against a tree whose nodes are all kept."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from seqfed.common.dp import noise, tree
from seqfed.common.dp.noise import derived, gaussian

KEY = derived(bytes(32), "tests")
LAW = gaussian(1e4)
ROUNDS, DIM = 70, 50


def node_noise(node: tree.Node) -> NDArray[np.int64]:
    out = np.zeros(DIM, np.int64)
    noise.add(out, LAW, derived(KEY, "tree", *node))
    return out


def covered(node: tree.Node) -> range:
    level, index = node
    return range((index << level) + 1, ((index + 1) << level) + 1)


@pytest.mark.parametrize("round_", [*range(1, 40), 1023, 1024, 1025])
def test_the_nodes_of_a_round_are_all_rounds_so_far(round_: int) -> None:
    found = [number for node in tree.nodes(round_) for number in covered(node)]
    assert found == list(range(1, round_ + 1))
    assert len(tree.nodes(round_)) == round_.bit_count()


def test_each_sum_of_rounds_has_the_noise_of_its_nodes_alone() -> None:
    total = np.zeros(DIM, np.int64)
    for round_ in range(1, ROUNDS + 1):
        tree.add(total, LAW, KEY, round_)
        assert np.array_equal(total, sum(node_noise(node) for node in tree.nodes(round_)))


def test_a_round_needs_no_memory_of_those_before() -> None:
    """After a restart the noise of the same rounds is the same."""
    steps = []
    for round_ in (5, 6, 6):
        step = np.zeros(DIM, np.int64)
        tree.add(step, LAW, KEY, round_, workers=2)
        steps.append(step)
    assert np.array_equal(steps[1], steps[2])
    assert not np.array_equal(steps[0], steps[1])


def test_the_noise_grows_with_the_number_of_nodes_only() -> None:
    """Its variance after round 31 (five nodes) and 32 (one), within 4.9 standard deviations of it (one in 10^6)."""
    total = np.zeros(100_000, np.int64)
    for round_ in range(1, 33):
        tree.add(total, LAW, KEY, round_)
        wanted = round_.bit_count() * LAW.std**2
        assert abs(np.mean(total.astype(float) ** 2) / wanted - 1) < 4.9 * np.sqrt(2 / len(total))
