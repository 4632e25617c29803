"""The lease: one server at a time writes, a dead one is replaced at once, and whoever was replaced changes nothing any more."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from tests.server.places import KINDS, Place, a_place
from tests.server.test_store import RECORD, RUN, TRAINING, UPDATE, create, saved

import seqfed.server.lease as lease_module
from seqfed.common.errors import LeaseLost, StorageError
from seqfed.common.schema import DataSchema
from seqfed.common.spec import RunSpec
from seqfed.server.store import CLIENTS, ROUNDS, KnownClient, Store, connect

ROOT = Path(__file__).parents[2]
CLIENT = KnownClient("a", "1" * 32, "0.1", DataSchema(features=2, steps=None, classes=2, examples=10), 1.0)


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return a_place(request.param, tmp_path)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on this process takes itself for one on another machine."""

    def move() -> None:
        monkeypatch.setattr(lease_module, "_machine", lambda: "another/machine")

    return move


def a_standby(place: Place) -> Store:
    place.folder.mkdir(parents=True, exist_ok=True)
    return connect(place.folder, database=place.url)


def expire(place: Place) -> None:
    """As if so much time had passed."""
    place.execute("UPDATE lease SET expires = 1.0")


# Who has it -----------------------------------------------------------------------------------------------------------


def test_each_holder_has_a_term_of_its_own_and_files_of_that_name(place: Place) -> None:
    for term in (1, 2, 3):
        store = place.open()
        assert store.lease.term == term
        assert store.model_path(RUN, 3).name == f"000003.t{term}.safetensors"
        store.close()


def test_a_second_server_is_refused_with_the_firsts_place_and_the_remedy(place: Place) -> None:
    first = place.open(address="127.0.0.1:7733")
    with pytest.raises(
        StorageError,
        match=rf"another seqfed server uses .*\(process {os.getpid()} on {re.escape(socket.gethostname())}, 127.0.0.1:7733"
        r"\); stop it, or pass another --state or --database, or --standby",
    ):
        place.open()
    create(first)  # and the first one is none the worse
    assert [found.run for found in first.runs()] == [RUN]
    first.close()


KILLED = """
import os, sys
from pathlib import Path
from seqfed.server.store import open_store

open_store(Path(sys.argv[1]), database=sys.argv[2] or None, lease_s=3600)
print("open", flush=True)
sys.stdin.read() if sys.argv[3] == "waits" else os._exit(9)
"""


def another_process(place: Place, then: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(place.folder), place.url or "", then]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_killed_servers_successor_on_its_machine_begins_at_once(place: Place) -> None:
    with another_process(place, "dies") as killed:
        assert killed.wait() == 9
    store = place.open()  # its lease would have lasted an hour
    assert store.lease.term == 2
    store.close()


def test_a_killed_server_that_nobody_has_reaped_yet_is_dead_too(place: Place) -> None:
    with another_process(place, "waits") as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(StorageError, match=f"process {other.pid} on"):
            place.open()
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        store = place.open()
        assert store.lease.term == 2
        store.close()


def test_another_process_of_the_same_number_is_not_the_holder(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    first = place.open(lease_s=3600)
    monkeypatch.setattr(lease_module, "_began", lambda pid: f"another moment than {pid}'s")
    second = place.open()
    assert second.lease.term == 2
    first.close()
    second.close()


def test_a_holder_out_of_sight_is_waited_for_until_its_lease_ends(place: Place, elsewhere: Callable[[], None]) -> None:
    first = place.open(lease_s=3600)
    elsewhere()
    second = a_standby(place)
    steps = second.take()
    assert 0 < next(steps).left <= 3600
    expire(place)
    assert next(steps, None) is None
    assert second.lease.term == 2
    first.close()
    second.close()


def test_a_holder_out_of_sight_that_renews_its_lease_is_not_replaced(
    place: Place, elsewhere: Callable[[], None]
) -> None:
    first = place.open(address="[2001:db8::1]:7733")
    elsewhere()
    second = a_standby(place)
    steps = second.take()
    next(steps)
    first.renew()
    with pytest.raises(StorageError, match=re.escape("2001:db8::1]:7733")):
        next(steps)
    second.close()
    create(first)
    first.close()


def test_one_that_stands_by_takes_over_when_the_holder_ends(place: Place) -> None:
    first, second = place.open(), a_standby(place)
    steps = second.take(standby=True)
    for _ in range(3):
        assert next(steps).pid == os.getpid()
        first.renew()
    create(first)
    first.close()
    assert next(steps, None) is None
    assert [found.run for found in second.runs()] == [RUN]
    second.close()


def test_a_lease_from_before_the_clock_was_set_back_is_not_waited_for(
    place: Place, elsewhere: Callable[[], None]
) -> None:
    first = place.open()
    elsewhere()
    place.execute("UPDATE lease SET expires = expires + 100000")
    second = place.open()
    assert second.lease.term == 2
    first.close()
    second.close()


def test_of_many_that_reach_for_it_one_gets_it(place: Place) -> None:
    place.open().close(release=False)
    stores = [a_standby(place) for _ in range(8)]
    expire(place)
    together = threading.Barrier(len(stores))

    def reach(store: Store) -> bool:
        together.wait()
        return store.lease.take() is None

    with ThreadPoolExecutor(len(stores)) as threads:
        got = list(threads.map(reach, stores))
    assert sum(got) == 1
    assert stores[got.index(True)].lease.term == 2
    for store in stores:
        store.close()


# Who has lost it ------------------------------------------------------------------------------------------------------


def replaced(place: Place) -> tuple[Store, Store, RunSpec]:
    """A server that was away for too long, and the one that has taken over meanwhile."""
    first = place.open()
    spec = create(first, rounds=5)
    expire(place)
    return first, place.open(), spec


WRITES: dict[str, Callable[[Store, RunSpec], object]] = {
    "create": lambda store, _: create(store, "f" * 16),
    "commit": lambda store, _: store.commit(RUN, TRAINING, updates=[UPDATE]),
    "model": lambda store, spec: store.commit(RUN, TRAINING, model=saved(store, RUN, 1, spec), record=RECORD),
    "remember": lambda store, _: store.remember(CLIENT),
    "clear_up": lambda store, _: store.clear_up(),
    "renew": lambda store, _: store.renew(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_one_that_was_replaced_changes_nothing_and_says_so(
    place: Place, write: Callable[[Store, RunSpec], object]
) -> None:
    first, second, spec = replaced(place)
    model = saved(second, RUN, 1, spec)
    content = model.path.read_bytes()
    second.commit(RUN, replace(TRAINING, round=2), model=model, record=RECORD)
    before = (second.runs(), second.clients(), second.history(RUN, 0, 9, 9))
    told: list[LeaseLost] = []
    first.when_lost = told.append
    with pytest.raises(LeaseLost, match=rf"lease of its database is lost: process {os.getpid()} on .* has taken over"):
        write(first, spec)
    assert len(told) == 1
    assert (second.runs(), second.clients(), second.history(RUN, 0, 9, 9)) == before
    assert model.path.read_bytes() == content
    first.close()
    second.renew()  # the first one's end does not end it
    with pytest.raises(StorageError, match="another seqfed server"):
        place.open()
    second.close()


def test_a_lease_that_is_over_but_nobody_elses_can_be_renewed(place: Place, elsewhere: Callable[[], None]) -> None:
    store = place.open()
    expire(place)
    create(store)
    store.renew()
    elsewhere()
    other = a_standby(place)
    assert next(other.take()).left > 9
    other.close()
    store.close()


def test_a_takeover_waits_for_the_transaction_that_has_begun(place: Place) -> None:
    first, second = place.open(), a_standby(place)
    expire(place)
    happened: list[str] = []

    def take() -> None:
        while second.lease.take() is not None:
            pass
        happened.append("taken over")

    thread = threading.Thread(target=take)
    with first._writing() as connection:
        thread.start()
        thread.join(0.3)  # time enough to take over, were it possible
        row: dict[str, object] = {**vars(CLIENT), "data_schema": CLIENT.schema.model_dump_json()}
        del row["schema"]
        connection.execute(CLIENTS.insert().values(row))
        happened.append("committed")
    thread.join()
    assert happened == ["committed", "taken over"]
    assert second.clients() == [CLIENT]
    with pytest.raises(LeaseLost):
        first.remember(CLIENT)
    first.close()
    second.close()


def test_whatever_servers_do_to_each_other_what_they_write_is_in_the_order_of_their_terms(place: Place) -> None:
    """Three of them take the lease, write, take it for expired, and pass for dead while they go on writing."""
    place.open().close()
    writes = 15

    def serve(seed: int) -> None:
        draws = np.random.default_rng(seed)
        for _ in range(6):
            store = a_standby(place)
            for holder in store.lease.waiting(standby=True):
                if draws.random() < 0.2 and holder.left > 0:
                    expire(place)
            if draws.random() < 0.5:
                store.lease.forget()
            with contextlib.suppress(LeaseLost):
                for _ in range(draws.integers(writes)):
                    with store._writing() as connection:
                        last = connection.execute(sa.select(sa.func.max(ROUNDS.c.round))).scalar() or 0
                        row = {"run": RUN, "round": last + 1, "record": str(store.lease.term)}
                        connection.execute(ROUNDS.insert().values(row))
            store.close(release=bool(draws.random() < 0.5))

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(serve, range(3)))
    with place.engine() as engine, engine.connect() as connection:
        terms = [int(one) for one in connection.execute(sa.select(ROUNDS.c.record).order_by(ROUNDS.c.round)).scalars()]
        (last,) = connection.execute(sa.text("SELECT term FROM lease")).one()
    assert terms == sorted(terms)
    assert len(set(terms)) > 1
    assert last == 1 + 3 * 6
