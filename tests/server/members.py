"""A daemon that speaks TLS, and channels of whoever a test wants to be."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from tests.server.conftest import Site

from seqfed.common import authority, identity, signing, wire
from seqfed.common.authority import Authority
from seqfed.common.identity import Credentials, Role, save_credentials
from seqfed.common.spec import RunSpec
from seqfed.common.views import AuditEntry, RunView
from seqfed.server.daemon import serving
from seqfed.server.settings import ServerSettings
from seqfed.v1 import admin_pb2
from seqfed.v1.admin_pb2_grpc import AdminStub

if TYPE_CHECKING:
    from seqfed.v1.admin_pb2_grpc import AdminAsyncStub


class Guarded:
    """A running daemon with its CA."""

    def __init__(self, address: str, settings: ServerSettings, ca: Authority, stack: contextlib.AsyncExitStack) -> None:
        self.address = address
        self.settings = settings
        self.ca = ca
        self._stack = stack
        self._channels: dict[tuple[Role, str], grpc.aio.Channel] = {}
        self.operator = self.issue(Role.OPERATOR, "ops")

    def issue(
        self,
        role: Role,
        name: str,
        *,
        now: datetime | None = None,
        days: float | None = None,
        ca: Authority | None = None,
    ) -> Credentials:
        return (ca or self.ca).credentials(role, name, now=now or identity.now(), days=days)

    async def dial(self, own: Credentials) -> grpc.aio.Channel:
        """A new connection with these credentials."""
        secrets = grpc.ssl_channel_credentials(self.ca.pem, own.key, own.certificate)
        options = (("grpc.use_local_subchannel_pool", 1),)
        return await self._stack.enter_async_context(grpc.aio.secure_channel(self.address, secrets, options))

    async def channel(self, role: Role, name: str) -> grpc.aio.Channel:
        """The connection of this member, who has one certificate."""
        if (role, name) not in self._channels:
            own = self.operator if (role, name) == (Role.OPERATOR, "ops") else self.issue(role, name)
            self._channels[role, name] = await self.dial(own)
        return self._channels[role, name]

    async def desk(self, role: Role = Role.OPERATOR, name: str = "ops") -> AdminAsyncStub:
        return AdminStub(await self.channel(role, name))

    async def arrive(self, *names: str) -> list[Site]:
        """Clients that have joined and listen, each with its own certificate."""
        sites = [Site(await self.channel(Role.CLIENT, name), name) for name in names]
        for site in sites:
            self._stack.push_async_callback(site.leave)
            await site.come()
        return sites

    async def submit(self, spec: RunSpec, by: Credentials | None = None, **changes: Any) -> RunView:
        """Queue a signed run; `changes` are fields of its header."""
        by = by or self.operator
        signed = {"signature": signing.sign(spec.canonical, by.key), "certificate": by.certificate}
        header = admin_pb2.SubmitHeader(spec=spec.canonical, **{**signed, **changes})

        async def parts() -> AsyncIterator[admin_pb2.SubmitRequest]:
            yield admin_pb2.SubmitRequest(header=header)

        return wire.run_from_wire((await (await self.desk()).Submit(parts())).run)

    async def revoke(self, client: str, reason: str = "lost") -> admin_pb2.ClientStatus:
        return await (await self.desk()).RevokeClient(admin_pb2.RevokeClientRequest(client=client, reason=reason))

    async def audit(self, after: int = 0) -> list[AuditEntry]:
        calls = (await self.desk()).ListAudit(admin_pb2.ListAuditRequest(after=after))
        return [wire.entry_from_wire(message) async for message in calls]


@contextlib.asynccontextmanager
async def guarded(folder: Path, **changes: Any) -> AsyncIterator[Guarded]:
    """A daemon with TLS on a free port, and a new CA."""
    ca = authority.create(folder / "ca", identity.now())
    hosts = ("localhost", "127.0.0.1")
    save_credentials(folder / "tls", ca.credentials(Role.SERVER, "server", now=identity.now(), hosts=hosts))
    settings = ServerSettings(**{"port": 0, "state": folder / "state", "tls": folder / "tls", **changes})
    async with contextlib.AsyncExitStack() as after, serving(settings) as address:
        yield Guarded(address, settings, ca, after)
