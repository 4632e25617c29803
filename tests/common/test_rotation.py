"""The rotation against dense matrices and a slow transform, and what it is for: numbers alike in size."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from seqfed.common import rotation
from seqfed.common.rotation import rotate, span, unrotate
from seqfed.common.seeds import generator

Reals = NDArray[np.float64]
sizes = st.integers(1, 100_000)
seeds = st.integers(0, (1 << 63) - 1)


def matrix(size: int, seed: int) -> Reals:
    """The rotation's matrix, column by column."""
    columns = np.eye(size, dtype=np.float32)
    for column in columns:
        rotate(column, seed)
    return columns.T.astype(np.float64)


def slow(numbers: Reals) -> Reals:
    """The Walsh-Hadamard transform, neighbours first, orthonormal."""
    half = 1
    while half < len(numbers):
        first, second = numbers.reshape(-1, 2, half).swapaxes(0, 1) / math.sqrt(2)
        numbers = np.stack((first + second, first - second), axis=1).reshape(-1)
        half *= 2
    return numbers


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 31, 32, 33, 64, 100])
def test_it_is_orthonormal(size: int) -> None:
    turn = matrix(size, 7)
    assert np.allclose(turn @ turn.T, np.eye(size), atol=1e-5)


@pytest.mark.parametrize("stages", [0, 1, 2, 3, 6, 7])
def test_of_a_power_of_two_it_is_hadamards_matrix_with_a_sign_a_column(stages: int) -> None:
    size = 1 << stages
    turn = matrix(size, 11)
    hadamard = np.array([slow(column) for column in np.eye(size)])
    signs = np.sign(turn[0])  # the matrix' first row is all plus
    assert np.allclose(turn, hadamard * signs, atol=1e-6)
    assert stages < 3 or 0 < (signs > 0).sum() < size


@pytest.mark.parametrize(
    ("stages", "near", "far"), [(15, 16, 8), (16, 16, 8), (17, 16, 8), (19, 16, 8), (13, 5, 3), (14, 6, 1), (9, 4, 4)]
)
def test_long_ones_are_transformed_like_short_ones(
    stages: int, near: int, far: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many passes it takes; with smaller ones in place of the many millions that several passes are for."""
    monkeypatch.setattr(rotation, "BITS", near)
    monkeypatch.setattr(rotation, "FAR", far)
    numbers = generator(1, "numbers").standard_normal(1 << stages).astype(np.float32)
    found, signs = numbers.copy(), np.zeros(1 << stages, np.float32)
    rotate(found, 5)
    signs[0] = 1
    unrotate(signs, 5)  # the matrix' first row
    assert np.abs(found - slow(np.float64(numbers) * np.sign(signs))).max() < 1e-5


@settings(deadline=None, max_examples=60)
@given(sizes, seeds)
def test_the_inverse_brings_it_back(size: int, seed: int) -> None:
    numbers = generator(seed, "numbers").standard_normal(size).astype(np.float32)
    found = numbers.copy()
    rotate(found, seed)
    assert abs(np.linalg.norm(found.astype(np.float64)) / np.linalg.norm(numbers.astype(np.float64)) - 1) < 1e-5
    again = numbers.copy()
    rotate(again, seed)
    assert np.array_equal(found, again)
    unrotate(found, seed)
    assert np.abs(found - numbers).max() < 1e-5


@settings(deadline=None, max_examples=60)
@given(sizes, seeds, st.sampled_from(["first", "last", "tail", "constant", "steep"]))
def test_all_numbers_are_alike_in_size_wherever_the_large_ones_lay(size: int, seed: int, shape: str) -> None:
    """Beyond z |x| / sqrt(s) with probability 2 exp(-z^2 / 2): with 100,000 numbers and 60 vectors, z = 9 never is."""
    numbers = np.zeros(size, np.float32)
    match shape:
        case "first":
            numbers[0] = 1
        case "last":
            numbers[-1] = 1
        case "tail":
            numbers[span(size) :] = 1
            numbers[-1] = 1
        case "constant":
            numbers[:] = 1
        case _:
            numbers[:] = np.exp(-np.arange(size) / 10)
    length = float(np.linalg.norm(numbers))
    rotate(numbers, seed)
    assert np.abs(numbers).max() <= 9 * length / math.sqrt(span(size))


def test_another_seed_draws_other_signs() -> None:
    one, other = np.ones(64, np.float32), np.ones(64, np.float32)
    rotate(one, 1)
    rotate(other, 2)
    assert not np.array_equal(one, other)


def test_the_bits_are_fixed() -> None:
    """Whoever has the seed must find the same: another stream of signs would need another codec."""
    numbers = np.arange(6, dtype=np.float32)
    rotate(numbers, 2026)
    assert numbers.tolist() == [-3.0, 1.0, 3.5, -1.5, -5.5, -0.5]
