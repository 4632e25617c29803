"""Masks against AES on one counter block after another, and that nothing in the package draws from a weak generator."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import seqfed.common.masking
from seqfed.common.masking.prg import PIECE, add_masks, threads

TYPES = [np.dtype(name) for name in ("u1", "u2", "u4", "u8")]
keys = st.binary(min_size=32, max_size=32)


def slow_mask(key: bytes, dtype: np.dtype[Any], start: int, count: int) -> list[int]:
    """Numbers start to start + count of a key's mask: AES in its plainest mode on the block numbers."""
    encrypt = Cipher(algorithms.AES256(key), modes.ECB()).encryptor().update  # noqa: S305 - one block, the standard's own
    first, last = start * dtype.itemsize, (start + count) * dtype.itemsize
    stream = b"".join(encrypt(block.to_bytes(16, "big")) for block in range(first // 16, last // 16 + 1))
    stream = stream[first % 16 :]
    return [int.from_bytes(stream[at * dtype.itemsize : (at + 1) * dtype.itemsize], "little") for at in range(count)]


def slow(values: NDArray[Any], plus: list[bytes], minus: list[bytes], start: int) -> list[int]:
    totals = [int(value) for value in values]
    for sign, some in ((1, plus), (-1, minus)):
        for key in some:
            for at, one in enumerate(slow_mask(key, values.dtype, start, len(values))):
                totals[at] += sign * one
    return [total % (1 << (8 * values.dtype.itemsize)) for total in totals]


def vector(dtype: np.dtype[Any], size: int, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, size, dtype, endpoint=True)


@given(
    st.sampled_from(TYPES),
    st.integers(0, 40),
    st.lists(keys, max_size=3),
    st.lists(keys, max_size=3),
    st.one_of(st.integers(0, 100), st.integers(0, 1 << 36)),
)
def test_masks_are_those_of_one_block_after_another(
    dtype: np.dtype[Any], size: int, plus: list[bytes], minus: list[bytes], start: int
) -> None:
    out = vector(dtype, size)
    expected = slow(out, plus, minus, start)
    add_masks(out, plus, minus, start)
    assert out.tolist() == expected


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("over", [-1, 0, 1])
def test_long_vectors_are_masked_like_short_ones(dtype: np.dtype[Any], over: int) -> None:
    size, plus, minus = 2 * PIECE // dtype.itemsize + over, [bytes(32), b"\1" * 32], [b"\2" * 32]
    out, start = vector(dtype, size), 5
    expected = out.copy()
    for first in range(0, size, 1000):
        add_masks(expected[first : first + 1000], plus, minus, start + first)
    add_masks(out, plus, minus, start)
    assert np.array_equal(out, expected)
    tail = slow(vector(dtype, size)[-20:], plus, minus, start + size - 20)
    assert out[-20:].tolist() == tail


@settings(max_examples=20)
@given(st.sampled_from(TYPES), st.integers(0, 5 * PIECE), st.integers(1, 5))
def test_threads_do_what_one_does(dtype: np.dtype[Any], size: int, workers: int) -> None:
    plus, minus = [bytes([number]) * 32 for number in range(2)], [b"\7" * 32]
    out, expected = vector(dtype, size), vector(dtype, size)
    add_masks(expected, plus, minus)
    threads(out, plus, minus, workers)
    assert np.array_equal(out, expected)


@given(st.sampled_from(TYPES), st.lists(keys, max_size=4))
def test_what_one_adds_another_takes_away(dtype: np.dtype[Any], some: list[bytes]) -> None:
    out = vector(dtype, 50)
    add_masks(out, some, some[:1])
    add_masks(out, some[:1], some)
    assert np.array_equal(out, vector(dtype, 50))


def test_a_masked_vector_says_nothing_of_what_it_holds() -> None:
    # one zero vector masked by one key: every byte's values about as frequent
    out = np.zeros(1 << 18, np.uint8)
    add_masks(out, [b"\3" * 32], [])
    counts = np.bincount(out, minlength=256)
    assert abs(counts - 1024).max() < 6 * 32


def test_a_part_of_a_vector_is_masked_where_it_lies() -> None:
    whole = vector(np.dtype("u2"), 100)
    before, part = whole.copy(), whole[30:60]
    add_masks(part, [bytes(32)], [], 30)
    assert np.array_equal(whole[:30], before[:30])
    assert np.array_equal(whole[60:], before[60:])
    assert whole[30:60].tolist() == slow(before[30:60], [bytes(32)], [], 30)


@pytest.mark.parametrize(
    "out", [np.zeros(4, np.int16), np.zeros(4, np.float32), np.zeros((2, 2), np.uint8), np.zeros(8, np.uint8)[::2]]
)
def test_only_contiguous_unsigned_vectors_are_masked(out: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="contiguous unsigned"):
        add_masks(out, [bytes(32)], [])


@pytest.mark.parametrize("size", [0, 16, 24, 31, 33])
def test_keys_of_another_size_are_refused_before_anything_is_masked(size: int) -> None:
    out = np.zeros(4, np.uint8)
    with pytest.raises(ValueError, match=f"key has {size} bytes"):
        add_masks(out, [bytes(32)], [bytes(size)])
    assert not out.any()


def test_the_package_knows_no_generator_but_the_operating_systems() -> None:
    """Neither `random` nor numpy's, nor the run's own seeded one."""
    files = sorted(Path(seqfed.common.masking.__path__[0]).rglob("*.py"))
    assert {"shamir.py", "prg.py", "keys.py"} <= {file.name for file in files}
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Import(names=names):
                    said = [one.name for one in names]
                case ast.ImportFrom(module=module, names=names):
                    said = [f"{module}.{one.name}" for one in names]
                case ast.Attribute(attr=attribute):
                    said = [f".{attribute}"]
                case ast.Call(func=ast.Name(id=name)):
                    said = [f"{name}()"]
                case _:
                    continue
            weak = {"random", "default_rng", "generator", "torch", "generator()", "__import__()", "import_module()"}
            found += [f"{file.name}:{node.lineno}: {one}" for one in said if weak & set(one.split("."))]
    assert found == []
