"""The daemon with real client processes gives the plain loop's model, bit for bit, whatever order the updates came in."""

from __future__ import annotations

from typing import Literal

import numpy as np
from tests.integration.cluster import Cluster, some_sequences
from tests.integration.oracle import fedavg

from seqfed.common.spec import AggregationSpec, CohortSpec, DataSpec, ModelSpec, RunSpec, TrainingSpec


def specification(weighting: Literal["examples", "uniform"]) -> RunSpec:
    return RunSpec(
        name=weighting,
        seed=7,
        rounds=3,
        data=DataSpec(features=3, steps=4, classes=3),
        model=ModelSpec(hidden=5, layers=2),
        training=TrainingSpec(optimizer="adam", batch_size=8, epochs=2),
        cohort=CohortSpec(min_clients=3),
        aggregation=AggregationSpec(weighting=weighting),
    )


def test_equals_the_plain_loop_weighted_and_uniform(cluster: Cluster) -> None:
    data = {name: some_sequences(size, seed) for seed, (name, size) in enumerate({"a": 40, "b": 11, "c": 23}.items())}
    for name in ("c", "a", "b"):
        cluster.start_client(name, data[name], some_sequences(10, 99))
    models = []
    for weighting in ("examples", "uniform"):
        spec = specification(weighting)
        view, flat = cluster.run(spec)
        assert view.phase == "finished", view.reason
        assert flat.tolist() == fedavg(spec, data)
        models.append(flat)
    assert not np.array_equal(models[0], models[1])
    # the same specification once more: other arrival times, the same bits, and metrics of sums that are exact
    other, again = cluster.run(specification("uniform"))
    assert np.array_equal(again, models[1])
    assert [record.evaluated_examples for record in view.history] == [30, 30, 30]
    assert [record.evaluation for record in other.history] == [record.evaluation for record in view.history]
