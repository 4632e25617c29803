"""CSV and Parquet files as one Frame: numbers, coded texts and entities, in the order of entities and time.

Two passes. The first decides what each column is from all of its values, finds the bad ones, and learns the order of the
rows; the second writes them where they belong. So the rows themselves are never in memory at once, only a few bytes of
each for its entity and its time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqfed.client.data.frame import LARGEST, MOST_VALUES, Column, Frame, Ints, listed, short
from seqfed.client.data.reading import Bound, Kind, TableFile
from seqfed.client.data.store import Growing, Store
from seqfed.client.data.values import Codes, Reader, compute, is_numeric, is_textual
from seqfed.client.settings import DataSettings
from seqfed.common.errors import DataError


@dataclass
class _Rows:
    """What the first pass learns of the rows: their entity and time, batch by batch."""

    entities: Codes = field(default_factory=Codes)
    groups: list[NDArray[np.int32]] = field(default_factory=list)
    times: list[NDArray[np.float64]] = field(default_factory=list)
    count: int = 0
    dated: bool | None = None  # whether the times are dates


def read_frame(paths: Sequence[Path], kind: Kind, settings: DataSettings) -> Frame:
    """All rows of these files; raises DataError with file, row, column and remedy."""
    import pyarrow as pa

    frame = _Ingest(paths, kind, settings).frame()
    pa.default_memory_pool().release_unused()
    return frame


class _Ingest:
    """The two passes over a table's files."""

    def __init__(self, paths: Sequence[Path], kind: Kind, settings: DataSettings) -> None:
        self.settings = settings
        self.files = [TableFile.of(path, kind, settings) for path in paths]
        self.store = Store.of(settings)
        self.reader = Reader(settings)
        self.source = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        self.named = self._named()
        self.wanted = self._wanted()
        self._check_size()
        self.columns = {name: Column(name, self._type(name)) for name in self.wanted if name != settings.text}
        self.rows = _Rows()
        self.sizes: list[int] = []  # rows of each file

    def _named(self) -> tuple[str, ...]:
        """The columns that the settings name, all of them in every file."""
        given = self.settings
        single = (given.group, given.time, given.variable, given.value, given.text)
        named = [*(given.columns or ()), *(name for names in given.wide.values() for name in names)]
        named += [name for name in single if name is not None]
        named += given.label if given.label_file is None else ()
        if given.variable is not None:  # its inputs are values in that column
            named = [name for name in named if name not in (given.columns or ())]
        first = self.files[0]
        for file in self.files:
            for name in named:
                if name not in file.names:
                    raise DataError(f"{file.path}: has no column '{name}'; it has {listed(file.names)}")
            if given.columns is None and set(file.names) != set(first.names):
                other = min(set(file.names) ^ set(first.names))
                lacks, has = (file, first) if other in first.names else (first, file)
                raise DataError(
                    f"{lacks.path}: has no column '{other}', which {has.path} has; files of one table have the same columns; "
                    "or name those that count (data.columns)"
                )
        return tuple(dict.fromkeys(named))

    def _wanted(self) -> tuple[str, ...]:
        given = self.settings
        if given.columns is not None or given.variable is not None:
            return self.named
        return self.files[0].names

    def _type(self, name: str) -> str | None:
        """What a Parquet column is if it is of no use: a list, say. Files that differ here are refused."""
        if self.files[0].kind != "parquet":
            return None
        import pyarrow.parquet as pq

        sorts = []
        for file in self.files:
            kind = pq.read_schema(file.path).field(name).type
            sorts.append("texts" if is_textual(kind) else "numbers" if is_numeric(kind) else str(kind))
            if sorts[-1] != sorts[0]:
                raise DataError(
                    f"{file.path}, column '{name}': holds {sorts[-1]}, in {self.files[0].path} it holds {sorts[0]}; "
                    "write both with one schema"
                )
        return None if sorts[0] in {"texts", "numbers"} else sorts[0]

    def _check_size(self) -> None:
        """Parquet tells its size first, and a few bytes of it may stand for very many rows."""
        bound = Bound(self.settings.unpacked_gib)
        for file in self.files:
            if file.rows is not None:
                bound.take(file.path, max(file.unpacked, 4 * file.rows * len(self.wanted)))

    def frame(self) -> Frame:
        self._first_pass()
        given = self.settings
        if self.rows.count == 0:
            raise DataError(f"{self.source}: has no rows below its header line; is it the right file?")
        begins, ends, entities, order = self._ordered()
        numbers, codes, values, texts = self._second_pass(order)
        times = None
        if given.time is not None:
            times = np.concatenate(self.rows.times)
            times = times if order is None else times[order]

        owners = None
        if entities and (given.wide or given.text is not None):
            owners = np.concatenate(self.rows.groups).astype(np.int64)
        self.rows = _Rows()  # `place` keeps this object, and need not keep them

        def place(row: int) -> str:
            return self._place(row if order is None else int(order[row]))

        return Frame(
            numbers=numbers,
            number_names=self._number_names,
            begins=begins,
            ends=ends,
            entities=entities,
            source=self.source,
            place=place,
            codes=codes,
            text_names=self._text_names,
            values=values,
            times=times,
            texts=texts,
            columns=self.columns,
            owners=owners,
            place_in_files=self._place,
        )

    def _batches(self) -> Iterator[tuple[int, int, Any]]:
        """(file, rows before, batch)."""
        base, bound = 0, Bound(self.settings.unpacked_gib)
        for number, file in enumerate(self.files):
            for batch in file.batches(self.wanted, bound):
                yield number, base, batch
                base += batch.num_rows

    def _place(self, row: int) -> str:
        """Where the row (from 0, over all files) stands."""
        for file, size in zip(self.files, self.sizes, strict=True):
            if row < size:
                return file.place(row)
            row -= size
        return self.source

    # First pass: what the columns are

    def _first_pass(self) -> None:
        given, rows = self.settings, self.rows
        self.sizes = [0] * len(self.files)
        values = {name: Codes() for name in self.columns if name != given.group}
        for number, base, batch in self._batches():
            self.sizes[number] += batch.num_rows
            for name, column in self.columns.items():
                array = batch.column(name)
                if name == given.time:
                    rows.times.append(self._times(array, base))
                if name == given.group:
                    rows.groups.append(self._groups(array, base))
                elif column.type is None:
                    self._scan(column, array, base, values[name])
            if given.group is None:
                rows.groups.append(np.full(batch.num_rows, number, np.int32))
            rows.count += batch.num_rows

    def _scan(self, column: Column, array: Any, base: int, values: Codes) -> None:
        found, texts = self.reader.numbers(array)
        if texts is not None and texts.any():
            where = np.flatnonzero(texts)
            column.texts = column.texts.more(where + base, lambda one: str(array[int(where[one])].as_py()))
        if column.texts.count and not column.crowded:
            values.of(self.reader.texts(array))
            column.crowded = len(values.places) > MOST_VALUES
            if column.crowded:
                values.places.clear()
        real = found[~np.isnan(found)]
        if len(real) == 0:
            column.missing += len(array) - (0 if texts is None else int(texts.sum()))
            return
        column.numbers += len(real)
        column.missing += len(array) - len(real) - (0 if texts is None else int(texts.sum()))
        infinite = np.flatnonzero(np.abs(found) > LARGEST)
        column.infinite = column.infinite.more(infinite + base, lambda one: str(array[int(infinite[one])].as_py()))
        column.low, column.high = min(column.low, float(real.min())), max(column.high, float(real.max()))
        column.whole = column.whole and len(infinite) == 0 and bool((real == np.floor(real)).all())

    def _groups(self, array: Any, base: int) -> NDArray[np.int32]:
        codes = self.rows.entities.of(self.reader.texts(array))
        if (codes < 0).any():
            self._refuse(base + np.flatnonzero(codes < 0), self.settings.group, "has no value", "say whose the row is")
        return codes

    def _times(self, array: Any, base: int) -> NDArray[np.float64]:
        import pyarrow as pa

        pc = compute()

        kind, name = array.type, self.settings.time
        if pa.types.is_temporal(kind) and not pa.types.is_duration(kind) and not pa.types.is_time(kind):
            stamps = array.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False)  # nanoseconds are cut
            exact = stamps.cast(pa.int64()).cast(pa.float64(), safe=False)
            found = pc.fill_null(exact, np.nan).to_numpy(zero_copy_only=False) / 1e6
        else:
            found, texts = self.reader.numbers(array)
            if texts is not None and texts.any():
                self._one_kind_of_time(True, bool((~np.isnan(found)).any()), base + int(np.argmax(texts)))
                found = self._dates(array, texts, base)
            elif not np.isnan(found).all():
                self._one_kind_of_time(False, False, base + int(np.argmin(np.isnan(found))))
        if np.isnan(found).any():
            self._refuse(base + np.flatnonzero(np.isnan(found)), name, "has no value", "say when the row was")
        if np.isinf(found).any():
            self._refuse(base + np.flatnonzero(np.isinf(found)), name, "is not finite", "mend it")
        return np.asarray(found, np.float64)

    def _one_kind_of_time(self, dates: bool, numbers_too: bool, row: int) -> None:
        if numbers_too or self.rows.dated not in {None, dates}:
            self._refuse(np.array([row]), self.settings.time, "mixes numbers and dates", "write all times one way")
        self.rows.dated = dates

    def _dates(self, array: Any, texts: NDArray[np.bool_], base: int) -> NDArray[np.float64]:
        out = np.full(len(array), np.nan)
        for place in np.flatnonzero(texts):
            text = str(array[int(place)].as_py()).strip()
            try:
                when = datetime.fromisoformat(text)
            except ValueError:
                what = f"{short(text)} is neither a number nor an ISO 8601 date"
                remedy = "write it as 2024-01-31T08:30:00, or as a number"
                self._refuse(np.array([base + place]), self.settings.time, what, remedy)
                continue
            out[place] = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
        return out

    def _refuse(self, rows: Ints, column: str | None, what: str, remedy: str) -> None:
        """Raise DataError for these rows, the first one named."""
        others = f" ({len(rows)} such rows in this stretch of the file)" if len(rows) > 1 else ""
        raise DataError(f"{self._place(int(rows[0]))}, column '{column}': {what}{others}; {remedy}")

    # Between: the order of the rows

    def _ordered(self) -> tuple[Ints, Ints, tuple[str, ...], Ints | None]:
        """(begins, ends, names, order): order[i] is the place in the files of the i-th row; None if it is i."""
        given, rows = self.settings, self.rows
        count = rows.count
        if (
            given.text is not None
            or given.wide
            or (given.group is None and given.time is None and len(self.files) == 1)
        ):
            if given.text is None and not given.wide:
                return np.array([0]), np.array([count]), (self.source,), None
            each = np.arange(count, dtype=np.int64)
            return each, each + 1, tuple(rows.entities.places), None
        groups = np.concatenate(rows.groups)
        names = tuple(rows.entities.places) if given.group is not None else tuple(str(file.path) for file in self.files)
        keys = (groups,) if given.time is None else (np.concatenate(rows.times), groups)
        order = np.lexsort(keys)
        sizes = np.bincount(groups, minlength=len(names))
        present = np.flatnonzero(sizes)
        ends = np.cumsum(sizes)[present]
        begins = ends - sizes[present]
        named = tuple(names[place] for place in present)
        tidy = bool((order == np.arange(count)).all())
        return begins, ends, named, None if tidy else order

    # Second pass: the rows where they belong

    @cached_property
    def _number_names(self) -> tuple[str, ...]:
        return tuple(name for name, column in self.columns.items() if column.is_number and name != self.settings.group)

    @cached_property
    def _text_names(self) -> tuple[str, ...]:
        return tuple(
            name
            for name, column in self.columns.items()
            if column.is_text and column.texts.count > 0 and name != self.settings.group
        )

    def _second_pass(self, order: Ints | None) -> tuple[Any, Any, tuple[tuple[str, ...], ...], Any]:
        count = self.rows.count
        numbers = self.store.empty((count, len(self._number_names)), np.float32)
        codes = self.store.empty((count, len(self._text_names)), np.int32)
        values = [Codes() for _ in self._text_names]
        blob, sizes = Growing(self.store, np.uint8), []
        ranks = None
        if order is not None:
            ranks = np.empty(count, np.int64)
            ranks[order] = np.arange(count)
        changed = DataError(f"{self.source}: changed while it was read; start again when nothing writes to it")
        done = 0
        for _, base, batch in self._batches():
            size = batch.num_rows
            done = base + size
            if done > count:
                raise changed
            where = slice(base, base + size) if ranks is None else ranks[base : base + size]
            block = np.empty((size, len(self._number_names)), np.float32)
            with np.errstate(over="ignore"):  # an infinite one is refused when its column is used
                for place, name in enumerate(self._number_names):
                    block[:, place] = self.reader.numbers(batch.column(name))[0]
            numbers[where] = block
            coded = np.empty((size, len(values)), np.int32)
            for place, name in enumerate(self._text_names):
                coded[:, place] = values[place].of(self.reader.texts(batch.column(name)))
            codes[where] = coded
            if self.settings.text is not None:
                sizes.append(self._add_texts(batch.column(self.settings.text), blob))
        if done != count:
            raise changed
        texts = None
        if self.settings.text is not None:
            texts = (blob.finish(), np.concatenate([[0], *sizes]).cumsum().astype(np.int64))
        return numbers, codes, tuple(tuple(one.places) for one in values), texts

    def _add_texts(self, column: Any, blob: Growing) -> NDArray[np.int64]:
        import pyarrow as pa

        pc = compute()

        if not is_textual(column.type):
            raise DataError(f"{self.source}, column '{self.settings.text}': is of type {column.type}, not texts")
        column = pc.fill_null(column.cast(pa.large_string()), "")
        sizes = pc.binary_length(column).to_numpy(zero_copy_only=False)
        offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
        data = column.buffers()[2]
        if data is not None:
            blob.add(np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]])
        return np.asarray(sizes, np.int64)
