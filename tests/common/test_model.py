"""The layout and the first numbers of a model, without torch."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest

from seqfed.common.errors import ConfigError
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.spec import DataSpec, ModelSpec, RunSpec, TaskSpec


def spec(kind: Literal["rnn", "lstm", "gru"] = "gru", hidden: int = 4, layers: int = 1, seed: int = 1) -> RunSpec:
    model = ModelSpec(kind=kind, hidden=hidden, layers=layers)
    return RunSpec(seed=seed, data=DataSpec(features=2, classes=3), model=model)


@pytest.mark.parametrize(("kind", "gates"), [("rnn", 1), ("gru", 3), ("lstm", 4)])
def test_the_layout_by_hand(kind: Literal["rnn", "lstm", "gru"], gates: int) -> None:
    assert layout_of(spec(kind, hidden=5, layers=2)).tensors == (
        ("recurrent.weight_ih_l0", (5 * gates, 2)),
        ("recurrent.weight_hh_l0", (5 * gates, 5)),
        ("recurrent.bias_ih_l0", (5 * gates,)),
        ("recurrent.bias_hh_l0", (5 * gates,)),
        ("recurrent.weight_ih_l1", (5 * gates, 5)),
        ("recurrent.weight_hh_l1", (5 * gates, 5)),
        ("recurrent.bias_ih_l1", (5 * gates,)),
        ("recurrent.bias_hh_l1", (5 * gates,)),
        ("head.weight", (3, 5)),
        ("head.bias", (3,)),
    )


def test_the_first_numbers_stay_what_they_were() -> None:
    layout = layout_of(spec())
    assert layout.digest.hex() == "c1c29cf40da1a78b38f4e5b339d547ead7e9e2ace0ca19a568bca12aae63d270"
    flat = initial_parameters(spec()).flat
    assert flat[:4].tolist() == [0.3388659954071045, -0.38074755668640137, -0.3349701762199402, -0.43010830879211426]
    assert flat[-2:].tolist() == [0.3881571888923645, -0.07774913311004639]


def test_they_fill_their_interval_evenly() -> None:
    flat = initial_parameters(spec("lstm", hidden=64, layers=2)).flat
    bound = 1 / math.sqrt(64)
    assert np.abs(flat).max() <= bound
    shares = np.histogram(flat, bins=8, range=(-bound, bound))[0] / len(flat)
    assert np.abs(shares - 1 / 8).max() < 0.01  # 50,000 numbers: seven standard deviations


def test_they_depend_on_the_seed() -> None:
    assert initial_parameters(spec(seed=1)).flat.tobytes() == initial_parameters(spec(seed=1)).flat.tobytes()
    assert initial_parameters(spec(seed=1)).flat.tobytes() != initial_parameters(spec(seed=2)).flat.tobytes()


def wide(**model: Any) -> RunSpec:
    """Tokens in, two yes/no labels out."""
    return RunSpec(
        data=DataSpec(vocabulary=("a", "b"), targets=2), task=TaskSpec(kind="multilabel"), model=ModelSpec(**model)
    )


def test_the_layout_of_all_parts_by_hand() -> None:
    run = wide(hidden=5, layers=2, embedding=7, bidirectional=True, projection=3, pooling="attention")
    recurrent = [
        (f"recurrent.{kind}_l{layer}{direction}", shape)
        for layer, width in ((0, 7), (1, 6))
        for direction in ("", "_reverse")
        for kind, shape in (
            ("weight_ih", (20, width)),
            ("weight_hh", (20, 3)),
            ("bias_ih", (20,)),
            ("bias_hh", (20,)),
            ("weight_hr", (3, 5)),
        )
    ]
    assert layout_of(run).tensors == (
        ("embedding.weight", (3, 7)),
        *recurrent,
        ("attention.weight", (1, 6)),
        ("attention.bias", (1,)),
        ("head.weight", (2, 6)),
        ("head.bias", (2,)),
    )


def test_each_part_has_its_own_interval() -> None:
    run = wide(hidden=100, layers=1, embedding=500, bidirectional=True, pooling="attention")
    parameters = initial_parameters(run)
    views = parameters.layout.views(parameters.flat)
    for name, array in views.items():
        if name == "embedding.weight":
            assert 0.095 < np.abs(array).max() <= np.float32(0.1)
        else:
            fan_in = 100 if name.startswith("recurrent") else 200
            assert np.abs(array).max() <= np.float32(fan_in**-0.5)
            assert array.size < 200 or np.abs(array).max() > 0.95 * fan_in**-0.5
    assert len(np.unique(parameters.flat)) > 0.95 * parameters.layout.size  # 2^24 values: no part repeats another


def test_of_a_custom_model_names_and_shapes_are_enough() -> None:
    tensors = (("conv.weight", (8, 4, 9)), ("conv.bias", (8,)), ("norm.weight", (8,)), ("norm.running_var", (8,)))
    run = RunSpec(data=DataSpec(features=2, classes=3), model=ModelSpec(custom="mine:model", tensors=tensors))
    assert layout_of(run).tensors == tensors
    parameters = initial_parameters(run)
    views = parameters.layout.views(parameters.flat)
    assert 0.95 / 6 < np.abs(views["conv.weight"]).max() <= np.float32(1 / 6)
    assert not views["conv.bias"].any()
    assert views["norm.weight"].tolist() == views["norm.running_var"].tolist() == [1] * 8


def test_a_custom_model_without_its_tensors_is_refused() -> None:
    run = RunSpec(data=DataSpec(features=2, classes=3), model=ModelSpec(custom="mine:model"))
    with pytest.raises(ConfigError, match="`seqfed submit` fills them in"):
        layout_of(run)
