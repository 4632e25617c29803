"""The flags that name a data holder's files and how their rows become sequences; every command that reads data takes them.

A command asks for one parameter, `data: DataTable`; `with_data_flags` puts the flags in its place on the command line
and hands over what was given of them: the entries of a client.toml's [data] table.
"""

from __future__ import annotations

import csv
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer

DataTable = dict[str, Any]


def _flag(kind: Any, name: str, said: str) -> Any:
    return Annotated[kind, typer.Option(name, help=said)]


# The keys are those of DataSettings; a comma separates where several names are due, "a,b" quotes a name that has one.
FLAGS: Final[dict[str, Any]] = {
    "file": _flag(
        list[str] | None,
        "--data",
        "The data: an .npz, .csv, .tsv, .parquet or .txt file, perhaps .gz, or module:function. Again for more of the same kind.",
    ),
    "label": _flag(str | None, "--label", "The label's column; several with commas."),
    "columns": _flag(str | None, "--columns", "Input columns, comma-separated [those that the run names]."),
    "group": _flag(str | None, "--group", "The column that tells entities apart; no sequence crosses two."),
    "time": _flag(str | None, "--time", "The column that orders an entity's rows [as they stand]."),
    "window": _flag(int | None, "--window", "Rows in a sequence, where the run leaves it open."),
    "stride": _flag(
        int | None, "--stride", "Rows from one window's start to the next's, where the run leaves it open."
    ),
    "horizon": _flag(
        int | None, "--horizon", "Rows from a window's last to its label's, where the run leaves it open."
    ),
    "variable": _flag(str | None, "--variable", "Long format, one row a measurement: the column that says of what."),
    "value": _flag(str | None, "--value", "Long format: the column with the measured number."),
    "wide": _flag(
        list[str] | None,
        "--wide",
        "NAME=COLUMN,COLUMN,...: one row an entity; NAME's columns in the order of time. Again for each input.",
    ),
    "label_file": _flag(str | None, "--label-file", "A second table: one row an entity, with its label."),
    "remaining": _flag(
        int | None, "--remaining", "The label is the number of rows left to the entity's end, at most so many."
    ),
    "text": _flag(str | None, "--text", "The column with the text: a review, a SMILES string."),
    "lines": _flag(bool | None, "--lines", "Plain text: each line is a document of its own."),
    "delimiter": _flag(
        str | None, "--delimiter", "What separates the columns: a character, tab or whitespace [, in .tsv tab]."
    ),
    "quotes": _flag(
        bool | None, "--quotes/--no-quotes", "Whether a field may stand in quotes [as the delimiter has it]."
    ),
    "encoding": _flag(str | None, "--encoding", "Of text files [utf-8]."),
    "names": _flag(str | None, "--names", "The columns' names, comma-separated, of a file without a header line."),
    "missing_values": _flag(
        list[str] | None, "--missing-value", "One more text that means: no value here. Again for more."
    ),
    "unpacked_gib": _flag(float | None, "--unpacked-gib", "GiB that compressed files may unfold to [16]."),
    "memory_mib": _flag(float | None, "--memory-mib", "MiB up to which an array stays in memory, not in a file [64]."),
    "cache": _flag(str | None, "--cache", "Folder for those files [the system's for temporary files]."),
}
# Of those who train; a model is used and scored on everything in the file.
SPLITTING: Final[dict[str, Any]] = {
    "validation": _flag(
        list[str] | None, "--validation", "File of the same kind to score models on; never trained on. Again for more."
    ),
    "validation_fraction": _flag(
        float | None, "--validation-fraction", "Share of the entities held out if there is no --validation [0.2]."
    ),
    "seed": _flag(int | None, "--split-seed", "Chooses which entities are held out [0]."),
}
LISTS: Final = frozenset({"columns", "names"})  # one flag, several names


def with_data_flags(command: Callable[..., None], *, splitting: bool = False) -> Callable[..., None]:
    """The command with the data flags where its parameter `data` stands; it gets those that were given.

    splitting: also the flags that hold out sequences. Raises ConfigError for a --wide that is no NAME=COLUMN,....
    """
    flags = {**FLAGS, **(SPLITTING if splitting else {})}
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def filled(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in flags}
        command(**arguments, data=table(given))

    places: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name == "data":
            places += [
                inspect.Parameter(flag, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
                for flag, kind in flags.items()
            ]
        else:
            places.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    filled.__signature__ = signature.replace(parameters=places)  # type: ignore[attr-defined]
    return filled


def table(given: DataTable) -> DataTable:
    """The [data] table of these flags; those that were left out (None, or an empty list) are not in it.

    >>> table({"file": ["a.csv"], "columns": 'v,"a,b"', "wide": ["bill=b1,b2"], "label": None, "missing_values": []})
    {'file': 'a.csv', 'columns': ['v', 'a,b'], 'wide': {'bill': ['b1', 'b2']}}
    """
    from seqfed.common.errors import ConfigError

    found: DataTable = {}
    for name, value in given.items():
        if value is None or value == []:
            continue
        if name in {"file", "validation"} and len(value) == 1:
            found[name] = value[0]
        elif name == "label" and len(names := _names(value)) > 1:
            found[name] = names
        elif name in LISTS:
            found[name] = _names(value)
        elif name == "wide":
            pairs = [one.partition("=") for one in value]
            for one, (key, _, columns) in zip(value, pairs, strict=True):
                if not key or not columns:
                    raise ConfigError(f"--wide {one}: not NAME=COLUMN,COLUMN,...; for instance --wide bill=bill1,bill2")
            found[name] = {key: _names(columns) for key, _, columns in pairs}
        else:
            found[name] = value
    return found


def settings_of(data: DataTable, **fixed: Any) -> Any:
    """The DataSettings of the flags that were given; `fixed` wins. Raises ConfigError."""
    from seqfed.client.settings import DataSettings
    from seqfed.common.config import validate
    from seqfed.common.errors import ConfigError

    if "file" not in data:
        raise ConfigError("which data? pass --data FILE")
    return validate(DataSettings, {**data, **fixed}, "flags")


def _names(text: str) -> list[str]:
    return next(csv.reader([text], skipinitialspace=True), [])
