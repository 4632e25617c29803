"""The server's durable state: a database of runs and rounds, and the folder of models and of complete updates beside it.

Order of every commit: the file is written beside its place and renamed; then one transaction makes it count. A file without
its row is a leftover that the next writer replaces or `clear_up` removes. Models are fsynced before their row, so a row
without its model cannot be. Updates are not: they outlive a killed daemon, and after a power cut those that are not whole
are asked for again, which costs less than syncing every one of them, mostly to delete it a second later.

Every transaction that writes holds the lease fast (`seqfed.server.lease`), so what another server has taken over stays as
that one wants it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from blake3 import blake3

from seqfed.common.checkpoint import PIECE_BYTES, ModelFile
from seqfed.common.errors import LeaseLost, StorageError, StorageFull
from seqfed.common.layout import Layout
from seqfed.common.model import layout_of
from seqfed.common.schema import DataSchema
from seqfed.common.spec import RunSpec
from seqfed.common.views import AuditEntry, LedgerEntry, RoundRecord
from seqfed.server import audit, steps
from seqfed.server.audit import Note
from seqfed.server.copies import Copies
from seqfed.server.database import Database, open_database
from seqfed.server.folder import Folder
from seqfed.server.lease import LEASE, Holder, Lease
from seqfed.server.round import ENDED, Phase, Run
from seqfed.server.steps import Step

log = logging.getLogger("seqfed.server")

LEASE_S: Final = 10.0
NONCE_KEPT_S: Final = 86_400.0  # after its token has expired: a clock may be set back

_METADATA = sa.MetaData()


def _table(name: str, key: tuple[str, ...], *columns: str) -> sa.Table:
    # Types, sizes and indices are the migrations' business; a query needs the names only.
    return sa.Table(name, _METADATA, *(sa.Column(one, primary_key=one in key) for one in (*key, *columns)))


RUNS = _table(
    "runs",
    ("run",),
    *("number", "spec", "state", "started", "ended", "bytes_up", "bytes_down", "traffic"),
    *("signature", "certificate", "operator"),
)
MODELS = _table("models", ("run", "version"), "data_start", "digest", "file")
ROUNDS = _table("rounds", ("run", "round"), "record")
UPDATES = _table("updates", ("run", "client"), "base", "round", "weight", "digest", "tally", "training_seconds")
CLIENTS = _table("clients", ("client",), "instance", "software", "data_schema", "seen")
LEDGER = _table(
    "ledger",
    ("run", "holder"),
    *("round", "releases", "unit", "epsilon", "delta", "noise_multiplier", "sampling", "accountant"),
)
NONCES = _table("nonces", ("nonce",), "expires")
REVOKED = _table("revoked", ("client",), "at", "reason")

# Built once: in a round of small updates, building statements would cost more than running them.
SET_STATE = RUNS.update().where(RUNS.c.run == sa.bindparam("of")).values(state=sa.bindparam("state"))
SET_MOVED = (
    RUNS.update()
    .where(RUNS.c.run == sa.bindparam("of"))
    .values(bytes_up=sa.bindparam("up"), bytes_down=sa.bindparam("down"), traffic=sa.bindparam("by"))
)
DROP_UPDATE = UPDATES.delete().where(UPDATES.c.run == sa.bindparam("of"), UPDATES.c.client == sa.bindparam("by"))
DROP_CLIENT = CLIENTS.delete().where(CLIENTS.c.client == sa.bindparam("of"))
DROP_ENTRY = LEDGER.delete().where(LEDGER.c.run == sa.bindparam("of"), LEDGER.c.holder == sa.bindparam("by"))
DROP_COUNTED = UPDATES.delete().where(UPDATES.c.run == sa.bindparam("of"), UPDATES.c.round <= sa.bindparam("upto"))


@dataclass(frozen=True)
class UpdateRow:
    """A complete update that no model has yet: its bytes lie in `Store.update_path`."""

    client: str
    base: int  # the round whose task it answers
    round: int  # the round into whose sum it counts; later than `base` if it came late
    weight: int
    digest: bytes
    tally: dict[str, int]
    training_seconds: float


@dataclass(frozen=True)
class Signed:
    """Who answers for a run: the signature of its specification and the certificate (PEM) for it; empty in plaintext."""

    operator: str = ""
    signature: bytes = b""
    certificate: bytes = b""


UNSIGNED: Final = Signed()
NEW: Final = Run()


@dataclass(frozen=True)
class Moved:
    """Bytes of a run's messages, as in `views.RoundRecord`: of all of it, and by client, up and down, of its open round."""

    up: int = 0
    down: int = 0
    traffic: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredRun:
    """A run as the database has it."""

    run: str
    spec: RunSpec
    state: Run
    started: float | None
    ended: float | None
    moved: Moved
    model: ModelFile
    version: int
    updates: tuple[UpdateRow, ...]
    record: RoundRecord | None  # of the round whose model is committed and being evaluated
    signed: Signed
    ledger: tuple[LedgerEntry, ...] = ()  # of a run with differential privacy
    steps: tuple[Step, ...] = ()  # of one with compressed downloads


@dataclass(frozen=True)
class KnownClient:
    """A client that has been here: `seen` in seconds since the epoch."""

    client: str
    instance: str
    software: str
    schema: DataSchema
    seen: float


class Store:
    """All reads and writes of the server's state; blocking, so called from worker threads; one writer at a time.

    Whatever writes raises LeaseLost once another server has taken over, and tells `when_lost` so.
    """

    def __init__(self, folder: Folder, database: Database, lease: Lease, copies: Copies | None) -> None:
        self._folder = folder
        self._database = database
        self.lease = lease
        self._copies = copies
        self.when_lost: Callable[[LeaseLost], None] = lambda _: None
        self._appending = threading.Lock()  # the audit log's end has one writer, though transactions may overlap

    # files

    def model_path(self, run: str, version: int) -> Path:
        """Where a model of this version is to be written: a server that lost its lease writes to another place."""
        return self._folder.model(run, f"{version:06}.t{self.lease.term}.safetensors")

    def update_path(self, run: str, base: int, client: str, digest: bytes) -> Path:
        """Where this very update lies: another one of the same client never takes its place."""
        return self._folder.update(run, base, client, digest)

    # runs

    def create(
        self,
        run: str,
        spec: RunSpec,
        model: ModelFile,
        signed: Signed = UNSIGNED,
        notes: Sequence[Note] = (),
        require: Callable[[], object] = lambda: None,
        ledger: Sequence[LedgerEntry] = (),
        state: Run = NEW,
    ) -> None:
        """A queued run with its initial model, which lies at model_path(run, 0), and the first entries of its ledger.

        `require`: asked when no other writer can come between; what it raises is raised, and there is no run.
        """
        if self._copies is not None:
            self._copies.put(run, model.path)
        row = {"spec": spec.canonical.decode(), "state": dump_state(state), "bytes_up": 0, "bytes_down": 0}
        with self._writing(notes) as connection:
            require()
            connection.execute(RUNS.insert().values(run=run, **row, **vars(signed)))
            _add_model(connection, run, 0, model)
            _enter(connection, ledger)

    def commit(
        self,
        run: str,
        state: Run,
        *,
        updates: Sequence[UpdateRow] = (),
        model: ModelFile | None = None,
        record: RoundRecord | None = None,
        notes: Sequence[Note] = (),
        ledger: Sequence[LedgerEntry] = (),
        moved: Moved | None = None,
        **columns: float,
    ) -> None:
        """In one transaction: the state, and with it what the event brought.

        `updates`: complete and in their files. `model`: the one that the record's round made, in its file; the
        updates that counted up to that round are then done with. `record`: the round's, new or completed. `notes`: what the
        audit log is to say of it. `ledger`: entries, in place of their holders' older ones. `moved`: what is counted up to
        here. `columns`: started, ended of the run.
        """
        if model is not None and self._copies is not None:
            self._copies.put(run, model.path)
        with self._writing(notes) as connection:
            connection.execute(SET_STATE, {"of": run, "state": dump_state(state)})
            if moved is not None:
                connection.execute(SET_MOVED, _bytes(run, moved))
            if columns:
                connection.execute(RUNS.update().where(RUNS.c.run == run).values(columns))
            if updates:
                rows = [{**vars(one), "run": run, "tally": json.dumps(one.tally)} for one in updates]
                connection.execute(DROP_UPDATE, [{"of": run, "by": one.client} for one in updates])
                connection.execute(UPDATES.insert(), rows)
            if model is not None:
                assert record is not None  # `state` may be in the next round already
                _add_model(connection, run, record.round, model)
                connection.execute(DROP_COUNTED, {"of": run, "upto": record.round})
            _enter(connection, ledger)
            if record is not None:
                _replace(connection, ROUNDS, {"run": run, "round": record.round, "record": json.dumps(vars(record))})

    def count(self, moved: Mapping[str, Moved]) -> None:
        """What is counted up to here of these runs, by their ids, without any other change."""
        with self._writing() as connection:
            connection.execute(SET_MOVED, [_bytes(run, one) for run, one in moved.items()])

    def runs(self) -> list[StoredRun]:
        """Every run, oldest first."""
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(RUNS).order_by(RUNS.c.number)).all()
            return [self._stored(connection, row) for row in rows]

    def _stored(self, connection: sa.Connection, row: sa.Row[Any]) -> StoredRun:
        with _readable("the saved specification of a run"):
            spec = RunSpec.model_validate_json(row.spec)
        newest = connection.execute(
            sa.select(MODELS).where(MODELS.c.run == row.run).order_by(MODELS.c.version.desc()).limit(1)
        ).one()
        model = self._model_file(row.run, newest, layout_of(spec))
        updates = connection.execute(sa.select(UPDATES).where(UPDATES.c.run == row.run)).all()
        state = load_state(row.state)
        open_round = sa.select(ROUNDS.c.record).where(ROUNDS.c.run == row.run, ROUNDS.c.round == state.round)
        record = (
            connection.execute(open_round).scalar()
            if Phase.EVALUATING.value in (state.phase.value, state.masks)
            else None
        )
        return StoredRun(
            run=row.run,
            spec=spec,
            state=state,
            started=row.started,
            ended=row.ended,
            moved=Moved(row.bytes_up, row.bytes_down, _traffic(row.traffic)),
            model=model,
            version=newest.version,
            updates=tuple(
                UpdateRow(
                    one.client,
                    one.base,
                    one.round,
                    one.weight,
                    bytes(one.digest),
                    json.loads(one.tally),
                    one.training_seconds,
                )
                for one in updates
            ),
            record=_record(record) if record is not None else None,
            signed=Signed(row.operator or "", bytes(row.signature or b""), bytes(row.certificate or b"")),
            ledger=_entries(connection, row.run) if spec.privacy.dp is not None else (),
            steps=self._steps(connection, row.run) if spec.compression.download != "none" else (),
        )

    def _steps(self, connection: sa.Connection, run: str) -> tuple[Step, ...]:
        query = sa.select(MODELS).where(MODELS.c.run == run).order_by(MODELS.c.version.desc()).limit(steps.MOST + 1)
        rows = list(reversed(connection.execute(query).all()))
        return steps.found([(row.version, self._folder.model(run, row.file), bytes(row.digest)) for row in rows])

    def _model_file(self, run: str, row: sa.Row[Any], layout: Layout) -> ModelFile:
        return ModelFile(self._folder.model(run, row.file), layout, row.data_start, bytes(row.digest))

    def lost(self, stored: StoredRun) -> tuple[str, ...]:
        """The clients whose complete updates are not, or not whole, in their files."""
        return tuple(
            one.client
            for one in stored.updates
            if _file_digest(self.update_path(stored.run, one.base, one.client, one.digest)) != one.digest
        )

    def history(self, run: str, after: int, last: int, limit: int) -> list[RoundRecord]:
        """The rounds after round `after` up to round `last`, in order, at most `limit` of them."""
        query = (
            sa.select(ROUNDS.c.record)
            .where(ROUNDS.c.run == run, ROUNDS.c.round > after, ROUNDS.c.round <= last)
            .order_by(ROUNDS.c.round)
            .limit(limit)
        )
        with self._database.reading() as connection:
            return [_record(text) for (text,) in connection.execute(query)]

    def ledger(self) -> dict[str, dict[str, LedgerEntry]]:
        """The whole ledger of differential privacy, by run and data holder."""
        found: dict[str, dict[str, LedgerEntry]] = {}
        with self._database.reading() as connection:
            for row in connection.execute(sa.select(LEDGER).order_by(LEDGER.c.run, LEDGER.c.holder)).mappings():
                found.setdefault(row["run"], {})[row["holder"]] = LedgerEntry(**row)
        return found

    # clients

    def remember(self, *clients: KnownClient) -> None:
        """Write or renew what is known of these clients; of two with the same name the last one counts."""
        rows = {
            one.client: {
                "client": one.client,
                "instance": one.instance,
                "software": one.software,
                "data_schema": one.schema.model_dump_json(),
                "seen": one.seen,
            }
            for one in clients
        }
        if rows:
            with self._writing() as connection:
                connection.execute(DROP_CLIENT, [{"of": name} for name in rows])
                connection.execute(CLIENTS.insert(), list(rows.values()))

    def clients(self) -> list[KnownClient]:
        """Every client that was ever here, by name."""
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(CLIENTS).order_by(CLIENTS.c.client)).all()
        return [
            KnownClient(
                row.client, row.instance, row.software, DataSchema.model_validate_json(row.data_schema), row.seen
            )
            for row in rows
        ]

    # who belongs

    def use_nonce(self, nonce: str, expires: float, notes: Sequence[Note] = ()) -> bool:
        """Note that this token is used up, and `notes` with it; False, and no notes, if it was before.

        Of those that have long expired nothing is kept.
        """
        with self._appending, self._writing() as connection:
            old = self._database.now(connection) - NONCE_KEPT_S
            connection.execute(NONCES.delete().where(NONCES.c.expires < old))
            if connection.execute(sa.select(NONCES.c.nonce).where(NONCES.c.nonce == nonce)).first() is not None:
                return False
            connection.execute(NONCES.insert().values(nonce=nonce, expires=expires))
            if notes:
                audit.append(connection, notes)
        return True

    def revoke(self, client: str, at: float, reason: str, notes: Sequence[Note] = ()) -> None:
        """From now on what was issued to this client up to `at`, in seconds since the epoch, is worth nothing."""
        with self._writing(notes) as connection:
            _replace(connection, REVOKED, {"client": client, "at": at, "reason": reason})

    def revoked(self) -> dict[str, float]:
        """Who was revoked, and when last."""
        with self._database.reading() as connection:
            return {row.client: row.at for row in connection.execute(sa.select(REVOKED.c.client, REVOKED.c.at))}

    # the audit log

    def note(self, notes: Sequence[Note]) -> None:
        """Entries for the audit log that belong to nothing else that is written."""
        with self._writing(notes):
            pass

    def audit(self, after: int, limit: int) -> list[AuditEntry]:
        """Its entries after the one of this number, at most `limit` of them."""
        return audit.page(self._database, after, limit)

    def audit_head(self) -> tuple[int, bytes]:
        """The number and digest of its last entry."""
        return audit.head(self._database)

    # models from elsewhere

    def fetch(self) -> None:
        """Fetch what is not whole here of each run's newest model from the copies.

        Raises StorageError for a run that is not over and whose model is nowhere; of one that is over the log tells.
        """
        for stored in self.runs():
            over = stored.state.phase in ENDED
            if self._whole(stored.model, thorough=self._copies is not None and not over):
                continue
            try:
                self._fetch(stored)
            except (StorageError, StorageFull) as error:
                if not over:
                    raise
                log.warning("%s", error)

    def _fetch(self, stored: StoredRun) -> None:
        run, path = stored.run, stored.model.path
        if self._copies is None:
            raise StorageError(
                f"run {run}: its model {path} is missing or damaged; put it back, start with the --state of the server "
                "that wrote it, or give all servers of this database the same --models"
            )
        self._copies.get(run, path)
        if not self._whole(stored.model, thorough=True):
            raise StorageError(f"run {run}: its model {path.name} is damaged here, and so is its copy")
        log.info("run %s: model %s was not whole here; fetched from its copy", run, path.name)

    @staticmethod
    def _whole(model: ModelFile, thorough: bool) -> bool:
        try:
            if model.path.stat().st_size != model.data_start + model.layout.nbytes:
                return False
            return not thorough or _digest(model.pieces()) == model.digest
        except OSError:
            return False

    # leftovers

    def tidy(self, run: str, version: int, consumed: Sequence[Path], oldest_step: int = 0) -> None:
        """Remove what no restart needs: models before the last two, payloads before version `oldest_step`, and the files
        of updates that a model has.
        """
        self._folder.tidy(run, version - 1, consumed, oldest_step)
        if self._copies is not None:
            self._copies.tidy(run, version - 1)

    def clear_up(self) -> None:
        """Remove what a killed server was in the middle of: files that are not whole, and those that no row names."""
        with self._writing() as connection:  # as a writer, so that no other server is at work on them
            runs = set(connection.execute(sa.select(RUNS.c.run)).scalars())
            models = {self._folder.model(*row) for row in connection.execute(sa.select(MODELS.c.run, MODELS.c.file))}
            updates = {
                self.update_path(row.run, row.base, row.client, row.digest)
                for row in connection.execute(sa.select(UPDATES))
            }
        self._folder.clear_up(runs, models, updates)

    # the lease

    def take(self, standby: bool = False) -> Iterator[Holder]:
        """See `Lease.waiting`; when it ends, the store may be written, and `prepare` is next."""
        yield from self.lease.waiting(standby)

    def prepare(self) -> None:
        """Clear up what a killed server left, and fetch the models that this folder lacks; that may outlast a lease."""
        with self._database.reading() as connection:
            name = connection.execute(sa.select(LEASE.c.store)).scalar_one()
        self._folder.claim(name, unmarked=self._database.is_sqlite)
        self.clear_up()
        self.fetch()

    def renew(self) -> None:
        """See `Lease.renew`."""
        with self._telling():
            self.lease.renew()

    def close(self, *, release: bool = True) -> None:
        """Let go of everything; without `release` as a killed server does."""
        if release and self.lease.term:
            with contextlib.suppress(StorageError, StorageFull):  # it then ends by itself
                self.lease.release()
        self.lease.forget()
        self._database.close()

    @contextlib.contextmanager
    def _writing(self, notes: Sequence[Note] = ()) -> Iterator[sa.Connection]:
        # The lock is held until the transaction is over: the next entry builds on the last one that counts.
        alone = self._appending if notes else contextlib.nullcontext()
        with alone, self._telling(), self._database.writing() as connection:
            self.lease.check(connection)
            yield connection
            if notes:
                audit.append(connection, notes)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except LeaseLost as error:
            self.when_lost(error)
            raise


def connect(folder: Path, *, database: str | None = None, models: str | None = None, lease_s: float = LEASE_S) -> Store:
    """The store in this folder and this database, made or migrated if need be, to be read only until `Store.take`.

    Raises StorageError if it cannot be used, ConfigError if the URL cannot be right.
    """
    Folder(folder).make()
    copies = Copies(models) if models is not None else None
    opened = open_database(folder, database)
    return Store(Folder(folder), opened, Lease(opened, lease_s), copies)


def open_store(
    folder: Path,
    *,
    database: str | None = None,
    models: str | None = None,
    address: str = "",
    lease_s: float = LEASE_S,
    standby: bool = False,
) -> Store:
    """The store, taken and prepared, after waiting for it if need be; raises StorageError if another server has it."""
    store = connect(folder, database=database, models=models, lease_s=lease_s)
    store.lease.address = address
    try:
        for holder in store.take(standby):
            time.sleep(holder.pause)
        store.prepare()
    except BaseException:
        store.close()
        raise
    return store


def _file_digest(path: Path) -> bytes | None:
    try:
        with path.open("rb", buffering=0) as file:
            return _digest(iter(lambda: file.read(PIECE_BYTES), b""))
    except OSError:
        return None


def _digest(pieces: Iterable[bytes]) -> bytes:
    hasher = blake3()
    for piece in pieces:
        hasher.update(piece)
    return hasher.digest()


def _replace(connection: sa.Connection, table: sa.Table, row: dict[str, Any]) -> None:
    """Insert the row in place of the one with its primary key, if there is one."""
    key = [column == row[column.name] for column in table.primary_key.columns]
    connection.execute(table.delete().where(*key))
    connection.execute(table.insert().values(row))


def _enter(connection: sa.Connection, entries: Sequence[LedgerEntry]) -> None:
    """Into the ledger, in place of what it has of the same runs and holders."""
    if entries:
        connection.execute(DROP_ENTRY, [{"of": one.run, "by": one.holder} for one in entries])
        connection.execute(LEDGER.insert(), [vars(one) for one in entries])


def _entries(connection: sa.Connection, run: str) -> tuple[LedgerEntry, ...]:
    query = sa.select(LEDGER).where(LEDGER.c.run == run).order_by(LEDGER.c.holder)
    return tuple(LedgerEntry(**row) for row in connection.execute(query).mappings())


def _add_model(connection: sa.Connection, run: str, version: int, model: ModelFile) -> None:
    """Its row; one that is there already, of a commit whose answer was lost on the way, is left as it is."""
    place = (MODELS.c.run == run, MODELS.c.version == version)
    known = connection.execute(sa.select(MODELS.c.file, MODELS.c.digest).where(*place)).one_or_none()
    if known is not None and (known.file, bytes(known.digest)) == (model.path.name, model.digest):
        return
    row = {"data_start": model.data_start, "digest": model.digest, "file": model.path.name}
    connection.execute(MODELS.insert().values(run=run, version=version, **row))


def _bytes(run: str, moved: Moved) -> dict[str, Any]:
    """The parameters of SET_MOVED."""
    return {"of": run, "up": moved.up, "down": moved.down, "by": json.dumps(moved.traffic)}


def _traffic(text: str) -> dict[str, tuple[int, int]]:
    with _readable("what has moved in a round"):
        return {str(client): (int(up), int(down)) for client, (up, down) in json.loads(text).items()}


def _record(text: str) -> RoundRecord:
    with _readable("the saved record of a round"):
        return RoundRecord(**{name: _tuples(value) for name, value in json.loads(text).items()})


def dump_state(state: Run) -> str:
    """The durable part of a run's state, as JSON; who is present is not."""
    fields = dict(vars(state))  # not asdict, which copies every sum of the evaluation
    del fields["present"]
    return json.dumps({**fields, "phase": state.phase.value})


def load_state(text: str) -> Run:
    """The state that `dump_state` wrote, with nobody present; what an older version did not know is as in `Run()`.

    Raises StorageError for what no version up to this one has written.
    """
    with _readable("the saved state of a run"):
        fields = {name: _tuples(value) for name, value in json.loads(text).items()}
        return Run(**{**fields, "phase": Phase(fields["phase"])})


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(
            f"{what} cannot be read: it is damaged, or of a newer version of seqfed; restore the database from a backup, "
            "or install that version"
        ) from error


def _tuples(value: Any) -> Any:
    """What JSON made lists of, as the tuples that it was; they may lie in each other."""
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    if isinstance(value, dict):
        return {key: _tuples(one) for key, one in value.items()}
    return value
