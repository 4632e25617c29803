"""The durable state: what is committed is there again, whatever happened to the process, and nothing else is."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import exc as sqlalchemy_exc
from tests.server.conftest import make_spec, some_delta
from tests.server.places import KINDS, Place, a_place

import seqfed.server.store as store_module
from seqfed.common import checkpoint
from seqfed.common.checkpoint import ModelFile
from seqfed.common.config import validate_json
from seqfed.common.errors import StorageError, StorageFull
from seqfed.common.layout import Parameters
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.schema import DataSchema
from seqfed.common.spec import RunSpec
from seqfed.common.views import RoundRecord
from seqfed.server.audit import AUDIT
from seqfed.server.database import SCHEMA, database_error
from seqfed.server.lease import LEASE
from seqfed.server.round import Phase, Run
from seqfed.server.store import (
    CLIENTS,
    LEDGER,
    MODELS,
    NONCES,
    REVOKED,
    ROUNDS,
    RUNS,
    UPDATES,
    KnownClient,
    Moved,
    Signed,
    Store,
    UpdateRow,
    dump_state,
    load_state,
    open_store,
)

RUN = "0123456789abcdef"
UPDATE = UpdateRow("a", 1, 1, 10, bytes(range(32)), {"examples": 10, "loss": -5}, 1.5)
RECORD = RoundRecord(
    1, 2, ("a", "b"), ("b", "a"), {"examples": 3}, {"loss": 0.1}, 4, 5, 6.5, 0.25, {"loss": (0.2, 0.3)}, 9, 2
)
TRAINING = Run(
    Phase.TRAINING,
    present=frozenset("ab"),
    round=1,
    attempt=2,
    given_up=1,
    cohort=("a", "b"),
    folded=("b",),
    failed=(("a", "no data"),),
    reason="because",
)


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return a_place(request.param, tmp_path)


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    opened = place.open()
    yield opened
    opened.close()


@pytest.fixture
def lite(tmp_path: Path) -> Iterator[Store]:
    """A store on SQLite, for what only that has."""
    opened = open_store(tmp_path / "state")
    yield opened
    opened.close()


def saved(store: Store, run: str, version: int, spec: RunSpec) -> ModelFile:
    parameters = Parameters(layout_of(spec), some_delta(layout_of(spec).size, version))
    return checkpoint.save(store.model_path(run, version), parameters, {})


def create(store: Store, run: str = RUN, **changes: Any) -> RunSpec:
    spec = make_spec(**changes)
    store.create(run, spec, checkpoint.save(store.model_path(run, 0), initial_parameters(spec), {}))
    return spec


def reopened(store: Store, place: Place) -> Store:
    store.close()
    return place.open()


# What is written is read ----------------------------------------------------------------------------------------------


def test_a_new_run_is_queued_with_its_initial_model(store: Store) -> None:
    spec = create(store)
    (found,) = store.runs()
    assert (found.run, found.spec, found.state, found.version) == (RUN, spec, Run(), 0)
    assert (found.started, found.ended, found.moved) == (None, None, Moved())
    assert (found.updates, found.record) == ((), None)
    assert b"".join(found.model.pieces()) == initial_parameters(spec).flat.tobytes()
    assert found.model.layout == layout_of(spec)


def test_a_specification_keeps_its_bytes_whichever_version_wrote_them(place: Place) -> None:
    store = place.open()
    content = json.loads(make_spec().canonical)
    del content["convergence"]  # as from a version that did not know it yet
    text = json.dumps(content, indent=1).encode()
    spec = validate_json(RunSpec, text, "test")
    store.create(RUN, spec, saved(store, RUN, 0, spec), Signed("anna", b"signature", b"certificate"))
    store = reopened(store, place)
    (found,) = store.runs()
    assert found.spec == make_spec()
    assert found.spec.canonical == text
    assert found.signed.signature == b"signature"
    store.close()


def test_runs_come_back_oldest_first(store: Store) -> None:
    ids = [f"{number:016}" for number in (5, 3, 9, 1)]
    for one in ids:
        create(store, one)
    assert [found.run for found in store.runs()] == ids


def test_everything_comes_back_after_closing_and_opening_again(place: Place) -> None:
    store = place.open()
    spec = create(store, rounds=5, evaluation__every=1)
    store.commit(RUN, TRAINING, updates=[UPDATE], started=12.5)
    store = reopened(store, place)
    (found,) = store.runs()
    assert (found.state, found.started, found.updates) == (replace(TRAINING, present=frozenset()), 12.5, (UPDATE,))
    model = saved(store, RUN, 1, spec)
    evaluating = replace(TRAINING, phase=Phase.EVALUATING)
    moved = Moved(1 << 40, 1 << 41, {"a": (1 << 40, 0), "b": (0, 7)})
    store.commit(RUN, evaluating, model=model, record=RECORD, moved=moved)
    store = reopened(store, place)
    (found,) = store.runs()
    assert (found.version, found.model, found.record, found.updates) == (1, model, RECORD, ())
    assert found.moved == moved
    assert found.state.phase is Phase.EVALUATING
    store.commit(RUN, replace(TRAINING, phase=Phase.STOPPED), ended=99.0)
    store = reopened(store, place)
    assert (store.runs()[0].ended, store.runs()[0].record) == (99.0, None)
    store.close()


def test_bytes_are_counted_without_another_change(store: Store) -> None:
    for run in (RUN, "f" * 16):
        create(store, run)
    store.commit(RUN, TRAINING, updates=[UPDATE], moved=Moved(1, 2, {"a": (1, 2)}))
    (before, other) = store.runs()
    store.count({RUN: Moved(3, 4, {"a": (1, 2), "b": (2, 2)}), "f" * 16: Moved(5, 6)})
    assert store.runs() == [
        replace(before, moved=Moved(3, 4, {"a": (1, 2), "b": (2, 2)})),
        replace(other, moved=Moved(5, 6)),
    ]


def test_a_model_keeps_its_version_when_the_state_is_in_the_next_round_already(store: Store) -> None:
    spec = create(store, rounds=3)
    for number in (1, 2, 3):
        model = saved(store, RUN, number, spec)
        state = replace(TRAINING, round=min(number + 1, 3))
        store.commit(RUN, state, model=model, record=replace(RECORD, round=number))
        (found,) = store.runs()
        assert (found.version, found.model) == (number, model)


def test_a_clients_newer_update_takes_the_older_ones_place(store: Store) -> None:
    create(store)
    newer = replace(UPDATE, round=2, weight=7)
    other = replace(UPDATE, client="b")
    store.commit(RUN, TRAINING, updates=[UPDATE, other])
    store.commit(RUN, TRAINING, updates=[newer])
    assert sorted(store.runs()[0].updates, key=lambda one: one.client) == [newer, other]


def test_history_is_in_order_and_in_portions(store: Store) -> None:
    create(store)
    create(store, "f" * 16)
    for number in (3, 1, 2, 4):
        store.commit(RUN, TRAINING, record=replace(RECORD, round=number))
    store.commit("f" * 16, TRAINING, record=replace(RECORD, round=9))
    store.commit(RUN, TRAINING, record=replace(RECORD, round=2, attempt=7))  # completed later

    def rounds(after: int, last: int, limit: int) -> list[int]:
        return [one.round for one in store.history(RUN, after, last, limit)]

    assert rounds(0, 10, 10) == [1, 2, 3, 4]
    assert rounds(1, 3, 10) == [2, 3]
    assert rounds(0, 10, 2) == [1, 2]
    assert rounds(4, 10, 10) == []
    assert store.history(RUN, 0, 1, 1) == [replace(RECORD, round=1)]
    assert store.history(RUN, 1, 2, 1) == [replace(RECORD, round=2, attempt=7)]


def test_clients_are_remembered_and_renewed(store: Store) -> None:
    schema = DataSchema(features=2, steps=None, classes=2, examples=10)
    b, a = KnownClient("b", "1" * 32, "0.1", schema, 1.0), KnownClient("a", "2" * 32, "0.2", schema, 2.0)
    store.remember(b)
    store.remember(a)
    renewed = replace(b, seen=3.0, software="0.3")
    store.remember(renewed)
    assert store.clients() == [a, renewed]
    c = replace(a, client="c")
    store.remember(c, b, replace(a, seen=5.0), renewed)  # many arrive together
    assert store.clients() == [replace(a, seen=5.0), renewed, c]
    store.remember()
    assert len(store.clients()) == 3


STATES = st.builds(Run, **{name: st.from_type(kind) for name, kind in get_type_hints(Run).items()})


@given(STATES)
def test_a_state_is_read_as_it_was_written_but_for_who_is_present(state: Run) -> None:
    assert repr(load_state(dump_state(state))) == repr(replace(state, present=frozenset()))  # NaN is not itself
    json.loads(dump_state(state))


def test_what_a_state_of_an_older_version_lacks_is_as_in_a_new_run() -> None:
    assert load_state('{"phase": "training", "round": 4}') == Run(Phase.TRAINING, round=4)
    every = json.loads(dump_state(TRAINING))
    for name in every:
        if name != "phase":
            fields = {key: value for key, value in every.items() if key != name}
            assert load_state(json.dumps(fields)) == replace(
                TRAINING, present=frozenset(), **{name: getattr(Run(), name)}
            )


def test_an_update_that_counts_later_outlives_the_model_of_this_round(store: Store) -> None:
    spec = create(store, rounds=3)
    late = replace(UPDATE, client="late", base=1, round=2)
    store.commit(RUN, TRAINING, updates=[UPDATE, late])
    store.commit(RUN, TRAINING, model=saved(store, RUN, 1, spec), record=RECORD)
    assert store.runs()[0].updates == (late,)
    store.commit(RUN, TRAINING, model=saved(store, RUN, 2, spec), record=replace(RECORD, round=2))
    assert store.runs()[0].updates == ()


def test_a_commit_whose_answer_was_lost_is_made_again(store: Store) -> None:
    """A connection may break between PostgreSQL's commit and the news of it."""
    spec = create(store)
    model = saved(store, RUN, 1, spec)
    for _ in range(2):
        store.commit(RUN, TRAINING, updates=[replace(UPDATE, round=2)], model=model, record=RECORD)
    (found,) = store.runs()
    assert (found.model, found.updates) == (model, (replace(UPDATE, round=2),))
    assert len(store.history(RUN, 0, 9, 9)) == 1


# Nothing by halves ----------------------------------------------------------------------------------------------------


def test_a_commit_that_fails_changes_nothing(store: Store) -> None:
    spec = create(store)
    store.commit(RUN, TRAINING, updates=[UPDATE])
    before = store.runs()
    model = saved(store, RUN, 0, spec)
    with pytest.raises(StorageError, match="(?i)unique"):  # version 0 is there already
        store.commit(
            RUN,
            replace(TRAINING, round=2),
            updates=[replace(UPDATE, client="b")],
            model=model,
            record=replace(RECORD, round=0),
        )
    assert store.runs() == before
    assert store.history(RUN, -1, 10, 10) == []


KILLED = """
import os, sys
from dataclasses import replace
from pathlib import Path
from tests.server.conftest import make_spec
from tests.server.test_store import RUN, TRAINING, UPDATE, RECORD, create, saved
from seqfed.server.store import open_store

store = open_store(Path(sys.argv[1]))
spec = create(store)
store.commit(RUN, TRAINING, updates=[UPDATE])
if sys.argv[2] == "model":  # written, but not committed
    saved(store, RUN, 1, spec)
if sys.argv[2] == "transaction":
    with store._writing() as connection:
        connection.exec_driver_sql("DELETE FROM updates")
        connection.exec_driver_sql("UPDATE runs SET state = '{}'")
        os._exit(9)
os._exit(9)
"""


@pytest.mark.parametrize("moment", ["after", "model", "transaction"])
def test_a_killed_process_leaves_its_last_commit(tmp_path: Path, moment: str) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, tmp_path, moment], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 9, done.stderr
    store = open_store(tmp_path)
    (found,) = store.runs()
    assert (found.state, found.updates, found.version) == (replace(TRAINING, present=frozenset()), (UPDATE,), 0)
    model = saved(store, RUN, 1, found.spec)  # the leftover is no obstacle
    store.commit(RUN, TRAINING, model=model, record=RECORD)
    assert store.runs()[0].model == model
    store.close()


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="opening the state folder"):
        open_store(tmp_path / "file")


def test_a_database_that_is_none_is_refused_and_let_go(tmp_path: Path) -> None:
    (tmp_path / "seqfed.db").write_bytes(b"no database " * 1000)
    with pytest.raises(StorageError, match="not a database"):
        open_store(tmp_path)
    (tmp_path / "seqfed.db").unlink()
    open_store(tmp_path).close()


def test_the_state_is_nobody_elses_to_read(store: Store, tmp_path: Path) -> None:
    assert store is not None
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0


def test_a_full_disk_is_called_by_its_name() -> None:
    full = sqlalchemy_exc.OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))
    assert isinstance(database_error(full), StorageFull)
    other = sqlalchemy_exc.OperationalError("INSERT", {}, sqlite3.OperationalError("disk I/O error"))
    error = database_error(other)
    assert type(error) is StorageError
    assert "disk I/O error" in str(error)


def test_a_database_without_room_is_a_full_disk(lite: Store) -> None:
    create(lite)
    with lite._writing() as connection:  # as many pages as there are: nothing more fits
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    before = lite.runs()
    with pytest.raises(StorageFull, match="the disk with the server's database is full"):
        lite.commit(RUN, replace(TRAINING, reason="x" * 1_000_000))
    assert lite.runs() == before


# Leftovers ------------------------------------------------------------------------------------------------------------


def an_update(store: Store, run: str, round_: int, client: str = "a", digest: bytes = b"digest") -> Path:
    path = store.update_path(run, round_, client, digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_tidy_keeps_the_last_two_models_and_what_no_model_has(store: Store) -> None:
    spec = create(store)
    create(store, "f" * 16)
    for number in range(1, 12):
        saved(store, RUN, number, spec)
    updates = [an_update(store, RUN, number) for number in range(1, 12)]
    other = an_update(store, "f" * 16, 1)
    store.tidy(RUN, 10, [*updates[:9], *updates[:2]])
    models = store.model_path(RUN, 0).parent
    assert sorted(path.name for path in models.iterdir()) == [f"{number:06}.t1.safetensors" for number in (9, 10, 11)]
    assert [path.exists() for path in updates] == [False] * 9 + [True] * 2
    assert other.exists()
    assert store.model_path("f" * 16, 0).exists()
    store.tidy("0" * 16, 5, [])  # a run without any files


def test_opening_removes_what_no_row_names(place: Place) -> None:
    store = place.open()
    spec = create(store)
    kept = [store.model_path(RUN, 0), an_update(store, RUN, UPDATE.base, UPDATE.client, UPDATE.digest)]
    store.commit(RUN, TRAINING, updates=[UPDATE])
    saved(store, RUN, 1, spec)  # and killed before its row
    an_update(store, RUN, UPDATE.base, UPDATE.client, b"other")
    an_update(store, RUN, UPDATE.base, "b", UPDATE.digest)
    an_update(store, "e" * 16, 1)
    kept[1].with_suffix(".f32.0123.part").write_bytes(b"x")
    (kept[1].parent / "1").mkdir()  # as version 0.1 had them
    (kept[1].parent / "1" / "a.f32").write_bytes(b"x")
    (place.folder / "tmpabc.safetensors").write_bytes(b"x")
    store = reopened(store, place)
    files = [path for path in place.folder.rglob("*") if path.is_file() and path.parent != place.folder]
    assert sorted(files) == sorted(kept)
    assert not (place.folder / "updates" / ("e" * 16)).exists()
    assert not (place.folder / "tmpabc.safetensors").exists()
    store.close()


# Migrations -----------------------------------------------------------------------------------------------------------


def alembic(connection: sa.Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(store_module.__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def columns(engine: sa.Engine) -> dict[str, set[str]]:
    inspector = sa.inspect(engine)
    return {
        table: {column["name"] for column in inspector.get_columns(table)}
        for table in inspector.get_table_names()
        if table != "alembic_version"
    }


NAMED = {
    table.name: set(table.columns.keys())
    for table in (RUNS, MODELS, ROUNDS, UPDATES, CLIENTS, NONCES, REVOKED, LEDGER, AUDIT)
} | {"lease": {"number", *LEASE.columns.keys()}}


def test_the_migrations_make_exactly_the_tables_that_the_store_names(store: Store, place: Place) -> None:
    create(store)
    with place.engine() as engine:
        assert columns(engine) == NAMED
        with engine.begin() as connection:
            assert ScriptDirectory.from_config(alembic(connection)).get_current_head() == SCHEMA


def test_the_migrations_go_back_and_forth(place: Place) -> None:
    place.folder.mkdir()
    with place.engine() as engine:
        for _ in range(2):
            with engine.begin() as connection:
                command.upgrade(alembic(connection), "head")
            assert columns(engine) == NAMED
            with engine.begin() as connection:
                command.downgrade(alembic(connection), "base")
            assert columns(engine) == {}


def test_rounds_of_the_first_version_get_their_metrics(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'seqfed.db'}")
    old = ["round", "attempt", "cohort", "folded", "training", "bytes_up", "bytes_down", "seconds"]
    record = {name: vars(RECORD)[name] for name in (*old, "slowest_training_seconds")}
    record["evaluation"] = {"examples": 4, "loss": 1 << 20, "correct": 3}
    state = {**json.loads(dump_state(TRAINING)), "evaluation": [["examples", 4]]}
    del state["scores"], state["newest"]
    bare = {**record, "evaluation": {}}
    with engine.begin() as connection:
        command.upgrade(alembic(connection), "0001")
        connection.execute(RUNS.insert().values(run=RUN, spec="{}", state=json.dumps(state), bytes_up=0, bytes_down=0))
        for number, one in ((1, record), (2, bare)):
            connection.execute(ROUNDS.insert().values(run=RUN, round=number, record=json.dumps(one)))
        command.upgrade(alembic(connection), "0002")
        (text,) = connection.execute(sa.select(RUNS.c.state)).scalars()
        assert load_state(text) == replace(TRAINING, present=frozenset(), evaluation=(("examples", 4),))
        texts = connection.execute(sa.select(ROUNDS.c.record).order_by(ROUNDS.c.round)).scalars().all()
        found = [store_module._record(one) for one in texts]
        plain = replace(RECORD, spread={}, evaluated_examples=0, evaluated_clients=0, evaluation={})
        assert found == [replace(plain, evaluation={"loss": 0.25, "accuracy": 0.75}, evaluated_examples=4), plain]
        command.downgrade(alembic(connection), "0001")
        texts = connection.execute(sa.select(ROUNDS.c.record)).scalars().all()
        assert [json.loads(one) for one in texts] == [json.loads(json.dumps(bare))] * 2
    engine.dispose()


def test_the_third_version_knows_bases_and_files(place: Place) -> None:
    place.folder.mkdir()
    old_models = sa.table("models", *(sa.column(name) for name in ("run", "version", "data_start", "digest")))
    with place.engine() as engine, engine.begin() as connection:
        command.upgrade(alembic(connection), "0002")
        row = {name: value for name, value in vars(UPDATE).items() if name not in ("base", "tally")}
        old_updates = sa.table("updates", *(sa.column(name) for name in ("run", "tally", *row)))
        connection.execute(old_updates.insert().values(run=RUN, tally="{}", **{**row, "round": 7}))
        for version in (0, 12):
            values = {"run": RUN, "version": version, "data_start": 8, "digest": b"x"}
            connection.execute(old_models.insert().values(values))
        command.upgrade(alembic(connection), "0003")
        assert connection.execute(sa.select(UPDATES.c.base, UPDATES.c.round)).one() == (7, 7)
        files = connection.execute(sa.select(MODELS.c.file).order_by(MODELS.c.version)).scalars().all()
        assert files == ["000000.safetensors", "000012.safetensors"]


def test_a_database_of_a_newer_version_is_refused(place: Place) -> None:
    place.open().close()
    with place.engine() as engine, engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(
        StorageError, match=r"schema 9999, which this version of seqfed does not know .*; run the version"
    ):
        place.open()


def test_a_commit_survives_a_power_cut(lite: Store) -> None:
    with lite._writing() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
