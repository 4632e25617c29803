"""mTLS over real gRPC: who comes in and who does not, and what each side hears of it; enrolment and renewal."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import json
import random
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc
import pytest
from cryptography import x509
from tests.integration.light import Formula, undisturbed

from seqfed.client import enroll as enrolling
from seqfed.client.admin import operating
from seqfed.client.channel import connected, raising
from seqfed.client.enroll import Renewal, enroll, load_token
from seqfed.client.session import Session
from seqfed.client.work import Workshop
from seqfed.common import addresses, authority, checkpoint, identity, tokens, views
from seqfed.common.authority import Authority
from seqfed.common.errors import (
    ConfigError,
    InsecureRefused,
    NotAllowed,
    PortInUse,
    RateLimited,
    SeqfedError,
    ServerUnavailable,
    Unauthenticated,
    UnknownSession,
)
from seqfed.common.identity import Credentials, Role
from seqfed.common.model import layout_of
from seqfed.common.spec import RunSpec
from seqfed.server.daemon import serving
from seqfed.server.enrollment import BURST, Office
from seqfed.server.settings import ServerSettings
from seqfed.v1 import admin_pb2, federation_pb2
from seqfed.v1.admin_pb2_grpc import AdminStub
from seqfed.v1.federation_pb2_grpc import EnrollmentStub, FederationStub

T = TypeVar("T")

PATIENCE = 30.0
HOSTS = ("localhost", "127.0.0.1")
DAY = datetime.timedelta(days=1)
SPEC = RunSpec.model_validate(
    {
        "rounds": 2,
        "data": {"features": 2, "classes": 2},
        "model": {"kind": "rnn", "hidden": 4, "layers": 1},
        "cohort": {"min_clients": 2, "deadline_s": 600},
        "evaluation": {"every": 0},
    }
)


@dataclass
class Place:
    """A folder with a CA, and whatever credentials a test asks of it."""

    folder: Path
    ca: Authority

    @classmethod
    def at(cls, folder: Path) -> Place:
        return cls(folder, authority.create(folder / "ca", identity.now()))

    def credentials(
        self, role: Role, name: str, *, ago: datetime.timedelta | None = None, days: float = 5, **more: Any
    ) -> Path:
        """A credentials folder, of a certificate issued so long ago."""
        now = identity.now() - (ago or datetime.timedelta())
        folder = self.folder / f"{role}-{name}-{len(list(self.folder.iterdir()))}"
        identity.save_credentials(folder, self.ca.credentials(role, name, now=now, days=days, **more))
        return folder

    def server(self, **more: Any) -> Path:
        return self.credentials(Role.SERVER, "server", **{"hosts": HOSTS, **more})

    def token(self, client: str, seconds: float = 60.0) -> Path:
        token = tokens.sign(tokens.new(client, self.ca.pem, identity.now(), seconds), self.ca.key)
        file = self.folder / f"{client}.{len(list(self.folder.iterdir()))}.token"
        identity.write_private(file, tokens.to_file(token, self.ca.pem))
        return file


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place.at(tmp_path)


@pytest.fixture
def stranger(tmp_path: Path) -> Place:
    """Another federation's."""
    (tmp_path / "other").mkdir()
    return Place.at(tmp_path / "other")


@dataclass
class Serving:
    """Where a server with TLS is, and where it enrols."""

    address: str
    enroll: str
    state: Path


@contextlib.asynccontextmanager
async def a_server(place: Place, tls: Path | None = None, **settings: Any) -> AsyncIterator[Serving]:
    state = place.folder / "state"
    given = {"port": 0, "enroll_port": 0, "state": state, "tls": tls or place.server(), "ca": place.folder / "ca"}
    async with serving(ServerSettings.model_validate({**given, **settings})) as address:
        told = json.loads((state / "address.json").read_text())
        yield Serving(address, told.get("enroll", ""), state)


async def soon(work: Awaitable[T]) -> T:
    return await asyncio.wait_for(work, PATIENCE)


async def asked(address: str, credentials: Path | None, insecure: bool = False) -> list[views.RunView]:
    """What an operator hears there."""
    async with operating(address, insecure, credentials) as operator:
        return await soon(operator.runs())


# A whole training -----------------------------------------------------------------------------------------------------


def session_with(formula: Formula, address: str, credentials: Path) -> Session:
    return Session(
        cast(Workshop, formula),
        (address,),
        formula.client.encode().hex().ljust(32, "0"),
        insecure=False,
        dial=functools.partial(connected, credentials=credentials),
        renewal=Renewal(credentials),
        rng=random.Random(1),  # noqa: S311 - not a secret
    )


@contextlib.asynccontextmanager
async def running(*sessions: Session) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(one.run()) for one in sessions]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_federation_trains_over_tls_as_without(place: Place, tmp_path: Path) -> None:
    operator = place.credentials(Role.OPERATOR, "alice")
    formulas = [Formula("a"), Formula("b")]
    async with a_server(place) as server:
        sessions = [session_with(one, server.address, place.credentials(Role.CLIENT, one.client)) for one in formulas]
        async with running(*sessions), operating(server.address, insecure=False, credentials=operator) as calls:
            run = (await calls.submit(SPEC, None)).run
            last = await soon(ended(calls.watch(run)))
            assert (last.phase, last.cohort) == ("finished", ("a", "b"))
            await calls.export(run, tmp_path / "model.safetensors")
    flat = checkpoint.load(tmp_path / "model.safetensors", layout_of(SPEC)).flat
    assert (flat == undisturbed(SPEC, "ab")).all()


async def ended(watched: AsyncIterator[views.RunView]) -> views.RunView:
    return [view async for view in watched][-1]


# Who does not come in -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "odd", ["none", "plaintext", "another CA's", "another CA's with our name", "expired", "not yet valid", "a server's"]
)
async def test_the_port_takes_nobody_without_a_good_certificate(place: Place, stranger: Place, odd: str) -> None:
    async with a_server(place) as server:
        key, certificate, ours = None, None, (place.folder / "ca" / "ca.pem").read_bytes()
        folder = {
            "another CA's": lambda: stranger.credentials(Role.OPERATOR, "alice"),
            "another CA's with our name": lambda: masked(place, stranger).credentials(Role.OPERATOR, "alice"),
            "expired": lambda: place.credentials(Role.OPERATOR, "alice", ago=9 * DAY),
            "not yet valid": lambda: place.credentials(Role.OPERATOR, "alice", ago=-2 * DAY),
            "a server's": place.server,
        }.get(odd, lambda: None)()
        if folder is not None:
            found = identity.load_credentials(folder)
            key, certificate = found.key, found.certificate
        channel = (
            grpc.aio.insecure_channel(server.address)
            if odd == "plaintext"
            else grpc.aio.secure_channel(server.address, grpc.ssl_channel_credentials(ours, key, certificate))
        )
        async with channel:
            with pytest.raises(Unauthenticated, match="no certificate that it accepts; pass --credentials DIR"):
                await one_call(channel, server.address)
        assert await asked(server.address, place.credentials(Role.OPERATOR, "alice")) == []


def masked(ours: Place, theirs: Place) -> Place:
    """Their key under our CA's name."""
    return Place(theirs.folder, replace(theirs.ca, certificate=ours.ca.certificate))


async def one_call(channel: grpc.aio.Channel, address: str) -> None:
    with raising(address):
        async for _ in AdminStub(channel).ListRuns(admin_pb2.ListRunsRequest(), timeout=PATIENCE):
            pass


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_old_versions_of_tls_are_not_spoken(place: Place, version: ssl.TLSVersion) -> None:
    async with a_server(place) as server:
        with pytest.raises(ssl.SSLError, match="EOF occurred"):
            await soon(asyncio.to_thread(shaken, server.address, place, version))
        with pytest.raises(ssl.SSLError, match="EOF occurred"):
            await soon(asyncio.to_thread(shaken, server.enroll, place, version))
        shown = await soon(asyncio.to_thread(shaken, server.address, place, ssl.TLSVersion.TLSv1_2))
        assert identity.identity_of(shown).role is Role.SERVER


def shaken(address: str, place: Place, version: ssl.TLSVersion | None = None) -> x509.Certificate:
    """The server's certificate, after a handshake in this version of TLS at most."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(place.folder / "ca" / "ca.pem")
    context.set_ciphers("ALL:@SECLEVEL=0")  # this side would do it
    context.set_alpn_protocols(["h2"])
    if version is not None:
        context.minimum_version, context.maximum_version = ssl.TLSVersion.MINIMUM_SUPPORTED, version
    folder = place.credentials(Role.OPERATOR, "alice")
    context.load_cert_chain(folder / identity.CERTIFICATE, folder / identity.KEY)
    host, port = addresses.parse(address)
    with ssl_socket(context, host, port) as connection:
        shown = connection.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown)


def ssl_socket(context: ssl.SSLContext, host: str, port: int) -> ssl.SSLSocket:
    return context.wrap_socket(socket.create_connection((host, port), PATIENCE), server_hostname=host)


# What a client hears of a server that is not the right one ------------------------------------------------------------


async def test_a_server_of_another_ca_is_not_trusted(place: Place, stranger: Place) -> None:
    async with a_server(stranger) as server:
        with pytest.raises(ServerUnavailable, match="not of this federation's CA"):
            await asked(server.address, place.credentials(Role.OPERATOR, "alice"))


async def test_a_server_under_a_name_that_is_not_its_own_is_not_trusted(place: Place) -> None:
    async with a_server(place, place.server(hosts=("fed.example.org",))) as server:
        with pytest.raises(ServerUnavailable, match="not for this name.*seqfed ca issue server"):
            await asked(server.address, place.credentials(Role.OPERATOR, "alice"))


async def test_a_server_with_a_clients_certificate_is_not_trusted(place: Place) -> None:
    folder = place.credentials(Role.CLIENT, "a", hosts=HOSTS)
    async with bare_server(identity.load_credentials(folder)) as address:
        with pytest.raises(ServerUnavailable, match="that is not a server's; do not trust it"):
            await asked(address, place.credentials(Role.OPERATOR, "alice"))


async def test_a_server_whose_certificate_has_ended_is_told_with_the_remedy(place: Place) -> None:
    async with bare_server(identity.load_credentials(place.server(ago=9 * DAY))) as address:
        with pytest.raises(ServerUnavailable, match="has expired; on the server: seqfed ca issue server"):
            await asked(address, place.credentials(Role.OPERATOR, "alice"))


async def test_a_plaintext_server_gets_nothing_from_a_client_with_credentials(place: Place) -> None:
    async with a_plaintext_server(place) as address:
        with pytest.raises(ServerUnavailable, match="speaks plaintext, and not TLS"):
            await asked(address, place.credentials(Role.OPERATOR, "alice"))
        assert await asked(address, None) == []


@contextlib.asynccontextmanager
async def a_plaintext_server(place: Place) -> AsyncIterator[str]:
    async with serving(ServerSettings(port=0, state=place.folder / "plain")) as address:
        yield address


@contextlib.asynccontextmanager
async def bare_server(shows: Credentials) -> AsyncIterator[str]:
    """Something with TLS that our own daemon would not start with."""
    server = grpc.aio.server()
    credentials = grpc.ssl_server_credentials([(shows.key, shows.certificate)], shows.ca, True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def test_ones_own_certificate_is_looked_at_before_anything_is_sent(place: Place) -> None:
    folder = place.credentials(Role.CLIENT, "a", ago=9 * DAY)
    with pytest.raises(Unauthenticated, match="ended on .*; enrol anew with: seqfed client enroll --force"):
        async with connected("127.0.0.1:1", insecure=False, credentials=folder):
            pytest.fail("there is a channel")
    (folder / identity.KEY).chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        async with connected("127.0.0.1:1", insecure=False, credentials=folder):
            pytest.fail("there is a channel")


# What a server does not start with ------------------------------------------------------------------------------------


async def refusal(place: Place, **settings: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        async with a_server(place, **settings):
            pytest.fail("it serves")
    assert not (place.folder / "state").exists()
    return str(refused.value)


async def test_a_server_says_what_is_wrong_with_its_credentials(place: Place, stranger: Place) -> None:
    assert "seqfed ca issue server" in await refusal(place, tls=place.folder / "none")
    assert "the certificate ended on" in await refusal(place, tls=place.server(ago=9 * DAY))
    assert "certificate of client 'a', and not a server's" in await refusal(
        place, tls=place.credentials(Role.CLIENT, "a")
    )
    assert "not of the CA in" in await refusal(place, tls=stranger.server())
    assert "make a CA with `seqfed ca init`" in await refusal(place, ca=place.folder / "none")
    open_to_all = place.server()
    (open_to_all / identity.KEY).chmod(0o644)
    assert "chmod 600" in await refusal(place, tls=open_to_all)
    (place.folder / "ca" / "ca.key").chmod(0o644)
    assert "chmod 600" in await refusal(place)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
async def test_off_loopback_it_wants_certificates(host: str, tmp_path: Path) -> None:
    with pytest.raises(InsecureRefused, match="make a CA with `seqfed ca init`.*--tls DIR.*--insecure"):
        async with serving(ServerSettings(host=host, port=0, state=tmp_path / "state")):
            pytest.fail("it serves")
    assert not (tmp_path / "state").exists()


async def test_with_certificates_it_serves_off_loopback(place: Place) -> None:
    async with a_server(place, host="0.0.0.0") as server:
        _, port = addresses.parse(server.address)
        assert await asked(f"localhost:{port}", place.credentials(Role.OPERATOR, "alice")) == []


async def test_over_ipv6_too(place: Place) -> None:
    with socket.socket(socket.AF_INET6) as one:
        try:
            one.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    async with a_server(place, place.server(hosts=("::1",)), host="::1") as server:
        assert server.address.startswith("[::1]:")
        assert await asked(server.address, place.credentials(Role.OPERATOR, "alice")) == []


async def test_a_server_says_in_time_that_its_certificate_will_end(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_server(place, place.server(ago=4 * DAY)):
        pass
    assert caplog.text.count("the server's certificate ends on") == 1
    assert "seqfed ca issue server NAME... --force" in caplog.text


async def test_an_enrolment_port_in_use_is_told(place: Place) -> None:
    async with a_plaintext_server(place) as address:
        _, port = addresses.parse(address)
        with pytest.raises(PortInUse, match="pass another --enroll-port"):
            async with a_server(place, enroll_port=port):
                pytest.fail("it serves")


async def test_without_a_ca_nobody_enrols(place: Place) -> None:
    async with a_server(place, ca=None) as server:
        assert server.enroll == ""
        assert await asked(server.address, place.credentials(Role.OPERATOR, "alice")) == []


async def test_a_new_certificate_counts_from_the_next_connection_on(place: Place) -> None:
    tls, other = place.server(), place.server()
    async with a_server(place, tls) as server:
        before = await asyncio.to_thread(shaken, server.address, place)
        for name in (identity.KEY, identity.CERTIFICATE):
            (other / name).replace(tls / name)
        after = await asyncio.to_thread(shaken, server.address, place)
        assert before.serial_number != after.serial_number
        (tls / identity.CERTIFICATE).write_bytes(b"nonsense")  # the old one stays
        again = await asyncio.to_thread(shaken, server.address, place)
        assert again.serial_number == after.serial_number
        enrolling_port = await asyncio.to_thread(shaken, server.enroll, place)
        assert enrolling_port.serial_number == after.serial_number


# Enrolment ------------------------------------------------------------------------------------------------------------


async def enrolled(address: str, file: Path, folder: Path, **more: Any) -> identity.Identity:
    token, text, ca = load_token(file)
    return await soon(enroll(address, text, ca, token.client, folder, **more))


async def test_who_has_a_token_enrols_and_belongs(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    folder, file = tmp_path / "a" / "credentials", place.token("a")
    async with a_server(place, certificate_days=30) as server:
        whose = await enrolled(server.enroll, file, folder)
        assert (whose.role, whose.name) == (Role.CLIENT, "a")
        assert 29 * DAY < whose.not_after - identity.now() <= 30 * DAY
        assert identity.holder(identity.load_credentials(folder), identity.now(), folder) == whose
        assert (folder / identity.KEY).stat().st_mode & 0o777 == 0o600
        async with connected(server.address, False, folder) as channel:
            with pytest.raises(UnknownSession, match="join first"), raising(server.address):  # so far it gets
                await FederationStub(channel).UploadStatus(federation_pb2.UploadStatusRequest())
        operator = place.credentials(Role.OPERATOR, "alice")
        entries = await audited(server, operator, "enrolled")
    assert [one["client"] for one in entries] == ["a"]
    assert int(entries[0]["serial"], 16) == whose.serial
    _, token, _ = load_token(file)
    assert token not in caplog.text
    assert "PRIVATE" not in caplog.text


async def audited(server: Serving, operator: Path, kind: str) -> list[dict[str, Any]]:
    """What the audit log says of this kind, once it says anything."""
    async with connected(server.address, False, operator) as channel, asyncio.timeout(PATIENCE):
        found: list[dict[str, Any]] = []
        while not found:
            calls = AdminStub(channel).ListAudit(admin_pb2.ListAuditRequest())
            found = [json.loads(one.body) async for one in calls if one.kind == kind]
        return found


async def test_a_token_works_once_also_after_a_restart(place: Place, tmp_path: Path) -> None:
    file = place.token("a")
    async with a_server(place) as server:
        await enrolled(server.enroll, file, tmp_path / "one")
        with pytest.raises(Unauthenticated, match="was used before, and works once.*seqfed enroll token"):
            await enrolled(server.enroll, file, tmp_path / "two")
    async with a_server(place) as server:
        with pytest.raises(Unauthenticated, match="was used before"):
            await enrolled(server.enroll, file, tmp_path / "three")
        assert not (tmp_path / "two" / identity.CERTIFICATE).exists()
        refused = await audited(server, place.credentials(Role.OPERATOR, "alice"), "refused")
    assert {(one["who"], one["method"], one["error"]) for one in refused} == {
        ("ipv4:127.0.0.1", "/seqfed.v1.Enrollment/Enroll", "Unauthenticated")
    }


async def test_of_many_that_bring_the_same_token_at_once_one_enrols(place: Place, tmp_path: Path) -> None:
    file = place.token("a")
    async with a_server(place) as server:
        tries = [enrolled(server.enroll, file, tmp_path / f"{number}") for number in range(8)]
        found = await asyncio.gather(*tries, return_exceptions=True)
    assert sum(isinstance(one, identity.Identity) for one in found) == 1
    assert sum(isinstance(one, Unauthenticated) for one in found) == 7


async def test_a_request_that_cannot_be_read_does_not_use_up_the_token(place: Place, tmp_path: Path) -> None:
    file = place.token("a")
    _, text, ca = load_token(file)
    async with a_server(place) as server:
        async with grpc.aio.secure_channel(server.enroll, grpc.ssl_channel_credentials(ca)) as channel:
            for csr in (b"", b"nonsense", ca):
                with pytest.raises(Unauthenticated, match="cannot be read"), raising(server.enroll):
                    await EnrollmentStub(channel).Enroll(federation_pb2.EnrollRequest(token=text, csr=csr))
        await enrolled(server.enroll, file, tmp_path / "a")


async def test_the_token_says_who_it_is_for_and_not_the_request(place: Place) -> None:
    _, text, ca = load_token(place.token("a"))
    csr = identity.request(identity.new_key(), "operator")
    trusted = grpc.ssl_channel_credentials(ca)
    async with a_server(place) as server, grpc.aio.secure_channel(server.enroll, trusted) as channel:
        reply = await EnrollmentStub(channel).Enroll(federation_pb2.EnrollRequest(token=text, csr=csr))
    found = identity.verify_chain(reply.certificate, place.ca.pem, identity.now())
    assert (found.role, found.name) == (Role.CLIENT, "a")


async def test_another_federations_token_and_another_federations_server_are_refused(
    place: Place, stranger: Place, tmp_path: Path
) -> None:
    _, theirs, _ = load_token(stranger.token("a"))
    async with a_server(place) as server:
        with pytest.raises(Unauthenticated, match="not one of this federation's CA"):
            await enroll(server.enroll, theirs, place.ca.pem, "a", tmp_path / "a")
        with pytest.raises(ServerUnavailable, match="not of this federation's CA"):  # nothing was sent to it
            await enrolled(server.enroll, stranger.token("a"), tmp_path / "b")


async def test_an_expired_token_is_refused_on_both_sides(place: Place, tmp_path: Path) -> None:
    now = identity.now() - DAY
    text = tokens.sign(tokens.new("a", place.ca.pem, now, 60), place.ca.key)
    identity.write_private(tmp_path / "old.token", tokens.to_file(text, place.ca.pem))
    with pytest.raises(Unauthenticated, match="token for 'a' expired on"):
        load_token(tmp_path / "old.token")
    async with a_server(place) as server:
        with pytest.raises(Unauthenticated, match="token for 'a' expired on"):
            await enroll(server.enroll, text, place.ca.pem, "a", tmp_path / "a")


async def test_a_token_file_that_others_can_read_is_refused(place: Place) -> None:
    file = place.token("a")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_token(file)


async def test_a_certificate_is_not_enrolled_over_unless_asked_for(place: Place, tmp_path: Path) -> None:
    async with a_server(place) as server:
        first = await enrolled(server.enroll, place.token("a"), tmp_path / "a")
        key = (tmp_path / "a" / identity.KEY).read_bytes()
        again = place.token("a")
        with pytest.raises(ConfigError, match="has a certificate already.*--force"):
            await enrolled(server.enroll, again, tmp_path / "a")
        assert (tmp_path / "a" / identity.KEY).read_bytes() == key
        second = await enrolled(server.enroll, again, tmp_path / "a", replace=True)
        assert second.serial != first.serial
        assert (tmp_path / "a" / identity.KEY).read_bytes() != key


async def test_an_enrolment_that_failed_half_way_goes_on_with_the_same_key(place: Place, tmp_path: Path) -> None:
    file = place.token("a")
    with pytest.raises(ServerUnavailable, match="no server answers"):
        await enrolled("127.0.0.1:1", file, tmp_path / "a")
    key = (tmp_path / "a" / identity.KEY).read_bytes()
    async with a_server(place) as server:
        await enrolled(server.enroll, file, tmp_path / "a")
    assert (tmp_path / "a" / identity.KEY).read_bytes() == key


async def test_the_main_port_enrols_nobody_and_the_enrolment_port_does_nothing_else(
    place: Place, tmp_path: Path
) -> None:
    async with a_server(place) as server:
        with pytest.raises(Unauthenticated, match="no certificate that it accepts"):
            await enrolled(server.address, place.token("a"), tmp_path / "a")
        with pytest.raises(ServerUnavailable, match="not a seqfed server of this version"):
            await asked(server.enroll, place.credentials(Role.OPERATOR, "alice"))


def an_office(place: Place, **more: Any) -> Office:
    return Office(place.ca, lambda *_: True, **{"days": 1.0, "a_second": 2.0, **more})


async def test_strangers_are_told_why_no_faster_than_the_setting_says_and_hold_up_nobody(place: Place) -> None:
    now = 100.0
    office = an_office(place, clock=lambda: now)
    for _ in range(int(BURST)):
        with pytest.raises(Unauthenticated):
            await office.enroll("x", b"")
    with pytest.raises(RateLimited, match="more than 2 enrolments a second"):
        await office.enroll("x", b"")
    _, text, _ = load_token(place.token("a"))
    reply = await office.enroll(text, identity.request(identity.new_key(), "a"))
    assert identity.identity_of(reply.certificate).name == "a"
    now += 0.5
    with pytest.raises(Unauthenticated):
        await office.enroll("x", b"")
    with pytest.raises(RateLimited):
        await office.enroll("x", b"")


async def test_a_revocation_ends_the_tokens_before_it(place: Place) -> None:
    _, text, _ = load_token(place.token("a"))
    csr = identity.request(identity.new_key(), "a")
    revoked = identity.now().timestamp()
    office = an_office(place, revoked_at=lambda _: revoked)
    with pytest.raises(Unauthenticated, match="made before that client was revoked"):
        await office.enroll(text, csr)
    later = tokens.Token(**{**dict(tokens.new("a", place.ca.pem, identity.now(), 60)), "issued": revoked + 0.001})
    reply = await office.enroll(tokens.sign(later, place.ca.key), csr)
    assert (identity.identity_of(reply.certificate).not_before + authority.EARLIER).timestamp() > revoked


async def test_a_server_is_not_renewed_over_the_wire(place: Place) -> None:
    whose = identity.identity_of(identity.load_credentials(place.server()).certificate)
    with pytest.raises(NotAllowed, match="seqfed ca issue server"):
        await an_office(place).renew(identity.request(identity.new_key(), "server"), whose)


def test_one_enrols_at_the_port_after_the_servers_unless_told_otherwise() -> None:
    assert enrolling.counter("fed.example.org:80", None) == "fed.example.org:81"
    with pytest.raises(ConfigError, match="--enroll-port"):
        enrolling.counter("fed.example.org:65535", None)


# Renewal --------------------------------------------------------------------------------------------------------------

ALMOST_OVER: dict[str, Any] = {"ago": datetime.timedelta(days=8), "days": 10.0}  # less than a third is left


async def test_a_session_renews_its_certificate_and_the_task_in_hand_goes_on(place: Place) -> None:
    formulas = [Formula("a"), Formula("b")]
    folders = [
        place.credentials(Role.CLIENT, "a", **ALMOST_OVER),
        place.credentials(Role.CLIENT, "b"),
    ]
    before = [identity.load_credentials(one) for one in folders]
    begun, may_go_on = formulas[0].gate(1)
    held, go = threading.Event(), threading.Event()

    class Held(Renewal):
        """Renews once the training has begun."""

        async def renew(self, call: Callable[[bytes], Awaitable[bytes]]) -> identity.Identity:
            held.set()
            await asyncio.to_thread(go.wait, PATIENCE)
            return await super().renew(call)

    operator = place.credentials(Role.OPERATOR, "alice")
    async with a_server(place) as server:
        sessions = [session_with(one, server.address, folder) for one, folder in zip(formulas, folders, strict=True)]
        sessions[0]._renewal = Held(folders[0])
        async with running(*sessions), operating(server.address, insecure=False, credentials=operator) as calls:
            run = (await calls.submit(SPEC, None)).run
            watched = asyncio.create_task(ended(calls.watch(run)))
            await soon(asyncio.to_thread(begun.wait, PATIENCE))
            assert held.is_set()
            go.set()
            (entry,) = await audited(server, operator, "renewed")
            may_go_on.set()
            assert (await soon(watched)).phase == "finished"
    assert [round_ for round_, _ in formulas[0].trained] == [1, 2]  # each once
    after = [identity.load_credentials(one) for one in folders]
    assert after[0].key == before[0].key
    assert after[0].certificate != before[0].certificate
    assert entry["client"] == "a"
    assert int(entry["serial"], 16) == identity.identity_of(after[0].certificate).serial
    assert after[1] == before[1]


async def test_where_nothing_renews_a_session_goes_on_with_what_it_has(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    formulas = [Formula("a"), Formula("b")]
    folders = [place.credentials(Role.CLIENT, one.client, **ALMOST_OVER) for one in formulas]
    operator = place.credentials(Role.OPERATOR, "alice")
    async with a_server(place, ca=None) as server:
        sessions = [session_with(one, server.address, folder) for one, folder in zip(formulas, folders, strict=True)]
        async with running(*sessions), operating(server.address, insecure=False, credentials=operator) as calls:
            run = (await calls.submit(SPEC, None)).run
            assert (await soon(ended(calls.watch(run)))).phase == "finished"
    assert "could not be renewed: this server renews no certificates" in caplog.text


async def test_a_renewal_takes_nothing_that_is_not_its_own(place: Place, stranger: Place) -> None:
    folder = place.credentials(Role.CLIENT, "a", **ALMOST_OVER)
    before = identity.load_credentials(folder)
    renewal = Renewal(folder)
    assert renewal.wait() < 0 < Renewal(place.credentials(Role.CLIENT, "a")).wait()

    def answering(ca: Authority, role: Role, name: str, **more: Any) -> Callable[[bytes], Awaitable[bytes]]:
        async def answer(csr: bytes) -> bytes:
            key = identity.public_key_of(more.pop("csr", csr))
            return ca.issue(role, name, key, now=identity.now(), **more)

        return answer

    for answer, kind in (
        (answering(stranger.ca, Role.CLIENT, "a"), Unauthenticated),
        (answering(place.ca, Role.CLIENT, "b"), Unauthenticated),
        (answering(place.ca, Role.OPERATOR, "a"), Unauthenticated),
        (answering(place.ca, Role.CLIENT, "a", csr=identity.request(identity.new_key(), "a")), Unauthenticated),
        (answering(place.ca, Role.CLIENT, "a", days=0.5), SeqfedError),
    ):
        with pytest.raises(kind):
            await renewal.renew(answer)
        assert identity.load_credentials(folder) == before
        assert len(list(folder.iterdir())) == 3
    await renewal.renew(answering(place.ca, Role.CLIENT, "a"))
    assert identity.load_credentials(folder).certificate != before.certificate
    assert renewal.wait() > 0
