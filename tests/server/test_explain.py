"""The words that tell an operator why a run stands where it stands."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.server.conftest import make_spec

from seqfed.common.views import Progress, Stage, TaskView
from seqfed.server.explain import explain
from seqfed.server.round import ENDED, Phase, Run

SPEC = make_spec(cohort__min_clients=3)
TRAINING = Run(Phase.TRAINING, frozenset("ab"), 1, 1, cohort=("a", "b", "c"), folded=("a",))


def test_too_few_clients_are_counted_and_named() -> None:
    assert explain(SPEC, Run(), [], {}, None) == "waits for 3 more of 3 clients; nobody is here"
    assert explain(SPEC, Run(), ["a"], {}, "other") == "waits for 2 more of 3 clients; here: a"
    assert explain(SPEC, Run(Phase.GATHERING), ["a", "b"], {}, None) == "waits for 1 more of 3 clients; here: a, b"


def test_who_does_not_fit_is_told_with_the_reason_but_not_a_thousand_of_them() -> None:
    misfits = {f"site-{number}": "has no legs" for number in range(1000)}
    told = explain(SPEC, Run(), ["a"], misfits, None)
    assert told.startswith("waits for 2 more of 3 clients; here: a; site-0 does not fit: it has no legs; site-1 does")
    assert told.count("does not fit") == 5


def test_many_names_are_cut_short() -> None:
    names = [f"site-{number}" for number in range(20)]
    told = explain(make_spec(cohort__min_clients=30), Run(), names, {}, None)
    assert told.endswith("here: site-0, site-1, site-2, site-3, site-4, site-5, site-6, site-7 and 12 more")


def test_a_queued_run_names_the_run_before_it() -> None:
    assert explain(SPEC, Run(), ["a", "b", "c"], {}, "0123") == "queued: run 0123 has its turn"
    assert explain(SPEC, Run(), ["a", "b", "c"], {}, None) == "about to begin"


def task(client: str, progress: Progress | None = None, silent_s: float = 0, **changes: Any) -> TaskView:
    return replace(TaskView(client, 1, progress, silent_s, connected=True), **changes)


def test_who_is_waited_for_what_each_is_at_and_how_long_yet() -> None:
    tasks = [task("b", Progress(Stage.TRAINING, 61, 100, 2, 0.5)), task("c", silent_s=40)]
    told = explain(SPEC, TRAINING, ["a", "b", "c"], {}, "r", tasks, 20.4)
    assert told == "round 1 waits for 2 of 3: b training 61 %, c silent for 40 s, deadline in 20 s"
    evaluating = replace(TRAINING, phase=Phase.EVALUATING, evaluated=("b",))
    tasks = [task("a"), task("c", connected=False, silent_s=7)]
    told = explain(SPEC, evaluating, ["a"], {}, "r", tasks)
    assert told == "the model of round 1 waits for 2 of 3 to score it: a, c away for 7 s"


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (Progress(Stage.READING), "b preparing"),
        (Progress(Stage.FETCHING, 1, 3), "b fetching 33 %"),
        (Progress(Stage.SENDING), "b sending"),
        (Progress(Stage.EVALUATING, 3, 3), "b evaluating 100 %"),
    ],
)
def test_every_stage_has_words(progress: Progress, words: str) -> None:
    run = replace(TRAINING, cohort=("a", "b"))
    assert explain(SPEC, run, ["b"], {}, "r", [task("b", progress)]) == f"round 1 waits for 1 of 2: {words}"


def test_an_asynchronous_round_counts_its_updates_and_names_the_older_work() -> None:
    spec = make_spec(asynchronous__buffer=2, asynchronous__concurrency=3, cohort__min_clients=2)
    run = replace(TRAINING, round=4, target=2, cohort=("a", "b"), owing=(("c", 3),))
    told = explain(spec, run, ["b", "c"], {}, "r", [task("b", round=4), task("c", round=3)], 5.0)
    assert told == "round 4 has 1 of 2 updates: b, c (of round 3), deadline in 5 s"


def test_a_round_that_waits_for_late_work_says_so() -> None:
    run = Run(Phase.GATHERING, frozenset("abc"), 2, owing=(("c", 1),))
    assert explain(SPEC, run, ["a", "b", "c"], {}, "r") == "waits for 1 that still work on an earlier round: c"


def test_why_the_last_attempt_was_given_up_is_told_along() -> None:
    run = replace(TRAINING, reason="round 1, attempt 1 of 3: a: no data")
    assert explain(SPEC, run, ["b", "c"], {}, "r").endswith("of 3: b, c (before: round 1, attempt 1 of 3: a: no data)")
    waiting = replace(run, phase=Phase.GATHERING, cohort=())
    assert explain(SPEC, waiting, ["b", "c"], {}, "r").startswith("waits for 1 more of 3 clients; here: b, c (before:")


def test_saving_is_told() -> None:
    assert explain(SPEC, replace(TRAINING, phase=Phase.COMMITTING), [], {}, "r") == "round 1: saving the new model"


@pytest.mark.parametrize("phase", [one for one in Phase if one in {*ENDED, Phase.PAUSED}])
def test_a_run_that_is_over_has_its_own_reason(phase: Phase) -> None:
    assert explain(SPEC, Run(phase, reason="because"), [], {}, None) == "because"


def test_every_phase_has_words() -> None:
    for phase in Phase:
        assert explain(SPEC, replace(TRAINING, phase=phase, reason="r"), ["a"], {}, None)
