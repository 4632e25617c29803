"""Sequences of numbers: a run's columns out of a Frame, filled, normalised, coded and cut into windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from seqfed.client.data.frame import Frame, number_text
from seqfed.client.data.labels import Labels, targets
from seqfed.client.data.reading import LONGEST_NAME, MOST_COLUMNS
from seqfed.client.data.sequences import ClientData, Sequences
from seqfed.client.data.store import Store
from seqfed.client.data.windows import (
    Floats,
    Ints,
    bin_means,
    cut,
    forward_fill,
    grid_steps,
    held_out,
    held_out_rows,
    normalised,
    one_hot,
)
from seqfed.client.settings import DataSettings
from seqfed.common.errors import DataError, SchemaMismatch
from seqfed.common.schema import DataSchema
from seqfed.common.spec import DataSpec, RunSpec
from seqfed.common.statistics import LIMIT, Sums

CELLS: Final = 1 << 20  # numbers worked on at once


@dataclass(frozen=True, eq=False)
class Material:
    """The rows of some files, and their labels if they have any."""

    frame: Frame
    labels: Labels | None = None


@dataclass(frozen=True, eq=False)
class View:
    """R rows of NaN-holed numbers in a run's columns, not there until asked for.

    block(first, end): float32 (end - first, C). label_row: the row of the labels that a row here goes by.
    """

    rows: int
    begins: Ints
    ends: Ints
    block: Callable[[int, int], Floats]
    place: Callable[[int], str]
    label_row: Callable[[Ints], Ints]
    names: tuple[str, ...]
    whole: Floats | None = None  # all of the blocks, where they lie there as they are


@dataclass(frozen=True)
class Refused:
    """Sequences that do not fit: how many, and the first in words."""

    count: int = 0
    first: str = ""

    def __add__(self, other: Refused) -> Refused:
        return Refused(self.count + other.count, self.first or other.first)

    def said(self, kept: int) -> str | None:
        if self.count == 0:
            return None
        return f"{self.count} of {self.count + kept} sequences refused; the first: {self.first}"


# A part of the stretches: where each begins and ends, and which it is.
Part = tuple[Ints, Ints, Ints]


class Numbers:
    """A Source of tables and arrays of numbers."""

    def __init__(self, settings: DataSettings, training: Material, validation: Material | None = None) -> None:
        self._settings = settings
        self.training = training
        self.validation = validation
        self._store = Store.of(settings)
        if validation is not None and training.frame.is_array:
            ours, theirs = (len(one.frame.number_names) for one in (training, validation))
            if ours != theirs:
                raise DataError(
                    f"{validation.frame.source}: has {theirs} features a step, {training.frame.source} has {ours}"
                )
        for name in settings.columns or ():
            column = training.frame.columns.get(name)
            if settings.variable is None and column is not None and column.type is not None:
                training.frame.check(name)
        inputs = inputs_of(training.frame, settings)
        if not inputs and not self._categories():
            raise DataError(
                f"{training.frame.source}: has no column of numbers or categories besides label, group and time"
            )
        if settings.variable is not None and (len(inputs) > MOST_COLUMNS or max(map(len, inputs)) > LONGEST_NAME):
            raise DataError(
                f"{training.frame.source}, column '{settings.variable}': has {len(inputs):,} variables, at most "
                f"{MOST_COLUMNS:,} can be read, their names of at most {LONGEST_NAME} characters; is it the right column?"
            )

    @property
    def schema(self) -> DataSchema:
        """What the server is told: names and counts, no value but the variables' names and the highest class."""
        frame, labels = self.training.frame, self.training.labels
        names = inputs_of(frame, self._settings)
        both = [one.labels.highest() for one in (self.training, self.validation) if one and one.labels]
        classes = (
            None if not both or None in both or labels is None else max(one for one in both if one is not None) + 1
        )
        lengths = frame.ends - frame.begins
        even = frame.is_array and bool((lengths == lengths[0]).all())
        whole = frame.is_array or bool(self._settings.wide)  # sequences already; else rows that are yet to be cut
        training, held = _divided(frame.begins, frame.ends, frame, self._settings, self.validation is not None)
        examples, held_examples = (len(one[0]) if whole else int((one[1] - one[0]).sum()) for one in (training, held))
        if self.validation is not None:
            other = self.validation.frame
            held_examples = len(other.begins) if whole else len(other)
        return DataSchema(
            features=len(names) or None,
            steps=int(lengths[0]) if even else None,
            classes=classes,
            columns=None if frame.is_array else (*names, *self._times()),
            categories=() if frame.is_array else self._categories(),
            examples=examples,
            validation_examples=held_examples,
        )

    def _times(self) -> tuple[str, ...]:
        """The time column, which a run may also take as an input."""
        time = self._settings.time
        frame = self.training.frame
        return (time,) if self._settings.variable is None and time is not None and time in frame.number_names else ()

    def _categories(self) -> tuple[str, ...]:
        if self._settings.variable is not None:
            return ()
        apart = {self._settings.group, self._settings.time, *self._settings.label}
        return tuple(name for name, one in self.training.frame.columns.items() if one.is_text and name not in apart)

    def prepare(self, spec: RunSpec) -> ClientData:
        """The run's sequences; raises SchemaMismatch or DataError with file, row, column and remedy."""
        if spec.data.normalise == "federated":
            raise SchemaMismatch(
                "the run's mean and scale are not known yet (data.normalise = 'federated'), and its sequences depend on them; "
                "run the server and this client with the same version of seqfed"
            )
        frame = self.training.frame
        view = self._view(spec)
        rows, holes = self._rows(view, frame, spec)
        parts = _divided(view.begins, view.ends, frame, self._settings, self.validation is not None)
        training, refused = self._cut(self.training, view, rows, holes, parts[0], spec)
        if self.validation is None:
            validation, more = self._cut(self.training, view, rows, holes, parts[1], spec)
        else:
            other = self.validation.frame
            view = view_of(other, view.names, spec.data, self._settings)
            rows, holes = self._rows(view, other, spec)
            every = (view.begins, view.ends, np.arange(len(view.begins), dtype=np.int64))
            validation, more = self._cut(self.validation, view, rows, holes, every, spec)
            if validation.entities is not None and frame.entities:
                validation = replace(validation, entities=validation.entities + len(frame.entities))
        if len(training) == 0:
            raise self._nothing(refused, spec)
        refused += more
        entities = frame.entities + (self.validation.frame.entities if self.validation is not None else ())
        return ClientData(training, validation, entities, refused.said(len(training) + len(validation)))

    def measure(self, spec: RunSpec) -> dict[str, int]:
        """The exact sums of `seqfed.common.statistics` over the numbers that are there in the sequences to train on, each row
        counted once, however many windows it is in. Raises SchemaMismatch or DataError, as `prepare`.
        """
        view = self._view(spec)
        holes = _holes(view) if spec.data.missing == "refuse" else None
        part, _ = _divided(view.begins, view.ends, self.training.frame, self._settings, self.validation is not None)
        training, refused = self._cut(self.training, view, np.empty((0, 0), np.float32), holes, part, spec)
        if len(training) == 0:
            raise self._nothing(refused, spec)
        # How many sequences begin in a row, less those that ended before it: how many it is in.
        turns = np.bincount(training.starts, minlength=view.rows + 1)
        turns -= np.bincount(training.starts + training.lengths, minlength=view.rows + 1)
        used = turns.cumsum()[:-1] > 0
        sums = Sums(len(view.names))
        for first, end in _blocks(view.rows, len(view.names)):
            rows = np.flatnonzero(used[first:end])
            block = view.block(first, end)[rows]
            large = np.argwhere(np.abs(block) >= LIMIT)
            if len(large):
                row, column = (int(one) for one in large[0])
                raise DataError(
                    f"{view.place(first + int(rows[row]))}, column '{view.names[column]}': is too large for "
                    f"data.normalise = 'federated', which takes numbers below {LIMIT:.3g}; is it a mistake, or a code for a "
                    "missing value (data.missing_values)?"
                )
            sums.add(block)
        return sums.tally()

    def _view(self, spec: RunSpec) -> View:
        frame = self.training.frame
        if spec.data.vocabulary is not None:
            raise SchemaMismatch(f"{frame.source} has numbers, the run wants texts (a vocabulary)")
        return view_of(frame, columns_of(frame, spec.data, self._settings), spec.data, self._settings)

    def _nothing(self, refused: Refused, spec: RunSpec) -> DataError:
        why = (
            refused.said(0)
            or f"no entity has {1 + _ahead(spec, self._settings)} rows, as windows and their labels need"
        )
        return DataError(f"{self.training.frame.source}: no sequence is left to train on: {why}")

    def _rows(self, view: View, frame: Frame, spec: RunSpec) -> tuple[Floats, Ints | None]:
        """The rows as the network sees them, float32 (R, inputs); and how many incomplete ones come before each, (R + 1,),
        where a run refuses those, None if none is incomplete.
        """
        data = spec.data
        coded = [(*frame.coded(name), values) for name, values in data.categories.items()]
        plain = (
            view.whole is not None
            and data.missing == "refuse"
            and data.mean is None
            and data.scale is None
            and not coded
        )
        out = (
            view.whole if plain and view.whole is not None else self._store.empty((view.rows, data.inputs), np.float32)
        )
        holes = np.zeros(view.rows + 1, np.int64) if data.missing == "refuse" else None
        first_rows = np.zeros(view.rows, np.bool_)
        first_rows[view.begins] = True
        carry = np.full(len(view.names), np.nan, np.float32)
        for first, end in _blocks(view.rows, data.inputs):
            block = view.block(first, end)
            missing = np.isnan(block)
            if holes is not None:
                holes[first + 1 : end + 1] = missing.any(axis=1)
            if plain:
                continue
            if data.missing == "forward":
                block, carry = forward_fill(block, first_rows[first:end], carry)
            block = normalised(block, data.mean, data.scale)
            if np.isinf(block).any():
                row, column = (int(one) for one in np.argwhere(np.isinf(block))[0])
                raise DataError(
                    f"{view.place(first + row)}, column '{view.names[column]}': is too large for float32 after the run's "
                    "mean and scale"
                )
            width = block.shape[1]
            out[first:end, :width] = np.where(np.isnan(block), 0, block)
            if data.missing == "mask":
                out[first:end, width : 2 * width] = ~missing
                width *= 2
            for codes, values, categories in coded:
                out[first:end, width : width + len(categories)] = one_hot(codes[first:end], values, categories)
                width += len(categories)
        if holes is None or not holes.any():
            return out, None
        return out, holes.cumsum()

    def _cut(
        self, material: Material, view: View, rows: Floats, holes: Ints | None, part: Part, spec: RunSpec
    ) -> tuple[Sequences, Refused]:
        settings, frame = self._settings, material.frame
        steps, stride, horizon = reach(spec.data, settings)
        ahead = _ahead(spec, settings)
        begins, ends, which = part
        starts, lengths, owners = cut(begins, ends, steps, stride, ahead)
        stretches = which[owners]
        of_rows = spec.task.kind in {"forecast", "anomaly"}
        foretold = of_rows and ahead > 0
        refused = Refused()
        if holes is not None:
            reaches = starts + lengths + (ahead if foretold else 0)
            bad = holes[reaches] > holes[starts]
            if bad.any():
                one = int(np.argmax(bad))
                refused += Refused(int(bad.sum()), self._hole(view, int(starts[one]), int(reaches[one])))
                starts, lengths, stretches = starts[~bad], lengths[~bad], stretches[~bad]
        last = starts + lengths - 1
        y: NDArray[np.int64] | NDArray[np.float32] | None = None
        anomalies = None
        if of_rows:
            if spec.task.kind == "anomaly" and material.labels is not None:
                at = self._label_rows(material.labels, view, last + ahead, stretches)
                truths = material.labels.truths(1)[at, 0]
                truths[at < 0] = np.nan
                anomalies = np.where(np.isnan(truths), -1, truths).astype(np.int64)
        elif not settings.unlabelled:
            if settings.remaining is not None:
                y, there = self._remaining(view, last + horizon, stretches, spec)
            elif material.labels is None:
                raise no_label(frame.source, spec)
            else:
                at = self._label_rows(material.labels, view, last + horizon, stretches)
                y, there = targets(material.labels, spec, at)
            if not there.all():
                one = int(np.argmin(there))
                named = self._entity(frame, int(stretches[one]))
                refused += Refused(int((~there).sum()), f"{view.place(int(last[one]))}: {named}has no label")
                starts, lengths, stretches, y = starts[there], lengths[there], stretches[there], y[there]
        entities = stretches if frame.owners is None else frame.owners[stretches]
        made = Sequences(rows, starts, lengths, y, entities=entities, anomalies=anomalies)
        if foretold:
            made = replace(
                made, target="rows ahead", horizon=ahead, numbers=spec.data.numbers, masks=spec.data.missing == "mask"
            )
        return made, refused

    def _hole(self, view: View, start: int, end: int) -> str:
        missing = np.isnan(view.block(start, end))
        row, column = (int(one) for one in np.argwhere(missing)[0])
        return (
            f"{view.place(start + row)}, column '{view.names[column]}' has no value, and the run refuses what is missing "
            "(data.missing)"
        )

    @staticmethod
    def _label_rows(labels: Labels, view: View, rows: Ints, stretches: Ints) -> Ints:
        return view.label_row(rows) if labels.stretch_rows is None else labels.stretch_rows[stretches]

    @staticmethod
    def _entity(frame: Frame, stretch: int) -> str:
        if not frame.entities:
            return ""
        return f"'{frame.entities[stretch if frame.owners is None else int(frame.owners[stretch])]}' "

    def _remaining(
        self, view: View, at: Ints, stretches: Ints, spec: RunSpec
    ) -> tuple[NDArray[np.int64] | NDArray[np.float32], NDArray[np.bool_]]:
        """Rows left after each of these to its entity's end, at most so many."""
        left = np.minimum(view.ends[stretches] - 1 - at, self._settings.remaining or 0).astype(np.float32)
        of_rows = Labels(
            ("remaining",),
            lambda _: left,
            lambda _: (np.empty(0, np.int32), ()),
            lambda _: True,
            lambda row, _: view.place(int(at[row])),
        )
        return targets(of_rows, spec, np.arange(len(left), dtype=np.int64))


def _holes(view: View) -> Ints | None:
    """How many incomplete rows come before each, (R + 1,); None if none is incomplete."""
    holes = np.zeros(view.rows + 1, np.int64)
    for first, end in _blocks(view.rows, len(view.names)):
        holes[first + 1 : end + 1] = np.isnan(view.block(first, end)).any(axis=1)
    return holes.cumsum() if holes.any() else None


def no_label(source: str, spec: RunSpec) -> DataError:
    """What to raise where a run needs labels and nothing says which they are."""
    return DataError(f"{source}: which column is the label? The run's task is {spec.task.kind}: name it (data.label)")


def reach(data: DataSpec, settings: DataSettings) -> tuple[int | None, int | None, int]:
    """(steps, stride, horizon): the run's, and where it leaves them open the client's."""
    steps = data.steps if data.steps is not None else settings.window
    stride = data.stride if data.stride is not None else settings.stride
    return steps, stride, data.horizon or settings.horizon or 0


def _ahead(spec: RunSpec, settings: DataSettings) -> int:
    """Rows that must follow a window."""
    if spec.task.kind == "anomaly":
        return spec.task.horizon
    if settings.unlabelled:
        return 0
    return spec.task.horizon if spec.task.kind == "forecast" else reach(spec.data, settings)[2]


def inputs_of(frame: Frame, settings: DataSettings) -> tuple[str, ...]:
    """The number columns that are inputs if the run names none, in their order."""
    if settings.variable is not None:
        named = settings.columns
        return tuple(sorted(frame.coded(settings.variable)[1])) if named is None else named
    if settings.columns is not None:
        return tuple(settings.wide) + tuple(name for name in settings.columns if name in frame.number_names)
    apart = {settings.group, settings.time, *(settings.label if settings.label_file is None else ())}
    return tuple(name for name in frame.number_names if name not in apart)


def columns_of(frame: Frame, data: DataSpec, settings: DataSettings) -> tuple[str, ...]:
    """The frame's columns for this run; raises SchemaMismatch or DataError if they are not there."""
    inputs = inputs_of(frame, settings)
    if data.columns is not None and not frame.is_array:
        lacking = sorted(set(data.columns) - set(inputs)) if settings.variable is not None else ()
        if lacking:
            raise DataError(
                f"{frame.source}, column '{settings.variable}': has no variable '{lacking[0]}'; it has {', '.join(inputs[:50])}"
            )
        return data.columns
    if len(inputs) != data.numbers:
        for name in settings.columns or ():
            frame.check(name)
        raise SchemaMismatch(
            f"{frame.source} has {len(inputs)} features a step ({', '.join(inputs[:10])}{', ...' if len(inputs) > 10 else ''}), "
            f"the run wants {data.numbers}; name the columns (data.columns)"
        )
    return inputs


def view_of(frame: Frame, names: tuple[str, ...], data: DataSpec, settings: DataSettings) -> View:
    """The frame's rows in these columns; of long format: its measurements on the run's grid. Raises DataError."""
    if settings.variable is not None:
        return _on_grid(frame, names, data, settings)
    for name in names:
        frame.check(name)
        if name not in frame.number_names:
            frame.number(name)  # says what is wrong
    places = [frame.number_names.index(name) for name in names]
    every = places == list(range(frame.numbers.shape[1]))

    def block(first: int, end: int) -> Floats:
        found = frame.numbers[first:end]
        return np.array(found if every else found[:, places], np.float32)

    whole = frame.numbers if every else None
    return View(len(frame), frame.begins, frame.ends, block, frame.place, lambda rows: rows, names, whole)


def _on_grid(frame: Frame, names: tuple[str, ...], data: DataSpec, settings: DataSettings) -> View:
    assert settings.variable is not None  # DataSettings sees to these three
    assert settings.value is not None
    assert frame.times is not None
    if data.grid is None:
        raise SchemaMismatch(
            f"{frame.source} is in long format, and the run names no grid (data.grid, in the unit of the time)"
        )
    times = frame.times
    values = frame.number(settings.value)
    codes, variables = frame.coded(settings.variable)
    known = {name: place for place, name in enumerate(names)}
    columns = np.array([*(known.get(name, -1) for name in variables), -1], np.int64)
    try:
        steps, counts = grid_steps(times, frame.begins, frame.ends, data.grid)
    except ValueError as error:
        entity = frame.entities[int(error.args[0])]
        raise DataError(
            f"{frame.source}: '{entity}' has over a million steps of {number_text(data.grid)}; check the column "
            f"'{settings.time}' for a wild value, or use a longer grid"
        ) from None
    ends = np.cumsum(counts)
    begins = ends - counts
    owners = np.repeat(np.arange(len(begins)), frame.ends - frame.begins)
    rows = begins[owners] + steps  # of each measurement, ascending

    def block(first: int, end: int) -> Floats:
        left, right = np.searchsorted(rows, (first, end))
        inside = slice(int(left), int(right))
        return bin_means(rows[inside] - first, columns[codes[inside]], values[inside], (end - first, len(names)))

    def place(row: int) -> str:
        entity = int(np.searchsorted(ends, row, "right"))
        return f"{frame.source}, '{frame.entities[entity]}', step {row - int(begins[entity]) + 1}"

    def label_row(wanted: Ints) -> Ints:
        return np.searchsorted(rows, wanted, "right") - 1  # the last measurement in the step or before it

    return View(int(ends[-1]), begins, ends, block, place, label_row, names)


def _divided(begins: Ints, ends: Ints, frame: Frame, settings: DataSettings, apart: bool) -> tuple[Part, Part]:
    """Stretches to train on, and those held out: whole entities; of a single entity its last rows. apart: hold out none."""
    every = np.arange(len(begins), dtype=np.int64)
    fraction = 0.0 if apart else settings.validation_fraction
    if len(begins) == 1 and not frame.is_array and frame.owners is None and frame.entities:
        middle = ends - (fraction * (ends - begins)).astype(np.int64)
        held = every if middle[0] < ends[0] else every[:0]
        return (begins, middle, every), (middle[held], ends[held], held)
    if frame.entities:
        out = held_out(frame.entities, fraction, settings.seed)
        out = out if frame.owners is None else out[frame.owners]
    else:
        out = held_out_rows(len(begins), fraction, settings.seed)
    kept, held = every[~out], every[out]
    return (begins[kept], ends[kept], kept), (begins[held], ends[held], held)


def _blocks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    size = max(1, CELLS // max(1, width))
    for first in range(0, rows, size):
        yield first, min(first + size, rows)
