"""`seqfed data split`: one table cut into a file a client, for trying a federation before there is one.

A CSV file is read twice, line by line: first for the columns that decide who gets what, then to copy each record, untouched,
to its client's file. So its size is bounded by the disk, and a shard differs from the original by nothing but missing
records. Parquet goes the same way in batches of rows; NPZ is read whole.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import shutil
import tempfile
import zipfile
import zlib
from array import array
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from seqfed.client import partition
from seqfed.client.data.values import compute
from seqfed.client.settings import DELIMITERS, WHITESPACE
from seqfed.common.errors import ConfigError, DataError
from seqfed.common.seeds import generator

if TYPE_CHECKING:
    import pyarrow as pa

LONGEST_LINE: Final = 16 << 20  # characters; a file without line ends would otherwise be read into memory whole
MOST_CLASSES: Final = 1000  # of a Dirichlet split: more are not classes but numbers
BATCH_ROWS: Final = 65_536  # of Parquet held at a time, and in a shard's row group
TELL_ROWS: Final = 20_000  # between two tellings of progress

Progress = Callable[[str, float], None]  # what is being done, and the share of it that is


class How(StrEnum):
    """Ways to split."""

    IID = "iid"
    DIRICHLET = "dirichlet"
    COLUMN = "column"
    SIZE = "size"


@dataclass(frozen=True)
class Plan:
    """Which rows go together, and how they are dealt.

    clients: None is one a value of the column `by`.
    by: the column of how = column. label: that of how = dirichlet. group: the column that tells entities apart.
    alpha: of dirichlet, its concentration, 0.5 if None; of size, the power law's exponent, 1 if None.
    """

    how: How
    clients: int | None
    by: str | None = None
    label: str | None = None
    group: str | None = None
    alpha: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.how is How.COLUMN and self.by is None:
            raise ConfigError("a split by column needs the column: --by COLUMN")
        if self.how is not How.COLUMN and self.by is not None:
            raise ConfigError(f"--by is the column of --how column, not of {self.how}; leave one of the two out")
        if self.how is How.DIRICHLET and self.label is None:
            raise ConfigError("a Dirichlet split is by label: name its column with --label")
        if self.clients is None and self.how is not How.COLUMN:
            raise ConfigError(f"among how many clients? --how {self.how} needs --clients N")
        if self.clients is not None and self.clients < 1:
            raise ConfigError(f"--clients is {self.clients}; it must be 1 or more")
        if self.alpha is not None and not 0 < self.alpha <= 1e6:
            raise ConfigError(f"--alpha is {self.alpha:g}; it must be above 0 and at most 1,000,000")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that decide, each once."""
        label = self.label if self.how is How.DIRICHLET else None
        return tuple(dict.fromkeys(name for name in (self.group, label, self.by) if name is not None))


@dataclass(frozen=True, eq=False)
class Keys:
    """One column's values: row r has values[codes[r]]."""

    codes: NDArray[np.int64]
    values: Sequence[str]


@dataclass(frozen=True)
class Shard:
    """One client's file; `entities` is its number of rows if no group was named, `values` what it got of the column `by`."""

    file: Path
    rows: int
    entities: int
    values: tuple[str, ...] = ()


# Who gets what -------------------------------------------------------------------------------------------------------


def owners(plan: Plan, rows: int, keys: Mapping[str, Keys]) -> NDArray[np.int64]:
    """The client of each row, int64 (rows,); raises DataError if the rows cannot be split so.

    Where the plan names a group, its entities are dealt, never their rows: by Dirichlet as what most of an entity's rows
    are labelled, and by column only if all its rows agree.
    """
    units, count = (keys[plan.group].codes, len(keys[plan.group].values)) if plan.group else (None, rows)
    draw = generator(plan.seed, "data split")
    match plan.how:
        case How.IID:
            parts = partition.iid(count, plan.clients or 1, draw)
        case How.SIZE:
            parts = partition.by_size(count, plan.clients or 1, 1.0 if plan.alpha is None else plan.alpha, draw)
        case How.COLUMN:
            assert plan.by is not None  # Plan sees to it
            of_unit = _agreed(plan, keys, units, count)
            parts = partition.by_key(of_unit, plan.clients or len(keys[plan.by].values), draw)
        case How.DIRICHLET:
            assert plan.label is not None
            assert plan.clients is not None
            labels = keys[plan.label]
            if len(labels.values) > MOST_CLASSES:
                raise DataError(
                    f"column '{plan.label}' has {len(labels.values)} different values; a Dirichlet split is by class, of "
                    f"which there are at most {MOST_CLASSES}: use another --label or another --how"
                )
            of_unit = labels.codes if units is None else _most_common(labels, units, count)
            # a tenth of an even share is little, and still something to train on
            smallest = max(1, min(10, count // (10 * plan.clients)))
            alpha = 0.5 if plan.alpha is None else plan.alpha
            parts = partition.dirichlet(of_unit, plan.clients, alpha, draw, smallest)
    owner = np.empty(count, np.int64)
    for client, part in enumerate(parts):
        owner[part] = client
    return owner if units is None else owner[units]


def _agreed(plan: Plan, keys: Mapping[str, Keys], units: NDArray[np.int64] | None, count: int) -> NDArray[np.int64]:
    """The value of the column `by` of each unit; raises DataError naming an entity that has two."""
    assert plan.by is not None
    by = keys[plan.by]
    if units is None:
        return by.codes
    found = np.empty(count, np.int64)
    found[units] = by.codes
    wrong = np.flatnonzero(found[units] != by.codes)
    if len(wrong):
        assert plan.group is not None
        row = int(wrong[0])
        one, other = by.values[by.codes[row]], by.values[found[int(units[row])]]
        raise DataError(
            f"entity {keys[plan.group].values[units[row]]!r} of column '{plan.group}' has {one!r} and {other!r} in column "
            f"'{plan.by}', so it belongs to two clients; split by another column, or leave --group out"
        )
    return found


def _most_common(labels: Keys, units: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """What most rows of each entity are labelled; the smaller code at a tie."""
    pairs, sizes = np.unique(units * len(labels.values) + labels.codes, return_counts=True)
    order = np.lexsort((-pairs, sizes))  # the last one written is the most common, and of those the first label
    found = np.empty(count, np.int64)
    found[pairs[order] // len(labels.values)] = pairs[order] % len(labels.values)
    return found


# The files ------------------------------------------------------------------------------------------------------------


def write_shards(
    file: Path,
    plan: Plan,
    out: Path,
    *,
    delimiter: str | None = None,
    quotes: bool | None = None,
    encoding: str = "utf-8",
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> list[Shard]:
    """Write one file a client into the folder `out`, of the same kind and with the same header as `file`.

    delimiter, quotes, encoding, names: of CSV files, as in client.toml. All shards appear at once, or none.
    Raises DataError and ConfigError.
    """
    tell = progress or (lambda _what, _share: None)
    if encoding.lower().replace("_", "-") in {"utf-16", "utf-32"}:
        raise ConfigError(f"{encoding} cannot be copied record by record; convert the file to UTF-8")
    suffix, table = _kind(file, delimiter, quotes, encoding, names)
    try:
        rows, keys = table.scan(plan.columns, tell)
        if rows == 0:
            raise DataError("has no rows below its header; is it the right file?")
        owner = owners(plan, rows, keys)
        clients = int(owner.max()) + 1
        width = len(str(clients - 1))
        stem = file.name[: -len(suffix)]
        names = [f"{stem}-{client:0{width}}{suffix}" for client in range(clients)]
        out.mkdir(parents=True, exist_ok=True)
        for name in names:
            if (out / name).exists():
                raise ConfigError(f"{out / name} exists already; remove it, or name another folder with --out")
        with tempfile.TemporaryDirectory(prefix=".split-", dir=out) as folder:
            table.write(owner, [Path(folder) / name for name in names], tell)
            for name in names:
                shutil.move(Path(folder) / name, out / name)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file}: damaged or cut off: {error}; copy it here again") from error
    except OSError as error:
        raise DataError(f"{error.filename or file}: {error.strerror or error}") from error
    entities = np.arange(rows) if plan.group is None else keys[plan.group].codes
    shards = []
    for client, name in enumerate(names):
        own = owner == client
        by = keys[plan.by] if plan.by is not None else None
        values = tuple(by.values[int(code)] for code in np.unique(by.codes[own])) if by is not None else ()
        shards.append(Shard(out / name, int(own.sum()), len(np.unique(entities[own])), values))
    return shards


@dataclass(frozen=True)
class _Csv:
    file: Path
    delimiter: str  # one character, or WHITESPACE
    quotes: bool
    encoding: str
    names: tuple[str, ...] | None  # of a file without a header line

    def scan(self, columns: Sequence[str], tell: Progress) -> tuple[int, dict[str, Keys]]:
        with contextlib.closing(self._records(tell, "reading")) as records:
            places = _places(self.names or next(records)[1], columns)
            codes = [array("q") for _ in columns]
            known: list[dict[str, int]] = [{} for _ in columns]
            rows = 0
            for _, record in records:
                rows += 1
                for place, code, found in zip(places, codes, known, strict=True):
                    code.append(found.setdefault(record[place], len(found)))
        found_keys = zip(columns, codes, known, strict=True)
        return rows, {name: Keys(np.array(code, np.int64), list(found)) for name, code, found in found_keys}

    def write(self, owner: NDArray[np.int64], targets: Sequence[Path], tell: Progress) -> None:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(self._open(target, "wb")) for target in targets]
            records = stack.enter_context(contextlib.closing(self._records(tell, "writing")))
            if self.names is None:
                header, _ = next(records)
                for file in files:
                    file.write(header)
            rows = 0
            for client, (raw, _) in zip(owner.tolist(), records, strict=False):  # a record too many stays in `records`
                rows += 1
                files[client].write(raw if raw.endswith((b"\n", b"\r")) else raw + b"\n")
            if rows != len(owner) or next(records, None) is not None:
                raise DataError("changed while it was being split; split it again")

    def _open(self, path: Path, mode: str) -> IO[bytes]:
        if path.suffix == ".gz":
            return gzip.open(path, mode)  # type: ignore[return-value]
        return path.open(mode)

    def _records(self, tell: Progress, what: str) -> Generator[tuple[bytes, list[str]]]:
        """Each record's bytes and its fields, the header first if there is one; blank lines are passed over."""
        size = max(1, self.file.stat().st_size)
        with self.file.open("rb") as below, self._unpacked(below) as file:
            taken: list[bytes] = []
            lines = self._lines(file, taken)
            number = 0

            def counted() -> Iterator[str]:
                nonlocal number
                for number, line in enumerate(lines, 1):  # noqa: B007 - the number is for the refusals below
                    yield line

            reader: Iterator[list[str]]
            if self.delimiter == WHITESPACE:
                reader = (line.split() for line in counted())
            else:
                reader = csv.reader(
                    counted(),
                    delimiter=self.delimiter,
                    quoting=csv.QUOTE_MINIMAL if self.quotes else csv.QUOTE_NONE,
                    strict=True,
                )
            fields, count = len(self.names or ()), 0
            while True:
                try:
                    record = next(reader, None)
                except csv.Error as error:
                    raise DataError(f"line {number}: {error}; mend the line or its quoting") from error
                if record is None:
                    break
                raw = b"".join(taken)
                taken.clear()
                if not record:
                    continue
                fields = fields or len(record)
                if len(record) != fields:
                    raise DataError(
                        f"line {number}: {len(record)} fields, {'the header has' if self.names is None else 'named are'} "
                        f"{fields}; mend the line or its quoting"
                    )
                yield raw, record
                count += 1
                if count % TELL_ROWS == 0:
                    tell(what, min(1.0, below.tell() / size))
            if not fields:
                raise DataError("is empty; a header line and rows are needed")
            tell(what, 1.0)

    def _lines(self, file: IO[bytes], taken: list[bytes]) -> Iterator[str]:
        number = 0
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(raw) > LONGEST_LINE:
                raise DataError(f"line {number}: longer than {LONGEST_LINE} bytes; is it a text file with line ends?")
            taken.append(raw)
            try:
                yield raw.decode(
                    ("utf-8-sig" if self.encoding == "utf-8" else self.encoding) if number == 1 else self.encoding
                )
            except UnicodeDecodeError as error:
                raise DataError(
                    f"line {number}: not {self.encoding} text; name its encoding, or convert the file to UTF-8"
                ) from error
            except LookupError:
                raise ConfigError(f"unknown encoding '{self.encoding}'; utf-8 and latin-1 are common") from None

    def _unpacked(self, file: IO[bytes]) -> contextlib.AbstractContextManager[IO[bytes]]:
        if self.file.suffix == ".gz":
            return gzip.open(file, "rb")  # type: ignore[return-value]
        return contextlib.nullcontext(file)


@dataclass(frozen=True)
class _Parquet:
    file: Path

    def scan(self, columns: Sequence[str], tell: Progress) -> tuple[int, dict[str, Keys]]:
        pc = compute()

        with self._opened() as parquet:
            rows = parquet.metadata.num_rows
            _places(parquet.schema_arrow.names, columns)
            known: list[dict[str, int]] = [{} for _ in columns]
            codes: list[list[NDArray[np.int64]]] = [[np.empty(0, np.int64)] for _ in columns]
            done = 0
            for batch in parquet.iter_batches(BATCH_ROWS, columns=list(columns)) if columns else ():
                for place, name in enumerate(columns):
                    encoded = pc.dictionary_encode(batch.column(name), null_encoding="encode")
                    values = [str(value) for value in encoded.dictionary.to_pylist()]
                    own = np.array([known[place].setdefault(one, len(known[place])) for one in values], np.int64)
                    codes[place].append(own[encoded.indices.to_numpy(zero_copy_only=False)])
                done += batch.num_rows
                tell("reading", done / max(1, rows))
        found_keys = zip(columns, codes, known, strict=True)
        return rows, {name: Keys(np.concatenate(code), list(found)) for name, code, found in found_keys}

    def write(self, owner: NDArray[np.int64], targets: Sequence[Path], tell: Progress) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with self._opened() as parquet, contextlib.ExitStack() as stack:
            schema = parquet.schema_arrow
            writers = [stack.enter_context(pq.ParquetWriter(target, schema)) for target in targets]
            pending: list[list[pa.RecordBatch]] = [[] for _ in targets]
            held, done = 0, 0

            def flush() -> None:
                for writer, batches in zip(writers, pending, strict=True):
                    if batches:
                        writer.write_table(pa.Table.from_batches(batches, schema), row_group_size=BATCH_ROWS)
                        batches.clear()

            for batch in parquet.iter_batches(BATCH_ROWS):
                own = owner[done : done + batch.num_rows]
                for client in np.unique(own):
                    pending[client].append(batch.take(pa.array(np.flatnonzero(own == client))))
                done, held = done + batch.num_rows, held + batch.num_rows
                if held >= 8 * BATCH_ROWS:  # a few row groups a shard at most, without holding the file
                    flush()
                    held = 0
                tell("writing", done / len(owner))
            flush()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with self.file.open("rb") as file, pq.ParquetFile(file) as parquet:
                yield parquet
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(f"not a readable Parquet file: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class _Npz:
    file: Path

    def scan(self, columns: Sequence[str], tell: Progress) -> tuple[int, dict[str, Keys]]:
        arrays = self._arrays()
        _places(list(arrays), columns, "array")
        keys = {}
        for name in columns:
            if arrays[name].shape != (self._rows(arrays),):
                raise DataError(
                    f"array '{name}' has the shape {arrays[name].shape}; it must be ({self._rows(arrays)},)"
                )
            values, codes = np.unique(arrays[name], return_inverse=True)
            keys[name] = Keys(codes.astype(np.int64), [str(one) for one in values])
        tell("reading", 1.0)
        return self._rows(arrays), keys

    def write(self, owner: NDArray[np.int64], targets: Sequence[Path], tell: Progress) -> None:
        arrays = self._arrays()
        for client, target in enumerate(targets):
            mine = owner == client
            parts: dict[str, Any] = {
                name: one[mine] if self._split(one, owner) else one for name, one in arrays.items()
            }
            np.savez(target, **parts)
            tell("writing", (client + 1) / len(targets))

    @staticmethod
    def _split(values: NDArray[Any], owner: NDArray[np.int64]) -> bool:
        return bool(values.ndim) and len(values) == len(owner)

    @staticmethod
    def _rows(arrays: Mapping[str, NDArray[Any]]) -> int:
        return len(arrays["x"])

    def _arrays(self) -> dict[str, NDArray[Any]]:
        try:
            with self.file.open("rb") as file:
                archive = np.load(file, allow_pickle=False)
                if not isinstance(archive, np.lib.npyio.NpzFile):
                    raise ValueError("it is a single array (.npy)")
                arrays = {name: np.asarray(archive[name]) for name in archive.files}
        except (ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"not a readable NPZ file of plain arrays: {error}") from error
        if "x" not in arrays or arrays["x"].ndim == 0:
            raise DataError(f"has no array 'x' of sequences; it has {', '.join(sorted(arrays)) or 'none'}")
        return arrays


def _kind(
    file: Path, delimiter: str | None, quotes: bool | None, encoding: str, names: Sequence[str] | None
) -> tuple[str, _Csv | _Parquet | _Npz]:
    name = file.name.lower()
    if name.endswith((".txt", ".txt.gz")) and delimiter is None and names is None:
        raise ConfigError(
            f"{file}: a text has no rows to deal out; if it is a table, say what separates its columns: --delimiter"
        )
    for suffix in (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz"):
        if name.endswith(suffix):
            between = "," if delimiter is None else DELIMITERS.get(delimiter, delimiter)
            if delimiter is None and ".tsv" in suffix:
                between = "\t"
            if between != WHITESPACE and len(between) != 1:
                raise ConfigError(f"--delimiter {delimiter} is not one character, 'tab' or 'whitespace'")
            quoted = between not in {"\t", WHITESPACE} if quotes is None else quotes
            return file.name[-len(suffix) :], _Csv(file, between, quoted, encoding, tuple(names) if names else None)
    if name.endswith(".parquet"):
        return file.name[-8:], _Parquet(file)
    if name.endswith(".npz"):
        return file.name[-4:], _Npz(file)
    raise DataError(f"{file}: unknown kind of file '{file.suffix}'; use .csv, .tsv, .csv.gz, .parquet or .npz")


def _places(header: Sequence[str], columns: Sequence[str], what: str = "column") -> list[int]:
    """Where the columns stand; raises DataError."""
    for name in columns:
        if header.count(name) > 1:
            raise DataError(f"{what} '{name}' is there {header.count(name)} times; rename or remove one of them")
        if name not in header:
            shown = ", ".join(header[:20]) + (", ..." if len(header) > 20 else "")
            raise DataError(f"has no {what} '{name}'; it has {shown}")
    return [header.index(name) for name in columns]
