"""The bare counterpart of a round: the same bytes between the same number of processes over plain gRPC calls, and no more.

A server says go to every client over a stream, each client downloads the bytes over one streaming call and uploads as many
over another, in chunks of 512 KiB without protobuf, checks or files. Run as a process with a role:
`python -m benchmarks.bare server|client ...`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from seqfed.common.transfer import CHUNK_BYTES


def measure(clients: int, size: int, rounds: int) -> float:
    """Median milliseconds of a bare round of `size` bytes down and up for each of so many client processes."""
    command = [sys.executable, "-m", "benchmarks.bare"]
    server = subprocess.Popen(
        [*command, "server", str(clients), str(size), str(rounds)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    others = [subprocess.Popen([*command, "client", port, str(size)]) for _ in range(clients)]
    times = json.loads(server.stdout.readline())
    started: list[subprocess.Popen[Any]] = [server, *others]
    for process in started:
        process.terminate()
        process.wait()
    return 1000 * float(statistics.median(times[1:]))


async def serve(clients: int, size: int, rounds: int) -> None:
    """Drive the rounds; prints the port, then the rounds' seconds as JSON."""
    chunk = bytes(CHUNK_BYTES)
    queues: list[asyncio.Queue[bytes]] = []
    joined, arrived = asyncio.Semaphore(0), asyncio.Semaphore(0)

    async def go(_: bytes, __: Any) -> AsyncIterator[bytes]:
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        queues.append(queue)
        joined.release()
        while True:
            yield await queue.get()

    async def down(_: bytes, __: Any) -> AsyncIterator[bytes]:
        for start in range(0, size, CHUNK_BYTES):
            yield chunk if size - start >= CHUNK_BYTES else chunk[: size - start]

    async def up(chunks: AsyncIterator[bytes], _: Any) -> bytes:
        received = 0
        async for one in chunks:
            received += len(one)
        assert received == size
        arrived.release()
        return b"."

    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Go": grpc.unary_stream_rpc_method_handler(go),
        "Down": grpc.unary_stream_rpc_method_handler(down),
        "Up": grpc.stream_unary_rpc_method_handler(up),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Bare", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    for _ in range(clients):
        await joined.acquire()
    times = []
    for _ in range(rounds):
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
    chunk = bytes(CHUNK_BYTES)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, size, CHUNK_BYTES):
            yield chunk if size - start >= CHUNK_BYTES else chunk[: size - start]

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        go, down, up = (
            channel.unary_stream("/Bare/Go"),
            channel.unary_stream("/Bare/Down"),
            channel.stream_unary("/Bare/Up"),
        )
        try:
            async for _ in go(b""):
                received = 0
                async for one in down(b""):
                    received += len(one)
                assert received == size
                await up(chunks())
        except grpc.aio.AioRpcError:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    roles = parser.add_subparsers(dest="role", required=True)
    server = roles.add_parser("server")
    for name in ("clients", "size", "rounds"):
        server.add_argument(name, type=int)
    client = roles.add_parser("client")
    client.add_argument("port")
    client.add_argument("size", type=int)
    given = parser.parse_args()
    if given.role == "server":
        asyncio.run(serve(given.clients, given.size, given.rounds))
    else:
        asyncio.run(take_part(given.port, given.size))


if __name__ == "__main__":
    main()
