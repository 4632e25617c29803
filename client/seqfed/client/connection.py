"""The client's half of the Federation service: each method is one call, in the records of `views`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

import grpc

import seqfed.client
from seqfed.client.channel import ANSWER_S, raising
from seqfed.common import views, wire, wire_masking
from seqfed.common.errors import ConfigError, SeqfedError, VersionMismatch
from seqfed.common.schema import DataSchema
from seqfed.common.transfer import CHUNK_BYTES, Reassembly, split
from seqfed.common.wire_masking import Reply, Request
from seqfed.v1 import federation_pb2
from seqfed.v1.federation_pb2_grpc import FederationStub

AHEAD: Final = 2  # chunks: one arrives while the other follows
AGAIN_S: Final = 0.25  # seconds from one look at what has arrived to the next
LONGEST_SPREAD: Final = 600.0  # seconds; a server that asks for more is not obeyed


class Connection:
    """One joined session over one channel. Every method raises the typed error of `channel.raising`."""

    def __init__(self, channel: grpc.aio.Channel, address: str) -> None:
        self._stub = FederationStub(channel)
        self._address = address
        self._metadata: tuple[tuple[str, str], ...] = ()

    async def join(
        self,
        client: str,
        instance: str,
        schema: DataSchema,
        working: views.TaskKey | None = None,
        holds: bytes = b"",
    ) -> float:
        """Say hello; every other method needs it. `working`: the task in hand, which goes on. holds: the newest model's BLAKE3.

        Returns over how many seconds to spread the next dialling if this server is lost, so that not all come back at once.
        """
        request = federation_pb2.JoinRequest(
            protocol=wire.PROTOCOL,
            client=client,
            instance=instance,
            software=seqfed.client.__version__,
            data_schema=schema.model_dump_json().encode(),
            working=None if working is None else wire.key_to_wire(working),
            holds=holds,
        )
        with raising(self._address):
            reply = await self._stub.Join(request, timeout=ANSWER_S)
        self._metadata = ((wire.SESSION_METADATA, reply.session),)
        return min(reply.spread_s, LONGEST_SPREAD) if reply.spread_s > 0 else 0.0

    async def listen(self) -> AsyncIterator[views.Task]:
        """The server's tasks, until the stream ends; one that this version does not understand is declined."""
        known = None
        with raising(self._address):
            async for message in self._stub.Listen(federation_pb2.ListenRequest(), metadata=self._metadata):
                try:
                    task = wire.task_from_wire(message, known)
                    known = task.spec
                except (ConfigError, VersionMismatch) as error:
                    known = None  # it was sent, and not understood: what relies on it is not either
                    await self.report_failure(wire.key_from_wire(message.key), error)
                    continue
                yield task

    async def fetch_model(
        self, run: str, version: int, into: Reassembly, size: int = CHUNK_BYTES, *, step: bool = False
    ) -> None:
        """The model's bytes from where `into` stands to their end, checked, in chunks of `size` bytes.

        At a break, `into` keeps what has come. step: not the version's but those of the payload that leads to it.
        """
        request = federation_pb2.FetchModelRequest(
            run=run, version=version, offset=into.received, chunk_bytes=size, step=step
        )
        with raising(self._address):
            async for chunk in self._stub.FetchModel(request, metadata=self._metadata):
                into.add(chunk.offset, chunk.data)
        into.finish()

    async def upload_status(self, key: views.TaskKey, digest: bytes) -> tuple[int, bool]:
        """(bytes that the server holds, whether the update is counted already)."""
        request = federation_pb2.UploadStatusRequest(key=wire.key_to_wire(key), digest=digest)
        with raising(self._address):
            reply = await self._stub.UploadStatus(request, metadata=self._metadata, timeout=ANSWER_S)
        return reply.received_bytes, reply.complete

    async def submit_update(
        self,
        header: views.UpdateHeader,
        delta: memoryview,
        size: int = CHUNK_BYTES,
        sent: Callable[[int], None] = lambda _: None,
    ) -> float:
        """Send the update from header.offset on, in chunks of `size` bytes; seconds that it waited for the server, not the link.

        Of chunks smaller than CHUNK_BYTES, which is what a slow link has, no more than AHEAD are on their way: gRPC would
        put megabytes into the system's buffers, where pings wait behind them until the connection is taken for dead.

        sent: told how many of its bytes have been handed to the connection.
        """

        async def parts() -> AsyncIterator[federation_pb2.SubmitUpdateRequest]:
            yield federation_pb2.SubmitUpdateRequest(header=wire.header_to_wire(header))
            there = header.offset
            for offset, data in split(delta, header.offset, size):
                while size < CHUNK_BYTES and offset - there >= AHEAD * size:
                    before = there
                    there, _ = await self.upload_status(header.key, header.digest)
                    if there <= before:  # it waits for room at the server, or for a link slower than was thought
                        await asyncio.sleep(AGAIN_S)
                sent(offset)
                request = federation_pb2.SubmitUpdateRequest()  # a Chunk made apart would be copied into it
                request.chunk.offset, request.chunk.data = offset, data
                yield request

        with raising(self._address):
            reply = await self._stub.SubmitUpdate(parts(), metadata=self._metadata)
        return reply.busy_s

    async def mask(self, key: views.TaskKey, number: int, step: Request, names: Sequence[str] = ()) -> Reply:
        """Take a step of a masked sum; the answer comes once everybody has. The same step may be sent again.

        names: the roster's, as soon as there is one. Raises MaskingRefused for an answer that is none.
        """
        request = wire_masking.request_to_wire(key, number, step)
        with raising(self._address):  # without a deadline: the server has one, and keepalive finds the dead
            reply = await self._stub.Mask(request, metadata=self._metadata)
        return wire_masking.reply_from_wire(reply, names)

    async def submit_evaluation(self, key: views.TaskKey, version: int, tally: dict[str, int]) -> bool:
        """Send the sums of an evaluation; True if the server had counted them already."""
        request = federation_pb2.SubmitEvaluationRequest(key=wire.key_to_wire(key), version=version, tally=tally)
        with raising(self._address):
            reply = await self._stub.SubmitEvaluation(request, metadata=self._metadata, timeout=ANSWER_S)
        return reply.duplicate

    async def renew(self, csr: bytes) -> bytes:
        """A new certificate (PEM) for the caller's own identity, for this request (PEM)."""
        with raising(self._address):
            reply = await self._stub.Renew(
                federation_pb2.RenewRequest(csr=csr), metadata=self._metadata, timeout=ANSWER_S
            )
        return reply.certificate

    async def report_progress(self, key: views.TaskKey, progress: views.Progress) -> None:
        """Tell the server how far the task is; raises WrongRound, RunEnded, NoModel or UnknownRun if it is not wanted."""
        request = wire.progress_to_wire(key, progress)
        with raising(self._address):
            await self._stub.ReportProgress(request, metadata=self._metadata, timeout=ANSWER_S)

    async def report_failure(self, key: views.TaskKey, error: SeqfedError) -> None:
        """Tell the server that the task cannot be done."""
        request = federation_pb2.ReportFailureRequest(
            key=wire.key_to_wire(key), reason=type(error).__name__, message=str(error)
        )
        with raising(self._address):
            await self._stub.ReportFailure(request, metadata=self._metadata, timeout=ANSWER_S)
