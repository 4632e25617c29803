"""The lease: of all servers that know a database, the one that may write it.

One row says who holds it and until when. Its holder renews it; another takes it over once it has ended, which adds one to
its term. Clocks and pauses make it possible that a holder does not know yet that it has been replaced, so the time alone
protects nothing: every transaction that writes looks at the row and fails if it is of another term (Kleppmann 2016, "How to
do distributed locking": a fencing token). Files carry the term in their names for the same reason.

A server that was killed and starts again need not wait: its predecessor's name tells machine, process and the moment at
which that process began, so it sees that nobody is there any more.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from seqfed.common.errors import LeaseLost, StorageError, StorageFull
from seqfed.server.database import Database

log = logging.getLogger("seqfed.server")

LEASE = sa.table(
    "lease", *(sa.column(name) for name in ("holder", "host", "pid", "address", "term", "expires", "store"))
)
LOOK_S: Final = 1.0  # between two looks of one that waits
LONGEST_S: Final = (
    3600.0  # settings allow no longer lease; one that ends later was written before the clock was set back
)

# Built once: they are part of every commit. On PostgreSQL nobody can take over before the transaction has ended; SQLite, which
# knows no FOR SHARE, has but one writer anyway, and SQLAlchemy leaves it out there.
CHECK = sa.select(LEASE.c.holder, LEASE.c.term).with_for_update(read=True)
LOCK = sa.select(LEASE).with_for_update()

_held: set[str] = set()  # the names of this process's own leases


@dataclass(frozen=True)
class Holder:
    """Who has the lease, for `left` seconds more."""

    name: str
    host: str
    pid: int
    address: str
    term: int
    expires: float
    left: float

    @property
    def pause(self) -> float:
        """Seconds until it is worth another look."""
        return max(0.01, min(LOOK_S, self.left))

    def __str__(self) -> str:
        where = f", {self.address}" if self.address else ""
        return f"process {self.pid} on {self.host}{where}"


class Lease:
    """This process's claim on the database. Blocking; `take` and `renew` are one small transaction each."""

    def __init__(self, database: Database, seconds: float) -> None:
        self._database = database
        self.seconds = seconds
        self.term = 0  # held now, or last
        self.address = ""
        self._name = f"{_machine()}/{os.getpid()}/{_began(os.getpid())}/{secrets.token_hex(4)}"

    def waiting(self, standby: bool) -> Iterator[Holder]:
        """Take the lease; yields who has it, for the caller to pause before the next look, and ends when it is taken.

        Raises StorageError if another server has it and lives; with `standby` never, but it goes on looking.
        """
        first: Holder | None = None
        while (holder := self._attempt(first if standby else None)) is not None:
            first = first or holder
            renewed = (holder.name, holder.expires) != (first.name, first.expires)
            if not standby and (renewed or _lives(holder.name)):
                raise StorageError(
                    f"another seqfed server uses this database or state folder ({holder}); stop it, or pass another "
                    "--state or --database, or --standby to wait and take over from it"
                )
            yield holder

    def _attempt(self, last: Holder | None) -> Holder | None:
        try:
            return self.take()
        except (StorageError, StorageFull):
            if last is None:
                raise
            return replace(last, left=LOOK_S)  # the database is away; that is for its holder to tell

    def holder(self) -> Holder | None:
        """Who has it now, whoever that is; None if nobody has."""
        with self._database.reading() as connection:
            row = connection.execute(sa.select(LEASE)).one()
            return self._holder(row, self._database.now(connection))

    def take(self) -> Holder | None:
        """Take the lease if it is free, expired or its holder is dead; otherwise who has it."""
        if (holder := self.holder()) is not None:  # most looks find it taken, and need no lock
            return holder
        taken = False
        _held.add(self._name)  # before anybody can read that it is the holder's
        try:
            with self._database.writing() as connection:
                row = connection.execute(LOCK).one()
                now = self._database.now(connection)
                if (holder := self._holder(row, now)) is not None:
                    return holder
                connection.execute(
                    LEASE.update().values(
                        holder=self._name,
                        host=socket.gethostname(),
                        pid=os.getpid(),
                        address=self.address,
                        term=row.term + 1,
                        expires=now + self.seconds,
                    )
                )
            taken = True
        finally:
            if not taken:
                _held.discard(self._name)
        self.term = row.term + 1
        if row.holder:
            log.info("taken over from process %d on %s, which did not release the database", row.pid, row.host)
        return None

    def _holder(self, row: sa.Row[tuple[object, ...]], now: float) -> Holder | None:
        if not row.holder or not 0 < row.expires - now <= LONGEST_S or _lives(row.holder) is False:
            return None
        return Holder(row.holder, row.host, row.pid, row.address, row.term, row.expires, row.expires - now)

    def check(self, connection: sa.Connection) -> None:
        """Raise LeaseLost unless it is still ours, and until this transaction ends stays so."""
        row = connection.execute(CHECK).one()
        if (row.holder, row.term) != (self._name, self.term):
            raise self._lost(connection)

    def renew(self) -> None:
        """Another span from now on, also if the last one is over and nobody has taken it. Raises LeaseLost."""
        with self._database.writing() as connection:
            expires = self._database.now(connection) + self.seconds
            if not self._update(connection, address=self.address, expires=expires):
                raise self._lost(connection)

    def release(self) -> None:
        """End it, if it is still ours."""
        with self._database.writing() as connection:
            self._update(connection, holder="", host="", pid=0, address="", expires=0.0)

    def _update(self, connection: sa.Connection, **values: object) -> bool:
        """Change the row, if it is ours; one statement, for to read and then write it could lock out a second reader."""
        mine = (LEASE.c.holder == self._name, LEASE.c.term == self.term)
        return connection.execute(LEASE.update().where(*mine).values(**values)).rowcount > 0

    def forget(self) -> None:
        """Have no more to do with it; to this process its holder is then dead, as if it had been killed."""
        _held.discard(self._name)

    def _lost(self, connection: sa.Connection) -> LeaseLost:
        row = connection.execute(sa.select(LEASE)).one()
        now = self._database.now(connection)
        holder = Holder(row.holder, row.host, row.pid, row.address, row.term, row.expires, row.expires - now)
        by = f"{holder} has taken over" if row.holder else "another server has had it since"
        return LeaseLost(
            f"this server's lease of its database is lost: {by}; it gave no sign of life for {self.seconds:g} s. "
            "Nothing saved is lost; start it with --standby to have it wait for its turn"
        )


def _lives(name: str) -> bool | None:
    """Whether the process that holds a lease under this name is alive; None if that cannot be seen from here."""
    machine, pid, began, _ = name.rsplit("/", 3)
    if machine != _machine():
        return None
    if int(pid) == os.getpid() and began == _began(os.getpid()):
        return name in _held
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's, but there
    there = _began(int(pid))
    return None if began and not there else there == began  # /proc may hide other users' processes


def _machine() -> str:
    """This machine since it was started and, in a container, this container: where a process number means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:  # not Linux
        return socket.gethostname()
    return f"{socket.gethostname()}/{boot}/{space}"


def _began(pid: int) -> str:
    """When this process began, in ticks since the machine did; "" where that is not told; "dead" of one not yet reaped."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "dead" if state in "ZX" else fields[18]  # proc(5): field 22, of which the first two are cut off
