"""The demo itself: split the digits, train them federated over real processes, compare, save, and tell."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from seqfed.client import partition
from seqfed.client.admin import operating
from seqfed.client.data import ClientData, Sequences
from seqfed.client.demo.processes import Processes, processes, server_address
from seqfed.client.shown import size
from seqfed.client.watching import follow
from seqfed.common import checkpoint
from seqfed.common.errors import ConfigError, TrainingFailed
from seqfed.common.layout import Parameters
from seqfed.common.metrics import summary
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.seeds import generator
from seqfed.common.spec import CohortSpec, DataSpec, ModelSpec, RunSpec, TrainingSpec
from seqfed.common.views import RoundRecord, RunView

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HELD_OUT = 0.2  # of the digits: nobody trains on them, and each client scores its share of them


@dataclass(frozen=True)
class Settings:
    """The demo's flags."""

    clients: int
    rounds: int
    model: str
    partition: str
    alpha: float
    seed: int
    out: Path


def run(settings: Settings, *, as_json: bool) -> None:
    """The whole demo; the result goes to standard output, the progress too unless `as_json`."""
    console = Console(stderr=as_json, highlight=False)
    begun = time.monotonic()
    spec = specification(settings)
    shards = split_digits(settings)
    console.print(
        f"{settings.clients} clients hold {', '.join(str(len(one.training)) for one in shards)} of scikit-learn's digits "
        f"({settings.partition} split); {sum(len(one.validation) for one in shards)} are held out",
        soft_wrap=True,
    )
    try:
        view = federate(settings, spec, shards, console)
        if view.phase != "finished":
            raise TrainingFailed(f"the run {view.phase}: {view.reason}; the logs are in {settings.out / 'logs'}")
        held_out = join([one.validation for one in shards])
        parameters = checkpoint.load(settings.out / "model.safetensors", layout_of(spec))
        accuracy = score(spec, parameters, held_out)
        federated = summary(view.history[-1].evaluation)["accuracy"]
        if accuracy != federated:
            raise TrainingFailed(f"the clients' summed accuracy {federated} is not the saved model's, {accuracy}")
        pooled, alone = baselines(settings, spec, shards, held_out, console)
    except KeyboardInterrupt:
        console.print("stopped; every process has ended")
        raise SystemExit(130) from None
    curves(settings.out / "curves.png", view.history, pooled, alone)
    result = {
        "accuracy": accuracy,
        "pooled_accuracy": pooled,
        "alone_accuracy_mean": float(np.mean(alone)),
        "rounds": len(view.history),
        "seconds": round(time.monotonic() - begun, 2),
        "clients": settings.clients,
        "bytes_up": view.bytes_up,
        "bytes_down": view.bytes_down,
        "model": str(settings.out / "model.safetensors"),
    }
    console.print(result_table(accuracy, pooled, alone))
    console.print(next_steps(settings, view), soft_wrap=True)
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")


def specification(settings: Settings) -> RunSpec:
    """The run that the demo submits."""
    return RunSpec(
        name="digits",
        seed=settings.seed,
        rounds=settings.rounds,
        data=DataSpec(features=8, steps=8, classes=10),
        model=ModelSpec.model_validate({"kind": settings.model}),
        training=TrainingSpec(epochs=2),
        cohort=CohortSpec(min_clients=settings.clients),
    )


def split_digits(settings: Settings) -> list[ClientData]:
    """Each client's part of the digits, and its even share of those held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("the demo needs scikit-learn and matplotlib: pip install 'seqfed[demo]'") from None
    pixels, labels = load_digits(return_X_y=True)
    everything = Sequences((pixels.reshape(-1, 8, 8) / 16).astype(np.float32), labels.astype(np.int64))
    draw = generator(settings.seed, "demo split")
    order = draw.permutation(len(everything))
    cut = int(HELD_OUT * len(everything))
    held_out, rest = everything.take(order[:cut]), everything.take(order[cut:])
    if settings.partition == "iid":
        parts = partition.iid(len(rest), settings.clients, draw)
    else:
        parts = partition.dirichlet(rest.y, settings.clients, settings.alpha, draw)
    shares = partition.iid(len(held_out), settings.clients, draw)
    return [ClientData(rest.take(part), held_out.take(share)) for part, share in zip(parts, shares, strict=True)]


def join(parts: list[Sequences]) -> Sequences:
    """All sequences of the parts, which have no lengths."""
    return Sequences(np.concatenate([one.x for one in parts]), np.concatenate([one.y for one in parts]))


# The federation -------------------------------------------------------------------------------------------------------


def federate(settings: Settings, spec: RunSpec, shards: list[ClientData], console: Console) -> RunView:
    """Run it over real processes and fetch the model; the run's last view."""
    with tempfile.TemporaryDirectory(prefix="seqfed-demo-") as name, processes(settings.out / "logs") as started:
        work = Path(name)
        console.print(f"starting a server and {settings.clients} clients (logs: {settings.out / 'logs'})")
        started.start("server", "server", "--port", "0", "--state", str(work / "server"))
        address = server_address(work / "server", started)
        for number, shard in enumerate(shards, 1):
            start_client(started, work, f"client-{number}", shard, address)
        return started.run(_train(address, spec, settings.out, console, started))


def start_client(started: Processes, work: Path, name: str, shard: ClientData, address: str) -> None:
    files = {"data": shard.training, "validation": shard.validation}
    for purpose, data in files.items():
        np.savez(work / f"{name}-{purpose}.npz", x=data.x, y=data.y)
    flags = [part for one in files for part in (f"--{one}", str(work / f"{name}-{one}.npz"))]
    started.start(name, "client", "--server", address, "--name", name, "--state", str(work / name), *flags)


async def _train(address: str, spec: RunSpec, out: Path, console: Console, started: Processes) -> RunView:
    async with operating(address, insecure=False) as operator:
        submitted = await operator.submit(spec, None)
        following = asyncio.create_task(follow(operator, submitted.run, console=console))
        try:
            while not (await asyncio.wait([following], timeout=1.0))[0]:
                started.require_alive()
        finally:
            following.cancel()
        view = await following
        await operator.export(submitted.run, out / "model.safetensors")
    return view


# What it is compared with ---------------------------------------------------------------------------------------------


def baselines(
    settings: Settings, spec: RunSpec, shards: list[ClientData], held_out: Sequences, console: Console
) -> tuple[float, list[float]]:
    """The same model from the same start, trained as long: on the pooled data, and on each client's alone."""
    pooled = join([one.training for one in shards])
    sets = [("pooled data", pooled), *((f"client {n} alone", one.training) for n, one in enumerate(shards, 1))]
    epochs = settings.rounds * (spec.training.epochs or 1)
    training = spec.training.model_copy(update={"epochs": epochs})
    batches = sum(epochs * -(-len(data) // training.batch_size) for _, data in sets)
    columns = (TextColumn("for comparison: {task.description}"), BarColumn(), TimeElapsedColumn())
    found = []
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=batches)

        def tick() -> bool:
            progress.advance(bar)
            return False

        for name, data in sets:
            progress.update(bar, description=name)
            found.append(_train_centrally(spec, training, data, held_out, tick))
    return found[0], found[1:]


def _train_centrally(
    spec: RunSpec, training: TrainingSpec, data: Sequences, held_out: Sequences, tick: Callable[[], bool]
) -> float:
    from seqfed.client.network import SequenceClassifier, use_threads
    from seqfed.client.training import evaluate, train

    use_threads(1)
    network = SequenceClassifier(spec)
    network.load(initial_parameters(spec))
    train(network, data, training, generator(spec.seed, "baseline"), tick)
    return summary(evaluate(network, held_out))["accuracy"]


def score(spec: RunSpec, parameters: Parameters, data: Sequences) -> float:
    """The accuracy of these parameters."""
    from seqfed.client.network import SequenceClassifier
    from seqfed.client.training import evaluate

    network = SequenceClassifier(spec)
    network.load(parameters)
    return summary(evaluate(network, data))["accuracy"]


# What people see ------------------------------------------------------------------------------------------------------


def result_table(accuracy: float, pooled: float, alone: list[float]) -> Table:
    table = Table("trained on", "accuracy on the held-out digits")
    table.add_row("all clients' data, federated", f"{accuracy:.4f}", style="bold")
    table.add_row("the same data, pooled in one place", f"{pooled:.4f}")
    for number, one in enumerate(alone, 1):
        table.add_row(f"client {number}'s data alone", f"{one:.4f}")
    return table


def next_steps(settings: Settings, view: RunView) -> str:
    out = settings.out
    return (
        f"{len(view.history)} rounds moved {size(view.bytes_up)} up and {size(view.bytes_down)} down.\n"
        f"model:  {out / 'model.safetensors'}\ncurves: {out / 'curves.png'}\n"
        "next: seqfed demo --help; or run the parts yourself: `seqfed server`, `seqfed client --data FILE` for each data "
        "holder, `seqfed submit run.toml --wait` (README.md has the files)"
    )


def curves(path: Path, history: tuple[RoundRecord, ...], pooled: float, alone: list[float]) -> None:
    """Loss and accuracy over the rounds, beside the two alternatives, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rounds = [record.round for record in history if record.evaluation]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    _curve(left, rounds, [summary(one.evaluation)["loss"] for one in history if one.evaluation], "held-out loss")
    _curve(
        right, rounds, [summary(one.evaluation)["accuracy"] for one in history if one.evaluation], "held-out accuracy"
    )
    right.axhline(pooled, linestyle="--", color="tab:green", label="pooled")
    right.axhspan(min(alone), max(alone), color="tab:red", alpha=0.15, label="each client alone")
    right.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curve(axes: Axes, rounds: list[int], values: list[float], name: str) -> None:
    axes.plot(rounds, values, color="tab:blue", label="federated")
    axes.set_xlabel("round")
    axes.set_ylabel(name)
    axes.grid(alpha=0.3)
