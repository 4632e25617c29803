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

from seqfed.common import checkpoint, views
from seqfed.common.errors import (
    DuplicateUpdate,
    IllegalTransition,
    LeaseLost,
    NoModel,
    Overloaded,
    RunEnded,
    StorageFull,
    WrongRound,
)
from seqfed.common.layout import Flat
from seqfed.common.schema import DataSchema
from seqfed.common.views import Progress, Stage, TaskKind
from seqfed.server import coordinator as module
from seqfed.server import desk
from seqfed.server import round as machine
from seqfed.server.coordinator import Coordinator
from seqfed.server.desk import Desk
from seqfed.server.live import Live
from seqfed.server.round import ENDED, Phase
from seqfed.server.settings import ServerSettings
from seqfed.server.store import Store, open_store


class Bench:
    """A coordinator at work, and clients that listen."""

    def __init__(self, folder: Path) -> None:
        self.store = open_store(folder)
        self.coordinator = Coordinator(self.store, ServerSettings(state=folder))
        self.desk = Desk(self.coordinator)
        self.listening: list[asyncio.Task[None]] = []
        self.tasks: dict[str, list[tuple[TaskKind, int]]] = {}  # what each has been told, in order

    async def join(self, *names: str, working: views.TaskKey | None = None) -> None:
        for name in names:
            schema = DataSchema(features=2, steps=5, classes=2, examples=10)
            connection = await self.coordinator.join(name, "0" * 32, "test", schema, working)

            async def listen(name: str = name, session: str = connection.session) -> None:
                async for task in self.coordinator.hub.listen(session):
                    self.tasks.setdefault(name, []).append((task.kind, task.key.round))

            self.listening.append(asyncio.create_task(listen()))

    async def submit(self, **changes: Any) -> Live:
        return self.desk.find((await self.desk.submit(make_spec(**changes), None)).run)

    async def send(self, live: Live, client: str, delta: Flat, weight: int, round_: int | None = None) -> bool:
        data = delta.tobytes()
        header = views.UpdateHeader(
            key=views.TaskKey(live.run, round_ or live.state.round, 1),
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


async def until(live: Live, *phases: Phase, number: int = 0) -> None:
    """Wait for one of these phases, of round `number` or later."""
    async with asyncio.timeout(PATIENCE):
        while live.state.phase not in phases or live.state.round < number:
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
    assert bench.desk.view(live).reason == "the disk is full; trying again every 0.5 s"
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
    assert bench.desk.view(cursed).reason == "round 0, queued: internal error; see the log"
    fine = await bench.submit(name="fine")
    await until(fine, Phase.TRAINING)


async def test_a_long_history_comes_in_parts_and_only_the_last_says_that_the_run_has_ended(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "HISTORY_NAMES", 4)  # two rounds of two clients a message
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
    views_ = [view async for view in bench.desk.watch(live.run, 0)]
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


# Late updates and buffers ---------------------------------------------------------------------------------------------


def weighted(model: Flat, *updates: tuple[int, int, Flat]) -> Flat:
    """FedBuff's new model from (weight, rounds late, delta): each delta times (1 + rounds)^-1/2, in numpy's own integers."""
    total = np.zeros(len(model), np.int64)
    for weight, age, delta in updates:
        total += np.rint(delta.astype(np.float64) * (weight * (1 + age) ** -0.5 * 2.0**30)).astype(np.int64)
    return (model + total / (sum(weight for weight, _, _ in updates) * 2.0**30)).astype(np.float32)


async def test_a_late_update_counts_in_the_next_round_weighing_less(bench: Bench) -> None:
    await bench.join("a", "b", "c")
    live = await bench.submit(
        rounds=3, cohort={"min_clients": 3, "quorum": 2, "grace_s": 0, "deadline_s": 600, "late": "fold"}
    )
    size = live.layout.size
    deltas = {(name, number): some_delta(size, ord(name), number) for name in "abc" for number in (1, 2, 3)}
    first = numbers(live)
    await until(live, Phase.TRAINING, number=1)
    for client, weight in (("a", 5), ("b", 7)):
        await bench.send(live, client, deltas[client, 1], weight)
    await until(live, Phase.TRAINING, number=2)
    second = weighted(first, (5, 0, deltas["a", 1]), (7, 0, deltas["b", 1]))
    assert numbers(live).tobytes() == second.tobytes()
    model, _ = bench.coordinator.model_file("c", live.run, 0)  # what it works from is there as long as it may need it
    assert b"".join(model.pieces()) == first.tobytes()
    with pytest.raises(WrongRound):
        await bench.send(live, "a", deltas["a", 2], 5, round_=1)
    assert await bench.send(live, "c", deltas["c", 1], 11, round_=1) is False
    assert await bench.send(live, "c", deltas["c", 1], 11, round_=1) is True
    with pytest.raises(DuplicateUpdate):
        await bench.send(live, "c", deltas["c", 2], 11, round_=1)
    for client, weight in (("b", 7), ("a", 5)):
        await bench.send(live, client, deltas[client, 2], weight)
    await until(live, Phase.TRAINING, number=3)
    third = weighted(second, (5, 0, deltas["a", 2]), (7, 0, deltas["b", 2]), (11, 1, deltas["c", 1]))
    assert numbers(live).tobytes() == third.tobytes()
    (_, record) = await asyncio.to_thread(bench.store.history, live.run, 0, 2, 9)
    assert (record.folded, record.stale) == (("b", "a", "c"), {"c": 1})
    assert bench.tasks["c"] == [(TaskKind.TRAIN, 1), (TaskKind.TRAIN, 3)]
    with pytest.raises(NoModel):
        bench.coordinator.model_file("c", live.run, 0)


async def test_an_asynchronous_run_folds_every_answer_into_the_next_model(bench: Bench) -> None:
    await bench.join("a", "b", "c")
    live = await bench.submit(
        rounds=3, asynchronous={"buffer": 2, "concurrency": 3}, cohort={"min_clients": 3, "deadline_s": 600}
    )
    size, model = live.layout.size, numbers(live)
    await until(live, Phase.TRAINING, number=1)
    order = [("a", 1, 0), ("b", 1, 0), ("a", 2, 0), ("c", 1, 1), ("b", 2, 1), ("c", 3, 0)]
    for number, (client, base, _) in enumerate(order):
        await until(live, Phase.TRAINING, number=1 + number // 2)
        assert live.state.wants(client, base)
        await bench.send(live, client, some_delta(size, number), 1, round_=base)
    await until(live, *ENDED)
    for one, other in ((0, 1), (2, 3), (4, 5)):
        model = weighted(model, *((1, order[number][2], some_delta(size, number)) for number in (one, other)))
    assert numbers(live).tobytes() == model.tobytes()
    assert bench.tasks["c"] == [(TaskKind.TRAIN, 1), (TaskKind.TRAIN, 3)]


async def test_an_update_that_nobody_wants_any_more_leaves_nothing_behind(bench: Bench, tmp_path: Path) -> None:
    await bench.join("a", "b", "c")
    live = await bench.submit(rounds=2, cohort={"min_clients": 3, "quorum": 2, "grace_s": 0, "deadline_s": 600})
    await until(live, Phase.TRAINING)
    size = live.layout.size
    ask = bench.coordinator.ask
    held, free = asyncio.Event(), asyncio.Event()

    async def slowly(live: Live, event: Any, update: Any = None, by: str = "") -> None:
        if getattr(event, "client", "") == "c":
            held.set()
            await free.wait()
        await ask(live, event, update)

    bench.coordinator.ask = slowly  # type: ignore[method-assign]
    late = asyncio.create_task(bench.send(live, "c", some_delta(size, 3), 1))
    await held.wait()  # it is whole, and not yet counted, while the others end the round
    for client in "ab":
        await bench.send(live, client, some_delta(size, 1), 1)
    await until(live, Phase.TRAINING, number=2)
    free.set()
    with pytest.raises(WrongRound):
        await late
    await bench.coordinator.tidied()
    assert not list((tmp_path / "updates" / live.run).glob("1.c.*"))


# Pausing --------------------------------------------------------------------------------------------------------------


async def test_a_paused_run_lets_the_next_one_go_first_and_goes_on_where_it_was(bench: Bench) -> None:
    await bench.join("a", "b")
    live, other = await bench.submit(name="one"), await bench.submit(name="two")
    await until(live, Phase.TRAINING)
    first, size = numbers(live), live.layout.size
    await bench.send(live, "a", some_delta(size, 1), 3)
    view = await bench.desk.pause("one")
    assert (view.phase, view.reason) == ("paused", "paused by the operator; `seqfed resume` lets it go on")
    with pytest.raises(WrongRound):
        await bench.send(live, "b", some_delta(size, 2), 4)
    with pytest.raises(IllegalTransition):
        await bench.desk.pause("one")
    await until(other, Phase.TRAINING)
    assert (await bench.desk.resume("one")).phase == "queued"
    for client in "ab":
        await bench.send(other, client, some_delta(size, 9), 1)
    await until(live, Phase.TRAINING)
    await bench.send(live, "b", some_delta(size, 2), 4)
    await until(live, *ENDED)
    assert numbers(live).tobytes() == averaged(first, (3, some_delta(size, 1)), (4, some_delta(size, 2))).tobytes()
    with pytest.raises(RunEnded):
        await bench.desk.resume("one")
    assert bench.tasks["a"] == [(TaskKind.TRAIN, 1), (TaskKind.TRAIN, 1)]  # of either run one


async def test_a_full_disk_pauses_the_run_which_then_makes_the_same_model(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.join("a", "b")
    live = await bench.submit()
    await until(live, Phase.TRAINING)
    first, size = numbers(live), live.layout.size

    def full(*_: Any, **__: Any) -> Any:
        raise StorageFull("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", full)
        for client in "ab":
            await bench.send(live, client, some_delta(size, ord(client)), 1)
        await until(live, Phase.PAUSED)
    assert live.state.reason == "round 1, committing: the disk is full; `seqfed resume` tries again"
    await bench.desk.resume(live.run)
    await until(live, *ENDED)
    assert live.state.phase is Phase.FINISHED
    expected = averaged(first, *((1, some_delta(size, ord(client))) for client in "ab"))
    assert numbers(live).tobytes() == expected.tobytes()


# What is heard of the clients -----------------------------------------------------------------------------------------


async def test_progress_is_shown_and_only_that_of_a_task_that_is_wanted(bench: Bench) -> None:
    await bench.join("a", "b")
    live = await bench.submit()
    await until(live, Phase.TRAINING)
    key = views.TaskKey(live.run, 1, 1)
    bench.coordinator.progress("a", key, Progress(Stage.TRAINING, 3, 4, 1, 0.5))
    view = bench.desk.view(live)
    assert view.reason.startswith("round 1 waits for 2 of 2: a training 75 %, b, deadline in 600 s")
    assert [(one.client, one.round, one.progress, one.connected) for one in view.tasks] == [
        ("a", 1, Progress(Stage.TRAINING, 3, 4, 1, 0.5), True),
        ("b", 1, None, True),
    ]
    for client, wrong in (("z", key), ("a", views.TaskKey(live.run, 2, 1))):
        with pytest.raises(WrongRound):
            bench.coordinator.progress(client, wrong, Progress(Stage.READING))
    await bench.send(live, "a", some_delta(live.layout.size, 1), 1)
    bench.coordinator.progress("a", key, Progress(Stage.SENDING, 4, 4))  # overtaken by the answer itself
    assert [one.client for one in bench.desk.view(live).tasks] == ["b"]


async def test_mere_progress_wakes_a_watcher_but_not_each_time(bench: Bench) -> None:
    await bench.join("a", "b")
    live = await bench.submit()
    await until(live, Phase.TRAINING)
    changed, woken = live.changed, asyncio.get_running_loop().time()
    for done in range(100):
        bench.coordinator.progress("a", views.TaskKey(live.run, 1, 1), Progress(Stage.TRAINING, done, 100))
    assert not changed.is_set()
    await asyncio.wait_for(changed.wait(), PATIENCE)
    assert asyncio.get_running_loop().time() - woken >= 0.9  # progress_s


# Too many at once -----------------------------------------------------------------------------------------------------


async def test_clients_that_come_too_fast_are_told_to_come_later(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    coordinator = Coordinator(store, ServerSettings(state=tmp_path, joins_per_s=3))
    schema = DataSchema(features=2, steps=5, classes=2, examples=10)
    for number in range(4):
        await coordinator.join(f"site-{number}", "0" * 32, "test", schema)
    with pytest.raises(Overloaded, match=r"more than 3 clients a second \(joins_per_s\)"):
        await coordinator.join("one-more", "0" * 32, "test", schema)
    assert coordinator.spread_s == pytest.approx(2)  # four known clients, three a second, and half as long again
    coordinator.close()
    await coordinator.run()
    assert [one.client for one in store.clients()] == [f"site-{number}" for number in range(4)]
    store.close()


async def test_a_coordinator_that_has_lost_its_store_does_nothing_more(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.join("a", "b")
    live = await bench.submit()
    await until(live, Phase.TRAINING)

    def taken(*_: Any, **__: Any) -> None:
        raise LeaseLost("another daemon has taken over")

    monkeypatch.setattr(Store, "commit", taken)
    with pytest.raises(LeaseLost):
        await bench.send(live, "a", some_delta(live.layout.size, 1), 1)
    assert isinstance(await asyncio.wait_for(bench.coordinator.lost, PATIENCE), LeaseLost)
    assert (live.state.phase, live.state.folded) == (Phase.TRAINING, ())
