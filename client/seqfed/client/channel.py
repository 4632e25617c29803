"""Channels to a server, and the server's refusals raised again as the errors that they were there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final, cast

import grpc
import grpc_status.rpc_status
from google.rpc import error_details_pb2

from seqfed.common import addresses
from seqfed.common.errors import InternalError, Overloaded, SeqfedError, ServerUnavailable, every_error
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
CALLS_LIMIT: Final = "Concurrent RPC limit"  # gRPC's own words where a server's maximum_concurrent_rpcs is reached
ANSWER_S: Final = 30.0  # seconds for the answer to a small call


@contextlib.asynccontextmanager
async def connected(address: str, insecure: bool) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to HOST:PORT; raises ConfigError or InsecureRefused before anything is sent."""
    host, port = addresses.parse(address)
    addresses.require_private(host, insecure)
    async with grpc.aio.insecure_channel(addresses.join(host, port), options=OPTIONS) as channel:
        yield channel


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
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED | grpc.StatusCode.DEADLINE_EXCEEDED:
            return ServerUnavailable(
                f"no server answers at {address} ({error.code().name.lower()}); is `seqfed server` running there, and is "
                "the address right?"
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return ServerUnavailable(f"what answers at {address} is not a seqfed server of this version")
        case grpc.StatusCode.RESOURCE_EXHAUSTED if CALLS_LIMIT in (error.details() or ""):
            return Overloaded(f"the server at {address} has as many calls as it takes at a time; try again later")
        case _:
            return InternalError(f"{address}: {error.code().name}: {error.details()}")
