"""Bytes off the disk as text, and tables as batches of columns; every refusal names the file, the place and the remedy.

Nothing here is ever larger than a block: a file that unfolds beyond its bound, a line that never ends and a table of a
million columns are refused before they are in memory. pyarrow is loaded when the first table is read.
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Literal

import numpy as np

from seqfed.client.settings import WHITESPACE, DataSettings
from seqfed.common.errors import DataError

BLOCK: Final = 1 << 22  # bytes read at once, and so the longest row: ten times one of 16,384 numbers
MOST_COLUMNS: Final = 16_384  # as in a spreadsheet; a batch's cost grows with it
LONGEST_NAME: Final = 200  # characters, as a run's names
Kind = Literal["npz", "csv", "parquet", "text"]


def files_of(given: tuple[str, ...]) -> list[Path]:
    """The files behind paths and globs, each glob's in the order of names; raises DataError if there are none."""
    found: list[Path] = []
    for one in given:
        if Path(one).exists() or not glob.has_magic(one):
            found.append(Path(one))
            continue
        matching = sorted(Path(name) for name in glob.glob(one, recursive=True))  # noqa: PTH207 -- one may be absolute
        if not matching:
            raise DataError(f"{one}: no file matches; check the path and the working folder")
        found += matching
    return found


def kind_of(paths: list[Path], settings: DataSettings) -> Kind:
    """What the files are, from their suffixes; raises DataError for a mixture and for what is unknown."""
    kind = _kind(paths[0], settings)
    for path in paths:
        if (other := _kind(path, settings)) != kind:
            raise DataError(f"{path} is {other}, {paths[0]} is {kind}; give files of one kind")
    return kind


def _kind(path: Path, settings: DataSettings) -> Kind:
    packed = path.suffix == ".gz"
    suffix = (path.with_suffix("") if packed else path).suffix.lower()
    if suffix in {".npz", ".parquet", ".pq"} and packed:
        raise DataError(f"{path}: such a file is compressed inside; unpack it with gunzip")
    match suffix:
        case ".npz":
            return "npz"
        case ".parquet" | ".pq":
            return "parquet"
        case ".csv" | ".tsv":
            return "csv"
        case _ if settings.of_tables:
            return "csv"
        case ".txt":
            return "text"
    raise DataError(
        f"{path}: unknown kind of file '{suffix}'; use .npz, .csv, .tsv, .parquet or .txt, or name a table's columns"
    )


# Bytes and text -------------------------------------------------------------------------------------------------------


class _Bounded(io.RawIOBase):
    """The bytes of a gzip file, until they are more than they may be."""

    def __init__(self, path: Path, packed: IO[bytes], bound: Bound) -> None:
        self._path, self._file, self._bound = path, gzip.GzipFile(fileobj=packed), bound

    def readable(self) -> bool:
        return True

    def readinto(self, out: Any) -> int:
        chunk = self._file.read(min(len(out), 1 << 20))  # GzipFile reads in full: a bound on each step
        self._bound.take(self._path, len(chunk))
        out[: len(chunk)] = chunk
        return len(chunk)


@dataclass
class Bound:
    """How many bytes compressed files may still unfold to."""

    gib: float
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = int(self.gib * (1 << 30))

    def take(self, path: Path, size: int) -> None:
        """Raise DataError if there is no room for `size` more bytes of this file."""
        self.left -= size
        if self.left < 0:
            raise DataError(
                f"{path}: unfolds to more than the {self.gib:g} GiB allowed; if it is meant to, raise data.unpacked_gib"
            )


@contextmanager
def opened(path: Path, bound: Bound) -> Iterator[io.BufferedReader]:
    """The file's bytes, unpacked if it is gzip; raises DataError for what cannot be read."""
    try:
        with path.open("rb") as file:
            if file.peek(2)[:2] == b"\x1f\x8b":
                yield io.BufferedReader(_Bounded(path, file, bound), 1 << 20)
            elif path.suffix == ".gz" and file.peek(1):
                raise DataError(f"{path}: is not gzip, though its name says so; rename it or pack it again")
            else:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: is truncated or damaged gzip ({error}); fetch or write it again") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


@contextmanager
def text_of(path: Path, settings: DataSettings, bound: Bound, newline: str | None = "") -> Iterator[io.TextIOWrapper]:
    """The file's text; raises DataError with the line where it is not in the encoding. newline: as of open()."""
    try:
        with opened(path, bound) as file:
            yield io.TextIOWrapper(file, _encoding(settings), newline=newline)
    except UnicodeError as error:
        line = _undecodable_line(path, settings)
        raise DataError(
            f"{path}, line {line}: not {settings.encoding} text; name its encoding (data.encoding, such as latin-1 or "
            "utf-16) or convert the file"
        ) from error


def _encoding(settings: DataSettings) -> str:
    name = codecs.lookup(settings.encoding).name
    return "utf-8-sig" if name == "utf-8" else name  # spreadsheets begin a file with a mark


def _undecodable_line(path: Path, settings: DataSettings) -> int:
    decoder = codecs.getincrementaldecoder(_encoding(settings))()
    line = 1
    with opened(path, Bound(settings.unpacked_gib)) as file:
        while chunk := file.read(1 << 16):
            try:
                line += decoder.decode(chunk).count("\n")
            except UnicodeError as error:
                if isinstance(error, UnicodeDecodeError):
                    good = error.object[: error.start]
                    line += good.decode(_encoding(settings), "ignore").count("\n")
                return line
    return line


# Tables ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableFile:
    """One file of a table. names: of its columns, in its order; rows: known beforehand of Parquet only."""

    path: Path
    kind: Kind
    names: tuple[str, ...]
    settings: DataSettings
    rows: int | None = None
    unpacked: int = 0  # bytes that a Parquet file says it unfolds to

    @classmethod
    def of(cls, path: Path, kind: Kind, settings: DataSettings) -> TableFile:
        """Read the names; raises DataError."""
        if kind == "parquet":
            with _parquet(path) as file:
                schema, about = file.schema_arrow, file.metadata
                if "" in schema.names:
                    raise DataError(f"{path}: column {schema.names.index('') + 1} has no name; give it one")
                _checked_names(path, schema.names)
                unpacked = sum(about.row_group(one).total_byte_size for one in range(about.num_row_groups))
                return cls(path, kind, tuple(schema.names), settings, about.num_rows, unpacked)
        with text_of(path, settings, Bound(settings.unpacked_gib)) as text:
            names, _ = _header(path, text, settings)
        return cls(path, kind, names, settings)

    def batches(self, wanted: tuple[str, ...], bound: Bound) -> Iterator[Any]:
        """pyarrow RecordBatches of these columns: all text if CSV, as typed if Parquet. Raises DataError."""
        return self._parquet_batches(wanted) if self.kind == "parquet" else self._csv_batches(wanted, bound)

    def place(self, row: int) -> str:
        """Where the row (from 0, the header not counted) stands, for people: "ward.csv, line 3"."""
        if self.kind == "parquet":
            return f"{self.path}, row {row + 1}"
        line = self._line(row)
        return f"{self.path}, row {row + 1} below the header" if line is None else f"{self.path}, line {line}"

    # CSV

    def _csv_batches(self, wanted: tuple[str, ...], bound: Bound) -> Iterator[Any]:
        import pyarrow as pa
        import pyarrow.csv as pacsv

        ragged: list[Any] = []  # the first row of another number of fields, and a None for each other

        def odd(row: Any) -> str:
            ragged.append(None if ragged else (before + row.number - 1, row))
            return "skip"

        parse = pacsv.ParseOptions(
            delimiter=_delimiter(self.path, self.settings),
            quote_char='"' if _quotes(self.path, self.settings) else False,
            newlines_in_values=True,
            invalid_row_handler=odd,
        )
        convert = pacsv.ConvertOptions(
            check_utf8=False,  # it was made from text
            column_types=dict.fromkeys(wanted, pa.string()),
            include_columns=wanted,
            strings_can_be_null=False,
            null_values=[],
        )
        before = 0  # rows
        with text_of(self.path, self.settings, bound) as text:
            _, rest = _header(self.path, text, self.settings)
            for block in _blocks(self.path, text, rest, self.settings):
                try:
                    # Whole blocks, not a stream: Arrow would read ahead from a stream in a thread of its own, and end
                    # the process if Python is on its way out.
                    table = pacsv.read_csv(
                        pa.BufferReader(block),
                        pacsv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=self.names),
                        parse,
                        convert,
                    )
                except pa.ArrowInvalid as error:
                    if "Empty CSV" in str(error):  # blank lines
                        continue
                    raise DataError(f"{self.path}: not readable as a table: {_short(str(error), 200)}") from error
                if not ragged:
                    yield from table.combine_chunks().to_batches()
                before += table.num_rows
        if ragged:
            at, first = ragged[0]
            others = f" ({len(ragged)} such rows)" if len(ragged) > 1 else ""
            raise DataError(
                f"{self.place(at)}: {first.actual_columns} fields where {first.expected_columns} are due{others}: "
                f"{_short(first.text)}; mend the line, its quoting, or the delimiter"
            )

    def _line(self, row: int) -> int | None:
        """The line of a row; slow, for messages only."""
        if _separator(self.path, self.settings) == WHITESPACE:
            return None
        with text_of(self.path, self.settings, Bound(self.settings.unpacked_gib)) as text:
            reader = _rows(text, self.path, self.settings)
            left = row + (1 if self.settings.names is None else 0)
            before = 0
            try:
                for fields in reader:
                    if fields and left == 0:
                        return before + 1
                    left -= bool(fields)
                    before = reader.line_num
            except csv.Error:
                return None
        return before + 1 if left == 0 else None

    # Parquet

    def _parquet_batches(self, wanted: tuple[str, ...]) -> Iterator[Any]:
        with _parquet(self.path) as file:
            widest = max(1, len(wanted))
            yield from file.iter_batches(
                batch_size=max(64, (1 << 20) // widest), columns=list(wanted), use_threads=False
            )


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb"):  # for the system's own words if it cannot be
            pass
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{path}: {error.strerror or error}") from error
        raise DataError(f"{path}: not a readable Parquet file: {_short(str(error), 200)}; write it again") from error


def _blocks(path: Path, text: IO[str], first: str, settings: DataSettings) -> Iterator[bytes]:
    """The text, `first` and then the rest, as UTF-8 in blocks of whole rows; raises DataError for an endless row."""
    spaces = _separator(path, settings) == WHITESPACE
    delimiter, quotes = _delimiter(path, settings).encode(), _quotes(path, settings)
    left, chunk = b"", first
    while chunk or (chunk := text.read(BLOCK // 4)):
        if spaces:
            chunk += text.readline(BLOCK)  # whole lines, for their ends are stripped
            chunk = re.sub(r"[ \t]+", "\t", re.sub(r"(?m)^[ \t]+|[ \t]+(?=\r?$)", "", chunk))
        left += chunk.encode()
        chunk = ""
        end = (
            _last_row_end(left, delimiter)
            if quotes and b'"' in left
            else left.rfind(b"\n" if b"\n" in left else b"\r") + 1
        )
        if end:
            yield left[:end]
            left = left[end:]
        elif len(left) > BLOCK:
            raise DataError(f"{path}: has a row of over {BLOCK >> 20} MiB; is a line's end or a closing quote missing?")
    if left:
        yield left


def _last_row_end(block: bytes, delimiter: bytes) -> int:
    """Where the last whole row of a block ends that begins with a row and has quotes in it; 0 if it has none.

    Quotes open and close in turn if each that opens stands where a field begins, or after one that closed ("" within
    quotes). Where one stands in the middle of a field, the fields must be read one by one.
    """
    content = np.frombuffer(block, np.uint8)
    places = np.flatnonzero(content == ord('"'))
    opening = places[::2]
    before = np.where(opening > 0, content[opening - 1], ord("\n"))
    if np.isin(before, np.frombuffer(delimiter + b'\n\r"', np.uint8)).all():
        ends = np.flatnonzero(content == ord("\n" if b"\n" in block else "\r"))
        outside = ends[np.searchsorted(places, ends) % 2 == 0]
        return int(outside[-1]) + 1 if len(outside) else 0
    newline = b"\n" if b"\n" in block else b"\r"
    field = re.compile(rb"(?:^|(?<=[\n\r" + re.escape(delimiter) + rb']))"(?:[^"]|"")*("|\Z)')
    last = at = 0
    for quoted in field.finditer(block):
        last = max(last, block.rfind(newline, at, quoted.start()) + 1)
        at = quoted.end()
        if not quoted[1]:
            return last
    return max(last, block.rfind(newline, at) + 1)


def _header(path: Path, text: io.TextIOWrapper, settings: DataSettings) -> tuple[tuple[str, ...], str]:
    """The columns' names, and the text that was read beyond them; raises DataError."""
    start = text.read(BLOCK // 4)
    if not start.strip():
        raise DataError(f"{path}: is empty; {'rows are' if settings.names else 'a header line and rows are'} needed")
    if settings.names is not None:
        return _checked_names(path, settings.names), start
    separator = _separator(path, settings)
    lines = io.StringIO(start, newline="")
    if separator == WHITESPACE:
        line = next(one for one in lines if one.strip())
        names = line.split()
    else:
        try:
            names = next((row for row in _rows(lines, path, settings) if row), [])
        except csv.Error as error:
            raise DataError(f"{path}, line 1: no header of a table: {error}; is it the right file?") from error
    end = lines.tell()  # a StringIO counts characters
    if end >= len(start) == BLOCK // 4:
        raise DataError(
            f"{path}: its header goes on for over a million characters; a table has at most {MOST_COLUMNS:,} columns"
        )
    return _checked_names(path, [name.strip() for name in names]), start[end:]


def _rows(text: IO[str], path: Path, settings: DataSettings) -> Any:  # what csv.reader returns has no public name
    """Rows as Python reads them: slowly, but it tells their lines."""
    delimiter = _delimiter(path, settings)
    if _quotes(path, settings):
        return csv.reader(text, delimiter=delimiter)
    return csv.reader(text, delimiter=delimiter, quoting=csv.QUOTE_NONE)


def _checked_names(path: Path, given: Any) -> tuple[str, ...]:
    """The names, those that are empty replaced; raises DataError for too many, a too long one, and one given twice."""
    if len(given) > MOST_COLUMNS:
        raise DataError(
            f"{path}: has {len(given):,} columns, at most {MOST_COLUMNS:,} can be read; keep those needed, or use .npz"
        )
    names = [name or f"column {place}" for place, name in enumerate(given, 1)]  # pandas leaves its index unnamed
    if long := next((name for name in names if len(name) > LONGEST_NAME), None):
        raise DataError(f"{path}: a column's name has {len(long)} characters ({_short(long)}); is it the right file?")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"{path}: columns appear twice: {', '.join(twice)}; rename or remove one of each")
    return tuple(names)


def _separator(path: Path, settings: DataSettings) -> str:
    if settings.separator is not None:
        return settings.separator
    return "\t" if ".tsv" in path.suffixes[-2:] else ","


def _delimiter(path: Path, settings: DataSettings) -> str:
    """As pyarrow is told."""
    separator = _separator(path, settings)
    return "\t" if separator == WHITESPACE else separator


def _quotes(path: Path, settings: DataSettings) -> bool:
    if settings.quotes is not None:
        return settings.quotes
    return _separator(path, settings) not in {"\t", WHITESPACE}


def _short(text: str, most: int = 40) -> str:
    text = repr(text) if most == 40 else " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
