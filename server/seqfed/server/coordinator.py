"""The coordinator: owns the clock, the store and the connections, and does what the round machine says.

One task takes events from one queue: the machine's step is committed to the store, then the caller is answered, then the
effects are performed. Everything here is that loop, the effects, and the questions that services ask.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from seqfed.common import checkpoint, views
from seqfed.common.checkpoint import PIECE_BYTES, ModelFile
from seqfed.common.errors import (
    DuplicateUpdate,
    NoModel,
    RunEnded,
    SeqfedError,
    StorageError,
    StorageFull,
    TooLarge,
    UnknownRun,
    WrongRound,
)
from seqfed.common.layout import Flat, Layout
from seqfed.common.metrics import add, names, require_metric
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.schema import DataSchema, misfit
from seqfed.common.spec import RunSpec
from seqfed.common.transfer import CHUNK_BYTES
from seqfed.server import fedavg
from seqfed.server import round as machine
from seqfed.server.explain import explain
from seqfed.server.hub import Connection, Hub
from seqfed.server.intake import Intake, check_tally
from seqfed.server.round import ACTIVE, ENDED, Phase, Run
from seqfed.server.settings import ServerSettings
from seqfed.server.store import KnownClient, Store, StoredRun, UpdateRow

log = logging.getLogger("seqfed.server")

STORE_AGAIN_S = 5.0  # before an event is tried again that the store could not take
# Clients named in one message to a watcher, each twice: 1 MB at 64 letters a name; gRPC stops at 4.
HISTORY_NAMES = 8_000


@dataclass(eq=False)
class Live:
    """A run in memory: the committed state and what can be made anew from the store."""

    run: str
    spec: RunSpec
    layout: Layout
    state: Run
    model: ModelFile
    version: int
    started: float | None  # seconds since the epoch
    ended: float | None
    bytes_up: int
    bytes_down: int
    updates: dict[str, UpdateRow]
    sum: fedavg.WeightedSum | None = None
    small: tuple[bytes, bytes] | None = None  # digest and vector of the current model, if it is one chunk
    record: views.RoundRecord | None = None  # the round that is committed and not yet closed
    mark: tuple[float, int, int] = (0.0, 0, 0)  # clock, bytes up, bytes down when the round began
    deadline: asyncio.TimerHandle | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # replaced at every change
    trouble: str = ""  # why the store does not take its next step, while it does not

    @cached_property
    def sums(self) -> frozenset[str]:
        """What the tally of an evaluation may have."""
        return frozenset(names(self.spec))

    def tell(self) -> None:
        """Wake everybody who watches this run."""
        self.changed.set()
        self.changed = asyncio.Event()


@dataclass(frozen=True)
class _Item:
    run: str
    event: machine.Event
    update: UpdateRow | None = None
    answer: asyncio.Future[None] | None = None


class Coordinator:
    """All runs of the daemon; one of them has its turn at a time."""

    def __init__(self, store: Store, settings: ServerSettings) -> None:
        self._store = store
        self._settings = settings
        self.hub = Hub(settings.max_clients, self._client_changed)
        self.intake = Intake(settings.uploads_in_flight, settings.upload_stall_s)
        self._runs: dict[str, Live] = {}
        self._items: deque[_Item] = deque()
        self._wake = asyncio.Event()
        self._closing = False
        self._waiting = False  # for a store that could not take an event
        self._tidying: set[asyncio.Future[None]] = set()
        self._seen: dict[str, float] = {}  # when a client that is away was last here, in seconds since the epoch

    # Life ---------------------------------------------------------------------------------------------------------

    async def take_up(self) -> None:
        """Take up what the store holds; before anybody can call, so that nobody who comes is overlooked."""
        for stored in await asyncio.to_thread(self._store.runs):
            live = self._runs[stored.run] = _revive(stored)
            if live.state.phase not in ENDED:
                lost = await asyncio.to_thread(self._store.lost, stored)
                again = f"; to be sent again: {', '.join(lost)}" if lost else ""
                log.info("run %s: taken up again at round %d%s", live.run, live.state.round, again)
                for client in lost:
                    del live.updates[client]
                self._post(live, machine.Restarted(lost))

    async def run(self) -> None:
        """Work until `close`."""
        self._schedule()
        while True:
            while self._items:
                await self._handle(self._runs[self._items[0].run])
                self._schedule()
            if self._closing:
                await asyncio.gather(*self._tidying)
                return
            self._wake.clear()
            await self._wake.wait()

    def close(self) -> None:
        """Stop after the events in hand; runs stay as they are and are taken up by the next daemon."""
        self._closing = True
        self.hub.close()
        self._wake.set()
        for live in self._runs.values():
            live.tell()

    def _post(self, live: Live, event: machine.Event) -> None:
        self._put(_Item(live.run, event))

    async def _ask(self, live: Live, event: machine.Event, update: UpdateRow | None = None) -> None:
        """Post an event and wait until it is committed; raises the machine's or the store's refusal."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._put(_Item(live.run, event, update, answer))
        await answer

    def _put(self, item: _Item) -> None:
        self._items.append(item)
        self._wake.set()

    # The loop -----------------------------------------------------------------------------------------------------

    async def _handle(self, live: Live) -> None:
        """Take the next event, and those behind it that can share its transaction: it costs more than a step.

        Events share one as long as they only fold, so no effect that others depend on is put off.
        """
        state, taken = live.state, list[_Item]()
        effects, refused = list[machine.Effect](), list[tuple[_Item, Exception]]()
        while self._items and self._items[0].run == live.run:
            item = self._items.popleft()
            try:
                state, more = machine.on(live.spec, state, item.event)
            except Exception as error:  # noqa: BLE001 - the caller gets it, or the log
                refused.append((item, error))
                continue
            taken.append(item)
            effects.extend(more)
            if any(not isinstance(one, machine.Fold) for one in more):
                break
        try:
            if taken:
                await self._commit(live, state, effects, [one.update for one in taken if one.update is not None])
        except Exception as error:  # noqa: BLE001 - the callers get it, or the log
            refused, taken, effects = [*refused, *((one, error) for one in taken)], [], []
        for item in taken:
            if item.answer is not None and not item.answer.done():
                item.answer.set_result(None)
        for item, refusal in refused:
            await self._refuse(live, item, refusal)
        try:
            await self._perform(live, effects)
        except Exception as error:  # whatever it is, it must end this run only, and say so
            log.exception("run %s: round %d", live.run, live.state.round)
            await self._break(live, str(error) if isinstance(error, SeqfedError) else "internal error; see the log")

    async def _refuse(self, live: Live, item: _Item, refusal: Exception) -> None:
        """Whoever asked is told; what nobody asked for is tried again if only the store is in the way."""
        what = type(item.event).__name__
        if item.answer is not None:
            if not item.answer.done():
                item.answer.set_exception(refusal)
        elif isinstance(refusal, (StorageError, StorageFull)):
            log.error("run %s: %s: %s; again in %g s", live.run, what, refusal, STORE_AGAIN_S)
            live.trouble = f"{refusal}; trying again every {STORE_AGAIN_S:g} s"
            live.tell()
            self._waiting = True
            asyncio.get_running_loop().call_later(STORE_AGAIN_S, self._again, item)
        elif isinstance(refusal, SeqfedError):
            log.debug("run %s: %s came to nothing: %s", live.run, what, refusal)
        else:
            log.error("run %s: %s", live.run, what, exc_info=refusal)
            await self._break(live, "internal error; see the log")

    def _again(self, item: _Item) -> None:
        self._waiting = False
        self._put(item)

    async def _follow(self, live: Live, event: machine.Event, model: ModelFile | None = None) -> None:
        """A step that an effect itself brought about, and its own effects."""
        state, effects = machine.on(live.spec, live.state, event)
        await self._commit(live, state, effects, [], model)
        await self._perform(live, effects)

    async def _commit(
        self,
        live: Live,
        state: Run,
        effects: Sequence[machine.Effect],
        updates: Sequence[UpdateRow],
        model: ModelFile | None = None,
    ) -> None:
        """Make the new state durable with what the events brought, then true; if that fails, nothing has changed."""
        before, now = live.state, (time.monotonic(), live.bytes_up, live.bytes_down)
        record = self._record(live, now, effects, model)
        columns: dict[str, float | int] = {}
        if before.phase is Phase.QUEUED and state.phase is not Phase.QUEUED:
            columns["started"] = time.time()
        if state.phase in ENDED:
            columns["ended"] = time.time()
        if record is not None or state.phase in ENDED:
            columns |= {"bytes_up": live.bytes_up, "bytes_down": live.bytes_down}
        if replace(state, present=before.present) != before:
            await asyncio.to_thread(
                self._store.commit, live.run, state, updates=updates, model=model, record=record, **columns
            )
        live.state, live.trouble = state, ""
        live.started = columns.get("started", live.started)
        live.ended = columns.get("ended", live.ended)
        live.updates |= {one.client: one for one in updates}
        if model is not None:
            live.model, live.version = model, before.round
            live.updates.clear()
        if record is not None:
            live.record = None if any(isinstance(one, machine.CloseRound) for one in effects) else record
        if state.round != before.round:
            live.mark = now  # where the last round's record ended, so that the rounds add up to the run
        live.tell()

    def _record(
        self, live: Live, now: tuple[float, int, int], effects: Iterable[machine.Effect], model: ModelFile | None
    ) -> views.RoundRecord | None:
        """The round's record, to be written with this step: made with its model, completed at its close."""
        clock, up, down = live.mark
        record = live.record
        if model is not None:
            before = live.state
            counted = [live.updates[name] for name in before.folded]
            record = views.RoundRecord(
                round=before.round,
                attempt=before.attempt,
                cohort=before.cohort,
                folded=before.folded,
                training=add(one.tally for one in counted),
                slowest_training_seconds=max(one.training_seconds for one in counted),
            )
        closed = next((one for one in effects if isinstance(one, machine.CloseRound)), None)
        if record is None or (model is None and closed is None):
            return None
        return replace(
            record,
            evaluation=closed.metrics if closed is not None else {},
            spread=closed.spread if closed is not None else {},
            evaluated_examples=closed.examples if closed is not None else 0,
            evaluated_clients=closed.clients if closed is not None else 0,
            bytes_up=now[1] - up,
            bytes_down=now[2] - down,
            seconds=now[0] - clock,
        )

    async def _perform(self, live: Live, effects: Iterable[machine.Effect]) -> None:
        """Do them: what others wait for first, then the arithmetic, then what needs its result."""
        for effect in effects:
            match effect:
                case machine.Ask(clients):
                    task = self._task(live, _ASKS[live.state.phase])
                    # An absent one's arrival, which may be on its way here already, asks it: not twice.
                    for client in (one for one in clients if one in live.state.present):
                        self.hub.push(client, self._with_model(live, client, task))
                case machine.Dismiss(clients):
                    for client in clients:
                        self.hub.push(client, self._task(live, views.TaskKind.CANCEL))
                        self.hub.done(client)
                case machine.StartDeadline(seconds):
                    self._start_deadline(live, seconds)
                case machine.CloseRound(round_):
                    self.intake.forget(live.run)
                    self._tidy(live, round_)
                case machine.EndRun():
                    self._ended(live)
        if live.state.phase in ENDED:
            return  # the sum is of no more use
        opened, names = _folds(effects)
        folds = [live.updates[name] for name in names]
        if opened:
            live.sum = fedavg.empty(live.layout.size, live.sum)
        if folds:
            await asyncio.to_thread(self._fold, live, folds)
        if any(isinstance(one, machine.CommitModel) for one in effects):
            await self._commit_model(live)

    def _tidy(self, live: Live, round_: int) -> None:
        """Remove what no restart needs, beside the work: nobody waits for it."""
        task = asyncio.ensure_future(asyncio.to_thread(self._store.tidy, live.run, live.version, round_))
        self._tidying.add(task)
        task.add_done_callback(self._tidying.discard)

    def _start_deadline(self, live: Live, seconds: float) -> None:
        if live.deadline is not None:
            live.deadline.cancel()
        event = machine.DeadlinePassed(live.state.round, live.state.attempt, live.state.phase)
        live.deadline = asyncio.get_running_loop().call_later(seconds, self._post, live, event)

    def _fold(self, live: Live, updates: Iterable[UpdateRow]) -> None:
        assert live.sum is not None
        for update in updates:
            path = self._store.update_path(live.run, update.round, update.client, update.digest)
            fedavg.fold(live.sum, _weight(live.spec, update), _numbers(path))

    async def _commit_model(self, live: Live) -> None:
        model = await asyncio.to_thread(self._write_model, live)
        await self._follow(live, machine.ModelCommitted(live.state.round), model)

    def _write_model(self, live: Live) -> ModelFile:
        assert live.sum is not None
        old = (np.frombuffer(piece, "<f4") for piece in live.model.pieces())
        metadata = {
            "run": live.run,
            "round": str(live.state.round),
            "spec": live.spec.canonical.decode(),
            "spec_digest": live.spec.digest,
        }
        return checkpoint.write(
            self._store.model_path(live.run, live.state.round), live.layout, fedavg.finish(live.sum, old), metadata
        )

    async def _break(self, live: Live, why: str) -> None:
        """End the run because it cannot go on; if even that cannot be committed, in memory only."""
        if live.state.phase in ENDED:
            return
        try:
            await self._follow(live, machine.Broken(why))
        except SeqfedError as error:
            log.error("run %s: its end could not be saved: %s", live.run, error)
            live.state = replace(live.state, phase=Phase.FAILED, reason=why)
            live.ended = time.time()
            self._ended(live)

    def _ended(self, live: Live) -> None:
        if live.deadline is not None:
            live.deadline.cancel()
        live.sum = None
        self.intake.forget(live.run)
        self._tidy(live, live.state.round)
        log.info("run %s: %s: %s", live.run, live.state.phase.value, live.state.reason)
        live.tell()

    def _schedule(self) -> None:
        """Give the turn to the oldest queued run that can begin, if nobody has it."""
        if any(live.state.phase in ACTIVE for live in self._runs.values()) or self._items or self._waiting:
            return
        for live in self._runs.values():
            if live.state.phase is Phase.QUEUED:
                fitting = self._fitting(live.spec)
                if len(fitting) >= live.spec.cohort.required:
                    self._post(live, machine.ClientsChanged(arrived=tuple(fitting)))
                    self._post(live, machine.Turn())
                    return

    def _client_changed(self, arrived: str | None, left: str | None) -> None:
        if self._closing:
            return  # nobody has left: it is the daemon that goes, and its runs stay as they are
        name = arrived or left or ""
        self._seen[name] = time.time()
        log.info("client %s: %s", name, "connected" if arrived else "disconnected")
        for live in self._runs.values():
            if live.state.phase not in ENDED:  # a queued one too: its turn may be on its way already
                if arrived is None:
                    self._post(live, machine.ClientsChanged(left=(name,)))
                elif name in self._fitting(live.spec):
                    self._post(live, machine.ClientsChanged(arrived=(name,)))
                live.tell()
        self._schedule()

    def _fitting(self, spec: RunSpec) -> list[str]:
        return [one.client for one in self.hub.connected() if misfit(spec.data, one.schema) is None]

    def _task(self, live: Live, kind: views.TaskKind) -> views.Task:
        key = views.TaskKey(live.run, live.state.round, live.state.attempt)
        version = views.ModelVersion(live.version, live.layout.nbytes, live.model.digest, live.layout.digest)
        return views.Task(kind, key, live.spec, version)

    def _with_model(self, live: Live, client: str, task: views.Task) -> views.Task:
        """The task with its model, where that is one chunk and new to the client: it spares each of them a call."""
        connection = self.hub.get(client)
        if connection is None or task.model.nbytes > CHUNK_BYTES or connection.holds == task.model.digest:
            return task
        if live.small is None or live.small[0] != task.model.digest:
            live.small = (task.model.digest, live.model.read(0, task.model.nbytes))
        connection.holds = task.model.digest
        live.bytes_down += task.model.nbytes
        return replace(task, model=replace(task.model, data=live.small[1]))

    # What clients say ---------------------------------------------------------------------------------------------

    async def join(self, client: str, instance: str, software: str, schema: DataSchema) -> Connection:
        """See `Hub.join`; what is known of the client is kept."""
        now = time.time()
        connection = self.hub.join(client, instance, software, schema, now)
        await asyncio.to_thread(self._store.remember, KnownClient(client, instance, software, schema, now))
        return connection

    def model_file(self, run: str, version: int) -> tuple[Live, ModelFile]:
        """The run's current model, if that is the version asked for."""
        live = self._live(run)
        if version != live.version:
            raise NoModel(f"model version {version} of run {run} is not served; the current one is {live.version}")
        return live, live.model

    def counted(self, client: str, key: views.TaskKey, digest: bytes) -> bool:
        """Whether exactly this update is counted already; raises WrongRound, RunEnded, DuplicateUpdate, UnknownRun."""
        live = self._live(key.run)
        state = live.state
        if state.phase in ENDED:
            raise RunEnded(f"run {key.run} is over: {state.reason}")
        known = live.updates.get(client) if client in state.folded else None  # left out of this attempt: send again
        if known is not None and known.round == key.round:
            if known.digest != digest:
                raise DuplicateUpdate(
                    f"client '{client}' has already sent another update for round {key.round}; the first one stands"
                )
            return True
        if live.record is not None and live.record.round == key.round and client in live.record.folded:
            return True
        if state.phase is not Phase.TRAINING or key.round != state.round or not 1 <= key.attempt <= state.attempt:
            raise WrongRound(
                f"an update for round {key.round}, attempt {key.attempt} came; run {key.run} is {state.phase.value} "
                f"in round {state.round}, attempt {state.attempt}"
            )
        if client not in state.cohort:
            raise WrongRound(f"client '{client}' was not asked in round {key.round}")
        return False

    async def submit_update(
        self, client: str, header: views.UpdateHeader, chunks: AsyncIterator[tuple[int, bytes]]
    ) -> bool:
        """Receive, check, keep and count one update; True if it had been counted already."""
        live = self._live(header.key.run)
        if self.counted(client, header.key, header.digest):
            return True

        def meter(size: int) -> None:
            live.bytes_up += size

        row = UpdateRow(
            client, header.key.round, header.weight, header.digest, dict(header.tally), header.training_seconds
        )
        path = self._store.update_path(live.run, header.key.round, client, header.digest)
        weight, cohort = _weight(live.spec, row), len(live.state.cohort)
        await self.intake.receive(client, header, live.layout, weight, cohort, path, chunks, meter)
        try:
            await self._ask(live, machine.UpdateArrived(header.key.round, client), row)
        except DuplicateUpdate:
            return self.counted(client, header.key, header.digest)
        self.hub.done(client)
        return False

    async def submit_evaluation(self, client: str, key: views.TaskKey, version: int, tally: dict[str, int]) -> bool:
        """Count one client's score of the current model; True if it had been counted already."""
        live = self._live(key.run)
        if live.state.phase is not Phase.EVALUATING or version != live.version:
            raise WrongRound(f"an evaluation of model {version} came; run {key.run} is {live.state.phase.value}")
        check_tally(tally, len(live.state.cohort), live.sums)
        event = machine.EvaluationArrived(key.round, client, tuple(sorted(tally.items())))
        try:
            await self._ask(live, event)
        except DuplicateUpdate:
            return True
        self.hub.done(client)
        return False

    async def report_failure(self, client: str, key: views.TaskKey, why: str) -> None:
        """Note that a client cannot do its task."""
        live = self._live(key.run)
        log.warning("run %s: round %d: client %s: %s", live.run, key.round, client, why)
        await self._ask(live, machine.TaskFailed(key.round, client, why))
        self.hub.done(client)

    # What operators say -------------------------------------------------------------------------------------------

    async def submit(self, spec: RunSpec, initial: Path | None) -> views.RunView:
        """Queue a run, from its seed or from a safetensors checkpoint.

        Raises CheckpointError if that is another model, ConfigError if the run's task lacks its convergence metric.
        """
        require_metric(spec)
        layout = layout_of(spec)
        if layout.nbytes > self._settings.max_model_bytes:
            raise TooLarge(
                f"the run's model has {layout.nbytes:,} bytes, the server's limit (max_model_bytes) is "
                f"{self._settings.max_model_bytes:,}"
            )
        run = secrets.token_hex(8)

        def prepare() -> ModelFile:
            parameters = initial_parameters(spec) if initial is None else checkpoint.load(initial, layout)
            metadata = {"run": run, "round": "0", "spec": spec.canonical.decode(), "spec_digest": spec.digest}
            model = checkpoint.save(self._store.model_path(run, 0), parameters, metadata)
            self._store.create(run, spec, model)
            return model

        model = await asyncio.to_thread(prepare)
        live = Live(run, spec, layout, Run(), model, 0, None, None, 0, 0, {})
        self._runs[run] = live
        log.info("run %s (%s): submitted, %d parameters, %d rounds", run, spec.name, layout.size, spec.rounds)
        self._schedule()
        return self.view(live)

    async def stop(self, run: str) -> views.RunView:
        """End a run; raises RunEnded if it has ended."""
        live = self.find(run)
        if live.state.phase in ENDED:
            raise RunEnded(f"run {live.run} is over already: {live.state.reason}")
        await self._ask(live, machine.StopRequested())
        return self.view(live)

    def find(self, run: str) -> Live:
        """The run with this id, this beginning of an id, or this name; raises UnknownRun."""
        if run in self._runs:
            return self._runs[run]
        found = [one for one in self._runs.values() if one.run.startswith(run) or one.spec.name == run]
        if len(found) == 1 and run:
            return found[0]
        told = f"{len(found)} runs answer to '{run[:80]}'" if found and run else f"no run answers to '{run[:80]}'"
        raise UnknownRun(f"{told}; `seqfed runs` lists the ids")

    def runs(self) -> list[views.RunView]:
        """All runs, oldest first."""
        return [self.view(live) for live in self._runs.values()]

    async def watch(self, run: str, after: int) -> AsyncIterator[views.RunView]:
        """A view at once and after every change, each with the finished rounds since the last; ends with the run."""
        live = self.find(run)
        while True:
            changed, state = live.changed, live.state
            ended = state.phase in ENDED
            last = state.round if ended else state.round - 1  # the round under way has no complete record yet
            history: list[views.RoundRecord] = []
            most = max(1, min(50, HISTORY_NAMES // max(1, len(self._fitting(live.spec)), len(state.cohort))))
            if last > after:
                history = await asyncio.to_thread(self._store.history, live.run, after, last, most)
            more = len(history) == most
            yield replace(self.view(live, history), ended=ended and not more)
            after = history[-1].round if history else after
            if more:
                continue
            if ended or self._closing:
                return
            await changed.wait()

    def view(self, live: Live, history: Iterable[views.RoundRecord] = ()) -> views.RunView:
        """The run as its operator sees it."""
        state = live.state
        misfits = {one.client: why for one in self.hub.connected() if (why := misfit(live.spec.data, one.schema))}
        turn_of = next((one.run for one in self._runs.values() if one.state.phase in ACTIVE), None)
        end = live.ended if live.ended is not None else time.time()
        return views.RunView(
            run=live.run,
            name=live.spec.name,
            phase=state.phase.value,
            round=state.round,
            rounds=live.spec.rounds,
            attempt=state.attempt,
            cohort=state.cohort,
            pending=state.pending,
            reason=live.trouble or explain(live.spec, state, self._fitting(live.spec), misfits, turn_of),
            history=tuple(history),
            bytes_up=live.bytes_up,
            bytes_down=live.bytes_down,
            seconds=end - live.started if live.started is not None else 0.0,
            spec=live.spec,
            ended=state.phase in ENDED,
            metrics=dict(state.newest),
        )

    async def clients(self) -> list[views.ClientView]:
        """Every client that was ever here."""
        now = time.time()
        found = []
        for known in await asyncio.to_thread(self._store.clients):
            connection = self.hub.get(known.client)
            task = connection.task if connection is not None else None
            found.append(
                views.ClientView(
                    client=known.client,
                    connected=connection is not None,
                    seconds=now
                    - (connection.since if connection is not None else self._seen.get(known.client, known.seen)),
                    task=f"{task.kind.value} in round {task.key.round} of {task.key.run}" if task is not None else "",
                    schema=connection.schema if connection is not None else known.schema,
                    software=connection.software if connection is not None else known.software,
                )
            )
        return found

    def _live(self, run: str) -> Live:
        try:
            return self._runs[run]
        except KeyError:
            raise UnknownRun(f"no run has the id '{run[:80]}'") from None


_ASKS: Mapping[Phase, views.TaskKind] = {
    Phase.TRAINING: views.TaskKind.TRAIN,
    Phase.EVALUATING: views.TaskKind.EVALUATE,
}


def _folds(effects: Iterable[machine.Effect]) -> tuple[bool, list[str]]:
    """Whether a sum is to be opened, and what to fold into it: what came before the opening belongs to the old sum."""
    opened, names = False, list[str]()
    for one in effects:
        if isinstance(one, machine.OpenSum):
            opened, names = True, []
        elif isinstance(one, machine.Fold):
            names.append(one.client)
    return opened, names


def _weight(spec: RunSpec, update: UpdateRow) -> int:
    return update.weight if spec.aggregation.weighting == "examples" else 1


def _numbers(path: Path) -> Iterator[Flat]:
    """A complete update's numbers from its file, in parts."""
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            yield np.frombuffer(piece, "<f4")


def _revive(stored: StoredRun) -> Live:
    return Live(
        stored.run,
        stored.spec,
        stored.model.layout,
        stored.state,
        stored.model,
        stored.version,
        stored.started,
        stored.ended,
        stored.bytes_up,
        stored.bytes_down,
        {one.client: one for one in stored.updates},
        record=stored.record,
        mark=(time.monotonic(), stored.bytes_up, stored.bytes_down),
    )
