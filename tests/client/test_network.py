"""The torch network: the layout that the server knows, the numbers of plain loops, and padding that changes nothing."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from seqfed.client.data import Sequences
from seqfed.client.network import Network, Recurrent, custom_parameters, device_of, network_for
from seqfed.client.training import evaluate, train
from seqfed.common.config import validate
from seqfed.common.errors import ConfigError, LayoutMismatch, PolicyRefused, TrainingFailed
from seqfed.common.layout import Layout, Parameters
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.spec import DataSpec, RunSpec

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("rnn", "lstm", "gru")
NUMBERS: dict[str, Any] = {"features": 3, "classes": 4}
TOKENS: dict[str, Any] = {"vocabulary": list("abcde"), "classes": 4}
NEXT: dict[str, Any] = {"vocabulary": list("abcde"), "steps": 6}
WINDOWS: dict[str, Any] = {"features": 3, "steps": 6, "stride": 1}


def spec(kind: str = "lstm", data: dict[str, Any] = NUMBERS, task: str = "classification", **model: Any) -> RunSpec:
    model = {"kind": kind, "layers": 2, "hidden": 5, "embedding": 7, **model}
    return validate(RunSpec, {"data": data, "task": {"kind": task}, "model": model}, "test")


def network(run: RunSpec) -> Network:
    found = network_for(run)
    found.load(initial_parameters(run))
    return found.eval()


def body(of: Network) -> Recurrent:
    assert isinstance(of.body, Recurrent)
    return of.body


# The layout -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "layers", "bidirectional", "projection", "pooling", "data"),
    [
        given
        for given in product(
            KINDS, (1, 2, 3), (False, True), (None, 2), ("last", "mean", "attention"), (NUMBERS, TOKENS)
        )
        if given[0] == "lstm" or given[3] is None
    ],
)
def test_torch_has_the_layout_that_the_server_computes(
    kind: str, layers: int, bidirectional: bool, projection: int | None, pooling: str, data: dict[str, Any]
) -> None:
    run = spec(kind, data, layers=layers, bidirectional=bidirectional, projection=projection, pooling=pooling)
    torch.manual_seed(0)
    made = Recurrent(run)  # network_for would refuse what differs; this says how
    state = made.state_dict()
    assert layout_of(run).tensors == tuple((name, tuple(tensor.shape)) for name, tensor in state.items())
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    bounds = {name: float(one.abs().max()) for name, one in initial_views(run).items()}
    for name, tensor in state.items():  # torch's own first numbers are within the same bounds, and come near them
        if name != "embedding.weight" and tensor.numel() > 30:
            assert float(tensor.abs().max()) == pytest.approx(bounds[name], rel=0.25)


def initial_views(run: RunSpec) -> dict[str, Tensor]:
    parameters = initial_parameters(run)
    return {name: torch.from_numpy(view) for name, view in parameters.layout.views(parameters.flat).items()}


@pytest.mark.parametrize(
    ("task", "data", "model", "shape"),
    [
        ("classification", NUMBERS, {}, (2, 4)),
        ("multilabel", {"features": 3, "targets": 6}, {}, (2, 6)),
        ("regression", {**TOKENS, "targets": 2}, {}, (2, 2)),
        ("forecast", WINDOWS, {}, (2, 3)),
        ("anomaly", {**WINDOWS, "missing": "mask"}, {}, (2, 3)),
        ("next_token", NEXT, {}, (2, 6, 6)),
    ],
)
@torch.no_grad()
def test_the_outputs_are_those_of_the_task(
    task: str, data: dict[str, Any], model: dict[str, Any], shape: tuple[int, ...]
) -> None:
    run = spec("gru", data, task, **model)
    x = torch.zeros(2, 6, dtype=torch.int64) if run.data.vocabulary else torch.zeros(2, 6, run.data.inputs)
    assert network(run)(x).shape == shape


def test_each_kind_is_torchs() -> None:
    made = {kind: type(Recurrent(spec(kind)).recurrent) for kind in KINDS}
    assert made == {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
    assert layout_of(RunSpec(data=DataSpec(features=8, classes=10))).size == 52_874


def test_dropout_stands_between_layers_and_is_silent_in_scoring() -> None:
    assert Recurrent(spec(dropout=0.5)).recurrent.dropout == 0.5
    assert Recurrent(spec(dropout=0.5, layers=1)).recurrent.dropout == 0
    x = torch.ones(2, 6, 3)
    assert torch.equal(network(spec(dropout=0.5))(x), network(spec())(x))
    assert not torch.equal(network(spec(dropout=0.5)).train()(x), network(spec())(x))


# Numbers in and out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run", [*map(spec, KINDS), spec(data=TOKENS, bidirectional=True, pooling="attention", projection=2)]
)
def test_numbers_go_in_and_come_out(run: RunSpec) -> None:
    parameters = initial_parameters(run)
    found = network(run)
    for name, array in parameters.layout.views(parameters.flat).items():
        assert found.body.state_dict()[name].numpy().tobytes() == array.tobytes()
    assert found.save().flat.tobytes() == parameters.flat.tobytes()
    out = np.full(parameters.layout.size, np.nan, np.float32)
    assert found.save(out=out).flat is out
    assert out.tobytes() == parameters.flat.tobytes()


def test_what_comes_out_is_a_copy() -> None:
    run = spec()
    found = network(run)
    saved = found.save().flat
    saved += 1
    assert found.save().flat.tobytes() == initial_parameters(run).flat.tobytes()


def test_another_models_numbers_are_refused_and_change_nothing() -> None:
    found = network(spec())
    before = found.save().flat.tobytes()
    layout = layout_of(spec())
    for other in (layout_of(spec("gru")), layout_of(spec(layers=1)), Layout(layout.tensors[::-1])):
        with pytest.raises(LayoutMismatch):
            found.load(Parameters(other, np.zeros(other.size, np.float32)))
    assert found.save().flat.tobytes() == before


def test_devices() -> None:
    assert device_of("cpu").type == "cpu"
    there = torch.cuda.is_available()
    assert device_of("auto").type == ("cuda" if there else "cpu")
    assert network_for(spec(), device="cpu").device.type == "cpu"
    if not there:
        with pytest.raises(ConfigError, match="torch sees no GPU here; set device = 'auto' or 'cpu'"):
            network_for(spec(), device="cuda")


# The recurrence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@torch.no_grad()
def test_a_vanilla_rnn_is_its_formula(nonlinearity: str) -> None:
    """h_t = f(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh), layer upon layer; outputs = W h_T + b."""
    run = spec("rnn", nonlinearity=nonlinearity)
    own = {name: view.double().numpy() for name, view in initial_views(run).items()}
    draw = np.random.default_rng(0)
    x = draw.normal(size=(3, 6, 3)).astype(np.float32)
    found = network(run)(torch.from_numpy(x)).numpy()
    for row in range(3):
        states: list[list[float]] = x[row].tolist()
        for layer in range(2):
            w_ih, w_hh = own[f"recurrent.weight_ih_l{layer}"], own[f"recurrent.weight_hh_l{layer}"]
            b_ih, b_hh = own[f"recurrent.bias_ih_l{layer}"], own[f"recurrent.bias_hh_l{layer}"]
            h = [0.0] * 5
            after = []
            for step in states:
                total = [
                    sum(w_ih[i][j] * step[j] for j in range(len(step)))
                    + b_ih[i]
                    + sum(w_hh[i][j] * h[j] for j in range(5))
                    + b_hh[i]
                    for i in range(5)
                ]
                h = [float(np.tanh(one)) if nonlinearity == "tanh" else max(0.0, float(one)) for one in total]
                after.append(h)
            states = after
        expected = own["head.weight"] @ np.array(states[-1]) + own["head.bias"]
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-6)


def alone(of: Network, sequence: Tensor) -> Tensor:
    """The outputs of one sequence without padding, pooled by plain loops."""
    inner = body(of)
    steps = sequence if inner.embedding is None else inner.embedding.weight[sequence]
    states, last = inner.recurrent(steps[None])
    states = states[0]
    if inner.each_step:
        return torch.stack([inner.head(state) for state in states])
    if inner.pooling == "mean":
        pooled = sum(states[1:], states[0]) / len(states)
    elif inner.pooling == "attention":
        assert inner.attention is not None
        weights = [float(inner.attention(state).exp()) for state in states]
        pooled = sum((w * state for w, state in zip(weights, states, strict=True)), torch.zeros(())) / sum(weights)
    else:
        final = last[0] if isinstance(last, tuple) else last  # torch's own final states, of each layer and direction
        pooled = torch.cat([final[-2, 0], final[-1, 0]]) if inner.recurrent.bidirectional else final[-1, 0]
    outputs: Tensor = inner.head(pooled)
    return outputs


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    bidirectional=st.booleans(),
    pooling=st.sampled_from(["last", "mean", "attention"]),
    tokens=st.booleans(),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_a_padded_batch_is_each_sequence_alone(
    kind: str, lengths: list[int], bidirectional: bool, pooling: str, tokens: bool, seed: int
) -> None:
    found = network(spec(kind, TOKENS if tokens else NUMBERS, bidirectional=bidirectional, pooling=pooling))
    draw = torch.Generator().manual_seed(seed)
    x = (
        torch.randint(6, (len(lengths), 6), generator=draw)
        if tokens
        else torch.randn(len(lengths), 6, 3, generator=draw)
    )
    long = torch.tensor(lengths)
    outputs = found(x, long)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(outputs[row], alone(found, x[row, :length]), rtol=1e-4, atol=1e-5)
        x[row, length:] = 5 if tokens else 1e6
    assert found(x, long).numpy().tobytes() == outputs.numpy().tobytes()
    more = torch.cat([x, x[:, :2]], 1)  # more padding behind
    torch.testing.assert_close(found(more, long), outputs, rtol=1e-4, atol=1e-5)


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), kind=st.sampled_from(KINDS))
@torch.no_grad()
def test_a_next_token_model_speaks_at_each_step_and_never_of_what_comes(lengths: list[int], kind: str) -> None:
    found = network(spec(kind, NEXT, "next_token"))
    x = torch.randint(6, (len(lengths), 6), generator=torch.Generator().manual_seed(0))
    outputs = found(x, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(outputs[row, :length], alone(found, x[row, :length]), rtol=1e-4, atol=1e-5)


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    kind=st.sampled_from(KINDS),
    pooling=st.sampled_from(["last", "mean", "attention"]),
)
@torch.no_grad()
def test_where_a_forward_model_is_not_packed_packing_would_change_nothing(
    lengths: list[int], kind: str, pooling: str
) -> None:
    found = network(spec(kind, pooling=pooling))
    inner, long = body(found), torch.tensor(lengths)
    x = torch.randn(len(lengths), 6, 3, generator=torch.Generator().manual_seed(1))
    packed = pack_padded_sequence(x, long, batch_first=True, enforce_sorted=False)
    states, _ = pad_packed_sequence(inner.recurrent(packed)[0], batch_first=True, total_length=6)
    torch.testing.assert_close(found(x, long), inner.read(states, long), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("bidirectional", "pooling"), list(product((False, True), ("last", "mean", "attention"))))
@torch.no_grad()
def test_without_lengths_all_steps_count(bidirectional: bool, pooling: str) -> None:
    found = network(spec(bidirectional=bidirectional, pooling=pooling))
    x = torch.randn(3, 6, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found(x), found(x, torch.full((3,), 6)), rtol=1e-5, atol=1e-6)


# Custom modules ---------------------------------------------------------------------------------------------------------

MINE = """
import torch
from torch import nn

class Convolution(nn.Module):
    def __init__(self, inputs, outputs, wide):
        super().__init__()
        self.first = nn.Conv1d(inputs, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, outputs)

    def forward(self, x, lengths):
        return self.head(self.norm(self.first(x.transpose(1, 2)).mean(2)))

def model(spec):
    return Convolution(spec.data.inputs, spec.outputs, False)

def wider(spec):
    return Convolution(spec.data.inputs, spec.outputs + 1, False)

def normed(spec):
    return nn.BatchNorm1d(spec.data.inputs)

def nothing(spec):
    return None

def empty(spec):
    return nn.Identity()

def broken(spec):
    raise RuntimeError("no such layer")

number = 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_models.py").write_text(MINE)
    (tmp_path / "unfinished.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    return tmp_path


def custom(name: str, tensors: Any = None) -> RunSpec:
    return validate(RunSpec, {"data": NUMBERS, "model": {"custom": name, "tensors": tensors}}, "test")


def filled(name: str) -> RunSpec:
    return custom(name, custom_parameters(custom(name)).layout.tensors)


@pytest.mark.usefixtures("mine")
def test_a_custom_module_takes_part() -> None:
    run = filled("my_models:model")
    found = network_for(run, allow_custom=("my_models:model",))
    assert [name for name, _ in found.layout.tensors] == [
        f"{layer}.{kind}" for layer in ("first", "norm", "head") for kind in ("weight", "bias")
    ]
    found.load(initial_parameters(run))
    x = np.random.default_rng(0).normal(size=(20, 6, 3)).astype(np.float32)
    data = Sequences.of(x, x.sum(axis=1).argmax(axis=1))
    before = evaluate(found, data, run)
    assert train(found, data, run, 1, np.random.default_rng(0)).tally["examples"] == 20
    assert evaluate(found, data, run)["loss"] < before["loss"]
    own: dict[str, NDArray[np.float32]] = {name: view.numpy() for name, view in initial_views(run).items()}
    assert own["norm.weight"].tolist() == [1, 1, 1, 1]
    assert own["first.bias"].tolist() == [0, 0, 0, 0]
    assert 0 < np.abs(own["first.weight"]).max() <= (3 * 3) ** -0.5


@pytest.mark.usefixtures("mine")
def test_a_custom_modules_own_first_numbers_depend_on_the_seed_alone() -> None:
    first = custom_parameters(custom("my_models:model"))
    torch.rand(3)
    assert custom_parameters(custom("my_models:model")).flat.tobytes() == first.flat.tobytes()
    other = custom("my_models:model").model_copy(update={"seed": 9})
    assert custom_parameters(other).flat.tobytes() != first.flat.tobytes()


def test_nothing_is_imported_that_the_client_does_not_allow(mine: Path) -> None:
    run = custom("my_models:model", (("w", (1,)),))
    for allowed in ((), ("my_models:other",), ("my_models",)):
        with pytest.raises(PolicyRefused, match="pass --allow-custom my_models:model"):
            network_for(run, allow_custom=allowed)
    assert mine.exists()
    assert "my_models" not in sys.modules


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:model", "importing no_such_module failed: ModuleNotFoundError.*is its folder on PYTHONPATH"),
        ("unfinished:model", "No module named 'no_such_package'"),
        ("my_models:absent", "my_models has no function absent"),
        ("my_models:number", "my_models has no function number"),
        ("my_models:nothing", "made a NoneType; a torch.nn.Module is due"),
        ("my_models:empty", "without parameters"),
        ("my_models:normed", "tensor 'num_batches_tracked' is torch.int64.*LayerNorm"),
        ("my_models:broken", "failed: RuntimeError: no such layer"),
    ],
)
def test_what_is_no_model_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        custom_parameters(custom(name))
    with pytest.raises(ConfigError, match=message):
        network_for(custom(name, (("w", (1,)),)), allow_custom=(name,))


@pytest.mark.usefixtures("mine")
def test_a_custom_module_must_be_what_the_run_says() -> None:
    with pytest.raises(LayoutMismatch, match="tensor 'head.weight' has shape"):
        network_for(
            custom("my_models:model", filled("my_models:wider").model.tensors), allow_custom=("my_models:model",)
        )
    found = network_for(filled("my_models:wider"), allow_custom=("my_models:wider",))
    with pytest.raises(TrainingFailed, match=r"puts out \(2, 5\); \(..., 4\) is due"):
        found(torch.ones(2, 6, 3))
    with pytest.raises(ConfigError, match="`seqfed submit` fills them in"):
        layout_of(custom("my_models:model"))
