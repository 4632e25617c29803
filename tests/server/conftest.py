"""A real daemon in this process over real gRPC, and a client made of raw stubs to drive it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
import grpc_status.rpc_status
import numpy as np
import pytest
from blake3 import blake3
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from hypothesis import settings as hypothesis_settings

from seqfed.common import views, wire
from seqfed.common.errors import every_error
from seqfed.common.layout import Flat
from seqfed.common.spec import RunSpec
from seqfed.common.transfer import CHUNK_BYTES
from seqfed.server.daemon import serving
from seqfed.server.settings import ServerSettings
from seqfed.v1 import admin_pb2, federation_pb2
from seqfed.v1.admin_pb2_grpc import AdminStub
from seqfed.v1.federation_pb2_grpc import FederationStub

PATIENCE: Final = 20.0  # seconds until a test that waits for something gives up
SMALL: Final = {"kind": "rnn", "hidden": 4, "layers": 1}  # 42 parameters
BIG: Final = {"kind": "lstm", "hidden": 256, "layers": 1}  # 266,754 parameters, three chunks on the wire
SCHEMA: Final = b'{"features": 2, "steps": 5, "classes": 2, "examples": 10}'

Metadata = tuple[tuple[str, str], ...]
T = TypeVar("T")

hypothesis_settings.register_profile("seqfed", deadline=None, derandomize=True)
hypothesis_settings.load_profile("seqfed")


def make_spec(**changes: Any) -> RunSpec:
    """A small run of one round for two clients, without evaluation; a dotted key changes one of a table's entries."""
    content: dict[str, Any] = {
        "rounds": 1,
        "data": {"features": 2, "classes": 2},
        "model": dict(SMALL),
        "cohort": {"min_clients": 2, "deadline_s": 600},
        "evaluation": {"every": 0},
    }
    for key, value in changes.items():
        table, _, entry = key.partition("__")
        if entry:
            content.setdefault(table, {})[entry] = value
        else:
            content[key] = value
    return RunSpec.model_validate(content)


def averaged(model: Flat, *updates: tuple[int, Flat]) -> Flat:
    """FedAvg's new model from (weight, delta) of each client, in numpy's own integers."""
    total = sum(np.rint(delta.astype(np.float64) * (weight * 2.0**30)).astype(np.int64) for weight, delta in updates)
    return (model + total / (sum(weight for weight, _ in updates) * 2.0**30)).astype(np.float32)


def flat_of(file: bytes, size: int) -> Flat:
    """The flat vector at the end of one of our model files."""
    return np.frombuffer(file[-4 * size :], "<f4")


def some_delta(size: int, *seed: int) -> Flat:
    """An update's numbers, the same for the same seed."""
    return np.random.default_rng(seed).normal(0, 0.01, size).astype(np.float32)


@contextlib.contextmanager
def typed() -> Iterator[None]:
    """Raises a refused call's error as the class that the server named; other failures as they are."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        status = grpc_status.rpc_status.from_call(error)  # type: ignore[arg-type]  # typed for synchronous calls
        for detail in status.details if status is not None else ():
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info):
                raise every_error()[info.reason](error.details() or "") from error
        raise


async def soon(work: Awaitable[T]) -> T:
    """The work's result; a test that waits in vain fails here."""
    return await asyncio.wait_for(work, PATIENCE)


def framed(message: Message) -> int:
    """Bytes with gRPC's prefix, in frames of 16 KiB."""
    whole = message.ByteSize() + 5
    return whole + 9 * math.ceil(whole / 16_384)


class Site:
    """One data holder's end of the wire, by hand: what it sends is the test's choice, right or wrong."""

    def __init__(self, channel: grpc.aio.Channel, name: str) -> None:
        self.name = name
        self.instance = hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()
        self.stub = FederationStub(channel)
        self.metadata: Metadata = ()
        self.up = self.down = 0  # bytes about runs, from it and to it, as the server is to count them
        self.tasks: asyncio.Queue[views.Task | None] = asyncio.Queue()  # None: the stream has ended
        self._listener: asyncio.Task[None] | None = None

    async def join(self, **changes: Any) -> None:
        """Say hello; `changes` are fields of the request."""
        fields: dict[str, Any] = {
            "protocol": wire.PROTOCOL,
            "client": self.name,
            "instance": self.instance,
            "software": "test",
            "data_schema": SCHEMA,
        }
        with typed():
            reply = await self.stub.Join(federation_pb2.JoinRequest(**{**fields, **changes}))
        self.metadata = ((wire.SESSION_METADATA, reply.session),)

    def listen(self) -> None:
        """Begin to receive tasks into `tasks`."""
        self._listener = asyncio.create_task(self._listen(self.metadata, self.tasks))

    async def _listen(self, metadata: Metadata, tasks: asyncio.Queue[views.Task | None]) -> None:
        known = None
        try:
            async for message in self.stub.Listen(federation_pb2.ListenRequest(), metadata=metadata):
                self.up += 8
                self.down += 8 + framed(message)
                task = wire.task_from_wire(message, known)
                known = task.spec
                tasks.put_nowait(task)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError):
            pass
        finally:
            tasks.put_nowait(None)

    async def come(self, **changes: Any) -> None:
        """Join and listen, with no task left from before."""
        self.tasks = asyncio.Queue()
        await self.join(**changes)
        self.listen()

    async def leave(self) -> None:
        """Stop listening."""
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.wait([self._listener])
            self._listener = None

    async def task(self, kind: views.TaskKind = views.TaskKind.TRAIN) -> views.Task:
        """The next task, which must be of this kind."""
        task = await soon(self.tasks.get())
        assert task is not None, f"{self.name}: the stream ended"
        assert task.kind is kind, (self.name, task.kind, task.key)
        return task

    async def fetch(self, task: views.Task, offset: int = 0) -> bytes:
        """The task's model from this byte on, which must come in order."""
        data = b""
        request = federation_pb2.FetchModelRequest(run=task.key.run, version=task.model.version, offset=offset)
        with typed():
            self.up += 100 + framed(request)
            self.down += 50
            async for chunk in self.stub.FetchModel(request, metadata=self.metadata):
                self.down += framed(chunk)
                assert chunk.offset == offset + len(data)
                data += chunk.data
        return data

    def header(self, task: views.Task, data: bytes, **changes: Any) -> views.UpdateHeader:
        """What announces these bytes; `changes` are fields of the record, and of its key."""
        key = {name: changes.pop(name) for name in ("run", "round", "attempt") if name in changes}
        header = views.UpdateHeader(
            key=replace(task.key, **key),
            weight=1,
            layout_digest=task.model.layout_digest,
            nbytes=len(data),
            digest=blake3(data).digest(),
            offset=0,
            tally={"examples": 1, "loss": 1 << 20},
            training_seconds=0.25,
        )
        return replace(header, **changes)

    async def send(self, header: views.UpdateHeader, chunks: Iterable[tuple[int, bytes]]) -> bool:
        """One SubmitUpdate with exactly these chunks, which then ends; True for a duplicate."""

        async def parts() -> AsyncIterator[federation_pb2.SubmitUpdateRequest]:
            messages = [federation_pb2.SubmitUpdateRequest(header=wire.header_to_wire(header))]
            for offset, data in chunks:
                chunk = federation_pb2.Chunk(offset=offset, data=data)
                messages.append(federation_pb2.SubmitUpdateRequest(chunk=chunk))
            for message in messages:
                self.up += framed(message)
                yield message

        with typed():
            self.up += 100 + 9
            reply = await soon(self.stub.SubmitUpdate(parts(), metadata=self.metadata))
        self.down += 50 + framed(reply)
        return bool(reply.duplicate)

    async def begin(self, header: views.UpdateHeader) -> Upload:
        """A SubmitUpdate that stays open."""
        call: Any = self.stub.SubmitUpdate(metadata=self.metadata)
        await call.write(federation_pb2.SubmitUpdateRequest(header=wire.header_to_wire(header)))
        return Upload(call)

    async def submit(self, task: views.Task, delta: Flat, **changes: Any) -> bool:
        """The whole update as a good client sends it, but for `changes` of its header."""
        data = delta.tobytes()
        header = self.header(task, data, **changes)
        return await self.send(header, chunks(data, header.offset))

    async def status(self, task: views.Task, data: bytes) -> tuple[int, bool]:
        """(bytes that the server has, whether the update is counted)."""
        key = wire.key_to_wire(task.key)
        request = federation_pb2.UploadStatusRequest(key=key, digest=blake3(data).digest())
        with typed():
            reply = await self.stub.UploadStatus(request, metadata=self.metadata)
        self.up += 100 + framed(request)
        self.down += 50 + framed(reply)
        return reply.received_bytes, reply.complete

    async def score(self, task: views.Task, tally: dict[str, int], version: int | None = None) -> bool:
        """Answer an evaluation task; True for a duplicate."""
        request = federation_pb2.SubmitEvaluationRequest(
            key=wire.key_to_wire(task.key), version=task.model.version if version is None else version, tally=tally
        )
        with typed():
            reply = await self.stub.SubmitEvaluation(request, metadata=self.metadata)
        self.up += 100 + framed(request)
        self.down += 50 + framed(reply)
        return bool(reply.duplicate)

    async def fail(self, task: views.Task, reason: str = "DataError", message: str = "no data") -> None:
        """Report that the task cannot be done."""
        request = federation_pb2.ReportFailureRequest(key=wire.key_to_wire(task.key), reason=reason, message=message)
        with typed():
            await self.stub.ReportFailure(request, metadata=self.metadata)


class Upload:
    """A SubmitUpdate under way."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def write(self, offset: int, data: bytes) -> None:
        chunk = federation_pb2.Chunk(offset=offset, data=data)
        await self._call.write(federation_pb2.SubmitUpdateRequest(chunk=chunk))

    def cut(self) -> None:
        """The connection breaks."""
        self._call.cancel()

    async def finish(self, *rest: tuple[int, bytes]) -> bool:
        """Nothing more comes than these chunks; True for a duplicate."""
        with typed():
            for offset, data in rest:
                await self.write(offset, data)
            await self._call.done_writing()
            reply = await soon(self._call)
        self.busy_s: float = reply.busy_s
        return bool(reply.duplicate)


def chunks(data: bytes, start: int = 0) -> list[tuple[int, bytes]]:
    """The chunks of the wire from byte `start` on, cut here by hand."""
    return [(offset, data[offset : offset + CHUNK_BYTES]) for offset in range(start, len(data), CHUNK_BYTES)]


class Daemon:
    """A daemon that serves, and its operator's calls."""

    def __init__(self, address: str, settings: ServerSettings, channel: grpc.aio.Channel) -> None:
        assert settings.state is not None
        self.address = address
        self.settings = settings
        self.state: Path = settings.state
        self.channel = channel
        self.stub = AdminStub(channel)
        self.sites: list[Site] = []

    def site(self, name: str) -> Site:
        """A client that has not joined yet."""
        site = Site(self.channel, name)
        self.sites.append(site)
        return site

    async def leave(self) -> None:
        """All clients stop listening."""
        for site in self.sites:
            await site.leave()

    async def arrive(self, *names: str, **changes: Any) -> list[Site]:
        """Clients that have joined and listen."""
        sites = [self.site(name) for name in names]
        for site in sites:
            await site.come(**changes)
        return sites

    async def submit(self, spec: RunSpec, checkpoint: bytes = b"", digest: bytes | None = None) -> views.RunView:
        """Queue a run, from this file's bytes if there are any."""
        return await self.submit_raw(spec.canonical, checkpoint, digest)

    async def submit_raw(self, spec: bytes, checkpoint: bytes = b"", digest: bytes | None = None) -> views.RunView:
        digest = blake3(checkpoint).digest() if digest is None else digest
        header = admin_pb2.SubmitHeader(spec=spec, checkpoint_bytes=len(checkpoint), checkpoint_digest=digest)

        async def parts() -> AsyncIterator[admin_pb2.SubmitRequest]:
            yield admin_pb2.SubmitRequest(header=header)
            for offset, data in chunks(checkpoint):
                yield admin_pb2.SubmitRequest(chunk=federation_pb2.Chunk(offset=offset, data=data))

        with typed():
            reply = await soon(self.stub.Submit(parts()))
        return wire.run_from_wire(reply.run)

    async def runs(self) -> list[views.RunView]:
        with typed():
            return [wire.run_from_wire(message) async for message in self.stub.ListRuns(admin_pb2.ListRunsRequest())]

    async def clients(self) -> dict[str, views.ClientView]:
        with typed():
            calls = self.stub.ListClients(admin_pb2.ListClientsRequest())
            return {message.client: wire.client_from_wire(message) async for message in calls}

    async def stop(self, run: str) -> views.RunView:
        with typed():
            return wire.run_from_wire(await self.stub.StopRun(admin_pb2.StopRunRequest(run=run)))

    async def watch(self, run: str, after: int = 0) -> AsyncGenerator[views.RunView, None]:
        call = self.stub.WatchRun(admin_pb2.WatchRunRequest(run=run, after_round=after))
        try:
            with typed():
                async for message in call:
                    yield wire.run_from_wire(message)
        finally:
            call.cancel()  # now; left to the garbage collector it would hold up the daemon's stop

    async def until(self, run: str, wanted: Callable[[views.RunView], bool]) -> views.RunView:
        """The first view of the run that is as wanted."""

        async def look() -> views.RunView:
            seen = []
            async with contextlib.aclosing(self.watch(run)) as watched:
                async for view in watched:
                    if wanted(view):
                        return view
                    seen.append((view.phase, view.round, view.reason))
            raise AssertionError(f"the run ended: {seen}")

        return await soon(look())

    async def end(self, run: str) -> views.RunView:
        """The run's last view, with all its rounds."""

        async def look() -> views.RunView:
            seen = [view async for view in self.watch(run)]
            return replace(seen[-1], history=tuple(record for view in seen for record in view.history))

        return await soon(look())

    async def export(self, run: str, offset: int = 0) -> bytes:
        data = b""
        with typed():
            async for chunk in self.stub.ExportModel(admin_pb2.ExportModelRequest(run=run, offset=offset)):
                assert chunk.offset == offset + len(data)
                data += chunk.data
        return data


async def turns_until(wanted: Callable[[], bool]) -> None:
    """Let the event loop turn until this is so."""
    async with asyncio.timeout(PATIENCE):
        while not wanted():  # noqa: ASYNC110 - what a test waits for here tells nobody of itself
            await asyncio.sleep(0)


@contextlib.contextmanager
def busy_database(state: Path) -> Iterator[None]:
    """Another writer holds the daemon's database, so whatever it wants to commit waits for the end of the block."""
    other = sqlite3.connect(state / "seqfed.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


@contextlib.asynccontextmanager
async def a_daemon(state: Path, **changes: Any) -> AsyncIterator[Daemon]:
    """A daemon on a free port of the loopback interface, with its state in this folder; it stops before its clients."""
    settings = ServerSettings(**{"port": 0, "state": state, **changes})
    async with contextlib.AsyncExitStack() as after, serving(settings) as address:
        channel = await after.enter_async_context(grpc.aio.insecure_channel(address))
        daemon = Daemon(address, settings, channel)
        after.push_async_callback(daemon.leave)
        yield daemon


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with a_daemon(tmp_path / "state") as running:
        yield running
