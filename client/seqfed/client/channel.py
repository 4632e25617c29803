"""Channels to a server, and the server's refusals raised again as the errors that they were there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final, cast

import grpc
import grpc_status.rpc_status
from google.rpc import error_details_pb2

from seqfed.common import addresses, identity
from seqfed.common.errors import (
    InternalError,
    NotAllowed,
    SeqfedError,
    ServerUnavailable,
    TooLarge,
    Unauthenticated,
    every_error,
)
from seqfed.common.identity import Credentials, Identity, Role
from seqfed.common.wire import ERROR_DOMAIN

OPTIONS: Final = (
    # A dead server is noticed within 12 + 16 s. Of the two, the second is what a slow link needs: gRPC hands it to the system
    # as TCP_USER_TIMEOUT too, so it also bounds how long what is sent may be under way.
    ("grpc.keepalive_time_ms", 12_000),
    ("grpc.keepalive_timeout_ms", 16_000),
    ("grpc.http2.ping_timeout_ms", 16_000),  # of the same pings, and left alone it is a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),  # the client's own backoff decides; gRPC's must not add to it
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),  # a fresh channel is a fresh connection
)
TOO_LARGE: Final = "larger than max"  # what gRPC says of a message beyond the receiver's limit
ANSWER_S: Final = 30.0  # seconds for the answer to a small call


# gRPC's words for a TLS connection that did not come about, and what is to be said instead. The last is all that a client
# sees of a server that does not accept its certificate, or to which it speaks plaintext.
REFUSALS: Final = {
    "WRONG_VERSION_NUMBER": (
        "what answers at {address} speaks plaintext, and not TLS; start that server with --tls, or, if plaintext is meant, "
        "pass --insecure and no --credentials"
    ),
    "certificate has expired": (
        "the certificate of the server at {address} has expired; on the server: seqfed ca issue server NAME... --force"
    ),
    "certificate is not yet valid": (
        "the certificate of the server at {address} is not valid yet; are the clocks right?"
    ),
    "unsupported certificate purpose": (
        "what answers at {address} has a certificate of this federation that is not a server's; do not trust it"
    ),
    "CERTIFICATE_VERIFY_FAILED": (
        "the certificate of the server at {address} is not of this federation's CA (ca.pem in the credentials folder); is "
        "the address right, and are these the credentials for it?"
    ),
    "Hostname Verification Check failed": (
        "the certificate of the server at {address} is not for this name; dial one that it is for, or on the server: seqfed "
        "ca issue server NAME... --force, with every name and address that is dialled"
    ),
}
NOT_BEGUN: Final = "failed to connect to all addresses"  # gRPC's words; what broke later has others
CLOSED: Final = ("Socket closed", "Connection reset by peer", "Broken pipe")


@contextlib.asynccontextmanager
async def connected(address: str, insecure: bool, credentials: Path | None = None) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to HOST:PORT, with TLS if there is a credentials folder, whose CA alone is then trusted.

    Raises ConfigError, InsecureRefused, or Unauthenticated (our own certificate is of no use) before anything is sent.
    """
    host, port = addresses.parse(address)
    target = addresses.join(host, port)
    if credentials is None:
        addresses.require_private(host, insecure, addresses.CLIENT_REMEDY)
        channel = grpc.aio.insecure_channel(target, options=OPTIONS)
    else:
        found, _ = own(credentials)
        channel = grpc.aio.secure_channel(
            target, grpc.ssl_channel_credentials(found.ca, found.key, found.certificate), options=OPTIONS
        )
    async with channel:
        yield channel


def own(folder: Path) -> tuple[Credentials, Identity]:
    """The credentials in this folder, good at this moment, and whose they are.

    Raises ConfigError, or Unauthenticated with the command that makes new ones.
    """
    found = identity.load_credentials(folder)
    try:
        return found, identity.holder(found, identity.now(), folder)
    except (Unauthenticated, NotAllowed) as error:
        raise Unauthenticated(f"{error}; {_anew(found.certificate)}") from None


def _anew(certificate: bytes) -> str:
    try:
        whose = identity.identity_of(certificate)
    except (Unauthenticated, NotAllowed):
        return "name another folder with --credentials"
    if whose.role is Role.CLIENT:
        return "enrol anew with: seqfed client enroll --force"
    return f"make a new one where the CA is: seqfed ca issue {whose.role} {whose.name} --force"


@contextlib.contextmanager
def raising(address: str) -> Iterator[None]:
    """Turns a failed call in the block into the typed error."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise _typed(error, address) from None
    except grpc.aio.UsageError:
        raise ServerUnavailable(f"the connection to {address} was closed") from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # Nobody cancelled this task: grpc.aio raises it in whoever still waits for a call when the channel is closed.
        raise ServerUnavailable(f"the connection to {address} was closed") from None


def _typed(error: grpc.aio.AioRpcError, address: str) -> SeqfedError:
    status = grpc_status.rpc_status.from_call(cast(Any, error))  # typed for the synchronous call only
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
            return every_error().get(info.reason, SeqfedError)(error.details() or "")
    match error.code():
        case grpc.StatusCode.UNAVAILABLE if refused := _refused(error.details() or "", address):
            return refused
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED | grpc.StatusCode.DEADLINE_EXCEEDED:
            return ServerUnavailable(
                f"no server answers at {address} ({error.code().name.lower()}); is `seqfed server` running there, and is "
                "the address right?"
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return ServerUnavailable(f"what answers at {address} is not a seqfed server of this version")
        case grpc.StatusCode.RESOURCE_EXHAUSTED if TOO_LARGE in (error.details() or ""):
            return TooLarge(f"{address}: {error.details()}; the server's setting is max_message_bytes")
        case _:
            return InternalError(f"{address}: {error.code().name}: {error.details()}")


def _refused(details: str, address: str) -> SeqfedError | None:
    """What TLS had against the connection, if it was that."""
    for sign, told in REFUSALS.items():
        if sign in details:
            return ServerUnavailable(told.format(address=address))
    if NOT_BEGUN in details and any(sign in details for sign in CLOSED):
        return Unauthenticated(
            f"the server at {address} ended the connection before the first call, as one with TLS does to whoever has no "
            "certificate that it accepts; pass --credentials DIR with one of its federation (seqfed client enroll, seqfed "
            "ca issue)"
        )
    return None
