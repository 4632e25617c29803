"""Payloads: what comes back is what was sent, as near as the codec says, and nothing else is taken for one."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from seqfed.common.compression import NAMES, Codec, Key, decode, encode, header, largest, pieces, topk
from seqfed.common.errors import (
    BrokenTransfer,
    ChecksumMismatch,
    ConfigError,
    LayoutMismatch,
    NonFiniteUpdate,
    SeqfedError,
    TooLarge,
    UpdateOutOfRange,
    VersionMismatch,
)
from seqfed.common.layout import Flat, Layout
from seqfed.common.seeds import generator

KEY = Key(7, "run", 3, "alice")
CODECS = [Codec(name) for name in NAMES] + [Codec("topk", bits=8, fraction=0.1), Codec("eden1", fraction=1.0)]
ids = [f"{one.name}-{one.bits}-{one.fraction}" for one in CODECS]
every = pytest.mark.parametrize("codec", CODECS, ids=ids)
shapes = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6)
CUT = {"rotq8": 0.03, "rotq4": 0.5, "delta8": 0.03, "delta4": 0.35, "none": 0.0}  # error of the length, at most


def layout_of(*given: tuple[int, ...]) -> Layout:
    return Layout(tuple((f"t{nth}", shape) for nth, shape in enumerate(given)))


def normal(size: int, seed: int = 1) -> Flat:
    return generator(seed, "numbers").standard_normal(size, np.float32)


def whole(payload: bytes | memoryview, layout: Layout, codec: Codec, key: Key = KEY) -> Flat:
    return np.concatenate([np.empty(0, np.float32), *decode(payload, layout, key, codec)])


def length(numbers: NDArray[np.floating[Any]]) -> float:
    return float(np.linalg.norm(numbers.astype(np.float64)))


@settings(deadline=None, max_examples=80)
@given(shapes, st.sampled_from(CODECS), st.integers(0, 1 << 62), st.sampled_from([1e-20, 1e-3, 1.0, 1e20]))
def test_what_comes_back_has_the_layouts_size_and_what_is_left_out_is_the_difference(
    given_: list[tuple[int, ...]], codec: Codec, seed: int, scale: float
) -> None:
    layout = layout_of(*given_)
    vector = normal(layout.size, seed) * np.float32(scale)
    before = vector.copy()
    found = encode(vector, layout, KEY, codec)
    assert np.array_equal(vector, before)
    assert len(found.payload) <= largest(codec, layout)
    assert found.payload == encode(vector, layout, KEY, codec).payload
    back = whole(found.payload, layout, codec)
    assert back.shape == vector.shape
    assert back.dtype == np.float32
    assert (found.residual is not None) == codec.feeds_back
    if found.residual is not None:
        assert length(found.residual + back - vector) <= 1e-5 * length(vector)
    if codec.name in CUT:
        # A piece's largest number is within sqrt(size) of its length, so one of few numbers is cut no finer than that.
        step = 2 * math.sqrt(max(1, layout.size)) / ((1 << codec.bits) - 1) if codec.bits else 0.0
        assert length(back - vector) <= step * length(vector) + 1e-6 * length(vector)


@pytest.mark.parametrize("size", [5000, pieces.PIECE + 77])
@pytest.mark.parametrize("name", sorted(CUT))
def test_a_grid_is_as_fine_as_its_bits(name: str, size: int) -> None:
    layout, codec = layout_of((size,)), Codec(name)
    vector = normal(size)
    back = whole(encode(vector, layout, KEY, codec).payload, layout, codec)
    assert length(back - vector) <= CUT[name] * length(vector)


def test_payloads_are_as_short_as_they_are_said_to_be() -> None:
    layout = layout_of((200_000,))
    vector = normal(200_000)
    sizes = {codec.name: len(encode(vector, layout, KEY, codec).payload) for codec in map(Codec, NAMES)}
    assert sizes["none"] == header.SIZE + 800_000
    assert sizes["rotq8"] < 200_000 / 1.1
    assert sizes["rotq4"] < 100_000 / 1.25
    assert sizes["eden1"] <= header.SIZE + 4 * 4 + 0.161 * 200_000 / 8
    assert sizes["topk"] < 0.02 * 200_000 * 8.3 / 8 + header.SIZE  # 7.07 bits a place is the entropy, and a sign


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(
    ("name", "most"),
    [("none", 0), ("rotq8", 0.5), ("rotq4", 0.5), ("eden1", 0), ("topk", 1.5), ("powersgd", 0), ("delta8", 0.5)],
)
def test_memory_is_as_much_as_is_said(name: str, most: float, rows: bool) -> None:
    """In vectors beside what is given and returned; a few pieces are not counted."""
    layout, codec, few = layout_of((1 << 11, 1 << 10)), Codec(name), 8 * 4 * pieces.PIECE
    vector = normal(layout.size)
    if rows:
        vector.reshape(1 << 11, -1)[::2] = 0
        most += name not in {"topk", "powersgd"}
    found = encode(vector, layout, KEY, codec)
    given = len(found.payload) + (0 if found.residual is None else found.residual.nbytes)
    assert peak(lambda: encode(vector, layout, KEY, codec)) < given + most * vector.nbytes + few
    largest_part = peak(lambda: [len(part) for part in decode(found.payload, layout, KEY, codec)])
    assert largest_part < (0.55 * vector.nbytes if name == "topk" else 0) + few


def peak(work: Callable[[], object]) -> int:
    """Bytes at most that are allocated meanwhile."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["none", "rotq8", "rotq4", "eden1", "delta8"])
def test_rows_that_are_zero_cost_a_bit_each(name: str) -> None:
    layout, codec = layout_of((3,), (1000, 64), (7, 2)), Codec(name)
    vector = normal(layout.size)
    table = vector[3:64_003].reshape(1000, 64)
    untouched = np.arange(1000) % 10 > 0
    table[untouched] = 0
    found = encode(vector, layout, KEY, codec)
    dense = layout_of((3,), (100, 64), (7, 2))
    compact = np.concatenate((vector[:3], table[~untouched].reshape(-1), vector[64_003:]))
    alike = encode(compact, dense, KEY, codec)
    assert len(found.payload) - len(alike.payload) == 125 + 1
    back = whole(found.payload, layout, codec)
    assert not back[3:64_003].reshape(1000, 64)[untouched].any()
    assert np.array_equal(back[:3], whole(alike.payload, dense, codec)[:3])
    if found.residual is not None:
        assert np.array_equal(found.residual, vector - back)


@pytest.mark.parametrize("name", NAMES)
def test_an_update_of_zeros_is_zeros(name: str) -> None:
    layout = layout_of((30, 50), (9,))
    found = encode(np.zeros(layout.size, np.float32), layout, KEY, Codec(name))
    assert not whole(found.payload, layout, Codec(name)).any()


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_what_is_not_finite_or_too_large_is_refused(codec: Codec, bad: float) -> None:
    layout = layout_of((70, 1000))
    vector = np.ones(70_000, np.float32)
    vector[69_000] = bad
    with pytest.raises(UpdateOutOfRange if bad == 3e38 else NonFiniteUpdate, match="69,000"):
        encode(vector, layout, KEY, codec)


def test_another_round_client_or_run_draws_anew_and_is_refused() -> None:
    layout, codec = layout_of((4000,)), Codec("eden1")
    vector = normal(4000)
    seen = set()
    for key in (KEY, Key(8, "run", 3, "alice"), Key(7, "ruN", 3, "alice"), Key(7, "run", 4, "alice"), Key(7, "run", 3)):
        payload = encode(vector, layout, key, codec).payload
        seen.add(payload[header.SIZE :])
        if key != KEY:
            with pytest.raises(BrokenTransfer, match="another run or round, or by another client"):
                decode(payload, layout, KEY, codec)
    assert len(seen) == 5


def test_another_layout_codec_or_version_is_refused() -> None:
    layout, codec = layout_of((40, 10)), Codec("eden1")
    payload = encode(normal(400), layout, KEY, codec).payload
    with pytest.raises(LayoutMismatch, match="400 parameters"):
        decode(payload, layout_of((10, 40)), KEY, codec)
    for other in (Codec("eden1", fraction=0.2), Codec("rotq4"), Codec("topk", fraction=0.1)):
        with pytest.raises(BrokenTransfer, match="this run's is"):
            decode(payload, layout, KEY, other)
    with pytest.raises(VersionMismatch):
        decode(payload[:5] + b"\2" + payload[6:], layout, KEY, codec)
    with pytest.raises(TooLarge, match="at most here"):
        decode(payload + bytes(1000), layout, KEY, codec)
    with pytest.raises(LayoutMismatch, match="shape"):
        encode(normal(401), layout, KEY, codec)
    with pytest.raises(LayoutMismatch, match="residual"):
        encode(normal(400), layout, KEY, codec, normal(400))


@every
def test_a_changed_bit_is_found(codec: Codec) -> None:
    layout = layout_of((20, 30), (11,))
    vector = normal(layout.size)
    vector[30:90] = 0
    payload = encode(vector, layout, KEY, codec).payload
    for at in range(0, 8 * len(payload), 37):
        changed = bytearray(payload)
        changed[at // 8] ^= 1 << at % 8
        with pytest.raises(SeqfedError):
            decode(bytes(changed), layout, KEY, codec)
    with pytest.raises((BrokenTransfer, ChecksumMismatch)):
        decode(payload[:-1], layout, KEY, codec)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(CODECS),
    st.data(),
)
def test_any_body_with_the_right_hash_is_decoded_or_refused_by_name(codec: Codec, data: st.DataObject) -> None:
    """What comes of one is of the layout's size and finite, or a SeqfedError."""
    layout = layout_of((12, 33), (64, 20), (17,))
    vector = normal(layout.size)
    vector[33:66] = 0
    good = encode(vector, layout, KEY, codec).payload
    body = bytearray(good[header.SIZE :])
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, max(0, len(body) - 1)))
        match data.draw(st.sampled_from(["set", "cut", "double", "fill"])):
            case "set":
                body[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del body[at : at + data.draw(st.integers(1, 9))]
            case "double":
                body[at:at] = body[at : at + data.draw(st.integers(1, 9))]
            case _:
                body[at : at + 4] = data.draw(
                    st.sampled_from([b"\xff" * 4, b"\0\0\x80\x7f", b"\0" * 4, b"\xff\xff\x7f\x7f"])
                )
    flags = data.draw(st.sampled_from([good[7], 0, 1, 2, 3, 4, 255]))
    sent = data.draw(st.sampled_from([int.from_bytes(good[32:40], "little"), 0, 1, layout.size, 1 << 63]))
    try:
        found = whole(header.write(codec, layout, KEY, flags, sent, bytes(body)), layout, codec)
    except SeqfedError:
        return
    assert found.shape == (layout.size,)
    assert codec.name == "none" or np.isfinite(found).all()


def test_the_header_is_where_it_is_said_to_be() -> None:
    """magic, codec, version, bits, flags, key, layout, d, D, levels, rank, fraction, hash: 84 bytes."""
    layout = layout_of((100,))
    payload = encode(normal(100), layout, KEY, Codec("rotq4")).payload
    assert header.SIZE == 84
    assert payload[:7] == b"sfc1" + bytes([NAMES.index("rotq4"), 1, 4])
    assert payload[8:24] == KEY.digest[:8] + layout.digest[:8]
    assert np.frombuffer(payload[24:40], "<u8").tolist() == [100, 100]
    assert np.frombuffer(payload[40:48], "<u4").tolist() == [15, 0]


@pytest.mark.parametrize(
    ("name", "given_"),
    [
        ("zip", {}),
        ("eden1", {"fraction": 1.1}),
        ("eden1", {"fraction": -0.1}),
        ("eden1", {"fraction": math.nan}),
        ("eden1", {"rank": 2}),
        ("rotq8", {"bits": 4}),
        ("topk", {"bits": 2}),
        ("powersgd", {"rank": 5000}),
        ("none", {"fraction": 0.5}),
    ],
)
def test_parameters_that_there_are_not_are_refused(name: str, given_: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Codec(name, **given_)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 3000), st.floats(1e-4, 1), st.sampled_from([1, 8]), st.integers(0, 1 << 60))
def test_topk_sends_the_largest_numbers(size: int, fraction: float, bits: int, seed: int) -> None:
    """Against a sort; equal numbers by their order."""
    vector = np.round(normal(size, seed) * 4) / np.float32(4)
    sent = topk.sent_of(size, fraction)
    body, left = topk.encode(vector, fraction, bits)
    found = np.concatenate(list(topk.decode(memoryview(body), size, fraction, bits)))
    order = sorted(range(size), key=lambda at: (-abs(float(vector[at])), at))[:sent]
    apart = np.ones(size, np.bool_)
    apart[order] = False
    assert not found[apart].any()
    assert np.array_equal(left[apart], vector[apart])
    assert np.allclose(found + left, vector, atol=1e-6)
    if bits == 1:
        assert np.allclose(np.abs(found[order]), np.abs(vector[order]).mean(), rtol=1e-6)
    else:
        assert np.abs(left[order]).max() <= np.abs(vector).max() / 127 * 0.51
    assert len(body) <= topk.body_bytes(size, sent, bits)


@pytest.mark.parametrize("name", ["topk", "powersgd", "delta8", "delta4"])
def test_what_is_left_out_comes_with_the_next_ones(name: str) -> None:
    """Of the same update again and again, the mean of what comes back goes to the update itself."""
    layout, codec = layout_of((40, 30), (50,)), Codec(name)
    vector = normal(layout.size)
    total, left = np.zeros(layout.size), None
    for round_ in range(100):
        key = Key(1, "run", round_, "alice")
        found = encode(vector, layout, key, codec, left)
        left = found.residual
        total += whole(found.payload, layout, codec, key)
    assert left is not None
    assert np.abs(total + left - 100 * vector.astype(np.float64)).max() < 0.01
    assert length((total / 100 - vector).astype(np.float32)) < 0.4 * length(vector)
