"""The database beneath the store: SQLite in the state folder or PostgreSQL by URL, at the schema that this version wants.

A transaction that writes takes SQLite's write lock when it begins. Otherwise it would look first (at the lease, say) and
could find on its first write that what it saw is no longer true, which SQLite answers with an error and no waiting.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy import exc as sqlalchemy_exc

from seqfed.common.errors import ConfigError, SeqfedError, StorageError, StorageFull
from seqfed.server.urls import hidden

SCHEMA: Final = "0006"  # of the newest file in migrations/versions; a test holds them together
BUSY_S: Final = 10  # that a statement waits for another's lock
POSTGRES: Final = {
    "connect_timeout": 5,
    "application_name": "seqfed",
    # A server that was halted in mid-transaction must not keep the lease's row from its successor.
    "options": f"-c statement_timeout=30s -c lock_timeout={BUSY_S}s -c idle_in_transaction_session_timeout={BUSY_S}s",
    "keepalives_idle": 10,  # a database that is gone without a word is noticed within 10 + 3 * 5 s
    "keepalives_interval": 5,
    "keepalives_count": 3,
}


class Database:
    """Transactions on one engine; `shown` is its name in messages, without a password."""

    def __init__(self, engine: sa.Engine, shown: str) -> None:
        self._engine = engine
        self._writing = engine.execution_options(writes=True)
        self._shown = shown

    @property
    def is_sqlite(self) -> bool:
        return self._engine.dialect.name == "sqlite"

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that only reads. Raises StorageError."""
        with self._typed(), self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction: all of the block, or nothing. Raises StorageError or StorageFull."""
        with self._typed(), self._writing.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def _typed(self) -> Iterator[None]:
        try:
            yield
        except (sqlalchemy_exc.DBAPIError, sqlalchemy_exc.TimeoutError) as error:
            raise database_error(error, self._shown) from error

    def now(self, connection: sa.Connection) -> float:
        """Seconds since the epoch by the clock that all servers of this database share."""
        if self.is_sqlite:
            return time.time()  # they are on one machine
        return float(connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())

    def migrate(self) -> None:
        """Bring the schema to this version's; a glance where it is there already, as alembic takes 0.3 s to load."""
        with self.reading() as connection:
            if self._version(connection) == SCHEMA:
                return
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self.writing() as connection:
            if not self.is_sqlite:  # two servers that begin together: one of them makes the tables
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(hashtext('seqfed'))"))
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise StorageError(
                    f"{self._shown} has schema {self._version(connection)}, which this version of seqfed does not know "
                    f"(it knows up to {SCHEMA}); run the version that wrote it, or a newer one"
                ) from error

    @staticmethod
    def _version(connection: sa.Connection) -> str | None:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()

    def has(self, table: str) -> bool:
        """Whether there is a table of this name."""
        with self.reading() as connection:
            return sa.inspect(connection).has_table(table)

    def close(self) -> None:
        self._engine.dispose()


def open_database(folder: Path, url: str | None, *, migrate: bool = True) -> Database:
    """The database at this URL, or the one in the state folder, at this version's schema; raises ConfigError, StorageError.

    Without `migrate` it is left as it is, whichever version it is of: for who only reads.
    """
    if url is None:
        engine = sa.create_engine(f"sqlite:///{folder / 'seqfed.db'}")
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        database = Database(engine, "the server's database")
    else:
        database = _postgres(url)
    try:
        if migrate:
            database.migrate()
    except BaseException:
        database.close()
        raise
    return database


def _postgres(text: str) -> Database:
    try:
        url = sa.make_url(text)
    except (sqlalchemy_exc.ArgumentError, ValueError):  # it is not shown: who knows where the password stands in it
        raise ConfigError("database: what is given is no URL; write postgresql://user@host/name") from None
    if url.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise ConfigError(
            f"database: '{url.drivername}' is not supported; write postgresql://user@host/name, or leave it out for "
            "SQLite in the state folder"
        )
    try:
        engine = sa.create_engine(
            url.set(drivername="postgresql+psycopg"),
            connect_args={**POSTGRES, **{key: value for key, value in url.query.items() if key in POSTGRES}},
            pool_pre_ping=True,  # a database that was restarted costs a new connection and no error
            pool_size=5,
            max_overflow=10,
            pool_timeout=BUSY_S,
        )
    except ImportError as error:
        raise ConfigError("a PostgreSQL database needs the driver psycopg: pip install 'seqfed[postgres]'") from error
    return Database(engine, f"the database {hidden(text)}")


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # the driver begins no transaction by itself; _begin_sqlite does
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")  # a commit survives a power cut; 0.3 ms more than without
    connection.execute(f"PRAGMA busy_timeout={BUSY_S * 1000}")


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def database_error(error: sqlalchemy_exc.SQLAlchemyError, shown: str = "the server's database") -> SeqfedError:
    """The typed error for what the driver or the pool of connections says."""
    said = " ".join(str(getattr(error, "orig", error)).split())
    if "disk is full" in said or "No space left on device" in said:
        return StorageFull("the disk with the server's database is full; free some space; nothing saved before is lost")
    return StorageError(f"{shown}: {said}")
