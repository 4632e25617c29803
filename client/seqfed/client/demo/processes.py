"""The demo's server and clients as real processes, all of them stopped however the demo ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import FrameType
from typing import TypeVar

from seqfed.common.errors import ServerUnavailable, storage_error

T = TypeVar("T")
START_S = 60.0  # a loaded machine imports slowly
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, kill, a closed terminal
STOP_S = 5.0  # before a process that was asked to stop is killed


class Processes:
    """Started processes, their logs in one folder."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._started: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._starting = self._interrupted = self._stopping = False
        self._cancel: Callable[[], object] | None = None  # ends what `run` runs

    def start(self, name: str, *arguments: str) -> None:
        """Start `seqfed ARGUMENTS`; its output goes to NAME.log."""
        self._starting = True  # an interrupt between a process's birth and its entry here would leave it behind
        with (self._logs / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and our own command
                [sys.executable, "-m", "seqfed.client.demo.child", str(os.getpid()), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C comes to the demo alone, which then stops the others in order
            )
        self._started.append((name, process))
        self._starting = False
        if self._interrupted:
            raise KeyboardInterrupt

    def run(self, main: Coroutine[object, object, T]) -> T:
        """Run it to its end, as asyncio.run does; an interrupt cancels it, then raises KeyboardInterrupt.

        Raised wherever the program happens to be, as elsewhere here, it could strike inside gRPC's C code and crash it.
        """
        try:
            with asyncio.Runner() as runner:
                loop = runner.get_loop()
                task = loop.create_task(main)
                self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
                result = loop.run_until_complete(task)
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            self._cancel = None
        if self._interrupted:
            raise KeyboardInterrupt
        return result

    def require_alive(self) -> None:
        """Raise ServerUnavailable naming the first process that has ended by itself."""
        for name, process in self._started:
            if process.poll() is not None:
                log = self._logs / f"{name}.log"
                last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
                raise ServerUnavailable(f"{name} ended with status {process.returncode}: {last[0]} (see {log})")

    def pid(self, name: str) -> int:
        """The id of the process started under this name."""
        return next(process.pid for one, process in self._started if one == name)

    def kill(self, name: str) -> None:
        """End a process without warning, and forget it."""
        for one in [one for one in self._started if one[0] == name]:
            one[1].kill()
            one[1].wait()
            self._started.remove(one)

    def stop(self) -> None:
        """Stop all, clients before the server; kill what does not stop in time, or at once at another interrupt."""
        self._stopping = True
        for _, process in reversed(self._started):
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + STOP_S
        for _, process in reversed(self._started):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._started.clear()

    def interrupt(self, _: int, __: FrameType | None) -> None:
        """Handle a signal: raise KeyboardInterrupt as soon as that loses no process."""
        self._interrupted = True
        if self._stopping:
            for _name, process in self._started:
                process.kill()
        elif self._cancel is not None:
            with contextlib.suppress(RuntimeError):  # its loop has just closed
                self._cancel()
        elif not self._starting:
            raise KeyboardInterrupt


@contextlib.contextmanager
def processes(logs: Path) -> Iterator[Processes]:
    """Processes that end with the block, also when it ends by Ctrl-C or SIGTERM."""
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, "making the folder for the logs") from error
    found = Processes(logs)
    before = {number: signal.signal(number, found.interrupt) for number in ENDING}
    try:
        yield found
    finally:
        found.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def server_address(state: Path, started: Processes) -> str:
    """The address of a server that has just been started with this state folder."""
    file = state / "address.json"
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        started.require_alive()
        with contextlib.suppress(OSError, ValueError):
            return str(json.loads(file.read_text())["address"])
        time.sleep(0.05)
    raise ServerUnavailable(f"the server did not start within {START_S:.0f} s")
