"""The daemon's counter where certificates are given out: the first one for a token, the next ones for the one before.

Enrolment has a port of its own, since whoever comes has no certificate yet: TLS shows only who the server is. What a stranger
can do there is bounded by its own limits: one small call, which must come at once or make room, and a few reasons a second for
a refusal. What is given out stands in the audit log before it is given out.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import grpc

from seqfed.common import identity, tokens
from seqfed.common.authority import Authority
from seqfed.common.errors import NotAllowed, RateLimited, Unauthenticated
from seqfed.common.identity import Identity, Role
from seqfed.common.tokens import Token
from seqfed.server.access import Rates
from seqfed.server.audit import Kind, Note
from seqfed.server.gate import Call, Caller, Context, Gate, Refused, address, tell_refused
from seqfed.server.status import rich_status
from seqfed.v1 import federation_pb2, federation_pb2_grpc

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

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
    ("grpc.max_connection_age_grace_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 1),
)
PLACES: Final = 256  # for calls; a good one needs its own for milliseconds
MESSAGE_S: Final = 10.0  # for a message that fits into two packets
MOST_USED: Final = 10_000  # nonces that are remembered here besides the store
RENEWALS: Final = 10  # of one identity at once,
RENEWALS_PER_S: Final = 1 / 600  # and after them: each is an entry in the audit log


class Office:
    """Gives out certificates of this CA, valid for `days`.

    `use_nonce` remembers a token's nonce until it expires, and says whether it was not known before; if so, it adds the notes
    to the audit log, in one transaction. `note` adds some by themselves; both are durable, and block. `revoked_at`: when, in
    seconds since the epoch, this client was revoked last. `refused` hears of each refusal: who (an address), method, name of
    the error.
    """

    def __init__(
        self,
        authority: Authority,
        use_nonce: Callable[[str, float, Sequence[Note]], bool],
        *,
        days: float,
        a_second: float,
        revoked_at: Callable[[str], float | None] = lambda _: None,
        note: Callable[[Sequence[Note]], None] = lambda _: None,
        refused: Callable[[str, str, str], None] = lambda _, __, ___: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._authority = authority
        self._use_nonce = use_nonce
        self._days = days
        self._a_second = a_second
        self._revoked_at = revoked_at
        self._note = note
        self.refused = refused
        self._clock = clock
        self._room, self._at = BURST, clock()
        self._renewals = Rates(RENEWALS_PER_S, RENEWALS)
        self._used: dict[str, None] = {}  # nonces of the last tokens that were, for which the store need not be asked

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
        given, note = self._issue(Kind.ENROLLED, Role(found.role), found.client, key, now)
        if not await self._use(found, note):
            raise Unauthenticated(
                f"this token for '{found.client}' was used before, and works once; make a new one with: seqfed enroll token"
            )
        if self._revoked_at(found.client) != revoked:
            raise Unauthenticated(f"'{found.client}' was revoked just now; this token is used up")
        return given

    async def _use(self, token: Token, note: Note) -> bool:
        """Use the token up; False if it was before. Whoever sends such a one again and again is not the store's work."""
        if token.nonce in self._used:
            return False
        first = await asyncio.to_thread(self._use_nonce, token.nonce, token.expires, [note])
        self._used[token.nonce] = None
        if len(self._used) > MOST_USED:
            del self._used[next(iter(self._used))]
        return first

    async def renew(self, csr: bytes, whose: Identity) -> federation_pb2.Certificate:
        """A new certificate for somebody who has shown the one before; raises NotAllowed, Unauthenticated, RateLimited."""
        if whose.role is Role.SERVER:
            raise NotAllowed("a server's certificate is renewed with `seqfed ca issue server`")
        key = identity.public_key_of(csr)
        if not self._renewals.take(str(whose), self._clock()):
            raise RateLimited(
                f"{whose} was given {RENEWALS} certificates just now; the next one can be had in {1 / RENEWALS_PER_S:g} s"
            )
        given, note = self._issue(Kind.RENEWED, whose.role, whose.name, key, identity.now())
        await asyncio.to_thread(self._note, [note])
        return given

    def _issue(
        self, what: Kind, role: Role, name: str, key: EllipticCurvePublicKey, now: datetime
    ) -> tuple[federation_pb2.Certificate, Note]:
        """A certificate, and what the audit log must say before anybody gets it."""
        pem = self._authority.issue(role, name, key, now=now, days=self._days)
        made = identity.identity_of(pem)
        body = {"client": name, "serial": f"{made.serial:x}", "until": made.not_after.isoformat()}
        return federation_pb2.Certificate(certificate=pem, ca=self._authority.pem), Note(what, body)

    def _count(self) -> None:
        now = self._clock()
        self._room = min(BURST, self._room + (now - self._at) * self._a_second)
        self._at = now
        if self._room < 1.0:
            raise RateLimited(
                f"more than {self._a_second:g} enrolments a second (enrolments_per_s) were refused; this one is too"
            ) from None
        self._room -= 1.0


class Strangers:
    """The door of the enrolment port, through which everybody comes: an address is all that is known of them.

    There is no rate here: whoever has a good token would wait for all who come from the same address.
    """

    def __init__(self, refused: Refused) -> None:
        self.refused = refused

    def who(self, context: Context) -> Caller:
        return Caller(address(context))

    def check(self, caller: Caller, method: str, context: Context) -> None:
        """Everybody may ask."""

    def kept(self, call: Call) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


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
            tell_refused(error)
            await context.abort_with_status(rich_status(error))
            raise AssertionError("abort raises") from None


def at(host_and_port: str, office: Office, credentials: grpc.ServerCredentials) -> tuple[grpc.aio.Server, int]:
    """A server of enrolments alone, not started yet, and its port; raises RuntimeError if the port cannot be had."""
    gate = Gate(Strangers(office.refused), places=PLACES, message_s=MESSAGE_S)
    server = grpc.aio.server(interceptors=(gate,), options=CHANNEL_OPTIONS)
    federation_pb2_grpc.add_EnrollmentServicer_to_server(Enrollment(office), server)
    return server, server.add_secure_port(host_and_port, credentials)
