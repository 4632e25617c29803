"""DP-SGD against single sequences' gradients of the plain network, one backward pass each."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from seqfed.client import private_training
from seqfed.client.data import Sequences
from seqfed.client.network import Network, network_for
from seqfed.client.private_training import drawn, private_body, tensors_by_name, train
from seqfed.client.training import Cancelled, loss_for, tensors_of
from seqfed.common.config import validate
from seqfed.common.dp import noise
from seqfed.common.dp.noise import derived
from seqfed.common.errors import ConfigError, TrainingFailed
from seqfed.common.layout import Flat
from seqfed.common.metrics import units
from seqfed.common.model import initial_parameters
from seqfed.common.spec import RunSpec
from seqfed.common.views import Progress

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = derived(bytes(32), "tests")
WORST = 1e-6  # probability of a false alarm of one statistical test
FEATURES, CLASSES, STEPS = 3, 4, 5
NUMBERS: dict[str, Any] = {"data": {"features": FEATURES, "classes": CLASSES}}
TOKENS: dict[str, Any] = {"data": {"vocabulary": list("abcdef"), "steps": STEPS}, "task": {"kind": "next_token"}}
SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 1.0, "steps": 1, "batch_size": 12}


def spec(content: dict[str, Any] = NUMBERS, dp: dict[str, Any] | None = None, **more: Any) -> RunSpec:
    private = {"mode": "example", "delta": 1e-5, "noise_multiplier": 0.5, "clip": 0.7, **(dp or {})}
    public = private.get("evaluation") == "public"
    fixed = {"training": SGD, "model": {"hidden": 6, "embedding": 5}, "evaluation": {"every": 1 if public else 0}}
    whole = {**fixed, **content, **more, "aggregation": {"weighting": "uniform"}, "privacy": {"dp": private}}
    return validate(RunSpec, whole, "test")


def sequences(run: RunSpec, size: int, lengths: bool = True) -> Sequences:
    draw = np.random.default_rng(size)
    if run.task.kind == "next_token":
        rows = draw.integers(0, 7, size * (STEPS + 1)).astype(np.int32)
        starts = np.arange(size, dtype=np.int64) * (STEPS + 1)
        long = draw.integers(1, STEPS + 1, size) if lengths else np.full(size, STEPS)
        return Sequences(rows, starts, long, target="next token")
    x = draw.normal(size=(size, STEPS, FEATURES)).astype(np.float32)
    return Sequences.of(x, draw.integers(0, CLASSES, size), draw.integers(1, STEPS + 1, size) if lengths else None)


def network(run: RunSpec) -> Network:
    found = network_for(run)
    found.load(initial_parameters(run))
    return found


def slow_step(run: RunSpec, data: Sequences, key: bytes) -> Flat:
    """The model's change in one step at learning rate 1: each sequence's gradient by itself, through the plain network."""
    dp = run.privacy.dp
    assert dp is not None
    plain, loss_of, clip = network(run), loss_for(run, torch.device("cpu")), dp.first_clip
    total = np.zeros(plain.save().flat.size)
    rows = drawn(len(data), min(1.0, run.training.batch_size / len(data)), noise.Stream(derived(key, "batches")))
    for row in rows:
        plain.zero_grad()
        x, lengths, y = tensors_of(data.batch(np.array([row])), torch.device("cpu"))
        loss = loss_of(plain(x, lengths), y)
        if run.task.class_weights is not None:
            loss = loss * run.task.class_weights[int(y[0])]
        torch.autograd.backward(loss)
        gradients = {name: one.grad for name, one in plain.body.named_parameters()}
        single = np.concatenate([gradients[name].numpy().ravel() for name, _ in plain.layout.tensors]).astype(float)  # type: ignore[union-attr]
        total += single * min(1.0, clip / np.linalg.norm(single))
    noisy = noise.released(total, 0.5 * clip * noise.ROUNDED, derived(key, "noise", 1))
    return np.asarray(-noisy / np.float32(min(run.training.batch_size, len(data))), np.float32)


KINDS = [
    *({"kind": kind, "bidirectional": both} for kind in ("lstm", "gru", "rnn") for both in (False, True)),
    {"kind": "lstm", "pooling": "attention", "bidirectional": True},
    {"kind": "gru", "pooling": "mean", "layers": 1},
    {"kind": "rnn", "nonlinearity": "relu", "layers": 1},
]


@pytest.mark.parametrize("model", KINDS, ids=str)
@pytest.mark.parametrize("lengths", [False, True])
def test_the_private_body_is_the_networks(model: dict[str, Any], lengths: bool) -> None:
    run = spec(model={"hidden": 6, **model})
    plain, body = network(run), private_body(run)
    assert {name: one.shape for name, one in tensors_by_name(body).items()} == dict(plain.layout.tensors)
    private_training._copy(plain.body, body)
    data = sequences(run, 9, lengths)
    rows = np.argsort(-data.lengths, kind="stable")
    x, long, _ = tensors_of(data.batch(rows), torch.device("cpu"))
    assert torch.allclose(body(x, long), plain(x, long), atol=1e-6)


@pytest.mark.parametrize("model", KINDS, ids=str)
def test_a_step_is_that_of_single_gradients(model: dict[str, Any]) -> None:
    run = spec(model={"hidden": 6, **model})
    data = sequences(run, 30)
    wanted, trained = slow_step(run, data, KEY), network(run)
    before = trained.save().flat.copy()
    train(trained, data, run, 1, KEY)
    assert np.allclose(trained.save().flat - before, wanted, atol=2e-6)


@pytest.mark.parametrize(
    ("content", "dp"),
    [
        (TOKENS, {}),
        (TOKENS, {"clip": 0.01}),
        (TOKENS, {"clip": 1e3}),
        ({**NUMBERS, "task": {"class_weights": [1.0, 2.0, 0.1, 5.0]}}, {"clip": 1e3}),
        ({**NUMBERS, "task": {"loss": "focal"}}, {}),
    ],
    ids=["tokens", "all clipped", "none clipped", "class weights", "focal"],
)
@pytest.mark.parametrize("room", [1, private_training.ROOM])
def test_a_step_of_other_tasks(
    content: dict[str, Any], dp: dict[str, Any], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_training, "ROOM", room)
    run = spec(content, dp)
    data = sequences(run, 25, lengths=False)
    wanted, trained = slow_step(run, data, KEY), network(run)
    before = trained.save().flat.copy()
    train(trained, data, run, 1, KEY)
    assert np.allclose(trained.save().flat - before, wanted, atol=2e-6 * max(1.0, float(np.abs(wanted).max())))


def test_one_sequence_moves_a_steps_sum_by_the_clip_at_most() -> None:
    """The same key with and without the last sequence, which is in the batch: the noise is the same, the rest within C."""
    run = spec(training={**SGD, "batch_size": 1000}, dp={"clip": 0.2})
    data = sequences(run, 20)
    changes = []
    for count in (20, 19):
        part = Sequences(
            data.rows, data.starts[:count], data.lengths[:count], None if data.y is None else data.y[:count]
        )
        trained = network(run)
        before = trained.save().flat.copy()
        train(trained, part, run, 1, KEY)
        changes.append((trained.save().flat - before).astype(float) * count)
    moved = np.linalg.norm(changes[0] - changes[1])
    assert moved <= 0.2 * (1 + 1e-4)
    assert moved > 0.19


def test_each_sequence_is_drawn_by_itself_with_the_same_probability() -> None:
    size, chance, times = 20_000, 0.013, 100
    stream = noise.Stream(KEY)
    batches = [drawn(size, chance, stream) for _ in range(times)]
    assert all((np.diff(rows) > 0).all() and 0 <= rows[0] <= rows[-1] < size for rows in batches)
    sizes = np.array([len(rows) for rows in batches])
    spread = math.sqrt(size * chance * (1 - chance))
    assert stats.kstest((sizes - size * chance) / spread, "norm").pvalue > WORST
    counts = np.bincount(np.concatenate(batches), minlength=size)
    of_counts = np.bincount(np.minimum(counts, 5), minlength=6)
    chances = stats.binom.pmf(np.arange(6), times, chance)
    chances[5] = 1 - chances[:5].sum()
    assert stats.chisquare(of_counts, chances * size).pvalue > WORST
    assert len(drawn(size, 1.0, stream)) == size


def test_batches_and_noise_are_of_the_key_alone() -> None:
    """Not of the run's seed, which everybody knows."""
    run = spec(training={**SGD, "steps": 3})
    data, found = sequences(run, 30), []
    for key in (KEY, KEY, derived(KEY, "other")):
        trained = network(run)
        train(trained, data, run, 1, key)
        found.append(trained.save().flat.copy())
    assert np.array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-3


def test_a_step_without_any_sequence_is_noise() -> None:
    run = spec(training={**SGD, "batch_size": 1})
    data = sequences(run, 4000)
    key = next(
        one
        for one in (derived(KEY, nth) for nth in range(100))
        if not len(drawn(4000, 1 / 4000, noise.Stream(derived(one, "batches"))))
    )
    trained = network(run)
    before = trained.save().flat.copy()
    train(trained, data, run, 1, key)
    change = (trained.save().flat - before).astype(float)
    assert stats.kstest(change / (0.5 * 0.7), "norm").pvalue > WORST


def test_what_is_told_is_in_per_cent_and_without_a_loss() -> None:
    run, told = spec(training={**SGD, "steps": 7}), list[Progress]()
    data = sequences(run, 30)
    trained = train(network(run), data, run, 1, KEY, progress=told.append)
    assert trained.tally["examples"] == 0
    assert not any(trained.tally.values())
    assert {one.total for one in told} == {100}
    assert told[-1].done == 100
    assert all(one.loss is None for one in told)


def test_a_public_run_tells_its_losses() -> None:
    run, told = spec(dp={"evaluation": "public"}), list[Progress]()
    data = sequences(run, 30)
    trained = train(network(run), data, run, 1, KEY, progress=told.append)
    rows = drawn(30, 12 / 30, noise.Stream(derived(KEY, "batches")))
    assert trained.tally["examples"] == len(rows)
    plain, loss_of = network(run), loss_for(run, torch.device("cpu"))
    x, lengths, y = tensors_of(data.batch(rows), torch.device("cpu"))
    mean = loss_of(plain(x, lengths), y).item()
    assert told[-1].loss == pytest.approx(mean, rel=1e-5)
    assert sum(trained.tally.values()) - len(rows) == pytest.approx(units(mean * len(rows)), rel=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_it_learns(optimizer: str) -> None:
    """A pattern that 300 sequences have in common is learnt through the noise."""
    rate = 1.0 if optimizer == "sgd" else 0.03
    settings = {"optimizer": optimizer, "learning_rate": rate, "batch_size": 60, "epochs": 12}
    run = spec(training=settings, dp={"clip": 1.0})
    draw = np.random.default_rng(1)
    x = draw.normal(size=(300, STEPS, FEATURES)).astype(np.float32)
    y = draw.integers(0, CLASSES, 300)
    x[np.arange(300), :, 0] += 3 * y[:, None].astype(np.float32)
    trained = network(run)
    train(trained, Sequences.of(x, y), run, 1, KEY)
    with torch.no_grad():
        right = (trained(torch.from_numpy(x)).argmax(1).numpy() == y).mean()
    assert right > 0.6


def test_it_ends_when_it_is_no_longer_wanted() -> None:
    run = spec(training={**SGD, "steps": 50})
    with pytest.raises(Cancelled):
        train(network(run), sequences(run, 20), run, 1, KEY, cancelled=lambda: True)


def test_numbers_that_are_not_finite_fail_the_training() -> None:
    run = spec(training={**SGD, "batch_size": 20})
    broken = network(run)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    with pytest.raises(TrainingFailed, match=r"not finite; lower the learning rate \(1\)"):
        train(broken, sequences(run, 20), run, 1, KEY)


def test_what_has_no_single_gradients_is_refused() -> None:
    run = spec(model={"hidden": 6, "projection": 3})
    with pytest.raises(
        ConfigError, match=r"model\.projection: privacy\.dp\.mode = 'example' needs each sequence's own"
    ):
        train(network(run), sequences(run, 20), run, 1, KEY)
    for changed, said in (
        ({"model": run.model.model_copy(update={"custom": "a:b"})}, r"model\.custom"),
        ({"training": run.training.model_copy(update={"truncate": 2})}, r"training\.truncate"),
    ):
        bare = spec().model_copy(update=changed)
        with pytest.raises(ConfigError, match=said):
            private_body(bare)
