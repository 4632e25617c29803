"""The ground on which all worlds stand: clocks, secrets and gRPC's server replaced, a database to begin with, a folder."""

from __future__ import annotations

import atexit
import contextlib
import gc
import random
import secrets
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
from tests.simulation.loop import Loop
from tests.simulation.plan import CHUNK

from seqfed.server import daemon, lease, points
from seqfed.server import store as store_module
from seqfed.server.store import open_store

if TYPE_CHECKING:
    from tests.simulation.world import World

EPOCH: Final = 1_700_000_000.0  # what the clock on the wall shows at the beginning
REAL_CONNECT = store_module.connect


def on_the_loop() -> bool:
    """Whether no function of a worker thread is under way."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is Loop._execute.__code__:
            return False
        frame = frame.f_back
    return True


@cache
def shared_memory() -> Path | None:
    """Where a world's folder costs least; None: the usual place."""
    found = Path("/dev/shm")  # noqa: S108 - a folder of its own is made there
    return found if found.is_dir() else None


@cache
def template() -> Path:
    """A database at the newest schema."""
    folder = Path(tempfile.mkdtemp(prefix="seqfed-simulation-template-", dir=shared_memory()))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    open_store(folder).close()
    return folder / "seqfed.db"


@cache
def _modules() -> list[types.ModuleType]:
    return [module for name, module in sys.modules.items() if name.startswith("seqfed.")]


class _Clock:
    """In place of the module `time` in seqfed's own modules."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def time(self) -> float:
        return EPOCH + self._loop.time()

    monotonic = perf_counter = time

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class _Secrets:
    """In place of the module `secrets` there."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw

    def token_bytes(self, nbytes: int = 32) -> bytes:
        return self._draw.randbytes(nbytes)

    def token_hex(self, nbytes: int = 32) -> str:
        return self.token_bytes(nbytes).hex()

    def randbelow(self, end: int) -> int:
        return self._draw.randrange(end)


@contextlib.contextmanager
def patched(world: World) -> Iterator[None]:
    """Whatever reaches around the interfaces: clocks, secrets, gRPC's server, and the sizes that a small model needs."""
    before: list[tuple[Any, str, Any]] = []

    def patch(owner: Any, name: str, value: Any) -> None:
        before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    clock, hidden = _Clock(world.loop), _Secrets(world.random("secrets"))
    sizes = {"CHUNK_BYTES": CHUNK, "MIN_CHUNK_BYTES": 4, "SMALLEST_CHUNK": 16} if world.plan.chunks else {}
    for module in _modules():
        if vars(module).get("time") is time:
            patch(module, "time", clock)
        if vars(module).get("secrets") is secrets:
            patch(module, "secrets", hidden)
        for size, value in sizes.items():
            if size in vars(module):
                patch(module, size, value)
    patch(lease, "LOOK_S", 4.0)  # who stands by would look most of the time
    patch(daemon, "connect", world.connect)
    patch(daemon, "Coordinator", world.coordinate)
    patch(grpc.aio, "server", world.server)
    patch(points, "hook", world.reached)
    for owner, name, value in world.sums.patches():
        patch(owner, name, value)
    collecting = gc.isenabled()
    gc.disable()  # what becomes garbage in a cycle must not be finalised at a moment of the collector's choosing
    try:
        yield
    finally:
        if collecting:
            gc.enable()
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
