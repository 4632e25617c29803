"""A client's masking key, bound to its certificate: so that one who knows the federation's CA knows whose the key is.

The key outlives the certificate, and one signature of an advertisement by it costs a peer less than a chain does. ECDSA over
P-256 and SHA-256, of a prefix that no other signature of the project has, the client's name and its Ed25519 public key.
`cryptography` is loaded at the first call that needs it.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from seqfed.common.errors import MaskingRefused, NotAllowed, Unauthenticated
from seqfed.common.identity import Identity, Role, load_certificate, load_key, verify_chain
from seqfed.common.masking.messages import Advert

PREFIX: Final = b"seqfed masking key v1\0"


def bind(name: str, public: bytes, key_pem: bytes) -> bytes:
    """The signature (DER) by the certificate's key over the client's name and masking key; raises ConfigError for no key."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    return load_key(key_pem, "the client's key").sign(_text(name, public), ec.ECDSA(hashes.SHA256()))


def bound(advert: Advert, ca_pem: bytes, now: datetime) -> Identity:
    """Who holds the advertisement's certificate, if that is the client of its name and has bound its identity key.

    Raises MaskingRefused.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    name = advert.client
    if not advert.certificate:
        raise MaskingRefused(f"the masking key of '{name}' comes without a certificate")
    try:
        whose = verify_chain(advert.certificate, ca_pem, now)
        key = load_certificate(advert.certificate).public_key()
    except (Unauthenticated, NotAllowed) as error:
        raise MaskingRefused(f"the masking key of '{name}': {error}") from None
    if whose.role is not Role.CLIENT or whose.name != name:
        raise MaskingRefused(f"the masking key of '{name}' comes with the certificate of {whose}")
    try:
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise InvalidSignature
        key.verify(advert.binding, _text(name, advert.identity_key), ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature):
        raise MaskingRefused(f"the masking key of '{name}' is not bound to its certificate") from None
    return whose


def _text(name: str, public: bytes) -> bytes:
    return PREFIX + name.encode() + b"\0" + public
