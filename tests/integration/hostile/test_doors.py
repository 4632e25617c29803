"""Those whom TLS keeps out, at both ports.

What ends in the handshake never becomes a call, so the audit log has no line of it; each test here foretells none.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from tests.integration.hostile.siege import Siege, besieged
from tests.server.conftest import soon
from tests.server.members import Guarded

from seqfed.client.channel import raising
from seqfed.common import addresses, authority, identity
from seqfed.common.errors import InternalError, ServerUnavailable, Unauthenticated
from seqfed.common.identity import Credentials, Role
from seqfed.v1 import admin_pb2, federation_pb2
from seqfed.v1.admin_pb2_grpc import AdminStub
from seqfed.v1.federation_pb2_grpc import EnrollmentStub

DAY = datetime.timedelta(days=1)


def strangers(server: Guarded, folder: Path) -> Credentials:
    other = authority.create(folder / "other", identity.now())
    return server.issue(Role.OPERATOR, "ops", ca=other)


def masked(server: Guarded, folder: Path) -> Credentials:
    """Signed by another key under our CA's name."""
    other = authority.create(folder / "other", identity.now())
    return server.issue(Role.OPERATOR, "ops", ca=replace(other, certificate=server.ca.certificate))


def anothers_key(server: Guarded, _: Path) -> Credentials:
    """A good certificate, seen on the wire, without its key."""
    return replace(server.operator, key=identity.new_key())


def of_a_member(server: Guarded, _: Path) -> Credentials:
    """Signed by a client's key as if it were a CA's."""
    own = server.issue(Role.CLIENT, "m")
    mine = authority.Authority(
        identity.load_key(own.key, "m"), identity.load_certificate(own.certificate), own.certificate
    )
    made = mine.credentials(Role.OPERATOR, "ops", now=identity.now())
    return replace(made, certificate=made.certificate + own.certificate)  # with the chain up to the CA


STRANGERS: dict[str, Callable[[Guarded, Path], Credentials]] = {
    "another CA's": strangers,
    "another CA's under our CA's name": masked,
    "a client's own": of_a_member,
    "expired": lambda server, _: server.issue(Role.OPERATOR, "ops", now=identity.now() - 9 * DAY, days=5),
    "not yet valid": lambda server, _: server.issue(Role.OPERATOR, "ops", now=identity.now() + 2 * DAY),
    "the server's": lambda server, _: server.issue(Role.SERVER, "server"),
}


async def runs(channel: grpc.aio.Channel, address: str) -> None:
    with raising(address):
        async for _ in AdminStub(channel).ListRuns(admin_pb2.ListRunsRequest(), timeout=20):
            pass


@pytest.mark.parametrize("who", STRANGERS)
async def test_a_bad_certificate_does_not_get_in(tmp_path: Path, who: str) -> None:
    async with besieged(tmp_path) as siege:
        channel = await siege.server.dial(STRANGERS[who](siege.server, tmp_path))
        with pytest.raises(Unauthenticated, match="no certificate that it accepts"):
            await runs(channel, siege.server.address)


async def test_without_a_certificate_or_without_tls_nobody_gets_in(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        nobody = grpc.ssl_channel_credentials(siege.server.ca.pem)
        for channel in (
            grpc.aio.secure_channel(siege.server.address, nobody),
            grpc.aio.insecure_channel(siege.server.address),
        ):
            async with channel:
                with pytest.raises(Unauthenticated, match="no certificate that it accepts"):
                    await runs(channel, siege.server.address)


async def test_a_certificate_without_its_key_cannot_even_be_shown(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        channel = await siege.server.dial(anothers_key(siege.server, tmp_path))
        with pytest.raises((ServerUnavailable, Unauthenticated, InternalError)):
            await runs(channel, siege.server.address)


async def test_nothing_but_enrolment_is_served_at_its_port(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        async with at_the_counter(siege) as channel:
            with pytest.raises(ServerUnavailable, match="is not a seqfed server"):  # the method is not there
                await runs(channel, siege.counter)
        async with grpc.aio.insecure_channel(siege.counter) as channel:
            with pytest.raises(Unauthenticated), raising(siege.counter):
                await EnrollmentStub(channel).Enroll(federation_pb2.EnrollRequest(), timeout=20)


@contextlib.asynccontextmanager
async def at_the_counter(siege: Siege) -> AsyncIterator[grpc.aio.Channel]:
    credentials = grpc.ssl_channel_credentials(siege.server.ca.pem)
    async with grpc.aio.secure_channel(siege.counter, credentials) as channel:
        yield channel


# Below gRPC -----------------------------------------------------------------------------------------------------------


def context_of(
    folder: Path, own: Credentials, highest: ssl.TLSVersion, protocols: list[str], ciphers: str = "ALL"
) -> ssl.SSLContext:
    """A client that would do everything; raises ssl.SSLError if its own library has none of these ciphers."""
    identity.save_credentials(folder, own, replace=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder / identity.CA)
    context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    if protocols:
        context.set_alpn_protocols(protocols)
    context.minimum_version, context.maximum_version = ssl.TLSVersion.MINIMUM_SUPPORTED, highest
    context.load_cert_chain(folder / identity.CERTIFICATE, folder / identity.KEY)
    return context


def handshake(address: str, context: ssl.SSLContext) -> str | None:
    """The version agreed upon; raises OSError, or EOFError if it is over at once."""
    raw = socket.create_connection(addresses.parse(address), 10)
    with context.wrap_socket(raw, server_hostname="localhost") as wrapped:
        wrapped.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
        if not wrapped.recv(1):
            raise EOFError
        return wrapped.version()


OLD = {
    "TLS 1.0": (ssl.TLSVersion.TLSv1, ["h2"], "ALL"),
    "TLS 1.1": (ssl.TLSVersion.TLSv1_1, ["h2"], "ALL"),
    "no ALPN": (ssl.TLSVersion.MAXIMUM_SUPPORTED, [], "ALL"),
    "HTTP/1.1": (ssl.TLSVersion.MAXIMUM_SUPPORTED, ["http/1.1"], "ALL"),
    "no encryption": (ssl.TLSVersion.TLSv1_2, ["h2"], "eNULL"),
    "nobody's key": (ssl.TLSVersion.TLSv1_2, ["h2"], "aNULL"),
    "RC4 and 3DES": (ssl.TLSVersion.TLSv1_2, ["h2"], "3DES:RC4"),
    "no forward secrecy": (ssl.TLSVersion.TLSv1_2, ["h2"], "kRSA"),
}


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_tls_is_not_talked_down(tmp_path: Path) -> None:
    tried = set()
    async with besieged(tmp_path) as siege:
        own, operator = tmp_path / "own", siege.server.operator
        for how, (highest, protocols, ciphers) in OLD.items():
            try:
                context = context_of(own, operator, highest, protocols, ciphers)
            except ssl.SSLError:  # this side's own library no longer has it
                continue
            tried.add(how)
            for port in (siege.server.address, siege.counter):
                with pytest.raises((OSError, EOFError)):
                    await soon(asyncio.to_thread(handshake, port, context))
        context = context_of(own, operator, ssl.TLSVersion.MAXIMUM_SUPPORTED, ["h2"])
        assert await soon(asyncio.to_thread(handshake, siege.server.address, context)) == "TLSv1.3"
    assert tried >= {"TLS 1.0", "TLS 1.1", "no ALPN", "HTTP/1.1", "no forward secrecy"}


def said(address: str, words: bytes) -> bytes:
    """What comes back for these bytes."""
    with socket.create_connection(addresses.parse(address), 10) as raw:
        raw.sendall(words)
        with contextlib.suppress(OSError):  # ENOTCONN: the server has hung up already
            raw.shutdown(socket.SHUT_WR)
        heard = b""
        while data := raw.recv(4096):
            heard += data
        return heard


NOISE = {
    "nothing": b"",
    "HTTP": b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP/2 in plaintext": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9) * 100,
    "noise": bytes(range(256)) * 64,
    "a hello that never ends": b"\x16\x03\x01\x40\x00\x01\x00\x3f\xfc\x03\x03" + bytes(1000),
}


async def test_what_is_no_tls_hears_nothing_of_the_server(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        for port in (siege.server.address, siege.counter):
            for what, words in NOISE.items():
                with contextlib.suppress(ConnectionError):
                    heard = await soon(asyncio.to_thread(said, port, words))
                    assert len(heard) < 64, (what, heard)  # an alert of TLS at most


async def test_open_connections_that_say_nothing_keep_nobody_out(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        host, port = addresses.parse(siege.server.address)
        with contextlib.ExitStack() as stack:
            for _ in range(300):
                stack.enter_context(socket.create_connection((host, port), 10))
            await siege.outsider("late", listens=False)
            await siege.waits()


async def test_the_log_of_who_was_kept_out_is_not_the_audit_log(tmp_path: Path) -> None:
    """Whoever gets in afterwards with the same name leaves a line; the handshake that failed before left none."""
    async with besieged(tmp_path) as siege:
        channel = await siege.server.dial(STRANGERS["expired"](siege.server, tmp_path))
        with pytest.raises(Unauthenticated):
            await runs(channel, siege.server.address)
        told = [json.loads(one.body) for one in await siege.server.audit()]
        assert not [one for one in told if "error" in one]
