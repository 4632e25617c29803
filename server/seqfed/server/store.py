"""The daemon's durable state: a database of runs and rounds, and the folders of models and of complete updates beside it.

Order of every commit: the file is written beside its place and renamed; then one transaction makes it count. A file without
its row is a leftover that the next writer replaces. Models are fsynced before their row, so a row without its model cannot
be. Updates are not: they outlive a killed daemon, and after a power cut those that are not whole are asked for again, which
costs less than syncing every one of them, mostly to delete it a second later.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from blake3 import blake3
from sqlalchemy import event
from sqlalchemy import exc as sqlalchemy_exc

from seqfed.common.checkpoint import PIECE_BYTES, ModelFile
from seqfed.common.errors import SeqfedError, StorageError, StorageFull, storage_error
from seqfed.common.layout import Layout
from seqfed.common.model import layout_of
from seqfed.common.schema import DataSchema
from seqfed.common.spec import RunSpec
from seqfed.common.views import RoundRecord
from seqfed.server.round import Phase, Run

_METADATA = sa.MetaData()


def _table(name: str, key: tuple[str, ...], *columns: str) -> sa.Table:
    # Types, sizes and indices are the migrations' business; a query needs the names only.
    return sa.Table(name, _METADATA, *(sa.Column(one, primary_key=one in key) for one in (*key, *columns)))


RUNS = _table("runs", ("run",), "number", "spec", "state", "started", "ended", "bytes_up", "bytes_down")
MODELS = _table("models", ("run", "version"), "data_start", "digest")
ROUNDS = _table("rounds", ("run", "round"), "record")
UPDATES = _table("updates", ("run", "client"), "round", "weight", "digest", "tally", "training_seconds")
CLIENTS = _table("clients", ("client",), "instance", "software", "data_schema", "seen")

# Built once: in a round of small updates, building statements would cost more than running them.
SET_STATE = RUNS.update().where(RUNS.c.run == sa.bindparam("of")).values(state=sa.bindparam("state"))
DROP_UPDATE = UPDATES.delete().where(UPDATES.c.run == sa.bindparam("of"), UPDATES.c.client == sa.bindparam("by"))


@dataclass(frozen=True)
class UpdateRow:
    """A complete update of the round under way: its bytes lie in `Store.update_path`."""

    client: str
    round: int
    weight: int
    digest: bytes
    tally: dict[str, int]
    training_seconds: float


@dataclass(frozen=True)
class StoredRun:
    """A run as the database has it."""

    run: str
    spec: RunSpec
    state: Run
    started: float | None
    ended: float | None
    bytes_up: int
    bytes_down: int
    model: ModelFile
    version: int
    updates: tuple[UpdateRow, ...]
    record: RoundRecord | None  # of the round whose model is committed and being evaluated


@dataclass(frozen=True)
class KnownClient:
    """A client that has been here: `seen` in seconds since the epoch."""

    client: str
    instance: str
    software: str
    schema: DataSchema
    seen: float


class Store:
    """All reads and writes of the daemon's state; blocking, so called from worker threads; one writer at a time."""

    def __init__(self, folder: Path, engine: sa.Engine, lock: int) -> None:
        self._folder = folder
        self._engine = engine
        self._lock = lock

    # files

    def model_path(self, run: str, version: int) -> Path:
        return self._folder / "models" / run / f"{version:06}.safetensors"

    def update_path(self, run: str, round_: int, client: str, digest: bytes) -> Path:
        """Where this very update lies: another one of the same client never takes its place."""
        return self._updates(run) / str(round_) / f"{client}.{digest.hex()[:32]}.f32"

    def _updates(self, run: str) -> Path:
        return self._folder / "updates" / run

    # runs

    def create(self, run: str, spec: RunSpec, model: ModelFile) -> None:
        """A queued run with its initial model, which lies at model_path(run, 0)."""
        with self._transaction() as connection:
            connection.execute(
                RUNS.insert().values(
                    run=run, spec=spec.canonical.decode(), state=dump_state(Run()), bytes_up=0, bytes_down=0
                )
            )
            connection.execute(_model_row(run, 0, model))

    def commit(
        self,
        run: str,
        state: Run,
        *,
        updates: Sequence[UpdateRow] = (),
        model: ModelFile | None = None,
        record: RoundRecord | None = None,
        **columns: float | int,
    ) -> None:
        """In one transaction: the state, and with it what the event brought.

        `updates`: complete and in their files. `model`: the one that the record's round made, in its file; the
        round's updates are then done with. `record`: the round's, new or completed. `columns`: started, ended, bytes_up,
        bytes_down of the run.
        """
        with self._transaction() as connection:
            connection.execute(SET_STATE, {"of": run, "state": dump_state(state)})
            if columns:
                connection.execute(RUNS.update().where(RUNS.c.run == run).values(columns))
            if updates:
                rows = [{**vars(one), "run": run, "tally": json.dumps(one.tally)} for one in updates]
                connection.execute(DROP_UPDATE, [{"of": run, "by": one.client} for one in updates])
                connection.execute(UPDATES.insert(), rows)
            if model is not None:
                assert record is not None  # `state` may be in the next round already
                connection.execute(_model_row(run, record.round, model))
                connection.execute(UPDATES.delete().where(UPDATES.c.run == run))
            if record is not None:
                _replace(connection, ROUNDS, {"run": run, "round": record.round, "record": json.dumps(vars(record))})

    def runs(self) -> list[StoredRun]:
        """Every run, oldest first."""
        with self._transaction() as connection:
            rows = connection.execute(sa.select(RUNS).order_by(RUNS.c.number)).all()
            return [self._stored(connection, row) for row in rows]

    def _stored(self, connection: sa.Connection, row: sa.Row[Any]) -> StoredRun:
        spec = RunSpec.model_validate_json(row.spec)
        newest = connection.execute(
            sa.select(MODELS).where(MODELS.c.run == row.run).order_by(MODELS.c.version.desc()).limit(1)
        ).one()
        model = self._model_file(row.run, newest, layout_of(spec))
        updates = connection.execute(sa.select(UPDATES).where(UPDATES.c.run == row.run)).all()
        state = load_state(row.state)
        open_round = sa.select(ROUNDS.c.record).where(ROUNDS.c.run == row.run, ROUNDS.c.round == state.round)
        record = connection.execute(open_round).scalar() if state.phase is Phase.EVALUATING else None
        return StoredRun(
            run=row.run,
            spec=spec,
            state=state,
            started=row.started,
            ended=row.ended,
            bytes_up=row.bytes_up,
            bytes_down=row.bytes_down,
            model=model,
            version=newest.version,
            updates=tuple(
                UpdateRow(one.client, one.round, one.weight, one.digest, json.loads(one.tally), one.training_seconds)
                for one in updates
            ),
            record=_record(record) if record is not None else None,
        )

    def _model_file(self, run: str, row: sa.Row[Any], layout: Layout) -> ModelFile:
        return ModelFile(self.model_path(run, row.version), layout, row.data_start, row.digest)

    def lost(self, stored: StoredRun) -> tuple[str, ...]:
        """The clients whose complete updates are not, or not whole, in their files."""
        return tuple(
            one.client
            for one in stored.updates
            if _file_digest(self.update_path(stored.run, one.round, one.client, one.digest)) != one.digest
        )

    def history(self, run: str, after: int, last: int, limit: int) -> list[RoundRecord]:
        """The rounds after round `after` up to round `last`, in order, at most `limit` of them."""
        query = (
            sa.select(ROUNDS.c.record)
            .where(ROUNDS.c.run == run, ROUNDS.c.round > after, ROUNDS.c.round <= last)
            .order_by(ROUNDS.c.round)
            .limit(limit)
        )
        with self._transaction() as connection:
            return [_record(text) for (text,) in connection.execute(query)]

    # clients

    def remember(self, client: KnownClient) -> None:
        """Write or renew what is known of a client."""
        with self._transaction() as connection:
            _replace(
                connection,
                CLIENTS,
                {
                    "client": client.client,
                    "instance": client.instance,
                    "software": client.software,
                    "data_schema": client.schema.model_dump_json(),
                    "seen": client.seen,
                },
            )

    def clients(self) -> list[KnownClient]:
        """Every client that was ever here, by name."""
        with self._transaction() as connection:
            rows = connection.execute(sa.select(CLIENTS).order_by(CLIENTS.c.client)).all()
        return [
            KnownClient(
                row.client, row.instance, row.software, DataSchema.model_validate_json(row.data_schema), row.seen
            )
            for row in rows
        ]

    # leftovers

    def tidy(self, run: str, version: int, round_: int) -> None:
        """Remove what no restart needs: models before the last two, and updates of rounds up to `round_`."""
        with contextlib.suppress(OSError):
            for old in sorted(self.model_path(run, 0).parent.glob("*.safetensors")):
                if int(old.stem) < version - 1:
                    old.unlink()
            for folder in self._updates(run).glob("*"):
                if int(folder.name) <= round_:
                    shutil.rmtree(folder, ignore_errors=True)

    def clear_up(self) -> None:
        """Remove what a killed daemon was in the middle of: half-written files, and folders of runs that were never made."""
        with self._transaction() as connection:
            known = set(connection.execute(sa.select(RUNS.c.run)).scalars())
        with contextlib.suppress(OSError):
            for left in (*self._folder.glob("tmp*.safetensors"), *self._folder.glob("models/*/.*")):
                left.unlink()
            for folder in (*self._folder.glob("models/*"), *self._folder.glob("updates/*")):
                if folder.name not in known:
                    shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        self._engine.dispose()
        os.close(self._lock)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except sqlalchemy_exc.DBAPIError as error:
            raise _database_error(error) from error


def open_store(folder: Path) -> Store:
    """The store in this folder, made or migrated if need be.

    Raises StorageError if the folder cannot be used or another daemon uses it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise storage_error(error, f"opening the state folder {folder}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise StorageError(
            f"another seqfed server uses the state folder {folder}; stop it, or pass another --state"
        ) from error
    engine = sa.create_engine(f"sqlite:///{folder / 'seqfed.db'}")
    event.listen(engine, "connect", _prepare_sqlite)
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except sqlalchemy_exc.DBAPIError as error:
        os.close(lock)
        raise _database_error(error) from error
    store = Store(folder, engine, lock)
    store.clear_up()
    return store


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")  # a commit survives a power cut; 0.3 ms more than without
    connection.execute("PRAGMA busy_timeout=10000")


def _file_digest(path: Path) -> bytes | None:
    hasher = blake3()
    try:
        with path.open("rb", buffering=0) as file:
            while piece := file.read(PIECE_BYTES):
                hasher.update(piece)
    except OSError:
        return None
    return hasher.digest()


def _replace(connection: sa.Connection, table: sa.Table, row: dict[str, Any]) -> None:
    """Insert the row in place of the one with its primary key, if there is one."""
    key = [column == row[column.name] for column in table.primary_key.columns]
    connection.execute(table.delete().where(*key))
    connection.execute(table.insert().values(row))


def _model_row(run: str, version: int, model: ModelFile) -> sa.Insert:
    return MODELS.insert().values(run=run, version=version, data_start=model.data_start, digest=model.digest)


def _database_error(error: sqlalchemy_exc.DBAPIError) -> SeqfedError:
    if "disk is full" in str(error.orig):
        return StorageFull("the disk with the server's database is full; free some space; nothing saved before is lost")
    return StorageError(f"the server's database: {error.orig}")


def _record(text: str) -> RoundRecord:
    fields = json.loads(text)
    for name in ("cohort", "folded"):
        fields[name] = tuple(fields[name])
    fields["spread"] = {metric: tuple(both) for metric, both in fields["spread"].items()}
    return RoundRecord(**fields)


def dump_state(state: Run) -> str:
    """The durable part of a run's state, as JSON; who is present is not."""
    fields = dict(vars(state))  # not asdict, which copies every sum of the evaluation
    del fields["present"]
    return json.dumps({**fields, "phase": state.phase.value})


def load_state(text: str) -> Run:
    """The state that `dump_state` wrote, with nobody present."""
    fields = json.loads(text)
    for name in ("cohort", "folded", "evaluated"):
        fields[name] = tuple(fields[name])
    for name in ("failed", "evaluation", "newest"):
        fields[name] = tuple((one, other) for one, other in fields[name])
    fields["scores"] = tuple((metric, tuple(values)) for metric, values in fields["scores"])
    return Run(**{**fields, "phase": Phase(fields["phase"])})
