"""A vector as a payload and back: header, rows that are zero, body."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from seqfed.common.compression import header, lowrank, pieces, rows, topk
from seqfed.common.compression.codec import GRIDS, Codec, Encoded, Key
from seqfed.common.errors import BrokenTransfer, LayoutMismatch, TooLarge
from seqfed.common.layout import Flat, Layout

SECTIONS: Final = (
    "basis",
    "middle",
    "whole",
)  # of powersgd: numbers of different size, each rotated and scaled on its own


def encode(vector: Flat, layout: Layout, key: Key, codec: Codec, residual: Flat | None = None) -> Encoded:
    """The payload of a float32 vector (layout.size,), which stays as it is.

    residual: what the last `encode` left out; of a codec that feeds back, and of the same run and layout, else None. Raises
    LayoutMismatch, NonFiniteUpdate, UpdateOutOfRange.
    """
    if vector.shape != (layout.size,) or vector.dtype != np.float32:
        raise LayoutMismatch(
            f"a {vector.dtype} vector of shape {vector.shape} came for a model of {layout.size:,} parameters"
        )
    if residual is not None:
        if not codec.feeds_back or residual.shape != vector.shape:
            raise LayoutMismatch(f"codec '{codec.name}' was given a residual of shape {residual.shape}")
        vector = vector + residual
    if codec.name == "topk":
        few, rest = topk.encode(vector, codec.fraction, codec.bits)
        return Encoded(header.write(codec, layout, key, 0, topk.sent_of(layout.size, codec.fraction), few), rest)
    if codec.name == "powersgd":
        return _to_lowrank(vector, layout, key, codec)
    kept = rows.find(layout, vector)
    compact = kept.compact(vector)
    flags, first, sent = header.ROWS if kept.kept else 0, kept.pack() if kept.kept else b"", kept.sent
    body: bytes | memoryview
    left: Flat | None = None
    if codec.name == "none":
        for _, part in pieces.cut(len(compact)):
            pieces.require_finite(compact[part], part.start)
        body = np.ascontiguousarray(compact, "<f4").data.cast("B")
    elif codec.name == "eden1":
        body = b"".join(pieces.to_signs(compact, codec.fraction, key))
        sent = pieces.sent_signs(kept.sent, codec.fraction)
    else:
        if codec.feeds_back:
            # The sum with a residual is nobody else's, nor is a vector without some of its rows.
            left = compact if residual is not None or kept.kept else np.empty_like(compact)
        packed, body = _to_grid(compact, key, codec, left)
        flags |= packed
        if left is not None and kept.kept:
            left = np.concatenate(list(kept.expand(iter([left]))))
    return Encoded(header.write(codec, layout, key, flags, sent, first + body if first else body), left)


def decode(payload: bytes | memoryview, layout: Layout, key: Key, codec: Codec) -> Iterator[Flat]:
    """The vector in float32 parts, in their order.

    All that a peer declares is checked before this returns: raises TooLarge, BrokenTransfer, VersionMismatch, LayoutMismatch,
    ChecksumMismatch, UpdateOutOfRange. What only the numbers themselves can tell, the iterator raises (BrokenTransfer), so run
    through it once, as for `fedavg.peak`, before anything of it is folded.
    """
    if len(payload) > (most := largest(codec, layout)):
        raise TooLarge(
            f"a payload of {len(payload):,} bytes came; one of codec '{codec.name}' has {most:,} at most here"
        )
    data = memoryview(payload)
    head = header.read(data, layout, key, codec)
    body = data[header.SIZE :]
    if codec.name in {"topk", "powersgd"} and head.flags:
        raise BrokenTransfer(f"a payload of codec '{codec.name}' came with flags {head.flags}; it has none")
    if head.flags & header.PACKED and codec.name not in GRIDS:
        raise BrokenTransfer(f"a payload of codec '{codec.name}' came packed; it never is")
    if codec.name == "topk":
        _require_sent(head, topk.sent_of(layout.size, codec.fraction))
        return topk.decode(body, layout.size, codec.fraction, codec.bits)
    if codec.name == "powersgd":
        return _from_lowrank(body, head, layout, key, codec)
    kept = rows.Rows(layout, {})
    if head.flags & header.ROWS:
        kept, body = rows.read(layout, body)
    return kept.expand(_compact(body, head, kept.sent, key, codec))


def largest(codec: Codec, layout: Layout) -> int:
    """Bytes of a payload at most."""
    size, first = layout.size, header.SIZE + rows.most(layout)
    match codec.name:
        case "none":
            return first + 4 * size
        case "eden1":
            return first + 4 * pieces.sign_scales(size) + pieces.sign_bytes(size, codec.fraction)
        case "topk":
            return header.SIZE + topk.body_bytes(size, topk.sent_of(size, codec.fraction), codec.bits)
        case "powersgd":
            return header.SIZE + sum(_grid_bytes(one, codec.bits) for one in _sections(layout, codec))
        case _:
            return first + _grid_bytes(size, codec.bits)


def _compact(body: memoryview, head: header.Header, size: int, key: Key, codec: Codec) -> Iterator[Flat]:
    """The parts of a vector without the rows that are left out."""
    if codec.name == "none":
        _require_sent(head, size)
        _require_bytes(body, 4 * size)
        return (np.frombuffer(body[4 * p.start : 4 * p.stop], "<f4").astype(np.float32) for _, p in pieces.cut(size))
    count = pieces.sign_scales(size) if codec.name == "eden1" else pieces.count(size)
    if codec.name == "eden1":
        _require_sent(head, pieces.sent_signs(size, codec.fraction))
        _require_bytes(body, 4 * count + pieces.sign_bytes(size, codec.fraction))
        scales = pieces.scales_of(body[: 4 * count])
        return pieces.from_signs(body[4 * count :], scales, size, codec.fraction, key)
    _require_sent(head, size)
    if len(body) < 4 * count:
        raise BrokenTransfer(f"a payload of {size:,} numbers ends after {len(body):,} bytes")
    read: pieces.Inflating | pieces.Halves | pieces.Plain
    if head.flags & header.PACKED:
        symbols = body[4 * count :]
        read = pieces.Inflating(symbols) if codec.bits == 4 else pieces.Halves(symbols, size)
    else:
        _require_bytes(body, _grid_bytes(size, codec.bits))
        read = pieces.Plain(body[4 * count :])
    return _grid(read, pieces.scales_of(body[: 4 * count]), size, key, codec)


def _to_grid(vector: Flat, key: Key, codec: Codec, lost: Flat | None) -> tuple[int, bytes]:
    """Flags, and the body; what it leaves out goes to `lost`, if given, which may be the vector."""

    def lose(part: slice, found: Flat) -> None:
        if lost is not None:
            np.subtract(vector[part], found, out=lost[part])

    scales, symbols = pieces.to_grid(
        vector, GRIDS[codec.name], key, codec.name, codec.feeds_back, None if lost is None else lose
    )
    packed = pieces.deflate(symbols, codec.bits)
    return (header.PACKED, scales + packed) if len(packed) < len(symbols) else (0, scales + symbols)


def _grid(
    read: pieces.Inflating | pieces.Halves | pieces.Plain, scales: Flat, size: int, key: Key, codec: Codec
) -> Iterator[Flat]:
    yield from pieces.from_grid(read, scales, size, codec.bits, key, codec.name)
    read.finish()


def _grid_bytes(size: int, bits: int) -> int:
    return 4 * pieces.count(size) + pieces.grid_bytes(size, bits)


def _sections(layout: Layout, codec: Codec) -> tuple[int, ...]:
    plan = lowrank.Plan(layout, codec.rank)
    return plan.first, plan.middle, plan.whole


def _to_lowrank(vector: Flat, layout: Layout, key: Key, codec: Codec) -> Encoded:
    pieces.require_finite(vector)
    plan = lowrank.Plan(layout, codec.rank)
    basis, rest = lowrank.alone(vector, plan, key.draw("powersgd"))
    parts: list[bytes] = []
    for name, numbers in zip(SECTIONS, (basis, rest[: plan.middle], rest[plan.middle :]), strict=True):
        parts += pieces.to_grid(numbers, codec.bits, key, name, nearest=True, found=numbers.__setitem__)
    left, at = vector.copy(), 0
    for part in lowrank.rebuild(basis, rest, plan):
        left[at : at + len(part)] -= part
        at += len(part)
    return Encoded(header.write(codec, layout, key, 0, sum(_sections(layout, codec)), b"".join(parts)), left)


def _from_lowrank(body: memoryview, head: header.Header, layout: Layout, key: Key, codec: Codec) -> Iterator[Flat]:
    sizes = _sections(layout, codec)
    _require_sent(head, sum(sizes))
    _require_bytes(body, sum(_grid_bytes(size, codec.bits) for size in sizes))
    found, at = [], 0
    for name, size in zip(SECTIONS, sizes, strict=True):
        start = at + 4 * pieces.count(size)
        scales, at = pieces.scales_of(body[at:start]), start + pieces.grid_bytes(size, codec.bits)
        grid = pieces.from_grid(pieces.Plain(body[start:at]), scales, size, codec.bits, key, name)
        found.append(np.concatenate([np.empty(0, np.float32), *grid]))
    # A product of two is within float32 as a number alone is, if the basis is what it says: of numbers up to 1, nearly.
    if float(np.abs(found[0]).max(initial=0.0)) > 2:
        raise BrokenTransfer("a payload's columns are not orthonormal")
    return lowrank.rebuild(found[0], np.concatenate(found[1:]), lowrank.Plan(layout, codec.rank))


def _require_sent(head: header.Header, due: int) -> None:
    if head.sent != due:
        raise BrokenTransfer(f"a payload says that it has {head.sent:,} numbers; {due:,} are due")


def _require_bytes(body: memoryview, due: int) -> None:
    if len(body) != due:
        raise BrokenTransfer(f"a payload's body has {len(body):,} bytes; {due:,} are due")
