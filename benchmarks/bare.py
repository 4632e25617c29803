"""The bare counterpart of a round: the same bytes between the same number of processes over plain gRPC calls, and no more.

A server says go to every client over a stream; each client downloads a vector over one streaming call into memory of its
own and uploads another over a second call, in messages of 512 KiB (the contract's own Chunk), which the server puts
together in memory. No checks, sums, files or database. Each side is a process: `python -m benchmarks.bare server|client`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc

from seqfed.common.transfer import CHUNK_BYTES
from seqfed.v1.federation_pb2 import Chunk


class Bare:
    """Running processes that do bare rounds when told to."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def rounds(self, count: int) -> list[float]:
        """Do so many rounds; their wall times in seconds."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(count, file=self._server.stdin, flush=True)
        return [float(one) for one in json.loads(self._server.stdout.readline())]


@contextlib.contextmanager
def running(clients: int, size: int) -> Iterator[Bare]:
    """A bare server and so many client processes, for `size` bytes down and up for each client in every round."""
    command = [sys.executable, "-m", "benchmarks.bare"]
    pipe = subprocess.PIPE
    server = subprocess.Popen([*command, "server", str(clients), str(size)], stdin=pipe, stdout=pipe, text=True)
    started: list[subprocess.Popen[Any]] = [server]
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        started += [subprocess.Popen([*command, "client", port, str(size)]) for _ in range(clients)]
        yield Bare(server)
    finally:
        for process in started:
            process.terminate()
            process.wait()


def chunks_of(vector: memoryview) -> Iterator[Chunk]:
    """The vector as messages."""
    for start in range(0, len(vector), CHUNK_BYTES):
        yield Chunk(offset=start, data=bytes(vector[start : start + CHUNK_BYTES]))


def vector_of(size: int) -> memoryview:
    """Memory that has been written once, as a model's has."""
    return memoryview(bytearray(bytes(range(256)) * (size // 256 + 1)))[:size]


async def put_together(messages: AsyncIterator[Chunk], into: memoryview) -> None:
    """Copy every message to its place."""
    received = 0
    async for one in messages:
        into[one.offset : one.offset + len(one.data)] = one.data
        received += len(one.data)
    assert received == len(into)


async def serve(clients: int, size: int) -> None:
    """Print the port; then for each line with a number do as many rounds and print their seconds as JSON."""
    model = vector_of(size)
    rooms = [vector_of(size) for _ in range(clients)]
    queues: list[asyncio.Queue[bytes]] = []
    joined, arrived = asyncio.Semaphore(0), asyncio.Semaphore(0)

    async def go(_: bytes, __: Any) -> AsyncIterator[bytes]:
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        queues.append(queue)
        joined.release()
        while True:
            yield await queue.get()

    async def down(_: bytes, __: Any) -> AsyncIterator[Chunk]:
        for one in chunks_of(model):
            yield one

    async def up(messages: AsyncIterator[Chunk], _: Any) -> bytes:
        room = rooms.pop()
        await put_together(messages, room)
        rooms.append(room)
        arrived.release()
        return b"."

    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Go": grpc.unary_stream_rpc_method_handler(go),
        "Down": grpc.unary_stream_rpc_method_handler(down, response_serializer=Chunk.SerializeToString),
        "Up": grpc.stream_unary_rpc_method_handler(up, request_deserializer=Chunk.FromString),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Bare", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    for _ in range(clients):
        await joined.acquire()
    while line := await asyncio.to_thread(sys.stdin.readline):
        times = []
        for _ in range(int(line)):
            begun = time.perf_counter()
            for queue in queues:
                queue.put_nowait(b"go")
            for _ in range(clients):
                await arrived.acquire()
            times.append(time.perf_counter() - begun)
        print(json.dumps(times), flush=True)
    await server.stop(0)


async def take_part(port: str, size: int) -> None:
    """Download and upload at every go."""
    update, room = vector_of(size), vector_of(size)

    async def messages() -> AsyncIterator[Chunk]:
        for one in chunks_of(update):
            yield one

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        calls: Any = channel  # without generated stubs the methods' types stay open
        go = calls.unary_stream("/Bare/Go")
        down = calls.unary_stream("/Bare/Down", response_deserializer=Chunk.FromString)
        up = calls.stream_unary("/Bare/Up", request_serializer=Chunk.SerializeToString)
        try:
            async for _ in go(b""):
                await put_together(down(b""), room)
                await up(messages())
        except grpc.aio.AioRpcError:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    roles = parser.add_subparsers(dest="role", required=True)
    server = roles.add_parser("server")
    for name in ("clients", "size"):
        server.add_argument(name, type=int)
    client = roles.add_parser("client")
    client.add_argument("port")
    client.add_argument("size", type=int)
    given = parser.parse_args()
    if given.role == "server":
        asyncio.run(serve(given.clients, given.size))
    else:
        asyncio.run(take_part(given.port, given.size))


if __name__ == "__main__":
    main()
