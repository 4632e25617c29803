"""The commands of those who use a run's model: predict, evaluate."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from seqfed.client.data_flags import DataTable, settings_of, with_data_flags

if TYPE_CHECKING:
    from seqfed.client.data import ClientData
    from seqfed.client.network import Network
    from seqfed.common.spec import RunSpec

PATIENCE_S: Final = 2.0  # what takes longer shows a progress bar

ModelFile = Annotated[Path, typer.Option(help="Safetensors file from `seqfed export`.")]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu or cuda.")]
AllowCustom = Annotated[
    list[str] | None, typer.Option(help="module:function whose code the model may use. Again for more. [none]")
]


class Format(StrEnum):
    """How `seqfed predict` and `seqfed metrics` write their rows."""

    CSV = "csv"
    JSON = "json"


@with_data_flags
def predict(
    model: ModelFile,
    data: DataTable,
    out: Annotated[Path, typer.Option(help="Where to write a row for each sequence.")],
    kind: Annotated[
        Format | None, typer.Option("--format", help="csv or json [json if --out ends in .json, else csv].")
    ] = None,
    device: Device = "auto",
    allow_custom: AllowCustom = None,
) -> None:
    """Say with a run's model what it sees in each sequence of a file; labels are not needed.

    Numbers are in the data's own units, classes have their names and probabilities. Names given with --label stand above
    the outputs where the run has none; --stride wins over the run's.
    """
    from seqfed.client.predict import Predictor, write_csv, write_json

    spec, network, sequences = _prepared(model, data, device, allow_custom, unlabelled=True)
    label = data.get("label", ())
    predictor = Predictor(network, spec, (label,) if isinstance(label, str) else tuple(label))
    kind = kind or (Format.JSON if out.suffix == ".json" else Format.CSV)
    with _progress("predicting", len(sequences.training)) as told:
        rows = predictor.rows(sequences, told)
        count = write_json(out, rows) if kind is Format.JSON else write_csv(out, predictor.columns, rows)
    typer.echo(f"{out}: {count:,} sequences")


@with_data_flags
def evaluate(
    model: ModelFile,
    data: DataTable,
    device: Device = "auto",
    allow_custom: AllowCustom = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Score a run's model on all sequences of a file with labels."""
    import json

    from seqfed.client import predict as predicting
    from seqfed.common.metrics import metric_names, summary

    spec, network, sequences = _prepared(model, data, device, allow_custom)
    with _progress("evaluating", len(sequences.training)) as told:
        tally = predicting.evaluate(network, sequences, spec, told)
    found = summary(tally)
    metrics = {name: found[name] for name in metric_names(spec) if name in found}
    if as_json:
        content = {"model": str(model), "sequences": len(sequences.training), "examples": tally.get("examples", 0)}
        typer.echo(json.dumps({**content, **metrics}))
        return
    from rich import print as rich_print
    from rich.table import Table

    table = Table("metric", "value", title=f"{len(sequences.training):,} sequences")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.6g}")
    rich_print(table)


def _prepared(
    path: Path, data: DataTable, device: str, allow_custom: list[str] | None, **fixed: Any
) -> tuple[RunSpec, Network, ClientData]:
    """The run's specification, its network with the file's numbers, and all sequences of the data, none held out."""
    from seqfed.client.data import open_source
    from seqfed.client.data.numbers import reach
    from seqfed.client.model_file import read_model
    from seqfed.common.errors import DataError, SchemaMismatch
    from seqfed.common.schema import misfit

    model = read_model(path)
    settings = settings_of(data, validation_fraction=0.0, **fixed)
    source = open_source(settings)
    named = ", ".join(settings.file)
    why = misfit(model.spec.data, source.schema)
    if why is not None:
        raise SchemaMismatch(f"{named} {why}; is it a file like those that the run was trained on?")
    spec = model.spec
    steps, _, _ = reach(spec.data, settings)
    if settings.stride is not None and steps is not None:  # how often to look changes nothing in the model
        cut = {"steps": steps, "stride": settings.stride}
        spec = spec.model_copy(update={"data": spec.data.model_copy(update=cut)})
    sequences = source.prepare(spec)
    if sequences.refused is not None:
        typer.echo(f"seqfed: {sequences.refused}", err=True)
    if len(sequences.training) == 0:
        raise DataError(f"{named}: no sequence in it fits the run; `seqfed data check` shows what a run would see")

    from seqfed.client.network import network_for  # torch, only now that all else is well

    network = network_for(spec, device=device, allow_custom=tuple(allow_custom or ()))
    network.load(model.parameters)
    return spec, network, sequences


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function to be told how many more are done; after two seconds it shows a bar, if standard error is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    begun, done = time.monotonic(), 0
    with contextlib.ExitStack() as stack:
        bar: Progress | None = None

        def told(count: int) -> None:
            nonlocal bar, done
            done += count
            if bar is None and console.is_terminal and time.monotonic() - begun > PATIENCE_S:
                bar = stack.enter_context(Progress(console=console, transient=True))
                bar.add_task(what, total=total)
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done)

        yield told
