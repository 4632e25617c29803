"""The layout and the first numbers of a model, without torch."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest

from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.spec import DataSpec, ModelSpec, RunSpec


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
