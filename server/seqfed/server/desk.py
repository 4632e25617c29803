"""The operator's desk: runs are submitted, stopped, paused, resumed and shown here; the coordinator does the rest."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path

from seqfed.common import checkpoint, statistics, views, wire
from seqfed.common.checkpoint import ModelFile
from seqfed.common.errors import IllegalTransition, InvalidName, RunEnded, TooLarge, UnknownRun
from seqfed.common.homomorphic import scheme
from seqfed.common.layout import Layout
from seqfed.common.loop import whole
from seqfed.common.masking.agreed import grid_of
from seqfed.common.metrics import require_metric
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.spec import RunSpec
from seqfed.server import ledger
from seqfed.server import round as machine
from seqfed.server.audit import PAGE, Kind, Note
from seqfed.server.coordinator import ASKS, Coordinator
from seqfed.server.explain import explain
from seqfed.server.ledger import Booked
from seqfed.server.live import Live, Work
from seqfed.server.round import ACTIVE, ENDED, Run
from seqfed.server.store import UNSIGNED, KnownClient, Signed

log = logging.getLogger("seqfed.server")

# Clients named in one message to a watcher, each three times: 1.7 MB at 64 letters a name; gRPC stops at 4.
HISTORY_NAMES = 8_000
REVOCABLE = ("operator", "viewer")  # before a name that is not a client's


class Desk:
    """What operators say and ask of one coordinator."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    async def submit(self, spec: RunSpec, initial: Path | None, signed: Signed = UNSIGNED) -> views.RunView:
        """Queue a run, from its seed or from a safetensors checkpoint; wholly, also if the call is broken off meanwhile.

        Raises CheckpointError if that is another model, ConfigError for what the run's task, data or sums cannot have,
        Unauthenticated if the operator was revoked while the checkpoint came.
        """
        require_metric(spec)
        if spec.data.normalise == "federated":
            statistics.names(spec)  # refuses more columns than it can sum up
        if spec.privacy.secure_aggregation:
            grid_of(spec, spec.cohort.required)
        layout = layout_of(spec)
        if spec.privacy.homomorphic:
            scheme.check(spec, layout.size)
        if layout.nbytes > self._coordinator.settings.max_model_bytes:
            raise TooLarge(
                f"the run's model has {layout.nbytes:,} bytes, the server's limit (max_model_bytes) is "
                f"{self._coordinator.settings.max_model_bytes:,}"
            )
        return await whole(self._begin(spec, layout, initial, signed))

    async def _begin(self, spec: RunSpec, layout: Layout, initial: Path | None, signed: Signed) -> views.RunView:
        run = secrets.token_hex(8)
        state = Run() if spec.privacy.dp is None else Run(secret=secrets.token_hex(32))

        def require() -> None:
            if signed.operator:
                self._coordinator.signer(spec.canonical, signed.signature, signed.certificate)

        def prepare() -> tuple[ModelFile, tuple[views.LedgerEntry, ...]]:
            entries = ledger.opened(run, spec, self._coordinator.settings.max_epsilon)
            parameters = initial_parameters(spec) if initial is None else checkpoint.load(initial, layout)
            metadata = {"run": run, "round": "0", "spec": spec.canonical.decode(), "spec_digest": spec.digest}
            model = checkpoint.save(self._coordinator.store.model_path(run, 0), parameters, metadata)
            body = {"run": run, "name": spec.name, "spec": spec.digest, "operator": signed.operator}
            notes = [Note(Kind.SUBMITTED, body), *ledger.notes(entries)]
            self._coordinator.store.create(run, spec, model, signed, notes, require, entries, state)
            return model, entries

        model, entries = await asyncio.to_thread(prepare)
        own = {one.holder: one for one in entries}
        live = Live(run, spec, layout, state, model, 0, None, None, 0, 0, {}, signed=signed, ledger=own)
        self._coordinator.lives[run] = live
        live.log().info("submitted: '%s', %d parameters, %d rounds", spec.name, layout.size, spec.rounds)
        self._coordinator.schedule()
        return self.view(live)

    async def stop(self, run: str, by: str = "") -> views.RunView:
        """End a run; raises RunEnded if it has ended. `by`: who says so, for the audit log."""
        return await self._operate(run, machine.StopRequested(), by)

    async def pause(self, run: str, by: str = "") -> views.RunView:
        """Let a run rest; raises RunEnded if it has ended, IllegalTransition if it rests already."""
        return await self._operate(run, machine.PauseRequested(), by)

    async def resume(self, run: str, by: str = "") -> views.RunView:
        """Queue a paused run again; raises RunEnded if it has ended, IllegalTransition if it is not paused."""
        view = await self._operate(run, machine.ResumeRequested(), by)
        self._coordinator.schedule()
        return view

    async def _operate(self, run: str, event: machine.Event, by: str) -> views.RunView:
        live = self.find(run)
        if live.state.phase in ENDED:
            raise RunEnded(f"run {live.run} is over already: {live.state.reason}")
        try:
            await self._coordinator.ask(live, event, by=by)
        except IllegalTransition:
            what = (
                "only a paused run can be resumed" if isinstance(event, machine.ResumeRequested) else "it rests already"
            )
            raise IllegalTransition(f"run {live.run} is {live.state.phase.value}: {what}") from None
        return self.view(live)

    def find(self, run: str) -> Live:
        """The run with this id, this beginning of an id, or this name; raises UnknownRun."""
        if run in self._coordinator.lives:
            return self._coordinator.lives[run]
        found = [one for one in self._coordinator.lives.values() if one.run.startswith(run) or one.spec.name == run]
        if len(found) == 1 and run:
            return found[0]
        told = f"{len(found)} runs answer to '{run[:80]}'" if found and run else f"no run answers to '{run[:80]}'"
        raise UnknownRun(f"{told}; `seqfed runs` lists the ids")

    def runs(self) -> list[views.RunView]:
        """All runs, oldest first."""
        return [self.view(live) for live in self._coordinator.lives.values()]

    async def watch(self, run: str, after: int) -> AsyncIterator[views.RunView]:
        """A view at once and after every change, each with the finished rounds since the last; ends with the run."""
        live = self.find(run)
        while True:
            changed, state = live.changed, live.state
            ended = state.phase in ENDED
            last = state.round if ended else state.round - 1  # the round under way has no complete record yet
            history: list[views.RoundRecord] = []
            most = max(1, min(50, HISTORY_NAMES // max(1, len(self._coordinator.fits(live)[0]), len(state.cohort))))
            if last > after:
                history = await asyncio.to_thread(self._coordinator.store.history, live.run, after, last, most)
            more = len(history) == most
            yield replace(self.view(live, history), ended=ended and not more)
            after = history[-1].round if history else after
            if more:
                continue
            if ended or self._coordinator.closing:
                return
            await changed.wait()

    def view(self, live: Live, history: Iterable[views.RoundRecord] = ()) -> views.RunView:
        """The run as its operator sees it."""
        state = live.state
        turn_of = next((one.run for one in self._coordinator.lives.values() if one.state.phase in ACTIVE), None)
        end = live.ended if live.ended is not None else time.time()
        (fitting, misfits), tasks = self._coordinator.fits(live), self._tasks(live)
        left = None
        if live.deadline is not None and not live.deadline.cancelled() and state.phase in ASKS:
            left = max(0.0, live.deadline.when() - asyncio.get_running_loop().time())
        return views.RunView(
            run=live.run,
            name=live.spec.name,
            phase=state.phase.value,
            round=state.round,
            rounds=live.spec.rounds,
            attempt=state.attempt,
            cohort=state.cohort,
            pending=state.pending,
            reason=live.trouble or explain(live.spec, state, fitting, misfits, turn_of, tasks, left),
            history=tuple(history),
            bytes_up=live.bytes_up,
            bytes_down=live.bytes_down,
            seconds=end - live.started if live.started is not None else 0.0,
            spec=live.spec,
            ended=state.phase in ENDED,
            metrics=dict(state.newest),
            tasks=tasks,
            deadline_s=left,
        )

    def _tasks(self, live: Live) -> tuple[views.TaskView, ...]:
        """The clients at work for the run."""
        now = asyncio.get_running_loop().time()
        found = []
        for client, round_ in sorted(live.state.working):
            work = live.work.get(client) or Work(now, now)
            connected = self._coordinator.hub.get(client) is not None
            found.append(views.TaskView(client, round_, work.progress, max(0.0, now - work.heard), connected))
        return tuple(found)

    async def clients(self) -> list[views.ClientView]:
        """Every client that was ever here."""
        return [self._client(known) for known in await asyncio.to_thread(self._coordinator.store.clients)]

    def _client(self, known: KnownClient) -> views.ClientView:
        connection = self._coordinator.hub.get(known.client)
        task = connection.task if connection is not None else None
        since = connection.since if connection is not None else self._coordinator.seen.get(known.client, known.seen)
        return views.ClientView(
            client=known.client,
            connected=connection is not None,
            seconds=time.time() - since,
            task=f"{task.kind.value} in round {task.key.round} of {task.key.run}" if task is not None else "",
            schema=connection.schema if connection is not None else known.schema,
            software=connection.software if connection is not None else known.software,
            # One that is connected has shown a certificate that is good.
            revoked=connection is None and self._coordinator.access.revoked_at(known.client) is not None,
        )

    # Who belongs, and what was done -------------------------------------------------------------------------------

    async def revoke(self, client: str, reason: str, by: str) -> views.ClientView:
        """Make worthless what was issued to this client so far, and end what it has open; also one that was never here.

        client: a client's name; or operator:NAME, viewer:NAME. Raises InvalidName.
        """
        role, _, name = client.rpartition(":")
        if role not in ("", *REVOCABLE):
            raise InvalidName(
                f"{wire.clean(client, 80)!r}: write a client's name, or {' or '.join(REVOCABLE)}, a colon, a name"
            )
        wire.check_client_name(name)
        at = time.time()
        note = Note(Kind.REVOKED, {"client": client, "by": by, "reason": reason}, at)
        # Before it is saved: nothing is issued meanwhile that would outlive it.
        self._coordinator.access.revoke(client, at)
        await asyncio.to_thread(self._coordinator.store.revoke, client, at, reason, [note])
        if not role:
            self._coordinator.hub.dismiss(client)
            self._coordinator.cut_off(client)
        log.info("revoked what was issued to %s: %s", client, reason or "no reason given")
        known = {one.client: one for one in await asyncio.to_thread(self._coordinator.store.clients)}
        if client in known:
            return replace(self._client(known[client]), revoked=True)
        return views.ClientView(client, False, 0.0, "", None, "", revoked=True)

    async def privacy(self, run: str) -> views.PrivacyReport:
        """The account of differential privacy, of this run (see `find`) or of all; raises UnknownRun."""
        asked = [self.find(run)] if run else list(self._coordinator.lives.values())

        def look() -> views.PrivacyReport:
            entries = self._coordinator.store.ledger()
            every = {
                live.run: Booked(live.spec.name, live.spec, entries.get(live.run, {}))
                for live in self._coordinator.lives.values()
            }
            return ledger.report([every[live.run] for live in asked], list(every.values()) if run else None)

        return await asyncio.to_thread(look)

    def audit(self, after: int) -> list[views.AuditEntry]:
        """The next entries of the audit log, blocking."""
        return self._coordinator.store.audit(after, PAGE)
