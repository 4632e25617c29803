"""What a server gets to see: every byte that its clients send, and, from outside, its files and its memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

PIECE = 1 << 16
PAGE = 4096  # bytes; every region is made of them


@dataclass
class Line:
    """A way to a server. `heard`: what has gone to it, connection by connection; `answered`: what has come back."""

    address: str = ""
    heard: list[bytearray] = field(default_factory=list)
    answered: list[bytearray] = field(default_factory=list)

    def holds(self, needle: bytes) -> bool:
        return any(needle in one for one in self.heard)


@contextlib.asynccontextmanager
async def tapped(server: str) -> AsyncIterator[Line]:
    """Another address of this plaintext server, at which one listens in."""
    host, _, port = server.rpartition(":")
    line, tasks = Line(), set[asyncio.Task[None]]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own = asyncio.current_task()
        assert own is not None
        tasks.add(own)
        there, back = await asyncio.open_connection(host, int(port))
        heard, answered = bytearray(), bytearray()
        line.heard.append(heard)
        line.answered.append(answered)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(_pass(reader, back, heard), _pass(there, writer, answered))
        back.close()
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    line.address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield line
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, into: bytearray) -> None:
    while data := await reader.read(PIECE):
        into += data
        writer.write(data)
        await writer.drain()
    writer.close()


def files_of(folder: Path) -> Iterator[bytes]:
    """The content of everything in a folder."""
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # it may be gone by now
            if path.is_file():
                yield path.read_bytes()


def memory_of(pid: int) -> Iterator[bytes]:
    """All that a process may write to of its memory (Linux), without the empty pages. Raises OSError where nobody may look."""
    regions = Path(f"/proc/{pid}/maps").read_text().splitlines()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for region in regions:
            place, rights, *_ = region.split()
            start, end = (int(one, 16) for one in place.split("-"))
            if rights.startswith("rw"):
                with contextlib.suppress(OSError, ValueError):  # a guard page, say
                    memory.seek(start)
                    pages = np.frombuffer(memory.read(end - start), np.uint8).reshape(-1, PAGE)
                    yield pages[pages.any(axis=1)].tobytes()
