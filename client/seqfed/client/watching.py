"""Following a run until it ends: a live table on a terminal, a line a round elsewhere, one JSON object a change on demand."""

from __future__ import annotations

import asyncio
import json
import sys

from rich.console import Console
from rich.live import Live

from seqfed.client.admin import Operator
from seqfed.client.session import Backoff
from seqfed.client.shown import columns, progress_table, round_row, run_dict
from seqfed.common.errors import ServerUnavailable
from seqfed.common.metrics import main_metrics
from seqfed.common.views import RoundRecord, RunView


async def follow(operator: Operator, run: str, *, as_json: bool = False, console: Console | None = None) -> RunView:
    """Show the run until it has ended, through restarts of the server; the last view, with its whole history."""
    console = console or Console()
    show = _Json() if as_json else _Table(console) if console.is_terminal else _Lines(console)
    rounds: list[RoundRecord] = []
    backoff = Backoff()
    view: RunView | None = None
    try:
        while True:
            try:
                async for view in operator.watch(run, rounds[-1].round if rounds else 0):
                    backoff.reset()
                    run = view.run  # its name may soon be another's too
                    rounds.extend(view.history)
                    show.update(view, rounds)
                if view is not None and view.ended:
                    break
                raise ServerUnavailable("the server ended the connection")
            except ServerUnavailable as error:
                if view is None:
                    raise
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
    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown = 0
        self._reason = ""

    def update(self, view: RunView, rounds: list[RoundRecord]) -> None:
        if not rounds and not view.ended and view.reason != self._reason:
            self._console.print(f"{view.phase}: {view.reason}", highlight=False, markup=False, soft_wrap=True)
            self._reason = view.reason
        metrics = main_metrics(view.spec) if len(rounds) > self._shown else ()
        for record in rounds[self._shown :]:
            row = zip(columns(metrics), round_row(record, metrics), strict=True)
            told = ", ".join(f"{name} {value}" for name, value in row)
            self._console.print(told, highlight=False, soft_wrap=True)
        self._shown = len(rounds)
        if view.ended:
            self._console.print(f"{view.phase}: {view.reason}", highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        pass


class _Table:
    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=8)
        self._live.start()

    def update(self, view: RunView, rounds: list[RoundRecord]) -> None:
        self._live.update(progress_table(view, rounds))

    def close(self) -> None:
        self._live.stop()
