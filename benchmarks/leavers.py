"""Many clients of masked sums in one process: real sessions over TLS, with updates made of seeds instead of any training.

`python -m benchmarks.leavers ADDRESS FOLDER FIRST COUNT LEAVE` takes part as client FIRST to FIRST + COUNT - 1
until it is ended; each finds its certificate in FOLDER / its name. Those numbered below LEAVE vanish in every masked sum, once
all its clients have shared their keys, and come back after GONE_S.
"""

from __future__ import annotations

import asyncio
import functools
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
from blake3 import blake3

from benchmarks.peers import DIALS_PER_S, Pretended
from seqfed.client.channel import connected
from seqfed.client.masking import masking_of
from seqfed.client.session import Session
from seqfed.client.work import LocalUpdate, Workshop
from seqfed.common import identity, loop
from seqfed.common.errors import MaskingRefused
from seqfed.common.layout import Flat
from seqfed.common.seeds import generator
from seqfed.common.views import Progress, Task

if TYPE_CHECKING:
    from seqfed.client.masking import Masking
    from seqfed.common.masking.client import Client
    from seqfed.common.masking.terms import Terms
    from seqfed.common.spec import RunSpec

MOST_EXAMPLES: Final = 64
GONE_S: Final = 10.0  # the server lets go of a client sooner


def name_of(number: int) -> str:
    """A client's name."""
    return f"client-{number:04}"


def update_of(number: int, size: int) -> LocalUpdate:
    """A client's update of so many numbers, the same at every call; every tenth is longer than what a run takes unclipped."""
    draw = generator(number, "benchmark update")
    delta = draw.standard_normal(size, np.float32)
    delta *= np.float32((20.0 if number % 10 == 0 else 1.0) / np.sqrt(size))
    examples = 1 + number % MOST_EXAMPLES
    tally = {"examples": examples, "loss": examples}
    return LocalUpdate(delta, blake3(delta.data.cast("B")).digest(), examples, tally, 0.0)


class Seeded(Pretended):
    """Stands in a Workshop's place: gives the update of its number for every task."""

    def __init__(self, number: int) -> None:
        super().__init__(name_of(number))
        self._made: Callable[[int], LocalUpdate] = functools.cache(functools.partial(update_of, number))

    def train(
        self, task: Task, flat: Flat, _: Callable[[], bool], __: Callable[[Progress], None], *___: int
    ) -> LocalUpdate:
        return self._made(flat.size)


class Leaving:
    """Stands in a client's Masking's place: `leave` is called instead of masking anything, and nothing is sent any more."""

    def __init__(self, masking: Masking, leave: Callable[[], None]) -> None:
        self._masking = masking
        self._leave = leave

    def __getattr__(self, name: str) -> Any:
        return getattr(self._masking, name)

    def begin(self, spec: RunSpec, terms: Terms) -> Client:
        half = self._masking.begin(spec, terms)

        def gone(*_: object) -> Any:
            self._leave()
            raise MaskingRefused("it has left")  # to nobody: the session is over

        half.mask = gone  # type: ignore[method-assign, assignment]
        return half


async def stay(address: str, folder: Path, number: int) -> None:
    """One client, for ever."""
    masking, session = _client(address, folder, number)
    await session(masking).run()


async def come_and_go(address: str, folder: Path, number: int) -> None:
    """One client that leaves every masked sum, for ever."""
    masking, session = _client(address, folder, number)
    while True:
        await _until_it_leaves(masking, session)
        await asyncio.sleep(GONE_S)


async def _until_it_leaves(masking: Masking, session: Callable[[Masking], Session]) -> None:
    here, ended = asyncio.get_running_loop(), threading.Event()

    def leave() -> None:  # in a thread of the session's
        here.call_soon_threadsafe(life.cancel)
        ended.wait()

    life = asyncio.ensure_future(session(cast("Masking", Leaving(masking, leave))).run())
    await asyncio.wait((life,))
    ended.set()


def _client(address: str, folder: Path, number: int) -> tuple[Masking, Callable[[Masking], Session]]:
    state = folder / name_of(number)
    credentials = state / identity.CREDENTIALS

    def session(masking: Masking) -> Session:
        return Session(
            cast(Workshop, Seeded(number)),
            (address,),
            f"{number:032x}",
            insecure=False,
            dial=functools.partial(connected, credentials=credentials),
            masking=masking,
        )

    return masking_of(name_of(number), state, credentials, None), session


async def take_part(address: str, folder: Path, first: int, count: int, leave: int) -> None:
    """So many clients, for ever."""
    async with asyncio.TaskGroup() as group:
        for number in range(first, first + count):
            group.create_task((come_and_go if number < leave else stay)(address, folder, number))
            await asyncio.sleep(1 / DIALS_PER_S)


def main() -> None:
    import logging

    logging.getLogger("seqfed").setLevel(logging.ERROR)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    address, folder, *numbers = sys.argv[1:]
    loop.run(take_part(address, Path(folder), *map(int, numbers)))


if __name__ == "__main__":
    from seqfed.client.demo.child import end_with

    end_with(int(sys.argv.pop(1)))
    main()
