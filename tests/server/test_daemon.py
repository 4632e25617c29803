"""The daemon as a whole, over real gRPC: start and refusal to start, whose turn it is, and starting again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.server.conftest import (
    PATIENCE,
    Daemon,
    Site,
    a_daemon,
    averaged,
    busy_database,
    flat_of,
    make_spec,
    some_delta,
    soon,
)

from seqfed.common import addresses, statistics, views, wire
from seqfed.common.errors import InsecureRefused, LeaseLost, PortInUse, StorageError
from seqfed.common.layout import Flat
from seqfed.common.model import initial_parameters
from seqfed.common.views import TaskKind
from seqfed.server import lease
from seqfed.server.daemon import serving
from seqfed.server.settings import ServerSettings

SIZE = 42  # parameters of the small model


async def train(daemon: Daemon, sites: dict[str, Site], run: str, round_: int) -> None:
    """All that are asked in this round train well."""
    view = await daemon.until(run, lambda view: view.round == round_ and view.phase == "training")
    for name in view.pending:
        await sites[name].submit(await sites[name].task(), some_delta(SIZE, ord(name), round_), weight=ord(name))


async def model_of(daemon: Daemon, run: str) -> Flat:
    return flat_of(await daemon.export(run), SIZE)


# Start ----------------------------------------------------------------------------------------------------------------


async def test_its_address_is_in_the_state_folder_while_it_serves(tmp_path: Path) -> None:
    async with a_daemon(tmp_path) as daemon:
        found = json.loads((tmp_path / "address.json").read_text())
        assert found["address"] == daemon.address
        assert await daemon.runs() == []
    assert not (tmp_path / "address.json").exists()


async def test_a_port_in_use_is_refused_with_the_remedy(daemon: Daemon, tmp_path: Path) -> None:
    _, port = addresses.parse(daemon.address)
    for _ in range(2):  # and what was opened on the way is closed again
        with pytest.raises(PortInUse, match=re.escape(f"cannot listen on {daemon.address}") + ".*pass another --port"):
            async with a_daemon(tmp_path / "other", port=port):
                pass
    async with a_daemon(tmp_path / "other") as other:
        assert await other.runs() == []


async def test_a_state_folder_in_use_is_refused_with_the_remedy(daemon: Daemon) -> None:
    told = (
        rf"another seqfed server uses .*\(process {os.getpid()} on .*, {re.escape(daemon.address)}\); stop it, or pass"
    )
    with pytest.raises(StorageError, match=told):
        async with a_daemon(daemon.state):
            pass


# Standing by, and being replaced --------------------------------------------------------------------------------------


def replace_holder(state: Path) -> None:
    """As another server does that takes the daemon for dead."""
    with contextlib.closing(sqlite3.connect(state / "seqfed.db", isolation_level=None)) as database:
        database.execute("UPDATE lease SET term = term + 1, holder = 'machine/1/2/3', host = 'far', pid = 1")


async def test_one_that_stands_by_takes_over_where_the_first_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LOOK_S", 0.01)
    spec = make_spec(rounds=2)
    async with contextlib.AsyncExitStack() as stack:
        async with a_daemon(tmp_path) as first:
            begun = asyncio.create_task(stack.enter_async_context(a_daemon(tmp_path, standby=True)))
            run = (await first.submit(spec)).run
            sites = {site.name: site for site in await first.arrive("a", "b")}
            await train(first, sites, run, 1)
            await first.until(run, lambda view: view.round == 2)
            assert not begun.done()
        second = await soon(begun)
        sites = {site.name: site for site in await second.arrive("a", "b")}
        await train(second, sites, run, 2)
        assert (await second.end(run)).phase == "finished"
        expected = initial_parameters(spec).flat
        for number in (1, 2):
            expected = averaged(expected, *((ord(name), some_delta(SIZE, ord(name), number)) for name in "ab"))
        assert (await model_of(second, run) == expected).all()


async def test_a_daemon_that_was_replaced_stops_at_the_first_thing_it_would_write(tmp_path: Path) -> None:
    with pytest.raises(LeaseLost, match="process 1 on far.* has taken over"):  # noqa: PT012 - the block is what ends
        async with a_daemon(tmp_path) as daemon:
            replace_holder(tmp_path)
            with pytest.raises(LeaseLost):
                await daemon.submit(make_spec())
            await soon(asyncio.Event().wait())  # the daemon ends it


async def test_a_daemon_with_nothing_to_write_finds_out_when_it_renews_its_lease(tmp_path: Path) -> None:
    with pytest.raises(LeaseLost, match="start it with --standby"):  # noqa: PT012 - the block is what ends
        async with a_daemon(tmp_path, lease_s=1):
            replace_holder(tmp_path)
            await soon(asyncio.Event().wait())


async def test_a_block_that_ends_while_the_lease_is_lost_is_told_and_nothing_is_left_running(tmp_path: Path) -> None:
    with pytest.raises(LeaseLost):  # noqa: PT012 - the block is what ends
        async with a_daemon(tmp_path) as daemon:
            replace_holder(tmp_path)
            with contextlib.suppress(LeaseLost):
                await daemon.submit(make_spec())
    assert not (tmp_path / "address.json").exists()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_cancelled_block_is_not_taken_for_a_lost_lease(tmp_path: Path) -> None:
    async def work() -> None:
        async with a_daemon(tmp_path):
            asyncio.current_task().cancel()  # type: ignore[union-attr]  # there is one
            await asyncio.sleep(0)

    with pytest.raises(asyncio.CancelledError):
        await work()
    async with a_daemon(tmp_path):
        pass


async def test_it_holds_its_lease_longer_than_the_lease_lasts(tmp_path: Path) -> None:
    """Seen by one on another machine, which cannot look whether the process lives."""
    async with a_daemon(tmp_path, lease_s=1) as daemon:
        with contextlib.closing(sqlite3.connect(tmp_path / "seqfed.db")) as database:
            (first,) = database.execute("SELECT expires FROM lease").fetchone()
            async with asyncio.timeout(PATIENCE):
                while database.execute("SELECT expires FROM lease").fetchone()[0] < first + 1.0:
                    await daemon.runs()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
async def test_plaintext_off_the_loopback_interface_must_be_asked_for(host: str, tmp_path: Path) -> None:
    with pytest.raises(InsecureRefused, match=re.escape(host) + ".*pass --insecure"):
        async with serving(ServerSettings(host=host, port=0, state=tmp_path / "state")):
            pass
    assert not (tmp_path / "state").exists()


async def test_health_and_reflection_answer(daemon: Daemon) -> None:
    health: Any = health_pb2_grpc.HealthStub(daemon.channel)
    services = ("seqfed.v1.Federation", "seqfed.v1.Admin")
    for name in ("", *services):
        reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    channel: Any = daemon.channel  # the stub is typed for synchronous channels only
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)

    async def asks() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        yield reflection_pb2.ServerReflectionRequest(file_containing_symbol="seqfed.v1.Admin")

    listed, described = [reply async for reply in reflection.ServerReflectionInfo(asks())]
    names = {service.name for service in listed.list_services_response.service}
    assert names >= {*services, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert described.file_descriptor_response.file_descriptor_proto


async def test_it_stops_cleanly_with_streams_open(tmp_path: Path) -> None:
    async with a_daemon(tmp_path) as daemon:
        (site,) = await daemon.arrive("a")
        run = await daemon.submit(make_spec())
        await daemon.until(run.run, lambda view: "here: a" in view.reason)
        channel = grpc.aio.insecure_channel(daemon.address)
        listening = Site(channel, "b")
        await listening.come()
        await daemon.until(run.run, lambda view: view.phase == "training")
        await listening.task()
        await site.task()
    assert await soon(listening.tasks.get()) is None
    await channel.close()


# Whose turn it is -----------------------------------------------------------------------------------------------------


async def test_a_run_that_cannot_begin_says_who_is_missing_and_who_does_not_fit(daemon: Daemon) -> None:
    run = await daemon.submit(make_spec(cohort__min_clients=3, data={"features": 2, "classes": 2, "steps": 5}))
    assert run.reason == "waits for 3 more of 3 clients; nobody is here"
    await daemon.arrive("fits")
    await daemon.arrive("wide", data_schema=b'{"features": 7, "steps": 5, "classes": 2, "examples": 1}')
    await daemon.arrive("long", data_schema=b'{"features": 2, "steps": 9, "classes": 2, "examples": 1}')
    await daemon.arrive("many", data_schema=b'{"features": 2, "steps": 5, "classes": 4, "examples": 1}')
    view = await daemon.until(run.run, lambda view: view.reason.count("does not fit") == 3)
    assert (view.phase, view.round) == ("queued", 0)
    assert view.reason == (
        "waits for 2 more of 3 clients; here: fits"
        "; long does not fit: it has 9 steps a sequence, the run wants 5 steps"
        "; many does not fit: it has labels up to 3, the run's end at 1"
        "; wide does not fit: it has 7 features a step, the run wants 2"
    )


async def test_runs_have_their_turn_one_after_the_other(daemon: Daemon) -> None:
    sites = {site.name: site for site in await daemon.arrive("a", "b")}
    first = await daemon.submit(make_spec())
    second = await daemon.submit(make_spec(seed=1))
    await daemon.until(first.run, lambda view: view.phase == "training")
    view = await daemon.until(second.run, lambda view: True)
    assert (view.phase, view.reason) == ("queued", f"queued: run {first.run} has its turn")
    await train(daemon, sites, first.run, 1)
    assert (await daemon.end(first.run)).phase == "finished"
    await train(daemon, sites, second.run, 1)
    assert (await daemon.end(second.run)).phase == "finished"
    assert [view.run for view in await daemon.runs()] == [first.run, second.run]


async def test_stopping_a_run_gives_its_turn_to_the_next(daemon: Daemon) -> None:
    (site,) = await daemon.arrive("a")
    first = await daemon.submit(make_spec(cohort__min_clients=1))
    second = await daemon.submit(make_spec(cohort__min_clients=1))
    assert (await site.task()).key.run == first.run
    await daemon.stop(first.run)
    assert (await site.task(TaskKind.CANCEL)).key.run == first.run
    assert (await site.task()).key.run == second.run


async def test_a_run_that_lacks_clients_does_not_hold_up_another(daemon: Daemon) -> None:
    sites = {site.name: site for site in await daemon.arrive("a", "b")}
    big = await daemon.submit(make_spec(cohort__min_clients=3))
    other = await daemon.submit(make_spec(data={"features": 9, "classes": 2}))
    small = await daemon.submit(make_spec())
    await train(daemon, sites, small.run, 1)
    assert (await daemon.end(small.run)).phase == "finished"
    for run, missing in ((big, "waits for 1 more of 3 clients; here: a, b"), (other, "waits for 2 more of 2 clients")):
        view = await daemon.until(run.run, lambda view: True)
        assert view.phase == "queued"
        assert view.reason.startswith(missing)
    sites |= {site.name: site for site in await daemon.arrive("c")}
    await train(daemon, sites, big.run, 1)
    assert (await daemon.end(big.run)).phase == "finished"


async def test_a_client_that_leaves_while_a_run_begins_is_known_to_be_away(daemon: Daemon) -> None:
    a, b = daemon.site("a"), daemon.site("b")
    run = await daemon.submit(make_spec(cohort={"min_clients": 2, "deadline_s": 0.2}))
    await a.come()
    await b.join()
    await daemon.until(run.run, lambda view: "here: a" in view.reason)
    while "b" not in await daemon.clients():  # what is known of it is saved beside its hello
        pass
    with busy_database(daemon.state):  # so the run's beginning takes until the end of this block
        b.listen()
        while not (await daemon.clients())["b"].connected:
            pass
        await b.leave()
        while (await daemon.clients())["b"].connected:
            pass
    view = await daemon.until(run.run, lambda view: view.phase == "gathering")
    assert "waits for 1 more of 2 clients; here: a" in view.reason
    assert "no answer before the deadline from a, b" in view.reason


async def test_an_update_that_comes_together_with_a_failure_is_counted_once(daemon: Daemon) -> None:
    """The failure begins another attempt, whose sum is the update's second; both events are taken up together."""
    spec = make_spec(cohort__min_clients=3)
    sites = {site.name: site for site in await daemon.arrive("a", "b", "c")}
    run = await daemon.submit(spec)
    tasks = {name: await site.task() for name, site in sites.items()}
    deltas = {name: some_delta(SIZE, ord(name)) for name in sites}

    def in_place(name: str) -> bool:
        return any((daemon.state / "updates" / run.run).glob(f"1.{name}.*.f32"))

    with busy_database(daemon.state):
        pending = [
            asyncio.create_task(sites[name].submit(tasks[name], deltas[name], weight=ord(name))) for name in "ab"
        ]
        while not (in_place("a") and in_place("b")):
            await daemon.clients()
        pending.append(asyncio.create_task(failing(sites["c"], tasks["c"])))
        for _ in range(20):
            await daemon.clients()  # so many turns of the server's loop are enough for all of them to be waiting
    assert await soon(asyncio.gather(*pending)) == [False, False, False]
    again = await sites["c"].task()
    assert again.key.attempt == 2
    await sites["c"].submit(again, deltas["c"], weight=ord("c"))
    view = await daemon.end(run.run)
    assert (view.phase, view.attempt) == ("finished", 2)
    expected = averaged(initial_parameters(spec).flat, *((ord(name), delta) for name, delta in deltas.items()))
    assert (await model_of(daemon, run.run) == expected).all()


async def failing(site: Site, task: views.Task) -> bool:
    await site.fail(task)
    return False


# Starting again -------------------------------------------------------------------------------------------------------

HARD = {"cohort": {"min_clients": 4, "count": 3}, "seed": 11, "rounds": 3}


async def undisturbed(state: Path) -> tuple[Flat, list[views.RoundRecord]]:
    """The model and the rounds of the run whose daemon nobody stops."""
    async with a_daemon(state) as daemon:
        sites = {site.name: site for site in await daemon.arrive(*"abcd")}
        run = await daemon.submit(make_spec(**HARD))
        for number in (1, 2, 3):
            await train(daemon, sites, run.run, number)
        view = await daemon.end(run.run)
        return await model_of(daemon, run.run), list(view.history)


async def test_a_restart_in_mid_round_ends_with_the_same_bits(tmp_path: Path) -> None:
    expected, history = await undisturbed(tmp_path / "undisturbed")
    state = tmp_path / "state"
    async with a_daemon(state) as daemon:
        sites = {site.name: site for site in await daemon.arrive(*"abcd")}
        run = (await daemon.submit(make_spec(**HARD))).run
        await train(daemon, sites, run, 1)
        before = await daemon.until(run, lambda view: view.round == 2 and view.phase == "training")
        first, second, third = before.cohort
        done = await sites[second].task()
        await sites[second].submit(done, some_delta(SIZE, ord(second), 2), weight=ord(second))
    async with a_daemon(state) as daemon:
        (view,) = await daemon.runs()
        assert (view.run, view.phase, view.round) == (run, "training", 2)
        sites = {site.name: site for site in await daemon.arrive(*"abcd")}
        view = await daemon.until(run, lambda view: view.attempt == 2 and "away" not in view.reason)
        assert (view.round, view.attempt, view.cohort, view.pending) == (2, 2, before.cohort, (first, third))
        assert await sites[second].status(done, some_delta(SIZE, ord(second), 2).tobytes()) == (0, True)
        assert await sites[second].submit(done, some_delta(SIZE, ord(second), 2))  # a duplicate
        for name in (first, third):
            task = await sites[name].task()
            assert (task.key.round, task.key.attempt) == (2, 2)
            await sites[name].submit(task, some_delta(SIZE, ord(name), 2), weight=ord(name))
        await daemon.until(run, lambda view: view.round == 3)
    async with a_daemon(state) as daemon:  # and once more, before anybody has answered
        sites = {site.name: site for site in await daemon.arrive(*"dcba")}
        await train(daemon, sites, run, 3)
        view = await daemon.end(run)
        assert (view.phase, view.round) == ("finished", 3)
        assert [(one.round, one.attempt, one.cohort) for one in view.history] == [
            (one.round, attempt, one.cohort) for one, attempt in zip(history, (1, 2, 2), strict=True)
        ]
        assert [one.training for one in view.history] == [one.training for one in history]
        assert all(0 <= one.seconds < 60 for one in view.history)
        assert (await model_of(daemon, run)).tobytes() == expected.tobytes()


async def test_a_restart_in_evaluation_asks_for_what_is_missing(tmp_path: Path) -> None:
    async with a_daemon(tmp_path) as daemon:
        sites = {site.name: site for site in await daemon.arrive("a", "b")}
        run = (await daemon.submit(make_spec(rounds=2, evaluation__every=1))).run
        await train(daemon, sites, run, 1)
        await sites["a"].score(await sites["a"].task(TaskKind.EVALUATE), {"examples": 1, "loss": 5})
        assert (await sites["b"].task(TaskKind.EVALUATE)).model.version == 1
        model = await model_of(daemon, run)
    async with a_daemon(tmp_path) as daemon:
        sites = {site.name: site for site in await daemon.arrive("a", "b")}
        view = await daemon.until(run, lambda view: "away" not in view.reason)
        assert (view.phase, view.round, view.pending, view.history) == ("evaluating", 1, ("b",), ())
        assert (await model_of(daemon, run) == model).all()
        task = await sites["b"].task(TaskKind.EVALUATE)
        assert await sites["b"].fetch(task) == model.tobytes()
        await sites["b"].score(task, {"examples": 2, "loss": 1})
        view = await daemon.until(run, lambda view: view.round == 2 and bool(view.history))
        (record,) = view.history
        assert (record.evaluation, record.training["examples"]) == ({"loss": 6 / 2**20 / 3}, 2)
        assert 0 <= record.seconds < 60
        assert (await sites["a"].task()).key.round == 2


async def test_a_restart_in_mid_round_forgets_no_bytes(tmp_path: Path) -> None:
    sent, got = dict.fromkeys("ab", 0), dict.fromkeys("ab", 0)

    def add(*sites: Site) -> None:
        for site in sites:
            sent[site.name] += site.up
            got[site.name] += site.down

    async with a_daemon(tmp_path) as daemon:
        sites = {site.name: site for site in await daemon.arrive("a", "b")}
        run = (await daemon.submit(make_spec(rounds=2, evaluation__every=1))).run
        await sites["a"].submit(await sites["a"].task(), some_delta(SIZE, 1))
        await sites["b"].fetch(await sites["b"].task())  # no step of the run comes after that
        add(*sites.values())
    async with a_daemon(tmp_path) as daemon:
        (view,) = await daemon.runs()
        assert (view.bytes_up, view.bytes_down) == (sum(sent.values()), sum(got.values()))
        sites = {site.name: site for site in await daemon.arrive("a", "b")}
        await sites["b"].submit(await sites["b"].task(), some_delta(SIZE, 2))
        await sites["a"].score(await sites["a"].task(TaskKind.EVALUATE), {"examples": 1, "loss": 5})
        await sites["b"].task(TaskKind.EVALUATE)
        add(*sites.values())
    async with a_daemon(tmp_path) as daemon:  # and once more, while the round's model is scored
        sites = {site.name: site for site in await daemon.arrive("a", "b")}
        await sites["b"].score(await sites["b"].task(TaskKind.EVALUATE), {"examples": 1, "loss": 5})
        view = await daemon.until(run, lambda view: view.round == 2)
        for site in sites.values():
            await site.task()
            site.up -= wire.PING_BYTES  # with the task of the next round
        add(*sites.values())
        (record,) = view.history
        assert sorted(record.folded) == ["a", "b"]
        assert {name: up for name, (up, _) in record.traffic.items()} == sent
        assert record.bytes_up == sum(sent.values())


async def test_who_sums_up_its_data_is_sent_no_model(daemon: Daemon) -> None:
    (site,) = await daemon.arrive("a")
    spec = make_spec(data__normalise="federated", cohort__min_clients=1)
    run = (await daemon.submit(spec)).run
    measure = await site.task(TaskKind.MEASURE)
    assert measure.model.data == b""
    sums = statistics.Sums(spec.data.numbers)
    sums.add(np.eye(2, dtype=np.float32))
    await site.score(measure, sums.tally())
    train = await site.task()
    assert len(train.model.data) == 4 * SIZE
    await site.submit(train, some_delta(SIZE, 1))
    view = await daemon.end(run)
    (record,) = view.history
    assert (record.bytes_up, record.bytes_down) == (site.up, site.down) == (view.bytes_up, view.bytes_down)


async def test_a_restart_keeps_the_queue_and_what_is_over(tmp_path: Path) -> None:
    async with a_daemon(tmp_path) as daemon:
        ids = [(await daemon.submit(make_spec(seed=number))).run for number in range(3)]
        await daemon.stop(ids[0])
        (await daemon.arrive("a"))[0]
        await daemon.until(ids[1], lambda view: "here: a" in view.reason)
    async with a_daemon(tmp_path) as daemon:
        found = await daemon.runs()
        assert [view.run for view in found] == ids
        assert [view.phase for view in found] == ["stopped", "queued", "queued"]
        assert found[0].reason == "stopped by the operator"
        assert {name: one.connected for name, one in (await daemon.clients()).items()} == {"a": False}
        sites = {site.name: site for site in await daemon.arrive("a", "b")}
        await train(daemon, sites, ids[1], 1)
        await train(daemon, sites, ids[2], 1)
        assert (await daemon.end(ids[2])).phase == "finished"


async def test_a_gathering_run_goes_on_gathering_after_a_restart(tmp_path: Path) -> None:
    async with a_daemon(tmp_path) as daemon:
        sites = {site.name: site for site in await daemon.arrive("a", "b")}
        run = (await daemon.submit(make_spec(rounds=2))).run
        await daemon.until(run, lambda view: view.phase == "training")
        tasks = {name: await site.task() for name, site in sites.items()}
        await sites["a"].submit(tasks["a"], some_delta(SIZE, 1))
        await sites["a"].leave()
        await daemon.until(run, lambda view: "a (away)" in view.reason or not (view.cohort and "a" in view.pending))
        while (await daemon.clients())["a"].connected:
            pass
        await sites["b"].submit(tasks["b"], some_delta(SIZE, 2))
        await daemon.until(run, lambda view: view.phase == "gathering")
    async with a_daemon(tmp_path) as daemon:
        (view,) = await daemon.runs()
        assert (view.phase, view.round) == ("gathering", 2)
        sites = {site.name: site for site in await daemon.arrive("a", "b")}
        await train(daemon, sites, run, 2)
        assert (await daemon.end(run)).phase == "finished"


async def test_stopping_the_daemon_is_not_its_clients_leaving(tmp_path: Path) -> None:
    """Also not when it has an event in hand at that moment."""
    async with a_daemon(tmp_path) as daemon:
        sites = {site.name: site for site in await daemon.arrive("a", "b", "c")}
        run = (await daemon.submit(make_spec(cohort__min_clients=3, evaluation__every=1))).run
        await train(daemon, sites, run, 1)
        tasks = [await site.task(TaskKind.EVALUATE) for site in sites.values()]
        assert len(tasks) == 3
    async with a_daemon(tmp_path) as daemon:
        (view,) = await daemon.runs()
        assert (view.phase, view.pending) == ("evaluating", ("a", "b", "c"))


@pytest.mark.parametrize("harm", ["gone", "short", "altered"])
async def test_an_update_that_a_power_cut_harmed_is_asked_for_again(tmp_path: Path, harm: str) -> None:
    expected, _ = await undisturbed(tmp_path / "undisturbed")
    state = tmp_path / "state"
    async with a_daemon(state) as daemon:
        sites = {site.name: site for site in await daemon.arrive(*"abcd")}
        run = (await daemon.submit(make_spec(**HARD))).run
        cohort = (await daemon.until(run, lambda view: view.phase == "training")).cohort
        for name in cohort[:2]:
            task = await sites[name].task()
            await sites[name].submit(task, some_delta(SIZE, ord(name), 1), weight=ord(name))
    (file,) = (state / "updates" / run).glob(f"1.{cohort[0]}.*.f32")
    match harm:
        case "gone":
            file.unlink()
        case "short":
            file.write_bytes(file.read_bytes()[:-4])
        case _:
            file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    async with a_daemon(state) as daemon:
        sites = {site.name: site for site in await daemon.arrive(*"abcd")}
        view = await daemon.until(run, lambda view: view.attempt == 2 and "away" not in view.reason)
        assert view.pending == (cohort[0], cohort[2])
        for name in view.pending:
            task = await sites[name].task()
            await sites[name].submit(task, some_delta(SIZE, ord(name), 1), weight=ord(name))
        for round_ in (2, 3):
            await train(daemon, sites, run, round_)
        assert (await daemon.end(run)).phase == "finished"
        assert (await model_of(daemon, run)).tobytes() == expected.tobytes()
