"""A small database of the client's state folder, for what must not be forgotten: each change is on disk when it returns."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from seqfed.common.errors import StorageError, StorageFull

WAIT_S: Final = 10.0  # for another process that reads it


class Durable:
    """The file at `path`, made when it is first used.

    tables: statements that make them unless they are there. without: what follows where it cannot be written, and remedy:
    what to do where it cannot be read, both in words. Raises StorageFull or StorageError.
    """

    def __init__(self, path: Path, tables: Sequence[str], *, without: str, remedy: str) -> None:
        self.path = path
        self._tables = tuple(tables)
        self._without, self._remedy = without, remedy
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def changing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, durable at the end of the block; nothing of it if the block or the disk fails."""
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = self._open()
                database = self._connection
                database.execute("BEGIN IMMEDIATE")
                try:
                    yield database
                    database.execute("COMMIT")
                except BaseException:
                    if database.in_transaction:
                        database.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise self._typed(error) from error

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        with contextlib.suppress(OSError):  # what is wrong with the place, SQLite says too
            os.close(os.open(self.path, os.O_CREAT | os.O_CLOEXEC, 0o600))
        database = sqlite3.connect(self.path, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute(
                "PRAGMA synchronous = FULL"
            )  # each commit is on disk, for one fsync where a journal takes four
            for statement in self._tables:
                database.execute(statement)
        except BaseException:
            database.close()
            raise
        return database

    def _typed(self, error: sqlite3.Error) -> StorageError | StorageFull:
        if getattr(error, "sqlite_errorname", "") == "SQLITE_FULL":
            return StorageFull(f"{self.path}: the disk is full, so {self._without}; free some space")
        return StorageError(f"{self.path}: {error}, so {self._without}; {self._remedy}")
