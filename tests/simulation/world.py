"""One simulated federation from its first moment to the end of its last run, and what must be true of it all the time.

Real are the daemon and everything below it (round machine, coordinator, hub, intake, store, SQLite, lease, servicers), the
client's session and connection, and the messages; simulated are time, threads, processes, the network, and the training.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import random
import shutil
import sqlite3
import tempfile
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import Context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.simulation import oracle
from tests.simulation.ground import REAL_CONNECT, on_the_loop, patched, shared_memory, template
from tests.simulation.loop import Died, Loop, Process, current
from tests.simulation.network import Channel, Line, Network, Server
from tests.simulation.people import ADDRESSES, Operator, Violation, Workshop, require_reason
from tests.simulation.plan import ClientPlan, Fault, Plan, plan
from tests.simulation.sums import Sums

from seqfed.client.masking import Log, Masking, Trust
from seqfed.client.session import Session
from seqfed.common import metrics, statistics, views
from seqfed.common.errors import SeqfedError, StorageFull
from seqfed.common.masking.keys import Signer
from seqfed.common.masking.terms import Purpose
from seqfed.common.spec import RunSpec
from seqfed.server import daemon
from seqfed.server.coordinator import Coordinator
from seqfed.server.desk import Desk
from seqfed.server.round import NOT_TWICE
from seqfed.server.settings import ServerSettings
from seqfed.server.store import Store

PATIENCE_S: Final = 7200.0  # after the last fault, for all runs to end
LATE_S: Final = 600.0  # after the last other fault, for those that wait for a step of a masked sum
LOOK_S: Final = 2.0  # between two looks at every run


@dataclass
class Site:
    """A place where a server runs, again and again."""

    name: str
    starts: int = 0
    process: Process | None = None
    store: Store | None = None
    coordinator: Coordinator | None = None
    halt: asyncio.Event | None = None
    down_until: float = 0.0  # not started before
    full_until: float = 0.0  # its disk takes no commit
    dies_at: tuple[str, float] | None = None  # a point, and for how long it is down then


@dataclass
class Seat:
    """A client's place."""

    plan: ClientPlan
    line: Line
    starts: int = 0
    process: Process | None = None
    down_until: float = 0.0
    strikes: list[Fault] = field(default_factory=list)  # each at a step of its next masked sum


class World:
    """See the module. `run` raises Violation, or returns the digest of all that happened."""

    def __init__(self, seed: int, tell: Callable[[str], None] | None = None) -> None:
        self.plan: Plan = plan(seed)
        self.loop = Loop(self.random("threads"))
        self.loop.thread_s = self.plan.thread_s
        self.loop.set_exception_handler(self._unhandled)
        self.draw = self.random("world")
        self.network = Network(self.loop, self.random("network"), self.say)
        self.trace: list[str] = []
        self.sites = [Site(name) for name in ("AB" if self.plan.standby else "A")]
        self.seats = [Seat(one, Line(one.name, one.latency, one.rate)) for one in self.plan.clients]
        self.network.lines |= {seat.plan.name: seat.line for seat in self.seats}
        self.folder = Path()
        self.failure: BaseException | None = None
        self._tell = tell
        self.sums = Sums(self)
        self._signers = {one.name: Signer(self.random(f"key of {one.name}").randbytes(32)) for one in self.plan.clients}
        self._logs: list[Log] = []  # of dead clients too
        self._statistics: dict[str, bytes] = {}  # by run
        self._runs: dict[str, oracle.Replay] = {}
        self._specs: dict[str, RunSpec] = {}
        self._records: dict[tuple[str, int], views.RoundRecord] = {}
        self._ended: dict[str, str] = {}
        self._database: sqlite3.Connection | None = None
        self._failed: asyncio.Future[None] | None = None
        self._coordinators: list[Coordinator] = []  # dead ones too

    def random(self, purpose: str) -> random.Random:
        return random.Random(f"{self.plan.seed}/{purpose}")  # noqa: S311 - not a secret

    # the life of a world

    def run(self) -> str:
        """Everything; the digest of the trace."""
        self.folder = Path(tempfile.mkdtemp(prefix="seqfed-simulation-", dir=shared_memory()))
        try:
            with patched(self), self._listening():
                shutil.copyfile(template(), self.folder / "seqfed.db")
                self._database = sqlite3.connect(
                    f"file:{self.folder}/seqfed.db?mode=ro", uri=True, isolation_level=None
                )
                self.loop.run_until_complete(self._main())
        finally:
            self._bury()
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()

    def _bury(self) -> None:
        logging.disable(logging.CRITICAL)  # what is torn down complains
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if self._database is not None:
                    self._database.close()
                for site in self.sites:
                    if site.store is not None:
                        site.store.close(release=False)
                        site.store = site.coordinator = None
                self.loop.bury()
                for log in self._logs:
                    log.close()
                for coordinator in self._coordinators:
                    for run in self._runs:
                        coordinator.intake.forget(run)  # closes its files, as the end of its process would have
        finally:
            logging.disable(logging.NOTSET)
            shutil.rmtree(self.folder, ignore_errors=True)

    async def _main(self) -> None:
        self._failed = self.loop.create_future()
        operator = Operator(self)
        for site in self.sites:
            self.loop.create_task(self._keep_serving(site))
        for seat in self.seats:
            self.loop.create_task(self._keep_working(seat))
        for fault in self.plan.faults:
            self.loop.call_at(fault.at, self._strike, fault)
        self.loop.create_task(self._look_on())
        done = operator.process.start(operator.work())
        limit = self.loop.call_at(self.plan.heal + PATIENCE_S, self._late)
        await asyncio.wait((done, self._failed), return_when=asyncio.FIRST_COMPLETED)
        limit.cancel()
        if self._failed.done():
            assert self.failure is not None
            raise self.failure
        done.result()
        self._final()
        if not self.plan.faults:
            await asyncio.sleep(5)
            self._tidied()

    # what is seen

    def say(self, what: str) -> None:
        """Something happened."""
        if self.loop.over:
            return
        line = f"{self.loop.time():10.4f} {what}"
        self.trace.append(line)
        if self._tell is not None:
            self._tell(line)

    def fail(self, error: BaseException | str) -> None:
        """The world ends with this."""
        if self.failure is None and not self.loop.over:
            self.failure = error if isinstance(error, BaseException) else Violation(error)
            self.say(f"VIOLATION {self.failure!r}")
            if self._failed is not None and not self._failed.done():
                self._failed.set_result(None)

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """Whatever the block finds wrong ends the world."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - it is raised by `run`
            self.fail(error)

    def _unhandled(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.fail(Violation(f"unhandled: {context.get('message')}: {error!r}"))

    def _late(self) -> None:
        self.fail(f"stuck, {PATIENCE_S:g} s after the last fault: {self._stands()}\n{self.loop.dump()}")

    def _stands(self) -> str:
        return "; ".join(
            f"{view.name} {view.phase} round {view.round} of {view.rounds}: {view.reason}"
            for site in self.sites
            if site.coordinator is not None and site.process is not None and site.process.alive
            for view in Desk(site.coordinator).runs()
        )

    async def _look_on(self) -> None:
        """At every moment a run says why it stands where it stands, and what is committed stays."""
        while True:
            await asyncio.sleep(LOOK_S)
            with self.checking():
                for site in self.sites:
                    if site.coordinator is not None and site.process is not None and site.process.alive:
                        for view in Desk(site.coordinator).runs():
                            require_reason(view)

    def observe(self, run: str | None = None) -> None:
        """Compare what is committed with what was seen of it before, and new models with the oracle's."""
        with self.checking():
            assert self._database is not None
            for (name,) in self._database.execute("SELECT run FROM runs ORDER BY number").fetchall():
                if run in {None, name}:
                    self._observe(name)

    def _observe(self, run: str) -> None:
        assert self._database is not None
        query = self._database.execute
        if run not in self._runs:
            ((text,),) = query("SELECT spec FROM runs WHERE run = ?", (run,)).fetchall()
            self._specs[run] = RunSpec.model_validate_json(text)
            self._runs[run] = oracle.Replay(self._specs[run], {one.name: one.examples for one in self.plan.clients})
        replay, name = self._runs[run], self._specs[run].name
        models = {v: bytes(d) for v, d in query("SELECT version, digest FROM models WHERE run = ?", (run,)).fetchall()}
        texts = query("SELECT record FROM rounds WHERE run = ? ORDER BY round", (run,)).fetchall()
        records = [views.RoundRecord(**json.loads(text)) for (text,) in texts]
        if sorted(models) != list(range(len(models))) or [one.round for one in records] != sorted(models)[1:]:
            raise Violation(f"{name}: models {sorted(models)}, records {[one.round for one in records]}")
        if len(models) < len(replay.digests):
            raise Violation(f"{name}: {len(replay.digests) - 1} rounds were committed, {len(records)} are left")
        for record in records:
            known = self._records.setdefault((run, record.round), record)
            if (known.folded, known.stale, known.cohort) != (record.folded, record.stale, record.cohort):
                raise Violation(f"{name}: the record of round {record.round} was {known} and is {record}")
            if record.round == len(replay.digests):
                replay.add(record, self.sums.last(run, record.round, Purpose.TRAIN))
                stale = {client: age for client, age in record.stale.items() if age}
                self.say(f"{name} round {record.round} committed: {' '.join(record.folded)} {stale or ''}")
            if record.evaluation and replay.scores.setdefault(record.round, record.evaluation) is record.evaluation:
                self._require_scored(run, record)
        for version, found in models.items():
            if replay.digests[version] != found:
                raise Violation(
                    f"{name}: model {version} is {found.hex()[:12]}, not {replay.digests[version].hex()[:12]}"
                )

    def _require_scored(self, run: str, record: views.RoundRecord) -> None:
        """Masked scores are those of the plain sums."""
        if not self._specs[run].privacy.secure_aggregation:
            return
        scored = self.sums.last(run, record.round, Purpose.EVALUATE)
        if scored is None or metrics.summary(scored.tally) != record.evaluation:
            raise Violation(f"round {record.round} of run {run} was scored {record.evaluation}, its clients: {scored}")
        if (record.evaluated_clients, record.evaluated_examples) != (len(scored.given), scored.tally["examples"]):
            raise Violation(f"round {record.round} of run {run} has scores of {len(scored.given)} clients: {record}")

    def require_statistics(self, task: views.Task) -> None:
        """A run has one mean and scale from its first round on, and in a masked one they are those of the opened sum."""
        with self.checking():
            if bool(task.statistics) != (task.spec.data.normalise == "federated"):
                raise Violation(f"{task.spec.name}: the statistics are {task.statistics!r}")
            known = self._statistics.setdefault(task.key.run, task.statistics)
            opened = self.sums.last(task.key.run, 0, Purpose.MEASURE)
            if opened is not None:
                known = statistics.statistics_of(opened.tally, task.spec).model_dump_json().encode()
            if task.statistics != known:
                raise Violation(f"{task.spec.name}: the statistics are {task.statistics!r}, not {known!r}")

    def _final(self) -> None:
        self.observe()
        if self.failure is not None:
            raise self.failure
        assert self._database is not None
        for run, text in self._database.execute("SELECT run, state FROM runs").fetchall():
            state, replay, spec = json.loads(text), self._runs[run], self._specs[run]
            once = state["reason"].startswith("measuring: ") and NOT_TWICE in state["reason"]  # nothing can mend that
            if state["phase"] not in {"finished", "stopped", "failed" if once else ""} or not state["reason"]:
                raise Violation(f"{spec.name} ended {state['phase']}: {state['reason']}")
            if state["phase"] == "finished" and len(replay.models) != spec.rounds + 1:
                raise Violation(f"{spec.name} is finished after {len(replay.models) - 1} of {spec.rounds} rounds")
            newest = "SELECT file FROM models WHERE run = ? ORDER BY version DESC LIMIT 1"
            ((file,),) = self._database.execute(newest, (run,)).fetchall()
            last = replay.models[-1].tobytes()
            if (self.folder / "models" / run / file).read_bytes()[-len(last) :] != last:
                raise Violation(f"{spec.name}: the last model's file is another")
            self.say(f"{spec.name} {state['phase']} after {len(replay.models) - 1} rounds: {replay.digests[-1].hex()}")

    def _tidied(self) -> None:
        """Where nothing failed, nothing is left over."""
        left = [path.name for path in (self.folder / "updates").glob("*/*")]
        models = [len([*path.glob("*")]) for path in (self.folder / "models").glob("*")]
        if left or max(models) > 2:
            raise Violation(f"left over: updates {left}, models {models}")

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """An error with a traceback in the log is a surprise, and none is expected; with `tell`, every line is told."""
        handler = _Lines(self)
        logger = logging.getLogger("seqfed")
        before = logger.level, logger.propagate
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(logging.ERROR if self._tell is None else logging.DEBUG)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.level, logger.propagate = before

    # servers

    async def _keep_serving(self, site: Site) -> None:
        """A server that ends, however it does, is started again."""
        while True:
            await asyncio.sleep(max(0.0, site.down_until - self.loop.time()))
            site.starts += 1
            site.process = process = self.loop.process(f"{site.name}#{site.starts}")
            site.halt = asyncio.Event()
            self.say(f"{process.name} starts")
            work = process.start(self._serve(site))
            await asyncio.wait((work, process.gone), return_when=asyncio.FIRST_COMPLETED)
            if process.alive:
                error = work.exception()
                self.say(f"{process.name} ends: {type(error).__name__ if error is not None else 'stopped'}")
                if error is not None and not isinstance(error, SeqfedError):
                    self.fail(error)
            self._dead(site)
            site.down_until = max(site.down_until, self.loop.time() + 0.5)

    async def _serve(self, site: Site) -> None:
        host, _, port = ADDRESSES[site.name].rpartition(":")
        settings = ServerSettings(
            host=host,
            port=int(port),
            state=self.folder,
            standby=self.plan.standby,
            lease_s=self.plan.lease_s,
            **self.plan.settings,
        )
        assert site.halt is not None
        async with daemon.serving(settings):
            self.say(f"{current().name} serves")
            self.observe()
            await site.halt.wait()

    def _dead(self, site: Site) -> None:
        if site.process is not None and site.process.alive:
            site.process.kill()
        if site.process is not None:
            self.network.died(site.process)
        if site.store is not None:
            site.store.close(release=False)
        site.store = site.coordinator = None
        site.dies_at = None
        self.observe()

    def connect(self, *args: Any, **more: Any) -> Store:
        """In place of `seqfed.server.store.connect`: the world looks at every commit."""
        site = self._site()
        site.store = store = REAL_CONNECT(*args, **more)
        commit = store.commit

        def observed(run: str, *args: Any, **more: Any) -> None:
            if self.loop.time() < site.full_until:
                raise StorageFull("the disk is full")
            commit(run, *args, **more)
            if more.get("record") is not None:
                self.observe(run)

        store.commit = observed  # type: ignore[method-assign]
        return store

    def coordinate(self, store: Store, settings: ServerSettings) -> Coordinator:
        """In place of the daemon's Coordinator."""
        site = self._site()
        site.coordinator = Coordinator(store, settings)
        self._coordinators.append(site.coordinator)
        return site.coordinator

    def server(self, **_: Any) -> Server:
        """In place of grpc.aio.server."""
        return Server(self.network, self.fail)

    def reached(self, point: str) -> None:
        """The hook of `seqfed.server.points`."""
        site = self._site()
        if site.dies_at is None or site.dies_at[0] != point:
            return
        self.say(f"{site.name} is killed at {point}")
        site.down_until = self.loop.time() + site.dies_at[1]
        site.dies_at = None
        current().kill()
        if not on_the_loop():
            raise Died

    def _site(self) -> Site:
        return next(site for site in self.sites if site.process is current())

    # clients

    async def _keep_working(self, seat: Seat) -> None:
        seat.down_until = seat.plan.arrives
        while True:
            await asyncio.sleep(max(0.0, seat.down_until - self.loop.time()))
            seat.starts += 1
            seat.process = process = self.loop.process(f"{seat.plan.name}#{seat.starts}")
            self.say(f"{process.name} starts")
            work = process.start(self._take_part(seat))
            await asyncio.wait((work, process.gone), return_when=asyncio.FIRST_COMPLETED)
            if process.alive:
                self.fail(Violation(f"client {seat.plan.name} ended: {work.exception()!r}"))
                return
            self.network.died(process)

    async def _take_part(self, seat: Seat) -> None:
        instance = hashlib.sha256(seat.plan.name.encode()).hexdigest()[:32]
        workshop: Any = Workshop(self, seat.plan)
        addresses = [ADDRESSES[site.name] for site in self.sites]
        await Session(
            workshop,
            tuple(addresses),
            instance,
            False,
            dial=self.dial,
            rng=self.random(current().name),
            masking=self._masking(seat.plan.name),
        ).run()

    def _masking(self, name: str) -> Masking:
        """Of a client that has just been started; its log outlives it."""
        folder = self.folder / "clients" / name
        folder.mkdir(parents=True, exist_ok=True)
        log = Log(folder)
        self._logs.append(log)
        signer = self._signers[name]
        pinned = {one: known.public for one, known in self._signers.items()}
        return Masking(name, signer, Trust((name, signer), None, pinned), log)

    @contextlib.asynccontextmanager
    async def dial(self, address: str, insecure: bool) -> AsyncIterator[Any]:
        """In place of `seqfed.client.channel.connected`."""
        del insecure
        async with Channel(self.network, address) as channel:
            yield channel

    def training_s(self, spec: RunSpec, client: ClientPlan) -> float:
        """How long a training takes, drawn when it begins; while there are faults, now and then far too long."""
        usual = next(run.training_s for run in self.plan.runs if run.spec.name == spec.name)
        seconds = usual * client.pace * self.draw.uniform(0.6, 1.4)
        if self.loop.time() < self.plan.heal and self.plan.faults and self.draw.random() < 0.05:
            seconds *= 20
        return seconds

    # faults

    def stepped(self, step: str) -> None:
        """A client's message of this step of a masked sum is made, and goes out now."""
        seat = next(seat for seat in self.seats if seat.process is current())
        for fault in [one for one in seat.strikes if one.point == step]:
            seat.strikes.remove(fault)
            if self.draw.random() < 0.5:
                Context().run(self._strike, fault, True)  # nothing of it is the client's own doing
            else:  # a moment later: on its way there, or with the answer on its way back
                wait = self.draw.uniform(0, 4 * seat.line.latency)
                self.loop.call_later(wait, self._strike, fault, True, context=Context())
        if not current().alive and not on_the_loop():
            raise Died

    def _strike(self, fault: Fault, due: bool = False) -> None:
        """due: the moment for which it waits has come, if it waits for one."""
        seat = next((seat for seat in self.seats if seat.plan.name == fault.target), None)
        if seat is not None and fault.point and not due:
            seat.strikes.append(fault)
            return
        seconds = fault.seconds if due else min(fault.seconds, self.plan.heal - fault.at)
        if due and self.loop.time() > self.plan.heal + LATE_S:
            return
        self.say(f"FAULT {fault.kind} {fault.target} {seconds:.1f} s {fault.point}")
        site = next((site for site in self.sites if site.name == fault.target), None)
        process = seat.process if seat is not None else site.process if site is not None else None
        if process is None or not process.alive:
            return
        if fault.kind.startswith("hang"):
            if not process.stopped:
                process.stop()
                self.network.stopped(process, seconds)
                self.loop.call_later(seconds, self._thaw, process)
        elif seat is not None:
            self._strike_client(fault.kind, seat, seconds)
        elif site is not None:
            self._strike_server(fault, site, seconds)

    def _strike_server(self, fault: Fault, site: Site, seconds: float) -> None:
        until = self.loop.time() + seconds
        assert site.process is not None
        assert site.halt is not None
        match fault.kind:
            case "kill-server":
                site.down_until = until
                site.process.kill()
            case "kill-at-point":
                site.dies_at = fault.point, seconds
            case "stop-server":
                site.down_until = until
                site.halt.set()
            case "cut-server":
                for seat in self.seats:
                    self.network.part(seat.line, seconds)
            case "full-disk":
                site.full_until = until

    def _strike_client(self, kind: str, seat: Seat, seconds: float) -> None:
        assert seat.process is not None
        match kind:
            case "kill-client":
                seat.down_until = self.loop.time() + seconds
                seat.process.kill()
            case "part-client":
                self.network.part(seat.line, seconds)
            case "break-client":
                self.network.break_links(seat.line)
            case "slow-client":
                seat.line.rate = min(seat.line.rate, 20.0)
                self.loop.call_later(seconds, setattr, seat.line, "rate", seat.plan.rate)

    def _thaw(self, process: Process) -> None:
        if process.alive:
            self.say(f"{process.name} goes on")
            process.go_on()


class _Lines(logging.Handler):
    """Log lines into the trace; a traceback ends the world."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, SeqfedError):  # those that have a name are part of the plan
            self._world.fail(error)
        about = " ".join(
            f"{name} {value}" for name in ("run", "round", "client") if (value := getattr(record, name, ""))
        )
        tell = self._world._tell
        if tell is not None:
            tell(f"{self._world.loop.time():10.4f}     {record.name} {about}: {record.getMessage()}")
