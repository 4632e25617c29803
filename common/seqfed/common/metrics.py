"""Metrics as exact sums: a tally of integers that adds up over batches, clients and rounds in any order.

An average of averages is wrong when clients differ in size, and a sum of floats depends on its order; a tally is neither. So
the metrics of any partition of the examples are those of the pooled examples, to the last bit.

Real-valued sums (a loss) are counted in units of 2^-20, each example's rounded to the nearest. What of an example's units
is beyond 2^40 is counted in a second sum, NAME.high, in units of 2^40 of them: the squares of errors in a currency would
leave 64 bits after four examples otherwise.

AUROC and average precision come from a histogram of the scores of either kind, in BINS equal bins of [0, 1]. Two scores in
one bin are taken for equal, and a tie counts one half, so the binned AUROC is the exact one of the rounded scores. It
differs from the exact one of the scores themselves by at most half the share of (positive, negative) pairs that lie in
one bin: sum over bins of pos * neg, / (2 * all pos * all neg); 1 / (2 * BINS) = 0.001 where the scores are spread evenly.
Average precision is that of the rounded scores too: the sum over bins, from the highest score, of precision times the gain
in recall, so a bin's positives get the precision at the end of their bin.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from seqfed.common.errors import ConfigError
from seqfed.common.spec import RunSpec

Tally = Mapping[str, int]

UNIT: Final = float(1 << 20)  # of a real-valued sum: 1e-6 of resolution
CARRY: Final = 1 << 40  # units; a million examples of up to this add up to 2^60
BINS: Final = 512  # of a histogram: 8 kB a label on the wire at most, and an AUROC to the third digit
MAX_CLASSES: Final = 1000  # with counts of their own: beyond, a message would be all counts, and macro F1 mostly noise
MAX_HISTOGRAMS: Final = 64  # labels with histograms: 64 x 2 x 512 sums are 1.3 MB, a message may have 4
RANKS: Final = (5, 10)  # of recall at k
REAL: Final = frozenset({"loss", "squared_error", "absolute_error"})  # the sums that are counted in units
TRAINED: Final = frozenset({"examples", "tokens", "loss", "loss.high"})  # the sums of a training, all there may be
MEANS: Final = {  # metric -> (its sum, what it is divided by)
    "loss": ("loss", "examples"),
    "accuracy": ("correct", "examples"),
    "recall_at_5": ("hits.5", "examples"),
    "recall_at_10": ("hits.10", "examples"),
    "mse": ("squared_error", "values"),
    "mae": ("absolute_error", "values"),
}
NEEDS: Final = {  # metric, in the order of showing -> a sum without which no tally can tell it
    "loss": "loss",
    "perplexity": "tokens",
    "accuracy": "correct",
    "macro_f1": "actual.0",
    "auroc": "pos.0.0",
    "average_precision": "pos.0.0",
    "recall_at_5": "hits.5",
    "recall_at_10": "hits.10",
    "rmse": "squared_error",
    "mse": "squared_error",
    "mae": "absolute_error",
}
MAIN: Final = {  # what a table has room for
    "classification": ("loss", "accuracy", "auroc"),
    "multilabel": ("loss", "accuracy", "auroc"),
    "regression": ("rmse", "mae"),
    "forecast": ("rmse", "mae"),
    "next_token": ("loss", "perplexity", "accuracy"),
    "anomaly": ("rmse", "mae", "auroc"),
}
SMALLER_IS_BETTER: Final = frozenset({"loss", "perplexity", "mse", "mae", "rmse"})
MOST_EXP: Final = 709.0  # exp of more has no float


def units(value: float) -> int:
    """A real-valued sum in whole units of 2^-20, rounded to the nearest."""
    return round(value * UNIT)


def carried(name: str, total: int) -> dict[str, int]:
    """A real-valued sum of so many units under its one or two names.

    >>> carried("loss", 7), carried("loss", 3 * CARRY + 7)
    ({'loss': 7}, {'loss': 7, 'loss.high': 3})
    """
    high, low = divmod(total, CARRY)
    return {name: low, f"{name}.high": high} if high else {name: low}


def names(spec: RunSpec) -> tuple[str, ...]:
    """Every sum that a tally of this run may have, in a fixed order.

    `examples`: sequences (next_token: tokens, and `tokens` is the same) that have something to be scored by; `loss`: the
    sum of their plain losses. `correct`: right answers, of `examples`, or of multilabel's `labels` that are there. `tp.c`,
    `actual.c`, `predicted.c`: of class or label c. `hits.k`: the true class is among the k highest. `pos.l.b`, `neg.l.b`:
    label l's positives and negatives with a score in bin b. `squared_error`, `absolute_error`: over the `values` numbers
    that are there, in the data's own units.
    """
    found = ["examples", "loss", "loss.high"]
    match spec.task.kind:
        case "classification":
            found += ["correct", *_per_class(spec.outputs), *_ranks(spec.outputs)]
            found += _histograms(1 if spec.outputs == 2 else 0)
        case "multilabel":
            found += ["correct", "labels", *_per_class(spec.outputs)]
            found += _histograms(spec.outputs if spec.outputs <= MAX_HISTOGRAMS else 0)
        case "next_token":
            found += ["correct", "tokens", *_ranks(spec.outputs)]
        case kind:
            found += ["values", "squared_error", "squared_error.high", "absolute_error", "absolute_error.high"]
            found += _histograms(1 if kind == "anomaly" else 0)
    return tuple(found)


def _per_class(count: int) -> list[str]:
    return [f"{one}.{c}" for c in range(count) for one in ("tp", "actual", "predicted")] if count <= MAX_CLASSES else []


def _ranks(count: int) -> list[str]:
    return [f"hits.{k}" for k in RANKS if k < count]


def _histograms(labels: int) -> list[str]:
    return [f"{kind}.{label}.{b}" for label in range(labels) for kind in ("pos", "neg") for b in range(BINS)]


def metric_names(spec: RunSpec) -> tuple[str, ...]:
    """The metrics that an evaluation of this run may tell, in the order of showing."""
    sums = set(names(spec))
    return tuple(metric for metric, needed in NEEDS.items() if needed in sums)


def main_metrics(spec: RunSpec) -> tuple[str, ...]:
    """Those of them that a table shows."""
    there = metric_names(spec)
    return tuple(metric for metric in MAIN[spec.task.kind] if metric in there)


def require_metric(spec: RunSpec) -> None:
    """Raise ConfigError if the run waits for the convergence of a metric that its task has not."""
    if spec.convergence is None or spec.convergence.metric in (there := metric_names(spec)):
        return
    close = difflib.get_close_matches(spec.convergence.metric, there, n=1)
    raise ConfigError(
        f"convergence.metric = {spec.convergence.metric[:80]!r}: this {spec.task.kind} run has {', '.join(there)}"
        + (f"; did you mean '{close[0]}'?" if close else "")
    )


def add(tallies: Iterable[Tally]) -> dict[str, int]:
    """The sum, name by name; a name that a tally lacks counts as 0.

    >>> add([{"examples": 2, "correct": 1}, {"examples": 3, "correct": 3}])
    {'examples': 5, 'correct': 4}
    """
    total: dict[str, int] = {}
    for tally in tallies:
        for name, value in tally.items():
            total[name] = total.get(name, 0) + value
    return total


def summary(tally: Tally) -> dict[str, float]:
    """The metrics that this tally can tell, all finite; empty if it counts no examples.

    Counts by class and bin may be left out where they are 0. macro_f1: the mean over the classes that occur or are
    predicted. auroc, average_precision: with several labels the mean over those that have both kinds. perplexity: at most
    e^709. Precondition: the names are of `names(spec)`.

    >>> summary({"examples": 4, "correct": 3, "loss": 1 << 20})
    {'loss': 0.25, 'accuracy': 0.75}
    """
    found: dict[str, float] = {}
    for metric, (name, per) in MEANS.items():
        count = tally.get("labels", 0) if name == "correct" and "labels" in tally else tally.get(per, 0)
        if name in tally and count > 0:
            total = tally[name] + CARRY * tally.get(f"{name}.high", 0)
            found[metric] = total / (int(UNIT) * count if name in REAL else count)
    if "mse" in found:
        found["rmse"] = max(found["mse"], 0.0) ** 0.5
    if "loss" in found and tally.get("tokens", 0) > 0:
        found["perplexity"] = math.exp(min(found["loss"], MOST_EXP))
    found |= _of_classes(tally) | _of_histograms(tally)
    return {metric: found[metric] for metric in NEEDS if metric in found}


def _of_classes(tally: Tally) -> dict[str, float]:
    """Macro F1: of each class 2 tp / (actual + predicted), van Rijsbergen 1979."""
    sizes: dict[str, int] = {}
    for name, count in tally.items():
        if name.startswith(("actual.", "predicted.")):
            _, number = name.split(".")
            sizes[number] = sizes.get(number, 0) + count
    scores = [2 * tally.get(f"tp.{number}", 0) / size for number, size in sizes.items() if size > 0]
    return {"macro_f1": math.fsum(scores) / len(scores)} if scores else {}


def _of_histograms(tally: Tally) -> dict[str, float]:
    histograms: dict[str, tuple[list[int], list[int]]] = {}
    for name, count in tally.items():
        if name.startswith(("pos.", "neg.")):
            kind, label, number = name.split(".")
            if label not in histograms:
                histograms[label] = ([0] * BINS, [0] * BINS)
            histograms[label][kind == "neg"][int(number)] += count
    both = [(pos, neg) for pos, neg in histograms.values() if sum(pos) > 0 and sum(neg) > 0]
    if not both:
        return {}
    return {
        "auroc": math.fsum(_auroc(*one) for one in both) / len(both),
        "average_precision": math.fsum(_average_precision(*one) for one in both) / len(both),
    }


def _auroc(pos: Sequence[int], neg: Sequence[int]) -> float:
    """How often a positive's bin is above a negative's, a tie one half (Hanley and McNeil 1982)."""
    twice, below = 0, 0
    for p, n in zip(pos, neg, strict=True):
        twice += p * (2 * below + n)
        below += n
    return twice / (2 * sum(pos) * below)


def _average_precision(pos: Sequence[int], neg: Sequence[int]) -> float:
    """The sum over bins from the highest of precision x gain in recall; both lists have a positive sum."""
    parts, true, taken = [], 0, 0
    for p, n in zip(reversed(pos), reversed(neg), strict=True):
        true, taken = true + p, taken + p + n
        if p and taken > 0:
            parts.append(p * true / taken)
    return math.fsum(parts) / sum(pos)


def spread(scores: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    """Of each metric's values at the clients (at least one): the median, and the decile where the worst tenth begins.

    >>> spread({"accuracy": [0.5, 1.0, 0.75]})
    {'accuracy': (0.75, 0.55)}
    """
    return {
        metric: (_quantile(values, 0.5), _quantile(values, 0.9 if metric in SMALLER_IS_BETTER else 0.1))
        for metric, values in scores.items()
    }


def _quantile(values: Sequence[float], share: float) -> float:
    """On the line between the two nearest of the sorted values (Hyndman and Fan 1996, type 7; numpy's default)."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
