"""The operator's half of the Admin service: each function is one call, in the records of `views`."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import grpc
from blake3 import blake3
from grpc_health.v1 import health_pb2, health_pb2_grpc

from seqfed.client.channel import ANSWER_S, connected, raising
from seqfed.client.settings import each_server
from seqfed.common import checkpoint, identity, signing, views, wire
from seqfed.common.errors import BrokenTransfer, CheckpointError, ServerUnavailable
from seqfed.common.identity import Credentials
from seqfed.common.spec import RunSpec
from seqfed.common.transfer import CHUNK_BYTES
from seqfed.v1 import admin_pb2
from seqfed.v1.admin_pb2_grpc import AdminStub
from seqfed.v1.federation_pb2 import Chunk

ACCOUNT_S: Final = 120.0  # seconds: it is computed, of many runs together
CHOICE_S: Final = 5.0  # seconds that one of several servers has to say that it serves


class Operator:
    """The calls to one server at a time. Every method raises the typed error of `channel.raising`.

    `others`: channels to the servers that may take this one's place, with their addresses. `credentials`: the operator's own,
    with which it signs its runs.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        address: str,
        others: Sequence[tuple[grpc.aio.Channel, str]] = (),
        credentials: Credentials | None = None,
    ) -> None:
        self._credentials = credentials
        self._servers = collections.deque([(channel, address), *others])
        self._use()

    def _use(self) -> None:
        channel, self._address = self._servers[0]
        self._stub = AdminStub(channel)
        self._health: Any = health_pb2_grpc.HealthStub(channel)  # its stub declares no methods

    def turn(self) -> None:
        """Go on with the next server."""
        self._servers.rotate(-1)
        self._use()

    async def choose(self) -> None:
        """Go on with the first server, from the present one on, that says that it serves; with the last if none does."""
        for _ in range(len(self._servers) - 1):
            with contextlib.suppress(ServerUnavailable):
                if await self.healthy(CHOICE_S):
                    return
            self.turn()

    async def submit(self, spec: RunSpec, initial: Path | None) -> views.RunView:
        """Queue a run, from its seed or from this safetensors file."""
        header = admin_pb2.SubmitHeader(spec=spec.canonical)
        if self._credentials is not None:
            header.signature = signing.sign(spec.canonical, self._credentials.key)
            header.certificate = self._credentials.certificate
        if initial is not None:
            header.checkpoint_digest, header.checkpoint_bytes = _digest(initial)

        async def parts() -> AsyncIterator[admin_pb2.SubmitRequest]:
            yield admin_pb2.SubmitRequest(header=header)
            if initial is not None:
                offset = 0
                with initial.open("rb") as file:
                    while data := file.read(CHUNK_BYTES):
                        yield admin_pb2.SubmitRequest(chunk=Chunk(offset=offset, data=data))
                        offset += len(data)

        with raising(self._address):
            reply = await self._stub.Submit(parts())
        return wire.run_from_wire(reply.run)

    async def runs(self) -> list[views.RunView]:
        """All runs, oldest first."""
        with raising(self._address):
            calls = self._stub.ListRuns(admin_pb2.ListRunsRequest(), timeout=ANSWER_S)
            return [wire.run_from_wire(message) async for message in calls]

    async def watch(self, run: str, after: int = 0) -> AsyncGenerator[views.RunView, None]:
        """The run at once and after every change, each with the rounds finished since the last; ends with the run."""
        request = admin_pb2.WatchRunRequest(run=run, after_round=after)
        calls: Any = self._stub.WatchRun(request)
        try:
            with raising(self._address):
                async for message in calls:
                    yield wire.run_from_wire(message)
        finally:
            calls.cancel()  # whoever has seen enough must not hold up the server until the garbage is collected

    async def history(self, run: str) -> views.RunView:
        """The run with all the rounds that it has finished so far."""
        rounds: list[views.RoundRecord] = []
        view: views.RunView | None = None
        async with contextlib.aclosing(self.watch(run)) as seen:
            async for view in seen:
                rounds.extend(view.history)
                if not view.ended and (rounds[-1].round if rounds else 0) >= view.round - 1:
                    break  # the rest is to come
        assert view is not None  # the first one comes at once
        return replace(view, history=tuple(rounds))

    async def stop(self, run: str) -> views.RunView:
        """End a run."""
        with raising(self._address):
            return wire.run_from_wire(await self._stub.StopRun(admin_pb2.StopRunRequest(run=run), timeout=ANSWER_S))

    async def pause(self, run: str) -> views.RunView:
        """Dismiss a run's clients and keep it as it is."""
        with raising(self._address):
            return wire.run_from_wire(await self._stub.PauseRun(admin_pb2.PauseRunRequest(run=run), timeout=ANSWER_S))

    async def resume(self, run: str) -> views.RunView:
        """Queue a paused run again."""
        with raising(self._address):
            request = admin_pb2.ResumeRunRequest(run=run)
            return wire.run_from_wire(await self._stub.ResumeRun(request, timeout=ANSWER_S))

    async def clients(self) -> list[views.ClientView]:
        """Every client that the server has seen."""
        with raising(self._address):
            calls = self._stub.ListClients(admin_pb2.ListClientsRequest(), timeout=ANSWER_S)
            return [wire.client_from_wire(message) async for message in calls]

    async def revoke(self, client: str, reason: str) -> views.ClientView:
        """Make a client's certificates worthless; also operator:NAME and viewer:NAME."""
        with raising(self._address):
            request = admin_pb2.RevokeClientRequest(client=client, reason=reason)
            return wire.client_from_wire(await self._stub.RevokeClient(request, timeout=ANSWER_S))

    async def audit(self, after: int = 0) -> AsyncGenerator[views.AuditEntry, None]:
        """The audit log after the entry of this number, as the server gives it: whether its chain holds is not looked at."""
        calls: Any = self._stub.ListAudit(admin_pb2.ListAuditRequest(after=after))
        try:
            with raising(self._address):
                async for message in calls:
                    yield wire.entry_from_wire(message)
        finally:
            calls.cancel()

    async def privacy(self, run: str = "") -> views.PrivacyReport:
        """The account of differential privacy, of this run or of all."""
        with raising(self._address):
            request = admin_pb2.ReportPrivacyRequest(run=run)
            return wire.privacy_from_wire(await self._stub.ReportPrivacy(request, timeout=ACCOUNT_S))

    async def export(self, run: str, out: Path) -> int:
        """Write the run's newest model to `out`, whole or not at all; its size in bytes."""
        size = 0
        with checkpoint.replacing(out) as file, raising(self._address):
            async for chunk in self._stub.ExportModel(admin_pb2.ExportModelRequest(run=run)):
                if chunk.offset != size:
                    raise BrokenTransfer(f"byte {chunk.offset:,} of the model came where byte {size:,} was next")
                file.write(chunk.data)
                size += len(chunk.data)
        return size

    async def healthy(self, patience_s: float = ANSWER_S) -> bool:
        """Whether the server says so soon enough that it serves."""
        with raising(self._address):
            reply = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=patience_s)
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


@contextlib.asynccontextmanager
async def operating(address: str, insecure: bool, credentials: Path | None = None) -> AsyncIterator[Operator]:
    """An operator of the server at HOST:PORT; at HOST:PORT,HOST:PORT of the first that serves."""
    servers = each_server(address)
    async with contextlib.AsyncExitStack() as stack:
        lines = [(await stack.enter_async_context(connected(one, insecure, credentials)), one) for one in servers]
        own = None if credentials is None else identity.load_credentials(credentials)
        operator = Operator(*lines[0], lines[1:], own)
        await operator.choose()
        yield operator


def _digest(path: Path) -> tuple[bytes, int]:
    try:
        with path.open("rb") as file:
            hasher = blake3()
            while piece := file.read(CHUNK_BYTES):
                hasher.update(piece)
            return hasher.digest(), file.tell()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
