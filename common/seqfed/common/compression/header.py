"""The first 84 bytes of a payload: what it is of, so that nothing is allocated for one that is of something else.

    magic "sfc1", codec u8, version u8, bits u8, flags u8, first 8 bytes of the key's digest, first 8 of the layout's,
    d u64, numbers sent D u64, levels u32, rank u32, fraction f32, SHA-256

all little-endian. The hash is over the fields before it, the whole digests of key and layout, and the body.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final

import numpy as np

from seqfed.common.compression.codec import NAMES, Codec, Key
from seqfed.common.errors import BrokenTransfer, ChecksumMismatch, LayoutMismatch, VersionMismatch
from seqfed.common.layout import Layout

MAGIC: Final = b"sfc1"
VERSION: Final = 1
FIELDS: Final = struct.Struct("<4sBBBB8s8sQQIIf")
SIZE: Final = FIELDS.size + 32
ROWS: Final = 1  # flag: rows that are wholly zero are left out; the body begins with which
# Flag: the symbols are a raw deflate stream; of those of 8 bits the high halves, which come after all the low ones.
PACKED: Final = 2


@dataclass(frozen=True)
class Header:
    """What a payload says that codec, layout and key do not: its flags, and how many numbers stand in the body."""

    flags: int
    sent: int


def write(codec: Codec, layout: Layout, key: Key, flags: int, sent: int, body: bytes | memoryview) -> bytes:
    """The whole payload."""
    levels = (1 << codec.bits) - 1 if codec.bits else 0
    first = FIELDS.pack(
        MAGIC,
        NAMES.index(codec.name),
        VERSION,
        codec.bits,
        flags,
        key.digest[:8],
        layout.digest[:8],
        layout.size,
        sent,
        levels,
        codec.rank,
        codec.fraction,
    )
    return b"".join((first, _hash(first, layout, key, body), body))


def read(payload: bytes | memoryview, layout: Layout, key: Key, codec: Codec) -> Header:
    """The header of a payload of this codec, layout and key; raises BrokenTransfer, VersionMismatch, LayoutMismatch or
    ChecksumMismatch for any other.
    """
    if len(payload) < SIZE or payload[:4] != MAGIC:
        raise BrokenTransfer(f"{len(payload):,} bytes came that do not begin as a compressed update does")
    first = bytes(payload[: FIELDS.size])
    _, number, version, bits, flags, whose, digest, size, sent, levels, rank, fraction = FIELDS.unpack(first)
    if version != VERSION:
        raise VersionMismatch(
            f"a payload has version {version}, this side reads {VERSION}; run the same version of seqfed"
        )
    name = NAMES[number] if number < len(NAMES) else f"number {number}"
    due = (codec.bits, (1 << codec.bits) - 1 if codec.bits else 0, codec.rank, np.float32(codec.fraction))
    if name != codec.name or (bits, levels, rank, fraction) != due:
        raise BrokenTransfer(
            f"a payload of codec '{name}' (bits {bits}, levels {levels:,}, rank {rank}, fraction {fraction:.6g}) came; "
            f"this run's is '{codec.name}' (bits {due[0]}, levels {due[1]:,}, rank {due[2]}, fraction {due[3]:.6g})"
        )
    if (digest, size) != (layout.digest[:8], layout.size):
        raise LayoutMismatch(
            f"the payload's layout ({digest.hex()}, {size:,} parameters) is not the run's ({layout.digest[:8].hex()}, "
            f"{layout.size:,} parameters); do both sides run the same version of seqfed?"
        )
    if whose != key.digest[:8]:
        raise BrokenTransfer("a payload came that was made in another run or round, or by another client")
    if flags & ~(ROWS | PACKED):
        raise BrokenTransfer(f"a payload came with flags {flags}, of which this side knows {ROWS | PACKED}")
    if payload[FIELDS.size : SIZE] != _hash(first, layout, key, payload[SIZE:]):
        raise ChecksumMismatch(f"{len(payload):,} bytes of a payload came, but their SHA-256 is not the one it says")
    return Header(flags, sent)


def _hash(first: bytes, layout: Layout, key: Key, body: bytes | memoryview) -> bytes:
    found = hashlib.sha256(first)
    for part in (key.digest, layout.digest, body):
        found.update(part)
    return found.digest()
