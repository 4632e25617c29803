"""The audit log: an append-only, hash-chained table of what a federation must be able to answer for.

Entries are written by whoever holds the lease, in order; what a step of a run has to say stands in the step's own transaction,
so it is there if and only if the step is. Refusals are written behind, together, and no more of them than are worth reading:
a few a minute for each member, then one "and so many more". Strangers, of whom there are as many as there are addresses, have
one allowance together, and soon one line a minute: nobody can make the log grow who does not belong.

The chain (`seqfed.common.chain`) shows every change, but not that its end was cut off. Against that the server logs the head,
number and digest of the last entry, when it starts and once a day; `seqfed audit verify --head NUMBER:DIGEST` holds the table
against one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from seqfed.common.chain import START, digest
from seqfed.common.errors import ConfigError, LeaseLost, SeqfedError, StorageError
from seqfed.common.identity import Role
from seqfed.common.views import AuditEntry
from seqfed.server.database import Database, open_database

log = logging.getLogger("seqfed.server")

AUDIT = sa.table("audit", *(sa.column(name) for name in ("number", "at", "kind", "body", "digest")))
LAST = sa.select(AUDIT.c.number, AUDIT.c.digest).order_by(AUDIT.c.number.desc()).limit(1)
ADD = AUDIT.insert()
PAGE: Final = 500  # entries read at a time: one with 10,000 names has 200 KB
BEHIND_S: Final = 1.0  # that a refusal may wait for others, to be written with them
AGAIN_S: Final = 5.0  # before the next try, where the store could not take them
WAITING: Final = 10_000  # notes that may wait for a database that is away; there is no room for more
DAY_S: Final = 86_400.0
MINUTE_S: Final = 60.0
PEERS: Final = 1_000  # whose refusals are counted apart in a minute; all others share one count
MEMBERS: Final = frozenset(Role)  # with which their names begin
STRANGERS: Final = "strangers"  # who is known by an address only


class Kind(StrEnum):
    """What an entry is about."""

    ENROLLED = "enrolled"  # client, serial, until
    RENEWED = "renewed"  # the same
    REVOKED = "revoked"  # client, by, reason
    SUBMITTED = "submitted"  # run, name, spec (its digest), operator
    STOPPED = "stopped"  # run, by
    PAUSED = "paused"  # run, and by or reason
    RESUMED = "resumed"  # run, by
    COHORT = "cohort"  # run, round, attempt, clients
    COMMITTED = "committed"  # run, round, model (its digest), folded
    ENDED = "ended"  # run, phase, reason
    REFUSED = "refused"  # who, method, error; or more, how many others there were before
    PRIVACY = "privacy"  # run, round, client, epsilon


@dataclass(frozen=True)
class Note:
    """What an entry will say, once it has its place in the chain. `at`: seconds since the epoch."""

    kind: Kind
    body: dict[str, Any]
    at: float = field(default_factory=time.time)


def append(connection: sa.Connection, notes: Sequence[Note]) -> None:
    """Add these to the end of the chain, in the transaction of a writer that is alone."""
    last = connection.execute(LAST).one_or_none()
    number, before = (last.number, bytes(last.digest)) if last is not None else (0, START)
    rows = []
    for note in notes:
        number += 1
        body = json.dumps(note.body, sort_keys=True, separators=(",", ":"))
        before = digest(before, number, note.at, note.kind.value, body)
        rows.append({"number": number, "at": note.at, "kind": note.kind.value, "body": body, "digest": before})
    connection.execute(ADD, rows)


def page(database: Database, after: int, limit: int = PAGE) -> list[AuditEntry]:
    """The entries after the one of this number, at most `limit` of them."""
    query = sa.select(AUDIT).where(AUDIT.c.number > after).order_by(AUDIT.c.number).limit(limit)
    with database.reading() as connection:
        rows = connection.execute(query).all()
    return [AuditEntry(row.number, row.at, row.kind, _text(row.body), bytes(row.digest)) for row in rows]


def _text(body: str | bytes) -> str:
    """The body; bytes, which only somebody else can have put there, as a text that no digest fits."""
    return body if isinstance(body, str) else bytes(body).decode("utf-8", "backslashreplace") + "\0"


def head(database: Database) -> tuple[int, bytes]:
    """The number and digest of the last entry."""
    with database.reading() as connection:
        last = connection.execute(LAST).one_or_none()
    return (last.number, bytes(last.digest)) if last is not None else (0, START)


@contextlib.contextmanager
def reading(folder: Path, url: str | None) -> Iterator[Iterator[AuditEntry]]:
    """The whole log in a server's database, read past any server that writes it meanwhile.

    Raises ConfigError or StorageError if there is none, or it cannot be read.
    """
    if url is None and not (folder / "seqfed.db").exists():
        raise ConfigError(f"{folder} has no seqfed.db; name the server's --state folder or its --database")
    database = open_database(folder, url, migrate=False)
    try:
        if not database.has(AUDIT.name):
            raise StorageError("this database is of a version of seqfed that kept no audit log; start its server once")
        yield _pages(database)
    finally:
        database.close()


def _pages(database: Database) -> Iterator[AuditEntry]:
    after = 0
    while entries := page(database, after):
        yield from entries
        after = entries[-1].number


class Audit:
    """What the running server writes beside its steps.

    `write` puts notes into the store and `head` reads its last entry, both blocking; `per_minute`: refusals of one member
    that get an entry each; of all strangers so many at once, and then one a minute.
    """

    def __init__(
        self,
        write: Callable[[Sequence[Note]], None],
        head: Callable[[], tuple[int, bytes]],
        per_minute: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._clock = clock
        self._head = head
        self._per_minute = per_minute
        self._waiting: list[Note] = []
        self._writing: asyncio.Task[None] | None = None
        self._refused: dict[str, int] = {}  # in this minute, by peer
        self._left, self._left_at = (
            float(per_minute),
            clock(),
        )  # of the strangers' allowance, and when that was reckoned
        self._unheard = 0  # refusals of strangers since their last entry
        self._minute: asyncio.TimerHandle | None = None  # its end
        self._day: asyncio.TimerHandle | None = None
        self._telling: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def start(self) -> None:
        """Log the head, now and every day."""
        self._telling = asyncio.ensure_future(self._tell())
        self._day = asyncio.get_running_loop().call_later(DAY_S, self.start)

    async def _tell(self) -> None:
        try:
            number, last = await asyncio.to_thread(self._head)
        except SeqfedError as error:
            log.warning("the audit log's head could not be read: %s", error)
        else:
            log.info("the audit log's head is %d:%s", number, last.hex())

    def refused(self, peer: str, method: str, error: str) -> None:
        """Write soon that a call was refused; one of many of the same peer in a minute is only counted."""
        if self._minute is None and not self._closing.is_set():
            self._minute = asyncio.get_running_loop().call_later(MINUTE_S, self.sum_up)
        body: dict[str, Any] = {"who": peer, "method": method, "error": error}
        if peer.partition(":")[0] in MEMBERS:
            place = peer if peer in self._refused or len(self._refused) < PEERS else ""
            count = self._refused[place] = self._refused.get(place, 0) + 1
            if count <= self._per_minute:
                self._put(Note(Kind.REFUSED, body))
        elif self._allowed():
            if self._unheard:
                body["more"], self._unheard = self._unheard, 0
            self._put(Note(Kind.REFUSED, body))
        else:
            self._unheard += 1

    def _allowed(self) -> bool:
        """Whether another stranger may have an entry now."""
        now = self._clock()
        self._left = min(self._per_minute, self._left + (now - self._left_at) / MINUTE_S)
        self._left_at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def sum_up(self) -> None:
        """End the minute: of each peer that was refused more often than was written, how often."""
        if self._minute is not None:
            self._minute.cancel()
            self._minute = None
        for peer, count in self._refused.items():
            if count > self._per_minute:
                self._put(Note(Kind.REFUSED, {"who": peer or "others", "more": count - self._per_minute}))
        self._refused.clear()
        if self._unheard:
            self._put(Note(Kind.REFUSED, {"who": STRANGERS, "more": self._unheard}))
            self._unheard = 0

    def _put(self, note: Note) -> None:
        if len(self._waiting) < WAITING:
            self._waiting.append(note)
        if self._writing is None and not self._closing.is_set():
            self._writing = asyncio.ensure_future(self._write_behind())

    async def _write_behind(self) -> None:
        pause = BEHIND_S
        while self._waiting and not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), pause)
            pause = BEHIND_S if await self._flush() else AGAIN_S
        self._writing = None

    async def _flush(self) -> bool:
        """Write what waits; False if the store could not take it, and it waits on."""
        notes, self._waiting = self._waiting, []
        if notes:
            try:
                await asyncio.to_thread(self._write, notes)
            except LeaseLost:
                self._closing.set()  # whatever else there is to note is for the successor to see
            except SeqfedError as error:
                log.warning("%d entries of the audit log wait: %s", len(notes), error)
                self._waiting = [*notes, *self._waiting][:WAITING]
                return False
        return True

    async def close(self) -> None:
        """Write what waits, and nothing after it."""
        self.sum_up()
        self._closing.set()
        if self._day is not None:
            self._day.cancel()
        for task in (self._writing, self._telling):
            if task is not None:
                await asyncio.wait([task])
        await self._flush()
