"""Runs with differential privacy through the daemon: what is clipped, which noise their models have, and what is booked.

Clients are driven by hand, so a test knows every update; what their models have beside these must be noise of the run's law.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from tests.server.conftest import Daemon, Site, a_daemon, flat_of, make_spec, typed
from tests.server.test_private import deviation_is

from seqfed.common import views, wire
from seqfed.common.dp import accounting
from seqfed.common.errors import ConfigError
from seqfed.common.layout import Flat
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.spec import RunSpec
from seqfed.common.views import FEDERATION, TaskKind
from seqfed.server import coordinator
from seqfed.server import round as machine
from seqfed.server.private import vector_multiplier
from seqfed.server.round import Phase, Run
from seqfed.server.store import StoredRun, open_store
from seqfed.v1 import admin_pb2

MODEL: Final = {"kind": "lstm", "hidden": 128, "layers": 1}  # 67,842 parameters
WORST: Final = 1e-6  # probability of a false alarm of one statistical test
FAR: Final = float(stats.norm.isf(WORST / 2))  # standard deviations that are farther with that probability
Delta = Callable[[str, int], Flat]  # (client, round) -> its update


def private(rounds: int = 1, cohort: dict[str, Any] | None = None, model: Any = MODEL, **dp: Any) -> RunSpec:
    return make_spec(
        rounds=rounds,
        model=model,
        aggregation={"weighting": "uniform"},
        cohort={"min_clients": 3, "deadline_s": 600, **(cohort or {})},
        privacy={"dp": {"mode": "central", "delta": 1e-5, "noise_multiplier": 1.0, **dp}},
    )


def ray(spec: RunSpec, length: float) -> Flat:
    """An update of this norm, always in the same direction."""
    found = np.random.default_rng(1).standard_normal(layout_of(spec).size)
    return (found * (length / np.linalg.norm(found))).astype(np.float32)


def along(spec: RunSpec, change: NDArray[np.float64]) -> float:
    """How far a change of the model goes in that direction."""
    return float(change @ ray(spec, 1.0).astype(np.float64))


async def play(sites: Sequence[Site], spec: RunSpec, rounds: int, delta: Delta | None = None) -> list[Flat]:
    """Each answers so many tasks of training; the models that these began with."""
    zeros, models = np.zeros(layout_of(spec).size, np.float32), list[Flat]()
    for _ in range(rounds):
        tasks = [await training(site) for site in sites]
        models.append(np.frombuffer(await sites[0].fetch(tasks[0]), "<f4").copy())
        for site, task in zip(sites, tasks, strict=True):
            await site.submit(task, zeros if delta is None else delta(site.name, task.key.round))
    return models


async def training(site: Site) -> views.Task:
    """The next task of training; that an older one is no longer wanted is not heeded."""
    while True:
        task = await asyncio.wait_for(site.tasks.get(), 20)
        assert task is not None
        if task.kind is not TaskKind.CANCEL:
            assert task.kind is TaskKind.TRAIN
            return task


async def begun(daemon: Daemon, run: str, round_: int) -> views.RunView:
    """The first view of the run that has begun this round, or has ended before."""
    return await daemon.until(run, lambda one: one.ended or (one.round == round_ and one.phase == "training"))


async def finished(daemon: Daemon, run: str, spec: RunSpec) -> tuple[views.RunView, Flat]:
    view = await daemon.end(run)
    return view, flat_of(await daemon.export(run), layout_of(spec).size)


async def report(daemon: Daemon, run: str) -> views.PrivacyReport:
    with typed():
        return wire.privacy_from_wire(await daemon.stub.ReportPrivacy(admin_pb2.ReportPrivacyRequest(run=run)))


async def audited(daemon: Daemon, kind: str) -> list[dict[str, Any]]:
    with typed():
        calls = daemon.stub.ListAudit(admin_pb2.ListAuditRequest(after=0))
        entries = [wire.entry_from_wire(message) async for message in calls]
    return [json.loads(one.body) for one in entries if one.kind == kind]


def stored(state: Path) -> StoredRun:
    """The only run that a daemon which is over has left."""
    with contextlib.closing(open_store(state)) as store:
        (found,) = store.runs()
        return found


def models_in(state: Path) -> set[Path]:
    return {*state.rglob("*.safetensors")}


def change(one: Flat, other: Flat) -> NDArray[np.float64]:
    return other.astype(np.float64) - one


# Noise ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "clip"), [(1.0, 1.0), (0.3, 4.0)])
async def test_each_rounds_noise_has_the_runs_deviation_over_the_target(
    daemon: Daemon, noise: float, clip: float
) -> None:
    spec = private(3, noise_multiplier=noise, clip=clip)
    sites = await daemon.arrive("a", "b", "c")
    run = (await daemon.submit(spec)).run
    models = await play(sites, spec, 3)
    models.append((await finished(daemon, run, spec))[1])
    noises = [change(one, other) for one, other in itertools.pairwise(models)]
    assert len(noises) == 3
    for one in noises:
        assert deviation_is(one, noise * clip / 3)
        assert stats.kstest(one * 3 / (noise * clip), "norm").pvalue > WORST
    for one, other in itertools.pairwise(noises):  # nothing is drawn twice
        assert abs(np.corrcoef(one, other)[0, 1]) < FAR / math.sqrt(len(one))


async def test_two_runs_of_the_same_seed_have_other_noise(daemon: Daemon) -> None:
    spec = private()
    sites, found = await daemon.arrive("a", "b", "c"), list[Flat]()
    for _ in range(2):
        run = (await daemon.submit(spec)).run
        await play(sites, spec, 1)
        found.append((await finished(daemon, run, spec))[1])
    start = initial_parameters(spec).flat
    one, other = (change(start, one) for one in found)
    assert abs(np.corrcoef(one, other)[0, 1]) < FAR / math.sqrt(len(start))


@pytest.mark.parametrize("length", [0.5, 80.0])
async def test_updates_are_clipped_and_divided_by_the_target_however_many_answer(daemon: Daemon, length: float) -> None:
    noise, clip = 0.05, 2.0
    spec = private(2, {"quorum": 2, "grace_s": 0}, noise_multiplier=noise, clip=clip)
    sites = await daemon.arrive("a", "b", "c")
    run = (await daemon.submit(spec)).run
    one = ray(spec, length)
    (first,) = await play(sites[:2], spec, 1, lambda *_: one)
    (second,) = await play(sites[:1], spec, 1)
    view = await daemon.stop(run)
    assert view.phase == "stopped"
    found = along(spec, change(first, second)) * 3  # of two of three
    assert abs(found - 2 * min(length, clip)) < FAR * noise * clip + 1e-5
    assert deviation_is(change(first, second) - ray(spec, found / 3), noise * clip / 3)


async def test_the_clip_follows_the_norms_and_outlives_the_daemon(tmp_path: Path) -> None:
    """log C grows by 0.2 (1/2 - share) a round, the share with a deviation of 1/20 (Andrew et al. 2021, 3.2)."""
    noise = 0.05
    spec = private(9, noise_multiplier=noise, clip="adaptive")
    one = ray(spec, 50.0)
    async with a_daemon(tmp_path) as daemon:
        sites = await daemon.arrive("a", "b", "c")
        run = (await daemon.submit(spec)).run
        await play(sites, spec, 5, lambda *_: one)
        models = await play(sites[:1], spec, 1, lambda *_: one)
    clip, spread = stored(tmp_path).state.clip, FAR * 0.2 / 20
    assert abs(math.log(clip / 0.1) - 5 * 0.1) < math.sqrt(5) * spread
    async with a_daemon(tmp_path) as daemon:
        sites = await daemon.arrive("a", "b", "c")
        await play(sites[1:], spec, 1, lambda *_: one)
        models += await play(sites, spec, 1)
        models += await play(sites, spec, 1)
        await training(sites[0])
        await daemon.stop(run)
    assert abs(along(spec, change(models[0], models[1])) / clip - 1) < FAR * 0.053 / 3
    after, grown = stored(tmp_path).state.clip, 0.1 - 2 * 0.1  # the sixth above, the other two within
    assert abs(math.log(after / clip) - grown) < math.sqrt(3) * spread


async def test_a_round_of_few_is_divided_by_the_cohort_that_was_planned(daemon: Daemon) -> None:
    """Counting the clipped of 9 clients would take more than a noise multiplier of 1 leaves; of the planned 12 it does not."""
    noise, cohort = 1.0, {"min_clients": 12, "quorum": 2}
    spec = private(3, cohort, noise_multiplier=noise, clip="adaptive")
    sites = await daemon.arrive(*(f"ward-{nth:02}" for nth in range(12)))
    run = (await daemon.submit(spec)).run
    zeros = np.zeros(layout_of(spec).size, np.float32)
    tasks = [await training(site) for site in sites]
    for site, task in zip(sites[9:], tasks[9:], strict=True):
        await site.fail(task, "PolicyRefused", "no")
    for site, task in zip(sites[:9], tasks[:9], strict=True):
        await site.submit(task, zeros)
    models = [np.frombuffer(await sites[0].fetch(tasks[0]), "<f4").copy()]
    models += await play(sites[:9], spec, 2)
    view, flat = await finished(daemon, run, spec)
    assert view.phase == "finished", view.reason
    assert [len(one.folded) for one in view.history] == [9, 9, 9]
    assert deviation_is(change(models[0], models[1]), vector_multiplier(noise, 12) * 0.1 / 12)
    assert not np.array_equal(models[-1], flat)


async def test_a_trees_noise_is_that_of_its_nodes_and_outlives_the_daemon(tmp_path: Path) -> None:
    """After t rounds the model has the noise of as many nodes as t has bits set, and not that of t rounds."""
    spec = private(9, mechanism="ftrl", noise_multiplier=2.0)
    models: list[Flat] = []
    async with a_daemon(tmp_path) as daemon:
        sites = await daemon.arrive("a", "b", "c")
        await daemon.submit(spec)
        models += await play(sites, spec, 5)
    async with a_daemon(tmp_path) as daemon:
        sites = await daemon.arrive("a", "b", "c")
        models += await play(sites, spec, 4)
        (run,) = await daemon.runs()
        models.append((await finished(daemon, run.run, spec))[1])
    assert np.array_equal(models[0], initial_parameters(spec).flat)
    for number, one in enumerate(models[1:], 1):
        assert deviation_is(change(models[0], one), 2.0 * math.sqrt(number.bit_count()) / 3), number


async def test_no_client_is_in_more_rounds_than_the_tree_is_made_for(daemon: Daemon) -> None:
    cohort = {"min_clients": 2, "count": 2}
    spec = private(9, cohort, mechanism="ftrl", participations=1, noise_multiplier=2.0)
    sites = {one.name: one for one in await daemon.arrive("a", "b", "c", "d", "e")}
    run = (await daemon.submit(spec)).run
    zeros = np.zeros(layout_of(spec).size, np.float32)
    for number in (1, 2):
        view = await begun(daemon, run, number)
        for name in view.cohort:
            await sites[name].submit(await training(sites[name]), zeros)
    view = await daemon.end(run)
    assert view.phase == "finished"
    assert view.reason.endswith("too many have been in privacy.dp.participations rounds")
    took = [name for record in view.history for name in record.folded]
    assert len(took) == len(set(took)) == 4
    found = (await report(daemon, run)).runs[0]
    assert found.entry.epsilon == accounting.spent(spec, 2, 2.0)
    assert {(count, epsilon) for _, count, epsilon in found.holders} == {(1, accounting.spent(spec, 2, 2.0, 1))}


# The ledger -----------------------------------------------------------------------------------------------------------


async def test_a_run_ends_where_its_budget_does(daemon: Daemon) -> None:
    spec = private(9, epsilon=2.0, noise_multiplier=3.0)
    rounds = next(count for count in range(9) if accounting.spent(spec, count + 1, 3.0) > 2.0)
    assert 1 < rounds < 8
    sites = await daemon.arrive("a", "b", "c")
    run = (await daemon.submit(spec)).run
    await play(sites, spec, rounds)
    view, flat = await finished(daemon, run, spec)
    spent = accounting.spent(spec, rounds, 3.0)
    assert (view.phase, len(view.history)) == ("finished", rounds)
    assert f"privacy budget spent: epsilon {spent:.4g} of 2 (delta 1e-05, unit client) after {rounds}" in view.reason
    assert not np.array_equal(flat, initial_parameters(spec).flat)
    for site in sites:  # nobody was asked for more
        while not site.tasks.empty():
            task = site.tasks.get_nowait()
            assert task is None or task.kind is TaskKind.CANCEL
    (found,) = (await report(daemon, run)).runs
    assert (found.entry.epsilon, found.entry.releases, found.goal) == (spent, rounds, 2.0)
    assert found.holders == tuple((name, rounds, spent) for name in "abc")
    noted = [(one["round"], one["epsilon"]) for one in await audited(daemon, "privacy")]
    assert noted == [(number, accounting.spent(spec, number, 3.0)) for number in range(rounds + 1)]


async def test_a_round_that_was_missed_is_not_on_the_account(daemon: Daemon) -> None:
    spec = private(2, {"quorum": 2, "grace_s": 0}, noise_multiplier=3.0)
    sites = await daemon.arrive("a", "b", "c")
    run = (await daemon.submit(spec)).run
    await play(sites[:2], spec, 1)
    await play(sites[:2], spec, 1)
    await daemon.end(run)
    (found,) = (await report(daemon, run)).runs
    assert [name for name, *_ in found.holders] == ["a", "b"]
    assert found.entry.releases == 2


async def test_what_is_spent_stands_with_the_model_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "STORE_AGAIN_S", 0.1)
    spec = private(2)
    database = tmp_path / "seqfed.db"

    def script(text: str) -> None:
        with contextlib.closing(sqlite3.connect(database)) as opened:
            opened.executescript(text)

    async with a_daemon(tmp_path) as daemon:
        sites = await daemon.arrive("a", "b", "c")
        run = (await daemon.submit(spec)).run
        script("CREATE TRIGGER no BEFORE INSERT ON ledger BEGIN SELECT RAISE(ABORT, 'not now'); END")
        await play(sites, spec, 1)
        await daemon.until(run, lambda one: "not now" in one.reason)
    before = stored(tmp_path)
    assert (before.version, before.state.phase, before.record) == (0, Phase.COMMITTING, None)
    assert [one.releases for one in before.ledger] == [0]
    script("DROP TRIGGER no")
    async with a_daemon(tmp_path) as daemon:
        sites = await daemon.arrive("a", "b", "c")
        await play(sites, spec, 1)
        _, flat = await finished(daemon, run, spec)
        (found,) = (await report(daemon, run)).runs
    assert (found.entry.epsilon, found.entry.releases) == (accounting.spent(spec, 2, 1.0), 2)
    assert deviation_is(change(initial_parameters(spec).flat, flat), math.sqrt(2) / 3)


async def test_a_restart_forgets_nothing_that_was_spent(tmp_path: Path) -> None:
    spec = private(9, epsilon=2.0, noise_multiplier=3.0)
    rounds = next(count for count in range(9) if accounting.spent(spec, count + 1, 3.0) > 2.0)
    run = ""
    for number in range(rounds):
        async with a_daemon(tmp_path) as daemon:
            sites = await daemon.arrive("a", "b", "c")
            if not number:
                run = (await daemon.submit(spec)).run
            await play(sites, spec, 1)
            await begun(daemon, run, number + 2)
    found = stored(tmp_path)
    ledger = {one.holder: one for one in found.ledger}
    assert (found.state.phase, found.version) == (Phase.FINISHED, rounds)
    assert ledger[FEDERATION].epsilon == accounting.spent(spec, rounds, 3.0)
    assert {name: one.releases for name, one in ledger.items()} == dict.fromkeys((FEDERATION, *"abc"), rounds)


async def test_nothing_of_clients_data_is_told_without_noise(daemon: Daemon) -> None:
    """Of the training losses nothing is told, and the key of noise and cohorts stands nowhere that is told."""
    told, silent = private(cohort={"min_clients": 2}, evaluation="public"), private(cohort={"min_clients": 2})
    sites = await daemon.arrive("a", "b")
    for spec, expected in ((told, {"examples": 2, "loss": 2 << 20}), (silent, {})):
        run = (await daemon.submit(spec)).run
        await play(sites, spec, 1)
        view, _ = await finished(daemon, run, spec)
        (record,) = view.history
        assert record.training == expected
        assert (record.slowest_training_seconds > 0) == bool(expected)
        assert (record.evaluation, record.evaluated_examples) == ({}, 0)
        file = await daemon.export(run)
        with contextlib.closing(sqlite3.connect(daemon.state / "seqfed.db")) as database:
            (text,) = database.execute("SELECT state FROM runs WHERE run = ?", (run,)).fetchone()
        secret = json.loads(text)["secret"]
        assert len(bytes.fromhex(secret)) == 32
        assert secret not in repr(view)
        assert secret.encode() not in file
        assert secret not in json.dumps([*await audited(daemon, "privacy"), *await audited(daemon, "submitted")])


async def test_all_runs_together_have_a_limit(tmp_path: Path) -> None:
    """Also over restarts; a run that would pass it ends with the model that it has."""
    spec = private(2, noise_multiplier=3.0)
    limit = accounting.spent(spec, 3, 3.0)  # one run and a half
    for number, rounds in ((1, 2), (2, 1)):
        async with a_daemon(tmp_path, max_epsilon=limit) as daemon:
            before = models_in(tmp_path)
            for refused in (make_spec(), private(4, noise_multiplier=3.0)):
                with pytest.raises(ConfigError, match="and this server's max_epsilon"):
                    await daemon.submit(refused)
            assert models_in(tmp_path) == before
            sites = await daemon.arrive("a", "b", "c")
            run = (await daemon.submit(spec)).run
            await play(sites, spec, rounds)
            view, _ = await finished(daemon, run, spec)
            assert len(view.history) == rounds
            assert ("client 'a' over all runs of this server" in view.reason) == (number == 2)
            (total,) = (await report(daemon, "")).totals
            assert total.epsilon == accounting.spent(spec, 2 * number - (number == 2), 3.0)
    async with a_daemon(tmp_path, max_epsilon=limit) as daemon:
        await daemon.arrive("a", "b", "c")
        view = await daemon.end((await daemon.submit(spec)).run)
    assert (view.phase, len(view.history)) == ("finished", 0)
    assert view.reason.startswith("before round 1: privacy budget spent: round 1 would make epsilon")


# Cohorts that nobody knows ----------------------------------------------------------------------------------------------


def sampled(clients: int = 1000, count: int = 100, quorum: int = 30, **dp: Any) -> RunSpec:
    cohort = {"min_clients": clients, "count": count, "quorum": quorum}
    return private(9, cohort, {"kind": "rnn", "hidden": 4, "layers": 1}, population=clients, **dp)


def waiting(clients: int, round_: int = 1, secret: int = 1) -> Run:
    names = frozenset(f"ward-{nth}" for nth in range(clients))
    return Run(Phase.GATHERING, present=names, round=round_, secret=f"{secret:064x}")


def test_who_is_drawn_hangs_on_the_secret_and_the_round_only() -> None:
    spec, run = sampled(), waiting(1000)
    found = machine.drawn(spec, run)
    assert found == machine.drawn(spec, replace(run, attempt=2, given_up=1, missed=(("ward-1", 5, 99),)))
    assert found == tuple(sorted(found))
    others = [machine.drawn(spec, waiting(1000, round_, secret)) for round_, secret in ((2, 1), (1, 2))]
    for other in others:  # of two cohorts of 100, as many in both as by chance
        assert len(set(found) & set(other)) <= stats.binom.isf(WORST, 1000, 0.01)
    more = machine.drawn(spec, replace(run, present=run.present | {"someone else"}))
    assert set(more) - {"someone else"} == set(found)  # each by itself


def test_each_is_drawn_as_often_as_is_reckoned() -> None:
    spec, clients, rounds = sampled(200, 40, 5), 200, 400
    cohorts = [machine.drawn(spec, waiting(clients, round_)) for round_ in range(1, rounds + 1)]
    sizes = np.array([len(one) for one in cohorts])
    low, high = stats.binom.ppf([WORST / 2, 1 - WORST / 2], clients * rounds, 0.2)
    assert low <= sizes.sum() <= high
    assert abs(sizes.var() / (clients * 0.2 * 0.8) - 1) < FAR * math.sqrt(2 / rounds)
    counts = np.array([sum(f"ward-{nth}" in one for one in cohorts) for nth in range(clients)])
    low, high = stats.binom.ppf([WORST / clients / 2, 1 - WORST / clients / 2], rounds, 0.2)
    assert low <= counts.min() <= counts.max() <= high


def test_a_cohort_below_the_quorum_is_drawn_again() -> None:
    spec = sampled(40, 20, 2)
    alone = replace(waiting(40), present=frozenset({"ward-1", "ward-2"}))
    assert machine.drawn(spec, alone) == ("ward-1", "ward-2")
    assert machine.drawn(spec, replace(alone, present=frozenset({"ward-1"}))) == ()


async def test_a_drawn_cohorts_sum_is_divided_by_the_mean_number(tmp_path: Path) -> None:
    spec = sampled(24, 18, 1, noise_multiplier=1.0)
    names = [f"ward-{nth}" for nth in range(24)]
    async with a_daemon(tmp_path) as daemon:
        sites = {one.name: one for one in await daemon.arrive(*names)}
        run = (await daemon.submit(spec)).run
        start, size = initial_parameters(spec).flat, None
        for number in (1, 2):
            view = await begun(daemon, run, number)
            for name in view.cohort:
                task = await training(sites[name])
                if number == 2 and size is not None:
                    model = np.frombuffer(await sites[name].fetch(task), "<f4")
                    assert abs(along(spec, change(start, model)) * 18 - size) < FAR * 1.0
                    size = None
                await sites[name].submit(task, ray(spec, 7.0))
            size = len(view.cohort) if number == 1 else size
        view = await daemon.stop(run)
        (found,) = (await report(daemon, run)).runs
    assert size is None
    assert found.holders == ()  # one account for all who may have been drawn
    assert found.entry.accountant == accounting.PLD
    secret = stored(tmp_path).state.secret
    for number, record in enumerate(view.history, 1):
        expected = machine.drawn(spec, Run(present=frozenset(names), round=number, secret=secret))
        assert record.cohort == expected


# Masked sums that made no model -----------------------------------------------------------------------------------------


DISTRIBUTED: Final = {"secure_aggregation": True, "min_survivors": 3, "b": 18}


def masked(rounds: int = 9, **dp: Any) -> RunSpec:
    plain = private(rounds, {"count": 3}, {"kind": "rnn", "hidden": 4, "layers": 1})
    given = {"mode": "distributed", "delta": 1e-5, "noise_multiplier": 3.0, **dp}
    return RunSpec.model_validate({**plain.model_dump(), "privacy": {**DISTRIBUTED, "dp": given}})


@pytest.mark.parametrize(
    "event",
    [
        machine.PauseRequested(),
        machine.StopRequested(),
        machine.Broken("the disk is full", passing=True),
        machine.Broken("a bug"),
        machine.Restarted(),
    ],
)
@pytest.mark.parametrize(
    ("phase", "masks", "opened"),
    [
        (Phase.TRAINING, "", 0),
        (Phase.MASKING, "training", 1),
        (Phase.COMMITTING, "", 1),
        (Phase.MASKING, "evaluating", 0),
    ],
)
def test_a_sum_that_is_dropped_may_have_been_opened(
    phase: Phase, masks: str, opened: int, event: machine.Event
) -> None:
    run = Run(phase, round=2, attempt=1, masks=masks, cohort=tuple("abc"), folded=tuple("abc"), target=3, number=4)
    assert machine.on(masked(), run, event)[0].opened == opened


# Updates that have their noise already ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["local", "example"])
async def test_an_update_is_on_the_account_whatever_becomes_of_it(daemon: Daemon, mode: str) -> None:
    """Also where the run ends before there is a model of it."""
    spec = private(2, mode=mode, noise_multiplier=3.0)
    epsilon = accounting.spent(spec, 1, 3.0) if mode == "local" else None
    sites = await daemon.arrive("a", "b", "c")
    run = (await daemon.submit(spec)).run
    for site in sites[:2]:
        await site.submit(await training(site), ray(spec, 0.5))
    await daemon.stop(run)
    (found,) = (await report(daemon, run)).runs
    assert found.holders == (("a", 1, epsilon), ("b", 1, epsilon))
    assert (found.entry.round, found.entry.releases, found.entry.epsilon) == (1, 1, epsilon)
    assert [(one["round"], one["epsilon"]) for one in await audited(daemon, "privacy")][1:] == [(1, epsilon)]


async def test_who_declines_a_run_is_not_on_its_account(daemon: Daemon) -> None:
    spec = private(1, {"quorum": 2, "grace_s": 0}, mode="local", noise_multiplier=3.0)
    sites = await daemon.arrive("a", "b", "c")
    run = (await daemon.submit(spec)).run
    await sites[2].fail(await training(sites[2]), "PolicyRefused", "no")
    await play(sites[:2], spec, 1)
    await daemon.end(run)
    (found,) = (await report(daemon, run)).runs
    assert [name for name, *_ in found.holders] == ["a", "b"]


async def test_a_restart_books_no_update_twice(tmp_path: Path) -> None:
    spec = private(2, {"quorum": 2, "grace_s": 0}, mode="local", noise_multiplier=3.0)
    async with a_daemon(tmp_path) as daemon:
        sites = await daemon.arrive("a", "b", "c")
        run = (await daemon.submit(spec)).run
        await sites[0].submit(await training(sites[0]), ray(spec, 0.5))
    async with a_daemon(tmp_path) as daemon:
        sites = await daemon.arrive("a", "b", "c")
        await sites[1].submit(await training(sites[1]), ray(spec, 0.5))
        await begun(daemon, run, 2)
        (found,) = (await report(daemon, run)).runs
    # c was asked, and its update may have come too late
    assert found.holders == tuple((name, 1, accounting.spent(spec, 1, 3.0)) for name in "abc")
    assert found.entry.releases == 1
