"""Whether this client may do a task: whose run it is, what the data holder's policy says, and what was spent before.

Asked before anything is read or fetched for the task, and, in a run with differential privacy, once more before each release: an
update's noise is drawn, or it goes into a masked sum. What is spent is written down before it is spent, so a killed client has at
worst counted a little too much; where it cannot be written, the task is refused.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from blake3 import blake3

from seqfed.client import traffic
from seqfed.client.durable import Durable
from seqfed.client.policy import Policy, Released, Spent, check, check_promised, check_release, multiplier
from seqfed.common import identity, signing
from seqfed.common.config import load_toml
from seqfed.common.errors import NotAllowed, PolicyRefused, Unauthenticated
from seqfed.common.spec import RunSpec
from seqfed.common.views import Task, TaskKind

ACCOUNT: Final = "account.db"
# Modes in which an update has its noise from its making on, and in whatever sum it then is.
OWN_NOISE: Final = frozenset({"local", "example"})
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
    "CREATE TABLE IF NOT EXISTS specs (run TEXT PRIMARY KEY, digest BLOB NOT NULL) WITHOUT ROWID",
    # A ledger holds what was done, and under which rules; what epsilon that makes is computed when it is asked for.
    """CREATE TABLE IF NOT EXISTS private (
        run TEXT PRIMARY KEY, data TEXT NOT NULL, spec BLOB NOT NULL, noise REAL, round INTEGER NOT NULL
    )""",
    """CREATE TABLE IF NOT EXISTS releases (
        run TEXT NOT NULL, round INTEGER NOT NULL, model BLOB NOT NULL, number INTEGER NOT NULL,
        PRIMARY KEY (run, round, model, number)
    ) WITHOUT ROWID""",
    # of DP-SGD: what its account is made of
    """CREATE TABLE IF NOT EXISTS steps (
        run TEXT NOT NULL, noise REAL NOT NULL, rate REAL NOT NULL, steps INTEGER NOT NULL, PRIMARY KEY (run, noise, rate)
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

    def weigh(self, task: Task, operator: str, rule: Callable[[Spent], None], holds: bytes = b"") -> None:
        """Raise what `charge` would; nothing is noted."""
        with self._durable.changing() as database:
            _weigh(database, task, operator, rule, "", holds)

    def charge(
        self, task: Task, operator: str, rule: Callable[[Spent], None], data: str = "", holds: bytes = b""
    ) -> None:
        """Note that this task is done for this operator's run ('': nobody is known to have signed it), unless `rule` raises at
        what would then be spent. data: the data set's name, for the ledger. holds: BLAKE3 of the model that is there already.

        Raises PolicyRefused if the run is not the one that it was, or is another's copy. A release is noted by `release`; here
        `rule` sees the ledger with it, as far as it can be told beforehand.
        """
        run, signature = task.key.run, _signature(task, operator)
        with self._durable.changing() as database:
            begun, more, cost = _weigh(database, task, operator, rule, data, holds)
            if not begun:
                database.execute(
                    "INSERT INTO runs (run, operator, signature) VALUES (?, ?, ?)", (run, operator, signature)
                )
            database.execute("INSERT OR IGNORE INTO specs VALUES (?, ?)", (run, _digest(task)))
            if more:
                database.execute("INSERT INTO work VALUES (?, ?, ?, ?)", _work(task))
            column = _column(task.kind)
            database.execute(
                f"UPDATE runs SET {column} = {column} + ?, bytes = bytes + ? WHERE run = ?",  # noqa: S608 - one of two names
                (more, cost, run),
            )

    def add(self, task: Task, nbytes: int, rule: Callable[[int], None]) -> None:
        """Note that a task that is charged moves so many bytes more, unless `rule` raises at the sum of all runs."""
        with self._durable.changing() as database:
            rule(_spent(database, task.key.run, task.kind).bytes_total + nbytes)
            database.execute("UPDATE runs SET bytes = bytes + ? WHERE run = ?", (nbytes, task.key.run))

    def release(
        self,
        task: Task,
        number: int,
        rule: Callable[[Callable[[], Sequence[Released]]], None],
        data: str = "",
        noise: float | None = None,
        steps: tuple[float, float, int] | None = None,
    ) -> None:
        """Note what a training of a run with differential privacy gives away, unless `rule` raises at the ledger that has it.

        number: of the masked sum that it goes into, 0 without; the same update in the same sum is no other release. Where an
        update has noise of its own, each is one. noise: the run's multiplier, if it is known. steps: of DP-SGD, see `Released`.
        """
        with self._durable.changing() as database:
            _note(database, task, number, data, noise, steps)
            rule(lambda: _released(database))

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


def _weigh(
    database: sqlite3.Connection, task: Task, operator: str, rule: Callable[[Spent], None], data: str, holds: bytes
) -> tuple[bool, bool, int]:
    """Whether the run has begun, whether the task is another one than before, and its bytes; raises as `Account.charge`."""
    run = task.key.run
    _require_same(database, task, operator)
    begun = database.execute("SELECT 1 FROM runs WHERE run = ?", (run,)).fetchone() is not None
    known = database.execute(
        "SELECT 1 FROM work WHERE run = ? AND kind = ? AND round = ? AND model = ?", _work(task)
    ).fetchone()
    more = known is None
    cost = traffic.most(task, holds)
    spent = _spent(database, run, task.kind)
    rule(
        Spent(
            runs=spent.runs + (not begun),
            rounds=spent.rounds + more,
            rounds_total=spent.rounds_total + more,
            bytes_total=spent.bytes_total + cost,
            released=lambda: _supposed(database, task, data),
        )
    )
    return begun, more, cost


def _supposed(database: sqlite3.Connection, task: Task, data: str) -> tuple[Released, ...]:
    """The ledger with what the task will release, as far as that can be told before the data are read."""
    dp = task.spec.privacy.dp
    if task.kind is not TaskKind.TRAIN or dp is None or dp.mode == "example":
        return _released(database)
    if dp.mode in OWN_NOISE and _draws(database, task):  # the update that was made may be wanted once more
        return _released(database)
    database.execute("SAVEPOINT supposed")
    try:
        _note(database, task, 0 if task.masking is None else task.masking.number, data, dp.noise_multiplier, None)
        return _released(database)
    finally:
        database.execute("ROLLBACK TO supposed")


def _note(
    database: sqlite3.Connection,
    task: Task,
    number: int,
    data: str,
    noise: float | None,
    steps: tuple[float, float, int] | None,
) -> None:
    """As `Account.release`."""
    key, dp = task.key, task.spec.privacy.dp
    assert dp is not None  # or nothing of this is asked for
    row = (key.run, data, task.spec.canonical, noise, key.round)
    database.execute("INSERT OR IGNORE INTO private VALUES (?, ?, ?, ?, ?)", row)
    database.execute("UPDATE private SET round = max(round, ?) WHERE run = ?", (key.round, key.run))
    if dp.mode in OWN_NOISE:
        number = _draws(database, task) + 1
    database.execute(
        "INSERT OR IGNORE INTO releases VALUES (?, ?, ?, ?)", (key.run, key.round, task.model.digest, number)
    )
    if steps is not None:
        database.execute(
            "INSERT INTO steps VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET steps = steps + excluded.steps",
            (key.run, *steps),
        )


def _draws(database: sqlite3.Connection, task: Task) -> int:
    """The last number under which the task's round of its model has released something."""
    found: int = database.execute(
        "SELECT coalesce(max(number), 0) FROM releases WHERE run = ? AND round = ? AND model = ?",
        (task.key.run, task.key.round, task.model.digest),
    ).fetchone()[0]
    return found


def _released(database: sqlite3.Connection) -> tuple[Released, ...]:
    steps: dict[str, list[tuple[float, float, int]]] = {}
    for run, *one in database.execute("SELECT run, noise, rate, steps FROM steps"):
        steps.setdefault(run, []).append((one[0], one[1], one[2]))
    rows = database.execute(
        "SELECT run, data, spec, noise, private.round, count(*) FROM private JOIN releases USING (run) "
        "GROUP BY run ORDER BY private.rowid"
    ).fetchall()
    return tuple(
        Released(run, data, RunSpec.model_validate_json(spec), noise, round_, releases, tuple(steps.get(run, ())))
        for run, data, spec, noise, round_, releases in rows
    )


def _require_same(database: sqlite3.Connection, task: Task, operator: str) -> None:
    run, signature = task.key.run, _signature(task, operator)
    known = database.execute("SELECT operator, signature FROM runs WHERE run = ?", (run,)).fetchone()
    if known is not None and known != (operator, signature):
        raise PolicyRefused(f"the server shows run {run} with another signature than before; a run is signed once")
    pinned = database.execute("SELECT digest FROM specs WHERE run = ?", (run,)).fetchone()
    if pinned is not None and pinned[0] != _digest(task):
        raise PolicyRefused(
            f"the server shows run {run} with another specification than before; a run keeps the one that it was submitted with"
        )
    if signature and known is None:
        twin = database.execute("SELECT run FROM runs WHERE signature = ?", (signature,)).fetchone()
        if twin is not None:
            raise PolicyRefused(
                f"run {run} has the signature of run {twin[0]}: it is a copy that its operator has not submitted; "
                "submit it again to have it signed anew"
            )


def _work(task: Task) -> tuple[str, str, int, bytes]:
    return task.key.run, task.kind.value, task.key.round, task.model.digest


def _signature(task: Task, operator: str) -> bytes:
    return task.signature if operator else b""


def _digest(task: Task) -> bytes:
    return blake3(task.spec.canonical).digest()


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

    def __call__(self, task: Task, holds: bytes = b"") -> None:
        """holds: BLAKE3 of the model that the client has, which it need not fetch."""
        operator = self._operator(task)
        _require_told(task)
        policy = self.policy.model_copy(update={"custom": self.custom})

        def rule(spent: Spent, costly: bool) -> None:
            if task.key.round > task.spec.rounds:
                raise PolicyRefused(f"round {task.key.round:,} is asked for of a run with {task.spec.rounds:,} rounds")
            check(policy, task.spec, task.model.nbytes, operator, spent, costly=costly)

        if policy.min_noise is not None or policy.max_epsilon is not None:
            # What costs nothing first; then what takes a moment, at first, while nobody waits for the account.
            self._account.weigh(task, operator or "", lambda spent: rule(spent, False), holds)
            check_promised(policy, task.spec)
            multiplier(task.spec)  # it remembers it
        self._account.charge(task, operator or "", lambda spent: rule(spent, True), self._data, holds)

    def more(self, task: Task, nbytes: int | None = None) -> None:
        """The same before what could not be foreseen: the whole model where the steps to it fell short, another masked sum.

        nbytes: that are then moved; those of the answer if left out.
        """

        def rule(total: int) -> None:
            if (limit := self.policy.max_bytes_total) is not None and total > limit:
                raise PolicyRefused(
                    f"max_bytes_total: {total:,} bytes in all runs together, and the limit is {limit:,}"
                )

        self._account.add(task, traffic.answer(task) if nbytes is None else nbytes, rule)

    def release(self, task: Task, number: int, examples: int, fresh: bool = True) -> None:
        """The same before a training of a run with differential privacy, or what it has made, goes out once more.

        number: of the masked sum that it goes into, 0 without. examples: how many sequences it is of. fresh: it is to be made
        now, not the update that was made before.
        """
        spec, dp = task.spec, task.spec.privacy.dp
        if dp is None or (dp.mode in OWN_NOISE and not fresh):
            return
        noise, steps, own = dp.noise_multiplier, None, None
        if dp.mode == "example":
            from seqfed.common.dp import accounting

            own = examples
            rate, count = accounting.example_batches(spec, examples)
            alone = accounting.noise_multiplier(spec, examples)
            assert alone is not None  # it is known for so many sequences
            steps = (alone, rate, count)
        elif dp.mode != "central":  # whose noise is the server's; the others need it now
            noise = multiplier(spec)
        check_promised(self.policy, spec, own)
        self._account.release(
            task,
            number,
            lambda released: check_release(self.policy, spec, released, own),
            self._data,
            noise,
            steps,
        )

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


def _require_told(task: Task) -> None:
    """Raise PolicyRefused for sums over the data, which have no noise, that the run does not have."""
    spec = task.spec
    public = spec.privacy.dp is None or spec.privacy.dp.is_public
    if task.kind is TaskKind.EVALUATE and not (public and spec.evaluation.every):
        why = "says privacy.dp.evaluation = 'refuse'" if not public else "has evaluation.every = 0"
        raise PolicyRefused(f"the server asks for scores of a run that {why}")
    if task.kind is TaskKind.MEASURE and not (public and spec.data.normalise == "federated"):
        why = "says privacy.dp.evaluation = 'refuse'" if not public else f"has data.normalise = '{spec.data.normalise}'"
        raise PolicyRefused(f"the server asks for statistics of the data of a run that {why}")


def consent_of(
    policy: Path | None, state: Path, credentials: Path | None, allow_custom: tuple[str, ...] = (), data: str = ""
) -> Consent:
    """By the policy.toml, the state folder and the credentials folder of a client; raises ConfigError for the first and last."""
    rules = None if policy is None else load_toml(Policy, policy)
    ca = None if credentials is None else identity.load_credentials(credentials).ca
    return Consent(rules, state, ca, allow_custom, data=data)
