"""FedAvg as McMahan et al. 2017 write it, Algorithm 1, as plain loops: slow, obvious, and sharing no arithmetic with seqfed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from seqfed.client.data import Sequences
from seqfed.common.model import initial_parameters
from seqfed.common.seeds import generator
from seqfed.common.spec import RunSpec

Weights = dict[str, NDArray[np.float32]]


def fedavg(spec: RunSpec, data: Mapping[str, Sequences]) -> list[float]:
    """The global model's numbers after spec.rounds rounds with every client in every round."""
    torch.set_num_threads(1)
    start = initial_parameters(spec)
    model = {name: array.copy() for name, array in start.layout.views(start.flat).items()}
    for round_ in range(1, spec.rounds + 1):
        returned = {client: train(spec, model, round_, client, own) for client, own in data.items()}
        weights = {c: len(data[c]) if spec.aggregation.weighting == "examples" else 1 for c in data}
        for name, array in model.items():
            flat = array.reshape(-1)
            for place in range(len(flat)):
                total = 0
                for client, local in returned.items():
                    delta = np.float32(local[name].reshape(-1)[place] - flat[place])
                    total += round(float(delta) * weights[client] * 2**30)
                flat[place] = np.float32(float(flat[place]) + float(total) / (sum(weights.values()) * 2**30))
    return [float(number) for array in model.values() for number in array.reshape(-1)]


def train(spec: RunSpec, model: Weights, round_: int, client: str, data: Sequences) -> Weights:
    """One client's local training with torch alone."""
    recurrent = nn.LSTM(spec.data.numbers, spec.model.hidden, spec.model.layers, batch_first=True)
    head = nn.Linear(spec.model.hidden, spec.data.class_count)
    named = {f"recurrent.{name}": one for name, one in recurrent.named_parameters()}
    named |= {f"head.{name}": one for name, one in head.named_parameters()}
    with torch.no_grad():
        for name, one in named.items():
            one.copy_(torch.from_numpy(model[name]))
    optimizer = torch.optim.Adam(named.values(), lr=spec.training.learning_rate)
    draw = generator(spec.seed, round_, client, "batches")
    x, y = data.rows.reshape(len(data), -1, spec.data.numbers), data.y
    assert y is not None
    for _ in range(spec.training.epochs or 1):
        order = draw.permutation(len(data))
        for first in range(0, len(data), spec.training.batch_size):
            rows = order[first : first + spec.training.batch_size]
            optimizer.zero_grad()
            states, _ = recurrent(torch.from_numpy(x[rows]))
            loss = nn.functional.cross_entropy(head(states[:, -1]), torch.from_numpy(y[rows]))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return {name: one.detach().numpy().copy() for name, one in named.items()}
