"""Those who belong and ask for what is not theirs: viewers, clients as others, operators with a run that nobody signed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.integration.hostile.siege import ADMIN, FEDERATION, OTHER_SCHEMA, Siege, besieged
from tests.integration.light import Formula
from tests.integration.test_consent import client, spec_of, until
from tests.integration.test_tls import Place, a_server, running
from tests.server.conftest import Site, make_spec, soon, typed

from seqfed.client.admin import operating
from seqfed.client.policy import Policy
from seqfed.common import authority, identity, signing, views, wire
from seqfed.common.errors import NotAllowed, SeqfedError, Unauthenticated, UnknownSession, WrongRound
from seqfed.common.identity import Role
from seqfed.common.spec import RunSpec
from seqfed.v1 import admin_pb2, federation_pb2
from seqfed.v1.federation_pb2_grpc import FederationStub

Call = Callable[[Any, Siege], Awaitable[object]]


async def all_of(answers: AsyncIterator[object]) -> None:
    """A stream to its end."""
    async for _ in answers:
        pass


# Viewers and clients at the operators' desk ---------------------------------------------------------------------------


def submission(spec: RunSpec, signature: bytes = b"", certificate: bytes = b"") -> Any:
    header = admin_pb2.SubmitHeader(spec=spec.canonical, signature=signature, certificate=certificate)
    return iter([admin_pb2.SubmitRequest(header=header)])


DESK: dict[str, Call] = {
    "Submit": lambda stub, _: stub.Submit(submission(make_spec())),
    "StopRun": lambda stub, siege: stub.StopRun(admin_pb2.StopRunRequest(run=siege.run)),
    "PauseRun": lambda stub, siege: stub.PauseRun(admin_pb2.PauseRunRequest(run=siege.run)),
    "ResumeRun": lambda stub, siege: stub.ResumeRun(admin_pb2.ResumeRunRequest(run=siege.run)),
    "RevokeClient": lambda stub, _: stub.RevokeClient(admin_pb2.RevokeClientRequest(client="b")),
    "ExportModel": lambda stub, siege: all_of(stub.ExportModel(admin_pb2.ExportModelRequest(run=siege.run))),
}
LOOK: dict[str, Call] = {
    "ListRuns": lambda stub, _: all_of(stub.ListRuns(admin_pb2.ListRunsRequest())),
    "WatchRun": lambda stub, siege: all_of(stub.WatchRun(admin_pb2.WatchRunRequest(run=siege.run))),
    "ListClients": lambda stub, _: all_of(stub.ListClients(admin_pb2.ListClientsRequest())),
    "ListAudit": lambda stub, _: all_of(stub.ListAudit(admin_pb2.ListAuditRequest())),
}


@pytest.mark.parametrize("role", [Role.VIEWER, Role.CLIENT])
async def test_who_is_no_operator_changes_nothing(tmp_path: Path, role: Role) -> None:
    calls = DESK if role is Role.VIEWER else DESK | LOOK
    async with besieged(tmp_path) as siege:
        stub = await siege.desk(role, "mallory")
        for method, call in calls.items():
            with siege.refused(NotAllowed, f"{role}:mallory", ADMIN + method, f"may not call {method}"):
                await call(stub, siege)


# One client as another ------------------------------------------------------------------------------------------------


async def test_an_operator_is_no_client(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        site = Site(await siege.server.channel(Role.OPERATOR, "b"), "b")  # not even under a client's name
        with siege.refused(NotAllowed, "operator:b", FEDERATION + "Join"):
            await site.join()


async def test_a_client_joins_as_nobody_else(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        site = Site(await siege.server.channel(Role.CLIENT, "m"), "b")
        with siege.refused(NotAllowed, "client:m", FEDERATION + "Join", "cannot join as 'b'"):
            await site.join()
        assert siege.b.tasks.empty()  # nobody took its place: its stream has not ended


def upload(key: federation_pb2.TaskKey) -> Any:
    return iter([federation_pb2.SubmitUpdateRequest(header=federation_pb2.UpdateHeader(key=key))])


STOLEN: dict[str, Callable[[Any, federation_pb2.TaskKey, Any], Awaitable[object]]] = {
    "Listen": lambda stub, _, own: all_of(stub.Listen(federation_pb2.ListenRequest(), metadata=own)),
    "FetchModel": lambda stub, key, own: all_of(
        stub.FetchModel(federation_pb2.FetchModelRequest(run=key.run, version=1), metadata=own)
    ),
    "UploadStatus": lambda stub, key, own: stub.UploadStatus(federation_pb2.UploadStatusRequest(key=key), metadata=own),
    "SubmitUpdate": lambda stub, key, own: stub.SubmitUpdate(upload(key), metadata=own),
    "SubmitEvaluation": lambda stub, key, own: stub.SubmitEvaluation(
        federation_pb2.SubmitEvaluationRequest(key=key, version=1), metadata=own
    ),
    "ReportProgress": lambda stub, key, own: stub.ReportProgress(
        federation_pb2.ReportProgressRequest(key=key, stage=federation_pb2.STAGE_TRAINING), metadata=own
    ),
    "ReportFailure": lambda stub, key, own: stub.ReportFailure(
        federation_pb2.ReportFailureRequest(key=key, reason="DataError", message="gone"), metadata=own
    ),
}


async def test_a_session_is_worth_nothing_on_anothers_connection(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        stub = FederationStub(await siege.server.channel(Role.CLIENT, "m"))
        key = wire.key_to_wire(siege.task.key)
        for method, call in STOLEN.items():
            with siege.refused(NotAllowed, "client:m", FEDERATION + method, "the session is not one of client 'm'"):
                await call(stub, key, siege.b.metadata)
            with siege.refused(UnknownSession, "client:m", FEDERATION + method):
                await call(stub, key, ((wire.SESSION_METADATA, "0" * 32),))


async def test_who_was_not_asked_says_nothing_of_a_round(tmp_path: Path) -> None:
    """A member with a session of its own, and the key of a task that is another's."""
    async with besieged(tmp_path) as siege:
        m = await siege.outsider()
        calls = {name: call for name, call in STOLEN.items() if name != "Listen"}
        for method, call in calls.items():
            try:
                with typed():
                    await call(m.stub, wire.key_to_wire(siege.task.key), m.metadata)
            except SeqfedError as refusal:
                assert type(refusal) is WrongRound, (method, refusal)
                if not method.startswith("Report"):  # an honest one may be late with these
                    siege.lines.append(("client:m", FEDERATION + method, "WrongRound"))
            else:
                assert method == "UploadStatus", method  # whose answer is that there is nothing
        await m.leave()


# Runs that were not signed so -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["unsigned", "altered after", "by a viewer", "by another", "of another CA", "revoked"])
async def test_a_run_counts_only_as_its_operator_signed_it(tmp_path: Path, how: str) -> None:
    async with besieged(tmp_path) as siege:
        spec, server = make_spec(), siege.server
        signed = server.operator
        if how in {"by a viewer", "by another"}:
            signed = server.issue(Role.VIEWER if how == "by a viewer" else Role.OPERATOR, "mallory")
        if how == "of another CA":
            signed = server.issue(Role.OPERATOR, "ops", ca=authority.create(tmp_path / "other", identity.now()))
        if how == "revoked":
            signed = server.issue(Role.OPERATOR, "gone")
            await server.revoke("operator:gone")
        of = make_spec(training__epochs=50) if how == "altered after" else spec
        signature = b"" if how == "unsigned" else signing.sign(of.canonical, signed.key)
        error = NotAllowed if how in {"unsigned", "by a viewer", "by another"} else Unauthenticated
        with siege.refused(error, "operator:ops", ADMIN + "Submit"):
            await server.submit(spec, signature=signature, certificate=signed.certificate)


async def test_a_server_that_alters_a_signed_run_gets_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the server is the hostile one: it asks for more than the operator signed, of clients whose rules would let it."""
    honest = wire.task_to_wire

    def altered(task: views.Task, known: RunSpec | None = None) -> federation_pb2.Task:
        message = honest(task, known)
        if message.spec:
            content = json.loads(message.spec)
            content["training"]["epochs"] = 50
            message.spec = RunSpec.model_validate_json(json.dumps(content)).canonical
        return message

    monkeypatch.setattr(wire, "task_to_wire", altered)
    place = Place.at(tmp_path)
    formulas = [Formula("a"), Formula("b")]
    async with a_server(place) as server:
        sessions = [client(place, server.address, one, Policy()) for one in formulas]
        alice = place.credentials(Role.OPERATOR, "alice")
        async with running(*sessions), operating(server.address, False, alice) as calls:
            run = (await calls.submit(spec_of(), None)).run
            view, records = await until(calls, run, "paused", "failed", "stopped")
    assert [one.trained for one in formulas] == [[], []]
    assert records == []
    assert "the signature of operator 'alice' is not of this specification" in view.reason


# The revoked ----------------------------------------------------------------------------------------------------------


async def test_a_revoked_client_is_cut_off_at_once_whatever_it_does(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        m, stub = await siege.outsider(listens=False), FederationStub(await siege.server.channel(Role.CLIENT, "m"))
        listening: Any = stub.Listen(federation_pb2.ListenRequest(), metadata=m.metadata)
        uploading: Any = stub.SubmitUpdate(metadata=m.metadata)
        await soon(siege.listens("m"))
        await siege.server.revoke("m")
        with siege.refused(Unauthenticated, "client:m", FEDERATION + "Listen", "were revoked"):
            await soon(listening.read())
        with siege.refused(Unauthenticated, "client:m", FEDERATION + "SubmitUpdate", "revoked"):
            await soon(uploading)
        again = Site(await siege.server.dial(siege.server.issue(Role.CLIENT, "x")), "x")
        await again.join(data_schema=OTHER_SCHEMA)  # the others are not


async def test_a_revoked_operator_no_longer_sees_nor_says_anything(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        stub = await siege.desk(Role.OPERATOR, "mallory")
        watching: Any = stub.WatchRun(admin_pb2.WatchRunRequest(run=siege.run))
        assert (await soon(watching.read())).run == siege.run
        await siege.server.revoke("operator:mallory")
        with siege.refused(Unauthenticated, "operator:mallory", ADMIN + "WatchRun", "were revoked"):
            while await soon(watching.read()):
                pass


async def test_what_the_revoked_try_stands_under_their_name(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        m, stub = await siege.outsider(listens=False), await siege.desk(Role.OPERATOR, "mallory")
        for name in ("m", "operator:mallory"):
            await siege.server.revoke(name)
        with siege.refused(Unauthenticated, "client:m", FEDERATION + "Join", "was revoked"):
            await m.join(data_schema=OTHER_SCHEMA)
        for method, steal in STOLEN.items():
            with siege.refused(Unauthenticated, "client:m", FEDERATION + method, "was revoked"):
                await steal(m.stub, wire.key_to_wire(siege.task.key), m.metadata)
        for method, call in (DESK | LOOK).items():
            with siege.refused(Unauthenticated, "operator:mallory", ADMIN + method, "was revoked"):
                await call(stub, siege)
