"""Two servers on one store: the second goes on with the run when the first is killed or hangs, and clients follow it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from benchmarks.harness import Actor, free_port
from tests.integration.cluster import labels, some_sequences
from tests.integration.light import (
    EXAMPLES,
    Formula,
    arrived,
    delta_of,
    exported,
    seen_through,
    serves,
    session_of,
    submitted,
    taking_part,
    undisturbed,
)

from seqfed.client.channel import OPTIONS, connected
from seqfed.client.connection import Connection
from seqfed.client.data import open_source
from seqfed.client.settings import DataSettings
from seqfed.client.work import Workshop
from seqfed.common.errors import ServerUnavailable
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.schema import DataSchema
from seqfed.common.spec import RunSpec
from seqfed.common.views import ModelVersion, Task, TaskKey, TaskKind

CLIENTS = ("a", "b", "c")
SPEC = RunSpec.model_validate(
    {
        "rounds": 6,
        "data": {"features": 2, "classes": 2},
        "model": {"kind": "rnn", "hidden": 4, "layers": 1},
        "cohort": {"min_clients": len(CLIENTS), "deadline_s": 600},
        "evaluation": {"every": 2},
    }
)
LEASE_S = 2.0
TABLES = ("runs", "models", "rounds", "updates", "clients")  # all but the lease, which is renewed


@dataclass
class Pair:
    """A serving server, one that stands by, and the addresses of both."""

    folder: Path
    ports: tuple[int, int] = field(default_factory=lambda: (free_port(), free_port()))

    def __post_init__(self) -> None:
        config = self.folder / "server.toml"
        config.write_text(f'state = "{self.folder / "state"}"\nlease_s = {LEASE_S}\n')
        flags = [("server", str(config), "--port", str(port)) for port in self.ports]
        self.first = Actor("first", self.folder, *flags[0])
        self.second = Actor("second", self.folder, *flags[1], "--standby")
        self.addresses = tuple(f"127.0.0.1:{port}" for port in self.ports)
        self.both = ",".join(self.addresses)

    def content(self) -> tuple[list[Any], dict[str, int]]:
        """All that the store holds: the tables' rows, and when each file was last changed."""
        with contextlib.closing(sqlite3.connect(self.folder / "state" / "seqfed.db")) as database:
            rows = [database.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in TABLES]  # noqa: S608
        files = [one for one in self.folder.glob("state/*/**/*") if one.is_file()]
        return rows, {str(one): one.stat().st_mtime_ns for one in [*files, self.folder / "state" / "address.json"]}


@pytest.fixture
async def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    """The first serves, the second stands by; a dead connection is noticed soon."""
    hurried = dict.fromkeys(
        ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms"), 1_000
    )
    monkeypatch.setattr("seqfed.client.channel.OPTIONS", tuple({**dict(OPTIONS), **hurried}.items()))
    monkeypatch.setattr("seqfed.client.session.LONGEST_WAIT", 0.2)  # seconds between two dials
    found = Pair(tmp_path)
    found.first.start()
    await serves(found.addresses[0])
    found.second.start()
    try:
        while "standing by" not in found.second.log.read_text():
            assert found.second.ended() is None, found.second.last_words()
            await asyncio.sleep(0.05)
        yield found
    finally:
        for one in (found.first, found.second):
            one.kill()


async def reached(event: Any) -> None:
    assert await asyncio.to_thread(event.wait, 30)


async def test_the_second_goes_on_with_the_run_of_a_killed_server(pair: Pair, tmp_path: Path) -> None:
    async with taking_part(CLIENTS, *pair.addresses) as formulas:
        begun, may_go_on = formulas["c"].gate(3)
        run = await submitted(pair.both, SPEC)
        seeing = asyncio.create_task(seen_through(pair.both, run))
        await reached(begun)
        pair.first.kill()
        await serves(pair.addresses[1])
        may_go_on.set()
        view, records = await seeing
        flat = await exported(pair.both, run, SPEC, tmp_path)
        assert view.phase == "finished"
        assert flat.tobytes() == undisturbed(SPEC, CLIENTS).tobytes()
        assert sorted(records) == list(range(1, SPEC.rounds + 1))
        for formula in formulas.values():
            assert [round_ for round_, _ in formula.trained] == list(range(1, SPEC.rounds + 1))


async def test_a_server_that_hung_stops_and_changes_nothing(pair: Pair, tmp_path: Path) -> None:
    async with taking_part(CLIENTS, *pair.addresses) as formulas:
        begun, may_go_on = formulas["c"].gate(3)
        run = await submitted(pair.both, SPEC)
        seeing = asyncio.create_task(seen_through(pair.both, run))
        await reached(begun)
        pair.first.signal(signal.SIGSTOP)
        await serves(pair.addresses[1])
        may_go_on.set()
        view, records = await seeing
        flat = await exported(pair.addresses[1], run, SPEC, tmp_path)
        assert view.phase == "finished"
        assert flat.tobytes() == undisturbed(SPEC, CLIENTS).tobytes()
        assert sorted(records) == list(range(1, SPEC.rounds + 1))
    before = pair.content()
    pair.first.signal(signal.SIGCONT)
    assert await asyncio.to_thread(pair.first.wait, 30) == 1
    (rows, files), (rows_before, files_before) = pair.content(), before
    assert rows == rows_before
    assert files_before.items() <= files.items()
    # What clients had sent it before may still have come to its end in a file; no row names it, so it counts for nothing.
    assert not rows[TABLES.index("updates")]
    assert all("updates" in Path(one).parts for one in files.keys() - files_before.keys())
    words = pair.first.last_words()
    assert words.startswith("seqfed: ")
    assert "lease" in words or "taken over" in words
    assert pair.second.ended() is None
    await serves(pair.addresses[1])


@pytest.mark.slow
async def test_a_hung_server_is_noticed_within_30_seconds(tmp_path: Path) -> None:
    port = free_port()
    address = f"127.0.0.1:{port}"
    server = Actor("server", tmp_path, "server", "--port", str(port), "--state", str(tmp_path / "state"))
    server.start()
    try:
        await serves(address)
        async with connected(address, insecure=False) as channel:
            connection = Connection(channel, address)
            await connection.join("a", "0" * 32, DataSchema(features=2, classes=2, examples=1))
            listening = asyncio.ensure_future(anext(connection.listen()))
            await arrived(address, 1)
            server.signal(signal.SIGSTOP)
            with pytest.raises(ServerUnavailable):
                await asyncio.wait_for(listening, 30)
    finally:
        server.kill()


async def test_a_client_killed_in_training_comes_back_and_takes_up_its_task(tmp_path: Path) -> None:
    spec = RunSpec.model_validate(
        {
            "rounds": 1,
            "data": {"features": 3, "classes": 3},
            "model": {"hidden": 8, "layers": 1},
            "training": {"steps": 200, "batch_size": 16},
            "cohort": {"min_clients": 2, "deadline_s": 600},
            "evaluation": {"every": 0},
        }
    )
    data = some_sequences(40, 1)
    np.savez(tmp_path / "real.npz", x=data.rows.reshape(len(data), 4, 3), y=labels(data))
    port = free_port()
    address = f"127.0.0.1:{port}"
    server = Actor("server", tmp_path, "server", "--port", str(port), "--state", str(tmp_path / "state"))
    flags = ("--server", address, "--name", "real", "--state", str(tmp_path / "real"))
    client = Actor("real", tmp_path, "client", *flags, "--data", str(tmp_path / "real.npz"))
    server.start()
    client.start()
    schema = DataSchema(features=3, classes=3, examples=EXAMPLES)
    other = asyncio.create_task(session_of(Formula("other", schema=schema), address).run())
    try:
        await serves(address)
        run = await submitted(address, spec)
        while not training(client.pid):
            assert client.ended() is None, client.last_words()
            await asyncio.sleep(0.02)
        client.kill()
        client.start()
        view, records = await seen_through(address, run)
        flat = await exported(address, run, spec, tmp_path)
    finally:
        other.cancel()
        client.kill()
        server.kill()
    assert view.phase == "finished"
    assert (records[1].attempt, sorted(records[1].folded)) == (1, ["other", "real"])
    assert client.log.read_text().count("connected to") == 2
    layout = layout_of(spec)
    workshop = Workshop("real", open_source(DataSettings(file=(str(tmp_path / "real.npz"),))))
    first = initial_parameters(spec).flat
    model = ModelVersion(0, layout.nbytes, b"", layout.digest)
    update = workshop.train(Task(TaskKind.TRAIN, TaskKey(run, 1, 1), spec, model), first, lambda: False)
    assert update is not None
    total = np.rint(update.delta.astype(np.float64) * (update.weight * 2.0**30)).astype(np.int64)
    total += np.rint(delta_of("other", 1, first).astype(np.float64) * (EXAMPLES * 2.0**30)).astype(np.int64)
    wanted = (first + total / ((update.weight + EXAMPLES) * 2.0**30)).astype(np.float32)
    assert flat.tobytes() == wanted.tobytes()


def training(pid: int) -> bool:
    """Whether the client has loaded torch, which it does for its first training."""
    with contextlib.suppress(psutil.Error):
        return any("libtorch" in one.path for one in psutil.Process(pid).memory_maps())
    return False
