"""A run in the daemon's memory: its committed state, and what can be made anew from the store."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from seqfed.common import logs, statistics, views
from seqfed.common.checkpoint import ModelFile
from seqfed.common.layout import Layout
from seqfed.common.metrics import names
from seqfed.common.spec import RunSpec
from seqfed.server import fedavg, steps
from seqfed.server.masked import MaskedSum
from seqfed.server.round import Run
from seqfed.server.steps import Step
from seqfed.server.store import UNSIGNED, Moved, Signed, StoredRun, UpdateRow

log = logging.getLogger("seqfed.server")


@dataclass
class Work:
    """A client's task under way: clock readings of when it was asked and last heard of, and what it then said."""

    asked: float
    heard: float
    progress: views.Progress | None = None
    asked_again: int = 0


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
    updates: dict[str, UpdateRow]  # that are in the sum or go into the next, by client
    older: dict[int, ModelFile] = field(default_factory=dict)  # versions from which somebody still works
    sum: fedavg.WeightedSum | None = None
    ledger: dict[str, views.LedgerEntry] = field(default_factory=dict)  # of its privacy, by holder; the committed one
    within: int = 0  # updates in the sum that were not scaled down
    next_clip: float = 0.0  # where it adapts
    masked: MaskedSum | None = None  # under secure aggregation: of this phase, or of the one before
    steps: tuple[Step, ...] = ()  # to the current model, where downloads are differences
    next_step: Step | None = None  # with the model that is being committed
    small: tuple[bytes, bytes] | None = None  # digest and vector of the current model, if it is one chunk
    record: views.RoundRecord | None = None  # the round that is committed and not yet closed
    began: float = 0.0  # clock reading when the round began, or the daemon if that was later
    traffic: dict[str, tuple[int, int]] = field(default_factory=dict)  # bytes up and down by client, of no record yet
    deadline: asyncio.TimerHandle | None = None
    work: dict[str, Work] = field(default_factory=dict)  # of those who are at work, by client
    scan: asyncio.TimerHandle | None = None  # the next look for silent ones
    telling: asyncio.TimerHandle | None = None  # the next news of mere progress
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # replaced at every change
    fits: tuple[int, list[str], dict[str, str]] = (-1, [], {})  # see `Coordinator.fits`
    told_statistics: tuple[tuple[tuple[str, int], ...], bytes] = ((), b"")  # the newest in JSON, and of which tally
    trouble: str = ""  # why the store does not take its next step, while it does not
    signed: Signed = UNSIGNED

    @cached_property
    def sums(self) -> frozenset[str]:
        """What the tally of an evaluation may have."""
        return frozenset(names(self.spec))

    @property
    def statistics(self) -> bytes:
        """The data's statistics in JSON, once they were measured; before, and in other runs, nothing."""
        return self.told_statistics[1] if self.state.measured == self.told_statistics[0] else self._statistics()

    def _statistics(self) -> bytes:
        found = statistics.statistics_of(dict(self.state.measured), self.spec)
        self.told_statistics = (self.state.measured, found.model_dump_json().encode())
        return self.told_statistics[1]

    @property
    def effective(self) -> RunSpec:
        """The specification with what was measured of the data filled in: it makes a model file whole."""
        if not self.statistics:
            return self.spec
        return statistics.applied(self.spec, statistics.Statistics.model_validate_json(self.statistics))

    def moved(self, client: str, up: int = 0, down: int = 0) -> None:
        """So many bytes of messages have come from this client, or gone to it."""
        before = self.traffic.get(client, (0, 0))
        self.traffic[client] = before[0] + up, before[1] + down
        self.bytes_up += up
        self.bytes_down += down

    @property
    def counted(self) -> Moved:
        """What has moved up to here."""
        return Moved(self.bytes_up, self.bytes_down, dict(self.traffic))

    def recorded(self, traffic: Mapping[str, tuple[int, int]]) -> None:
        """So much of `traffic` is in the record of a round that is over."""
        for client, (up, down) in traffic.items():
            more = self.traffic[client][0] - up, self.traffic[client][1] - down
            if any(more):
                self.traffic[client] = more
            else:
                del self.traffic[client]

    def tell(self) -> None:
        """Wake everybody who watches this run."""
        if self.telling is not None:
            self.telling.cancel()
            self.telling = None
        self.changed.set()
        self.changed = asyncio.Event()

    def tell_soon(self, seconds: float) -> None:
        """The same, at most so often: for what changes all the time."""
        if self.telling is None:
            self.telling = asyncio.get_running_loop().call_later(seconds, self.tell)

    def weight(self, examples: int) -> int:
        """What an update of so many examples counts in the mean; never more than the run allows one (max_weight)."""
        rule = self.spec.aggregation
        return min(examples, rule.max_weight or examples) if rule.weighting == "examples" else 1

    def staleness(self, age: int) -> float:
        """What an update is scaled down to that is so many rounds late: (1 + age)^-a (Nguyen et al. 2022, section 5)."""
        return math.pow(1 + age, -self.spec.cohort.staleness)

    def log(self, client: str = "") -> logging.LoggerAdapter[logging.Logger]:
        """For lines about this run."""
        return logs.about(log, run=self.run, round=self.state.round, client=client)


def revive(stored: StoredRun) -> Live:
    """The run as the store has it."""
    return Live(
        stored.run,
        stored.spec,
        stored.model.layout,
        stored.state,
        stored.model,
        stored.version,
        stored.started,
        stored.ended,
        stored.moved.up,
        stored.moved.down,
        {one.client: one for one in stored.updates},
        traffic=dict(stored.moved.traffic),
        record=stored.record,
        signed=stored.signed,
        steps=steps.kept(stored.steps, stored.model.layout),
        ledger={one.holder: one for one in stored.ledger},
    )
