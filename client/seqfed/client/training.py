"""Local training and scoring: FedAvg's ClientUpdate (McMahan et al. 2017, Algorithm 1) as a plain loop over batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from seqfed.client.data import Sequences
from seqfed.client.network import SequenceClassifier
from seqfed.common.errors import TrainingFailed
from seqfed.common.metrics import units
from seqfed.common.spec import TrainingSpec

SCORING_BATCH = 512  # sequences scored at once


class Cancelled(Exception):
    """The training was no longer wanted."""


@dataclass(frozen=True)
class Trained:
    """What a local training tells: exact sums of the loss while training, and the loop's wall time in seconds."""

    tally: dict[str, int]
    seconds: float


def train(
    network: SequenceClassifier,
    data: Sequences,
    settings: TrainingSpec,
    draw: np.random.Generator,
    cancelled: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train the network in place; batches are drawn from `draw` alone.

    Raises TrainingFailed if the loss is not finite, Cancelled after the batch in which `cancelled()` became true.
    """
    x, y, lengths = _tensors(data)
    optimizer = _optimizer(network, settings)
    examples, loss_sum = 0, 0
    network.train()
    begun = time.perf_counter()
    for rows in batches(len(data), settings, draw):
        chosen = torch.from_numpy(rows)
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(x[chosen], _chosen(lengths, chosen)), y[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingFailed(
                f"the loss became {value} after {examples:,} examples; lower the learning rate ({settings.learning_rate:g})"
            )
        examples += len(rows)
        loss_sum += units(value * len(rows))
        if cancelled():
            raise Cancelled
    return Trained({"examples": examples, "loss": loss_sum}, time.perf_counter() - begun)


def batches(size: int, settings: TrainingSpec, draw: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """The rows of each batch: every epoch a fresh permutation, its last batch may be smaller; or so many steps of that."""
    left = settings.steps if settings.steps is not None else (settings.epochs or 1) * -(-size // settings.batch_size)
    while left > 0:
        order = draw.permutation(size)
        for start in range(0, size, settings.batch_size):
            if left == 0:
                return
            yield order[start : start + settings.batch_size]
            left -= 1


@torch.no_grad()
def evaluate(network: SequenceClassifier, data: Sequences) -> dict[str, int]:
    """The exact sums of the network's loss and correct answers on these data; all zero if there are none.

    Raises TrainingFailed if a sequence's loss is not finite.
    """
    x, y, lengths = _tensors(data)
    network.eval()
    correct, loss_sum = 0, 0
    for start in range(0, len(data), SCORING_BATCH):
        rows = torch.arange(start, min(start + SCORING_BATCH, len(data)))
        logits = network(x[rows], _chosen(lengths, rows))
        losses = functional.cross_entropy(logits, y[rows], reduction="none")
        if not losses.isfinite().all():
            raise TrainingFailed("the model's loss on the validation data is not finite; lower the run's learning rate")
        # Sequence by sequence in whole units, so that no sum rounds. One sequence's loss may still differ by a unit between
        # batches of different sizes, for which torch's kernels add in another order.
        loss_sum += sum(units(value) for value in losses.tolist())
        correct += int((logits.argmax(dim=1) == y[rows]).sum())
    return {"examples": len(data), "loss": loss_sum, "correct": correct}


def _optimizer(network: SequenceClassifier, settings: TrainingSpec) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), lr=settings.learning_rate, momentum=settings.momentum)
    return torch.optim.Adam(network.parameters(), lr=settings.learning_rate)


def _tensors(data: Sequences) -> tuple[Tensor, Tensor, Tensor | None]:
    lengths = None if data.lengths is None else torch.from_numpy(data.lengths)
    return torch.from_numpy(data.x), torch.from_numpy(data.y), lengths


def _chosen(lengths: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if lengths is None else lengths[rows]
