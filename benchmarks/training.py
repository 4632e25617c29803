"""What local training costs over the same plain torch loop on the same batches, from the same numbers to the same numbers.

Ours is `train` as a client calls it: batches gathered from the rows, losses read and summed, each batch asked whether it is
still wanted. The plain loop has its batches ready as tensors and reads no loss. Both make their own optimiser.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import machine, tell
from seqfed.client.data import Batch, Sequences
from seqfed.client.network import device_of, network_for, use_threads
from seqfed.client.training import batches, train
from seqfed.common.model import initial_parameters
from seqfed.common.seeds import generator
from seqfed.common.spec import DataSpec, ModelSpec, RunSpec, TaskSpec, TrainingSpec

BATCH = 32
RATE = 3e-3


@dataclass(frozen=True)
class Case:
    """A run, data for it, and how many blocks of either kind are measured; a block is spec.training.steps batches."""

    name: str
    spec: RunSpec
    data: Sequences
    blocks: int


class Classifier(nn.Module):
    """The seed model in plain torch."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(8, 64, 2, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.recurrent(x)
        return self.head(states[:, -1])  # type: ignore[no-any-return]


class Characters(nn.Module):
    """The next-character model in plain torch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(79, 8)
        self.recurrent = nn.LSTM(8, 256, 2, batch_first=True)
        self.head = nn.Linear(256, 79)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.recurrent(self.embedding(x))
        return self.head(states).flatten(0, 1)  # type: ignore[no-any-return]


PLAIN: dict[str, Callable[[], nn.Module]] = {"lstm 2x64": Classifier, "char-lstm 2x256": Characters}


def training(steps: int) -> TrainingSpec:
    return TrainingSpec(optimizer="adam", learning_rate=RATE, batch_size=BATCH, steps=steps)


def cases() -> list[Case]:
    """The seed model on sequences of 8 steps, and a next-character model (LEAF's for Shakespeare) on 80."""
    draw = generator(0, "training benchmark")
    x, y = draw.standard_normal((1024, 8, 8), np.float32), draw.integers(0, 10, 1024)
    seed = RunSpec(data=DataSpec(features=8, steps=8, classes=10), training=training(50))
    text = draw.integers(0, 79, 50_000).astype(np.int32)
    starts = np.arange(0, len(text) - 81, 80)
    characters = RunSpec(
        data=DataSpec(vocabulary=tuple(map(chr, range(33, 33 + 78))), steps=80),
        task=TaskSpec(kind="next_token"),
        model=ModelSpec(hidden=256, embedding=8),
        training=training(2),
    )
    windows = Sequences(text, starts, np.full(len(starts), 80), target="next token")
    return [
        Case("lstm 2x64", seed, Sequences.of(x, y), 60),
        Case("char-lstm 2x256", characters, windows, 16),
    ]


def plain_loop(model: nn.Module, made: list[Batch], device: torch.device) -> None:
    """What a person would write."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    model.train()
    for batch in made:
        x, y = torch.from_numpy(batch.x).to(device), torch.from_numpy(batch.y).to(device)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """Blocks of the two loops in turn, first the one, then the other ahead; the first of each is not counted.

    The times are those of the fastest block: what else runs on the machine can only add to a block's time.
    """
    spec, start = case.spec, initial_parameters(case.spec)
    assert spec.training.steps is not None
    made = [case.data.batch(rows) for rows in batches(len(case.data), spec.training, generator(0, "batches"))]
    network, model = network_for(spec, device=device.type), PLAIN[case.name]().to(device)
    views = {name: torch.from_numpy(view) for name, view in start.layout.views(start.flat).items()}

    def ours() -> None:
        train(network, case.data, spec, 1, generator(0, "batches"))

    times: dict[str, list[float]] = {"ours": [], "bare": []}
    loops = {"bare": lambda: plain_loop(model, made, device), "ours": ours}
    for block in range(case.blocks + 1):
        network.load(start)
        model.load_state_dict(views)
        for name in sorted(loops, reverse=block % 2 == 1):
            begun = time.perf_counter()
            loops[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - begun) / spec.training.steps)
    found = np.concatenate([tensor.cpu().numpy().ravel() for tensor in model.state_dict().values()])
    ours_ms, bare_ms = min(times["ours"][1:]), min(times["bare"][1:])
    return {
        "case": case.name,
        "ours_ms": round(ours_ms, 3),
        "bare_ms": round(bare_ms, 3),
        "ratio": round(ours_ms / bare_ms, 3),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "same_bits": found.tobytes() == network.save().flat.tobytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 1 is a client's own default")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    given = parser.parse_args()
    use_threads(given.threads)
    device = device_of(given.device)
    results = []
    for case in cases():
        results.append(measure(case, device))
        print(f"{case.name}: {results[-1]}", file=sys.stderr)
    tell({"results": results, "threads": given.threads, "machine": machine()}, given.json)


if __name__ == "__main__":
    main()
