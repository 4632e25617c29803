"""The keys of a masked sum: agreed (X25519), derived (HKDF-SHA256), sealing shares (AES-256-GCM), signing (Ed25519).

Whatever is hashed, signed or derived is first written so that it can be read in one way only: each part with its kind and
length, after a label that no other use has. `cryptography` is loaded at the first call that needs it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from seqfed.common.errors import MaskingRefused

SEED_BYTES: Final = 32  # of an X25519 pair
PUBLIC_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
SEAL_BYTES: Final = 16  # a sealed text is so much longer
DOMAIN: Final = "seqfed masking v1"
FIELD: Final = 2**255 - 19  # X25519's prime; a public key is a number below it
NONCE: Final = bytes(12)  # a sealing key seals once


def encode(*parts: str | bytes) -> bytes:
    """The parts, each with its kind and length before it: no two lists of parts have the same encoding."""
    found = bytearray()
    for part in parts:
        kind, data = (b"s", part.encode()) if isinstance(part, str) else (b"b", part)
        found += kind + len(data).to_bytes(8, "little") + data
    return bytes(found)


# Agreeing and deriving -----------------------------------------------------------------------------------------------


def public_of(seed: bytes) -> bytes:
    """The public X25519 key of a seed of 32 secret bytes."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def agreeing(seed: bytes) -> Callable[[bytes], bytes]:
    """With a peer's public key: the 32 bytes that only the holders of the two keys know.

    For many peers of one key, whose reading costs as much as an exchange. The function raises MaskingRefused if the other's
    public key is not one: of another length, not in its one canonical encoding, or of so low an order that everybody knows
    the outcome.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    own = X25519PrivateKey.from_private_bytes(seed)

    def agreed(peer_public: bytes) -> bytes:
        if len(peer_public) != PUBLIC_BYTES or int.from_bytes(peer_public, "little") >= FIELD:
            raise MaskingRefused(f"a public key is not a number below 2^255 - 19 in {PUBLIC_BYTES} bytes")
        try:
            return own.exchange(X25519PublicKey.from_public_bytes(peer_public))
        except ValueError:
            raise MaskingRefused("a public key is of low order: whatever is agreed with it, everybody knows") from None

    return agreed


def agree(seed: bytes, peer_public: bytes) -> bytes:
    """`agreeing` with a single peer."""
    return agreeing(seed)(peer_public)


def check_public(public: bytes) -> None:
    """Raise MaskingRefused if nothing secret can be agreed with this key (see `agree`)."""
    agree(bytes(SEED_BYTES), public)


def derive(secret: bytes, salt: bytes, *info: str | bytes) -> bytes:
    """A key of 32 bytes for one use, which the info names: HKDF-SHA256 (RFC 5869)."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), 32, salt, encode(DOMAIN, *info)).derive(secret)


def mask_key(shared: bytes, roster_hash: bytes, i: str, j: str, label: str) -> bytes:
    """The key of the mask between two clients, the same at both ends, for the vector that the label names.

    `shared` is what their mask keys agree on.
    """
    return derive(shared, roster_hash, "mask", *sorted((i, j)), label)


def self_key(b: bytes, roster_hash: bytes, label: str) -> bytes:
    """The key of a client's own mask, for the vector that the label names; `b` is its 32 secret bytes."""
    return derive(b, roster_hash, "self", label)


# Sealing and committing ----------------------------------------------------------------------------------------------


def seal(shared: bytes, roster_hash: bytes, ctx: bytes, sender: str, receiver: str, text: bytes) -> bytes:
    """The text for the receiver's eyes only; `shared` is what their encryption keys agree on.

    Precondition: no other text is ever sealed with the same first five arguments.
    """
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    key = derive(shared, roster_hash, "share", sender, receiver)
    return AESGCM(key).encrypt(NONCE, text, encode(DOMAIN, ctx, sender, receiver))


def open_(shared: bytes, roster_hash: bytes, ctx: bytes, sender: str, receiver: str, sealed: bytes) -> bytes:
    """The text that the sender sealed; raises MaskingRefused if it is not of this sender, receiver, roster and terms."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    key = derive(shared, roster_hash, "share", sender, receiver)
    try:
        return AESGCM(key).decrypt(NONCE, sealed, encode(DOMAIN, ctx, sender, receiver))
    except InvalidTag:
        raise MaskingRefused(f"the sealed shares from '{sender}' to '{receiver}' are not what was sealed") from None


def commit(ctx: bytes, kind: str, owner: str, holder: str, salt: bytes, share: bytes) -> bytes:
    """The commitment to one holder's share of the owner's secret of that kind; the salt is 32 secret bytes."""
    return hashlib.sha256(encode(DOMAIN, "share commitment", ctx, kind, owner, holder, salt, share)).digest()


def commit_secret(ctx: bytes, kind: str, owner: str, secret: bytes) -> bytes:
    """The commitment to the owner's secret of that kind: 32 bytes from the operating system, which need no salt."""
    return hashlib.sha256(encode(DOMAIN, "secret commitment", ctx, kind, owner, secret)).digest()


# Signing -------------------------------------------------------------------------------------------------------------


class Signer:
    """A client's masking identity: an Ed25519 key, from its 32 private bytes, made when it is first used."""

    def __init__(self, private: bytes) -> None:
        self._private: Callable[[], bytes] = lambda: private  # which no repr shows

    @cached_property
    def _key(self) -> Ed25519PrivateKey:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(self._private())

    @cached_property
    def public(self) -> bytes:
        """32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def sign(self, label: str, *parts: str | bytes) -> bytes:
        """The signature (64 bytes) over the parts, for the use that the label names."""
        return self._key.sign(encode(DOMAIN, label, *parts))


def verify(public: bytes, signature: bytes, label: str, *parts: str | bytes) -> bool:
    """Whether the holder of this public key signed these parts for this use. No key or signature: no."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, encode(DOMAIN, label, *parts))
    except (ValueError, InvalidSignature):
        return False
    return True
