"""A network between simulated processes, under the real stubs and the real servicers.

`Channel` takes grpc.aio.Channel's place below FederationStub and AdminStub, `Server` that of grpc.aio.Server below the daemon;
between them real serialised messages travel over links that delay, hold back and lose them. A stream's messages keep
their order, different calls overtake each other. What either side sees of a broken link, a dead, a stopped or an unreachable peer
is what gRPC 1.85 shows: UNAVAILABLE to the caller, a cancelled handler (or first the end of the upload's stream) to the
server, each at a moment of its own and by keepalive within 10 to 25 s; closing a channel cancels whoever awaits a call on it.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import grpc
from tests.simulation.loop import Loop, Process, current

Code = grpc.StatusCode
Pairs = tuple[tuple[str, Any], ...]

DIAL_S: Final = 20.0  # gRPC's own limit for a connection attempt
KEEPALIVE_S: Final = (10.0, 25.0)  # when a silent peer is given up: pings every 15 s, answers within 10


@dataclass(eq=False)
class Line:
    """A host's way to the server."""

    name: str
    latency: float = 0.005  # mean seconds one way
    rate: float = 1e9  # bytes/s
    down_until: float = -1.0


class Network:
    """All links. `say` hears of everything that happens, one line each."""

    def __init__(self, loop: Loop, draw: random.Random, say: Callable[[str], None]) -> None:
        self.loop = loop
        self.draw = draw
        self.say = say
        self.lines: dict[str, Line] = {}  # by host: the part of the process's name before '#'
        self.links: list[Link] = []
        self.made = 0  # links so far
        self.listening: dict[str, Server] = {}  # by address
        self.silent_death = 0.2  # how often a dead host says nothing

    def line(self, process: Process) -> Line:
        return self.lines.setdefault(process.name.partition("#")[0], Line(process.name))

    def moment(self, line: Line) -> float:
        """How long a message is on its way; now and then much longer."""
        wait = line.latency * self.draw.uniform(0.5, 1.5)
        return wait * 20 if self.draw.random() < 0.005 else wait

    def patience(self) -> float:
        return self.draw.uniform(*KEEPALIVE_S)

    # faults

    def break_links(self, line: Line) -> None:
        """A middlebox forgets the host's connections: each side notices at a moment of its own."""
        for link in self._of(line):
            moments = [self.draw.uniform(0, 0.2) if self.draw.random() < 0.7 else self.patience() for _ in range(2)]
            self.say(f"link {link} breaks")
            link.cut = True
            link.lose_after("client", moments[0])
            link.lose_after("server", moments[1])

    def part(self, line: Line, seconds: float) -> None:
        """Nothing passes for a while; what was sent comes afterwards, unless somebody has given up by then."""
        line.down_until = max(line.down_until, self.loop.time() + seconds)
        for link in self._of(line):
            self._unheard(link, seconds, "client", "server")

    def stopped(self, process: Process, seconds: float) -> None:
        """The process will stand still for so long: its peers hear nothing of it."""
        for link in self.links:
            if link.client is process:
                self._unheard(link, seconds, "server", "client")
            elif link.server.process is process:
                self._unheard(link, seconds, "client", "server")

    def _unheard(self, link: Link, seconds: float, *sides: str) -> None:
        for side in sides:
            patience = self.patience()
            if patience < seconds:
                link.lose_after(side, patience)

    def died(self, process: Process) -> None:
        """Its kernel closes its connections, or its host is gone without a word."""
        for address in [address for address, server in self.listening.items() if server.process is process]:
            del self.listening[address]
        for link in list(self.links):
            if process in {link.client, link.server.process}:
                side = "server" if link.client is process else "client"
                link.cut = self.draw.random() < 0.5  # what is on its way still comes, or not
                silent = self.draw.random() < self.silent_death
                held = max(0.0, link.line.down_until - self.loop.time())
                link.lose_after(side, self.patience() if silent else held + self.moment(link.line))
                self.links.remove(link)

    def _of(self, line: Line) -> list[Link]:
        return [link for link in self.links if link.line is line]


class Link:
    """One connection. `open`: which side takes it for whole."""

    def __init__(self, network: Network, client: Process, server: Server) -> None:
        self.network = network
        self.client = client
        self.server = server
        self.line = network.line(client)
        self.open = {"client": True, "server": True}
        self.cut = False  # nothing passes any more
        self.calls: dict[Call, None] = {}
        self.served: dict[Served, None] = {}
        network.links.append(self)
        network.made += 1
        self.number = network.made
        network.say(f"link {self} opens")

    def __str__(self) -> str:
        return f"{self.client.name}-{self.server.process.name}"

    def context(self, side: str) -> Any:
        return (self.client if side == "client" else self.server.process).context

    def lose_after(self, side: str, seconds: float) -> None:
        self.network.loop.call_later(seconds, self.lose, side, context=self.context(side))

    def lose(self, side: str) -> None:
        """This side notices that the link is broken; the other one will."""
        if not self.open[side]:
            return
        self.open[side] = False
        self.cut = True
        self.network.say(f"link {self} lost by the {side}")
        if self in self.network.links:
            self.network.links.remove(self)
        if side == "client":
            for call in list(self.calls):
                call.over(Code.UNAVAILABLE, "Connection reset by peer")
        else:
            for served in list(self.served):
                served.client_gone()
        other = "server" if side == "client" else "client"
        if self.open[other]:
            held = max(0.0, self.line.down_until - self.network.loop.time())
            quick = self.network.draw.random() < 0.7
            self.lose_after(other, held + self.network.moment(self.line) if quick else self.network.patience())


class Pipe:
    """One direction of one call: what is sent comes in order, or not at all."""

    def __init__(self, link: Link, side: str, receive: Callable[[Any], None]) -> None:
        self._link = link
        self._side = side  # the receiver's
        self._receive = receive
        self._items: deque[Any] = deque()

    def send(self, item: Any) -> None:
        self._items.append(item)
        network = self._link.network
        network.loop.call_later(network.moment(self._link.line), self._arrive, context=self._link.context(self._side))

    async def send_data(self, data: bytes) -> None:
        """A message, as fast as the line carries it."""
        if (seconds := len(data) / self._link.line.rate) > 1e-4:
            await asyncio.sleep(seconds)
        self.send(("message", data))

    def _arrive(self) -> None:
        link, network = self._link, self._link.network
        if link.cut or not link.open[self._side]:
            self._items.clear()
        elif link.line.down_until > network.loop.time():
            again = link.line.down_until + network.moment(link.line)
            network.loop.call_at(again, self._arrive, context=link.context(self._side))
        elif self._items:
            self._receive(self._items.popleft())


# The client's side ----------------------------------------------------------------------------------------------------


class Channel:
    """In place of grpc.aio.Channel."""

    def __init__(self, network: Network, address: str) -> None:
        self.network = network
        self.process = current()
        self._address = address
        self._link: Link | None = None
        self._dialing: asyncio.Task[Link] | None = None
        self._closed = False
        self.calls: dict[Call, None] = {}

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Cancel the calls; the server hears of it."""
        del grace
        self._closed = True
        for call in list(self.calls):
            call.cancel()
        link = self._link
        if link is not None and link.open["client"]:
            link.open["client"] = False
            held = max(0.0, link.line.down_until - self.network.loop.time())
            link.lose_after("server", held + self.network.moment(link.line))
        if self._dialing is not None:
            self._dialing.cancel()

    async def link(self) -> Link:
        """The connection, made if there is none; raises ConnectionError."""
        if self._link is not None and self._link.open["client"]:
            return self._link
        if self._dialing is None or self._dialing.done():
            self._dialing = self.network.loop.create_task(self._dial())
        return await asyncio.shield(self._dialing)

    async def _dial(self) -> Link:
        network, line = self.network, self.network.line(self.process)
        clock = network.loop.time
        end = clock() + DIAL_S
        while line.down_until > clock():
            if line.down_until > end:
                await asyncio.sleep(end - clock())
                raise ConnectionError("connection attempt timed out")
            await asyncio.sleep(line.down_until - clock())
        await asyncio.sleep(network.moment(line))
        server = network.listening.get(self._address)
        if server is None:
            raise ConnectionError("Connection refused")
        if server.process.stopped:  # the kernel accepts, and nobody speaks
            await asyncio.sleep(max(0.0, end - clock()))
            if server.process.stopped:
                raise ConnectionError("connection attempt timed out before receiving SETTINGS frame")
        if network.listening.get(self._address) is not server:
            raise ConnectionError("Connection reset by peer")
        self._link = Link(network, self.process, server)
        return self._link

    def _multicallable(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        _registered_method: bool = False,
    ) -> Callable[..., Call]:
        def call(request: Any = None, *, timeout: float | None = None, metadata: Pairs = (), **_: Any) -> Call:
            if self._closed:
                raise grpc.aio.UsageError("Channel is closed.")
            return Call(self, method, request_serializer, response_deserializer, request, timeout, tuple(metadata))

        return call

    unary_unary = unary_stream = stream_unary = stream_stream = _multicallable


class Call:
    """One call in place of grpc.aio's four kinds: await it for its one answer, or iterate over its answers."""

    def __init__(
        self,
        channel: Channel,
        method: str,
        serialise: Callable[[Any], bytes],
        deserialise: Callable[[bytes], Any],
        request: Any,
        timeout: float | None,
        metadata: Pairs,
    ) -> None:
        self.channel = channel
        self.method = method
        self._serialise = serialise
        self._deserialise = deserialise
        self._timeout = timeout
        self._metadata = metadata
        self._link: Link | None = None
        self._to_server: Pipe | None = None
        self._answers: deque[bytes] = deque()
        self._status: tuple[Code, str, Pairs] | None = None
        self._cancelled = False
        self._news = asyncio.Event()
        loop = channel.network.loop
        channel.calls[self] = None
        self._timer = (
            loop.call_later(timeout, self.over, Code.DEADLINE_EXCEEDED, "Deadline Exceeded")
            if timeout is not None
            else None
        )
        self._sender = loop.create_task(self._send(request))

    async def _send(self, request: Any) -> None:
        try:
            self._link = link = await self.channel.link()
        except ConnectionError as error:
            self.over(Code.UNAVAILABLE, f"failed to connect to all addresses; last error: {error}")
            return
        link.calls[self] = None
        served: list[Served] = []

        def receive(item: tuple[str, Any]) -> None:
            if not served:
                metadata, timeout = item[1]
                served.append(Served(link, self.method, metadata, timeout, from_server))
            else:
                served[0].take(*item)

        self._to_server = Pipe(link, "server", receive)
        from_server = Pipe(link, "client", self._receive)
        self._to_server.send(("head", (self._metadata, self._timeout)))
        if not isinstance(request, AsyncIterator):
            await self._to_server.send_data(self._serialise(request))
        else:
            try:
                async for message in request:
                    await self._to_server.send_data(self._serialise(message))
            except Exception:  # noqa: BLE001 - as grpc.aio does
                self.cancel()
                return
        self._to_server.send(("end", b""))

    def _receive(self, item: tuple[str, Any]) -> None:
        if self._status is not None:
            return
        kind, content = item
        if kind == "message":
            self._answers.append(content)
            self._news.set()
        else:
            self._end(content)

    def over(self, code: Code, details: str) -> None:
        """The call ends on this side; the server learns of it if it can."""
        if self._status is None:
            if self._to_server is not None:
                self._to_server.send(("reset", b""))
            if self.channel.network.draw.random() < 0.5:
                self._answers.clear()  # what had come and was not read
            self._end((code, details, ()))

    def _end(self, status: tuple[Code, str, Pairs]) -> None:
        self._status = status
        self.channel.network.say(f"{self.channel.process.name} {self.method.rpartition('/')[2]}: {status[0].name}")
        self.channel.calls.pop(self, None)
        if self._link is not None:
            self._link.calls.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
        self._sender.cancel()
        self._news.set()

    def cancel(self) -> bool:
        if self._status is not None:
            return False
        self._cancelled = True
        self.over(Code.CANCELLED, "Locally cancelled by application!")
        return True

    def done(self) -> bool:
        return self._status is not None

    async def read(self) -> Any:
        """The next answer, or EOF."""
        try:
            while not self._answers and self._status is None:
                self._news.clear()
                await self._news.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if self._answers:
            return self._deserialise(self._answers.popleft())
        assert self._status is not None
        if self._cancelled:
            raise asyncio.CancelledError
        code, details, trailing = self._status
        if code is not Code.OK:
            raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)
        return grpc.aio.EOF

    async def _one(self) -> Any:
        answer = await self.read()
        assert answer is not grpc.aio.EOF, f"{self.method} was answered with nothing"
        while await self.read() is not grpc.aio.EOF:
            raise AssertionError(f"{self.method} was answered twice")
        return answer

    def __await__(self) -> Any:
        return self._one().__await__()

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (answer := await self.read()) is not grpc.aio.EOF:
            yield answer


# The server's side ----------------------------------------------------------------------------------------------------


class Server:
    """In place of grpc.aio.Server."""

    def __init__(self, network: Network, surprise: Callable[[BaseException], None]) -> None:
        self.network = network
        self.process = current()
        self.surprise = surprise
        self.methods: dict[str, Any] = {}
        self.served: dict[Served, None] = {}
        self._address = ""

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """The stubs register the same ones again below."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        self.methods |= {f"/{service}/{name}": handler for name, handler in handlers.items()}

    def add_insecure_port(self, address: str) -> int:
        self._address = address
        return int(address.rpartition(":")[2])

    async def start(self) -> None:
        self.network.listening[self._address] = self

    async def stop(self, grace: float | None) -> None:
        """Take no more calls; those under way have `grace` seconds."""
        self.network.listening.pop(self._address, None)
        clock = self.network.loop.time
        end = clock() + (grace or 0.0)
        while self.served and clock() < end:  # noqa: ASYNC110 - nobody tells of the last one
            await asyncio.sleep(min(0.1, end - clock()))
        for one in list(self.served):
            one.cut_off()
        for link in [link for link in self.network.links if link.server is self]:
            link.open["server"] = False
            link.lose_after("client", self.network.moment(link.line))


class Served:
    """One call in the server's hands."""

    def __init__(self, link: Link, method: str, metadata: Pairs, timeout: float | None, answers: Pipe) -> None:
        self._link = link
        self._metadata = metadata
        self._answers = answers
        self._requests: deque[bytes] = deque()
        self._ended = False
        self._news = asyncio.Event()
        self._network = link.network
        link.served[self] = None
        link.server.served[self] = None
        self._task = self._network.loop.create_task(self._serve(link.server.methods.get(method)))
        self._timer = self._network.loop.call_later(timeout, self._task.cancel) if timeout is not None else None

    # grpc.aio.ServicerContext

    def invocation_metadata(self) -> Pairs:
        return self._metadata

    def peer(self) -> str:
        return f"sim:{self._link.number}"

    async def abort_with_status(self, status: Any) -> None:
        self._close(status.code, status.details, tuple(status.trailing_metadata))
        raise grpc.aio.AbortError("Locally aborted.")

    async def abort(self, code: Code, details: str = "", trailing_metadata: Pairs = ()) -> None:
        self._close(code, details, tuple(trailing_metadata))
        raise grpc.aio.AbortError("Locally aborted.")

    # the call's course

    def take(self, kind: str, data: bytes) -> None:
        """What the client sent."""
        if kind == "message":
            self._requests.append(data)
        elif kind == "end":
            self._ended = True
        else:
            self.client_gone()
        self._news.set()

    def client_gone(self) -> None:
        """The handler is cancelled; an upload's may see its stream end just before."""
        if self._task.done():
            return
        if self._network.draw.random() < 0.5:
            self._ended = True
            self._news.set()
            self._network.loop.call_later(self._network.draw.uniform(0, 0.002), self._task.cancel)
        else:
            self._task.cancel()

    def cut_off(self) -> None:
        """The server stops."""
        self._close(Code.UNAVAILABLE, "Cancelling all calls", ())
        self._task.cancel()

    async def _serve(self, handler: Any) -> None:
        try:
            if handler is None:
                self._close(Code.UNIMPLEMENTED, "Method not found!", ())
                return
            incoming = self._incoming(handler.request_deserializer)
            behaviour = next(
                one
                for one in (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
                if one is not None
            )
            request = incoming if handler.request_streaming else await anext(incoming)
            if handler.response_streaming:
                async for answer in behaviour(request, self):
                    await self._answers.send_data(handler.response_serializer(answer))
            else:
                answer = await behaviour(request, self)
                await self._answers.send_data(handler.response_serializer(answer))
            self._close(Code.OK, "", ())
        except (grpc.aio.AbortError, asyncio.CancelledError, StopAsyncIteration):
            pass
        except Exception as error:  # noqa: BLE001 - as grpc.aio does
            self._link.server.surprise(error)
            self._close(Code.UNKNOWN, f"Unexpected {type(error)}", ())
        finally:
            self._link.served.pop(self, None)
            self._link.server.served.pop(self, None)
            if self._timer is not None:
                self._timer.cancel()

    async def _incoming(self, deserialise: Callable[[bytes], Any]) -> AsyncIterator[Any]:
        while True:
            while not self._requests:
                if self._ended:
                    return
                self._news.clear()
                await self._news.wait()
            yield deserialise(self._requests.popleft())

    def _close(self, code: Code, details: str, trailing: Pairs) -> None:
        self._answers.send(("status", (code, details, trailing)))
