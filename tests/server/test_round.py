"""The round machine by hand-written scenarios, and under random events with a model of what a coordinator does."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.conftest import make_spec

from seqfed.common.errors import DuplicateUpdate, IllegalTransition, SeqfedError, WrongRound
from seqfed.common.metrics import UNIT
from seqfed.common.spec import RunSpec
from seqfed.server.round import (
    ACTIVE,
    ENDED,
    TRANSITIONS,
    Ask,
    Broken,
    BudgetSpent,
    ClientsChanged,
    CloseRound,
    CommitModel,
    DeadlinePassed,
    Dismiss,
    Effect,
    EndRun,
    EvaluationArrived,
    Event,
    Fold,
    Hasten,
    MaskingEnded,
    ModelCommitted,
    OpenSum,
    PauseRequested,
    Phase,
    Restarted,
    ResumeRequested,
    Run,
    Silence,
    StartDeadline,
    StopRequested,
    Suspend,
    TaskFailed,
    Turn,
    Unmasked,
    UpdateArrived,
    choose,
    on,
)
from seqfed.server.store import dump_state, load_state

EVENTS: dict[type, Event] = {
    Turn: Turn(),
    ClientsChanged: ClientsChanged(arrived=("z",)),
    UpdateArrived: UpdateArrived(1, "a"),
    EvaluationArrived: EvaluationArrived(1, "a", (("examples", 1),)),
    TaskFailed: TaskFailed(1, "a", "no data"),
    Silence: Silence("a"),
    Unmasked: Unmasked(1, ("a", "b")),
    MaskingEnded: MaskingEnded(1, "too few stayed"),
    ModelCommitted: ModelCommitted(1),
    BudgetSpent: BudgetSpent("no more"),
    Broken: Broken("the disk burns"),
    DeadlinePassed: DeadlinePassed(1, 1, Phase.TRAINING),
    PauseRequested: PauseRequested(),
    ResumeRequested: ResumeRequested(),
    StopRequested: StopRequested(),
    Restarted: Restarted(),
}


SECURE: dict[str, Any] = {
    "privacy": {"secure_aggregation": True, "min_survivors": 2},
    "aggregation": {"weighting": "uniform"},
}


def here(*names: str) -> ClientsChanged:
    return ClientsChanged(arrived=names)


def gone(*names: str) -> ClientsChanged:
    return ClientsChanged(left=names)


def follow(spec: RunSpec, run: Run, *events: Event) -> tuple[Run, tuple[Effect, ...]]:
    """The state after these events, and the effects of the last one."""
    effects: tuple[Effect, ...] = ()
    for event in events:
        run, effects = on(spec, run, event)
    return run, effects


def training(spec: RunSpec, *names: str) -> Run:
    return follow(spec, Run(), here(*names), Turn())[0]


def evaluating(spec: RunSpec, *names: str) -> Run:
    run = training(spec, *names)
    updates = [UpdateArrived(1, name) for name in run.cohort]
    return follow(spec, run, *updates, ModelCommitted(1))[0]


def score(loss: float, correct: int = 0, examples: int = 1) -> tuple[tuple[str, int], ...]:
    return (("correct", correct), ("examples", examples), ("loss", round(loss * UNIT)))


def closed(number: int, *scored: tuple[float, int, int]) -> CloseRound:
    """What these scores of two or of one client (loss, correct, examples) make of a round, by hand."""
    if not scored:
        return CloseRound(number)
    examples = sum(one[2] for one in scored)
    metrics = {
        "loss": sum(round(one[0] * UNIT) for one in scored) / UNIT / examples,
        "accuracy": sum(one[1] for one in scored) / examples,
    }
    losses = sorted(one[0] / one[2] for one in scored)
    hits = sorted(one[1] / one[2] for one in scored)
    spread = {  # between two values the ninth decile is nine tenths of the way
        "loss": ((losses[0] + losses[-1]) / 2, losses[0] + (losses[-1] - losses[0]) * 0.9),
        "accuracy": ((hits[0] + hits[-1]) / 2, hits[0] + (hits[-1] - hits[0]) * 0.1),
    }
    return CloseRound(number, metrics, spread, examples, len(scored))


# The way of a run -----------------------------------------------------------------------------------------------------


def test_the_first_round_by_hand() -> None:
    spec = make_spec(rounds=1, evaluation__every=1, cohort__deadline_s=60)
    run, effects = follow(spec, Run(), here("b", "a"))
    assert (run.phase, run.round, effects) == (Phase.QUEUED, 0, ())
    run, effects = on(spec, run, Turn())
    assert (run.phase, run.round, run.attempt, run.cohort) == (Phase.TRAINING, 1, 1, ("a", "b"))
    assert effects == (OpenSum(), StartDeadline(60), Ask(("a", "b")))
    run, effects = on(spec, run, UpdateArrived(1, "b"))
    assert (run.folded, run.pending, effects) == (("b",), ("a",), (Fold("b"),))
    run, effects = on(spec, run, UpdateArrived(1, "a"))
    assert (run.phase, run.folded, effects) == (Phase.COMMITTING, ("b", "a"), (Fold("a"), CommitModel()))
    run, effects = on(spec, run, ModelCommitted(1))
    assert (run.phase, run.pending, effects) == (Phase.EVALUATING, ("a", "b"), (StartDeadline(60), Ask(("a", "b"))))
    run, effects = on(spec, run, EvaluationArrived(1, "a", score(0.5, 1, 2)))
    assert (run.phase, run.pending, effects) == (Phase.EVALUATING, ("b",), ())
    run, effects = on(spec, run, EvaluationArrived(1, "b", score(0.25, 3, 4)))
    assert (run.phase, run.reason) == (Phase.FINISHED, "all 1 rounds are done")
    assert effects == (closed(1, (0.5, 1, 2), (0.25, 3, 4)), EndRun())
    assert dict(run.newest) == {"loss": 0.125, "accuracy": 4 / 6}


def test_rounds_follow_each_other_without_evaluation() -> None:
    spec = make_spec(rounds=3)
    run = training(spec, "a", "b")
    for number in (1, 2, 3):
        assert (run.phase, run.round, run.attempt, run.folded) == (Phase.TRAINING, number, 1, ())
        run, effects = follow(spec, run, *(UpdateArrived(number, one) for one in "ab"), ModelCommitted(number))
        assert effects[0] == CloseRound(number)
        assert (EndRun() in effects) == (number == 3)
    assert (run.phase, run.round) == (Phase.FINISHED, 3)


def test_evaluation_comes_every_so_many_rounds_and_after_the_last() -> None:
    spec = make_spec(rounds=5, evaluation__every=2)
    run, evaluated = training(spec, "a", "b"), []
    for number in range(1, 6):
        run, _ = follow(spec, run, *(UpdateArrived(number, one) for one in "ab"), ModelCommitted(number))
        if run.phase is Phase.EVALUATING:
            evaluated.append(number)
            run, _ = follow(spec, run, *(EvaluationArrived(number, one, score(1)) for one in "ab"))
    assert evaluated == [2, 4, 5]
    assert run.phase is Phase.FINISHED


def test_a_run_waits_until_enough_clients_are_there() -> None:
    spec = make_spec(cohort__min_clients=3)
    run, effects = follow(spec, Run(), Turn())
    assert (run.phase, run.round, effects) == (Phase.GATHERING, 1, ())
    run, effects = follow(spec, run, here("a", "b"), gone("b"), here("c"))
    assert (run.phase, effects) == (Phase.GATHERING, ())
    run, effects = on(spec, run, here("b"))
    assert (run.phase, run.attempt, run.cohort) == (Phase.TRAINING, 1, ("a", "b", "c"))


def test_the_next_round_waits_for_clients_that_left_after_their_update() -> None:
    spec = make_spec(rounds=2)
    run = training(spec, "a", "b")
    run, effects = follow(spec, run, *(UpdateArrived(1, one) for one in "ab"), gone("a"), ModelCommitted(1))
    assert (run.phase, run.round, effects) == (Phase.GATHERING, 2, (closed(1),))
    assert on(spec, run, here("a"))[0].phase is Phase.TRAINING


# Deadlines and failures -----------------------------------------------------------------------------------------------


def test_a_quorum_at_the_deadline_is_committed_and_the_late_are_dismissed() -> None:
    spec = make_spec(cohort={"min_clients": 3, "quorum": 2, "deadline_s": 9})
    run, _ = follow(spec, training(spec, "a", "b", "c"), UpdateArrived(1, "c"), UpdateArrived(1, "a"))
    assert run.phase is Phase.TRAINING  # all are waited for until the deadline
    run, effects = on(spec, run, DeadlinePassed(1, 1, Phase.TRAINING))
    assert (run.phase, run.folded, effects) == (Phase.COMMITTING, ("c", "a"), (Dismiss((("b", 1),)), CommitModel()))


def test_a_deadline_without_quorum_begins_another_attempt_that_keeps_what_is_folded() -> None:
    spec = make_spec(cohort={"min_clients": 3, "quorum": 2, "deadline_s": 9})
    run, _ = follow(spec, training(spec, "a", "b", "c"), UpdateArrived(1, "c"))
    run, effects = on(spec, run, DeadlinePassed(1, 1, Phase.TRAINING))
    assert (run.phase, run.round, run.attempt, run.given_up, run.folded) == (Phase.TRAINING, 1, 2, 1, ("c",))
    assert run.reason == "round 1, attempt 1 of 3: no answer before the deadline from a, b"
    assert effects == (OpenSum(), Fold("c"), StartDeadline(9), Ask(("a", "b")))


def test_the_run_pauses_after_the_last_attempt_and_says_why() -> None:
    spec = make_spec(cohort={"min_clients": 2, "deadline_s": 9, "max_attempts": 2})
    run = training(spec, "a", "b")
    run, _ = on(spec, run, DeadlinePassed(1, 1, Phase.TRAINING))
    run, effects = follow(spec, run, UpdateArrived(1, "a"), DeadlinePassed(1, 2, Phase.TRAINING))
    assert (run.phase, run.reason) == (Phase.PAUSED, "round 1, attempt 2 of 2: no answer before the deadline from b")
    assert effects == (Dismiss((("b", 1),)), Suspend())
    run, effects = follow(spec, run, ResumeRequested(), here("a", "b"), Turn())
    assert (run.phase, run.round, run.attempt, run.given_up, run.folded) == (Phase.TRAINING, 1, 3, 0, ("a",))
    assert effects == (OpenSum(), Fold("a"), StartDeadline(9), Ask(("b",)))


def test_attempts_are_counted_anew_in_each_round() -> None:
    spec = make_spec(rounds=3, cohort={"min_clients": 2, "max_attempts": 2})
    run = training(spec, "a", "b")
    for number in (1, 2, 3):
        run, _ = on(spec, run, DeadlinePassed(number, 1, Phase.TRAINING))
        assert (run.phase, run.given_up) == (Phase.TRAINING, 1)
        run, _ = follow(spec, run, *(UpdateArrived(number, one) for one in "ab"), ModelCommitted(number))
        assert (run.given_up, run.reason != "") == (0 if number < 3 else 1, number == 3)
    assert run.phase is Phase.FINISHED


@pytest.mark.parametrize(
    "late",
    [
        DeadlinePassed(1, 1, Phase.EVALUATING),
        DeadlinePassed(1, 2, Phase.TRAINING),
        DeadlinePassed(0, 1, Phase.TRAINING),
        DeadlinePassed(2, 1, Phase.TRAINING),
    ],
)
def test_the_deadline_of_something_else_changes_nothing(late: DeadlinePassed) -> None:
    spec = make_spec()
    run = training(spec, "a", "b")
    assert on(spec, run, late) == (run, ())


def test_a_failure_that_leaves_the_quorum_in_reach_is_waited_out() -> None:
    spec = make_spec(cohort={"min_clients": 3, "quorum": 2})
    run, effects = on(spec, training(spec, "a", "b", "c"), TaskFailed(1, "b", "no data"))
    assert (run.phase, run.pending, run.failed, effects) == (Phase.TRAINING, ("a", "c"), (("b", "no data"),), ())
    run, effects = follow(spec, run, UpdateArrived(1, "a"), UpdateArrived(1, "c"))
    assert (run.phase, effects[-1]) == (Phase.COMMITTING, CommitModel())


def test_the_last_to_answer_may_be_one_that_failed() -> None:
    spec = make_spec(cohort={"min_clients": 3, "quorum": 2})
    run, effects = follow(
        spec, training(spec, "a", "b", "c"), UpdateArrived(1, "a"), UpdateArrived(1, "c"), TaskFailed(1, "b", "x")
    )
    assert (run.phase, effects) == (Phase.COMMITTING, (CommitModel(),))


def test_a_failure_that_puts_the_quorum_out_of_reach_begins_another_attempt_at_once() -> None:
    spec = make_spec()
    run, effects = follow(spec, training(spec, "a", "b"), UpdateArrived(1, "a"), TaskFailed(1, "b", "no data"))
    assert (run.phase, run.attempt, run.given_up, run.failed) == (Phase.TRAINING, 2, 1, ())
    assert run.reason == "round 1, attempt 1 of 3: b: no data"
    assert effects == (OpenSum(), Fold("a"), StartDeadline(600), Ask(("b",)))


def test_failing_every_attempt_pauses_the_run_with_the_clients_own_words() -> None:
    spec = make_spec(cohort__max_attempts=3)
    run = training(spec, "a", "b")
    for _ in range(2):
        run, _ = on(spec, run, TaskFailed(1, "b", "no data"))
    run, effects = on(spec, run, TaskFailed(1, "b", "no data"))
    assert (run.phase, run.reason) == (Phase.PAUSED, "round 1, attempt 3 of 3: b: no data")
    assert effects[-1] == Suspend()


def test_an_update_after_a_failure_counts() -> None:
    spec = make_spec(cohort={"min_clients": 3, "quorum": 2})
    run, effects = follow(spec, training(spec, "a", "b", "c"), TaskFailed(1, "b", "hiccup"), UpdateArrived(1, "b"))
    assert (run.folded, run.failed, effects) == (("b",), (), (Fold("b"),))


def test_a_failure_said_twice_or_after_the_update_changes_nothing() -> None:
    spec = make_spec(cohort={"min_clients": 3, "quorum": 1})
    run, _ = follow(spec, training(spec, "a", "b", "c"), UpdateArrived(1, "a"), TaskFailed(1, "b", "x"))
    assert on(spec, run, TaskFailed(1, "b", "y")) == (run, ())
    assert on(spec, run, TaskFailed(1, "a", "y")) == (run, ())


def test_a_new_attempt_without_enough_clients_waits_for_them_and_keeps_what_is_folded() -> None:
    spec = make_spec(cohort={"min_clients": 3, "quorum": 3})
    run, _ = follow(spec, training(spec, "a", "b", "c"), UpdateArrived(1, "a"), gone("b"))
    run, effects = on(spec, run, DeadlinePassed(1, 1, Phase.TRAINING))
    assert (run.phase, run.cohort, run.folded, run.round) == (Phase.GATHERING, (), ("a",), 1)
    assert effects == (Dismiss((("b", 1), ("c", 1))),)
    run, effects = on(spec, run, here("d"))
    assert (run.phase, run.attempt, run.cohort, run.folded) == (Phase.TRAINING, 2, ("a", "c", "d"), ("a",))
    assert effects == (OpenSum(), Fold("a"), StartDeadline(3600), Ask(("c", "d")))


def test_an_attempt_whose_whole_cohort_is_folded_already_commits_at_once() -> None:
    spec = make_spec(cohort={"min_clients": 2, "fraction": 0.5})
    run = training(spec, *(f"site-{number}" for number in range(6)))
    assert (len(run.cohort), run.target) == (3, 3)
    run, _ = follow(spec, run, *(UpdateArrived(1, name) for name in run.cohort[:2]))
    run, _ = on(spec, run, gone(*(run.present - set(run.folded))))
    run, effects = on(spec, run, DeadlinePassed(1, 1, Phase.TRAINING))  # the two that are left are the next cohort
    assert (run.phase, run.attempt, run.cohort) == (Phase.COMMITTING, 2, run.folded)
    assert effects[1:] == (OpenSum(), *(Fold(name) for name in run.folded), CommitModel())


def test_another_attempt_has_another_cohort_if_there_are_enough_others() -> None:
    spec = make_spec(cohort={"min_clients": 4, "count": 2, "deadline_s": 9})
    run = training(spec, "a", "b", "c", "d", "e")
    first, second = run.cohort
    run, _ = follow(spec, run, UpdateArrived(1, first), DeadlinePassed(1, 1, Phase.TRAINING))
    assert first in run.cohort
    assert second not in run.cohort
    assert len(run.cohort) == 2


# Coming and going -----------------------------------------------------------------------------------------------------


def test_a_client_that_returns_is_asked_again() -> None:
    spec = make_spec()
    run = training(spec, "a", "b")
    run, effects = on(spec, run, gone("b"))
    assert (run.pending, run.present, effects) == (("a", "b"), frozenset("a"), ())
    run, effects = on(spec, run, here("b"))
    assert (run.present, effects) == (frozenset("ab"), (Ask(("b",)),))


def test_a_client_that_returns_after_its_update_is_not_asked_again() -> None:
    spec = make_spec()
    run, effects = follow(spec, training(spec, "a", "b"), UpdateArrived(1, "b"), gone("b"), here("b"))
    assert (run.folded, effects) == (("b",), ())


def test_a_client_that_was_not_drawn_is_not_asked() -> None:
    spec = make_spec(cohort={"min_clients": 2, "count": 2})
    run, effects = on(spec, training(spec, "a", "b"), here("c"))
    assert (run.cohort, run.present, effects) == (("a", "b"), frozenset("abc"), ())


# Evaluation -----------------------------------------------------------------------------------------------------------


def test_all_that_are_present_evaluate_not_the_cohort_alone() -> None:
    spec = make_spec(cohort={"min_clients": 2, "count": 2}, evaluation__every=1)
    run = training(spec, "a", "b", "c", "d")
    run, effects = follow(spec, run, *(UpdateArrived(1, one) for one in run.cohort), ModelCommitted(1))
    assert (run.phase, effects[-1]) == (Phase.EVALUATING, Ask(("a", "b", "c", "d")))


def test_when_nobody_is_present_the_cohort_is_asked_when_it_comes_and_not_waited_for_long() -> None:
    spec = make_spec(evaluation__every=1)
    run, effects = follow(
        spec, training(spec, "a", "b"), UpdateArrived(1, "a"), UpdateArrived(1, "b"), gone("a", "b"), ModelCommitted(1)
    )
    assert (run.phase, effects) == (Phase.EVALUATING, (StartDeadline(600), Ask(("a", "b"))))
    assert on(spec, run, here("a"))[1] == (Ask(("a",)),)
    run, effects = follow(spec, run, Silence("a"), Silence("b"))
    assert (run.phase, effects) == (Phase.FINISHED, (closed(1), Dismiss((("a", 1), ("b", 1))), EndRun()))


def test_whoever_leaves_or_fails_is_not_waited_for() -> None:
    spec = make_spec(evaluation__every=1)
    run = evaluating(spec, "a", "b", "c")
    run, _ = follow(spec, run, gone("b"), EvaluationArrived(1, "a", score(2)))
    assert (run.pending, run.failed) == (("c",), (("b", "left"),))
    run, effects = on(spec, run, TaskFailed(1, "c", "no validation data"))
    assert (run.phase, effects) == (Phase.FINISHED, (closed(1, (2, 0, 1)), EndRun()))


def test_an_evaluation_that_all_leave_is_over() -> None:
    spec = make_spec(rounds=2, evaluation__every=1)
    run, effects = on(spec, evaluating(spec, "a", "b"), gone("a", "b"))
    assert (run.phase, run.round, effects) == (Phase.GATHERING, 2, (closed(1),))


def test_the_deadline_ends_an_evaluation_with_what_has_come() -> None:
    spec = make_spec(evaluation__every=1)
    run, _ = on(spec, evaluating(spec, "a", "b"), EvaluationArrived(1, "b", score(3)))
    run, effects = on(spec, run, DeadlinePassed(1, 1, Phase.EVALUATING))
    assert (run.phase, effects) == (Phase.FINISHED, (closed(1, (3, 0, 1)), Dismiss((("a", 1),)), EndRun()))


def test_an_evaluator_that_connects_anew_is_asked_again() -> None:
    spec = make_spec(evaluation__every=1)
    _, effects = on(spec, evaluating(spec, "a", "b"), here("a"))
    assert effects == (Ask(("a",)),)


def test_a_score_given_twice_is_a_duplicate() -> None:
    spec = make_spec(evaluation__every=1)
    run, _ = on(spec, evaluating(spec, "a", "b"), EvaluationArrived(1, "a", score(1)))
    with pytest.raises(DuplicateUpdate, match="'a' has already answered in round 1"):
        on(spec, run, EvaluationArrived(1, "a", score(2)))


def test_the_spread_is_over_the_clients_that_have_examples() -> None:
    spec = make_spec(evaluation__every=1)
    names = [f"site-{number:02}" for number in range(12)]
    scores = {name: score(number, 11 - number, 11) for number, name in enumerate(names[:11])}
    run, effects = evaluating(spec, *names), tuple[Effect, ...]()
    for name in names:
        run, effects = on(spec, run, EvaluationArrived(1, name, scores.get(name, ())))
    record = effects[0]
    assert isinstance(record, CloseRound)
    assert (record.examples, record.clients) == (121, 11)
    assert record.spread["loss"] == pytest.approx((5 / 11, 9 / 11))  # of 0/11, 1/11, ... 10/11: the sixth and the tenth
    assert record.spread["accuracy"] == pytest.approx((6 / 11, 2 / 11))
    assert record.metrics["accuracy"] == 66 / 121


def test_the_spread_outlives_a_restart_and_is_of_one_round_only() -> None:
    spec = make_spec(rounds=2, evaluation__every=1)
    run, _ = on(spec, evaluating(spec, "a", "b"), EvaluationArrived(1, "a", score(1)))
    run = load_state(dump_state(run))
    run, _ = on(spec, run, Restarted())
    run, effects = follow(spec, run, here("a", "b"), EvaluationArrived(1, "b", score(2)))
    assert effects[0] == closed(1, (1, 0, 1), (2, 0, 1))
    assert (run.round, run.scores, run.evaluation) == (2, (), ())
    updates = [UpdateArrived(2, name) for name in run.cohort]
    run, effects = follow(spec, run, *updates, ModelCommitted(2), EvaluationArrived(2, "a", score(4)), gone("b"))
    assert effects[0] == closed(2, (4, 0, 1))


def test_the_newest_metrics_stay_until_there_are_newer_ones() -> None:
    spec = make_spec(rounds=2, evaluation__every=1)
    run, _ = follow(spec, evaluating(spec, "a", "b"), *(EvaluationArrived(1, one, score(1, 1)) for one in "ab"))
    assert dict(run.newest) == {"loss": 1.0, "accuracy": 1.0}
    run, effects = follow(spec, run, *(UpdateArrived(2, one) for one in "ab"), ModelCommitted(2), gone("a", "b"))
    assert effects[0] == closed(2)
    assert dict(run.newest) == {"loss": 1.0, "accuracy": 1.0}


# Convergence ----------------------------------------------------------------------------------------------------------


def converging(metric: str, patience: int, min_delta: float, values: list[float]) -> tuple[int, Run]:
    """How many rounds a run takes whose evaluations are these."""
    spec = make_spec(
        rounds=len(values),
        evaluation__every=1,
        convergence={"metric": metric, "patience": patience, "min_delta": min_delta},
    )
    run = training(spec, "a", "b")
    for number, value in enumerate(values, 1):
        tally = score(value * 100, 0, 100) if metric == "loss" else score(0, round(value * 100), 100)
        run, _ = follow(
            spec,
            run,
            UpdateArrived(number, "a"),
            UpdateArrived(number, "b"),
            ModelCommitted(number),
            EvaluationArrived(number, "a", tally),
            EvaluationArrived(number, "b", tally),
        )
        if run.phase in ENDED:
            return number, run
    raise AssertionError(run)


@pytest.mark.parametrize(
    ("metric", "patience", "min_delta", "values", "rounds"),
    [
        ("loss", 2, 0.0, [1.0, 0.9, 0.95, 0.9, 0.5, 0.4], 4),
        ("loss", 1, 0.0, [1.0, 0.9, 0.8, 0.8, 0.1], 4),
        ("loss", 2, 0.2, [1.0, 0.9, 0.7, 0.6, 0.55, 0.1], 5),  # 0.7 beats 1.0 by more than 0.2; 0.6 and 0.55 do not
        ("accuracy", 2, 0.0, [0.1, 0.5, 0.5, 0.4, 0.9], 4),
        ("accuracy", 1, 0.25, [0.25, 0.5, 1.0], 2),  # exactly min_delta is no improvement
        ("accuracy", 3, 0.0, [0.5, 0.4, 0.4, 0.6, 0.6], 5),  # better in time, so all rounds are done
    ],
)
def test_a_run_ends_when_its_metric_no_longer_improves(
    metric: str, patience: int, min_delta: float, values: list[float], rounds: int
) -> None:
    number, run = converging(metric, patience, min_delta, values)
    assert (number, run.phase) == (rounds, Phase.FINISHED)
    if rounds < len(values):
        assert run.reason.startswith(f"converged: {metric} has not improved on ")
        assert run.reason.endswith(f"for {patience} evaluations")
    else:
        assert run.reason == f"all {rounds} rounds are done"


def test_an_evaluation_without_the_metric_counts_as_none() -> None:
    spec = make_spec(rounds=2, evaluation__every=1, convergence={"metric": "accuracy", "patience": 1})
    run = replace(evaluating(spec, "a", "b"), best=0.5)
    run, _ = follow(spec, run, TaskFailed(1, "a", "x"), TaskFailed(1, "b", "x"))
    assert (run.phase, run.round, run.best, run.stale) == (Phase.TRAINING, 2, 0.5, 0)


# Anywhere -------------------------------------------------------------------------------------------------------------


def in_phase(phase: Phase) -> tuple[RunSpec, Run]:
    """A run of two rounds that stands in this phase of its first."""
    spec = make_spec(rounds=2, evaluation__every=1)
    run = training(spec, "a", "b")
    match phase:
        case Phase.QUEUED:
            return spec, Run()
        case Phase.GATHERING:
            return spec, follow(spec, Run(), here("a"), Turn())[0]
        case Phase.TRAINING:
            return spec, follow(spec, run, UpdateArrived(1, "a"))[0]
        case Phase.COMMITTING:
            return spec, follow(spec, run, UpdateArrived(1, "b"), UpdateArrived(1, "a"))[0]
        case Phase.EVALUATING:
            return spec, evaluating(spec, "a", "b")
        case Phase.PAUSED:
            return spec, follow(spec, run, UpdateArrived(1, "a"), PauseRequested())[0]
        case Phase.MEASURING:
            spec = make_spec(rounds=2, evaluation__every=1, data__normalise="federated")
            return spec, training(spec, "a", "b")
        case Phase.MASKING:
            spec = make_spec(rounds=2, evaluation__every=1, **SECURE)
            return spec, follow(spec, training(spec, "a", "b"), UpdateArrived(1, "b"), UpdateArrived(1, "a"))[0]
        case _:
            return spec, replace(run, phase=phase)


@pytest.mark.parametrize("phase", [one for one in Phase if one not in ENDED])
def test_a_run_can_be_stopped_anywhere(phase: Phase) -> None:
    spec, run = in_phase(phase)
    assert run.phase is phase
    state, effects = on(spec, run, StopRequested())
    assert (state.phase, state.reason) == (Phase.STOPPED, "stopped by the operator")
    working = (Dismiss(run.working),) if run.working else ()
    assert effects == (*working, EndRun())


@pytest.mark.parametrize("phase", [one for one in Phase if one not in ENDED])
def test_what_breaks_a_run_is_its_reason(phase: Phase) -> None:
    spec, run = in_phase(phase)
    state, effects = on(spec, run, Broken("the disk is full"))
    assert (state.phase, state.reason) == (Phase.FAILED, f"round {run.round}, {phase.value}: the disk is full")
    working = (Dismiss(run.working),) if run.working else ()
    assert effects == (*working, EndRun())


@pytest.mark.parametrize("phase", [one for one in Phase if one not in ENDED])
def test_what_hinders_a_run_for_a_while_pauses_it(phase: Phase) -> None:
    spec, run = in_phase(phase)
    state, effects = on(spec, run, Broken("the disk is full", passing=True))
    told = f"round {run.round}, {phase.value}: the disk is full; `seqfed resume` tries again"
    assert (state.phase, state.reason, effects[-1]) == (Phase.PAUSED, told, Suspend())
    assert (state.folded, state.late) == (run.folded, run.late)


def test_a_restart_while_waiting_changes_nothing() -> None:
    for phase in (Phase.QUEUED, Phase.GATHERING, Phase.PAUSED):
        spec, run = in_phase(phase)
        run = load_state(dump_state(run))
        assert on(spec, run, Restarted()) == (replace(run, back=run.here), ())


def test_a_restart_in_training_keeps_the_cohort_and_folds_again_what_is_there() -> None:
    spec, run = in_phase(Phase.TRAINING)
    state, effects = on(spec, run, Restarted())
    assert (state.phase, state.round, state.attempt, state.given_up) == (Phase.TRAINING, 1, 2, 0)
    assert (state.cohort, state.folded, state.present) == (run.cohort, ("a",), frozenset())
    assert effects == (OpenSum(), Fold("a"), StartDeadline(600), Ask(("b",)))
    assert on(spec, state, here("a"))[1] == ()
    assert on(spec, state, here("b"))[1] == (Ask(("b",)),)


def test_a_restart_while_committing_commits_the_same_updates() -> None:
    spec, run = in_phase(Phase.COMMITTING)
    state, effects = on(spec, run, Restarted())
    assert (state.phase, state.round, state.attempt, state.cohort) == (Phase.COMMITTING, 1, 2, run.cohort)
    assert effects == (OpenSum(), Fold("b"), Fold("a"), CommitModel())


def test_a_restart_in_evaluation_asks_those_that_have_not_answered() -> None:
    spec, run = in_phase(Phase.EVALUATING)
    run, _ = on(spec, run, EvaluationArrived(1, "a", score(1)))
    state, effects = on(spec, run, Restarted())
    assert (state.phase, state.round, state.evaluated, state.evaluation) == (Phase.EVALUATING, 1, ("a",), score(1))
    assert effects == (StartDeadline(600), Ask(("b",)))
    assert on(spec, state, here("b"))[1] == (Ask(("b",)),)


def test_restarts_do_not_use_up_the_attempts() -> None:
    spec = make_spec(cohort__max_attempts=1)
    run = training(spec, "a", "b")
    for number in range(2, 7):
        run, _ = on(spec, run, Restarted())
        assert (run.phase, run.attempt) == (Phase.TRAINING, number)


# What must not be -----------------------------------------------------------------------------------------------------

PAIRS = [(phase, kind) for phase in Phase for kind in EVENTS]


@pytest.mark.parametrize(("phase", "kind"), [pair for pair in PAIRS if pair[1] not in TRANSITIONS.get(pair[0], {})])
def test_an_illegal_event_changes_nothing_and_is_named_with_the_phase(phase: Phase, kind: type) -> None:
    spec, run = in_phase(phase)
    before = dataclasses.asdict(run)
    with pytest.raises(IllegalTransition, match=f"^{kind.__name__} means nothing to a run that is {phase.value}$"):
        on(spec, run, EVENTS[kind])
    assert dataclasses.asdict(run) == before


@pytest.mark.parametrize("phase", [one for one in Phase if one in ENDED])
@pytest.mark.parametrize("kind", EVENTS)
def test_a_run_that_is_over_takes_nothing(phase: Phase, kind: type) -> None:
    spec, run = in_phase(phase)
    with pytest.raises(IllegalTransition):
        on(spec, run, EVENTS[kind])


@pytest.mark.parametrize("phase", [one for one in Phase if one in ACTIVE])
def test_an_update_that_is_too_late_has_the_wrong_round(phase: Phase) -> None:
    spec, run = in_phase(phase)
    with pytest.raises(WrongRound, match=r"round 0 is over|is no longer wanted"):
        on(spec, run, UpdateArrived(0, "b"))
    if phase is not Phase.TRAINING:
        with pytest.raises(WrongRound, match="is no longer wanted"):
            on(spec, run, UpdateArrived(1, "b"))


@pytest.mark.parametrize("phase", [Phase.GATHERING, Phase.TRAINING, Phase.COMMITTING])
def test_a_score_that_is_too_late_has_the_wrong_round(phase: Phase) -> None:
    spec, run = in_phase(phase)
    with pytest.raises(WrongRound, match="is no longer wanted"):
        on(spec, run, EvaluationArrived(1, "b", score(1)))


@pytest.mark.parametrize("phase", [Phase.GATHERING, Phase.COMMITTING])
def test_a_failure_that_is_too_late_has_the_wrong_round(phase: Phase) -> None:
    spec, run = in_phase(phase)
    with pytest.raises(WrongRound, match="is no longer wanted"):
        on(spec, run, TaskFailed(1, "b", "x"))


@pytest.mark.parametrize("number", [0, 2])
def test_an_event_of_another_round_has_the_wrong_round(number: int) -> None:
    for phase, event in (
        (Phase.TRAINING, UpdateArrived(number, "b")),
        (Phase.TRAINING, TaskFailed(number, "b", "x")),
        (Phase.EVALUATING, EvaluationArrived(number, "b", score(1))),
        (Phase.EVALUATING, TaskFailed(number, "b", "x")),
        (Phase.COMMITTING, ModelCommitted(number)),
    ):
        spec, run = in_phase(phase)
        with pytest.raises(WrongRound, match="round 1 is under way"):
            on(spec, run, event)


def test_a_client_that_was_not_asked_has_the_wrong_round() -> None:
    for phase, event in (
        (Phase.TRAINING, UpdateArrived(1, "z")),
        (Phase.TRAINING, TaskFailed(1, "z", "x")),
        (Phase.EVALUATING, EvaluationArrived(1, "z", score(1))),
        (Phase.EVALUATING, TaskFailed(1, "z", "x")),
    ):
        spec, run = in_phase(phase)
        with pytest.raises(WrongRound, match="client 'z' was not asked in round 1"):
            on(spec, run, event)


def test_a_second_update_is_a_duplicate() -> None:
    spec, run = in_phase(Phase.TRAINING)
    with pytest.raises(DuplicateUpdate, match="'a' has already been counted in round 1"):
        on(spec, run, UpdateArrived(1, "a"))


# The cohort -----------------------------------------------------------------------------------------------------------


def cohort(spec: RunSpec, number: int, attempt: int, names: Iterable[str]) -> tuple[str, ...]:
    """Who is asked of these in this attempt at this round."""
    pool = tuple(names)
    return choose(spec, Run(round=number, attempt=attempt - 1, target=spec.cohort.size(len(pool))), pool)


def test_the_cohort_depends_on_seed_round_and_attempt_only() -> None:
    spec = make_spec(seed=7, cohort={"min_clients": 1, "count": 5})
    names = [f"site-{number:02}" for number in range(20)]
    drawn = cohort(spec, 3, 1, names)
    assert drawn == tuple(sorted(drawn))
    assert len(set(drawn)) == 5
    assert set(drawn) <= set(names)
    for number in range(5):
        random.Random(number).shuffle(names)  # noqa: S311 - not a secret
        assert cohort(spec, 3, 1, names) == drawn
        assert cohort(spec, 3, 1, frozenset(names)) == drawn
    others = {cohort(spec, 3, 2, names), cohort(spec, 4, 1, names), cohort(make_spec(**again(spec)), 3, 1, names)}
    assert len({drawn, *others}) == 4


def again(spec: RunSpec) -> dict[str, Any]:
    return {"seed": spec.seed + 1, "cohort": {"min_clients": 1, "count": 5}}


def test_every_client_is_drawn_about_as_often() -> None:
    spec = make_spec(cohort={"min_clients": 1, "count": 3})
    names, draws = [f"site-{number}" for number in range(10)], 2000
    counts = Counter(name for number in range(draws) for name in cohort(spec, number, 1, names))
    expected = draws * 3 / 10
    square = sum((counts[name] - expected) ** 2 / expected for name in names)
    assert square < 35  # chi-square with 9 degrees of freedom is above 35 once in 17,000 times


def test_a_fraction_of_those_present_is_drawn_but_never_too_few() -> None:
    names = [f"site-{number}" for number in range(10)]
    for fraction, size in ((0.5, 5), (0.01, 2), (1.0, 10)):
        assert len(cohort(make_spec(cohort={"min_clients": 2, "fraction": fraction}), 1, 1, names)) == size


# Any events in any order ----------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c", "d")


class Model:
    """A coordinator's memory: performs the effects in the simplest way and checks what they must be."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.run = Run()
        self.sum: list[str] | None = None
        self.asked: set[tuple[str, int]] = set()  # (client, round) of those at work
        self.counted: set[tuple[str, int]] = set()  # of the updates in committed models
        self.models: list[tuple[str, ...]] = []
        self.closed: list[int] = []
        self.ended = False
        self.restarting = False  # it asks those again that had failed
        self.declines = False  # somebody has declined the run

    def give(self, event: Event) -> bool:
        """Give the machine this event; False if it refused, having changed nothing."""
        before = self.run
        frozen = dataclasses.asdict(before)
        try:
            state, effects = on(self.spec, before, event)
        except (IllegalTransition, WrongRound, DuplicateUpdate):
            assert dataclasses.asdict(before) == frozen
            return False
        assert before.phase not in ENDED
        assert state.round >= before.round
        assert state.round <= self.spec.rounds
        if state.round == before.round and state.phase not in ENDED:
            assert state.attempt >= before.attempt
        self.run = state
        self.declines |= bool(state.declined)
        match event:
            case UpdateArrived(round=number, client=client) | TaskFailed(round=number, client=client):
                self.asked.discard((client, number))
            case EvaluationArrived(round=number, client=client):
                self.asked.discard((client, number))
            case ClientsChanged(arrived=arrived, working=working):
                self.asked -= {one for one in self.asked if one[0] in arrived and one not in working}
            case ModelCommitted(round=number):
                self.counted |= {*((name, number) for name in before.folded), *before.late}
            case _:
                pass
        if state.phase is not before.phase and state.phase is not Phase.COMMITTING:
            self.asked = {one for one in self.asked if one in {*before.working, *state.working}}
        for effect in effects:
            self.perform(effect)
        self.check()
        return True

    def perform(self, effect: Effect) -> None:
        match effect:
            case OpenSum():
                self.sum = []
            case Fold(client):
                assert self.sum is not None, "folded into no sum"
                assert client not in self.sum, "folded twice"
                self.sum.append(client)
            case Ask(clients):
                assert set(clients) <= set(self.run.cohort)
                assert not set(clients) & set(self.run.folded if self.run.phase is Phase.TRAINING else ())
                assert not set(clients) & {name for name, _ in self.run.owing}, "asked while it owes"
                assert not set(clients) & {name for name, _ in self.run.declined}, "asked although it has declined"
                fresh = self.run.phase is Phase.TRAINING and not set(clients) <= {name for name, _ in self.asked}
                if self.spec.asynchronous is not None and fresh and not self.restarting:
                    assert len(self.run.awaited) + len(self.run.owing) <= self.spec.asynchronous.concurrency
                self.asked |= {(client, self.run.round) for client in clients}
            case Dismiss(clients):
                self.asked -= set(clients)
            case CommitModel():
                assert self.sum is not None
                late = [name for name, _ in self.run.late]
                assert sorted(self.sum) == sorted((*self.run.folded, *late)), "each folded client once"
                assert len(self.sum) >= max(1, self.spec.cohort.needed(self.run.target))
                assert len(self.sum) >= self.spec.smallest_sum
                updates = {*((name, self.run.round) for name in self.run.folded), *self.run.late}
                assert not updates & self.counted, "an update counted in two rounds"
                assert all(0 < self.run.round - base <= self.spec.cohort.max_staleness for _, base in self.run.late)
                self.models.append(tuple(self.sum))
                self.sum = None
            case CloseRound(number):
                self.closed.append(number)
            case Suspend():
                assert self.run.phase is Phase.PAUSED
                self.sum = None
                assert not self.asked, "somebody still works for a paused run"
            case Hasten(seconds):
                assert seconds == self.spec.cohort.grace_s
            case EndRun():
                assert not self.ended
                self.ended = True

    def check(self) -> None:
        run = self.run
        assert len(set(run.folded)) == len(run.folded)
        if run.phase in {Phase.TRAINING, Phase.COMMITTING}:
            assert set(run.folded) <= set(run.cohort)
            if not self.spec.folds_late and not self.declines:
                assert len(run.cohort) >= (self.spec.cohort.count or self.spec.cohort.min_clients)
        owing = [name for name, _ in run.owing]
        assert len(set(owing)) == len(owing)
        assert not set(owing) & {*(name for name, _ in run.late), *run.pending}
        assert self.spec.folds_late or not (run.owing or run.late)
        if run.phase is Phase.TRAINING:
            assert self.sum is not None
            assert sorted(self.sum) == sorted((*run.folded, *(name for name, _ in run.late)))
            assert run.awaited or (self.spec.asynchronous and run.owing), "an attempt that waits for nobody"
            assert {(name, run.round) for name in run.pending} <= self.asked
        assert self.ended == (run.phase in ENDED)
        assert self.closed == list(range(1, len(self.closed) + 1))
        assert load_state(dump_state(run)) == replace(run, present=frozenset())

    def crash(self) -> None:
        """The daemon dies and begins again; only what the store holds is left."""
        if self.run.phase not in ENDED:
            self.run, self.sum, self.asked = load_state(dump_state(self.run)), None, set()
            before = self.run
            self.restarting = True
            assert self.give(Restarted())
            self.restarting = False
            assert set(before.cohort) <= set(self.run.cohort)
            assert (self.run.folded, self.run.late) == (before.folded, before.late)

    def finish(self) -> None:
        """All clients are there and answer what they are asked; a run that can be finished must then finish."""
        for _ in range(200):
            run = self.run
            match run.phase:
                case Phase.QUEUED:
                    assert self.give(Turn())
                case Phase.GATHERING:
                    assert self.give(ClientsChanged(arrived=NAMES))
                case Phase.TRAINING:
                    client, base = run.working[0]
                    assert self.give(UpdateArrived(base, client, 1.0))
                case Phase.PAUSED:
                    assert self.give(ResumeRequested())
                case Phase.COMMITTING:
                    models = len(self.models)
                    assert models >= 1
                    assert self.give(ModelCommitted(run.round))
                case Phase.EVALUATING:
                    assert self.give(EvaluationArrived(run.round, run.pending[0], score(1)))
                case _:
                    return
        raise AssertionError(f"stuck: {self.run}")


@st.composite
def specs(draw: st.DrawFn) -> RunSpec:
    """Any policy over few rounds and clients."""
    least, quorum = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    cohort: dict[str, Any] = {
        "min_clients": least,
        "max_attempts": draw(st.integers(1, 3)),
        "max_staleness": draw(st.integers(1, 3)),
        "late": draw(st.sampled_from(("drop", "fold"))),
        "adaptive": draw(st.sampled_from((None, 2.0))),
    }
    tables: dict[str, Any] = {}
    if draw(st.booleans()):
        buffer = draw(st.integers(1, least))
        tables["asynchronous"] = {"buffer": buffer, "concurrency": draw(st.integers(buffer, 4))}
        least = buffer
    else:
        count = draw(st.integers(0, 3))
        cohort |= {"count": max(count, quorum)} if count else {}
        cohort["over_select"] = draw(st.sampled_from((1.0, 1.0, 1.4)))
    if quorum:
        cohort |= {"quorum": min(quorum, least), "grace_s": draw(st.sampled_from((None, 5.0)))}
    return make_spec(rounds=draw(st.integers(1, 3)), cohort=cohort, evaluation__every=draw(st.integers(0, 2)), **tables)


@st.composite
def moves(draw: st.DrawFn) -> Any:
    """What happens next: an event that is likely to mean something, or any event at all."""
    name, shift = draw(st.sampled_from(NAMES)), draw(st.sampled_from((0, 0, 0, 0, 1, -1)))
    return draw(
        st.sampled_from(
            (
                *["answer"] * 4,
                *("come", "come", "back", "go", "fail", "decline", "late", "silent", "heard", "pause", "crash", "any"),
            )
        )
    ), (
        name,
        shift,
        draw(st.sampled_from(sorted(EVENTS, key=lambda kind: kind.__name__))),
    )


def make_move(model: Model, kind: str, name: str, shift: int, any_event: type) -> None:
    run = model.run
    if kind == "crash":
        model.crash()
    elif kind == "answer":
        model.give(answer(run, name, shift))
    elif kind == "any":
        frequent = any_event not in {Restarted, ModelCommitted, StopRequested, Broken}
        if frequent or (any_event in {StopRequested, Broken} and shift == 1):
            model.give(EVENTS[any_event])
        elif any_event in {StopRequested, Broken}:
            return
        else:
            model.give(answer(run, name, shift))
    else:
        events: dict[str, Event] = {
            "come": ClientsChanged(arrived=(name,)),
            "back": ClientsChanged(arrived=(name,), working=tuple(one for one in run.working if one[0] == name)),
            "go": ClientsChanged(left=(name,)),
            "silent": Silence(name),
            "heard": Silence(name, over=True),
            "pause": PauseRequested() if shift else ResumeRequested(),
            "fail": TaskFailed(run.round + shift, name, "x"),
            "decline": TaskFailed(dict(run.owing).get(name, run.round), name, "x", lasting=True),
            "late": DeadlinePassed(run.round + shift, run.attempt, run.phase),
        }
        model.give(events[kind])


def answer(run: Run, name: str, shift: int) -> Event:
    """What this client or the store would say next; with a shift of another round."""
    number = run.round + shift
    match run.phase:
        case Phase.QUEUED:
            return Turn()
        case Phase.EVALUATING if name not in dict(run.owing):
            return EvaluationArrived(number, name, score(1))
        case Phase.COMMITTING:
            return ModelCommitted(number)
        case _:
            owed = dict(run.owing).get(name)
            return UpdateArrived(number if owed is None or shift else owed, name, 2.0)


@settings(max_examples=300)
@given(specs(), st.lists(moves(), max_size=60))
def test_the_invariants_hold_under_any_events(spec: RunSpec, steps: list[Any]) -> None:
    model = Model(spec)
    model.give(ClientsChanged(arrived=NAMES[:3]))
    for kind, (name, shift, event) in steps:
        make_move(model, kind, name, shift, event)
    model.finish()
    assert model.run.phase in ENDED
    if model.run.phase is Phase.FINISHED:
        assert not model.run.owing
        assert model.closed == list(range(1, spec.rounds + 1))
        assert len(model.models) >= spec.rounds
    for event in EVENTS.values():
        assert not model.give(event)


@given(specs(), st.lists(moves(), max_size=40))
def test_the_state_is_the_whole_truth(spec: RunSpec, steps: list[Any]) -> None:
    """What is saved and loaded before each step is what was there, but for who is present."""
    model = Model(spec)
    for kind, (name, shift, event) in steps:
        before = model.run
        model.run = replace(load_state(dump_state(before)), present=before.present)
        assert model.run == before
        make_move(model, kind, name, shift, event)


def test_every_event_and_phase_has_its_place_in_the_table() -> None:
    assert set(TRANSITIONS) == set(Phase) - ENDED
    assert {kind for row in TRANSITIONS.values() for kind in row} == set(EVENTS)
    for kind, event in EVENTS.items():
        assert type(event) is kind
    assert issubclass(IllegalTransition, SeqfedError)
