"""A run followed: without a terminal, what is worth a line, and on one, what each client has moved; what goes on by itself."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import cast

import pytest
from rich.console import Console
from tests.client.test_shown import RECORD, view

from seqfed.client.admin import Operator
from seqfed.client.watching import CALM_S, HUM_S, _Lines, follow
from seqfed.common.errors import ServerUnavailable
from seqfed.common.views import RunView

ROUND = replace(RECORD, round=1)


class Told:
    """Lines as they are printed at each second."""

    def __init__(self) -> None:
        self.now = 100.0
        self._console = Console(file=io.StringIO(), width=200)
        self._lines = _Lines(self._console, lambda: self.now)

    def at(self, second: float, phase: str, reason: str, rounds: int = 0, ended: bool = False) -> list[str]:
        self.now = 100.0 + second
        assert isinstance(self._console.file, io.StringIO)
        self._console.file.seek(0)
        self._console.file.truncate()
        self._lines.update(replace(view(reason, ended), phase=phase), [ROUND] * rounds)
        return self._console.file.getvalue().splitlines()


def test_a_run_that_stands_still_says_why_at_once() -> None:
    told = Told()
    assert told.at(0, "queued", "waits for 2 more of 3") == ["queued: waits for 2 more of 3"]
    assert told.at(0.1, "queued", "waits for 2 more of 3") == []
    assert told.at(0.2, "queued", "waits for 1 more of 3") == ["queued: waits for 1 more of 3"]
    assert told.at(0.3, "paused", "by the operator") == ["paused: by the operator"]
    assert told.at(900, "paused", "by the operator") == []


def test_a_round_under_way_is_worth_a_line_only_if_it_takes_its_time() -> None:
    told = Told()
    slow = "round 1 waits for {} of 2: a training {} %, b silent for {} s, deadline in {} s"
    assert told.at(0, "training", slow.format(2, 1, 20, 60)) == [f"training: {slow.format(2, 1, 20, 60)}"]
    assert told.at(CALM_S + 1, "training", slow.format(2, 9, 26, 54)) == []  # nothing has happened
    assert told.at(CALM_S + 2, "training", slow.format(1, 9, 26, 53)) == [f"training: {slow.format(1, 9, 26, 53)}"]
    assert told.at(CALM_S + 3, "training", "round 1 waits for 1 of 2: b") == []  # too soon
    assert told.at(2 * CALM_S + 2, "training", "round 1 waits for 1 of 2: b") == [
        "training: round 1 waits for 1 of 2: b"
    ]
    assert told.at(2 * CALM_S + 1 + HUM_S, "training", "round 1 waits for 1 of 2: b") == []
    assert len(told.at(2 * CALM_S + 2 + HUM_S, "training", "round 1 waits for 1 of 2: b")) == 1


def test_a_run_that_goes_well_tells_of_its_rounds_alone() -> None:
    told = Told()
    lines = told.at(0, "training", "round 1 waits for 2 of 2: a, b")
    for number in range(1, 20):
        lines += told.at(number, "gathering", "about to begin", number)
        lines += told.at(number + 0.1, "training", f"round {number + 1} waits for 2 of 2: a, b", number)
        lines += told.at(number + 0.6, "training", f"round {number + 1} waits for 1 of 2: b", number)
        lines += told.at(number + 0.8, "evaluating", f"the model of round {number + 1} waits for 2", number)
    lines += told.at(20, "finished", "all rounds are done", 20, ended=True)
    assert [line.split()[0] for line in lines] == ["training:", *["round"] * 20, "finished:"]


async def test_a_paused_run_is_watched_on_and_through_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(seconds: float) -> None:
        pass

    class Scripted:
        """Two pauses of a run, between which the first server goes away."""

        turns = 0

        async def watch(self, run: str, after: int = 0) -> AsyncIterator[RunView]:
            base = replace(view(), history=())
            if self.turns == 0:
                for phase in ("training", "paused", "paused"):
                    yield replace(base, phase=phase)
                raise ServerUnavailable("gone")
            for phase in ("paused", "training", "paused", "queued"):
                yield replace(base, phase=phase)
            yield replace(base, phase="finished", ended=True, history=(ROUND,))

        def turn(self) -> None:
            self.turns += 1

    monkeypatch.setattr(asyncio, "sleep", at_once)
    told: list[str] = []
    operator = Scripted()
    console = Console(file=io.StringIO())
    last = await follow(cast(Operator, operator), "trial", console=console, paused=lambda view: told.append(view.phase))
    assert (operator.turns, told) == (1, ["paused", "paused"])
    assert (last.phase, last.history) == ("finished", (ROUND,))


async def test_on_a_terminal_each_clients_bytes_add_up_over_the_rounds() -> None:
    class Rounds:
        async def watch(self, _: str, __: int) -> AsyncIterator[RunView]:
            for number, traffic in ((1, {"ward": (1_000, 2_000)}), (2, {"ward": (3_000, 5_000), "desk": (9, 0)})):
                yield replace(view(ended=number == 2), history=(replace(RECORD, round=number, traffic=traffic),))

    file = io.StringIO()
    console = Console(file=file, width=200, force_terminal=True, color_system=None)
    await follow(cast(Operator, Rounds()), "trial", console=console)
    last = [[cell.strip() for cell in line.split("│")[1:-1]] for line in file.getvalue().splitlines() if "│" in line]
    assert last[-2:] == [["ward", "3.0 kB", "5.0 kB", "4.0 kB", "7.0 kB"], ["desk", "9 B", "0 B", "9 B", "0 B"]]
