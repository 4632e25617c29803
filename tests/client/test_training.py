"""Local training against a plain loop in torch, bit for bit, and scoring against sums one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from seqfed.client.data import Sequences
from seqfed.client.network import SequenceClassifier
from seqfed.client.training import Cancelled, batches, evaluate, train
from seqfed.common.config import validate
from seqfed.common.errors import TrainingFailed
from seqfed.common.layout import Flat, Parameters
from seqfed.common.metrics import add
from seqfed.common.model import initial_parameters
from seqfed.common.seeds import generator
from seqfed.common.spec import RunSpec, TrainingSpec

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
FEATURES, HIDDEN, LAYERS, CLASSES, STEPS = 3, 6, 2, 4, 5
SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.3, "momentum": 0.9}
ADAM: dict[str, Any] = {"optimizer": "adam", "learning_rate": 0.01}


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
    return Sequences(x, draw.integers(0, CLASSES, size), long)


def network(run: RunSpec) -> SequenceClassifier:
    found = SequenceClassifier(run)
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
        states, _ = recurrent(torch.from_numpy(data.x[rows]))
        ends = [STEPS] * len(rows) if data.lengths is None else data.lengths[rows].tolist()
        last = torch.stack([states[row, end - 1] for row, end in enumerate(ends)])
        loss = functional.cross_entropy(head(last), torch.from_numpy(data.y[rows]))
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
    trained = train(found, data, run.training, generator(1, "draw"))
    assert found.save().flat.tobytes() == expected.tobytes()
    sizes = list(islice([8, 8, 4] * 2, count))
    units = sum(round(loss * size * 2**20) for loss, size in zip(losses, sizes, strict=True))
    assert trained.tally == {"examples": sum(sizes), "loss": units}
    assert trained.seconds > 0


@pytest.mark.parametrize("kind", KINDS)
def test_with_lengths_too_and_whatever_the_padding_holds(kind: str) -> None:
    run = spec(kind, **SGD)
    data = sequences(20, lengths=True)
    assert data.lengths is not None
    padding = np.arange(STEPS) >= data.lengths[:, None]
    other = replace(data, x=np.where(padding[..., None], np.float32(7), data.x))
    results = []
    for one in (data, other):
        found = network(run)
        train(found, one, run.training, generator(1, "draw"))
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
        train(found, sequences(20), run.training, generator(1, "draw"), cancelled)
    expected, _ = plain(run, sequences(20), after, generator(1, "draw"))
    assert found.save().flat.tobytes() == expected.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_ends_the_training(value: float) -> None:
    run = spec(**SGD)
    parameters = initial_parameters(run)
    parameters.flat[-1] = value
    found = SequenceClassifier(run)
    found.load(parameters)
    with pytest.raises(TrainingFailed, match=r"the loss became nan after 0 examples; lower the learning rate \(0\.3\)"):
        train(found, sequences(20), run.training, generator(1, "draw"))
    with pytest.raises(TrainingFailed, match="loss on the validation data is not finite"):
        evaluate(found, sequences(20))


@pytest.mark.parametrize("lengths", [False, True])
def test_scores_are_the_sums_over_single_sequences(lengths: bool) -> None:
    run, data = spec(), sequences(30, lengths)
    found = network(run)
    loss, correct = 0.0, 0
    with torch.no_grad():
        for row in range(len(data)):
            end = STEPS if data.lengths is None else int(data.lengths[row])
            logits = found(torch.from_numpy(data.x[row : row + 1, :end])).double()[0]
            loss -= float(logits.log_softmax(0)[data.y[row]])
            correct += int(logits.argmax()) == data.y[row]
    tally = evaluate(found, data)
    assert (tally["examples"], tally["correct"]) == (30, correct)
    assert tally["loss"] / 2**20 == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("cuts", [[1], [600], [511, 512, 513], [100, 200, 300, 1000], list(range(0, 1100, 7))])
def test_scores_add_up_over_any_partition(cuts: list[int]) -> None:
    data = sequences(1100)
    found = network(spec())
    parts = [data.take(rows) for rows in np.split(np.arange(1100), cuts)]
    whole, summed = evaluate(found, data), add(evaluate(found, part) for part in parts)
    assert (summed["examples"], summed["correct"]) == (whole["examples"], whole["correct"])
    # torch's kernels round differently for batches of another size: at most a unit of 2^-20 for each sequence
    assert abs(summed["loss"] - whole["loss"]) <= len(data)
    assert evaluate(found, data) == whole


def test_no_data_score_nothing() -> None:
    assert evaluate(network(spec()), sequences(0)) == {"examples": 0, "loss": 0, "correct": 0}


def test_training_leaves_its_data_alone() -> None:
    data = sequences(20)
    before = data.x.tobytes()
    run = spec(**ADAM)
    train(network(run), data, run.training, generator(1, "draw"))
    assert data.x.tobytes() == before
    assert isinstance(network(run).save(), Parameters)
