"""Tallies: integers that add up the same over any partition, and the metrics they tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqfed.common.errors import ConfigError
from seqfed.common.metrics import (
    BINS,
    MAX_CLASSES,
    MAX_HISTOGRAMS,
    MEANS,
    NEEDS,
    SMALLER_IS_BETTER,
    UNIT,
    add,
    main_metrics,
    metric_names,
    names,
    require_metric,
    spread,
    summary,
    units,
)
from seqfed.common.spec import ConvergenceSpec, RunSpec
from seqfed.v1 import federation_pb2

tallies = st.lists(st.dictionaries(st.sampled_from(["examples", "loss", "correct"]), st.integers()), max_size=8)


@given(tallies, st.integers(0, 8))
def test_add_does_not_depend_on_the_partition_or_the_order(found: list[dict[str, int]], cut: int) -> None:
    names = {name for tally in found for name in tally}
    slow = {name: sum(tally.get(name, 0) for tally in found) for name in names}
    assert add(found) == slow
    assert add([add(found[:cut]), add(found[cut:])]) == slow
    assert add(reversed(found)) == slow


@given(st.floats(-1e9, 1e9))
def test_units_are_the_nearest(value: float) -> None:
    assert abs(Fraction(units(value)) - Fraction(value) * int(UNIT)) <= Fraction(1, 2)


@pytest.mark.parametrize(
    ("tally", "expected"),
    [
        ({}, {}),
        ({"examples": 0, "loss": 0, "correct": 0}, {}),
        ({"loss": 5}, {}),
        ({"examples": 4, "correct": 3, "loss": 1 << 20}, {"loss": 0.25, "accuracy": 0.75}),
        ({"examples": 2, "correct": 3, "labels": 4}, {"accuracy": 0.75}),
        (
            {"examples": 1, "values": 2, "squared_error": 9 << 21, "absolute_error": 3 << 20},
            {"rmse": 3.0, "mse": 9.0, "mae": 1.5},
        ),
        ({"examples": 2, "squared_error": 9 << 21}, {}),
        ({"examples": 2, "loss": 1, "loss.high": 1 << 21}, {"loss": 2.0**40 + 2.0**-21}),
        ({"examples": 4, "tokens": 4, "loss": 4 << 20}, {"loss": 1.0, "perplexity": math.e}),
        ({"examples": 1, "tokens": 1, "loss": 1 << 40}, {"loss": 2.0**20, "perplexity": math.exp(709)}),
        ({"examples": 8, "hits.5": 2, "hits.10": 4}, {"recall_at_5": 0.25, "recall_at_10": 0.5}),
        ({"tp.0": 1, "actual.0": 1, "predicted.0": 3, "actual.2": 2}, {"macro_f1": 0.25}),
        ({"pos.0.9": 1, "neg.0.9": 1}, {"auroc": 0.5, "average_precision": 0.5}),
        ({"pos.0.9": 1, "neg.0.8": 1, "pos.1.0": 3}, {"auroc": 1.0, "average_precision": 1.0}),
        ({"pos.7.2": 1, "neg.7.4": 3, "pos.12.1": 1, "neg.12.0": 1}, {"auroc": 0.5, "average_precision": 0.625}),
        ({"pos.0.1": 1}, {}),
        ({"examples": 2, "something_new": 7}, {}),
    ],
)
def test_summary_by_hand(tally: Mapping[str, int], expected: dict[str, float]) -> None:
    assert summary(tally) == expected


def test_a_mean_of_unequal_parts_is_the_mean_of_the_whole() -> None:
    parts = [{"examples": 1, "correct": 1}, {"examples": 99, "correct": 0}]
    assert summary(add(parts)) == {"accuracy": 0.01}


def test_every_metric_has_a_direction() -> None:
    assert NEEDS.keys() >= SMALLER_IS_BETTER
    assert NEEDS.keys() == MEANS.keys() | {"perplexity", "macro_f1", "auroc", "average_precision", "rmse"}
    assert "accuracy" not in SMALLER_IS_BETTER
    assert math.log2(UNIT) == 20  # tallies of other versions are in these units


# The sums and metrics of a run ----------------------------------------------------------------------------------------


def run(data: Mapping[str, object], task: str = "classification", **changes: object) -> RunSpec:
    return RunSpec.model_validate({"data": data, "task": {"kind": task}, **changes})


NUMBERS = {"features": 1, "steps": 3, "stride": 1}
SEQUENCE = {"vocabulary": tuple("abc"), "steps": 3}


@pytest.mark.parametrize(
    ("spec", "count", "metrics", "main"),
    [
        (run({"features": 1, "classes": 3}), 13, "loss accuracy macro_f1", "loss accuracy"),
        (
            run({"features": 1, "classes": 2}),
            10 + 2 * BINS,
            "loss accuracy macro_f1 auroc average_precision",
            "loss accuracy auroc",
        ),
        (run({"features": 1, "classes": 6}), 23, "loss accuracy macro_f1 recall_at_5", "loss accuracy"),
        (
            run({"features": 1, "classes": MAX_CLASSES + 1}),
            6,
            "loss accuracy recall_at_5 recall_at_10",
            "loss accuracy",
        ),
        (
            run({"features": 1, "targets": 3}, "multilabel"),
            5 + 3 * 3 + 3 * 2 * BINS,
            "loss accuracy macro_f1 auroc average_precision",
            "loss accuracy auroc",
        ),
        (
            run({"features": 1, "targets": MAX_HISTOGRAMS + 1}, "multilabel"),
            5 + 3 * (MAX_HISTOGRAMS + 1),
            "loss accuracy macro_f1",
            "loss accuracy",
        ),
        (run({"features": 1, "targets": 3}, "regression"), 8, "loss rmse mse mae", "rmse mae"),
        (run(NUMBERS, "forecast"), 8, "loss rmse mse mae", "rmse mae"),
        (
            run(NUMBERS, "anomaly"),
            8 + 2 * BINS,
            "loss auroc average_precision rmse mse mae",
            "rmse mae auroc",
        ),
        (run(SEQUENCE, "next_token"), 5, "loss perplexity accuracy", "loss perplexity accuracy"),
    ],
)
def test_the_sums_and_metrics_of_each_task(spec: RunSpec, count: int, metrics: str, main: str) -> None:
    assert len(names(spec)) == len(set(names(spec))) == count
    assert " ".join(metric_names(spec)) == metrics
    assert " ".join(main_metrics(spec)) == main
    everything = summary(dict.fromkeys(names(spec), 1))
    assert tuple(everything) == metric_names(spec)  # no metric without its sums, none that the task has not


SMALL = [
    run({"features": 1, "classes": 2}),
    run({"features": 1, "targets": 2}, "multilabel"),
    run({"features": 1, "targets": 2}, "regression"),
    run(NUMBERS, "anomaly"),
    run({"vocabulary": tuple("abcdefghijkl"), "steps": 3}, "next_token"),
]


def test_the_most_sums_that_a_message_must_hold_fit_in_one() -> None:
    most = run({"features": 1, "targets": MAX_HISTOGRAMS}, "multilabel")
    full = dict.fromkeys(names(most), 1 << 62)
    message = federation_pb2.SubmitEvaluationRequest(tally=full)
    assert message.ByteSize() < 4 << 20  # gRPC's limit
    assert summary(dict.fromkeys(names(most), 1 << 40))["auroc"] == 0.5


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        ("acuracy", "this classification run has loss, accuracy, macro_f1; did you mean 'accuracy'?"),
        ("rmse", "'rmse': this classification run has loss, accuracy, macro_f1"),
        ("x" * 1000, "xx': this classification run has loss, accuracy, macro_f1"),
    ],
)
def test_a_convergence_metric_that_the_task_has_not_is_refused(metric: str, told: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        require_metric(run({"features": 1, "classes": 3}, convergence={"metric": metric}))
    assert str(refusal.value).endswith(told)
    assert len(str(refusal.value)) < 250


def test_a_convergence_metric_that_the_task_has() -> None:
    for spec in (run({"features": 1, "classes": 3}), run(NUMBERS, "forecast"), run(SEQUENCE, "next_token")):
        require_metric(spec)
        for metric in metric_names(spec):
            require_metric(spec.model_copy(update={"convergence": ConvergenceSpec(metric=metric)}))


@given(st.data())
def test_whatever_the_sums_are_the_metrics_are_finite(data: st.DataObject) -> None:
    spec = data.draw(st.sampled_from(SMALL))
    some = st.sampled_from(names(spec)[:40] + names(spec)[-40:])
    tally = data.draw(st.dictionaries(some, st.integers(-(1 << 62), 1 << 62)))
    found = summary(tally)
    assert found.keys() <= set(metric_names(spec))
    assert all(math.isfinite(value) for value in found.values())
    assert all(
        math.isfinite(value) for both in spread({name: [one] for name, one in found.items()}).values() for value in both
    )


# The spread -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_the_spread_is_numpys_quantiles(values: list[float]) -> None:
    found = spread({"loss": values, "accuracy": values})
    for metric, share in (("loss", 0.9), ("accuracy", 0.1)):
        median, worst = found[metric]
        assert median == pytest.approx(float(np.quantile(values, 0.5)), rel=1e-9, abs=1e-6)
        assert worst == pytest.approx(float(np.quantile(values, share)), rel=1e-9, abs=1e-6)
    assert found == spread({"loss": values[::-1], "accuracy": values[::-1]})


# Histograms by the definition -----------------------------------------------------------------------------------------

bins = st.lists(st.tuples(st.integers(0, BINS - 1), st.booleans()), min_size=2, max_size=40)


@given(bins)
def test_auroc_and_average_precision_are_what_their_definitions_count(scored: list[tuple[int, bool]]) -> None:
    tally: dict[str, int] = {}
    for place, positive in scored:
        name = f"{'pos' if positive else 'neg'}.0.{place}"
        tally[name] = tally.get(name, 0) + 1
    pos, neg = ([place for place, positive in scored if positive is kind] for kind in (True, False))
    if not pos or not neg:
        assert summary(tally) == {}
        return
    won = sum(Fraction(1) if p > n else Fraction(p == n, 2) for p in pos for n in neg)
    assert summary(tally)["auroc"] == pytest.approx(float(won / len(pos) / len(neg)))
    precise = sum(Fraction(sum(q >= p for q in pos), sum(q >= p for q, _ in scored)) for p in pos)
    assert summary(tally)["average_precision"] == pytest.approx(float(precise / len(pos)))
