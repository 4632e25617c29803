"""The commands `seqfed data check`, `schema` and `split`: a data holder's files before any run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from seqfed.client.data_flags import DataTable, settings_of, with_data_flags

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from seqfed.client.data import ClientData, Sequences, Source
    from seqfed.client.data.describe import Description
    from seqfed.client.settings import DataSettings
    from seqfed.common.spec import RunSpec

data = typer.Typer(
    help="Look at a data file, write a run's [data] table from it, cut it into shards.", no_args_is_help=True
)

Files = Annotated[list[str] | None, typer.Argument(help="The data, as --data.", metavar="FILE...")]
Task = Annotated[
    str | None,
    typer.Option(
        help="classification, multilabel, regression, forecast, next_token or anomaly [guessed by the labels]."
    ),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps a sequence at most.")]
Grid = Annotated[float | None, typer.Option(help="Long format: a step's length, in the unit of the time column.")]
Unit = Annotated[str, typer.Option(help="Texts: a token is one of the characters or of the words.")]


def check(
    data: DataTable,
    files: Files = None,
    run: Annotated[
        Path | None, typer.Option(help="A run.toml; left out: what `seqfed data schema` would write.")
    ] = None,
    task: Task = None,
    steps: Steps = None,
    grid: Grid = None,
    unit: Unit = "characters",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show what is in a data file, and the sequences that a run would see in it."""
    import json
    from dataclasses import asdict

    from rich.console import Console

    from seqfed.client.data.describe import describe
    from seqfed.common.config import load_toml
    from seqfed.common.schema import misfit
    from seqfed.common.spec import RunSpec
    from seqfed.common.statistics import applied, statistics_of

    settings, source = _opened(data, files)
    found = describe(source, settings)
    console = Console(soft_wrap=True)
    if not as_json:  # first: whoever named too little for a run sees what there is to name
        _show(console, found)
    spec = (
        load_toml(RunSpec, run)
        if run is not None
        else run_for(source, settings, task, steps=steps, grid=grid, unit=unit)
    )
    why = misfit(spec.data, source.schema)
    if why is not None:
        from seqfed.common.errors import SchemaMismatch

        raise SchemaMismatch(f"{found.source} {why}")
    if spec.data.normalise == "federated":  # by this file's own mean and scale: the others' files are not here
        spec = applied(spec, statistics_of(source.measure(spec), spec))
    seen = source.prepare(spec)
    if as_json:
        typer.echo(json.dumps({**asdict(found), "task": spec.task.kind, "run": _seen(spec, seen)}))
        return
    console.print(f"a {spec.task.kind} run would see:", highlight=False)
    for name, value in _seen(spec, seen).items():
        console.print(f"  {name}: {_told(value)}", highlight=False, markup=False)


def schema(
    data: DataTable,
    files: Files = None,
    task: Task = None,
    steps: Steps = None,
    missing: Annotated[
        str | None, typer.Option(help="refuse, mask, forward or mean [mask if any number is missing].")
    ] = None,
    normalise: Annotated[
        str,
        typer.Option(
            help="given: by this file's mean and scale; federated: by those of all clients' files, which the run finds."
        ),
    ] = "given",
    grid: Grid = None,
    unit: Unit = "characters",
    tokens: Annotated[int | None, typer.Option(min=1, help="Texts: size of the vocabulary at most.")] = None,
    least: Annotated[int, typer.Option(min=1, help="Texts: how often a token must be there to be in it.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write it here [standard output].")] = None,
) -> None:
    """Write the [data] and [task] tables of a run from a file, for run.toml.

    The means, scales, categories and tokens in them are this file's, and everybody in the run will see them. Publish them
    only if they may be; otherwise write the table by hand. With --normalise federated there are no columns' means and scales.
    """
    import tomli_w

    from seqfed.common.errors import ConfigError, storage_error

    settings, source = _opened(data, files)
    tables = tables_of(
        source,
        settings,
        task,
        steps=steps,
        missing=missing,
        normalise=normalise,
        grid=grid,
        unit=unit,
        tokens=tokens,
        least=least,
    )
    text = tomli_w.dumps(tables)
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{out} exists already; remove it, or name another file with --out") from None
    except OSError as error:
        raise storage_error(error, f"writing {out}") from error


def split(
    file: Annotated[Path, typer.Argument(help="CSV or TSV with a header line (.gz too), Parquet, or NPZ.")],
    clients: Annotated[
        int | None, typer.Option(min=1, help="How many shards [with --by: one a value of the column].")
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="All rows with the same value in this column go to one client.")
    ] = None,
    how: Annotated[
        str | None,
        typer.Option(
            help="iid: at random; dirichlet: unevenly by --label; column: see --by; size: at random, by a power law "
            "[column with --by, else iid]."
        ),
    ] = None,
    label: Annotated[str | None, typer.Option(help="dirichlet: the column with the label (NPZ: the array).")] = None,
    group: Annotated[str | None, typer.Option(help="Column that tells entities apart; none is ever split.")] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="dirichlet: the smaller, the more uneven [0.5]; size: the power law's exponent [1]."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed, the same split.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the shards [FILE's name without suffix, -shards].")
    ] = None,
    delimiter: Annotated[
        str | None,
        typer.Option(help="CSV: what separates the columns, also 'tab' or 'whitespace' [, and in .tsv a tab]."),
    ] = None,
    quotes: Annotated[
        bool | None, typer.Option(help='CSV: fields may stand in "quotes" [unless tabs or whitespace separate them].')
    ] = None,
    names: Annotated[
        str | None, typer.Option(help="CSV: the columns' names, comma-separated, of a file without a header line.")
    ] = None,
    encoding: Annotated[str, typer.Option(help="CSV: how its text is encoded.")] = "utf-8",
    as_json: Annotated[bool, typer.Option("--json", help="Print the shards as one JSON array.")] = False,
) -> None:
    """Cut one file into a shard a client, of the same kind and with the same header, to try a federation with."""
    import json

    from rich.console import Console
    from rich.progress import Progress as Bar

    from seqfed.client.data.split import How, Plan, write_shards
    from seqfed.common.errors import ConfigError

    if how is not None and how not in set(How):
        raise ConfigError(f"--how {how}: use one of {', '.join(How)}")
    plan = Plan(How(how or ("iid" if by is None else "column")), clients, by, label, group, alpha, seed)
    folder = out or file.with_name(f"{file.name.split('.')[0]}-shards")
    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        shards = write_shards(
            file,
            plan,
            folder,
            delimiter=delimiter,
            quotes=quotes,
            encoding=encoding,
            names=names.split(",") if names else None,
            progress=lambda what, share: bar.update(task, description=what, completed=share),
        )
    if as_json:
        typer.echo(json.dumps([{**vars(one), "file": str(one.file)} for one in shards]))
        return
    for one in shards:
        whose = f" ({by}: {', '.join(one.values[:5])}{', ...' if len(one.values) > 5 else ''})" if by else ""
        typer.echo(f"{one.file}: {one.rows} rows" + (f" of {one.entities} entities" if group else "") + whose)


QUANTILES = ("smallest", "lower quartile", "median", "upper quartile", "95 %", "largest")


def _opened(data: DataTable, files: list[str] | None) -> tuple[DataSettings, Source]:
    from seqfed.client.data import open_source
    from seqfed.common.errors import ConfigError

    if files:
        if "file" in data:
            raise ConfigError("the data are named twice: as arguments and with --data; keep one")
        data = {**data, "file": files}
    if "file" not in data:
        raise ConfigError("which data? name a file")
    settings = cast("DataSettings", settings_of(data))
    return settings, open_source(settings)


def tables_of(source: Source, settings: DataSettings, task: str | None, **given: Any) -> dict[str, Any]:
    from seqfed.client.data.describe import data_section, describe, task_of
    from seqfed.common.config import validate
    from seqfed.common.errors import ConfigError
    from seqfed.common.spec import RunSpec

    kind = task or task_of(describe(source, settings), settings)
    section = data_section(source, settings, task=cast("Literal['classification']", kind), **given)
    if kind in {"forecast", "anomaly"}:
        if "steps" not in section:
            unlabelled = (
                "" if task else "no label is named, so this would be a forecast; name one (--label; y in an NPZ), or "
            )
            raise ConfigError(f"{settings.file[0]}: {unlabelled}say of how many steps a {kind} is made: --steps N")
        section.setdefault("stride", section["steps"])
    about: dict[str, Any] = {"kind": kind}
    if (ahead := section.get("horizon")) and kind == "forecast":
        about["horizon"] = ahead
    if kind in {"forecast", "anomaly", "next_token"}:
        section.pop("horizon", None)
    tables = {"data": section, **({} if kind == "classification" else {"task": about})}
    validate(RunSpec, tables, "these data")
    return tables


def run_for(source: Source, settings: DataSettings, task: str | None, **given: Any) -> RunSpec:
    from seqfed.common.config import validate
    from seqfed.common.spec import RunSpec

    return validate(RunSpec, tables_of(source, settings, task, **given), "these data")


def _seen(spec: RunSpec, found: ClientData) -> dict[str, Any]:
    """What the run makes of the data, for people and programs."""
    told: dict[str, Any] = {
        "training sequences": len(found.training),
        "validation sequences": len(found.validation),
        "numbers a step" if spec.data.vocabulary is None else "tokens known": spec.data.inputs,
        "outputs": spec.outputs,
    }
    if len(found.training):
        told["steps"] = f"{int(found.training.lengths.min())} to {int(found.training.lengths.max())}"
    if spec.task.kind == "classification":
        told["classes"] = {
            name: _count(spec, part) for name, part in (("training", found.training), ("validation", found.validation))
        }
    if found.refused is not None:
        told["refused"] = found.refused
    return told


def _told(value: Any) -> str:
    """Counts of classes in each part as people read them; everything else as it is."""
    if not isinstance(value, dict):
        return str(value)
    return "; ".join(f"{part} " + ", ".join(f"{one}: {n:,}" for one, n in of.items()) for part, of in value.items())


def _count(spec: RunSpec, data: Sequences) -> dict[str, int]:
    import numpy as np

    names = spec.data.labels or [str(one) for one in range(spec.data.class_count)]
    counts = (
        np.bincount(data.y, minlength=len(names)) if data.y is not None and len(data) else np.zeros(len(names), int)
    )
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}


def _show(console: Console, found: Description) -> None:
    console.print(f"{found.source}: {found.rows:,} rows, {found.entities:,} entities", highlight=False, markup=False)
    quantiles = ", ".join(f"{name} {value:,}" for name, value in zip(QUANTILES, found.lengths, strict=True))
    console.print(f"lengths: {quantiles}", highlight=False)
    if found.columns:
        console.print(_columns_table(found))
    if found.labels:
        console.print(_labels_table(found))


def _columns_table(found: Description) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("column", "kind", "values", "missing", "low", "high", "mean", "scale", "note")
    for one in found.columns:
        numbers = (f"{value:.4g}" if value is not None else "" for value in (one.low, one.high, one.mean, one.scale))
        note = one.note or ", ".join(one.categories[:5]) + (", ..." if len(one.categories) > 5 else "")
        table.add_row(Text(one.name), one.kind, f"{one.count:,}", f"{one.missing:,}", *numbers, Text(note))
    return table


def _labels_table(found: Description) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("label", "missing", "values")
    for one in found.labels:
        many = sorted(one.values.items(), key=lambda pair: -pair[1])
        told = ", ".join(f"{name}: {count:,}" for name, count in many[:10]) + (", ..." if len(many) > 10 else "")
        table.add_row(Text(one.name), f"{one.missing:,}", Text(told or f"mean {one.mean}, scale {one.scale}"))
    return table


data.command()(with_data_flags(check, splitting=True))
data.command()(with_data_flags(schema))
data.command()(split)
