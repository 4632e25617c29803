"""The layout and the initial numbers of a run's model, from its specification alone, without torch.

The server only ever needs these two, so it never loads torch. The client's `network` builds the torch module of the same
specification; a test holds the two layouts equal. Initial weights follow torch's defaults: uniform in +-1/sqrt(hidden) for
the recurrent layers and in +-1/sqrt(fan_in) for the linear one.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from seqfed.common.layout import Layout, Parameters
from seqfed.common.seeds import generator
from seqfed.common.spec import RunSpec

GATES: Final = {"rnn": 1, "gru": 3, "lstm": 4}  # blocks of hidden rows in each recurrent weight


def layout_of(spec: RunSpec) -> Layout:
    """The tensors of the run's model, named as torch's state_dict names them.

    >>> from seqfed.common.spec import DataSpec
    >>> layout_of(RunSpec(data=DataSpec(features=8, classes=10))).size
    52874
    """
    hidden, rows = spec.model.hidden, GATES[spec.model.kind] * spec.model.hidden
    tensors: list[tuple[str, tuple[int, ...]]] = []
    width = spec.data.features
    for layer in range(spec.model.layers):
        tensors += [
            (f"recurrent.weight_ih_l{layer}", (rows, width)),
            (f"recurrent.weight_hh_l{layer}", (rows, hidden)),
            (f"recurrent.bias_ih_l{layer}", (rows,)),
            (f"recurrent.bias_hh_l{layer}", (rows,)),
        ]
        width = hidden
    tensors += [("head.weight", (spec.data.classes, hidden)), ("head.bias", (spec.data.classes,))]
    return Layout(tuple(tensors))


def initial_parameters(spec: RunSpec) -> Parameters:
    """The model before the first round: depends on the specification and its seed only."""
    layout = layout_of(spec)
    draw = generator(spec.seed, "initial")
    bound = np.float32(spec.model.hidden**-0.5)  # every tensor's: the head's fan_in is the hidden size too
    flat = draw.random(layout.size, dtype=np.float32)
    flat *= 2 * bound
    flat -= bound
    return Parameters(layout, flat)
