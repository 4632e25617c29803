"""Converted models give what the network gives, for raw numbers, at any batch and number of steps."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from seqfed.client.convert import Format, convert, describe, raw_width
from seqfed.client.model_file import read_model
from seqfed.client.network import network_for
from seqfed.common import checkpoint
from seqfed.common.config import validate
from seqfed.common.errors import CheckpointError, ConfigError, PolicyRefused
from seqfed.common.layout import Parameters
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.spec import RunSpec

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS: tuple[Format, ...] = ("torchscript", "onnx")
KINDS = ("rnn", "lstm", "gru")
SIZES = ((1, 1), (1, 9), (5, 1), (4, 7), (9, 12))
NUMBERS: dict[str, Any] = {"columns": ["a", "b", "c"], "mean": [10.0, -1.0, 0.5], "scale": [4.0, 0.5, 2.0]}
WINDOWS: dict[str, Any] = {**NUMBERS, "steps": 8, "stride": 2}
TOKENS: dict[str, Any] = {"vocabulary": list("abcde"), "steps": 8}
TASKS: dict[str, dict[str, Any]] = {
    "classification": {"data": {**NUMBERS, "classes": 4}},
    "multilabel": {"data": {**NUMBERS, "targets": 3}, "task": {"kind": "multilabel"}},
    "regression": {
        "data": {**NUMBERS, "targets": 2, "target_mean": [100.0, -3.0], "target_scale": [20.0, 0.1]},
        "task": {"kind": "regression"},
    },
    "forecast": {"data": WINDOWS, "task": {"kind": "forecast", "horizon": 3}},
    "anomaly": {"data": WINDOWS, "task": {"kind": "anomaly"}},
    "next_token": {"data": TOKENS, "task": {"kind": "next_token"}},
    "texts": {"data": {"vocabulary": list("abcde"), "classes": 3}},
}


def spec(task: str = "classification", data: dict[str, Any] | None = None, **model: Any) -> RunSpec:
    parts = TASKS[task]
    return validate(
        RunSpec,
        {**parts, "data": {**parts["data"], **(data or {})}, "model": {"hidden": 6, "embedding": 5, **model}},
        "test",
    )


def saved(run: RunSpec, folder: Path) -> Path:
    """The run's first model, with larger numbers than training begins with, as a server writes it."""
    parameters = initial_parameters(run)
    parameters = Parameters(parameters.layout, np.float32(1.5) * parameters.flat)
    metadata = {"run": "0123456789abcdef", "round": "7", "spec": run.canonical.decode(), "spec_digest": run.digest}
    return checkpoint.save(folder / "model.safetensors", parameters, metadata).path


def raw(run: RunSpec, batch: int, steps: int, seed: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Sequences as they stand in a file, padded with zeros to the longest."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, steps + 1, batch)
    lengths[draw.integers(batch)] = steps
    if run.data.vocabulary is not None:
        x: NDArray[Any] = draw.integers(0, run.data.inputs, (batch, steps))
    else:
        x = (10 * draw.standard_normal((batch, steps, raw_width(run)))).astype(np.float32)
        categories = raw_width(run) - run.data.numbers
        if categories:
            x[:, :, run.data.numbers :] = np.eye(categories)[draw.integers(0, categories, (batch, steps))]
        if run.data.missing != "refuse":
            x[:, :, : run.data.numbers][draw.random((batch, steps, run.data.numbers)) < 0.3] = np.nan
    x[np.arange(steps) >= lengths[:, None]] = 0
    return x, lengths


@torch.no_grad()
def expected(run: RunSpec, model: Path, x: NDArray[Any], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
    """The slow way: sequence by sequence, without padding, each step's numbers made one by one."""
    network = network_for(run).eval()
    network.load(checkpoint.load(model, layout_of(run)))
    data = run.data
    mean, scale = data.mean or (0.0,) * data.numbers, data.scale or (1.0,) * data.numbers
    outputs = []
    for sequence, length in zip(x, lengths, strict=True):
        if data.vocabulary is not None:
            inputs = torch.from_numpy(sequence[:length])
        else:
            rows = []
            for step in sequence[:length].tolist():
                row = [
                    0.0 if np.isnan(one) else (one - m) / s
                    for one, m, s in zip(step[: data.numbers], mean, scale, strict=True)
                ]
                if data.missing == "mask":
                    row += [0.0 if np.isnan(one) else 1.0 for one in step[: data.numbers]]
                rows.append(row + step[data.numbers :])
            inputs = torch.tensor(rows)
        out = network(inputs[None])[0].numpy()
        match run.task.kind:
            case "regression":
                out = out * np.array(data.target_scale or (1.0,)) + np.array(data.target_mean or (0.0,))
            case "forecast" | "anomaly":
                out = out.reshape(run.task.horizon, data.numbers) * np.array(scale) + np.array(mean)
            case "next_token":
                out = np.concatenate([out, np.full((x.shape[1] - length, run.outputs), np.nan, np.float32)])
        outputs.append(out)
    return np.stack(outputs).astype(np.float32)


class Converted:
    """A converted model as its user loads it."""

    def __init__(self, path: Path) -> None:
        self.metadata: dict[str, str]
        if path.suffix == ".onnx":
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1  # other tests want the other cores
            self._session = onnxruntime.InferenceSession(path, options)
            self.metadata = self._session.get_modelmeta().custom_metadata_map
        else:
            extra = {"seqfed.json": ""}
            with warnings.catch_warnings():  # torch: TorchScript is deprecated
                warnings.simplefilter("ignore", DeprecationWarning)
                self._module = torch.jit.load(io.BytesIO(path.read_bytes()), _extra_files=extra)  # type: ignore[no-untyped-call]
            self.metadata = json.loads(extra["seqfed.json"])
        self._onnx = path.suffix == ".onnx"

    def __call__(self, x: NDArray[Any], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        if self._onnx:
            out = np.asarray(self._session.run(None, {"x": x, "lengths": lengths})[0])
        else:
            with torch.no_grad():
                out = self._module(torch.from_numpy(x), torch.from_numpy(lengths)).numpy()
        assert out.dtype == np.float32
        return np.asarray(out)


def check(run: RunSpec, kind: Format, folder: Path) -> Converted:
    """Convert, and compare with the slow way on random batches of several sizes."""
    model, out = saved(run, folder), folder / f"model.{'onnx' if kind == 'onnx' else 'pt'}"
    assert convert(model, out, kind) == out.stat().st_size
    found = Converted(out)
    for seed, (batch, steps) in enumerate(SIZES):
        x, lengths = raw(run, batch, steps, seed)
        wanted = expected(run, model, x, lengths)
        got = found(x, lengths)
        assert got.shape == wanted.shape
        got = np.where(np.isnan(wanted), np.nan, got)  # padded steps may say anything
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * np.nanmax(np.abs(wanted)))
    return found


@pytest.mark.parametrize(("kind", "task"), list(product(KINDS, TASKS)))
def test_every_task_of_every_kind_as_onnx(kind: str, task: str, tmp_path: Path) -> None:
    check(spec(task, kind=kind), "onnx", tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_as_torchscript(task: str, tmp_path: Path) -> None:
    check(spec(task), "torchscript", tmp_path)


@pytest.mark.parametrize(
    ("of", "kind", "pooling", "bidirectional"),
    list(product(FORMATS, KINDS, ("last", "mean", "attention"), (False, True))),
)
def test_directions_and_pooling(of: Format, kind: str, pooling: str, bidirectional: bool, tmp_path: Path) -> None:
    check(spec(kind=kind, pooling=pooling, bidirectional=bidirectional, layers=3), of, tmp_path)


@pytest.mark.parametrize(("of", "missing"), list(product(FORMATS, ("refuse", "mask", "forward", "mean"))))
def test_missing_numbers_and_categories(of: Format, missing: str, tmp_path: Path) -> None:
    run = spec(data={"missing": missing, "categories": {"ward": ["A", "B"], "sex": ["f", "m", "x"]}})
    found = check(run, of, tmp_path)
    assert "'ward' 1 where it is the step's, else 0, of: A, B" in found.metadata["description"]


@pytest.mark.parametrize(("of", "kind"), list(product(FORMATS, KINDS)))
def test_numbers_without_normalisation(of: Format, kind: str, tmp_path: Path) -> None:
    check(spec(data={"columns": None, "features": 2, "mean": None, "scale": None}, kind=kind, layers=1), of, tmp_path)
    regression = {"target_mean": None, "target_scale": None}
    check(spec("regression", regression, kind=kind), of, tmp_path)


def test_relu_and_projection(tmp_path: Path) -> None:
    for of in FORMATS:
        check(spec(kind="rnn", nonlinearity="relu"), of, tmp_path)
    with warnings.catch_warnings():  # torch on CPU: LSTM with projections is not supported with oneDNN
        warnings.simplefilter("ignore", UserWarning)
        check(spec(kind="lstm", projection=3, bidirectional=True), "torchscript", tmp_path)
    with pytest.raises(ConfigError, match="ONNX's LSTM has no projection .* --format torchscript"):
        convert(saved(spec(kind="lstm", projection=3), tmp_path), tmp_path / "m.onnx", "onnx")
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("of", FORMATS)
def test_the_file_says_what_it_is(of: Format, tmp_path: Path) -> None:
    run = spec("regression")
    metadata = check(run, of, tmp_path).metadata
    assert validate(RunSpec, json.loads(metadata["spec"]), "test") == run
    assert metadata["spec_digest"] == run.digest
    assert (metadata["run"], metadata["round"]) == ("0123456789abcdef", "7")
    assert metadata["layout_digest"] == layout_of(run).digest.hex()
    assert metadata["description"] == describe(run)
    assert "a, b, c" in describe(run)
    assert "the labels' own units" in describe(run)


def test_an_onnx_file_has_free_axes_and_is_valid(tmp_path: Path) -> None:
    check(spec("next_token"), "onnx", tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        one.name: [axis.dim_param or axis.dim_value for axis in one.type.tensor_type.shape.dim]
        for one in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"x": ["batch", "steps"], "lengths": ["batch"], "logits": ["batch", "steps", 6]}


def test_without_the_onnx_package_the_remedy_is_named(tmp_path: Path) -> None:
    model = saved(spec(), tmp_path)
    script = (
        "import sys; sys.modules['onnx'] = None\n"
        "from pathlib import Path; from seqfed.client.convert import convert\n"
        f"convert(Path({str(model)!r}), Path({str(tmp_path / 'out.onnx')!r}), 'onnx')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "ConfigError: ONNX needs the package onnx; install it: pip install 'seqfed[onnx]'" in done.stderr
    assert not (tmp_path / "out.onnx").exists()


CUSTOM = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.mix = nn.Linear(spec.data.inputs, 5)
        self.head = nn.Linear(5, spec.outputs)

    def forward(self, x, lengths=None):
        states = torch.relu(self.mix(x))
        if lengths is None:
            return self.head(states.mean(1))
        real = torch.arange(x.shape[1]) < lengths[:, None]
        return self.head((states * real[:, :, None]).sum(1) / lengths[:, None])

class Fixed(Own):
    def forward(self, x, lengths=None):
        return super().forward(x, lengths) * len(x)

class Table(Own):
    def forward(self, x, lengths=None):
        return {len(x): super().forward(x, lengths)}

class One(Own):
    def forward(self, x, lengths=None):
        if len(x) == 3:
            raise KeyError("three")
        return super().forward(x, lengths)

make, make_fixed, make_table, make_one = Own, Fixed, Table, One
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, RunSpec]:
    (tmp_path / "own_networks.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    tensors = [("mix.weight", (5, 3)), ("mix.bias", (5,)), ("head.weight", (4, 5)), ("head.bias", (4,))]
    return {
        name: spec(custom=f"own_networks:{name}", tensors=tensors)
        for name in ("make", "make_fixed", "make_table", "make_one")
    }


@pytest.mark.parametrize("of", FORMATS)
def test_a_custom_module(of: Format, custom: dict[str, RunSpec], tmp_path: Path) -> None:
    run = custom["make"]
    model, out = saved(run, tmp_path), tmp_path / f"model.{'onnx' if of == 'onnx' else 'pt'}"
    with pytest.raises(PolicyRefused, match="own_networks:make"):
        convert(model, out, of)
    convert(model, out, of, allow_custom=["own_networks:make"])
    network = network_for(run, allow_custom=["own_networks:make"])
    network.load(checkpoint.load(model, layout_of(run)))
    found = Converted(out)
    assert found.metadata["spec_digest"] == run.digest
    mean, scale = np.array(run.data.mean), np.array(run.data.scale)
    for seed, (batch, steps) in enumerate(SIZES):
        x, lengths = raw(run, batch, steps, seed)
        inputs = torch.from_numpy(((x - mean) / scale).astype(np.float32))
        wanted = network(inputs, torch.from_numpy(lengths)).detach().numpy()
        np.testing.assert_allclose(found(x, lengths), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("of", FORMATS)
def test_a_custom_module_that_fixes_a_size_is_refused(of: Format, custom: dict[str, RunSpec], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="'own_networks:make_fixed' does not convert: at . sequences of . steps"):
        convert(saved(custom["make_fixed"], tmp_path), out, of, allow_custom=["own_networks:make_fixed"])
    assert not out.exists()


@pytest.mark.parametrize("of", FORMATS)
@pytest.mark.parametrize("name", ["make_table", "make_one"])
def test_a_custom_module_that_cannot_be_traced_is_refused(
    of: Format, name: str, custom: dict[str, RunSpec], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=f"'own_networks:{name}' does not convert"):
        convert(saved(custom[name], tmp_path), out, of, allow_custom=[f"own_networks:{name}"])
    assert not out.exists()


def test_what_is_no_exported_model_is_refused(tmp_path: Path) -> None:
    run = spec()
    good = initial_parameters(run)
    whole = {"spec": run.canonical.decode(), "spec_digest": run.digest}
    other = spec(hidden=7)
    cases: list[tuple[dict[str, str], str]] = [
        ({}, "has no run specification, which says what its numbers are of; use a file that `seqfed export` wrote"),
        (
            {**whole, "spec": whole["spec"].replace('"seed":0', '"seed":1')},
            "not the one of its digest; export the run again",
        ),
        ({"spec": whole["spec"]}, "not the one of its digest"),
        ({"spec": other.canonical.decode(), "spec_digest": other.digest}, "its tensors are not those of its run spec"),
    ]
    for metadata, said in cases:
        path = checkpoint.save(tmp_path / "m.safetensors", good, metadata).path
        with pytest.raises(CheckpointError, match=said):
            read_model(path)
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 100)
    with pytest.raises(CheckpointError, match="junk.safetensors: not a readable safetensors file"):
        read_model(tmp_path / "junk.safetensors")
    later = whole["spec"].replace('"seed":0', '"seed":0,"later":1')
    digest = hashlib.sha256(later.encode()).hexdigest()
    path = checkpoint.save(tmp_path / "m.safetensors", good, {"spec": later, "spec_digest": digest}).path
    with pytest.raises(CheckpointError, match="unknown key 'later'.* this version of seqfed does not read"):
        read_model(path)
