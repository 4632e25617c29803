"""What the parties of an encrypted sum send each other; in place of most messages of `masking.messages`.

Without signatures: a server that lies is not what this is for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

CIPHERTEXT: Final = 1 << 17  # bytes (see `scheme`)
MOST_PIECE: Final = 4  # ciphertexts in a message: 512 KiB


@dataclass(frozen=True)
class Ready:
    """key: SHA-256 of the federation's CKKS key. agreed: `scheme.Form.agreed`."""

    key: bytes
    agreed: bytes = field(repr=False)


@dataclass(frozen=True)
class Circle:
    """Who is in the sum, in ascending order."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Encrypted:
    """BLAKE3 of the ciphertexts that were sent."""

    digest: bytes = field(repr=False)


@dataclass(frozen=True)
class ToOpen:
    """The sum of these clients' ciphertexts is to be fetched, and decrypted."""

    members: frozenset[str]


@dataclass(frozen=True)
class Fetch:
    """Some ciphertexts of the sum, from this one on."""

    start: int


@dataclass(frozen=True)
class Piece:
    """As many ciphertexts of the sum as go into a message, in the order of the vector."""

    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Opened:
    """The sums of the scalars (mod 2^64, little-endian), and BLAKE3 of the packed sum of the vectors that was sent; empty
    where there is none.
    """

    scalars: bytes = field(repr=False)
    digest: bytes = field(repr=False)


Request = Ready | Encrypted | Fetch | Opened
Reply = Circle | ToOpen | Piece
