"""Failed calls raised again as what they were at the server."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import grpc
import pytest
import typer
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from typer.testing import CliRunner

from seqfed.client.channel import connected, raising
from seqfed.client.cli import client
from seqfed.common import authority, identity
from seqfed.common.errors import (
    ConfigError,
    InsecureRefused,
    InternalError,
    SeqfedError,
    ServerUnavailable,
    TooLarge,
    Unauthenticated,
    every_error,
)
from seqfed.common.identity import Role
from seqfed.common.wire import ERROR_DOMAIN

commands = typer.Typer()
commands.command()(client)

WHERE = "fed.example.org:7733"


def failed(code: grpc.StatusCode, message: str = "", reason: str = "", domain: str = ERROR_DOMAIN) -> Exception:
    """What grpc.aio raises for this answer."""
    metadata = grpc.aio.Metadata()
    if reason:
        detail = any_pb2.Any()
        detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain))
        status = status_pb2.Status(code=code.value[0], message=message, details=[detail])
        metadata.add("grpc-status-details-bin", status.SerializeToString())
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, message)


def raised(error: Exception) -> SeqfedError:
    with pytest.raises(SeqfedError) as found, raising(WHERE):
        raise error
    return found.value


@pytest.mark.parametrize("name", every_error())
def test_the_servers_error_is_raised_again(name: str) -> None:
    found = raised(failed(grpc.StatusCode.FAILED_PRECONDITION, "why", name))
    assert type(found) is every_error()[name]
    assert str(found) == "why"


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (failed(grpc.StatusCode.UNAVAILABLE), ServerUnavailable, f"no server answers at {WHERE} (unavailable)"),
        (failed(grpc.StatusCode.DEADLINE_EXCEEDED), ServerUnavailable, "is `seqfed server` running there"),
        (failed(grpc.StatusCode.CANCELLED), ServerUnavailable, "(cancelled)"),
        (failed(grpc.StatusCode.UNIMPLEMENTED), ServerUnavailable, f"{WHERE} is not a seqfed server of this version"),
        (failed(grpc.StatusCode.RESOURCE_EXHAUSTED, "message larger than max"), TooLarge, "larger than max"),
        (failed(grpc.StatusCode.INTERNAL, "oops"), InternalError, f"{WHERE}: INTERNAL: oops"),
        (failed(grpc.StatusCode.INTERNAL, "oops", "TooLarge", "other.org"), InternalError, "INTERNAL: oops"),
        (failed(grpc.StatusCode.ABORTED, "new here", "FromTheFuture"), SeqfedError, "new here"),
        (grpc.aio.UsageError("Channel is closed."), ServerUnavailable, f"the connection to {WHERE} was closed"),
    ],
    ids=[
        "away",
        "late",
        "cancelled",
        "stranger",
        "large",
        "internal",
        "another domain",
        "unknown class",
        "closed",
    ],
)
def test_other_failures_are_typed_too(error: Exception, kind: type[SeqfedError], said: str) -> None:
    found = raised(error)
    assert type(found) is kind
    assert said in str(found)


PREFIX = "failed to connect to all addresses; last error: UNKNOWN: ipv4:192.0.2.1:7733: "


@pytest.mark.parametrize(
    ("details", "kind", "said"),
    [
        (PREFIX + "Tls handshake failed: WRONG_VERSION_NUMBER", ServerUnavailable, "speaks plaintext, and not TLS"),
        (
            PREFIX + "CERTIFICATE_VERIFY_FAILED: certificate has expired",
            ServerUnavailable,
            "has expired; on the server",
        ),
        (
            PREFIX + "CERTIFICATE_VERIFY_FAILED: certificate is not yet valid",
            ServerUnavailable,
            "are the clocks right?",
        ),
        (PREFIX + "CERTIFICATE_VERIFY_FAILED: unsupported certificate purpose", ServerUnavailable, "do not trust it"),
        (PREFIX + "CERTIFICATE_VERIFY_FAILED: self signed", ServerUnavailable, "not of this federation's CA"),
        (PREFIX + "Hostname Verification Check failed.", ServerUnavailable, "not for this name"),
        (PREFIX + "Socket closed", Unauthenticated, "no certificate that it accepts; pass --credentials DIR"),
        (PREFIX + "recvmsg:Connection reset by peer", Unauthenticated, "no certificate that it accepts"),
        ("Socket closed", ServerUnavailable, "no server answers"),  # later, a connection breaks for other reasons
        (PREFIX + "Connection refused", ServerUnavailable, "no server answers"),
    ],
)
def test_what_tls_has_against_a_connection_is_told_in_words(details: str, kind: type[SeqfedError], said: str) -> None:
    found = raised(failed(grpc.StatusCode.UNAVAILABLE, details))
    assert type(found) is kind
    assert said in str(found)
    assert WHERE in str(found)


def test_what_is_no_failed_call_passes() -> None:
    with pytest.raises(ZeroDivisionError), raising(WHERE):
        _ = 1 / 0


@pytest.mark.parametrize(
    ("role", "remedy"),
    [
        (Role.CLIENT, "; enrol anew with: seqfed client enroll --force"),
        (Role.OPERATOR, "; make a new one where the CA is: seqfed ca issue operator anna --force"),
        (Role.VIEWER, "; make a new one where the CA is: seqfed ca issue viewer anna --force"),
    ],
)
async def test_what_has_ended_is_told_with_the_command_that_makes_a_new_one(
    role: Role, remedy: str, tmp_path: Path
) -> None:
    then = identity.now() - timedelta(days=9)
    ca = authority.create(tmp_path / "ca", then)
    identity.save_credentials(tmp_path / "own", ca.credentials(role, "anna", now=then, days=5))
    with pytest.raises(Unauthenticated) as refused:
        async with connected("127.0.0.1:1", insecure=False, credentials=tmp_path / "own"):
            pytest.fail("there is a channel")
    assert "the certificate ended on" in str(refused.value)
    assert str(refused.value).endswith(remedy)
    asked = CliRunner().invoke(commands, ["--credentials", str(tmp_path / "own"), "--data", "data.npz"])
    assert str(asked.exception) == str(refused.value)


@pytest.mark.parametrize(("address", "kind"), [("10.0.0.1:1", InsecureRefused), ("a:b", ConfigError)])
async def test_a_bad_address_is_refused_before_anything_is_sent(address: str, kind: type[SeqfedError]) -> None:
    with pytest.raises(kind):
        async with connected(address, insecure=False):
            pytest.fail("there is a channel")
