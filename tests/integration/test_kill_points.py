"""kill -9 of the server at each named point of a round: started again it ends with the model of an undisturbed run.

What was complete is not sent again, and every round is in the history once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.light import EXAMPLES, exported, seen_through, submitted, taking_part, undisturbed

from seqfed.client.connection import Connection
from seqfed.common.spec import RunSpec
from seqfed.server import points

CLIENTS = ("a", "b", "c")
SPEC = RunSpec.model_validate(
    {
        "rounds": 5,
        "data": {"features": 2, "classes": 2},
        "model": {"kind": "rnn", "hidden": 4, "layers": 1},
        "cohort": {"min_clients": len(CLIENTS), "deadline_s": 600},
    }
)
CHILD = [sys.executable, "-m", "seqfed.client.demo.child", str(os.getpid())]
KILLED = [sys.executable, "-m", "tests.integration.killing_server", str(os.getpid())]


@pytest.fixture
def servers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Servers that the test started, ended with it."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for one in started:
        one.kill()
        one.wait()


async def start(servers: list[subprocess.Popen[bytes]], folder: Path, port: str, command: list[str]) -> str:
    """A server with its state in this folder; its address."""
    address = folder / "state" / "address.json"
    address.unlink(missing_ok=True)
    with (folder / "log").open("ab") as log:
        flags = ["server", "--port", port, "--state", str(folder / "state")]
        servers.append(await asyncio.to_thread(subprocess.Popen, [*command, *flags], stdout=log, stderr=log))
    while True:
        assert servers[-1].poll() is None, (folder / "log").read_text()
        with contextlib.suppress(OSError, ValueError):
            return str(json.loads(address.read_text())["address"])
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("count", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("point", points.NAMES)
async def test_killed_at_a_point_the_run_ends_with_the_same_bits(
    tmp_path: Path,
    servers: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    count: int,
) -> None:
    sent: list[bytes] = []
    submit = Connection.submit_update

    async def noted(self: Connection, header, *rest, **more):  # type: ignore[no-untyped-def]
        sent.append(header.digest)
        return await submit(self, header, *rest, **more)

    monkeypatch.setattr(Connection, "submit_update", noted)
    monkeypatch.setattr("seqfed.client.session.LONGEST_WAIT", 0.2)  # seconds between two dials
    address = await start(servers, tmp_path, "0", [*KILLED, point, str(count)])
    async with taking_part(CLIENTS, address) as formulas:
        run = await submitted(address, SPEC)
        seeing = asyncio.create_task(seen_through(address, run))
        assert await asyncio.to_thread(servers[0].wait, 30) == -9
        with contextlib.closing(sqlite3.connect(tmp_path / "state" / "seqfed.db")) as database:
            complete = [bytes(digest) for (digest,) in database.execute("SELECT digest FROM updates")]
        before = len(sent)
        await start(servers, tmp_path, address.rpartition(":")[2], CHILD)
        view, records = await seeing
        flat = await exported(address, run, SPEC, tmp_path)
    assert (view.phase, view.reason) == ("finished", f"all {SPEC.rounds} rounds are done")
    assert flat.tobytes() == undisturbed(SPEC, CLIENTS).tobytes()
    assert sorted(records) == list(range(1, SPEC.rounds + 1))
    assert all(sorted(record.folded) == list(CLIENTS) for record in records.values())
    scored = [record.evaluated_examples for record in records.values()]
    assert scored.count(len(CLIENTS) * EXAMPLES) >= SPEC.rounds - 1  # none twice; in the round of the kill
    assert not set(complete) & set(sent[before:])
    for formula in formulas.values():  # the client keeps its work through the server's absence
        assert [round_ for round_, _ in formula.trained] == list(range(1, SPEC.rounds + 1))
