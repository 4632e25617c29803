"""DP-SGD: a training whose every step hides each single sequence (Abadi et al. 2016, "Deep learning with differential privacy").

    each sequence comes into a batch by itself, with the same probability; its gradient is clipped to C; their sum gets Gaussian
    noise of deviation z C, and is divided by the expected size of a batch.

Single sequences' gradients are Opacus's (Yousefpour et al. 2021), whose DPLSTM, DPGRU and DPRNN compute what our networks do, of
the same tensors. Who is in a batch and the noise are of the operating system's randomness: the run's seed is no secret, and
Opacus's own secure mode needs torchcsprng, of which there is no build for the torch of today. The sum is in float64 and goes to a
grid before the noise.
"""

from __future__ import annotations

import importlib
import math
import re
import time
import warnings
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from seqfed.client.data import Batch, Sequences
from seqfed.client.network import Network, Recurrent, State
from seqfed.client.training import (
    TELL_S,
    Cancelled,
    Loss,
    Trained,
    learning_rate,
    loss_for,
    memory_limits,
    optimizer_of,
    seeded,
    tensors_of,
)
from seqfed.common.dp import accounting, noise
from seqfed.common.errors import ConfigError, TrainingFailed
from seqfed.common.metrics import carried, units
from seqfed.common.spec import RunSpec
from seqfed.common.views import Progress, Stage

CELL: Final = re.compile(r"(l\d+(?:_reverse)?)\.(ih|hh)\.(weight|bias)$")  # as Opacus has what is weight_ih_l0 in torch
SINGLE: Final = "grad_sample"  # Opacus's attribute of a parameter
ROOM: Final = 1 << 26  # numbers in the gradients of the sequences looked at at once (256 MiB)


def train(
    network: Network,
    data: Sequences,
    spec: RunSpec,
    round_: int,
    key: bytes,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Trained:
    """Train the network in place. key: fresh (`noise.fresh_key`), of all batches and noise.

    The tally has the loss, and the progress too, only where the run makes such numbers public; how many batches there are tells
    how many sequences, so progress is in per cent. Raises ConfigError for what cannot be trained so, and without the extra
    seqfed[dp]; TrainingFailed; Cancelled as `training.train`.
    """
    given, settings, device = spec.privacy.dp, spec.training, network.device
    assert given is not None  # or nobody asked for this
    body = private_body(spec).to(device)
    _copy(network.body, body)
    wrapped = _opacus().GradSampleModule(body, loss_reduction="sum")
    chance, steps = accounting.example_batches(spec, len(data))
    multiplier = accounting.noise_multiplier(spec, len(data))
    assert multiplier is not None  # it is known for so many sequences
    rate, expected, clip = learning_rate(settings, round_, spec.rounds), chance * len(data), given.first_clip
    optimizer, loss_of = optimizer_of(body, settings, rate), loss_for(spec, device)
    named = tensors_by_name(body)
    parameters = [named[name] for name, _ in network.layout.tensors]
    at_once = max(1, ROOM // sum(one.numel() for one in parameters))
    batches, tally, newest = noise.Stream(noise.derived(key, "batches")), {"examples": 0, "loss": 0}, None
    dropout = np.random.default_rng(np.frombuffer(noise.derived(key, "dropout"), np.uint32))
    wrapped.train()
    begun = told = time.perf_counter()
    progress(Progress(Stage.TRAINING, 0, 100, 1))
    with seeded(spec, dropout, device), memory_limits(), warnings.catch_warnings():
        # Of Opacus's hooks on the first layer, whose input needs no gradient.
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        for step in range(1, steps + 1):
            rows = drawn(len(data), chance, batches)
            sums = [torch.zeros(one.shape, dtype=torch.float64, device=device) for one in parameters]
            for first in range(0, len(rows), at_once):
                batch = data.batch(_longest_first(data, rows[first : first + at_once]))
                losses = _add_clipped(wrapped, parameters, sums, batch, loss_of, spec, clip)
                if given.is_public:
                    newest = _count(losses, tally)
            flat = torch.cat([one.flatten() for one in sums]).cpu().numpy()
            _require_finite(flat, rate)
            noisy = noise.released(flat, multiplier * clip * noise.ROUNDED, noise.derived(key, "noise", step))
            _set_gradients(parameters, noisy / np.float32(expected))
            if settings.clip_norm is not None:
                clip_grad_norm_(parameters, settings.clip_norm)
            optimizer.step()
            if (now := time.perf_counter()) - told >= TELL_S or step == steps:
                told = now
                progress(Progress(Stage.TRAINING, 100 * step // steps, 100, 1, newest))
            if cancelled():
                raise Cancelled
    _copy(body, network.body)
    seconds = time.perf_counter() - begun
    return Trained({"examples": tally["examples"], **carried("loss", tally["loss"])}, seconds)


def private_body(spec: RunSpec) -> Recurrent:
    """The network's body with layers whose single gradients Opacus can tell, and the same tensors (`tensors_by_name`).

    Raises ConfigError for what it cannot: custom modules, projections, truncated back-propagation.
    """
    alone = "privacy.dp.mode = 'example' needs each sequence's own gradient"
    if spec.model.custom is not None:
        raise ConfigError(f"model.custom: {alone}, which only the built-in models have; drop custom, or choose a mode")
    if spec.model.projection is not None:
        raise ConfigError(f"model.projection: {alone}, and Opacus's LSTM has no projection; drop it")
    if spec.training.truncate is not None:
        raise ConfigError(f"training.truncate: {alone}, through all of its steps; drop it")
    with torch.random.fork_rng(devices=[]):
        return _private_class()(spec)


def drawn(size: int, chance: float, stream: noise.Stream) -> NDArray[np.int64]:
    """The rows of a batch: each of 0 to size - 1 by itself with this probability."""
    found = []
    for first in range(0, size, noise.PIECE):
        draws = stream.uniform(np.empty(min(noise.PIECE, size - first)))
        found.append(first + np.flatnonzero(draws < chance))
    return np.concatenate(found)


def _private_class() -> type[Recurrent]:
    layers = _opacus().layers

    class Private(Recurrent):
        """As Recurrent."""

        def __init__(self, spec: RunSpec) -> None:
            super().__init__(spec)
            model, known = spec.model, self.recurrent
            made = {"lstm": layers.DPLSTM, "gru": layers.DPGRU, "rnn": layers.DPRNN}[model.kind]
            more = {"nonlinearity": model.nonlinearity} if model.kind == "rnn" else {}
            self.recurrent = made(
                known.input_size,
                known.hidden_size,
                known.num_layers,
                batch_first=True,
                dropout=known.dropout,
                bidirectional=known.bidirectional,
                **more,
            )

        def states(self, x: Tensor, lengths: Tensor | None, state: State = None) -> tuple[Tensor, State]:
            if lengths is None or not self.recurrent.bidirectional:
                return super().states(x, lengths, state)
            # Sorted beforehand: a packing that sorts would give the layers' gradients in another order than the others'.
            steps = x if self.embedding is None else self.embedding(x)
            packed = pack_padded_sequence(steps, lengths.cpu(), batch_first=True)
            states, after = self.recurrent(packed, state)
            return pad_packed_sequence(states, batch_first=True, total_length=x.shape[1])[0], after

    return Private


def _add_clipped(
    wrapped: torch.nn.Module,
    parameters: list[Tensor],
    sums: list[Tensor],
    batch: Batch,
    loss_of: Loss,
    spec: RunSpec,
    clip: float,
) -> list[float]:
    """sums += the batch's gradients, each clipped; the losses of its sequences."""
    x, lengths, y = tensors_of(batch, sums[0].device)
    outputs = wrapped(x, lengths).float()
    losses = torch.stack([_loss(outputs[at : at + 1], y[at : at + 1], loss_of, spec) for at in range(len(x))])
    torch.autograd.backward(losses.sum())
    singles: list[Tensor | None] = [getattr(one, SINGLE, None) for one in parameters]
    squares = torch.zeros(len(x), dtype=torch.float64, device=losses.device)
    for single in singles:
        if single is not None:
            squares += single.flatten(1).double().square().sum(1)
    factors = clip / squares.sqrt().clamp(min=clip)
    for total, single, parameter in zip(sums, singles, parameters, strict=True):
        if single is not None:
            total.add_(torch.einsum("b,b...->...", factors, single.double()))
        parameter.grad = None
        setattr(parameter, SINGLE, None)
    return losses.detach().tolist()


def _loss(outputs: Tensor, y: Tensor, loss_of: Loss, spec: RunSpec) -> Tensor:
    """One sequence's. outputs, y (1, ...)."""
    if spec.task.kind == "next_token" and not bool((y >= 0).any()):
        return outputs.sum() * 0.0
    loss, weights = loss_of(outputs, y), spec.task.class_weights
    # the mean over one weight is without it
    return loss * weights[int(y[0])] if weights is not None and spec.task.kind == "classification" else loss


def _count(losses: list[float], tally: dict[str, int]) -> float:
    tally["examples"] += len(losses)
    tally["loss"] += sum(map(units, losses))
    return math.fsum(losses) / len(losses)


def _require_finite(flat: NDArray[np.float64], rate: float) -> None:
    if not np.isfinite(flat).all():
        raise TrainingFailed(f"a gradient is not finite; lower the learning rate ({rate:g})")


def _set_gradients(parameters: list[Tensor], flat: NDArray[np.float32]) -> None:
    start, whole = 0, torch.from_numpy(flat)
    for one in parameters:
        one.grad = whole[start : start + one.numel()].view(one.shape).to(one.device)
        start += one.numel()


def _longest_first(data: Sequences, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return rows[np.argsort(-data.lengths[rows], kind="stable")]


def tensors_by_name(body: torch.nn.Module) -> dict[str, Tensor]:
    """A body's parameters by their names in the network's layout, whichever of the two bodies it is."""
    return {CELL.sub(r"\3_\2_\1", name): tensor for name, tensor in body.named_parameters()}


def _copy(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """The numbers of one body into the other."""
    numbers = tensors_by_name(source)
    with torch.no_grad():
        for name, tensor in tensors_by_name(target).items():
            tensor.copy_(numbers[name])


def _opacus() -> Any:
    try:
        opacus = importlib.import_module("opacus")
    except ImportError as error:
        raise ConfigError("privacy.dp.mode = 'example' needs Opacus; pip install 'seqfed[dp]'") from error
    return opacus
