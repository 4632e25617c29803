"""The coordinator between its clients and its store: what comes at the same moment, and a store that refuses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from blake3 import blake3
from tests.server.conftest import PATIENCE, averaged, make_spec, some_delta

from seqfed.common import views
from seqfed.common.errors import DuplicateUpdate, StorageFull
from seqfed.common.layout import Flat
from seqfed.common.schema import DataSchema
from seqfed.server import coordinator as module
from seqfed.server import round as machine
from seqfed.server.coordinator import Coordinator, Live
from seqfed.server.round import ENDED, Phase
from seqfed.server.settings import ServerSettings
from seqfed.server.store import Store, open_store


class Bench:
    """A coordinator at work, and clients that listen."""

    def __init__(self, folder: Path) -> None:
        self.store = open_store(folder)
        self.coordinator = Coordinator(self.store, ServerSettings(state=folder))
        self.listening: list[asyncio.Task[None]] = []

    async def join(self, *names: str) -> None:
        for name in names:
            schema = DataSchema(features=2, steps=5, classes=2, examples=10)
            connection = await self.coordinator.join(name, "0" * 32, "test", schema)

            async def listen(session: str = connection.session) -> None:
                async for _ in self.coordinator.hub.listen(session):
                    pass

            self.listening.append(asyncio.create_task(listen()))

    async def submit(self, **changes: Any) -> Live:
        return self.coordinator.find((await self.coordinator.submit(make_spec(**changes), None)).run)

    async def send(self, live: Live, client: str, delta: Flat, weight: int) -> bool:
        data = delta.tobytes()
        header = views.UpdateHeader(
            key=views.TaskKey(live.run, live.state.round, 1),
            weight=weight,
            layout_digest=live.layout.digest,
            nbytes=len(data),
            digest=blake3(data).digest(),
            offset=0,
            tally={"examples": weight},
            training_seconds=0.0,
        )

        async def chunks() -> AsyncIterator[tuple[int, bytes]]:
            yield 0, data

        return await self.coordinator.submit_update(client, header, chunks())


@pytest_asyncio.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    found = Bench(tmp_path)
    work = asyncio.create_task(found.coordinator.run())
    yield found
    found.coordinator.close()
    await asyncio.wait_for(work, PATIENCE)
    for task in found.listening:
        task.cancel()
    found.store.close()


async def until(live: Live, *phases: Phase) -> None:
    async with asyncio.timeout(PATIENCE):
        while live.state.phase not in phases:
            await live.changed.wait()


def numbers(live: Live) -> Flat:
    return np.frombuffer(b"".join(live.model.pieces()), "<f4").copy()


async def test_of_two_updates_at_the_same_moment_one_counts_with_its_own_numbers(bench: Bench) -> None:
    await bench.join("a", "b")
    live = await bench.submit()
    await until(live, Phase.TRAINING)
    before, size = numbers(live), live.layout.size
    deltas = [(1 << 20, some_delta(size, 1)), (3, np.full(size, 1000, np.float32))]
    sent = await asyncio.gather(
        *(bench.send(live, "a", delta, weight) for weight, delta in deltas), return_exceptions=True
    )
    assert sorted(str(type(one)) for one in sent) == sorted([str(bool), str(DuplicateUpdate)])
    counted = deltas[sent.index(False)]
    other = (7, some_delta(size, 2))
    await bench.send(live, "b", other[1], other[0])
    await until(live, *ENDED)
    assert numbers(live).tobytes() == averaged(before, counted, other).tobytes()


async def test_a_store_that_is_full_is_asked_again_after_a_while_and_said_to_be(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STORE_AGAIN_S", 0.5)
    tries, full = 0, True
    commit = Store.commit

    def refusing(self: Store, *arguments: Any, **named: Any) -> None:
        nonlocal tries
        tries += 1
        if full:
            raise StorageFull("the disk is full")
        commit(self, *arguments, **named)

    monkeypatch.setattr(Store, "commit", refusing)
    await bench.join("a", "b")
    live = await bench.submit()
    async with asyncio.timeout(PATIENCE):
        while not live.trouble:
            await live.changed.wait()
    for _ in range(200):
        await asyncio.sleep(0)
    assert tries == 1  # and not once a turn of the loop
    assert bench.coordinator.view(live).reason == "the disk is full; trying again every 0.5 s"
    full = False
    await bench.join("c")  # whatever else happens meanwhile
    async with asyncio.timeout(PATIENCE):
        while live.state.phase is not Phase.TRAINING:
            await live.changed.wait()
    assert not live.trouble


async def test_a_surprise_in_a_step_ends_its_run_and_no_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bench.join("a", "b")
    right = machine.on

    def wrong(spec: Any, run: Any, event: Any) -> Any:
        if spec.name == "cursed" and isinstance(event, machine.Turn):
            raise RuntimeError("a bug")
        return right(spec, run, event)

    monkeypatch.setattr(machine, "on", wrong)
    cursed = await bench.submit(name="cursed")
    await until(cursed, Phase.FAILED)
    assert bench.coordinator.view(cursed).reason == "round 0, queued: internal error; see the log"
    fine = await bench.submit(name="fine")
    await until(fine, Phase.TRAINING)


async def test_a_long_history_comes_in_parts_and_only_the_last_says_that_the_run_has_ended(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HISTORY_NAMES", 4)  # two rounds of two clients a message
    await bench.join("a", "b")
    live = await bench.submit(rounds=5)
    for _ in range(5):
        await until(live, Phase.TRAINING)
        number = live.state.round
        for client in "ab":
            await bench.send(live, client, some_delta(live.layout.size, number), 1)
        async with asyncio.timeout(PATIENCE):
            while live.state.round == number and live.state.phase not in ENDED:
                await live.changed.wait()
    views_ = [view async for view in bench.coordinator.watch(live.run, 0)]
    assert [[one.round for one in view.history] for view in views_] == [[1, 2], [3, 4], [5]]
    assert [view.ended for view in views_] == [False, False, True]


async def test_what_a_killed_daemon_left_half_written_is_cleared_up(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.close()
    left = [
        tmp_path / "tmpabc.safetensors",
        tmp_path / "models" / "f" / ".000001.safetensors.x1",
        tmp_path / "models" / "f" / "000000.safetensors",
        tmp_path / "updates" / "f" / "1" / "a.f32",
    ]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    with contextlib.closing(open_store(tmp_path)):
        assert not [path for path in left if path.exists()]
