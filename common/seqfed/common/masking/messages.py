"""What the parties of a masked sum send each other: the protobuf messages Mask* as frozen records, with sets in place of bitmaps.

All keys are 32 bytes, signatures 64. Nothing here is checked; who receives a message checks it. No byte string stands in a repr.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Final

from seqfed.common.errors import MaskingRefused

OF_SELF: Final = 1  # an opened share is of the seed of its owner's own mask
OF_KEY: Final = 2  # or of the seed of its owner's mask key
SALT: Final = 32  # bytes before a share, so that its commitment tells nothing of it
SHARE: Final = 33  # bytes of a share
OPENED: Final = 1 + SALT + SHARE  # which secret, the salt, the share
COMMITMENTS: Final = 2 * 32  # to a holder's share of either secret: OF_SELF, then OF_KEY
SEALED: Final = 2 * (SALT + SHARE) + 16  # both salted shares, and the tag of AES-GCM


@dataclass(frozen=True)
class Advert:
    """A client's keys for one masked sum. binding and certificate are empty in a federation without certificates."""

    client: str
    encryption_key: bytes = field(repr=False)
    mask_key: bytes = field(repr=False)
    identity_key: bytes = field(repr=False)
    binding: bytes = field(repr=False)
    certificate: bytes = field(repr=False)
    signature: bytes = field(repr=False)


@dataclass(frozen=True)
class Roster:
    """U1: everybody's advert, in ascending order of client."""

    adverts: tuple[Advert, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(advert.client for advert in self.adverts)

    @cached_property
    def hash(self) -> bytes:
        """SHA-256 of all that stands in it: two rosters of one hash are the same."""
        whole = hashlib.sha256(b"seqfed masking roster")
        for advert in self.adverts:
            for one in fields(advert):
                value = getattr(advert, one.name)
                data = value.encode() if isinstance(value, str) else value
                whole.update(len(data).to_bytes(8, "little") + data)
        return whole.digest()

    def index(self, name: str) -> int:
        """The client's place. Raises MaskingRefused for who is not in it."""
        try:
            return self._places[name]
        except KeyError:
            raise MaskingRefused(f"client '{name}' is not in the roster of this masked sum") from None

    def __contains__(self, name: object) -> bool:
        return name in self._places

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}


@dataclass(frozen=True)
class KeyShares:
    """A client's two secrets, split: sealed by receiver (neighbours), and committed to by receiver (itself, too)."""

    sealed: Mapping[str, bytes] = field(repr=False)
    self_commitment: bytes = field(repr=False)
    commitments: Mapping[str, bytes] = field(repr=False)
    signature: bytes = field(repr=False)


@dataclass(frozen=True)
class Delivery:
    """U2: who has shared; and what its neighbours have sealed for one client, by sender."""

    members: frozenset[str]
    sealed: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class MaskedInput:
    """The masked scalars (mod 2^64, little-endian), and BLAKE3 of the packed masked vector; empty where the sum has none."""

    scalars: bytes = field(repr=False)
    digest: bytes = field(repr=False)
    signature: bytes = field(repr=False)


@dataclass(frozen=True)
class Survivors:
    """U3: whose input is in the sum."""

    members: frozenset[str]


@dataclass(frozen=True)
class Confirm:
    """A client's signature of the roster, U2 and U3: it gives one in a masked sum."""

    signature: bytes = field(repr=False)


@dataclass(frozen=True)
class Confirmed:
    """Everybody's signatures, by client."""

    signatures: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class Opening:
    """By owner: OF_SELF or OF_KEY, the salt, the share; of each owner only one."""

    shares: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class Done:
    """The sum has been opened."""


Request = Advert | KeyShares | MaskedInput | Confirm | Opening
Reply = Roster | Delivery | Survivors | Confirmed | Done


def bitmap(members: Collection[str], names: Sequence[str]) -> bytes:
    """Which of the names are members, lowest bit first, in ceil(len(names) / 8) bytes."""
    digits = "".join("1" if name in members else "0" for name in reversed(names))
    return int(digits or "0", 2).to_bytes((len(names) + 7) // 8, "little")


def members_of(data: bytes, names: Sequence[str]) -> frozenset[str]:
    """The inverse of `bitmap`. Raises MaskingRefused if it is of another length or sets a bit beyond the names."""
    digits = f"{int.from_bytes(data, 'little'):0{len(names)}b}"
    if len(data) != (len(names) + 7) // 8 or len(digits) > max(len(names), 1):
        raise MaskingRefused(f"a bitmap of {len(data)} bytes, or with bits beyond the roster's {len(names)} clients")
    return frozenset(name for name, digit in zip(names, reversed(digits), strict=False) if digit == "1")
