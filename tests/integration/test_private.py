"""Differential privacy end to end: real sessions over real gRPC, masked sums with noise, and kill -9 amid the accounting."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from blake3 import blake3
from numpy.typing import NDArray
from tests.client.ready import Ready
from tests.integration.light import Formula, arrived, seen_through, submitted, taking_part
from tests.integration.maskers import session_of
from tests.integration.test_kill_points import CHILD, KILLED, servers, start
from tests.integration.test_tls import running
from tests.server.test_private import deviation_is

from seqfed.client.admin import Operator, operating
from seqfed.client.data import Sequences
from seqfed.client.masking import masking_of
from seqfed.client.work import LocalUpdate, Workshop
from seqfed.common import checkpoint, quantising
from seqfed.common.dp import accounting, skellam
from seqfed.common.errors import MaskingFailed
from seqfed.common.layout import Flat
from seqfed.common.metrics import units
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.seeds import generator
from seqfed.common.spec import RunSpec
from seqfed.common.views import FEDERATION, Progress, RoundRecord, RunView, Task
from seqfed.server.daemon import serving
from seqfed.server.settings import ServerSettings
from seqfed.server.store import open_store

T = TypeVar("T")

CLIENTS = ("a", "b", "c", "d")
PATIENCE = 60.0
MODEL = {"kind": "lstm", "hidden": 64, "layers": 1}  # 17,538 parameters

__all__ = ["servers"]  # a fixture


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for who is gone."""
    monkeypatch.setattr("seqfed.client.session.LONGEST_WAIT", 0.2)
    monkeypatch.setattr("seqfed.server.masked.AWAY_S", 0.2)


async def soon(work: Awaitable[T]) -> T:
    return await asyncio.wait_for(work, PATIENCE)


def spec_of(
    mode: str,
    rounds: int = 1,
    *,
    secure: bool = True,
    survivors: int = 3,
    cohort: dict[str, Any] | None = None,
    **dp: Any,
) -> RunSpec:
    masks = {"secure_aggregation": True, "mode": "semi_honest", "min_survivors": survivors, "b": 18} if secure else {}
    return RunSpec.model_validate(
        {
            "rounds": rounds,
            "data": {"features": 2, "classes": 2},
            "model": MODEL,
            "aggregation": {"weighting": "uniform"},
            "training": {"optimizer": "sgd", "learning_rate": 1e-12, "batch_size": 8},
            "cohort": {"min_clients": 4, "count": 4, "deadline_s": 600, **(cohort or {})},
            "evaluation": {"every": 0},
            "privacy": {**masks, "dp": {"mode": mode, "delta": 1e-5, "noise_multiplier": 1.0, "clip": 0.5, **dp}},
        }
    )


@dataclass
class Still(Formula):
    """A workshop whose updates are of the norm that a test asks for, in one direction; of norm 0 as a rule."""

    length: float = 0.0

    def train(
        self, task: Task, flat: Flat, _: Callable[[], bool], __: Callable[[Progress], None], anew: int = 0
    ) -> LocalUpdate:
        delta = ray(len(flat), self.length)
        delta[0] += anew * np.float32(1e-12)  # what was trained anew is another update
        digest = blake3(delta.tobytes() + bytes([anew, task.key.round])).digest()
        return LocalUpdate(delta, digest, 10, {"examples": 10, "loss": units(3.0)}, 0.5)


def ray(size: int, length: float) -> Flat:
    found = np.random.default_rng(1).standard_normal(size)
    return (found * (length / np.linalg.norm(found))).astype(np.float32)


@contextlib.asynccontextmanager
async def federation(folder: Path, *workshops: Any) -> AsyncIterator[Operator]:
    """A server, and clients over these workshops, without certificates."""
    async with serving(ServerSettings(port=0, state=folder / "state")) as address:
        sessions = [
            session_of(one, address, masking_of(one.client, folder / one.client, None, None)) for one in workshops
        ]
        async with running(*sessions), operating(address, insecure=False) as operator:
            await soon(arrived(address, len(workshops)))
            yield operator


async def ended(
    operator: Operator, spec: RunSpec, folder: Path, reasons: set[str] | None = None
) -> tuple[RunView, list[RoundRecord], NDArray[np.float64]]:
    """A new run up to its end, its rounds, and how far its model has moved."""
    run, records, view = (await operator.submit(spec, None)).run, list[RoundRecord](), None
    async with contextlib.aclosing(operator.watch(run)) as watched:
        async for view in watched:
            records += view.history
            (set() if reasons is None else reasons).add(view.reason)
            assert view.phase != "paused", view.reason
    assert view is not None
    await operator.export(run, folder / "model.safetensors")
    flat = checkpoint.load(folder / "model.safetensors", layout_of(spec)).flat
    return view, records, flat.astype(np.float64) - initial_parameters(spec).flat


# Masked sums with noise -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "variance"),
    [
        # its clients' noise alone is counted for three of the four that there are, less one who knows its own
        (spec_of("distributed"), 4 / 2),
        (spec_of("distributed", colluding=0), 4 / 3),
        (spec_of("distributed", survivors=4, colluding=0), 1.0),
        (spec_of("central"), 1.0),
        (spec_of("distributed", 3), 3 * 4 / 2),
        (spec_of("central", 3), 3.0),
        (spec_of("central", 3, mechanism="ftrl"), 2.0),
        (spec_of("central", 4, mechanism="ftrl"), 1.0),
    ],
    ids=[
        "distributed",
        "distributed-all",
        "distributed-4",
        "central",
        "distributed-3",
        "central-3",
        "ftrl-3",
        "ftrl-4",
    ],
)
async def test_a_masked_sums_noise_is_what_is_counted(tmp_path: Path, spec: RunSpec, variance: float) -> None:
    async with federation(tmp_path, *(Still(name) for name in CLIENTS)) as operator:
        view, records, change = await soon(ended(operator, spec, tmp_path))
        (told,) = (await operator.privacy(view.run)).runs
    assert view.phase == "finished", view.reason
    assert len(records) == spec.rounds
    assert all(sorted(record.folded) == list(CLIENTS) for record in records)
    assert {str(dict(record.training)) for record in records} == {"{}"}
    # a step's rounding comes on top: 1e-4 of the noise
    assert deviation_is(change, math.sqrt(variance) * 0.5 / 4)
    assert told.entry.releases == spec.rounds
    assert told.entry.epsilon == accounting.spent(spec, spec.rounds, 1.0)


@pytest.mark.parametrize("mode", ["central", "distributed"])
async def test_masked_updates_are_clipped_and_the_sum_is_divided_by_the_target(tmp_path: Path, mode: str) -> None:
    spec = spec_of(mode, noise_multiplier=0.05)
    workshops = [Still(name, length=length) for name, length in zip(CLIENTS, (0.2, 0.5, 5.0, 80.0), strict=True)]
    async with federation(tmp_path, *workshops) as operator:
        _, _, change = await soon(ended(operator, spec, tmp_path))
    along = float(change @ ray(len(change), 1.0))
    assert along * 4 == pytest.approx(0.2 + 3 * 0.5, abs=5 * 0.05 * 0.5 * math.sqrt(4 / 2))


async def test_local_noise_is_each_clients_own(tmp_path: Path) -> None:
    """The real workshop, whose training moves nothing: the mean of four updates has half the deviation of one."""
    spec = spec_of("local", 2, secure=False, noise_multiplier=3.0)

    def data(seed: int) -> Sequences:
        x = generator(seed, "test data").standard_normal((16, 4, 2)).astype(np.float32)
        return Sequences.of(x, (x.sum(axis=(1, 2)) > 0).astype(np.int64))

    shops = [Workshop(name, Ready(data(nth), data(nth), features=2)) for nth, name in enumerate(CLIENTS)]
    async with federation(tmp_path, *shops) as operator:
        view, records, change = await soon(ended(operator, spec, tmp_path))
        (told,) = (await operator.privacy(view.run)).runs
    assert view.phase == "finished", view.reason
    assert [dict(record.training) for record in records] == [{}, {}]
    assert deviation_is(change, math.sqrt(2) * 3.0 * 0.5 / 2)
    assert told.entry.epsilon == accounting.spent(spec, 2, 3.0)
    assert {(count, epsilon) for _, count, epsilon in told.holders} == {(2, told.entry.epsilon)}


@pytest.mark.parametrize("mode", ["distributed", "central", "local"])
async def test_a_sum_that_was_opened_in_vain_is_on_the_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The clients' inputs of the first sum may have been seen; what they give again is another release. Of the server's own
    noise no number is told.
    """
    fails = [MaskingFailed("the sum of 4 updates is 123 steps long")]
    where = quantising if mode == "local" else skellam
    real: Callable[..., Flat] = where.decode

    def failing(*arguments: Any, **named: Any) -> Flat:
        if fails:
            raise fails.pop()
        return real(*arguments, **named)

    monkeypatch.setattr(where, "decode", failing)
    spec = spec_of(mode, 2, noise_multiplier=5.0)
    reasons = set[str]()
    async with federation(tmp_path, *(Still(name) for name in CLIENTS)) as operator:
        view, records, _ = await soon(ended(operator, spec, tmp_path, reasons))
        (told,) = (await operator.privacy(view.run)).runs
    assert (view.phase, [record.attempt for record in records]) == ("finished", [2, 1])
    assert (told.entry.releases, told.entry.epsilon) == (3, accounting.spent(spec, 3, 5.0))
    assert {count for _, count, _ in told.holders} == {3}
    assert mode != "central" or not any("123" in one for one in reasons)


# Kill -9 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["asked", "model-written", "model-committed"])
async def test_a_killed_server_has_booked_each_model_once(tmp_path: Path, servers: list[Any], point: str) -> None:
    spec = spec_of("central", 9, secure=False, epsilon=3.0, noise_multiplier=3.0)
    rounds = next(count for count in range(9) if accounting.spent(spec, count + 1, 3.0) > 3.0)
    assert 2 < rounds < 8
    address = await start(servers, tmp_path, "0", [*KILLED, point, "2"])
    async with taking_part(CLIENTS, address):
        run = await submitted(address, spec)
        seeing = asyncio.create_task(seen_through(address, run))
        assert await asyncio.to_thread(servers[0].wait, 30) == -9
        with contextlib.closing(sqlite3.connect(tmp_path / "state" / "seqfed.db")) as database:
            ((version,),) = database.execute("SELECT max(version) FROM models")
            ((booked,),) = database.execute("SELECT releases FROM ledger WHERE holder = '*'")
        assert booked == version == (2 if point == "model-committed" else 1)
        await start(servers, tmp_path, address.rpartition(":")[2], CHILD)
        view, records = await soon(seeing)
    assert view.phase == "finished"
    assert "privacy budget spent" in view.reason
    assert sorted(records) == list(range(1, rounds + 1))
    servers[1].kill()
    servers[1].wait()
    with contextlib.closing(open_store(tmp_path / "state")) as store:
        (found,) = store.runs()
        audited = [entry for entry in store.audit(0, 1000) if entry.kind == "privacy"]
    ledger = {one.holder: one for one in found.ledger}
    assert {name: one.releases for name, one in ledger.items()} == dict.fromkeys((FEDERATION, *CLIENTS), rounds)
    assert ledger[FEDERATION].epsilon == accounting.spent(spec, rounds, 3.0)
    assert len(audited) == rounds + 1
