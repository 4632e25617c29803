"""The operator's own commands about who belongs, against a real daemon: `seqfed clients revoke`, `seqfed audit`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import typer
from tests.server.conftest import make_spec
from tests.server.members import Guarded, guarded
from typer.testing import CliRunner, Result

from seqfed.client import operator as commands
from seqfed.common import wire
from seqfed.common.errors import AuditBroken, NotAllowed
from seqfed.common.identity import Role, save_credentials
from seqfed.common.views import AuditEntry
from seqfed.v1 import admin_pb2


async def run(server: Guarded, folder: Path, *arguments: str) -> Result:
    """The command, with the credentials in this folder, outside this event loop."""
    app = typer.Typer()
    for command in (commands.revoke, commands.audit, commands.clients):
        app.command()(command)
    where = ("--server", server.address, "--credentials", str(folder))
    return await asyncio.to_thread(CliRunner().invoke, app, [*arguments, *where])


async def test_revoke_and_what_is_shown_of_it(tmp_path: Path) -> None:
    async with guarded(tmp_path) as server:
        save_credentials(tmp_path / "ops", server.operator)
        save_credentials(tmp_path / "v", server.issue(Role.VIEWER, "v"))
        await server.arrive("a", "b")
        await server.submit(make_spec(cohort__min_clients=3))
        told = await run(server, tmp_path / "ops", "revoke", "a", "--reason", "laptop stolen")
        assert (told.exit_code, told.output) == (0, "a: revoked\n")
        refused = await run(server, tmp_path / "v", "revoke", "b", "--reason", "fun")
        assert isinstance(refused.exception, NotAllowed)
        found = json.loads((await run(server, tmp_path / "v", "clients", "--json")).output)
        assert {one["client"]: (one["revoked"], one["connected"]) for one in found} == {
            "a": (True, False),
            "b": (False, True),
        }
        told = await run(server, tmp_path / "v", "audit")
        first, second, *_ = told.output.splitlines()
        assert first.split()[0] == "1"
        assert "submitted" in first
        assert second.endswith('by="operator:ops" client="a" reason="laptop stolen"')
        entry = json.loads(
            (await run(server, tmp_path / "v", "audit", "--json", "--after", "1")).output.splitlines()[0]
        )
        assert (entry["number"], entry["kind"]) == (2, "revoked")


async def test_a_log_that_does_not_hold_is_not_shown_as_if_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with guarded(tmp_path) as server:
        save_credentials(tmp_path / "ops", server.operator)
        await server.submit(make_spec())
        honest = wire.entry_to_wire

        def lie(entry: AuditEntry) -> admin_pb2.AuditEntry:
            message = honest(entry)
            message.body = b"{}"
            return message

        monkeypatch.setattr(wire, "entry_to_wire", lie)
        told = await run(server, tmp_path / "ops", "audit")
        assert isinstance(told.exception, AuditBroken)
