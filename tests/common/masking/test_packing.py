"""Packed integers against one big integer of them all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from seqfed.common.errors import MaskingRefused
from seqfed.common.masking.packing import PIECE, pack, packed_bytes, unpack
from seqfed.common.masking.terms import WIDTHS

widths = st.sampled_from(list(WIDTHS))


def slow(values: list[int], bits: int) -> bytes:
    """All numbers as the digits of one."""
    whole = sum((value % (1 << bits)) << (bits * at) for at, value in enumerate(values))
    return whole.to_bytes(-(-len(values) * bits // 8), "little")


def vector(bits: int, size: int) -> NDArray[Any]:
    dtype = np.dtype(WIDTHS[bits])
    return np.random.default_rng(size).integers(0, np.iinfo(dtype).max, size, dtype, endpoint=True)


@given(widths, st.lists(st.integers(0, (1 << 32) - 1), max_size=20))
def test_numbers_are_the_digits_of_one_number(bits: int, some: list[int]) -> None:
    dtype = np.dtype(WIDTHS[bits])
    values = np.array(some, np.uint64).astype(dtype)
    packed = pack(values, bits)
    assert packed == slow(values.tolist(), bits)
    assert len(packed) == packed_bytes(len(values), bits)
    for memory in {dtype, np.dtype("u4"), np.dtype("u8")}:
        found = unpack(packed, bits, len(values), memory)
        assert found.dtype == memory
        assert found.tolist() == [value % (1 << bits) for value in values.tolist()]


@pytest.mark.parametrize("bits", list(WIDTHS))
@pytest.mark.parametrize("size", [PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5])
def test_long_vectors_are_packed_like_short_ones(bits: int, size: int) -> None:
    values = vector(bits, size)
    packed = pack(values, bits)
    assert packed == b"".join(slow(values[at : at + 8].tolist(), bits) for at in range(0, size, 8))
    assert unpack(packed, bits, size, values.dtype).tolist() == (values & ((1 << bits) - 1)).tolist()


@given(widths, st.integers(0, 100), st.integers(0, 12))
def test_a_vector_may_be_packed_and_unpacked_in_pieces_of_eights(bits: int, size: int, eights: int) -> None:
    values, cut = vector(bits, size), 8 * eights
    packed = pack(values, bits)
    assert pack(values[:cut], bits) + pack(values[cut:], bits) == packed
    if cut <= size:
        place = packed_bytes(cut, bits)
        first = unpack(memoryview(packed)[:place], bits, cut, values.dtype)
        rest = unpack(memoryview(packed)[place:], bits, size - cut, values.dtype)
        assert np.concatenate([first, rest]).tolist() == unpack(packed, bits, size, values.dtype).tolist()


@pytest.mark.parametrize("bits", list(WIDTHS))
def test_what_is_packed_and_what_comes_back_is_not_the_memory_of_either(bits: int) -> None:
    values = vector(bits, 16)
    before = values.copy()
    packed = pack(values, bits)
    found = unpack(packed, bits, 16, values.dtype)
    found += 1
    assert found.flags.writeable
    assert np.array_equal(values, before)
    assert packed == pack(before, bits)


@given(widths, st.integers(0, 20), st.integers(-3, 3).filter(bool))
def test_bytes_of_another_number_are_refused(bits: int, size: int, more: int) -> None:
    due = packed_bytes(size, bits)
    if due + more >= 0:
        with pytest.raises(MaskingRefused, match=f"are {due} bytes, and there are {due + more}"):
            unpack(bytes(due + more), bits, size, np.dtype("u4"))


@pytest.mark.parametrize("bits", [12, 20])
def test_numbers_have_one_form(bits: int) -> None:
    packed = bytearray(pack(vector(bits, 3), bits))
    packed[-1] |= 0x10
    with pytest.raises(MaskingRefused, match="last 4 bits of 3"):
        unpack(bytes(packed), bits, 3, np.dtype("u4"))


def test_strided_numbers_are_packed_like_others() -> None:
    for bits in WIDTHS:
        values = vector(bits, 64)
        assert pack(values[::2], bits) == pack(values[::2].copy(), bits)
