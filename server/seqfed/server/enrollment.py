"""The daemon's counter where certificates are given out: the first one for a token, the next ones for the one before.

Enrolment has a port of its own, since whoever comes has no certificate yet: TLS shows only who the server is. What a stranger
can do there is bounded by its own limits: one small call, a few at a time, and a few reasons a second for a refusal.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import grpc

from seqfed.common import identity, tokens
from seqfed.common.authority import Authority
from seqfed.common.errors import NotAllowed, RateLimited, Unauthenticated
from seqfed.common.identity import Identity, Role
from seqfed.server.status import rich_status
from seqfed.v1 import federation_pb2, federation_pb2_grpc

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

Context = grpc.aio.ServicerContext[Any, Any]

BURST: Final = 20.0  # refusals at once, before the rate counts
HANDSHAKE_MS: Final = 30_000  # of TLS; on a slow link it takes seconds, and who says nothing must not stay
CHANNEL_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
    ("grpc.max_receive_message_length", 64 << 10),  # a token and a request have 1 KiB
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.max_concurrent_streams", 4),
    ("grpc.max_connection_idle_ms", 10_000),
    ("grpc.max_connection_age_ms", 15_000),
    ("grpc.max_connection_age_grace_ms", 5_000),  # also for calls whose message never comes
    ("grpc.http2.max_ping_strikes", 1),
)
METHOD: Final = "/seqfed.v1.Enrollment/Enroll"
MAX_CALLS: Final = 64  # at the same time; beyond it gRPC refuses


class Office:
    """Gives out certificates of this CA, valid for `days`.

    `use_nonce` remembers a token's nonce until it expires, and says whether it was not known before, durably. `revoked_at`:
    when, in seconds since the epoch, this client was revoked last. `told` hears of each certificate: "enrolled" or "renewed",
    and whose it is. `refused` hears of each refusal: who (an address), method, name of the error.
    """

    def __init__(
        self,
        authority: Authority,
        use_nonce: Callable[[str, float], bool],
        *,
        days: float,
        a_second: float,
        revoked_at: Callable[[str], float | None] = lambda _: None,
        told: Callable[[str, Identity], None] = lambda _, __: None,
        refused: Callable[[str, str, str], None] = lambda _, __, ___: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._authority = authority
        self._use_nonce = use_nonce
        self._days = days
        self._a_second = a_second
        self._revoked_at = revoked_at
        self._told = told
        self.refused = refused
        self._clock = clock
        self._room, self._at = BURST, clock()

    async def enroll(self, token: str, csr: bytes) -> federation_pb2.Certificate:
        """The certificate for this token; raises Unauthenticated, or RateLimited where too many were refused just now.

        Who brings a good token never waits for those who do not: to look at one costs less than their TLS.
        """
        try:
            return await self._enroll(token, csr)
        except Unauthenticated:
            self._count()
            raise

    async def _enroll(self, token: str, csr: bytes) -> federation_pb2.Certificate:
        now = identity.now()
        found = tokens.verify(token, self._authority.pem, now)
        key = identity.public_key_of(csr)  # before the token is used up
        revoked = self._revoked_at(found.client)
        if revoked is not None:
            if found.issued <= revoked:
                raise Unauthenticated(
                    f"this token for '{found.client}' was made before that client was revoked; if it may come back, make a "
                    "new one with: seqfed enroll token"
                )
            # A certificate counts whole seconds, and must be seen to be later than the revocation.
            now = max(now, datetime.fromtimestamp(int(revoked) + 1, UTC))
        if not await asyncio.to_thread(self._use_nonce, found.nonce, found.expires):
            raise Unauthenticated(
                f"this token for '{found.client}' was used before, and works once; make a new one with: seqfed enroll token"
            )
        if self._revoked_at(found.client) != revoked:
            raise Unauthenticated(f"'{found.client}' was revoked just now; this token is used up")
        return self._issue("enrolled", Role(found.role), found.client, key, now)

    async def renew(self, csr: bytes, whose: Identity) -> federation_pb2.Certificate:
        """A new certificate for somebody who has shown the one before; raises NotAllowed, Unauthenticated."""
        if whose.role is Role.SERVER:
            raise NotAllowed("a server's certificate is renewed with `seqfed ca issue server`")
        return self._issue("renewed", whose.role, whose.name, identity.public_key_of(csr), identity.now())

    def _issue(
        self, what: str, role: Role, name: str, key: EllipticCurvePublicKey, now: datetime
    ) -> federation_pb2.Certificate:
        pem = self._authority.issue(role, name, key, now=now, days=self._days)
        self._told(what, identity.identity_of(pem))
        return federation_pb2.Certificate(certificate=pem, ca=self._authority.pem)

    def _count(self) -> None:
        now = self._clock()
        self._room = min(BURST, self._room + (now - self._at) * self._a_second)
        self._at = now
        if self._room < 1.0:
            raise RateLimited(
                f"more than {self._a_second:g} enrolments a second (enrolments_per_s) were refused; this one is too"
            ) from None
        self._room -= 1.0


class Enrollment(federation_pb2_grpc.EnrollmentServicer):
    """What those call who have no certificate yet."""

    def __init__(self, office: Office) -> None:
        self._office = office

    async def Enroll(self, request: federation_pb2.EnrollRequest, context: Context) -> federation_pb2.Certificate:
        try:
            return await self._office.enroll(request.token, request.csr)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - the table decides what of it the stranger learns
            if isinstance(error, (Unauthenticated, RateLimited)):
                address = unquote(str(context.peer()).rpartition(":")[0])
                self._office.refused(address, METHOD, type(error).__name__)
            await context.abort_with_status(rich_status(error))
            raise AssertionError("abort raises") from None


def at(host_and_port: str, office: Office, credentials: grpc.ServerCredentials) -> tuple[grpc.aio.Server, int]:
    """A server of enrolments alone, not started yet, and its port; raises RuntimeError if the port cannot be had."""
    server = grpc.aio.server(options=CHANNEL_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
    federation_pb2_grpc.add_EnrollmentServicer_to_server(Enrollment(office), server)
    return server, server.add_secure_port(host_and_port, credentials)
