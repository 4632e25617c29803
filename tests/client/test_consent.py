"""What a session asks before each task: whose run it is, and an account of what was spent that outlives whatever happens."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from seqfed.client.consent import Account, Consent
from seqfed.client.policy import Policy, Released, Spent
from seqfed.client.policy import account as added_up
from seqfed.common import authority, identity, signing, wire
from seqfed.common.authority import Authority
from seqfed.common.config import validate, validate_json
from seqfed.common.dp import accounting
from seqfed.common.errors import PolicyRefused, StorageError, StorageFull
from seqfed.common.identity import Credentials, Role
from seqfed.common.spec import RunSpec
from seqfed.common.views import ModelVersion, Task, TaskKey, TaskKind
from seqfed.v1.federation_pb2 import Task as Message

NOW = identity.now()
SPEC = validate(RunSpec, {"data": {"features": 3, "classes": 2}, "rounds": 5}, "test")
TASK = Task(TaskKind.TRAIN, TaskKey("run-1", 1, 1), SPEC, ModelVersion(0, 400, b"model 0", b"layout"))


def rules(**content: Any) -> Policy:
    return validate(Policy, content, "policy.toml")


def nth(number: int, task: Task = TASK, *, run: str | None = None, attempt: int = 1) -> Task:
    """The training of a round, from the model of the one before."""
    key = TaskKey(run or task.key.run, number, attempt)
    return replace(task, key=key, model=replace(task.model, version=number - 1, digest=b"model %d" % (number - 1)))


def scoring(number: int) -> Task:
    task = nth(number)
    return replace(task, kind=TaskKind.EVALUATE, model=replace(task.model, version=number, digest=b"model %d" % number))


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority.create(tmp_path_factory.mktemp("ca"), NOW)


@pytest.fixture(scope="module")
def anna(ca: Authority) -> Credentials:
    return ca.credentials(Role.OPERATOR, "anna", now=NOW, days=10)


def signed(task: Task, who: Credentials) -> Task:
    return replace(task, signature=signing.sign(task.spec.canonical, who.key), certificate=who.certificate)


# What is spent ------------------------------------------------------------------------------------------------------------


def spent(account: Account, task: Task, operator: str = "anna") -> Spent:
    seen: list[Spent] = []
    account.charge(task, operator, seen.append)
    (found,) = seen
    return found


def test_each_model_of_each_run_counts_once_and_bytes_each_time(tmp_path: Path) -> None:
    account = Account(tmp_path)
    assert spent(account, nth(1)) == Spent(1, 1, 1, 800)
    assert spent(account, nth(1)) == Spent(1, 1, 1, 1600)  # the same again, after a restart
    assert spent(account, nth(1, attempt=2)) == Spent(1, 1, 1, 2400)
    assert spent(account, nth(2)) == Spent(1, 2, 2, 3200)
    assert spent(account, scoring(1)) == Spent(1, 1, 1, 3600)
    assert spent(account, nth(1, run="run-2")) == Spent(2, 1, 3, 4400)
    assert spent(account, nth(1, run="run-3"), "berta") == Spent(3, 1, 4, 5200)
    assert spent(account, nth(1, run="run-4"), "") == Spent(4, 1, 5, 6000)
    assert account.operators() == {"anna": Spent(2, 0, 3, 4400), "berta": Spent(1, 0, 1, 800), "": Spent(1, 0, 1, 800)}
    assert account.total() == Spent(4, 0, 5, 6000)


def test_another_model_under_the_same_round_is_another_round(tmp_path: Path) -> None:
    account = Account(tmp_path)
    spent(account, nth(1))
    other = replace(nth(1), model=replace(TASK.model, digest=b"made to measure"))
    assert spent(account, other).rounds == 2


def test_a_refused_task_has_spent_nothing(tmp_path: Path) -> None:
    account = Account(tmp_path)
    spent(account, nth(1))

    def refuse(_: Spent) -> None:
        raise PolicyRefused("no")

    for task in (nth(1), nth(2), nth(1, run="run-2")):
        with pytest.raises(PolicyRefused):
            account.charge(task, "anna", refuse)
    assert spent(account, nth(2)) == Spent(1, 2, 2, 1600)


def test_a_restart_forgets_nothing(tmp_path: Path) -> None:
    account = Account(tmp_path)
    for number in range(1, 4):
        assert spent(account, nth(number)) == Spent(1, number, number, 800 * number)
        account.close()
        account = Account(tmp_path)
    assert stat.S_IMODE(account.path.stat().st_mode) == 0o600


CHARGING = """
import sys
from pathlib import Path
from seqfed.client.consent import Account
from tests.client.test_consent import nth
account = Account(Path(sys.argv[1]))
for number in range(1, 100_000):
    account.charge(nth(number), "anna", lambda _: None)
    print(number, flush=True)
"""


@pytest.mark.parametrize("lines", [1, 7, 23])
def test_a_killed_client_has_forgotten_nothing(tmp_path: Path, lines: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", CHARGING, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        told += [int(line) for line in process.stdout.read().split()]
    found = Account(tmp_path).operators()["anna"]
    assert len(told) <= found.rounds_total <= len(told) + 1
    assert found.bytes_total == 800 * found.rounds_total


def test_a_full_disk_refuses_and_forgets_nothing(tmp_path: Path) -> None:
    account = Account(tmp_path)
    spent(account, nth(1))
    database = account._durable._connection
    assert database is not None
    pages = database.execute("PRAGMA page_count").fetchone()[0]
    database.execute(f"PRAGMA max_page_count = {pages}")
    done = [1]

    def go_on() -> None:
        for number in range(2, 10_000):
            spent(account, nth(number))
            done.append(number)

    with pytest.raises(StorageFull, match="what this run gets cannot be written down, and it gets nothing; free some"):
        go_on()
    account.close()
    assert Account(tmp_path).operators()["anna"].rounds_total == len(done)


@pytest.mark.parametrize("harm", ["garbage", "folder", "missing folder", "other tables"])
def test_an_account_that_cannot_be_read_refuses(harm: str, tmp_path: Path) -> None:
    folder = tmp_path / "none" if harm == "missing folder" else tmp_path
    account = Account(folder)
    if harm == "garbage":
        account.path.write_bytes(b"not a database at all" * 100)
    elif harm == "folder":
        account.path.mkdir()
    elif harm == "other tables":
        with sqlite3.connect(account.path) as database:
            database.execute("CREATE TABLE runs (run, operator, signature)")
        database.close()
    with pytest.raises(StorageError, match=r"account\.db: .*, so what this run gets cannot be written down"):
        spent(account, nth(1))


def test_another_process_that_reads_it_is_waited_for(tmp_path: Path) -> None:
    account, reader = Account(tmp_path), Account(tmp_path)
    spent(account, nth(1))
    assert reader.operators() == account.operators()
    assert spent(account, nth(2)).rounds == 2


# Differential privacy ----------------------------------------------------------------------------------------------------


def private(*, secure: bool = False, rounds: int = 50, every: int = 0, **dp: Any) -> RunSpec:
    content: dict[str, Any] = {
        "data": {"features": 3, "classes": 2},
        "rounds": rounds,
        "aggregation": {"weighting": "uniform"},
        "evaluation": {"every": every},
        "cohort": {"min_clients": 5, "count": 5},
        "privacy": {"secure_aggregation": secure, "dp": {"mode": "central", "delta": 1e-5, **dp}},
    }
    return validate(RunSpec, content, "test")


def given(account: Account, task: Task, number: int = 0, data: str = "", **steps: Any) -> None:
    """A release of the task, which nothing forbids."""
    dp = task.spec.privacy.dp
    assert dp is not None
    account.release(task, number, lambda _: None, data, dp.noise_multiplier, **steps)


def test_the_ledger_has_every_release_once_over_runs_and_restarts(tmp_path: Path) -> None:
    spec = private(noise_multiplier=4.0)
    task = replace(TASK, spec=spec)
    account = Account(tmp_path)
    for number in (1, 2, 2, 3):  # the same update sent again gives nothing more away
        given(account, nth(number, task), data="wards.csv")
    account.close()
    account = Account(tmp_path)
    given(account, nth(7, task, run="run-2"), data="beds.csv")
    first, second = account.released()
    assert (first.run, first.data, first.noise, first.round, first.releases) == ("run-1", "wards.csv", 4.0, 3, 3)
    assert (second.run, second.data, second.round, second.releases) == ("run-2", "beds.csv", 7, 1)
    (whole,) = added_up([first, second])
    assert whole.epsilon == accounting.gaussian_epsilon(
        4.0 / 2, 1e-5
    )  # four Gaussian releases are one of half the noise
    assert (whole.unit, whole.delta) == ("client", 1e-5)


def test_neither_an_evaluation_nor_a_run_without_noise_is_in_the_ledger(tmp_path: Path) -> None:
    public = private(noise_multiplier=4.0, evaluation="public", every=1)
    ask = Consent(None, tmp_path, None)
    ask(replace(scoring(3), spec=public))
    ask(nth(1, run="run-3"))
    ask.release(nth(1, run="run-3"), 0, 10)
    assert Account(tmp_path).released() == ()


def test_another_masked_sum_of_the_same_update_is_another_release(tmp_path: Path) -> None:
    task = replace(TASK, spec=private(secure=True, noise_multiplier=2.0))
    ask = Consent(None, tmp_path, None)
    for number, fresh in ((1, True), (1, False), (4, False)):
        ask.release(task, number, 10, fresh)
    (found,) = Account(tmp_path).released()
    assert (found.round, found.releases) == (1, 2)


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("mode", ["local", "example"])
def test_each_noise_that_is_drawn_for_an_update_is_a_release(mode: str, secure: bool, tmp_path: Path) -> None:
    task = replace(TASK, spec=private(secure=secure, mode=mode, noise_multiplier=8.0))
    for _ in range(3):
        ask = Consent(None, tmp_path, None)  # a client that was started again draws anew
        ask.release(task, 1, 100)
        ask.release(task, 1, 100, fresh=False)  # the very same update
        ask.release(task, 2, 100, fresh=False)
    (found,) = Account(tmp_path).released()
    assert found.releases == 3
    (whole,) = added_up([found])
    assert whole.epsilon == pytest.approx(accounting.spent(task.spec, 3, 8.0, None, 100), rel=1e-9)


def test_what_is_asked_of_a_task_has_not_been_released_yet(tmp_path: Path) -> None:
    account, seen = Account(tmp_path), list[int]()

    def rule(found: Spent) -> None:
        seen.extend(one.releases for one in found.released())

    for number in (1, 1, 2):
        account.charge(nth(number, replace(TASK, spec=private(noise_multiplier=2.0))), "anna", rule)
    assert seen == [1, 1, 1]  # the one in question counts
    assert account.released() == ()


def test_a_release_that_is_refused_is_not_in_the_ledger(tmp_path: Path) -> None:
    def refuse(found: Callable[[], Sequence[Released]]) -> None:
        assert [one.releases for one in found()] == [1]  # the one in question counts
        raise PolicyRefused("no")

    account = Account(tmp_path)
    with pytest.raises(PolicyRefused):
        account.release(replace(TASK, spec=private(noise_multiplier=2.0)), 0, refuse)
    assert account.released() == ()


def go_through(policy: Policy | None, folder: Path, tasks: Iterable[Task], examples: int = 100) -> int:
    """How many of these are trained, each by a client that was started again, until one is refused for its epsilon."""
    done = 0
    for task in tasks:
        ask = Consent(policy, folder, None)
        try:
            ask(task)
            ask.release(task, 0 if task.masking is None else task.masking.number, examples)
            done += 1
        except PolicyRefused as error:
            assert "max_epsilon: all runs together, with this round, have " in str(error)
    return done


def test_the_limit_of_epsilon_holds_over_runs_and_restarts(tmp_path: Path) -> None:
    spec = private(noise_multiplier=3.0, rounds=8)
    limit = accounting.spent(spec, 12, 3.0) * 1.0001
    tasks = [
        nth(number, replace(TASK, spec=spec), run=run) for run in ("run-1", "run-2", "run-3") for number in range(1, 9)
    ]
    assert go_through(rules(max_epsilon=limit, unsigned=True), tmp_path, tasks) == 12


def test_what_would_pass_the_limit_is_refused_before_the_data_are_read(tmp_path: Path) -> None:
    task = replace(TASK, spec=private(noise_multiplier=3.0, rounds=2))
    ask = Consent(rules(max_epsilon=accounting.spent(task.spec, 2, 3.0) * 1.0001), tmp_path, None)
    for number in (1, 2):
        ask(nth(number, task))
        ask.release(nth(number, task), 0, 10)
    ask(nth(2, task))  # which is known
    with pytest.raises(PolicyRefused, match="max_epsilon: all runs together, with this round, have epsilon "):
        ask(nth(1, task, run="run-2"))


def test_an_update_that_was_made_may_be_sent_again_when_all_is_spent(tmp_path: Path) -> None:
    task = replace(TASK, spec=private(mode="local", noise_multiplier=30.0, rounds=1))
    limit = accounting.spent(task.spec, 1, 30.0) * 1.0001
    ask = Consent(rules(max_epsilon=limit), tmp_path, None)
    ask(task)
    ask.release(task, 0, 10)
    ask(task)
    ask.release(task, 0, 10, fresh=False)
    with pytest.raises(PolicyRefused, match="max_epsilon"):
        ask.release(task, 0, 10)
    assert [one.releases for one in Account(tmp_path).released()] == [1]


def test_a_run_that_plans_more_than_the_limit_never_begins(tmp_path: Path) -> None:
    spec = private(noise_multiplier=3.0, rounds=50)
    consent = Consent(rules(max_epsilon=accounting.spent(spec, 49, 3.0)), tmp_path, None)
    with pytest.raises(PolicyRefused, match="max_epsilon: the run's epsilon is .*, and the limit is"):
        consent(replace(TASK, spec=spec))
    with pytest.raises(PolicyRefused, match="max_epsilon: the run has no epsilon"):
        consent(TASK)
    with pytest.raises(PolicyRefused, match="min_noise: the run's noise is 3, and the least is 4"):
        Consent(rules(min_noise=4.0), tmp_path, None)(replace(TASK, spec=spec))


# Of single sequences each client keeps the only account that there is.


def test_examples_are_an_account_of_their_own(tmp_path: Path) -> None:
    ask = Consent(None, tmp_path, None)
    runs = [(private(mode="example", epsilon=2.0, rounds=2), 500), (private(mode="example", noise_multiplier=1.5), 80)]
    history = []
    for place, (spec, examples) in enumerate(runs):
        for number in (1, 2):
            ask.release(nth(number, replace(TASK, spec=spec), run=f"run-{place}"), 0, examples)
        noise = accounting.noise_multiplier(spec, examples)
        rate, steps = accounting.example_batches(spec, examples)
        history.append((noise, rate, 2 * steps))
    given(Account(tmp_path), replace(TASK, spec=private(noise_multiplier=4.0), key=TaskKey("run-9", 1, 1)))
    of_clients, found = added_up(Account(tmp_path).released())
    assert (of_clients.unit, found.unit, found.delta) == ("client", "example", 1e-5)
    opacus = importlib.import_module("opacus.accountants").RDPAccountant()
    opacus.history = history
    assert found.epsilon == pytest.approx(opacus.get_epsilon(1e-5), rel=1e-9)
    # the runs' goals, added up, were never what was spent
    first, second = (added_up([one])[0].epsilon for one in Account(tmp_path).released()[:2])
    assert first is not None
    assert second is not None
    assert found.epsilon is not None
    assert max(first, second) < found.epsilon < first + second
    assert first <= 2.0


@pytest.mark.parametrize("given_", [{"epsilon": 2.0}, {"noise_multiplier": 3.0}])
def test_of_single_sequences_too_a_run_has_no_more_than_the_limit(given_: dict[str, Any], tmp_path: Path) -> None:
    """A server that asks for the same rounds of ever other models."""
    spec = private(mode="example", rounds=2, **given_)
    planned = accounting.plan(spec, 500).epsilon
    assert planned is not None
    tasks = [
        replace(nth(1 + number % 2, replace(TASK, spec=spec)), model=replace(TASK.model, digest=b"other %d" % number))
        for number in range(9)
    ]
    limit = max(planned, given_.get("epsilon", 0.0)) * 1.0001
    assert go_through(rules(max_epsilon=limit), tmp_path, tasks, 500) == 2
    (found,) = added_up(Account(tmp_path).released())
    assert found.epsilon == pytest.approx(planned, rel=1e-9)


def test_what_one_is_told_of_single_sequences_has_no_figure_of_the_data(tmp_path: Path) -> None:
    spec = private(mode="example", rounds=2, noise_multiplier=3.0)
    planned = accounting.plan(spec, 500).epsilon
    assert planned is not None
    ask, told = Consent(rules(max_epsilon=planned * 1.0001), tmp_path, None), list[str]()
    for examples in (400, 500, 500, 500):
        try:
            ask.release(replace(TASK, spec=spec), 0, examples)
        except PolicyRefused as error:
            told.append(str(error))
    first, second = told
    assert first == (
        "max_epsilon: the run's epsilon is not enough, or too much, for as many sequences as are here, and the limit is "
        f"{planned * 1.0001:g}"
    )
    assert second.startswith(
        "max_epsilon: all runs together, with this round, have a larger epsilon (delta 1e-05, unit ex"
    )
    with pytest.raises(PolicyRefused, match="min_noise: the run's noise is 3, and the least is 9"):
        Consent(rules(min_noise=9.0), tmp_path, None)(replace(TASK, spec=spec))  # which the operator knows as well


def test_a_run_of_single_sequences_with_too_large_a_goal_never_begins(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefused, match="max_epsilon: the run's epsilon is 3, and the limit is 2"):
        Consent(rules(max_epsilon=2.0), tmp_path, None)(replace(TASK, spec=private(mode="example", epsilon=3.0)))


def test_what_a_tree_has_taken_in_counts_to_its_end(tmp_path: Path) -> None:
    """The noise of later rounds is given together with the client's update of the first."""
    spec = private(mechanism="ftrl", participations=1, noise_multiplier=4.0, rounds=1000)
    task = replace(TASK, spec=spec)
    whole = accounting.spent(spec, 1000, 4.0, 1)
    ask = Consent(None, tmp_path, None)
    ask.release(task, 0, 10)
    assert added_up(Account(tmp_path).released())[0].epsilon == whole
    limit = accounting.together([(spec, 1000, 4.0, 1)] * 3, 1e-5)[0] * 1.0001
    tasks = [nth(1, task, run=f"other-{place}") for place in range(5)]
    assert go_through(rules(max_epsilon=limit), tmp_path, tasks) == 2  # with the one of before


@pytest.mark.parametrize("policy", [{"max_rounds": 10}, {"runs": ["sepsis"]}, {"max_rounds_total": 0}])
def test_what_costs_nothing_is_asked_first(
    policy: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run may be made so that its accounting takes long."""

    def solve(_: object) -> None:
        raise AssertionError("the noise was solved for")

    monkeypatch.setattr(accounting, "solve", solve)
    task = replace(TASK, spec=private(epsilon=2.75, rounds=77))
    (rule,) = policy
    with pytest.raises(PolicyRefused, match=f"^{rule}: [^;]*$"):
        Consent(rules(**policy, max_epsilon=1.0, min_noise=1.0), tmp_path, None)(task)
    ask = Consent(rules(max_rounds=100), tmp_path, None)
    ask(task)
    ask.release(task, 0, 10)  # the server's noise, which nobody asks for here
    assert [one.releases for one in Account(tmp_path).released()] == [1]


@pytest.mark.parametrize("kind", [TaskKind.EVALUATE, TaskKind.MEASURE])
@pytest.mark.parametrize("mode", ["central", "local", "example"])
def test_no_sum_over_the_data_leaves_a_private_run_without_noise(mode: str, kind: TaskKind, tmp_path: Path) -> None:
    spec = private(mode=mode, epsilon=2.0)
    what = {TaskKind.EVALUATE: "scores", TaskKind.MEASURE: "statistics of the data"}[kind]
    ask = Consent(None, tmp_path, None)
    with pytest.raises(
        PolicyRefused, match=rf"^the server asks for {what} of a run that says privacy\.dp\.evaluation = 'refuse'$"
    ):
        ask(replace(scoring(1), kind=kind, spec=spec))
    assert Account(tmp_path).total() == Spent(0, 0, 0, 0)


def test_nor_does_one_that_the_run_does_not_have(tmp_path: Path) -> None:
    quiet = validate(RunSpec, {"data": {"features": 3, "classes": 2}, "evaluation": {"every": 0}}, "test")
    measured = validate(RunSpec, {"data": {"features": 3, "classes": 2, "normalise": "federated"}}, "test")
    ask = Consent(None, tmp_path, None)
    with pytest.raises(PolicyRefused, match=r"scores of a run that has evaluation\.every = 0"):
        ask(replace(scoring(1), spec=quiet))
    with pytest.raises(PolicyRefused, match=r"statistics of the data of a run that has data\.normalise = 'given'"):
        ask(replace(TASK, kind=TaskKind.MEASURE))
    ask(replace(scoring(1)))
    ask(replace(TASK, kind=TaskKind.MEASURE, spec=measured, key=TaskKey("run-2", 0, 1)))
    public = private(noise_multiplier=4.0, evaluation="public", every=1)
    ask(replace(scoring(1), spec=public, key=TaskKey("run-3", 1, 1)))


# Whose run it is -----------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


def consent(policy: Policy | None, folder: Path, ca: Authority | None, **more: Any) -> Consent:
    return Consent(policy, folder, None if ca is None else ca.pem, **more)


def test_a_signed_run_of_a_named_operator_is_done(tmp_path: Path, ca: Authority, anna: Credentials) -> None:
    ask = consent(rules(operators=["anna"], max_rounds=5), tmp_path, ca)
    task = signed(TASK, anna)
    for number in range(1, 6):
        ask(nth(number, task))
    assert Account(tmp_path).operators()["anna"].rounds_total == 5


@pytest.mark.parametrize("policy", [None, Policy(), Policy(operators=("anna",))])
def test_over_tls_a_run_that_nobody_has_signed_is_refused(policy: Policy | None, tmp_path: Path, ca: Authority) -> None:
    with pytest.raises(
        PolicyRefused, match="unsigned: nobody has signed this run, although the server has certificates"
    ):
        consent(policy, tmp_path, ca)(TASK)


def test_one_may_allow_unsigned_runs_but_not_of_named_operators(tmp_path: Path, ca: Authority) -> None:
    consent(rules(unsigned=True), tmp_path, ca)(TASK)
    with pytest.raises(PolicyRefused, match="operators: the run is of nobody who has signed it"):
        consent(rules(unsigned=True, operators=["anna"]), tmp_path, ca)(nth(2))


def test_in_plaintext_nobody_is_known(tmp_path: Path, anna: Credentials) -> None:
    consent(None, tmp_path, None)(TASK)
    consent(Policy(), tmp_path, None)(signed(TASK, anna))
    consent(Policy(), tmp_path, None)(nth(2))
    assert Account(tmp_path).operators() == {"": Spent(1, 0, 2, 2400)}
    with pytest.raises(PolicyRefused, match="operators: the run is of nobody"):
        consent(rules(operators=["anna"]), tmp_path, None)(signed(TASK, anna))


def test_a_specification_that_the_server_has_changed_is_refused(
    tmp_path: Path, ca: Authority, anna: Credentials
) -> None:
    task = signed(TASK, anna)
    other = validate(RunSpec, {"data": {"features": 3, "classes": 2}, "rounds": 6}, "test")
    ask = consent(None, tmp_path, ca)
    ask(task)
    with pytest.raises(PolicyRefused, match="the run's signature: the signature of operator 'anna' is not of this"):
        ask(replace(task, spec=other))


def test_the_signature_is_judged_by_the_bytes_that_came(tmp_path: Path, ca: Authority, anna: Credentials) -> None:
    """Those of an operator whose version writes a specification otherwise: with a key less, in another order, with spaces."""
    content = json.loads(SPEC.canonical)
    del content["privacy"]
    text = json.dumps(dict(reversed(content.items())), indent=2).encode()
    task = signed(replace(TASK, spec=validate_json(RunSpec, text, "test")), anna)
    came = wire.task_from_wire(Message.FromString(wire.task_to_wire(task).SerializeToString()))
    assert (came.spec, came.spec.canonical) == (SPEC, text)
    ask = consent(None, tmp_path, ca)
    ask(came)
    with pytest.raises(PolicyRefused, match="the run's signature: the signature of operator 'anna' is not of this"):
        ask(replace(came, spec=SPEC))


@pytest.mark.parametrize("role", [Role.CLIENT, Role.VIEWER, Role.SERVER])
def test_a_run_signed_by_somebody_else_than_an_operator_is_refused(role: Role, tmp_path: Path, ca: Authority) -> None:
    own = ca.credentials(role, "anna", now=NOW)
    with pytest.raises(PolicyRefused, match=f"signed by {role} 'anna', and only an operator may"):
        consent(Policy(), tmp_path, ca)(signed(TASK, own))


def test_a_run_of_another_federations_operator_is_refused(tmp_path: Path, ca: Authority) -> None:
    other = authority.create(tmp_path / "other", NOW).credentials(Role.OPERATOR, "anna", now=NOW)
    with pytest.raises(PolicyRefused, match="another CA"):
        consent(Policy(), tmp_path, ca)(signed(TASK, other))


def test_a_run_that_has_begun_outlives_its_operators_certificate(
    tmp_path: Path, ca: Authority, anna: Credentials
) -> None:
    clock, task = Clock(), signed(TASK, anna)
    ask = consent(Policy(), tmp_path, ca, clock=clock)
    ask(nth(1, task))
    clock.now = NOW + timedelta(days=11)
    ask(nth(2, task))
    with pytest.raises(PolicyRefused, match="the certificate ended on"):
        ask(nth(1, signed(task, anna), run="run-2"))


def test_a_copy_of_a_run_gets_nothing(tmp_path: Path, ca: Authority, anna: Credentials) -> None:
    """A server that shows a signed run again under another id, to have more rounds of it."""
    task = signed(TASK, anna)
    ask = consent(Policy(), tmp_path, ca)
    ask(task)
    with pytest.raises(PolicyRefused, match="run run-2 has the signature of run run-1: it is a copy"):
        ask(nth(1, task, run="run-2"))
    ask(nth(1, signed(TASK, anna), run="run-2"))  # submitted once more


def test_a_run_keeps_its_signature(tmp_path: Path, ca: Authority, anna: Credentials) -> None:
    ask = consent(Policy(), tmp_path, ca)
    ask(signed(TASK, anna))
    with pytest.raises(PolicyRefused, match="run run-1 with another signature than before"):
        ask(nth(2, signed(TASK, anna)))


# The rules, applied ----------------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_specification(tmp_path: Path) -> None:
    """Nobody has signed it, so nothing else keeps the server from showing another."""
    strong = private(mode="local", rounds=100, noise_multiplier=1e4)
    weak = private(mode="local", rounds=100, epsilon=2.0)
    ask = consent(rules(unsigned=True), tmp_path, None)
    ask(replace(TASK, spec=strong))
    for _ in range(2):
        with pytest.raises(PolicyRefused, match="the server shows run run-1 with another specification than before; a"):
            ask(nth(2, replace(TASK, spec=weak)))
        ask = consent(rules(unsigned=True), tmp_path, None)  # started again, it remembers
    with pytest.raises(PolicyRefused, match="another specification"):
        ask(nth(2))
    ask(nth(2, replace(TASK, spec=strong)))
    ask(nth(1, replace(TASK, spec=weak), run="run-2"))


def test_an_account_of_before_learns_the_specification_that_it_sees_next(tmp_path: Path) -> None:
    account = Account(tmp_path)
    spent(account, nth(1), "")
    account.close()
    with sqlite3.connect(account.path) as database:
        database.execute("DROP TABLE specs")
    database.close()
    ask = consent(None, tmp_path, None)
    ask(nth(2))
    with pytest.raises(PolicyRefused, match="another specification"):
        ask(nth(3, replace(TASK, spec=private(noise_multiplier=1.0))))


def test_rounds_beyond_the_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefused, match="round 6 is asked for of a run with 5 rounds"):
        consent(Policy(), tmp_path, None)(nth(6))


def test_a_server_that_asks_for_the_same_round_of_ever_other_models_runs_into_the_limit(tmp_path: Path) -> None:
    ask = consent(rules(max_rounds=5), tmp_path, None)
    for number in range(5):
        ask(replace(TASK, model=replace(TASK.model, digest=b"%d" % number)))
    with pytest.raises(PolicyRefused, match="max_rounds: 6 rounds in this run, and the limit is 5"):
        ask(replace(TASK, model=replace(TASK.model, digest=b"one more")))


def test_the_limits_hold_over_the_runs_of_all_operators_and_of_nobody_and_over_restarts(
    tmp_path: Path, ca: Authority, anna: Credentials
) -> None:
    policy = rules(max_rounds_total=9, max_runs=3, unsigned=True)
    berta = ca.credentials(Role.OPERATOR, "berta", now=NOW)
    consent(policy, tmp_path, ca)(nth(1, signed(TASK, anna), run="run-1"))
    consent(policy, tmp_path, ca)(nth(1, signed(TASK, berta), run="run-2"))
    consent(policy, tmp_path, ca)(nth(1, run="run-3"))
    for task in (signed(TASK, anna), signed(TASK, berta), TASK):
        with pytest.raises(PolicyRefused, match="max_runs: 4 runs, and the limit is 3"):
            consent(policy, tmp_path, ca)(nth(1, task, run="run-4"))
    assert Account(tmp_path).operators().keys() == {"anna", "berta", ""}


def test_a_policy_that_is_made_later_counts_what_was_spent_before(
    tmp_path: Path, ca: Authority, anna: Credentials
) -> None:
    task = signed(TASK, anna)
    for number in (1, 2, 3):
        consent(None, tmp_path, ca)(nth(number, task))
    policy = rules(max_rounds_total=4)
    consent(policy, tmp_path, ca)(nth(4, task))
    with pytest.raises(PolicyRefused, match="max_rounds_total: 5 rounds in all runs together, and the limit is 4"):
        consent(policy, tmp_path, ca)(nth(5, task))


def test_evaluations_are_judged_like_trainings(tmp_path: Path) -> None:
    ask = consent(rules(max_bytes_total=1200), tmp_path, None)
    ask(nth(1))
    ask(scoring(1))
    with pytest.raises(PolicyRefused, match="max_bytes_total: 1,600 bytes in all runs together, and the"):
        ask(scoring(2))


def test_code_may_be_allowed_in_either_file(tmp_path: Path) -> None:
    content = {"data": {"features": 3, "classes": 2}, "model": {"custom": "ours:net", "tensors": (("w", (1,)),)}}
    task = replace(TASK, spec=validate(RunSpec, content, "test"))
    for policy, allow in ((Policy(custom=("ours:net",)), ()), (Policy(), ("ours:net",)), (None, ("ours:net",))):
        ask = consent(policy, tmp_path, None, allow_custom=allow)
        ask(task)
        assert "ours:net" in ask.custom
    for policy in (None, Policy(), Policy(custom=("ours:other",))):
        with pytest.raises(PolicyRefused, match="custom: the run's model is 'ours:net'"):
            consent(policy, tmp_path, None)(task)


def test_without_a_policy_too_a_copy_of_a_run_gets_nothing(tmp_path: Path, ca: Authority, anna: Credentials) -> None:
    ask, task = consent(None, tmp_path, ca), signed(TASK, anna)
    ask(task)
    with pytest.raises(PolicyRefused, match="run run-2 has the signature of run run-1: it is a copy"):
        ask(nth(1, task, run="run-2"))
