"""Whole federations in virtual time, each from one seed: delays, losses, partitions, crashes and hangs of either side.

What must be true of every one is in `world`. A seed that fails is run again by `python -m tests.simulation SEED --trace`.
"""

from __future__ import annotations

import pytest
from tests.simulation.world import World

BLOCK = 20  # seeds a test: enough for the workers to share them evenly
QUICK = 100  # seeds of the default suite
SEEDS = 2000
SHOWN = 60  # of a failing world's last events


def through(seed: int) -> str:
    """One world; the digest of its trace. A failure says what a person needs to find it again."""
    world = World(seed)
    try:
        return world.run()
    except Exception as error:  # noqa: BLE001 - whatever it is, it comes with its seed
        last = "\n".join(world.trace[-SHOWN:])
        pytest.fail(
            f"seed {seed}: {error!r}\n\n{last}\n\nagain: .venv/bin/python -m tests.simulation {seed} --trace",
            pytrace=False,
        )


def blocks(first: int, last: int) -> list[object]:
    starts = range(first, last, BLOCK)
    return [pytest.param(range(start, start + BLOCK), id=f"{start}-{start + BLOCK - 1}") for start in starts]


@pytest.mark.parametrize("seeds", blocks(0, QUICK))
def test_a_run_survives_whatever_a_seed_has_in_store(seeds: range) -> None:
    for seed in seeds:
        through(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", blocks(QUICK, SEEDS))
def test_a_run_survives_whatever_many_more_seeds_have_in_store(seeds: range) -> None:
    for seed in seeds:
        through(seed)


@pytest.mark.parametrize("seed", [3, 14, 15, 92, 65])
def test_the_same_seed_is_the_same_world_to_the_last_event(seed: int) -> None:
    assert through(seed) == through(seed)
