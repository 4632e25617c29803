"""What a session asks before each task: whose run it is, and an account of what was spent that outlives whatever happens."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from seqfed.client.consent import Account, Consent
from seqfed.client.policy import Policy, Spent
from seqfed.client.policy import account as added_up
from seqfed.common import authority, identity, signing, wire
from seqfed.common.authority import Authority
from seqfed.common.config import validate, validate_json
from seqfed.common.dp import accounting
from seqfed.common.errors import PolicyRefused, StorageError, StorageFull
from seqfed.common.identity import Credentials, Role
from seqfed.common.spec import RunSpec
from seqfed.common.views import MaskingTerms, ModelVersion, Task, TaskKey, TaskKind
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


def private(*, secure: bool = False, rounds: int = 50, **dp: Any) -> RunSpec:
    content: dict[str, Any] = {
        "data": {"features": 3, "classes": 2},
        "rounds": rounds,
        "aggregation": {"weighting": "uniform"},
        "evaluation": {"every": 0},
        "cohort": {"min_clients": 5, "count": 5},
        "privacy": {"secure_aggregation": secure, "dp": {"mode": "central", "delta": 1e-5, **dp}},
    }
    return validate(RunSpec, content, "test")


def test_the_ledger_has_every_release_once_over_runs_and_restarts(tmp_path: Path) -> None:
    spec = private(noise_multiplier=4.0)
    task = replace(TASK, spec=spec)
    account = Account(tmp_path)
    for number in (1, 2, 2, 3):  # the same update sent again gives nothing more away
        account.charge(nth(number, task), "anna", lambda _: None, "wards.csv")
    account.charge(replace(scoring(3), spec=spec), "anna", lambda _: None, "wards.csv")
    account.close()
    account = Account(tmp_path)
    account.charge(nth(7, task, run="run-2"), "anna", lambda _: None, "beds.csv")
    account.charge(nth(1, run="run-3"), "anna", lambda _: None)
    first, second = account.released()
    assert (first.run, first.data, first.noise, first.round, first.releases) == ("run-1", "wards.csv", 4.0, 3, 3)
    assert (second.run, second.data, second.round, second.releases) == ("run-2", "beds.csv", 7, 1)
    (whole,) = added_up([first, second])
    assert whole.epsilon == accounting.gaussian_epsilon(
        4.0 / 2, 1e-5
    )  # four Gaussian releases are one of half the noise
    assert (whole.unit, whole.delta) == ("client", 1e-5)


def test_another_masked_sum_of_the_same_update_is_another_release(tmp_path: Path) -> None:
    task = replace(TASK, spec=private(secure=True, noise_multiplier=2.0))
    account = Account(tmp_path)
    for number in (1, 1, 4):
        account.charge(replace(nth(1, task), masking=MaskingTerms(number, 5)), "anna", lambda _: None)
    (found,) = account.released()
    assert (found.round, found.releases) == (1, 2)


def test_a_task_that_is_refused_is_not_in_the_ledger(tmp_path: Path) -> None:
    def refuse(found: Spent) -> None:
        assert [one.releases for one in found.released()] == [1]  # the one in question counts
        raise PolicyRefused("no")

    account = Account(tmp_path)
    with pytest.raises(PolicyRefused):
        account.charge(replace(TASK, spec=private(noise_multiplier=2.0)), "anna", refuse)
    assert account.released() == ()


def test_the_limit_of_epsilon_holds_over_runs_and_restarts(tmp_path: Path) -> None:
    spec = private(noise_multiplier=3.0, rounds=8)
    limit = accounting.spent(spec, 12, 3.0) * 1.0001
    policy = rules(max_epsilon=limit, unsigned=True)
    done = 0
    for run in ("run-1", "run-2", "run-3"):
        consent = Consent(policy, tmp_path, None)  # a client that was started again
        for number in range(1, 9):
            try:
                consent(nth(number, replace(TASK, spec=spec), run=run))
                done += 1
            except PolicyRefused as error:
                assert "max_epsilon: all runs together, with this round, have epsilon" in str(error)
    assert done == 12


def test_a_run_that_plans_more_than_the_limit_never_begins(tmp_path: Path) -> None:
    spec = private(noise_multiplier=3.0, rounds=50)
    consent = Consent(rules(max_epsilon=accounting.spent(spec, 49, 3.0)), tmp_path, None)
    with pytest.raises(PolicyRefused, match="max_epsilon: the run's epsilon is .*, and the limit is"):
        consent(replace(TASK, spec=spec))
    with pytest.raises(PolicyRefused, match="max_epsilon: the run has no epsilon"):
        consent(TASK)
    with pytest.raises(PolicyRefused, match="min_noise: the run's noise is 3, and the least is 4"):
        Consent(rules(min_noise=4.0), tmp_path, None)(replace(TASK, spec=spec))


def test_examples_are_an_account_of_their_own(tmp_path: Path) -> None:
    account = Account(tmp_path)
    for number, dp in enumerate((2.0, 1.5)):
        spec = private(mode="example", epsilon=dp)
        account.charge(replace(nth(1, run=f"run-{number}"), spec=spec), "anna", lambda _: None)
    (found,) = added_up(account.released())
    assert (found.unit, found.epsilon, found.delta) == ("example", 3.5, 2e-5)


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
