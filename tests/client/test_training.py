"""Local training against a plain loop in torch, bit for bit, and scoring against sums one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count as ticks
from itertools import islice, pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from seqfed.client import training
from seqfed.client.data import Batch, Sequences
from seqfed.client.network import Network, network_for
from seqfed.client.training import (
    TELL_S,
    Cancelled,
    batch_count,
    batches,
    evaluate,
    learning_rate,
    loss_for,
    outputs_of,
    train,
)
from seqfed.common.config import validate
from seqfed.common.errors import TrainingFailed
from seqfed.common.layout import Flat, Parameters
from seqfed.common.metrics import add, units
from seqfed.common.model import initial_parameters
from seqfed.common.seeds import generator
from seqfed.common.spec import RunSpec, TrainingSpec
from seqfed.common.views import Progress, Stage

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
FEATURES, HIDDEN, LAYERS, CLASSES, STEPS = 3, 6, 2, 4, 5
SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.3, "momentum": 0.9}
ADAM: dict[str, Any] = {"optimizer": "adam", "learning_rate": 0.01}
PLAIN: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 1.0}  # one step's update is the gradient
CPU = torch.device("cpu")


def spec(kind: str = "lstm", **training: Any) -> RunSpec:
    content = {
        "seed": 5,
        "data": {"features": FEATURES, "classes": CLASSES},
        "model": {"kind": kind, "hidden": HIDDEN, "layers": LAYERS},
        "training": {"batch_size": 8, **training},
    }
    return validate(RunSpec, content, "test")


def sequences(size: int, lengths: bool = False) -> Sequences:
    draw = np.random.default_rng(size)
    x = draw.normal(size=(size, STEPS, FEATURES)).astype(np.float32)
    long = draw.integers(1, STEPS + 1, size) if lengths else None
    return Sequences.of(x, draw.integers(0, CLASSES, size), long)


def labels(data: Sequences) -> NDArray[Any]:
    assert data.y is not None
    return data.y


def network(run: RunSpec) -> Network:
    found = network_for(run)
    found.load(initial_parameters(run))
    return found


def shuffled(size: int, batch: int, draw: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Batches without end: permutation after permutation."""
    while True:
        order = draw.permutation(size)
        yield from (order[start : start + batch] for start in range(0, size, batch))


def plain(run: RunSpec, data: Sequences, count: int, draw: np.random.Generator) -> tuple[Flat, list[float]]:
    """The numbers after `count` batches, by torch's layers in a loop of their own; and each batch's mean loss."""
    recurrent = KINDS[run.model.kind](FEATURES, HIDDEN, LAYERS, batch_first=True)
    head = nn.Linear(HIDDEN, CLASSES)
    both = nn.ModuleDict({"recurrent": recurrent, "head": head})
    parameters = initial_parameters(run)
    views = parameters.layout.views(parameters.flat.copy())
    both.load_state_dict({name: torch.from_numpy(view) for name, view in views.items()})
    given = run.training
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(both.parameters(), lr=given.learning_rate, momentum=given.momentum)
        if given.optimizer == "sgd"
        else torch.optim.Adam(both.parameters(), lr=given.learning_rate)
    )
    losses = []
    for rows in islice(shuffled(len(data), given.batch_size, draw), count):
        states, _ = recurrent(torch.from_numpy(data.rows.reshape(-1, STEPS, FEATURES)[rows]))
        last = torch.stack([states[row, end - 1] for row, end in enumerate(data.lengths[rows].tolist())])
        loss = functional.cross_entropy(head(last), torch.from_numpy(labels(data)[rows]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return np.concatenate([tensor.numpy().ravel() for tensor in both.state_dict().values()]), losses


@pytest.mark.parametrize(
    ("kind", "optimizer", "amount"),
    list(product(KINDS, ("sgd", "adam"), ("epochs", "steps"))),
)
def test_training_is_the_plain_loop_bit_for_bit(kind: str, optimizer: str, amount: str) -> None:
    run = spec(kind, **(SGD if optimizer == "sgd" else ADAM), **{amount: {"epochs": 2, "steps": 5}[amount]})
    data = sequences(20)  # batches of 8, 8 and 4
    count = {"epochs": 6, "steps": 5}[amount]
    expected, losses = plain(run, data, count, generator(1, "draw"))
    found = network(run)
    trained = train(found, data, run, 1, generator(1, "draw"))
    assert found.save().flat.tobytes() == expected.tobytes()
    sizes = list(islice([8, 8, 4] * 2, count))
    units = sum(round(loss * size * 2**20) for loss, size in zip(losses, sizes, strict=True))
    assert trained.tally == {"examples": sum(sizes), "loss": units}
    assert trained.seconds > 0


@pytest.mark.parametrize("kind", KINDS)
def test_with_lengths_too_and_whatever_stands_between_the_sequences(kind: str) -> None:
    run = spec(kind, **SGD)
    data = sequences(20, lengths=True)
    rows = data.rows.reshape(20, STEPS, FEATURES).copy()
    rows[np.arange(STEPS) >= data.lengths[:, None]] = 7
    results = []
    for one in (data, replace(data, rows=rows.reshape(-1, FEATURES))):
        found = network(run)
        train(found, one, run, 1, generator(1, "draw"))
        results.append(found.save().flat)
    assert results[0].tobytes() == results[1].tobytes()
    expected, _ = plain(run, data, 3, generator(1, "draw"))
    np.testing.assert_allclose(results[0], expected, rtol=1e-5, atol=1e-6)


@given(size=st.integers(1, 40), batch=st.integers(1, 15), epochs=st.integers(1, 3))
def test_an_epoch_covers_every_row_once(size: int, batch: int, epochs: int) -> None:
    found = list(batches(size, TrainingSpec(batch_size=batch, epochs=epochs), np.random.default_rng(0)))
    per_epoch = -(-size // batch)
    assert len(found) == epochs * per_epoch
    for epoch in range(epochs):
        mine = found[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(np.concatenate(mine).tolist()) == list(range(size))
        assert all(len(rows) == batch for rows in mine[:-1])


@given(size=st.integers(1, 40), batch=st.integers(1, 15), steps=st.integers(1, 30))
def test_steps_are_the_beginning_of_enough_epochs(size: int, batch: int, steps: int) -> None:
    found = batches(size, TrainingSpec(batch_size=batch, steps=steps), np.random.default_rng(0))
    expected = islice(shuffled(size, batch, np.random.default_rng(0)), steps)
    assert [rows.tolist() for rows in found] == [rows.tolist() for rows in expected]


def test_one_epoch_is_what_is_done_when_nothing_is_said() -> None:
    assert len(list(batches(20, TrainingSpec(batch_size=8), np.random.default_rng(0)))) == 3


@pytest.mark.parametrize("after", [1, 2, 3])
def test_cancelling_stops_after_that_batch(after: int) -> None:
    asked = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) == after

    run = spec(**SGD, epochs=2)
    found = network(run)
    with pytest.raises(Cancelled):
        train(found, sequences(20), run, 1, generator(1, "draw"), cancelled)
    expected, _ = plain(run, sequences(20), after, generator(1, "draw"))
    assert found.save().flat.tobytes() == expected.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_ends_the_training(value: float) -> None:
    run = spec(**SGD)
    parameters = initial_parameters(run)
    parameters.flat[-1] = value
    found = network_for(run)
    found.load(parameters)
    with pytest.raises(TrainingFailed, match=r"the loss became nan after 0 examples; lower the learning rate \(0\.3\)"):
        train(found, sequences(20), run, 1, generator(1, "draw"))
    with pytest.raises(TrainingFailed, match="loss on the validation data is not finite"):
        evaluate(found, sequences(20), run)


def ticking(monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    """Every look at the clock finds it so many seconds later."""
    clock = ticks(0.0, step)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: next(clock)))


def test_progress_is_told_with_the_epoch_and_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(monkeypatch, TELL_S)
    told: list[Progress] = []
    run = spec(**SGD, epochs=2)
    trained = train(network(run), sequences(20), run, 1, generator(1, "draw"), progress=told.append)
    assert [(one.stage, one.done, one.total, one.epoch) for one in told] == [
        (Stage.TRAINING, done, 6, epoch) for done, epoch in [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    ]
    losses = [one.loss for one in told]
    assert losses[0] is None
    sizes = [8, 8, 4] * 2  # of the batches, whose losses make up the tally
    assert trained.tally["loss"] == sum(
        units(loss * size) for loss, size in zip(losses[1:], sizes, strict=True) if loss
    )


def test_progress_is_not_told_after_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(monkeypatch, TELL_S / 100)
    told: list[Progress] = []
    run = spec(**SGD, epochs=100)
    train(network(run), sequences(20), run, 1, generator(1, "draw"), progress=told.append)
    assert len(told) <= 1 + 300 / 100 + 1
    assert (told[-1].done, told[-1].total) == (300, 300)


def test_an_evaluation_tells_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(monkeypatch, TELL_S)
    monkeypatch.setattr(training, "SCORING_BATCH", 8)
    told: list[Progress] = []
    run = spec(**SGD)
    evaluate(network(run), sequences(20), run, told.append)
    assert told == [Progress(Stage.EVALUATING, done, 3) for done in range(4)]


def test_no_data_train_nothing() -> None:
    amounts: list[dict[str, Any]] = [{"epochs": 2}, {"steps": 5}]
    for amount in amounts:
        run = spec(**ADAM, **amount)
        found = network(run)
        assert train(found, sequences(0), run, 1, generator(1, "draw")).tally == {"examples": 0, "loss": 0}
        assert found.save().flat.tobytes() == initial_parameters(run).flat.tobytes()
        assert batch_count(0, run.training) == 0


def test_training_leaves_its_data_alone() -> None:
    data = sequences(20)
    before = data.rows.tobytes()
    run = spec(**ADAM)
    train(network(run), data, run, 1, generator(1, "draw"))
    assert data.rows.tobytes() == before
    assert isinstance(network(run).save(), Parameters)


def test_rows_may_be_mapped_from_a_file(tmp_path: Path) -> None:
    data, run = sequences(20), spec(**ADAM)
    np.save(tmp_path / "rows.npy", data.rows)
    mapped = replace(data, rows=np.load(tmp_path / "rows.npy", mmap_mode="r"))
    results = []
    for one in (data, mapped):
        found = network(run)
        train(found, one, run, 1, generator(1, "draw"))
        results.append(found.save().flat.tobytes())
    assert results[0] == results[1]


# Seeds ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_draw_alone_decides_and_torchs_own_generator_is_left_as_it_was(dropout: float) -> None:
    run = full("regression", {"features": 3, "targets": 1}, model={"dropout": dropout}, **ADAM, epochs=3)
    data = made(run, 20)
    results = []
    for seed, global_ in ((1, 1), (1, 2), (2, 1)):
        torch.manual_seed(global_)
        before = torch.get_rng_state()
        found = network(run)
        torch.set_rng_state(before)
        train(found, data, run, 1, generator(seed, "draw"))
        assert torch.equal(torch.get_rng_state(), before)
        results.append(found.save().flat.tobytes())
    assert results[0] == results[1] != results[2]


# Every task -------------------------------------------------------------------------------------------------------------

TASKS: dict[str, dict[str, Any]] = {
    "classification": {"features": 3, "classes": 4},
    "multilabel": {"features": 3, "targets": 3},
    "regression": {"features": 3, "targets": 2},
    "forecast": {"features": 3, "steps": 6, "stride": 1},
    "anomaly": {"features": 3, "steps": 6, "stride": 1},
    "next_token": {"vocabulary": list("abcd"), "steps": 6},
}


def full(kind: str, data: dict[str, Any], **given: Any) -> RunSpec:
    """A run of a small model; what is neither task nor model is training."""
    task, model = given.pop("task", {}), given.pop("model", {})
    content = {
        "data": data,
        "task": {"kind": kind, **task},
        "model": {"hidden": 5, "embedding": 3, **model},
        "training": {"batch_size": 8, **given},
    }
    return validate(RunSpec, content, "test")


def made(run: RunSpec, size: int, longest: int = 6, even: bool = False) -> Sequences:
    """Sequences for the run, some of whose labels are missing where they may be."""
    draw = np.random.default_rng(size)
    lengths = np.full(size, longest) if even else draw.integers(1, longest + 1, size)
    starts, count = np.arange(size) * (longest + 2), size * (longest + 2)
    rows = draw.normal(size=(count, 3)).astype(np.float32)
    targets = run.data.targets or 1
    match run.task.kind:
        case "classification":
            return Sequences(rows, starts, lengths, draw.integers(0, 4, size))
        case "multilabel" | "regression":
            y = draw.normal(size=(size, targets)).astype(np.float32)
            y = (y > 0).astype(np.float32) if run.task.kind == "multilabel" else y
            y[draw.random(y.shape) < 0.3] = np.nan
            return Sequences(rows, starts, lengths, y)
        case "next_token":
            tokens = draw.integers(0, 5, count).astype(np.int32)
            return Sequences(tokens, starts, lengths, target="next token")
        case _:
            return Sequences(rows, starts, lengths, target="rows ahead", horizon=run.task.horizon, numbers=3)


@pytest.mark.parametrize(("kind", "optimizer"), list(product(TASKS, ("sgd", "adam", "adamw"))))
def test_every_task_learns(kind: str, optimizer: str) -> None:
    rate = SGD if optimizer == "sgd" else {"optimizer": optimizer, "learning_rate": 0.02}
    run = full(kind, TASKS[kind], **rate, epochs=80, model={"hidden": 16})
    data, found = made(run, 24), network(run)
    before = evaluate(found, data, run)
    trained = train(found, data, run, 1, generator(1, "draw"))
    after = evaluate(found, data, run)
    assert after["loss"] < 0.95 * before["loss"]
    assert trained.tally["examples"] == 80 * data.weight
    assert before["examples"] == after["examples"] <= data.weight


@given(
    kind=st.sampled_from(list(TASKS)),
    pooling=st.sampled_from(["last", "mean", "attention"]),
    bidirectional=st.booleans(),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6),
)
def test_padding_changes_neither_losses_nor_gradients(
    kind: str, pooling: str, bidirectional: bool, lengths: list[int]
) -> None:
    """A padded batch, against its sequences one by one, each in a batch of its own."""
    model = {} if kind == "next_token" else {"pooling": pooling, "bidirectional": bidirectional}
    run = full(kind, TASKS[kind], model=model)
    data = replace(made(run, len(lengths)), lengths=np.array(lengths))
    loss_of = loss_for(run, CPU)
    together, apart = network(run).double(), network(run).double()
    whole = data.batch(np.arange(len(lengths)))
    loss = loss_of(together(*inputs(whole)), torch.from_numpy(whole.y))
    loss.backward()  # type: ignore[no-untyped-call]
    counts = [int(present(data.batch(np.array([row]))).sum()) for row in range(len(lengths))]
    value = 0.0
    for row, count in enumerate(counts):
        one = data.batch(np.array([row]))
        part = loss_of(apart(*inputs(one)), torch.from_numpy(one.y)) * (count / max(1, sum(counts)))
        part.backward()  # type: ignore[no-untyped-call]
        value += part.item()
    assert loss.item() == pytest.approx(value, rel=1e-6, abs=1e-9)
    for mine, other in zip(together.parameters(), apart.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=1e-9)


def inputs(batch: Batch) -> tuple[Tensor, Tensor | None]:
    x = torch.from_numpy(batch.x)
    lengths = None if batch.lengths is None else torch.from_numpy(batch.lengths)
    return x.double() if x.is_floating_point() else x, lengths


def present(batch: Batch) -> NDArray[np.bool_]:
    return batch.y >= 0 if batch.y.dtype == np.int64 else ~np.isnan(batch.y)


def test_mixed_precision_is_for_gpus_alone() -> None:
    data, results = sequences(20), []
    for mixed in (False, True):
        run = spec(**ADAM, mixed_precision=mixed)
        found = network(run)
        train(found, data, run, 1, generator(1, "draw"))
        results.append(found.save().flat.tobytes())
    assert results[0] == results[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize(
    ("kind", "model", "given"),
    [
        *((kind, {}, {}) for kind in TASKS),
        ("classification", {"bidirectional": True, "pooling": "attention"}, {}),
        ("regression", {"pooling": "mean"}, {"truncate": 2}),
        ("regression", {"dropout": 0.5}, {"mixed_precision": True}),
        ("next_token", {}, {"truncate": 2, "clip_norm": 0.1, "mixed_precision": True}),
    ],
)
def test_a_gpu_trains_as_the_processor_does(kind: str, model: dict[str, Any], given: dict[str, Any]) -> None:
    run = full(kind, TASKS[kind], **PLAIN, epochs=7, model=model, **given)  # 21 batches: losses are read in two goes
    data, tallies, moves = made(run, 24), [], []
    for device in ("cpu", "cuda"):
        found = network_for(run, device=device)
        found.load(initial_parameters(run))
        tallies.append(train(found, data, run, 1, generator(1, "draw")).tally)
        moves.append(found.save().flat - initial_parameters(run).flat)
        assert evaluate(found, data, run)["examples"] > 0
    assert tallies[0]["examples"] == tallies[1]["examples"]
    loose = 0.3 if "mixed_precision" in given else 0.01
    assert tallies[1]["loss"] == pytest.approx(tallies[0]["loss"], rel=loose)
    if "dropout" not in model:
        assert np.linalg.norm(moves[1] - moves[0]) < loose * np.linalg.norm(moves[0])


# Losses -----------------------------------------------------------------------------------------------------------------


def loss_and_gradient(run: RunSpec, outputs: list[Any], y: list[Any]) -> tuple[float, list[Any]]:
    found = torch.tensor(outputs, requires_grad=True)
    loss = loss_for(run, CPU)(found, torch.tensor(y))
    loss.backward()  # type: ignore[no-untyped-call]
    assert found.grad is not None
    return loss.item(), found.grad.tolist()


def of(kind: str, loss: str | None = None, weights: tuple[float, ...] | None = None) -> RunSpec:
    data = {**TASKS[kind], **({"classes": 2} if kind == "classification" else {})}
    data |= {"targets": 2} if kind in {"multilabel", "regression"} else {}
    return full(kind, data, task={"loss": loss, "class_weights": weights})


LN3, LN4 = float(np.log(3)), float(np.log(4))


@pytest.mark.parametrize(
    ("loss", "weights", "expected"),
    [
        # Probabilities of the true class: 3/4 and 1/4, so -log p is ln(4/3) and ln 4.
        ("cross_entropy", None, (LN4 - LN3 + LN4) / 2),
        ("focal", None, ((LN4 - LN3) / 16 + LN4 * 9 / 16) / 2),
        ("cross_entropy", (1.0, 3.0), (LN4 - LN3 + 3 * LN4) / 4),
        ("focal", (1.0, 3.0), ((LN4 - LN3) / 16 + 3 * LN4 * 9 / 16) / 4),
    ],
)
def test_losses_of_classes_by_hand(loss: str, weights: tuple[float, ...] | None, expected: float) -> None:
    value, _ = loss_and_gradient(of("classification", loss, weights), [[LN3, 0.0], [LN3, 0.0]], [0, 1])
    assert value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "weights", "expected"),
    [
        # Sigmoids of ln 3, -ln 3, ln 3: 3/4, 1/4, 3/4, for labels 1, 1, 0; the fourth is missing.
        ("cross_entropy", None, (LN4 - LN3 + LN4 + LN4) / 3),
        ("focal", None, ((LN4 - LN3) / 16 + LN4 * 9 / 16 + LN4 * 9 / 16) / 3),
        ("cross_entropy", (2.0, 5.0), (2 * (LN4 - LN3) + 5 * LN4 + LN4) / 8),
    ],
)
def test_losses_of_labels_by_hand(loss: str, weights: tuple[float, ...] | None, expected: float) -> None:
    run = of("multilabel", loss, weights)
    value, gradient = loss_and_gradient(run, [[LN3, -LN3], [LN3, 99.0]], [[1.0, 1.0], [0.0, np.nan]])
    assert value == pytest.approx(expected, rel=1e-6)
    assert gradient[1][1] == 0
    assert 0 not in (*gradient[0], gradient[1][0])


@pytest.mark.parametrize("kind", ["regression", "forecast", "anomaly"])
@pytest.mark.parametrize(
    ("loss", "expected"), [(None, (0.25 + 9) / 2), ("mse", (0.25 + 9) / 2), ("mae", 1.75), ("huber", (0.125 + 2.5) / 2)]
)
def test_losses_of_numbers_by_hand(kind: str, loss: str | None, expected: float) -> None:
    value, gradient = loss_and_gradient(of(kind, loss), [[1.5, 7.0], [-2.0, 5.0]], [[1.0, np.nan], [1.0, np.nan]])
    assert value == pytest.approx(expected)
    assert [row[1] for row in gradient] == [0, 0]
    assert [np.sign(row[0]) for row in gradient] == [1, -1]


@pytest.mark.parametrize(("loss", "expected"), [("cross_entropy", LN4), ("focal", LN4 * 9 / 16)])
def test_losses_of_tokens_by_hand(loss: str, expected: float) -> None:
    same = [[0.0, 0.0, 0.0, 0.0, -1e9]] * 3  # five tokens, one impossible
    value, gradient = loss_and_gradient(of("next_token", loss), [same, same], [[1, 2, 3], [0, -1, -1]])
    assert value == pytest.approx(expected, rel=1e-6)
    assert gradient[1][1:] == [[0] * 5] * 2


@pytest.mark.parametrize(
    ("kind", "loss"), [("multilabel", "cross_entropy"), ("multilabel", "focal"), ("regression", "mae")]
)
def test_a_batch_without_a_label_teaches_nothing(kind: str, loss: str) -> None:
    value, gradient = loss_and_gradient(of(kind, loss), [[1.0, 2.0]], [[np.nan, np.nan]])
    assert (value, gradient) == (0, [[0, 0]])


# Truncated back-propagation ---------------------------------------------------------------------------------------------


def update(run: RunSpec, data: Sequences) -> dict[str, NDArray[np.float32]]:
    """What one step at learning rate 1 takes from each tensor: the gradient."""
    found = network(run)
    before = initial_parameters(run).flat
    train(found, data, run, 1, generator(1, "draw"))
    return found.layout.views(before - found.save().flat)


@pytest.mark.parametrize("kind", TASKS)
def test_truncation_at_the_length_or_beyond_is_none(kind: str) -> None:
    run = full(kind, TASKS[kind], **PLAIN)
    data = made(run, 8)
    for steps in (6, 7, 100):
        other = full(kind, TASKS[kind], **PLAIN, truncate=steps)
        for name, mine in update(other, data).items():
            assert mine.tobytes() == update(run, data)[name].tobytes()


@pytest.mark.parametrize(
    ("kind", "cell", "truncate"), list(product(("classification", "forecast", "next_token"), KINDS, (1, 2, 4)))
)
def test_truncated_gradients_are_those_of_segments_with_states_taken_as_given(
    kind: str, cell: str, truncate: int
) -> None:
    """A plain loop over single steps, which cuts the graph every `truncate` of them."""
    model = {"kind": cell, "layers": 1}
    run = full(kind, TASKS[kind], **PLAIN, truncate=truncate, model=model)
    data = made(run, 8)
    found = network(run)
    parameters = dict(found.body.named_parameters())
    batch = data.batch(generator(1, "draw").permutation(8))
    x = torch.from_numpy(batch.x)
    steps = parameters["embedding.weight"][x] if kind == "next_token" else x
    recurrent, states = found.body.get_submodule("recurrent"), []
    state: Any = None
    for step in range(x.shape[1]):
        if step and step % truncate == 0:
            state = tuple(one.detach() for one in state) if isinstance(state, tuple) else state.detach()
        out, state = recurrent(steps[:, step : step + 1], state)
        states.append(out[:, 0])
    whole = torch.stack(states, 1)
    if kind != "next_token":
        ends = [x.shape[1]] * 8 if batch.lengths is None else batch.lengths.tolist()
        whole = torch.stack([whole[row, end - 1] for row, end in enumerate(ends)])
    outputs = whole @ parameters["head.weight"].T + parameters["head.bias"]
    loss = loss_for(run, CPU)(outputs, torch.from_numpy(batch.y))
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    mine = update(run, data)
    for name, expected in zip(parameters, gradients, strict=True):
        np.testing.assert_allclose(mine[name], expected.numpy(), rtol=1e-3, atol=1e-6)
    trained = train(network(run), data, run, 1, generator(1, "draw"))
    assert trained.tally["loss"] / 2**20 == pytest.approx(loss.item() * data.weight, rel=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_pooled_states_of_every_segment_teach(pooling: str) -> None:
    run = full("classification", TASKS["classification"], **PLAIN, truncate=2, model={"pooling": pooling})
    data = made(run, 8, even=True)
    late = replace(data, starts=data.starts + 4, lengths=np.full(8, 2))  # the last segment alone
    name = "recurrent.weight_ih_l0"
    assert not np.allclose(update(run, data)[name], update(run, late)[name], rtol=0.1)


# Clipping and schedules -------------------------------------------------------------------------------------------------


def norm(of: dict[str, NDArray[np.float32]]) -> float:
    return float(np.sqrt(sum((one.astype(np.float64) ** 2).sum() for one in of.values())))


def test_the_gradient_of_a_batch_is_clipped_to_its_norm() -> None:
    data = sequences(8)
    free = update(spec(**PLAIN), data)
    for share in (0.1, 0.5):
        clipped = update(spec(**PLAIN, clip_norm=share * norm(free)), data)
        for name, one in clipped.items():
            np.testing.assert_allclose(one, share * free[name], rtol=1e-3, atol=1e-6)
    loose = update(spec(**PLAIN, clip_norm=2 * norm(free)), data)
    assert all(np.array_equal(one, free[name]) for name, one in loose.items())


def test_weight_decay_pulls_to_zero() -> None:
    data = sequences(8)
    start = initial_parameters(spec())
    views = start.layout.views(start.flat)
    for optimizer in ("sgd", "adamw"):  # in both, a step takes learning rate x decay x number, whatever the gradient
        given: dict[str, Any] = {"optimizer": optimizer, "learning_rate": 1.0}
        free, decayed = update(spec(**given), data), update(spec(**given, weight_decay=0.1), data)
        for name, one in decayed.items():
            np.testing.assert_allclose(one - free[name], 0.1 * views[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"warmup": 3}, [0.25, 0.5, 0.75, 1, 1]),
        ({"schedule": "linear"}, [1, 0.775, 0.55, 0.325, 0.1]),
        ({"schedule": "linear", "final": 0.2}, [1, 0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "cosine", "final": 0.0}, [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0]),
        ({"schedule": "cosine", "warmup": 2, "final": 0.5}, [1 / 3, 2 / 3, 1, 0.75, 0.5]),
        ({"schedule": "cosine", "warmup": 9}, [0.1, 0.2, 0.3, 0.4, 0.5]),
    ],
)
def test_schedules_by_hand(given: dict[str, Any], expected: list[float]) -> None:
    settings = TrainingSpec(learning_rate=2.0, **given)
    found = [learning_rate(settings, round_, 5) for round_ in range(1, 6)]
    assert found == pytest.approx([2 * one for one in expected])


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 12),
    final=st.floats(0.01, 1),
    rounds=st.integers(1, 12),
)
def test_a_rate_rises_to_the_full_one_and_then_falls_to_the_last(
    schedule: Any, warmup: int, final: float, rounds: int
) -> None:
    final = 0.0 if schedule == "constant" else final
    settings = TrainingSpec(learning_rate=0.5, schedule=schedule, warmup=warmup, final=final)
    found = [learning_rate(settings, round_, rounds) for round_ in range(1, rounds + 1)]
    assert all(one < other for one, other in pairwise(found[: warmup + 1]))
    assert all(one >= other for one, other in pairwise(found[warmup:]))
    assert 0 < min(found) <= max(found) <= 0.5
    if rounds > warmup + 1:
        assert found[-1] == pytest.approx(0.5 * (1 if schedule == "constant" else final))


def test_the_rounds_rate_is_the_one_that_trains() -> None:
    run = spec(**PLAIN, schedule="linear", final=0.0).model_copy(update={"rounds": 5})
    data = sequences(8)
    whole, half, found = update(run, data), {}, network(run)
    train(found, data, run, 3, generator(1, "draw"))
    half = found.layout.views(initial_parameters(run).flat - found.save().flat)
    for name, one in half.items():
        np.testing.assert_allclose(one, 0.5 * whole[name], rtol=1e-3, atol=1e-6)


# Scoring ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [False, True])
def test_scores_are_the_sums_over_single_sequences(lengths: bool) -> None:
    run, data = spec(), sequences(30, lengths)
    found = network(run)
    loss, correct = 0.0, 0
    with torch.no_grad():
        for row in range(len(data)):
            x = torch.from_numpy(data.rows[data.starts[row] : data.starts[row] + data.lengths[row]])
            logits = found(x[None]).double()[0]
            loss -= float(logits.log_softmax(0)[labels(data)[row]])
            correct += int(logits.argmax()) == labels(data)[row]
    tally = evaluate(found, data, run)
    assert (tally["examples"], tally["correct"]) == (30, correct)
    assert tally["loss"] / 2**20 == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("cuts", [[1], [600], [511, 512, 513], [100, 200, 300, 1000], list(range(0, 1100, 7))])
def test_scores_add_up_over_any_partition(cuts: list[int]) -> None:
    run, data = spec(), sequences(1100)
    found = network(run)
    parts = [data.take(rows) for rows in np.split(np.arange(1100), cuts)]
    whole, summed = evaluate(found, data, run), add(evaluate(found, part, run) for part in parts)
    assert (summed["examples"], summed["correct"]) == (whole["examples"], whole["correct"])
    # torch's kernels round differently for batches of another size: at most a unit of 2^-20 for each sequence
    assert abs(summed["loss"] - whole["loss"]) <= len(data)
    assert evaluate(found, data, run) == whole


def test_no_data_score_nothing() -> None:
    assert evaluate(network(spec()), sequences(0), spec()) == {"examples": 0, "loss": 0}


@pytest.mark.parametrize("kind", TASKS)
def test_outputs_come_in_order_and_in_pieces_that_fit_in_memory(kind: str) -> None:
    run = full(kind, TASKS[kind], model={"hidden": 128})
    data = made(run, 1100, longest=20)  # 4 x 128 x 20 numbers each: 1,638 fit, and 512 are the most
    found = network(run)
    seen = []
    for indices, outputs, batch in outputs_of(found, data, run):
        assert len(indices) == len(outputs) == len(batch) <= 512
        assert outputs.dtype == np.float32
        seen += indices.tolist()
        row = len(indices) // 2
        x = torch.from_numpy(data.batch(indices[row : row + 1]).x)
        with torch.no_grad():
            alone = found(x)[0].numpy()
        mine = outputs[row, : x.shape[1]] if kind == "next_token" else outputs[row]
        np.testing.assert_allclose(mine, alone, rtol=1e-4, atol=1e-5)
    assert seen == list(range(1100))
    wide = full(kind, TASKS[kind], model={"hidden": 16_384, "layers": 1})
    assert training._at_once(data, wide) == 2**24 // (4 * 16_384 * 20) == 12


def test_what_is_known_of_anomalies_is_scored() -> None:
    run = full("anomaly", TASKS["anomaly"])
    data = replace(made(run, 20), anomalies=np.arange(20) % 3 - 1)  # unknown, none, one, ...
    tally = evaluate(network(run), data, run)
    counts = {
        kind: sum(value for name, value in tally.items() if name.startswith(f"{kind}.0.")) for kind in ("pos", "neg")
    }
    assert counts == {"pos": 6, "neg": 7}
