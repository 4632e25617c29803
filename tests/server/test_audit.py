"""The audit log: what stands in it, that its chain shows every change, and that it costs no more than it may."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import typer
from tests.server.conftest import a_daemon, make_spec, some_delta, turns_until, typed
from tests.server.members import guarded
from tests.server.places import KINDS, Place, a_place
from typer.testing import CliRunner

from seqfed.common import chain
from seqfed.common.errors import AuditBroken, LeaseLost, SeqfedError, StorageError
from seqfed.common.identity import Role
from seqfed.common.views import AuditEntry
from seqfed.server import audit
from seqfed.server.audit import Audit, Kind, Note
from seqfed.server.audit_cli import verify
from seqfed.v1 import admin_pb2

NOTES = [Note(Kind.SUBMITTED, {"run": f"{number:016x}", "name": "ä"}, at=1.1 * number) for number in range(1, 6)]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return a_place(request.param, tmp_path)


def whole(place: Place) -> list[AuditEntry]:
    with audit.reading(place.folder, place.url) as entries:
        return list(entries)


def test_entries_follow_each_other_through_restarts(place: Place) -> None:
    for notes in (NOTES[:2], [], NOTES[2:3], NOTES[3:]):
        store = place.open()
        store.note(notes)
        store.close(release=False)  # as a killed one does
    entries = whole(place)
    assert [(one.number, one.at, json.loads(one.body)) for one in entries] == [
        (number, note.at, note.body) for number, note in enumerate(NOTES, 1)
    ]
    assert chain.verify(entries) == (5, entries[-1].digest)


def test_a_step_and_its_entry_are_there_together_or_not_at_all(place: Place) -> None:
    store = place.open()
    with pytest.raises(TypeError):  # after the row and the first entry, in the same transaction
        store.revoke("a", 1.0, "", [NOTES[0], Note(Kind.REVOKED, {"at": object()})])
    assert store.revoked() == {}
    store.lease.term += 1
    with pytest.raises(LeaseLost):
        store.revoke("a", 1.0, "", NOTES)
    assert whole(place) == []
    store.close()


def test_a_token_is_used_up_and_its_certificate_written_down_together_or_not_at_all(place: Place) -> None:
    store, later = place.open(), time.time() + 60
    with pytest.raises(TypeError):
        store.use_nonce("a", later, [Note(Kind.ENROLLED, {"client": object()})])
    assert store.use_nonce("a", later, NOTES[:1])  # so it was not used
    assert not store.use_nonce("a", later, NOTES[1:])  # and what did not come of it is not written
    assert [json.loads(one.body) for one in whole(place)] == [NOTES[0].body]
    store.close()


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (
            "UPDATE audit SET body = '{}' WHERE number = 3",
            "entry 3 of the audit log, or what stands before it, was changed",
        ),
        ("UPDATE audit SET at = 0 WHERE number = 1", "entry 1 "),
        ("UPDATE audit SET kind = 'ended' WHERE number = 5", "entry 5 "),
        ("DELETE FROM audit WHERE number = 2", "entry 2 of the audit log is missing: entry 3 stands in its place"),
        ("DELETE FROM audit WHERE number = 1", "entry 1 of the audit log is missing"),
        ("UPDATE audit SET number = 7 WHERE number = 5", "entry 5 of the audit log is missing: entry 7"),
        (
            "UPDATE audit SET digest = (SELECT digest FROM audit AS one WHERE one.number = 4) WHERE number = 2",
            "entry 2 ",
        ),
    ],
)
def test_every_change_is_found(place: Place, change: str, first: str) -> None:
    store = place.open()
    store.note(NOTES)
    store.close()
    place.execute(change)
    with pytest.raises(AuditBroken) as broken:
        chain.verify(whole(place))
    assert str(broken.value).startswith(first)


def test_a_log_that_was_cut_off_is_found_by_a_remembered_head(tmp_path: Path) -> None:
    place = a_place("sqlite", tmp_path)
    store = place.open()
    store.note(NOTES)
    head = store.audit_head()
    assert head == chain.verify(whole(place), known=head)
    store.note(NOTES)
    assert chain.verify(whole(place), known=head)[0] == 10  # it has grown since
    store.close()
    place.execute("DELETE FROM audit WHERE number > 4")
    chain.verify(whole(place))  # the chain alone does not show it
    with pytest.raises(AuditBroken, match="entry 5 of the audit log is missing, and so are all up to 5"):
        chain.verify(whole(place), known=head)
    with pytest.raises(AuditBroken, match="entry 4 of the audit log is another one than the head that is remembered"):
        chain.verify(whole(place), known=(4, bytes(32)))


def test_two_logs_do_not_fit_together() -> None:
    def log(word: str) -> list[AuditEntry]:
        entries, before = list[AuditEntry](), chain.START
        for number in range(1, 4):
            before = chain.digest(before, number, 0.0, word, "{}")
            entries.append(AuditEntry(number, 0.0, word, "{}", before))
        return entries

    one, other = log("a"), log("b")
    assert chain.verify(one) == (3, one[-1].digest)
    with pytest.raises(AuditBroken, match="entry 2 "):
        chain.verify([one[0], *other[1:]])
    with pytest.raises(AuditBroken, match="entry 2 "):
        chain.verify([one[0], replace(one[1], at=0.5), one[2]])


# What a federation leaves in it


def bodies(entries: Sequence[AuditEntry], kind: str) -> list[dict[str, Any]]:
    return [json.loads(one.body) for one in entries if one.kind == kind]


async def test_a_run_leaves_who_what_and_when(tmp_path: Path) -> None:
    async with guarded(tmp_path) as server:
        a, b = await server.arrive("a", "b")
        spec = make_spec(name="trial")
        run = (await server.submit(spec)).run
        stub = await server.desk()
        for site in (a, b):
            await site.submit(await site.task(), some_delta(42, 1))
        with typed():
            views = [view async for view in stub.WatchRun(admin_pb2.WatchRunRequest(run=run))]
            assert views[-1].phase == "finished"
            second = (await server.submit(make_spec(cohort__min_clients=3))).run
            await stub.PauseRun(admin_pb2.PauseRunRequest(run=second))
            await stub.ResumeRun(admin_pb2.ResumeRunRequest(run=second))
            await stub.StopRun(admin_pb2.StopRunRequest(run=second))
            await server.revoke("a", "left")
        entries = await server.audit()
        assert bodies(entries, "submitted")[0] == {"run": run, "name": "trial", "spec": spec.digest, "operator": "ops"}
        assert bodies(entries, "cohort") == [{"run": run, "round": 1, "attempt": 1, "clients": ["a", "b"]}]
        (committed,) = bodies(entries, "committed")
        assert (committed["run"], committed["round"], sorted(committed["folded"])) == (run, 1, ["a", "b"])
        assert len(committed["model"]) == 64
        assert [one["run"] for one in bodies(entries, "ended")] == [run]
        for kind in ("paused", "resumed", "stopped"):
            (one,) = bodies(entries, kind)
            assert (one["run"], one["by"]) == (second, "operator:ops")
        assert bodies(entries, "revoked") == [{"client": "a", "by": "operator:ops", "reason": "left"}]
        chain.verify(entries)
        assert await server.audit(after=len(entries) - 1) == entries[-1:]
        stored = whole(Place(tmp_path / "state", None))  # past the running server
        assert stored[: len(entries)] == entries
    assert chain.verify(whole(Place(tmp_path / "state", None)))[0] >= len(entries)


async def test_refusals_are_noted_but_not_without_end(tmp_path: Path) -> None:
    async with guarded(tmp_path, refusals_per_minute=3) as server:
        viewer = await server.desk(Role.VIEWER, "v")
        for _ in range(8):
            with pytest.raises(SeqfedError), typed():
                await viewer.StopRun(admin_pb2.StopRunRequest(run="x"))
        stub = await server.desk()
        with pytest.raises(SeqfedError), typed():
            await stub.StopRun(admin_pb2.StopRunRequest(run="nobody"))
    refused = bodies(whole(Place(tmp_path / "state", None)), "refused")
    denied = {"who": "viewer:v", "method": "/seqfed.v1.Admin/StopRun", "error": "NotAllowed"}
    assert refused == [
        *[denied] * 3,
        {"who": "operator:ops", "method": "/seqfed.v1.Admin/StopRun", "error": "UnknownRun"},
        {"who": "viewer:v", "more": 5},
    ]


async def test_the_head_is_logged_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="seqfed.server")
    async with a_daemon(tmp_path / "state") as daemon:
        await daemon.submit(make_spec())
    caplog.clear()
    async with a_daemon(tmp_path / "state"):
        await turns_until(lambda: any("audit log's head" in one.getMessage() for one in caplog.records))
    (line,) = [one.getMessage() for one in caplog.records if "audit log's head" in one.getMessage()]
    number, digest = chain.verify(whole(Place(tmp_path / "state", None)))
    assert line == f"the audit log's head is {number}:{digest.hex()}"


# Written behind


@pytest.fixture
async def written() -> AsyncIterator[tuple[Audit, list[Note], Callable[[bool], None]]]:
    notes: list[Note] = []
    away = False

    def write(more: Sequence[Note]) -> None:
        if away:
            raise StorageError("the database is away")
        notes.extend(more)

    def set_away(now: bool) -> None:
        nonlocal away
        away = now

    behind = Audit(write, lambda: (0, chain.START), 2)
    yield behind, notes, set_away
    await behind.close()


async def test_what_the_store_cannot_take_waits(
    written: tuple[Audit, list[Note], Callable[[bool], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    behind, notes, set_away = written
    monkeypatch.setattr(audit, "BEHIND_S", 0.0)
    monkeypatch.setattr(audit, "AGAIN_S", 0.0)
    set_away(True)
    behind.refused("client:a", "m", "NotAllowed")
    await asyncio.sleep(0.01)
    behind.refused("client:b", "m", "NotAllowed")
    assert notes == []
    set_away(False)
    await turns_until(lambda: len(notes) == 2)
    assert [one.body["who"] for one in notes] == ["client:a", "client:b"]


async def test_a_flood_of_many_members_takes_bounded_room(
    written: tuple[Audit, list[Note], Callable[[bool], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    behind, notes, _ = written
    monkeypatch.setattr(audit, "PEERS", 3)
    for number in range(100):
        behind.refused(f"client:{number % 50}", "m", "NotAllowed")
    await behind.close()
    named = [one.body for one in notes if "error" in one.body]
    assert len(named) == 3 * 2 + 2
    assert [one.body for one in notes if "more" in one.body] == [{"who": "others", "more": 92}]


async def test_all_strangers_share_one_allowance() -> None:
    """Whatever the number of their addresses: so many lines at once, then one a minute that says how many there were."""
    now, notes = 0.0, list[Note]()
    behind = Audit(notes.extend, lambda: (0, chain.START), 3, lambda: now)
    for minute in range(10):
        now = 60.0 * minute
        for number in range(1000):
            behind.refused(f"ipv4:192.0.2.{number % 256}", "m", "Unauthenticated")
        behind.refused("client:a", "m", "NotAllowed")  # a member is heard all the same
        now += 30.0
    await behind.close()
    lines = [one.body for one in notes if one.body["who"] != "client:a"]
    assert len(notes) - len(lines) == 3 + 1  # and how many more
    assert [one.get("more", 0) for one in lines] == [0, 0, 0, 997, *[999] * 8, 999]
    assert lines[3] == {"who": "ipv4:192.0.2.0", "method": "m", "error": "Unauthenticated", "more": 997}
    assert lines[-1] == {"who": "strangers", "more": 999}


# The command


def test_the_command(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(verify)
    place = a_place("sqlite", tmp_path)
    store = place.open()
    store.note(NOTES)
    number, digest = store.audit_head()
    run = CliRunner()
    where = ["--state", str(place.folder)]
    told = run.invoke(app, where)  # while a server holds it
    assert (told.exit_code, told.output) == (0, f"the audit log is whole: 5 entries; head 5:{digest.hex()}\n")
    head = f"{number}:{digest.hex()}"
    assert json.loads(run.invoke(app, [*where, "--json", "--head", head]).output) == {
        "entries": 5,
        "head": digest.hex(),
    }
    assert isinstance(run.invoke(app, [*where, "--head", "7"]).exception, SeqfedError)
    assert isinstance(run.invoke(app, ["--state", str(tmp_path / "none")]).exception, SeqfedError)
    store.close()
    with place.engine() as engine, engine.begin() as connection:
        connection.execute(sa.text("UPDATE audit SET body = '{}' WHERE number = 2"))
    assert isinstance(run.invoke(app, where).exception, AuditBroken)
