"""What a round adds to the ledger, when another may not begin, and the account of one run and of all."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.server.conftest import make_spec

from seqfed.common import checkpoint, wire
from seqfed.common.dp import accounting
from seqfed.common.errors import ConfigError, StorageError
from seqfed.common.model import initial_parameters
from seqfed.common.spec import RunSpec
from seqfed.common.views import FEDERATION, LedgerEntry, RoundRecord
from seqfed.server import ledger
from seqfed.server.audit import Kind
from seqfed.server.ledger import Booked
from seqfed.server.round import Phase, Run
from seqfed.server.store import Store, open_store

RUN = "0123456789abcdef"


def private(*, cohort: dict[str, Any] | None = None, rounds: int = 10, **dp: Any) -> RunSpec:
    return make_spec(
        rounds=rounds,
        aggregation={"weighting": "uniform"},
        cohort={"min_clients": 3, "count": 3, **(cohort or {})},
        privacy={"dp": {"mode": "central", "delta": 1e-5, **dp}},
    )


def begun(spec: RunSpec, *rounds: str, run: str = RUN) -> dict[str, LedgerEntry]:
    """The ledger after these rounds, each given as the names of its clients, one letter each."""
    found = {one.holder: one for one in ledger.opened(run, spec)}
    for number, clients in enumerate(rounds, 1):
        found |= {one.holder: one for one in ledger.after(spec, found, number, tuple(clients))}
    return found


def test_a_run_without_privacy_has_no_ledger() -> None:
    assert ledger.opened(RUN, make_spec()) == ()
    assert ledger.allows(make_spec(), {}, 1) is None


def test_each_data_holder_has_what_it_took_part_in() -> None:
    spec = private(noise_multiplier=3.0)
    found = begun(spec, "abc", "abd", "ad")
    assert {name: one.releases for name, one in found.items()} == {FEDERATION: 3, "a": 3, "b": 2, "c": 1, "d": 2}
    assert found[FEDERATION].epsilon == found["a"].epsilon == accounting.spent(spec, 3, 3.0)
    assert found["b"].epsilon == accounting.spent(spec, 2, 3.0)
    assert (found["c"].round, found["d"].round) == (1, 3)
    assert {one.unit for one in found.values()} == {"client"}


def test_where_clients_are_drawn_in_secret_there_is_one_account_for_all() -> None:
    cohort = {"min_clients": 1000, "count": 100, "quorum": 30}
    spec = private(cohort=cohort, noise_multiplier=1.0, population=1000)
    found = begun(spec, "abc", "d")
    assert list(found) == [FEDERATION]
    assert found[FEDERATION].epsilon == accounting.spent(spec, 2, 1.0)
    assert found[FEDERATION].accountant == accounting.PLD


def test_a_sum_that_was_opened_in_vain_counts() -> None:
    spec = private(noise_multiplier=3.0)
    first = {one.holder: one for one in ledger.opened(RUN, spec)}
    found = {one.holder: one for one in ledger.after(spec, first, 1, ("a",), releases=2)}
    assert found["a"].releases == found[FEDERATION].releases == 2
    assert found["a"].epsilon == accounting.spent(spec, 2, 3.0)


@given(st.floats(0.5, 20), st.integers(1, 12))
def test_a_round_that_would_pass_the_budget_does_not_begin(epsilon: float, rounds: int) -> None:
    solved = private(epsilon=epsilon, rounds=rounds)
    found = begun(solved)
    for number in range(1, rounds + 1):  # the noise was solved for all of them
        assert ledger.allows(solved, found, number) is None
        found |= {one.holder: one for one in ledger.after(solved, found, number, "a")}
    total = found[FEDERATION].epsilon
    assert total is not None
    assert total <= epsilon
    why = ledger.allows(solved, found, rounds + 1)
    assert why is not None
    assert f"after {rounds} rounds; round {rounds + 1} would make it" in why


def test_a_budget_beside_a_given_noise_ends_the_run_early() -> None:
    spec = private(epsilon=2.0, noise_multiplier=3.0)
    found, number = begun(spec), 1
    while ledger.allows(spec, found, number) is None:
        found |= {one.holder: one for one in ledger.after(spec, found, number, "ab")}
        number += 1
    assert accounting.spent(spec, number - 1, 3.0) <= 2.0 < accounting.spent(spec, number, 3.0)
    assert 1 < number < 10


def test_with_only_a_noise_there_is_no_budget() -> None:
    spec = private(noise_multiplier=0.5)
    assert ledger.allows(spec, begun(spec, *["ab"] * 9), 10) is None


def test_who_was_in_as_many_rounds_as_the_tree_allows_is_out() -> None:
    spec = private(noise_multiplier=3.0, mechanism="ftrl", participations=2)
    found = begun(spec, "abc", "abd", "cd")
    assert ledger.spent_out(spec, found) == frozenset("abcd")
    assert ledger.spent_out(spec, begun(spec, "abc", "abd")) == frozenset("ab")
    assert ledger.spent_out(private(noise_multiplier=3.0), found) == frozenset()


def test_a_run_that_no_noise_fits_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="leaves nothing for the model"):
        ledger.opened(RUN, private(noise_multiplier=5.0, clip="adaptive"))


def test_the_audit_log_hears_of_the_federation_only() -> None:
    found = begun(private(noise_multiplier=3.0), "abc")
    (note,) = ledger.notes(found.values())
    assert note.kind is Kind.PRIVACY
    assert note.body == {
        "run": RUN,
        "round": 1,
        "client": FEDERATION,
        "epsilon": found[FEDERATION].epsilon,
        "delta": 1e-5,
        "unit": "client",
    }


# The account ----------------------------------------------------------------------------------------------------------


def test_runs_add_up_for_the_client_that_was_in_most() -> None:
    spec, other = private(noise_multiplier=3.0), private(noise_multiplier=2.0, delta=1e-6)
    runs = [
        Booked("one", spec, begun(spec, "abc", "ab", run="1")),
        Booked("two", other, begun(other, "bc", "bd", "bd", run="2")),
        Booked("plain", make_spec(), {}),
        Booked("not begun", spec, begun(spec, run="3")),
    ]
    (total,) = ledger.totals(runs)
    assert (total.holder, total.runs, total.unit, total.delta) == ("b", 2, "client", 1e-5)
    assert total.epsilon == accounting.gaussian_epsilon((2 / 9 + 3 / 4) ** -0.5, 1e-5)


def test_whoever_may_have_been_drawn_counts_in_every_total() -> None:
    drawn = private(cohort={"min_clients": 1000, "count": 100, "quorum": 30}, noise_multiplier=1.0, population=1000)
    spec = private(noise_multiplier=3.0)
    runs = [Booked("one", drawn, begun(drawn, "a", run="1")), Booked("two", spec, begun(spec, "z", run="2"))]
    (total,) = ledger.totals(runs)
    both, _ = accounting.together([(drawn, 1, 1.0, None), (spec, 1, 3.0, 1)], 1e-5)
    assert (total.holder, total.epsilon) == ("z", both)
    (alone,) = ledger.totals(runs[:1])
    assert alone.holder == FEDERATION


def test_examples_are_their_own_unit() -> None:
    spec = private(mode="example", epsilon=2.0)
    found = begun(spec, "ab")
    assert (found[FEDERATION].unit, found[FEDERATION].epsilon, found["a"].releases) == ("example", None, 1)
    assert ledger.allows(spec, found, 2) is None  # each client keeps its own account
    (total,) = ledger.totals([Booked("one", spec, found)] * 2)
    assert (total.unit, total.epsilon, total.delta) == ("example", 4.0, 2e-5)


def test_a_report_crosses_the_wire_whole() -> None:
    spec, other = private(noise_multiplier=3.0), private(mode="example", noise_multiplier=1.0)
    every = [Booked("one", spec, begun(spec, "abc", run="1")), Booked("two", other, begun(other, "a", run="2"))]
    for found in (ledger.report(every), ledger.report(every[:1], every), ledger.report([], every)):
        assert wire.privacy_from_wire(wire.privacy_to_wire(found)) == found
    assert ledger.report(every).runs[0].holders == ()
    assert [name for name, *_ in ledger.report(every[:1], every).runs[0].holders] == ["a", "b", "c"]


# Of all runs together ---------------------------------------------------------------------------------------------------


def test_no_round_begins_that_would_pass_the_limit_of_all_runs() -> None:
    """Whoever is asked in it counts, whatever others have spent."""
    spec, other = private(noise_multiplier=3.0), private(noise_multiplier=2.0, delta=1e-6)
    others = [
        Booked("one", spec, begun(spec, "ab", "ab", run="1")),
        Booked("plain", make_spec(), {}),
        Booked("not begun", spec, begun(spec, run="3")),
    ]
    booked = Booked("two", other, begun(other, "ac", run="2"))
    then = accounting.gaussian_epsilon((2 / 9 + 2 / 4) ** -0.5, 1e-5)
    of_b = accounting.gaussian_epsilon((2 / 9 + 1 / 4) ** -0.5, 1e-5)
    assert ledger.affords(then, booked, others, 2, "abc") is None
    told = ledger.affords(then * 0.999, booked, others, 2, "abc")
    assert told == (
        f"privacy budget spent: round 2 would make epsilon {then:.4g} of client 'a' over all runs of this server (delta 1e-05, "
        f"unit client), and its max_epsilon is {then * 0.999:g}"
    )
    assert ledger.affords(of_b, booked, others, 2, "b") is None
    assert "of client 'b'" in (ledger.affords(of_b * 0.999, booked, others, 2, "bd") or "")
    assert ledger.affords(of_b * 0.999, booked, others, 2, "d") is None


def test_the_limit_of_all_runs_is_of_everybody_who_may_have_been_drawn() -> None:
    drawn = private(cohort={"min_clients": 1000, "count": 100, "quorum": 30}, noise_multiplier=1.0, population=1000)
    spec = private(noise_multiplier=3.0)
    others = [Booked("one", spec, begun(spec, "z", run="1"))]
    booked = Booked("two", drawn, begun(drawn, "a", run="2"))
    most, _ = accounting.together([(drawn, 2, 1.0, None), (spec, 1, 3.0, 1)], 1e-5)
    assert ledger.affords(most, booked, others, 2, "b") is None
    assert "of client 'z'" in (ledger.affords(most * 0.999, booked, others, 2, "b") or "")
    least, _ = accounting.together([(drawn, 2, 1.0, None)], 1e-5)
    assert "of any data holder" in (ledger.affords(least * 0.999, booked, [], 2, "b") or "")


def test_the_limit_of_all_runs_of_examples_is_of_their_goals() -> None:
    spec, other = private(mode="example", epsilon=2.0), private(mode="example", epsilon=1.0)
    others = [
        Booked("one", spec, begun(spec, "ab", run="1")),
        Booked("clients'", private(noise_multiplier=0.1), begun(private(noise_multiplier=0.1), "ab", run="3")),
    ]
    booked = Booked("two", other, begun(other, "b", run="2"))
    assert ledger.affords(3.0, booked, others, 2, "ab") is None
    assert "epsilon 3 of client 'b'" in (ledger.affords(2.9, booked, others, 2, "ab") or "")
    assert ledger.affords(1.0, booked, others, 2, "c") is None


def test_a_run_that_alone_would_pass_the_limit_is_refused() -> None:
    assert ledger.opened(RUN, private(epsilon=2.0), 2.0)[0].epsilon == 0
    assert ledger.opened(RUN, private(epsilon=2.0, noise_multiplier=0.5), 2.0)  # it ends where its own goal does
    assert ledger.opened(RUN, private(mode="example", epsilon=2.0), 2.0)
    for spec in (private(epsilon=2.1), private(noise_multiplier=0.5)):
        with pytest.raises(ConfigError, match="and this server's max_epsilon, for all runs together, is 2; lower"):
            ledger.opened(RUN, spec, 2.0)
    with pytest.raises(ConfigError, match="the run's epsilon is inf"):
        ledger.opened(RUN, private(mode="example", noise_multiplier=1.0), 2.0)
    with pytest.raises(ConfigError, match="no \\[privacy.dp\\], so no epsilon, and this server's max_epsilon is 2"):
        ledger.opened(RUN, make_spec(), 2.0)


# In the store ---------------------------------------------------------------------------------------------------------


def created(folder: Path, spec: RunSpec) -> tuple[Store, tuple[LedgerEntry, ...]]:
    store = open_store(folder)
    entries = ledger.opened(RUN, spec)
    model = checkpoint.save(store.model_path(RUN, 0), initial_parameters(spec), {})
    store.create(RUN, spec, model, ledger=entries)
    return store, entries


def test_what_is_spent_stands_in_the_rounds_transaction(tmp_path: Path) -> None:
    spec = private(noise_multiplier=3.0)
    store, first = created(tmp_path, spec)
    assert store.runs()[0].ledger == first
    entries = ledger.after(spec, {one.holder: one for one in first}, 1, "ab")
    model = checkpoint.save(store.model_path(RUN, 1), initial_parameters(spec), {})
    record = RoundRecord(1, 1, ("a", "b"), ("a", "b"), {})
    state = Run(Phase.GATHERING, round=2)
    store.commit(RUN, state, model=model, record=record, notes=ledger.notes(entries), ledger=entries)
    store.close()
    again = open_store(tmp_path)
    assert set(again.runs()[0].ledger) == set(entries)
    assert again.ledger() == {RUN: {one.holder: one for one in entries}}
    assert [one.kind for one in again.audit(0, 10)] == ["privacy"]
    again.close()


def test_a_commit_that_fails_spends_nothing(tmp_path: Path) -> None:
    spec = private(noise_multiplier=3.0)
    store, first = created(tmp_path, spec)
    entries = ledger.after(spec, {one.holder: one for one in first}, 1, "ab")
    with contextlib.closing(sqlite3.connect(tmp_path / "seqfed.db")) as database:
        database.execute("CREATE TRIGGER no BEFORE INSERT ON rounds BEGIN SELECT RAISE(ABORT, 'not again'); END")
        database.commit()
    model = checkpoint.save(store.model_path(RUN, 1), initial_parameters(spec), {})
    record = RoundRecord(1, 1, ("a", "b"), ("a", "b"), {})
    with pytest.raises(StorageError, match="not again"):
        store.commit(RUN, Run(Phase.GATHERING, round=2), model=model, record=record, ledger=entries)
    assert store.runs()[0].ledger == first
    assert store.runs()[0].version == 0
    store.close()
