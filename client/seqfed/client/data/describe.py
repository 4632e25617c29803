"""What is in a data holder's files, and the [data] table of a run for them: for `seqfed data check` and `seqfed data schema`.

The means, scales, categories and words of one client's file are shown to everybody in the run that uses them: whoever
publishes them decides that they may be.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from seqfed.client.data.arrays import TokenRows
from seqfed.client.data.frame import Frame, number_text, short
from seqfed.client.data.labels import Labels
from seqfed.client.data.numbers import Numbers, inputs_of
from seqfed.client.data.source import Made, Source
from seqfed.client.data.text import Texts, Tokens
from seqfed.client.settings import DataSettings
from seqfed.common.errors import DataError

MOST_CATEGORIES: Final = 1000  # values told of a text column, and classes told of a label
FEW: Final = 20  # different whole numbers of a label that are still taken for classes
ROWS: Final = 1 << 16  # looked at together
Task = Literal["classification", "multilabel", "regression", "forecast", "next_token", "anomaly"]


@dataclass(frozen=True)
class ColumnSummary:
    """One column, or one variable of long format.

    kind: "number", "text", or "unusable" with the reason in `note`. count: values that are there. low, high, mean, scale
    (standard deviation): of numbers; None if there are none. categories: the most frequent values of a text first.
    """

    name: str
    kind: Literal["number", "text", "unusable"]
    count: int
    missing: int
    low: float | None = None
    high: float | None = None
    mean: float | None = None
    scale: float | None = None
    categories: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class LabelSummary:
    """One column of labels. values: how often each is there, if it is text or few whole numbers; else mean and scale."""

    name: str
    missing: int
    values: dict[str, int] = field(default_factory=dict)
    mean: float | None = None
    scale: float | None = None

    @property
    def yes_no(self) -> bool:
        return bool(self.values) and set(self.values) <= {"0", "1"}


@dataclass(frozen=True)
class Description:
    """What a source holds. rows: of the table, or texts; lengths: rows (measurements, characters, tokens) an entity, as
    (smallest, lower quartile, median, upper quartile, 95th percentile, largest).
    """

    source: str
    kind: Literal["numbers", "texts", "tokens"]
    rows: int
    entities: int
    lengths: tuple[int, int, int, int, int, int]
    columns: tuple[ColumnSummary, ...] = ()
    labels: tuple[LabelSummary, ...] = ()


def describe(source: Source, settings: DataSettings) -> Description:
    """What is in the files to train on. Raises DataError for a label column that is neither numbers nor texts."""
    if isinstance(source, Numbers):
        frame, labels = source.training.frame, source.training.labels
        columns = _variables(frame, settings) if settings.variable is not None else _columns(frame, settings)
        entities = len(set(frame.owners.tolist())) if frame.owners is not None else len(frame.begins)
        lengths = frame.ends - frame.begins
        return Description(frame.source, "numbers", len(frame), entities, _quantiles(lengths), columns, _labels(labels))
    if isinstance(source, Tokens):
        texts = source.training
        if isinstance(texts, TokenRows):
            lengths, kind = texts.ends - texts.begins, "tokens"
        else:
            lengths, kind = np.array([sum(map(len, texts.pieces(one))) for one in range(len(texts))], np.int64), "texts"
        entities = len(texts.entities) or len(lengths)
        return Description(
            texts.source,
            "tokens" if kind == "tokens" else "texts",
            len(lengths),
            entities,
            _quantiles(lengths),
            (),
            _labels(texts.labels),
        )
    assert isinstance(source, Made)  # there is no other
    made = source.training
    kind = "numbers" if made.rows.ndim == 2 else "tokens"
    return Description(
        settings.file[0],
        "numbers" if kind == "numbers" else "tokens",
        len(made.rows),
        len(made),
        _quantiles(made.lengths),
    )


def vocabulary(
    source: Source, unit: Literal["characters", "words"], most: int | None = None, least: int = 1
) -> tuple[str, ...]:
    """The texts' tokens, the most frequent first (equals in the order of code points): `most` of them, there `least` times.

    Raises DataError if the source has no texts.
    """
    if not isinstance(source, Tokens) or not isinstance(source.training, Texts):
        raise DataError("these data have no texts, so no vocabulary")
    texts, counts = source.training, Counter[str]()
    for document in range(len(texts)):
        if unit == "words":
            waiting = ""
            for piece in texts.pieces(document):
                words = (waiting + piece).split()
                waiting = words.pop() if words and not piece[-1].isspace() else ""
                counts.update(words)
            counts.update([waiting] if waiting else [])
        else:
            for piece in texts.pieces(document):
                counts.update(piece)
    ordered = sorted((-count, token) for token, count in counts.items() if count >= least)
    return tuple(token for _, token in ordered[:most])


def data_section(
    source: Source,
    settings: DataSettings,
    *,
    task: Task | None = None,
    steps: int | None = None,
    stride: int | None = None,
    horizon: int = 0,
    missing: Literal["refuse", "mask", "forward", "mean"] | None = None,
    normalise: Literal["given", "federated"] = "given",
    grid: float | None = None,
    unit: Literal["characters", "words"] = "characters",
    tokens: int | None = None,
    least: int = 1,
) -> dict[str, Any]:
    """The [data] table of a run for these data; what is None is left out or guessed. Whoever makes a run of it
    validates it.

    task: what the run is for; left out, `task_of` guesses. normalise: the columns' mean and scale are these data's, or left
    for the run to find. tokens: size of the vocabulary at most; least: how often a token must be there to be in it. Raises
    DataError if the data have no input, or not the labels of the task.
    """
    found = describe(source, settings)
    task = task_of(found, settings) if task is None else task
    section: dict[str, Any] = {} if normalise == "given" else {"normalise": normalise}
    if found.kind == "texts":
        most = (10_000 if unit == "words" else 1000) if tokens is None else tokens
        section |= {"vocabulary": vocabulary(source, unit, most, least), "unit": unit}
        steps = 80 if steps is None and task == "next_token" else steps
    elif found.kind == "tokens":
        raise DataError(
            f"{found.source}: has token ids, and only who made them knows their vocabulary; write it by hand"
        )
    else:
        if not isinstance(source, Numbers):
            raise DataError(
                f"{found.source}: only who wrote it knows its columns; write the run by hand (check: --run)"
            )
        section = _number_section(source, settings, found, missing) | section
        if normalise != "given":
            del section["mean"], section["scale"]
        if settings.variable is not None:
            if grid is None:
                raise DataError(
                    f"{found.source} is in long format: how long is a step? (grid, in the unit of '{settings.time}')"
                )
            section["grid"] = grid
    given_steps, given_stride, given_horizon = (
        steps or settings.window,
        stride or settings.stride,
        horizon or settings.horizon,
    )
    section |= {
        key: value
        for key, value in (("steps", given_steps), ("stride", given_stride), ("horizon", given_horizon))
        if value
    }
    return section | _label_section(found, settings, task)


def task_of(found: Description, settings: DataSettings) -> Task:
    """What such data are probably for."""
    if settings.remaining is not None:
        return "regression"
    labels = list(found.labels)
    if not labels:
        return "next_token" if found.kind != "numbers" else "forecast"
    if len(labels) > 1:
        return "multilabel" if all(one.yes_no for one in labels) else "regression"
    return "classification" if labels[0].values else "regression"


def _number_section(source: Source, settings: DataSettings, found: Description, missing: str | None) -> dict[str, Any]:
    assert isinstance(source, Numbers)
    frame = source.training.frame
    inputs = inputs_of(frame, settings)
    summaries = {one.name: one for one in found.columns}
    used = [summaries[name] for name in inputs if summaries[name].kind == "number" and summaries[name].count]
    texts = [one for one in found.columns if one.kind == "text" and one.categories and one.name not in inputs]
    if not used:
        raise DataError(
            f"{found.source}: has no column of numbers to put in; is it the right file? (--text: a column of texts)"
        )
    section: dict[str, Any] = (
        {"features": len(used)} if frame.is_array else {"columns": tuple(one.name for one in used)}
    )
    section["mean"] = tuple(_rounded(one.mean or 0.0, one.scale) for one in used)
    section["scale"] = tuple(_rounded(one.scale or 1.0) or 1.0 for one in used)
    if texts:
        section["categories"] = {one.name: tuple(sorted(one.categories)) for one in texts}
    if missing is None and (settings.variable is not None or any(one.missing for one in used)):
        missing = "mask"
    if missing is not None and missing != "refuse":
        section["missing"] = missing
    return section


def _label_section(found: Description, settings: DataSettings, task: Task) -> dict[str, Any]:
    if task in {"forecast", "anomaly", "next_token"}:
        return {}
    if settings.remaining is not None and task == "regression":
        half = settings.remaining / 2  # of its cap: near enough, and says nothing of the data
        return {"targets": 1, "target_mean": (half,), "target_scale": (half,)}
    if not found.labels:
        raise DataError(f"{found.source}: which column is the label? A {task} task needs one (data.label)")
    if task == "classification":
        values = found.labels[0].values
        if len(values) < 2:
            raise DataError(
                f"{found.source}, column '{found.labels[0].name}': has {len(values)} classes, a task needs two"
            )
        numbers = sorted(int(one) for one in values) if all(one.isdecimal() for one in values) else []
        if numbers and numbers[0] == 0 and numbers[-1] < 2 * len(numbers):
            return {"classes": numbers[-1] + 1}
        return {"labels": tuple(str(one) for one in numbers) if numbers else tuple(sorted(values))}
    section: dict[str, Any] = {"targets": len(found.labels)}
    if task == "regression":
        section["target_mean"] = tuple(_rounded(one.mean or 0.0, one.scale) for one in found.labels)
        section["target_scale"] = tuple(_rounded(one.scale or 1.0) or 1.0 for one in found.labels)
    return section


def _rounded(value: float, scale: float | None = None) -> float:
    """To six digits; a mean to a thousandth of its scale, however far from 0 it lies."""
    if not scale:
        return float(f"{value:.6g}")
    return round(value, 3 - math.floor(math.log10(scale)))


# Summaries ------------------------------------------------------------------------------------------------------------


def _columns(frame: Frame, settings: DataSettings) -> tuple[ColumnSummary, ...]:
    apart = {settings.group, settings.time, *(settings.label if settings.label_file is None else ())}
    names = [*dict.fromkeys((*frame.number_names, *frame.columns))]
    return tuple(_column(frame, name) for name in names if name not in apart)


def _column(frame: Frame, name: str) -> ColumnSummary:
    column = frame.columns.get(name)
    if column is not None and column.type is not None:
        return ColumnSummary(name, "unusable", 0, 0, note=f"is of type {column.type}")
    if name in frame.number_names:
        note = ""
        try:
            frame.check(name)
        except DataError as error:
            note = str(error)
        place = frame.number_names.index(name)
        blocks = (frame.numbers[first : first + ROWS, place] for first in range(0, len(frame), ROWS))
        return _numbers(name, blocks, note)
    assert column is not None  # texts come from tables
    if column.crowded:
        return ColumnSummary(name, "unusable", column.texts.count, column.missing, note="has too many different texts")
    codes, values = frame.coded(name)
    counts = np.bincount(codes[codes >= 0], minlength=len(values))
    order = sorted(range(len(values)), key=lambda one: (-int(counts[one]), values[one]))
    shown = tuple(values[one] for one in order) if len(values) <= MOST_CATEGORIES else ()
    note = "" if shown or not values else f"has {len(values):,} different texts, such as {short(values[order[0]])}"
    return ColumnSummary(name, "text", int(counts.sum()), int((codes < 0).sum()), categories=shown, note=note)


def _variables(frame: Frame, settings: DataSettings) -> tuple[ColumnSummary, ...]:
    assert settings.variable is not None
    assert settings.value is not None
    values = frame.number(settings.value)
    codes, names = frame.coded(settings.variable)
    order = np.argsort(codes, kind="stable")
    edges = np.searchsorted(codes[order], np.arange(len(names) + 1))
    wanted = set(inputs_of(frame, settings))
    return tuple(
        _numbers(name, (values[order[edges[place] : edges[place + 1]]],), "")
        for place, name in sorted(enumerate(names), key=lambda one: one[1])
        if name in wanted
    )


def _numbers(name: str, blocks: Any, note: str) -> ColumnSummary:
    """Sums in double precision around the first number, block by block, so that no large mean drowns a small spread."""
    count = missing = 0
    shift = total = squares = 0.0
    low, high = np.inf, -np.inf
    for block in blocks:
        real = block[np.isfinite(block)].astype(np.float64)
        missing += len(block) - len(real)
        if len(real) == 0:
            continue
        shift = float(real[0]) if count == 0 else shift
        total += float((real - shift).sum())
        squares += float(((real - shift) ** 2).sum())
        count += len(real)
        low, high = min(low, float(real.min())), max(high, float(real.max()))
    if count == 0:
        return ColumnSummary(name, "number", 0, missing, note=note)
    mean = total / count
    scale = max(0.0, squares / count - mean * mean) ** 0.5
    # Columns are kept as float32, whose neighbours are this far apart at the largest number.
    if not note and scale > 0 and float(np.spacing(np.float32(max(abs(low), abs(high))))) > scale / 100:
        note = "so far from 0 that float32 tells few of its values apart; subtract a constant in the file"
    return ColumnSummary(name, "number", count, missing, low, high, shift + mean, scale, note=note)


def _labels(labels: Labels | None) -> tuple[LabelSummary, ...]:
    return () if labels is None else tuple(_label(labels, k) for k in range(len(labels.names)))


def _label(labels: Labels, k: int) -> LabelSummary:
    name = labels.names[k]
    if labels.is_number(k):
        found = labels.number(k).astype(np.float64)
        real = found[~np.isnan(found)]
        values, counts = np.unique(real, return_counts=True)
        missing = len(found) - len(real)
        if len(real) and len(values) <= FEW and (values == np.floor(values)).all():
            told = {number_text(float(value)): int(count) for value, count in zip(values, counts, strict=True)}
            return LabelSummary(name, missing, told, float(real.mean()), float(real.std()))
        return (
            LabelSummary(name, missing, {}, float(real.mean()), float(real.std()))
            if len(real)
            else LabelSummary(name, missing)
        )
    codes, texts = labels.coded(k)
    told = Counter(
        {texts[place]: int(count) for place, count in enumerate(np.bincount(codes[codes >= 0], minlength=len(texts)))}
    )
    return LabelSummary(name, int((codes < 0).sum()), dict(told.most_common(MOST_CATEGORIES)))


def _quantiles(lengths: NDArray[np.int64]) -> tuple[int, int, int, int, int, int]:
    found = np.quantile(lengths, (0, 0.25, 0.5, 0.75, 0.95, 1), method="nearest").astype(int).tolist()
    return (found[0], found[1], found[2], found[3], found[4], found[5])
