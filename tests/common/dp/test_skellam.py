"""The distributed mechanism is what the accountant counts on: its bounds always hold, and its noise is of the law."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special, stats

from seqfed.common.dp.noise import derived
from seqfed.common.dp.skellam import COARSE, FINE, Mechanism, Residues, decode, encode
from seqfed.common.errors import ConfigError, MaskingFailed, NonFiniteUpdate
from seqfed.common.rotation import rotate

Flat = NDArray[np.float32]
KEY = derived(bytes(32), "tests")
WORST = 1e-6  # probability of a false alarm of one statistical test


def centred(residues: Residues, bits: int) -> NDArray[np.int64]:
    """Residues modulo 2^bits as the whole numbers nearest to 0."""
    half = 1 << bits - 1
    return (residues.astype(np.int64) + half) % (1 << bits) - half


def update(dim: int, length: float, nth: int = 0) -> Flat:
    found = np.random.default_rng([dim, nth]).standard_normal(dim)
    return (found * (length / np.linalg.norm(found))).astype(np.float32)


def summed(mechanism: Mechanism, updates: list[Flat], *labels: int | str) -> Residues:
    total = np.zeros(mechanism.dim, mechanism.dtype)
    for nth, one in enumerate(updates):
        total += encode(one, mechanism, 3, derived(KEY, *labels, nth))[0]
    return total


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 20_000),
    st.sampled_from([16, 18, 20, 24, 32]),
    st.integers(1, 300),
    st.floats(0.05, 20),
    st.floats(1e-3, 1e3),
    st.floats(0, 50),
    st.booleans(),
)
def test_no_update_is_longer_than_what_is_counted(
    dim: int, bits: int, clients: int, multiplier: float, clip: float, times: float, spiky: bool
) -> None:
    try:
        mechanism = Mechanism(dim, bits, clip, clients, clients, multiplier)
    except ConfigError:
        return
    given_ = update(dim, clip * times)
    if spiky:
        given_[1:] = 0
    before = given_.copy()
    found, clipped = encode(given_, mechanism, 3, KEY, noisy=False)
    assert np.array_equal(given_, before)
    whole = centred(found, bits)
    assert int((whole * whole).sum()) <= mechanism.square
    assert int(np.abs(whole).sum()) <= mechanism.bound1 * (1 + 1e-12)
    assert clipped == (np.linalg.norm(given_.astype(np.float64)) > clip) or times == pytest.approx(1, rel=1e-6)
    assert mechanism.variance == pytest.approx((multiplier * mechanism.bound2) ** 2)
    assert mechanism.client_variance * clients == pytest.approx(mechanism.variance)
    assert mechanism.bound2 <= COARSE * mechanism.scale
    assert mechanism.scale <= FINE * math.sqrt(dim)


def test_the_bound_is_the_published_one() -> None:
    """Kairouz, Liu and Steinke 2021, proposition 26, of gamma = 1 / scale, c = 1 and beta = exp(-1/2)."""
    mechanism = Mechanism(10_000, 16, 1.0, 10, 10, 0.5)
    gamma, root = 1 / mechanism.scale, math.sqrt(10_000)
    beta = math.sqrt(2 * math.log(1 / math.exp(-0.5)))
    wanted = min((1 + gamma * root) ** 2, 1 + gamma**2 * 10_000 / 4 + beta * gamma * (1 + gamma / 2 * root))
    assert mechanism.square == math.floor(wanted / gamma**2)


@pytest.mark.parametrize(
    ("dim", "bits", "most"), [(50_000, 16, 0.01), (1_000_000, 18, 0.002), (100_000_000, 24, 0.001)]
)
@pytest.mark.parametrize("clients", [100, 1000])
def test_what_distribution_costs_beside_central_noise(dim: int, bits: int, most: float, clients: int) -> None:
    mechanism = Mechanism(dim, bits, 1.0, clients, clients, 1.0)
    rounding = clients / 4 / mechanism.variance
    assert mechanism.bound2 / mechanism.scale * math.sqrt(1 + rounding) < 1 + most


def test_rounding_leans_to_neither_side() -> None:
    """Of T roundings the mean is within t of the number, but for 2 exp(-2 T t^2) (Hoeffding) and the condition on the norm."""
    mechanism, times = Mechanism(200, 16, 1.0, 4, 4, 0.5), 3000
    one = update(200, 0.9)
    turned = one.copy()
    rotate(turned, 3)
    total = np.zeros(200)
    for nth in range(times):
        total += centred(encode(one, mechanism, 3, derived(KEY, "lean", nth), noisy=False)[0], 16)
    wanted = turned.astype(np.float64) / mechanism.step
    assert np.abs(total / times - wanted).max() <= math.sqrt(math.log(2 * 200 / WORST) / (2 * times))


@pytest.mark.parametrize("clients", [3, 5, 10])
def test_the_sums_noise_is_skellam_from_the_fewest_survivors_to_all(clients: int) -> None:
    """The sum less the same updates rounded the same way, without noise: variance and chi square of the exact law."""
    mechanism = Mechanism(60_000, 16, 1.0, 10, 3, 0.02)
    total = np.zeros(60_000, np.int64)
    for nth in range(clients):
        one, key = update(60_000, 1.0, nth), derived(KEY, "noise", clients, nth)
        total += centred(encode(one, mechanism, 3, key)[0] - encode(one, mechanism, 3, key, noisy=False)[0], 16)
    variance = mechanism.client_variance * clients
    assert variance >= mechanism.variance * (1 - 1e-12)
    z = stats.norm.isf(WORST / 2)
    assert np.mean(total.astype(float) ** 2) == pytest.approx(
        variance, rel=float(z * math.sqrt((2 + 1 / variance) / 60_000))
    )
    edge = math.ceil(10 * math.sqrt(variance))
    far = np.arange(-edge, edge + 1)
    chances = special.ive(np.abs(far).astype(float), variance)
    cell = np.minimum((np.cumsum(chances) * 40).astype(int), 39)
    wanted, counts = np.bincount(cell, chances), np.bincount(cell[total + edge], minlength=40)
    wanted, counts = wanted[wanted > 0], counts[wanted > 0]
    assert stats.chisquare(counts, wanted / wanted.sum() * 60_000).pvalue > WORST


def test_clients_noise_is_independent() -> None:
    mechanism = Mechanism(60_000, 18, 1.0, 10, 3, 1.0)
    zero, z = np.zeros(60_000, np.float32), stats.norm.isf(WORST / 2)
    rows = np.array(
        [centred(encode(zero, mechanism, 3, derived(KEY, "client", nth))[0], 18) for nth in range(8)], float
    )
    between = np.corrcoef(rows)[np.triu_indices(8, 1)]
    assert np.abs(between).max() <= stats.norm.isf(WORST / 2 / len(between)) / math.sqrt(60_000)
    sums = rows.sum(0)
    assert sums.var() == pytest.approx(8 * mechanism.client_variance, rel=float(z * math.sqrt(2 / 60_000)))


@pytest.mark.parametrize("bits", [16, 18, 24])
@pytest.mark.parametrize("clients", [3, 7, 12])
def test_the_sum_decodes_to_the_sum_of_clipped_updates_with_the_expected_noise(bits: int, clients: int) -> None:
    dim = 5000
    mechanism = Mechanism(dim, bits, 0.5, 12, 3, 0.7)
    updates = [update(dim, 0.1 + 0.1 * nth, nth) for nth in range(clients)]
    found = decode(summed(mechanism, updates, "sum", bits), mechanism, 3, clients=clients, target=10)
    wanted = sum(
        one.astype(np.float64) * min(1.0, 0.5 / float(np.linalg.norm(one.astype(np.float64)))) for one in updates
    )
    off = np.linalg.norm(found - wanted / 10)
    assert off == pytest.approx(mechanism.noise_norm(clients) / 10, rel=0.1)


def test_no_number_of_a_sum_wraps() -> None:
    """The worst there is: all clients with one update, at the most clients; the decoded sum is off by its noise alone."""
    mechanism = Mechanism(3000, 16, 1.0, 60, 60, 0.3)
    found = decode(summed(mechanism, [update(3000, 5.0)] * 60, "wrap"), mechanism, 3, clients=60, target=60)
    wanted = update(3000, 1.0)
    assert np.linalg.norm(found - wanted) == pytest.approx(mechanism.noise_norm(60) / 60, rel=0.1)


def test_garbage_is_no_sum_of_updates() -> None:
    mechanism = Mechanism(5000, 18, 1.0, 10, 5, 0.1)
    total = summed(mechanism, [update(5000, 1.0, nth) for nth in range(9)], "garbage")
    decode(total, mechanism, 3, clients=9, target=9)
    total += np.random.default_rng(1).integers(0, 1 << 18, 5000).astype(total.dtype)
    with pytest.raises(MaskingFailed, match="a client sent something else"):
        decode(total, mechanism, 3, clients=10, target=9)


@pytest.mark.parametrize("worst", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_refused(worst: float) -> None:
    one = update(100, 1.0)
    one[17] = worst
    with pytest.raises(NonFiniteUpdate, match=f"holds {worst}"):
        encode(one, Mechanism(100, 16, 1.0, 3, 3, 1.0), 3, KEY)


def test_too_few_bits_are_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.b = 16.*raise privacy\.b"):
        Mechanism(100_000_000, 16, 1.0, 1000, 1000, 1.0)
    with pytest.raises(ConfigError, match=r"colluding clients, and that is 0"):
        Mechanism(1000, 16, 1.0, 10, 0, 1.0)
