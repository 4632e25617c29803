"""A data holder's files as sequences: NPZ arrays, and CSV rows cut into windows that never cross from one entity to another.

Every refusal names the file, the place in it, and the remedy. Nothing here leaves the machine but the shapes in `schema`.
"""

from __future__ import annotations

import csv
import math
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from seqfed.client.settings import DataSettings
from seqfed.common.errors import DataError
from seqfed.common.schema import DataSchema
from seqfed.common.seeds import generator

HIGHEST_LABEL: Final = 999_999  # the run's `classes` ends at a million
LARGEST: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Sequences:
    """N labelled sequences of T steps of F numbers.

    x: float32 (N, T, F), finite; y: int64 (N,), from 0; lengths: int64 (N,) from 1 to T, steps beyond them are padding;
    None when all have T steps.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    lengths: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: NDArray[np.int64]) -> Sequences:
        """The sequences at these indices."""
        return Sequences(self.x[rows], self.y[rows], None if self.lengths is None else self.lengths[rows])


@dataclass(frozen=True, eq=False)
class ClientData:
    """What one client trains on and what it scores models on; the second may be empty."""

    training: Sequences
    validation: Sequences

    @property
    def schema(self) -> DataSchema:
        """What the server is told of these data."""
        both = (self.training, self.validation)
        return DataSchema(
            features=self.training.x.shape[2],
            steps=None if self.training.lengths is not None else self.training.x.shape[1],
            classes=max(int(one.y.max(initial=0)) for one in both) + 1,
            examples=len(self.training),
            validation_examples=len(self.validation),
        )


def load(settings: DataSettings) -> ClientData:
    """Read the files that the settings name; raises DataError."""
    if settings.validation is not None:
        training, _ = read(settings, settings.file, 0.0)
        validation, _ = read(settings, settings.validation, 0.0)
        if validation.x.shape[2] != training.x.shape[2]:
            raise DataError(
                f"{settings.validation}: has {validation.x.shape[2]} features a step, "
                f"{settings.file} has {training.x.shape[2]}"
            )
        if training.lengths is None and validation.x.shape[1] != training.x.shape[1]:
            raise DataError(
                f"{settings.validation}: has {validation.x.shape[1]} steps a sequence, "
                f"{settings.file} has {training.x.shape[1]}"
            )
        return ClientData(training, validation)
    return ClientData(*read(settings, settings.file, settings.validation_fraction))


def read(settings: DataSettings, path: Path, held_out: float) -> tuple[Sequences, Sequences]:
    """The sequences of one file as (kept, held out)."""
    try:
        if path.suffix == ".npz":
            return _split(_read_npz(path), held_out)
        if path.suffix == ".csv":
            return _read_csv(settings, path, held_out)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    raise DataError(f"{path}: unknown kind of file '{path.suffix}'; use .npz or .csv")


# NPZ ------------------------------------------------------------------------------------------------------------------


def _read_npz(path: Path) -> Sequences:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array (.npy)")
            arrays = {name: np.asanyarray(archive[name]) for name in archive.files}
    except (ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:  # Runtime: encrypted
        raise DataError(f"{path}: not a readable NPZ file of plain arrays: {error}") from error
    for name in ("x", "y"):
        if name not in arrays:
            raise DataError(f"{path}: has no array '{name}'; it has {', '.join(sorted(arrays)) or 'none'}")
    x, y, lengths = arrays["x"], arrays["y"], arrays.get("lengths")
    if x.ndim != 3 or x.dtype.kind not in "fiu" or 0 in x.shape:
        raise DataError(
            f"{path}: x is {x.dtype} of shape {x.shape}; it must be numbers of shape (N, T, F), none of them 0"
        )
    if y.shape != (len(x),) or y.dtype.kind not in "iu":
        raise DataError(f"{path}: y is {y.dtype} of shape {y.shape}; it must be whole numbers of shape ({len(x)},)")
    if y.min() < 0:
        raise DataError(f"{path}: y[{int(y.argmin())}] is {int(y.min())}; labels start at 0")
    if y.max() > HIGHEST_LABEL:
        raise DataError(f"{path}: y[{int(y.argmax())}] is {int(y.max())}; labels end at {HIGHEST_LABEL}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        x = x.astype(np.float32)
    if not np.isfinite(x).all():
        first = tuple(int(place) for place in np.argwhere(~np.isfinite(x))[0])
        raise DataError(f"{path}: x[{', '.join(map(str, first))}] is not finite; fill or drop missing values first")
    if lengths is not None:
        if lengths.shape != (len(x),) or lengths.dtype.kind not in "iu":
            raise DataError(f"{path}: lengths must be whole numbers of shape ({len(x)},)")
        if lengths.min() < 1 or lengths.max() > x.shape[1]:
            raise DataError(f"{path}: lengths must be from 1 to {x.shape[1]}")
        lengths = lengths.astype(np.int64)
    return Sequences(x, y.astype(np.int64), lengths)


def _split(data: Sequences, held_out: float) -> tuple[Sequences, Sequences]:
    """A seeded share of the sequences, at least one being kept."""
    order = generator(0, "validation split").permutation(len(data))
    count = min(int(held_out * len(data)), len(data) - 1)
    return data.take(np.sort(order[count:])), data.take(np.sort(order[:count]))


# CSV ------------------------------------------------------------------------------------------------------------------


def _read_csv(settings: DataSettings, path: Path, held_out: float) -> tuple[Sequences, Sequences]:
    assert settings.label is not None  # DataSettings sees to it
    assert settings.window is not None
    entities, columns = _csv_entities(settings, path)
    if settings.group is not None:
        names = sorted(entities)
        order = generator(0, "validation split").permutation(len(names))
        count = min(int(held_out * len(names)), len(names) - 1)
        out = {names[place] for place in order[:count]}
        kept = [rows for name, rows in entities.items() if name not in out]
        held = [rows for name, rows in entities.items() if name in out]
    else:  # one entity: its last rows, so that no window of the one half overlaps the other
        (rows,) = entities.values()
        cut = len(rows) - int(held_out * len(rows))
        kept, held = [rows[:cut]], [rows[cut:]]
    training = _windows(kept, settings.window, settings.stride, columns)
    if len(training) == 0:
        longest = max(len(rows) for rows in kept)
        raise DataError(
            f"{path}: no entity has {settings.window} rows (the longest has {longest}); use a smaller window"
        )
    return training, _windows(held, settings.window, settings.stride, columns)


def _csv_entities(settings: DataSettings, path: Path) -> tuple[dict[str, list[list[float]]], int]:
    """Per entity its rows in file order, each the features and then the label; and the number of features."""
    assert settings.label is not None
    entities: dict[str, list[list[float]]] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            features = _feature_columns(settings, path, header)
            places = [header.index(name) for name in (*features, settings.label)]
            group = header.index(settings.group) if settings.group is not None else None
            for row in reader:
                if not row:
                    continue  # a blank line, as often at a file's end
                if len(row) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(row)} fields, the header has {len(header)}; "
                        "mend the line or its quoting"
                    )
                numbers = [_number(path, reader.line_num, header[place], row[place]) for place in places]
                label = numbers[-1]
                if not 0 <= label <= HIGHEST_LABEL or label != int(label):
                    raise DataError(
                        f"{path}, line {reader.line_num}, column '{settings.label}': {row[places[-1]]!r} is not a label; "
                        f"labels are whole numbers from 0 to {HIGHEST_LABEL}"
                    )
                entities.setdefault(row[group] if group is not None else "", []).append(numbers)
        except UnicodeDecodeError as error:
            line = _first_line_not_utf8(path)
            raise DataError(f"{path}, line {line}: not UTF-8 text; convert the file to UTF-8") from error
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    if not entities:
        raise DataError(f"{path}: has no rows below its header line; is it the right file?")
    return entities, len(features)


def _first_line_not_utf8(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    raise AssertionError("every line is UTF-8, so their sum is")


def _feature_columns(settings: DataSettings, path: Path, header: Sequence[str]) -> list[str]:
    if not header:
        raise DataError(f"{path}: is empty; a header line and rows are needed")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}: columns appear twice: {', '.join(twice)}; rename or remove one of each")
    others = [name for name in header if name not in (settings.label, settings.group)]
    features = list(settings.columns) if settings.columns is not None else others
    for name in (*features, settings.label, settings.group):
        if name is not None and name not in header:
            raise DataError(f"{path}: has no column '{name}'; it has {', '.join(header)}")
    if not features:
        raise DataError(f"{path}: has no feature column besides the label and the group")
    return features


def _number(path: Path, line: int, column: str, text: str) -> float:
    try:
        value = math.nan if "_" in text else float(text)  # Python reads 1_000 as a number; nobody else does
    except ValueError:
        value = math.nan
    if not abs(value) <= LARGEST:  # nor if it is NaN
        shown = text if len(text) <= 40 else text[:37] + "..."
        raise DataError(
            f"{path}, line {line}, column '{column}': {shown!r} is not a finite float32 number; "
            "fill or drop missing values, or leave the column out"
        )
    return value


def _windows(entities: Iterable[Sequence[Sequence[float]]], window: int, stride: int, features: int) -> Sequences:
    x, y = [np.empty((0, window, features), np.float32)], [np.empty(0, np.int64)]
    for rows in entities:
        if len(rows) < window:
            continue
        table = np.asarray(rows, np.float64)
        starts = np.arange(0, len(table) - window + 1, stride)
        view = np.lib.stride_tricks.sliding_window_view(table[:, :-1].astype(np.float32), window, axis=0)
        x.append(np.ascontiguousarray(view[starts].transpose(0, 2, 1)))
        y.append(table[starts + window - 1, -1].astype(np.int64))
    return Sequences(np.concatenate(x), np.concatenate(y))
