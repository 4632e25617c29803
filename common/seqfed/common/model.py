"""The layout and the initial numbers of a run's model, from its specification alone, without torch.

The server only ever needs these two, so it never loads torch. The client's `network` builds the torch module of the same
specification; a test holds the two layouts equal. Initial numbers have the bounds of torch's own defaults: uniform in
+-1/sqrt(hidden) for the recurrent layers and in +-1/sqrt(fan_in) for the linear ones; but in +-0.1 for the embedding (as
Zaremba et al. 2014, section 4.1), for torch's normal(0, 1) drowns what a few local steps can add to it.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from seqfed.common.errors import ConfigError
from seqfed.common.layout import Layout, Parameters
from seqfed.common.seeds import generator
from seqfed.common.spec import RunSpec

GATES: Final = {"rnn": 1, "gru": 3, "lstm": 4}  # blocks of hidden rows in each recurrent weight


def layout_of(spec: RunSpec) -> Layout:
    """The tensors of the run's model, named as torch's state_dict names them.

    Raises ConfigError if a custom model's tensors are not filled in.

    >>> from seqfed.common.spec import DataSpec
    >>> layout_of(RunSpec(data=DataSpec(features=8, classes=10))).size
    52874
    """
    model = spec.model
    if model.custom is not None:
        if model.tensors is None:
            raise ConfigError(f"model.tensors of '{model.custom}' are not known; `seqfed submit` fills them in")
        return Layout(model.tensors)
    tensors: list[tuple[str, tuple[int, ...]]] = []
    width = spec.data.inputs
    if spec.data.vocabulary is not None:
        tensors.append(("embedding.weight", (width, model.embedding)))
        width = model.embedding
    rows, state = GATES[model.kind] * model.hidden, model.projection or model.hidden
    directions = ("", "_reverse") if model.bidirectional else ("",)
    for layer in range(model.layers):
        for direction in directions:
            place = f"l{layer}{direction}"
            tensors += [
                (f"recurrent.weight_ih_{place}", (rows, width)),
                (f"recurrent.weight_hh_{place}", (rows, state)),
                (f"recurrent.bias_ih_{place}", (rows,)),
                (f"recurrent.bias_hh_{place}", (rows,)),
            ]
            if model.projection is not None:
                tensors.append((f"recurrent.weight_hr_{place}", (model.projection, model.hidden)))
        width = state * len(directions)
    if model.pooling == "attention":
        tensors += [("attention.weight", (1, width)), ("attention.bias", (1,))]
    tensors += [("head.weight", (spec.outputs, width)), ("head.bias", (spec.outputs,))]
    return Layout(tuple(tensors))


def initial_parameters(spec: RunSpec) -> Parameters:
    """The model before the first round: depends on the specification and its seed only.

    Of a custom model only names and shapes are known. Its matrices are uniform in +-1/sqrt(fan_in), its vectors 0, but 1
    where they are a norm's: named `...weight` or `...running_var`. Other first numbers come with `seqfed submit --initial`.
    """
    layout = layout_of(spec)
    draw = generator(spec.seed, "initial")
    flat = np.empty(layout.size, np.float32)
    # Part by part in the layout's order: the stream of numbers is the same as in one draw, without a second vector's memory.
    for name, shape, part in layout.parts():
        numbers = flat[part]
        if spec.model.custom is not None and len(shape) < 2:
            numbers[:] = name.endswith(("weight", "running_var"))
        else:
            embedding = spec.model.custom is None and name == "embedding.weight"
            bound = np.float32(0.1 if embedding else _fan_in(spec, layout, name, shape) ** -0.5)
            draw.random(out=numbers, dtype=np.float32)
            numbers *= 2 * bound
            numbers -= bound
    return Parameters(layout, flat)


def _fan_in(spec: RunSpec, layout: Layout, name: str, shape: tuple[int, ...]) -> int:
    """Of a linear layer, also for its bias; of the recurrent layers their hidden size, as torch has it."""
    if spec.model.custom is not None:
        return max(1, math.prod(shape[1:]))
    layer = name.partition(".")[0]
    return spec.model.hidden if layer == "recurrent" else dict(layout.tensors)[f"{layer}.weight"][1]
