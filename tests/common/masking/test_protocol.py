"""The whole protocol of a masked sum: the sum is the plain one to the last bit, or there is none and somebody is named."""

from __future__ import annotations

import gc
import logging
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.common.masking.run import (
    EVENTS,
    Course,
    Log,
    client_of,
    masked_sum,
    names_of,
    pinned,
    signer_of,
    started,
    terms_for,
)

from seqfed.common.errors import DuplicateUpdate, IllegalTransition, MaskingFailed, MaskingRefused, WrongRound
from seqfed.common.masking import keys
from seqfed.common.masking.client import Client
from seqfed.common.masking.messages import (
    OF_KEY,
    OF_SELF,
    Advert,
    Confirmed,
    Delivery,
    Done,
    KeyShares,
    MaskedInput,
    Opening,
    Roster,
    Survivors,
    bitmap,
    members_of,
)
from seqfed.common.masking.plan import Plan, advert_statement
from seqfed.common.masking.server import (
    Answer,
    Confirming,
    Fail,
    Finish,
    Left,
    Masked,
    Opened,
    Shared,
    StartStep,
    State,
    Step,
    StepDeadline,
    answer,
    begin,
    on,
)
from seqfed.common.masking.terms import WIDTHS
from seqfed.common.masking.unmasking import Unmasking, check_sums, unmasking

STEPS = tuple(EVENTS)


def quorum_of(n: int, malicious: bool) -> int:
    """As the table of the specification has it: more than two thirds, or more than half."""
    return next(count for count in range(n + 2) if (3 * count > 2 * n if malicious else 2 * count > n))


def assert_exact(course: Course) -> None:
    vector, scalars = course.total()
    expected, expected_scalars = course.expected()
    assert scalars == expected_scalars
    if expected is None:
        assert vector is None
    else:
        np.testing.assert_array_equal(vector, expected)


# The sum --------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(data=st.data())
def test_the_masked_sum_is_the_plain_sum_or_fails_and_says_through_whom(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 11), "clients")
    terms = terms_for(
        n,
        bits=data.draw(st.sampled_from([bits for bits in WIDTHS if n < 1 << bits - 1]), "bits"),
        dim=data.draw(st.integers(0, 40), "dim"),
        scalars=data.draw(st.integers(1, 4), "scalars"),
        malicious=data.draw(st.booleans(), "malicious"),
        min_survivors=data.draw(st.integers(2, n), "min_survivors"),
    )
    names = names_of(n)
    going = data.draw(
        st.dictionaries(st.sampled_from(names), st.tuples(st.sampled_from(STEPS), st.booleans()), max_size=n), "going"
    )
    gone = {step: {name for name, (at, left) in going.items() if at is step and left} for step in STEPS}
    silent = {step: {name for name, (at, left) in going.items() if at is step and not left} for step in STEPS}

    course = masked_sum(terms, names, gone, silent, seed=data.draw(st.integers(0, 9), "seed"))

    here, needed = set(names), max(quorum_of(n, terms.malicious), terms.min_survivors)
    survivors = set(names)
    for step in STEPS:
        here -= gone[step] | silent[step]
        if len(here) < needed:
            assert course.state.step is Step.FAILED
            assert course.failed is not None
            assert course.failed.missed == tuple(sorted(set(names) - here))
            assert f"'{step.name.lower()}'" in course.failed.why
            assert course.finished is None
            with pytest.raises(MaskingFailed):
                answer(course.state, names[0])
            return
        if step is Step.MASKING:
            survivors = set(here)
    assert course.failed is None
    assert course.finished == Finish(tuple(sorted(survivors)))
    assert_exact(course)


@pytest.mark.parametrize(("malicious", "drops"), [(True, 3), (False, 5)])
@pytest.mark.parametrize("step", STEPS)
def test_as_many_may_drop_out_in_any_step_as_the_threshold_leaves(malicious: bool, drops: int, step: Step) -> None:
    names = names_of(11)
    terms = terms_for(11, malicious=malicious)
    assert_exact(masked_sum(terms, names, {step: names[2 : 2 + drops]}))
    failed = masked_sum(terms, names, {step: names[2 : 3 + drops]}).failed
    assert failed is not None
    assert failed.missed == tuple(names[2 : 3 + drops])
    assert f"{10 - drops} of 11 clients are left, and it needs {11 - drops}" in failed.why


def test_a_sum_of_scalars_alone_sends_no_vector() -> None:
    names = names_of(4)
    course = masked_sum(terms_for(4, dim=0, levels=0), names, {Step.MASKING: names[:1]})
    assert set(course.vectors.values()) == {b""}
    assert {message.digest for message in course.state.masked.values()} == {b""}
    assert_exact(course)


def test_beyond_128_clients_each_has_a_few_neighbours() -> None:
    names = names_of(129)
    terms = terms_for(129, malicious=False, dim=3, bits=32)
    gone = {
        Step.SHARING: names[::60],
        Step.MASKING: names[1::60],
        Step.CONFIRMING: names[2:4],
        Step.OPENING: names[5:7],
    }
    course = masked_sum(terms, names, gone)
    neighbours = {name: course.state.plan.neighbours(name) for name in names}
    assert {len(one) for one in neighbours.values()} == {course.state.plan.parameters[0]}
    assert course.state.plan.parameters[0] < 70
    assert all(name in neighbours[other] for name in names for other in neighbours[name])
    assert_exact(course)


def test_a_client_that_goes_after_its_input_came_still_counts() -> None:
    names = names_of(4)
    course = masked_sum(terms_for(4), names, {Step.CONFIRMING: names[:1]})
    assert course.finished == Finish(tuple(names))
    assert_exact(course)


def test_what_a_client_sends_tells_nothing_without_the_others() -> None:
    names = names_of(5)
    first, second = (masked_sum(terms_for(5, dim=4000), names, {}) for _ in range(2))
    for name in names:
        assert first.vectors[name] != second.vectors[name]  # of the same numbers
        sent = np.frombuffer(first.vectors[name], "<u2")
        # uniform: 16 bins of 250 each, chi square with 15 degrees of freedom is below 60 but for 2e-7
        bins = np.histogram(sent, 16, (0, 1 << 16))[0]
        assert ((bins - 250) ** 2 / 250).sum() < 60
    assert_exact(first)
    assert_exact(second)


def inputs_due(given: Collection[str]) -> tuple[State, tuple[Any, ...]]:
    """A sum of 300 clients at the deadline of its inputs; all have shared, and these have sent theirs."""
    names = names_of(300)
    terms = terms_for(300)
    state = begin(terms, [client_of(terms, name, []).advertise() for name in names])
    shared = KeyShares({}, b"", {}, b"")
    masked = MaskedInput(b"", b"", b"")
    state = replace(
        state, step=Step.MASKING, shared=dict.fromkeys(names, shared), masked=dict.fromkeys(sorted(given), masked)
    )
    return on(state, StepDeadline(Step.MASKING))


def test_in_a_large_sum_nobodys_circle_may_be_short_of_its_threshold() -> None:
    names = names_of(300)
    state, effects = inputs_due(names)
    assert effects == (Answer(tuple(names)), StartStep(Step.CONFIRMING))
    plan = state.plan
    spare = len(plan.circle(names[0])) - plan.threshold
    neighbours = plan.neighbours(names[0])

    def without(gone: Collection[str]) -> Fail | None:
        masked = {name: one for name, one in state.masked.items() if name not in gone}
        _, effects = on(replace(state, step=Step.MASKING, masked=masked), StepDeadline(Step.MASKING))
        return next((one for one in effects if isinstance(one, Fail)), None)

    short, few = without(neighbours[: spare + 1]), without(names[:100])
    assert short is not None
    assert short.missed == neighbours[: spare + 1]
    assert f"fewer than {plan.threshold} are left" in short.why
    assert few is not None
    assert "200 of 300 clients are left, and it needs 201" in few.why


# The server's machine -------------------------------------------------------------------------------------------------


def test_the_course_of_a_sum_and_who_is_answered_what() -> None:
    names = names_of(4)
    course = started(terms_for(4), names)
    assert isinstance(answer(course.state, names[0]), Roster)
    expected: list[tuple[Step, type]] = [
        (Step.SHARING, Delivery),
        (Step.MASKING, Survivors),
        (Step.CONFIRMING, Confirmed),
        (Step.OPENING, Done),
    ]
    for step, reply in expected:
        assert course.state.members == tuple(names)
        for place, name in enumerate(names):
            assert course.state.awaited == tuple(names[place:])
            course.effects.clear()
            course.take(EVENTS[step](name, course.say(name)))
            if place < 3:
                assert course.effects == []
                assert answer(course.state, name) is None
        after = Finish(tuple(names)) if step is Step.OPENING else StartStep(Step(step + 1))
        assert course.effects == [Answer(tuple(names)), after]
        assert isinstance(answer(course.state, names[0]), reply)
    assert course.state.awaited == course.state.members == ()


@pytest.mark.parametrize("step", STEPS)
def test_the_same_again_is_answered_again_and_another_is_refused(step: Step) -> None:
    names = names_of(4)
    first, other = started(terms_for(4), names), started(terms_for(4), names)
    for before in STEPS[:step]:
        first.step(before)
        other.step(before)
    message, another = first.say(names[0]), other.say(names[0])
    first.take(EVENTS[step](names[0], message))
    state = first.state
    assert on(state, EVENTS[step](names[0], message)) == (state, ())
    with pytest.raises(DuplicateUpdate):
        on(state, EVENTS[step](names[0], another))
    for name in names[1:]:
        first.take(EVENTS[step](name, first.say(name)))
    over = first.state
    assert on(over, EVENTS[step](names[0], message)) == (over, ())
    assert answer(over, names[0]) is not None


@pytest.mark.parametrize("step", STEPS)
def test_who_is_too_late_is_told_so(step: Step) -> None:
    names = names_of(7)
    course = started(terms_for(7), names)
    for before in STEPS[:step]:
        course.step(before)
    message = course.say(names[0])
    course.step(step, silent=names[:1])
    with pytest.raises(WrongRound, match=f"'{Step(step + 1).name.lower()}'"):
        course.take(EVENTS[step](names[0], message))
    with pytest.raises(WrongRound):
        answer(course.state, names[0])


def test_messages_out_of_their_step_change_nothing() -> None:
    names = names_of(4)
    course = started(terms_for(4), names)
    shares = course.say(names[0])
    whole = masked_sum(terms_for(4), names, {})
    with pytest.raises(WrongRound):
        on(course.state, Masked(names[0], whole.state.masked[names[0]]))
    with pytest.raises(WrongRound):
        on(course.state, Confirming(names[0], whole.state.confirmed[names[0]]))
    with pytest.raises(WrongRound):
        on(course.state, Opened(names[0], whole.state.opened[names[0]]))
    with pytest.raises(WrongRound):
        on(course.state, Shared("client-9999", shares))
    with pytest.raises(MaskingRefused, match="not in the roster"):
        answer(course.state, "client-9999")
    with pytest.raises(IllegalTransition):
        on(course.state, "Surprise")  # type: ignore[arg-type]
    for step in Step:
        if step is not Step.SHARING:
            assert on(course.state, StepDeadline(step)) == (course.state, ())
    assert on(whole.state, Left(names[0], "gone")) == (whole.state, ())
    assert on(whole.state, StepDeadline(Step.DONE)) == (whole.state, ())


def test_who_has_left_is_not_waited_for_and_may_come_back() -> None:
    names = names_of(4)
    course = started(terms_for(4), names)
    course.take(Left(names[3], "it lost its connection"))
    assert course.state.awaited == tuple(names[:3])
    messages = {name: course.say(name) for name in names}
    course.take(Shared(names[3], messages[names[3]]))
    assert course.state.awaited == tuple(names[:3])
    # gone after its answer: not waited for in the next step, unless it says something
    course.take(Left(names[3], "it lost its connection"))
    for name in names[:3]:
        course.take(Shared(name, messages[name]))
    assert course.state.step is Step.MASKING
    assert course.state.members == tuple(names)
    assert course.state.awaited == tuple(names[:3])
    course.take(Shared(names[3], messages[names[3]]))
    assert course.state.awaited == tuple(names)
    # or before its answer: it is there again with that
    course.take(Left(names[2], "it lost its connection"))
    course.take(Masked(names[2], course.say(names[2])))
    for name in (names[0], names[1], names[3]):
        course.take(Masked(name, course.say(name)))
    assert course.state.awaited == tuple(names)
    for step in STEPS[2:]:
        course.step(step)
    assert course.finished == Finish(tuple(names))
    assert_exact(course)


def test_nobody_left_ends_it_at_once() -> None:
    names = names_of(4)
    course = started(terms_for(4), names)
    messages = {name: course.say(name) for name in names}
    for name in names:
        course.take(Left(name, "refused"))
        if name != names[3]:
            course.take(Shared(name, messages[name]))
            course.take(Left(name, "refused"))
    assert course.state.step is Step.FAILED
    assert course.failed == Fail(course.state.why, tuple(names))
    assert "client-0001 (refused)" in course.state.why


def test_a_sum_begins_with_enough_and_with_different_clients() -> None:
    names = names_of(4)
    terms = terms_for(4, min_survivors=3)
    adverts = [client_of(terms, name, names).advertise() for name in names]
    assert begin(terms, reversed(adverts)).roster.names == tuple(names)
    with pytest.raises(MaskingFailed, match="it needs 3 to 4"):
        begin(terms, adverts[:2])
    with pytest.raises(MaskingFailed, match="it needs 3 to 4"):
        begin(terms, [*adverts, client_of(terms, "more", ["more"]).advertise()])
    with pytest.raises(MaskingFailed, match="same key"):
        begin(terms, [*adverts[:3], replace(adverts[0], client="again")])
    again = Client(terms, names[0], signer_of("another"), 2, pinned([]), Log().begin).advertise()
    with pytest.raises(MaskingFailed, match="advertises twice"):
        begin(terms, [*adverts[:3], again])


# The client's order ---------------------------------------------------------------------------------------------------


def test_a_client_takes_each_step_once_and_in_order() -> None:
    names = names_of(3)
    terms = terms_for(3)
    course = started(terms, names)
    client = course.clients[names[0]]
    with pytest.raises(MaskingRefused, match="'confirm' when 'share' is due"):
        client.confirm(Survivors(frozenset(names)))
    # it has ended
    with pytest.raises(MaskingRefused, match="'share' when 'none' is due"):
        client.share(course.state.roster)

    course = masked_sum(terms, names, {})
    opened = answer(replace(course.state, step=Step.OPENING, opened={}), names[0])
    assert isinstance(opened, Confirmed)
    with pytest.raises(MaskingRefused, match="'open' when 'none' is due"):
        course.clients[names[0]].open(opened)


@pytest.mark.parametrize(
    ("vector", "scalars", "what"),
    [
        (np.zeros(10, np.uint16), [1, 2, 3], "10 numbers"),
        (None, [1, 2, 3], "0 numbers"),
        (np.zeros(11, np.uint32), [1, 2, 3], "uint32"),
        (np.zeros(11, np.int16), [1, 2, 3], "int16"),
        (np.zeros(11, np.uint16), [1, 2], "2 scalars"),
        (np.zeros(11, np.uint16), [1, 2, 1 << 62], "could wrap"),
        (np.zeros(11, np.uint16), [1, 2, -(1 << 62)], "could wrap"),
    ],
)
def test_a_client_masks_nothing_that_is_not_of_the_terms(vector: Any, scalars: list[int], what: str) -> None:
    names = names_of(3)
    course = started(terms_for(3), names)
    course.step(Step.SHARING)
    reply = answer(course.state, names[0])
    assert isinstance(reply, Delivery)
    with pytest.raises(MaskingRefused, match=what):
        course.clients[names[0]].mask(reply, vector, scalars)


def test_the_vector_is_masked_in_place_by_any_number_of_threads() -> None:
    names = names_of(3)
    course = started(terms_for(3, dim=300_000), names)
    course.step(Step.SHARING)
    reply = answer(course.state, names[0])
    assert isinstance(reply, Delivery)
    vector = course.plain[names[0]]
    assert vector is not None
    packed, _ = course.clients[names[0]].mask(reply, vector, course.scalars[names[0]], workers=2)
    assert packed == vector.astype("<u2").tobytes()


def test_a_step_is_begun_once_also_from_within_it() -> None:
    names = names_of(3)
    course = started(terms_for(3), names)
    client = course.clients[names[0]]

    def again(_: Advert) -> None:
        client.share(course.state.roster)

    client._trust = again
    with pytest.raises(MaskingRefused, match="'share' when 'none' is due"):
        client.share(course.state.roster)


def test_what_was_masked_when_the_sum_was_ended_is_not_sent() -> None:
    """The caller gives up in another thread, and the secrets are gone in the middle of the step."""
    names = names_of(3)
    course = started(terms_for(3), names)
    course.step(Step.SHARING)
    client = course.clients[names[0]]
    reply = answer(course.state, names[0])
    assert isinstance(reply, Delivery)

    class Ending(list[int]):
        def __iter__(self) -> Iterator[int]:
            client.wipe()
            return super().__iter__()

    with pytest.raises(MaskingRefused, match="ended in the course of step 'mask'"):
        client.mask(reply, np.zeros(11, np.uint16), Ending([1, 2, 3]))


def test_nothing_that_is_signed_can_be_taken_for_something_else() -> None:
    names = names_of(4)
    said = []
    for number in (1, 2):
        terms = terms_for(4, number=number)
        course = masked_sum(terms, names, {})
        roster = Roster(tuple(replace(advert, signature=b"") for advert in course.state.roster.adverts))
        same = replace(started(terms_for(4), names).state.roster.adverts[0], client="same")
        for plan in (course.state.plan, Plan(terms, roster)):
            said += (
                [advert_statement(terms, replace(same, client=name)) for name in names] if plan.roster is roster else []
            )
            said += [plan.shares_statement(name, course.state.shared[names[0]]) for name in names]
            for members in (names, names[1:]):
                said += [plan.input_statement(name, course.state.masked[names[0]], members) for name in names]
                said += [plan.survivors_statement(name, plan.agreed(names, members)) for name in names]
                said += [plan.survivors_statement(name, plan.agreed(members, names[2:])) for name in names]
    every = [keys.encode(*one) for one in said]
    assert len(every) == len(set(every)) == 2 * (4 + 2 * 4 * (1 + 2 * 3))
    bare = Roster(())
    assert Plan(terms_for(4), bare).hash != Plan(terms_for(5), bare).hash


# Secrets --------------------------------------------------------------------------------------------------------------


def secrets_of(course: Course, name: str) -> set[bytes]:
    """All that this client knows at this moment and nobody else may."""
    known = course.clients[name]._secrets
    assert known is not None
    every = [
        known.own,
        known.mask,
        known.encryption,
        *known.boxes.values(),
        *known.pairs.values(),
        *known.held.values(),
    ]
    return {one for one in every if one}


def reachable(root: object) -> Iterator[object]:
    """Everything that the object keeps alive, but for modules, classes and functions."""
    seen, todo = {id(root)}, [root]
    while todo:
        one = todo.pop()
        yield one
        for other in gc.get_referents(one):
            if id(other) not in seen and not callable(other) and not isinstance(other, type(gc)):
                seen.add(id(other))
                todo.append(other)


def test_secrets_are_in_no_repr_message_or_log_and_are_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    names = names_of(4)
    course = started(terms_for(4), names)
    secret = secrets_of(course, names[0])
    for step in STEPS:
        if step is Step.MASKING:
            secret |= secrets_of(course, names[0])
        if step is Step.CONFIRMING:
            # what has been shared is forgotten as soon as the input is masked, but for what is held for the opening
            known = course.clients[names[0]]._secrets
            assert known is not None
            assert known.own == known.mask == known.encryption == b""
            assert not known.boxes
            assert not known.pairs
            secret |= secrets_of(course, names[0])
        course.step(step)
    assert len(secret) == 3 + 2 * 3 + 4
    found = course.opened()
    shown = (
        "".join(map(repr, [course.state, found, course.clients[names[0]], *course.seen, *course.effects])) + caplog.text
    )
    opened = {key for keys in (found.plus, found.minus, found.scalar_plus, found.scalar_minus) for key in keys}
    for one in secret | opened:
        assert repr(one)[2:-1] not in shown
        assert one.hex() not in shown
    kept = {one for one in reachable(course.clients[names[0]]) if isinstance(one, bytes)}
    assert kept
    assert not secret & kept


def test_a_refusal_forgets_the_secrets_whoever_still_holds_its_traceback() -> None:
    names = names_of(4)
    course = started(terms_for(4), names)
    course.step(Step.SHARING)
    secret = secrets_of(course, names[0])
    with pytest.raises(MaskingRefused) as caught:
        course.clients[names[0]].mask(Delivery(frozenset(names[1:]), {}), None, [])
    kept = {one for one in reachable(course.clients[names[0]]) if isinstance(one, bytes)}
    assert not secret & kept
    frame = caught.value.__traceback__
    while frame is not None:
        for value in frame.tb_frame.f_locals.values():
            if value is not course and not isinstance(value, set):
                assert not secret & {one for one in reachable(value) if isinstance(one, bytes)}
        frame = frame.tb_next


def test_what_is_opened_is_one_share_of_each_and_of_the_right_secret() -> None:
    names = names_of(7)
    course = masked_sum(terms_for(7), names, {Step.MASKING: names[:1]})
    for opening in course.state.opened.values():
        assert isinstance(opening, Opening)
        kinds = {owner: share[0] for owner, share in opening.shares.items()}
        assert kinds == {name: OF_KEY if name == names[0] else OF_SELF for name in names}


# Odds and ends --------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 70), data=st.data())
def test_bitmaps_are_sets_of_names(n: int, data: st.DataObject) -> None:
    names = names_of(n)
    members = data.draw(st.frozensets(st.sampled_from(names)))
    made = bitmap(members, names)
    assert made == bytes(
        sum(1 << bit for bit in range(8) if 8 * byte + bit < n and names[8 * byte + bit] in members)
        for byte in range((n + 7) // 8)
    )
    assert members_of(made, names) == members
    for bad in (made + b"\0", made[:-1], *([bytes([*made[:-1], made[-1] | 1 << n % 8])] if n % 8 else [])):
        with pytest.raises(MaskingRefused, match="bitmap"):
            members_of(bad, names)


def test_sums_that_no_clients_can_have_are_found_out() -> None:
    most = {"weight": 100, "clients": 1, "clipped": 1}
    good = {"weight": 250, "clients": 3, "clipped": 0, "loss": -5}
    check_sums(good, 3, most)
    for bad in ({"weight": 301}, {"weight": -1}, {"clients": 2}, {"clients": 4}, {"clipped": 4}, {"clipped": -1}):
        with pytest.raises(MaskingFailed, match=next(iter(bad))):
            check_sums(good | bad, 3, most)


def test_the_unmasking_is_not_of_the_vector_and_the_scalars_with_one_key() -> None:
    names = names_of(4)
    found = masked_sum(terms_for(4), names, {Step.MASKING: names[:1]}).opened()
    assert isinstance(found, Unmasking)
    every = [*found.plus, *found.minus, *found.scalar_plus, *found.scalar_minus]
    assert len(every) == len(set(every)) == 2 * (3 + 3)


def test_unmasking_needs_no_more_than_the_threshold_of_openings() -> None:
    names = names_of(10)
    course = masked_sum(terms_for(10), names, {})
    openings = dict(list(course.state.opened.items())[3:])
    assert isinstance(unmasking(replace(course.state, opened=openings)), Unmasking)
    fewer = dict(list(course.state.opened.items())[4:])
    assert isinstance(unmasking(replace(course.state, opened=fewer)), Fail)
