"""Following a run until it ends: a live table on a terminal, a line a round elsewhere, one JSON object a change on demand."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Callable
from typing import Final

from rich.console import Console
from rich.live import Live

from seqfed.client.admin import Operator
from seqfed.client.session import Backoff
from seqfed.client.shown import columns, live, round_row, run_dict
from seqfed.common.errors import ServerUnavailable
from seqfed.common.metrics import main_metrics
from seqfed.common.views import RoundRecord, RunView

# What in a reason changes by itself while nothing happens: a duration, a share, an amount, how far a training is.
MOVING: Final = re.compile(r"\b\d[\d.,]*\s?(?:%|(?:s|min|h|B|kB|MB|GB)\b)|\bepoch \d+|\bloss [\d.e+-]+")
CALM_S: Final = (
    5.0  # seconds without a line after which a round under way is worth one, if something has happened in it,
)
HUM_S: Final = 60.0  # and after which it is in any case


async def follow(
    operator: Operator,
    run: str,
    *,
    as_json: bool = False,
    console: Console | None = None,
    paused: Callable[[RunView], None] = lambda _: None,
) -> RunView:
    """Show the run until it has ended, through restarts of the server; the last view, with its whole history.

    paused: told each time that the run pauses.
    """
    console = console or Console()
    show = _Json() if as_json else _Table(console) if console.is_terminal else _Lines(console)
    rounds: list[RoundRecord] = []
    backoff = Backoff()
    view: RunView | None = None
    phase = ""
    try:
        while True:
            try:
                async for view in operator.watch(run, rounds[-1].round if rounds else 0):
                    backoff.reset()
                    run = view.run  # its name may soon be another's too
                    rounds.extend(view.history)
                    show.update(view, rounds)
                    if view.phase == "paused" != phase:
                        paused(view)
                    phase = view.phase
                if view is not None and view.ended:
                    break
                raise ServerUnavailable("the server ended the connection")
            except ServerUnavailable as error:
                if view is None:
                    raise
                operator.turn()
                wait = backoff.wait()
                print(f"seqfed: {error}; trying again in {wait:.1f} s", file=sys.stderr)
                await asyncio.sleep(wait)
    finally:
        show.close()
    return RunView(**{**vars(view), "history": tuple(rounds)})


class _Json:
    def update(self, view: RunView, _: list[RoundRecord]) -> None:
        print(json.dumps(run_dict(view)), flush=True)

    def close(self) -> None:
        pass


class _Lines:
    """A line a finished round, and one for what a run waits for: at once where it stands still, and where a round is under
    way only when that takes its time, so that a run that goes well tells of its rounds alone.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._shown = 0
        self._phase = self._meaning = ""
        self._last = 0.0  # when the last line was printed

    def update(self, view: RunView, rounds: list[RoundRecord]) -> None:
        if len(rounds) == self._shown and not view.ended:
            self._tell(view, bool(rounds))
        metrics = main_metrics(view.spec) if len(rounds) > self._shown else ()
        for record in rounds[self._shown :]:
            row = zip(columns(metrics), round_row(record, metrics), strict=True)
            told = ", ".join(f"{name} {value}" for name, value in row)
            self._print(told)
        self._shown = len(rounds)
        if view.ended:
            self._print(f"{view.phase}: {view.reason}")

    def _tell(self, view: RunView, begun: bool) -> None:
        meaning = f"{view.phase}: {MOVING.sub('', view.reason)}"
        quiet = self._clock() - self._last
        changed = meaning != self._meaning
        rests = view.phase in ("queued", "paused") or (view.phase == "gathering" and not begun)
        calm = 0.0 if rests or (view.phase != self._phase and not begun) else CALM_S
        if (changed and quiet >= calm) or (quiet >= HUM_S and not rests):
            self._phase, self._meaning = view.phase, meaning
            self._print(f"{view.phase}: {view.reason}")

    def _print(self, line: str) -> None:
        self._last = self._clock()
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        pass


class _Table:
    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=8)
        self._live.start()
        self._added = 0  # rounds in `_moved`
        self._moved: dict[str, tuple[int, int]] = {}

    def update(self, view: RunView, rounds: list[RoundRecord]) -> None:
        for record in rounds[self._added :]:
            for client, (up, down) in record.traffic.items():
                before = self._moved.get(client, (0, 0))
                self._moved[client] = before[0] + up, before[1] + down
        self._added = len(rounds)
        self._live.update(live(view, rounds, self._moved))

    def close(self) -> None:
        self._live.stop()
