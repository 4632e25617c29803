"""A run that is submitted is there wholly or not at all, whatever becomes of the call that submitted it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.server.conftest import Daemon, a_daemon, busy_database, make_spec, soon, turns_until, typed
from tests.server.members import guarded

from seqfed.common import signing
from seqfed.common.errors import Unauthenticated
from seqfed.common.identity import Credentials, Role
from seqfed.common.spec import RunSpec
from seqfed.v1 import admin_pb2
from seqfed.v1.admin_pb2_grpc import AdminStub

if TYPE_CHECKING:
    from seqfed.v1.admin_pb2_grpc import AdminAsyncStub


def initial(state: Path) -> list[Path]:
    return list(state.glob("models/*/000000.*.safetensors"))


async def parts(spec: RunSpec, own: Credentials | None = None) -> AsyncIterator[admin_pb2.SubmitRequest]:
    header = admin_pb2.SubmitHeader(spec=spec.canonical)
    if own is not None:
        header.signature, header.certificate = signing.sign(spec.canonical, own.key), own.certificate
    yield admin_pb2.SubmitRequest(header=header)


async def test_a_submit_that_is_broken_off_leaves_no_hidden_run(daemon: Daemon) -> None:
    state = daemon.settings.state
    assert state is not None
    await daemon.arrive("a", "b")
    with busy_database(state):
        call: Any = daemon.stub.Submit(parts(make_spec(rounds=1)))
        await turns_until(lambda: len(initial(state)) == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await daemon.runs() == []
    async with asyncio.timeout(30):
        while not (runs := await daemon.runs()):  # noqa: ASYNC110 - nobody is told of it any more
            await asyncio.sleep(0)
    (run,) = runs
    await daemon.until(run.run, lambda view: view.phase == "training")  # it has its turn as any other


async def test_a_submit_that_is_broken_off_is_in_the_state_that_the_next_daemon_takes_up(tmp_path: Path) -> None:
    async with a_daemon(tmp_path) as daemon:
        with busy_database(tmp_path):
            call: Any = daemon.stub.Submit(parts(make_spec(rounds=1)))
            await turns_until(lambda: len(initial(tmp_path)) == 1)
            call.cancel()
    async with a_daemon(tmp_path) as daemon:
        assert [view.phase for view in await daemon.runs()] == ["queued"]


async def test_who_is_revoked_while_his_run_is_made_has_none(tmp_path: Path) -> None:
    async with guarded(tmp_path) as server:
        late = server.issue(Role.OPERATOR, "late")
        desk = AdminStub(await server.dial(late))
        with busy_database(tmp_path / "state"):
            call: Any = desk.Submit(parts(make_spec(), late))
            await turns_until(lambda: len(initial(tmp_path / "state")) == 1)
            revoking = asyncio.ensure_future(server.revoke("operator:late"))
            with pytest.raises(Unauthenticated, match="revoked"), typed():
                await until_refused(desk)
        with pytest.raises(Unauthenticated, match="revoked"), typed():
            await soon(call)
        await soon(revoking)
        assert await runs_of(await server.desk()) == []
        assert [entry.kind for entry in await server.audit() if entry.kind != "refused"] == ["revoked"]


async def until_refused(desk: AdminAsyncStub) -> None:
    while True:
        await runs_of(desk)


async def runs_of(desk: AdminAsyncStub) -> list[str]:
    return [message.run async for message in desk.ListRuns(admin_pb2.ListRunsRequest())]
