"""The server's half of an encrypted sum: who is in it, who opens it, and what becomes of it when somebody is gone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.common.homomorphic.test_scheme import TERMS

from seqfed.common.errors import (
    ConfigError,
    DuplicateUpdate,
    IllegalTransition,
    MaskingFailed,
    MaskingRefused,
    SeqfedError,
    WrongRound,
)
from seqfed.common.homomorphic.messages import Circle, Encrypted, Opened, Ready, ToOpen
from seqfed.common.homomorphic.scheme import Form
from seqfed.common.homomorphic.server import Added, Decrypted, Event, State, answer, begin, check_ready, on
from seqfed.common.masking.messages import Done
from seqfed.common.masking.server import Answer, Effect, Fail, Finish, Left, StartStep, Step, StepDeadline

FORM = Form(TERMS)
KEY, OTHER = b"k" * 32, b"o" * 32
DIGEST = bytes(32)
OPENED = Opened(bytes(24), DIGEST)


def begun(names: str = "abcd", **keys: bytes) -> State:
    return begin(TERMS, {name: Ready(keys.get(name, KEY), FORM.agreed) for name in names})[0]


def follow(state: State, *events: Event) -> tuple[State, list[Effect]]:
    effects: list[Effect] = []
    for event in events:
        state, found = on(state, event)
        effects += found
    return state, effects


def added(names: str) -> list[Event]:
    return [Added(name, Encrypted(DIGEST)) for name in names]


def test_all_send_and_the_first_two_open() -> None:
    state = begun()
    assert [answer(state, name) for name in "ad"] == [Circle(tuple("abcd"))] * 2
    state, effects = follow(state, *added("abc"))
    assert (effects, answer(state, "a"), answer(state, "d")) == ([], None, Circle(tuple("abcd")))
    state, effects = follow(state, *added("d"))
    assert effects == [Answer(("a", "b")), StartStep(Step.OPENING, ("a", "b"))]
    assert [answer(state, name) for name in "abcd"] == [ToOpen(frozenset("abcd"))] * 2 + [None] * 2
    state, effects = follow(state, Decrypted("b", OPENED))
    assert (effects, answer(state, "b"), answer(state, "a")) == ([], None, ToOpen(frozenset("abcd")))
    state, effects = follow(state, Decrypted("a", OPENED))
    assert Finish(tuple("abcd")) in effects
    assert [answer(state, name) for name in "abcd"] == [Done()] * 4


def test_who_sends_nothing_is_left_out_at_the_deadline() -> None:
    state, effects = follow(begun(), *added("bcd"), StepDeadline(Step.MASKING))
    assert state.survivors == (*state.openers, "d") == tuple("bcd")
    with pytest.raises(WrongRound, match="is at step 'opening'"):
        answer(state, "a")
    with pytest.raises(WrongRound, match="has no place for this message of client 'a'"):
        on(state, Added("a", Encrypted(DIGEST)))
    assert StartStep(Step.OPENING, ("b", "c")) in effects


def test_too_few_end_it_by_name() -> None:
    state, effects = follow(begun(), *added("b"), Left("c", "it lost its connection"), StepDeadline(Step.MASKING))
    (fail,) = (one for one in effects if isinstance(one, Fail))
    assert fail.missed == tuple("acd")
    assert (
        "1 of 4 clients are left, and it needs 2; missing: a (no answer in time), c (it lost its connection)"
        in fail.why
    )
    with pytest.raises(MaskingFailed, match="1 of 4"):
        answer(state, "b")


def test_an_opener_that_leaves_or_is_late_is_followed_by_the_next() -> None:
    state, effects = follow(begun(), *added("abcd"), Left("a", "gone"))
    assert (state.openers, state.step) == (tuple("abc"), Step.OPENING)
    assert effects[-2:] == [Answer(("c",)), StartStep(Step.OPENING, ("c",))]
    state, effects = follow(state, Decrypted("c", OPENED), StepDeadline(Step.OPENING, ("a", "b")))
    assert state.openers == tuple("abcd")
    assert effects == [Answer(("d",)), StartStep(Step.OPENING, ("d",))]
    assert answer(state, "d") == ToOpen(frozenset("abcd"))
    finished, effects = follow(state, Decrypted("b", OPENED))  # late, and right
    assert Finish(tuple("abcd")) in effects
    assert follow(finished, Decrypted("d", OPENED)) == (finished, [])  # two others were enough
    assert answer(finished, "d") == Done()
    failed, effects = follow(state, Left("d", "it refuses"))
    assert failed.why.endswith(
        "no 2 clients are left to open it; missing: a (gone), b (no answer in time), d (it refuses)"
    )


def test_each_opener_has_the_time_of_a_step() -> None:
    first = StepDeadline(Step.OPENING, ("a", "b"))
    state, _ = follow(begun(), *added("abcd"), Decrypted("b", OPENED), Left("a", "gone"))
    assert follow(state, first, StepDeadline(Step.MASKING)) == (state, [])  # c was asked later
    assert answer(state, "c") == ToOpen(frozenset("abcd"))
    late, effects = follow(state, StepDeadline(Step.OPENING, ("c",)))
    assert (late.openers, late.left["c"]) == (tuple("abcd"), "no answer in time")
    assert effects == [Answer(("d",)), StartStep(Step.OPENING, ("d",))]
    assert follow(late, first, StepDeadline(Step.OPENING, ("c",))) == (late, [])
    failed, _ = follow(late, StepDeadline(Step.OPENING, ("d",)))
    assert failed.step is Step.FAILED


def test_two_that_do_not_agree_are_both_named() -> None:
    for other in (replace(OPENED, digest=b"x" * 32), replace(OPENED, scalars=b"\1" + bytes(23))):
        state, effects = follow(begun(), *added("abcd"), Decrypted("a", OPENED), Decrypted("b", other))
        (fail,) = (one for one in effects if isinstance(one, Fail))
        assert fail.missed == ("a", "b")
        assert "'a' and 'b' have decrypted it to different sums" in fail.why
        assert state.step is Step.FAILED


def test_who_has_another_key_is_told_and_done_without() -> None:
    state = begun("abcd", a=OTHER)
    assert state.names == tuple("bcd")
    told = r"client 'a' has another CKKS key \(6f6f.*\) than 'b', 'c', 'd' \(6b6b.*\); put the same file in both places"
    with pytest.raises(ConfigError, match=told):
        answer(state, "a")
    assert begun("abcd", c=OTHER, d=OTHER).names == ("a", "b")  # of equally many, the first
    failed, effects = begin(replace(TERMS, min_survivors=3), {"a": Ready(KEY, DIGEST), "b": Ready(OTHER, DIGEST)})
    (fail,) = effects
    assert isinstance(fail, Fail)
    assert "1 clients, and it needs 3 to 4" in fail.why
    assert "client 'b' has another CKKS key" in fail.why
    with pytest.raises(ConfigError, match="another CKKS key"):
        answer(failed, "b")
    with pytest.raises(MaskingFailed):
        answer(failed, "a")


def test_other_terms_or_another_scheme_are_refused() -> None:
    check_ready(FORM, "a", Ready(KEY, FORM.agreed))
    with pytest.raises(MaskingRefused, match="client 'a' has other terms of encrypted sum 7, or another scheme"):
        check_ready(FORM, "a", Ready(KEY, Form(replace(TERMS, round=4)).agreed))


def test_what_is_said_again_must_be_the_same() -> None:
    state, _ = follow(begun(), *added("a"))
    assert follow(state, *added("a")) == (state, [])
    with pytest.raises(DuplicateUpdate, match="other ciphertexts"):
        on(state, Added("a", Encrypted(b"x" * 32)))
    state, _ = follow(state, *added("bcd"), Decrypted("a", OPENED))
    assert follow(state, Decrypted("a", OPENED)) == (state, [])
    with pytest.raises(DuplicateUpdate, match="something else"):
        on(state, Decrypted("a", replace(OPENED, digest=b"x" * 32)))


def test_messages_out_of_turn_change_nothing() -> None:
    state = begun()
    with pytest.raises(WrongRound):
        on(state, Decrypted("a", OPENED))
    with pytest.raises(WrongRound):
        on(state, Added("e", Encrypted(DIGEST)))
    with pytest.raises(MaskingRefused, match="'e' is not in encrypted sum 7"):
        answer(state, "e")
    with pytest.raises(IllegalTransition):
        on(state, "open sesame")  # type: ignore[arg-type]
    state, _ = follow(state, *added("abcd"))
    with pytest.raises(WrongRound):
        on(state, Decrypted("d", OPENED))  # it was not asked
    for wrong in (replace(OPENED, scalars=bytes(16)), replace(OPENED, digest=b"")):
        with pytest.raises(MaskingRefused, match="is not 3 scalars and a digest"):
            on(state, Decrypted("a", wrong))


def deadlines(effects: Iterable[Effect]) -> list[StepDeadline]:
    return [StepDeadline(one.step, one.clients) for one in effects if isinstance(one, StartStep)]


@given(st.data())
def test_whatever_happens_it_ends_and_two_have_agreed_or_it_failed(data: st.DataObject) -> None:
    state, started = begin(TERMS, dict.fromkeys("abcd", Ready(KEY, FORM.agreed)))
    effects, clocks = list(started), deadlines(started)
    for _ in range(40):
        client = data.draw(st.sampled_from("abcde"))
        events: list[Event] = [
            Added(client, Encrypted(DIGEST)),
            Decrypted(client, OPENED),
            Left(client, "gone"),
            *clocks[:1],
        ]
        event = data.draw(st.sampled_from(events))
        if isinstance(event, StepDeadline):
            clocks.pop(0)
        try:
            state, found = on(state, event)
        except SeqfedError:
            continue
        effects += found
        clocks += deadlines(found)
    while clocks:  # nobody says anything any more
        state, found = on(state, clocks.pop(0))
        effects += found
        clocks += deadlines(found)
    ends = [one for one in effects if isinstance(one, Finish | Fail)]
    assert len(ends) == 1
    if isinstance(ends[0], Finish):
        assert len(state.opened) == 2
        assert ends[0].survivors == tuple(sorted(state.added))
        assert len(state.added) >= TERMS.min_survivors
    else:
        assert state.step is Step.FAILED
