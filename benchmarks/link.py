"""Links between clients and servers that are slow, lose packets or break, under control: one process carries them all.

Three kinds, the first that the machine allows:

netem  Every client is in a network namespace of its own, joined to the servers' by a veth pair which the kernel's netem
       delays, slows and thins out.
tun    The same namespaces where the kernel has no netem: between them lie two TUN devices, and this process passes the
       packets from one to the other, late, at a rate, and not all of them. Both ends are still the kernel's own TCP, which
       sends again what was really lost.
proxy  Without the right to make namespaces: a TCP relay on the loopback interface. It cannot lose a byte, so it emulates a
       lost segment: everything behind it waits for a retransmission's time (Linux's least, 200 ms, and a round trip).

A cut drops every packet in silence; where the connections are reset as well, both ends hear of it at once. The proxy holds
back what comes during a silent cut and passes it on afterwards, as TCP would send it again.

`with links(kind) as net`, then `net.add(name, ports)` tells how a process behind that link is started and whom it dials.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

Kind = Literal["netem", "tun", "proxy"]

INSIDE: Final = "SEQFED_BENCHMARK_NETWORK"  # the kind, in the environment of what runs in a namespace of its own
SEGMENT: Final = 1448  # bytes of TCP's payload in a packet of 1500
LEAST_RTO_S: Final = 0.2  # Linux's TCP_RTO_MIN
QUEUE_S: Final = 2.0  # of packets before a slow line, more are dropped: a home router's buffer
TUN: Final = Path("/dev/net/tun")


@dataclass(frozen=True)
class Quality:
    """What a link does to what it carries, both ways alike."""

    rate: float = 0.0  # bit/s; 0: as fast as the machine
    delay_s: float = 0.0  # one way
    loss: float = 0.0  # share of the packets


@dataclass(frozen=True)
class Place:
    """Where a client behind a link is: what its command begins with, and the servers' addresses as seen from there."""

    prefix: tuple[str, ...]
    addresses: tuple[str, ...]


class Links:
    """The process that carries the links. What needs a namespace runs inside `settle`'s."""

    def __init__(self, kind: Kind, process: subprocess.Popen[str]) -> None:
        self.kind = kind
        self.host = "127.0.0.1" if kind == "proxy" else "0.0.0.0"  # noqa: S104 - all there is in the namespace
        self.flags: tuple[str, ...] = () if kind == "proxy" else ("--insecure",)  # of both sides' commands
        self._process = process

    def add(self, name: str, ports: Sequence[int]) -> Place:
        """A new perfect link to the servers that listen on these ports."""
        prefix, addresses = self._say("add", name, list(ports))
        return Place(tuple(prefix), tuple(addresses))

    def shape(self, name: str, quality: Quality) -> None:
        self._say("shape", name, asdict(quality))

    def cut(self, name: str, *, reset: bool = False) -> None:
        """Carry nothing more until `mend`; reset: break the connections too, so that both ends know."""
        self._say("cut", name, reset)

    def mend(self, name: str) -> None:
        """Carry again, with the quality as before the cut."""
        self._say("mend", name)

    def _say(self, *words: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(words), file=self._process.stdin, flush=True)
        answer = json.loads(
            self._process.stdout.readline() or '{"error": "the process that carries the links is over"}'
        )
        if "error" in answer:
            raise RuntimeError(f"{words[0]} {words[1]}: {answer['error']}")
        return answer["result"]


@contextlib.contextmanager
def links(kind: Kind, seed: int = 0) -> Iterator[Links]:
    """Links of this kind, all gone after the block. Which packets are lost follows from the seed (not with netem)."""
    command = [sys.executable, "-m", "benchmarks.link", kind, str(seed)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Links(kind, process)
    finally:
        assert process.stdin is not None
        process.stdin.close()  # it ends, and its namespaces with it
        process.wait()


# Namespaces -----------------------------------------------------------------------------------------------------------


def settle(wanted: str = "auto") -> Kind:
    """The kind of links to be had here. For namespaces this process first begins anew in one of its own.

    So nothing of it is seen, or left, outside: only what is started from here can reach the servers in it.
    """
    inside = os.environ.get(INSIDE)
    kind: Kind
    if inside is not None:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)  # noqa: S607
        kind = "netem" if inside == "netem" else "tun"
        return kind
    kind = best() if wanted == "auto" else _kind(wanted)
    if kind != "proxy":
        command = [*_unshare(), *sys.orig_argv]
        os.execvpe(command[0], command, {**os.environ, INSIDE: kind})  # noqa: S606
    return kind


def best() -> Kind:
    """The first kind that this machine allows."""
    for kind, trial in (
        ("netem", "tc qdisc add dev lo root netem delay 1ms"),
        ("tun", "ip tuntap add dev t0 mode tun"),
    ):
        if all(map(shutil.which, ("unshare", "nsenter", "ip", "tc"))):
            tried = [*_unshare(), "sh", "-c", f"ip link set lo up && {trial}"]
            if subprocess.run(tried, capture_output=True, check=False).returncode == 0:
                return _kind(kind)
    return "proxy"


def _kind(name: str) -> Kind:
    match name:
        case "netem" | "tun" | "proxy":
            return name
    raise SystemExit(f"the network is one of auto, netem, tun and proxy, not '{name}'")


def _unshare() -> list[str]:
    return ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]


# The process ----------------------------------------------------------------------------------------------------------


class Way:
    """One direction of a link: when what is sent now will arrive."""

    def __init__(self, draw: random.Random) -> None:
        self.quality = Quality()
        self._draw = draw
        self._free = 0.0  # when the line has sent what was given to it

    def packet(self, size: int, now: float) -> float | None:
        """The packet's time of arrival; None if it is lost, or the queue before the line is full."""
        begin = max(now, self._free)
        if begin - now > QUEUE_S or self._lost():
            return None
        return self._sent(begin, size)

    def bytes(self, size: int, now: float) -> float:
        """The same of a stream's next bytes, which all arrive: each lost segment holds them up instead."""
        lost = sum(self._lost() for _ in range(-(-size // SEGMENT)))
        return self._sent(max(now, self._free) + lost * (LEAST_RTO_S + 2 * self.quality.delay_s), size)

    def _lost(self) -> bool:
        return self.quality.loss > 0 and self._draw.random() < self.quality.loss

    def _sent(self, begin: float, size: int) -> float:
        self._free = begin + (8 * size / self.quality.rate if self.quality.rate else 0.0)
        return self._free + self.quality.delay_s


class Space:
    """A client's network namespace, which ends with this process."""

    def __init__(self, number: int) -> None:
        self._holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S607
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.write(b"\n")
        self._holder.stdin.flush()
        self._holder.stdout.readline()  # it is in its namespace
        self.prefix = ("nsenter", f"--net=/proc/{self._holder.pid}/ns/net")
        self.near, self.far = f"near{number}", f"far{number}"
        first = 4 * number  # networks of 4 addresses, 2 of which are hosts'
        self.servers = f"10.213.{first >> 8}.{(first & 255) + 1}"
        self._client = f"10.213.{first >> 8}.{(first & 255) + 2}"

    def join(self) -> None:
        """Give the two devices to their namespaces and addresses to them."""
        call("ip", "link", "set", self.far, "netns", str(self._holder.pid))
        for prefix, device, address in (((), self.near, self.servers), (self.prefix, self.far, self._client)):
            call(*prefix, "ip", "addr", "add", f"{address}/30", "dev", device)
            call(*prefix, "ip", "link", "set", device, "up")
        call(*self.prefix, "ip", "link", "set", "lo", "up")

    def reset(self) -> None:
        """Break every connection of the client's."""
        call(*self.prefix, "ss", "--kill", "--tcp", "dst", self.servers, check=False)


class Tunnel:
    """Two TUN devices and the packets between them."""

    def __init__(self, number: int, ports: Sequence[int], draw: random.Random) -> None:
        self._space, self._ports, self._draw = Space(number), ports, draw
        self._ways: list[Way] = []
        self._is_cut = False

    def add(self) -> tuple[Sequence[str], Sequence[str]]:
        near, far = _tun(self._space.near), _tun(self._space.far)
        self._space.join()
        self._forward(near, far)
        self._forward(far, near)
        return self._space.prefix, [f"{self._space.servers}:{port}" for port in self._ports]

    def _forward(self, source: int, target: int) -> None:
        loop, way, waiting = asyncio.get_running_loop(), Way(self._draw), deque[tuple[float, bytes]]()
        self._ways.append(way)

        def deliver() -> None:
            while waiting and waiting[0][0] <= loop.time():
                with contextlib.suppress(OSError):  # the device is down or its queue is full: it is lost
                    os.write(target, waiting.popleft()[1])
            if waiting:
                loop.call_at(waiting[0][0], deliver)

        def take() -> None:
            with contextlib.suppress(BlockingIOError):
                while packet := os.read(source, 65_536):
                    at = None if self._is_cut else way.packet(len(packet), loop.time())
                    if at is None:
                        continue
                    waiting.append((at, packet))
                    if len(waiting) == 1:
                        deliver()

        loop.add_reader(source, take)

    def shape(self, quality: Quality) -> None:
        for way in self._ways:
            way.quality = quality

    def cut(self, reset: bool) -> None:
        if reset:
            self._space.reset()
        self._is_cut = True

    def mend(self) -> None:
        self._is_cut = False


class Netem:
    """A veth pair whose two ends netem shapes."""

    def __init__(self, number: int, ports: Sequence[int], _: random.Random) -> None:
        self._space, self._ports = Space(number), ports
        self._quality = Quality()

    def add(self) -> tuple[Sequence[str], Sequence[str]]:
        call("ip", "link", "add", self._space.near, "type", "veth", "peer", "name", self._space.far)
        self._space.join()
        return self._space.prefix, [f"{self._space.servers}:{port}" for port in self._ports]

    def shape(self, quality: Quality) -> None:
        self._quality = quality
        rate = ("rate", f"{quality.rate:.0f}bit", "limit", "100") if quality.rate else ()
        self._set("delay", f"{1000 * quality.delay_s:g}ms", "loss", f"{100 * quality.loss:g}%", *rate)

    def _set(self, *words: str) -> None:
        call("tc", "qdisc", "replace", "dev", self._space.near, "root", "netem", *words)
        call(*self._space.prefix, "tc", "qdisc", "replace", "dev", self._space.far, "root", "netem", *words)

    def cut(self, reset: bool) -> None:
        if reset:
            self._space.reset()
        self._set("loss", "100%")

    def mend(self) -> None:
        self.shape(self._quality)


class Relay:
    """A TCP relay on the loopback interface."""

    def __init__(self, _: int, ports: Sequence[int], draw: random.Random) -> None:
        self._ports = ports
        self._ways = Way(draw), Way(draw)  # to the server, from the server
        self._open = asyncio.Event()
        self._open.set()
        self._refuses = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def add(self) -> tuple[Sequence[str], Sequence[str]]:
        addresses = []
        for port in self._ports:
            server = await asyncio.start_server(self._answer(port), "127.0.0.1", 0)
            addresses.append(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        return (), addresses

    def _answer(self, port: int) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]:
        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._carry(port, reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return connected

    async def _carry(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refuses:
            return writer.transport.abort()
        await self._open.wait()
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:  # nobody listens there
            return writer.transport.abort()
        both = {writer, server_writer}
        self._writers |= both
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(reader, server_writer, self._ways[0]))
                group.create_task(self._pass_on(server_reader, writer, self._ways[1]))
        except* (OSError, RuntimeError):  # uvloop's word for a transport that is closed
            pass
        finally:
            self._writers -= both
            for one in both:
                one.transport.abort()
        return None

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way) -> None:
        now = asyncio.get_running_loop().time
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(16)

        async def deliver() -> None:
            while True:
                at, data = await waiting.get()
                await asyncio.sleep(max(0.0, at - now()))
                await self._open.wait()
                if not data:
                    raise ConnectionResetError  # ends the other direction too
                writer.write(data)
                await writer.drain()

        async with asyncio.TaskGroup() as group:
            group.create_task(deliver())
            while data := await reader.read(4096 if way.quality.rate else 65_536):
                await waiting.put((way.bytes(len(data), now()), data))
            await waiting.put((way.bytes(0, now()), b""))

    def shape(self, quality: Quality) -> None:
        for way in self._ways:
            way.quality = quality

    def cut(self, reset: bool) -> None:
        self._open.clear()
        self._refuses = reset
        for writer in self._writers if reset else ():
            writer.transport.abort()

    def mend(self) -> None:
        self._refuses = False
        self._open.set()


CARRIERS: Final[Mapping[Kind, type[Tunnel | Netem | Relay]]] = {"netem": Netem, "tun": Tunnel, "proxy": Relay}


def _tun(name: str) -> int:
    """A new TUN device; packets as they are, without the driver's own header."""
    tunsetiff, iff_tun, iff_no_pi = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
    descriptor = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, tunsetiff, struct.pack("16sH22x", name.encode(), iff_tun | iff_no_pi))
    return descriptor


def call(*command: str, check: bool = True) -> None:
    """Run a command; raises RuntimeError with its words."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


async def carry(kind: Kind, seed: int) -> None:
    """Do what the lines on standard input say, each answered by one, until there are no more."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    carriers: dict[str, Tunnel | Netem | Relay] = {}
    while line := await reader.readline():
        word, name, *given = json.loads(line)
        try:
            result: Any = None
            match word:
                case "add":
                    made = CARRIERS[kind](len(carriers), given[0], random.Random(f"{seed} {name}"))  # noqa: S311
                    carriers[name] = made
                    result = await made.add() if isinstance(made, Relay) else made.add()
                case "shape":
                    carriers[name].shape(Quality(**given[0]))
                case "cut":
                    carriers[name].cut(given[0])
                case "mend":
                    carriers[name].mend()
            answer: dict[str, Any] = {"result": result}
        except (RuntimeError, OSError, KeyError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


def main() -> None:
    from seqfed.common import loop

    loop.run(carry(_kind(sys.argv[1]), int(sys.argv[2])))


if __name__ == "__main__":
    main()
