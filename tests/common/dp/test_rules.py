"""What a run with differential privacy may not say, and why: each rule refuses at submission, with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from seqfed.common.config import validate, validate_json
from seqfed.common.errors import ConfigError
from seqfed.common.spec import RunSpec

CENTRAL = {"mode": "central", "epsilon": 2.0, "delta": 1e-5}
SECURE = {"secure_aggregation": True}
COHORT = {"min_clients": 5, "count": 5}


def run(dp: dict[str, Any] | None = None, privacy: dict[str, Any] | None = None, **tables: Any) -> RunSpec:
    content = {
        "data": {"features": 2, "classes": 3},
        "aggregation": {"weighting": "uniform"},
        "evaluation": {"every": 0},
        "cohort": COHORT,
        "privacy": {**(privacy or {}), "dp": {**CENTRAL, **(dp or {})}},
        **tables,
    }
    return validate(RunSpec, content, "test")


@pytest.mark.parametrize(
    ("dp", "tables"),
    [
        ({}, {}),
        ({"clip": "adaptive"}, {}),
        ({"mechanism": "ftrl", "participations": 3}, {}),
        ({"population": 50}, {"cohort": {"min_clients": 50, "count": 20, "quorum": 2}}),
        ({"mode": "distributed"}, {"privacy": SECURE}),
        ({"mode": "distributed", "colluding": 0}, {"privacy": SECURE}),
        ({"mode": "distributed", "colluding": 2}, {"privacy": SECURE}),
        ({"colluding": 0}, {}),
        ({}, {"privacy": {**SECURE, "clip": 1.0}}),
        ({"mode": "local"}, {}),
        ({"mode": "local"}, {"privacy": SECURE}),
        ({"mode": "example"}, {"privacy": SECURE}),
        ({"evaluation": "public"}, {"evaluation": {"every": 1}, "convergence": {"metric": "loss"}}),
    ],
)
def test_what_fits_is_taken_and_its_canonical_text_reads_back(dp: dict[str, Any], tables: dict[str, Any]) -> None:
    spec = run(dp, **tables)
    assert validate_json(RunSpec, spec.canonical, "test") == spec


@pytest.mark.parametrize(
    ("dp", "tables", "told"),
    [
        ({"epsilon": None}, {}, "needs epsilon, the goal, or noise_multiplier"),
        ({"mode": "local", "mechanism": "ftrl"}, {}, "mechanism belongs to mode = 'central'"),
        ({"mode": "local", "population": 9}, {}, "population belongs to mode = 'central', mechanism = 'gaussian'"),
        ({"mechanism": "ftrl", "population": 9}, {}, "population belongs to"),
        ({"mode": "local", "clip": "adaptive"}, {}, "clip = 'adaptive' belongs to"),
        ({"mechanism": "ftrl", "clip": "adaptive"}, {}, "clip = 'adaptive' belongs to"),
        ({"participations": 3}, {}, "participations belongs to mechanism = 'ftrl'"),
        ({"mechanism": "ftrl", "participations": 11}, {}, "participations \\(11\\) is more than rounds \\(10\\)"),
        ({"colluding": 1}, {}, "colluding belongs to mode = 'distributed'"),
        ({}, {"aggregation": {"weighting": "examples"}}, "with clients' own weights no clip bounds"),
        ({}, {"aggregation": {"weighting": "uniform", "max_norm": 1.0}}, "dp.clip is the one bound"),
        ({}, {"asynchronous": {"buffer": 2}, "cohort": {"min_clients": 5}}, "\\[asynchronous\\]: privacy.dp counts each"),
        ({}, {"cohort": {**COHORT, "late": "fold"}}, "cohort.late = 'fold': privacy.dp counts each"),
        ({}, {"evaluation": {"every": 2}}, "evaluation.every = 2: metrics of clients' data are told without noise"),
        (
            {},
            {"data": {"features": 2, "classes": 3, "normalise": "federated"}},
            "data.normalise = 'federated': mean and scale of clients' data are told without noise",
        ),
        ({"mode": "distributed"}, {}, "it needs privacy.secure_aggregation = true"),
        ({"mode": "distributed"}, {"privacy": {**SECURE, "b": 12}}, "privacy.b = 12: the noise of"),
        ({"mode": "distributed", "colluding": 3}, {"privacy": SECURE}, "leaves nobody of privacy.min_survivors \\(3\\)"),
        (
            {"population": 50},
            {"privacy": SECURE, "cohort": {"min_clients": 50, "count": 20, "quorum": 5}},
            "each client that is drawn for a masked sum learns who else was",
        ),
        ({"mode": "distributed"}, {"privacy": SECURE, "cohort": {"min_clients": 5}}, "set cohort.count"),
        ({"mode": "distributed"}, {"privacy": {**SECURE, "clip": 2.0}}, "two bounds of one norm; drop privacy.clip"),
        ({"clip": "adaptive"}, {"privacy": SECURE}, "no task tells them a clip that moves"),
        ({"mode": "example"}, {"training": {"truncate": 5}}, "training.truncate: privacy.dp.mode = 'example'"),
        ({"mode": "example"}, {"model": {"custom": "a:b"}}, "model.custom: privacy.dp.mode = 'example'"),
        ({"population": 50}, {}, "set cohort.count, its mean, and a cohort.quorum well below"),
        (
            {"population": 50},
            {"cohort": {"min_clients": 50, "count": 20, "quorum": 2, "over_select": 1.3}},
            "takes all answers; drop one",
        ),
        (
            {"population": 50},
            {"cohort": {"min_clients": 40, "count": 20, "quorum": 2}},
            "must be from cohort.count \\(20\\) to cohort.min_clients \\(40\\)",
        ),
        ({}, {"privacy": {"b": 12}}, "are of secure_aggregation = true; set it"),
    ],
)  # fmt: skip
def test_what_breaks_the_accounting_is_refused_with_the_reason(
    dp: dict[str, Any], tables: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        run(dp, **tables)


def test_public_metrics_and_statistics_are_a_choice_that_is_said() -> None:
    data = {"features": 2, "classes": 3, "normalise": "federated"}
    spec = run({"evaluation": "public"}, data=data, evaluation={"every": 1})
    assert spec.privacy.dp is not None
    assert spec.privacy.dp.is_public


def test_the_bound_of_a_masked_update_is_the_clip_that_is_counted() -> None:
    assert run({"mode": "distributed", "clip": 0.5}, SECURE).privacy.bound == 0.5
    assert run({"clip": 2}, SECURE).privacy.bound == 2.0
    assert run({"mode": "local"}, {**SECURE, "clip": 30.0}).privacy.bound == 30.0
