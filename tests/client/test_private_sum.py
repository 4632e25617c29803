"""What clients give into masked sums of private runs: each mode's vector, and nothing else of their data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from seqfed.client.secure import contribution
from seqfed.client.work import LocalUpdate
from seqfed.common import quantising
from seqfed.common.config import validate
from seqfed.common.dp import accounting, skellam
from seqfed.common.errors import ConfigError, MaskingRefused
from seqfed.common.layout import Flat
from seqfed.common.masking.agreed import lattice_of, mechanism_of, rotation_seed, scalar_names, terms_of
from seqfed.common.masking.terms import Purpose, Terms
from seqfed.common.metrics import TRAINED
from seqfed.common.model import layout_of
from seqfed.common.spec import RunSpec
from seqfed.common.views import MaskingTerms, ModelVersion, Task, TaskKey, TaskKind

CLIENTS, CLIP, NOISE = 5, 0.5, 0.4
NAMES = tuple(f"ward-{nth}" for nth in range(CLIENTS))


def spec_of(mode: str, cohort: dict[str, Any] | None = None, **dp: Any) -> RunSpec:
    private = {"mode": mode, "clip": CLIP, "delta": 1e-5, "noise_multiplier": NOISE, **dp}
    content = {
        "rounds": 9,
        "data": {"features": 3, "classes": 2},
        "model": {"hidden": 40, "layers": 1},
        "cohort": {"min_clients": CLIENTS, "count": CLIENTS} if cohort is None else cohort,
        "aggregation": {"weighting": "uniform"},
        "evaluation": {"every": 1 if dp.get("evaluation") == "public" else 0},
        "privacy": {"secure_aggregation": True, "min_survivors": 3, "b": 18, "dp": private},
    }
    return validate(RunSpec, content, "test")


def terms_for(spec: RunSpec, round_: int = 1, n_max: int = CLIENTS) -> Terms:
    key, size = TaskKey("run", round_, 1), layout_of(spec).size
    return terms_of(spec, key, Purpose.TRAIN, 1, n_max, bytes(32), b"", size)


def task_of(spec: RunSpec) -> Task:
    layout = layout_of(spec)
    model = ModelVersion(0, layout.nbytes, bytes(32), layout.digest)
    return Task(TaskKind.TRAIN, TaskKey("run", 1, 1), spec, model, masking=MaskingTerms(1, CLIENTS))


def update(nth: int, dim: int) -> LocalUpdate:
    """Of norm 0.2 to 1; the clip is 0.5."""
    found = np.random.default_rng(nth).standard_normal(dim)
    delta = (found * (0.2 * (nth + 1) / np.linalg.norm(found))).astype(np.float32)
    return LocalUpdate(delta, bytes(32), 77 + nth, dict.fromkeys(TRAINED, 12345), 1.0)


def clipped_sum(dim: int) -> Flat:
    deltas = [update(nth, dim).delta.astype(np.float64) for nth in range(CLIENTS)]
    return np.asarray(sum(one * min(1.0, CLIP / float(np.linalg.norm(one))) for one in deltas), np.float32)


@pytest.mark.parametrize(("mode", "dp"), [("central", {}), ("distributed", {}), ("central", {"mechanism": "ftrl"})])
def test_the_sum_is_that_of_the_clipped_updates_and_its_noise_where_it_belongs(mode: str, dp: dict[str, Any]) -> None:
    spec = spec_of(mode, **dp)
    terms, dim = terms_for(spec), layout_of(spec).size
    mechanism = mechanism_of(spec, terms)
    assert mechanism is not None
    assert terms.codec == skellam.CODEC
    total = np.zeros(dim, terms.dtype)
    for nth, name in enumerate(NAMES):
        vector, _ = contribution(terms, task_of(spec), name, update(nth, dim))
        assert vector is not None
        total += vector
    found = skellam.decode(total, mechanism, rotation_seed(spec, 1), clients=CLIENTS, target=1)
    off = float(np.linalg.norm(found - clipped_sum(dim)))
    rounding = mechanism.step * math.sqrt(CLIENTS * dim / 4)
    if mode == "central":
        assert off < rounding * 1.1
    else:
        noise = NOISE * CLIP * math.sqrt(dim * CLIENTS / 2)  # of three, one knows its own
        assert off == pytest.approx(noise, rel=0.05)
        assert rounding < noise / 20


def test_a_clients_noise_is_another_each_time() -> None:
    spec = spec_of("distributed")
    terms, dim = terms_for(spec), layout_of(spec).size
    one, other = (contribution(terms, task_of(spec), "ward", update(1, dim))[0] for _ in range(2))
    assert one is not None
    assert other is not None
    assert (one != other).mean() > 0.9


def test_what_clients_do_is_what_is_counted() -> None:
    spec = spec_of("distributed", colluding=1)
    found = mechanism_of(spec, terms_for(spec, n_max=4))
    assert found == accounting.mechanism(spec, NOISE)
    assert found is not None
    assert (found.n_max, found.n_min, found.clip, found.bits) == (CLIENTS, 2, CLIP, 18)
    with pytest.raises(MaskingRefused, match="up to 6 clients, whose noise is counted for 5 at most"):
        terms_for(spec, n_max=6)


def test_local_noise_has_room_in_a_masked_sum() -> None:
    """The update comes with its noise, many times the clip, and is not clipped once more."""
    spec = spec_of("local", noise_multiplier=3.0)
    terms, dim = terms_for(spec), layout_of(spec).size
    assert mechanism_of(spec, terms) is None
    noisy = np.random.default_rng(1).normal(0, 3.0 * CLIP, dim).astype(np.float32)
    given = LocalUpdate(noisy, bytes(32), 1, {}, 1.0)
    vector, scalars = contribution(terms, task_of(spec), "ward", given)
    assert vector is not None
    assert dict(zip(scalar_names(spec, Purpose.TRAIN), scalars, strict=True))["clipped"] == 0
    lattice = lattice_of(spec, terms)
    found = quantising.decode(vector, lattice, rotation_seed(spec, 1), clients=1, weight=1, max_weight=1)
    assert np.linalg.norm(found - noisy) < 0.02 * np.linalg.norm(noisy)


@pytest.mark.parametrize("mode", ["central", "distributed"])
def test_the_scalars_say_nothing_of_the_data(mode: str) -> None:
    spec = spec_of(mode)
    dim = layout_of(spec).size
    _, scalars = contribution(terms_for(spec), task_of(spec), "ward", update(4, dim))
    said = dict(zip(scalar_names(spec, Purpose.TRAIN), scalars, strict=True))
    assert said == {**dict.fromkeys(TRAINED, 0), "weight": 1, "clients": 1, "clipped": 0}
    public = spec_of(mode, evaluation="public")
    _, scalars = contribution(terms_for(public), task_of(public), "ward", update(4, dim))
    assert 12345 in scalars


def test_rounds_that_share_a_trees_noise_share_their_steps() -> None:
    spec = spec_of("central", mechanism="ftrl")
    rounds = [(mechanism_of(spec, terms_for(spec, round_)), rotation_seed(spec, round_)) for round_ in (1, 2, 7)]
    assert len(set(rounds)) == 1
    assert rounds[0][0] == mechanism_of(spec, terms_for(spec, n_max=4))
    fresh = spec_of("central")
    assert rotation_seed(fresh, 1) != rotation_seed(fresh, 2)
    with pytest.raises(ConfigError, match=r"needs the same steps in all rounds; set cohort\.count"):
        terms_for(spec_of("central", {"min_clients": CLIENTS}, mechanism="ftrl"))
