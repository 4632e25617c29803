"""What differential privacy costs: the accuracy of a character model after the same rounds, over epsilon.

Rounds happen in this process, with the arithmetic, noise and accounting of the server and of clients, but no wire, and no masks,
which leave a sum as it is. A client is a piece of 160 characters of a role in DIR/shakespeare, or without --data of an author of
a generated Markov text, and its piece is all that it has: so epsilon is of pieces. 600 are asked each round, and nothing is
claimed of sampling. The server's noise (central) and the clients' own inside masked sums (distributed, 18 bits a number, all
clients counted on: colluding = 0, against the server alone) have the same settings, cohorts and batches. Clients are trained many
at a time; that each becomes what it does in the client's own training is seen to first.

`accuracy` is the share of characters that the last model foretells right, in text that no client has; mean over the seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.compression import generated, shakespeare
from benchmarks.harness import machine, tell
from seqfed.client.data import Sequences
from seqfed.client.network import network_for, use_threads
from seqfed.client.training import evaluate, learning_rate, train
from seqfed.common import metrics
from seqfed.common.dp import accounting, skellam
from seqfed.common.dp.noise import fresh_key
from seqfed.common.layout import Flat, Parameters
from seqfed.common.masking.agreed import rotation_seed
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.seeds import generator
from seqfed.common.spec import RunSpec
from seqfed.server import fedavg, private

PIECE: Final = 160  # characters of a client
STEPS: Final = 40  # of a sequence
COHORT: Final = 600
ROUNDS: Final = 40
EPOCHS: Final = 2
AT_ONCE: Final = 250  # clients trained in one graph
BITS: Final = 18
CLIP: Final = 2.0
DELTA: Final = 1e-5
SCORED: Final = 400  # sequences that models are scored on
MODES: Final = ("central", "distributed")
EPSILONS: Final = (None, 10.0, 4.0, 1.0)


def spec_of(symbols: int, rounds: int, seed: int, mode: str, epsilon: float | None) -> RunSpec:
    """Without epsilon, what the run would be with one; nobody is then to add noise."""
    distributed = mode == "distributed"
    masked = {"secure_aggregation": True, "min_survivors": COHORT, "b": BITS} if distributed else {}
    counted = {"colluding": 0} if distributed else {}
    return RunSpec.model_validate(
        {
            "name": f"{mode}-{epsilon}",
            "seed": seed,
            "rounds": rounds,
            "data": {
                "vocabulary": [chr(0x4E00 + nth) for nth in range(symbols)],
                "unit": "characters",
                "steps": STEPS,
            },
            "task": {"kind": "next_token"},
            "model": {"kind": "lstm", "hidden": 24, "layers": 1, "embedding": 8},
            "training": {"optimizer": "adam", "learning_rate": 0.1, "batch_size": PIECE // STEPS, "epochs": EPOCHS},
            "aggregation": {"weighting": "uniform"},
            "cohort": {"min_clients": COHORT, "count": COHORT},
            "evaluation": {"every": 0},
            "privacy": {
                **masked,
                "dp": {"mode": mode, "epsilon": epsilon or 10.0, "delta": DELTA, "clip": CLIP, **counted},
            },
        }
    )


def pieces(texts: Sequence[NDArray[np.int32]], size: int, most: int | None = None) -> list[Sequences]:
    """Each client's sequences: a piece of a text, of so many characters."""
    cut = [one[start : start + size + 1] for one in texts for start in range(0, len(one) - size, size)]
    starts = np.arange(0, size, STEPS)
    lengths = np.full(len(starts), STEPS)
    return [Sequences(one, starts, lengths, target="next token") for one in cut[:most]]


@dataclass(frozen=True, eq=False)
class Trial:
    """All that models are trained and scored on."""

    clients: Sequence[Sequences]
    scored: Sequences
    symbols: int
    rounds: int

    def accuracy(self, seed: int, mode: str, epsilon: float | None) -> tuple[float, float | None]:
        """Of the model after all rounds, and the noise multiplier; without epsilon the updates are clipped alone."""
        spec = spec_of(self.symbols, self.rounds, seed, mode, epsilon)
        noise = None if epsilon is None else accounting.noise_multiplier(spec)
        model, network = initial_parameters(spec).flat, network_for(spec)
        for round_ in range(1, spec.rounds + 1):
            cohort = generator(seed, round_, "cohort").choice(len(self.clients), COHORT, replace=False).tolist()
            model = _next(spec, model, self.updates(spec, model, cohort, round_), round_, noise)
        network.load(Parameters(network.layout, model))
        return metrics.summary(evaluate(network, self.scored, spec))["accuracy"], noise

    def updates(self, spec: RunSpec, model: Flat, cohort: Sequence[int], round_: int) -> Iterator[Flat]:
        for at in range(0, len(cohort), AT_ONCE):
            rows = [self.clients[client].rows for client in cohort[at : at + AT_ONCE]]
            yield from trained(spec, model, np.stack(rows).astype(np.int64), round_)

    def require_alike(self) -> None:
        """Exit unless clients trained together become what each does in the client's own training."""
        spec = spec_of(self.symbols, self.rounds, 1, MODES[0], None)
        model, network = initial_parameters(spec).flat, network_for(spec)
        for client, together in enumerate(self.updates(spec, model, range(3), 1)):
            network.load(Parameters(network.layout, model))
            train(network, self.clients[client], spec, 1, generator(1))
            alone = network.save().flat - model
            if float(np.linalg.norm(alone - together)) > 1e-3 * float(np.linalg.norm(alone)):
                raise SystemExit(f"client {client} trained among others is not what it is alone")


def trained(spec: RunSpec, model: Flat, rows: NDArray[np.int64], round_: int) -> NDArray[np.float32]:
    """Each client's update, of all its sequences a step: one graph over copies of the model, (clients, parameters), since most of
    the time of so small a training is Python's.

    rows: (clients, characters + 1). Adam goes by single numbers, so no client's training touches another's.
    """
    shapes, settings = layout_of(spec).tensors, spec.training
    copies = torch.from_numpy(np.repeat(model[np.newaxis], len(rows), 0)).requires_grad_()
    optimizer = torch.optim.Adam([copies], learning_rate(settings, round_, spec.rounds))
    tokens = torch.from_numpy(rows)
    read, foretold = (part.reshape(len(rows), -1, STEPS) for part in (tokens[:, :-1], tokens[:, 1:]))
    for _ in range(settings.epochs or 1):
        optimizer.zero_grad()
        parts = torch.split(copies, [math.prod(shape) for _, shape in shapes], dim=1)
        tensors = [one.view(len(rows), *shape) for one, (_, shape) in zip(parts, shapes, strict=True)]
        logits = _forward(read, tensors)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), foretold.flatten(), reduction="sum")
        (loss / foretold[0].numel()).backward()  # type: ignore[no-untyped-call]  # as torch has it
        optimizer.step()
    found: NDArray[np.float32] = copies.detach().numpy() - model
    return found


def _forward(read: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The network's logits, one of each client: an LSTM between an embedding and a linear layer."""
    embedding, into, again, bias, other, head, shift = tensors
    clients, sequences, steps = read.shape
    first = torch.arange(clients).view(-1, 1, 1) * embedding.shape[1]
    seen = embedding.flatten(0, 1)[read + first].flatten(1, 2)
    gates = torch.baddbmm((bias + other).unsqueeze(1), seen, into.mT).view(clients, sequences, steps, -1)
    hidden = cell = gates.new_zeros(clients, sequences, again.shape[2])
    told = []
    for gate in gates.unbind(2):
        i, f, g, o = (gate + hidden @ again.mT).chunk(4, -1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        told.append(hidden)
    return torch.baddbmm(shift.unsqueeze(1), torch.stack(told, 2).flatten(1, 2), head.mT)


def _next(spec: RunSpec, model: Flat, updates: Iterable[Flat], round_: int, noise: float | None) -> Flat:
    """The next model, of clipped updates and their noise."""
    if noise is not None and spec.privacy.secure_aggregation:
        how, seed = accounting.mechanism(spec, noise), rotation_seed(spec, round_)
        masked = np.zeros(how.dim, how.dtype)
        for one in updates:
            masked += skellam.encode(one, how, seed, fresh_key())[0]
        return model + skellam.decode(masked, how, seed, clients=COHORT, target=COHORT)
    total = fedavg.empty(len(model))
    for one in updates:
        fedavg.fold(total, 1, [one], fedavg.shrink(fedavg.norm([one]), CLIP))
    if noise is not None:
        private.noise_sum(total, CLIP, noise, COHORT, fresh_key())
    return np.concatenate(list(fedavg.finish(total, [model])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder that has shakespeare/; without it the text is generated")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seeds", default="1", help="with commas")
    parser.add_argument("--out", type=Path, help="append each measured run here, and do none again that stands there")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    given = parser.parse_args()
    seeds, begun = [int(one) for one in given.seeds.split(",")], time.monotonic()
    use_threads(1)
    texts = generated() if given.data is None else shakespeare(given.data / "shakespeare")
    (scored,) = pieces([texts.held_out], SCORED * STEPS, 1)
    trial = Trial(pieces(texts.clients, PIECE), scored, texts.symbols, given.rounds)
    trial.require_alike()
    source = "generated" if given.data is None else "shakespeare"
    known: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    results = []
    for mode, epsilon in itertools.product(MODES, EPSILONS):
        key = (MODES[0] if epsilon is None else mode, epsilon)  # without noise both are the same run
        if key not in known:
            known[key] = [_measured(trial, source, seed, *key, given.out) for seed in seeds]
        mine = known[key]
        results.append(
            {
                "mode": mode,
                "epsilon": epsilon,
                "accuracy": round(float(np.mean([one["accuracy"] for one in mine])), 4),
                "accuracy_by_seed": [round(one["accuracy"], 4) for one in mine],
                "noise_multiplier": mine[0]["noise_multiplier"],
            }
        )
    half = len(EPSILONS)
    gaps = [one["accuracy"] - other["accuracy"] for one, other in zip(results[:half], results[half:], strict=True)]
    tell(
        {
            "results": results,
            "largest_gap": round(max(map(abs, gaps)), 4),
            "text": source,
            "rounds": given.rounds,
            "cohort": COHORT,
            "population": len(trial.clients),
            "params": layout_of(spec_of(texts.symbols, given.rounds, 1, MODES[1], None)).size,
            "clip": CLIP,
            "delta": DELTA,
            "bits": BITS,
            "seeds": seeds,
            "seconds": round(time.monotonic() - begun, 1),
            "machine": machine(),
        },
        given.json,
    )


def _measured(
    trial: Trial, source: str, seed: int, mode: str, epsilon: float | None, out: Path | None
) -> dict[str, Any]:
    """A run's figures, read from `out` or trained for."""
    same = {"mode": mode, "epsilon": epsilon, "seed": seed, "rounds": trial.rounds, "text": source}
    lines = out.read_text().splitlines() if out is not None and out.exists() else []
    for before in map(json.loads, lines):
        if same.items() <= before.items():
            return dict(before)
    begun = time.monotonic()
    accuracy, noise = trial.accuracy(seed, mode, epsilon)
    line = same | {"accuracy": accuracy, "noise_multiplier": noise}
    print(json.dumps({**line, "seconds": round(time.monotonic() - begun, 1)}), file=sys.stderr)
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
    return line


if __name__ == "__main__":
    main()
