"""The daemon: puts store, coordinator and services together, listens, and stops cleanly on SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import grpc
import platformdirs
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from seqfed.common import addresses
from seqfed.common.errors import PortInUse
from seqfed.server.coordinator import Coordinator
from seqfed.server.servicers import Admin, Federation
from seqfed.server.settings import ServerSettings
from seqfed.server.store import open_store
from seqfed.v1 import admin_pb2, admin_pb2_grpc, federation_pb2, federation_pb2_grpc

log = logging.getLogger("seqfed.server")

GRACE: Final = 2.0  # seconds that calls under way have when the daemon stops
CHANNEL_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),  # a second daemon on the same port must fail, not share it
    ("grpc.http2.bdp_probe", 0),  # a window that grows with the link's speed grows the server's memory with its clients
    ("grpc.http2.lookahead_bytes", 2 << 20),  # bytes of a stream that may wait to be read
    ("grpc.keepalive_time_ms", 15_000),  # a dead peer is noticed within 15 + 10 s
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # clients ping every 15 s
)


@contextlib.asynccontextmanager
async def serving(settings: ServerSettings) -> AsyncIterator[str]:
    """A running daemon inside this event loop; yields its address. Raises PortInUse, StorageError, InsecureRefused."""
    addresses.require_private(settings.host, settings.insecure)
    folder = settings.state or Path(platformdirs.user_state_dir("seqfed")) / "server"
    settings = settings.model_copy(update={"state": folder})
    store = await asyncio.to_thread(open_store, folder)
    coordinator = Coordinator(store, settings)
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    federation_pb2_grpc.add_FederationServicer_to_server(Federation(coordinator), server)
    admin_pb2_grpc.add_AdminServicer_to_server(Admin(coordinator, settings), server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    files = (federation_pb2.DESCRIPTOR, admin_pb2.DESCRIPTOR)
    names = [str(service.full_name) for file in files for service in file.services_by_name.values()]
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    try:
        port = server.add_insecure_port(addresses.join(settings.host, settings.port))
    except RuntimeError as error:
        store.close()
        raise PortInUse(
            f"cannot listen on {addresses.join(settings.host, settings.port)}: another process has it or the address is "
            "not this machine's; pass another --port, or stop the other process"
        ) from error
    try:
        await coordinator.take_up()
    except BaseException:
        await server.stop(None)
        store.close()
        raise
    work = asyncio.create_task(coordinator.run())
    await server.start()
    address = addresses.join(settings.host, port)
    (folder / "address.json").write_text(json.dumps({"address": address, "pid": os.getpid()}))
    for name in ("", *names):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        yield address
    finally:
        await checks.enter_graceful_shutdown()
        coordinator.close()
        await server.stop(GRACE)
        await work
        (folder / "address.json").unlink(missing_ok=True)
        store.close()


async def serve(settings: ServerSettings) -> None:
    """Run until SIGTERM or SIGINT; a second signal ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, stop)
    async with serving(settings) as address:
        if settings.insecure and not addresses.is_loopback(settings.host):
            log.warning(
                "plaintext on %s (--insecure): anybody on the way can read and alter models and updates", address
            )
        log.info("listening on %s", address)
        await stop.wait()
        log.info("stopping; runs under way go on when the server is started again")


def _on_signal(stop: asyncio.Event) -> None:
    if stop.is_set():
        os._exit(130)
    stop.set()
