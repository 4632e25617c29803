"""The counter where certificates are given out: tokens used twice, too late, altered; requests that are none; floods."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from tests.integration.hostile.siege import Siege, a_token, besieged
from tests.server.conftest import Site, busy_database, soon

from seqfed.client.enroll import enroll
from seqfed.common import authority, identity, tokens
from seqfed.common.errors import NotAllowed, RateLimited, Unauthenticated
from seqfed.common.identity import Role
from seqfed.server import audit, enrollment
from seqfed.v1 import federation_pb2
from seqfed.v1.federation_pb2_grpc import EnrollmentStub

METHOD = "/seqfed.v1.Enrollment/Enroll"
HERE = "ipv4:127.0.0.1"  # all that the server knows of a stranger


async def ask(siege: Siege, token: str, csr: bytes) -> federation_pb2.Certificate:
    credentials = grpc.ssl_channel_credentials(siege.server.ca.pem)
    async with grpc.aio.secure_channel(siege.counter, credentials) as channel:
        return await soon(EnrollmentStub(channel).Enroll(federation_pb2.EnrollRequest(token=token, csr=csr)))


def csr(name: str = "new") -> bytes:
    return identity.request(identity.new_key(), name)


async def test_a_token_works_once_and_for_its_own_name(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        token = a_token(siege.server.ca, "new")
        found = identity.identity_of((await ask(siege, token, csr("b"))).certificate)
        assert (found.role, found.name) == (Role.CLIENT, "new")  # whatever the request says of itself
        for name in ("new", "b"):
            with siege.refused(Unauthenticated, HERE, METHOD, "was used before"):
                await ask(siege, token, csr(name))


async def test_of_many_who_bring_the_same_token_at_once_one_is_served(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        token = a_token(siege.server.ca, "new")
        done = await asyncio.gather(*(ask(siege, token, csr()) for _ in range(8)), return_exceptions=True)
        assert len([one for one in done if isinstance(one, federation_pb2.Certificate)]) == 1
        siege.lines += [(HERE, METHOD, "Unauthenticated")] * 7


async def test_a_client_does_not_take_the_certificate_of_another_name(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        token, folder = a_token(siege.server.ca, "new"), tmp_path / "own"
        with pytest.raises(Unauthenticated, match="and not of 'other'"):
            await enroll(siege.counter, token, siege.server.ca.pem, "other", folder)
        assert not (folder / identity.CERTIFICATE).exists()


def _payload(token: str, **changes: Any) -> str:
    """The same signature under another payload."""
    payload, signature = token.split(".")
    content = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return base64.urlsafe_b64encode(json.dumps({**content, **changes}).encode()).rstrip(b"=").decode() + "." + signature


TOKENS: dict[str, Callable[[Siege, Path], str]] = {
    "none": lambda _, __: "",
    "a dot": lambda _, __: ".",
    "noise": lambda _, __: "A" * 2_000,
    "lines": lambda siege, _: a_token(siege.server.ca, "new") + "\n2026-01-01 INFO all is well",
    "control characters": lambda _, __: "\x00\x1b[2J.\u202e",
    "expired": lambda siege, _: a_token(siege.server.ca, "new", -1.0),
    "another CA's": lambda _, folder: a_token(authority.create(folder / "other", identity.now()), "new"),
    "another name": lambda siege, _: _payload(a_token(siege.server.ca, "new"), client="b"),
    "a later end": lambda siege, _: _payload(a_token(siege.server.ca, "new", -1.0), expires=4e9),
    "an operator's": lambda siege, _: _payload(a_token(siege.server.ca, "new"), role="operator"),
    "another nonce": lambda siege, _: _payload(a_token(siege.server.ca, "new"), nonce="0" * 32),
    "a signature of another": lambda siege, _: (
        a_token(siege.server.ca, "new").split(".")[0] + "." + a_token(siege.server.ca, "b").split(".")[1]
    ),
    "a member's own": lambda siege, _: tokens.sign(
        tokens.new("new", siege.server.ca.pem, identity.now(), 60.0),
        identity.load_key(siege.server.operator.key, "ops"),
    ),
}


def rsa_request() -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "new")])
    key = rsa.generate_private_key(65537, 2048)
    return x509.CertificateSigningRequestBuilder(name).sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def other_curve() -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "new")])
    key = ec.generate_private_key(ec.SECP384R1())
    return x509.CertificateSigningRequestBuilder(name).sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def altered() -> bytes:
    lines = csr().decode().splitlines()
    body = bytearray(base64.b64decode("".join(lines[1:-1])))
    body[-5] ^= 1  # in the signature
    return "\n".join([lines[0], base64.b64encode(bytes(body)).decode(), lines[-1], ""]).encode()


REQUESTS: dict[str, Callable[[], bytes]] = {
    "none": lambda: b"",
    "noise": lambda: bytes(range(256)) * 16,
    "huge": lambda: csr() + b"\n" * 20_000,
    "of RSA": rsa_request,
    "of another curve": other_curve,
    "not signed with its own key": altered,
    "a certificate": lambda: csr().replace(b"CERTIFICATE REQUEST", b"CERTIFICATE"),
}


async def test_a_token_that_is_not_the_cas_buys_nothing(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        for what, make in TOKENS.items():
            with siege.refused(Unauthenticated, HERE, METHOD):
                found = await ask(siege, make(siege, tmp_path), csr())
                pytest.fail(f"{what}: {found}")


async def test_a_request_that_is_none_does_not_use_its_token_up(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        token = a_token(siege.server.ca, "new")
        for what, make in REQUESTS.items():
            with siege.refused(Unauthenticated, HERE, METHOD):
                found = await ask(siege, token, make())
                pytest.fail(f"{what}: {found}")
        assert (await ask(siege, token, csr())).certificate


async def test_a_token_of_before_a_revocation_is_over(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        early = [a_token(siege.server.ca, "new") for _ in range(2)]
        await ask(siege, early[0], csr())
        await siege.server.revoke("new")
        with siege.refused(Unauthenticated, HERE, METHOD, "made before that client was revoked"):
            await ask(siege, early[1], csr())
        await ask(siege, a_token(siege.server.ca, "new"), csr())


async def test_a_flood_of_bad_tokens_keeps_no_good_one_out(tmp_path: Path) -> None:
    async with besieged(tmp_path, enrolments_per_s=1.0, refusals_per_minute=5) as siege:
        bad = _payload(a_token(siege.server.ca, "new"), client="b")
        credentials = grpc.ssl_channel_credentials(siege.server.ca.pem)
        heard: set[str] = set()
        async with grpc.aio.secure_channel(siege.counter, credentials) as channel:
            stub = EnrollmentStub(channel)
            for _ in range(60):
                try:
                    await soon(stub.Enroll(federation_pb2.EnrollRequest(token=bad, csr=b"")))
                except grpc.aio.AioRpcError as error:
                    heard.add(error.code().name)
        assert heard == {"UNAUTHENTICATED", "RESOURCE_EXHAUSTED"}
        assert (await ask(siege, a_token(siege.server.ca, "new"), csr())).certificate
        siege.lines += [(HERE, METHOD, "Unauthenticated")] * 5
        siege.more[audit.STRANGERS] = 55  # counted, not told one by one


async def test_a_renewal_makes_nobody_somebody_else(tmp_path: Path) -> None:
    """The request's own subject says nothing, a server's certificate is not renewed, and a bad request is refused."""
    async with besieged(tmp_path) as siege:
        m = Site(await siege.server.channel(Role.CLIENT, "m"), "m")
        reply = await m.stub.Renew(federation_pb2.RenewRequest(csr=csr("b")))
        found = identity.identity_of(reply.certificate)
        assert (found.role, found.name) == (Role.CLIENT, "m")
        for make in REQUESTS.values():
            with siege.refused(Unauthenticated, "client:m", "/seqfed.v1.Federation/Renew"):
                await m.stub.Renew(federation_pb2.RenewRequest(csr=make()))


async def test_a_certificate_is_written_down_before_it_is_given_out(tmp_path: Path) -> None:
    """Who has one, and kills the server at once, is in the log all the same: nothing of this is written behind."""
    async with besieged(tmp_path) as siege:
        m = Site(await siege.server.channel(Role.CLIENT, "m"), "m")
        for reply, kind in (
            (ask(siege, a_token(siege.server.ca, "new"), csr()), audit.Kind.ENROLLED),
            (m.stub.Renew(federation_pb2.RenewRequest(csr=csr())), audit.Kind.RENEWED),
        ):
            found = identity.identity_of((await reply).certificate)
            with audit.reading(tmp_path / "state", None) as entries:
                said = [(one.kind, json.loads(one.body).get("serial")) for one in entries]
            assert (kind, f"{found.serial:x}") in said


async def test_renewals_do_not_make_the_log_grow(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        m = Site(await siege.server.channel(Role.CLIENT, "m"), "m")
        request = federation_pb2.RenewRequest(csr=csr())
        for _ in range(enrollment.RENEWALS):
            await m.stub.Renew(request)
        for _ in range(5):
            with siege.refused(RateLimited, "client:m", "/seqfed.v1.Federation/Renew", "was given 10 certificates"):
                await m.stub.Renew(request)
        assert len([one for one in await siege.server.audit() if one.kind == audit.Kind.RENEWED]) == enrollment.RENEWALS


async def test_a_used_token_is_no_work_for_the_database(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        token = a_token(siege.server.ca, "new")
        await ask(siege, token, csr())
        with busy_database(tmp_path / "state"), siege.refused(Unauthenticated, HERE, METHOD, "was used before"):
            await ask(siege, token, csr())


async def test_the_counter_speaks_only_to_who_trusts_its_ca(tmp_path: Path) -> None:
    """A token file that was exchanged on the way: the client does not dial, for the token vouches for its CA."""
    async with besieged(tmp_path):
        ours, theirs = (authority.create(tmp_path / name, identity.now()) for name in ("ours", "theirs"))
        content = tokens.to_file(a_token(ours, "new"), theirs.pem)
        with pytest.raises((Unauthenticated, NotAllowed, RateLimited)):
            tokens.from_file(content, "the file", identity.now())
