"""An event loop in virtual time, shared by simulated processes that can be stopped and killed between any two callbacks.

Nothing waits: when no callback is ready, the clock jumps to the next timer. What asyncio would hand to a thread runs on the
loop itself, a random moment after it was handed over, and its result is told another such moment later: a crash can strike
before the work, or between the work and the news of it. The same draws give the same order of everything.

A callback belongs to the process in whose context it was made. Once that is killed, none of its callbacks runs again and
none of its `finally` blocks does, as after kill -9; while it is stopped, they gather, as after SIGSTOP.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any, Final, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

MOST_CALLBACKS: Final = 3_000_000  # a world takes some ten thousand; this many never end


class DeadEnd(Exception):
    """Nothing is ready and no timer runs: everybody waits for somebody."""


class Livelock(Exception):
    """Far more callbacks than any world needs."""


class Takes(BaseException):
    """Raised by a function in a worker thread that needs time: it is called again when so many seconds have gone by."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class Died(BaseException):
    """Raised where a process dies in the middle of a function in a worker thread."""


class Process:
    """A simulated process. `context`: in which its callbacks are made."""

    def __init__(self, loop: Loop, name: str) -> None:
        self.name = name
        self.alive = True
        self.stopped = False
        self.context = copy_context()
        self.context.run(_PROCESS.set, self)
        self.tasks: list[asyncio.Task[Any]] = []  # also keeps those of a dead process from the garbage collector
        self.parked: list[asyncio.Handle] = []
        self.gone: asyncio.Future[None] = loop.create_future()  # done once it is killed
        self._loop = loop

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine as this process."""
        return self._loop.create_task(work, context=self.context.copy())

    def kill(self) -> None:
        """Nothing of it runs any more."""
        self.alive = self.stopped = False
        if not self.gone.done():
            self.gone.set_result(None)

    def stop(self) -> None:
        """It stands still until `go_on`."""
        self.stopped = True

    def go_on(self) -> None:
        self.stopped = False
        for handle in self.parked:
            self._loop.again(self, handle)
        self.parked = []

    def keep(self, task: asyncio.Task[Any]) -> None:
        if len(self.tasks) > 200:
            self.tasks = [one for one in self.tasks if not one.done()]
        self.tasks.append(task)


_PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


def current() -> Process:
    """The process whose code runs now."""
    process = _PROCESS.get()
    assert process is not None, "this runs in no process"
    return process


class Loop(asyncio.BaseEventLoop):
    """See the module. `draw` decides how long work in threads waits and takes."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self._draw = draw
        self._now = 0.0
        self._count = itertools.count()
        self._soon: deque[tuple[Process | None, asyncio.Handle]] = deque()
        self._timers: list[tuple[float, int, Process | None, asyncio.TimerHandle]] = []
        self._outside: list[asyncio.Task[Any]] = []
        self._dead: list[asyncio.Handle] = []  # kept, so that what they hold is not finalised before the end
        self.processes: list[Process] = []
        self.thread_s = 0.002  # mean wait before and after work in a thread
        self.over = False  # nothing works any more, it only unwinds

    # asyncio's interface

    def time(self) -> float:
        return self._now

    def get_debug(self) -> bool:
        return False

    def call_soon(
        self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        context = copy_context() if context is None else context
        handle = asyncio.Handle(callback, args, self, context)
        self._soon.append((context.get(_PROCESS), handle))
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_later(
        self, delay: float, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        context = copy_context() if context is None else context
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._count), context.get(_PROCESS), handle))
        return handle

    def create_task(
        self, coro: Any, *, name: object = None, context: Context | None = None, **more: Any
    ) -> asyncio.Task[Any]:
        process = (copy_context() if context is None else context).get(_PROCESS)
        task = asyncio.Task(coro, loop=self, name=None if name is None else str(name), context=context, **more)
        if process is not None:
            process.keep(task)
        else:
            self._outside.append(task)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]  # typed as a coroutine there
        del executor
        future: asyncio.Future[T] = self.create_future()
        if self.over:
            future.cancel()
        else:
            self.call_later(self._moment(), self._begin, future, func, args)
        return future

    # threads

    def _moment(self) -> float:
        return self._draw.expovariate(1 / self.thread_s)

    def _begin(self, future: asyncio.Future[Any], func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if not future.cancelled():  # as with a pool: what has not begun is dropped, what has begun goes on
            self._execute(future, func, args)

    def _execute(self, future: asyncio.Future[Any], func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        result, failure = None, None
        try:
            result = func(*args)
        except Takes as pause:
            self.call_later(pause.seconds, self._execute, future, func, args)
            return
        except Died:
            return
        except BaseException as error:  # noqa: BLE001 - it goes to whoever waits
            failure = error
        self.call_later(self._moment(), _tell, future, result, failure)

    # processes

    def process(self, name: str) -> Process:
        process = Process(self, name)
        self.processes.append(process)
        return process

    def again(self, process: Process, handle: asyncio.Handle) -> None:
        """Make a parked callback ready."""
        self._soon.append((process, handle))

    # the loop

    def _run_once(self) -> None:
        while not self._soon:
            if not self._timers:
                raise DeadEnd("nobody has anything to do, and no timer runs:\n" + self.dump())
            when, _, process, timer = heapq.heappop(self._timers)
            if not timer.cancelled():
                self._now = max(self._now, when)
                self._soon.append((process, timer))
        process, handle = self._soon.popleft()
        if handle.cancelled():
            return
        if self.over:
            handle._run()
        elif process is not None and not process.alive:
            self._dead.append(handle)
        elif process is not None and process.stopped:
            process.parked.append(handle)
        else:
            if next(self._count) > MOST_CALLBACKS:
                raise Livelock(f"{MOST_CALLBACKS:,} callbacks in {self._now:.1f} s:\n{self.dump()}")
            handle._run()

    def dump(self) -> str:
        """Who waits where."""
        lines = []
        for process in self.processes:
            state = "dead" if not process.alive else "stopped" if process.stopped else "alive"
            lines.append(f"{process.name} ({state})")
            if process.alive:
                lines += [f"  {_place(task)}" for task in process.tasks if not task.done()]
        return "\n".join(lines)

    def bury(self) -> None:
        """The world is over: whatever is left of all processes, dead ones too, is cancelled and unwinds; no thread works."""
        self.over = True
        self.set_exception_handler(lambda *_: None)
        for process in self.processes:
            process.alive, process.stopped = True, False
            self._dead += process.parked
            process.parked = []
        self._soon.extend((None, handle) for handle in self._dead)
        self._dead.clear()
        self._timers.clear()
        self.run_until_complete(self._unwind())
        self._soon.clear()
        self.close()

    async def _unwind(self) -> None:
        left = list[asyncio.Task[Any]]()
        for _ in range(100):
            tasks = [*self._outside, *(task for process in self.processes for task in process.tasks)]
            left = [task for task in tasks if not task.done() and task is not asyncio.current_task()]
            if not left:
                return
            for task in left:
                task.cancel()
            for _ in range(10):
                await asyncio.sleep(0)
        raise RuntimeError(f"some tasks cannot be cancelled: {', '.join(map(_place, left))}")


def _tell(future: asyncio.Future[Any], result: object, failure: BaseException | None) -> None:
    if future.done():
        return
    if failure is not None:
        future.set_exception(failure)
    else:
        future.set_result(result)


def _place(task: asyncio.Task[Any]) -> str:
    """The innermost line at which a task waits."""
    found = list[str]()
    coroutine: Any = task.get_coro()
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "ag_frame", None)
        if frame is not None:
            found.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "ag_await", None)
    return " > ".join(found)
