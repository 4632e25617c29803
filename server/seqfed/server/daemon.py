"""The daemon: puts store, coordinator and services together, listens, and stops cleanly on SIGTERM or Ctrl-C.

It serves for as long as it holds the store's lease, and not a moment longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import resource
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc
import platformdirs
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from seqfed.common import addresses, authority, tokens
from seqfed.common.authority import Authority
from seqfed.common.errors import ConfigError, LeaseLost, PortInUse, StorageError, StorageFull
from seqfed.common.loop import on_first_signal, whole
from seqfed.server import enrollment
from seqfed.server.coordinator import Coordinator
from seqfed.server.enrollment import Office
from seqfed.server.gate import Gate
from seqfed.server.servicers import Admin, Federation
from seqfed.server.settings import ServerSettings
from seqfed.server.store import Store, connect
from seqfed.server.tls import Certificate
from seqfed.v1 import admin_pb2, admin_pb2_grpc, federation_pb2, federation_pb2_grpc

log = logging.getLogger("seqfed.server")

GRACE: Final = 2.0  # seconds that calls under way have when the daemon stops
STANDING_BY_S: Final = 60.0  # between two log lines of one that waits for its turn
CHANNEL_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),  # a second daemon on the same port must fail, not share it
    ("grpc.http2.bdp_probe", 0),  # a window that grows with the link's speed grows the server's memory with its clients
    ("grpc.http2.lookahead_bytes", 2 << 20),  # bytes of a stream that may wait to be read
    ("grpc.keepalive_time_ms", 12_000),  # a dead peer is noticed within 12 + 16 s; less would break slow links off
    ("grpc.keepalive_timeout_ms", 16_000),
    ("grpc.http2.ping_timeout_ms", 16_000),  # of the same pings, and left alone it is a minute
    ("grpc.server_handshake_timeout_ms", enrollment.HANDSHAKE_MS),
    ("grpc.max_connection_idle_ms", 300_000),  # without any call, as those of the revoked are; who belongs listens
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # clients ping every 12 s
)


@contextlib.asynccontextmanager
async def serving(settings: ServerSettings) -> AsyncIterator[str]:
    """A running daemon inside this event loop; yields its address.

    With `standby` it may take long to begin. Raises PortInUse, StorageError, ConfigError, InsecureRefused; once it runs,
    LeaseLost if another daemon has taken over, and the block is then cancelled.
    """
    certificate, ca = _identity(settings)
    folder = settings.state or Path(platformdirs.user_state_dir("seqfed")) / "server"
    settings = settings.model_copy(update={"state": folder})
    async with _its_turn(settings, folder) as store, _held(store) as lost:
        await whole(asyncio.to_thread(store.prepare))
        coordinator = Coordinator(store, settings)
        office = None if ca is None else _office(ca, coordinator, settings)
        server, names, checks = _services(coordinator, settings, office)
        servers = [server]
        where: dict[str, Any] = {"pid": os.getpid()}
        try:
            with _port(settings.host, settings.port, "--port") as listen:
                if certificate is None:
                    port = server.add_insecure_port(listen)
                else:
                    port = server.add_secure_port(listen, certificate.credentials(mutual=True))
            where["address"] = address = addresses.join(settings.host, port)
            if certificate is not None and office is not None:
                with _port(settings.host, settings.counter, "--enroll-port") as listen:
                    counter, port = enrollment.at(listen, office, certificate.credentials(mutual=False))
                servers.append(counter)
                where["enroll"] = addresses.join(settings.host, port)
            await coordinator.take_up()
        except BaseException:
            for one in servers:
                await one.stop(None)
            raise
        work = asyncio.create_task(coordinator.run())
        place, told = folder / "address.json", ""
        try:
            for one in servers:
                await one.start()
            store.lease.address = address
            await asyncio.to_thread(store.renew)
            place.write_text(told := json.dumps(where))
            for name in ("", *names):
                await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
            yield address
        finally:
            store.when_lost = _too_late
            await whole(_shut_down(coordinator, servers, checks, work, None if lost.is_set() else GRACE))
            if place.exists() and place.read_text() == told:  # it may be a successor's
                place.unlink()


def _identity(settings: ServerSettings) -> tuple[Certificate | None, Authority | None]:
    """What the server shows of itself, and the CA whose counter it keeps; raises InsecureRefused, ConfigError."""
    if settings.tls is None:
        addresses.require_private(settings.host, settings.insecure, addresses.SERVER_REMEDY)
        return None, None
    certificate = Certificate(settings.tls)
    if settings.ca is None:
        return certificate, None
    ca = authority.load(settings.ca)
    if tokens.fingerprint(ca.pem) != tokens.fingerprint(certificate.ca):
        raise ConfigError(
            f"the server's certificate in {settings.tls} is not of the CA in {settings.ca}; issue it with that one, or name "
            "the other's folder"
        )
    return certificate, ca


def _office(ca: Authority, coordinator: Coordinator, settings: ServerSettings) -> Office:
    """The counter of this CA: used tokens stand in the store, what it gives out in the audit log."""
    return Office(
        ca,
        coordinator.store.use_nonce,
        days=settings.certificate_days,
        a_second=settings.enrolments_per_s,
        revoked_at=coordinator.access.revoked_at,
        note=coordinator.store.note,
        refused=coordinator.audit.refused,
    )


@contextlib.contextmanager
def _port(host: str, port: int, flag: str) -> Iterator[str]:
    """Where to listen; what gRPC raises in the block if that cannot be is raised as PortInUse."""
    place = addresses.join(host, port)
    try:
        yield place
    except RuntimeError as error:
        raise PortInUse(
            f"cannot listen on {place}: another process has it or the address is not this machine's; pass another {flag}, "
            "or stop the other process"
        ) from error


async def _shut_down(
    coordinator: Coordinator,
    servers: list[grpc.aio.Server],
    checks: health.aio.HealthServicer,
    work: asyncio.Task[None],
    grace: float | None,
) -> None:
    await checks.enter_graceful_shutdown()
    coordinator.close()
    await asyncio.gather(*(one.stop(grace) for one in servers))
    await work
    await coordinator.settle()


def _services(
    coordinator: Coordinator, settings: ServerSettings, office: Office | None
) -> tuple[grpc.aio.Server, list[str], health.aio.HealthServicer]:
    """A server of everything that is served, not listening yet; the names of its services, and their health."""
    places = 2 * settings.max_clients + 1000  # each client listens, and works
    server = grpc.aio.server(
        interceptors=(Gate(coordinator.access, places=places, message_s=settings.message_s),),
        options=(
            *CHANNEL_OPTIONS,
            ("grpc.max_concurrent_streams", settings.max_streams),
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            (
                "grpc.max_metadata_size",
                2 * settings.max_metadata_bytes,
            ),  # beyond it gRPC itself refuses, without our words
            ("grpc.compression_enabled_algorithms_bitset", 1),  # none: numbers do not shrink, and bombs do not grow
        ),
    )
    federation_pb2_grpc.add_FederationServicer_to_server(Federation(coordinator, office), server)
    admin_pb2_grpc.add_AdminServicer_to_server(Admin(coordinator, settings), server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    files = ((federation_pb2.DESCRIPTOR, "Federation"), (admin_pb2.DESCRIPTOR, "Admin"))
    names = [str(file.services_by_name[name].full_name) for file, name in files]
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    return server, names, checks


@contextlib.asynccontextmanager
async def _its_turn(settings: ServerSettings, folder: Path) -> AsyncIterator[Store]:
    """The store, once this daemon has it."""
    store = await asyncio.to_thread(
        connect, folder, database=settings.database, models=settings.models, lease_s=settings.lease_s
    )
    try:
        steps, told = store.take(settings.standby), -math.inf
        while (holder := await whole(asyncio.to_thread(next, steps, None))) is not None:
            if (now := time.monotonic()) - told >= STANDING_BY_S:
                told = now
                what = "standing by" if settings.standby else "waiting for the lease to end"
                log.info("%s: %s has this database or state folder", what, holder)
            await asyncio.sleep(holder.pause)
        yield store
    finally:
        await asyncio.to_thread(store.close)


@contextlib.asynccontextmanager
async def _held(store: Store) -> AsyncIterator[asyncio.Event]:
    """Renew the lease until the block ends. When it is lost, the event is set, the block cancelled, and LeaseLost raised."""
    loop, block, lost = asyncio.get_running_loop(), asyncio.current_task(), asyncio.Event()
    why: list[LeaseLost] = []

    def give_up(error: LeaseLost) -> None:
        if not why:
            why.append(error)
            lost.set()
            assert block is not None
            block.cancel()

    def from_a_thread(error: LeaseLost) -> None:
        loop.call_soon_threadsafe(give_up, error)

    store.when_lost = from_a_thread
    # A thread of its own, for those of the loop may all be at work for longer than the lease.
    thread = ThreadPoolExecutor(1, "lease")
    renewing = asyncio.create_task(_renew(store, thread))
    try:
        yield lost
    except asyncio.CancelledError:
        if why and block is not None and not block.uncancel():
            raise why[0] from None
        raise
    finally:
        store.when_lost = _too_late
        renewing.cancel()
        await asyncio.to_thread(thread.shutdown)
    if why:
        raise why[0]


async def _renew(store: Store, thread: ThreadPoolExecutor) -> None:
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(store.lease.seconds / 3)
        try:
            await loop.run_in_executor(thread, store.renew)
        except LeaseLost:
            return  # `when_lost` has said so
        except (StorageError, StorageFull) as error:
            log.warning("the lease could not be renewed: %s; again in %g s", error, store.lease.seconds / 3)


def _too_late(_: LeaseLost) -> None:
    """It stops already."""


async def serve(settings: ServerSettings) -> None:
    """Run until SIGTERM or SIGINT; a second signal ends the process at once. Raises what `serving` raises."""
    stop, this = asyncio.Event(), asyncio.current_task()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (most, most)
    )  # a client's connection is a file, and 1,024 are soon used up
    begun = False

    def on_signal() -> None:
        stop.set()
        if not begun and this is not None:  # it may be standing by
            this.cancel()

    on_first_signal(on_signal)
    try:
        async with serving(settings) as address:
            begun = True
            if settings.insecure and settings.tls is None and not addresses.is_loopback(settings.host):
                log.warning(
                    "plaintext on %s (--insecure): anybody on the way can read and alter models and updates", address
                )
            log.info("listening on %s%s", address, "" if settings.tls is None else ", for holders of a certificate")
            await stop.wait()
            log.info("stopping; runs under way go on when the server is started again")
    except asyncio.CancelledError:
        if not stop.is_set() or this is None or this.uncancel():
            raise
        log.info("stopped before it had its turn")
