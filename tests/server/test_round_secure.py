"""The round machine of a run with secure aggregation, and of one that measures its data first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.conftest import make_spec
from tests.server.test_round import EVENTS, SECURE, follow, gone, here, score, training

from seqfed.common.errors import SeqfedError, WrongRound
from seqfed.common.spec import RunSpec
from seqfed.server.round import (
    ENDED,
    WORKING,
    Ask,
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
    LeaveOut,
    Mask,
    MaskingEnded,
    ModelCommitted,
    PauseRequested,
    Phase,
    Restarted,
    ResumeRequested,
    Run,
    Silence,
    StartDeadline,
    Suspend,
    TaskFailed,
    Turn,
    Unmasked,
    UpdateArrived,
    on,
)
from seqfed.server.store import dump_state, load_state

NAMES = ("a", "b", "c", "d", "e")


def secure(**changes: Any) -> RunSpec:
    return make_spec(**{"cohort": {"min_clients": 3, "deadline_s": 600}, **SECURE, **changes})


def masking(spec: RunSpec, *names: str) -> Run:
    run = training(spec, *names)
    return follow(spec, run, *(UpdateArrived(1, name) for name in run.cohort))[0]


def test_a_round_by_hand() -> None:
    spec = secure(rounds=2, evaluation__every=2)
    run = training(spec, "a", "b", "c")
    assert (run.phase, run.number, run.cohort) == (Phase.TRAINING, 1, ("a", "b", "c"))
    run, effects = on(spec, run, UpdateArrived(1, "c"))
    assert effects == ()  # nothing is folded before all are there
    run, effects = follow(spec, run, UpdateArrived(1, "a"), UpdateArrived(1, "b"))
    assert (run.phase, effects) == (Phase.MASKING, (Mask(("c", "a", "b")),))
    assert run.working == (("c", 1), ("a", 1), ("b", 1))
    run, effects = on(spec, run, Unmasked(1, ("a", "c")))
    assert (run.phase, run.folded, effects) == (Phase.COMMITTING, ("a", "c"), (CommitModel(),))
    assert [name for name, _, _ in run.missed] == ["b"]
    run, effects = on(spec, run, ModelCommitted(1))
    assert (run.phase, run.round, run.number) == (Phase.TRAINING, 2, 2)
    assert effects[0] == CloseRound(1)


def test_a_quorum_at_the_deadline_is_masked_and_the_late_are_dismissed() -> None:
    spec = secure(cohort={"min_clients": 4, "quorum": 3})
    run = training(spec, *NAMES[:4])
    run, _ = follow(spec, run, *(UpdateArrived(1, name) for name in "abd"))
    run, effects = on(spec, run, DeadlinePassed(1, 1, Phase.TRAINING))
    assert effects == (Dismiss((("c", 1),)), Mask(("a", "b", "d")))


def test_a_sum_that_comes_to_nothing_is_tried_again_with_a_new_number_and_nobody_ready() -> None:
    spec = secure()
    run = masking(spec, "a", "b", "c", "d")
    cohort = run.cohort
    run, effects = on(spec, run, MaskingEnded(1, "2 of 4 stayed", ("a",)))
    assert (run.phase, run.attempt, run.number, run.folded, run.given_up) == (Phase.TRAINING, 2, 2, (), 1)
    assert run.reason == "round 1, attempt 1 of 3: 2 of 4 stayed"
    assert "a" not in run.cohort  # it rests, as there are others
    assert effects[-1] == Ask(run.cohort)
    assert cohort == ("a", "b", "c", "d")


def test_after_the_last_attempt_it_pauses() -> None:
    spec = secure(cohort={"min_clients": 3, "max_attempts": 1})
    run, effects = on(spec, masking(spec, "a", "b", "c"), MaskingEnded(1, "2 of 3 stayed"))
    assert (run.phase, run.masks, effects[-1]) == (Phase.PAUSED, "", Suspend())
    assert run.reason == "round 1, attempt 1 of 1: 2 of 3 stayed"
    run, _ = follow(spec, run, ResumeRequested(), Turn())
    assert (run.phase, run.number) == (Phase.TRAINING, 2)


@pytest.mark.parametrize("event", [Unmasked(7, ("a", "b", "c")), MaskingEnded(7, "x")])
def test_the_end_of_another_sum_has_the_wrong_round(event: Event) -> None:
    spec = secure()
    with pytest.raises(WrongRound, match="masked sum 7 is over; 1 is under way"):
        on(spec, masking(spec, "a", "b", "c"), event)


@pytest.mark.parametrize("event", [TaskFailed(1, "b", "MaskingRefused: x"), Silence("b")])
def test_who_fails_or_falls_silent_in_a_sum_is_left_out_once(event: Event) -> None:
    spec = secure()
    run, effects = on(spec, masking(spec, "a", "b", "c"), event)
    assert [one.client for one in effects if isinstance(one, LeaveOut)] == ["b"]
    assert run.working == (("a", 1), ("c", 1))
    assert on(spec, run, event) == (run, ())


def test_a_lost_connection_costs_no_place_in_a_sum_but_a_new_start_does() -> None:
    spec = secure()
    run, effects = on(spec, masking(spec, "a", "b", "c"), gone("b"))
    assert (run.failed, effects) == ((), ())
    back, effects = on(spec, run, ClientsChanged(arrived=("b",), working=(("b", 1),)))
    assert (back.failed, effects) == ((), ())
    _, effects = on(spec, run, here("b"))
    assert effects == (LeaveOut("b", "it was started anew"),)


def test_who_is_ready_and_leaves_must_come_back_ready() -> None:
    spec = secure(evaluation__every=1)
    run, _ = follow(spec, training(spec, "a", "b", "c"), UpdateArrived(1, "a"), gone("a"))
    assert (run.folded, run.pending) == ((), ("a", "b", "c"))
    run, effects = on(spec, run, here("a"))
    assert effects == (Ask(("a",)),)
    run, effects = follow(spec, run, *(UpdateArrived(1, name) for name in "abc"))
    assert effects == (Mask(("a", "b", "c")),)


def test_scores_are_masked_too() -> None:
    spec = secure(evaluation__every=1)
    run, effects = follow(spec, masking(spec, "a", "b", "c"), Unmasked(1, ("a", "b", "c")), ModelCommitted(1))
    assert (run.phase, run.number, effects[-1]) == (Phase.EVALUATING, 2, Ask(("a", "b", "c")))
    run, effects = follow(spec, run, *(EvaluationArrived(1, name, ()) for name in "bac"))
    assert (run.phase, run.masks, effects) == (Phase.MASKING, "evaluating", (Mask(("b", "a", "c")),))
    total = tuple(sorted(dict(score(3.0, 2, 4)).items()))
    run, effects = on(spec, run, Unmasked(2, ("a", "c"), total))
    assert run.phase is Phase.FINISHED
    assert effects == (CloseRound(1, {"loss": 0.75, "accuracy": 0.5}, {}, 4, 2), EndRun())


def test_too_few_scores_are_not_summed_and_a_lost_sum_of_them_is_worth_no_second_try() -> None:
    spec = secure(evaluation__every=1, rounds=2)
    run, _ = follow(spec, masking(spec, "a", "b", "c"), Unmasked(1, ("a", "b", "c")), ModelCommitted(1))
    few, effects = follow(spec, run, EvaluationArrived(1, "a", ()), gone("b"), gone("c"))
    assert effects[0] == CloseRound(1)
    assert few.phase is Phase.GATHERING
    lost, _ = follow(spec, run, *(EvaluationArrived(1, name, ()) for name in "abc"))
    lost, effects = on(spec, lost, MaskingEnded(2, "x"))
    assert (lost.phase, lost.round, effects[0]) == (Phase.TRAINING, 2, CloseRound(1))


@pytest.mark.parametrize("left", ["a", "ab", "abc"])
def test_fewer_than_a_sum_may_be_of_are_not_asked_for_scores(left: str) -> None:
    spec = secure(rounds=2, privacy={"secure_aggregation": True, "min_survivors": 3}, evaluation__every=1)
    run, _ = on(spec, masking(spec, "a", "b", "c", "d"), Unmasked(1, ("a", "b", "c", "d")))
    run, _ = follow(spec, run, gone(*left))
    run, effects = on(spec, run, ModelCommitted(1))
    if left == "a":
        assert (run.phase, run.round, run.cohort) == (Phase.EVALUATING, 1, ("b", "c", "d"))
    else:
        assert effects[0] == CloseRound(1)
        assert (run.phase, run.round) == (Phase.GATHERING, 2)


def test_no_more_are_asked_than_a_sum_bears() -> None:
    spec = secure(rounds=2, privacy={"secure_aggregation": True, "min_survivors": 2, "b": 4}, evaluation__every=1)
    run = training(spec, *NAMES)
    assert (len(run.cohort), run.target) == (3, 3)  # 2^3 - 1 is 3 clients' two levels each, and no fourth's
    asked = run.cohort
    run, _ = follow(spec, run, *(UpdateArrived(1, name) for name in asked), Unmasked(1, asked), ModelCommitted(1))
    assert (run.phase, run.cohort) == (Phase.EVALUATING, NAMES)  # scores have 64 bits


def test_no_more_are_asked_for_scores_than_an_encrypted_sum_bears() -> None:
    privacy = {"secure_aggregation": True, "mode": "semi_honest", "homomorphic": True, "min_survivors": 2}
    spec = secure(rounds=2, privacy=privacy, evaluation__every=1, data__normalise="federated")
    names = [f"client-{number}" for number in range(1003)]
    run, _ = follow(spec, Run(), Turn(), here(*names))
    assert (run.phase, len(run.cohort)) == (Phase.MEASURING, 1000)


def test_a_restart_begins_the_phase_anew_with_the_same_clients_and_another_number() -> None:
    spec = secure(evaluation__every=1)
    run = masking(spec, "a", "b", "c")
    for state in (
        follow(spec, training(spec, "a", "b", "c"), UpdateArrived(1, "a"))[0],
        run,
        on(spec, run, Unmasked(1, ("a", "b", "c")))[0],
    ):
        again, effects = on(spec, load_state(dump_state(state)), Restarted())
        assert (again.phase, again.attempt, again.number, again.folded) == (Phase.TRAINING, 2, 2, ())
        assert (again.cohort, again.given_up, effects[-1]) == (run.cohort, 0, Ask(run.cohort))
    scoring, _ = follow(spec, run, Unmasked(1, ("a", "b", "c")), ModelCommitted(1))
    summing, _ = follow(spec, scoring, *(EvaluationArrived(1, name, ()) for name in "abc"))
    for state in (scoring, summing):
        again, effects = on(spec, load_state(dump_state(state)), Restarted())
        assert (again.phase, again.number, again.masks) == (Phase.EVALUATING, 3, "")
        assert effects == (StartDeadline(600), Ask(("a", "b", "c")))


def test_the_data_are_measured_once_before_the_first_round() -> None:
    spec = make_spec(rounds=2, data__normalise="federated")
    run, effects = follow(spec, Run(), here("a", "b"), Turn())
    assert (run.phase, run.round, effects) == (Phase.MEASURING, 0, (StartDeadline(600), Ask(("a", "b"))))
    run, _ = on(spec, run, EvaluationArrived(0, "a", (("count.0", 2),)))
    run, effects = on(spec, run, EvaluationArrived(0, "b", (("count.0", 3),)))
    assert (run.phase, run.round, run.measured, run.scores) == (Phase.TRAINING, 1, (("count.0", 5),), ())
    assert Ask(("a", "b")) in effects
    again, _ = on(spec, load_state(dump_state(run)), Restarted())
    assert (again.phase, again.measured) == (Phase.TRAINING, run.measured)


def test_a_measuring_without_enough_answers_is_tried_again_and_then_pauses() -> None:
    spec = make_spec(data__normalise="federated", cohort={"min_clients": 2, "max_attempts": 2})
    run, effects = follow(
        spec, Run(), here("a", "b"), Turn(), TaskFailed(0, "a", "DataError: x"), EvaluationArrived(0, "b", ())
    )
    assert (run.phase, run.attempt, effects[-1]) == (Phase.MEASURING, 2, Ask(("a", "b")))
    run, _ = on(spec, run, DeadlinePassed(0, 2, Phase.MEASURING))
    assert (run.phase, run.reason) == (
        Phase.PAUSED,
        "measuring, attempt 2 of 2: a: nothing heard for 60 s; b: nothing heard for 60 s",
    )
    run, _ = follow(spec, run, ResumeRequested(), Turn())
    assert run.phase is Phase.MEASURING


def test_measuring_is_masked_in_a_secure_run() -> None:
    spec = secure(data__normalise="federated")
    run, _ = follow(spec, Run(), here("a", "b", "c"), Turn())
    run, effects = follow(spec, run, *(EvaluationArrived(0, name, ()) for name in "abc"))
    assert effects == (Mask(("a", "b", "c")),)
    run, _ = on(spec, run, Unmasked(1, ("a", "b", "c"), (("count.0", 9),)))
    assert (run.phase, run.round, run.measured, run.number) == (Phase.TRAINING, 1, (("count.0", 9),), 2)


def test_a_measuring_whose_sums_were_sent_is_not_tried_again() -> None:
    spec = secure(data__normalise="federated")
    run, _ = follow(spec, Run(), here("a", "b", "c"), Turn(), *(EvaluationArrived(0, name, ()) for name in "abc"))
    again, effects = on(spec, run, MaskingEnded(1, "x"))
    assert (again.phase, again.number, effects[-1]) == (Phase.MEASURING, 2, Ask(("a", "b", "c")))
    for event in (MaskingEnded(1, "x", given=True), Restarted()):
        ended, effects = on(spec, run, event)
        assert (ended.phase, effects[-1]) == (Phase.FAILED, EndRun())
        assert ended.reason.endswith("of the same data they give nothing twice; submit the run anew")


class Model:
    """What a coordinator does with the effects, and what must then be true."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec, self.run = spec, Run()
        self.number = 0  # the highest that was ever asked for
        self.ready: set[str] = set()  # who was ready since the last asking
        self.masked: int | None = None  # the sum that is under way
        self.models: list[tuple[str, ...]] = []
        self.closed: list[int] = []

    def give(self, event: Event) -> bool:
        before = self.run
        try:
            state, effects = on(self.spec, before, event)
        except SeqfedError:
            assert self.run == before
            return False
        assert state.number in {before.number, before.number + 1}
        if state.number != before.number:
            self.ready = set()
        if isinstance(event, UpdateArrived | EvaluationArrived):
            self.ready.add(event.client)
        elif isinstance(event, ClientsChanged) and before.phase in WORKING:
            self.ready -= set(event.left)
        self.run = state
        self.perform(state, event, effects)
        if state.phase is Phase.MASKING:
            assert self.masked == state.number
            assert state.masks
        else:
            assert not state.masks
        assert load_state(dump_state(state)) == replace(state, present=frozenset())
        return True

    def perform(self, state: Run, event: Event, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            assert not isinstance(effect, Fold), "nothing is folded one by one"
            match effect:
                case Ask():
                    assert state.phase in WORKING
                    self.number, self.masked = max(self.number, state.number), None
                case Mask(clients):
                    assert state.phase is Phase.MASKING
                    assert self.masked is None
                    assert state.number == self.number
                    assert len(clients) >= self.spec.privacy.min_survivors
                    assert set(clients) == set(state.ready) == self.ready & set(clients)
                    self.masked = state.number
                case LeaveOut(client):
                    assert self.masked == state.number
                    assert client in state.ready
                case CommitModel():
                    assert isinstance(event, Unmasked)
                    assert state.folded == event.survivors
                    self.models.append(state.folded)
                case CloseRound(number):
                    self.closed.append(number)
                case Suspend() | EndRun():
                    assert not state.working
                    self.masked = None
                case _:
                    pass

    def finish(self) -> None:
        for _ in range(200):
            run = self.run
            match run.phase:
                case Phase.QUEUED:
                    assert self.give(Turn())
                case Phase.GATHERING:
                    assert self.give(ClientsChanged(arrived=NAMES))
                case Phase.TRAINING:
                    assert self.give(UpdateArrived(run.round, run.pending[0]))
                case Phase.EVALUATING | Phase.MEASURING:
                    assert self.give(EvaluationArrived(run.round, run.pending[0], ()))
                case Phase.MASKING:
                    assert self.give(Unmasked(run.number, tuple(sorted(run.ready)), (("examples", 1), ("loss", 1))))
                case Phase.COMMITTING:
                    assert self.give(ModelCommitted(run.round))
                case Phase.PAUSED:
                    assert self.give(ResumeRequested())
                case _:
                    return
        raise AssertionError(f"stuck: {self.run}")


@st.composite
def moves(draw: st.DrawFn) -> tuple[str, str, int]:
    kinds = (
        "answer",
        "answer",
        "answer",
        "go",
        "come",
        "back",
        "fail",
        "silent",
        "deadline",
        "sum",
        "no sum",
        "crash",
        "pause",
        "any",
    )
    return draw(st.sampled_from(kinds)), draw(st.sampled_from(NAMES)), draw(st.sampled_from((0, 0, 0, 0, 1, -1)))


def make_move(model: Model, kind: str, name: str, shift: int) -> None:
    run = model.run
    number = run.round + shift
    match kind:
        case "crash":
            if run.phase not in ENDED:
                model.run, model.masked = load_state(dump_state(run)), None
                assert model.give(Restarted())
                assert model.run.phase is not Phase.MASKING
        case "answer" if run.phase is Phase.QUEUED:
            model.give(Turn())
        case "answer" if run.phase is Phase.COMMITTING:
            model.give(ModelCommitted(number))
        case "answer" if run.phase is Phase.TRAINING:
            model.give(UpdateArrived(number, name))
        case "answer":
            model.give(EvaluationArrived(number, name, ()))
        case "any":
            event = list(EVENTS.values())[(ord(name) + shift) % len(EVENTS)]
            if not isinstance(event, Restarted | UpdateArrived | EvaluationArrived | ModelCommitted):
                model.give(event)
        case _:
            events: dict[str, Event] = {
                "come": here(name),
                "back": ClientsChanged(arrived=(name,), working=tuple(one for one in run.working if one[0] == name)),
                "go": gone(name),
                "silent": Silence(name),
                "fail": TaskFailed(number, name, "x", lasting=shift == 1),
                "deadline": DeadlinePassed(number, run.attempt, run.phase),
                "sum": Unmasked(run.number + shift, run.ready[: max(2, len(run.ready) - 1)], (("examples", 1),)),
                "no sum": MaskingEnded(run.number + shift, "x", (name,)),
                "pause": PauseRequested() if shift else ResumeRequested(),
            }
            model.give(events[kind])


@settings(max_examples=300)
@given(
    st.integers(1, 3),
    st.integers(0, 2),
    st.booleans(),
    st.sampled_from(({}, {"quorum": 2}, {"count": 3, "over_select": 1.5})),
    st.lists(moves(), max_size=60),
)
def test_the_invariants_hold_under_any_events(
    rounds: int, every: int, measures: bool, policy: dict[str, Any], steps: list[tuple[str, str, int]]
) -> None:
    tables = {"data__normalise": "federated"} if measures else {}
    spec = make_spec(
        rounds=rounds,
        evaluation__every=every,
        cohort={"min_clients": 3, "deadline_s": 600, **policy},
        **SECURE,
        **tables,
    )
    model = Model(spec)
    model.give(here(*NAMES[:3]))
    for kind, name, shift in steps:
        make_move(model, kind, name, shift)
    model.finish()
    assert model.run.phase in ENDED
    if model.run.phase is Phase.FINISHED:
        assert model.closed == list(range(1, rounds + 1))
        assert len(model.models) >= rounds
