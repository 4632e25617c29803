"""Who may call what, and how often: every call to the main port passes here before its servicer sees it.

The caller is whoever the certificate of its connection says. A call is refused if that certificate has ended or was revoked,
if the table does not name the caller's role, if its holder calls too often or has too many calls open, or if what it sends
along is too much. What passes is kept as long as it is open, so that a revocation ends it at once, whatever it waits for; so
does the certificate's own end. Servicers ask `caller` who calls.

In plaintext nobody can be told from anybody else, so everybody may do everything; calls are then counted by address, but not
those from this machine, where one address is everybody's.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import unquote

import grpc

from seqfed.common import addresses, identity
from seqfed.common.authority import EARLIER
from seqfed.common.errors import (
    LeaseLost,
    NotAllowed,
    Overloaded,
    RateLimited,
    SeqfedError,
    StorageError,
    StorageFull,
    TooLarge,
    Unauthenticated,
)
from seqfed.common.identity import Identity, Role
from seqfed.server.status import rich_status

log = logging.getLogger("seqfed.server")

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any  # grpc.RpcMethodHandler, whose fields grpc's own types do not tell

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
        "/seqfed.v1.Admin/ExportModel": OPERATORS,
        "/grpc.health.v1.Health/Check": MEMBERS,
        "/grpc.health.v1.Health/List": MEMBERS,
        "/grpc.health.v1.Health/Watch": MEMBERS,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": LOOKERS,
    }
)

OURS: Final = (StorageError, StorageFull, LeaseLost, Overloaded)  # refusals that say nothing of whoever was refused
MOST_BUCKETS: Final = 10_000  # of callers; beyond it those that have not called for a while are forgotten
LONGEST_TIMER_S: Final = 86_400.0

Refused = Callable[[str, str, str], None]  # (who, method, name of the error)


@dataclass(eq=False)
class Call:
    """One call that passed. `who`: its caller's identity or, in plaintext, address."""

    who: str
    method: str
    identity: Identity | None
    told: Refused
    task: asyncio.Task[Any] | None = field(default_factory=asyncio.current_task)
    ended: str = ""  # why it was broken off

    def end(self, why: str) -> None:
        """Break it off, unless it is the one that asks for that."""
        if self.task is not None and self.task is not asyncio.current_task() and not self.ended:
            self.ended = why
            self.task.cancel()


_call: ContextVar[Call | None] = ContextVar("call", default=None)


def caller() -> Identity | None:
    """Who makes the call that is being served; None in plaintext."""
    call = _call.get()
    return None if call is None else call.identity


def caller_name() -> str:
    """The same for the audit log: a name, or an address in plaintext."""
    call = _call.get()
    return "" if call is None else call.who


def tell_refused(error: BaseException) -> None:
    """Note for the audit log that the call being served is refused with this error."""
    call = _call.get()
    if call is not None and isinstance(error, SeqfedError) and not isinstance(error, OURS):
        call.told(call.who, call.method, type(error).__name__)


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


class Access(grpc.aio.ServerInterceptor):
    """The gate.

    secure: the port speaks TLS and asks for certificates. per_s, burst: calls of one caller. open_calls: of one identity at
    a time. max_metadata: bytes that a call may send along. refused: hears of each refusal: who, method, name of the error.
    """

    def __init__(
        self, *, secure: bool, per_s: float, burst: int, open_calls: int, max_metadata: int, refused: Refused
    ) -> None:
        self._secure = secure
        self._per_s = per_s
        self._burst = float(burst)
        self._open_calls = open_calls
        self._max_metadata = max_metadata
        self._refused = refused
        self._revoked: dict[str, float] = {}
        self._buckets: dict[str, Bucket] = {}
        self._open: dict[str, set[Call]] = {}
        self._gates: dict[str, tuple[Handler, Handler]] = {}  # by method: what it is for, and itself

    # Revocation ---------------------------------------------------------------------------------------------------

    def remember(self, revoked: Mapping[str, float]) -> None:
        """Take over what the store has."""
        self._revoked = dict(revoked)

    def revoke(self, name: str, at: float) -> None:
        """What was issued to this name (see `key`) up to `at` is worth nothing any more; its open calls end."""
        self._revoked[name] = at
        for calls in list(self._open.values()):
            for call in list(calls):
                if call.identity is not None and key(call.identity) == name and self.is_revoked(call.identity):
                    call.end(f"the certificates of {call.identity} were revoked")

    def is_revoked(self, who: Identity) -> bool:
        """Whether this certificate was issued before its name was revoked."""
        at = self._revoked.get(key(who))
        return at is not None and (who.not_before + EARLIER).timestamp() <= at

    def revoked_at(self, name: str) -> float | None:
        """When this name was revoked last: what is issued must be issued later, in whole seconds."""
        return self._revoked.get(name)

    # Calls --------------------------------------------------------------------------------------------------------

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """The method's own handler behind the gate."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # there is no such method; gRPC says so
        method = str(handler_call_details.method)
        known = self._gates.get(method)
        if known is None or known[0] is not handler:
            known = self._gates[method] = (handler, self._gate(method, handler))
        return known[1]

    def _gate(self, method: str, handler: Handler) -> Handler:
        """A handler that lets a call through to this one, or refuses it."""
        inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        outer: Callable[..., Any]
        if inspect.isasyncgenfunction(inner):
            outer = self._generating(method, inner)
        elif inspect.iscoroutinefunction(inner):
            outer = self._awaiting(method, inner)
        else:
            return None  # a thread's work, which nothing could end; gRPC's own services have it for what they lack
        made = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        return made(outer, handler.request_deserializer, handler.response_serializer)

    def _awaiting(self, method: str, inner: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def answer(request: Any, context: Context) -> Any:
            call = await self._admitted(method, context)
            with self._kept(call):
                try:
                    return await inner(request, context)
                except asyncio.CancelledError:
                    await _say_ended(call, context)
                    raise

        return answer

    def _generating(self, method: str, inner: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
        async def answers(request: Any, context: Context) -> AsyncIterator[Any]:
            call = await self._admitted(method, context)
            with self._kept(call):
                try:
                    async with contextlib.aclosing(inner(request, context)) as messages:  # type: ignore[type-var]
                        async for message in messages:
                            yield message
                except asyncio.CancelledError:
                    await _say_ended(call, context)
                    raise

        return answers

    async def _admitted(self, method: str, context: Context) -> Call:
        """The call, if it may be made; otherwise it is aborted with what is wrong."""
        who = ""
        try:
            found = self._identity(context)
            who = _address(context) if found is None else key(found, always=True)
            self._require_good(found)
            self._check(method, who, found, context)
            call = Call(who, method, found, self._refused)
        except Exception as error:  # noqa: BLE001 - the table decides what of it the stranger learns
            if isinstance(error, SeqfedError):
                self._refused(who or _address(context), method, type(error).__name__)
            await context.abort_with_status(rich_status(error))
            raise AssertionError("abort raises") from None
        _call.set(call)
        return call

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

    def _check(self, method: str, who: str, found: Identity | None, context: Context) -> None:
        """Raise NotAllowed, RateLimited or TooLarge unless this caller may call this now."""
        if found is not None and found.role not in ALLOWED.get(method, NOBODY):
            raise NotAllowed(f"{found} may not call {method.rpartition('/')[2]}")
        if (found is not None or not _is_here(who)) and not self._take(who):
            raise RateLimited(
                f"{who} makes more than {self._per_s:g} calls a second (calls_per_s); the server takes its next ones later"
            )
        if found is not None and len(self._open.get(who, ())) >= self._open_calls:
            raise RateLimited(f"{who} has {self._open_calls:,} calls open, the limit (calls_open); end some of them")
        size = sum(len(name) + len(value) + 32 for name, value in context.invocation_metadata() or ())
        if size > self._max_metadata:
            raise TooLarge(
                f"the call's metadata have {size:,} bytes; the limit (max_metadata_bytes) is {self._max_metadata:,}"
            )

    def _take(self, who: str) -> bool:
        now = asyncio.get_running_loop().time()
        bucket = self._buckets.get(who)
        if bucket is None:
            if len(self._buckets) >= MOST_BUCKETS:
                full = self._burst / self._per_s
                self._buckets = {name: one for name, one in self._buckets.items() if now - one.at < full}
            if len(self._buckets) >= MOST_BUCKETS:
                self._buckets.clear()  # that many callers within seconds: better to begin anew than to grow
            bucket = self._buckets[who] = Bucket(self._burst, now)
        return bucket.take(self._per_s, self._burst, now)

    @contextlib.contextmanager
    def _kept(self, call: Call) -> Iterator[None]:
        """Keep the call where a revocation, and the end of its certificate, find it."""
        if call.identity is None:
            yield
            return
        calls = self._open.setdefault(call.who, set())
        calls.add(call)
        left = (call.identity.not_after - identity.now()).total_seconds()
        why = f"the certificate of {call.identity} has ended"
        timer = asyncio.get_running_loop().call_later(left, call.end, why) if left < LONGEST_TIMER_S else None
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
            calls.discard(call)
            if not calls and self._open.get(call.who) is calls:
                del self._open[call.who]


def key(who: Identity, *, always: bool = False) -> str:
    """What an identity is called: a client by its name, others (and a client too, if `always`) as ROLE:NAME."""
    return f"{who.role}:{who.name}" if always or who.role is not Role.CLIENT else who.name


async def _say_ended(call: Call, context: Context) -> None:
    """If it was broken off here and not by its caller, tell the caller why."""
    if call.ended:
        if call.task is not None:
            call.task.uncancel()
        call.told(call.who, call.method, Unauthenticated.__name__)
        await context.abort_with_status(rich_status(Unauthenticated(call.ended)))


@functools.lru_cache(maxsize=4096)
def _identity_of(pem: bytes) -> Identity:
    return identity.identity_of(pem)


def _address(context: Context) -> str:
    """The caller's address without its port."""
    return unquote(str(context.peer()).rpartition(":")[0])


def _is_here(address: str) -> bool:
    """Whether this is the address of this machine itself."""
    kind, _, host = address.partition(":")
    return kind == "unix" or addresses.is_loopback(host.strip("[]"))
