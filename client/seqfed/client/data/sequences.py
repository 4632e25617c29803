"""Sequences as the training sees them: stretches of rows that lie one after the other, gathered batch by batch.

Windows overlap, so keeping each apart would need as many times the memory; and rows may be memory-mapped from a file that
is larger than memory. A batch is the only copy ever made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Target = Literal["labels", "rows ahead", "next token"]


@dataclass(frozen=True, eq=False)
class Batch:
    """B sequences, padded at their ends to the longest of them, T steps.

    x: float32 (B, T, F), or int64 (B, T) token ids; zeros where padded.
    lengths: int64 (B,), from 1 to T; None if all are T.
    y: classification int64 (B,); multilabel and regression float32 (B, K), NaN where missing; forecast and anomaly float32
    (B, horizon * numbers), NaN where missing; next_token int64 (B, T), -1 where padded. Empty (B, 0) if there are no labels.
    """

    x: NDArray[np.float32] | NDArray[np.int64]
    lengths: NDArray[np.int64] | None
    y: NDArray[np.int64] | NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True, eq=False)
class Sequences:
    """N sequences: the i-th is rows[starts[i] : starts[i] + lengths[i]].

    rows: float32 (R, F), finite, the F = DataSpec.inputs numbers of each step (columns, then their masks, then categories);
    or int32 (R,) token ids. In memory or memory-mapped.
    y: labels, as in Batch: int64 (N,) or float32 (N, K); None where the targets are rows themselves or nothing is labelled.
    target: what y is. "rows ahead": the first `numbers` numbers of the `horizon` rows after the sequence, in that order,
    NaN where the mask channel says missing (masks: whether there is one); "next token": at each step the row after it. Those
    rows exist for every sequence: whoever cuts the windows sees to it.
    entities: int64 (N,), whose sequence it is: an index into ClientData.entities; None if nobody asked.
    anomalies: int64 (N,), 1 for a known anomaly, 0 for none, -1 unknown; of an anomaly task.
    """

    rows: NDArray[np.float32] | NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    y: NDArray[np.int64] | NDArray[np.float32] | None = None
    target: Target = "labels"
    horizon: int = 1
    numbers: int = 0
    masks: bool = False
    entities: NDArray[np.int64] | None = None
    anomalies: NDArray[np.int64] | None = None

    @classmethod
    def of(
        cls,
        x: NDArray[np.float32],
        y: NDArray[np.int64] | NDArray[np.float32],
        lengths: NDArray[np.int64] | None = None,
    ) -> Sequences:
        """Padded arrays: x float32 (N, T, F), y as in Batch, lengths int64 (N,) or None when all have T steps."""
        count, steps = x.shape[:2]
        starts = np.arange(count, dtype=np.int64) * steps
        whole = np.full(count, steps, np.int64) if lengths is None else lengths
        return cls(np.ascontiguousarray(x).reshape(count * steps, *x.shape[2:]), starts, whole, y)

    @classmethod
    def joined(cls, parts: Sequence[Sequences]) -> Sequences:
        """The sequences of several sources of one run, one after the other; their entities are not kept apart."""
        before = np.cumsum([0, *(len(one.rows) for one in parts)])

        def all_of(name: str) -> Any:
            values = [getattr(one, name) for one in parts]
            return None if any(one is None for one in values) else np.concatenate(values)

        return replace(
            parts[0],
            rows=all_of("rows"),
            starts=np.concatenate([one.starts + first for one, first in zip(parts, before, strict=False)]),
            lengths=all_of("lengths"),
            y=all_of("y"),
            entities=None,
            anomalies=all_of("anomalies"),
        )

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def weight(self) -> int:
        """What these sequences count for in an average: their number, or the number of their tokens to foretell."""
        return int(self.lengths.sum()) if self.target == "next token" else len(self)

    def take(self, which: NDArray[np.int64]) -> Sequences:
        """The sequences at these indices; the rows stay where they are."""
        chosen = {
            name: None if (values := getattr(self, name)) is None else values[which]
            for name in ("starts", "lengths", "y", "entities", "anomalies")
        }
        return replace(self, **chosen)  # type: ignore[arg-type]

    def batch(self, which: NDArray[np.int64]) -> Batch:
        """The sequences at these indices, gathered and padded. Precondition: at least one."""
        starts, lengths = self.starts[which], self.lengths[which]
        steps = int(lengths.max())
        place = starts[:, None] + np.arange(steps)
        real = None
        if not (lengths == steps).all():
            real = np.arange(steps) < lengths[:, None]
            place = np.where(real, place, starts[:, None])  # any row of its own will do
        rows = self.rows[place]
        x: NDArray[Any] = rows.astype(np.int64) if rows.ndim == 2 else rows
        if real is None:
            return Batch(x, None, self._targets(which, place, None))
        x[~real] = 0
        return Batch(x, lengths, self._targets(which, place, real))

    def _targets(
        self, which: NDArray[np.int64], place: NDArray[np.int64], real: NDArray[np.bool_] | None
    ) -> NDArray[np.int64] | NDArray[np.float32]:
        if self.target == "next token":
            after: NDArray[np.int64] = self.rows[place + 1].astype(np.int64)
            if real is not None:
                after[~real] = -1
            return after
        if self.target == "rows ahead":
            ends = self.starts[which] + self.lengths[which]
            rows = self.rows[ends[:, None] + np.arange(self.horizon)]
            ahead = rows[:, :, : self.numbers].astype(np.float32)
            if self.masks:
                ahead[rows[:, :, self.numbers : 2 * self.numbers] == 0] = np.nan
            return np.asarray(ahead.reshape(len(which), -1), np.float32)
        if self.y is None:
            return np.empty((len(which), 0), np.float32)
        return self.y[which]


@dataclass(frozen=True, eq=False)
class ClientData:
    """What one client trains on and what it scores models on; the second may be empty.

    entities: the names behind Sequences.entities; empty if those are the sequences' places in the file.
    refused: how many rows did not fit, and the first of them in words; None if none.
    """

    training: Sequences
    validation: Sequences
    entities: tuple[str, ...] = ()
    refused: str | None = None
