"""PowerSGD's pieces against numpy's own: columns are orthonormal, low ranks come back whole, sums are those of the mean."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfed.common.compression import lowrank
from seqfed.common.layout import Flat, Layout
from seqfed.common.seeds import generator

LAYOUT = Layout((("ih", (48, 10)), ("hh", (48, 20)), ("bias", (48,)), ("cube", (30, 5, 6)), ("tiny", (2, 2))))


def low(layout: Layout, rank: int, seed: int) -> Flat:
    """Each matrix of at most this rank."""
    rng, parts = generator(seed, "low"), []
    for _, shape in layout.tensors:
        size = int(np.prod(shape))
        if len(shape) == 1:
            parts.append(rng.standard_normal(size))
        else:
            parts.append(
                (rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, size // shape[0]))).reshape(-1)
            )
    return np.concatenate(parts).astype(np.float32)


def rebuilt(basis: Flat, rest: Flat, plan: lowrank.Plan) -> Flat:
    return np.concatenate(list(lowrank.rebuild(basis, rest, plan)))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5))
def test_sizes_add_up(rank: int, given_: list[tuple[int, int]]) -> None:
    layout = Layout(tuple((f"t{nth}", shape) for nth, shape in enumerate(given_)))
    plan = lowrank.Plan(layout, rank)
    vector = generator(1, "numbers").standard_normal(layout.size, np.float32)
    basis, rest = lowrank.alone(vector, plan, 3)
    assert basis.shape == (plan.first,)
    assert rest.shape == (plan.second,)
    assert plan.first + plan.second <= layout.size
    back = rebuilt(basis, rest, plan)
    assert back.shape == vector.shape
    assert np.linalg.norm(back - vector) <= np.linalg.norm(vector) * (1 + 1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_what_has_so_low_a_rank_comes_back(rank: int) -> None:
    plan, vector = lowrank.Plan(LAYOUT, rank), low(LAYOUT, rank, 1)
    back = rebuilt(*lowrank.alone(vector, plan, 5), plan)
    assert np.abs(back - vector).max() < 1e-4


def test_columns_are_orthonormal_or_zero() -> None:
    plan = lowrank.Plan(Layout((("w", (40, 60)),)), 3)
    columns = generator(1).standard_normal((3, 40), np.float32)
    columns[2] = columns[0] - 2 * columns[1]  # depends on the others
    basis = lowrank.orthonormal(columns.reshape(-1), plan).reshape(3, 40)
    assert np.allclose(basis[:2] @ basis[:2].T, np.eye(2), atol=1e-6)
    nearly = np.linalg.norm(basis[2])
    assert nearly < 1e-6 or np.abs(basis[:2] @ basis[2]).max() < 1e-6
    assert not lowrank.orthonormal(np.zeros(120, np.float32), plan).any()


def test_sums_over_clients_are_those_of_the_mean() -> None:
    """Both steps are linear: that is why they can be masked."""
    plan = lowrank.Plan(LAYOUT, 2)
    updates = [generator(nth, "update").standard_normal(LAYOUT.size, np.float32) for nth in range(5)]
    mean = np.asarray(np.mean(updates, axis=0, dtype=np.float64), np.float32)
    middle = lowrank.orthonormal_middle(lowrank.start(plan, 1), plan)
    p = np.mean([lowrank.first(one, plan, middle) for one in updates], axis=0)
    assert np.allclose(p, lowrank.first(mean, plan, middle), atol=1e-4)
    assert np.linalg.norm(lowrank.first(mean, plan, middle)) <= np.linalg.norm(mean) * (1 + 1e-5)
    basis = lowrank.orthonormal(np.asarray(p, np.float32), plan)
    rest = np.mean([lowrank.second(one, plan, basis) for one in updates], axis=0).astype(np.float32)
    assert np.allclose(rebuilt(basis, rest, plan), rebuilt(basis, lowrank.second(mean, plan, basis), plan), atol=1e-4)


def test_the_last_middle_is_a_better_one() -> None:
    """A power iteration: against the singular value decomposition."""
    layout = Layout((("w", (60, 80)),))
    plan = lowrank.Plan(layout, 3)
    rng = generator(4)
    matrix = rng.standard_normal((60, 60)) * 0.7 ** np.arange(60) @ rng.standard_normal((60, 80))
    vector, middle = matrix.reshape(-1).astype(np.float32), lowrank.start(plan, 1)
    best = float(np.sqrt(np.square(np.linalg.svd(matrix, compute_uv=False)[3:]).sum()))
    errors = []
    for _ in range(12):
        basis = lowrank.orthonormal(lowrank.first(vector, plan, lowrank.orthonormal_middle(middle, plan)), plan)
        rest = lowrank.second(vector, plan, basis)
        middle = rest[: plan.middle]
        errors.append(float(np.linalg.norm(rebuilt(basis, rest, plan) - vector)))
    assert errors == sorted(errors, reverse=True) or errors[-1] < 1.001 * min(errors)
    assert errors[-1] < 1.05 * best


@pytest.mark.parametrize("round_", [1, 2])
def test_a_side_is_linear_and_nothing_gets_longer(round_: int) -> None:
    plan = lowrank.Plan(LAYOUT, 2)
    side = lowrank.side(plan, round_, None, 3)
    assert side.left == (round_ == 2)
    vectors = [generator(1, nth).standard_normal(LAYOUT.size, np.float32) for nth in range(3)]
    sent = [side.project(one) for one in vectors]
    assert {one.shape for one in sent} == {(side.size,)}
    assert side.size == (plan.middle if side.left else plan.first) + plan.whole
    assert np.allclose(np.mean(sent, axis=0), side.project(np.mean(vectors, axis=0)), atol=1e-5)
    for vector, one in zip(vectors, sent, strict=True):
        assert np.linalg.norm(one) <= np.linalg.norm(vector) * (1 + 1e-6)
        back = side.rebuild(one)
        assert back.shape == vector.shape
        assert np.allclose(side.project(back), one, atol=1e-4)  # nothing of what is sent is left out
        assert float(np.dot(vector - back, back)) == pytest.approx(0, abs=1e-2)


def test_in_turns_the_sides_find_the_matrices() -> None:
    """A vector of rank 2 that stays comes back whole from the second round on, and nearly so from one that changes slowly."""
    plan, before, off = lowrank.Plan(LAYOUT, 2), None, []
    steady, other = low(LAYOUT, 2, 1), low(LAYOUT, 2, 2)
    for round_ in range(1, 8):
        vector = steady if round_ < 5 else np.asarray(steady + 0.02 * (round_ - 4) * other, np.float32)
        side = lowrank.side(plan, round_, before, 3)
        sent = side.project(vector)
        off.append(float(np.linalg.norm(side.rebuild(sent) - vector) / np.linalg.norm(vector)))
        before = sent[: side.factor]
    assert off[0] > 0.3
    assert max(off[1:4]) < 1e-5
    assert max(off[4:]) < 0.1
