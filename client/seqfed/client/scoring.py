"""What a network's outputs are worth: a tally of exact sums, in numpy alone, so that whoever has outputs can score them.

Losses are the plain ones, without class weights and without focal's factor: what a run trains by is its own choice, what its
models are compared by is not. They are computed in float64 from each example's own outputs and rounded to units example
by example, so a tally does not depend on how the examples were put into batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from seqfed.client.data import Batch
from seqfed.common.errors import TrainingFailed
from seqfed.common.metrics import BINS, CARRY, MAX_CLASSES, MAX_HISTOGRAMS, RANKS, UNIT
from seqfed.common.spec import RunSpec

Reals = NDArray[np.float64]
Integers = NDArray[np.int64]

PIECE: Final = 1 << 20  # numbers turned into float64 at once: 8 MB, whatever the vocabulary
LARGEST: Final = 2.0**62  # of one example's loss or error: a million of them stay within the sums
DELTA: Final = 1.0  # where huber turns from a square to a line, torch's default


def score(
    spec: RunSpec, outputs: NDArray[np.float32], batch: Batch, *, anomalies: Integers | None = None
) -> dict[str, int]:
    """The tally of these outputs, under names of `metrics.names(spec)`; counts by class and bin that are 0 are left out.

    outputs: (B, spec.outputs), or (B, T, spec.outputs) for next_token; of numbers in normalised units, as batch.y is.
    anomalies: int64 (B,), 1 for a known anomaly, 0 for none, -1 unknown; of an anomaly task.

    Sequences without any label or number to be scored by, and padded steps, are not counted. Raises TrainingFailed if a
    loss is not finite, or too large for the sums.
    """
    with np.errstate(all="ignore"):  # what is not finite is refused by name
        match spec.task.kind:
            case "classification":
                return _classification(spec, outputs, batch.y.astype(np.int64, copy=False))
            case "next_token":
                real = batch.y >= 0
                return _next_token(outputs[real], batch.y[real].astype(np.int64, copy=False))
            case "multilabel":
                return _multilabel(outputs, batch.y)
            case _:
                return _numbers(spec, outputs, batch.y, anomalies)


def _classification(spec: RunSpec, outputs: NDArray[np.float32], y: Integers) -> dict[str, int]:
    losses, ranks, predicted = _against(outputs, y)
    tally = {
        "examples": len(y),
        **_sum("loss", losses),
        "correct": int((predicted == y).sum()),
        **_hits(outputs, ranks),
    }
    classes = spec.outputs
    if classes <= MAX_CLASSES:
        tally |= _counts("tp", y[predicted == y], classes)
        tally |= _counts("actual", y, classes) | _counts("predicted", predicted, classes)
    if classes == 2:
        chances = _sigmoid(outputs[:, 1].astype(np.float64) - outputs[:, 0])
        tally |= _histogram(0, chances, y)
    return tally


def _next_token(outputs: NDArray[np.float32], y: Integers) -> dict[str, int]:
    losses, ranks, predicted = _against(outputs, y)
    tally = {"examples": len(y), "tokens": len(y), **_sum("loss", losses)}
    return {**tally, "correct": int((predicted == y).sum()), **_hits(outputs, ranks)}


def _multilabel(outputs: NDArray[np.float32], y: NDArray[np.float32] | Integers) -> dict[str, int]:
    x, there = outputs.astype(np.float64), ~np.isnan(y)
    losses = np.maximum(x, 0) - x * y + np.log1p(np.exp(-np.abs(x)))  # of logits, without overflow
    counted = there.any(axis=1)
    actual, predicted = there & (y == 1), there & (x > 0)
    right = there & (actual == predicted)
    tally = {
        "examples": int(counted.sum()),
        **_sum("loss", _mean_where(there, losses)[counted]),
        "correct": int(right.sum()),
        "labels": int(there.sum()),
    }
    labels = x.shape[1]
    if labels <= MAX_CLASSES:
        for name, which in (("tp", actual & predicted), ("actual", actual), ("predicted", predicted)):
            tally |= _nonzero(name, which.sum(axis=0))
    if labels <= MAX_HISTOGRAMS:
        chances = _sigmoid(x)
        for label in range(labels):
            known = there[:, label]
            tally |= _histogram(label, chances[known, label], actual[known, label].astype(np.int64))
    return tally


def _numbers(
    spec: RunSpec, outputs: NDArray[np.float32], y: NDArray[np.float32] | Integers, anomalies: Integers | None
) -> dict[str, int]:
    there = ~np.isnan(y)
    errors = np.where(there, outputs.astype(np.float64) - y, 0.0)
    absolute, counted = np.abs(errors), there.any(axis=1)
    match spec.task.loss:
        case "mae":
            losses = absolute
        case "huber":
            losses = np.where(absolute < DELTA, absolute**2 / 2, DELTA * (absolute - DELTA / 2))
        case _:
            losses = absolute**2
    own = absolute * own_units(spec)[1]
    tally = {
        "examples": int(counted.sum()),
        **_sum("loss", _mean_where(there, losses)[counted]),
        "values": int(there.sum()),
        **_sum("squared_error", (own**2)[there]),
        **_sum("absolute_error", own[there]),
    }
    if spec.task.kind == "anomaly" and anomalies is not None:
        known = counted & (anomalies >= 0)
        error = anomaly_scores(outputs[known], y[known])
        tally |= _histogram(0, error / (1 + error), anomalies[known])
    return tally


def anomaly_scores(outputs: NDArray[np.float32], y: NDArray[np.float32] | Integers) -> Reals:
    """Each sequence's mean squared forecast error (B,), in normalised units; NaN where no number is there to compare."""
    there = ~np.isnan(y)
    errors = np.where(there, outputs.astype(np.float64) - y, 0.0)
    return np.where(there.any(axis=1), _mean_where(there, errors**2), np.nan)


def own_units(spec: RunSpec) -> tuple[Reals, Reals]:
    """(mean, scale), each float64 (spec.outputs,): outputs * scale + mean is in the data's own units."""
    data, times = spec.data, 1
    mean, scale = data.target_mean, data.target_scale
    if spec.task.kind != "regression":
        mean, scale, times = data.mean, data.scale, spec.task.horizon
    each = spec.outputs // times
    return np.tile(np.array(mean or [0.0] * each), times), np.tile(np.array(scale or [1.0] * each), times)


# Of classes -----------------------------------------------------------------------------------------------------------


def _against(outputs: NDArray[np.float32], y: Integers) -> tuple[Reals, Integers, Integers]:
    """Of each row of scores (N, C) and its class (N,): cross-entropy, the class's rank from 0, the highest class."""
    losses, ranks, predicted = np.empty(len(y)), np.empty(len(y), np.int64), np.empty(len(y), np.int64)
    for part in _pieces(*outputs.shape):
        x, own = outputs[part].astype(np.float64), y[part, None]
        highest = x.max(axis=1, keepdims=True)
        chosen = np.take_along_axis(x, own, axis=1)
        losses[part] = (highest + np.log(np.exp(x - highest).sum(axis=1, keepdims=True)) - chosen)[:, 0]
        # the lower class first among equals, as argmax has it
        ahead = (x > chosen) | ((x == chosen) & (np.arange(x.shape[1]) < own))
        ranks[part], predicted[part] = ahead.sum(axis=1), x.argmax(axis=1)
    return losses, ranks, predicted


def _pieces(rows: int, width: int) -> Iterator[slice]:
    step = max(1, PIECE // width)
    return (slice(start, start + step) for start in range(0, rows, step))


def _hits(outputs: NDArray[np.float32], ranks: Integers) -> dict[str, int]:
    return {f"hits.{k}": int((ranks < k).sum()) for k in RANKS if k < outputs.shape[1]}


def _counts(name: str, classes: Integers, count: int) -> dict[str, int]:
    return _nonzero(name, np.bincount(classes, minlength=count))


def _histogram(label: int, scores: Reals, positive: Integers) -> dict[str, int]:
    """Counts of scores from 0 to 1 by bin, those of positives (1) and of the others (0) apart."""
    if not np.isfinite(scores).all():
        raise _failed("score", float("nan"))
    bins = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    pos, neg = bins[positive == 1], bins[positive == 0]
    return _nonzero(f"pos.{label}", np.bincount(pos)) | _nonzero(f"neg.{label}", np.bincount(neg))


def _nonzero(name: str, counts: Integers) -> dict[str, int]:
    return {f"{name}.{place}": int(counts[place]) for place in np.flatnonzero(counts)}


def _sigmoid(x: Reals) -> Reals:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


# Sums -----------------------------------------------------------------------------------------------------------------


def _mean_where(there: NDArray[np.bool_], values: Reals) -> Reals:
    """The mean of each row's values that are there; 0 for a row without any."""
    mean: Reals = np.where(there, values, 0.0).sum(axis=1) / np.maximum(there.sum(axis=1), 1)
    return mean


def _sum(name: str, values: Reals) -> dict[str, int]:
    """The values' sum in units, what is beyond CARRY of each under NAME.high; raises TrainingFailed."""
    if len(values) and not (largest := float(values.max(initial=0.0))) < LARGEST:
        raise _failed(name.replace("_", " "), largest)
    whole = np.rint(values * UNIT)  # exact from here on: integers, and powers of two
    high = np.floor(whole / CARRY)
    found = {name: int((whole - high * CARRY).astype(np.int64).sum())}
    return found | ({f"{name}.high": int(high.astype(np.int64).sum())} if high.any() else {})


def _failed(what: str, value: float) -> TrainingFailed:
    if np.isfinite(value):
        return TrainingFailed(
            f"the model's {what} on the validation data reaches {value:.3g}, the sums take {LARGEST:.3g} at most; lower the "
            "run's learning rate, or set its data.scale or data.target_scale"
        )
    return TrainingFailed(f"the model's {what} on the validation data is not finite; lower the run's learning rate")
