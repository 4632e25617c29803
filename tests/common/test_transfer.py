"""Chunks: split and put together again, in exactly one way."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfed.common import transfer
from seqfed.common.errors import BrokenTransfer, ChecksumMismatch
from seqfed.common.transfer import Pace, Reassembly, split

SIZES = st.integers(1, 3).map(lambda count: 4 * count)


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    """Chunks of 12 bytes at most, so that many cases are quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "CHUNK_BYTES", 12)
        yield


def receiver(data: bytes) -> tuple[Reassembly, bytearray]:
    into = bytearray()

    def sink(offset: int, chunk: bytes) -> None:
        assert offset == len(into)
        into.extend(chunk)

    return Reassembly(len(data), blake3(data).digest(), sink), into


@given(st.binary(max_size=40), st.lists(st.tuples(st.integers(0, 6), SIZES), max_size=4))
def test_any_breaks_and_resumptions_give_the_same_bytes(data: bytes, breaks: list[tuple[int, int]]) -> None:
    whole, into = receiver(data)
    for taken, size in breaks:  # each connection carries so many chunks of this size and dies
        for _, (offset, chunk) in zip(range(taken), split(memoryview(data), whole.received, size), strict=False):
            whole.add(offset, chunk)
    for offset, chunk in split(memoryview(data), whole.received):
        whole.add(offset, chunk)
    whole.finish()
    assert bytes(into) == data


@settings(max_examples=300)
@given(st.binary(max_size=30), st.integers(0, 3), st.integers(-2, 16), st.binary(max_size=18))
def test_only_the_next_whole_numbers_are_taken(data: bytes, before: int, offset: int, chunk: bytes) -> None:
    whole, into = receiver(data)
    for start in range(0, min(4 * before, len(data)), 4):
        whole.add(start, data[start : start + 4])
    had = whole.received
    left = len(data) - had
    right = offset == had and (len(chunk) in (4, 8, 12) or 0 < len(chunk) == left <= 12) and len(chunk) <= left
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


@given(st.binary(max_size=40), st.integers(0, 40), st.none() | SIZES)
def test_split_covers_the_rest_in_full_chunks(data: bytes, start: int, size: int | None) -> None:
    chunks = list(split(memoryview(data), start, size))
    assert b"".join(chunk for _, chunk in chunks) == data[start:]
    assert [offset for offset, _ in chunks] == list(range(start, len(data), size or 12))
    assert all(len(chunk) == (size or 12) for _, chunk in chunks[:-1])


def test_chunks_shrink_with_each_break_and_grow_with_each_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 512 << 10)
    pace = Pace()
    sizes = [pace.size >> 10]
    for turn in [pace.broken] * 6 + [pace.whole] * 6:
        turn()
        sizes.append(pace.size >> 10)
    assert sizes == [512, 256, 128, 64, 32, 16, 16, 32, 64, 128, 256, 512, 512]


@pytest.mark.parametrize(
    ("nbytes", "seconds", "size"),
    [
        (100 << 20, 1.0, 512),
        (512 << 10, 1.0, 512),
        (1 << 20, 0.0, 512),
        (1 << 20, 32.0, 32),
        (1 << 20, 9e9, 16),
        (0, 1, 16),
    ],
)
def test_chunks_are_a_seconds_worth(nbytes: int, seconds: float, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 512 << 10)
    pace = Pace()
    pace.timed(nbytes, seconds)
    assert pace.size >> 10 == size


def test_how_wide_the_way_up_is_slow_uploads_tell() -> None:
    pace = Pace()
    assert pace.bytes_per_s == math.inf
    pace.carried(5_000_000, 0.1)
    assert pace.bytes_per_s == math.inf  # it has never been too narrow
    for nbytes, seconds in ((9_000_000, 9.0), (7_000, 7.0), (1, 0.5)):
        pace.carried(nbytes, seconds)
        assert pace.bytes_per_s == nbytes / seconds


def test_a_short_upload_tells_what_the_way_carries_at_least_and_is_trusted_a_little_more_each_time() -> None:
    pace = Pace()
    pace.carried(1_000_000, 10.0)
    pace.carried(1_000, 0.4)
    assert pace.bytes_per_s == pytest.approx(125_000)
    pace.carried(1_000, 0.4)
    assert pace.bytes_per_s == pytest.approx(156_250)
    pace.carried(300_000, 0.3)
    assert pace.bytes_per_s == pytest.approx(1_000_000)
    for nothing in ((0, 3.0), (5, 0.0), (5, -1.0)):
        pace.carried(*nothing)
        assert pace.bytes_per_s == pytest.approx(1_000_000)


def test_downloads_stand_for_uploads_only_until_there_is_one() -> None:
    pace = Pace()
    pace.timed(1_000_000, 2.0)
    assert pace.bytes_per_s == 500_000
    pace.carried(1_000, 1.0)
    pace.timed(1_000_000, 0.1)
    assert pace.bytes_per_s == 1_000


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
