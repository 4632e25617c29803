"""Attacks on a server's memory. The server is a process of its own, whose resident memory is looked at before and after.

What gRPC itself refuses (too much metadata, too large or compressed messages) ends before any code of the server's runs: there
is a status without a class of ours, and no line in the audit log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import psutil
import pytest
from tests.integration.hostile.siege import ADMIN, FEDERATION, OTHER_SCHEMA, Siege, besieged, check_log, prepared
from tests.server.conftest import busy_database, make_spec, typed
from tests.server.members import Guarded

from seqfed.client.demo.processes import Processes, processes, server_address
from seqfed.common import authority, identity, signing
from seqfed.common.errors import BrokenTransfer, InvalidName, TooLarge, WrongRound
from seqfed.common.identity import Role, save_credentials
from seqfed.server.settings import ServerSettings
from seqfed.v1 import admin_pb2, federation_pb2

MIB: Final = 1 << 20
ROOM: Final = 48 * MIB  # that the server may grow by: what one connection may have on its way, and Python's own heap
EXHAUSTED: Final = grpc.StatusCode.RESOURCE_EXHAUSTED


@contextlib.asynccontextmanager
async def besieged_process(
    folder: Path, started: Processes, **changes: Any
) -> AsyncIterator[tuple[Siege, psutil.Process]]:
    """As `besieged`, with a server that is a process."""
    ca = authority.create(folder / "ca", identity.now())
    tls, state, ours = folder / "tls", folder / "state", folder / "ca"
    save_credentials(tls, ca.credentials(Role.SERVER, "server", now=identity.now(), hosts=("localhost", "127.0.0.1")))
    lines = [f'tls = "{tls}"', f'ca = "{ours}"', "enroll_port = 0"]
    lines += [f"{name} = {json.dumps(value)}" for name, value in changes.items()]
    (folder / "server.toml").write_text("\n".join(lines))
    started.start("server", "server", str(folder / "server.toml"), "--port", "0", "--state", str(state))
    address = await asyncio.to_thread(server_address, state, started)
    settings = ServerSettings(port=0, state=state, tls=tls, ca=ours, **changes)
    async with contextlib.AsyncExitStack() as after:
        siege = await prepared(Guarded(address, settings, ca, after))
        yield siege, psutil.Process(started.pid("server"))
        await siege.goes_on()
        await asyncio.to_thread(started.stop)
    check_log(state, siege)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Processes]:
    with processes(tmp_path / "logs") as found:
        yield found


def signed_header(siege: Siege, **changes: Any) -> admin_pb2.SubmitRequest:
    spec, own = make_spec().canonical, siege.server.operator
    fields = {"spec": spec, "signature": signing.sign(spec, own.key), "certificate": own.certificate, **changes}
    return admin_pb2.SubmitRequest(header=admin_pb2.SubmitHeader(**fields))


# Each: what is sent, in an identity's own name.


async def zip_bombs(siege: Siege) -> None:
    """64 MiB of zeros in 64 KiB, to both ports, as a message and amid a stream."""
    channel, zeros = await siege.server.channel(Role.CLIENT, "m"), bytes(64 * MIB)
    nobody = grpc.ssl_channel_credentials(siege.server.ca.pem)
    async with grpc.aio.secure_channel(siege.counter, nobody) as counter:
        for how in (grpc.Compression.Gzip, grpc.Compression.Deflate):
            unary: Any = channel.unary_unary(FEDERATION + "UploadStatus")
            stream: Any = channel.stream_unary(FEDERATION + "SubmitUpdate")
            enrol: Any = counter.unary_unary("/seqfed.v1.Enrollment/Enroll")
            for call, message in ((unary, zeros), (stream, iter([zeros])), (enrol, zeros)):
                siege.perhaps.append(("client:m", FEDERATION + "SubmitUpdate", "UnknownSession"))
                with siege.unheard(grpc.StatusCode.UNIMPLEMENTED, EXHAUSTED):
                    await call(message, compression=how)


async def header_floods(siege: Siege) -> None:
    desk = await siege.desk(Role.OPERATOR, "mallory")
    request = admin_pb2.StopRunRequest(run="none")
    for number, size in ((1, 9_000), (200, 20)):
        with siege.refused(TooLarge, "operator:mallory", ADMIN + "StopRun", "max_metadata_bytes"):
            await desk.StopRun(request, metadata=tuple((f"h{n}", "x" * size) for n in range(number)))
    for number, size in ((1, 64 << 10), (5_000, 20), (1, 4 * MIB), (100, 64 << 10)):
        siege.perhaps.append(
            ("operator:mallory", ADMIN + "StopRun", "TooLarge")
        )  # where the call comes before its end does
        with siege.unheard(EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL):
            await desk.StopRun(request, metadata=tuple((f"h{n}", "x" * size) for n in range(number)))


async def oversized_messages(siege: Siege) -> None:
    stub = (await siege.outsider()).stub
    for size in (5 * MIB, 100 * MIB):
        with siege.unheard(EXHAUSTED):
            await stub.UploadStatus(federation_pb2.UploadStatusRequest(digest=bytes(size)))
        siege.perhaps.append(("client:b", FEDERATION + "SubmitUpdate", "BrokenTransfer"))
        with siege.unheard(EXHAUSTED):
            chunk = federation_pb2.Chunk(data=bytes(size))
            await siege.b.stub.SubmitUpdate(
                iter([federation_pb2.SubmitUpdateRequest(chunk=chunk)]), metadata=siege.b.metadata
            )


async def a_billion_chunks(siege: Siege) -> None:
    """A checkpoint of 10^9 bytes, one byte a message, as fast as they go: over after the first one."""
    sent = 0

    async def parts() -> AsyncIterator[admin_pb2.SubmitRequest]:
        nonlocal sent
        yield signed_header(siege, checkpoint_bytes=10**9, checkpoint_digest=bytes(32))
        for sent in range(10**9):
            yield admin_pb2.SubmitRequest(chunk=federation_pb2.Chunk(offset=sent, data=b"x"))

    with siege.refused(BrokenTransfer, "operator:ops", ADMIN + "Submit", "a chunk of 1 bytes"):
        await (await siege.server.desk()).Submit(parts())
    assert sent < 200_000, sent


async def empty_messages(siege: Siege) -> None:
    """The same, of messages in which there is nothing at all."""

    async def parts() -> AsyncIterator[federation_pb2.SubmitUpdateRequest]:
        while True:
            yield federation_pb2.SubmitUpdateRequest()

    with siege.refused(BrokenTransfer, "client:b", FEDERATION + "SubmitUpdate"):
        await siege.b.stub.SubmitUpdate(parts(), metadata=siege.b.metadata)


async def checkpoints_that_are_none(siege: Siege) -> None:
    desk = await siege.server.desk()
    with siege.refused(TooLarge, "operator:ops", ADMIN + "Submit", "max_model_bytes"):
        await desk.Submit(iter([signed_header(siege, checkpoint_bytes=(1 << 64) - 1, checkpoint_digest=bytes(32))]))


async def joins(siege: Siege) -> None:
    """One client that comes again and again."""
    m = await siege.outsider(listens=False)
    for _ in range(5):
        with siege.refused(InvalidName, "client:m", FEDERATION + "Join"):
            await m.join(instance="x" * 4_000_000)
    for _ in range(300):
        await m.join(data_schema=OTHER_SCHEMA)


async def words(siege: Siege) -> None:
    """Messages of a client about a failure and itself, each as long as a message may be."""
    m = await siege.outsider(listens=False)
    for _ in range(10):
        await m.join(data_schema=OTHER_SCHEMA, software="x" * 3_000_000)
        key = federation_pb2.TaskKey(run=siege.run, round=2, attempt=1)
        long = federation_pb2.ReportFailureRequest(key=key, reason="y" * 1_000_000, message="z" * 2_000_000)
        with pytest.raises(WrongRound), typed():
            await m.stub.ReportFailure(long, metadata=m.metadata)


FLOODS: dict[str, Callable[[Siege], Awaitable[None]]] = {
    one.__name__: one
    for one in (
        zip_bombs,
        header_floods,
        oversized_messages,
        a_billion_chunks,
        empty_messages,
        checkpoints_that_are_none,
        joins,
        words,
    )
}


@pytest.mark.slow
async def test_no_flood_grows_the_server(tmp_path: Path, started: Processes) -> None:
    async with besieged_process(tmp_path, started, joins_per_minute=1_000, joins_per_s=1e6) as (siege, process):
        grown = {}
        for name, flood in FLOODS.items():
            before = process.memory_info().rss
            await flood(siege)
            await siege.waits()
            grown[name] = process.memory_info().rss - before
        assert max(grown.values()) < ROOM, grown


async def test_who_joins_again_and_again_is_written_down_once_at_a_time(tmp_path: Path) -> None:
    """Each of these tasks would hold what its client says of its data: megabytes, as often as it likes."""
    async with besieged(tmp_path) as siege:
        m, most = await siege.outsider(listens=False), 0
        with busy_database(tmp_path / "state"):
            for _ in range(20):
                await m.join(data_schema=OTHER_SCHEMA)
                tasks = [one for one in asyncio.all_tasks() if "Coordinator._remember" in repr(one.get_coro())]
                most = max(most, len(tasks))
    assert most == 1
