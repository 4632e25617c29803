"""A task's computation: the delta that the design's one line promises, whatever the workshop did before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from tests.client.ready import Ready

from seqfed.client import training
from seqfed.client.data import Sequences
from seqfed.client.network import network_for
from seqfed.client.work import LocalUpdate, Workshop
from seqfed.common.config import validate
from seqfed.common.errors import ConfigError, LayoutMismatch, MaskingRefused, PolicyRefused, SchemaMismatch
from seqfed.common.layout import Flat
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.seeds import generator
from seqfed.common.spec import RunSpec
from seqfed.common.statistics import Statistics
from seqfed.common.views import ModelVersion, Progress, Stage, Task, TaskKey, TaskKind

pytestmark = pytest.mark.usefixtures("one_thread")


def sequences(size: int) -> Sequences:
    draw = np.random.default_rng(size)
    return Sequences.of(draw.normal(size=(size, 4, 3)).astype(np.float32), draw.integers(0, 2, size))


def task(round_: int = 1, **tables: Any) -> Task:
    content = {"data": {"features": 3, "classes": 2}, "model": {"hidden": 4, "layers": 1}, **tables}
    spec = validate(RunSpec, content, "test")
    layout = layout_of(spec)
    return Task(TaskKind.TRAIN, TaskKey("run", round_, 1), spec, ModelVersion(0, layout.nbytes, b"", layout.digest))


def model(of: Task) -> Flat:
    return initial_parameters(of.spec).flat


def workshop(client: str = "ward") -> Workshop:
    return Workshop(client, Ready(sequences(20), sequences(7)))


def train(shop: Workshop, given: Task, flat: Flat) -> LocalUpdate:
    update = shop.train(given, flat, lambda: False)
    assert update is not None
    return update


def test_an_update_is_the_local_model_less_the_global_one() -> None:
    given = task()
    flat = model(given)
    update = train(workshop(), given, flat)
    network = network_for(given.spec)
    network.load(initial_parameters(given.spec))
    draw = generator(given.spec.seed, 1, "ward", "batches")
    trained = training.train(network, sequences(20), given.spec, 1, draw)
    assert update.delta.tobytes() == (network.save().flat - model(given)).tobytes()
    assert update.digest == blake3(update.delta.tobytes()).digest()
    assert (update.weight, update.tally) == (20, trained.tally)
    assert flat.tobytes() == model(given).tobytes()


def test_what_was_done_before_leaves_no_trace() -> None:
    fresh = train(workshop(), task(), model(task())).delta.copy()
    used = workshop()
    for other in (task(2), task(model={"hidden": 9}), task(training={"learning_rate": 0.5})):
        train(used, other, model(other))
    used.evaluate(task(), model(task()) + 1)
    assert train(used, task(), model(task())).delta.tobytes() == fresh.tobytes()


def test_a_cancelled_training_leaves_no_trace() -> None:
    fresh = train(workshop(), task(), model(task())).delta.copy()
    used = workshop()
    assert used.train(task(), model(task()), lambda: True) is None
    assert train(used, task(), model(task())).delta.tobytes() == fresh.tobytes()


@pytest.mark.parametrize(
    ("client", "other"), [("icu", task()), ("ward", task(2)), ("ward", task(seed=1))], ids=["client", "round", "seed"]
)
def test_each_client_round_and_seed_draws_its_own_batches(client: str, other: Task) -> None:
    flat = model(task())
    one = train(workshop(), task(), flat).delta
    assert train(workshop(client), other, flat).delta.tobytes() != one.tobytes()


def test_another_attempt_is_the_same_work() -> None:
    given = task()
    again = replace(given, key=replace(given.key, attempt=2))
    one = train(workshop(), given, model(given))
    assert train(workshop(), again, model(given)).digest == one.digest


def test_a_training_anew_of_all_data_at_once_would_be_the_same_and_is_refused() -> None:
    given, shop = task(training={"batch_size": 64}), workshop()
    with pytest.raises(MaskingRefused, match="trains on all its data at once"):
        shop.train(given, model(given), lambda: False, lambda _: None, 3)


def test_a_training_anew_draws_other_batches_each_time() -> None:
    given, shop = task(training={"batch_size": 8}), workshop()
    digests = {0: train(shop, given, model(given)).digest}
    for number in (3, 4):
        update = shop.train(given, model(given), lambda: False, lambda _: None, number)
        assert update is not None
        digests[number] = update.digest
    assert len(set(digests.values())) == 3
    once_more = workshop().train(given, model(given), lambda: False, lambda _: None, 4)
    assert once_more is not None
    assert once_more.digest == digests[4]


def test_a_run_that_has_measured_the_data_trains_on_what_follows_from_it() -> None:
    federated = task(data={"features": 3, "classes": 2, "normalise": "federated"})
    statistics = Statistics(mean=(1.0, 2.0, 3.0), scale=(1.0, 1.0, 2.0))
    measured = replace(federated, statistics=statistics.model_dump_json().encode())
    source = Ready(sequences(20), sequences(7))
    shop = Workshop("ward", source)
    assert shop.measure(federated) == {"count.0": 20}
    assert source.asked == []
    update = train(shop, measured, model(measured))
    shop.evaluate(measured, model(measured))
    assert [(one.data.mean, one.data.scale) for one in source.asked] == [(statistics.mean, statistics.scale)]
    assert (
        update.digest == train(workshop(), task(), model(task())).digest
    )  # these are not for a function's own sequences
    with pytest.raises(ConfigError, match="the run's statistics"):
        shop.check(federated)
    given = replace(task(), statistics=measured.statistics)  # of a run that has its own
    assert Workshop("ward", source).check(given) is not None
    assert source.asked[-1] == given.spec


def test_only_what_fits_is_measured() -> None:
    with pytest.raises(SchemaMismatch, match="client 'ward' has 3 features a step, the run wants 5"):
        workshop().measure(task(data={"features": 5, "classes": 2, "normalise": "federated"}))


def test_scores_are_those_of_the_validation_data() -> None:
    given = task()
    network = network_for(given.spec)
    network.load(initial_parameters(given.spec))
    assert workshop().evaluate(given, model(given)) == training.evaluate(network, sequences(7), given.spec)


def test_the_data_are_cut_once_for_all_runs_that_want_the_same() -> None:
    source = Ready(sequences(20), sequences(7))
    shop = Workshop("ward", source)
    first = task()
    for one in (first, first, task(seed=1), task(model={"hidden": 9}), task(data={"features": 3, "classes": 5})):
        shop.check(one)
    assert [spec.data.classes for spec in source.asked] == [2, 5]


def test_a_task_for_other_data_is_refused() -> None:
    with pytest.raises(SchemaMismatch, match="client 'ward' has 3 features a step, the run wants 5"):
        workshop().check(task(data={"features": 5, "classes": 2}))


def test_code_that_is_not_allowed_is_refused_before_the_data_are_read() -> None:
    source = Ready(sequences(20), sequences(7))
    with pytest.raises(PolicyRefused, match="custom: the run's model.custom is 'ours:net', which is not allowed here"):
        Workshop("ward", source).check(task(model={"custom": "ours:net", "tensors": (("w", (1,)),)}))
    assert source.asked == []


@pytest.mark.parametrize("change", [{"layout_digest": b"other"}, {"nbytes": 4}])
def test_a_task_of_another_model_is_refused(change: dict[str, Any]) -> None:
    given = task()
    with pytest.raises(LayoutMismatch, match="run the same version of seqfed"):
        workshop().check(replace(given, model=replace(given.model, **change)))


def test_both_kinds_of_work_tell_how_far_they_are() -> None:
    told: list[Progress] = []
    given = task()
    workshop().train(given, model(given), lambda: False, told.append)
    workshop().evaluate(given, model(given), told.append)
    assert {one.stage for one in told} == {Stage.TRAINING, Stage.EVALUATING}


def private(mode: str, **dp: Any) -> Task:
    settings = {"mode": mode, "delta": 1e-5, "noise_multiplier": 0.5, "clip": 0.1, **dp}
    public = dp.get("evaluation") == "public"
    return task(
        model={"hidden": 64, "layers": 1},
        training={"batch_size": 10},
        aggregation={"weighting": "uniform"},
        evaluation={"every": int(public)},
        privacy={"dp": settings},
    )


def test_a_local_updates_noise_hides_more_than_the_clipped_update() -> None:
    """Two of the same training have the clipped update in common, and noise of z C each."""
    given = private("local")
    one, other = (train(workshop(), given, model(given)) for _ in range(2))
    plain = train(workshop(), task(model={"hidden": 64, "layers": 1}, training={"batch_size": 10}), model(given)).delta
    clipped = plain.astype(float) * min(1.0, 0.1 / np.linalg.norm(plain.astype(float)))
    first = one.delta - clipped
    assert first.std() == pytest.approx(0.05, rel=4.9 / np.sqrt(2 * first.size))
    difference = one.delta.astype(float) - other.delta
    assert difference.std() == pytest.approx(0.05 * np.sqrt(2), rel=4.9 / np.sqrt(2 * first.size))
    assert one.digest == blake3(one.delta.tobytes()).digest()


def test_an_example_update_has_noise_of_its_own_each_time() -> None:
    given = private("example")
    one, other = (train(workshop(), given, model(given)).delta for _ in range(2))
    assert np.abs(one - other).max() > 1e-4


@pytest.mark.parametrize("mode", ["local", "example"])
def test_what_a_private_update_says_beside_itself(mode: str) -> None:
    """Neither how many sequences there are nor how badly they were told, unless the run makes that public."""
    update = train(workshop(), private(mode), model(private(mode)))
    assert update.weight == 1
    assert not any(update.tally.values())
    given = private(mode, evaluation="public")
    update = train(workshop(), given, model(given))
    assert update.weight == 1
    assert update.tally["examples"] > 0
