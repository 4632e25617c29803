"""Light clients for runs with secure aggregation, and what their masked sums must come to.

`python -m tests.integration.maskers PARENT NAME SERVER FOLDER STEP` is one in a process of its own, without certificates, that
kills itself (kill -9) as soon as the server has answered its message of this step: `advert`, `keyshares`, `maskedinput`,
`confirm`; `-`: never. Its state is in FOLDER/NAME, its peers are in FOLDER/peers.toml; what it has
made it writes to FOLDER/NAME.made.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from blake3 import blake3
from tests.integration.light import Formula, delta_of

from seqfed.client.channel import connected
from seqfed.client.connection import Connection
from seqfed.client.consent import Consent
from seqfed.client.masking import Masking, line, masking_of, own_key
from seqfed.client.session import Session
from seqfed.client.work import LocalUpdate, Workshop
from seqfed.common import statistics
from seqfed.common.layout import Flat
from seqfed.common.metrics import units
from seqfed.common.model import initial_parameters
from seqfed.common.quantising import Lattice, decode, levels, quantise
from seqfed.common.seeds import derive, generator
from seqfed.common.spec import RunSpec
from seqfed.common.views import Progress, RoundRecord, Task

STEPS = ("advert", "keyshares", "maskedinput", "confirm")  # a client's messages, but for the last, which nobody follows
Deltas = Callable[[int, str, Flat], Flat]  # (round, client, the model that it began with) -> its update


def spec_of(clients: int = 4, survivors: int = 3, **changes: Any) -> RunSpec:
    """A run with secure aggregation for so many clients; a table that is given is put over the one here."""
    content: dict[str, Any] = {
        "rounds": 3,
        "data": {"features": 2, "classes": 2},
        "model": {"kind": "rnn", "hidden": 4, "layers": 1},
        "cohort": {"min_clients": clients, "deadline_s": 600},
        "aggregation": {"max_weight": 25},
        "privacy": {"secure_aggregation": True, "min_survivors": survivors},
    }
    for name, value in changes.items():
        content[name] = {**content.get(name, {}), **value} if isinstance(value, Mapping) else value
    return RunSpec.model_validate(content)


def examples_of(client: str) -> int:
    """How many a client has: of 'a' to 'd' 10, 17, 24 and 31."""
    return 10 + 7 * (ord(client[0]) - ord("a"))


def rows_of(client: str) -> Flat:
    """Its data, of which it sends sums only: float32 (examples, 2)."""
    return generator(0, client, "rows").normal(3, 50, (examples_of(client), 2)).astype(np.float32)


def score_of(client: str) -> dict[str, int]:
    """Its score of any model."""
    many = examples_of(client)
    histograms = {f"pos.0.{100 + many}": many // 2, f"neg.0.{120 + many}": many - many // 2}
    return {"examples": many, "loss": units(0.25 * many), "loss.high": 3, "correct": many - 3, **histograms}


def made_anew(round_: int, client: str, model: Flat, anew: int = 0) -> Flat:
    """A client's update; each `anew` is another one."""
    return delta_of(f"{client} {anew}" if anew else client, round_, model)


@dataclass
class Masker(Formula):
    """A workshop of sums. `made`: by round, for which masked sum it trained anew (0: for none), of each training.

    `told`: where it writes that down, too. `statistics`: all that its trainings were told.
    """

    made: dict[int, list[int]] = field(default_factory=dict)
    told: Path | None = None
    statistics: set[bytes] = field(default_factory=set)

    def measure(self, task: Task) -> dict[str, int]:
        sums = statistics.Sums(task.spec.data.numbers)
        sums.add(rows_of(self.client))
        return sums.tally()

    def train(
        self, task: Task, flat: Flat, _: Callable[[], bool], __: Callable[[Progress], None], anew: int = 0
    ) -> LocalUpdate:
        self.statistics.add(task.statistics)
        delta = made_anew(task.key.round, self.client, flat, anew)
        self.made.setdefault(task.key.round, []).append(anew)
        if self.told is not None:
            with self.told.open("a") as file:
                file.write(f"{task.key.round} {anew}\n")
        digest, many = blake3(delta.data.cast("B")).digest(), examples_of(self.client)
        return LocalUpdate(delta, digest, many, {"examples": many, "loss": units(0.5 * many)}, 0.0)

    def evaluate(self, _: Task, __: Flat, ___: Callable[[Progress], None]) -> dict[str, int]:
        return score_of(self.client)


def made_in(file: Path) -> dict[int, list[int]]:
    """What a client in a process of its own has made."""
    found: dict[int, list[int]] = {}
    for text in file.read_text().splitlines():
        round_, anew = map(int, text.split())
        found.setdefault(round_, []).append(anew)
    return found


def newest(made: Mapping[str, Mapping[int, Sequence[int]]]) -> Deltas:
    """The updates of the clients' last trainings for each round."""
    return lambda round_, client, model: made_anew(round_, client, model, made[client][round_][-1])


def replayed(
    spec: RunSpec,
    records: Iterable[RoundRecord],
    deltas: Deltas = made_anew,
    examples: Callable[[str], int] = examples_of,
) -> Flat:
    """The model after these rounds: each is the one before and the plain mean of the survivors' quantised updates."""
    private, most = spec.privacy, spec.aggregation.max_weight or 1
    model = initial_parameters(spec).flat
    for record in records:
        lattice = Lattice(len(model), private.b, levels(private.b, len(record.cohort)), private.clip)
        rotation = derive(spec.seed, record.round, "rotation")
        total, weights = np.zeros(len(model), np.int64), 0
        for client in record.folded:
            weight = min(examples(client), most)
            rounding = generator(spec.seed, record.round, client, "rounding")
            delta = deltas(record.round, client, model)
            residues = quantise(delta, weight / most, lattice, rotation, rounding)[0].astype(np.int64)
            total += np.where(residues < 1 << private.b - 1, residues, residues - (1 << private.b))
            weights += weight
        assert 2 * np.abs(total).max() < 1 << private.b  # no sum wraps
        summed: Any = (total % (1 << private.b)).astype(lattice.dtype)
        change = decode(summed, lattice, rotation, clients=len(record.folded), weight=weights, max_weight=most)
        model = model + change
    return model


def undisturbed(spec: RunSpec, clients: Iterable[str]) -> Flat:
    """The model after all rounds with all of these clients in each."""
    all_ = tuple(clients)
    return replayed(spec, [RoundRecord(number, 1, all_, all_) for number in range(1, spec.rounds + 1)])


# Clients --------------------------------------------------------------------------------------------------------------


def introduce(folder: Path, clients: Iterable[str], file: str = "peers.toml") -> Path:
    """A file of peers with these clients' keys, which are made in their state folders."""
    lines = ["[peers]", *(line(name, own_key(folder / name).public) for name in clients)]
    (folder / file).write_text("\n".join(lines) + "\n")
    return folder / file


def session_of(
    formula: Formula,
    server: str,
    masking: Masking | None,
    credentials: Path | None = None,
    consent: Consent | None = None,
) -> Session:
    """Its session; the same client for the same name, after a restart too."""
    return Session(
        cast(Workshop, formula),
        (server,),
        blake3(formula.client.encode()).hexdigest()[:32],
        insecure=False,
        dial=functools.partial(connected, credentials=credentials),
        rng=random.Random(formula.client),  # noqa: S311 - not a secret
        consent=consent,
        masking=masking,
    )


def killing_after(step: str) -> None:
    """This process is over as soon as the server has answered its message of this step."""
    mask = Connection.mask

    async def answered(self: Connection, key: Any, number: int, step_: Any, names: Sequence[str] = ()) -> Any:
        reply = await mask(self, key, number, step_, names)
        if type(step_).__name__.lower() == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return reply

    Connection.mask = answered  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    from seqfed.client.demo.child import end_with

    end_with(int(sys.argv.pop(1)))
    own_name, address, place, when = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    killing_after(when)
    own = masking_of(own_name, place / own_name, None, place / "peers.toml")
    asyncio.run(session_of(Masker(own_name, told=place / f"{own_name}.made"), address, own).run())
