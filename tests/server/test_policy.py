"""The round machine's policies: whom it asks, for whom it waits, and what becomes of those who come late or not at all."""

from __future__ import annotations

from typing import Any

import pytest
from tests.server.conftest import make_spec
from tests.server.test_round import follow, gone, here, training

from seqfed.common.config import validate
from seqfed.common.errors import ConfigError, IllegalTransition, WrongRound
from seqfed.common.spec import RunSpec
from seqfed.server.round import (
    MOST_WORDS,
    Ask,
    ClientsChanged,
    CloseRound,
    CommitModel,
    DeadlinePassed,
    Dismiss,
    EvaluationArrived,
    Fold,
    Hasten,
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
    UpdateArrived,
    deadline,
    on,
)


def committed(spec: RunSpec, run: Run, *names: str) -> Run:
    """After updates of these clients for the round under way, and its commit."""
    run, _ = follow(spec, run, *(UpdateArrived(run.round, name) for name in names))
    assert run.phase is Phase.COMMITTING, run
    return on(spec, run, ModelCommitted(run.round))[0]


# Over-selection -------------------------------------------------------------------------------------------------------


def test_more_are_asked_than_wanted_and_the_first_answers_are_taken() -> None:
    spec = make_spec(rounds=2, cohort={"min_clients": 3, "count": 3, "over_select": 1.3})
    run = training(spec, *"abcdef")
    assert (len(run.cohort), run.target) == (4, 3)
    first, second, third, last = run.cohort
    run, effects = follow(spec, run, *(UpdateArrived(1, name) for name in (second, last, first)))
    assert (run.phase, run.folded) == (Phase.COMMITTING, (second, last, first))
    assert effects == (Fold(first), Dismiss(((third, 1),)), CommitModel())
    assert not run.missed  # who was not needed has missed nothing
    with pytest.raises(WrongRound, match="no longer wanted"):
        on(spec, run, UpdateArrived(1, third))


def test_one_of_the_spare_clients_may_fail_without_another_attempt() -> None:
    spec = make_spec(cohort={"min_clients": 2, "count": 2, "over_select": 1.5})
    run = training(spec, *"abc")
    run, _ = follow(spec, run, TaskFailed(1, "b", "no data"), UpdateArrived(1, "a"), UpdateArrived(1, "c"))
    assert (run.phase, run.attempt, run.folded) == (Phase.COMMITTING, 1, ("a", "c"))


# Deadlines and grace --------------------------------------------------------------------------------------------------


def test_an_adaptive_deadline_is_a_multiple_of_the_time_of_nine_in_ten_answers() -> None:
    spec = make_spec(cohort={"min_clients": 2, "deadline_s": 100, "adaptive": 3})
    seconds = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)
    assert deadline(spec, Run(times=seconds)) == 27
    assert deadline(spec, Run(times=seconds[:4])) == 100  # too few to tell
    assert deadline(spec, Run(times=(0.01,) * 10)) == 1  # never shorter
    assert deadline(spec, Run(times=(50.0,) * 10)) == 100  # never longer
    assert deadline(make_spec(cohort__deadline_s=100), Run(times=seconds)) == 100


def test_the_times_are_those_of_the_last_answers_and_outlive_the_round() -> None:
    spec = make_spec(rounds=40, cohort={"min_clients": 2, "deadline_s": 1000, "adaptive": 2})
    run = training(spec, "a", "b")
    for number in range(1, 31):
        run, _ = follow(
            spec, run, UpdateArrived(number, "a", number), UpdateArrived(number, "b"), ModelCommitted(number)
        )
    assert run.times == tuple(range(1, 31))
    assert deadline(spec, run) == 2 * 27
    run, effects = follow(spec, run, UpdateArrived(31, "a", 31), UpdateArrived(31, "b", 31), ModelCommitted(31))
    assert StartDeadline(2 * 29) in effects  # of 32 answers the 29th
    for number in range(32, 40):
        run, _ = follow(spec, run, *(UpdateArrived(number, one, 1) for one in "ab"), ModelCommitted(number))
    assert len(run.times) == 48
    assert len(follow(spec, run, *(UpdateArrived(40, one, 1) for one in "ab"))[0].times) == 50


def test_the_grace_begins_when_the_quorum_is_in_and_not_again() -> None:
    spec = make_spec(cohort={"min_clients": 4, "quorum": 2, "grace_s": 7})
    run, effects = on(spec, training(spec, *"abcd"), UpdateArrived(1, "c"))
    assert effects == (Fold("c"),)
    run, effects = on(spec, run, UpdateArrived(1, "a"))
    assert effects == (Fold("a"), Hasten(7))
    run, effects = on(spec, run, UpdateArrived(1, "b"))
    assert effects == (Fold("b"),)
    run, effects = on(spec, run, DeadlinePassed(1, 1, Phase.TRAINING))
    assert effects == (Dismiss((("d", 1),)), CommitModel())


# Silence --------------------------------------------------------------------------------------------------------------


def test_a_silent_client_is_not_waited_for() -> None:
    spec = make_spec(cohort={"min_clients": 3, "quorum": 2})
    run, _ = follow(spec, training(spec, *"abc"), UpdateArrived(1, "a"), Silence("b"))
    assert (run.phase, run.pending, run.awaited) == (Phase.TRAINING, ("b", "c"), ("c",))
    run, effects = on(spec, run, UpdateArrived(1, "c"))
    assert (run.phase, effects) == (Phase.COMMITTING, (Fold("c"), Dismiss((("b", 1),)), CommitModel()))
    assert run.missed == (("b", 1, 2),)


def test_a_silent_client_that_is_heard_again_is_waited_for_and_its_update_counts() -> None:
    spec = make_spec(cohort={"min_clients": 3, "quorum": 2})
    run, _ = follow(spec, training(spec, *"abc"), Silence("b"), Silence("b", over=True), UpdateArrived(1, "a"))
    run, _ = on(spec, run, UpdateArrived(1, "c"))
    assert (run.phase, run.awaited) == (Phase.TRAINING, ("b",))
    run, _ = follow(spec, run, Silence("b"))
    assert run.phase is Phase.COMMITTING  # everybody else has answered
    run, _ = follow(spec, training(spec, *"abc"), Silence("b"), UpdateArrived(1, "b"))
    assert (run.folded, run.silent, run.missed) == (("b",), (), ())


def test_silence_that_puts_the_quorum_out_of_reach_begins_another_attempt_without_the_silent_one() -> None:
    spec = make_spec(cohort={"min_clients": 2, "silence_s": 30})
    run, effects = on(spec, training(spec, *"abc"), Silence("b"))
    assert (run.attempt, run.cohort, run.reason) == (
        2,
        ("a", "c"),
        "round 1, attempt 1 of 3: b: nothing heard for 30 s",
    )
    assert effects == (Dismiss((("b", 1),)), OpenSum(), StartDeadline(3600), Ask(("a", "c")))


def test_a_silent_evaluator_is_not_waited_for() -> None:
    spec = make_spec(evaluation__every=1)
    run = committed(spec, training(spec, "a", "b"), "a", "b")
    run, _ = on(spec, run, EvaluationArrived(1, "a", (("examples", 1), ("loss", 0))))
    run, effects = on(spec, run, Silence("b"))
    assert run.phase is Phase.FINISHED
    assert isinstance(effects[0], CloseRound)


def test_silence_of_somebody_who_is_not_at_work_changes_nothing() -> None:
    spec = make_spec(cohort={"min_clients": 3, "quorum": 1})
    run, _ = on(spec, training(spec, *"abc"), UpdateArrived(1, "a"))
    for event in (Silence("a"), Silence("z"), Silence("b", over=True)):
        assert on(spec, run, event) == (run, ())


# Rest -----------------------------------------------------------------------------------------------------------------


def test_who_misses_rounds_is_asked_less_and_less_often_and_again_after_an_answer() -> None:
    spec = make_spec(rounds=99, cohort={"min_clients": 2, "quorum": 2, "deadline_s": 9})
    run, asked = training(spec, "a", "b", "c"), []
    while run.round <= 50:
        number = run.round
        asked += [number] if "c" in run.cohort else []
        run, _ = follow(spec, run, UpdateArrived(number, "a"), UpdateArrived(number, "b"))
        if run.phase is Phase.TRAINING:
            run, _ = on(spec, run, DeadlinePassed(number, run.attempt, Phase.TRAINING))
        run, _ = on(spec, run, ModelCommitted(number))
    assert asked == [1, 2, 4, 8, 16, 32, 48]
    while "c" not in run.cohort:
        run = committed(spec, run, "a", "b")
    run = committed(spec, run, "a", "b", "c")
    assert not run.missed
    assert "c" in run.cohort


def test_who_rests_is_asked_when_there_are_too_few_others_or_it_connects_anew() -> None:
    spec = make_spec(rounds=9, cohort={"min_clients": 2, "quorum": 2})
    resting = Run(present=frozenset("abc"), missed=(("c", 2, 5),))
    run, _ = on(spec, resting, Turn())
    assert run.cohort == ("a", "b")
    run, _ = follow(spec, resting, gone("b"), Turn())
    assert run.cohort == ("a", "c")
    run, _ = follow(spec, resting, gone("c"), here("c"), Turn())
    assert (run.cohort, run.missed) == (("a", "b", "c"), (("c", 2, 0),))  # it may come; the next miss counts three
    often = Run(present=frozenset("abc"), missed=(("c", 3, 5),))
    run, _ = follow(spec, often, gone("c"), here("c"), Turn())
    assert run.cohort == ("a", "b")  # it may crash in each training


# Late updates ---------------------------------------------------------------------------------------------------------


def folding(**cohort: Any) -> RunSpec:
    return make_spec(rounds=9, cohort={"min_clients": 3, "quorum": 2, "deadline_s": 9, "late": "fold", **cohort})


def test_who_is_late_owes_its_update_which_the_next_round_folds() -> None:
    spec = folding()
    run, _ = follow(spec, training(spec, *"abc"), UpdateArrived(1, "a"), UpdateArrived(1, "b"))
    run, effects = on(spec, run, DeadlinePassed(1, 1, Phase.TRAINING))
    assert (run.owing, effects) == ((("c", 1),), (CommitModel(),))  # nobody is dismissed
    run, effects = on(spec, run, ModelCommitted(1))
    assert (run.round, run.cohort, run.target) == (2, ("a", "b"), 2)  # c is at work already
    assert run.wants("c", 1)
    run, effects = on(spec, run, UpdateArrived(1, "c", 12.0))
    assert (run.late, run.owing, run.missed, effects) == ((("c", 1),), (), (), (Fold("c"),))
    assert not run.wants("c", 1)
    run, effects = follow(spec, run, UpdateArrived(2, "a"), UpdateArrived(2, "b"))
    assert (run.phase, run.folded) == (Phase.COMMITTING, ("a", "b"))  # it does not stand in for one of the round's own
    run, _ = on(spec, run, ModelCommitted(2))
    assert (run.late, run.cohort) == ((), ("a", "b", "c"))


def test_a_late_update_that_comes_between_two_sums_goes_into_the_next() -> None:
    spec = make_spec(
        rounds=3, cohort={"min_clients": 3, "quorum": 2, "deadline_s": 9, "late": "fold"}, evaluation__every=1
    )
    run, _ = follow(spec, training(spec, *"abc"), UpdateArrived(1, "a"), UpdateArrived(1, "b"))
    run, _ = follow(spec, run, DeadlinePassed(1, 1, Phase.TRAINING), ModelCommitted(1))
    assert (run.phase, run.cohort, run.sum_round) == (Phase.EVALUATING, ("a", "b"), 2)  # who trains does not evaluate
    run, effects = on(spec, run, UpdateArrived(1, "c"))
    assert (run.late, effects) == ((("c", 1),), ())
    run, effects = follow(spec, run, *(EvaluationArrived(1, one, ()) for one in "ab"))
    assert (run.phase, run.cohort) == (Phase.TRAINING, ("a", "b"))
    assert effects[1:3] == (OpenSum(), Fold("c"))
    state, effects = on(spec, run, Restarted())
    assert effects[:2] == (OpenSum(), Fold("c"))
    state, effects = on(spec, run, Restarted(lost=("c",)))
    assert (state.late, effects[0], effects[1]) == ((), OpenSum(), StartDeadline(9))


def test_an_update_too_old_is_dismissed() -> None:
    spec = folding(max_staleness=2)
    run, _ = follow(spec, training(spec, *"abc"), UpdateArrived(1, "a"), UpdateArrived(1, "b"))
    run, _ = follow(spec, run, DeadlinePassed(1, 1, Phase.TRAINING), ModelCommitted(1))
    run = committed(spec, run, "a", "b")
    assert (run.round, run.owing) == (3, (("c", 1),))
    run, effects = follow(spec, run, UpdateArrived(3, "a"), UpdateArrived(3, "b"), ModelCommitted(3))
    assert (run.round, run.owing, run.cohort) == (4, (), ("a", "b", "c"))
    assert effects[0] == Dismiss((("c", 1),))
    with pytest.raises(WrongRound):
        on(spec, run, UpdateArrived(1, "c"))


def test_who_owes_and_falls_silent_fails_or_comes_back_without_its_work_owes_no_more() -> None:
    spec = folding()
    run, _ = follow(spec, training(spec, *"abc"), UpdateArrived(1, "a"), UpdateArrived(1, "b"))
    run, _ = follow(spec, run, DeadlinePassed(1, 1, Phase.TRAINING), ModelCommitted(1))
    state, effects = on(spec, run, Silence("c"))
    assert (state.owing, state.missed, effects) == ((), (("c", 1, 3),), (Dismiss((("c", 1),)),))
    assert on(spec, run, TaskFailed(1, "c", "no memory"))[0].owing == ()
    assert on(spec, run, here("c"))[0].owing == ()
    assert on(spec, run, ClientsChanged(arrived=("c",), working=(("c", 1),)))[0].owing == (("c", 1),)
    assert on(spec, run, gone("c"))[0].owing == (("c", 1),)  # it may come back with its work


def test_in_the_last_round_nobody_is_left_at_work() -> None:
    spec = folding()
    run = Run(
        Phase.TRAINING, frozenset("abcd"), 9, 1, target=2, cohort=("a", "b", "c"), folded=("a",), owing=(("d", 8),)
    )
    run, effects = on(spec, run, UpdateArrived(9, "b"))
    assert effects == (Fold("b"), Dismiss((("c", 9), ("d", 8))), CommitModel())
    run, effects = on(spec, run, ModelCommitted(9))
    assert (run.phase, run.owing) == (Phase.FINISHED, ())


# Without a quorum: pause and resume -----------------------------------------------------------------------------------


def test_a_paused_run_keeps_what_has_come_and_goes_on_with_it() -> None:
    spec = make_spec(rounds=2)
    run, effects = follow(spec, training(spec, "a", "b"), UpdateArrived(1, "a"), PauseRequested())
    assert (run.phase, run.folded) == (Phase.PAUSED, ("a",))
    assert run.reason == "paused by the operator; `seqfed resume` lets it go on"
    assert effects == (Dismiss((("b", 1),)), Suspend())
    with pytest.raises(WrongRound):
        on(spec, run, UpdateArrived(1, "b"))
    run, effects = follow(spec, run, Restarted(), here("a", "b"), ResumeRequested())
    assert (run.phase, run.reason, effects) == (Phase.QUEUED, "", ())
    run, effects = on(spec, run, Turn())
    assert (run.phase, run.round, run.attempt, run.folded) == (Phase.TRAINING, 1, 2, ("a",))
    assert effects == (OpenSum(), Fold("a"), StartDeadline(600), Ask(("b",)))


def test_a_pause_in_evaluation_closes_the_round_with_what_has_come() -> None:
    spec = make_spec(rounds=2, evaluation__every=1)
    run = committed(spec, training(spec, "a", "b"), "a", "b")
    run, effects = follow(spec, run, EvaluationArrived(1, "a", (("examples", 2), ("loss", 0))), PauseRequested())
    assert (run.phase, run.round, run.attempt, run.folded) == (Phase.PAUSED, 2, 0, ())
    assert isinstance(effects[0], CloseRound)
    assert (effects[0].round, effects[0].examples) == (1, 2)
    assert effects[1:] == (Dismiss((("b", 1),)), Suspend())
    run, effects = follow(spec, run, ResumeRequested(), Turn())
    assert (run.round, run.attempt, effects) == (2, 1, (OpenSum(), StartDeadline(600), Ask(("a", "b"))))


def test_a_pause_in_the_last_evaluation_ends_the_run() -> None:
    spec = make_spec(evaluation__every=1)
    run, _ = on(spec, committed(spec, training(spec, "a", "b"), "a", "b"), PauseRequested())
    assert run.phase is Phase.FINISHED


def test_a_queued_run_can_be_paused_and_only_a_paused_one_resumed() -> None:
    spec = make_spec()
    run, effects = on(spec, Run(), PauseRequested())
    assert (run.phase, effects) == (Phase.PAUSED, (Suspend(),))
    with pytest.raises(IllegalTransition, match="PauseRequested means nothing to a run that is paused"):
        on(spec, run, PauseRequested())
    run, _ = follow(spec, run, ResumeRequested(), here("a", "b"), Turn())
    assert (run.phase, run.round) == (Phase.TRAINING, 1)
    with pytest.raises(IllegalTransition):
        on(spec, run, ResumeRequested())
    assert on(spec, on(spec, run, PauseRequested())[0], StopRequested())[0].phase is Phase.STOPPED


# Asynchronous ---------------------------------------------------------------------------------------------------------


def buffered(buffer: int, concurrency: int, **changes: Any) -> RunSpec:
    return make_spec(
        **{
            "rounds": 5,
            "asynchronous": {"buffer": buffer, "concurrency": concurrency},
            "cohort__min_clients": 3,
            **changes,
        }
    )


def test_every_answer_lets_another_client_begin_and_a_full_buffer_makes_a_model() -> None:
    spec = buffered(2, 3)
    run = training(spec, *"abcde")
    assert (len(run.cohort), run.target) == (3, 2)
    first, second, third = run.cohort
    others = sorted({*"abcde"} - {*run.cohort})
    run, effects = on(spec, run, UpdateArrived(1, first))
    (asked,) = (one for one in effects if isinstance(one, Ask))
    assert asked.clients[0] in others
    assert (effects[0], len(asked.clients), len(run.pending)) == (Fold(first), 1, 3)
    run, effects = on(spec, run, UpdateArrived(1, second))
    assert (run.phase, effects) == (Phase.COMMITTING, (Fold(second), CommitModel()))
    assert run.owing == tuple((name, 1) for name in sorted((third, *asked.clients)))
    run, effects = on(spec, run, ModelCommitted(1))
    assert (run.phase, run.round, len(run.cohort)) == (Phase.TRAINING, 2, 1)  # two still train from the model before
    run, effects = on(spec, run, UpdateArrived(1, third))
    assert (run.late, effects[0]) == (((third, 1),), Fold(third))
    run, effects = on(spec, run, UpdateArrived(2, run.cohort[0]))
    assert run.phase is Phase.COMMITTING  # a stale one fills the buffer like another


def test_a_client_fills_one_place_of_a_buffer() -> None:
    spec = buffered(3, 3)
    run, effects = on(spec, training(spec, *"abc"), UpdateArrived(1, "a"))
    assert (run.pending, effects) == (("b", "c"), (Fold("a"),))
    run, effects = follow(spec, run, UpdateArrived(1, "b"), here("d"))
    assert effects == (Ask(("d",)),)


def test_an_asynchronous_round_survives_failures_silence_and_restarts() -> None:
    spec = buffered(2, 2)
    run = training(spec, *"abcd")
    first, second = run.cohort
    run, effects = on(spec, run, TaskFailed(1, first, "no memory"))
    assert isinstance(effects[0], Ask)
    (third,) = effects[0].clients
    run, effects = on(spec, run, Silence(second))
    assert isinstance(effects[0], Ask)
    (fourth,) = effects[0].clients
    assert {first, second, third, fourth} == {*"abcd"}
    run, effects = on(spec, run, UpdateArrived(1, third))
    run, effects = on(spec, run, Restarted())
    assert (run.folded, effects[:2]) == ((third,), (OpenSum(), Fold(third)))
    run, effects = on(spec, run, UpdateArrived(1, second))
    assert (run.phase, run.missed) == (Phase.COMMITTING, ())  # a new attempt: who failed had another chance


def test_an_asynchronous_round_that_nobody_can_fill_pauses_with_the_reason() -> None:
    spec = buffered(3, 3, cohort={"min_clients": 3, "max_attempts": 2})
    run = training(spec, *"abc")
    failures = [TaskFailed(1, name, "no memory") for name in "abc"]
    run, effects = follow(spec, run, *failures, *failures)
    assert (run.phase, effects[-1]) == (Phase.PAUSED, Suspend())
    assert run.reason == "round 1, attempt 2 of 2: a: no memory; b: no memory; c: no memory"


def test_a_quorum_at_the_deadline_is_enough_for_a_buffer() -> None:
    spec = buffered(3, 3, cohort={"min_clients": 3, "quorum": 1, "deadline_s": 9})
    run, _ = follow(spec, training(spec, *"abc"), UpdateArrived(1, "a"), DeadlinePassed(1, 1, Phase.TRAINING))
    assert (run.phase, run.owing) == (Phase.COMMITTING, (("b", 1), ("c", 1)))


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        (
            {"asynchronous": {"buffer": 3, "concurrency": 5}},
            "asynchronous.buffer (3) is more than cohort.min_clients (2)",
        ),
        ({"asynchronous": {"buffer": 2, "concurrency": 1}}, "asynchronous.concurrency (1)"),
        ({"asynchronous": {"buffer": 2}, "cohort": {"count": 2}}, "choose a round's cohort"),
        ({"asynchronous": {"buffer": 2}, "cohort": {"over_select": 1.5}}, "choose a round's cohort"),
        ({"cohort": {"grace_s": 5}}, "set cohort.quorum"),
        ({"cohort": {"silence_s": 1}}, "silence_s"),
        ({"cohort": {"late": "keep"}}, "late"),
    ],
)
def test_policies_that_contradict_each_other_are_refused_with_the_remedy(tables: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(RunSpec, {"data": {"features": 2, "classes": 2}, **tables}, "run.toml")
    assert told in str(caught.value)


# Who declines -----------------------------------------------------------------------------------------------------------


def declines(client: str, number: int = 1, why: str = "PolicyRefused: max_rounds") -> TaskFailed:
    return TaskFailed(number, client, why, lasting=True)


def test_who_declines_is_not_asked_again_in_this_run() -> None:
    spec = make_spec(rounds=3, evaluation__every=1)
    run, effects = on(spec, training(spec, *"abc"), declines("b"))
    assert (run.phase, run.attempt, run.cohort, run.target) == (Phase.TRAINING, 2, ("a", "c"), 2)
    assert Ask(("a", "c")) in effects
    assert run.given_up == 0  # refusals do not use up the attempts
    run = committed(spec, run, "a", "c")
    assert (run.phase, run.cohort) == (Phase.EVALUATING, ("a", "c"))
    run, _ = follow(spec, run, *(EvaluationArrived(1, name, (("examples", 1),)) for name in "ac"))
    assert (run.round, run.cohort) == (2, ("a", "c"))


def test_who_connects_anew_or_is_resumed_is_asked_again() -> None:
    spec = make_spec(rounds=3)
    run, _ = on(spec, training(spec, *"abc"), declines("b"))
    run, _ = on(spec, run, here("b"))
    assert not run.declined
    run, _ = on(spec, committed(spec, run, "a", "c"), declines("c", 2))
    assert run.cohort == ("a", "b")
    run, _ = follow(spec, run, PauseRequested(), ResumeRequested(), Turn())
    assert run.cohort == ("a", "b", "c")


def test_too_few_others_pause_the_run_with_the_rule_in_its_reason() -> None:
    spec = make_spec(rounds=3)
    run, _ = on(spec, training(spec, *"abc"), declines("b"))
    run, effects = on(spec, run, declines("a", why="PolicyRefused: operators: no"))
    assert run.phase is Phase.PAUSED
    assert run.reason == (
        "round 1: b declines: PolicyRefused: max_rounds; a declines: PolicyRefused: operators: no; "
        "`seqfed resume` asks them again"
    )
    assert effects == (Dismiss((("c", 1),)), Suspend())


def test_a_run_that_lacks_clients_in_any_case_goes_on_waiting() -> None:
    spec = make_spec(rounds=3)
    run, _ = follow(spec, training(spec, "a", "b"), gone("a"), declines("b"))
    assert (run.phase, run.declined) == (Phase.GATHERING, (("b", "PolicyRefused: max_rounds"),))
    run, _ = on(spec, run, here("a", "c"))
    assert (run.phase, run.cohort) == (Phase.TRAINING, ("a", "c"))


def test_where_the_quorum_is_there_without_it_the_round_goes_on() -> None:
    spec = make_spec(rounds=2, cohort={"min_clients": 3, "quorum": 2})
    run, _ = on(spec, training(spec, *"abc"), declines("b"))
    assert (run.phase, run.attempt) == (Phase.TRAINING, 1)
    run = committed(spec, run, "a", "c")
    assert (run.round, run.cohort, run.target) == (2, ("a", "c"), 2)


def test_a_refusal_beside_a_failure_uses_up_an_attempt() -> None:
    spec = make_spec(rounds=2, cohort={"min_clients": 2, "count": 3, "max_attempts": 2})
    run, _ = follow(spec, training(spec, *"abcdef"))
    first, second, _ = run.cohort
    run, _ = on(spec, run, TaskFailed(1, first, "DataError: no"))
    assert run.given_up == 1
    run, _ = on(spec, run, declines(run.cohort[0]))
    assert run.given_up == 1
    assert second or run.reason.startswith("round 1, attempt 2 of 2")


def test_who_declines_an_evaluation_or_a_late_update_is_left_out_too() -> None:
    spec = make_spec(rounds=3, evaluation__every=1)
    run = committed(spec, training(spec, *"abc"), *"abc")
    run, _ = follow(spec, run, declines("b"), *(EvaluationArrived(1, name, (("examples", 1),)) for name in "ac"))
    assert (run.round, run.cohort) == (2, ("a", "c"))
    spec = make_spec(rounds=3, cohort={"min_clients": 2, "quorum": 2, "late": "fold"})
    run, _ = follow(spec, training(spec, *"abc"), UpdateArrived(1, "a"), UpdateArrived(1, "b"))
    run, _ = follow(spec, run, DeadlinePassed(1, 1, Phase.TRAINING), ModelCommitted(1))
    assert run.owing == (("c", 1),)
    run, _ = on(spec, run, declines("c"))
    assert (run.owing, [name for name, _ in run.declined]) == ((), ["c"])


def test_an_asynchronous_run_goes_on_with_the_others_and_pauses_without() -> None:
    spec = make_spec(rounds=3, cohort__min_clients=3, asynchronous={"buffer": 3, "concurrency": 3})
    run, _ = on(spec, training(spec, *"abcd"), declines("a"))
    assert sorted(set(run.cohort) - {"a"}) == ["b", "c", "d"] or run.phase is Phase.TRAINING
    for name in [*run.awaited][:1]:
        run, _ = on(spec, run, declines(name))
    while run.phase is Phase.TRAINING and run.awaited:
        run, _ = on(spec, run, UpdateArrived(1, run.awaited[0]))
    assert run.phase is Phase.PAUSED
    assert "declines: PolicyRefused" in run.reason


def test_a_long_refusal_is_cut_before_it_is_kept() -> None:
    spec = make_spec(rounds=3)
    run, _ = on(spec, training(spec, *"abc"), declines("b", why="x" * 2000))
    assert len(run.declined[0][1]) == MOST_WORDS


def test_a_buffer_that_is_full_when_its_round_begins_asks_nobody_and_nobody_owes_what_it_was_not_asked() -> None:
    spec = buffered(2, 4, evaluation__every=1)
    run, _ = follow(spec, training(spec, *"abcd"), UpdateArrived(1, "a"), UpdateArrived(1, "b"), ModelCommitted(1))
    assert (run.phase, run.owing) == (Phase.EVALUATING, (("c", 1), ("d", 1)))
    run, _ = follow(spec, run, UpdateArrived(1, "c"), UpdateArrived(1, "d"))
    run, effects = follow(spec, run, *(EvaluationArrived(1, one, ()) for one in "ab"))
    assert effects[1:] == (OpenSum(), Fold("c"), Fold("d"), CommitModel())
    assert (run.phase, run.cohort, run.owing) == (Phase.COMMITTING, (), ())
    run, effects = on(spec, run, ModelCommitted(2))
    assert run.cohort == ("a", "b", "c", "d")


def test_after_a_restart_a_cohort_is_drawn_once_all_are_back_or_enough_time_has_passed() -> None:
    spec = make_spec(rounds=3, cohort={"min_clients": 2, "fraction": 0.5}, evaluation__every=1)
    names = [f"site-{number}" for number in range(8)]
    run = training(spec, *names)
    run = committed(spec, run, *run.cohort)
    undisturbed = follow(spec, run, *(EvaluationArrived(1, one, ()) for one in names))[0].cohort
    run, _ = follow(spec, run, *(EvaluationArrived(1, one, ()) for one in names[:6]), Restarted(), here(*names[6:]))
    run, effects = follow(spec, run, *(EvaluationArrived(1, one, ()) for one in names[6:]))
    assert (run.phase, run.round, effects[1:]) == (Phase.GATHERING, 2, (StartDeadline(60),))
    state, effects = on(spec, run, here(*names[:5]))
    assert (state.phase, effects) == (Phase.GATHERING, ())
    assert on(spec, state, here(names[5]))[0].cohort == undisturbed
    state, _ = on(spec, state, DeadlinePassed(2, 0, Phase.GATHERING))
    assert (state.phase, len(state.cohort)) == (Phase.TRAINING, 4)


def test_of_a_commit_whose_updates_are_lost_in_part_nobody_both_owes_and_is_asked() -> None:
    spec = folding()
    run, _ = follow(spec, training(spec, *"abc"), UpdateArrived(1, "a"), UpdateArrived(1, "b"))
    run, _ = follow(spec, run, DeadlinePassed(1, 1, Phase.TRAINING))
    run, _ = on(spec, run, Restarted(lost=("a",)))
    assert (run.phase, run.folded, run.pending, run.owing) == (Phase.TRAINING, ("b",), ("a", "c"), ())


def test_a_pause_does_not_count_towards_convergence() -> None:
    spec = make_spec(rounds=5, evaluation__every=1, convergence={"metric": "loss", "patience": 1})
    run = committed(spec, training(spec, "a", "b"), "a", "b")
    run, _ = follow(spec, run, *(EvaluationArrived(1, one, (("examples", 1), ("loss", 1))) for one in "ab"))
    run = committed(spec, run, "a", "b")
    run, _ = follow(spec, run, EvaluationArrived(2, "a", (("examples", 1), ("loss", 9))), PauseRequested())
    assert (run.phase, run.stale) == (Phase.PAUSED, 0)
