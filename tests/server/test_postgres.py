"""What only PostgreSQL has: a driver to install, passwords, a server that goes away. See also test_store and test_lease."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.server.conftest import a_daemon, averaged, flat_of, make_spec, some_delta
from tests.server.places import KINDS, Place, a_place
from tests.server.postgres import cluster
from tests.server.test_store import RUN, TRAINING, UPDATE, create

from seqfed.common.errors import ConfigError, StorageError, StorageFull
from seqfed.common.model import initial_parameters
from seqfed.server import coordinator
from seqfed.server.database import database_error
from seqfed.server.store import connect


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return a_place("postgres", tmp_path)


@pytest.fixture
def running() -> Iterator[None]:
    """Whatever a test does to it, the cluster runs for the next one."""
    yield
    if cluster().is_stopped:
        cluster().start()


def test_a_database_that_comes_back_costs_one_error(place: Place, running: None) -> None:
    store = place.open()
    create(store)
    before = store.runs()
    cluster().stop()
    for _ in range(2):
        with pytest.raises(StorageError, match=r"the database postgresql://seqfed@/t\d+\?host="):
            store.commit(RUN, TRAINING, updates=[UPDATE])
    with pytest.raises(StorageError):
        store.renew()
    cluster().start()
    assert store.runs() == before
    store.commit(RUN, TRAINING, updates=[UPDATE])
    store.renew()
    assert store.runs()[0].updates == (UPDATE,)
    store.close()


def test_a_database_that_was_restarted_unseen_costs_nothing(place: Place, running: None) -> None:
    store = place.open()
    create(store)
    cluster().stop()
    cluster().start()
    store.commit(RUN, TRAINING, updates=[UPDATE])
    assert store.runs()[0].updates == (UPDATE,)
    store.close()


def test_one_that_stands_by_outwaits_a_database_that_is_away(place: Place, running: None) -> None:
    first = place.open(lease_s=3600)
    second = connect(place.folder, database=place.url)
    steps = second.take(standby=True)
    next(steps)
    cluster().stop()
    assert next(steps).left > 0
    cluster().start()
    next(steps)
    first.close()
    assert next(steps, None) is None
    assert second.lease.term == 2
    second.close()


def test_a_database_that_is_not_there_is_named_without_its_password(tmp_path: Path) -> None:
    url = f"postgresql://seqfed:geheim@/runs?host={tmp_path}"
    with pytest.raises(StorageError, match=r"the database postgresql://seqfed:\*\*\*@/runs.*connection") as refusal:
        connect(tmp_path / "state", database=url)
    assert "geheim" not in str(refusal.value)


def test_a_missing_driver_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"pip install 'seqfed\[postgres\]'"):
        connect(tmp_path, database="postgresql://db/runs")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("mysql://user:geheim@db/runs", "'mysql' is not supported; write postgresql://"),
        ("postgresql", "is no URL; write postgresql://"),
        ("db:geheim@runs", "is no URL"),
        ("postgresql+asyncpg://db/runs", "is not supported"),
        ("postgresql://seqfed:geheim@db:port/runs", "is no URL"),
    ],
)
def test_a_url_of_something_else_is_refused(tmp_path: Path, url: str, told: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        connect(tmp_path, database=url)
    assert told in str(refusal.value)
    assert "geheim" not in str(refusal.value)


def test_a_full_disk_is_called_by_its_name() -> None:
    from psycopg.errors import DiskFull
    from sqlalchemy.exc import OperationalError

    said = DiskFull('could not extend file "base/1/2": No space left on device\nHINT:  Check free disk space.')
    assert isinstance(database_error(OperationalError("INSERT", {}, said)), StorageFull)


async def test_a_run_goes_on_where_nothing_is_left_of_the_first_servers_folder(place: Place, tmp_path: Path) -> None:
    """As on another machine: the database and the models' copies are all that both servers have."""
    spec = make_spec(rounds=2)
    shared = {"database": place.url, "models": f"file://{tmp_path / 'models'}"}
    async with a_daemon(tmp_path / "first", **shared) as daemon:
        run = (await daemon.submit(spec)).run
        sites = await daemon.arrive("a", "b")
        for site in sites:
            await site.submit(await site.task(), some_delta(42, ord(site.name), 1), weight=ord(site.name))
        await daemon.until(run, lambda view: view.round == 2)
        task = await sites[0].task()
        await sites[0].submit(task, some_delta(42, ord("a"), 2), weight=ord("a"))
    (tmp_path / "first").rename(tmp_path / "gone")
    async with a_daemon(tmp_path / "second", **shared) as daemon:
        sites = await daemon.arrive("a", "b")
        for site in sites:  # the first one again, for its update was on the other machine only
            await site.submit(await site.task(), some_delta(42, ord(site.name), 2), weight=ord(site.name))
        assert (await daemon.end(run)).phase == "finished"
        model = flat_of(await daemon.export(run), 42)
    expected = initial_parameters(spec).flat
    for round_ in (1, 2):
        expected = averaged(expected, *((ord(name), some_delta(42, ord(name), round_)) for name in "ab"))
    assert (model == expected).all()


async def test_another_servers_folder_without_copies_is_refused_with_the_remedy(place: Place, tmp_path: Path) -> None:
    store = place.open()
    create(store)
    store.close()
    for _ in range(2):  # and the lease is let go
        with pytest.raises(
            StorageError, match="start with the --state of the server that wrote it, or give all servers"
        ):
            async with a_daemon(tmp_path / "other", database=place.url):
                pass
    place.open().close()


@pytest.mark.parametrize("first", KINDS)
def test_a_folder_with_another_databases_models_is_refused_and_left_alone(tmp_path: Path, first: str) -> None:
    mine = a_place(first, tmp_path)
    store = mine.open()
    create(store)
    model = store.model_path(RUN, 0)
    store.close()
    others = [replace(mine, url=cluster().database()), *([replace(mine, url=None)] if mine.url else [])]
    for other in others:
        with pytest.raises(StorageError, match=r"belong to another database; pass another --state, or the --database"):
            other.open()
        assert model.exists()
    store = mine.open()
    assert store.lease.term == 2
    assert [found.run for found in store.runs()] == [RUN]
    store.close()
    model.unlink()
    model.parent.rmdir()
    others[0].open().close()  # nothing is left to lose


async def test_a_run_outlives_its_databases_absence(
    place: Place, running: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "STORE_AGAIN_S", 0.05)
    spec = make_spec(cohort__min_clients=1)
    async with a_daemon(place.folder, database=place.url) as daemon:
        run = (await daemon.submit(spec)).run
        (site,) = await daemon.arrive("a")
        task = await site.task()
        await asyncio.to_thread(cluster().stop)
        with pytest.raises(StorageError):
            await site.submit(task, some_delta(42, 1))
        await asyncio.to_thread(cluster().start)
        await site.submit(task, some_delta(42, 1))
        assert (await daemon.end(run)).phase == "finished"
