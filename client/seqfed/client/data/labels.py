"""Labels as a run's task wants them: classes, yes/no labels or numbers, checked over the whole column."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqfed.client.data.frame import Frame, number_text, short
from seqfed.client.data.windows import Ints, normalised
from seqfed.common.errors import DataError
from seqfed.common.spec import RunSpec


@dataclass(frozen=True, eq=False)
class Labels:
    """K columns of L labels.

    number(k): float (L,), NaN where missing, raises DataError if they are texts; coded(k): codes and the texts they stand
    for; is_number(k): whether they are all numbers. stretch_rows: which of the L belongs to each stretch of rows, int64
    (E,), -1 for none; None if every row has its own.
    """

    names: tuple[str, ...]
    number: Callable[[int], NDArray[Any]]
    coded: Callable[[int], tuple[NDArray[np.int32], tuple[str, ...]]]
    is_number: Callable[[int], bool]
    place: Callable[[int, int], str]  # (row, k), for people
    stretch_rows: Ints | None = None

    @classmethod
    def of(cls, frame: Frame, names: tuple[str, ...], stretch_rows: Ints | None = None) -> Labels:
        """Columns of a table."""
        return cls(
            names,
            lambda k: frame.number(names[k]),
            lambda k: frame.coded(names[k]),
            lambda k: frame.columns[names[k]].is_sound,
            lambda row, k: f"{frame.place(row)}, column '{names[k]}'",
            stretch_rows,
        )

    def highest(self) -> int | None:
        """The highest class if they look like classes."""
        if len(self.names) != 1 or not self.is_number(0):
            return None
        found = self.number(0)
        real = found[~np.isnan(found)]
        if len(real) == 0 or real.min() < 0 or real.max() >= 1_000_000 or (real != np.floor(real)).any():
            return None
        return int(real.max())

    def classes(self, count: int, named: tuple[str, ...] | None) -> Ints:
        """Class numbers, (L,), -1 where missing; raises DataError with the first place of one that is out of range."""
        if len(self.names) != 1:
            raise DataError(f"a class is one column; data.label names {len(self.names)}: {', '.join(self.names)}")
        if named is not None:
            return self._by_name(named)
        try:
            found = self.number(0)
        except DataError as error:
            raise DataError(f"{error}; or let the run name its classes (data.labels)") from error
        with np.errstate(invalid="ignore"):
            bad = ~np.isnan(found) & ((found < 0) | (found >= count) | (found != np.floor(found)))
        if bad.any():
            first = int(np.argmax(bad))
            others = f" ({int(bad.sum())} such labels)" if bad.sum() > 1 else ""
            raise DataError(
                f"{self.place(first, 0)}: {number_text(float(found[first]))} is not a label{others}; the run's are whole numbers "
                f"from 0 to {count - 1}"
            )
        return np.where(np.isnan(found), -1, found).astype(np.int64)

    def _by_name(self, named: tuple[str, ...]) -> Ints:
        codes, values = self.coded(0)
        known = {name: place for place, name in enumerate(named)}
        table = np.array([*(known.get(value, -2) for value in values), -1], np.int64)
        found: Ints = table[codes]
        if (found == -2).any():
            first = int(np.argmax(found == -2))
            count = int((found == -2).sum())
            others = f" ({count} such labels)" if count > 1 else ""
            raise DataError(
                f"{self.place(first, 0)}: {short(values[codes[first]])} is not a label{others}; the run's are "
                f"{', '.join(named[:20])}{', ...' if len(named) > 20 else ''}"
            )
        return found

    def numbers(self, count: int) -> NDArray[np.float32]:
        """(L, count), NaN where missing; raises DataError if there are more or fewer columns."""
        if len(self.names) != count:
            raise DataError(
                f"the run has {count} labels a sequence, the data {len(self.names)}: {', '.join(self.names) or 'none'}; "
                "name them with data.label, in the run's order"
            )
        return np.stack([self.number(k).astype(np.float32) for k in range(count)], axis=1)

    def truths(self, count: int) -> NDArray[np.float32]:
        """(L, count) of 0, 1 and NaN; raises DataError with the first place of anything else."""
        found = self.numbers(count)
        bad = ~np.isnan(found) & (found != 0) & (found != 1)
        if bad.any():
            row, k = (int(place) for place in np.argwhere(bad)[0])
            raise DataError(
                f"{self.place(row, k)}: {number_text(float(found[row, k]))} is not a yes/no label "
                f"({int(bad.sum())} in all); they are 0, 1 or missing"
            )
        return found


def targets(labels: Labels, spec: RunSpec, at: Ints) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """y as in Batch for the label rows `at`, int64 (N,), -1 for none; and bool (N,), whether any label is there."""
    data = spec.data
    if spec.task.kind == "classification":
        found = labels.classes(data.class_count, data.labels)
        y = np.where(at >= 0, found[at], -1)
        return y, y >= 0
    if spec.task.kind == "multilabel":
        values = labels.truths(data.targets or 0)
    else:
        values = normalised(labels.numbers(data.targets or 0), data.target_mean, data.target_scale)
        if np.isinf(values).any():
            row, k = (int(place) for place in np.argwhere(np.isinf(values))[0])
            raise DataError(
                f"{labels.place(row, k)}: is too large for float32 after the run's target_mean and target_scale"
            )
    out = values[at]
    out[at < 0] = np.nan
    return out, np.asarray(~np.isnan(out).all(axis=1))
