"""Local training and scoring: FedAvg's ClientUpdate (McMahan et al. 2017, Algorithm 1) as a plain loop over batches."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from seqfed.client.data import Batch, Sequences
from seqfed.client.network import Network, Recurrent, detached
from seqfed.client.scoring import score
from seqfed.common.errors import TrainingFailed
from seqfed.common.metrics import add, carried, units
from seqfed.common.spec import RunSpec, TrainingSpec
from seqfed.common.views import Progress, Stage

FOCUS: Final = 2.0  # gamma of the focal loss: the value that Lin et al. 2017 found best and use throughout
SCORING_BATCH: Final = 512  # sequences scored at once,
SCORING_ROOM: Final = 1 << 24  # but no more than fill a tensor of so many numbers (64 MiB)
CUDA_LAG: Final = 16  # batches whose losses are read together: reading one makes the GPU wait for Python
TELL_S: Final = 0.5  # seconds from one word about the progress to the next: what shows it is no quicker

Loss = Callable[[Tensor, Tensor], Tensor]  # outputs and labels -> their mean loss, a scalar


class Cancelled(Exception):
    """The training was no longer wanted."""


@dataclass(frozen=True)
class Trained:
    """What a local training tells: exact sums of the loss while training, and the loop's wall time in seconds.

    The tally's examples are sequences, or tokens if the task is next_token; its loss is the one that was minimised.
    """

    tally: dict[str, int]
    seconds: float


# Training --------------------------------------------------------------------------------------------------------------


def train(
    network: Network,
    data: Sequences,
    spec: RunSpec,
    round_: int,
    draw: np.random.Generator,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Trained:
    """Train the network in place; all that is random comes from `draw`.

    round_: from 1; the learning rate's schedule is over spec.rounds. progress: told every TELL_S and at the end how many
    batches are done, and the loss of the last one that has been read. Raises TrainingFailed if the loss is not finite or the
    GPU's memory too small, Cancelled after the batch in which `cancelled()` became true.
    """
    settings, device = spec.training, network.device
    rate = learning_rate(settings, round_, spec.rounds)
    optimizer, loss_of = optimizer_of(network, settings, rate), loss_for(spec, device)
    tally = {"examples": 0, "loss": 0}
    unread: list[tuple[int, Tensor]] = []
    lag = CUDA_LAG if device.type == "cuda" else 1
    total, an_epoch = batch_count(len(data), settings), max(1, -(-len(data) // settings.batch_size))
    newest = None
    network.train()
    begun = told = time.perf_counter()
    progress(Progress(Stage.TRAINING, 0, total, 1))
    with seeded(spec, draw, device), memory_limits():
        for done, rows in enumerate(batches(len(data), settings, draw), 1):
            batch = data.batch(rows)
            optimizer.zero_grad()
            loss = _backward(network, batch, loss_of, spec)
            if settings.clip_norm is not None:
                clip_grad_norm_(network.parameters(), settings.clip_norm)
            optimizer.step()
            unread.append((_labels_of(batch, spec), loss))
            if len(unread) == lag or done == total:
                newest = _read(unread, tally, rate)
            if (now := time.perf_counter()) - told >= TELL_S or done == total:
                told = now
                progress(Progress(Stage.TRAINING, done, total, (done - 1) // an_epoch + 1, newest))
            if cancelled():
                raise Cancelled
    seconds = time.perf_counter() - begun
    return Trained({"examples": tally["examples"], **carried("loss", tally["loss"])}, seconds)


def batches(size: int, settings: TrainingSpec, draw: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """The rows of each batch: every epoch a fresh permutation, its last batch may be smaller; or so many steps of that."""
    left = batch_count(size, settings)
    while left > 0:
        order = draw.permutation(size)
        for start in range(0, size, settings.batch_size):
            if left == 0:
                return
            yield order[start : start + settings.batch_size]
            left -= 1


def batch_count(size: int, settings: TrainingSpec) -> int:
    """How many batches one round's training on `size` sequences has."""
    if settings.steps is not None and size > 0:
        return settings.steps
    return (settings.epochs or 1) * -(-size // settings.batch_size)


def learning_rate(training: TrainingSpec, round_: int, rounds: int) -> float:
    """The learning rate in this round, from 1 to `rounds`: warm-up in equal stairs, then the schedule.

    The round after the warm-up is the first at the full rate, the last round the one at `final` of it. A cosine falls as
    in Loshchilov & Hutter 2017, without restarts.

    >>> training = TrainingSpec(learning_rate=1.0, schedule="linear", warmup=1, final=0.5)
    >>> [learning_rate(training, round_, 4) for round_ in (1, 2, 3, 4)]
    [0.5, 1.0, 0.75, 0.5]
    """
    full, warmup, final = training.learning_rate, training.warmup, training.final
    if round_ <= warmup:
        return full * round_ / (warmup + 1)
    way = min(1.0, (round_ - warmup - 1) / max(1, rounds - warmup - 1))
    match training.schedule:
        case "constant":
            return full
        case "linear":
            return full * (1 - (1 - final) * way)
        case "cosine":
            return full * (final + (1 - final) * (1 + math.cos(math.pi * way)) / 2)


def _backward(network: Network, batch: Batch, loss_of: Loss, spec: RunSpec) -> Tensor:
    """Add the gradient of the batch's mean loss to the parameters' gradients; that loss, a scalar."""
    x, lengths, y = tensors_of(batch, network.device)
    size = spec.training.truncate
    if size is None or size >= x.shape[1]:
        with _arithmetic(spec, network.device):
            outputs = network(x, lengths)
        loss = loss_of(outputs.float(), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()
    # Truncated back-propagation through time (Williams & Peng 1990): one step of the optimiser a batch all the same.
    body = network.body
    assert isinstance(body, Recurrent)
    if not body.each_step:
        with _arithmetic(spec, network.device):
            outputs = body(x, lengths, size)
        loss = loss_of(outputs.float(), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()
    # Each segment's graph is freed before the next one is built: memory for `size` steps, however long the sequence.
    state, total, whole = None, _labels_of(batch, spec), torch.zeros((), device=network.device)
    for start in range(0, x.shape[1], size):
        piece = slice(start, start + size)
        with _arithmetic(spec, network.device):
            states, state = body.states(x[:, piece], None, state)
            outputs = body.read(states, None)
        state = detached(state)
        loss = loss_of(outputs.float(), y[:, piece]) * (int((batch.y[:, piece] >= 0).sum()) / total)
        loss.backward()  # type: ignore[no-untyped-call]
        whole += loss.detach()
    return whole


def _read(unread: list[tuple[int, Tensor]], tally: dict[str, int], rate: float) -> float:
    """Move these batches' losses into the tally; the last of them. Raises TrainingFailed at the first that is not finite."""
    losses = [loss for _, loss in unread]
    values = [losses[0].item()] if len(losses) == 1 else torch.stack(losses).tolist()
    for (count, _), value in zip(unread, values, strict=True):
        if not math.isfinite(value):
            raise TrainingFailed(
                f"the loss became {value} after {tally['examples']:,} examples; lower the learning rate ({rate:g})"
            )
        tally["examples"] += count
        tally["loss"] += units(value * count)
    unread.clear()
    return values[-1]


def optimizer_of(network: nn.Module, settings: TrainingSpec, rate: float) -> torch.optim.Optimizer:
    """The run's, at this learning rate."""
    parameters, decay = network.parameters(), settings.weight_decay
    match settings.optimizer:
        case "sgd":
            return torch.optim.SGD(parameters, lr=rate, momentum=settings.momentum, weight_decay=decay)
        case "adam":
            return torch.optim.Adam(parameters, lr=rate, weight_decay=decay)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)


@contextlib.contextmanager
def seeded(spec: RunSpec, draw: np.random.Generator, device: torch.device) -> Iterator[None]:
    """What a network itself draws (dropout) comes from `draw` too; torch's own generators end as they began."""
    if spec.model.dropout == 0 and spec.model.custom is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(draw.integers(1 << 63)))
        yield


@contextlib.contextmanager
def memory_limits() -> Iterator[None]:
    """Raise TrainingFailed where the GPU's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingFailed(
            "the GPU's memory is too small for a batch; lower training.batch_size or set training.truncate, "
            "or train on the processor (device = 'cpu')"
        ) from error


def _arithmetic(spec: RunSpec, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bfloat16 where the run wants it and the device is a GPU; the numbers that are trained stay float32."""
    if spec.training.mixed_precision and device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


# Losses ----------------------------------------------------------------------------------------------------------------


def loss_for(spec: RunSpec, device: torch.device) -> Loss:
    """The loss that the run minimises: the mean over the labels that are there, 0 without any.

    Its arguments are the network's outputs and the labels, as in Batch. A missing number or yes/no label (NaN) and a padded
    token (-1) count for nothing and have no gradient. Focal is Lin et al. 2017 with gamma 2; Huber's delta is 1, in the
    normalised units of the targets. Class weights multiply a label's loss, and the mean is over the sum of the weights.
    """
    kind = spec.task.kind
    loss = spec.task.loss or ("mse" if spec.task.of_numbers else "cross_entropy")
    given = spec.task.class_weights
    weights = None if given is None else torch.tensor(given, dtype=torch.float32, device=device)
    if spec.task.of_numbers:
        return lambda outputs, y: _of_numbers(loss, outputs, y)
    if kind == "multilabel":
        return lambda outputs, y: _of_labels(loss == "focal", weights, outputs, y)
    of_classes = _focal if loss == "focal" else functional.cross_entropy
    if kind == "next_token":
        return lambda outputs, y: of_classes(outputs.flatten(0, 1), y.flatten(), ignore_index=-1)
    return lambda outputs, y: of_classes(outputs, y, weights)


def _focal(logits: Tensor, y: Tensor, weights: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """Lin et al. 2017, equation 5: -w (1 - p)^2 log p of the true class's probability p. logits (N, C), y (N,)."""
    surprise = functional.cross_entropy(logits, y, ignore_index=ignore_index, reduction="none")
    share = (y != ignore_index).float() if weights is None else weights[y]
    return _mean(_focused(surprise), share)


def _of_labels(focal: bool, weights: Tensor | None, outputs: Tensor, y: Tensor) -> Tensor:
    """Each label's binary cross-entropy or focal loss; `weights` (K,) multiply that of positives. outputs, y (B, K)."""
    there = ~y.isnan()
    known = torch.where(there, y, 0.0)
    surprise = functional.binary_cross_entropy_with_logits(outputs, known, reduction="none")
    losses = _focused(surprise) if focal else surprise
    share = there.float() if weights is None else torch.where(known > 0.5, weights, 1.0) * there
    return _mean(losses, share)


def _of_numbers(kind: str, outputs: Tensor, y: Tensor) -> Tensor:
    """mse, mae or huber of the numbers that are there. outputs, y (B, K)."""
    there = ~y.isnan()
    known = torch.where(there, y, 0.0)
    match kind:
        case "mse":
            losses = functional.mse_loss(outputs, known, reduction="none")
        case "mae":
            losses = functional.l1_loss(outputs, known, reduction="none")
        case _:
            losses = functional.huber_loss(outputs, known, reduction="none")
    return _mean(losses, there.float())


def _focused(surprise: Tensor) -> Tensor:
    """(1 - p)^gamma (-log p) of -log p."""
    return (1 - torch.exp(-surprise)) ** FOCUS * surprise


def _mean(losses: Tensor, share: Tensor) -> Tensor:
    total = share.sum()
    return (losses * share).sum() / torch.where(total > 0, total, 1.0)


# Scoring ---------------------------------------------------------------------------------------------------------------


def evaluate(
    network: Network, data: Sequences, spec: RunSpec, progress: Callable[[Progress], None] = lambda _: None
) -> dict[str, int]:
    """The exact sums of `scoring.score` over all these sequences; raises TrainingFailed if a loss is not finite.

    progress: told every TELL_S how many batches are done.
    """
    tally = {"examples": 0, "loss": 0}
    total = -(-len(data) // _at_once(data, spec))
    told = time.perf_counter()
    progress(Progress(Stage.EVALUATING, 0, total))
    for done, (indices, outputs, batch) in enumerate(outputs_of(network, data, spec), 1):
        anomalies = None if data.anomalies is None else data.anomalies[indices]
        tally = add([tally, score(spec, outputs, batch, anomalies=anomalies)])
        if (now := time.perf_counter()) - told >= TELL_S:
            told = now
            progress(Progress(Stage.EVALUATING, done, total))
    return tally


def outputs_of(
    network: Network, data: Sequences, spec: RunSpec
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32], Batch]]:
    """The sequences in their order, in batches: their indices, the network's outputs as `Network.forward` has them, and they
    themselves. Raises TrainingFailed if the GPU's memory is too small.
    """
    network.eval()
    at_once = _at_once(data, spec)
    for start in range(0, len(data), at_once):
        indices = np.arange(start, min(start + at_once, len(data)))
        batch = data.batch(indices)
        x, lengths, _ = tensors_of(batch, network.device)
        with torch.no_grad(), memory_limits():
            outputs = network(x, lengths).cpu().numpy()
        yield indices, outputs, batch


def _at_once(data: Sequences, spec: RunSpec) -> int:
    """How many sequences to score at once: the most memory goes to a layer's gates, or to the outputs at each step."""
    widest = max(spec.data.inputs if spec.data.vocabulary is None else 1, 4 * spec.model.hidden)
    if spec.task.kind == "next_token":
        widest = max(widest, spec.outputs)
    longest = int(data.lengths.max(initial=1))
    return max(1, min(SCORING_BATCH, SCORING_ROOM // (longest * widest)))


def _labels_of(batch: Batch, spec: RunSpec) -> int:
    """What a batch counts for in the training's mean loss: its sequences, or its tokens to foretell."""
    return int((batch.y >= 0).sum()) if spec.task.kind == "next_token" else len(batch)


def tensors_of(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
    """x and y on the device, and the lengths."""
    lengths = None if batch.lengths is None else torch.from_numpy(batch.lengths)
    return torch.from_numpy(batch.x).to(device), lengths, torch.from_numpy(batch.y).to(device)
