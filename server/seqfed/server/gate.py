"""The gate: a call is let in when its headers come, before any of its message is read, and has its place until it ends.

gRPC by itself would take a place for every call whose message never comes, and ask who calls only afterwards. Here a method's
handler is put behind one that takes a stream, whatever the method takes, so that it begins with the headers: a door says who
calls and whether that may be; then the message is awaited, for `message_s` at most. Where all places are taken, somebody who
comes with a message gets that of a call which still owes one: of the caller with the most such calls the oldest. So whoever
opens calls and sends nothing takes places from itself first.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Protocol
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError

from seqfed.common.errors import BrokenTransfer, LeaseLost, Overloaded, SeqfedError, StorageError, StorageFull
from seqfed.common.identity import Identity
from seqfed.server.status import rich_status

log = logging.getLogger("seqfed.server")

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any  # grpc.RpcMethodHandler, whose fields grpc's own types do not tell
Refused = Callable[[str, str, str], None]  # (who, method, name of the error)

OURS: Final = (StorageError, StorageFull, LeaseLost, Overloaded)  # refusals that say nothing of whoever was refused
SAID_S: Final = 60.0  # between two lines about having no place left
LOOKS: Final = 4  # for calls whose message does not come, in the time that it has


@dataclass(frozen=True)
class Caller:
    """Who calls. `name`: as the audit log has it, an address where there is no identity."""

    name: str
    identity: Identity | None = None


@dataclass(eq=False)
class Call:
    """One call that was let in."""

    caller: Caller
    method: str
    told: Refused
    since: float  # of the loop's clock
    task: asyncio.Task[Any] | None = field(default_factory=asyncio.current_task)
    ended: SeqfedError | None = None  # why it was broken off
    empty: bool = False  # no message came, as from a caller that was cut off: nothing to write down

    def end(self, why: SeqfedError) -> None:
        """Break it off, unless it is the one that asks for that."""
        if self.task is not None and self.task is not asyncio.current_task() and self.ended is None:
            self.ended = why
            self.task.cancel()

    def refused(self, error: BaseException) -> None:
        """Note for the audit log that it is refused with this error."""
        if isinstance(error, SeqfedError) and not isinstance(error, OURS) and not self.empty:
            self.told(self.caller.name, self.method, type(error).__name__)


_call: ContextVar[Call | None] = ContextVar("call", default=None)


def caller() -> Identity | None:
    """Who makes the call that is being served; None in plaintext."""
    call = _call.get()
    return None if call is None else call.caller.identity


def caller_name() -> str:
    """The same for the audit log: a name, or an address in plaintext."""
    call = _call.get()
    return "" if call is None else call.caller.name


def tell_refused(error: BaseException) -> None:
    """Note for the audit log that the call being served is refused with this error."""
    call = _call.get()
    if call is not None:
        call.refused(error)


class Door(Protocol):
    """What lets calls in at a port. `refused` hears of each that is not: who, method, name of the error."""

    refused: Refused

    def who(self, context: Context) -> Caller:
        """Who calls; raises Unauthenticated."""
        ...

    def check(self, caller: Caller, method: str, context: Context) -> None:
        """Raise why this caller may not call this now."""

    def kept(self, call: Call) -> contextlib.AbstractContextManager[None]:
        """The call is let in, and open for as long as the block lasts."""
        ...


class Gate(grpc.aio.ServerInterceptor):
    """The gate of one port.

    places: calls that may be open at a time. message_s: seconds that a call's first message may take.
    """

    def __init__(self, door: Door, *, places: int, message_s: float) -> None:
        self._door = door
        self._places = places
        self._message_s = message_s
        self._open: set[Call] = set()
        self._owing: dict[str, dict[Call, None]] = {}  # by caller, oldest first: calls whose message has not come
        self._look: asyncio.TimerHandle | None = None
        self._said = -math.inf  # when it was last logged that there is no place left
        self._handlers: dict[str, tuple[Handler, Handler]] = {}  # by method: what is behind the gate, and in front

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
        known = self._handlers.get(method)
        if known is None or known[0] is not handler:
            known = self._handlers[method] = (handler, self._in_front(method, handler))
        return known[1]

    def _in_front(self, method: str, handler: Handler) -> Handler:
        inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        outer: Callable[..., Any]
        if inspect.isasyncgenfunction(inner):
            outer = self._generating(method, inner, handler.request_streaming)
        elif inspect.iscoroutinefunction(inner):
            outer = self._awaiting(method, inner, handler.request_streaming)
        else:
            return None  # a thread's work, which nothing could end; gRPC's own services have it for what they lack
        made = {
            False: grpc.stream_unary_rpc_method_handler,
            True: grpc.stream_stream_rpc_method_handler,
        }[handler.response_streaming]
        return made(outer, handler.request_deserializer, handler.response_serializer)

    def _awaiting(self, method: str, inner: Callable[..., Awaitable[Any]], streams: bool) -> Callable[..., Any]:
        async def answer(_: object, context: Context) -> Any:
            call = await self._admitted(method, context)
            with self._kept(call):
                try:
                    return await inner(await self._given(call, context, streams), context)
                except asyncio.CancelledError:
                    await _say_ended(call, context)
                    raise

        return answer

    def _generating(
        self, method: str, inner: Callable[..., AsyncIterator[Any]], streams: bool
    ) -> Callable[..., AsyncIterator[Any]]:
        async def answers(_: object, context: Context) -> AsyncIterator[Any]:
            call = await self._admitted(method, context)
            with self._kept(call):
                try:
                    given = await self._given(call, context, streams)
                    async with contextlib.aclosing(inner(given, context)) as messages:  # type: ignore[type-var]
                        async for message in messages:
                            yield message
                except asyncio.CancelledError:
                    await _say_ended(call, context)
                    raise

        return answers

    async def _admitted(self, method: str, context: Context) -> Call:
        """The call, if it may be made; otherwise it is aborted with what is wrong."""
        name = ""
        try:
            caller = self._door.who(context)
            name = caller.name
            self._door.check(caller, method, context)
            self._make_room()
            call = Call(caller, method, self._door.refused, asyncio.get_running_loop().time())
        except Exception as error:  # noqa: BLE001 - the table decides what of it the stranger learns
            if isinstance(error, SeqfedError) and not isinstance(error, OURS):
                self._door.refused(name or address(context), method, type(error).__name__)
            await context.abort_with_status(rich_status(error))
            raise AssertionError("abort raises") from None
        _call.set(call)
        return call

    def _make_room(self) -> None:
        """Raise Overloaded unless there is a place, or one whose call still owes its message."""
        if len(self._open) < self._places:
            return
        self._say_full()
        if not self._owing:
            raise Overloaded(f"{self._places:,} calls are open, as many as the server takes; try again later")
        most = max(self._owing, key=lambda name: len(self._owing[name]))
        first = next(iter(self._owing[most]))
        self._leave(first)
        first.end(Overloaded("the server has no place left for a call whose message has not come; try again later"))

    def _say_full(self) -> None:
        """Log, now and then, that whoever calls may be refused for no fault of his own."""
        now = asyncio.get_running_loop().time()
        if now - self._said >= SAID_S:
            self._said = now
            owing = sum(map(len, self._owing.values()))
            log.warning(
                "all %d places for calls are taken, %d by calls whose message has not come", self._places, owing
            )

    @contextlib.contextmanager
    def _kept(self, call: Call) -> Iterator[None]:
        self._open.add(call)
        self._owing.setdefault(call.caller.name, {})[call] = None
        if self._look is None:
            self._look_later()
        try:
            with self._door.kept(call):
                yield
        finally:
            self._leave(call)

    def _leave(self, call: Call) -> None:
        self._open.discard(call)
        self._paid(call)

    def _paid(self, call: Call) -> None:
        """Its message is there, or will not be awaited any longer."""
        name = call.caller.name
        calls = self._owing.get(name)
        if calls is not None:
            calls.pop(call, None)
            if not calls:
                del self._owing[name]

    # Messages -----------------------------------------------------------------------------------------------------

    async def _given(self, call: Call, context: Context, streams: bool) -> Any:
        """What the method is called with: its message, or the stream of them; aborts a call that ends without it."""
        if streams:
            return self._messages(call, context)
        try:
            message = await self._first(call, context)
            if message is grpc.aio.EOF:
                raise BrokenTransfer("the call ended before its message came")
        except BrokenTransfer as error:
            call.refused(error)
            await context.abort_with_status(rich_status(error))
        return message

    async def _messages(self, call: Call, context: Context) -> AsyncIterator[Any]:
        message = await self._first(call, context)
        while message is not grpc.aio.EOF:
            yield message
            message = await _read(context)

    async def _first(self, call: Call, context: Context) -> Any:
        message = await _read(context)
        self._paid(call)
        call.empty = message is grpc.aio.EOF
        return message

    def _look_later(self) -> None:
        self._look = asyncio.get_running_loop().call_later(self._message_s / LOOKS, self._end_silent)

    def _end_silent(self) -> None:
        """End the calls whose message is overdue."""
        self._look = None
        long_ago = asyncio.get_running_loop().time() - self._message_s
        for calls in list(self._owing.values()):
            for call in list(calls):
                if call.since > long_ago:
                    break
                self._paid(call)
                call.end(
                    BrokenTransfer(f"no message came within {self._message_s:g} s (message_s) of the call's headers")
                )
        if self._owing:
            self._look_later()


async def _read(context: Context) -> Any:
    """The next message, or EOF; raises BrokenTransfer."""
    try:
        return await context.read()
    except DecodeError:
        raise BrokenTransfer("a message came that is not of this method's kind") from None


async def _say_ended(call: Call, context: Context) -> None:
    """If it was broken off here and not by its caller, tell the caller why."""
    if call.ended is not None:
        if call.task is not None:
            call.task.uncancel()
        call.refused(call.ended)
        await context.abort_with_status(rich_status(call.ended))


def address(context: Context) -> str:
    """The caller's address without its port."""
    return unquote(str(context.peer()).rpartition(":")[0])
