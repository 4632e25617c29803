"""Many clients in one process: the real session, connection and channel of each, over a computation that is only pretended.

`python -m benchmarks.peers ADDRESS FIRST COUNT` takes part as client FIRST to FIRST + COUNT - 1 until it is ended. Each has
a TCP connection of its own, as real clients have. What they train is made once and sent by all: no torch, no data. It prints
a line when all have been told to dial.
"""

from __future__ import annotations

import asyncio
import os
import resource
import sys
from collections.abc import Callable
from typing import cast

import numpy as np
from blake3 import blake3

from seqfed.client.data import ClientData
from seqfed.client.session import Session
from seqfed.client.work import LocalUpdate, Workshop
from seqfed.common import loop
from seqfed.common.layout import Flat
from seqfed.common.schema import DataSchema
from seqfed.common.views import Progress, Task

FEATURES, CLASSES = 8, 10
DIALS_PER_S = 200  # of one process; all at once would time out where they wait for each other

_updates: dict[int, LocalUpdate] = {}  # by the model's size


class Pretended:
    """Stands in a Workshop's place: gives the same small update for every task."""

    schema = DataSchema(features=FEATURES, classes=CLASSES, examples=32, validation_examples=8)

    def __init__(self, client: str) -> None:
        self.client = client

    @property
    def source(self) -> Pretended:
        """Itself: it has the schema."""
        return self

    def check(self, _: Task) -> ClientData | None:
        return None

    def train(self, task: Task, flat: Flat, _: Callable[[], bool], __: Callable[[Progress], None]) -> LocalUpdate:
        """An update of 10^-4 in every place."""
        if flat.size not in _updates:
            delta = np.full(flat.size, 1e-4, np.float32)
            digest = blake3(delta.data.cast("B")).digest()
            _updates[flat.size] = LocalUpdate(delta, digest, 32, {"examples": 32, "loss": 32}, 0.001)
        return _updates[flat.size]

    def evaluate(self, _: Task, __: Flat, ___: Callable[[Progress], None]) -> dict[str, int]:
        return {"examples": 8, "loss": 8, "correct": 4}


async def take_part(address: str, first: int, count: int) -> None:
    """So many sessions, for ever."""
    async with asyncio.TaskGroup() as group:
        for number in range(first, first + count):
            workshop = cast(Workshop, Pretended(f"peer-{number:05}"))
            group.create_task(Session(workshop, (address,), f"{number:032x}", insecure=False).run())
            await asyncio.sleep(1 / DIALS_PER_S)
        print("all dial", flush=True)


def main() -> None:
    import logging

    os.nice(10)  # clients are elsewhere as a rule: where they are not, the server comes first
    logging.getLogger("seqfed").setLevel(logging.ERROR)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    address, first, count = sys.argv[1:]
    loop.run(take_part(address, int(first), int(count)))


if __name__ == "__main__":
    from seqfed.client.demo.child import end_with

    end_with(int(sys.argv.pop(1)))
    main()
