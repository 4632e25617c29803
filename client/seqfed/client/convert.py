"""An exported model for use without seqfed: TorchScript or ONNX, with normalisation inside.

It takes what stands in the data (numbers in their columns' own units, token ids) and the lengths of padded sequences, and
gives logits, or numbers in the data's own units. What each axis means, the run's specification and its digest go along: as
metadata of an ONNX file, and in the file `seqfed.json` inside a TorchScript one.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from seqfed.client import onnx_graph
from seqfed.client.model_file import Model, read_model
from seqfed.client.network import network_for
from seqfed.client.scoring import own_units
from seqfed.common.checkpoint import replacing
from seqfed.common.errors import ConfigError
from seqfed.common.spec import RunSpec

Format = Literal["torchscript", "onnx"]
SIZES: Final = ((1, 1), (3, 5))  # batch and steps at which what was traced is compared with the network


def require(kind: Format) -> None:
    """Raise ConfigError with the remedy if a package is missing without which nothing becomes a file of this kind."""
    if kind == "onnx":
        onnx_graph.load_onnx()


def convert(model: Path, out: Path, kind: Format, allow_custom: Collection[str] = ()) -> int:
    """Write the exported safetensors file `model` as `out` in another format, whole or not at all; its size in bytes.

    Raises CheckpointError if `model` is no exported model, ConfigError for a custom model that is not allowed or does not
    convert, and for ONNX if its package is missing or the model has a part that ONNX lacks.
    """
    found = read_model(model)
    metadata = {**found.metadata, "description": describe(found.spec)}
    if kind == "torchscript":
        data = _torchscript(_usable(found, allow_custom), found.spec, metadata)
    elif found.spec.model.custom is not None:
        data = _onnx_of_custom(_usable(found, allow_custom), found.spec, metadata)
    else:
        data = onnx_graph.build(found.spec, found.parameters, output_shape(found.spec), metadata).SerializeToString()
    with replacing(out) as file:
        file.write(data)
    return len(data)


def describe(spec: RunSpec) -> str:
    """What goes in and what comes out, in words; this text stands in the file."""
    data = spec.data
    if data.vocabulary is not None:
        x = (
            "x: int64 (batch, steps), token ids: 1 for the first of data.vocabulary in the specification, and so on, "
            "0 for an unknown one"
        )
    else:
        named = f": {', '.join(data.columns)}" if data.columns is not None else ""
        x = f"x: float32 (batch, steps, {raw_width(spec)}), the {data.numbers} numbers of a step in their own units{named}"
        for name, values in data.categories.items():
            x += f"; then for '{name}' 1 where it is the step's, else 0, of: {', '.join(values)}"
        match data.missing:
            case "mask" | "mean":
                x += "; NaN where a number is missing"
            case "forward":
                x += "; the entity's last number before it in place of a missing one, NaN if there is none"
    shape = output_shape(spec)
    axes = ", ".join(map(str, shape))
    match spec.task.kind:
        case "classification":
            said = f"logits: float32 ({axes}); their softmax gives the classes' probabilities"
        case "multilabel":
            said = f"logits: float32 ({axes}); the sigmoid of each gives its label's probability"
        case "next_token":
            said = f"logits: float32 ({axes}); at each step, the softmax gives the next token's probabilities"
        case "regression":
            said = f"values: float32 ({axes}), in the labels' own units"
        case _:
            said = f"values: float32 ({axes}), the numbers of the steps that follow, in their own units"
    return f"{x}. lengths: int64 (batch,), each sequence's steps before padding, from 1. {said}."


def raw_width(spec: RunSpec) -> int:
    """Numbers a step that the converted model takes: columns, then one a value of each category."""
    return spec.data.numbers + sum(map(len, spec.data.categories.values()))


def output_shape(spec: RunSpec) -> tuple[str | int, ...]:
    """The axes of what a converted model gives."""
    match spec.task.kind:
        case "next_token":
            return ("batch", "steps", spec.outputs)
        case "forecast" | "anomaly":
            return ("batch", spec.task.horizon, spec.data.numbers)
        case _:
            return ("batch", spec.outputs)


class Usable(nn.Module):
    """A network between raw numbers and outputs in the data's own units: `describe` in torch."""

    def __init__(self, network: nn.Module, spec: RunSpec) -> None:
        super().__init__()
        self.network = network
        self._tokens = spec.data.vocabulary is not None
        self._numbers = spec.data.numbers
        self._missing = spec.data.missing
        self._steps_ahead = spec.task.horizon if spec.task.kind in {"forecast", "anomaly"} else 0
        self._of_numbers = spec.task.of_numbers
        data = spec.data
        self.mean = nn.Buffer(torch.tensor(data.mean or [0.0] * data.numbers))
        self.scale = nn.Buffer(torch.tensor(data.scale or [1.0] * data.numbers))
        if self._of_numbers:
            mean, scale = own_units(spec)
            self.out_mean = nn.Buffer(torch.from_numpy(mean).float())
            self.out_scale = nn.Buffer(torch.from_numpy(scale).float())

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """As `describe` says."""
        outputs: Tensor = self.network(x if self._tokens else self._normalised(x), lengths)
        if self._of_numbers:
            outputs = outputs * self.out_scale + self.out_mean
        return outputs.reshape(-1, self._steps_ahead, self._numbers) if self._steps_ahead else outputs

    def _normalised(self, x: Tensor) -> Tensor:
        raw = x[:, :, : self._numbers]
        parts = [(raw - self.mean) / self.scale]
        if self._missing != "refuse":
            parts[0] = parts[0].masked_fill(raw.isnan(), 0)
        if self._missing == "mask":
            parts.append((~raw.isnan()).to(x.dtype))
        return torch.cat([*parts, x[:, :, self._numbers :]], 2)


def _usable(model: Model, allow_custom: Collection[str]) -> Usable:
    network = network_for(model.spec, allow_custom=allow_custom)
    network.load(model.parameters)
    return Usable(network, model.spec).eval()


def example(spec: RunSpec, batch: int, steps: int, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random x and lengths that fit the model; the longest sequence has all the steps."""
    if spec.data.vocabulary is not None:
        x = torch.from_numpy(draw.integers(0, spec.data.inputs, (batch, steps)))
    else:
        x = torch.from_numpy(draw.standard_normal((batch, steps, raw_width(spec)), np.float32))
    lengths = draw.integers(1, steps + 1, batch)
    lengths[draw.integers(batch)] = steps
    return x, torch.from_numpy(lengths)


@torch.no_grad()
def _torchscript(usable: Usable, spec: RunSpec, metadata: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with _unwarned():
        try:
            traced: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
                usable, example(spec, 2, 3, np.random.default_rng(0)), check_trace=False
            )
            torch.jit.save(traced, buffer, _extra_files={"seqfed.json": json.dumps(metadata).encode()})
        except Exception as error:
            raise ConfigError(
                f"model.custom = '{spec.model.custom}' does not convert to TorchScript: {error}; "
                "export it with --format safetensors"
            ) from error
        _compare(usable, spec, lambda x, lengths: np.asarray(traced(x, lengths)))
    return buffer.getvalue()


@torch.no_grad()
def _onnx_of_custom(usable: Usable, spec: RunSpec, metadata: dict[str, str]) -> bytes:
    """A person's own module, through torch's exporter: of its operators only torch knows."""
    onnx = onnx_graph.load_onnx()
    try:
        import onnxscript  # noqa: F401 -- torch's exporter writes with it
    except ImportError:
        raise ConfigError(
            "ONNX of a custom model needs the package onnxscript; install it: pip install 'seqfed[onnx]'"
        ) from None
    from onnx.reference import ReferenceEvaluator

    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    with _unwarned():
        try:
            program = torch.onnx.export(
                usable,
                example(spec, 2, 3, np.random.default_rng(0)),
                input_names=["x", "lengths"],
                output_names=["values" if spec.task.of_numbers else "logits"],
                dynamic_shapes=({0: batch, 1: steps}, {0: batch}),
                dynamo=True,
                verbose=False,
            )
        except Exception as error:
            raise ConfigError(
                f"model.custom = '{spec.model.custom}' does not convert to ONNX: {error}; "
                "export it with --format torchscript or safetensors"
            ) from error
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, metadata)
    evaluator = ReferenceEvaluator(model)

    def run(x: Tensor, lengths: Tensor) -> Any:
        [found] = evaluator.run(None, {"x": x.numpy(), "lengths": lengths.numpy()})
        return found

    _compare(usable, spec, run)
    return bytes(model.SerializeToString())


def _compare(usable: Usable, spec: RunSpec, converted: Callable[[Tensor, Tensor], Any]) -> None:
    """Raise ConfigError unless the converted module gives what the network does at other sizes than it was traced at."""
    draw = np.random.default_rng(1)
    for batch, steps in SIZES:
        x, lengths = example(spec, batch, steps, draw)
        try:
            wanted = usable(x, lengths).numpy()
            found = converted(x, lengths)
        except Exception as error:
            raise ConfigError(_unlike(spec, batch, steps, str(error).strip().splitlines()[-1])) from error
        if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max()):
            raise ConfigError(_unlike(spec, batch, steps, "its outputs are others"))


def _unlike(spec: RunSpec, batch: int, steps: int, why: str) -> str:
    return (
        f"model.custom = '{spec.model.custom}' does not convert: at {batch} sequences of {steps} steps the converted module "
        f"is not like it ({why}); its code may turn a size into a fixed number (len(x), int(...)): use x.shape and tensors"
    )


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without torch's warnings about its exporters.

    TorchScript is deprecated but still what C++ and mobile runtimes load, so people ask for it; tracing warns of every size
    that Python code looks at, right or wrong, and `_compare` looks at the result instead.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
