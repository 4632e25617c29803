"""The operator's calls over real gRPC: pausing and resuming, and finding the server that serves among several."""

# ruff: noqa: N802 - the .proto files name the calls
from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from tests.client.test_shown import view

from seqfed.client.admin import operating
from seqfed.common import wire
from seqfed.common.errors import ServerUnavailable
from seqfed.v1 import admin_pb2, admin_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
NOBODY = "127.0.0.1:1"
UNUSED: Any = lambda *_: None  # noqa: E731 - of a type that fits every call


@dataclass
class Fake(admin_pb2_grpc.AdminServicer):
    """Pauses and resumes; its other calls are not implemented."""

    asked: list[Any] = field(default_factory=list)

    async def PauseRun(self, request: admin_pb2.PauseRunRequest, context: Context) -> admin_pb2.RunStatus:
        self.asked.append(request)
        return wire.run_to_wire(replace(view("by the operator"), phase="paused"))

    async def ResumeRun(self, request: admin_pb2.ResumeRunRequest, context: Context) -> admin_pb2.RunStatus:
        self.asked.append(request)
        return wire.run_to_wire(replace(view(), phase="queued"))

    Submit = ListRuns = WatchRun = StopRun = ListClients = RevokeClient = ListAudit = ReportPrivacy = ExportModel = (
        UNUSED
    )


@contextlib.asynccontextmanager
async def serving(fakes: Sequence[Fake], ready: Sequence[bool]) -> AsyncIterator[list[str]]:
    """The addresses of these servers; those that are not ready stand by."""
    async with contextlib.AsyncExitStack() as stack:
        addresses = []
        for fake, serves in zip(fakes, ready, strict=True):
            server, checks = grpc.aio.server(), health.aio.HealthServicer()
            admin_pb2_grpc.add_AdminServicer_to_server(fake, server)
            health_pb2_grpc.add_HealthServicer_to_server(checks, server)
            status = health_pb2.HealthCheckResponse.SERVING if serves else health_pb2.HealthCheckResponse.NOT_SERVING
            await checks.set("", status)
            addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
            await server.start()
            stack.push_async_callback(server.stop, None)
        yield addresses


async def test_pause_and_resume() -> None:
    fake = Fake()
    async with serving([fake], [True]) as (address,), operating(address, insecure=False) as operator:
        paused = await operator.pause("trial")
        resumed = await operator.resume("0123")
    assert (paused.phase, paused.reason, resumed.phase) == ("paused", "by the operator", "queued")
    assert [one.run for one in fake.asked] == ["trial", "0123"]


async def test_the_first_that_serves_is_asked() -> None:
    standby, active = Fake(), Fake()
    async with (
        serving([standby, active], [False, True]) as addresses,
        operating(",".join([NOBODY, *addresses]), insecure=False) as operator,
    ):
        await operator.pause("trial")
        operator.turn()
        with pytest.raises(ServerUnavailable, match=NOBODY):
            await operator.pause("trial")
    assert (len(standby.asked), len(active.asked)) == (0, 1)


async def test_of_several_that_are_away_one_is_named() -> None:
    async with operating(f"{NOBODY}, 127.0.0.1:2", insecure=False) as operator:
        with pytest.raises(ServerUnavailable, match="127.0.0.1:2"):
            await operator.runs()
