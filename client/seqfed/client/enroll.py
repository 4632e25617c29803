"""How a client comes by its certificate: the first for a token, the next ones for the one that it has.

The key is made here and stays here; the server sees a request signed with it, and signs what it is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from seqfed.client.channel import ANSWER_S, OPTIONS, raising
from seqfed.common import addresses, identity, tokens
from seqfed.common.errors import ConfigError, NotAllowed, SeqfedError, Unauthenticated
from seqfed.common.identity import Credentials, Identity
from seqfed.v1 import federation_pb2
from seqfed.v1.federation_pb2_grpc import EnrollmentStub

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def counter(server: str, port: int | None) -> str:
    """Where to enrol with the server at HOST:PORT: at the port after its own, if no other is named. Raises ConfigError.

    >>> counter("fed.example.org", None), counter("[::1]:80", 99)
    ('fed.example.org:7734', '[::1]:99')
    """
    host, main = addresses.parse(server)
    if port is None and main == 65_535:
        raise ConfigError(f"{server}: there is no port after 65535 to enrol at; pass --enroll-port")
    return addresses.join(host, main + 1 if port is None else port)


async def enroll(address: str, token: str, ca: bytes, name: str, folder: Path, *, replace: bool = False) -> Identity:
    """Get the certificate for this token at HOST:PORT, from the server of this CA alone, into the credentials folder.

    A key that an enrolment left there without a certificate is used. Raises ConfigError if there is a whole folder and
    `replace` was not asked for, Unauthenticated, ServerUnavailable, StorageError and what else the server refuses with.
    """
    # Beside the old one until there is a certificate for it: a refused token leaves what was there as it was.
    place = folder / (f"new-{identity.KEY}" if replace else identity.KEY)
    if (folder / identity.CERTIFICATE).exists() and not replace:
        raise ConfigError(
            f"{folder} has a certificate already, which renews itself; pass --force to enrol anew with another key"
        )
    identity.make_folder(folder)
    if not place.exists():
        identity.write_private(place, key := identity.new_key())
    else:
        key = identity.read_private(place)
    request = federation_pb2.EnrollRequest(token=token, csr=identity.request(key, name))
    credentials = grpc.ssl_channel_credentials(ca)
    async with grpc.aio.secure_channel(address, credentials, options=OPTIONS) as channel:
        with raising(address):
            reply = await EnrollmentStub(channel).Enroll(request, timeout=ANSWER_S)
    found = Credentials(key, reply.certificate, ca)
    whose = _checked(found, name)
    identity.save_credentials(folder, found, replace=replace)
    if replace:
        place.unlink()
    return whose


def _checked(found: Credentials, name: str) -> Identity:
    """Whose credentials a server made of us; raises Unauthenticated if they are not this client's."""
    try:
        whose = identity.holder(found, identity.now(), "the server's answer")
    except (ConfigError, NotAllowed) as error:
        raise Unauthenticated(f"the server sent a certificate that is of no use: {error}") from None
    if whose.name != name:
        raise Unauthenticated(f"the server sent the certificate of {whose}, and not of '{name}'")
    return whose


@dataclass(frozen=True)
class Renewal:
    """Keeps the certificate in a credentials folder valid, with the same key."""

    folder: Path

    def wait(self) -> float:
        """Seconds until less than a third of its life is left; 0 or less: now. Raises ConfigError, Unauthenticated."""
        found = identity.identity_of(identity.load_credentials(self.folder).certificate)
        return (found.renewable - identity.now()).total_seconds()

    async def renew(self, call: Callable[[bytes], Awaitable[bytes]]) -> Identity:
        """Put the certificate (PEM) that `call` gets for a request (PEM) into its place, whole or not at all.

        Raises what the call raises, ConfigError, StorageError, or Unauthenticated if the new one is not ours or no better.
        """
        old = identity.load_credentials(self.folder)
        before = identity.identity_of(old.certificate)
        new = Credentials(old.key, await call(identity.request(old.key, before.name)), old.ca)
        whose = _checked(new, before.name)
        if whose.role is not before.role:
            raise Unauthenticated(f"the server sent the certificate of {whose}, and not of {before}")
        if whose.not_after <= before.not_after:
            raise SeqfedError(f"the server's new certificate ends no later than the one of {before} here")
        identity.write_public(self.folder / identity.CERTIFICATE, new.certificate)
        return whose


def in_use(given: Path | None, insecure: bool, default: Path) -> Path | None:
    """The credentials folder to use: the one given, or the default one if it is there and plaintext was not asked for."""
    if given is not None:
        return given
    return default if not insecure and (default / identity.CERTIFICATE).exists() else None


def load_token(file: Path) -> tuple[tokens.Token, str, bytes]:
    """A token file's token, its text, and the CA's certificate; raises ConfigError, Unauthenticated."""
    return tokens.from_file(identity.read_private(file), str(file), identity.now())
