"""The server's half of one masked sum: a pure function of what its clients send, in the style of `seqfed.server.round`.

`on(state, event) -> (state, effects)`. Whoever performs the effects holds each client's call until `answer` has a reply to
it. A step is over when every member has answered or left, or at its deadline; the members of the next are those who answered.
It fails as soon as a step ends with too few: fewer than the quorum or `min_survivors`, or than the threshold of one client's
circle, whose masks then could not be taken off. A client that is gone after its input came still counts, so long as the others
suffice to open its mask.

The server needs none of its own checks for anybody's secrecy, which the clients look after themselves; they keep one client's
garbage from costing all the others the sum, and say whose it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, Final

from seqfed.common.errors import DuplicateUpdate, IllegalTransition, MaskingFailed, WrongRound
from seqfed.common.masking.checks import check_confirm, check_input, check_opening, check_shares
from seqfed.common.masking.messages import (
    Advert,
    Confirm,
    Confirmed,
    Delivery,
    Done,
    KeyShares,
    MaskedInput,
    Opening,
    Reply,
    Roster,
    Survivors,
)
from seqfed.common.masking.plan import Plan
from seqfed.common.masking.terms import Terms

MOST_NAMED: Final = 8  # clients in the words of a failure


class Step(IntEnum):
    """What is awaited."""

    SHARING = 0
    MASKING = 1
    CONFIRMING = 2
    OPENING = 3
    DONE = 4
    FAILED = 5


@dataclass(frozen=True)
class State:
    """The whole state of a masked sum, from its roster on. What has come, by client; who gave the last step's are the members."""

    plan: Plan = field(repr=False)
    step: Step = Step.SHARING
    shared: Mapping[str, KeyShares] = field(default_factory=dict, repr=False)
    masked: Mapping[str, MaskedInput] = field(default_factory=dict, repr=False)
    confirmed: Mapping[str, Confirm] = field(default_factory=dict, repr=False)
    opened: Mapping[str, Opening] = field(default_factory=dict, repr=False)
    left: Mapping[str, str] = field(default_factory=dict)  # client: why it is not waited for
    why: str = ""  # it failed

    @property
    def terms(self) -> Terms:
        return self.plan.terms

    @property
    def roster(self) -> Roster:
        return self.plan.roster

    @property
    def given(self) -> Mapping[str, Any]:
        """What has come in the step under way, by client."""
        return self._given_in(self.step)

    @property
    def members(self) -> tuple[str, ...]:
        """Who takes part in the step under way, in ascending order."""
        if self.step is Step.SHARING:
            return self.roster.names
        return tuple(sorted(self._given_in(Step(self.step - 1)))) if self.step <= Step.OPENING else ()

    @property
    def awaited(self) -> tuple[str, ...]:
        """The members that have neither answered nor left."""
        return tuple(name for name in self.members if name not in self.given and name not in self.left)

    @property
    def survivors(self) -> tuple[str, ...]:
        """Whose input is in the sum, in ascending order; none before that is settled."""
        return tuple(sorted(self.masked)) if self.step > Step.MASKING else ()

    def _given_in(self, step: Step) -> Mapping[str, Any]:
        every: tuple[Mapping[str, Any], ...] = (self.shared, self.masked, self.confirmed, self.opened)
        return every[step] if step <= Step.OPENING else {}


# Events ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """Step 1 of a client."""

    client: str
    message: KeyShares


@dataclass(frozen=True)
class Masked:
    """Step 2 of a client; its vector, if the sum has one, lies whole and of this digest at the server."""

    client: str
    message: MaskedInput


@dataclass(frozen=True)
class Confirming:
    """Step 3 of a client."""

    client: str
    message: Confirm


@dataclass(frozen=True)
class Opened:
    """Step 4 of a client."""

    client: str
    message: Opening


@dataclass(frozen=True)
class Left:
    """A client is no longer waited for: gone, silent, failed, refusing. What it sends before the step is over still counts."""

    client: str
    why: str


@dataclass(frozen=True)
class StepDeadline:
    """The time for this step is over; clients: of these, who were asked at once (see `StartStep`)."""

    step: Step
    clients: tuple[str, ...] = ()


Event = Shared | Masked | Confirming | Opened | Left | StepDeadline

# Effects --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """The calls that these clients have open have their replies now (see `answer`)."""

    clients: tuple[str, ...]


@dataclass(frozen=True)
class StartStep:
    """Send StepDeadline for this step, and these clients, after the time that a step may take. clients: who begins it now, where
    not all members do.
    """

    step: Step
    clients: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finish:
    """All has come: call `unmasking`, in a thread, and take the masks off the sum of the survivors' vectors."""

    survivors: tuple[str, ...]


@dataclass(frozen=True)
class Fail:
    """No sum comes about. missed: through whom, in ascending order."""

    why: str
    missed: tuple[str, ...]


Effect = Answer | StartStep | Finish | Fail
Next = tuple[State, tuple[Effect, ...]]


def begin(terms: Terms, adverts: Iterable[Advert]) -> State:
    """The sum of these clients, whose calls can be answered now, and for which the step SHARING starts.

    Precondition: each advert passed `checks.check_advert`. Raises MaskingFailed for too few or too many clients, and for two
    with one key.
    """
    terms.check()
    roster = Roster(tuple(sorted(adverts, key=lambda advert: advert.client)))
    every = [key for one in roster.adverts for key in (one.encryption_key, one.mask_key, one.identity_key)]
    if not terms.min_survivors <= len(roster.names) <= terms.n_max:
        raise MaskingFailed(
            f"masked sum {terms.number} of {len(roster.names)} clients; it needs {terms.min_survivors} to {terms.n_max}"
        )
    if len(set(every)) < len(every) or len(set(roster.names)) < len(roster.names):
        raise MaskingFailed(
            f"masked sum {terms.number}: two clients advertise the same key, or one client advertises twice"
        )
    return State(Plan(terms, roster))


def on(state: State, event: Event) -> Next:
    """What the event makes of the sum, and what must be done about it.

    A client's message raises MaskingRefused if it is malformed or not the client's, DuplicateUpdate if the client has sent
    another in its place, and WrongRound if its step is over or has not begun; nothing has changed then. The same message
    again is answered again.
    """
    handler = TRANSITIONS.get(type(event))
    if handler is None:
        raise IllegalTransition(f"{type(event).__name__} means nothing to a masked sum")
    return handler(state, event)


def answer(state: State, client: str) -> Reply | None:
    """The reply to this client's last message, its advert at first; None: it is not due yet.

    Raises WrongRound if the sum goes on without the client, and MaskingFailed if it does not go on.
    """
    if state.step is Step.FAILED:
        raise MaskingFailed(state.why)
    state.roster.index(client)
    every = (state.shared, state.masked, state.confirmed, state.opened)
    given = sum(client in one for one in every)
    if given > state.step:
        return None
    if given < state.step:
        raise _late(state, client)
    match given:
        case Step.SHARING:
            return state.roster
        case Step.MASKING:
            sealed = {
                name: state.shared[name].sealed[client]
                for name in state.plan.neighbours(client)
                if name in state.shared
            }
            return Delivery(frozenset(state.shared), sealed)
        case Step.CONFIRMING:
            return Survivors(frozenset(state.masked))
        case Step.OPENING:
            return Confirmed({name: message.signature for name, message in state.confirmed.items()})
        case _:
            return Done()


# Steps ----------------------------------------------------------------------------------------------------------------


def _message(step: Step, check: Callable[[State, str, Any], None]) -> Callable[[State, Any], Next]:
    """The handler of a client's message in this step."""

    def handle(state: State, event: Shared | Masked | Confirming | Opened) -> Next:
        client, given = event.client, state._given_in(step)
        if client in given:
            if given[client] != event.message:
                raise DuplicateUpdate(
                    f"client '{client}' has sent something else for step '{step.name.lower()}'; that stands"
                )
            # who says it again is there again
            return replace(state, left=_without(state.left, client)), ()
        if state.step is not step or client not in (state._given_in(Step(step - 1)) if step else state.roster):
            raise _late(state, client)
        check(state, client, event.message)
        return _settle(_with(replace(state, left=_without(state.left, client)), {**given, client: event.message}))

    return handle


def _without(left: Mapping[str, str], client: str) -> Mapping[str, str]:
    return {name: why for name, why in left.items() if name != client} if client in left else left


def _with(state: State, given: Mapping[str, Any]) -> State:
    match state.step:
        case Step.SHARING:
            return replace(state, shared=given)
        case Step.MASKING:
            return replace(state, masked=given)
        case Step.CONFIRMING:
            return replace(state, confirmed=given)
        case _:
            return replace(state, opened=given)


def _left(state: State, event: Left) -> Next:
    """Neither in this step nor, unless it comes back, in the next."""
    if state.step > Step.OPENING or event.client not in state.members:
        return state, ()
    return _settle(replace(state, left={**state.left, event.client: event.why}))


def _deadline(state: State, event: StepDeadline) -> Next:
    return _conclude(state) if event.step is state.step and state.step <= Step.OPENING else (state, ())


def _settle(state: State) -> Next:
    return (state, ()) if state.awaited else _conclude(state)


def _conclude(state: State) -> Next:
    """The step is over: go on with those who answered, or fail if they are too few."""
    plan, given = state.plan, state.given
    # whoever has shared has masks in the sum that must come off; before, whoever shares now
    masked = state.shared
    needed = max(plan.quorum, state.terms.min_survivors)
    if len(given) < needed:
        return _fail(state, f"{len(given)} of {len(plan.roster.names)} clients are left, and it needs {needed}")
    for name in sorted(masked):
        if not plan.supported(name, given):
            return _fail(state, f"of the clients that hold shares of '{name}' fewer than {plan.threshold} are left")
    done = Answer(tuple(sorted(given)))
    state = replace(state, step=Step(state.step + 1))
    if state.step is Step.DONE:
        return state, (done, Finish(state.survivors))
    settled, effects = _settle(state)
    return settled, (done, StartStep(state.step), *effects)


def _fail(state: State, what: str) -> Next:
    missed = tuple(name for name in state.roster.names if name not in state.given)
    told = [f"{name} ({state.left.get(name, 'no answer in time')})" for name in missed]
    more = f" and {len(told) - MOST_NAMED} more" if len(told) > MOST_NAMED else ""
    why = (
        f"masked sum {state.terms.number} ended in step '{state.step.name.lower()}': {what}; "
        f"missing: {', '.join(told[:MOST_NAMED])}{more}"
    )
    return replace(state, step=Step.FAILED, why=why), (Fail(why, missed),)


def _late(state: State, client: str) -> WrongRound:
    number, step = state.terms.number, state.step.name.lower()
    return WrongRound(
        f"masked sum {number} is at step '{step}', and has no place for this message of client '{client}'"
    )


def _shares(state: State, client: str, message: KeyShares) -> None:
    check_shares(state.plan, client, message)


def _input(state: State, client: str, message: MaskedInput) -> None:
    check_input(state.plan, client, message, state.shared)


def _confirm(state: State, client: str, message: Confirm) -> None:
    check_confirm(state.plan, client, message, state.shared, state.masked)


def _opening(state: State, client: str, message: Opening) -> None:
    check_opening(state.plan, client, message, state.shared, state.masked)


TRANSITIONS: Final[Mapping[type, Callable[[State, Any], Next]]] = {
    Shared: _message(Step.SHARING, _shares),
    Masked: _message(Step.MASKING, _input),
    Confirming: _message(Step.CONFIRMING, _confirm),
    Opened: _message(Step.OPENING, _opening),
    Left: _left,
    StepDeadline: _deadline,
}
