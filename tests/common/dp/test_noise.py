"""Noise against the laws it is to be of: each statistical test has a false alarm in 10^6 runs at most, and its keys are fixed."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special, stats

from seqfed.common.dp import noise
from seqfed.common.dp.noise import CHUNK, KEEP, PIECE, WIDEST, Law, derived, fresh_key, gaussian, released, skellam

WORST = 1e-6  # probability of a false alarm of one statistical test
N = 400_000
KEY = derived(bytes(32), "tests")


def drawn(law: Law, *labels: int | str, size: int = N) -> NDArray[np.int64]:
    out = np.zeros(size, np.int64)
    noise.add(out, law, derived(KEY, *labels))
    return out


def of_gaussian(std: float) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """The discrete Gaussian's probabilities."""
    far = np.arange(-math.ceil(40 * std) - 40, math.ceil(40 * std) + 41)
    total = math.fsum(np.exp(-0.5 * (far / std) ** 2))
    return lambda k: np.exp(-0.5 * (k / std) ** 2) / total


def of_skellam(variance: float) -> Callable[[NDArray[Any]], NDArray[Any]]:
    return lambda k: special.ive(np.abs(k).astype(float), variance)


LAWS = [
    (gaussian(0.3), of_gaussian(0.3)),
    (gaussian(2.0), of_gaussian(2.0)),
    (gaussian(750.0), of_gaussian(750.0)),
    (skellam(0.1), of_skellam(0.1)),
    (skellam(3.0), of_skellam(3.0)),
    (skellam(9_999.0), of_skellam(9_999.0)),
    (skellam(10_001.0), of_skellam(10_001.0)),
    (skellam(4e6), of_skellam(4e6)),
]


@pytest.mark.parametrize(("law", "exact"), LAWS, ids=[str(law) for law, _ in LAWS])
def test_numbers_come_as_often_as_the_law_says(law: Law, exact: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    """Pearson's chi square over cells of about equal probability, the outermost open to the far."""
    found = drawn(law, "often", str(law.std))
    far = np.arange(-math.ceil(10 * law.std) - 70, math.ceil(10 * law.std) + 71)
    chances = exact(far)
    assert chances.sum() == pytest.approx(1, abs=1e-9)
    cell = np.minimum((np.cumsum(chances) * 60).astype(int), 59)
    wanted = np.bincount(cell, chances) * N
    counts = np.bincount(cell[found - far[0]], minlength=len(wanted))
    filled = wanted > 20
    wanted, counts = np.append(wanted[filled], wanted[~filled].sum()), np.append(counts[filled], counts[~filled].sum())
    wanted, counts = wanted[wanted > 0], counts[wanted > 0]
    assert stats.chisquare(counts, wanted * counts.sum() / wanted.sum()).pvalue > WORST


@pytest.mark.parametrize("std", [1e6, 2.0**36, WIDEST])
def test_a_wide_law_is_the_continuous_one(std: float) -> None:
    found = drawn(gaussian(std), "wide", str(std)) / std
    assert stats.kstest(found, "norm").pvalue > WORST
    wide = drawn(skellam(std * std), "skellam", str(std)) / std
    assert stats.kstest(wide, "norm").pvalue > WORST


@pytest.mark.parametrize("law", [one for one, _ in LAWS] + [gaussian(2.0**36), skellam(1e11)], ids=str)
def test_variance_and_symmetry(law: Law) -> None:
    found = drawn(law, "variance", str(law.std)).astype(np.float64)
    variance = law.std**2
    if law.shift == 0 and law.std < 1:  # the parameter of a narrow Gaussian is not its deviation
        k = np.arange(-60.0, 61.0)
        chances = np.exp(law.log(np.abs(k)))
        variance = float((chances * k * k).sum() / chances.sum())
    z = stats.norm.isf(WORST / 2)
    fourth = np.mean(found**4)
    assert abs(np.mean(found**2) - variance) <= z * math.sqrt((fourth - variance**2) / N) * 1.1
    assert abs(found.mean()) <= z * math.sqrt(variance / N)
    positive, negative = int((found > 0).sum()), int((found < 0).sum())
    assert stats.binomtest(positive, positive + negative).pvalue > WORST


def test_the_tails_are_there() -> None:
    """Beyond 4 standard deviations as often as a Gaussian, whose ranges out there share one cell of the guide."""
    found = np.abs(drawn(gaussian(1e6), "tails", size=4_000_000))
    for far in (3.0, 4.0, 4.5):
        beyond = int((found > far * 1e6).sum())
        assert stats.binomtest(beyond, len(found), 2 * float(stats.norm.sf(far))).pvalue > WORST


@pytest.mark.parametrize("law", [gaussian(2.0**36), skellam(1e11), skellam(4e6)], ids=str)
def test_every_number_of_a_range_comes(law: Law) -> None:
    """The low bits of wide laws are even: a chi square over the last four of them."""
    counts = np.bincount(drawn(law, "low", str(law.std)) & 15, minlength=16)
    assert stats.chisquare(counts).pvalue > WORST


@pytest.mark.parametrize(
    "law", [one for one, _ in LAWS] + [gaussian(2.0**36), gaussian(WIDEST), skellam(1e11)], ids=str
)
def test_a_table_has_the_laws_own_probabilities(law: Law) -> None:
    """Range by range: the thresholds' differences are its size times its largest probability, all of them together 2^64."""
    count = len(law.thresholds)
    cut = [0, *map(int, law.thresholds[:-1]), 2**64]
    shares = [(after - before) / 2**64 for before, after in pairwise(cut)]
    heights = np.exp(law.log(law.first[:count].astype(float)))
    wanted = heights / heights.sum()
    assert np.allclose(shares, wanted, rtol=1e-9, atol=2.0**-63)
    # no number is kept for sure that the law has less of
    last = law.first[:count] + (1 << law.shift) - 1
    ratio = np.exp(law.log(last.astype(float))) / heights
    assert (law.sure[:count] <= np.ceil(ratio * 2**KEEP)).all()
    for cell in range(0, 1 << noise.GUIDE, 997):
        first = int(np.searchsorted(law.thresholds, np.uint64(cell << (64 - noise.GUIDE)), side="right"))
        assert law.guide[cell] == first


@pytest.mark.parametrize("variance", [0.1, 1.0, 50.0, 9_999.0])
def test_the_recurrence_is_bessels(variance: float) -> None:
    k = np.arange(0, math.ceil(8 * math.sqrt(variance)) + 5)
    wanted = np.log(special.ive(k, variance))
    assert np.allclose(skellam(variance).log(k.astype(float)), wanted - wanted[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variance", [10_001.0, 123_456.0, 3e6])
def test_the_expansion_is_bessels(variance: float) -> None:
    k = np.linspace(0, 9 * math.sqrt(variance), 500).round()
    log = skellam(variance).log
    wanted = np.log(special.ive(k, variance))
    assert np.allclose(log(k) - log(np.zeros(1)), wanted - wanted[0], rtol=1e-10, atol=1e-10)


def test_sums_of_skellam_numbers_are_skellam_numbers() -> None:
    parts = sum(drawn(skellam(2.5), "part", nth) for nth in range(8))
    k = np.arange(-40, 41)
    wanted, counts = of_skellam(20.0)(k) * N, np.bincount(np.clip(parts, -40, 40) + 40, minlength=81)
    common = wanted > 20
    statistic = float(((counts - wanted)[common] ** 2 / wanted[common]).sum())
    assert stats.chi2.sf(statistic, int(common.sum()) - 1) > WORST


def test_draws_are_of_their_place_and_key_alone() -> None:
    law, size = gaussian(1e5), CHUNK + 3 * PIECE + 17
    whole = drawn(law, "place", size=size)
    for workers in (2, 3):
        again = np.zeros(size, np.int64)
        noise.add(again, law, derived(KEY, "place"), workers=workers)
        assert np.array_equal(again, whole)
    assert np.array_equal(drawn(law, "place", size=CHUNK), whole[:CHUNK])
    noise.add(whole, law, derived(KEY, "place"), negative=True)
    assert not whole.any()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
def test_what_is_added_is_modulo_the_type(dtype: type[Any]) -> None:
    law = skellam(1e9)
    out = np.arange(1000, dtype=dtype)
    noise.add(out, law, derived(KEY, "modulo"))
    wanted = np.arange(1000) + drawn(law, "modulo", size=1000)
    assert np.array_equal(out, wanted.astype(dtype))


def test_different_keys_have_nothing_in_common() -> None:
    one, other = drawn(gaussian(1e3), "one").astype(float), drawn(gaussian(1e3), "other").astype(float)
    assert abs(np.corrcoef(one, other)[0, 1]) < stats.norm.isf(WORST / 2) / math.sqrt(N)
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < stats.norm.isf(WORST / 2) / math.sqrt(N - 1)
    assert len({fresh_key() for _ in range(100)}) == 100
    assert len({derived(KEY, *labels) for labels in [(1, 2), (12,), ("1", 2), (1, "2"), ("1, 2",)]}) == 5


@given(st.floats(1e-3, 1e3), st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20))
def test_released_numbers_are_on_the_grid_of_the_noise(std: float, some: list[float]) -> None:
    numbers = np.array(some, np.float32)
    found = released(numbers, std, derived(KEY, "grid"))
    draws = drawn(gaussian(2.0**36), "grid", size=len(some)) * (std / 2**36)
    assert found.dtype == np.float32
    assert np.allclose(found, numbers + draws, rtol=1e-6, atol=1e-6 * (std + np.abs(numbers).max()))


def test_released_noise_is_gaussian() -> None:
    found = released(np.full(N, 3.0, np.float32), 0.7, derived(KEY, "released"))
    assert stats.kstest((found - 3.0) / 0.7, "norm").pvalue > WORST


@pytest.mark.parametrize("numbers", [[3e6], [math.nan], [math.inf]])
def test_what_no_noise_hides_is_refused(numbers: list[float]) -> None:
    with pytest.raises(ValueError, match="standard deviations"):
        released(np.array(numbers, np.float32), 1.0, KEY)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf, 2 * WIDEST])
def test_no_law_without_a_width_that_fits(std: float) -> None:
    with pytest.raises(ValueError, match="standard deviation"):
        gaussian(std)


def test_what_noise_is_added_to() -> None:
    with pytest.raises(ValueError, match="contiguous integers, not to float32"):
        noise.add(np.zeros(3, np.float32), gaussian(1.0), KEY)
    with pytest.raises(ValueError, match="contiguous integers"):
        noise.add(np.zeros((2, 2), np.int64), gaussian(1.0), KEY)
    with pytest.raises(ValueError, match="has 3 bytes instead of 32"):
        noise.add(np.zeros(3, np.int64), gaussian(1.0), b"abc")


def test_the_stream_is_aes_256_in_counter_mode() -> None:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = bytes(range(32))
    blocks = b"".join((7).to_bytes(8, "big") + nth.to_bytes(8, "big") for nth in range(4))
    # the bare cipher, block by block
    wanted = Cipher(algorithms.AES256(key), modes.ECB()).encryptor().update(blocks)  # noqa: S305
    assert noise.Stream(key, 7).words(8).astype("<u8").tobytes() == wanted
