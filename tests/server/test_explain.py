"""The words that tell an operator why a run stands where it stands."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.server.conftest import make_spec

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


def test_who_is_waited_for_and_who_of_them_is_away() -> None:
    assert explain(SPEC, TRAINING, ["a", "b"], {}, "r") == "waits for 2 of 3 to train: b, c (away)"
    evaluating = replace(TRAINING, phase=Phase.EVALUATING, evaluated=("b",))
    assert explain(SPEC, evaluating, ["a", "c"], {}, "r") == "waits for 2 of 3 to evaluate: a, c"


def test_why_the_last_attempt_was_given_up_is_told_along() -> None:
    run = replace(TRAINING, reason="round 1, attempt 1 of 3: a: no data")
    assert explain(SPEC, run, ["b", "c"], {}, "r").endswith("train: b, c (before: round 1, attempt 1 of 3: a: no data)")
    waiting = replace(run, phase=Phase.GATHERING, cohort=())
    assert explain(SPEC, waiting, ["b", "c"], {}, "r").startswith("waits for 1 more of 3 clients; here: b, c (before:")


def test_saving_is_told() -> None:
    assert explain(SPEC, replace(TRAINING, phase=Phase.COMMITTING), [], {}, "r") == "saving the new model"


@pytest.mark.parametrize("phase", [one for one in Phase if one in ENDED])
def test_a_run_that_is_over_has_its_own_reason(phase: Phase) -> None:
    assert explain(SPEC, Run(phase, reason="because"), [], {}, None) == "because"


def test_every_phase_has_words() -> None:
    for phase in Phase:
        assert explain(SPEC, replace(TRAINING, phase=phase, reason="r"), ["a"], {}, None)
