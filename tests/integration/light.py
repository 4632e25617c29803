"""Clients without torch: real sessions over real gRPC, whose training is a formula that a test can work out for itself.

`python -m tests.integration.light PARENT NAME SERVER` is one in a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
from blake3 import blake3

from seqfed.client.admin import operating
from seqfed.client.data import ClientData
from seqfed.client.session import Session
from seqfed.client.work import LocalUpdate, Workshop
from seqfed.common import checkpoint
from seqfed.common.errors import SeqfedError, ServerUnavailable
from seqfed.common.layout import Flat
from seqfed.common.metrics import units
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.schema import DataSchema
from seqfed.common.seeds import generator
from seqfed.common.spec import RunSpec
from seqfed.common.views import Progress, RoundRecord, RunView, Task

EXAMPLES = 10


def delta_of(client: str, round_: int, flat: Flat) -> Flat:
    """A client's update: it draws every number nearer to 0 and to noise of its own, so any slip in a model shows in all later."""
    noise = generator(round_, client).normal(0, 0.01, len(flat)).astype(np.float32)
    return (noise - np.float32(0.1) * flat).astype(np.float32)


def undisturbed(spec: RunSpec, clients: Iterable[str]) -> Flat:
    """The model after all rounds with all of these clients in each."""
    everybody = tuple(clients)
    return replayed(spec, [RoundRecord(number, 1, everybody, everybody) for number in range(1, spec.rounds + 1)])


def replayed(spec: RunSpec, records: Iterable[RoundRecord]) -> Flat:
    """The model after these rounds, in numpy's integers; an update s rounds old is scaled by (1 + s)^-a."""
    models = [initial_parameters(spec).flat]
    for record in records:
        total, weights = np.zeros(len(models[0]), np.int64), 0
        for client in record.folded:
            age = record.stale.get(client, 0)
            base = record.round - age
            delta = delta_of(client, base, models[base - 1]).astype(np.float64)
            total += np.rint(delta * (EXAMPLES * (1 + age) ** -spec.cohort.staleness * 2.0**30)).astype(np.int64)
            weights += EXAMPLES
        models.append((models[-1] + total / (weights * 2.0**30)).astype(np.float32))
    return models[-1]


@dataclass
class Formula:
    """Stands in a Workshop's place.

    `trained`: (round, digest of the update) of every training that it did. `gates`: in these rounds it trains until the
    second event is set; the first tells that it has begun. `train_s`: what a training takes at least.
    """

    client: str
    train_s: float = 0.0
    trained: list[tuple[int, bytes]] = field(default_factory=list)
    gates: dict[int, tuple[threading.Event, threading.Event]] = field(default_factory=dict)
    schema: DataSchema = field(
        default_factory=lambda: DataSchema(features=2, classes=2, examples=EXAMPLES, validation_examples=EXAMPLES)
    )

    @property
    def source(self) -> Formula:
        return self

    def check(self, _: Task) -> ClientData | None:
        return None

    def gate(self, round_: int) -> tuple[threading.Event, threading.Event]:
        """Hold its training in this round up: (it has begun, it may go on)."""
        return self.gates.setdefault(round_, (threading.Event(), threading.Event()))

    def train(self, task: Task, flat: Flat, _: Callable[[], bool], __: Callable[[Progress], None]) -> LocalUpdate:
        if task.key.round in self.gates:
            begun, may_go_on = self.gates[task.key.round]
            begun.set()
            may_go_on.wait(60)
        if self.train_s:
            time.sleep(self.train_s)
        delta = delta_of(self.client, task.key.round, flat)
        digest = blake3(delta.data.cast("B")).digest()
        self.trained.append((task.key.round, digest))
        return LocalUpdate(delta, digest, EXAMPLES, {"examples": EXAMPLES, "loss": units(1.0)}, self.train_s)

    def evaluate(self, _: Task, __: Flat, ___: Callable[[Progress], None]) -> dict[str, int]:
        return {"examples": EXAMPLES, "loss": units(1.0), "correct": 5}


def session_of(formula: Formula, *servers: str, insecure: bool = False) -> Session:
    """Its session; the same client for the same name, after a restart too."""
    instance = blake3(formula.client.encode()).hexdigest()[:32]
    draw = random.Random(formula.client)  # noqa: S311 - not a secret
    return Session(cast(Workshop, formula), servers, instance, insecure, rng=draw)


@contextlib.asynccontextmanager
async def taking_part(names: Iterable[str], *servers: str, train_s: float = 0.0) -> AsyncIterator[dict[str, Formula]]:
    """Clients of these servers, until the end of the block."""
    formulas = {name: Formula(name, train_s) for name in names}
    tasks = [asyncio.create_task(session_of(one, *servers).run()) for one in formulas.values()]
    try:
        yield formulas
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def serves(address: str) -> None:
    """Wait until this server says so."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(ServerUnavailable):
                async with operating(address, insecure=False) as operator:
                    if await operator.healthy():
                        return
            await asyncio.sleep(0.05)


async def arrived(server: str, count: int) -> None:
    """Wait until so many clients are connected."""
    async with operating(server, insecure=False) as operator:
        while True:
            if sum(one.connected for one in await operator.clients()) >= count:
                return
            await asyncio.sleep(0.05)


async def submitted(server: str, spec: RunSpec) -> str:
    """The id of a new run."""
    async with operating(server, insecure=False) as operator:
        return (await operator.submit(spec, None)).run


async def seen_through(servers: str, run: str) -> tuple[RunView, Mapping[int, RoundRecord]]:
    """The run's last view, followed through every loss of its servers, and its rounds as they were told last.

    A record that had been told otherwise before fails the test.
    """
    records: dict[int, RoundRecord] = {}
    async with operating(servers, insecure=False) as operator:
        while True:
            with contextlib.suppress(SeqfedError):
                async for view in operator.watch(run):
                    for record in view.history:
                        assert records.setdefault(record.round, record) == record
                    if view.ended:
                        return view, records
            operator.turn()
            await asyncio.sleep(0.05)


async def exported(servers: str, run: str, spec: RunSpec, folder: Path) -> Flat:
    """The run's newest model."""
    async with operating(servers, insecure=False) as operator:
        await operator.export(run, folder / "exported.safetensors")
    return checkpoint.load(folder / "exported.safetensors", layout_of(spec)).flat


if __name__ == "__main__":
    from seqfed.client.demo.child import end_with

    end_with(int(sys.argv.pop(1)))
    asyncio.run(session_of(Formula(sys.argv[1]), sys.argv[2], insecure=True).run())
