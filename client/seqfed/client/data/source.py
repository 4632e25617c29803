"""Where a client's sequences come from: files read once at the start, made into a run's sequences when a run asks."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from seqfed.client.data.arrays import TokenRows, of_function, read_npz
from seqfed.client.data.frame import Frame
from seqfed.client.data.labels import Labels
from seqfed.client.data.numbers import Material, Numbers
from seqfed.client.data.reading import files_of, kind_of
from seqfed.client.data.sequences import ClientData, Sequences
from seqfed.client.data.store import Store
from seqfed.client.data.tables import read_frame
from seqfed.client.data.text import Texts, Tokens, of_frame, read_texts
from seqfed.client.data.wide import widen
from seqfed.client.data.windows import held_out_rows
from seqfed.client.settings import DataSettings
from seqfed.common.errors import DataError, SchemaMismatch
from seqfed.common.schema import DataSchema
from seqfed.common.spec import RunSpec

log = logging.getLogger("seqfed.client")


class Source(Protocol):
    """One data holder's files, read and checked."""

    @property
    def schema(self) -> DataSchema:
        """What the server is told of them."""
        ...

    def prepare(self, spec: RunSpec) -> ClientData:
        """The run's sequences; raises SchemaMismatch or DataError with file, row, column and remedy."""
        ...

    def measure(self, spec: RunSpec) -> dict[str, int]:
        """The exact sums of the columns to train on (`seqfed.common.statistics.names`); raises as `prepare`."""
        ...


@dataclass(frozen=True, eq=False)
class Made:
    """A Source of sequences that a data holder's own function made; every run gets them as they are."""

    training: Sequences
    validation: Sequences

    @property
    def schema(self) -> DataSchema:
        rows, y = self.training.rows, self.training.y
        return DataSchema(
            features=rows.shape[1] if rows.ndim == 2 else None,
            classes=int(y.max(initial=0)) + 1 if y is not None and y.dtype.kind == "i" and y.ndim == 1 else None,
            tokens=rows.ndim == 1,
            examples=len(self.training),
            validation_examples=len(self.validation),
        )

    def prepare(self, spec: RunSpec) -> ClientData:
        return ClientData(self.training, self.validation)

    def measure(self, spec: RunSpec) -> dict[str, int]:
        raise SchemaMismatch(
            "the data are Sequences that a function made, as the network is to see them, and the run normalises them "
            "(data.normalise = 'federated'); return x, y[, lengths] from it instead"
        )


def open_source(settings: DataSettings) -> Source:
    """Read the files that the settings name; raises DataError."""
    if len(settings.file) == 1 and ":" in settings.file[0] and not Path(settings.file[0]).exists():
        return _of_function(settings)
    _check_apart(settings)
    training = _read(settings.file, settings)
    validation = _read(settings.validation, settings) if settings.validation is not None else None
    if isinstance(training, Material):
        if validation is not None and not isinstance(validation, Material):
            raise DataError(
                f"{validation.source} has tokens, {training.frame.source} has numbers; give files of one kind"
            )
        if validation is not None and settings.group is not None:
            both = set(training.frame.entities) & set(validation.frame.entities)
            if both:
                log.warning(
                    "%d of %d entities of %s are in %s too, such as '%s'; if they are the same, the scores flatter",
                    *(len(both), len(validation.frame.entities), validation.frame.source, training.frame.source),
                    min(both),
                )
        return Numbers(settings, training, validation)
    if isinstance(validation, Material):
        raise DataError(f"{validation.frame.source} has numbers, {training.source} has tokens; give files of one kind")
    return Tokens(settings, training, validation)


def _check_apart(settings: DataSettings) -> None:
    """Raise DataError if a file is to be trained on and to be scored on."""
    of_training = {path.resolve() for path in files_of(settings.file)}
    for path in files_of(settings.validation) if settings.validation is not None else ():
        if path.resolve() in of_training:
            raise DataError(f"{path}: is among the files to train on and those to score on; keep it in one of them")


def _of_function(settings: DataSettings) -> Source:
    made = of_function(settings.file[0], Store.of(settings))
    if isinstance(made, Material):
        return Numbers(settings, made)
    if isinstance(made, TokenRows):
        return Tokens(settings, made)
    training, validation = made
    if validation is None:
        out = held_out_rows(len(training), settings.validation_fraction, settings.seed)
        training, validation = training.take(np.flatnonzero(~out)), training.take(np.flatnonzero(out))
    return Made(training, validation)


def _read(given: tuple[str, ...], settings: DataSettings) -> Material | Texts | TokenRows:
    paths = files_of(given)
    kind = kind_of(paths, settings)
    if kind == "npz":
        if len(paths) > 1:
            raise DataError(
                f"{paths[0]} and {len(paths) - 1} more: only one NPZ file can be read; join them with numpy"
            )
        return read_npz(paths[0], settings)
    if kind == "text":
        return read_texts(paths, settings)
    frame = read_frame(paths, kind, settings)
    labels = _labels(frame, settings)
    if settings.text is not None:
        return of_frame(frame, labels)
    if settings.wide:
        frame = widen(frame, settings)
    return Material(frame, labels)


def _labels(frame: Frame, settings: DataSettings) -> Labels | None:
    if not settings.label or settings.unlabelled:
        return None
    if settings.label_file is None:
        return Labels.of(frame, settings.label, np.arange(len(frame), dtype=np.int64) if settings.wide else None)
    paths = files_of((settings.label_file,))
    table = DataSettings(
        file=(settings.label_file,),
        columns=settings.label,
        group=settings.group,
        encoding=settings.encoding,
        missing_values=settings.missing_values,
        unpacked_gib=settings.unpacked_gib,
    )
    other = read_frame(paths, kind_of(paths, table), table)
    twice = np.flatnonzero(other.ends - other.begins > 1)
    if len(twice):
        entity = int(twice[0])
        raise DataError(
            f"{other.place(int(other.begins[entity]) + 1)}: '{other.entities[entity]}' is there twice; one row an entity, please"
        )
    rows = {name: int(begin) for name, begin in zip(other.entities, other.begins, strict=True)}
    found = np.array([rows.get(name, -1) for name in frame.entities], np.int64)
    if (found < 0).all():
        raise DataError(
            f"{other.source}: knows none of the entities of {frame.source}, such as '{frame.entities[0]}'; is '{settings.group}' "
            "the same thing in both?"
        )
    return Labels.of(other, settings.label, found if frame.owners is None else found[frame.owners])
