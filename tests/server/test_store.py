"""The durable state: what is committed is there again, whatever happened to the process, and nothing else is."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import exc as sqlalchemy_exc
from tests.server.conftest import make_spec, some_delta

import seqfed.server.store as store_module
from seqfed.common import checkpoint
from seqfed.common.checkpoint import ModelFile
from seqfed.common.errors import StorageError, StorageFull
from seqfed.common.layout import Parameters
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.schema import DataSchema
from seqfed.common.spec import RunSpec
from seqfed.common.views import RoundRecord
from seqfed.server.round import Phase, Run
from seqfed.server.store import (
    CLIENTS,
    MODELS,
    ROUNDS,
    RUNS,
    UPDATES,
    KnownClient,
    Store,
    UpdateRow,
    dump_state,
    load_state,
    open_store,
)

RUN = "0123456789abcdef"
UPDATE = UpdateRow("a", 1, 10, bytes(range(32)), {"examples": 10, "loss": -5}, 1.5)
RECORD = RoundRecord(
    1, 2, ("a", "b"), ("b", "a"), {"examples": 3}, {"loss": 0.1}, 4, 5, 6.5, 0.25, {"loss": (0.2, 0.3)}, 9, 2
)
TRAINING = Run(Phase.TRAINING, frozenset("ab"), 1, 2, 1, ("a", "b"), ("b",), (("a", "no data"),), reason="because")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
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


def reopened(store: Store, folder: Path) -> Store:
    store.close()
    return open_store(folder)


# What is written is read ----------------------------------------------------------------------------------------------


def test_a_new_run_is_queued_with_its_initial_model(store: Store) -> None:
    spec = create(store)
    (found,) = store.runs()
    assert (found.run, found.spec, found.state, found.version) == (RUN, spec, Run(), 0)
    assert (found.started, found.ended, found.bytes_up, found.bytes_down) == (None, None, 0, 0)
    assert (found.updates, found.record) == ((), None)
    assert b"".join(found.model.pieces()) == initial_parameters(spec).flat.tobytes()
    assert found.model.layout == layout_of(spec)


def test_runs_come_back_oldest_first(store: Store) -> None:
    ids = [f"{number:016}" for number in (5, 3, 9, 1)]
    for one in ids:
        create(store, one)
    assert [found.run for found in store.runs()] == ids


def test_everything_comes_back_after_closing_and_opening_again(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    store = open_store(folder)
    spec = create(store, rounds=5, evaluation__every=1)
    store.commit(RUN, TRAINING, updates=[UPDATE], started=12.5)
    store = reopened(store, folder)
    (found,) = store.runs()
    assert (found.state, found.started, found.updates) == (replace(TRAINING, present=frozenset()), 12.5, (UPDATE,))
    model = saved(store, RUN, 1, spec)
    evaluating = replace(TRAINING, phase=Phase.EVALUATING)
    store.commit(RUN, evaluating, model=model, record=RECORD, bytes_up=1 << 40, bytes_down=1 << 41)
    store = reopened(store, folder)
    (found,) = store.runs()
    assert (found.version, found.model, found.record, found.updates) == (1, model, RECORD, ())
    assert (found.bytes_up, found.bytes_down) == (1 << 40, 1 << 41)
    assert found.state.phase is Phase.EVALUATING
    store.commit(RUN, replace(TRAINING, phase=Phase.STOPPED), ended=99.0)
    store = reopened(store, folder)
    assert (store.runs()[0].ended, store.runs()[0].record) == (99.0, None)
    store.close()


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


NAMES = st.text("abc", min_size=1, max_size=3)
REALS = st.floats(allow_nan=False)
TALLIES = st.lists(st.tuples(NAMES, st.integers(-(1 << 80), 1 << 80)), max_size=3).map(tuple)
STATES = st.builds(
    Run,
    phase=st.sampled_from(Phase),
    present=st.frozensets(NAMES),
    round=st.integers(0, 1 << 40),
    attempt=st.integers(0, 1 << 40),
    given_up=st.integers(0, 1000),
    cohort=st.lists(NAMES, max_size=3).map(tuple),
    folded=st.lists(NAMES, max_size=3).map(tuple),
    failed=st.lists(st.tuples(NAMES, st.text()), max_size=3).map(tuple),
    evaluated=st.lists(NAMES, max_size=3).map(tuple),
    evaluation=TALLIES,
    scores=st.lists(st.tuples(NAMES, st.lists(REALS, max_size=3).map(tuple)), max_size=3).map(tuple),
    newest=st.lists(st.tuples(NAMES, REALS), max_size=3).map(tuple),
    best=st.none() | st.floats(allow_nan=False),
    stale=st.integers(0, 1000),
    reason=st.text(),
)


@given(STATES)
def test_a_state_is_read_as_it_was_written_but_for_who_is_present(state: Run) -> None:
    assert load_state(dump_state(state)) == replace(state, present=frozenset())
    json.loads(dump_state(state))


# Nothing by halves ----------------------------------------------------------------------------------------------------


def test_a_commit_that_fails_changes_nothing(store: Store) -> None:
    spec = create(store)
    store.commit(RUN, TRAINING, updates=[UPDATE])
    before = store.runs()
    model = saved(store, RUN, 0, spec)
    with pytest.raises(StorageError, match="the server's database"):  # version 0 is there already
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
    with store._transaction() as connection:
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


def test_a_second_server_on_the_same_folder_is_refused_with_the_remedy(tmp_path: Path) -> None:
    first = open_store(tmp_path)
    with pytest.raises(StorageError, match=r"another seqfed server uses the state folder .*; stop it, or pass another"):
        open_store(tmp_path)
    create(first)  # and the first one is none the worse
    first = reopened(first, tmp_path)
    assert [found.run for found in first.runs()] == [RUN]
    first.close()


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
    assert isinstance(store_module._database_error(full), StorageFull)
    other = sqlalchemy_exc.OperationalError("INSERT", {}, sqlite3.OperationalError("disk I/O error"))
    error = store_module._database_error(other)
    assert type(error) is StorageError
    assert "disk I/O error" in str(error)


def test_a_database_without_room_is_a_full_disk(store: Store) -> None:
    create(store)
    with store._transaction() as connection:  # as many pages as there are: nothing more fits
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    before = store.runs()
    with pytest.raises(StorageFull, match="the disk with the server's database is full"):
        store.commit(RUN, replace(TRAINING, reason="x" * 1_000_000))
    assert store.runs() == before


# Leftovers ------------------------------------------------------------------------------------------------------------


def test_tidy_keeps_the_last_two_models_and_the_rounds_to_come(store: Store) -> None:
    spec = create(store)
    create(store, "f" * 16)
    for number in range(1, 12):
        saved(store, RUN, number, spec)
        path = store.update_path(RUN, number, "a", b"digest")
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    other = store.update_path("f" * 16, 1, "a", b"digest")
    other.parent.mkdir(parents=True)
    other.write_bytes(b"x")
    store.tidy(RUN, 10, 9)
    models = store.model_path(RUN, 0).parent
    assert sorted(path.name for path in models.iterdir()) == [f"{number:06}.safetensors" for number in (9, 10, 11)]
    updates = store.update_path(RUN, 1, "a", b"digest").parents[1]
    assert sorted(path.name for path in updates.iterdir()) == ["10", "11"]
    assert other.exists()
    assert store.model_path("f" * 16, 0).exists()
    store.tidy("0" * 16, 5, 5)  # a run without any files


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


NAMED = {table.name: set(table.columns.keys()) for table in (RUNS, MODELS, ROUNDS, UPDATES, CLIENTS)}


def test_the_migrations_make_exactly_the_tables_that_the_store_names(store: Store, tmp_path: Path) -> None:
    create(store)
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'state' / 'seqfed.db'}")
    assert columns(engine) == NAMED
    engine.dispose()


def test_the_migrations_go_back_and_forth(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'seqfed.db'}")
    for _ in range(2):
        with engine.begin() as connection:
            command.upgrade(alembic(connection), "head")
        assert columns(engine) == NAMED
        with engine.begin() as connection:
            command.downgrade(alembic(connection), "base")
        assert columns(engine) == {}
    engine.dispose()


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


def test_a_commit_survives_a_power_cut(store: Store) -> None:
    with store._transaction() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
