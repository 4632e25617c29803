"""Any message to any method of the services, of callers with and without a session: an answer or a typed refusal.

The coordinator, its store and its files are real; gRPC is left out, so that thousands of calls take seconds. Refusals that
would blame the server (INTERNAL, UNAVAILABLE) are failures here: nothing that a caller sends may do that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from blake3 import blake3
from google.protobuf.message import Message
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.fuzz import messages
from tests.server.conftest import SCHEMA, make_spec, some_delta

from seqfed.common import authority, identity, tokens, wire
from seqfed.common.model import layout_of
from seqfed.server.coordinator import Coordinator
from seqfed.server.enrollment import Enrollment, Office
from seqfed.server.servicers import Admin, Federation
from seqfed.server.settings import ServerSettings
from seqfed.server.store import open_store
from seqfed.v1 import admin_pb2, federation_pb2

INSTANCE: Final = "0" * 32
TURNS: Final = 20  # of the event loop, for the answers of a stream that does not end
SPEC: Final = make_spec(name="fuzzed", rounds=1000, cohort__max_attempts=1000)
LAYOUT: Final = layout_of(SPEC)
UPDATE: Final = some_delta(LAYOUT.size, 1).tobytes()
BLAMING: Final = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN}


class Aborted(grpc.aio.AbortError):
    """What `abort_with_status` raises."""


@dataclass
class Call:
    """The context of one call."""

    session: str
    status: grpc.Status | None = None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ((wire.SESSION_METADATA, self.session),)

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    async def abort_with_status(self, status: grpc.Status) -> None:
        self.status = status
        raise Aborted


@dataclass
class Ground:
    """A coordinator at work on one run, with two clients that listen, in an event loop that turns during calls only."""

    runner: asyncio.Runner
    coordinator: Coordinator
    federation: Federation
    admin: Admin
    office: Enrollment
    token: str
    csr: bytes
    run: str = ""
    sessions: list[str] = field(default_factory=list)
    work: list[asyncio.Task[Any]] = field(default_factory=list)

    def call(self, method: Any, message: Message | list[Message], session: str = "") -> grpc.StatusCode:
        """Call a method; the code of its end, OK for an answer or a stream that was left."""
        return self.runner.run(self._call(method, message, session))

    async def _call(self, method: Any, message: Message | list[Message], session: str) -> grpc.StatusCode:
        context = Call(session)
        answer = method(_stream(message) if isinstance(message, list) else message, context)
        task = asyncio.ensure_future(_first(answer) if hasattr(answer, "__aiter__") else answer)
        try:
            if hasattr(answer, "__aiter__"):
                for _ in range(TURNS):
                    await asyncio.sleep(0)
                    if task.done():
                        break
                else:
                    task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait_for(task, 20.0)
        except Aborted:
            assert context.status is not None
            assert context.status.code not in BLAMING, context.status.details
            return context.status.code
        finally:
            if hasattr(answer, "aclose"):
                await answer.aclose()
        assert not any(one.done() for one in self.work), "the coordinator or a client's stream is over"
        return grpc.StatusCode.OK


async def _stream(messages_: list[Any]) -> AsyncIterator[Any]:
    for one in messages_:
        yield one


async def _first(answers: AsyncIterator[Message]) -> None:
    async for one in answers:
        assert one.SerializeToString() is not None
        break


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder: Path = tmp_path_factory.mktemp("ground")
    with asyncio.Runner() as runner:
        ground = runner.run(_begin(runner, folder))
        yield ground
        runner.run(_end(ground))


async def _begin(runner: asyncio.Runner, folder: Path) -> Ground:
    own = ServerSettings(state=folder / "state", max_model_bytes=1 << 16, upload_stall_s=5.0, joins_per_s=1e9)
    coordinator = Coordinator(open_store(folder / "state"), own)
    now = identity.now()
    ca = authority.create(folder / "ca", now)
    office = Office(ca, coordinator.store.use_nonce, days=1.0, a_second=1e9)
    csr = identity.request(identity.new_key(), "alice")
    token = tokens.sign(tokens.new("alice", ca.pem, now, 3600.0), ca.key)
    federation, admin = Federation(coordinator, office), Admin(coordinator, own)
    ground = Ground(runner, coordinator, federation, admin, Enrollment(office), token, csr)
    await coordinator.take_up()
    ground.work.append(asyncio.create_task(coordinator.run()))
    for name in ("first", "second"):
        ground.sessions.append(await _arrive(ground, name))
    submitted = admin_pb2.SubmitRequest(header=admin_pb2.SubmitHeader(spec=SPEC.canonical))
    context: Any = Call("")
    reply = await admin.Submit(_stream([submitted]), context)
    ground.run = reply.run.run
    async with asyncio.timeout(20.0):
        while not coordinator.lives[ground.run].state.cohort:  # noqa: ASYNC110 - nobody else tells
            await asyncio.sleep(0)
    return ground


async def _join(ground: Ground, name: str) -> str:
    context: Any = Call("")
    join = federation_pb2.JoinRequest(protocol=wire.PROTOCOL, client=name, instance=INSTANCE, data_schema=SCHEMA)
    return (await ground.federation.Join(join, context)).session


async def _arrive(ground: Ground, name: str) -> str:
    """The session of a client that has joined and listens."""
    session = await _join(ground, name)

    async def listen() -> None:
        context: Any = Call(session)
        async for _ in ground.federation.Listen(federation_pb2.ListenRequest(), context):
            pass

    ground.work.append(asyncio.create_task(listen()))
    await asyncio.sleep(0)
    return session


async def _end(ground: Ground) -> None:
    ground.coordinator.close()
    await asyncio.wait_for(asyncio.gather(*ground.work), 20.0)
    ground.coordinator.store.close()


def hints(ground: Ground) -> messages.Hints:
    """What leads further in: the run and its round, its layout, an update's digest, names that are known."""
    runs = st.sampled_from([ground.run])
    digests = st.sampled_from([blake3(UPDATE).digest(), LAYOUT.digest])
    sizes = st.sampled_from([LAYOUT.nbytes, LAYOUT.nbytes + 4, 4])
    tallies = st.sampled_from([{}, {"examples": 1, "loss": 1}, {"examples": -1}, {"examples": 1 << 62}])
    specs = st.sampled_from([SPEC.canonical, *(json.dumps(one).encode() for one in SUBMITTED)])
    found: dict[str, st.SearchStrategy[Any]] = {
        "TaskKey.run": runs,
        "TaskKey.round": st.sampled_from([1, 2]),
        "TaskKey.attempt": st.sampled_from([1, 2]),
        "FetchModelRequest.run": runs,
        "FetchModelRequest.version": st.just(0),
        "FetchModelRequest.chunk_bytes": st.sampled_from([0, 4096, 4098]),
        "WatchRunRequest.run": runs,
        "ExportModelRequest.run": runs,
        "UpdateHeader.weight": st.sampled_from([1, 1 << 40, (1 << 40) + 1]),
        "UpdateHeader.layout_digest": st.just(LAYOUT.digest),
        "UpdateHeader.digest": digests,
        "UpdateHeader.bytes": sizes,
        "UpdateHeader.offset": st.just(0),
        "UpdateHeader.tally": tallies,
        "Chunk.offset": st.just(0),
        "Chunk.data": st.sampled_from([UPDATE, UPDATE[:-4], b"\0\0\xc0\x7f" * LAYOUT.size, UPDATE + UPDATE]),
        "UploadStatusRequest.digest": digests,
        "SubmitEvaluationRequest.tally": tallies,
        "ReportProgressRequest.stage": st.sampled_from([1, 2, 3, 4, 5]),
        "JoinRequest.protocol": st.just(wire.PROTOCOL),
        "JoinRequest.client": st.sampled_from(["c", "d"]),
        "JoinRequest.instance": st.just(INSTANCE),
        "JoinRequest.data_schema": st.sampled_from(
            [SCHEMA, b'{"examples":1}', b'{"examples":1,"columns":["\\u001b"]}']
        ),
        "SubmitHeader.spec": specs,
        "SubmitHeader.checkpoint_bytes": st.sampled_from([0, len(UPDATE), 1 << 16]),
        "SubmitHeader.checkpoint_digest": digests,
        "RenewRequest.csr": st.just(ground.csr),
        "EnrollRequest.token": st.just(ground.token),
        "EnrollRequest.csr": st.just(ground.csr),
    }
    return {f"seqfed.v1.{name}": one for name, one in found.items()}


_DATA: Final = {"features": 2, "classes": 2}
SUBMITTED: Final[list[dict[str, Any]]] = [
    {"data": _DATA, "model": {"hidden": 65_536, "layers": 64}},
    {"data": _DATA, "model": {"custom": "a:b"}},
    {"data": _DATA, "model": {"custom": "a:b", "tensors": [["w", [2, 3]], ["b", [2]]]}},
    {"data": _DATA, "model": {"custom": "a:b", "tensors": [["w", [1 << 62, 1 << 62]]]}},
    {"data": _DATA, "model": {"custom": "os:system"}},
    {"data": _DATA, "convergence": {"metric": "../x"}},
    {"data": {"vocabulary": ["a", "\x1b"], "steps": 3}, "task": {"kind": "next_token"}},
]
UNARY: Final[Mapping[str, type[Message]]] = {
    "Join": federation_pb2.JoinRequest,
    "Listen": federation_pb2.ListenRequest,
    "FetchModel": federation_pb2.FetchModelRequest,
    "UploadStatus": federation_pb2.UploadStatusRequest,
    "Mask": federation_pb2.MaskRequest,
    "SubmitEvaluation": federation_pb2.SubmitEvaluationRequest,
    "ReportProgress": federation_pb2.ReportProgressRequest,
    "ReportFailure": federation_pb2.ReportFailureRequest,
    "Renew": federation_pb2.RenewRequest,
    "ListRuns": admin_pb2.ListRunsRequest,
    "WatchRun": admin_pb2.WatchRunRequest,
    "StopRun": admin_pb2.StopRunRequest,
    "PauseRun": admin_pb2.PauseRunRequest,
    "ResumeRun": admin_pb2.ResumeRunRequest,
    "ListClients": admin_pb2.ListClientsRequest,
    "RevokeClient": admin_pb2.RevokeClientRequest,
    "ListAudit": admin_pb2.ListAuditRequest,
    "ReportPrivacy": admin_pb2.ReportPrivacyRequest,
    "ExportModel": admin_pb2.ExportModelRequest,
    "Enroll": federation_pb2.EnrollRequest,
}
STREAMED: Final[Mapping[str, type[Message]]] = {
    "SubmitUpdate": federation_pb2.SubmitUpdateRequest,
    "Submit": admin_pb2.SubmitRequest,
}

several = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


def method_of(ground: Ground, name: str) -> Any:
    return next(getattr(one, name) for one in (ground.federation, ground.admin, ground.office) if hasattr(one, name))


def test_no_method_is_left_out() -> None:
    services = (*federation_pb2.DESCRIPTOR.services_by_name.values(), *admin_pb2.DESCRIPTOR.services_by_name.values())
    assert {one.name for service in services for one in service.methods} == {*UNARY, *STREAMED}


@pytest.mark.parametrize("name", UNARY)
def test_any_message_is_answered_or_refused(ground: Ground, name: str) -> None:
    @several
    @given(messages.of(UNARY[name].DESCRIPTOR, hints(ground)), st.sampled_from(["", "x", *ground.sessions]))
    def call(message: Message, session: str) -> None:
        if name == "Listen" and session in ground.sessions:
            session = ground.runner.run(_join(ground, "passer-by"))  # whose stream nobody else reads
        ground.call(method_of(ground, name), message, session)

    call()


def test_an_export_from_beyond_the_end_is_empty(ground: Ground) -> None:
    beyond = admin_pb2.ExportModelRequest(run=ground.run, offset=(1 << 64) - 1)
    assert ground.call(ground.admin.ExportModel, beyond) is grpc.StatusCode.OK


def test_a_second_stream_of_a_session_leaves_none_behind(ground: Ground) -> None:
    session = ground.runner.run(_arrive(ground, "twice"))
    first = ground.work.pop()
    try:
        ground.call(ground.federation.Listen, federation_pb2.ListenRequest(), session)
        assert first.done() or ground.coordinator.hub.get("twice") is not None
    finally:
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            ground.runner.run(_ended(first))


async def _ended(task: asyncio.Task[Any]) -> None:
    await task


@pytest.mark.parametrize("name", STREAMED)
def test_any_stream_is_answered_or_refused(ground: Ground, name: str) -> None:
    @settings(several, max_examples=60)
    @given(
        st.lists(messages.of(STREAMED[name].DESCRIPTOR, hints(ground)), max_size=4),
        st.sampled_from(["", *ground.sessions, *ground.sessions]),
    )
    def call(stream: list[Message], session: str) -> None:
        ground.call(method_of(ground, name), stream, session)

    call()


@several
@given(
    st.fixed_dictionaries(
        {
            "custom": st.just("a:b"),
            "tensors": st.lists(
                st.tuples(
                    st.text(st.characters(codec="utf-8"), max_size=5),
                    st.lists(st.integers(1, 9) | st.integers(1 << 30, 1 << 64), max_size=4),
                ),
                min_size=1,
                max_size=3,
                unique_by=lambda one: str(one[0]),
            ),
        }
    )
)
@example({"custom": "a:b", "tensors": [["w", []]]})
def test_any_tensors_are_a_model_or_refused(ground: Ground, model: dict[str, Any]) -> None:
    submit(ground, model)


def submit(ground: Ground, model: dict[str, Any]) -> grpc.StatusCode:
    spec = json.dumps({"data": _DATA, "model": model}).encode()
    header = admin_pb2.SubmitRequest(header=admin_pb2.SubmitHeader(spec=spec))
    return ground.call(ground.admin.Submit, [header])


@pytest.mark.parametrize(
    "tensors",
    [
        [],
        [["w", [0]]],
        [["w", [-1]]],
        [["w", [-2, -3]]],
        [["w", [2, 3]], ["b", [-4]]],
        [["w", [1] * 100]],
        [["__metadata__", [2]]],
    ],
    ids=["none", "zero", "negative", "twice-negative", "cancelling", "dimensions", "metadata"],
)
def test_tensors_that_cannot_be_are_refused(ground: Ground, tensors: list[Any]) -> None:
    assert submit(ground, {"custom": "a:b", "tensors": tensors}) is grpc.StatusCode.INVALID_ARGUMENT
