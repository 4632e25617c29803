"""Who may call what, and how often: the door of the main port (see `gate`), which every call passes when its headers come.

The caller is whoever the certificate of its connection says. A call is refused if that certificate has ended or was revoked,
if the table does not name the caller's role, if its holder calls too often or has too many calls open, or if what it sends
along is too much. What passes is kept as long as it is open, so that a revocation ends it at once, whatever it waits for; so
does the certificate's own end.

In plaintext nobody can be told from anybody else, so everybody may do everything; calls are then counted by address, but not
those from this machine, where one address is everybody's.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

from seqfed.common import addresses, identity
from seqfed.common.authority import EARLIER
from seqfed.common.errors import NotAllowed, RateLimited, TooLarge, Unauthenticated
from seqfed.common.identity import Identity, Role
from seqfed.server.gate import Call, Caller, Context, Refused, address

CLIENTS: Final = frozenset({Role.CLIENT})
OPERATORS: Final = frozenset({Role.OPERATOR})
LOOKERS: Final = frozenset({Role.OPERATOR, Role.VIEWER})
MEMBERS: Final = frozenset({Role.CLIENT, Role.OPERATOR, Role.VIEWER})
NOBODY: Final = frozenset[Role]()

ALLOWED: Final[Mapping[str, frozenset[Role]]] = MappingProxyType(
    {
        "/seqfed.v1.Federation/Join": CLIENTS,
        "/seqfed.v1.Federation/Listen": CLIENTS,
        "/seqfed.v1.Federation/FetchModel": CLIENTS,
        "/seqfed.v1.Federation/UploadStatus": CLIENTS,
        "/seqfed.v1.Federation/SubmitUpdate": CLIENTS,
        "/seqfed.v1.Federation/Mask": CLIENTS,
        "/seqfed.v1.Federation/SubmitEvaluation": CLIENTS,
        "/seqfed.v1.Federation/ReportProgress": CLIENTS,
        "/seqfed.v1.Federation/ReportFailure": CLIENTS,
        "/seqfed.v1.Federation/Renew": MEMBERS,
        "/seqfed.v1.Enrollment/Enroll": NOBODY,  # on a port of its own, for those who have no certificate yet
        "/seqfed.v1.Admin/Submit": OPERATORS,
        "/seqfed.v1.Admin/ListRuns": LOOKERS,
        "/seqfed.v1.Admin/WatchRun": LOOKERS,
        "/seqfed.v1.Admin/StopRun": OPERATORS,
        "/seqfed.v1.Admin/PauseRun": OPERATORS,
        "/seqfed.v1.Admin/ResumeRun": OPERATORS,
        "/seqfed.v1.Admin/ListClients": LOOKERS,
        "/seqfed.v1.Admin/RevokeClient": OPERATORS,
        "/seqfed.v1.Admin/ListAudit": LOOKERS,
        "/seqfed.v1.Admin/ReportPrivacy": LOOKERS,
        "/seqfed.v1.Admin/ExportModel": OPERATORS,
        "/grpc.health.v1.Health/Check": MEMBERS,
        "/grpc.health.v1.Health/List": MEMBERS,
        "/grpc.health.v1.Health/Watch": MEMBERS,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": LOOKERS,
    }
)

MOST_BUCKETS: Final = 10_000  # of callers; beyond it those that have not called for a while are forgotten
LONGEST_TIMER_S: Final = 86_400.0


class Bucket:
    """Calls that a caller may make just now: it fills at `per_s` up to `burst`."""

    __slots__ = ("at", "left")

    def __init__(self, burst: float, at: float) -> None:
        self.left = burst
        self.at = at

    def take(self, per_s: float, burst: float, now: float) -> bool:
        """Whether there is one; it is then used up."""
        self.left = min(burst, self.left + (now - self.at) * per_s)
        self.at = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


class Rates:
    """What each of many callers may do: `per_s` times a second over a while, `burst` times at once after a pause."""

    def __init__(self, per_s: float, burst: float) -> None:
        self.per_s = per_s
        self._burst = burst
        self._buckets: dict[str, Bucket] = {}

    def take(self, who: str, now: float) -> bool:
        """Whether this caller may just now; it then has."""
        bucket = self._buckets.get(who)
        if bucket is None:
            if len(self._buckets) >= MOST_BUCKETS:
                full = self._burst / self.per_s
                self._buckets = {name: one for name, one in self._buckets.items() if now - one.at < full}
            if len(self._buckets) >= MOST_BUCKETS:
                self._buckets.clear()  # that many callers within seconds: better to begin anew than to grow
            bucket = self._buckets[who] = Bucket(self._burst, now)
        return bucket.take(self.per_s, self._burst, now)


class Access:
    """The door of the main port.

    secure: the port speaks TLS and asks for certificates. per_s, burst: calls of one caller. open_calls: of one identity at
    a time. max_metadata: bytes that a call may send along. refused: hears of each refusal: who, method, name of the error.
    """

    def __init__(
        self, *, secure: bool, per_s: float, burst: int, open_calls: int, max_metadata: int, refused: Refused
    ) -> None:
        self.refused = refused
        self._secure = secure
        self._rates = Rates(per_s, float(burst))
        self._open_calls = open_calls
        self._max_metadata = max_metadata
        self._revoked: dict[str, float] = {}
        self._open: dict[str, set[Call]] = {}

    # Revocation ---------------------------------------------------------------------------------------------------

    def remember(self, revoked: Mapping[str, float]) -> None:
        """Take over what the store has."""
        self._revoked = dict(revoked)

    def revoke(self, name: str, at: float) -> None:
        """What was issued to this name (see `key`) up to `at` is worth nothing any more; its open calls end."""
        self._revoked[name] = at
        for calls in list(self._open.values()):
            for call in list(calls):
                found = call.caller.identity
                if found is not None and key(found) == name and self.is_revoked(found):
                    call.end(Unauthenticated(f"the certificates of {found} were revoked"))

    def is_revoked(self, who: Identity) -> bool:
        """Whether this certificate was issued before its name was revoked."""
        at = self._revoked.get(key(who))
        return at is not None and (who.not_before + EARLIER).timestamp() <= at

    def revoked_at(self, name: str) -> float | None:
        """When this name was revoked last: what is issued must be issued later, in whole seconds."""
        return self._revoked.get(name)

    # Calls --------------------------------------------------------------------------------------------------------

    def who(self, context: Context) -> Caller:
        """Whose certificate the connection has or, in plaintext, whence it comes; raises Unauthenticated."""
        found = self._identity(context)
        return Caller(address(context)) if found is None else Caller(key(found, always=True), found)

    def check(self, caller: Caller, method: str, context: Context) -> None:
        """Raise Unauthenticated, RateLimited, NotAllowed or TooLarge unless this caller may call this now."""
        who, found = caller.name, caller.identity
        self._require_good(found)  # first, for who was revoked must not use up what belongs to a later certificate
        now = asyncio.get_running_loop().time()
        if (found is not None or not _is_here(who)) and not self._rates.take(who, now):
            raise RateLimited(
                f"{who} makes more than {self._rates.per_s:g} calls a second (calls_per_s); the server takes its next ones "
                "later"
            )
        if found is not None and found.role not in ALLOWED.get(method, NOBODY):
            raise NotAllowed(f"{found} may not call {method.rpartition('/')[2]}")
        if found is not None and len(self._open.get(who, ())) >= self._open_calls:
            raise RateLimited(f"{who} has {self._open_calls:,} calls open, the limit (calls_open); end some of them")
        size = sum(len(name) + len(value) + 32 for name, value in context.invocation_metadata() or ())
        if size > self._max_metadata:
            raise TooLarge(
                f"the call's metadata have {size:,} bytes; the limit (max_metadata_bytes) is {self._max_metadata:,}"
            )

    def _identity(self, context: Context) -> Identity | None:
        """Whose certificate the connection has; None in plaintext."""
        if not self._secure:
            return None
        shown = next(iter(context.auth_context().get("x509_pem_cert") or ()), b"")  # the chain begins with the caller's
        if not shown:
            raise Unauthenticated("the connection has no certificate; enrol, or ask the federation's operator for one")
        return _identity_of(shown)

    def _require_good(self, found: Identity | None) -> None:
        """Raise Unauthenticated unless the certificate is valid now and was not revoked."""
        if found is None:
            return
        now = identity.now()
        if not found.not_before <= now <= found.not_after:
            raise Unauthenticated(
                f"the certificate of {found} is good from {identity.day(found.not_before)} to "
                f"{identity.day(found.not_after)}, and it is {identity.day(now)}; it needs a new one"
            )
        if self.is_revoked(found):
            raise Unauthenticated(f"the certificate of {found} was revoked; enrol again with a new token")

    @contextlib.contextmanager
    def kept(self, call: Call) -> Iterator[None]:
        """Keep the call where a revocation, and the end of its certificate, find it."""
        found = call.caller.identity
        if found is None:
            yield
            return
        who = call.caller.name
        calls = self._open.setdefault(who, set())
        calls.add(call)
        left = (found.not_after - identity.now()).total_seconds()
        why = Unauthenticated(f"the certificate of {found} has ended")
        timer = asyncio.get_running_loop().call_later(left, call.end, why) if left < LONGEST_TIMER_S else None
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
            calls.discard(call)
            if not calls and self._open.get(who) is calls:
                del self._open[who]


def key(who: Identity, *, always: bool = False) -> str:
    """What an identity is called: a client by its name, others (and a client too, if `always`) as ROLE:NAME."""
    return f"{who.role}:{who.name}" if always or who.role is not Role.CLIENT else who.name


@functools.lru_cache(maxsize=4096)
def _identity_of(pem: bytes) -> Identity:
    return identity.identity_of(pem)


def _is_here(where: str) -> bool:
    """Whether this is the address of this machine itself."""
    kind, _, host = where.partition(":")
    return kind == "unix" or addresses.is_loopback(host.strip("[]"))
