"""Around one table: the server's half of masked sums without its network, and parties that are in them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from seqfed.client import secure
from seqfed.client.masking import Log, Masking, Trust, own_key
from seqfed.client.secure import Given
from seqfed.client.work import LocalUpdate
from seqfed.common.config import validate
from seqfed.common.masking import packing, prg
from seqfed.common.masking.agreed import scalar_names, terms_of
from seqfed.common.masking.checks import check_advert
from seqfed.common.masking.messages import (
    Advert,
    Confirm,
    Done,
    KeyShares,
    MaskedInput,
    Opening,
)
from seqfed.common.masking.server import Confirming, Masked, Opened, Shared, State, Step, answer, begin, on
from seqfed.common.masking.terms import Purpose, Terms
from seqfed.common.masking.unmasking import Unmasking, scalar_totals, unmasking
from seqfed.common.spec import RunSpec
from seqfed.common.views import MaskingTerms, ModelVersion, Task, TaskKey, TaskKind
from seqfed.common.wire_masking import Reply, Request

EVENTS: dict[type, Callable[[str, Any], Any]] = {
    KeyShares: Shared,
    MaskedInput: Masked,
    Confirm: Confirming,
    Opening: Opened,
}
LAYOUT = bytes(32)


def secure_spec(normalise: str = "given", **privacy: Any) -> RunSpec:
    content = {
        "data": {"features": 1, "classes": 2, "normalise": normalise},
        "cohort": {"min_clients": 3},
        "aggregation": {"max_weight": 1000},
        "privacy": {"secure_aggregation": True, **privacy},
    }
    return validate(RunSpec, content, "test")


def secure_task(
    spec: RunSpec, kind: TaskKind = TaskKind.TRAIN, *, model: bytes = b"model", number: int = 1, n_max: int = 5
) -> Task:
    version = ModelVersion(0, len(model), blake3(model).digest(), LAYOUT)
    return Task(kind, TaskKey("0123456789abcdef", 1, 1), spec, version, masking=MaskingTerms(number, n_max))


def again(task: Task, number: int) -> Task:
    """The next attempt at its round."""
    assert task.masking is not None
    key = replace(task.key, attempt=task.key.attempt + 1)
    return replace(task, key=key, masking=replace(task.masking, number=number))


def update(seed: int, size: int = 100, weight: int = 7) -> LocalUpdate:
    delta = np.random.default_rng(seed).normal(0, 0.1, size).astype(np.float32)
    tally = {"examples": weight, "loss": 3 * weight}
    return LocalUpdate(delta, blake3(delta.tobytes()).digest(), weight, tally, 1.5)


@dataclass
class Table:
    """One masked sum of the task among `seats` clients, as soon as so many are there."""

    task: Task
    seats: int
    dim: int = 0
    adverts: dict[str, Advert] = field(default_factory=dict)
    vectors: dict[str, bytes] = field(default_factory=dict)
    said: list[tuple[str, Request]] = field(default_factory=list)
    state: State | None = None
    lie: Callable[[str, Reply], Reply] = lambda _, reply: reply
    checks: bool = True

    def __post_init__(self) -> None:
        self._changed = asyncio.Condition()

    @property
    def terms(self) -> Terms:
        task, chosen = self.task, self.task.masking
        assert chosen is not None
        purpose, model = Purpose(task.kind.value), task.model.digest
        return terms_of(task.spec, task.key, purpose, chosen.number, chosen.n_max, model, task.statistics, self.dim)

    async def say(self, client: str, step: Request) -> Reply:
        """Raises what is wrong with the step, or with the sum."""
        self.said.append((client, step))
        async with self._changed:
            if isinstance(step, Advert):
                if self.checks:
                    check_advert(self.terms, step, lambda _: None)
                self.adverts.setdefault(client, step)
                if self.state is None and len(self.adverts) == self.seats:
                    self.state = begin(self.terms, self.adverts.values())
            else:
                if isinstance(step, MaskedInput) and self.dim:
                    assert blake3(self.vectors[client]).digest() == step.digest
                assert self.state is not None
                self.state, _ = on(self.state, EVENTS[type(step)](client, step))
            self._changed.notify_all()
            while True:
                if self.state is not None and (reply := answer(self.state, client)) is not None:
                    return self.lie(client, reply)
                await self._changed.wait()

    async def heard(self, count: int) -> None:
        """Wait until so many steps have come."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.said) >= count)

    def take(self, client: str, packed: bytes) -> None:
        self.vectors[client] = packed

    def sums(self) -> tuple[NDArray[Any], dict[str, int]]:
        """Of the vectors, modulo 2^bits, and of the scalars by name."""
        assert self.state is not None
        assert self.state.step is Step.DONE
        terms, found = self.state.terms, unmasking(self.state)
        assert isinstance(found, Unmasking)
        whole = np.zeros(terms.dim, terms.dtype)
        for name in self.state.survivors if terms.dim else ():
            whole += packing.unpack(self.vectors[name], terms.bits, terms.dim, terms.dtype)
        prg.add_masks(whole, found.plus, found.minus)
        names = scalar_names(self.task.spec, terms.purpose)
        totals = dict(zip(names, scalar_totals(self.state, found), strict=True))
        return whole & np.array((1 << terms.bits) - 1, terms.dtype), totals


def party(name: str, folder: Path, pinned: dict[str, bytes] | None = None, min_cohort: int | None = None) -> Masking:
    """A client with a key of its own in folder/name, that knows these keys; None: nobody's."""
    place = folder / name
    signer = own_key(place)
    return Masking(name, signer, Trust((name, signer), None, pinned), Log(place), None, min_cohort)


def parties(folder: Path, *names: str, min_cohort: int | None = None) -> dict[str, Masking]:
    """Clients that know each other."""
    known = {name: own_key(folder / name).public for name in names}
    return {name: party(name, folder, known, min_cohort) for name in names}


async def be_in(table: Table, one: Masking, given: Given, task: Task | None = None) -> None:
    """This party's way through the sum."""

    async def ask(step: Request, names: Any) -> Reply:
        reply = await table.say(one.name, step)
        assert isinstance(reply, Done) or not names or table.state is None or names == table.state.roster.names
        return reply

    async def send(packed: bytes, digest: bytes) -> None:
        table.take(one.name, packed)

    await secure.take_part(one, task or table.task, given, ask, send)
