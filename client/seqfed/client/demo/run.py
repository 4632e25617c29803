"""The demo itself: deal the data, train on them federated over real processes, compare, save, and tell."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from seqfed.client import partition
from seqfed.client.admin import operating
from seqfed.client.data import ClientData, Sequences, open_source
from seqfed.client.data.split import How, Plan, write_shards
from seqfed.client.data_cli import run_for
from seqfed.client.data_flags import DataTable, settings_of
from seqfed.client.demo.processes import Processes, processes, server_address
from seqfed.client.history import draw
from seqfed.client.shown import size
from seqfed.client.watching import follow
from seqfed.common import authority, checkpoint, identity, views
from seqfed.common.errors import ConfigError, TrainingFailed
from seqfed.common.identity import Role
from seqfed.common.layout import Parameters
from seqfed.common.metrics import metric_names, summary
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.seeds import generator
from seqfed.common.spec import CohortSpec, DataSpec, ModelSpec, PrivacySpec, RunSpec, TrainingSpec
from seqfed.common.views import RunView

BITS = 20  # of a masked parameter: at 16 the rounding shows, in two of the 359 sequences
HELD_OUT = 0.2  # of the digits: nobody trains on them, and each client scores its share of them


@dataclass(frozen=True)
class Settings:
    """The demo's flags. `data`: the [data] table of one's own file or files; empty for the digits."""

    clients: int
    rounds: int
    model: str
    partition: str
    alpha: float
    seed: int
    out: Path
    data: DataTable = field(default_factory=dict)
    task: str | None = None
    grid: float | None = None
    secure: bool = False


@dataclass(frozen=True)
class Site:
    """One client: the client.toml of its process, and the same data for the comparison."""

    name: str
    config: Path
    data: ClientData


def run(settings: Settings, *, as_json: bool) -> None:
    """The whole demo; the result goes to standard output, the progress too unless `as_json`."""
    console = Console(stderr=as_json, highlight=False)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="seqfed-demo-") as folder:
        work = Path(folder)
        spec, sites = _own_files(settings, work) if settings.data else _digits(settings, work)
        metric = "accuracy" if "accuracy" in metric_names(spec) else "rmse"
        what = f"{settings.data['file']}" if settings.data else "scikit-learn's digits"
        console.print(
            f"{len(sites)} clients hold {', '.join(str(len(one.data.training)) for one in sites)} sequences of {what} "
            f"({settings.partition} split); {sum(len(one.data.validation) for one in sites)} are held out",
            soft_wrap=True,
            markup=False,
        )
        held_out = Sequences.joined([one.data.validation for one in sites])
        if not len(held_out):
            raise ConfigError("no client holds enough to hold any of it out; take fewer --clients, or more data")
        try:
            if settings.secure:
                spec = masked(spec, max(len(site.data.training) for site in sites), BITS)
                console.print(
                    f"secure aggregation: {spec.privacy.b} bits a parameter, against a server that lies; a client counts for "
                    f"{spec.aggregation.max_weight} sequences at most, and {spec.privacy.min_survivors} or more are in a sum",
                    soft_wrap=True,
                )
            view = federate(settings, spec, sites, work, console)
            if view.phase != "finished":
                raise TrainingFailed(f"the run {view.phase}: {view.reason}; the logs are in {settings.out / 'logs'}")
            parameters = checkpoint.load(settings.out / "model.safetensors", layout_of(spec))
            federated = score(spec, parameters, held_out)[metric]
            told = view.history[-1].evaluation[metric]
            # The clients scored in other batches, where torch's kernels add in another order and may break a tie otherwise.
            if abs(federated - told) > 0.01 * max(abs(told), 0.1):
                raise TrainingFailed(f"the clients' {metric}, {told}, is not the saved model's, {federated}")
            pooled, alone = baselines(settings, spec, sites, held_out, metric, console)
        except KeyboardInterrupt:
            console.print("stopped; every process has ended")
            raise SystemExit(130) from None
    draw(view, settings.out / "curves.png", {metric: (pooled, alone)})
    result: dict[str, Any] = {
        metric: federated,
        f"pooled_{metric}": pooled,
        f"alone_{metric}_mean": float(np.mean(alone)),
        "rounds": len(view.history),
        "seconds": round(time.monotonic() - begun, 2),
        "clients": len(sites),
        "bytes_up": view.bytes_up,
        "bytes_down": view.bytes_down,
        "model": str(settings.out / "model.safetensors"),
    }
    console.print(result_table(metric, federated, pooled, alone))
    console.print(next_steps(settings, view), soft_wrap=True)
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")


# The data and the run -------------------------------------------------------------------------------------------------


def _complete(settings: Settings, spec: RunSpec, clients: int) -> RunSpec:
    """The run that the demo submits, for these data and this task."""
    return RunSpec(
        name="demo" if settings.data else "digits",
        seed=settings.seed,
        rounds=settings.rounds,
        data=spec.data,
        task=spec.task,
        model=ModelSpec.model_validate({"kind": settings.model}),
        training=TrainingSpec(epochs=2),
        cohort=CohortSpec(min_clients=clients),
    )


def masked(spec: RunSpec, largest: int, bits: int | None = None) -> RunSpec:
    """The same run with secure aggregation, for clients of at most so many sequences."""
    weight = 1 << (largest - 1).bit_length()  # of the size only its magnitude becomes public
    survivors = min(PrivacySpec().min_survivors, spec.cohort.min_clients)
    return RunSpec.model_validate(
        {
            **spec.model_dump(),
            "aggregation": {"max_weight": weight},
            "privacy": {"secure_aggregation": True, "min_survivors": survivors} | ({} if bits is None else {"b": bits}),
        }
    )


def _digits(settings: Settings, work: Path) -> tuple[RunSpec, list[Site]]:
    """Each client's part of the digits, and its even share of those held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("the demo needs scikit-learn and matplotlib: pip install 'seqfed[demo]'") from None
    pixels, labels = load_digits(return_X_y=True)
    x, y = (pixels.reshape(-1, 8, 8) / 16).astype(np.float32), labels.astype(np.int64)
    draw_ = generator(settings.seed, "demo split")
    order = draw_.permutation(len(y))
    cut = int(HELD_OUT * len(y))
    held_out, rest = order[:cut], order[cut:]
    if settings.partition == "iid":
        parts = partition.iid(len(rest), settings.clients, draw_)
    else:
        parts = partition.dirichlet(y[rest], settings.clients, settings.alpha, draw_)
    shares = partition.iid(len(held_out), settings.clients, draw_)
    spec = _complete(settings, RunSpec(data=DataSpec(features=8, steps=8, classes=10)), settings.clients)
    sites = []
    for number, (part, share) in enumerate(zip(parts, shares, strict=True), 1):
        files = {}
        for purpose, which in (("file", rest[part]), ("validation", held_out[share])):
            files[purpose] = str(work / f"client-{number}-{purpose}.npz")
            np.savez(files[purpose], x=x[which], y=y[which])
        sites.append(_site(f"client-{number}", files, spec, work))
    return spec, sites


def _own_files(settings: Settings, work: Path) -> tuple[RunSpec, list[Site]]:
    """One's own data: several files are a client each; one file is dealt as `seqfed data split` does it."""
    found = settings_of(settings.data)
    source = open_source(found)
    spec = run_for(source, found, settings.task, grid=settings.grid)
    source.prepare(spec)  # what does not fit is named by its place in this file, not in a client's part of it
    files = [str(one) for one in found.file]
    tables: list[DataTable] = [{**settings.data, "file": file} for file in files]
    if len(files) == 1:
        if source.schema.tokens and found.text is None:
            raise ConfigError(f"{files[0]}: one text is not dealt among clients; give several files, one a client")
        dirichlet = settings.partition == "dirichlet" and spec.task.kind == "classification" and len(found.label) == 1
        plan = Plan(
            How.DIRICHLET if dirichlet and found.label_file is None else How.IID,
            settings.clients,
            label=found.label[0] if dirichlet else None,
            group=found.group,
            alpha=settings.alpha if dirichlet else None,
            seed=settings.seed,
        )
        separator = found.separator
        shards = write_shards(
            Path(files[0]),
            plan,
            work / "shards",
            delimiter=separator,
            quotes=found.quotes,
            encoding=found.encoding,
            names=list(found.names) if found.names else None,
        )
        # A share of a few entities may be less than one, and without any there would be nothing to compare on.
        shares = [max(HELD_OUT, 1 / one.entities + 1e-9) if one.entities > 1 else 0.0 for one in shards]
        tables = [
            {**settings.data, "file": str(one.file), "validation_fraction": share}
            for one, share in zip(shards, shares, strict=True)
        ]
    spec = _complete(settings, spec, len(tables))
    return spec, [_site(f"client-{number}", table, spec, work) for number, table in enumerate(tables, 1)]


def _site(name: str, table: DataTable, spec: RunSpec, work: Path) -> Site:
    config = work / f"{name}.toml"
    config.write_text(tomli_w.dumps({"name": name, "state": str(work / name), "data": table}), encoding="utf-8")
    return Site(name, config, open_source(settings_of(table)).prepare(spec))


# The federation -------------------------------------------------------------------------------------------------------


def federate(settings: Settings, spec: RunSpec, sites: list[Site], work: Path, console: Console) -> RunView:
    """Run it over real processes and fetch the model; the run's last view."""
    tls, operator = certify(work, [site.name for site in sites])
    with processes(settings.out / "logs") as started:
        console.print(f"starting a server and {len(sites)} clients, with TLS (logs: {settings.out / 'logs'})")
        started.start("server", "server", "--port", "0", "--state", str(work / "server"), "--tls", str(tls))
        address = server_address(work / "server", started)
        for site in sites:
            started.start(site.name, "client", str(site.config), "--server", address)
        return started.run(_train(address, operator, spec, settings.out, console, started))


def certify(work: Path, clients: Sequence[str]) -> tuple[Path, Path]:
    """A CA in this folder, and what it issued: the server's and an operator's credentials folders.

    A client's credentials lie in its state folder, work / name, where it finds them by itself.
    """
    now, hosts = identity.now(), ("localhost", "127.0.0.1")
    ca = authority.create(work / "ca", now)
    identity.save_credentials(work / "tls", ca.credentials(Role.SERVER, "localhost", now=now, hosts=hosts))
    identity.save_credentials(work / "operator", ca.credentials(Role.OPERATOR, "demo", now=now))
    for name in clients:
        own = ca.credentials(Role.CLIENT, name, now=now)
        identity.save_credentials(work / name / identity.CREDENTIALS, own)
    return work / "tls", work / "operator"


async def _train(
    address: str, credentials: Path, spec: RunSpec, out: Path, console: Console, started: Processes
) -> RunView:
    async with operating(address, insecure=False, credentials=credentials) as operator:
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
    settings: Settings, spec: RunSpec, sites: list[Site], held_out: Sequences, metric: str, console: Console
) -> tuple[float, list[float]]:
    """The same model from the same start, trained as long: on the pooled data, and on each client's alone."""
    from seqfed.client.training import batch_count

    pooled = Sequences.joined([one.data.training for one in sites])
    sets = [("pooled data", pooled), *((f"{one.name} alone", one.data.training) for one in sites)]
    epochs = settings.rounds * (spec.training.epochs or 1)
    longer = spec.model_copy(update={"training": spec.training.model_copy(update={"epochs": epochs})})
    batches = [batch_count(len(data), longer.training) for _, data in sets]
    columns = (TextColumn("for comparison: {task.description}"), BarColumn(), TimeElapsedColumn())
    found = []
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=sum(batches))
        for number, (name, data) in enumerate(sets):
            progress.update(bar, description=name)

            def tell(now: views.Progress, before: int = sum(batches[:number])) -> None:
                progress.update(bar, completed=before + now.done)

            found.append(_train_centrally(longer, data, held_out, tell)[metric])
    return found[0], found[1:]


def _train_centrally(
    spec: RunSpec, data: Sequences, held_out: Sequences, tell: Callable[[views.Progress], None]
) -> dict[str, float]:
    from seqfed.client.network import network_for, use_threads
    from seqfed.client.training import evaluate, train

    use_threads(1)
    network = network_for(spec)
    network.load(initial_parameters(spec))
    train(network, data, spec, 1, generator(spec.seed, "baseline"), progress=tell)
    return summary(evaluate(network, held_out, spec))


def score(spec: RunSpec, parameters: Parameters, data: Sequences) -> dict[str, float]:
    """The metrics of these parameters."""
    from seqfed.client.network import network_for
    from seqfed.client.training import evaluate

    network = network_for(spec)
    network.load(parameters)
    return summary(evaluate(network, data, spec))


# What people see ------------------------------------------------------------------------------------------------------


def result_table(metric: str, federated: float, pooled: float, alone: list[float]) -> Table:
    table = Table("trained on", f"{metric} on the held-out data")
    table.add_row("all clients' data, federated", f"{federated:.4f}", style="bold")
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
