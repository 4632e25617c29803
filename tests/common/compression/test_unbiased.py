"""What a codec claims of its expectation, statistically; false alarms are rarer than one in a million."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from seqfed.common.compression import Codec, Key, decode, encode, pieces, rotsub
from seqfed.common.layout import Flat, Layout
from seqfed.common.seeds import generator

WORST = 1e-6
BEYOND = 5.3  # deviations of a normal number within which it is but for WORST / 10
LAYOUT = Layout((("w", (30, 20)), ("b", (77,))))


def heavy(size: int) -> Flat:
    """Tails as an update's, and layers of different size."""
    drawn = generator(3, "update").standard_t(4, size) * np.where(np.arange(size) < size // 2, 1.0, 0.05)
    return drawn.astype(np.float32)


def deviations(samples: list[Flat], wanted: Flat) -> NDArray[np.float64]:
    """Of each coordinate's mean from what is wanted, in its own standard errors."""
    many = np.array(samples, np.float64)
    error = many.std(axis=0, ddof=1) / math.sqrt(len(many))
    found: NDArray[np.float64] = (many.mean(axis=0) - wanted) / np.maximum(error, 1e-12)
    return found


@pytest.mark.parametrize("name", ["rotq8", "rotq4", "eden1"])
def test_the_expectation_is_the_update(name: str) -> None:
    """Over the codec's own draws: each coordinate within 5.3 standard errors plus what 677 of them allow, and the mean square of
    all near 1, from which a common lean would move it.
    """
    vector, codec, times = heavy(LAYOUT.size), Codec(name), 400
    samples = []
    for round_ in range(times):
        key = Key(1, "run", round_, "alice")
        samples.append(np.concatenate(list(decode(encode(vector, LAYOUT, key, codec).payload, LAYOUT, key, codec))))
    found = deviations(samples, vector)
    assert np.abs(found).max() < BEYOND + 1
    # A chi-square of 677 / 3 freedoms at least (neighbours share their noise): within 5.3 of its deviations of 1.
    assert abs(float(np.square(found).mean()) - 1) < BEYOND * math.sqrt(2 / (LAYOUT.size / 3))


@pytest.mark.parametrize("size", [16, 64, 1000])
@pytest.mark.parametrize("fraction", [0.16, 1.0])
def test_one_large_number_in_a_short_vector_takes_nothing_of_the_others(size: int, fraction: float) -> None:
    """Along the large number, and along the others together."""
    layout, codec, times = Layout((("w", (size,)),)), Codec("eden1", fraction=fraction), 400
    vector = 0.3 * generator(4, "update").standard_normal(size, np.float32)
    vector[size // 2] = 5.0
    ways = np.zeros((2, size))
    ways[0, size // 2] = 1.0
    ways[1] = vector * (np.arange(size) != size // 2) / np.linalg.norm(vector[np.arange(size) != size // 2])
    samples = []
    for round_ in range(times):
        key = Key(1, "run", round_, "alice")
        found = np.concatenate(list(decode(encode(vector, layout, key, codec).payload, layout, key, codec)))
        samples.append((ways @ found).astype(np.float32))
    assert np.abs(deviations(samples, (ways @ vector).astype(np.float32))).max() < BEYOND


@pytest.mark.parametrize("size", [1500, 6144])
def test_layers_of_different_size_are_alike_in_a_vector_of_any_length(size: int) -> None:
    """Along each third of the vector, of which one has far larger numbers: none grows or shrinks."""
    layout, codec, times = Layout((("w", (size,)),)), Codec("eden1", fraction=1.0), 100
    for large in range(3):
        third = np.arange(size) * 3 // size
        vector = generator(5, "update").standard_normal(size, np.float32) * np.where(third == large, 1.0, 0.1)
        ways = np.array([vector * (third == one) / np.linalg.norm(vector * (third == one)) for one in range(3)])
        samples = []
        for round_ in range(times):
            key = Key(1, "run", round_, "alice")
            payload = encode(vector.astype(np.float32), layout, key, codec).payload
            samples.append((ways @ np.concatenate(list(decode(payload, layout, key, codec)))).astype(np.float32))
        assert np.abs(deviations(samples, (ways @ vector).astype(np.float32))).max() < BEYOND


def test_the_last_few_numbers_of_a_long_vector_lean_no_more_than_others() -> None:
    size, times = pieces.PIECE + 3, 60
    layout, codec = Layout((("w", (size,)),)), Codec("eden1")
    vector = generator(6, "update").standard_normal(size, np.float32)
    vector[-3:] = (1.0, 0.1, 0.0)
    samples = []
    for round_ in range(times):
        key = Key(1, "run", round_, "alice")
        samples.append(list(decode(encode(vector, layout, key, codec).payload, layout, key, codec))[-1][-3:])
    # Their noise is that of all numbers, far larger than they are; alone they would be wrong by parts of themselves only.
    assert np.abs(deviations(samples, vector[-3:])).max() < BEYOND + 1
    assert np.std(samples, axis=0).min() > 2.0
    for length in (1, pieces.PIECE, pieces.PIECE + 1, 2 * pieces.PIECE, 5 * pieces.PIECE - 1, 5 * pieces.PIECE + 7):
        parts = [part for _, part in pieces.shared(length)]
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == length
        assert len(parts) == pieces.count(length)
        assert min(part.stop - part.start for part in parts) >= min(length, pieces.PIECE // 2)


def test_edens_noise_is_what_the_paper_says() -> None:
    """With a part p of the signs: pi / (2 p) - 1 of the squared length (Vargaftik et al. 2022, for large d)."""
    size, fraction = 1 << 14, 0.25
    layout, codec = Layout((("w", (size,)),)), Codec("eden1", fraction=fraction)
    vector = heavy(size)
    noise = []
    for round_ in range(20):
        key = Key(1, "run", round_, "alice")
        back = np.concatenate(list(decode(encode(vector, layout, key, codec).payload, layout, key, codec)))
        noise.append(
            float(np.square(back.astype(np.float64) - vector).sum() / np.square(vector.astype(np.float64)).sum())
        )
    assert np.mean(noise) == pytest.approx(math.pi / 2 / fraction - 1, rel=0.05)


def test_each_number_has_the_same_chance_to_be_drawn() -> None:
    for size in (100, 5001):
        _, runs, sent = pieces.drawn(size, 0.16)
        counts, times = np.zeros(size), 1500
        for seed in range(times):
            where = pieces.places(size, 0.16, seed)
            assert np.all(np.diff(where) > 0)
            counts[where[where < size]] += 1
        chance = sent / runs
        assert np.abs(counts - times * chance).max() < (BEYOND + 1) * math.sqrt(times * chance * (1 - chance))


def test_numbers_are_rounded_by_chance_in_proportion() -> None:
    """At four places, over seeds: with T roundings within t, but for 2 exp(-2 T t^2) (Hoeffding)."""
    times, top = 4000, 255
    for part in (0.1, 0.5, 0.93):
        ups = np.zeros(4)
        for seed in range(times):
            numbers = np.full(4, (2 * (100 + part) - top) / top, np.float32)
            symbols = pieces._rounded(numbers, 1.0, 8, seed)
            assert set(symbols.tolist()) <= {100, 101}
            ups += symbols == 101
        assert np.all(np.abs(ups / times - part) < math.sqrt(math.log(2 / WORST) / (2 * times)) + 2**-16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_no_number_is_rounded_beyond_the_grid(bits: int, scale: float) -> None:
    """The largest and the smallest themselves, of many sizes, and so often that every draw comes up with them."""
    top = (1 << bits) - 1
    for seed in range(40):
        highest = np.float32(scale * (1 + seed / 40))
        for drawn in (seed, None):
            found = pieces._rounded(np.tile([highest, -highest], 1 << 15), float(highest), bits, drawn).reshape(-1, 2)
            assert found.min(axis=0).tolist()[0] >= top - 1
            assert found.max(axis=0).tolist()[1] <= 1


@pytest.mark.parametrize("wraps", [False, True])
def test_a_masked_part_is_unbiased(wraps: bool) -> None:
    size, clients = 600, 3
    updates = [heavy(size) * np.float32(0.02 * (1 + nth)) for nth in range(clients)]
    wanted = np.mean(updates, axis=0)
    clip = 1.01 * max(float(np.linalg.norm(one)) for one in updates)
    deviation = float(np.linalg.norm(wanted)) * clients / math.sqrt(size)
    part = (
        rotsub.tuned(size, 0.3, 12, clients, clip, deviation) if wraps else rotsub.bounded(size, 0.3, 8, clients, clip)
    )
    samples = []
    for seed in range(400):
        total = np.zeros(part.size, part.dtype)
        for nth, one in enumerate(updates):
            total += rotsub.quantise(one, 1.0, part, seed, generator(seed, nth))[0]
        total &= part.dtype.type((1 << part.bits) - 1)
        samples.append(rotsub.decode(total, part, seed, clients=clients, weight=clients, max_weight=1))
    found = deviations(samples, np.asarray(wanted, np.float32))
    assert np.abs(found).max() < BEYOND + 1
    assert abs(float(np.square(found).mean()) - 1) < BEYOND * math.sqrt(2 / (size / 3))
