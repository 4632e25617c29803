"""What fewer bytes cost: federated rounds of a character model with each codec, and how fast the codecs are.

Rounds happen in this process, with the client's own training code, the codecs and the server's arithmetic, but no wire. The
clients are the first 100 speaking roles of at least 2,000 characters in DIR/shakespeare, or without --data as many authors of
a generated Markov text; 10 of them are asked a round. `ce_final` is the mean cross-entropy (nats a character) of the model
after the last round, on text that no client trained on, over the seeds; `ce_float32` the same of the same seeds without a
codec. Ratios are of float32's bytes to the payloads', headers included.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import machine, tell
from seqfed.client.data import Sequences
from seqfed.client.network import Network, network_for, use_threads
from seqfed.client.training import evaluate, train
from seqfed.common import metrics
from seqfed.common.compression import Codec, Key, decode, encode, lowrank, rotsub
from seqfed.common.compression.header import SIZE
from seqfed.common.compression.pieces import PIECE
from seqfed.common.errors import MaskingFailed
from seqfed.common.layout import Flat, Layout, Parameters
from seqfed.common.masking.packing import packed_bytes
from seqfed.common.masking.terms import width
from seqfed.common.model import initial_parameters
from seqfed.common.quantising import Lattice, levels, shortened
from seqfed.common.quantising import decode as decode_sum
from seqfed.common.quantising import quantise as quantise_all
from seqfed.common.rotation import rotate
from seqfed.common.seeds import derive, generator
from seqfed.common.spec import DataSpec, EvaluationSpec, ModelSpec, RunSpec, TaskSpec, TrainingSpec
from seqfed.server import fedavg

ROLES: Final = 100
LEAST: Final = 2000  # characters of a role
COHORT: Final = 10
STEPS: Final = 80  # characters of a sequence
SCORED: Final = 192  # sequences that models are scored on
RATE: Final = 2e-2  # where the codecs were tried; float32 alone is best at 8e-2
CLIP: Final = 6.0  # of a masked update; those of this model are 0.8 to 6 long at that rate
BLOCK: Final = 1 << 20  # numbers that speed is measured with
PASSES: Final = (
    20  # of each kind, by turns; the fastest counts, since others may have the machine's caches in the meantime
)


# Data -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Texts:
    """The clients' training texts and one to score by, as token ids from 1; `symbols`: how many ids there are."""

    clients: list[NDArray[np.int32]]
    held_out: NDArray[np.int32]
    symbols: int


def shakespeare(raw: Path) -> Texts:
    with np.load(raw / "shards" / "clients.npz") as archive:
        text, start, length, split, vocabulary = (
            archive[name] for name in ("text", "start", "length", "split", "vocab")
        )
    roles = np.flatnonzero(length >= LEAST)[:ROLES]
    whole = [text[start[role] :][: length[role]].astype(np.int32) + 1 for role in roles]
    held_out = [one[split[role] :] for one, role in zip(whole, roles, strict=True)]
    clients = [one[: split[role]] for one, role in zip(whole, roles, strict=True)]
    return Texts(clients, np.concatenate(held_out), len(str(vocabulary)))


def generated() -> Texts:
    """Text of a chain of order 2 over 40 symbols, each author with a tenth of habits of their own."""
    draw, symbols = generator(1, "markov"), 40
    common = draw.dirichlet(np.full(symbols, 0.08), (symbols, symbols)).cumsum(2)

    def written(author: int, size: int) -> NDArray[np.int32]:
        own = generator(1, "markov", author)
        habits = own.dirichlet(np.full(symbols, 0.3)).cumsum()
        found, one, other = np.empty(size, np.int32), 0, 0
        for at, (kind, value) in enumerate(own.random((size, 2))):
            chain = habits if kind < 0.1 else common[one, other]
            one, other = other, min(int(np.searchsorted(chain, value)), symbols - 1)
            found[at] = other + 1
        return found

    return Texts([written(nth, 3000) for nth in range(ROLES)], written(ROLES, 40_000), symbols)


def sequences(text: NDArray[np.int32], most: int | None = None) -> Sequences:
    starts = np.arange(0, max(1, len(text) - STEPS - 1), STEPS)
    if most is not None and len(starts) > most:
        starts = starts[:: len(starts) // most][:most]
    lengths = np.minimum(STEPS, len(text) - 1 - starts)
    return Sequences(text, starts, lengths, target="next token")


def spec_of(texts: Texts, rounds: int, seed: int, rate: float = RATE) -> RunSpec:
    """About 37,500 parameters with 79 symbols."""
    return RunSpec(
        name="compression",
        seed=seed,
        rounds=rounds,
        data=DataSpec(
            vocabulary=tuple(chr(0x4E00 + nth) for nth in range(texts.symbols)), unit="characters", steps=STEPS
        ),
        task=TaskSpec(kind="next_token"),
        model=ModelSpec(kind="lstm", hidden=78, layers=1, embedding=16),
        training=TrainingSpec(
            optimizer="adam", learning_rate=rate, batch_size=8, steps=2, schedule="cosine", final=0.1
        ),
        evaluation=EvaluationSpec(every=0),
    )


# What is compared -----------------------------------------------------------------------------------------------------


@dataclass
class Mean:
    """The cohort's mean update by some way, and the bytes that each client sent for it."""

    update: Flat
    sent: float


@dataclass
class State:
    """What a way keeps from round to round. clip: of a masked update."""

    clip: float = CLIP
    residuals: dict[int, Flat] = field(default_factory=dict)
    deviation: float | None = None
    factor: Flat | None = None
    velocity: Flat | None = None
    refused: int = 0


Combine = Callable[
    [Sequence[int], Sequence[Flat], Layout, int, int, State], Mean
]  # (clients, updates, layout, seed, round)


def plainly(codec: Codec) -> Combine:
    """Each update as a payload of its own, folded as the server folds."""

    def combine(
        clients: Sequence[int], updates: Sequence[Flat], layout: Layout, seed: int, round_: int, state: State
    ) -> Mean:
        total, sent = fedavg.empty(layout.size), 0
        for client, update in zip(clients, updates, strict=True):
            key = Key(seed, "benchmark", round_, str(client))
            found = encode(update, layout, key, codec, state.residuals.get(client) if codec.feeds_back else None)
            if found.residual is not None:
                state.residuals[client] = found.residual
            fedavg.fold(total, 1, decode(found.payload, layout, key, codec))
            sent += len(found.payload)
        zeros = np.zeros(layout.size, np.float32)
        return Mean(next(iter(fedavg.finish(total, [zeros]))), sent / len(clients))

    return combine


def by_part(fraction: float, bits: int, groups: int = 1, wraps: bool = False) -> Combine:
    """Masked sums, one a group of clients with a part of its own each; what a sum of residues modulo 2^bits tells, exactly."""

    def combine(
        clients: Sequence[int], updates: Sequence[Flat], layout: Layout, seed: int, round_: int, state: State
    ) -> Mean:
        found, sent, spread = np.zeros(layout.size, np.float64), 0, []
        for group in range(groups):
            mine = range(group, len(clients), groups)
            size = layout.size, fraction, bits, len(mine), state.clip
            part = rotsub.tuned(*size, state.deviation) if wraps else rotsub.bounded(*size)
            drawn = derive(seed, round_, group, "rotation")
            total = np.zeros(part.size, part.dtype)
            for at in mine:
                rounding = generator(seed, round_, clients[at], "rounding")
                total += rotsub.quantise(updates[at], 1.0, part, drawn, rounding)[0]
            total &= part.dtype.type((1 << bits) - 1)
            sent += len(mine) * (SIZE + packed_bytes(part.size, bits))
            try:
                mean = rotsub.decode(total, part, drawn, clients=len(mine), weight=len(mine), max_weight=1)
            except MaskingFailed:
                state.refused += 1
                assert state.deviation is not None
                spread.append(2 * state.deviation)
                continue
            spread.append(rotsub.deviation_of(total, part, len(mine)))
            found += mean * (len(mine) / len(clients))
        state.deviation = float(np.mean(spread))
        return Mean(found.astype(np.float32), sent / len(clients))

    return combine


def by_levels(most: int) -> Combine:
    """Whole updates in masked sums of as many bits as these levels of each client need."""

    def combine(
        clients: Sequence[int], updates: Sequence[Flat], layout: Layout, seed: int, round_: int, state: State
    ) -> Mean:
        lattice = Lattice(layout.size, width(most, len(updates)), most, state.clip)
        return _summed(updates, lattice, seed, round_)

    return combine


def by_side(rank: int, bits: int) -> Combine:
    """PowerSGD in one masked sum a round, rotated and quantised as masked updates are, with error feedback at the client."""

    def combine(
        clients: Sequence[int], updates: Sequence[Flat], layout: Layout, seed: int, round_: int, state: State
    ) -> Mean:
        side = lowrank.side(lowrank.Plan(layout, rank), round_, state.factor, seed)
        whole = [
            shortened(one + state.residuals.get(client, 0), state.clip)[0]
            for client, one in zip(clients, updates, strict=True)
        ]
        sent = [side.project(one) for one in whole]
        mean = _summed(sent, Lattice(side.size, bits, levels(bits, len(sent)), state.clip), seed, round_)
        for client, one, other in zip(clients, whole, sent, strict=True):
            state.residuals[client] = one - side.rebuild(other)
        state.factor = mean.update[: side.factor]
        return Mean(side.rebuild(mean.update), mean.sent)

    return combine


def _summed(vectors: Sequence[Flat], lattice: Lattice, seed: int, round_: int) -> Mean:
    total, drawn = np.zeros(lattice.dim, lattice.dtype), derive(seed, round_, "rotation")
    for nth, vector in enumerate(vectors):
        total += quantise_all(vector, 1.0, lattice, drawn, generator(seed, round_, nth, "rounding"))[0]
    mean = decode_sum(total, lattice, drawn, clients=len(vectors), weight=len(vectors), max_weight=1)
    return Mean(mean, SIZE + packed_bytes(lattice.dim, lattice.bits))


def steadied(combine: Combine, momentum: float) -> Combine:
    """The server moves by a running mean of the updates, which lets noise cancel over rounds."""

    def steady(
        clients: Sequence[int], updates: Sequence[Flat], layout: Layout, seed: int, round_: int, state: State
    ) -> Mean:
        found = combine(clients, updates, layout, seed, round_, state)
        before = np.zeros_like(found.update) if state.velocity is None else state.velocity
        state.velocity = (momentum * before + (1 - momentum) * found.update).astype(np.float32)
        return Mean(state.velocity, found.sent)

    return steady


@dataclass(frozen=True)
class Way:
    """Up, down, and whether a server could sum it without seeing it."""

    up: Combine
    down: Codec | None = None
    masked: bool = False


WAYS: Final[Mapping[str, Way]] = {
    "none": Way(plainly(Codec("none"))),
    "rotq8": Way(plainly(Codec("rotq8"))),
    "rotq4": Way(plainly(Codec("rotq4"))),
    "eden1": Way(plainly(Codec("eden1", fraction=0.25))),
    "eden1-30%": Way(plainly(Codec("eden1", fraction=0.3))),
    "eden1-16%": Way(plainly(Codec("eden1"))),
    "topk": Way(plainly(Codec("topk"))),
    "powersgd": Way(plainly(Codec("powersgd"))),
    "delta8": Way(plainly(Codec("none")), Codec("delta8")),
    "delta4": Way(plainly(Codec("none")), Codec("delta4")),
    "eden1+delta4": Way(plainly(Codec("eden1", fraction=0.25)), Codec("delta4")),
    "rotsub": Way(by_part(0.15, 5, wraps=True), masked=True),
    "rotsub-bounded": Way(by_part(0.095, 8), masked=True),
    "rotsub-40-groups": Way(by_part(0.187, 4, groups=3, wraps=True), masked=True),
    "rotsub-100": Way(by_part(0.057, 5, wraps=True), masked=True),
    "rotsub-200": Way(by_part(0.0285, 5, wraps=True), masked=True),
    "rotsub-100-groups": Way(by_part(0.072, 4, groups=3, wraps=True), masked=True),
    "rotsub-100-steady": Way(steadied(by_part(0.057, 5, wraps=True), 0.5), masked=True),
    "rotq8-masked": Way(by_levels(127), masked=True),
    "rotq4-masked": Way(by_levels(7), masked=True),
    "powersgd-masked": Way(by_side(4, 8), masked=True),
    "powersgd-masked-6": Way(by_side(6, 8), masked=True),
}


# Rounds ---------------------------------------------------------------------------------------------------------------


def rounds_of(way: Way, texts: Texts, spec: RunSpec, network: Network, clip: float = CLIP) -> dict[str, float]:
    """The last model's cross-entropy, the mean bytes of a client's upload and download a round, of the model, and how many
    masked sums were refused.
    """
    model = initial_parameters(spec).flat.copy()
    layout, state, lag = network.layout, State(clip), np.zeros(len(model), np.float32)
    scored = sequences(texts.held_out, SCORED)
    data = [sequences(one) for one in texts.clients]
    up = down = 0.0
    for round_ in range(1, spec.rounds + 1):
        cohort = generator(spec.seed, round_, "cohort").choice(len(data), COHORT, replace=False).tolist()
        updates = []
        for client in cohort:
            network.load(Parameters(layout, model))
            train(network, data[client], spec, round_, generator(spec.seed, round_, str(client), "batches"))
            updates.append(network.save().flat - model)
        mean = way.up(cohort, updates, layout, spec.seed, round_, state)
        up += mean.sent
        if way.down is None:
            model += mean.update
            down += layout.nbytes
        else:
            # All have the model that the payloads add up to; what rounding left out goes with the next one.
            key = Key(spec.seed, "benchmark", round_)
            found = encode(mean.update, layout, key, way.down, lag)
            assert found.residual is not None
            lag = found.residual
            model += np.concatenate(list(decode(found.payload, layout, key, way.down)))
            down += len(found.payload)
    network.load(Parameters(layout, model))
    tally = evaluate(network, scored, spec)
    loss = metrics.summary(tally)["loss"]
    sizes = {"up": up / spec.rounds, "down": down / spec.rounds, "bytes": float(layout.nbytes)}
    return {"ce": loss, **sizes, "refused": float(state.refused)}


# Speed ----------------------------------------------------------------------------------------------------------------


def speed(name: str) -> dict[str, float]:
    """Float32 input a second of processor time in MB/s, encoding and decoding by this way, and of the least that there is to do
    to such a vector, one pass that multiplies it: the best of several passes, one thread.
    """
    vector = generator(1, "speed").standard_normal(BLOCK, np.float32)
    other = np.empty_like(vector)
    works = (*_works(name, vector), lambda: np.multiply(vector, np.float32(1.0001), out=other))
    return dict(zip(("encode_mb_s", "decode_mb_s", "bare_mb_s"), _best(*works), strict=True))


def rotating() -> float:
    """The same of the rotation by itself, to which no way that rotates comes nearer than a codec's other work lets it."""
    pieces = generator(1, "speed").standard_normal(BLOCK, np.float32).reshape(-1, PIECE)

    def work() -> None:
        for piece in pieces:
            rotate(piece, 1)

    return _best(work)[0]


def _works(name: str, vector: Flat) -> tuple[Callable[[], object], Callable[[], object]]:
    """Encoding and decoding by this way."""
    sums: dict[str, int] = {"clients": 1, "weight": 1, "max_weight": 1}
    if name.startswith("rotsub"):
        part = rotsub.bounded(BLOCK, 0.15, 8, COHORT, 1e4)
        chosen, _ = rotsub.quantise(vector, 1.0, part, 1, generator(1))
        return (
            lambda: rotsub.quantise(vector, 1.0, part, 1, generator(1)),
            lambda: rotsub.decode(chosen, part, 1, **sums),
        )
    if name in {"rotq8-masked", "rotq4-masked"}:
        most = 127 if name == "rotq8-masked" else 7
        lattice = Lattice(BLOCK, width(most, COHORT), most, 1e4)
        whole, _ = quantise_all(vector, 1.0, lattice, 1, generator(1))
        return (
            lambda: quantise_all(vector, 1.0, lattice, 1, generator(1)),
            lambda: decode_sum(whole, lattice, 1, **sums),
        )
    codec = Codec(name.partition("-")[0].partition("+")[0])
    layout, key = Layout((("w", (BLOCK // 1024, 1024)),)), Key(1, "benchmark", 1, "a")
    residual = vector * np.float32(0.01) if codec.feeds_back else None
    payload = encode(vector, layout, key, codec, residual).payload
    return (
        lambda: encode(vector, layout, key, codec, residual),
        lambda: [len(one) for one in decode(payload, layout, key, codec)],
    )


def _best(*works: Callable[[], object]) -> list[float]:
    found = [math.inf] * len(works)
    for _ in range(PASSES):
        for nth, work in enumerate(works):
            begun = time.process_time()
            work()
            found[nth] = min(found[nth], time.process_time() - begun)
    return [round(4e-6 * BLOCK / max(one, 1e-6), 1) for one in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="the folder that has shakespeare/; without it the text is generated")
    parser.add_argument("--codecs", default=",".join(WAYS), help="these alone, with commas; none always comes along")
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--seeds", default="1,2,3", help="with commas")
    parser.add_argument("--lr", type=float, default=RATE, help="the learning rate at the first round")
    parser.add_argument("--clip", type=float, default=CLIP, help="of masked updates: the longest that is not shortened")
    parser.add_argument("--speed", action="store_true", help="how fast they are, and no rounds")
    parser.add_argument("--out", type=Path, help="append each measured pair here, and do none again that stands there")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    given = parser.parse_args()
    names, seeds = dict.fromkeys(["none", *given.codecs.split(",")]), [int(one) for one in given.seeds.split(",")]
    if unknown := set(names) - set(WAYS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    if given.speed:
        use_threads(1)
        rates = [{"codec": name, **speed(name)} for name in names]
        return tell({"results": rates, "rotation_mb_s": rotating(), "machine": machine()}, given.json)
    begun = time.monotonic()
    pairs = [(name, seed) for name in names for seed in seeds]
    same = {
        "rounds": given.rounds,
        "text": "generated" if given.data is None else "shakespeare",
        "lr": given.lr,
        "clip": given.clip,
    }
    measured = dict(_measured(pairs, given.data, same, given.out))
    results = []
    for name in names:
        mine = [measured[name, seed] for seed in seeds]
        mean = {key: sum(one[key] for one in mine) / len(mine) for key in ("ce", "up", "down", "bytes", "refused")}
        exact = sum(measured["none", seed]["ce"] for seed in seeds) / len(seeds)
        results.append(
            {
                "codec": name,
                "masked": WAYS[name].masked,
                "upload_ratio": round(mean["bytes"] / mean["up"], 1),
                "download_ratio": round(mean["bytes"] / mean["down"], 1),
                "ce_final": round(mean["ce"], 4),
                "ce_float32": round(exact, 4),
                "ce_by_seed": [round(one["ce"], 4) for one in mine],
                "refused_sums": round(mean["refused"], 2),
                **speed(name),
            }
        )
    tell(
        {
            "results": results,
            "rotation_mb_s": rotating(),
            **same,
            "cohort": COHORT,
            "seeds": seeds,
            "seconds": round(time.monotonic() - begun, 1),
            "machine": machine(),
        },
        given.json,
    )
    return None


def _measured(
    pairs: Sequence[tuple[str, int]], data: Path | None, settings: Mapping[str, Any], out: Path | None
) -> Iterator[tuple[tuple[str, int], dict[str, float]]]:
    """The figures of each pair, read from `out` or trained for."""
    texts: Texts | None = None
    for name, seed in pairs:
        same = {"codec": name, "seed": seed, **settings}
        lines = out.read_text().splitlines() if out is not None and out.exists() else []  # others may write there, too
        known = [one for one in map(json.loads, lines) if same.items() <= one.items()]
        if known:
            yield (name, seed), known[-1]
            continue
        if texts is None:
            use_threads(1)
            texts = generated() if data is None else shakespeare(data / "shakespeare")
        spec = spec_of(texts, settings["rounds"], seed, settings["lr"])
        network, begun = network_for(spec), time.monotonic()
        result = rounds_of(WAYS[name], texts, spec, network, settings["clip"])
        line = same | result
        print(json.dumps({**line, "seconds": round(time.monotonic() - begun, 1)}), file=sys.stderr)
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
        yield (name, seed), result


if __name__ == "__main__":
    main()
