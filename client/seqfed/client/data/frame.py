"""Rows in memory or mapped: numbers, coded texts, and which stretch of them is whose; what each column holds, in words.

Every reader of files makes a Frame, and everything that makes sequences of numbers takes one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from seqfed.common.errors import DataError

MOST_VALUES: Final = 100_000  # different texts in a column; one with more is prose or a key, not a category
LARGEST: Final = float(np.finfo(np.float32).max)

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Odd:
    """Values of one sort in a column: how many, and the first one's row and text."""

    count: int = 0
    row: int = -1
    text: str = ""

    def more(self, rows: Ints, shown: Callable[[int], str]) -> Odd:
        """With these as well; shown: the text of the i-th of them."""
        if len(rows) == 0:
            return self
        first = (self.row, self.text) if self.count else (int(rows[0]), shown(0))
        return Odd(self.count + len(rows), *first)


@dataclass
class Column:
    """What the first pass found in one column.

    texts: values that are no numbers; infinite: numbers that float32 cannot hold.
    """

    name: str
    type: str | None = None  # Parquet: what it is, if neither number nor text
    numbers: int = 0
    missing: int = 0
    texts: Odd = Odd()
    infinite: Odd = Odd()
    low: float = np.inf
    high: float = -np.inf
    whole: bool = True
    crowded: bool = False  # over MOST_VALUES different texts

    @property
    def is_number(self) -> bool:
        """Whether most of it is numbers; its texts are then mistakes, refused with their place when the column is used."""
        return self.texts.count <= self.numbers and self.type is None

    @property
    def is_sound(self) -> bool:
        """Whether all of it is finite numbers."""
        return self.type is None and self.texts.count == 0 and self.infinite.count == 0

    @property
    def is_text(self) -> bool:
        """Whether its values can be categories: texts, or a few whole numbers that stand for something."""
        if self.type is not None or self.crowded:
            return False
        return self.texts.count > 0 or (self.whole and self.numbers > 0 and self.high - self.low < 1000)


@dataclass(frozen=True, eq=False)
class Frame:
    """R rows, stretch by stretch: the e-th has rows [begins[e], ends[e]), in the order of time.

    numbers: float32 (R, C), NaN where missing, of the columns `number_names`; codes: int32 (R, K), -1 where missing, places in
    values[k], of the columns `text_names`. times: float64 (R,), seconds if they were dates. texts: UTF-8 bytes and where each
    row's begin, (R + 1,). entities: names; owners: int64 (E,), the entity of each stretch of rows, None if the e-th is the
    e-th's own. Without any name each stretch is an entity.
    is_array: the columns have no names, as in NPZ.
    """

    numbers: NDArray[np.float32]
    number_names: tuple[str, ...]
    begins: Ints
    ends: Ints
    entities: tuple[str, ...]
    source: str
    place: Callable[[int], str]  # where a row of the frame stands, for people
    codes: NDArray[np.int32] = field(default_factory=lambda: np.empty((0, 0), np.int32))
    text_names: tuple[str, ...] = ()
    values: tuple[tuple[str, ...], ...] = ()
    times: NDArray[np.float64] | None = None
    texts: tuple[NDArray[np.uint8], Ints] | None = None
    columns: dict[str, Column] = field(default_factory=dict)
    owners: Ints | None = None
    place_in_files: Callable[[int], str] = str  # of a row of the files
    is_array: bool = False

    def __len__(self) -> int:
        return len(self.numbers)

    def number(self, name: str) -> NDArray[np.float32]:
        """A column of numbers, (R,); raises DataError with the first place if it holds anything else."""
        self.check(name)
        if name not in self.number_names:
            raise DataError(f"{self.source}: has no number column '{name}'; it has {listed(self.number_names)}")
        return self.numbers[:, self.number_names.index(name)]

    def check(self, name: str) -> None:
        """Raise DataError unless this column is one of finite numbers."""
        column = self.columns.get(name)
        if column is None:
            return
        if column.type is not None:
            raise DataError(
                f"{self.source}, column '{name}': is of type {column.type}, not numbers; convert or leave it out"
            )
        for odd, what in ((column.texts, "not a number"), (column.infinite, "not a finite float32 number")):
            if odd.count:
                others = f" ({odd.count} such values)" if odd.count > 1 else ""
                raise DataError(
                    f"{self.place_in_files(odd.row)}, column '{name}': {short(odd.text)} is {what}{others}; mend it, "
                    "name it in data.missing_values, or leave the column out"
                )

    def coded(self, name: str) -> tuple[NDArray[np.int32], tuple[str, ...]]:
        """A column's values as codes, (R,), -1 where missing, and what they stand for; raises DataError."""
        if name in self.text_names:
            place = self.text_names.index(name)
            return self.codes[:, place], self.values[place]
        column = self.columns.get(name)
        if column is not None and (column.crowded or column.type is not None):
            why = f"has over {MOST_VALUES:,} different values" if column.crowded else f"is of type {column.type}"
            raise DataError(f"{self.source}, column '{name}': {why}, so it is no category; leave it out")
        found = self.number(name)
        values, codes = np.unique(found[~np.isnan(found)], return_inverse=True)
        out = np.full(len(found), -1, np.int32)
        out[~np.isnan(found)] = codes
        return out, tuple(number_text(float(value)) for value in values)


def number_text(value: float) -> str:
    """A number as it stands in most files: 3, not 3.0."""
    return str(int(value)) if value == int(value) else repr(float(np.float32(value)))


def short(text: str) -> str:
    """A value as a message shows it."""
    return repr(text) if len(text) <= 40 else repr(text[:37] + "...")


def listed(names: Sequence[str]) -> str:
    """Names as a message shows them."""
    return (", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")) or "none"
