"""The masked sums of a world: what each client gave for each of them, which were opened, and what must never be.

Real are both halves and all their secrets. The world looks at each step of either side from outside, so it knows what nobody
in it does: what stands in a masked vector.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tests.simulation.oracle import OpenSum
from tests.simulation.people import Violation
from tests.simulation.plan import STEPS

from seqfed.client import secure
from seqfed.client.secure import Given
from seqfed.client.work import LocalUpdate
from seqfed.common.masking import server as half
from seqfed.common.masking.client import Client
from seqfed.common.masking.terms import Purpose, Terms
from seqfed.common.masking.unmasking import Unmasking, unmasking
from seqfed.common.views import Task
from seqfed.server import masked

if TYPE_CHECKING:
    from tests.simulation.world import World

ONCE = STEPS[1:]  # an advertisement says nothing yet
TOOK = {
    half.Shared: "sum-sharing",
    half.Masked: "sum-masking",
    half.Confirming: "sum-confirming",
    half.Opened: "sum-opening",
}


class Sums:
    """Of all runs."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._taken: set[tuple[str, str, int, str]] = set()  # (step, run, number, client)
        self._given: dict[tuple[str, int, str], Given] = {}
        self._opened: dict[tuple[str, int], OpenSum] = {}
        self._once: dict[
            tuple[str, str, bytes], int
        ] = {}  # (run, client, what it gave) -> the number of the opened sum

    def last(self, run: str, round_: int, purpose: Purpose) -> OpenSum | None:
        """The newest that was opened for this."""
        found = [
            one
            for (of, _), one in self._opened.items()
            if (of, one.terms.round, one.terms.purpose) == (run, round_, purpose)
        ]
        return max(found, key=lambda one: one.terms.number, default=None)

    def patches(self) -> Iterator[tuple[Any, str, Any]]:
        """(owner, name, value): through which the world sees every step."""
        for step in STEPS:
            yield Client, step, self._watched(step, getattr(Client, step))
        yield half, "on", self._heard(half.on)
        yield masked, "unmasking", self._unmasked(unmasking)
        yield secure, "contribution", self._contributed(secure.contribution)

    def _watched(self, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def wrapper(client: Client, *args: Any, **more: Any) -> Any:
            made = step(client, *args, **more)
            if name in ONCE:
                self._take(name, client.terms, client.name)
            self._world.stepped(name)
            return made

        return wrapper

    def _heard(self, on: Callable[..., half.Next]) -> Callable[..., half.Next]:
        def wrapper(state: half.State, event: half.Event) -> half.Next:
            found = on(state, event)
            if type(event) in TOOK:
                self._world.reached(TOOK[type(event)])
            return found

        return wrapper

    def _unmasked(self, real: Callable[..., Unmasking | half.Fail]) -> Callable[..., Unmasking | half.Fail]:
        def wrapper(state: half.State) -> Unmasking | half.Fail:
            self._world.reached("sum-done")
            found = real(state)
            with self._world.checking():
                if isinstance(found, half.Fail) or found.disputes:
                    raise Violation(f"masked sum {state.terms.number}: honest clients' shares do not fit: {found}")
                self._open(state.terms, state.survivors)
            self._world.reached("sum-opened")
            return found

        return wrapper

    def _contributed(self, contribution: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(terms: Terms, task: Task, client: str, given: Given) -> Any:
            self._given[terms.run, terms.number, client] = given  # in its vector, should it come so far
            return contribution(terms, task, client, given)

        return wrapper

    def _take(self, step: str, terms: Terms, client: str) -> None:
        with self._world.checking():
            place = (step, terms.run, terms.number, client)
            if place in self._taken:
                raise Violation(f"{client} takes the step {step} twice in masked sum {terms.number} of run {terms.run}")
            self._taken.add(place)

    def _open(self, terms: Terms, survivors: tuple[str, ...]) -> None:
        run, number = terms.run, terms.number
        if (run, number) in self._opened:
            raise Violation(f"masked sum {number} of run {run} is opened twice")
        if len(survivors) < terms.min_survivors:
            raise Violation(f"masked sum {number} of run {run} is opened, and only {survivors} are in it")
        given = {client: self._given[run, number, client] for client in survivors}
        self._opened[run, number] = OpenSum(terms, given)
        self._world.say(f"masked sum {number} of round {terms.round}, to {terms.purpose}: {' '.join(survivors)}")
        for client, one in given.items():
            if isinstance(one, LocalUpdate):
                what = one.digest
            else:
                what = repr((terms.purpose, terms.round, sorted(one.items()))).encode()
            before = self._once.setdefault((run, client, what), number)
            if before != number:
                raise Violation(
                    f"what {client} gave to {terms.purpose} in round {terms.round} is in two opened sums, {before} and {number}"
                )
