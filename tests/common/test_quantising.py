"""Quantised updates against plain arithmetic: nothing wraps, nothing leans, and the sum decodes to the weighted mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from seqfed.common.errors import ConfigError, MaskingFailed, NonFiniteUpdate
from seqfed.common.quantising import Lattice, Residues, decode, levels, quantise
from seqfed.common.rotation import rotate, unrotate
from seqfed.common.seeds import generator

Flat = NDArray[np.float32]
BITS = (8, 12, 16, 18, 20, 24, 32)
WORST = 1e-6  # probability of a false alarm of a statistical test


def lattice_of(dim: int, bits: int, clients: int, clip: float = 1.0) -> Lattice:
    return Lattice(dim, bits, levels(bits, clients), clip)


def centred(residues: Residues, bits: int) -> list[int]:
    """Residues modulo 2^bits as the integers nearest to 0."""
    half = 1 << bits - 1
    return ((residues.astype(np.int64) + half) % (1 << bits) - half).tolist()  # type: ignore[no-any-return]


def lstm_like(number: int, hidden: int = 48, inputs: int = 12) -> Flat:
    """A made-up update: a common direction and a client's own, layers of different sizes of change, heavy tails."""

    def drawn(*labels: int | str) -> Flat:
        rng = generator(3, *labels)
        layers = [
            (4 * hidden * inputs, 1e-3),
            (4 * hidden * hidden, 3e-3),
            (8 * hidden, 1e-2),
            (hidden * 10 + 10, 5e-2),
        ]
        return np.concatenate([scale * rng.standard_t(4, size) for size, scale in layers]).astype(np.float32)

    return np.asarray(drawn("common") + drawn("client", number), np.float32)


@given(st.sampled_from(BITS), st.integers(1, 1 << 20))
def test_levels_are_the_most_with_which_no_sum_wraps(bits: int, n_max: int) -> None:
    half = 1 << bits - 1
    if 2 * n_max >= half:
        with pytest.raises(ConfigError, match=r"raise privacy\.b, or have fewer clients"):
            levels(bits, n_max)
    else:
        found = levels(bits, n_max)
        assert n_max * found < half <= n_max * (found + 1)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 100_000),
    st.sampled_from(BITS),
    st.integers(1, 60),
    st.floats(1e-3, 1),
    st.floats(1e-6, 1e6),
    st.floats(0, 1e9),
)
def test_residues_are_within_their_levels(
    dim: int, bits: int, clients: int, share: float, clip: float, length: float
) -> None:
    lattice = lattice_of(dim, bits, clients, clip)
    drawn = generator(dim, "update").standard_normal(dim)
    update = (drawn * (length / np.linalg.norm(drawn))).astype(np.float32)
    before = update.copy()
    found, clipped = quantise(update, share, lattice, 4, generator(4, "rounding"))
    assert np.array_equal(update, before)
    assert found.dtype == lattice.dtype
    assert found.shape == (dim,)
    assert lattice.dtype.itemsize == {8: 1, 12: 2, 16: 2}.get(bits, 4)
    assert int(found.max()) < 1 << bits
    whole = centred(found, bits)
    assert max(map(abs, whole)) <= lattice.levels
    assert clipped == (float(np.linalg.norm(update.astype(np.float64))) > clip) or math.isclose(
        length, clip, rel_tol=1e-6
    )
    again, _ = quantise(update, share, lattice, 4, generator(4, "rounding"))
    assert np.array_equal(found, again)


@pytest.mark.parametrize("bits", BITS)
def test_rounding_leans_to_neither_side(bits: int) -> None:
    """Of T roundings the mean is within t of the number itself, but for probability 2 exp(-2 T t^2) (Hoeffding 1963)."""
    dim, times, share = 300, 2000, 0.37
    lattice = lattice_of(dim, bits, 10)
    update = np.full(dim, 0.6 / math.sqrt(dim), np.float32)
    update[-1] = 0.5
    turned = update.copy()
    rotate(turned, 8)
    wanted = turned.astype(np.float64) * (share / lattice.step)
    assert np.abs(wanted).max() < lattice.levels - 1  # so that nothing is clamped
    rounding = generator(8, "rounding")
    total = np.zeros(dim)
    for _ in range(times):
        found, _ = quantise(update, share, lattice, 8, rounding)
        whole = np.array(centred(found, bits), np.float64)
        assert np.abs(whole - wanted).max() < 1
        total += whole
    assert np.abs(total / times - wanted).max() <= math.sqrt(math.log(2 * dim / WORST) / (2 * times))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3000),
    st.sampled_from(BITS),
    st.lists(st.integers(1, 5000), min_size=1, max_size=60),
    st.integers(1, 4000),
    st.floats(1e-3, 1e3),
)
def test_the_sum_decodes_to_the_mean_of_the_whole_numbers(
    dim: int, bits: int, weights: list[int], most: int, clip: float
) -> None:
    lattice = lattice_of(dim, bits, len(weights), clip)
    counted = [min(weight, most) for weight in weights]
    total = np.zeros(dim, lattice.dtype)
    sums = [0] * dim
    for number, weight in enumerate(counted):
        update = (generator(number, "update").standard_normal(dim) * (number % 3) * clip / dim**0.5).astype(np.float32)
        found, _ = quantise(update, weight / most, lattice, 9, generator(9, number))
        total += found
        sums = [a + b for a, b in zip(sums, centred(found, bits), strict=True)]
    unit = lattice.step * most / sum(counted)
    wanted = np.array([one * unit for one in sums]).astype(np.float32)
    unrotate(wanted, 9)
    mean = decode(total, lattice, 9, clients=len(weights), weight=sum(counted), max_weight=most)
    assert mean.dtype == np.float32
    assert np.array_equal(mean, wanted)


def mean_error(bits: int, clients: int, updates: list[Flat], clip: float) -> float:
    """|decoded mean - mean| / |mean| with equal weights; no update is longer than `clip`."""
    lattice = lattice_of(len(updates[0]), bits, clients, clip)
    total = np.zeros(lattice.dim, lattice.dtype)
    for number, update in enumerate(updates):
        found, clipped = quantise(update, 1.0, lattice, 6, generator(6, number))
        assert not clipped
        total += found
    mean = decode(total, lattice, 6, clients=len(updates), weight=len(updates), max_weight=1)
    wanted = np.mean(updates, axis=0, dtype=np.float64)
    return float(np.linalg.norm(mean - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(("bits", "worst"), [(8, 0.08), (12, 6e-3), (16, 5e-4), (20, 4e-5), (24, 5e-6), (32, 1e-6)])
def test_the_mean_of_ten_updates_is_near(bits: int, worst: float) -> None:
    updates = [lstm_like(number) for number in range(10)]
    clip = 1.0001 * max(float(np.linalg.norm(one.astype(np.float64))) for one in updates)
    assert mean_error(bits, 10, updates, clip) < worst


def test_what_is_longer_is_scaled_down_to_the_clip() -> None:
    update = 40 * lstm_like(0)
    length = float(np.linalg.norm(update.astype(np.float64)))
    lattice = lattice_of(len(update), 24, 2, 1.0)
    found, clipped = quantise(update, 1.0, lattice, 1, generator(1))
    assert clipped
    mean = decode(found, lattice, 1, clients=1, weight=1, max_weight=1)
    assert np.linalg.norm(mean - update / length) < 1e-4
    assert not quantise(update / np.float32(2 * length), 1.0, lattice, 1, generator(1))[1]


def test_the_largest_numbers_that_there_are_do_not_overflow() -> None:
    update = np.full(1000, np.finfo(np.float32).max, np.float32)
    lattice = lattice_of(1000, 16, 2)
    found, clipped = quantise(update, 1.0, lattice, 1, generator(1))
    mean = decode(found, lattice, 1, clients=1, weight=1, max_weight=1)
    assert clipped
    assert np.allclose(mean, 1 / math.sqrt(1000), atol=3 * lattice.step)


def test_an_update_of_zeros_is_zeros() -> None:
    lattice = lattice_of(50, 8, 5)
    found, clipped = quantise(np.zeros(50, np.float32), 1.0, lattice, 1, generator(1))
    assert not clipped
    assert not found.any()
    assert not decode(found, lattice, 1, clients=1, weight=1, max_weight=1).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    update = np.ones(40_000, np.float32)
    update[30_000] = bad
    with pytest.raises(NonFiniteUpdate, match="lower the learning rate"):
        quantise(update, 1.0, lattice_of(40_000, 16, 3), 1, generator(1))


def test_bits_above_those_of_the_sum_do_not_count() -> None:
    """A masked sum fills its native integers: of 12 bits, 16."""
    lattice = lattice_of(100, 12, 4)
    found, _ = quantise(np.full(100, 0.1, np.float32), 1.0, lattice, 1, generator(1))
    plain = decode(found, lattice, 1, clients=1, weight=1, max_weight=1)
    noisy = decode(found + np.uint16(5 << 12), lattice, 1, clients=1, weight=1, max_weight=1)
    assert np.array_equal(plain, noisy)


@pytest.mark.parametrize("bits", BITS)
def test_a_sum_that_holds_garbage_is_refused(bits: int) -> None:
    lattice = lattice_of(5000, bits, 3)
    honest, _ = quantise(np.full(5000, 0.01, np.float32), 1.0, lattice, 1, generator(1))
    noise = generator(2).integers(0, 1 << bits, 5000).astype(lattice.dtype)
    with pytest.raises(MaskingFailed, match="keep to the settings"):
        decode(honest + noise, lattice, 1, clients=2, weight=2, max_weight=1)
    many = np.full(5000, lattice.levels, lattice.dtype)  # each number could be, but not all of them
    if lattice.levels > 100:
        with pytest.raises(MaskingFailed, match="long"):
            decode(many, lattice, 1, clients=1, weight=1, max_weight=1)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5000), st.sampled_from(BITS), st.integers(1, 10), st.integers(1, 1000))
def test_no_honest_sum_is_refused(dim: int, bits: int, clients: int, most: int) -> None:
    """All of them at the clip, in the same direction: as long as a sum can be."""
    lattice = lattice_of(dim, bits, clients, 3.0)
    update = generator(dim, "update").standard_normal(dim).astype(np.float32) * np.float32(1e6)
    total = np.zeros(dim, lattice.dtype)
    for number in range(clients):
        total += quantise(update, 1 / most, lattice, 5, generator(5, number))[0]
    decode(total, lattice, 5, clients=clients, weight=clients, max_weight=most)


def test_the_bits_are_fixed() -> None:
    """Of one codec, for all versions of seqfed and of numpy."""
    update = np.arange(-3, 3, dtype=np.float32)
    found, clipped = quantise(update, 0.5, lattice_of(6, 16, 10, 4.0), 2026, generator(2026, "rounding"))
    assert clipped
    assert centred(found, 16) == [0, -254, 444, -190, 63, -63]
