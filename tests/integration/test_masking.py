"""Secure aggregation over real gRPC: exact sums, nothing of any one client at the server, and kill -9 at every step."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.integration import light
from tests.integration.cluster import Cluster, some_sequences
from tests.integration.killing_sum import STEPS as SERVER_STEPS
from tests.integration.maskers import (
    STEPS,
    Masker,
    examples_of,
    introduce,
    made_anew,
    made_in,
    newest,
    replayed,
    rows_of,
    score_of,
    session_of,
    spec_of,
    undisturbed,
)
from tests.integration.oracle import train
from tests.integration.tapping import files_of, memory_of, tapped
from tests.integration.test_tls import Place, a_server, running

from seqfed.client import secure
from seqfed.client.admin import Operator, operating
from seqfed.client.consent import Consent
from seqfed.client.demo.processes import processes, server_address
from seqfed.client.demo.run import certify
from seqfed.client.masking import masking_of
from seqfed.client.policy import Policy
from seqfed.client.work import LocalUpdate
from seqfed.common import checkpoint, identity, metrics
from seqfed.common.identity import Role
from seqfed.common.layout import Flat
from seqfed.common.masking.terms import Purpose, Terms
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.spec import RunSpec
from seqfed.common.statistics import Statistics
from seqfed.common.views import RoundRecord, RunView, Task
from seqfed.server.daemon import serving
from seqfed.server.settings import ServerSettings

T = TypeVar("T")

CLIENTS = ("a", "b", "c", "d")
PATIENCE = 60.0
PARENT = str(os.getpid())


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for who is gone."""
    monkeypatch.setattr("seqfed.client.session.LONGEST_WAIT", 0.2)
    monkeypatch.setattr("seqfed.server.masked.AWAY_S", 0.2)


async def soon(work: Awaitable[T]) -> T:
    return await asyncio.wait_for(work, PATIENCE)


@dataclass
class Seen:
    """What an operator saw of a run, and its model."""

    view: RunView
    records: list[RoundRecord]
    flat: Flat


async def seen_through(operator: Operator, spec: RunSpec, folder: Path) -> Seen:
    """A new run's course up to its end, or to a pause."""
    run = (await operator.submit(spec, None)).run
    records: list[RoundRecord] = []
    view = None
    async with contextlib.aclosing(operator.watch(run)) as watched:
        async for view in watched:
            records += view.history
            if view.phase == "paused":
                break
    assert view is not None
    await operator.export(run, folder / "model.safetensors")
    return Seen(view, records, checkpoint.load(folder / "model.safetensors", layout_of(spec)).flat)


# What comes of it -----------------------------------------------------------------------------------------------------


async def test_over_mtls_it_is_the_plain_quantised_mean_to_the_bit(tmp_path: Path) -> None:
    place = Place.at(tmp_path)
    spec = spec_of(data={"normalise": "federated"})
    maskers = {name: Masker(name) for name in CLIENTS}
    async with a_server(place) as server:
        sessions = []
        for name, one in maskers.items():
            folder = place.credentials(Role.CLIENT, name)
            masking = masking_of(name, tmp_path / name, folder, None)
            sessions.append(session_of(one, server.address, masking, folder))
        operator = place.credentials(Role.OPERATOR, "alice")
        async with running(*sessions), operating(server.address, insecure=False, credentials=operator) as calls:
            seen = await soon(seen_through(calls, spec, tmp_path))
            plain = spec.model_dump() | {"privacy": {}, "seed": 1}
            openly = await soon(seen_through(calls, RunSpec.model_validate(plain), tmp_path))
    assert (seen.view.phase, openly.view.phase) == ("finished", "finished"), seen.view.reason
    assert seen.flat.tobytes() == undisturbed(spec, CLIENTS).tobytes()
    everything = metrics.summary(metrics.add(score_of(name) for name in CLIENTS))
    assert len(everything) == 4
    told: set[bytes] = set.union(*(one.statistics for one in maskers.values()))
    pooled = np.concatenate([rows_of(name) for name in CLIENTS]).astype(np.float64)
    statistics, *others = (Statistics.model_validate_json(one) for one in sorted(told))  # of the plain run, too
    assert all(one == statistics for one in others)
    assert statistics.mean == pytest.approx(pooled.mean(axis=0), rel=1e-12)
    assert statistics.scale == pytest.approx(pooled.std(axis=0), rel=1e-12)
    for record, other in zip(seen.records, openly.records, strict=True):
        assert sorted(record.folded) == sorted(other.folded) == list(CLIENTS)
        assert record.evaluation == other.evaluation == everything
        assert record.evaluated_examples == sum(map(examples_of, CLIENTS))
        assert {name: value for name, value in record.training.items() if value} == other.training


@pytest.mark.slow
def test_real_processes_train_to_the_bits_of_plain_loops(tmp_path: Path) -> None:
    data = {
        name: some_sequences(size, seed)
        for seed, (name, size) in enumerate(zip(CLIENTS, (40, 11, 23, 30), strict=True))
    }
    changes: dict[str, Any] = {
        "data": {"features": 3, "steps": 4, "classes": 3},
        "model": {"kind": "lstm", "hidden": 5},
    }
    spec = spec_of(training={"batch_size": 8, "epochs": 2}, rounds=2, **changes)
    tls, operator = certify(tmp_path, CLIENTS)

    def delta(round_: int, client: str, model: Flat) -> Flat:
        before = layout_of(spec).views(model)
        after = train(spec, before, round_, client, data[client])
        return np.concatenate([(after[name] - array).reshape(-1) for name, array in before.items()])

    async def run() -> Seen:
        async with operating(cluster.address, insecure=False, credentials=operator) as calls:
            return await soon(seen_through(calls, spec, tmp_path))

    with processes(tmp_path / "logs") as started:
        cluster = Cluster(tmp_path, started)
        started.start("server", "server", "--port", "0", "--state", str(tmp_path / "server"), "--tls", str(tls))
        cluster.address = server_address(tmp_path / "server", started)
        for name in CLIENTS:
            cluster.start_client(name, data[name], some_sequences(10, 99))
        seen = asyncio.run(run())
    assert seen.view.phase == "finished", seen.view.reason
    assert [sorted(record.folded) for record in seen.records] == [list(CLIENTS)] * 2
    assert seen.flat.tobytes() == replayed(spec, seen.records, delta, lambda client: len(data[client])).tobytes()
    assert [record.evaluated_examples for record in seen.records] == [40, 40]


@pytest.mark.parametrize("mode", ["semi_honest", "malicious"])
async def test_without_certificates_only_a_server_that_is_trusted_is_believed(tmp_path: Path, mode: str) -> None:
    spec = spec_of(privacy={"mode": mode}, cohort={"max_attempts": 1}, rounds=2)
    async with (
        a_plain_server(tmp_path) as address,
        taking_part(tmp_path, address, peers=None),
        operating(address, insecure=False) as calls,
    ):
        seen = await soon(seen_through(calls, spec, tmp_path))
    if mode == "semi_honest":
        assert seen.view.phase == "finished"
        assert seen.flat.tobytes() == undisturbed(spec, CLIENTS).tobytes()
    else:
        assert seen.view.phase == "paused"
        assert "knows nobody's masking key" in seen.view.reason
        for remedy in ("seqfed client enroll", 'peers = "peers.toml"', "privacy.mode = 'semi_honest'"):
            assert remedy in seen.view.reason


async def test_who_misses_one_among_its_pinned_peers_is_in_no_sum(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The others go on without it where they are enough, and only there."""
    fewer = introduce(tmp_path, "abc", "fewer.toml")
    introduce(tmp_path, CLIENTS)
    why = "MaskingRefused: the masking key of 'd' is not in this client's list of peers"
    async with (
        a_plain_server(tmp_path) as address,
        taking_part(tmp_path, address, {"b": fewer}),
        operating(address, insecure=False) as calls,
    ):
        seen = await soon(seen_through(calls, spec_of(cohort={"max_attempts": 1}), tmp_path))
        assert seen.view.phase == "finished"
        assert [sorted(record.folded) for record in seen.records] == [["a", "c", "d"]] * 3
        assert why in caplog.text
        spec = spec_of(survivors=4, cohort={"max_attempts": 1})
        seen = await soon(seen_through(calls, spec, tmp_path))
    assert (seen.view.phase, seen.records) == ("paused", [])
    assert f"missing: b ({why}" in seen.view.reason


async def test_a_floor_above_the_runs_own_ends_it_paused_by_the_rules_name(tmp_path: Path) -> None:
    place = Place.at(tmp_path)
    spec = spec_of(cohort={"max_attempts": 1})
    policy = Policy(min_cohort=4)
    async with a_server(place) as server:
        sessions = []
        for name in CLIENTS:
            folder = place.credentials(Role.CLIENT, name)
            consent = Consent(policy, folder, identity.load_credentials(folder).ca)
            masking = masking_of(name, tmp_path / name, folder, None, policy.min_cohort)
            sessions.append(session_of(Masker(name), server.address, masking, folder, consent))
        operator = place.credentials(Role.OPERATOR, "alice")
        async with running(*sessions), operating(server.address, insecure=False, credentials=operator) as calls:
            seen = await soon(seen_through(calls, spec, tmp_path))
            enough = await soon(seen_through(calls, spec_of(survivors=4), tmp_path))
    assert (seen.view.phase, seen.records) == ("paused", [])
    assert "min_cohort: as few as 3 clients can be behind a model of this run, and the limit is 4" in seen.view.reason
    assert "raise privacy.min_survivors" in seen.view.reason
    assert enough.view.phase == "finished"


@contextlib.asynccontextmanager
async def a_plain_server(folder: Path) -> AsyncIterator[str]:
    async with serving(ServerSettings(port=0, state=folder / "state")) as address:
        yield address


@contextlib.asynccontextmanager
async def taking_part(
    folder: Path, address: str, peers: Mapping[str, Path] | None = None, names: Iterable[str] = CLIENTS
) -> AsyncIterator[dict[str, Masker]]:
    """Clients without certificates. peers: by client its file of peers; the others have folder/peers.toml; None: nobody has."""
    maskers = {name: Masker(name) for name in names}
    common = folder / "peers.toml"
    sessions = []
    for name, one in maskers.items():
        file = None if peers is None else peers.get(name, common)
        sessions.append(session_of(one, address, masking_of(name, folder / name, None, file)))
    async with running(*sessions):
        yield maskers


# What the server sees ---------------------------------------------------------------------------------------------------


@dataclass
class Given:
    """What one client gave for a masked sum, before it was masked."""

    update: Flat
    residues: NDArray[np.unsignedinteger[Any]]
    scalars: list[int]

    def forms(self) -> Iterator[NDArray[Any]]:
        """How it could show: as the update, and as whole numbers of any size, which of 16 bits are also the packed ones."""
        half = 1 << 15
        signed = np.where(
            self.residues < half, self.residues.astype(np.int64), self.residues.astype(np.int64) - 2 * half
        )
        yield from (self.update, self.residues, signed.astype(np.int32), signed, signed.astype(np.float32))
        yield np.array(self.scalars, np.int64)

    def needles(self, places: int) -> Iterator[bytes]:
        for form in self.forms():
            if form.dtype == np.int64 and len(form) == len(self.scalars):
                yield form.tobytes()
                continue
            for place in np.linspace(0, len(form) - 8, places).astype(int):
                yield form[place : place + 8].tobytes()


async def test_the_server_gets_to_see_no_single_update(
    tmp_path: Path, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither on the wire nor in its files nor in its memory is any client's update, float or quantised, or its tally."""
    given: list[Given] = []
    contribution = secure.contribution

    def noted(terms: Terms, task: Task, client: str, one: secure.Given) -> Any:
        vector, scalars = contribution(terms, task, client, one)
        if isinstance(one, LocalUpdate):
            assert vector is not None
            given.append(Given(one.delta.copy(), vector.copy(), list(scalars)))
        return vector, scalars

    monkeypatch.setattr(secure, "contribution", noted)
    introduce(tmp_path, CLIENTS)
    spec = spec_of(model={"hidden": 16}, evaluation={"every": 0})
    openly = RunSpec.model_validate(spec.model_dump() | {"privacy": {}, "seed": 1, "rounds": 1})
    plain = initial_parameters(openly).flat
    process, address = await children.server("0", "seqfed.client.demo.child")
    async with (
        tapped(address) as line,
        taking_part(tmp_path, line.address, {}),
        operating(address, insecure=False) as calls,
    ):
        await soon(seen_through(calls, openly, tmp_path))
        assert all(line.holds(made_anew(1, name, plain)[-8:].tobytes()) for name in CLIENTS)  # it would be found
        seen = await soon(seen_through(calls, spec, tmp_path))
        assert seen.view.phase == "finished"
        assert len(given) == len(CLIENTS) * spec.rounds
        everywhere = [needle for one in given for needle in one.needles(places=9)]
        assert not any(map(line.holds, everywhere))
        assert not any(needle in file for file in files_of(tmp_path / "state") for needle in everywhere)
        try:
            memory = list(memory_of(process.pid))
        except OSError as error:
            pytest.skip(f"another process's memory cannot be read here: {error}")
        assert any(seen.view.run.encode() in one for one in memory)
        last = [needle for one in given[-len(CLIENTS) :] for needle in one.needles(places=2)]
        assert not [needle for one in memory for needle in last if needle in one]


# kill -9 --------------------------------------------------------------------------------------------------------------


@dataclass
class Children:
    """Processes of a test, ended with it; what they write is in folder/log."""

    folder: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    async def start(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            whole = [sys.executable, "-m", *command]
            self.started.append(await asyncio.to_thread(subprocess.Popen, whole, stdout=log, stderr=log))
        return self.started[-1]

    async def masker(self, name: str, address: str, step: str) -> subprocess.Popen[bytes]:
        return await self.start("tests.integration.maskers", PARENT, name, address, str(self.folder), step)

    async def server(self, port: str, *child: str) -> tuple[subprocess.Popen[bytes], str]:
        """child: the module, and what it wants before the command. Its process, and its address."""
        told = self.folder / "state" / "address.json"
        told.unlink(missing_ok=True)
        flags = ("--port", port, "--state", str(self.folder / "state"))
        process = await self.start(child[0], PARENT, *child[1:], "server", *flags)
        while True:
            assert process.poll() is None, (self.folder / "log").read_text()
            with contextlib.suppress(OSError, ValueError):
                return process, str(json.loads(told.read_text())["address"])
            await asyncio.sleep(0.02)


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    found = Children(tmp_path)
    yield found
    for one in found.started:
        one.kill()
        one.wait()


def slow_but(quick: Collection[tuple[Any, ...]], every: Iterable[tuple[Any, ...]]) -> list[Any]:
    """All these parameters, but for the quick ones in the slow tests."""
    return [pytest.param(*one, marks=() if one in quick else pytest.mark.slow) for one in every]


@pytest.mark.parametrize(
    ("step", "count"), slow_but({("keyshares", 4), ("confirm", 3)}, itertools.product(STEPS, (3, 4)))
)
async def test_a_client_killed_in_a_sum_is_done_without_or_the_round_is_tried_again(
    tmp_path: Path, children: Children, step: str, count: int
) -> None:
    names = CLIENTS[:count]
    *others, victim = names
    introduce(tmp_path, names)
    spec = spec_of(count, evaluation={"every": 0}, rounds=2)
    async with a_plain_server(tmp_path) as address, taking_part(tmp_path, address, {}, others) as maskers:
        process = await children.masker(victim, address, step)
        async with operating(address, insecure=False) as calls:
            seeing = asyncio.create_task(seen_through(calls, spec, tmp_path))
            assert await asyncio.to_thread(process.wait, PATIENCE) == -9
            await children.masker(victim, address, "-")
            seen = await soon(seeing)
    assert seen.view.phase == "finished", seen.view.reason
    first, second = seen.records
    assert sorted(second.folded) == list(names)
    sent = step in {"maskedinput", "confirm"}  # whoever has given its input is in the sum, gone or not
    assert sorted(first.folded) == (others if count == 4 and not sent else list(names))
    assert first.attempt == (1 if count == 4 else 2)  # two thirds of three are all three
    made = {name: one.made for name, one in maskers.items()} | {victim: made_in(tmp_path / f"{victim}.made")}
    assert seen.flat.tobytes() == replayed(spec, seen.records, newest(made)).tobytes()
    given = (
        count == 3 and step != "advert"
    )  # the others' inputs were on their way: what may be opened is not given again
    for name in others:
        assert made[name] == {1: [0, 2] if given else [0], 2: [0]}


@pytest.mark.parametrize(
    ("purpose", "step", "count"),
    slow_but(
        {(Purpose.TRAIN, "sharing", 4), (Purpose.TRAIN, "opening", 4)},
        (
            *((Purpose.TRAIN, step, count) for step in SERVER_STEPS for count in (1, 4)),
            *((Purpose.EVALUATE, step, 4) for step in SERVER_STEPS),
        ),
    ),
)
async def test_a_server_killed_in_a_sum_begins_it_anew_and_opens_no_update_twice(
    tmp_path: Path, children: Children, purpose: Purpose, step: str, count: int
) -> None:
    spec = spec_of(rounds=2)
    view, history, flat, maskers = await killed(tmp_path, children, spec, purpose, step, count)
    assert view.phase == "finished", view.reason
    assert [sorted(record.folded) for record in history] == [list(CLIENTS)] * 2
    made = {name: one.made for name, one in maskers.items()}
    assert flat.tobytes() == replayed(spec, history, newest(made)).tobytes()
    for one in made.values():  # whose input may have gone out has made another for the second try
        assert one[2] == [0]
        assert one[1] in ([[0]] if purpose is not Purpose.TRAIN or step == "sharing" else [[0], [0, 2]])
    if all(one[1] == [0] for one in made.values()):
        assert flat.tobytes() == undisturbed(spec, CLIENTS).tobytes()
    elif count == len(CLIENTS):
        assert all(one[1] == [0, 2] for one in made.values())
    everything = metrics.summary(metrics.add(score_of(name) for name in CLIENTS))
    lost = purpose is Purpose.EVALUATE and step != "sharing"  # scores that may have been opened are not given again
    assert [record.evaluation for record in history] == [{} if lost else everything, everything]


@pytest.mark.slow
@pytest.mark.parametrize("step", SERVER_STEPS)
async def test_data_whose_sums_may_have_been_opened_are_measured_in_no_second_sum(
    tmp_path: Path, children: Children, step: str
) -> None:
    spec = spec_of(data={"normalise": "federated"}, rounds=2)
    view, history, _, _ = await killed(tmp_path, children, spec, Purpose.MEASURE, step, len(CLIENTS))
    assert (view.phase, history) == ("failed", [])
    assert "submit the run anew" in view.reason


async def killed(
    folder: Path, children: Children, spec: RunSpec, purpose: Purpose, step: str, count: int
) -> tuple[RunView, list[RoundRecord], Flat, dict[str, Masker]]:
    """A run of all the clients whose server is killed at this message and started again: its end, rounds, and model."""
    introduce(folder, CLIENTS)
    process, address = await children.server("0", "tests.integration.killing_sum", purpose, step, str(count))
    async with taking_part(folder, address, {}) as maskers:
        await light.arrived(address, len(CLIENTS))
        run = await light.submitted(address, spec)
        seeing = asyncio.create_task(light.seen_through(address, run))
        assert await asyncio.to_thread(process.wait, PATIENCE) == -9
        await children.server(address.rpartition(":")[2], "seqfed.client.demo.child")
        view, records = await soon(seeing)
        flat = await light.exported(address, run, spec, folder)
    return view, [records[number] for number in sorted(records)], flat, maskers
