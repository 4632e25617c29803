"""Who may call what, over real gRPC with certificates."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from tests.server.conftest import SCHEMA, Daemon, Site, make_spec, soon, typed
from tests.server.members import Guarded, guarded

from seqfed.common import authority, identity, signing
from seqfed.common.errors import (
    BrokenTransfer,
    InvalidName,
    NotAllowed,
    Overloaded,
    RateLimited,
    SeqfedError,
    TooLarge,
    Unauthenticated,
    WrongRound,
)
from seqfed.common.identity import Role
from seqfed.server import audit
from seqfed.server.access import ALLOWED, Bucket
from seqfed.server.daemon import serving
from seqfed.server.settings import ServerSettings
from seqfed.v1 import admin_pb2, federation_pb2
from seqfed.v1.admin_pb2_grpc import AdminStub
from seqfed.v1.federation_pb2_grpc import FederationStub

FILES = (federation_pb2, admin_pb2, health_pb2, reflection_pb2)
ELSEWHERE = "/seqfed.v1.Enrollment/Enroll"  # on a port of its own


def methods() -> Iterator[MethodDescriptor]:
    for file in FILES:
        for service in file.DESCRIPTOR.services_by_name.values():
            yield from service.methods


def full(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Guarded]:
    async with guarded(tmp_path) as running:
        yield running


async def call(channel: grpc.aio.Channel, method: MethodDescriptor) -> None:
    """Make the call with an empty message; the first answer is enough."""
    kind: Any = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }[method.client_streaming, method.server_streaming]

    async def nothing() -> AsyncIterator[bytes]:
        for message in list[bytes]():
            yield message

    made: Any = kind(full(method))(nothing() if method.client_streaming else b"")
    with typed():
        if method.server_streaming:
            await soon(made.read())
            made.cancel()
        else:
            await soon(made)


def test_the_table_has_every_method_of_every_service_and_no_other() -> None:
    assert {full(method) for method in methods()} == set(ALLOWED)


@pytest.mark.parametrize("role", [Role.CLIENT, Role.OPERATOR, Role.VIEWER])
async def test_every_method_is_open_to_the_roles_of_the_table_and_no_other(server: Guarded, role: Role) -> None:
    channel = await server.channel(role, "somebody")
    for method in methods():
        if full(method) == ELSEWHERE:
            continue
        refused: SeqfedError | None = None
        try:
            await call(channel, method)
        except SeqfedError as error:
            refused = error
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED, full(method)  # not all of gRPC's own
            assert method.name == "List"
            continue
        allowed = role in ALLOWED[full(method)]
        assert isinstance(refused, NotAllowed) is not allowed, (full(method), refused)
        if not allowed:
            assert str(refused) == f"{role} 'somebody' may not call {method.name}"


async def test_a_certificate_of_a_server_opens_nothing(server: Guarded) -> None:
    channel = await server.dial(server.issue(Role.SERVER, "server"))
    with pytest.raises((NotAllowed, grpc.aio.AioRpcError)):
        await call(channel, next(methods()))


async def test_in_plaintext_everybody_may_do_everything_but_revoke(daemon: Daemon) -> None:
    await daemon.arrive("a")
    assert await daemon.runs() == []
    with pytest.raises(NotAllowed, match="plaintext"), typed():
        await daemon.stub.RevokeClient(admin_pb2.RevokeClientRequest(client="a"))


async def test_a_client_is_nobody_but_itself(server: Guarded) -> None:
    (b,) = await server.arrive("b")
    a = Site(await server.channel(Role.CLIENT, "a"), "b")
    with pytest.raises(NotAllowed, match="client 'a' cannot join as 'b'; start it with --name a"):
        await a.join()
    a.metadata = b.metadata  # somebody has told it
    request = federation_pb2.UploadStatusRequest(key=federation_pb2.TaskKey(run="x"))
    with pytest.raises(NotAllowed, match="the session is not one of client 'a'"), typed():
        await a.stub.UploadStatus(request, metadata=a.metadata)
    with pytest.raises(NotAllowed), typed():
        async for _ in a.stub.Listen(federation_pb2.ListenRequest(), metadata=a.metadata):
            pass
    assert b.tasks.empty()  # its own stream goes on


async def test_a_revocation_ends_what_is_open_at_once(server: Guarded) -> None:
    a, b = await server.arrive("a", "b")
    stub = FederationStub(await server.channel(Role.CLIENT, "a"))
    listening: Any = stub.Listen(federation_pb2.ListenRequest(), metadata=a.metadata)
    uploading: Any = stub.SubmitUpdate(metadata=a.metadata)
    await uploading.write(federation_pb2.SubmitUpdateRequest())
    reply = await server.revoke("a", "laptop stolen\nnot a line")
    assert (reply.client, reply.revoked) == ("a", True)
    with pytest.raises(Unauthenticated, match="the certificates of client 'a' were revoked"), typed():
        await soon(listening.read())
    with pytest.raises(SeqfedError), typed():
        await soon(uploading)
    assert await soon(a.tasks.get()) is None
    with pytest.raises(Unauthenticated, match="revoked; enrol again with a new token"):
        await a.join()
    assert b.tasks.empty()
    await b.come()
    shown = {one.client: one.revoked async for one in (await server.desk()).ListClients(admin_pb2.ListClientsRequest())}
    assert shown == {"a": True, "b": False}


async def test_who_enrols_again_after_a_revocation_is_let_in(server: Guarded) -> None:
    before = server.issue(Role.CLIENT, "a")
    await server.revoke("a")
    after = server.issue(
        Role.CLIENT, "a", now=identity.now() + timedelta(seconds=1)
    )  # what is in the same second is not
    await Site(await server.dial(after), "a").join()
    with pytest.raises(Unauthenticated):
        await Site(await server.dial(before), "a").join()


async def test_the_revoked_use_up_nothing_of_who_enrolled_again(tmp_path: Path) -> None:
    async with guarded(tmp_path, calls_per_s=0.01, calls_burst=3) as server:
        before = Site(await server.dial(server.issue(Role.CLIENT, "a")), "a")
        await server.revoke("a")
        after = server.issue(Role.CLIENT, "a", now=identity.now() + timedelta(seconds=1))
        for _ in range(10):
            with pytest.raises(Unauthenticated, match="was revoked"):
                await before.join()
        await Site(await server.dial(after), "a").join()


async def test_a_revocation_outlives_the_server(tmp_path: Path) -> None:
    async with guarded(tmp_path) as server:
        own = server.issue(Role.CLIENT, "a")
        await Site(await server.dial(own), "a").join()
        await server.revoke("a")
    async with guarded_again(tmp_path) as server:
        with pytest.raises(Unauthenticated):
            await Site(await server.dial(own), "a").join()


@contextlib.asynccontextmanager
async def guarded_again(folder: Path) -> AsyncIterator[Guarded]:
    settings = ServerSettings(port=0, state=folder / "state", tls=folder / "tls")
    async with contextlib.AsyncExitStack() as after, serving(settings) as address:
        yield Guarded(address, settings, authority.load(folder / "ca"), after)


async def test_an_operator_can_be_revoked_too(server: Guarded) -> None:
    stub = await server.desk(Role.OPERATOR, "mallory")
    with typed():
        _ = [one async for one in stub.ListRuns(admin_pb2.ListRunsRequest())]
        await server.revoke("operator:mallory")
    with pytest.raises(Unauthenticated, match="operator 'mallory' was revoked"), typed():
        _ = [one async for one in stub.ListRuns(admin_pb2.ListRunsRequest())]
    await Site(await server.channel(Role.CLIENT, "mallory"), "mallory").join()  # a client of that name is another


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "../a", "boss:a", "operator:"])
async def test_who_cannot_be_is_not_revoked(server: Guarded, name: str) -> None:
    with pytest.raises(InvalidName), typed():
        await server.revoke(name)


async def test_an_open_stream_ends_with_its_certificate(server: Guarded) -> None:
    own = server.issue(Role.CLIENT, "a", days=2 / 86_400)
    site = Site(await server.dial(own), "a")
    await site.join()
    with pytest.raises(Unauthenticated, match="the certificate of client 'a' has ended"), typed():
        await soon(anext(aiter(site.stub.Listen(federation_pb2.ListenRequest(), metadata=site.metadata))))
    with pytest.raises(Unauthenticated, match="it needs a new one"):
        await site.join()


async def test_a_certificate_of_another_ca_does_not_even_connect(server: Guarded, tmp_path: Path) -> None:
    other = authority.create(tmp_path / "other", identity.now())
    channel = await server.dial(server.issue(Role.OPERATOR, "ops", ca=other))
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await AdminStub(channel).StopRun(admin_pb2.StopRunRequest(run="x"), timeout=5)
    assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE


# Limits


async def test_who_calls_too_often_is_told_so_and_others_are_not(tmp_path: Path) -> None:
    async with guarded(tmp_path, calls_per_s=0.01, calls_burst=3) as server:
        a, b = [Site(await server.channel(Role.CLIENT, name), name) for name in ("a", "b")]
        for _ in range(3):
            await a.join()
        with pytest.raises(RateLimited, match="client:a makes more than 0.01 calls a second"):
            await a.join()
        await b.join()


async def test_who_joins_all_the_time_takes_nothing_from_others(tmp_path: Path) -> None:
    async with guarded(tmp_path, joins_per_minute=5, joins_per_s=10.0) as server:
        m, *others = [Site(await server.channel(Role.CLIENT, name), name) for name in "mabcde"]
        for _ in range(5):
            await m.join()
        for _ in range(30):
            with pytest.raises(RateLimited, match=r"client 'm' joins more than 5 times a minute \(joins_per_minute\)"):
                await m.join()
        for site in others:
            await site.join()
    line = ("client:m", "/seqfed.v1.Federation/Join", "RateLimited")
    assert refused(tmp_path / "state") == [line] * 20  # and then how many more


async def test_that_the_server_is_busy_says_nothing_of_whom_it_refuses(tmp_path: Path) -> None:
    """So there is no line of it in the audit log; whoever keeps it busy has some, for its own limits."""
    async with guarded(tmp_path, joins_per_s=0.01) as server:
        a, b, c = [Site(await server.channel(Role.CLIENT, name), name) for name in "abc"]
        for site in (a, b):
            await site.join()
        with pytest.raises(Overloaded, match="joins_per_s"):
            await c.join()
    assert refused(tmp_path / "state") == []


def refused(state: Path) -> list[tuple[str, str, str]]:
    """What the audit log says of refusals: who, method, error."""
    with audit.reading(state, None) as entries:
        told = [json.loads(one.body) for one in entries if one.kind == "refused"]
    return [(one["who"], one["method"], one["error"]) for one in told if "error" in one]


def test_a_bucket_fills_again() -> None:
    bucket = Bucket(2, at=0.0)
    assert [bucket.take(1.0, 2, 0.0) for _ in range(3)] == [True, True, False]
    assert not bucket.take(1.0, 2, 0.9)
    assert bucket.take(1.0, 2, 1.0)
    assert [bucket.take(1.0, 2, 100.0) for _ in range(3)] == [True, True, False]


async def test_one_identity_has_so_many_calls_open(tmp_path: Path) -> None:
    async with guarded(tmp_path, calls_open=4) as server:
        health: Any = health_pb2_grpc.HealthStub(await server.channel(Role.VIEWER, "v"))
        line = await server.dial(server.issue(Role.VIEWER, "v"))  # another connection is no way round it
        other: Any = health_pb2_grpc.HealthStub(line)
        watching = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(4)]
        for one in watching:
            await soon(one.read())
        with pytest.raises(RateLimited, match="has 4 calls open"), typed():
            await other.Check(health_pb2.HealthCheckRequest())
        for one in watching:
            one.cancel()
        while True:  # the server learns of it in its own time
            try:
                with typed():
                    await health.Check(health_pb2.HealthCheckRequest())
                break
            except RateLimited:
                await asyncio.sleep(0)


async def test_a_flood_of_metadata_is_refused(server: Guarded) -> None:
    stub = await server.desk()
    with pytest.raises(TooLarge, match="max_metadata_bytes"), typed():
        await stub.StopRun(admin_pb2.StopRunRequest(run="x"), metadata=(("flood", "x" * 9_000),))
    with pytest.raises(grpc.aio.AioRpcError) as refusal:  # so much that gRPC itself does
        await stub.StopRun(admin_pb2.StopRunRequest(run="x"), metadata=(("flood", "x" * 100_000),))
    assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_message_too_large_is_refused(tmp_path: Path) -> None:
    async with guarded(tmp_path, max_message_bytes=1 << 20) as server:
        stub = await server.desk()
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stub.StopRun(admin_pb2.StopRunRequest(run="x" * (1 << 20)))
        assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_compressed_message_is_refused_before_it_is_unpacked(server: Guarded) -> None:
    channel = await server.channel(Role.OPERATOR, "ops")
    for how in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        made: Any = channel.unary_unary("/seqfed.v1.Admin/StopRun")
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await made(bytes(16 << 20), compression=how)  # 16 KiB on the wire
        assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "disabled" in (refusal.value.details() or "")


async def test_a_model_is_given_only_to_whom_it_is_a_task(server: Guarded) -> None:
    a, _ = await server.arrive("a", "b")
    c = Site(await server.channel(Role.CLIENT, "c"), "c")
    await c.join(data_schema=SCHEMA.replace(b'"features": 2', b'"features": 3'))
    await server.submit(make_spec())
    task = await a.task()
    assert len(await a.fetch(task)) == 4 * 42
    with pytest.raises(WrongRound, match="client 'c' is not asked for anything by run"):
        await c.fetch(task)


async def test_a_call_without_a_message_is_ended(tmp_path: Path) -> None:
    async with guarded(tmp_path, message_s=0.1) as server:
        (a,) = await server.arrive("a")
        uploading: Any = a.stub.SubmitUpdate(metadata=a.metadata)
        submitting: Any = (await server.desk()).Submit()
        channel: Any = await server.channel(Role.CLIENT, "a")
        joining = channel.stream_unary("/seqfed.v1.Federation/Join")()
        for made in (uploading, submitting, joining):
            with pytest.raises(BrokenTransfer, match=r"no message came within 0.1 s \(message_s\)"), typed():
                await soon(made)
        assert a.tasks.empty()  # one whose message has come may take as long as it likes


async def test_a_call_that_ends_without_its_message_or_with_another_is_refused(server: Guarded) -> None:
    channel: Any = await server.channel(Role.CLIENT, "a")

    for method in ("Join", "SubmitUpdate"):
        for messages, what in (
            ((), "the (call ended before|stream did not begin)"),
            ((b"\xff",), "not of this method's"),
        ):
            sent = channel.stream_unary(f"/seqfed.v1.Federation/{method}")(iter(messages), metadata=await seen(server))
            with pytest.raises(BrokenTransfer, match=what), typed():
                await soon(sent)


async def seen(server: Guarded) -> Any:
    """What shows the session of client `a`."""
    site = Site(await server.channel(Role.CLIENT, "a"), "a")
    await site.join()
    return site.metadata


async def test_names_that_could_forge_a_line_are_refused_or_escaped(
    server: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="seqfed.server")
    a, _ = await server.arrive("a", "b")
    for column in ("x\ny", "x\x1b[31m", "x\u2028y", "x\u202ey"):
        schema = json.dumps({"columns": [column], "examples": 1}).encode()
        with pytest.raises(InvalidName):
            await a.join(data_schema=schema)
    await server.submit(make_spec(rounds=1))
    task = await a.task()
    await a.fail(task, "Evil\nError", "no\r\n2026-01-01 INFO forged\x1b[2J")
    lines = [record.getMessage() for record in caplog.records]
    assert any("forged" in line for line in lines)
    assert not any(set(line) & {"\n", "\r", "\x1b"} for line in lines)


# Signatures


async def test_a_run_carries_its_operators_signature_to_the_clients(server: Guarded) -> None:
    a, b = await server.arrive("a", "b")
    spec = make_spec()
    await server.submit(spec)
    for site in (a, b):
        task = await site.task()
        assert task.certificate == server.operator.certificate
        signer = signing.verify(task.certificate, server.ca.pem, task.spec.canonical, task.signature, identity.now())
        assert (signer.role, signer.name) == (Role.OPERATOR, "ops")


async def test_a_run_that_its_submitter_has_not_signed_is_refused(server: Guarded) -> None:
    spec = make_spec()
    other = server.issue(Role.OPERATOR, "other")
    viewer = server.issue(Role.VIEWER, "v")
    for error, by, changes in (
        (NotAllowed, None, {"signature": b""}),
        (Unauthenticated, None, {"signature": b"x" * 70}),
        (NotAllowed, other, {}),
        (NotAllowed, viewer, {}),
        (Unauthenticated, None, {"certificate": b""}),
        (Unauthenticated, None, {"signature": signing.sign(make_spec(rounds=2).canonical, server.operator.key)}),
        (TooLarge, None, {"signature": b"x" * 1000}),
        (TooLarge, None, {"certificate": b"x" * 100_000}),
    ):
        with pytest.raises(error), typed():
            await server.submit(spec, by, **changes)
    await server.submit(spec)


async def test_a_signature_outlives_the_server(tmp_path: Path) -> None:
    async with guarded(tmp_path) as server:
        await server.submit(make_spec())
        certificate = server.operator.certificate
    async with guarded_again(tmp_path) as server:
        a, _ = await server.arrive("a", "b")
        task = await a.task()
        assert task.certificate == certificate
        assert task.signature
