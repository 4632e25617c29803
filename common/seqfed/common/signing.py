"""An operator's signature of a run's specification, with which it goes to every client: what the server may not change.

ECDSA over P-256 and SHA-256, of a prefix that no other signature of the project has and the specification's JSON text, which
is kept and sent to the byte: written anew by a later version it could be another. Of the two
values of s that are as good as each other only the smaller counts, so that nobody but the signer can make a second signature
of the first, and clients can tell a run from a copy of it. `cryptography` is loaded at the first call that needs it.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from seqfed.common.errors import NotAllowed, Unauthenticated
from seqfed.common.identity import Identity, Role, load_certificate, load_key, verify_chain

PREFIX: Final = b"seqfed run specification v1\0"
MAX_SIGNATURE: Final = 72  # bytes of DER: two numbers of 33
# The order of P-256's group (FIPS 186-4, D.1.2.3).
ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def sign(data: bytes, key_pem: bytes) -> bytes:
    """The signature (DER) of a specification's canonical JSON; raises ConfigError if that is no key of a federation."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    made = load_key(key_pem, "the operator's key").sign(PREFIX + data, ec.ECDSA(hashes.SHA256()))
    r, s = utils.decode_dss_signature(made)
    return utils.encode_dss_signature(r, min(s, ORDER - s))


def verify(certificate_pem: bytes, ca_pem: bytes, data: bytes, signature: bytes, now: datetime) -> Identity:
    """The operator of this CA who signed the data.

    Raises Unauthenticated if the signature or its certificate does not hold, NotAllowed if it is not an operator's.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    identity = verify_chain(certificate_pem, ca_pem, now)
    if identity.role is not Role.OPERATOR:
        raise NotAllowed(f"the run is signed by {identity}, and only an operator may; use an operator's credentials")
    key = load_certificate(certificate_pem).public_key()
    try:
        r, s = utils.decode_dss_signature(signature[: MAX_SIGNATURE + 1])
        if not isinstance(key, ec.EllipticCurvePublicKey) or utils.encode_dss_signature(r, s) != signature:
            raise ValueError
        if s > ORDER // 2:
            raise ValueError
        key.verify(signature, PREFIX + data, ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature):
        raise Unauthenticated(
            f"the signature of {identity} is not of this specification: somebody changed one of the two; submit the run again"
        ) from None
    return identity
