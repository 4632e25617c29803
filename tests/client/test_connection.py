"""Each call over real gRPC, to a server that does as it is told."""

# ruff: noqa: N802 - the .proto files name the calls
from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
from blake3 import blake3

from seqfed.client.channel import connected
from seqfed.client.connection import AHEAD, Connection
from seqfed.common import wire_masking
from seqfed.common.errors import BrokenTransfer, MaskingRefused, ServerUnavailable, TrainingFailed
from seqfed.common.masking.messages import Confirm, Reply, Survivors
from seqfed.common.schema import DataSchema
from seqfed.common.transfer import CHUNK_BYTES, Reassembly
from seqfed.common.views import Progress, Stage, TaskKey, UpdateHeader
from seqfed.common.wire import SESSION_METADATA
from seqfed.v1 import federation_pb2, federation_pb2_grpc

KEY = TaskKey("run", 3, 2)
DATA = np.arange(300_000, dtype="<f4").tobytes()
DIGEST = blake3(DATA).digest()
SMALL = 64 << 10
B_ALONE = Survivors(frozenset("b"))
SCHEMA = DataSchema(features=1, examples=1, validation_examples=0)

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass
class Fake(federation_pb2_grpc.FederationServicer):
    """Remembers what came; reads an upload's chunks only as `room` lets it."""

    spread: float = 7.0
    messages: list[Any] = field(default_factory=list)
    sessions: list[Any] = field(default_factory=list)
    received: int = 0
    room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1 << 20))
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    held: asyncio.Event = field(default_factory=asyncio.Event)
    reply: Reply = B_ALONE  # to a step of a masked sum, as soon as it is not held any more
    deadlines: list[float | None] = field(default_factory=list)

    def _note(self, message: Any, context: Context) -> None:
        self.messages.append(message)
        self.sessions.append(dict(context.invocation_metadata() or ()).get(SESSION_METADATA))

    async def Join(self, request: federation_pb2.JoinRequest, context: Context) -> federation_pb2.JoinReply:
        self._note(request, context)
        return federation_pb2.JoinReply(session="s", spread_s=self.spread)

    async def Listen(
        self, request: federation_pb2.ListenRequest, context: Context
    ) -> AsyncIterator[federation_pb2.Task]:
        self.asked.set()
        await asyncio.Event().wait()
        yield federation_pb2.Task()

    async def FetchModel(
        self, request: federation_pb2.FetchModelRequest, context: Context
    ) -> AsyncIterator[federation_pb2.Chunk]:
        self._note(request, context)
        for offset in range(request.offset, len(DATA), request.chunk_bytes):
            yield federation_pb2.Chunk(offset=offset, data=DATA[offset : offset + request.chunk_bytes])

    async def UploadStatus(
        self, request: federation_pb2.UploadStatusRequest, context: Context
    ) -> federation_pb2.UploadStatusReply:
        self._note(request, context)
        for _ in range(AHEAD):
            self.room.release()
        return federation_pb2.UploadStatusReply(received_bytes=self.received)

    async def SubmitUpdate(
        self, request_iterator: AsyncIterator[federation_pb2.SubmitUpdateRequest], context: Context
    ) -> federation_pb2.SubmitUpdateReply:
        async for message in request_iterator:
            if message.WhichOneof("part") == "chunk":
                await self.room.acquire()
                assert message.chunk.offset == self.received
                self.received += len(message.chunk.data)
            self._note(message, context)
        return federation_pb2.SubmitUpdateReply(busy_s=1.5)

    async def Mask(self, request: federation_pb2.MaskRequest, context: Context) -> federation_pb2.MaskReply:
        self._note(request, context)
        self.deadlines.append(context.time_remaining())
        self.asked.set()
        await self.held.wait()
        return wire_masking.reply_to_wire(self.reply, ["a", "b"])

    async def ReportProgress(
        self, request: federation_pb2.ReportProgressRequest, context: Context
    ) -> federation_pb2.ReportProgressReply:
        self._note(request, context)
        return federation_pb2.ReportProgressReply()

    async def SubmitEvaluation(
        self, request: federation_pb2.SubmitEvaluationRequest, context: Context
    ) -> federation_pb2.SubmitEvaluationReply:
        self._note(request, context)
        return federation_pb2.SubmitEvaluationReply(duplicate=True)

    async def ReportFailure(
        self, request: federation_pb2.ReportFailureRequest, context: Context
    ) -> federation_pb2.ReportFailureReply:
        self._note(request, context)
        return federation_pb2.ReportFailureReply()

    async def Renew(self, request: federation_pb2.RenewRequest, context: Context) -> federation_pb2.Certificate:
        self._note(request, context)
        return federation_pb2.Certificate(certificate=b"new", ca=b"theirs")


@contextlib.asynccontextmanager
async def joined(fake: Fake, working: TaskKey | None = None) -> AsyncIterator[tuple[Connection, float]]:
    server = grpc.aio.server()
    federation_pb2_grpc.add_FederationServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with connected(f"127.0.0.1:{port}", insecure=False) as channel:
            connection = Connection(channel, f"127.0.0.1:{port}")
            yield connection, await connection.join("ward", "0" * 32, SCHEMA, working)
    finally:
        await server.stop(None)


def header(offset: int = 0) -> UpdateHeader:
    return UpdateHeader(KEY, 1, b"layout", len(DATA), DIGEST, offset, {}, 1.0)


@pytest.mark.parametrize("working", [None, KEY])
async def test_joining_says_what_is_in_hand_and_hears_of_the_spread(working: TaskKey | None) -> None:
    fake = Fake()
    async with joined(fake, working) as (_, spread):
        assert spread == 7.0
    (hello,) = fake.messages
    assert hello.HasField("working") == (working is not None)
    assert (hello.working.run, hello.working.round, hello.working.attempt) == (("run", 3, 2) if working else ("", 0, 0))


@pytest.mark.parametrize(
    ("spread", "kept"), [(-1.0, 0.0), (float("nan"), 0.0), (75.0, 75.0), (float("inf"), 600.0), (1e9, 600.0)]
)
async def test_a_spread_is_kept_within_reason(spread: float, kept: float) -> None:
    async with joined(Fake(spread=spread)) as (_, heard):
        assert heard == kept


@pytest.mark.parametrize("size", [SMALL, CHUNK_BYTES])
async def test_a_model_comes_in_chunks_of_the_size_asked_for(size: int) -> None:
    fake, into, sizes = Fake(), bytearray(DATA[:SMALL]), []

    def sink(_: int, data: bytes) -> None:
        into.extend(data)
        sizes.append(len(data))

    whole = Reassembly(len(DATA), DIGEST, lambda offset, data: None)
    whole.add(0, DATA[:SMALL])
    whole._sink = sink
    async with joined(fake) as (connection, _):
        await connection.fetch_model("run", 4, whole, size)
    assert bytes(into) == DATA
    assert set(sizes[:-1]) == {size}
    asked = fake.messages[-1]
    assert (asked.run, asked.version, asked.offset, asked.chunk_bytes) == ("run", 4, SMALL, size)


async def test_full_chunks_are_sent_without_a_question() -> None:
    fake, sent = Fake(), list[int]()
    async with joined(fake) as (connection, _):
        assert await connection.submit_update(header(), memoryview(DATA), CHUNK_BYTES, sent.append) == 1.5
    assert fake.received == len(DATA)
    assert sent == list(range(0, len(DATA), CHUNK_BYTES))
    assert not [one for one in fake.messages if isinstance(one, federation_pb2.UploadStatusRequest)]


async def test_of_small_chunks_only_a_few_are_on_their_way() -> None:
    fake = Fake(room=asyncio.Semaphore(AHEAD))  # a slow reader: each question lets a few more chunks in
    ahead: list[int] = []
    async with joined(fake) as (connection, _):
        await connection.submit_update(
            header(), memoryview(DATA), SMALL, lambda offset: ahead.append(offset - fake.received)
        )
    assert fake.received == len(DATA)
    assert max(ahead) <= AHEAD * SMALL


async def test_progress() -> None:
    fake = Fake()
    async with joined(fake) as (connection, _):
        await connection.report_progress(KEY, Progress(Stage.TRAINING, 5, 9, 2, 0.5))
    told = fake.messages[-1]
    assert (told.key.round, told.stage, told.done, told.total, told.epoch, told.loss) == (
        *(3, federation_pb2.STAGE_TRAINING, 5, 9, 2, 0.5),
    )
    assert fake.sessions == [None, "s"]


async def test_the_answers_to_tasks() -> None:
    fake = Fake()
    async with joined(fake) as (connection, _):
        assert await connection.submit_evaluation(KEY, 5, {"examples": 3})
        await connection.report_failure(KEY, TrainingFailed("nan"))
    scores, failure = fake.messages[-2:]
    assert (scores.key.attempt, scores.version, dict(scores.tally)) == (2, 5, {"examples": 3})
    assert (failure.reason, failure.message) == ("TrainingFailed", "nan")


async def test_whoever_still_waits_when_the_connection_closes_hears_that_it_closed() -> None:
    fake = Fake()
    async with contextlib.AsyncExitStack() as stack:
        connection, _ = await stack.enter_async_context(joined(fake))
        waiting = asyncio.ensure_future(anext(aiter(connection.listen())))
        await fake.asked.wait()
    with pytest.raises(ServerUnavailable, match="was closed"):  # and not CancelledError: nobody cancelled it
        await waiting


async def test_a_cancelled_call_is_cancelled_and_nothing_else() -> None:
    fake = Fake()
    async with joined(fake) as (connection, _):
        waiting = asyncio.ensure_future(anext(aiter(connection.listen())))
        await fake.asked.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_a_step_of_a_masked_sum_is_answered_whenever_the_others_are_there() -> None:
    fake = Fake()
    async with joined(fake) as (connection, _):
        step = asyncio.ensure_future(connection.mask(KEY, 7, Confirm(bytes(64)), ["a", "b"]))
        await fake.asked.wait()
        assert not step.done()
        fake.held.set()
        assert await step == B_ALONE
    asked = fake.messages[-1]
    assert (asked.key.attempt, asked.number, asked.confirm.signature) == (2, 7, bytes(64))
    assert fake.deadlines == [None]
    assert fake.sessions == [None, "s"]


async def test_an_answer_that_does_not_fit_the_roster_is_refused() -> None:
    fake = Fake()
    fake.held.set()
    async with joined(fake) as (connection, _):
        with pytest.raises(MaskingRefused, match="beyond the roster's 1"):
            await connection.mask(KEY, 7, Confirm(bytes(64)), ["a"])


async def test_a_step_that_is_held_ends_with_its_task_or_its_connection() -> None:
    fake = Fake()
    async with contextlib.AsyncExitStack() as stack:
        connection, _ = await stack.enter_async_context(joined(fake))
        cancelled, closed = (asyncio.ensure_future(connection.mask(KEY, 7, Confirm(bytes(64)))) for _ in range(2))
        await fake.asked.wait()
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
    with pytest.raises(ServerUnavailable):
        await closed


async def test_what_stops_short_is_a_broken_transfer() -> None:
    whole = Reassembly(len(DATA) + 4, DIGEST, lambda offset, data: None)
    async with joined(Fake()) as (connection, _):
        with pytest.raises(BrokenTransfer, match="ended at byte"):
            await connection.fetch_model("run", 4, whole)
    assert whole.received == len(DATA)


async def test_a_renewal_sends_the_request_alone_and_takes_the_certificate_alone() -> None:
    fake = Fake()
    async with joined(fake) as (connection, _):
        assert await connection.renew(b"csr") == b"new"
    assert fake.messages[-1] == federation_pb2.RenewRequest(csr=b"csr")
