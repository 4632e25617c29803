"""A round's model with central noise, against plain arithmetic and the law of the noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from seqfed.common.dp import accounting
from seqfed.common.dp.noise import derived
from seqfed.common.dp.skellam import Mechanism, encode
from seqfed.common.errors import MaskingFailed
from seqfed.common.fixedpoint import SCALE
from seqfed.server import fedavg, private

Flat = NDArray[np.float32]
KEY = derived(bytes(32), "tests")
WORST = 1e-6  # probability of a false alarm of one statistical test
DIM = 100_000


def update(nth: int, length: float, dim: int = DIM) -> Flat:
    found = np.random.default_rng(nth).standard_normal(dim)
    return (found * (length / np.linalg.norm(found))).astype(np.float32)


def folded(updates: list[Flat], clip: float) -> fedavg.WeightedSum:
    found = fedavg.empty(len(updates[0]) if updates else DIM)
    for one in updates:
        fedavg.fold(found, 1, [one], fedavg.shrink(fedavg.norm([one]), clip))
    return found


def deviation_is(numbers: NDArray[np.float64], std: float) -> bool:
    z = stats.norm.isf(WORST / 2)
    return bool(abs(np.mean(numbers**2) / std**2 - 1) <= z * math.sqrt(2 / len(numbers)))


@pytest.mark.parametrize("clients", [1, 4])
@pytest.mark.parametrize("target", [4, 10])
def test_the_model_is_the_sum_with_noise_over_the_target(clients: int, target: int) -> None:
    """However many answered, the sum is divided by what was fixed before."""
    updates = [update(nth, 0.2 + nth) for nth in range(clients)]
    sum_ = folded(updates, 1.0)
    private.noise_sum(sum_, 1.0, 0.8, target, derived(KEY, clients, target))
    old = update(99, 3.0)
    fresh = np.concatenate(list(fedavg.finish(sum_, [old])))
    clipped = sum(
        one.astype(np.float64) * min(1.0, 1.0 / float(np.linalg.norm(one.astype(np.float64)))) for one in updates
    )
    noise = (fresh.astype(np.float64) - old) * target - clipped
    assert deviation_is(noise, 0.8)
    assert stats.kstest(noise / 0.8, "norm").pvalue > WORST


def test_a_round_without_updates_is_noise() -> None:
    sum_ = fedavg.empty(DIM)
    sum_.total[:] = 12345  # what was there before
    private.noise_sum(sum_, 0.5, 2.0, 7, KEY)
    assert deviation_is(sum_.total / SCALE, 1.0)
    assert sum_.weight == 7


@pytest.mark.parametrize("clip", [1e-3, 1.0, 37.0])
@pytest.mark.parametrize("dim", [1, 50, DIM])
def test_no_update_moves_the_sum_by_more_than_the_noise_is_for(clip: float, dim: int) -> None:
    """In whole numbers, over updates that are longer than the clip by little or much."""
    for nth, times in enumerate((0.9999999, 1.0, 1.0000001, 1.5, 1e4)):
        one = folded([update(nth, clip * times, dim)], clip).total.astype(object)
        bound = clip * private.ROUNDED * SCALE + math.sqrt(dim) / 2
        assert math.sqrt(int((one * one).sum())) <= bound


def test_a_trees_noise_cancels() -> None:
    """After rounds 1 to 4 one node's noise is left in the sum of all changes, after 1 to 3 two nodes'."""
    clip, target = 1.0, 10
    total = np.zeros(DIM)
    for round_, nodes in ((1, 1), (2, 1), (3, 2), (4, 1)):
        sum_ = folded([np.zeros(DIM, np.float32)], clip)
        private.noise_sum(sum_, clip, 1.5, target, KEY, tree_round=round_)
        total += sum_.total / SCALE
        assert deviation_is(total, 1.5 * math.sqrt(nodes))


@pytest.mark.parametrize("tree_round", [None, 4])
@pytest.mark.parametrize("clients", [3, 9])
def test_a_masked_sum_gets_the_same_noise(clients: int, tree_round: int | None) -> None:
    dim, multiplier = 20_000, 0.6
    mechanism = Mechanism(dim, 18, 0.5, 10, 10, multiplier * (2.0 if tree_round else 1.0))
    updates = [update(nth, 0.3 + nth, dim) for nth in range(clients)]
    total = np.zeros(dim, mechanism.dtype)
    for nth, one in enumerate(updates):
        total += encode(one, mechanism, 5, derived(KEY, "masked", nth), noisy=False)[0]
    found = private.decode(
        total, mechanism, 5, clients=clients, target=8, multiplier=multiplier, key=KEY, tree_round=tree_round
    )
    clipped = sum(
        one.astype(np.float64) * min(1.0, 0.5 / float(np.linalg.norm(one.astype(np.float64)))) for one in updates
    )
    noise = found * 8.0 - clipped
    nodes = 3 if tree_round else 1  # the fourth round's own, and two that end
    rounding = clients / 4 * mechanism.step**2
    expected = math.sqrt(nodes * (multiplier * mechanism.bound2 * mechanism.step) ** 2 + rounding)
    assert np.sqrt(np.mean(noise**2)) == pytest.approx(expected, rel=5 * math.sqrt(1 / 2 / dim) + 0.005)
    assert mechanism.bound2 * mechanism.step == pytest.approx(0.5, rel=0.002)


def test_a_masked_sum_that_is_too_long_tells_no_number_of_it() -> None:
    """A tree's noise is the same at the next try, and the difference of two lengths would be without noise."""
    mechanism = Mechanism(1000, 18, 0.5, 10, 10, 0.5)
    long = (np.arange(1000) * 131_071 // 1000).astype(mechanism.dtype)
    told = []
    for one in (long, long[::-1] // 2):
        with pytest.raises(MaskingFailed) as refusal:
            private.decode(one.copy(), mechanism, 5, clients=2, target=2, multiplier=0.5, key=KEY, tree_round=1)
        told.append(str(refusal.value))
    assert told[0] == told[1]
    assert "the sum of 2 updates is longer than" in told[0]


def test_counting_the_clipped_is_paid_by_the_sum() -> None:
    """Both Gaussian releases together are worth the multiplier: 1/z^2 = 1/z_sum^2 + 1/(2 sigma_b)^2."""
    found = private.vector_multiplier(1.0, 100)
    assert found**-2 + (2 * 100 / 20) ** -2 == pytest.approx(1)
    assert found > 1
    with pytest.raises(ValueError, match="it takes 11 clients"):
        private.vector_multiplier(1.0, 10)


def test_the_clip_finds_the_median_of_the_norms() -> None:
    norms, clip, seen = np.random.default_rng(2).lognormal(0.7, 0.5, 200), 0.1, []
    for round_ in range(150):
        within = int((norms <= clip).sum())
        clip = private.next_clip(clip, within, 200, 200, derived(KEY, "clip", round_))
        seen.append(clip)
    assert np.mean(seen[75:]) == pytest.approx(np.median(norms), rel=0.1)


def test_the_clips_count_has_the_noise_it_pays_for() -> None:
    """log(next / this) / -0.2 is share - 1/2, whose noise has the deviation 1/20."""
    logs = [math.log(private.next_clip(1.0, 30, 40, 40, derived(KEY, "count", nth))) / -0.2 for nth in range(2000)]
    noise = np.array(logs) - 0.25
    assert deviation_is(noise, 1 / 20)
    assert abs(noise.mean()) < stats.norm.isf(WORST / 2) / 20 / math.sqrt(2000)


def test_a_clip_stays_within_measure() -> None:
    assert private.next_clip(1e-6, 1000, 1000, 1000, KEY) == private.LOWEST
    assert private.next_clip(1e6, 0, 1000, 1000, KEY) == private.HIGHEST


def test_the_loudest_noise_of_a_run_fits_a_sum() -> None:
    sum_ = folded([], accounting.LOUDEST)
    private.noise_sum(sum_, accounting.LOUDEST, 1.0, 10, KEY)
    assert deviation_is(sum_.total.astype(np.float64), accounting.LOUDEST * SCALE)


def test_noise_that_does_not_fit_the_sums_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="standard deviation"):
        private.noise_sum(folded([], 1.0), 1e6, 1e3, 10, KEY)
