"""A run under faults: a server and clients as real processes that are killed, suspended, started again and cut off at random.

Which faults, on whom, for how long and how far apart follows from the seed; when exactly a fault strikes within a round does
not, for the processes run as they run. Faults strike until the time is over; then all of them end and the run must finish. A
run that finishes earlier is followed by another one, so that there is one at all times.

What the figures mean:

faults             Kind -> how many there were.
rounds_committed   Rounds that the server told of, to the benchmark's `watch`, as committed.
rounds_lost        Those of them that were not there later on, or not with the same record. Every time `watch` comes back it
                   has the whole history told again, and once more at the end.
duplicate_updates  Updates that were counted twice: a client twice among a round's folded, or a client's update for the same
                   base round in two rounds.
stuck_s            The longest time from one commit to the next (or from a run's beginning to its first, or to its end), less
                   that during which faults in force made a round impossible: the server killed or suspended, or fewer clients
                   than a round needs running, not suspended, with a link that carries. Starting again, finding out that a
                   connection is dead and dialling again count as stuck: there the software's time is measured.
final_equal        Whether the final model equals, bit for bit, that of a replay: from the same initial numbers, for every
                   committed round, the training of each folded client is done once more, here, and averaged in plain integers.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import itertools
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Actor, free_port, machine, tell
from benchmarks.link import Links, Quality, links, settle
from seqfed.client.admin import Operator, operating
from seqfed.client.data import open_source
from seqfed.client.settings import DataSettings
from seqfed.client.work import Workshop
from seqfed.common import checkpoint
from seqfed.common.errors import SeqfedError, ServerUnavailable
from seqfed.common.layout import Flat
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.seeds import generator
from seqfed.common.spec import CohortSpec, DataSpec, EvaluationSpec, ModelSpec, RunSpec, TrainingSpec
from seqfed.common.views import ModelVersion, RoundRecord, RunView, Task, TaskKey, TaskKind

FEATURES, STEPS, CLASSES = 8, 16, 4
APART_S = 2.5  # seconds from one fault to the next, on average
FIRST_ROUNDS = 3  # undisturbed, to learn how long one takes
LAST_S = 600.0  # for the run to finish once faults have ceased

PROCESS_FAULTS = {"client_kill": 4, "client_stop": 4, "client_restart": 2}  # kind -> how often, against the others
SERVER_FAULTS = {"server_kill": 2, "server_stop": 1, "server_restart": 1}
LINK_FAULTS = {"link_cut": 3, "link_reset": 2, "link_delay": 2, "link_loss": 2}
WEIGHTS = {**PROCESS_FAULTS, **SERVER_FAULTS, **LINK_FAULTS}
LONGEST_S = {  # of each kind; 8 where none is said
    "client_stop": 12.0,  # more than the run's silence_s
    "server_kill": 4.0,
    "server_stop": 12.0,  # more than the server's lease
    "link_cut": 30.0,  # more than it takes to notice a dead connection
    "link_delay": 15.0,
    "link_loss": 15.0,
}


def spec_for(seed: int, rounds: int, clients: int, late: str) -> RunSpec:
    """A run that goes on with half of its clients and waits for nobody long; one training takes a tenth of a second."""
    return RunSpec.model_validate(
        {
            "name": f"chaos-{seed}",
            "seed": seed,
            "rounds": rounds,
            "data": DataSpec(features=FEATURES, steps=STEPS, classes=CLASSES),
            "model": ModelSpec(hidden=24, layers=1),
            "training": TrainingSpec(learning_rate=0.001, batch_size=16, steps=60),
            "cohort": CohortSpec.model_validate(
                {
                    "min_clients": max(1, clients // 2 + 1),
                    "quorum": max(1, clients // 2),
                    "deadline_s": 30.0,
                    "grace_s": 2.0,
                    "silence_s": 5.0,
                    "late": late,
                    "max_attempts": 1000,
                }
            ),
            "evaluation": EvaluationSpec(every=3),
        }
    )


def data_of(folder: Path, number: int) -> DataSettings:
    """A client's data file, made the same way from its number every time."""
    file = folder / f"{number}.npz"
    if not file.exists():
        draw = generator(number, "benchmark data")
        size = 40 + 8 * number
        x = draw.standard_normal((size, STEPS, FEATURES)).astype(np.float32)
        np.savez(file, x=x, y=x.sum(axis=1)[:, :CLASSES].argmax(axis=1))
    return DataSettings(file=(str(file),))


# What is watched ------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """What the server tells of its runs, and what of it did not stay true."""

    address: str
    views: dict[str, RunView] = field(default_factory=dict)
    records: dict[str, dict[int, RoundRecord]] = field(default_factory=dict)  # as they were first told
    lost: set[tuple[str, int]] = field(default_factory=set)
    times: list[float] = field(default_factory=list)  # of commits, and of runs' beginnings and ends

    async def follow(self, run: str) -> None:
        """See the run until it has ended, through every loss of the server."""
        self.times.append(time.monotonic())
        self.records.setdefault(run, {})
        while True:
            try:
                async with self.operator() as operator, contextlib.aclosing(operator.watch(run)) as told:
                    again: dict[int, RoundRecord] = {}
                    async for view in told:
                        again |= {one.round: one for one in view.history}
                        self._see(run, view)
                        if view.ended:
                            self.times.append(time.monotonic())
                            self.lost |= {(run, one) for one in self.records[run].keys() - again.keys()}
                            return
            except SeqfedError as error:
                if not isinstance(error, ServerUnavailable):
                    print(f"watching: {type(error).__name__}: {error}", file=sys.stderr)
            await asyncio.sleep(0.2)

    def _see(self, run: str, view: RunView) -> None:
        before, known = self.views.get(run), self.records[run]
        self.views[run] = view
        for record in view.history:
            if record.round not in known:
                known[record.round] = record
                self.times.append(time.monotonic())
            elif known[record.round] != record:
                self.lost.add((run, record.round))
        waits = view.phase not in {"training", "committing", "evaluating"}
        if before is None or (
            before.phase != view.phase and (waits or (view.round % 10 == 0 and view.phase == "training"))
        ):
            print(f"{time.strftime('%X')} {view.name}: {view.phase}: {view.reason}", file=sys.stderr)

    def forget(self, run: str) -> None:
        """Leave this run out of the figures."""
        del self.views[run], self.records[run]
        self.times.clear()

    @contextlib.asynccontextmanager
    async def operator(self) -> AsyncIterator[Operator]:
        async with operating(self.address, insecure=False) as operator:
            yield operator


def duplicates(records: Iterable[RoundRecord]) -> int:
    """Updates of one run that were counted more than once."""
    counted = collections.Counter(
        (client, record.round - record.stale.get(client, 0)) for record in records for client in record.folded
    )
    return sum(counted.values()) - len(counted)


@dataclass
class Faults:
    """The faults in force, and for how long they have made a round impossible."""

    needed: int
    clients: int
    counted: collections.Counter[str] = field(default_factory=collections.Counter)
    server: bool = False
    processes: set[int] = field(default_factory=set)
    cut: set[int] = field(default_factory=set)  # clients whose links carry nothing,
    weak: set[int] = field(default_factory=set)  # or little
    impossible: list[tuple[float, float]] = field(default_factory=list)
    since: float | None = None

    def changed(self) -> None:
        """Note whether a round is possible from now on."""
        now = time.monotonic()
        possible = not self.server and self.clients - len(self.processes | self.cut) >= self.needed
        if possible and self.since is not None:
            self.impossible.append((self.since, now))
            self.since = None
        elif not possible and self.since is None:
            self.since = now

    def stuck(self, begin: float, end: float) -> float:
        """Seconds between the two moments in which a round was possible."""
        spans = [*self.impossible, *([(self.since, end)] if self.since is not None else [])]
        return end - begin - sum(max(0.0, min(end, last) - max(begin, first)) for first, last in spans)


# What is done to them -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strike:
    """One fault: after a pause since the one before, of this kind, on this client, for so long; `amount` in [0, 1)."""

    pause: float
    kind: str
    client: int
    seconds: float
    amount: float


def strikes(seed: int, clients: int) -> Iterator[Strike]:
    """The faults that follow from the seed."""
    draw = random.Random(f"chaos {seed}")  # noqa: S311 - not a secret
    while True:
        pause = draw.expovariate(1 / APART_S)
        (kind,) = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))
        yield Strike(pause, kind, draw.randrange(clients), draw.uniform(0.5, LONGEST_S.get(kind, 8.0)), draw.random())


@dataclass
class Ground:
    """The processes, their links, and what is done to them."""

    server: Actor
    clients: Sequence[Actor]
    net: Links
    faults: Faults

    def start(self) -> None:
        for actor in (self.server, *self.clients):
            actor.start()

    def end(self) -> None:
        for actor in (*self.clients, self.server):
            actor.kill()

    async def do(self, one: Strike) -> None:
        """The fault from its beginning to its end; nothing if its target has one of the same sort."""
        faults = self.faults
        if one.kind in SERVER_FAULTS:
            if not faults.server:
                faults.server = True
                await self._do(one, self._of_process(one, self.server))
                faults.server = False
        elif one.kind in PROCESS_FAULTS:
            if one.client not in faults.processes:
                faults.processes.add(one.client)
                await self._do(one, self._of_process(one, self.clients[one.client]))
                faults.processes.discard(one.client)
        elif one.client not in faults.cut | faults.weak:
            of = faults.cut if one.kind in {"link_cut", "link_reset"} else faults.weak
            of.add(one.client)
            await self._do(one, self._of_link(one))
            of.discard(one.client)
        faults.changed()

    async def _do(self, one: Strike, what: Coroutine[None, None, None]) -> None:
        on = "" if one.kind in SERVER_FAULTS else f" {one.client}"
        print(f"{time.strftime('%X')} {one.kind}{on} for {one.seconds:.1f} s", file=sys.stderr)
        self.faults.counted[one.kind] += 1
        self.faults.changed()
        await what

    async def _of_process(self, one: Strike, actor: Actor) -> None:
        match one.kind.partition("_")[2]:
            case "kill":
                actor.kill()
                await asyncio.sleep(one.seconds)
                actor.start()
            case "restart":
                actor.signal(signal.SIGTERM)
                await asyncio.to_thread(actor.wait)
                actor.start()
            case "stop":
                actor.signal(signal.SIGSTOP)
                await asyncio.sleep(one.seconds)
                actor.signal(signal.SIGCONT)

    async def _of_link(self, one: Strike) -> None:
        name = self.clients[one.client].name
        match one.kind:
            case "link_cut" | "link_reset":
                self.net.cut(name, reset=one.kind == "link_reset")
                await asyncio.sleep(one.seconds)
                self.net.mend(name)
            case "link_delay":
                self.net.shape(name, Quality(delay_s=0.02 + 0.4 * one.amount))
                await asyncio.sleep(one.seconds)
                self.net.shape(name, Quality())
            case "link_loss":
                self.net.shape(name, Quality(loss=0.02 + 0.28 * one.amount))
                await asyncio.sleep(one.seconds)
                self.net.shape(name, Quality())

    async def strike(self, seed: int, until: float) -> None:
        """Faults one after another, several of them at a time, until that moment; then none is left."""
        async with asyncio.TaskGroup() as group:
            for one in strikes(seed, len(self.clients)):
                if time.monotonic() + one.pause >= until:
                    return
                await asyncio.sleep(one.pause)
                group.create_task(self.do(one))

    async def look_after(self) -> None:
        """Start again what ended without any fault, as a service manager would; and say so, for it should not."""
        while True:
            await asyncio.sleep(0.5)
            for number, actor in enumerate((*self.clients, self.server)):
                faulty = self.faults.server if actor is self.server else number in self.faults.processes
                if not faulty and (status := actor.ended()) is not None:
                    print(f"{actor.name} ended by itself with {status}: {actor.last_words()}", file=sys.stderr)
                    actor.start()


# The replay -----------------------------------------------------------------------------------------------------------

_workshops: dict[tuple[str, str], Workshop] = {}  # of this process, by run and client
_specs: dict[str, RunSpec] = {}


def trained(work: tuple[bytes, str, int, str, DataSettings, Flat]) -> tuple[Flat, int]:
    """One client's update of one round and its weight; in a process of its own."""
    text, run, round_, client, data, flat = work
    spec = _specs.setdefault(run, RunSpec.model_validate_json(text))
    if (run, client) not in _workshops:
        _workshops[run, client] = Workshop(client, open_source(data))
    layout = layout_of(spec)
    model = ModelVersion(round_ - 1, layout.nbytes, b"", layout.digest)
    task = Task(TaskKind.TRAIN, TaskKey(run, round_, 1), spec, model)
    update = _workshops[run, client].train(task, flat, lambda: False)
    assert update is not None
    return update.delta.copy(), update.weight


def replay(
    spec: RunSpec,
    run: str,
    records: Sequence[RoundRecord],
    data: Mapping[str, DataSettings],
    workers: ProcessPoolExecutor,
) -> Flat:
    """The model that these rounds make, computed anew."""
    models = [initial_parameters(spec).flat]
    for record in records:
        bases = {client: record.round - record.stale.get(client, 0) for client in record.folded}
        works = [(spec.canonical, run, base, client, data[client], models[base - 1]) for client, base in bases.items()]
        updates = dict(zip(bases, workers.map(trained, works), strict=True))
        total, weights = np.zeros(len(models[0]), np.int64), 0
        for client, (delta, examples) in updates.items():
            share = examples * (1 + record.stale.get(client, 0)) ** -spec.cohort.staleness * 2.0**30
            total += np.rint(delta.astype(np.float64) * share).astype(np.int64)
            weights += examples
        models.append((models[-1] + total / (weights * 2.0**30)).astype(np.float32))
    return models[-1]


# The whole ------------------------------------------------------------------------------------------------------------


async def connected(watch: Watch, clients: int) -> None:
    while True:
        with contextlib.suppress(ServerUnavailable):
            async with watch.operator() as operator:
                if sum(one.connected for one in await operator.clients()) >= clients:
                    return
        await asyncio.sleep(0.2)


async def one_run(watch: Watch, spec: RunSpec) -> str:
    """Submit a run and see it through to its end; its id."""
    while True:
        try:
            async with watch.operator() as operator:
                there = [one.run for one in await operator.runs() if one.spec == spec]  # an answer may have been lost
                run = there[0] if there else (await operator.submit(spec, None)).run
            break
        except ServerUnavailable:
            await asyncio.sleep(0.2)
    await watch.follow(run)
    return run


async def chaos(ground: Ground, watch: Watch, seed: int, seconds: float, late: str) -> bool:
    """Runs under faults for so long, then to their end; whether all of them finished."""
    clients = len(ground.clients)
    await connected(watch, clients)
    first = await one_run(watch, spec_for(seed, FIRST_ROUNDS, clients, late))
    pace = statistics.median(one.seconds for one in list(watch.records[first].values())[1:])
    print(f"an undisturbed round takes {pace:.2f} s", file=sys.stderr)
    watch.forget(first)
    until = time.monotonic() + seconds
    caring = asyncio.create_task(ground.look_after())
    striking = asyncio.create_task(ground.strike(seed, until))
    for number in itertools.count(1):
        left = until - time.monotonic()
        if left < APART_S:
            break
        spec = spec_for(seed + number, max(FIRST_ROUNDS, round(0.6 * left / pace)), clients, late)
        try:
            async with asyncio.timeout(left + LAST_S):
                await one_run(watch, spec)
        except TimeoutError:
            print(f"not finished {LAST_S:g} s after the last fault", file=sys.stderr)
    await striking
    caring.cancel()
    return all(view.phase == "finished" for view in watch.views.values())


async def equal(watch: Watch, data: Mapping[str, DataSettings], work: Path, workers: ProcessPoolExecutor) -> bool:
    """Whether each run's model is the one that its committed rounds make."""
    same = True
    for run, view in watch.views.items():
        async with watch.operator() as operator:
            await operator.export(run, work / "model.safetensors")
        found = checkpoint.load(work / "model.safetensors", layout_of(view.spec)).flat
        records = [record for _, record in sorted(watch.records[run].items())]
        wanted = await asyncio.to_thread(replay, view.spec, run, records, data, workers)
        same = same and [one.round for one in records] == list(range(1, view.spec.rounds + 1))
        same = same and found.tobytes() == wanted.tobytes()
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="of faults [3]")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and the runs [0]")
    parser.add_argument("--clients", type=int, default=8, help="[8]")
    parser.add_argument("--late", default="fold", choices=["drop", "fold"], help="updates that miss their round [fold]")
    parser.add_argument("--network", default="auto", help="auto, netem, tun or proxy; see benchmarks/link.py [auto]")
    parser.add_argument("--keep", type=Path, help="folder for the processes' logs and state")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    given = parser.parse_args()
    kind = settle(given.network)
    with contextlib.ExitStack() as stack:
        folder = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="seqfed-chaos-")))
        folder.mkdir(parents=True, exist_ok=True)
        net = stack.enter_context(links(kind, given.seed))
        result = measure(given, net, folder)
    tell(result, given.json)
    good = result["final_equal"] and not result["rounds_lost"] and not result["duplicate_updates"]
    raise SystemExit(0 if good else 1)


def measure(given: argparse.Namespace, net: Links, folder: Path) -> dict[str, Any]:
    """The figures, once the run has finished."""
    port = free_port()
    listen = ("--host", net.host, "--port", str(port), "--state", str(folder / "server"), *net.flags)
    clients, data = [], {}
    for number in range(given.clients):
        name = f"client-{number}"
        data[name] = data_of(folder, number)
        place = net.add(name, [port])
        flags = ("--server", place.addresses[0], "--name", name, "--state", str(folder / name), *net.flags)
        clients.append(Actor(name, folder, "client", *flags, "--data", *data[name].file, prefix=place.prefix))
    needed = spec_for(0, 1, given.clients, given.late).cohort.required
    ground = Ground(Actor("server", folder, "server", *listen), clients, net, Faults(needed, given.clients))
    watch = Watch(f"127.0.0.1:{port}")
    ground.start()
    try:
        finished = asyncio.run(chaos(ground, watch, given.seed, 60 * given.minutes, given.late))
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as workers:
            same = asyncio.run(equal(watch, data, folder, workers)) if finished else False
    finally:
        ground.end()
    stuck, since = max((ground.faults.stuck(*both), both[0]) for both in itertools.pairwise(watch.times))
    moment = time.strftime("%X", time.localtime(time.time() - time.monotonic() + since))
    late = sum(len(record.stale) for one in watch.records.values() for record in one.values())
    print(f"{late} updates were folded late", file=sys.stderr)
    print(f"longest stuck for {stuck:.1f} s, after {moment}", file=sys.stderr)
    return {
        "faults": dict(sorted(ground.faults.counted.items())),
        "rounds_committed": sum(map(len, watch.records.values())),
        "rounds_lost": len(watch.lost),
        "duplicate_updates": sum(duplicates(one.values()) for one in watch.records.values()),
        "stuck_s": round(stuck, 2),
        "final_equal": same,
        "machine": machine(),
        "seed": given.seed,
        "minutes": given.minutes,
        "network": net.kind,
    }


if __name__ == "__main__":
    main()
