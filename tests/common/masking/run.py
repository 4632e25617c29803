"""A whole masked sum in one function, as a faithful transport would carry it; and the clients and settings of its tests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqfed.common.errors import MaskingRefused, Unauthenticated
from seqfed.common.masking import packing, prg
from seqfed.common.masking.checks import check_advert
from seqfed.common.masking.client import Client
from seqfed.common.masking.keys import Signer
from seqfed.common.masking.messages import (
    Advert,
    Confirm,
    Confirmed,
    Delivery,
    KeyShares,
    MaskedInput,
    Opening,
    Reply,
    Roster,
    Survivors,
)
from seqfed.common.masking.server import (
    Confirming,
    Effect,
    Event,
    Fail,
    Finish,
    Left,
    Masked,
    Opened,
    Shared,
    State,
    Step,
    StepDeadline,
    answer,
    begin,
    on,
)
from seqfed.common.masking.terms import Purpose, Terms
from seqfed.common.masking.unmasking import Unmasking, scalar_totals, unmasking

EVENTS: Mapping[Step, Callable[[str, Any], Event]] = {
    Step.SHARING: Shared,
    Step.MASKING: Masked,
    Step.CONFIRMING: Confirming,
    Step.OPENING: Opened,
}


def terms_for(n: int, **changes: Any) -> Terms:
    """Terms of a sum of at most n clients."""
    bits = changes.get("bits", 16)
    settings: dict[str, Any] = {
        "run": "run",
        "round": 3,
        "attempt": 1,
        "number": 7,
        "purpose": Purpose.TRAIN,
        "dim": 11,
        "bits": bits,
        "levels": max(1, ((1 << (bits - 1)) - 1) // n),
        "n_max": n,
        "min_survivors": 2,
        "malicious": True,
        "drop": 0.05,
        "scalars": 3,
        "codec": "test",
        "model": hashlib.sha256(b"model").digest(),
        "settings": hashlib.sha256(b"settings").digest(),
    }
    return Terms(**(settings | changes))


def names_of(n: int) -> list[str]:
    """In ascending order."""
    return [f"client-{place:04}" for place in range(n)]


@cache
def signer_of(name: str) -> Signer:
    """The lasting identity of the client of this name."""
    return Signer(hashlib.sha256(b"identity of " + name.encode()).digest())


def pinned(names: Collection[str]) -> Callable[[Advert], None]:
    """A trust store that knows these clients' identities."""
    known = {name: signer_of(name).public for name in names}

    def trust(advert: Advert) -> None:
        if known.get(advert.client) != advert.identity_key:
            raise Unauthenticated(f"'{advert.client}' is not pinned with this key")

    return trust


@dataclass
class Log:
    """What a client's replay log keeps through its restarts."""

    highest: dict[str, int] = field(default_factory=dict)

    def begin(self, run: str, number: int) -> None:
        if number <= self.highest.get(run, -1):
            raise MaskingRefused(f"masked sum {number} of run {run} has been before")
        self.highest[run] = number


def client_of(terms: Terms, name: str, others: Collection[str], *, floor: int = 2, log: Log | None = None) -> Client:
    """One that trusts the others' lasting identities."""
    return Client(terms, name, signer_of(name), floor, pinned(others), (log or Log()).begin)


@dataclass
class Course:
    """How a masked sum went. `seen`: all that the server was sent, and all that it answered."""

    state: State
    clients: dict[str, Client]
    plain: dict[str, NDArray[Any] | None]
    scalars: dict[str, Sequence[int]]
    vectors: dict[str, bytes] = field(default_factory=dict)
    effects: list[Effect] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)

    @property
    def failed(self) -> Fail | None:
        return next((one for one in self.effects if isinstance(one, Fail)), None)

    @property
    def finished(self) -> Finish | None:
        return next((one for one in self.effects if isinstance(one, Finish)), None)

    def take(self, event: Event) -> None:
        self.state, effects = on(self.state, event)
        self.effects.extend(effects)

    def say(self, name: str) -> Any:
        """The client's next message, in answer to the server's last; MaskingRefused if it refuses."""
        reply = answer(self.state, name)
        assert reply is not None, "this client waits for the others"
        self.seen.append(reply)
        said = self.heard(name, reply)
        self.seen.append(said)
        return said

    def heard(self, name: str, reply: Reply) -> KeyShares | MaskedInput | Confirm | Opening:
        """What this client says to this reply."""
        client = self.clients[name]
        match reply:
            case Roster():
                return client.share(reply)
            case Delivery():
                vector = self.plain[name]
                copy = None if vector is None else vector.copy()
                self.vectors[name], message = client.mask(reply, copy, self.scalars[name])
                return message
            case Survivors():
                return client.confirm(reply)
            case Confirmed():
                return client.open(reply)
            case _:
                raise AssertionError(reply)

    def step(self, step: Step, gone: Collection[str] = (), silent: Collection[str] = ()) -> None:
        """All members take the step, but those who are gone, and those of whom nothing is heard up to the deadline."""
        assert self.state.step is step
        # a step may end, and the next fail at once, before all have their turn
        messages = {name: self.say(name) for name in self.state.members if name not in gone and name not in silent}
        for name in self.state.members:
            if name in gone:
                self.take(Left(name, "gone"))
            elif name in messages:
                self.take(EVENTS[step](name, messages[name]))
        self.take(StepDeadline(step))

    def opened(self) -> Unmasking:
        assert self.finished is not None
        found = unmasking(self.state)
        assert isinstance(found, Unmasking), found
        return found

    def total(self) -> tuple[NDArray[Any] | None, tuple[int, ...]]:
        """The sums modulo 2^bits, and of the scalars."""
        terms, found = self.state.terms, self.opened()
        scalars = scalar_totals(self.state, found)
        if not terms.dim:
            return None, scalars
        whole = np.zeros(terms.dim, terms.dtype)
        for name in self.state.survivors:
            whole += packing.unpack(self.vectors[name], terms.bits, terms.dim, terms.dtype)
        prg.threads(whole, found.plus, found.minus, 2)
        return whole & np.array((1 << terms.bits) - 1, terms.dtype), scalars

    def expected(self) -> tuple[NDArray[Any] | None, tuple[int, ...]]:
        """The same of the survivors' plain vectors, in Python's integers."""
        terms = self.state.terms
        names = self.state.survivors
        scalars = tuple(sum(self.scalars[name][place] for name in names) for place in range(terms.scalars))
        vectors = [vector for name in names if (vector := self.plain[name]) is not None]
        if not terms.dim:
            return None, scalars
        sums = [sum(int(vector[place]) for vector in vectors) % (1 << terms.bits) for place in range(terms.dim)]
        return np.array(sums, terms.dtype), scalars


def started(terms: Terms, names: Sequence[str], *, floor: int = 2, seed: int = 0) -> Course:
    """A sum of these clients that have all advertised, with numbers of this seed."""
    generator = np.random.default_rng(seed)
    clients = {name: client_of(terms, name, names, floor=floor) for name in names}
    plain = dict[str, NDArray[Any] | None]()
    scalars = dict[str, Sequence[int]]()
    for name in names:
        levels = generator.integers(-terms.levels, terms.levels, terms.dim, endpoint=True)
        plain[name] = (levels % (1 << terms.bits)).astype(terms.dtype) if terms.dim else None
        bound = min((1 << 63) // terms.n_max - 1, 1 << 62)
        scalars[name] = [int(one) for one in generator.integers(-bound, bound, terms.scalars)]
    adverts = [client.advertise() for client in clients.values()]
    for advert in adverts:
        check_advert(terms, advert, pinned(names))
    return Course(begin(terms, adverts), clients, plain, scalars)


def masked_sum(
    terms: Terms,
    names: Sequence[str],
    gone: Mapping[Step, Collection[str]],
    silent: Mapping[Step, Collection[str]] | None = None,
    *,
    seed: int = 0,
) -> Course:
    """The whole protocol; in each step some leave, and of some nothing is heard any more."""
    course = started(terms, names, seed=seed)
    for step in EVENTS:
        if course.state.step is step:
            course.step(step, gone.get(step, ()), (silent or {}).get(step, ()))
    return course
