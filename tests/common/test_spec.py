"""The run's specification: its rules, and its one canonical text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from seqfed.common.config import validate, validate_json
from seqfed.common.errors import ConfigError
from seqfed.common.spec import CohortSpec, RunSpec

DATA: dict[str, Any] = {"features": 2, "classes": 3}


def test_canonical_json_is_what_peers_and_stored_runs_have() -> None:
    spec = validate(RunSpec, {"seed": 1, "data": DATA}, "test")
    assert spec.canonical == (
        b'{"name":"run","seed":1,"rounds":10,"data":{"features":2,"columns":null,"categories":{},'
        b'"missing":"refuse",'
        b'"normalise":"given","mean":null,"scale":null,"grid":null,'
        b'"vocabulary":null,"unit":"characters","unknown":"token","steps":null,"stride":null,"horizon":0,'
        b'"classes":3,"labels":null,"targets":null,"target_mean":null,"target_scale":null},'
        b'"task":{"kind":"classification","horizon":1,'
        b'"loss":null,"class_weights":null},'
        b'"model":{"kind":"lstm","hidden":64,"layers":2,"nonlinearity":"tanh",'
        b'"dropout":0.0,"bidirectional":false,"embedding":64,"projection":null,'
        b'"pooling":"last",'
        b'"custom":null,"tensors":null},'
        b'"training":{"optimizer":"adam",'
        b'"learning_rate":0.003,"momentum":0.0,"weight_decay":0.0,"schedule":"constant","warmup":0,"final":0.1,'
        b'"clip_norm":null,"batch_size":32,"epochs":null,"steps":null,"truncate":null,"mixed_precision":false},'
        b'"cohort":{"min_clients":2,"fraction":null,"count":null,"over_select":1.0,"quorum":null,"deadline_s":3600.0,'
        b'"adaptive":null,"grace_s":null,"silence_s":60.0,"late":"drop","staleness":0.5,"max_staleness":10,"max_attempts":3},'
        b'"asynchronous":null,'
        b'"aggregation":{"weighting":"examples","max_weight":null,"max_norm":null,"over_norm":"clip"},'
        b'"evaluation":{"every":1},'
        b'"convergence":null,'
        b'"privacy":{"secure_aggregation":false,"mode":"malicious","min_survivors":3,"b":16,"clip":10.0,"drop":0.05,"step_s":60.0,'
        b'"homomorphic":false,"dp":null},'
        b'"compression":{"upload":"none","fraction":null,"bits":null,"wrap":null,"rank":null,"download":"none"}}'
    )


@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"cohort": {"count": 3}},
        {"cohort": {"fraction": 0.1, "min_clients": 5, "quorum": 5}},
        {"training": {"steps": 4}},
        {"training": {"epochs": 2, "optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.1}},
        {"convergence": {"metric": "accuracy", "patience": 1}},
    ],
)
def test_the_canonical_text_reads_back_as_the_same_run(tables: dict[str, Any]) -> None:
    spec = validate(RunSpec, {"data": DATA, **tables}, "test")
    again = validate_json(RunSpec, spec.canonical, "test")
    assert again == spec
    assert again.canonical == spec.canonical
    assert again.digest == spec.digest


def test_writing_a_default_out_does_not_make_another_run() -> None:
    short = validate(RunSpec, {"data": DATA}, "test")
    long = validate(RunSpec, {"data": {**DATA, "steps": None}, "rounds": 10, "model": {"layers": 2}}, "test")
    assert short.digest == long.digest
    assert short.digest != validate(RunSpec, {"data": DATA, "rounds": 11}, "test").digest


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"training": {"epochs": 1, "steps": 1}}, "training.epochs and training.steps exclude each other; keep one"),
        ({"training": {"momentum": 0.9}}, "training.momentum belongs to optimizer = 'sgd', not to 'adam'"),
        ({"cohort": {"count": 3, "fraction": 0.5}}, "cohort.count and cohort.fraction exclude each other; keep one"),
        ({"cohort": {"count": 3, "fraction": 1.0}}, "cohort.count and cohort.fraction exclude each other; keep one"),
        ({"cohort": {"quorum": 3}}, "cohort.quorum (3) is more than the smallest cohort (2); lower quorum"),
        ({"cohort": {"quorum": 5, "count": 4}}, "cohort.quorum (5) is more than the smallest cohort (4)"),
        ({"convergence": {}, "evaluation": {"every": 0}}, "convergence needs evaluations; set evaluation.every to 1"),
        ({"rounds": 0}, "'rounds' = 0: Input should be greater than or equal to 1"),
        ({"seed": -1}, "'seed' = -1"),
        ({"seed": 1 << 63}, "'seed' = 9223372036854775808"),
        ({"name": "a b"}, "'name' = 'a b'"),
        ({"name": "line\n"}, "'name'"),
        ({"data": {"features": 2, "classes": 1}}, "'data.classes' = 1"),
        ({"training": {"learning_rate": float("nan")}}, "'training.learning_rate' = nan"),
        ({"training": {"learning_rate": float("inf")}}, "'training.learning_rate' = inf"),
        ({"training": {"learning_rate": 0}}, "'training.learning_rate' = 0"),
        ({"cohort": {"fraction": 1.5}}, "'cohort.fraction' = 1.5"),
        ({"model": {"kind": "transformer"}}, "'model.kind' = 'transformer': Input should be 'rnn', 'lstm' or 'gru'"),
    ],
)
def test_what_contradicts_or_is_out_of_range_is_named(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(RunSpec, {"data": DATA, **tables}, "run.toml")
    assert str(refused.value).startswith("run.toml: ")
    assert said in str(refused.value)


def test_a_specification_does_not_change() -> None:
    spec = validate(RunSpec, {"data": DATA}, "test")
    with pytest.raises(ValidationError, match="frozen"):
        spec.rounds = 3  # type: ignore[misc]


@given(st.integers(1, 20), st.none() | st.floats(0.01, 1), st.integers(0, 100))
def test_a_cohort_is_the_share_but_never_too_few_or_too_many(least: int, fraction: float | None, more: int) -> None:
    cohort = CohortSpec(min_clients=least, fraction=fraction)
    connected = cohort.required + more
    assert cohort.required == least
    assert cohort.size(connected) == max(least, round((fraction or 1) * connected))
    assert least <= cohort.size(connected) <= connected


def test_a_counted_cohort_has_that_size() -> None:
    cohort = CohortSpec(count=5, quorum=4)
    assert (cohort.required, cohort.size(9), cohort.needed(5)) == (5, 5, 4)
    assert CohortSpec().needed(7) == 7


@pytest.mark.parametrize(
    ("tables", "fewest"),
    [
        ({}, 2),
        ({"cohort": {"min_clients": 5}}, 5),
        ({"cohort": {"min_clients": 5, "quorum": 3}}, 3),
        ({"cohort": {"min_clients": 5, "count": 2}}, 2),
        ({"cohort": {"min_clients": 5, "fraction": 0.01, "over_select": 2.0}}, 5),
        ({"cohort": {"min_clients": 5}, "asynchronous": {"buffer": 4}}, 4),
        ({"cohort": {"min_clients": 5, "quorum": 3}, "asynchronous": {"buffer": 4}}, 3),
    ],
)
def test_how_few_clients_can_be_behind_a_model(tables: dict[str, Any], fewest: int) -> None:
    assert validate(RunSpec, {"data": DATA, **tables}, "test").smallest_sum == fewest


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"over_norm": "refuse"}, "needs aggregation.max_norm"),
        ({"max_norm": 0.0}, "max_norm"),
        ({"max_norm": float("inf")}, "max_norm"),
        ({"weighting": "uniform", "max_weight": 5}, "with 'uniform' each counts as one"),
    ],
)
def test_bounds_of_an_update_that_make_no_sense(table: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        validate(RunSpec, {"data": DATA, "aggregation": table}, "test")
