"""Masked parts against plain arithmetic: the sum decodes to what the whole numbers say, and wraps as seldom as stated."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfed.common.compression import pieces, rotsub
from seqfed.common.errors import ConfigError, MaskingFailed, NonFiniteUpdate
from seqfed.common.layout import Flat
from seqfed.common.quantising import Residues
from seqfed.common.rotation import rotate, unrotate
from seqfed.common.seeds import generator


def drawn(size: int, seed: int, long: float = 1.0) -> Flat:
    numbers = generator(seed, "update").standard_normal(size)
    return (numbers * (long / np.linalg.norm(numbers))).astype(np.float32)


def whole(residues: Residues, bits: int) -> list[int]:
    half = 1 << bits - 1
    return ((residues.astype(np.int64) + half) % (1 << bits) - half).tolist()  # type: ignore[no-any-return]


def summed(part: rotsub.Part, updates: list[Flat], seed: int = 5) -> Residues:
    total = np.zeros(part.size, part.dtype)
    for nth, one in enumerate(updates):
        total += rotsub.quantise(one, 1.0, part, seed, generator(seed, nth))[0]
    total &= part.dtype.type((1 << part.bits) - 1)
    return total


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3000),
    st.floats(0.01, 1),
    st.sampled_from([4, 5, 8, 12, 16, 24]),
    st.lists(st.integers(1, 50), min_size=1, max_size=7),
    st.integers(1, 40),
)
def test_a_bounded_sum_decodes_to_the_mean_of_the_whole_numbers(
    dim: int, fraction: float, bits: int, weights: list[int], most: int
) -> None:
    part = rotsub.bounded(dim, fraction, bits, len(weights), 2.0)
    counted = [min(weight, most) for weight in weights]
    total, sums = np.zeros(part.size, part.dtype), [0] * part.size
    for nth, weight in enumerate(counted):
        update = drawn(dim, nth, 0.9 * (nth % 4))
        before = update.copy()
        found, clipped = rotsub.quantise(update, weight / most, part, 9, generator(9, nth))
        assert np.array_equal(update, before)
        assert clipped == (nth % 4 == 3)
        assert max(map(abs, whole(found, bits))) <= part.levels
        assert found.shape == (part.size,)
        total += found
        sums = [a + b for a, b in zip(sums, whole(found, bits), strict=True)]
    _, runs, sent = pieces.drawn(dim, fraction)
    where = pieces.places(dim, fraction, 9)
    unit = part.step * most / sum(counted)
    wanted = np.zeros(max(dim, int(where[-1]) + 1))
    wanted[where] = np.array(sums) * unit * (runs / sent)
    turned = wanted[:dim].astype(np.float32)
    unrotate(turned, 9)
    mean = rotsub.decode(total, part, 9, clients=len(weights), weight=sum(counted), max_weight=most)
    assert np.allclose(mean, turned, rtol=1e-4, atol=1e-5 * float(np.abs(turned).max()))


@given(st.integers(2, 32), st.integers(1, 1 << 20))
def test_levels_are_the_most_with_which_no_sum_wraps(bits: int, n_max: int) -> None:
    half = 1 << bits - 1
    if n_max >= half:
        with pytest.raises(ConfigError, match="use more bits"):
            rotsub.bounded(100, 0.5, bits, n_max, 1.0)
    else:
        part = rotsub.bounded(100, 0.5, bits, n_max, 1.0)
        assert n_max * part.levels < half <= n_max * (part.levels + 1)
        assert part.wrap == 0


def test_a_part_of_all_is_the_mean_itself() -> None:
    updates = [drawn(5000, nth) for nth in range(4)]
    part = rotsub.bounded(5000, 1.0, 24, 4, 1.01)
    mean = rotsub.decode(summed(part, updates), part, 5, clients=4, weight=4, max_weight=1)
    assert np.linalg.norm(mean - np.mean(updates, axis=0)) < 1e-4


@pytest.mark.parametrize(("bits", "clients"), [(4, 3), (5, 10), (6, 30), (8, 100)])
def test_a_tuned_sum_wraps_as_seldom_as_stated(bits: int, clients: int) -> None:
    """Against the sum of the same whole numbers, not modulo anything. The chance of so many wraps or more is below 1e-6."""
    dim = 10_000
    common = drawn(dim, 1000)
    updates = [np.asarray(0.5 * common + drawn(dim, nth), np.float32) for nth in range(clients)]
    deviation = float(np.linalg.norm(np.sum(updates, axis=0, dtype=np.float64))) / math.sqrt(dim)
    part = rotsub.tuned(dim, 1.0, bits, clients, 2.0, deviation)
    total = summed(part, updates)
    true = np.zeros(part.size, np.int64)
    for nth, one in enumerate(updates):
        wide = rotsub.Part(part.dim, part.fraction, 32, part.levels, part.clip, part.step, part.wrap)
        true += np.array(whole(rotsub.quantise(one, 1.0, wide, 5, generator(5, nth))[0], 32))
    wrapped = int((np.array(whole(total, bits)) != true).sum())
    expected = part.size * part.wrap
    assert 1e-5 < part.wrap < 1e-4
    assert wrapped <= expected + 5 * math.sqrt(expected) + 6
    mean = rotsub.decode(total, part, 5, clients=clients, weight=clients, max_weight=1)
    wanted = np.mean(updates, axis=0)
    assert np.linalg.norm(mean - wanted) < 0.75 * np.linalg.norm(wanted)
    assert rotsub.deviation_of(total, part, clients) == pytest.approx(deviation, rel=0.1)


def test_fewer_bits_suffice_than_for_a_sum_that_never_wraps() -> None:
    with pytest.raises(ConfigError):
        rotsub.bounded(1000, 0.5, 6, 100, 1.0)
    assert rotsub.tuned(1000, 0.5, 7, 100, 1.0, 0.1).levels == 63


def test_the_deviation_is_found_in_a_few_rounds() -> None:
    """From the first step, which knows the clip alone, and after updates that shrink."""
    dim, deviation = 20_000, None
    for round_ in range(6):
        updates = [drawn(dim, 10 * round_ + nth, 0.1) for nth in range(10)]
        part = rotsub.tuned(dim, 0.2, 5, 10, 3.0, deviation)
        deviation = rotsub.deviation_of(summed(part, updates), part, 10)
    assert deviation == pytest.approx(0.1 * math.sqrt(10 / dim), rel=0.2)


@pytest.mark.parametrize("clients", [3, 10, 40])
@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("coarse", [0.5, 2.0, 5.0, 20.0, 100.0])
def test_the_deviation_is_never_found_too_small(clients: int, alike: float, coarse: float) -> None:
    """However much too large the step was: the next sum would wrap."""
    dim, common = 20_000, drawn(20_000, 1000)
    updates = [np.asarray(alike * common + (1 - alike) * drawn(dim, nth), np.float32) for nth in range(clients)]
    true = float(np.linalg.norm(np.sum(updates, axis=0, dtype=np.float64))) / math.sqrt(dim)
    part = rotsub.tuned(dim, 1.0, rotsub.bits_of(clients), clients, 9.0, coarse * true)
    found = rotsub.deviation_of(summed(part, updates), part, clients)
    assert 0.9 * true < found < max(1.2 * true, min(0.6 * coarse, math.sqrt(clients) + 1) * true)


@pytest.mark.parametrize("wraps", [False, True])
def test_a_sum_that_holds_garbage_or_outgrew_its_step_is_refused(wraps: bool) -> None:
    dim, clients = 6000, 10
    updates = [drawn(dim, nth) for nth in range(clients)]
    deviation = math.sqrt(clients / dim)
    part = rotsub.tuned(dim, 0.3, 8, clients, 100.0, deviation) if wraps else rotsub.bounded(dim, 0.3, 8, clients, 1.01)
    honest = summed(part, updates)
    rotsub.decode(honest, part, 5, clients=clients, weight=clients, max_weight=1)
    noise = generator(2).integers(0, 256, part.size).astype(np.uint8)
    with pytest.raises(MaskingFailed, match="tuned for"):
        rotsub.decode(honest + noise, part, 5, clients=clients, weight=clients, max_weight=1)
    if wraps:
        grown = summed(part, [one * np.float32(6) for one in updates])
        with pytest.raises(MaskingFailed):
            rotsub.decode(grown, part, 5, clients=clients, weight=clients, max_weight=1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    update = np.ones(100, np.float32)
    update[70] = bad
    with pytest.raises(NonFiniteUpdate):
        rotsub.quantise(update, 1.0, rotsub.bounded(100, 0.5, 8, 3, 1.0), 1, generator(1))


def test_all_clients_send_the_same_part() -> None:
    part = rotsub.bounded(1000, 0.1, 8, 1, 2.0)
    update = drawn(1000, 1)
    turned = update.copy()
    rotate(turned, 4)
    for nth in range(3):
        found, _ = rotsub.quantise(update, 1.0, part, 4, generator(nth))
        wanted = pieces.gather(turned, pieces.places(1000, 0.1, 4)) / part.step
        assert np.abs(np.array(whole(found, 8)) - wanted).max() < 1


def test_the_bits_are_fixed() -> None:
    """Of one codec, for all versions of seqfed and of numpy."""
    update = np.arange(-6, 6, dtype=np.float32)
    part = rotsub.bounded(12, 0.5, 12, 10, 4.0)
    found, clipped = rotsub.quantise(update, 0.5, part, 2026, generator(2026, "rounding"))
    assert clipped
    assert whole(found, 12) == GOLDEN


GOLDEN = [4, -17, -24, -3, -39, -17]
