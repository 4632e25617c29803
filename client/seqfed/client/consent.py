"""Whether this client may do a task: whose run it is, what the data holder's policy says, and what was spent before.

Asked before anything is read or fetched for the task. What is spent is written down before it is spent, so a killed client
has at worst counted a little too much; where it cannot be written, the task is refused.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Final

from seqfed.client.durable import Durable
from seqfed.client.policy import Policy, Released, Spent, check, multiplier
from seqfed.common import identity, signing
from seqfed.common.config import load_toml
from seqfed.common.errors import NotAllowed, PolicyRefused, Unauthenticated
from seqfed.common.spec import RunSpec
from seqfed.common.views import Task, TaskKind

ACCOUNT: Final = "account.db"
_TABLES: Final = (
    """CREATE TABLE IF NOT EXISTS runs (
        run TEXT PRIMARY KEY, operator TEXT NOT NULL, signature BLOB NOT NULL,
        trained INTEGER NOT NULL DEFAULT 0, evaluated INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0
    )""",
    "CREATE INDEX IF NOT EXISTS by_signature ON runs (signature)",
    """CREATE TABLE IF NOT EXISTS work (
        run TEXT NOT NULL, kind TEXT NOT NULL, round INTEGER NOT NULL, model BLOB NOT NULL,
        PRIMARY KEY (run, kind, round, model)
    ) WITHOUT ROWID""",
    # A ledger holds what was done, and under which rules; what epsilon that makes is computed when it is asked for.
    """CREATE TABLE IF NOT EXISTS private (
        run TEXT PRIMARY KEY, data TEXT NOT NULL, spec BLOB NOT NULL, noise REAL, round INTEGER NOT NULL
    )""",
    """CREATE TABLE IF NOT EXISTS releases (
        run TEXT NOT NULL, round INTEGER NOT NULL, model BLOB NOT NULL, number INTEGER NOT NULL,
        PRIMARY KEY (run, round, model, number)
    ) WITHOUT ROWID""",
)


class Account:
    """What runs have had of this data holder, in a file of the client's state folder; every change is on disk when it returns.

    One account, whoever the runs' operators are: how much of it is whose is a detail. Raises StorageFull or StorageError where
    it cannot be kept.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ACCOUNT
        self._durable = Durable(
            self.path,
            _TABLES,
            without="what this run gets cannot be written down, and it gets nothing",
            remedy="put the file back from a copy, or, if it may all begin anew, remove it",
        )

    def charge(self, task: Task, operator: str, rule: Callable[[Spent], None], data: str = "") -> None:
        """Note that this task is done for this operator's run ('': nobody is known to have signed it), unless `rule` raises at
        what would then be spent. data: the data set's name, for the ledger.

        Raises PolicyRefused if the run is not the one that it was, or is another's copy.
        """
        run, signature = task.key.run, task.signature if operator else b""
        noise = multiplier(task.spec)  # takes a moment, the first time
        work = (run, task.kind.value, task.key.round, task.model.digest)
        with self._durable.changing() as database:
            _require_same(database, run, operator, signature)
            begun = database.execute("SELECT 1 FROM runs WHERE run = ?", (run,)).fetchone() is not None
            known = database.execute(
                "SELECT 1 FROM work WHERE run = ? AND kind = ? AND round = ? AND model = ?", work
            ).fetchone()
            more = known is None
            cost = task.model.nbytes * (2 if task.kind is TaskKind.TRAIN else 1)
            spent = _spent(database, run, task.kind)
            _release(database, task, data, noise)
            rule(
                Spent(
                    runs=spent.runs + (not begun),
                    rounds=spent.rounds + more,
                    rounds_total=spent.rounds_total + more,
                    bytes_total=spent.bytes_total + cost,
                    released=lambda: _released(database),
                )
            )
            if not begun:
                database.execute(
                    "INSERT INTO runs (run, operator, signature) VALUES (?, ?, ?)", (run, operator, signature)
                )
            if more:
                database.execute("INSERT INTO work VALUES (?, ?, ?, ?)", work)
            column = _column(task.kind)
            database.execute(
                f"UPDATE runs SET {column} = {column} + ?, bytes = bytes + ? WHERE run = ?",  # noqa: S608 - one of two names
                (more, cost, run),
            )

    def total(self) -> Spent:
        """What all runs together have had; `rounds` is 0. Of trainings and evaluations, `rounds_total` is the larger number."""
        return self._sums("''").get("", Spent(0, 0, 0, 0))

    def operators(self) -> dict[str, Spent]:
        """How much of `total` each operator's runs have had, by its name, '' for those that nobody has signed."""
        return self._sums("operator")

    def _sums(self, whose: str) -> dict[str, Spent]:
        if not self.path.exists():
            return {}
        with self._durable.changing() as database:
            rows = database.execute(
                f"SELECT {whose} AS whose, count(*), max(sum(trained), sum(evaluated)), sum(bytes) FROM runs GROUP BY whose"  # noqa: S608 - a column or a constant
            ).fetchall()
        return {name: Spent(runs, 0, rounds, size) for name, runs, rounds, size in rows}

    def released(self) -> tuple[Released, ...]:
        """The ledger of differential privacy: every run with it that this data holder has given something, oldest first."""
        if not self.path.exists():
            return ()
        with self._durable.changing() as database:
            return _released(database)

    def close(self) -> None:
        self._durable.close()


def _release(database: sqlite3.Connection, task: Task, data: str, noise: float | None) -> None:
    """Note what a training gives away with noise; the same update sent again is no other one, but in another masked sum is."""
    if task.kind is not TaskKind.TRAIN or task.spec.privacy.dp is None:
        return
    key, number = task.key, task.masking.number if task.masking is not None else 0
    known = database.execute("SELECT 1 FROM private WHERE run = ?", (key.run,)).fetchone()
    if known is None:
        row = (key.run, data, task.spec.canonical, noise, key.round)
        database.execute("INSERT INTO private VALUES (?, ?, ?, ?, ?)", row)
    database.execute("UPDATE private SET round = max(round, ?) WHERE run = ?", (key.round, key.run))
    database.execute(
        "INSERT OR IGNORE INTO releases VALUES (?, ?, ?, ?)", (key.run, key.round, task.model.digest, number)
    )


def _released(database: sqlite3.Connection) -> tuple[Released, ...]:
    rows = database.execute(
        "SELECT run, data, spec, noise, private.round, count(*) FROM private JOIN releases USING (run) "
        "GROUP BY run ORDER BY private.rowid"
    ).fetchall()
    return tuple(
        Released(run, data, RunSpec.model_validate_json(spec), noise, round_, releases)
        for run, data, spec, noise, round_, releases in rows
    )


def _require_same(database: sqlite3.Connection, run: str, operator: str, signature: bytes) -> None:
    known = database.execute("SELECT operator, signature FROM runs WHERE run = ?", (run,)).fetchone()
    if known is not None and known != (operator, signature):
        raise PolicyRefused(f"the server shows run {run} with another signature than before; a run is signed once")
    if signature and known is None:
        twin = database.execute("SELECT run FROM runs WHERE signature = ?", (signature,)).fetchone()
        if twin is not None:
            raise PolicyRefused(
                f"run {run} has the signature of run {twin[0]}: it is a copy that its operator has not submitted; "
                "submit it again to have it signed anew"
            )


def _spent(database: sqlite3.Connection, run: str, kind: TaskKind) -> Spent:
    """Before the task: all other runs and this one, if it has begun."""
    column = _column(kind)
    runs, rounds_total, bytes_total = database.execute(
        f"SELECT count(*), coalesce(sum({column}), 0), coalesce(sum(bytes), 0) FROM runs"  # noqa: S608 - one of two names
    ).fetchone()
    row = database.execute(f"SELECT {column} FROM runs WHERE run = ?", (run,)).fetchone()  # noqa: S608 - one of two names
    return Spent(runs, 0 if row is None else row[0], rounds_total, bytes_total)


def _column(kind: TaskKind) -> str:
    return "trained" if kind is TaskKind.TRAIN else "evaluated"


class Consent:
    """What a session asks before each task; raises PolicyRefused, StorageFull or StorageError if it is not to be done.

    policy: None allows everything, but over TLS what nobody has signed. ca: the federation's, PEM; None in plaintext, where no
    signature can be judged. clock: the time in UTC. data: the data set's name in the client's ledger.
    """

    def __init__(
        self,
        policy: Policy | None,
        state: Path,
        ca: bytes | None,
        allow_custom: tuple[str, ...] = (),
        clock: Callable[[], datetime] = identity.now,
        data: str = "",
    ) -> None:
        self.policy = Policy() if policy is None else policy
        self.custom = (*allow_custom, *self.policy.custom)
        self._account = Account(state)  # also without a policy: one that is made later counts what was had before
        self._ca = ca
        self._clock = clock
        self._data = data
        self._last: tuple[bytes, bytes, bytes, str] | None = None  # what was verified last, and whose it is

    def __call__(self, task: Task) -> None:
        operator = self._operator(task)
        policy = self.policy.model_copy(update={"custom": self.custom})

        def rule(spent: Spent) -> None:
            if task.key.round > task.spec.rounds:
                raise PolicyRefused(f"round {task.key.round:,} is asked for of a run with {task.spec.rounds:,} rounds")
            check(policy, task.spec, task.model.nbytes, operator, spent)

        self._account.charge(task, operator or "", rule, self._data)

    def _operator(self, task: Task) -> str | None:
        """Whose run it is by its signature; None if nobody's is there, or none can be judged."""
        if self._ca is None:
            return None
        if not task.signature:
            if self.policy.unsigned:
                return None
            raise PolicyRefused(
                "unsigned: nobody has signed this run, although the server has certificates; submit it with an operator's "
                "credentials, or allow it with unsigned = true in policy.toml"
            )
        shown = (task.certificate, task.signature, task.spec.canonical)
        if self._last is None or self._last[:3] != shown:  # a run that has begun may outlive its operator's certificate
            try:
                who = signing.verify(task.certificate, self._ca, task.spec.canonical, task.signature, self._clock())
            except (Unauthenticated, NotAllowed) as error:
                raise PolicyRefused(f"the run's signature: {error}") from error
            self._last = (*shown, who.name)
        return self._last[3]


def consent_of(
    policy: Path | None, state: Path, credentials: Path | None, allow_custom: tuple[str, ...] = (), data: str = ""
) -> Consent:
    """By the policy.toml, the state folder and the credentials folder of a client; raises ConfigError for the first and last."""
    rules = None if policy is None else load_toml(Policy, policy)
    ca = None if credentials is None else identity.load_credentials(credentials).ca
    return Consent(rules, state, ca, allow_custom, data=data)
