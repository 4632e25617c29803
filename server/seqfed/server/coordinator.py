"""The coordinator: owns the clock, the store and the connections, and does what the round machine says.

One task takes events from one queue: the machine's step is committed to the store, then the caller is answered, then the
effects are performed. Everything here is that loop, the effects, and the questions that services ask.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from seqfed.common import checkpoint, identity, logs, signing, statistics, views
from seqfed.common.checkpoint import ModelFile
from seqfed.common.compression import Key
from seqfed.common.compression.chosen import download
from seqfed.common.errors import (
    ConfigError,
    DuplicateUpdate,
    LayoutMismatch,
    LeaseLost,
    NoModel,
    Overloaded,
    PolicyRefused,
    RunEnded,
    SchemaMismatch,
    SeqfedError,
    StorageError,
    StorageFull,
    Unauthenticated,
    UnknownRun,
    VersionMismatch,
    WrongRound,
)
from seqfed.common.identity import Identity, load_credentials
from seqfed.common.masking.messages import Advert
from seqfed.common.masking.trust import bound
from seqfed.common.metrics import TRAINED, add
from seqfed.common.schema import DataSchema, misfit
from seqfed.common.transfer import CHUNK_BYTES
from seqfed.common.wire_masking import Reply, Request
from seqfed.server import fedavg, learnt, ledger, making, points, steps
from seqfed.server import round as machine
from seqfed.server.access import Access
from seqfed.server.audit import Audit, Kind, Note
from seqfed.server.hub import Connection, Hub
from seqfed.server.intake import Intake, Patience, check_tally
from seqfed.server.live import Live, Work, revive
from seqfed.server.payloads import announced
from seqfed.server.round import ACTIVE, ENDED, FORGIVEN, Phase, Run
from seqfed.server.settings import ServerSettings
from seqfed.server.store import KnownClient, Store, UpdateRow
from seqfed.server.sums import Sums, of_task

log = logging.getLogger("seqfed.server")

COMMIT_TRIES = 24  # of a model that is made already, before its run pauses: a database may be away for a while
STORE_AGAIN_S = 5.0  # before an event is tried again that the store could not take
LATELY_S = 86_400.0  # who was here since then may be among those who come back all at once
SPREAD = 1.5  # of the time that it takes to admit all clients: at full rate some would be refused by mere chance
SCANS = 6  # looks for silent clients in the time after which one is silent


@dataclass(frozen=True)
class _Item:
    run: str
    event: machine.Event
    update: UpdateRow | None = None
    answer: asyncio.Future[None] | None = None
    by: str = ""  # who asks for it, for the audit log


@dataclass
class _Batch:
    """Steps that share a transaction, and the events that the machine refused meanwhile."""

    state: Run
    taken: list[_Item] = field(default_factory=list)
    updates: list[UpdateRow] = field(default_factory=list)
    effects: list[machine.Effect] = field(default_factory=list)
    refused: list[tuple[_Item, Exception]] = field(default_factory=list)

    @property
    def by(self) -> str:
        """The operator who has asked for a step of it, if one has."""
        return next((one.by for one in self.taken if one.by), "")

    def committed(self) -> None:
        if self.updates:
            points.reached("update-committed")
        if any(isinstance(one.event, machine.EvaluationArrived) for one in self.taken):
            points.reached("evaluation-committed")


class Coordinator:
    """All runs of the daemon; one of them has its turn at a time."""

    def __init__(self, store: Store, settings: ServerSettings) -> None:
        self.store = store
        self.settings = settings
        self.hub = Hub(settings.max_clients, self._client_changed)
        patience = Patience(settings.upload_stall_s, settings.upload_bytes_per_s)
        self.intake = Intake(
            settings.uploads_in_flight, settings.uploads_waiting, patience, settings.uploads_per_client
        )
        self.sums = Sums(
            self.hub,
            self.intake,
            store,
            self._trust,
            hear=self._hear,
            post=self._post,
            ask=self.ask,
            spread=lambda: self.spread_s,
        )
        self.audit = Audit(store.note, store.audit_head, settings.refusals_per_minute)
        self.access = Access(
            secure=settings.tls is not None,
            per_s=settings.calls_per_s,
            burst=settings.calls_burst,
            open_calls=settings.calls_open,
            max_metadata=settings.max_metadata_bytes,
            refused=self.audit.refused,
        )
        self._ca: bytes | None = None  # the federation's, once it was needed
        self.lives: dict[str, Live] = {}
        self._items: deque[_Item] = deque()
        self._put_off: dict[str, list[_Item]] = {}  # by run: events for a store that could not take the first of them
        self._wake = asyncio.Event()
        self.closing = False
        self._tidying: set[asyncio.Future[None]] = set()
        self.seen: dict[str, float] = {}  # when a client that is away was last here, in seconds since the epoch
        self._known: set[str] = set()  # every client that was here lately
        self._remembering: asyncio.Future[None] | None = None
        self._new: dict[str, KnownClient] = {}  # what the store is yet to be told of them
        self._joins = 0.0  # how full the allowance of joins is used, and when that was reckoned
        self._joins_at = 0.0
        self.lost: asyncio.Future[LeaseLost] = asyncio.get_running_loop().create_future()  # when it may write no more

    # Life ---------------------------------------------------------------------------------------------------------

    async def take_up(self) -> None:
        """Take up what the store holds; before anybody can call, so that nobody who comes is overlooked."""
        lately = time.time() - LATELY_S
        self._known = {one.client for one in await asyncio.to_thread(self.store.clients) if one.seen > lately}
        self.access.remember(await asyncio.to_thread(self.store.revoked))
        for stored in await asyncio.to_thread(self.store.runs):
            live = self.lives[stored.run] = revive(stored)
            if live.state.phase not in ENDED:
                lost = await asyncio.to_thread(self.store.lost, stored)
                again = f"; to be sent again: {', '.join(lost)}" if lost else ""
                live.log().info("taken up again, %s%s", live.state.phase.value, again)
                for client in lost:
                    del live.updates[client]
                now = asyncio.get_running_loop().time()
                live.began = now
                # They may take as long to come back as they are spread.
                live.work = {client: Work(now, now + self.spread_s) for client, _ in live.state.working}
                self._scan_later(live)
                self._post(live, machine.Restarted(lost))

    async def run(self) -> None:
        """Work until `close`."""
        self.audit.start()
        self.schedule()
        while True:
            while self._items:
                await self._handle(self.lives[self._items[0].run])
                self.schedule()
            if self.closing:
                await self.tidied()
                await self.audit.close()
                return
            self._wake.clear()
            await self._wake.wait()

    async def tidied(self) -> None:
        """Wait for what is done beside the work."""
        await asyncio.gather(*self._tidying)

    def close(self) -> None:
        """Stop after the events in hand; runs stay as they are and are taken up by the next daemon."""
        self.closing = True
        self.hub.close()
        self._wake.set()
        for live in self.lives.values():
            live.tell()
            _cancel(live.deadline, live.scan)

    async def settle(self) -> None:
        """Make durable what has moved since each run's last step; when all is said."""
        moved = {live.run: live.counted for live in self.lives.values() if live.state.phase not in ENDED}
        if not moved or self.lost.done():
            return
        try:
            await asyncio.to_thread(self.store.count, moved)
        except SeqfedError as error:
            log.warning("the bytes that have moved since the last step could not be counted: %s", error)

    def _post(self, live: Live, event: machine.Event) -> None:
        self._put(_Item(live.run, event))

    async def ask(self, live: Live, event: machine.Event, update: UpdateRow | None = None, by: str = "") -> None:
        """Post an event and wait until it is committed; raises the machine's or the store's refusal."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._put(_Item(live.run, event, update, answer, by))
        await answer

    def _put(self, item: _Item) -> None:
        """Queue an event; behind one that waits for the store, where order is kept, and nobody is made to wait."""
        put_off = self._put_off.get(item.run)
        if put_off is None:
            self._items.append(item)
            self._wake.set()
        elif item.answer is None:
            put_off.append(item)
        elif not item.answer.done():
            item.answer.set_exception(StorageError(self.lives[item.run].trouble))

    # The loop -----------------------------------------------------------------------------------------------------

    async def _handle(self, live: Live) -> None:
        """Take the next event, and those behind it that can share its transaction: it costs more than a step."""
        batch = self._take(live)
        effects = batch.effects
        try:
            if batch.taken:
                await self._commit(live, batch.state, effects, batch.updates, by=batch.by)
                batch.committed()
        except Exception as error:  # noqa: BLE001 - the callers get it, or the log
            batch.refused += [(one, error) for one in batch.taken]
            batch.taken, effects = [], []
        for item in batch.taken:
            if item.answer is not None and not item.answer.done():
                item.answer.set_result(None)
        for item, refusal in batch.refused:
            await self._refuse(live, item, refusal)
        try:
            await self._perform(live, effects)
        except LeaseLost as error:
            self._lose(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must stop this run only, and say so
            live.log().error("%s", live.state.phase.value, exc_info=error)
            await self._break(live, error)

    def _take(self, live: Live) -> _Batch:
        """Step the machine over the next events that only fold, so that no effect that others depend on is put off."""
        batch = _Batch(live.state)
        while self._items and self._items[0].run == live.run:
            item = self._items.popleft()
            into = batch.state.sum_round
            try:
                batch.state, more = machine.on(live.spec, batch.state, item.event)
            except Exception as error:  # noqa: BLE001 - the caller gets it, or the log
                batch.refused.append((item, error))
                continue
            batch.taken.append(item)
            batch.effects.extend(more)
            if item.update is not None:
                batch.updates.append(replace(item.update, round=into))
            if any(not isinstance(one, machine.Fold) for one in more):
                break
        return batch

    async def _refuse(self, live: Live, item: _Item, refusal: Exception) -> None:
        """Whoever asked is told; what nobody asked for is tried again if only the store is in the way."""
        what = type(item.event).__name__
        if isinstance(refusal, LeaseLost):
            self._lose(refusal)
        elif item.update is not None:
            known = live.updates.get(item.update.client)
            if known is None or known.digest != item.update.digest:
                # Here, where every refusal is heard of: who asked may be gone. And before it is told, or it might send again.
                one = item.update
                path = self.store.update_path(live.run, one.base, one.client, one.digest)
                await asyncio.to_thread(path.unlink, missing_ok=True)
        if item.answer is not None:
            if not item.answer.done():
                item.answer.set_exception(refusal)
        elif isinstance(refusal, LeaseLost):
            return
        elif isinstance(refusal, (StorageError, StorageFull)):
            live.log().error("%s: %s; again in %g s", what, refusal, STORE_AGAIN_S)
            live.trouble = f"{refusal}; trying again every {STORE_AGAIN_S:g} s"
            live.tell()
            self._put_off_until_later(item)
        elif isinstance(refusal, SeqfedError):
            live.log().debug("%s came to nothing: %s", what, refusal)
        else:
            live.log().error("%s", what, exc_info=refusal)
            await self._break(live, refusal)

    def _lose(self, error: LeaseLost) -> None:
        """Another daemon has the store: take no further step."""
        if not self.lost.done():
            log.error("%s", error)
            self.lost.set_result(error)
        self._items.clear()
        self.close()

    def _put_off_until_later(self, item: _Item) -> None:
        """Keep this event, and those of its run that come after it, for a while."""
        if item.run not in self._put_off:
            self._put_off[item.run] = []
            asyncio.get_running_loop().call_later(STORE_AGAIN_S, self._again, item.run)
        self._put_off[item.run].append(item)
        behind = [one for one in self._items if one.run == item.run]
        self._items = deque(one for one in self._items if one.run != item.run)
        for one in behind:
            self._put(one)

    def _again(self, run: str) -> None:
        self._items.extendleft(reversed(self._put_off.pop(run)))
        self._wake.set()

    async def _follow(self, live: Live, event: machine.Event, model: ModelFile | None = None) -> None:
        """A step that an effect itself brought about, and its own effects."""
        state, effects = machine.on(live.spec, live.state, event)
        for left in reversed(range(COMMIT_TRIES if model is not None else 1)):
            try:
                await self._commit(live, state, effects, [], model)
                break
            except StorageError as error:
                if not left or self.closing:
                    raise
                live.log().error("%s; again in %g s", error, STORE_AGAIN_S)
                live.trouble = f"{error}; trying again every {STORE_AGAIN_S:g} s"
                live.tell()
                await asyncio.sleep(STORE_AGAIN_S)
        await self._perform(live, effects)

    async def _commit(
        self,
        live: Live,
        state: Run,
        effects: Sequence[machine.Effect],
        updates: Sequence[UpdateRow],
        model: ModelFile | None = None,
        by: str = "",
    ) -> None:
        """Make the new state durable with what the events brought, then true; if that fails, nothing has changed."""
        before, now, moved = live.state, asyncio.get_running_loop().time(), live.counted
        closed = _closed(effects)
        record = self._record(live, now, moved.traffic, closed, model)
        columns: dict[str, float] = {}
        if live.started is None and state.phase in ACTIVE:
            columns["started"] = time.time()
        if state.phase in ENDED:
            columns["ended"] = time.time()
        if replace(state, present=before.present) != before:
            notes = _notes(live, state, effects, model, record, by)
            entries = await self._booked(live, state, updates, made=model is not None)

            def commit() -> None:
                more = [*notes, *ledger.notes(entries)]
                self.store.commit(
                    live.run,
                    state,
                    updates=updates,
                    model=model,
                    record=record,
                    notes=more,
                    ledger=entries,
                    moved=moved if closed is None else replace(moved, traffic={}),
                    **columns,
                )

            await asyncio.to_thread(commit)
            live.ledger |= {one.holder: one for one in entries}
        live.state, live.trouble = state, ""
        live.started = columns.get("started", live.started)
        live.ended = columns.get("ended", live.ended)
        if model is not None:
            points.reached("model-committed")
            live.older[live.version] = live.model
            live.steps = () if live.next_step is None else steps.kept((*live.steps, live.next_step), live.layout)
            live.model, live.version = model, before.round
            self._tidy(live, [one for one in live.updates.values() if one.round <= before.round])
            live.updates = {name: one for name, one in live.updates.items() if one.round > before.round}
        live.updates |= {one.client: one for one in updates}
        for client, _ in {*before.working} - {*state.working}:
            live.work.pop(client, None)
        if record is not None:
            live.record = None if closed is not None else record
        if closed is not None:
            live.recorded(moved.traffic)  # what has moved meanwhile is the next round's, so that they add up to the run
            points.reached("round-closed")
        if state.phase in ENDED:
            live.bytes_up, live.bytes_down = moved.up, moved.down  # as they are stored: no round has any more
        if state.round != before.round:
            live.began = now
        live.tell()

    async def _booked(
        self, live: Live, state: Run, updates: Sequence[UpdateRow], *, made: bool
    ) -> tuple[views.LedgerEntry, ...]:
        """What this step adds to the ledger: a round's model is a release, a sum that was opened and made none, and where clients
        put the noise on, an update.
        """
        spec, before = live.spec, live.state
        if spec.privacy.dp is None:
            return ()
        if spec.privacy.dp.mode not in ledger.BY_UPDATE or spec.privacy.secure_aggregation:
            clients = before.folded if made or state.opened > before.opened else None
        elif made:
            asked = {*before.cohort} - {name for name, _ in before.declined}
            return await asyncio.to_thread(ledger.sent, spec, live.ledger, before.round, asked)
        else:
            clients = tuple(one.client for one in updates) or None
        if clients is None:
            return ()
        return await asyncio.to_thread(ledger.after, spec, live.ledger, before.round, clients)

    def _record(
        self,
        live: Live,
        now: float,
        traffic: Mapping[str, tuple[int, int]],
        closed: machine.CloseRound | None,
        model: ModelFile | None,
    ) -> views.RoundRecord | None:
        """The round's record, to be written with this step: made with its model, completed at its close."""
        record = live.record
        if model is not None:
            before = live.state
            stale = {name: before.round - base for name, base in before.late}
            tallies, slowest = _trained(live, stale)
            record = views.RoundRecord(
                round=before.round,
                attempt=before.attempt,
                cohort=before.cohort,
                folded=(*before.folded, *stale),
                stale=stale,
                training=tallies,
                slowest_training_seconds=slowest,
            )
        if record is None or (model is None and closed is None):
            return None
        return replace(
            record,
            evaluation=closed.metrics if closed is not None else {},
            spread=closed.spread if closed is not None else {},
            evaluated_examples=closed.examples if closed is not None else 0,
            evaluated_clients=closed.clients if closed is not None else 0,
            bytes_up=sum(up for up, _ in traffic.values()),
            bytes_down=sum(down for _, down in traffic.values()),
            traffic=dict(sorted(traffic.items())),
            seconds=now - live.began,
        )

    async def _perform(self, live: Live, effects: Iterable[machine.Effect]) -> None:
        """Do them: what others wait for first, then the arithmetic, then what needs its result."""
        asks = live.state.phase is Phase.TRAINING and any(isinstance(one, machine.Ask) for one in effects)
        if asks and live.spec.privacy.dp is not None:
            why = await self._unaffordable(live)
            if why is not None:
                await self._follow(live, machine.BudgetSpent(why))
                return
        for effect in effects:
            self._effect(live, effect)
        if live.state.phase not in ACTIVE:
            return  # the sum is of no more use
        opened, names = _folds(effects)
        folds = [live.updates[name] for name in names]
        if opened and not live.spec.privacy.secure_aggregation:
            live.sum, live.within = fedavg.empty(live.layout.size, live.sum), 0
        if folds:
            await asyncio.to_thread(self._fold, live, folds)
            points.reached("folded")
        if any(isinstance(one, machine.CommitModel) for one in effects):
            await self._commit_model(live)

    async def _unaffordable(self, live: Live) -> str | None:
        """Why the round that is about to begin would spend too much, if it would."""
        limit, state = self.settings.max_epsilon, live.state
        why = await asyncio.to_thread(ledger.allows, live.spec, live.ledger, state.round)
        if why is not None or limit is None:
            return why
        own, *others = (
            ledger.Booked(one.spec.name, one.spec, one.ledger)
            for one in (live, *(other for other in self.lives.values() if other is not live))
        )
        return await asyncio.to_thread(ledger.affords, limit, own, others, state.round, state.cohort)

    def _effect(self, live: Live, effect: machine.Effect) -> None:
        """Do one that takes no time."""
        match effect:
            case machine.Ask(clients):
                points.reached("asked")
                self._push(live, clients)
            case machine.Dismiss(working):
                for client, round_ in working:
                    self.hub.push(client, self._task(live, views.TaskKind.CANCEL, round_))
                    self.hub.done(client)
            case machine.StartDeadline(seconds):
                self._start_deadline(live, seconds)
            case machine.Hasten(seconds):
                loop = asyncio.get_running_loop()
                if live.deadline is None or live.deadline.when() > loop.time() + seconds:
                    self._start_deadline(live, seconds)
            case machine.Mask(clients):
                self.sums.begin(live, clients)
            case machine.LeaveOut(client, why):
                if live.masked is not None:
                    live.masked.leave(client, why)
            case machine.CloseRound():
                self.intake.forget(live.run, {client for client, _ in live.state.owing})
                self._tidy(live)
            case machine.Suspend() | machine.EndRun():
                self._rest(live)

    def _push(self, live: Live, clients: Iterable[str]) -> None:
        """Ask those of them that are here; an absent one's arrival, which may be on its way already, asks it: not twice."""
        task = self._task(live, ASKS[live.state.phase])
        if task.masking is not None:
            self.sums.prepare(live, task)
        now = asyncio.get_running_loop().time()
        for client in clients:
            work = live.work.setdefault(client, Work(now, now))
            if work.asked_again < FORGIVEN:  # who comes back again and again is at work only if it says so
                work.heard = max(work.heard, now)  # after a restart it has longer
            work.asked_again += 1
            if client in live.state.present:
                self.hub.push(client, self._with_model(live, client, task))
        if live.scan is None:
            self._scan_later(live)

    def _scan_later(self, live: Live) -> None:
        live.scan = asyncio.get_running_loop().call_later(live.spec.cohort.silence_s / SCANS, self._scan, live)

    def _scan(self, live: Live) -> None:
        """Look for clients at work of which nothing has been heard for too long."""
        live.scan = None
        if live.state.phase not in ACTIVE:
            return
        oldest = asyncio.get_running_loop().time() - live.spec.cohort.silence_s
        for client, _ in live.state.working:
            work = live.work.setdefault(client, Work(oldest, oldest))
            if work.heard <= oldest and client not in live.state.silent:
                live.log(client).warning("nothing heard of its work for %g s", live.spec.cohort.silence_s)
                self._post(live, machine.Silence(client))
        live.tell()
        self._scan_later(live)

    def _hear(self, live: Live, client: str, progress: views.Progress | None = None) -> None:
        """A sign that this client's work for the run goes on."""
        work = live.work.get(client)
        if work is None:
            return
        work.heard = asyncio.get_running_loop().time()
        if progress is not None:
            work.progress = progress
            live.tell_soon(self.settings.progress_s)
        if client in live.state.silent:
            self._post(live, machine.Silence(client, over=True))

    def _tidy(self, live: Live, consumed: Iterable[UpdateRow] = ()) -> None:
        """Remove what no restart needs, beside the work: nobody waits for it. Models that somebody works from stay."""
        oldest = min((base for _, base in live.state.working), default=live.version + 1) - 1
        live.older = {version: model for version, model in live.older.items() if version >= oldest}
        version = min((live.version, *(one + 1 for one in live.older)))
        paths = [self.store.update_path(live.run, one.base, one.client, one.digest) for one in consumed]
        oldest_step = live.steps[0].version if live.steps else live.version + 1
        task = asyncio.ensure_future(asyncio.to_thread(self.store.tidy, live.run, version, paths, oldest_step))
        self._tidying.add(task)
        task.add_done_callback(self._tidying.discard)

    def _start_deadline(self, live: Live, seconds: float) -> None:
        _cancel(live.deadline)
        event = machine.DeadlinePassed(live.state.round, live.state.attempt, live.state.phase)
        live.deadline = asyncio.get_running_loop().call_later(seconds, self._post, live, event)

    def _fold(self, live: Live, updates: Iterable[UpdateRow]) -> None:
        place = self.store.update_path
        making.fold(live, [(one, place(live.run, one.base, one.client, one.digest)) for one in updates])

    async def _commit_model(self, live: Live) -> None:
        model, live.next_step = await asyncio.to_thread(self._write_model, live)
        points.reached("model-written")
        await self._follow(live, machine.ModelCommitted(live.state.round, live.next_clip), model)

    def _write_model(self, live: Live) -> tuple[ModelFile, steps.Step | None]:
        metadata = {
            "run": live.run,
            "round": str(live.state.round),
            "spec": live.effective.canonical.decode(),
            "spec_digest": live.effective.digest,
        }
        path = self.store.model_path(live.run, live.state.round)
        if live.masked is not None:
            learnt.keep(path, live.masked.known)
        codec = download(live.spec, live.layout.size)
        if codec is None:
            return checkpoint.write(path, live.layout, making.parts(live), metadata), None
        key = Key(live.spec.seed, live.run, live.state.round)
        return steps.write(path, live.model, making.parts(live), codec, key, metadata)

    async def _break(self, live: Live, error: Exception) -> None:
        """End the run because it cannot go on, or pause it if it may later; if even that cannot be committed, in memory only."""
        if live.state.phase in ENDED or self.closing:  # the next daemon takes it up as it stands
            return
        why = str(error) if isinstance(error, SeqfedError) else "internal error; see the log"
        broken = machine.Broken(why, passing=isinstance(error, (StorageError, StorageFull)))
        try:
            await self._follow(live, broken)
        except LeaseLost as lost:
            self._lose(lost)
        except SeqfedError as again:
            live.log().error("that it cannot go on could not be saved: %s", again)
            live.state, _ = machine.on(live.spec, live.state, broken)
            self._rest(live)

    def _rest(self, live: Live) -> None:
        """The run has no turn any more, for a while or for ever."""
        _cancel(live.deadline, live.scan)
        if live.masked is not None:
            live.masked.close()
        live.deadline = live.scan = live.sum = live.masked = None
        live.work.clear()
        self.intake.forget(live.run)
        consumed: list[UpdateRow] = []
        if live.state.phase in ENDED:
            live.ended = live.ended or time.time()
            consumed = list(live.updates.values())
        self._tidy(live, consumed)
        live.log().info("%s: %s", live.state.phase.value, live.state.reason)
        live.tell()

    def schedule(self) -> None:
        """Give the turn to the oldest queued run that can begin, if nobody has it."""
        if any(live.state.phase in ACTIVE for live in self.lives.values()) or self._items or self._put_off:
            return
        for live in self.lives.values():
            if live.state.phase is Phase.QUEUED:
                fitting, _ = self.fits(live)
                if len(fitting) >= live.spec.cohort.required:
                    self._post(live, machine.ClientsChanged(arrived=tuple(fitting)))
                    self._post(live, machine.Turn())
                    return

    def _client_changed(self, arrived: str | None, left: str | None) -> None:
        if self.closing:
            return  # nobody has left: it is the daemon that goes, and its runs stay as they are
        name = arrived or left or ""
        self.seen[name] = time.time()
        logs.about(log, client=name).info("connected" if arrived else "disconnected")
        connection = self.hub.get(name)
        key = connection.working if connection is not None else None
        for live in self.lives.values():
            if live.state.phase not in ENDED:  # a queued one too: its turn may be on its way already
                if arrived is None or connection is None:
                    self._post(live, machine.ClientsChanged(left=(name,)))
                    if live.masked is not None:
                        live.masked.away(name)
                elif misfit(live.spec.data, connection.schema) is None:
                    working = ((name, key.round),) if key is not None and key.run == live.run else ()
                    if working:
                        self._hear(live, name)
                    self._post(live, machine.ClientsChanged(arrived=(name,), working=working))
                live.tell()
        self.schedule()

    def fits(self, live: Live) -> tuple[list[str], dict[str, str]]:
        """The connected clients whose data suit the run, by name; and of the others why they do not."""
        changes, fitting, misfits = live.fits
        if changes != self.hub.changes:  # asked at every change of a run, where connections seldom do
            told = {one.client: misfit(live.spec.data, one.schema) for one in self.hub.connected()}
            misfits = {client: why for client, why in told.items() if why is not None}
            fitting = [client for client in told if client not in misfits]
            live.fits = (self.hub.changes, fitting, misfits)
        return fitting, misfits

    def _task(self, live: Live, kind: views.TaskKind, round_: int | None = None) -> views.Task:
        key = views.TaskKey(live.run, live.state.round if round_ is None else round_, live.state.attempt)
        version = views.ModelVersion(live.version, live.layout.nbytes, live.model.digest, live.layout.digest)
        if kind not in {views.TaskKind.CANCEL, views.TaskKind.MEASURE}:
            version = replace(version, steps=tuple(one.view() for one in live.steps))
        masking = None
        if live.spec.privacy.secure_aggregation and kind is not views.TaskKind.CANCEL:
            known = learnt.read(live.model.path) if kind is views.TaskKind.TRAIN else b""
            masking = views.MaskingTerms(live.state.number, len(live.state.cohort), known)
        return views.Task(
            kind, key, live.spec, version, live.signed.signature, live.signed.certificate, masking, live.statistics
        )

    def _with_model(self, live: Live, client: str, task: views.Task) -> views.Task:
        """The task with its model, or the steps to it, where they are one chunk and new to the client: it spares a call."""
        connection = self.hub.get(client)
        if connection is None or task.kind is views.TaskKind.MEASURE or connection.holds == task.model.digest:
            return task
        place = next((at for at, one in enumerate(live.steps) if one.base == connection.holds), len(live.steps))
        missed = live.steps[place:]
        if missed and sum(one.nbytes for one in missed) <= CHUNK_BYTES:
            connection.holds = task.model.digest
            with_data = tuple(one.view(whole=at >= place) for at, one in enumerate(live.steps))
            return replace(task, model=replace(task.model, steps=with_data))
        if missed or task.model.nbytes > CHUNK_BYTES:
            return task
        if live.small is None or live.small[0] != task.model.digest:
            live.small = (task.model.digest, live.model.read(0, task.model.nbytes))
        connection.holds = task.model.digest
        return replace(task, model=replace(task.model, data=live.small[1]))

    def moved(self, run: str, client: str, up: int = 0, down: int = 0) -> None:
        """Note bytes of messages about this run, if it is one that goes on."""
        live = self.lives.get(run)
        if live is not None and live.state.phase not in ENDED:
            live.moved(client, up, down)

    # What clients say ---------------------------------------------------------------------------------------------

    async def join(
        self, client: str, instance: str, software: str, schema: DataSchema, working: views.TaskKey | None = None
    ) -> Connection:
        """See `Hub.join`; what is known of the client is kept. Raises Overloaded if too many come at once."""
        self._admit()
        now = time.time()
        connection = self.hub.join(client, instance, software, schema, now, working)
        self._known.add(client)
        self._new[client] = KnownClient(client, instance, software, schema, now)
        if self._remembering is None or self._remembering.done():  # those who come while it writes are written together
            self._remembering = asyncio.ensure_future(self._remember())
            self._tidying.add(self._remembering)
            self._remembering.add_done_callback(self._tidying.discard)
        return connection

    async def _remember(self) -> None:
        while self._new:
            clients = list(self._new.values())
            try:
                await asyncio.to_thread(self.store.remember, *clients)
            except LeaseLost as error:
                self._lose(error)
            except SeqfedError as error:
                log.warning("who has joined could not be noted: %s", error)
            for one in clients:
                if self._new.get(one.client) is one:
                    del self._new[one.client]

    def _admit(self) -> None:
        """Raise Overloaded unless joins_per_s, over a second or so, has room for one more."""
        rate, now = self.settings.joins_per_s, asyncio.get_running_loop().time()
        self._joins = max(0.0, self._joins - (now - self._joins_at) * rate)
        self._joins_at = now
        if self._joins >= max(1.0, rate):
            raise Overloaded(f"more than {rate:g} clients a second (joins_per_s) are connecting; try again soon")
        self._joins += 1

    @property
    def spread_s(self) -> float:
        """Over how many seconds the clients are to spread when all of them come back at once."""
        return SPREAD * len(self._known) / self.settings.joins_per_s

    def model_file(self, client: str, run: str, version: int) -> tuple[ModelFile, Callable[[int], None]]:
        """A model that this client may still need, and what must hear of the bytes sent of it."""
        live = self._live(run)
        self._require_asked(live, client)
        model = live.model if version == live.version else live.older.get(version)
        if model is None:
            raise NoModel(f"model version {version} of run {run} is not served; the current one is {live.version}")
        return model, self._down(live, client)

    def step(self, client: str, run: str, version: int) -> tuple[steps.Step, Callable[[int], None]]:
        """The payload that leads to this version, and what must hear of the bytes sent of it."""
        live = self._live(run)
        self._require_asked(live, client)
        for one in live.steps:
            if one.version == version:
                return one, self._down(live, client)
        raise NoModel(f"the difference to model version {version} of run {run} is not served (any more)")

    def digest_of(self, run: str, version: int) -> bytes:
        """Of the model of this version, if it is the current one."""
        live = self._live(run)
        return live.model.digest if version == live.version else b""

    @staticmethod
    def _require_asked(live: Live, client: str) -> None:
        if client not in live.state.cohort and all(name != client for name, _ in live.state.working):
            raise WrongRound(
                f"client '{client}' is not asked for anything by run {live.run}, so it gets no model of it"
            )

    def _down(self, live: Live, client: str) -> Callable[[int], None]:
        def meter(_: int) -> None:
            self._hear(live, client)

        return meter

    def counted(self, client: str, key: views.TaskKey, digest: bytes) -> bool:
        """Whether exactly this update is counted already; raises WrongRound, RunEnded, DuplicateUpdate, UnknownRun."""
        live = self._live(key.run)
        state = live.state
        if state.phase in ENDED:
            raise RunEnded(f"run {key.run} is over: {state.reason}")
        if live.spec.privacy.secure_aggregation:
            sum_ = of_task(live, key)
            return not sum_.expects(client, sum_.terms.number, digest)
        attempts = state.attempt if key.round == state.round else key.attempt
        if state.wants(client, key.round) and 1 <= key.attempt <= attempts:
            return False
        known = live.updates.get(client)
        here = (client, key.round) in state.late or (client in state.folded and key.round == state.round)
        if here and known is not None and known.base == key.round:
            if known.digest != digest:
                raise DuplicateUpdate(
                    f"client '{client}' has already sent another update for round {key.round}; the first one stands"
                )
            return True
        record = live.record
        if record is not None and client in record.folded and key.round == record.round - record.stale.get(client, 0):
            return True
        if key.round == state.round and client not in state.cohort:
            raise WrongRound(f"client '{client}' was not asked in round {key.round}")
        raise WrongRound(
            f"an update of client '{client}' for round {key.round}, attempt {key.attempt} came, and it is not asked for one; "
            f"run {key.run} is {state.phase.value} in round {state.round}, attempt {state.attempt}"
        )

    async def has_counted(self, client: str, key: views.TaskKey, digest: bytes) -> bool:
        """The same, and True if the client's update counted in a round that is over: one whose codec feeds back has to know."""
        try:
            return self.counted(client, key, digest)
        except WrongRound:
            live = self._live(key.run)
            if not live.spec.compression.feeds_back or not 0 < key.round <= live.state.round:
                raise
            rounds = live.spec.cohort.max_staleness + 1
            last = min(live.state.round, key.round + rounds - 1)
            records = await asyncio.to_thread(self.store.history, key.run, key.round - 1, last, rounds)
            if any(client in one.folded and one.round - one.stale.get(client, 0) == key.round for one in records):
                return True
            raise

    def progress(self, client: str, key: views.TaskKey, progress: views.Progress) -> None:
        """Note how far a client's task is; raises WrongRound, RunEnded or UnknownRun if nobody waits for it."""
        live = self._live(key.run)
        if live.state.phase in ENDED:
            raise RunEnded(f"run {key.run} is over: {live.state.reason}")
        answered = client in (*live.state.folded, *live.state.evaluated) and key.round == live.state.round
        if (client, key.round) not in live.state.working and not answered:  # its answer may have overtaken this
            raise WrongRound(f"client '{client}' is not asked for anything in round {key.round}")
        self._hear(live, client, progress)

    async def submit_update(
        self, client: str, header: views.UpdateHeader, chunks: AsyncIterator[tuple[int, bytes]]
    ) -> bool:
        """Receive, check, keep and count one update; True if it had been counted already."""
        live, base = self._live(header.key.run), header.key.round
        if live.spec.privacy.secure_aggregation:
            return await self.sums.receive(live, client, header, chunks)
        if self.counted(client, header.key, header.digest):
            return True

        def meter(_: int) -> None:
            self._hear(live, client, views.Progress(views.Stage.SENDING))

        packing = announced(live.spec, live.layout, live.run, base, client, header.codec)
        row = UpdateRow(client, base, base, header.weight, header.digest, dict(header.tally), header.training_seconds)
        path = self.store.update_path(live.run, base, client, header.digest)
        weight, cohort = live.weight(row.weight), max(1, len(live.state.cohort) + len(live.state.owing))
        rule = live.spec.aggregation
        await self.intake.receive(
            client, header, live.layout, weight, cohort, path, chunks, meter, rule, packing=packing
        )
        points.reached("update-placed")
        work = live.work.get(client)
        seconds = asyncio.get_running_loop().time() - work.asked if work is not None else None
        try:
            await self.ask(live, machine.UpdateArrived(base, client, seconds), row)
        except DuplicateUpdate:
            return self.counted(client, header.key, header.digest)
        self.hub.done(client)
        return False

    async def mask(
        self, client: str, key: views.TaskKey, number: int, message: Request
    ) -> tuple[Reply, tuple[str, ...]]:
        """See `Sums.take`; raises UnknownRun and RunEnded, too."""
        live = self._live(key.run)
        if live.state.phase in ENDED:
            raise RunEnded(f"run {key.run} is over: {live.state.reason}")
        return await self.sums.take(live, client, key, number, message)

    async def submit_evaluation(self, client: str, key: views.TaskKey, version: int, tally: dict[str, int]) -> bool:
        """Count one client's score of the current model; True if it had been counted already."""
        live = self._live(key.run)
        measuring = live.state.phase is Phase.MEASURING
        if not (measuring or live.state.phase is Phase.EVALUATING) or version != live.version:
            raise WrongRound(f"the sums of model {version} came; run {key.run} is {live.state.phase.value}")
        if live.spec.privacy.secure_aggregation:
            raise WrongRound(f"run {key.run} takes sums only masked")
        check_tally(tally, len(live.state.cohort), statistics.names(live.spec) if measuring else live.sums)
        event = machine.EvaluationArrived(key.round, client, tuple(sorted(tally.items())))
        try:
            await self.ask(live, event)
        except DuplicateUpdate:
            return True
        self.hub.done(client)
        return False

    async def report_failure(self, client: str, key: views.TaskKey, why: str) -> None:
        """Note that a client cannot do its task; `why` begins with the name of its error."""
        live = self._live(key.run)
        error = why.partition(":")[0]
        await self.ask(live, machine.TaskFailed(key.round, client, why, lasting=error in LASTING))
        live.log(client).warning("%s", why)  # only of those who were asked: others could fill the log
        if error == PolicyRefused.__name__:  # the data holder's word is part of the federation's history
            self.audit.refused(f"client:{client}", f"round {key.round} of run {live.run}", error)
        self.hub.done(client)

    def cut_off(self, client: str) -> None:
        """Wait for nothing more from a client that was revoked; what it has sent before stays."""
        for live in self.lives.values():
            for name, round_ in live.state.working:
                if name == client:
                    self._post(live, machine.TaskFailed(round_, client, "Unauthenticated: it was revoked"))

    def signer(self, data: bytes, signature: bytes, certificate: bytes) -> Identity:
        """Who has signed these data, with a certificate of this federation that is good now.

        Raises NotAllowed or Unauthenticated.
        """
        found = signing.verify(certificate, self._authority(), data, signature, identity.now())
        if self.access.is_revoked(found):
            raise Unauthenticated(f"the certificate of {found}, which signed this, was revoked")
        return found

    def _trust(self, advert: Advert) -> None:
        """Raise unless the client's certificate, where there are any, stands for the keys that it advertises."""
        if self.settings.tls is None:
            return  # the clients have nobody else's word, either
        found = bound(advert, self._authority(), identity.now())
        if self.access.is_revoked(found):
            raise Unauthenticated(f"the certificate of {found} was revoked")

    def _authority(self) -> bytes:
        """The federation's CA, PEM."""
        if self._ca is None:
            assert self.settings.tls is not None  # in plaintext nobody asks
            self._ca = load_credentials(self.settings.tls).ca
        return self._ca

    def _live(self, run: str) -> Live:
        try:
            return self.lives[run]
        except KeyError:
            raise UnknownRun(f"no run has the id '{run[:80]}'") from None


# What a client says of the run and not of this task: asked again, it would say the same.
LASTING = frozenset(
    one.__name__ for one in (PolicyRefused, SchemaMismatch, LayoutMismatch, ConfigError, VersionMismatch)
)

ASKS: Mapping[Phase, views.TaskKind] = {
    Phase.MEASURING: views.TaskKind.MEASURE,
    Phase.TRAINING: views.TaskKind.TRAIN,
    Phase.EVALUATING: views.TaskKind.EVALUATE,
}


def _trained(live: Live, stale: Iterable[str]) -> tuple[dict[str, int], float]:
    """The summed tally of the round's trainings, and the seconds of the slowest; nothing where all that is told is private."""
    dp = live.spec.privacy.dp
    if dp is not None and not dp.is_public:
        return {}, 0.0
    if live.spec.privacy.secure_aggregation:
        assert live.masked is not None
        tally = {name: value for name, value in live.masked.tally.items() if name in TRAINED}
        return tally, live.masked.seconds
    counted = [live.updates[name] for name in (*live.state.folded, *stale)]
    return add(one.tally for one in counted), max(one.training_seconds for one in counted)


def _notes(
    live: Live,
    state: Run,
    effects: Iterable[machine.Effect],
    model: ModelFile | None,
    record: views.RoundRecord | None,
    by: str,
) -> list[Note]:
    """What the audit log is to say of a step from the live state to this one."""
    before, notes = live.state, list[Note]()

    def note(kind: Kind, **body: object) -> None:
        notes.append(Note(kind, {"run": live.run, **body}))

    if model is not None and record is not None:
        note(Kind.COMMITTED, round=record.round, model=model.digest.hex(), folded=record.folded)
    if state.phase is Phase.TRAINING and _asked(state) != _asked(before):
        clients = [name for one in effects if isinstance(one, machine.Ask) for name in one.clients]
        note(Kind.COHORT, round=state.round, attempt=state.attempt, clients=clients)
    if state.phase is before.phase:
        return notes
    if state.phase is Phase.PAUSED:
        note(Kind.PAUSED, by=by, reason=state.reason)
    elif before.phase is Phase.PAUSED and state.phase is Phase.QUEUED:
        note(Kind.RESUMED, by=by)
    elif state.phase is Phase.STOPPED:
        note(Kind.STOPPED, by=by)
    elif state.phase in ENDED:
        note(Kind.ENDED, phase=state.phase.value, reason=state.reason)
    return notes


def _closed(effects: Iterable[machine.Effect]) -> machine.CloseRound | None:
    return next((one for one in effects if isinstance(one, machine.CloseRound)), None)


def _asked(state: Run) -> tuple[int, int, tuple[str, ...]]:
    return state.round, state.attempt, state.cohort


def _folds(effects: Iterable[machine.Effect]) -> tuple[bool, list[str]]:
    """Whether a sum is to be opened, and what to fold into it: what came before the opening belongs to the old sum."""
    opened, names = False, list[str]()
    for one in effects:
        if isinstance(one, machine.OpenSum):
            opened, names = True, []
        elif isinstance(one, machine.Fold):
            names.append(one.client)
    return opened, names


def _cancel(*timers: asyncio.TimerHandle | None) -> None:
    for timer in timers:
        if timer is not None:
            timer.cancel()
