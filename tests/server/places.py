"""Where a store may be, for tests that are about both databases."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from tests.server.postgres import cluster

from seqfed.server.store import Store, open_store

KINDS: Final = ("sqlite", "postgres")


@dataclass(frozen=True)
class Place:
    """A store's folder, and the URL of its database unless that lies there too."""

    folder: Path
    url: str | None

    def open(self, **changes: Any) -> Store:
        return open_store(self.folder, database=self.url, **changes)

    @contextlib.contextmanager
    def engine(self) -> Iterator[sa.Engine]:
        """The database, past the store."""
        url = self.url or f"sqlite:///{self.folder / 'seqfed.db'}"
        engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
        yield engine
        engine.dispose()

    def execute(self, statement: str) -> None:
        with self.engine() as engine, engine.begin() as connection:
            connection.execute(sa.text(statement))


def a_place(kind: str, folder: Path) -> Place:
    return Place(folder / "state", cluster().database() if kind == "postgres" else None)
