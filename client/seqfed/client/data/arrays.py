"""NPZ arrays, and what a data holder's own function returns.

x is numbers (N, T, F) or token ids (N, T), lengths (N,) their real steps; y is classes (N,), or numbers or yes/no labels (N,) or
(N, K), NaN where missing; group (N,) says whose each sequence is. An archive's members are read block by block, so that
neither a huge one nor one that lies about its size is ever in memory whole.
"""

from __future__ import annotations

import importlib
import math
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from seqfed.client.data.frame import Frame, number_text
from seqfed.client.data.labels import Labels
from seqfed.client.data.numbers import Material
from seqfed.client.data.reading import Bound
from seqfed.client.data.sequences import Sequences
from seqfed.client.data.store import Store
from seqfed.client.data.windows import Ints
from seqfed.client.settings import DataSettings
from seqfed.common.errors import DataError

READABLE = ("x", "y", "lengths", "group")


@dataclass(frozen=True, eq=False)
class Member:
    """One array, not there until asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Any  # () -> Iterator of parts along the first axis

    def whole(self) -> NDArray[Any]:
        parts = list(self.blocks())
        return np.concatenate(parts) if parts else np.empty(self.shape, self.dtype)


@dataclass(frozen=True, eq=False)
class TokenRows:
    """N sequences of token ids: int32 rows, and where each begins and ends."""

    rows: NDArray[np.int32]
    begins: Ints
    ends: Ints
    labels: Labels | None
    entities: tuple[str, ...]
    owners: Ints | None
    source: str


UNREADABLE: Final = (  # what zipfile and numpy raise at a file that is damaged or made to harm
    *(ValueError, EOFError, KeyError, OverflowError, MemoryError, NotImplementedError, zipfile.BadZipFile, zlib.error),
    RuntimeError,  # encrypted
    *(SyntaxError, tokenize.TokenError),  # a header that is no Python literal
)


def read_npz(path: Path, settings: DataSettings) -> Material | TokenRows:
    """The arrays of one file; raises DataError with file, index and remedy."""
    with _members(path, settings) as members:
        for name in members:
            if name not in READABLE:
                continue
            kind = members[name].dtype.kind
            if kind not in ("fiubU" if name == "group" else "fiub"):
                raise DataError(f"{path}: {name} is {members[name].dtype}; it must be numbers")
        return material(str(path), members, Store.of(settings))


@contextmanager
def _members(path: Path, settings: DataSettings) -> Iterator[dict[str, Member]]:
    """The archive's arrays by name; raises DataError for what is damaged or a bomb."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            bound = Bound(settings.unpacked_gib)
            found = {}
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name not in READABLE:
                    found[name] = Member((), np.dtype("f4"), None)  # for messages: what there is
                    continue
                bound.take(path, info.file_size)
                found[name] = _member(archive, info)
            yield found
    except UNREADABLE as error:
        raise DataError(f"{path}: not a readable NPZ file of plain arrays: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    with archive.open(info) as stream:
        shape, fortran, dtype = _npy_header(stream)
    nbytes = math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded; save plain numbers")
    if nbytes > info.file_size:
        raise ValueError(f"{info.filename} says it has {shape}, and holds {info.file_size} bytes; it is truncated")

    def blocks() -> Iterator[NDArray[Any]]:
        with archive.open(info) as stream:
            _npy_header(stream)
            if fortran:  # lies column by column: only whole
                yield np.frombuffer(_exactly(stream, nbytes), dtype).reshape(shape[::-1]).T
                return
            row = math.prod(shape[1:]) * dtype.itemsize
            step = max(1, (1 << 22) // max(1, row))
            for first in range(0, shape[0] if shape and row else 0, step):
                count = min(step, shape[0] - first)
                yield np.frombuffer(_exactly(stream, count * row), dtype).reshape(count, *shape[1:])

    return Member(shape, dtype, blocks)


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) != size:
        raise ValueError("an array ends early; the file is truncated")
    return content


def of_function(named: str, store: Store) -> Material | TokenRows | tuple[Sequences, Sequences | None]:
    """What `module:function` returns: x, y[, lengths], a mapping of arrays as in NPZ, or Sequences (or two: the second to
    score models on). Raises DataError.
    """
    name, _, function = named.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        made = getattr(importlib.import_module(name), function)()
    except (ImportError, AttributeError) as error:
        raise DataError(f"{named}: {error}; give an importable module and a function in it") from error
    finally:
        sys.path.pop(0)
    if isinstance(made, Sequences):
        return made, None
    if isinstance(made, tuple) and made and all(isinstance(one, Sequences) for one in made):
        return made[0], made[1] if len(made) > 1 else None
    if isinstance(made, tuple):
        made = {key: one for key, one in zip(("x", "y", "lengths"), made, strict=False) if one is not None}
    if not isinstance(made, Mapping):
        raise DataError(f"{named}: returned {type(made).__name__}; return x, y[, lengths], or Sequences")
    return material(named, {key: _in_memory(np.asarray(one)) for key, one in made.items()}, store)


def _in_memory(array: NDArray[Any]) -> Member:
    return Member(array.shape, array.dtype, lambda: iter((array,)))


def material(source: str, members: Mapping[str, Member], store: Store) -> Material | TokenRows:
    """Arrays as rows; raises DataError."""
    if "x" not in members:
        raise DataError(f"{source}: has no array 'x'; it has {', '.join(sorted(members)) or 'none'}")
    x = members["x"]
    tokens = len(x.shape) == 2 and x.dtype.kind in "iu"
    if (not tokens and (len(x.shape) != 3 or x.dtype.kind not in "fiu")) or 0 in x.shape:
        raise DataError(
            f"{source}: x is {x.dtype} of shape {x.shape}; it must be numbers of shape (N, T, F), or token ids of shape (N, T), "
            "none of them 0"
        )
    count, steps = x.shape[:2]
    begins = np.arange(count, dtype=np.int64) * steps
    ends = begins + _lengths(source, members.get("lengths"), count, steps)
    labels = _labels(source, members.get("y"), count)
    entities, owners = _groups(source, members.get("group"), count)
    if tokens:
        return TokenRows(_token_rows(source, x, store), begins, ends, labels, entities, owners, source)
    names = tuple(str(place) for place in range(x.shape[-1]))

    def place(row: int) -> str:
        return f"{source}: x[{row // steps}, {row % steps}]"

    rows = _number_rows(source, x, store)
    frame = Frame(rows, names, begins, ends, entities, source, place, owners=owners, is_array=True)
    return Material(frame, labels)


def _number_rows(source: str, x: Member, store: Store) -> NDArray[np.float32]:
    rows: NDArray[np.float32] = store.empty((x.shape[0] * x.shape[1], x.shape[2]), np.float32)
    first = 0
    for part in x.blocks():
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
            block = part.astype(np.float32).reshape(-1, x.shape[2])
        if np.isinf(block).any():
            row, column = (int(one) for one in np.argwhere(np.isinf(block))[0])
            place = f"{(first + row) // x.shape[1]}, {(first + row) % x.shape[1]}, {column}"
            raise DataError(f"{source}: x[{place}] is not a finite float32 number; mend it, or make it NaN: missing")
        rows[first : first + len(block)] = block
        first += len(block)
    return rows


def _token_rows(source: str, x: Member, store: Store) -> NDArray[np.int32]:
    rows: NDArray[np.int32] = store.empty((x.shape[0] * x.shape[1],), np.int32)
    first = 0
    for part in x.blocks():
        block = part.reshape(-1)
        bad = (block < 0) | (block > 1_000_000)
        if bad.any():
            place = first + int(np.argmax(bad))
            raise DataError(
                f"{source}: x[{place // x.shape[1]}, {place % x.shape[1]}] is {int(block[place - first])}; token ids are "
                "from 0, the unknown one, to a vocabulary's size"
            )
        rows[first : first + len(block)] = block
        first += len(block)
    return rows


def _lengths(source: str, given: Member | None, count: int, steps: int) -> Ints:
    if given is None:
        return np.full(count, steps, np.int64)
    if given.shape != (count,) or given.dtype.kind not in "iu":
        raise DataError(f"{source}: lengths must be whole numbers of shape ({count},)")
    lengths = given.whole()
    if lengths.min() < 1 or lengths.max() > steps:
        bad = int(np.argmax((lengths < 1) | (lengths > steps)))
        raise DataError(f"{source}: lengths[{bad}] is {int(lengths[bad])}; lengths must be from 1 to {steps}")
    return lengths.astype(np.int64)


def _labels(source: str, given: Member | None, count: int) -> Labels | None:
    if given is None:
        return None
    if len(given.shape) not in {1, 2} or given.shape[0] != count or given.dtype.kind not in "fiub" or 0 in given.shape:
        raise DataError(
            f"{source}: y is {given.dtype} of shape {given.shape}; it must be numbers of shape ({count},) or "
            f"({count}, K)"
        )
    values = given.whole().astype(np.float64).reshape(count, -1)
    large = np.abs(values) > float(np.finfo(np.float32).max)
    if large.any():
        row, column = (int(one) for one in np.argwhere(large)[0])
        raise DataError(f"{source}: y[{row}, {column}] is not a finite float32 number")
    flat = len(given.shape) == 1

    def no_text(_: int) -> tuple[NDArray[np.int32], tuple[str, ...]]:
        # Numbers that stand for names: "0", "1".
        found = values[:, 0]
        real, codes = np.unique(found[~np.isnan(found)], return_inverse=True)
        out = np.full(count, -1, np.int32)
        out[~np.isnan(found)] = codes
        return out, tuple(number_text(float(one)) for one in real)

    return Labels(
        tuple("y" if flat else f"y[:, {k}]" for k in range(values.shape[1])),
        lambda k: values[:, k],
        no_text,
        lambda _: True,
        lambda row, k: f"{source}: y[{row}]" if flat else f"{source}: y[{row}, {k}]",
        np.arange(count, dtype=np.int64),
    )


def _groups(source: str, given: Member | None, count: int) -> tuple[tuple[str, ...], Ints | None]:
    if given is None:
        return (), None
    if given.shape != (count,):
        raise DataError(
            f"{source}: group is of shape {given.shape}; it must be one name or number a sequence, ({count},)"
        )
    names, owners = np.unique(given.whole().astype(str), return_inverse=True)
    return tuple(str(one) for one in names), owners.astype(np.int64)
