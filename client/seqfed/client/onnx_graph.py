"""A run's network as an ONNX graph, written operator by operator from the specification and the flat vector, without torch.

ONNX has the same recurrent layers as operators of their own, with the lengths of padded sequences, so nothing is traced: the
graph is small, reads like the model, and both its axes, batch and steps, are free. Sources: the operators RNN, LSTM and GRU
of ONNX's specification, and the formulas in the documentation of torch.nn.RNN, LSTM and GRU, for the order of the gates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from seqfed.client.scoring import own_units
from seqfed.common.errors import CheckpointError, ConfigError
from seqfed.common.layout import Parameters
from seqfed.common.spec import RunSpec

if TYPE_CHECKING:
    import onnx

OPSET: Final = 17  # of 2022: every runtime that is still kept reads it
IR_VERSION: Final = 8  # which goes with it
LARGEST: Final = (1 << 31) - (1 << 20)  # bytes of weights: a protobuf message ends at 2 GiB, graph and all
GATES: Final = {  # ONNX's order of the gates, as places in torch's
    "rnn": (0,),
    "lstm": (0, 3, 1, 2),  # torch: input, forget, cell, output; ONNX: input, output, forget, cell
    "gru": (1, 0, 2),  # torch: reset, update, new; ONNX: update, reset, hidden
}


def load_onnx() -> Any:
    """The onnx package; raises ConfigError with the remedy if it is not installed."""
    try:
        import onnx
    except ImportError:
        raise ConfigError("ONNX needs the package onnx; install it: pip install 'seqfed[onnx]'") from None
    return onnx


class _Graph:
    """The nodes and constants of a graph as they are added; every call returns the name of its result."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: NDArray[Any]) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, operator: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        name = out or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=f"make_{name}", **attributes))
        return name

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        name = "ints_" + "_".join(str(value).replace("-", "minus") for value in values)
        if not any(one.name == name for one in self.constants):
            self.constant(name, np.array(values, np.int64))
        return name


def build(
    spec: RunSpec, parameters: Parameters, shape: Sequence[str | int], metadata: Mapping[str, str]
) -> onnx.ModelProto:
    """The run's network with these numbers, between raw inputs and outputs of this shape, as metadata's description has it.

    Raises ConfigError if the onnx package is missing or a part of the model has no ONNX operator, CheckpointError if the
    model is larger than one ONNX file.
    """
    onnx = load_onnx()
    from onnx import TensorProto, helper

    if spec.model.projection is not None:
        raise ConfigError(
            "ONNX's LSTM has no projection (model.projection); export this run with --format torchscript or safetensors"
        )
    if parameters.layout.nbytes > LARGEST:
        raise CheckpointError(
            f"the model has {parameters.layout.nbytes:,} bytes, and one ONNX file holds {LARGEST:,}; "
            "export it with --format torchscript or safetensors"
        )
    graph = _Graph()
    weights = parameters.layout.views(parameters.flat)
    steps = _tokens(graph, weights) if spec.data.vocabulary is not None else _numbers(graph, spec)
    states, last = _recurrent(graph, spec, weights, steps)
    if spec.task.kind == "next_token":
        read = states
    else:
        read = last if spec.model.pooling == "last" else _pooled(graph, spec, weights, states)
    name = _outputs(graph, spec, weights, read)

    tokens = spec.data.vocabulary is not None
    width: list[str | int] = [] if tokens else [spec.data.numbers + sum(map(len, spec.data.categories.values()))]
    kind = TensorProto.INT64 if tokens else TensorProto.FLOAT
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "network",
            [
                helper.make_tensor_value_info("x", kind, ["batch", "steps", *width]),
                helper.make_tensor_value_info("lengths", TensorProto.INT64, ["batch"]),
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))],
            initializer=graph.constants,
            doc_string=metadata.get("description", ""),
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="seqfed",
    )
    helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    return model


def _tokens(graph: _Graph, weights: Mapping[str, NDArray[np.float32]]) -> str:
    return graph.add("Gather", graph.constant("embedding.weight", weights["embedding.weight"]), "x", axis=0)


def _numbers(graph: _Graph, spec: RunSpec) -> str:
    """Raw columns to what the network was trained on: normalised, missing ones as the run says, categories as they are."""
    data = spec.data
    plain = data.missing == "refuse"
    if plain and data.mean is None and data.scale is None:
        return "x"
    numbers, rest = "x", None
    if data.categories:
        first, axis = graph.ints(data.numbers), graph.ints(2)
        numbers = graph.add("Slice", "x", graph.ints(0), first, axis)
        rest = graph.add("Slice", "x", first, graph.ints(np.iinfo(np.int64).max), axis)
    there = None if plain else graph.add("Not", graph.add("IsNaN", numbers))
    if data.mean is not None:
        numbers = graph.add("Sub", numbers, graph.constant("mean", np.array(data.mean, np.float32)))
    if data.scale is not None:
        numbers = graph.add("Div", numbers, graph.constant("scale", np.array(data.scale, np.float32)))
    parts = [numbers]
    if there is not None:
        parts = [graph.add("Where", there, numbers, graph.constant("zero", np.zeros((), np.float32)))]
    if data.missing == "mask" and there is not None:
        parts.append(graph.add("Cast", there, to=1))  # 1: float32
    if rest is not None:
        parts.append(rest)
    return parts[0] if len(parts) == 1 else graph.add("Concat", *parts, axis=2)


def _recurrent(graph: _Graph, spec: RunSpec, weights: Mapping[str, NDArray[np.float32]], steps: str) -> tuple[str, str]:
    """The last layer's states (batch, steps, width) and each direction's last one (batch, width); width: directions * hidden."""
    from onnx import helper

    model = spec.model
    ends = ["", "_reverse"] if model.bidirectional else [""]
    lengths = graph.add("Cast", "lengths", to=6)  # 6: int32, which the recurrent operators want
    states = graph.add("Transpose", steps, perm=[1, 0, 2])
    attributes: dict[str, Any] = {
        "hidden_size": model.hidden,
        "direction": "bidirectional" if model.bidirectional else "forward",
    }
    if model.kind == "rnn":
        attributes["activations"] = [{"tanh": "Tanh", "relu": "Relu"}[model.nonlinearity]] * len(ends)
    if model.kind == "gru":
        attributes["linear_before_reset"] = 1  # torch resets after the hidden state's linear map

    def gates(name: str, layer: int, end: str) -> NDArray[np.float32]:
        blocks = np.split(weights[f"recurrent.{name}_l{layer}{end}"], len(GATES[model.kind]))
        return np.concatenate([blocks[place] for place in GATES[model.kind]])

    last = ""  # there is at least one layer
    for layer in range(model.layers):
        w = graph.constant(f"w_{layer}", np.stack([gates("weight_ih", layer, end) for end in ends]))
        r = graph.constant(f"r_{layer}", np.stack([gates("weight_hh", layer, end) for end in ends]))
        biases = [np.concatenate([gates("bias_ih", layer, end), gates("bias_hh", layer, end)]) for end in ends]
        b = graph.constant(f"b_{layer}", np.stack(biases))
        out, last = (
            f"states_{layer}",
            f"last_{layer}",
        )  # (steps, directions, batch, hidden), (directions, batch, hidden)
        graph.nodes.append(
            helper.make_node(
                model.kind.upper(), [states, w, r, b, lengths], [out, last], name=f"recurrent_{layer}", **attributes
            )
        )
        # (steps, batch, directions * hidden), for the next layer; 0 keeps an axis
        states = graph.add("Reshape", graph.add("Transpose", out, perm=[0, 2, 1, 3]), graph.ints(0, 0, -1))
    last = graph.add("Reshape", graph.add("Transpose", last, perm=[1, 0, 2]), graph.ints(0, -1))
    return graph.add("Transpose", states, perm=[1, 0, 2]), last


def _pooled(graph: _Graph, spec: RunSpec, weights: Mapping[str, NDArray[np.float32]], states: str) -> str:
    """The mean, plain or learnt, of each sequence's real states, (batch, directions * hidden)."""
    zero, one = graph.constant("int_0", np.zeros((), np.int64)), graph.constant("int_1", np.ones((), np.int64))
    place = graph.add("Range", zero, graph.add("Gather", graph.add("Shape", states), one), one)
    lengths = graph.add("Unsqueeze", "lengths", graph.ints(1))
    there = graph.add("Less", place, lengths)  # (batch, steps)
    if spec.model.pooling == "mean":
        weight = graph.add("Div", graph.add("Cast", there, to=1), graph.add("Cast", lengths, to=1))
    else:
        score = graph.add("Squeeze", _linear(graph, weights, "attention", states), graph.ints(2))
        never = graph.constant("never", np.array(-np.inf, np.float32))
        weight = graph.add("Softmax", graph.add("Where", there, score, never), axis=1)
    # (batch, 1, steps) @ (batch, steps, states)
    return graph.add(
        "Squeeze", graph.add("MatMul", graph.add("Unsqueeze", weight, graph.ints(1)), states), graph.ints(1)
    )


def _outputs(graph: _Graph, spec: RunSpec, weights: Mapping[str, NDArray[np.float32]], pooled: str) -> str:
    """The name of the graph's result: "logits", or "values" in the data's own units."""
    outputs = _linear(graph, weights, "head", pooled)
    if not spec.task.of_numbers:
        return graph.add("Identity", outputs, out="logits")
    mean, scale = own_units(spec)
    if (scale != 1).any():
        outputs = graph.add("Mul", outputs, graph.constant("output_scale", scale.astype(np.float32)))
    if mean.any():
        outputs = graph.add("Add", outputs, graph.constant("output_mean", mean.astype(np.float32)))
    if spec.task.kind != "regression":
        outputs = graph.add("Reshape", outputs, graph.ints(0, spec.task.horizon, spec.data.numbers))
    return graph.add("Identity", outputs, out="values")


def _linear(graph: _Graph, weights: Mapping[str, NDArray[np.float32]], name: str, states: str) -> str:
    product = graph.add("MatMul", states, graph.constant(f"{name}.weight", weights[f"{name}.weight"].T))
    return graph.add("Add", product, graph.constant(f"{name}.bias", weights[f"{name}.bias"]))
