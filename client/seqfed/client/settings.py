"""The client's settings: the content of client.toml; all of them also as flags."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from seqfed.common.spec import Count, Name, Settings

DELIMITERS: Final = {"tab": "\t", "\\t": "\t"}  # what people type where a tab is hard to type
WHITESPACE: Final = "whitespace"


def _several(value: Any) -> Any:
    """One text or path, or a list of them, as a tuple of texts."""
    if isinstance(value, str | Path):
        return (str(value),)
    return (
        tuple(str(one) if isinstance(one, Path) else one for one in value) if isinstance(value, list | tuple) else value
    )


def each_server(value: Any) -> Any:
    """'a:1, b:1', or a list of such texts, as a tuple of addresses.

    >>> each_server("a:1, b:1"), each_server(["a:1", "b:1"])
    (('a:1', 'b:1'), ('a:1', 'b:1'))
    """
    given = _several(value)
    if not isinstance(given, tuple) or not all(isinstance(one, str) for one in given):
        return given
    return tuple(one.strip() for text in given for one in text.split(","))


def _lists(value: Any) -> Any:
    """A table of lists as a table of tuples."""
    return {key: _several(names) for key, names in value.items()} if isinstance(value, dict) else value


Servers = Annotated[tuple[str, ...], BeforeValidator(each_server), Field(strict=False)]
Several = Annotated[tuple[str, ...], BeforeValidator(_several), Field(strict=False)]


class DataSettings(Settings):
    """Which files hold the data, and how their rows become sequences."""

    file: Several = Field(
        min_length=1,
        description="path, glob or list of them: .npz with x (N, T, F) or tokens x (N, T), perhaps lengths, y and group; "
        ".csv, .tsv, .parquet or, with any setting of tables, .txt; .txt alone: plain text; all but .npz and .parquet "
        "perhaps .gz; or module:function that returns x, y[, lengths], or Sequences",
    )
    validation: Several | None = Field(
        default=None, description="files of the same kind to score models on, never trained on"
    )
    validation_fraction: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="share of the entities (of one entity alone: its last rows) held out if there is no validation file",
    )
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="chooses which entities are held out")
    # Tables: CSV and Parquet.
    label: Several = Field(
        default=(), description="the label's column, or the columns of several; a sequence's is that of its last row"
    )
    columns: Several | None = Field(
        default=None, description="the input columns; left out: those that the run names, or all the others"
    )
    group: str | None = Field(
        default=None,
        description="the column that tells entities apart; left out: each file is one (wide, text: each row)",
    )
    time: str | None = Field(
        default=None,
        description="the column of numbers or ISO 8601 dates that orders an entity's rows; left out: as they stand",
    )
    window: Count | None = Field(default=None, description="rows in a sequence at most, where the run leaves it open")
    stride: Count | None = Field(
        default=None, description="rows from one window's start to the next's, where the run leaves it open"
    )
    horizon: Count | None = Field(
        default=None, description="rows from a window's last to its label's, where the run leaves it open"
    )
    variable: str | None = Field(
        default=None,
        description="long format, one row a measurement: the column that says of what; needs value and time",
    )
    value: str | None = Field(default=None, description="long format: the column with the measured number")
    wide: Annotated[dict[Name, Several], BeforeValidator(_lists)] = Field(
        default={},
        description="one row an entity: an input's name and its columns in the order of time, for each input",
    )
    label_file: str | None = Field(
        default=None, description="a second table, with one row an entity: the group column and the label columns"
    )
    remaining: Count | None = Field(
        default=None, description="the label is the number of rows left to the entity's end, at most so many"
    )
    unlabelled: bool = Field(
        default=False, description="leave the labels aside: for predicting where they are not known"
    )
    # Their text.
    delimiter: str | None = Field(
        default=None,
        description="what separates the columns: one character, 'tab' or 'whitespace'; [, and in .tsv a tab]",
    )
    quotes: bool | None = Field(
        default=None,
        description='whether a field may stand in "quotes"; left out: unless tabs or whitespace separate them',
    )
    encoding: str = Field(default="utf-8", description="of text files")
    names: Several | None = Field(default=None, description="the columns' names, of files without a header line")
    missing_values: Several = Field(
        default=(), description='what else means that a value is missing, beside "", NA, NaN, nan, null and None'
    )
    # Texts.
    text: str | None = Field(
        default=None, description="the column with the text: a review, a SMILES string; a row a sequence"
    )
    lines: bool = Field(
        default=False, description="plain text: each line is a document of its own; left out: each file"
    )
    # Limits.
    unpacked_gib: float = Field(
        default=16.0,
        gt=0,
        description="GiB that the compressed files together may unfold to; more is refused as a bomb",
    )
    memory_mib: float = Field(
        default=64.0, ge=0, description="MiB up to which each array stays in memory; larger ones lie in an unnamed file"
    )
    cache: Path | None = Field(
        strict=False,
        default=None,
        description="folder for those files; left out: the system's folder for temporary files",
    )

    @property
    def of_tables(self) -> bool:
        """Whether anything is set that only a table has."""
        named = (self.columns, self.group, self.time, self.variable, self.value, self.label_file, self.remaining)
        form = (self.delimiter, self.quotes, self.names, self.text)
        return bool(self.label or self.wide) or any(one is not None for one in (*named, *form))

    @property
    def separator(self) -> str | None:
        """The delimiter as one character or WHITESPACE; None if left out."""
        return None if self.delimiter is None else DELIMITERS.get(self.delimiter, self.delimiter)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_names()
        if (self.variable is None) != (self.value is None) or (self.variable is not None and self.time is None):
            raise ValueError(
                "long format needs all of variable, value and time: the columns of what, how much and when"
            )
        if sum((self.variable is not None, bool(self.wide), self.text is not None, self.lines)) > 1:
            raise ValueError("variable (long format), wide, text and lines exclude each other; keep one")
        if self.wide and (self.time is not None or len({len(columns) for columns in self.wide.values()}) > 1):
            raise ValueError(
                "wide needs as many columns for each input, and no time column: the columns are in its order"
            )
        if self.label_file is not None and (self.group is None or not self.label):
            raise ValueError("label_file needs group and label: its columns with the entity and with the label")
        if self.remaining is not None and (self.label or self.wide or self.text is not None):
            raise ValueError("remaining is itself the label, of rows in the order of time; drop label, wide and text")
        if self.separator is not None and self.separator != WHITESPACE and len(self.separator) != 1:
            raise ValueError(f"delimiter = {self.delimiter!r} is not one character, 'tab' or 'whitespace'")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(f"encoding = '{self.encoding}' is not known; try utf-8, latin-1 or utf-16") from None
        return self

    def _check_names(self) -> None:
        for key in ("label", "columns", "names"):
            given = getattr(self, key) or ()
            if len(set(given)) < len(given):
                raise ValueError(f"{key} has {next(one for one in given if given.count(one) > 1)!r} twice")
        if both := set(self.columns or ()) & set(self.label):
            raise ValueError(f"columns must name the inputs, and not the label '{min(both)}'")
        if self.text is not None and self.text in self.label:
            raise ValueError(f"text must name the input, and not the label '{self.text}'")
        of_npz = [one for one in (*self.file, *(self.validation or ()), self.label_file or "") if one.endswith(".npz")]
        if of_npz and self.of_tables:
            raise ValueError(
                f"{of_npz[0]} has arrays; label, columns, group and the like are for CSV and Parquet files"
            )


class ClientSettings(Settings):
    """One data holder's process."""

    server: Servers = Field(
        default=("127.0.0.1:7733",),
        min_length=1,
        description="HOST:PORT, or a list of several of which one serves at a time: they are tried in turn",
    )
    name: str | None = Field(default=None, description="within the federation; left out: this machine's host name")
    data: DataSettings
    state: Path | None = Field(
        strict=False, default=None, description="folder for what this client keeps; left out: the user's state folder"
    )
    threads: int = Field(
        default=1, ge=1, le=1024, description="for training; small recurrent networks gain little from more"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to train")
    allow_custom: Several = Field(
        default=(), description="module:function whose code runs may use as their model; all others are refused"
    )
    credentials: Path | None = Field(
        strict=False,
        default=None,
        description="folder with key and certificate (seqfed client enroll); left out: credentials in the state folder",
    )
    policy: Path | None = Field(
        strict=False,
        default=None,
        description="policy.toml: which runs this client takes part in, and how much they get in all; left out: any",
    )
    peers: Path | None = Field(
        strict=False,
        default=None,
        description="peers.toml: the masking key of every client (seqfed client key), for runs with secure aggregation; left "
        "out: those that have certificates of the same federation",
    )
    homomorphic_key: Path | None = Field(
        strict=False,
        default=None,
        description="the CKKS key that all clients have a copy of (seqfed client key --homomorphic FILE), for runs with "
        "privacy.homomorphic",
    )
    insecure: bool = Field(default=False, description="allow plaintext off the loopback interface")
    log_json: bool = Field(default=False, description="log a JSON object a line instead of text")
