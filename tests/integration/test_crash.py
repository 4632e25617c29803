"""A killed server goes on with its run when it is started again, and the model is the one that it would have been."""

from __future__ import annotations

import asyncio

import numpy as np
from tests.integration.cluster import Cluster, some_sequences

from seqfed.client.admin import operating
from seqfed.common import checkpoint
from seqfed.common.model import layout_of
from seqfed.common.spec import CohortSpec, DataSpec, ModelSpec, RunSpec, TrainingSpec

SPEC = RunSpec(
    rounds=6,
    data=DataSpec(features=3, classes=3),
    model=ModelSpec(hidden=16),
    training=TrainingSpec(epochs=1, batch_size=4),
    cohort=CohortSpec(min_clients=2),
)


async def kill_in_round(cluster: Cluster, round_: int) -> str:
    """Submit, and kill the server without warning when it has begun that round; the run's id."""
    async with operating(cluster.address, insecure=False) as operator:
        run = (await operator.submit(SPEC, None)).run
        async for view in operator.watch(run):
            if view.round == round_:
                cluster.started.kill("server")
                break
    return run


async def wait_and_export(cluster: Cluster, run: str) -> tuple[str, int]:
    async with operating(cluster.address, insecure=False) as operator:
        views = [view async for view in operator.watch(run)]
        await operator.export(run, cluster.work / "after.safetensors")
        return views[-1].phase, views[-1].round


def test_a_killed_server_resumes_and_ends_with_the_same_bits(cluster: Cluster) -> None:
    for seed, name in enumerate(("a", "b")):
        cluster.start_client(name, some_sequences(200, seed), some_sequences(20, 9))
    _, undisturbed = cluster.run(SPEC)
    run = asyncio.run(kill_in_round(cluster, 3))
    cluster.start_server(cluster.address.rpartition(":")[2])
    assert asyncio.run(wait_and_export(cluster, run)) == ("finished", 6)
    assert np.array_equal(checkpoint.load(cluster.work / "after.safetensors", layout_of(SPEC)).flat, undisturbed)
