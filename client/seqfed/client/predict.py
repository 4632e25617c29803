"""What a model says of sequences, as rows for a spreadsheet or a program: classes by name, numbers in the data's own units."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from seqfed.client.data import Batch, ClientData
from seqfed.client.scoring import anomaly_scores, own_units
from seqfed.common.checkpoint import replacing
from seqfed.common.metrics import MOST_EXP, add
from seqfed.common.spec import RunSpec

if TYPE_CHECKING:
    from seqfed.client.network import Network

Reals = NDArray[np.float64]
Row = dict[str, Any]
Told = Callable[[int], None]  # how many more sequences are done

MOST_CLASSES: Final = 1000  # with a column each; of more, the likeliest one's probability alone
DIGITS: Final = 7  # of a float32
EVALUATED: Final = 4096  # sequences between two tellings of progress


@dataclass(frozen=True)
class Predictor:
    """A run's network, and what the labels are called, where the specification has no names for them."""

    network: Network
    spec: RunSpec
    labels: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys of each row, in this order.

        entity: whose sequence it is, its number from 0 if it has no name. step: the entity's step, from 1, that a window
        ends with; null where an entity is one sequence, or rows were refused. steps: how many it has. Then, by task:
        class, its probability, and every class's as p_NAME (up to 1,000); p_NAME of every label; numbers in their own
        units; the columns' numbers so many steps ahead as NAME+1, NAME+2; next, the likeliest token after the sequence,
        its probability, and the perplexity of the sequence's tokens after the first; score, the mean squared error of
        the forecast of the step after, in normalised units.
        """
        return ("entity", "step", "steps", *self._said)

    @property
    def _said(self) -> tuple[str, ...]:
        spec = self.spec
        match spec.task.kind:
            case "classification":
                each = [f"p_{name}" for name in self._classes] if spec.outputs <= MOST_CLASSES else []
                return ("class", "probability", *each)
            case "multilabel":
                return tuple(f"p_{name}" for name in self._targets)
            case "regression":
                return ("value",) if spec.outputs == 1 and not self.labels else tuple(map(str, self._targets))
            case "forecast":
                names = spec.data.columns or [f"x{number}" for number in range(spec.data.numbers)]
                return tuple(f"{name}+{ahead}" for ahead in range(1, spec.task.horizon + 1) for name in names)
            case "next_token":
                return ("next", "probability", "perplexity")
            case "anomaly":
                return ("score",)

    @property
    def _classes(self) -> Sequence[str | int]:
        return self.spec.data.labels or range(self.spec.outputs)

    @property
    def _targets(self) -> Sequence[str | int]:
        return self.labels if len(self.labels) == self.spec.outputs else range(self.spec.outputs)

    def rows(self, data: ClientData, told: Told = lambda count: None) -> Iterator[Row]:
        """One a sequence of data.training, in their order. Raises TrainingFailed if the GPU's memory is too small."""
        from seqfed.client.training import outputs_of

        sequences, spec = data.training, self.spec
        ends = _ends(data, spec)
        if spec.task.kind == "next_token":
            # The token that each step foretells follows in the file: with it the sequence is read to its end.
            sequences = replace(sequences, lengths=sequences.lengths + 1, target="labels", y=None)
        names = self._said
        for indices, outputs, batch in outputs_of(self.network, sequences, spec):
            said = list(self._says(outputs, batch))
            for index, values in zip(indices.tolist(), said, strict=True):
                entity: str | int | None = None
                if sequences.entities is not None:
                    entity = int(sequences.entities[index])
                    entity = data.entities[entity] if data.entities else entity
                place = {"entity": entity, "step": ends(index), "steps": int(sequences.lengths[index])}
                yield place | dict(zip(names, values, strict=True))
            told(len(indices))

    def _says(self, outputs: NDArray[np.float32], batch: Batch) -> Iterator[list[Any]]:
        spec = self.spec
        match spec.task.kind:
            case "classification":
                shares, classes = _softmax(outputs), self._classes
                for share in shares:
                    likeliest = int(share.argmax())
                    each = share.tolist() if spec.outputs <= MOST_CLASSES else []
                    yield [classes[likeliest], *map(_short, (share[likeliest], *each))]
            case "multilabel":
                yield from (list(map(_short, row)) for row in (0.5 + 0.5 * np.tanh(0.5 * outputs.astype(np.float64))))
            case "next_token":
                lengths = batch.lengths if batch.lengths is not None else np.full(len(batch), batch.x.shape[1])
                for output, x, length in zip(outputs, batch.x, lengths.tolist(), strict=True):
                    yield self._says_next(output[:length], x[:length])
            case "anomaly":
                yield from ([None if np.isnan(one) else _short(one)] for one in anomaly_scores(outputs, batch.y))
            case _:
                mean, scale = own_units(spec)
                yield from (list(map(_short, row)) for row in outputs * scale + mean)

    def _says_next(self, outputs: NDArray[np.float32], tokens: NDArray[Any]) -> list[Any]:
        shares = _softmax(outputs)
        right = shares[np.arange(len(tokens) - 1), tokens[1:].astype(np.int64)]
        with np.errstate(divide="ignore"):  # a share too small for a float: the largest perplexity there is
            loss = -np.log(right).mean()
        likeliest = int(shares[-1].argmax())
        assert self.spec.data.vocabulary is not None
        token = self.spec.data.vocabulary[likeliest - 1] if likeliest else None  # 0: a token that it does not know
        return [token, _short(shares[-1, likeliest]), _short(np.exp(min(loss, MOST_EXP)))]


def evaluate(network: Network, data: ClientData, spec: RunSpec, told: Told = lambda count: None) -> dict[str, int]:
    """The exact sums of all of data.training; raises TrainingFailed if a loss is not finite."""
    from seqfed.client import training

    sequences = data.training
    tally: dict[str, int] = {}
    for start in range(0, len(sequences), EVALUATED):
        some = np.arange(start, min(start + EVALUATED, len(sequences)))
        tally = add([tally, training.evaluate(network, sequences.take(some), spec)])  # exact: the parts do not matter
        told(len(some))
    return tally


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> int:
    """A header and a line a row, nothing where a value is null; how many rows. Raises StorageError or StorageFull."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    count = 0
    with replacing(path) as file:
        for row in rows:
            writer.writerow(row)
            count += 1
            if text.tell() > 1 << 16:  # written in pieces: there may be more rows than memory
                file.write(text.getvalue().encode())
                text.seek(0)
                text.truncate()
        file.write(text.getvalue().encode())
    return count


def write_json(path: Path, rows: Iterable[Row]) -> int:
    """A list of one object a row; how many. Raises StorageError or StorageFull."""
    count = 0
    with replacing(path) as file:
        file.write(b"[")
        for row in rows:
            file.write((b",\n" if count else b"\n") + json.dumps(row, ensure_ascii=False).encode())
            count += 1
        file.write(b"\n]\n")
    return count


def _ends(data: ClientData, spec: RunSpec) -> Callable[[int], int | None]:
    """Where each sequence ends in its entity, from 1, if that can be told: the first window begins with the first row."""
    sequences = data.training
    windows = spec.task.kind == "next_token" or spec.data.stride is not None
    if not windows or data.refused is not None or sequences.entities is None or len(sequences) == 0:
        return lambda index: None
    begins = np.full(int(sequences.entities.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(begins, sequences.entities, sequences.starts)
    ends = sequences.starts + sequences.lengths - begins[sequences.entities] + (spec.task.kind == "next_token")
    return lambda index: int(ends[index])


def _softmax(logits: NDArray[np.float32]) -> Reals:
    """Along the last axis."""
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=-1, keepdims=True)
    np.exp(exact, out=exact)
    exact /= exact.sum(axis=-1, keepdims=True)
    return exact


def _short(value: float) -> float:
    """As many digits as the number has."""
    return float(f"{value:.{DIGITS}g}")
