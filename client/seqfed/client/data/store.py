"""Arrays that may be larger than memory: beyond a size they lie in an unnamed temporary file, mapped into memory.

The file has no name from the start, so that nothing of a data holder's is left behind, not even after kill -9. Its room on
the disk is taken before the first write: a disk that fills under a memory map ends the process without a word.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from seqfed.client.settings import DataSettings
from seqfed.common.errors import DataError


@dataclass(frozen=True)
class Store:
    """Up to `memory` bytes each array stays in memory; `folder` takes the others' files, None for the system's."""

    memory: int
    folder: Path | None = None

    @classmethod
    def of(cls, settings: DataSettings) -> Store:
        return cls(int(settings.memory_mib * (1 << 20)), settings.cache)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """An array of zeros to be filled; raises DataError if the disk has no room for it."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if nbytes <= self.memory or nbytes == 0:
            return np.zeros(shape, dtype)
        with self._file(nbytes) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
            return np.memmap(file, dtype, "w+" if not hasattr(os, "posix_fallocate") else "r+", shape=shape)

    @contextmanager
    def _file(self, nbytes: int) -> Iterator[IO[bytes]]:
        try:
            with tempfile.TemporaryFile(prefix="seqfed-", dir=self.folder) as file:
                yield file
        except (OSError, OverflowError) as error:
            where = self.folder or tempfile.gettempdir()
            raise DataError(
                f"no room for {nbytes / (1 << 20):,.0f} MiB of data in {where}: {getattr(error, 'strerror', None) or error}; "
                "name a folder on a larger disk (data.cache), or take fewer columns or files"
            ) from error


class Growing:
    """A one-dimensional array that is added to until it is finished."""

    def __init__(self, store: Store, dtype: Any) -> None:
        self._store = store
        self._dtype = np.dtype(dtype)
        self._parts: list[NDArray[Any]] = []
        self._waiting = 0  # bytes in _parts
        self._file: IO[bytes] | None = None
        self.size = 0

    def add(self, values: NDArray[Any]) -> None:
        """Append; raises DataError if the disk is full."""
        values = np.ascontiguousarray(values, self._dtype)
        self._parts.append(values)
        self._waiting += values.nbytes
        self.size += values.size
        if self._waiting > self._store.memory:
            self._spill()

    def finish(self) -> NDArray[Any]:
        """All that was added, in memory or mapped."""
        if self._file is None:
            return np.concatenate(self._parts) if self._parts else np.empty(0, self._dtype)
        self._spill()
        self._file.flush()
        with self._file as file:
            return np.memmap(file, self._dtype, "r", shape=(self.size,))

    def _spill(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="seqfed-", dir=self._store.folder)  # noqa: SIM115 -- finish closes
            for part in self._parts:
                self._file.write(part.data.cast("B") if part.size else b"")
        except OSError as error:
            where = self._store.folder or tempfile.gettempdir()
            raise DataError(
                f"no room for the data in {where}: {error.strerror or error}; name a folder on a larger disk (data.cache)"
            ) from error
        self._parts.clear()
        self._waiting = 0
