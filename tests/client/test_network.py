"""The torch network: the layout that the server knows, and the numbers of torch's own layers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from seqfed.client.network import RECURRENT, SequenceClassifier
from seqfed.common.config import validate
from seqfed.common.errors import LayoutMismatch
from seqfed.common.layout import Layout, Parameters
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.spec import DataSpec, RunSpec

KINDS = ("rnn", "lstm", "gru")


def spec(kind: str = "lstm", layers: int = 2, hidden: int = 5) -> RunSpec:
    model = {"kind": kind, "layers": layers, "hidden": hidden}
    return validate(RunSpec, {"data": {"features": 3, "classes": 4}, "model": model}, "test")


def network(run: RunSpec) -> SequenceClassifier:
    found = SequenceClassifier(run)
    found.load(initial_parameters(run))
    return found


@pytest.mark.parametrize(("kind", "layers"), list(product(KINDS, (1, 2, 3))))
def test_torch_has_the_layout_that_the_server_computes(kind: str, layers: int) -> None:
    run = spec(kind, layers)
    state = SequenceClassifier(run).state_dict()
    assert layout_of(run).tensors == tuple((name, tuple(tensor.shape)) for name, tensor in state.items())
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_go_in_and_come_out(kind: str) -> None:
    run = spec(kind)
    parameters = initial_parameters(run)
    found = network(run)
    for name, array in parameters.layout.views(parameters.flat).items():
        assert found.state_dict()[name].numpy().tobytes() == array.tobytes()
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


def packed_logits(of: SequenceClassifier, x: Tensor, lengths: Tensor) -> Tensor:
    """The slow way: torch packs the sequences, so that the recurrence never sees padding."""
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    states, _ = of.recurrent(packed)
    assert isinstance(states, PackedSequence)
    padded, _ = pad_packed_sequence(states, batch_first=True)
    last = torch.stack([padded[row, length - 1] for row, length in enumerate(lengths.tolist())])
    logits = of.head(last)
    assert isinstance(logits, Tensor)
    return logits


@settings(max_examples=40)
@given(
    kind=st.sampled_from(KINDS), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 99)
)
@torch.no_grad()
def test_lengths_do_what_packing_does_and_padding_does_not_matter(kind: str, lengths: list[int], seed: int) -> None:
    found = network(spec(kind))
    x = torch.randn(len(lengths), 6, 3, generator=torch.Generator().manual_seed(seed))
    long = torch.tensor(lengths)
    logits = found(x, long)
    torch.testing.assert_close(logits, packed_logits(found, x, long), rtol=1e-5, atol=1e-6)
    other = x.clone()
    for row, length in enumerate(lengths):
        other[row, length:] = 1e6
    assert found(other, long).numpy().tobytes() == logits.numpy().tobytes()


@torch.no_grad()
def test_without_lengths_the_last_step_counts() -> None:
    found = network(spec())
    x = torch.randn(3, 6, 3, generator=torch.Generator().manual_seed(1))
    assert found(x).shape == (3, 4)
    assert torch.equal(found(x), found(x, torch.full((3,), 6)))


def test_each_kind_is_torchs() -> None:
    assert {kind: type(SequenceClassifier(spec(kind)).recurrent) for kind in KINDS} == RECURRENT
    assert layout_of(RunSpec(data=DataSpec(features=8, classes=10))).size == 52_874
