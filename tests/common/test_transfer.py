"""Chunks: split and put together again, in exactly one way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfed.common import transfer
from seqfed.common.errors import BrokenTransfer, ChecksumMismatch
from seqfed.common.transfer import Reassembly, split


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    """Chunks of 4 bytes, so that many cases are quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "CHUNK_BYTES", 4)
        yield


def receiver(data: bytes) -> tuple[Reassembly, bytearray]:
    into = bytearray()

    def sink(offset: int, chunk: bytes) -> None:
        assert offset == len(into)
        into.extend(chunk)

    return Reassembly(len(data), blake3(data).digest(), sink), into


@given(st.binary(max_size=20), st.lists(st.integers(0, 6), max_size=4))
def test_any_breaks_and_resumptions_give_the_same_bytes(data: bytes, breaks: list[int]) -> None:
    whole, into = receiver(data)
    for taken in breaks:  # each connection carries so many chunks and dies
        for _, (offset, chunk) in zip(range(taken), split(memoryview(data), whole.received), strict=False):
            whole.add(offset, chunk)
    for offset, chunk in split(memoryview(data), whole.received):
        whole.add(offset, chunk)
    whole.finish()
    assert bytes(into) == data


@settings(max_examples=300)
@given(st.binary(max_size=14), st.integers(0, 3), st.integers(-2, 16), st.binary(max_size=6))
def test_only_the_next_chunk_at_its_full_size_is_taken(data: bytes, before: int, offset: int, chunk: bytes) -> None:
    whole, into = receiver(data)
    for start in range(0, min(4 * before, len(data)), 4):
        whole.add(start, data[start : start + 4])
    had = whole.received
    right = offset == had and chunk != b"" and len(chunk) == min(4, len(data) - had)
    if right:
        whole.add(offset, chunk)
        assert (whole.received, bytes(into)) == (had + len(chunk), data[:had] + chunk)
    else:
        with pytest.raises(BrokenTransfer):
            whole.add(offset, chunk)
        assert (whole.received, bytes(into)) == (had, data[:had])
        for start, rest in split(memoryview(data), had):  # and the right one still fits
            whole.add(start, rest)
        whole.finish()


@given(st.binary(max_size=14), st.integers(0, 14))
def test_split_covers_the_rest_in_full_chunks(data: bytes, start: int) -> None:
    chunks = list(split(memoryview(data), start))
    assert b"".join(chunk for _, chunk in chunks) == data[start:]
    assert [offset for offset, _ in chunks] == list(range(start, len(data), 4))
    assert all(len(chunk) == 4 for _, chunk in chunks[:-1])


def test_too_few_bytes() -> None:
    whole, _ = receiver(b"abcdef")
    whole.add(0, b"abcd")
    with pytest.raises(BrokenTransfer, match="ended at byte 4 of 6"):
        whole.finish()


def test_other_bytes() -> None:
    whole, _ = receiver(b"abcdef")
    whole.add(0, b"abcd")
    whole.add(4, b"eF")
    with pytest.raises(ChecksumMismatch, match="6 bytes came"):
        whole.finish()


def test_a_sink_that_fails_leaves_the_chunk_to_come_again() -> None:
    full = [True]
    taken: list[bytes] = []

    def sink(offset: int, chunk: bytes) -> None:
        if full[0]:
            raise OSError(28, "No space left on device")
        taken.append(chunk)

    whole = Reassembly(4, blake3(b"abcd").digest(), sink)
    with pytest.raises(OSError, match="No space"):
        whole.add(0, b"abcd")
    assert whole.received == 0
    full[0] = False
    whole.add(0, b"abcd")
    whole.finish()
    assert taken == [b"abcd"]


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_checksum_of_another_length(size: int) -> None:
    with pytest.raises(BrokenTransfer, match=f"a BLAKE3 digest has 32 bytes, {size} came"):
        Reassembly(1, bytes(size), lambda offset, data: None)
