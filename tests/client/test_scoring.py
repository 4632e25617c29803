"""Scores of outputs: against torchmetrics and torch's losses, and the same sums for any partition of the examples."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from seqfed.client.data import Batch
from seqfed.client.scoring import anomaly_scores, own_units, score
from seqfed.common.errors import TrainingFailed
from seqfed.common.metrics import BINS, UNIT, add, carried, main_metrics, metric_names, names, summary
from seqfed.common.spec import RunSpec

with warnings.catch_warnings():  # what torchmetrics and its helpers say of themselves while they load
    warnings.simplefilter("ignore")
    import torch
    import torchmetrics
    from torch.nn import functional
    from torchmetrics.functional import classification as oracle
    from torchmetrics.functional.text import perplexity as perplexity_oracle

NUMBERS = {"features": 2, "steps": 3, "stride": 1}
TOKENS = {"vocabulary": tuple("abcdefghijkl"), "steps": 4}


def run(kind: str, loss: str | None = None, **data: Any) -> RunSpec:
    return RunSpec.model_validate({"data": {"features": 2, **data}, "task": {"kind": kind, "loss": loss}})


CLASSES = run("classification", classes=12)
BINARY = run("classification", classes=2)
LABELS = run("multilabel", targets=3)
REGRESSION = run("regression", targets=3, target_scale=[1.0, 20.0, 0.5], target_mean=[0.0, 5.0, 5.0])
FORECAST = RunSpec.model_validate(
    {"data": {**NUMBERS, "scale": [2.0, 3.0]}, "task": {"kind": "forecast", "horizon": 2, "loss": "huber"}}
)
ANOMALY = RunSpec.model_validate({"data": NUMBERS, "task": {"kind": "anomaly", "loss": "mae"}})
NEXT = RunSpec.model_validate({"data": TOKENS, "task": {"kind": "next_token"}})
RUNS = {"classes": CLASSES, "binary": BINARY, "labels": LABELS, "regression": REGRESSION}
RUNS |= {"forecast": FORECAST, "anomaly": ANOMALY, "next": NEXT}


Cases = tuple[NDArray[np.float32], NDArray[Any], NDArray[np.int64]]


def some(spec: RunSpec, count: int, seed: int, size: float = 2.0) -> Cases:
    """Outputs, labels (some missing where the task has that) and anomalies of so many sequences."""
    draw = np.random.default_rng(seed)
    steps = (spec.data.steps or 1,) if spec.task.kind == "next_token" else ()
    outputs = draw.normal(0, size, (count, *steps, spec.outputs)).astype(np.float32)
    anomalies = draw.integers(-1, 2, count)
    match spec.task.kind:
        case "classification":
            return outputs, draw.integers(0, spec.outputs, count), anomalies
        case "next_token":
            y = draw.integers(0, spec.outputs, (count, *steps))
            lengths = draw.integers(1, y.shape[1] + 1, count)
            y[np.arange(y.shape[1]) >= lengths[:, None]] = -1
            return outputs, y, anomalies
        case "multilabel":
            y = draw.integers(0, 2, outputs.shape).astype(np.float32)
        case _:
            y = (outputs + draw.normal(0, size, outputs.shape)).astype(np.float32)
    y[draw.random(y.shape) < 0.25] = np.nan
    return outputs, y, anomalies


def scored(spec: RunSpec, cases: Cases, which: NDArray[np.int64] | slice = slice(None)) -> dict[str, int]:
    outputs, y, anomalies = cases
    batch = Batch(np.zeros((len(y[which]), 1, 2), np.float32), None, y[which])
    return score(spec, outputs[which], batch, anomalies=anomalies[which])


def tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


# Any partition --------------------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(RUNS)), st.integers(1, 40), st.integers(0, 999), st.data())
def test_any_partition_over_clients_gives_the_pooled_sums_and_metrics(
    kind: str, count: int, seed: int, data: st.DataObject
) -> None:
    spec = RUNS[kind]
    cases = some(spec, count, seed, data.draw(st.sampled_from([0.1, 2.0, 1e4, 1e7])))
    owners = np.array(data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count)))
    order = np.array(data.draw(st.permutations(range(count))))
    parts = [scored(spec, cases, mine) for owner in range(5) if len(mine := order[owners[order] == owner])]
    pooled = scored(spec, cases)
    assert add(parts) == pooled
    assert summary(add(parts)) == summary(pooled)
    assert summary(pooled).keys() <= set(metric_names(spec))
    assert pooled.keys() <= set(names(spec))
    assert all(value >= 0 for value in pooled.values())


@pytest.mark.parametrize("kind", RUNS)
def test_enough_examples_tell_every_metric_of_the_task(kind: str) -> None:
    found = summary(scored(RUNS[kind], some(RUNS[kind], 200, 1)))
    assert tuple(found) == metric_names(RUNS[kind])
    assert set(main_metrics(RUNS[kind])) <= found.keys()
    assert len(set(names(RUNS[kind]))) == len(names(RUNS[kind]))


# Classes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_classes_against_torchmetrics(seed: int) -> None:
    outputs, y, _ = cases = some(CLASSES, 400, seed)
    y[y == 7] = 3  # a class that does not occur, though it may be predicted
    x, labels = tensor(outputs).double(), tensor(y)
    found = summary(scored(CLASSES, cases))
    assert found["accuracy"] == pytest.approx(oracle.multiclass_accuracy(x, labels, 12, average="micro").item())
    assert found["macro_f1"] == pytest.approx(oracle.multiclass_f1_score(x, labels, 12).item(), rel=1e-6)
    for k in (5, 10):
        top = oracle.multiclass_accuracy(x, labels, 12, average="micro", top_k=k).item()
        assert found[f"recall_at_{k}"] == pytest.approx(top)
    assert found["loss"] == pytest.approx(functional.cross_entropy(x, labels).item(), abs=1 / UNIT)


def test_a_class_that_neither_occurs_nor_is_predicted_is_left_out_of_macro_f1() -> None:
    outputs = np.eye(12, dtype=np.float32)[[0, 0, 1]]
    y = np.array([0, 1, 1])
    expected = oracle.multiclass_f1_score(tensor(outputs), tensor(y), 12).item()
    assert summary(scored(CLASSES, (outputs, y, y)))["macro_f1"] == pytest.approx(expected) == 2 / 3


def test_equal_scores_rank_the_lower_class_first() -> None:
    outputs = np.zeros((12, 12), np.float32)
    tally = scored(CLASSES, (outputs, np.arange(12), np.arange(12)))
    assert (tally["correct"], tally["hits.5"], tally["hits.10"]) == (1, 5, 10)


def test_a_large_vocabulary_is_scored_in_pieces() -> None:
    spec = RunSpec.model_validate({"data": {"features": 1, "classes": 50_000}})
    draw = np.random.default_rng(0)
    outputs, y = draw.normal(0, 3, (50, 50_000)).astype(np.float32), draw.integers(0, 50_000, 50)
    tally = scored(spec, (outputs, y, y))
    expected = functional.cross_entropy(tensor(outputs).double(), tensor(y), reduction="none")
    assert tally["loss"] == sum(round(one * UNIT) for one in expected.tolist())
    assert "macro_f1" not in metric_names(spec)


# Histograms -----------------------------------------------------------------------------------------------------------


def binary(count: int, seed: int, rate: float = 0.3) -> tuple[NDArray[np.float32], NDArray[np.int64], torch.Tensor]:
    """Two logits a sequence, labels that follow them, and the positive's probability."""
    draw = np.random.default_rng(seed)
    y = (draw.random(count) < rate).astype(np.int64)
    outputs = draw.normal(0, 1, (count, 2)).astype(np.float32)
    outputs[:, 1] += (1.5 * y - 1).astype(np.float32)
    return outputs, y, torch.softmax(tensor(outputs).double(), dim=1)[:, 1]


def pairs_in_one_bin(tally: dict[str, int]) -> float:
    pos = [tally.get(f"pos.0.{b}", 0) for b in range(BINS)]
    neg = [tally.get(f"neg.0.{b}", 0) for b in range(BINS)]
    return sum(p * n for p, n in zip(pos, neg, strict=True)) / (sum(pos) * sum(neg))


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.02])
@pytest.mark.parametrize("seed", range(3))
def test_the_binned_auroc_is_within_its_bound_of_the_exact_one(seed: int, rate: float) -> None:
    outputs, y, chance = binary(2000, seed, rate)
    tally = scored(BINARY, (outputs, y, y))
    found, exact = summary(tally), oracle.binary_auroc(chance, tensor(y)).item()
    bound = pairs_in_one_bin(tally) / 2
    assert abs(found["auroc"] - exact) <= bound + 1e-6  # torchmetrics counts in float32
    assert bound < 0.005


@pytest.mark.parametrize("seed", range(3))
def test_it_is_torchmetrics_own_of_the_rounded_scores_and_of_the_edges_as_thresholds(seed: int) -> None:
    outputs, y, chance = binary(3000, seed)
    found, labels = summary(scored(BINARY, (outputs, y, y))), tensor(y)
    rounded = (chance * BINS).floor() / BINS
    assert found["auroc"] == pytest.approx(oracle.binary_auroc(rounded, labels).item(), abs=1e-6)
    assert found["average_precision"] == pytest.approx(
        oracle.binary_average_precision(rounded, labels).item(), abs=1e-6
    )
    edges = torch.arange(BINS + 1, dtype=torch.float64) / BINS  # from 0, where all are positive, to 1, where none is
    assert found["auroc"] == pytest.approx(oracle.binary_auroc(chance, labels, thresholds=edges).item(), abs=1e-6)
    assert found["average_precision"] == pytest.approx(
        oracle.binary_average_precision(chance, labels, thresholds=edges).item(), abs=1e-6
    )


def test_certain_scores_lie_in_the_outer_bins() -> None:
    outputs = np.array([[-200, 200], [200, -200], [0, 0]], np.float32)
    tally = scored(BINARY, (outputs, np.array([1, 0, 1]), np.array([0, 0, 0])))
    assert {name for name in tally if name[:3] in {"pos", "neg"}} == {"pos.0.511", "pos.0.256", "neg.0.0"}


@pytest.mark.parametrize("seed", range(3))
def test_labels_with_missing_ones_against_torchmetrics(seed: int) -> None:
    outputs, y, _ = cases = some(LABELS, 500, seed)
    found, tally = summary(scored(LABELS, cases)), scored(LABELS, cases)
    chance, there = torch.sigmoid(tensor(outputs).double()), ~np.isnan(y)
    labels = tensor(np.where(there, y, -1).astype(np.int64))
    rounded = (chance * BINS).floor() / BINS
    for metric, expected in (
        ("accuracy", oracle.multilabel_accuracy(chance, labels, 3, average="micro", ignore_index=-1)),
        ("macro_f1", oracle.multilabel_f1_score(chance, labels, 3, ignore_index=-1)),
        ("auroc", oracle.multilabel_auroc(rounded, labels, 3, ignore_index=-1)),
        ("average_precision", oracle.multilabel_average_precision(rounded, labels, 3, ignore_index=-1)),
    ):
        assert found[metric] == pytest.approx(expected.item(), abs=1e-6), metric
    assert tally["labels"] == there.sum()
    assert tally["examples"] == there.any(axis=1).sum() < len(y)
    losses = functional.binary_cross_entropy_with_logits(
        tensor(outputs).double(), tensor(np.nan_to_num(y)).double(), reduction="none"
    ).numpy()
    own = [losses[row][there[row]].mean() for row in range(len(y)) if there[row].any()]
    assert found["loss"] == pytest.approx(np.mean(own), abs=1 / UNIT)


def test_a_label_of_one_kind_only_is_left_out_of_the_mean() -> None:
    outputs, y, anomalies = some(LABELS, 100, 5)
    y[:, 1] = 1
    y[:, 2] = np.nan
    outputs[:, 2] = np.nan  # and what is not asked for may be anything
    found = summary(scored(LABELS, (outputs, y, anomalies)))
    kept = ~np.isnan(y[:, 0])
    rounded = (torch.sigmoid(tensor(outputs[kept, 0]).double()) * BINS).floor() / BINS
    expected = oracle.binary_auroc(rounded, tensor(y[kept, 0].astype(np.int64))).item()
    assert found["auroc"] == pytest.approx(expected, abs=1e-6)


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "data", "mean", "scale"),
    [
        ({"kind": "regression"}, {"targets": 2, "target_mean": (5.0, 6.0)}, [5, 6], [1, 1]),
        ({"kind": "regression"}, {"targets": 2, "target_scale": (2.0, 4.0)}, [0, 0], [2, 4]),
        ({"kind": "forecast", "horizon": 2}, {"mean": (1.0, -1.0), "scale": (2.0, 3.0)}, [1, -1, 1, -1], [2, 3, 2, 3]),
        ({"kind": "anomaly"}, {}, [0, 0], [1, 1]),
    ],
)
def test_the_units_of_each_output(
    task: dict[str, Any], data: dict[str, Any], mean: list[float], scale: list[float]
) -> None:
    found = own_units(RunSpec.model_validate({"data": {**NUMBERS, **data}, "task": task}))
    assert [one.tolist() for one in found] == [mean, scale]


@pytest.mark.parametrize("seed", range(3))
def test_numbers_against_torchmetrics_in_the_datas_own_units(seed: int) -> None:
    for spec, scale, mean in (
        (REGRESSION, np.array([1.0, 20.0, 0.5]), np.array([0.0, 5.0, 5.0])),
        (FORECAST, np.array([2.0, 3.0, 2.0, 3.0]), np.zeros(4)),
    ):
        outputs, y, _ = cases = some(spec, 300, seed)
        found, there = summary(scored(spec, cases)), ~np.isnan(y)
        said, true = (tensor((one.astype(np.float64) * scale + mean)[there]) for one in (outputs, y))
        oracles = torchmetrics.functional
        for metric, expected in (
            ("mse", oracles.mean_squared_error(said, true)),
            ("rmse", oracles.mean_squared_error(said, true, squared=False)),
            ("mae", oracles.mean_absolute_error(said, true)),
        ):
            assert found[metric] == pytest.approx(expected.item(), rel=1e-5), metric


@pytest.mark.parametrize(
    ("loss", "of_torch"),
    [
        ("mse", functional.mse_loss),
        (None, functional.mse_loss),
        ("mae", functional.l1_loss),
        ("huber", functional.huber_loss),
    ],
)
def test_the_loss_of_numbers_is_the_tasks_mean_over_those_that_are_there(
    loss: str | None, of_torch: Callable[..., torch.Tensor]
) -> None:
    spec = run("regression", loss, targets=3)
    outputs, y, _ = cases = some(spec, 200, 3)
    own = []
    for said, true in zip(outputs.astype(np.float64), y.astype(np.float64), strict=True):
        there = ~np.isnan(true)
        if there.any():
            own.append(of_torch(tensor(said[there]), tensor(true[there])).item())
    tally = scored(spec, cases)
    assert tally["examples"] == len(own)
    assert summary(tally)["loss"] == pytest.approx(np.mean(own), abs=1 / UNIT)


def test_sums_of_large_numbers_are_exact_beyond_64_bits() -> None:
    spec = run("regression", targets=1, target_scale=[1e6])
    errors = np.arange(1.0, 1001.0, dtype=np.float32)[:, None]  # of 1 to 1000 millions
    tally = scored(spec, (errors, np.zeros_like(errors), np.zeros(1000, np.int64)))
    squares = sum(int(number) ** 2 for number in range(1, 1001)) * 10**12 * 2**20
    assert squares > 1 << 63
    assert tally["squared_error"] + (tally["squared_error.high"] << 40) == squares
    assert max(tally.values()) < 1 << 62
    assert summary(tally)["mse"] == squares / 2**20 / 1000


@given(st.integers(0, 1 << 90))
def test_a_sum_and_what_it_carried_over_are_the_sum(total: int) -> None:
    found = carried("loss", total)
    assert found["loss"] + (found.get("loss.high", 0) << 40) == total
    assert summary({"examples": 1, **found})["loss"] == total / 2**20


def test_anomalies_against_torchmetrics() -> None:
    outputs, y, anomalies = cases = some(ANOMALY, 400, 2)
    outputs[anomalies == 1] += 3
    found = summary(scored(ANOMALY, cases))
    scores = anomaly_scores(outputs, y)
    lost = np.isnan(y).all(axis=1)
    assert np.isnan(scores[lost]).all()
    row = 7
    assert scores[row] == pytest.approx(np.nanmean((outputs[row].astype(np.float64) - y[row]) ** 2))
    known = (anomalies >= 0) & ~lost
    squashed = np.floor(scores / (1 + scores) * BINS)[known] / BINS
    expected = oracle.binary_auroc(tensor(squashed), tensor(anomalies[known])).item()
    assert found["auroc"] == pytest.approx(expected, abs=1e-6)
    assert found["auroc"] > 0.6
    unlabelled = score(ANOMALY, outputs, Batch(np.zeros((400, 1, 2), np.float32), None, y))
    assert summary(unlabelled).keys() == {"loss", "rmse", "mse", "mae"}


# Tokens ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_tokens_against_torchmetrics(seed: int) -> None:
    outputs, y, _ = cases = some(NEXT, 60, seed)
    found, tally = summary(scored(NEXT, cases)), scored(NEXT, cases)
    x, labels = tensor(outputs).double(), tensor(y)
    perplexity = perplexity_oracle(x, labels, ignore_index=-1).item()
    assert found["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    flat, own = x[labels >= 0], labels[labels >= 0]
    assert tally["examples"] == tally["tokens"] == len(own) < y.size
    assert found["accuracy"] == pytest.approx(oracle.multiclass_accuracy(flat, own, 13, average="micro").item())
    for k in (5, 10):
        top = oracle.multiclass_accuracy(flat, own, 13, average="micro", top_k=k).item()
        assert found[f"recall_at_{k}"] == pytest.approx(top)


# What cannot be scored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(kind: str, bad: float) -> None:
    outputs, y, anomalies = some(RUNS[kind], 5, 1)
    y = np.zeros_like(y)
    outputs[2] = bad
    with pytest.raises(TrainingFailed, match="validation data is not finite; lower the run's learning rate"):
        scored(RUNS[kind], (outputs, y, anomalies))


def test_an_error_too_large_for_the_sums_is_named() -> None:
    outputs, y = np.full((2, 3), 1e20, np.float32), np.zeros((2, 3), np.float32)
    with pytest.raises(TrainingFailed, match="reaches 1e\\+40.*or set its data.scale or data.target_scale"):
        scored(REGRESSION, (outputs, y, np.zeros(2, np.int64)))


@pytest.mark.parametrize("kind", ["labels", "regression", "forecast", "anomaly", "next"])
def test_nothing_to_be_scored_by_counts_as_nothing(kind: str) -> None:
    outputs, y, anomalies = some(RUNS[kind], 4, 1)
    y = np.full_like(y, -1 if kind == "next" else np.nan)
    tally = scored(RUNS[kind], (outputs, y, anomalies))
    assert set(tally.values()) == {0}
    assert summary(tally) == {}


def test_focal_and_weights_are_of_the_training_only() -> None:
    cases = some(CLASSES, 50, 4)
    task = {"kind": "classification", "loss": "focal", "class_weights": [float(n + 1) for n in range(12)]}
    spec = RunSpec.model_validate({"data": {"features": 2, "classes": 12}, "task": task})
    assert scored(spec, cases) == scored(CLASSES, cases)
