"""The server's half of one encrypted sum, in the manner of `masking.server`, whose steps, effects and other events it shares.

MASKING: everybody sends ciphertexts, which the server adds up. OPENING: two of those in the sum decrypt it, and must say the same
to the bit; where one leaves or is late, the next is asked, and has the time of a step from then on. Begun with those who have the
same key; who has another is told.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from seqfed.common.errors import (
    ConfigError,
    DuplicateUpdate,
    IllegalTransition,
    MaskingFailed,
    MaskingRefused,
    WrongRound,
)
from seqfed.common.homomorphic.messages import Circle, Encrypted, Opened, Ready, ToOpen
from seqfed.common.homomorphic.scheme import Form
from seqfed.common.masking.messages import Done
from seqfed.common.masking.server import (
    MOST_NAMED,
    Answer,
    Effect,
    Fail,
    Finish,
    Left,
    StartStep,
    Step,
    StepDeadline,
)
from seqfed.common.masking.terms import Terms

OPENERS: Final = 2
SHOWN: Final = 16  # hex digits of a key's digest that people see
DIGEST: Final = 32  # bytes


@dataclass(frozen=True)
class State:
    """The whole state of an encrypted sum, from its begin on."""

    terms: Terms
    names: tuple[str, ...]  # in ascending order
    step: Step = Step.MASKING
    added: Mapping[str, Encrypted] = field(default_factory=dict, repr=False)
    openers: tuple[str, ...] = ()  # who was asked to open it, in this order
    opened: Mapping[str, Opened] = field(default_factory=dict, repr=False)
    left: Mapping[str, str] = field(default_factory=dict)  # client: why it is not waited for
    strangers: Mapping[str, str] = field(default_factory=dict)  # client: why it is in none
    why: str = ""  # it failed

    @property
    def members(self) -> tuple[str, ...]:
        """Who takes part in the step under way."""
        match self.step:
            case Step.MASKING:
                return self.names
            case Step.OPENING:
                return self.openers
            case _:
                return ()

    @property
    def awaited(self) -> tuple[str, ...]:
        """The members that have neither answered nor left."""
        given = self.added if self.step is Step.MASKING else self.opened
        return tuple(name for name in self.members if name not in given and name not in self.left)

    @property
    def survivors(self) -> tuple[str, ...]:
        """Whose numbers are in the sum, in ascending order."""
        return tuple(sorted(self.added))


@dataclass(frozen=True)
class Added:
    """A client's ciphertexts lie whole, and of this digest, at the server."""

    client: str
    message: Encrypted


@dataclass(frozen=True)
class Decrypted:
    """What a client makes of the sum; its vector, if it has one, lies whole and of this digest at the server."""

    client: str
    message: Opened


Event = Added | Decrypted | Left | StepDeadline
Next = tuple[State, tuple[Effect, ...]]


def check_ready(form: Form, client: str, message: Ready) -> None:
    """Raise MaskingRefused unless the client speaks of the same sum, in the same scheme."""
    if message.agreed != form.agreed:
        raise MaskingRefused(
            f"client '{client}' has other terms of encrypted sum {form.terms.number}, or another scheme; run the same version "
            "of seqfed on both sides"
        )


def begin(terms: Terms, ready: Mapping[str, Ready]) -> Next:
    """The sum of those of these clients who have the key that most have, or, of equally many, the first one."""
    by_key = defaultdict[bytes, list[str]](list)
    for name in sorted(ready):
        by_key[ready[name].key].append(name)
    ours, names = min(by_key.items(), key=lambda item: (-len(item[1]), item[1]))
    strangers = {
        name: f"client '{name}' has another CKKS key ({key.hex()[:SHOWN]}) than {_named(names)} ({ours.hex()[:SHOWN]}); put the "
        "same file in both places (homomorphic_key)"
        for key, others in by_key.items()
        if key != ours
        for name in others
    }
    state = State(terms, tuple(names), strangers=strangers)
    if not terms.min_survivors <= len(names) <= terms.n_max:
        return _fail(
            state, f"{len(names)} clients, and it needs {terms.min_survivors} to {terms.n_max}", tuple(strangers)
        )
    return state, (Answer((*names, *strangers)), StartStep(state.step))


def on(state: State, event: Event) -> Next:
    """What the event makes of the sum, and what must be done about it; raises as `masking.server.on` does."""
    match event:
        case Added():
            return _added(state, event)
        case Decrypted():
            return _decrypted(state, event)
        case Left():
            if event.client not in state.names or state.step > Step.OPENING:
                return state, ()
            return _settle(replace(state, left={**state.left, event.client: event.why}))
        case StepDeadline():
            return _deadline(state, event) if event.step is state.step <= Step.OPENING else (state, ())
        case _:
            raise IllegalTransition(f"{type(event).__name__} means nothing to an encrypted sum")


def answer(state: State, client: str) -> Circle | ToOpen | Done | None:
    """The reply to this client's last message; None: it is not due yet.

    Raises WrongRound if the sum goes on without the client, MaskingFailed if it does not go on, ConfigError for another key.
    """
    if client in state.strangers:
        raise ConfigError(state.strangers[client])
    if state.step is Step.FAILED:
        raise MaskingFailed(state.why)
    if client not in state.names:
        raise MaskingRefused(f"client '{client}' is not in encrypted sum {state.terms.number}")
    if client not in state.added:
        if state.step is Step.MASKING:
            return Circle(state.names)
        raise _late(state, client)
    if state.step is Step.DONE:
        return Done()
    asked = state.step is Step.OPENING and client in state.openers and client not in state.opened
    return ToOpen(frozenset(state.added)) if asked else None


def _added(state: State, event: Added) -> Next:
    client, message = event.client, event.message
    if client in state.added:
        if state.added[client] != message:
            raise DuplicateUpdate(f"client '{client}' has sent other ciphertexts for this sum; those stand")
        return replace(state, left=_without(state.left, client)), ()
    if state.step is not Step.MASKING or client not in state.names:
        raise _late(state, client)
    if len(message.digest) != DIGEST:
        raise MaskingRefused(f"client '{client}': a digest of {len(message.digest)} bytes")
    return _settle(replace(state, left=_without(state.left, client), added={**state.added, client: message}))


def _decrypted(state: State, event: Decrypted) -> Next:
    client, message, terms = event.client, event.message, state.terms
    if client in state.opened:
        if state.opened[client] != message:
            raise DuplicateUpdate(f"client '{client}' has said something else of this sum; that stands")
        return state, ()
    if client not in state.openers:
        raise _late(state, client)
    if state.step is Step.DONE:
        return state, ()  # two others were enough
    if state.step is not Step.OPENING:
        raise _late(state, client)
    if len(message.scalars) != 8 * terms.scalars or len(message.digest) != (DIGEST if terms.dim else 0):
        raise MaskingRefused(f"client '{client}': what it has decrypted is not {terms.scalars} scalars and a digest")
    opened = {**state.opened, client: message}
    return _settle(replace(state, left=_without(state.left, client), opened=opened))


def _deadline(state: State, event: StepDeadline) -> Next:
    if state.step is Step.MASKING:
        return _conclude(state)
    late = {name: "no answer in time" for name in state.awaited if name in event.clients}
    return _settle(replace(state, left={**state.left, **late}))


def _settle(state: State) -> Next:
    if state.step is Step.OPENING:
        return _open(state)
    return (state, ()) if state.awaited else _conclude(state)


def _conclude(state: State) -> Next:
    if len(state.added) < state.terms.min_survivors:
        missed = tuple(name for name in state.names if name not in state.added)
        told = {**dict.fromkeys(missed, "no answer in time"), **state.left}
        what = f"{len(state.added)} of {len(state.names)} clients are left, and it needs {state.terms.min_survivors}; missing: "
        return _fail(state, what + _told(missed, told), missed)
    return _open(replace(state, step=Step.OPENING))


def _open(state: State) -> Next:
    """Finish, or see to it that two are at it."""
    if len(state.opened) >= OPENERS:
        one, other = sorted(state.opened)
        if state.opened[one] != state.opened[other]:
            what = f"'{one}' and '{other}' have decrypted it to different sums; one of them is not to be trusted, or broken"
            return _fail(state, what, tuple(sorted((one, other))))
        done = replace(state, step=Step.DONE)
        return done, (Answer(done.survivors), Finish(done.survivors))
    at_it = [name for name in state.openers if name in state.opened or name not in state.left]
    free = [name for name in state.survivors if name not in state.openers and name not in state.left]
    asked = tuple(free[: OPENERS - len(at_it)])
    if len(at_it) + len(asked) < OPENERS:
        gone = tuple(name for name in state.openers if name in state.left)
        return _fail(state, f"no {OPENERS} clients are left to open it; missing: {_told(gone, state.left)}", gone)
    begins = (Answer(asked), StartStep(Step.OPENING, asked)) if asked else ()
    return replace(state, openers=(*state.openers, *asked)), begins


def _fail(state: State, what: str, missed: tuple[str, ...]) -> Next:
    told = "".join(f"; {why}" for why in list(state.strangers.values())[:1])
    why = f"encrypted sum {state.terms.number} ended in step '{state.step.name.lower()}': {what}{told}"
    return replace(state, step=Step.FAILED, why=why), (Fail(why, missed),)


def _told(names: tuple[str, ...], why: Mapping[str, str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(f"{name} ({why[name]})" for name in names[:MOST_NAMED]) + more


def _named(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:MOST_NAMED]) + (" and others" if len(names) > MOST_NAMED else "")


def _without(left: Mapping[str, str], client: str) -> Mapping[str, str]:
    return {name: why for name, why in left.items() if name != client}


def _late(state: State, client: str) -> WrongRound:
    number, step = state.terms.number, state.step.name.lower()
    return WrongRound(
        f"encrypted sum {number} is at step '{step}', and has no place for this message of client '{client}'"
    )
