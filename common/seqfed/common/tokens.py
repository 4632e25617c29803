"""Enrolment tokens: the CA's word that whoever brings this one first, before it expires, gets a certificate for that name.

A token is its payload's JSON and the CA key's signature of it, both base64url, with a dot between. The server needs no list
of those that it made, only of those that were used. A token file carries one to the data holder, beside the CA's certificate:
the token names that certificate's fingerprint, so neither can be exchanged for another without the other.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field

from seqfed.common import identity
from seqfed.common.config import validate_json
from seqfed.common.errors import ConfigError, InvalidName, Unauthenticated
from seqfed.common.identity import Role
from seqfed.common.spec import Settings
from seqfed.common.wire import check_client_name

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

PREFIX: Final = (
    b"seqfed enrolment token 1\0"  # signed before the payload: no other signature of the CA can be one of these
)
MAX_TOKEN: Final = 2048  # characters; ours have about 400


class Token(Settings):
    """What a token says."""

    client: str = Field(max_length=64, description="the name that the certificate will be for")
    role: Literal["client"] = Role.CLIENT.value
    issued: float = Field(gt=0, description="seconds since the epoch; a revocation ends the tokens before it too")
    expires: float = Field(gt=0, description="the same")
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] = Field(description="tells it from every other token")
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = Field(
        description="SHA-256 of the CA's certificate, DER"
    )


class TokenFile(Settings):
    """The line of JSON in a token file."""

    ca: str = Field(max_length=identity.MAX_PEM, description="the CA's certificate, PEM")
    fingerprint: str = Field(description="of that certificate, for people to compare")
    token: str = Field(max_length=MAX_TOKEN)


def fingerprint(ca_pem: bytes) -> str:
    """SHA-256 of the certificate's DER, in hex; raises Unauthenticated."""
    from cryptography.hazmat.primitives.serialization import Encoding

    return hashlib.sha256(identity.load_certificate(ca_pem).public_bytes(Encoding.DER)).hexdigest()


def new(client: str, ca_pem: bytes, now: datetime, seconds: float) -> Token:
    """A token for so many seconds that nobody has signed yet; raises InvalidName."""
    return Token(
        client=check_client_name(client),
        issued=now.timestamp(),
        expires=now.timestamp() + seconds,
        nonce=secrets.token_hex(16),
        fingerprint=fingerprint(ca_pem),
    )


def sign(token: Token, key: ec.EllipticCurvePrivateKey) -> str:
    """The token's text, signed with the CA's key."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    payload = token.model_dump_json().encode()
    signature = key.sign(PREFIX + payload, ec.ECDSA(hashes.SHA256()))
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in (payload, signature))


def verify(text: str, ca_pem: bytes, now: datetime) -> Token:
    """What this token of this CA says; raises Unauthenticated for one that is not of this CA, altered, or over."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = identity.load_certificate(ca_pem).public_key()
        if len(text) > MAX_TOKEN or not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError("not ours")
        payload, signature = (
            base64.b64decode(part.encode("ascii") + b"=" * (-len(part) % 4), b"-_", validate=True)
            for part in text.split(".")
        )
        key.verify(signature, PREFIX + payload, ec.ECDSA(hashes.SHA256()))
        token = validate_json(Token, payload, "the token")
        check_client_name(token.client)
    except (ValueError, binascii.Error, InvalidSignature, UnsupportedAlgorithm, ConfigError, InvalidName):
        raise Unauthenticated("the token is not one of this federation's CA, or was altered on the way") from None
    if token.fingerprint != fingerprint(ca_pem):
        raise Unauthenticated("the token was made for another certificate of the CA; make a new token")
    if now.timestamp() > token.expires:
        raise Unauthenticated(
            f"the token for '{token.client}' expired on {identity.day(datetime.fromtimestamp(token.expires, now.tzinfo))}; "
            "make a new one with: seqfed enroll token"
        )
    return token


def to_file(text: str, ca_pem: bytes) -> bytes:
    """A token file's content."""
    found = TokenFile(ca=ca_pem.decode(), fingerprint=fingerprint(ca_pem), token=text)
    return found.model_dump_json().encode() + b"\n"


def from_file(content: bytes, place: str, now: datetime) -> tuple[Token, str, bytes]:
    """The token, its text and the CA's certificate, which it vouches for; raises ConfigError, Unauthenticated."""
    found = validate_json(TokenFile, content, place)
    ca = found.ca.encode()
    token = verify(found.token, ca, now)
    if found.fingerprint != token.fingerprint:
        raise Unauthenticated(f"{place}: its fingerprint is not that of its CA; ask for a new token file")
    return token, found.token, ca
