"""The services: each method translates a message into a call of the coordinator and its answer back, and no more."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from seqfed.common import wire, wire_masking
from seqfed.common.config import validate_json
from seqfed.common.errors import (
    BrokenTransfer,
    CheckpointError,
    ConfigError,
    InvalidName,
    NotAllowed,
    RateLimited,
    RunEnded,
    TooLarge,
    UnknownSession,
    VersionMismatch,
    WrongRound,
    storage_error,
)
from seqfed.common.identity import MAX_PEM
from seqfed.common.layout import BYTES_PER_PARAMETER
from seqfed.common.schema import DataSchema
from seqfed.common.spec import RunSpec
from seqfed.common.transfer import CHUNK_BYTES, DIGEST_BYTES
from seqfed.server import gate
from seqfed.server.access import Rates
from seqfed.server.coordinator import Coordinator
from seqfed.server.desk import Desk
from seqfed.server.enrollment import Office
from seqfed.server.hub import Connection
from seqfed.server.intake import MIN_CHUNK_BYTES, Patience, receive_file
from seqfed.server.settings import ServerSettings
from seqfed.server.status import rich_status
from seqfed.server.store import Signed
from seqfed.v1 import admin_pb2, admin_pb2_grpc, federation_pb2, federation_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
M = TypeVar("M", bound=Message)

MAX_SIGNATURE = 256  # bytes; one of P-256 has up to 72
MAX_REASON = 200  # characters of an operator's words about a revocation
MAX_SCHEMA = 256 << 10  # bytes of a client's data schema, which is kept for every client
RUN_LETTERS = 16  # of a run's id
MAX_FAILURE = 2_000  # characters of a client's words about a failure
LATE = (WrongRound, RunEnded)  # what an honest client hears whose report crosses the news that its task is off


@contextlib.asynccontextmanager
async def refusing(context: Context, quietly: tuple[type[Exception], ...] = ()) -> AsyncIterator[None]:
    """Turns what the block raises into the call's status; of what is refused `quietly` the audit log says nothing."""
    try:
        yield
    except (grpc.aio.AbortError, asyncio.CancelledError):
        raise
    except Exception as error:  # noqa: BLE001 - the table decides what of it the stranger learns
        if not isinstance(error, quietly):
            gate.tell_refused(error)
        await context.abort_with_status(rich_status(error))


class Federation(federation_pb2_grpc.FederationServicer):
    """What clients call."""

    def __init__(self, coordinator: Coordinator, office: Office | None = None) -> None:
        self._coordinator = coordinator
        self._office = office
        most = coordinator.settings.joins_per_minute
        self._joins = Rates(most / 60, most)

    def _connection(self, context: Context) -> Connection:
        metadata = dict(context.invocation_metadata() or ())
        session = metadata.get(wire.SESSION_METADATA)
        if not isinstance(session, str):
            raise UnknownSession(f"the call has no '{wire.SESSION_METADATA}' metadata; join first")
        connection = self._coordinator.hub.connection(session)
        identity = gate.caller()
        if identity is not None and identity.name != connection.client:
            raise NotAllowed(f"the session is not one of {identity}")
        return connection

    def _moved(self, run: str, client: str, request: Message | None, reply: M) -> M:
        """The reply, once it is counted, and the request, unless that was before it could have ended a round."""
        up = 0 if request is None else wire.request_bytes(request)
        self._coordinator.moved(run, client, up, wire.reply_bytes(reply))
        return reply

    async def Join(self, request: federation_pb2.JoinRequest, context: Context) -> federation_pb2.JoinReply:
        async with refusing(context):
            if request.protocol != wire.PROTOCOL:
                raise VersionMismatch(
                    f"the client speaks version {request.protocol} of the protocol, this server {wire.PROTOCOL}; "
                    "run the same version of seqfed on both sides"
                )
            name, identity = wire.check_client_name(request.client), gate.caller()
            if identity is not None and identity.name != name:
                raise NotAllowed(f"{identity} cannot join as '{name}'; start it with --name {identity.name}")
            if not self._joins.take(name, asyncio.get_running_loop().time()):  # before it takes from what all have
                raise RateLimited(
                    f"client '{name}' joins more than {self._coordinator.settings.joins_per_minute:,} times a minute "
                    "(joins_per_minute); it can again soon"
                )
            if not wire.HEX.fullmatch(request.instance):
                raise InvalidName("a client's instance is 32 hex digits")
            if len(request.data_schema) > MAX_SCHEMA:
                raise TooLarge(
                    f"the client's data schema has {len(request.data_schema):,} bytes; {MAX_SCHEMA:,} is the limit"
                )
            schema = validate_json(DataSchema, request.data_schema, "the client's data schema")
            wire.require_clean(schema.model_dump(), "the client's data schema")
            working = wire.key_from_wire(request.working) if len(request.working.run) == RUN_LETTERS else None
            software = wire.clean(request.software, 64)[:64]
            connection = await self._coordinator.join(name, request.instance, software, schema, working)
            connection.holds = request.holds[:DIGEST_BYTES]
            return federation_pb2.JoinReply(session=connection.session, spread_s=self._coordinator.spread_s)

    async def Listen(
        self, request: federation_pb2.ListenRequest, context: Context
    ) -> AsyncIterator[federation_pb2.Task]:
        async with refusing(context):
            known, connection = None, self._connection(context)
            async with contextlib.aclosing(self._coordinator.hub.listen(connection.session)) as tasks:
                async for task in tasks:
                    message = wire.task_to_wire(task, known)
                    known = task.spec
                    self._coordinator.moved(task.key.run, connection.client, wire.PING_BYTES, wire.task_bytes(message))
                    yield message

    async def FetchModel(
        self, request: federation_pb2.FetchModelRequest, context: Context
    ) -> AsyncIterator[federation_pb2.Chunk]:
        async with refusing(context):
            connection = self._connection(context)
            size = request.chunk_bytes or CHUNK_BYTES
            if not MIN_CHUNK_BYTES <= size <= CHUNK_BYTES or size % BYTES_PER_PARAMETER:
                raise BrokenTransfer(
                    f"chunks of {size:,} bytes were asked for; {MIN_CHUNK_BYTES:,} to {CHUNK_BYTES:,}, a multiple of "
                    f"{BYTES_PER_PARAMETER}, can be had"
                )
            offset = request.offset
            if request.step:
                step, meter = self._coordinator.step(connection.client, request.run, request.version)
                pieces = step.pieces(offset, size)
            else:
                model, meter = self._coordinator.model_file(connection.client, request.run, request.version)
                pieces = model.pieces(offset, size)
            moved = self._coordinator.moved
            moved(request.run, connection.client, wire.request_bytes(request), wire.CALL_DOWN)
            for data in pieces:
                chunk = federation_pb2.Chunk(offset=offset, data=data)
                meter(len(data))
                moved(request.run, connection.client, down=wire.on_wire(wire.chunk_bytes(offset, len(data))))
                yield chunk
                offset += len(data)
            connection.holds = self._coordinator.digest_of(request.run, request.version)

    async def UploadStatus(
        self, request: federation_pb2.UploadStatusRequest, context: Context
    ) -> federation_pb2.UploadStatusReply:
        async with refusing(context):
            client, key = self._connection(context).client, wire.key_from_wire(request.key)
            complete = await self._coordinator.has_counted(client, key, request.digest)
            received = self._coordinator.intake.received(client, key.run, request.digest)
            reply = federation_pb2.UploadStatusReply(received_bytes=received, complete=complete)
            return self._moved(key.run, client, request, reply)

    async def SubmitUpdate(
        self, request_iterator: AsyncIterator[federation_pb2.SubmitUpdateRequest], context: Context
    ) -> federation_pb2.SubmitUpdateReply:
        async with refusing(context):
            client = self._connection(context).client
            header, chunks = await _header_and_chunks(request_iterator)
            run, moved = header.key.run, self._coordinator.moved
            # The end of what a client streams is a frame without data.
            moved(run, client, up=wire.CALL_UP + wire.part_bytes(header.ByteSize()) + wire.FRAME_BYTES)
            clock = asyncio.get_running_loop().time
            busy_s = -clock()

            async def counted() -> AsyncIterator[tuple[int, bytes]]:
                nonlocal busy_s
                busy_s += clock()
                async for offset, data in chunks:
                    busy_s -= clock()
                    moved(run, client, up=wire.part_bytes(wire.chunk_bytes(offset, len(data))))
                    yield offset, data
                    busy_s += clock()
                busy_s -= clock()

            duplicate = await self._coordinator.submit_update(client, wire.header_from_wire(header), counted())
            reply = federation_pb2.SubmitUpdateReply(duplicate=duplicate, busy_s=max(0.0, busy_s + clock()))
            return self._moved(run, client, None, reply)

    async def Mask(self, request: federation_pb2.MaskRequest, context: Context) -> federation_pb2.MaskReply:
        async with refusing(context, quietly=LATE):
            key, number, step = wire_masking.request_from_wire(request)
            client = self._connection(context).client
            self._coordinator.moved(key.run, client, up=wire.request_bytes(request))
            reply, roster = await self._coordinator.mask(client, key, number, step)
            return self._moved(key.run, client, None, wire_masking.reply_to_wire(reply, roster))

    async def SubmitEvaluation(
        self, request: federation_pb2.SubmitEvaluationRequest, context: Context
    ) -> federation_pb2.SubmitEvaluationReply:
        async with refusing(context):
            client, key = self._connection(context).client, wire.key_from_wire(request.key)
            self._coordinator.moved(key.run, client, up=wire.request_bytes(request))
            duplicate = await self._coordinator.submit_evaluation(client, key, request.version, dict(request.tally))
            return self._moved(key.run, client, None, federation_pb2.SubmitEvaluationReply(duplicate=duplicate))

    async def ReportProgress(
        self, request: federation_pb2.ReportProgressRequest, context: Context
    ) -> federation_pb2.ReportProgressReply:
        async with refusing(context, quietly=LATE):
            client, key = self._connection(context).client, wire.key_from_wire(request.key)
            self._coordinator.progress(client, key, wire.progress_from_wire(request))
            return self._moved(key.run, client, request, federation_pb2.ReportProgressReply())

    async def ReportFailure(
        self, request: federation_pb2.ReportFailureRequest, context: Context
    ) -> federation_pb2.ReportFailureReply:
        async with refusing(context, quietly=LATE):
            why = f"{wire.clean(request.reason, 64)}: {wire.clean(request.message, MAX_FAILURE)}"
            key = wire.key_from_wire(request.key)
            client = self._connection(context).client
            self._coordinator.moved(key.run, client, up=wire.request_bytes(request))
            await self._coordinator.report_failure(client, key, why)
            return self._moved(key.run, client, None, federation_pb2.ReportFailureReply())

    async def Renew(self, request: federation_pb2.RenewRequest, context: Context) -> federation_pb2.Certificate:
        async with refusing(context):
            identity = gate.caller()
            if identity is None or self._office is None:
                raise ConfigError("this server renews no certificates: it was started without --tls or without --ca")
            return await self._office.renew(request.csr, identity)


class Admin(admin_pb2_grpc.AdminServicer):
    """What operators call."""

    def __init__(self, coordinator: Coordinator, settings: ServerSettings) -> None:
        self._coordinator = coordinator
        self._desk = Desk(coordinator)
        self._settings = settings
        self._patience = Patience(settings.upload_stall_s, settings.upload_bytes_per_s)

    async def Submit(
        self, request_iterator: AsyncIterator[admin_pb2.SubmitRequest], context: Context
    ) -> admin_pb2.SubmitReply:
        async with refusing(context):
            header, chunks = await _header_and_chunks(request_iterator)
            spec = validate_json(RunSpec, header.spec, "the run's specification")
            signed = self._signed(spec, header.signature, header.certificate)
            if not header.checkpoint_bytes:
                return admin_pb2.SubmitReply(run=wire.run_to_wire(await self._desk.submit(spec, None, signed)))
            if header.checkpoint_bytes > self._settings.max_model_bytes:
                raise TooLarge(
                    f"a checkpoint of {header.checkpoint_bytes:,} bytes came; the server's limit (max_model_bytes) is "
                    f"{self._settings.max_model_bytes:,}"
                )
            try:
                descriptor, name = tempfile.mkstemp(dir=self._settings.state, suffix=".safetensors")
                os.close(descriptor)
            except OSError as error:
                raise storage_error(error, "receiving a checkpoint") from error
            try:
                await receive_file(
                    Path(name), header.checkpoint_bytes, header.checkpoint_digest, chunks, self._patience
                )
                view = await self._desk.submit(spec, Path(name), signed)
            except CheckpointError as error:  # it knows the file by our name for it
                raise CheckpointError(str(error).removeprefix(f"{name}: ").replace(name, "the checkpoint")) from error
            finally:
                os.unlink(name)  # noqa: PTH108 - a plain call, as Path methods are reserved for threads here
            return admin_pb2.SubmitReply(run=wire.run_to_wire(view))

    def _signed(self, spec: RunSpec, signature: bytes, certificate: bytes) -> Signed:
        """Who answers for the run; raises NotAllowed or Unauthenticated unless whoever calls has signed it.

        In plaintext there is no CA to hold a signature against: it is handed on as it came, for the clients to judge.
        """
        identity = gate.caller()
        if len(signature) > MAX_SIGNATURE or len(certificate) > MAX_PEM:
            raise TooLarge(
                f"a signature of {len(signature):,} bytes and a certificate of {len(certificate):,} came; "
                f"{MAX_SIGNATURE:,} and {MAX_PEM:,} are the limits"
            )
        if identity is None:
            return Signed("", signature, certificate)
        if not signature:
            raise NotAllowed(
                "the run is not signed; submit it with this version's `seqfed submit` and your --credentials"
            )
        signer = self._coordinator.signer(spec.canonical, signature, certificate)
        if (signer.role, signer.name) != (identity.role, identity.name):
            raise NotAllowed(f"the run is signed by {signer}, and {identity} submits it")
        return Signed(identity.name, signature, certificate)

    async def ListRuns(
        self, request: admin_pb2.ListRunsRequest, context: Context
    ) -> AsyncIterator[admin_pb2.RunStatus]:
        async with refusing(context):
            for view in self._desk.runs():
                yield wire.run_to_wire(view)

    async def WatchRun(
        self, request: admin_pb2.WatchRunRequest, context: Context
    ) -> AsyncIterator[admin_pb2.RunStatus]:
        async with refusing(context):
            async for view in self._desk.watch(request.run, request.after_round):
                yield wire.run_to_wire(view)

    async def StopRun(self, request: admin_pb2.StopRunRequest, context: Context) -> admin_pb2.RunStatus:
        async with refusing(context):
            return wire.run_to_wire(await self._desk.stop(request.run, gate.caller_name()))

    async def PauseRun(self, request: admin_pb2.PauseRunRequest, context: Context) -> admin_pb2.RunStatus:
        async with refusing(context):
            return wire.run_to_wire(await self._desk.pause(request.run, gate.caller_name()))

    async def ResumeRun(self, request: admin_pb2.ResumeRunRequest, context: Context) -> admin_pb2.RunStatus:
        async with refusing(context):
            return wire.run_to_wire(await self._desk.resume(request.run, gate.caller_name()))

    async def ListClients(
        self, request: admin_pb2.ListClientsRequest, context: Context
    ) -> AsyncIterator[admin_pb2.ClientStatus]:
        async with refusing(context):
            for view in await self._desk.clients():
                yield wire.client_to_wire(view)

    async def RevokeClient(self, request: admin_pb2.RevokeClientRequest, context: Context) -> admin_pb2.ClientStatus:
        async with refusing(context):
            if gate.caller() is None:
                raise NotAllowed(
                    "this server speaks plaintext: there are no certificates to revoke; start it with --tls"
                )
            reason = wire.clean(request.reason, MAX_REASON)
            return wire.client_to_wire(await self._desk.revoke(request.client, reason, gate.caller_name()))

    async def ListAudit(
        self, request: admin_pb2.ListAuditRequest, context: Context
    ) -> AsyncIterator[admin_pb2.AuditEntry]:
        async with refusing(context):
            after = min(request.after, 1 << 62)  # beyond the last entry there is nothing, and no error
            while entries := await asyncio.to_thread(self._desk.audit, after):
                for entry in entries:
                    yield wire.entry_to_wire(entry)
                after = entries[-1].number

    async def ReportPrivacy(self, request: admin_pb2.ReportPrivacyRequest, context: Context) -> admin_pb2.PrivacyReport:
        async with refusing(context):
            return wire.privacy_to_wire(await self._desk.privacy(request.run))

    async def ExportModel(
        self, request: admin_pb2.ExportModelRequest, context: Context
    ) -> AsyncIterator[federation_pb2.Chunk]:
        async with refusing(context):
            with self._desk.find(request.run).model.path.open("rb", buffering=0) as file:
                offset = min(
                    request.offset, os.fstat(file.fileno()).st_size
                )  # beyond its end there is nothing, and no error
                file.seek(offset)
                while data := file.read(CHUNK_BYTES):
                    yield federation_pb2.Chunk(offset=offset, data=data)
                    offset += len(data)


async def _header_and_chunks(messages: AsyncIterator[Any]) -> tuple[Any, AsyncIterator[tuple[int, bytes]]]:
    """The first message's header, and the (offset, data) of the chunks after it; raises BrokenTransfer.

    The gate sees to it that the header comes; the chunks are the reader's to wait for.
    """

    async def chunks() -> AsyncIterator[tuple[int, bytes]]:
        async for message in messages:
            if message.WhichOneof("part") != "chunk":
                raise BrokenTransfer("something else than a chunk came in the middle of a stream")
            yield message.chunk.offset, message.chunk.data

    async for message in messages:
        if message.WhichOneof("part") == "header":
            return message.header, chunks()
        break
    raise BrokenTransfer("the stream did not begin with a header")
