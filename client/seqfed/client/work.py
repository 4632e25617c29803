"""One task's computation, without any connection: torch is first loaded here, when the first task has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from blake3 import blake3

from seqfed.client.data import ClientData
from seqfed.common.errors import LayoutMismatch, SchemaMismatch
from seqfed.common.layout import Flat, Layout, Parameters
from seqfed.common.model import layout_of
from seqfed.common.schema import misfit
from seqfed.common.seeds import generator
from seqfed.common.spec import RunSpec
from seqfed.common.views import Task

if TYPE_CHECKING:
    from seqfed.client.network import SequenceClassifier


@dataclass(frozen=True, eq=False)
class LocalUpdate:
    """delta = local model - global model, with its BLAKE3 digest, the examples behind it and what the training told.

    `delta` is the workshop's memory: it holds until the next training.
    """

    delta: Flat
    digest: bytes
    weight: int
    tally: dict[str, int]
    training_seconds: float


class Workshop:
    """One client's data and, between tasks, the network last used."""

    def __init__(self, client: str, data: ClientData, threads: int) -> None:
        self.client = client
        self.data = data
        self._threads = threads
        self._checked: tuple[RunSpec, Layout] | None = None
        self._network: tuple[RunSpec, SequenceClassifier] | None = None
        self._delta: Flat | None = None  # fresh memory costs more than the copy into it, so it is used again

    def check(self, task: Task) -> None:
        """Raise SchemaMismatch or LayoutMismatch if the task is not for these data or this version of the software."""
        if self._checked is None or self._checked[0] is not task.spec:
            why = misfit(task.spec.data, self.data.schema)
            if why is not None:
                raise SchemaMismatch(f"client '{self.client}' {why}")
            self._checked = (task.spec, layout_of(task.spec))
        layout = self._checked[1]
        if layout.digest != task.model.layout_digest or layout.nbytes != task.model.nbytes:
            raise LayoutMismatch(
                "the server builds another model of this specification; run the same version of seqfed"
            )

    def train(self, task: Task, flat: Flat, cancelled: Callable[[], bool]) -> LocalUpdate:
        """Train from the global model `flat`; raises TrainingFailed, training.Cancelled."""
        from seqfed.client import training

        network = self._prepared(task, flat)
        draw = generator(task.spec.seed, task.key.round, self.client, "batches")
        trained = training.train(network, self.data.training, task.spec.training, draw, cancelled)
        if self._delta is None or self._delta.shape != flat.shape:
            self._delta = np.empty_like(flat)
        delta = network.save(out=self._delta).flat
        delta -= flat
        digest = blake3(delta.data.cast("B")).digest()
        return LocalUpdate(delta, digest, len(self.data.training), trained.tally, trained.seconds)

    def evaluate(self, task: Task, flat: Flat) -> dict[str, int]:
        """The global model's exact sums on this client's validation data."""
        from seqfed.client import training

        return training.evaluate(self._prepared(task, flat), self.data.validation)

    def _prepared(self, task: Task, flat: Flat) -> SequenceClassifier:
        from seqfed.client.network import SequenceClassifier, use_threads

        use_threads(self._threads)
        if self._network is None or self._network[0] is not task.spec:
            self._network = (task.spec, SequenceClassifier(task.spec))
        network = self._network[1]
        network.load(Parameters(network.layout, np.asarray(flat)))
        return network
