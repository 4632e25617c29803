"""A loop whose clock jumps to the next timer whenever nothing else is left to do, and threads that run in its own."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any


class Hurried(asyncio.SelectorEventLoop):
    """Hours pass in no time. Only for coroutines that wait for timers and each other: a socket's answer would come too late."""

    skipped = 0.0

    def time(self) -> float:
        return super().time() + self.skipped

    def _run_once(self) -> None:
        ready, scheduled = getattr(self, "_ready"), getattr(self, "_scheduled")  # noqa: B009 - of the base class, untyped
        due = [timer.when() for timer in scheduled if not timer.cancelled()]
        if not ready and due:
            self.skipped += max(0.0, min(due) - self.time())
        super()._run_once()  # type: ignore[misc]


def hurry(main: Callable[[], Any]) -> Any:
    """The result of a coroutine function on such a loop."""
    with asyncio.Runner(loop_factory=Hurried) as runner:
        return runner.run(main())


async def at_once(work: Callable[..., Any], *arguments: Any) -> Any:
    """Instead of asyncio.to_thread: the work in the loop itself; what it may await, it awaits."""
    result = work(*arguments)
    return await result if inspect.isawaitable(result) else result
