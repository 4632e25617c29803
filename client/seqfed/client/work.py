"""One task's computation, without any connection: torch is first loaded here, when the first task has come."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from blake3 import blake3

from seqfed.client import custom
from seqfed.client.data import ClientData, Source
from seqfed.common.config import validate_json
from seqfed.common.dp import noise
from seqfed.common.errors import LayoutMismatch, MaskingRefused, NonFiniteUpdate, SchemaMismatch
from seqfed.common.layout import Flat, Layout, Parameters
from seqfed.common.model import layout_of
from seqfed.common.schema import misfit
from seqfed.common.seeds import generator
from seqfed.common.spec import RunSpec
from seqfed.common.statistics import Statistics, applied
from seqfed.common.views import Progress, Task

if TYPE_CHECKING:
    from seqfed.client.network import Network

log = logging.getLogger("seqfed.client")


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
    """One client's data and, between tasks, what the last run made of them and its network."""

    def __init__(
        self, client: str, source: Source, *, threads: int = 1, device: str = "cpu", allow_custom: tuple[str, ...] = ()
    ) -> None:
        self.client = client
        self.source = source
        self._threads = threads
        self._device = device
        self._allow_custom = allow_custom
        self._checked: tuple[RunSpec, Layout, ClientData] | None = None
        self._network: tuple[RunSpec, Network] | None = None
        self._delta: Flat | None = None  # fresh memory costs more than the copy into it, so it is used again

    def check(self, task: Task) -> ClientData:
        """The run's sequences; raises SchemaMismatch, DataError or LayoutMismatch if the task is not for these data or this
        version of the software, PolicyRefused if it would run code that is not allowed. The first call for a run reads and
        cuts the data, the others find that done.
        """
        spec = self._spec(task)
        if self._checked is None or self._checked[0] is not spec:
            self._require_fitting(spec)
            data = self._checked[2] if self._checked is not None and _alike(self._checked[0], spec) else None
            if data is None:
                data = self.source.prepare(spec)
                if len(data.training) == 0:
                    raise SchemaMismatch(f"client '{self.client}' has no sequence to train on that fits the run")
                if data.refused is not None:
                    log.warning("run %s: %s", spec.name, data.refused)
            self._checked = (spec, layout_of(spec), data)
        layout = self._checked[1]
        if layout.digest != task.model.layout_digest or layout.nbytes != task.model.nbytes:
            raise LayoutMismatch(
                "the server builds another model of this specification; run the same version of seqfed"
            )
        return self._checked[2]

    def _spec(self, task: Task) -> RunSpec:
        """The run's, with what it has measured of the data in its place: the same object for all of a run's tasks."""
        if task.spec.data.normalise == "given":
            return task.spec
        return applied(task.spec, validate_json(Statistics, task.statistics, "the run's statistics"))

    def _require_fitting(self, spec: RunSpec) -> None:
        custom.require_allowed(spec.model.custom, self._allow_custom)
        why = misfit(spec.data, self.source.schema)
        if why is not None:
            raise SchemaMismatch(f"client '{self.client}' {why}")

    def measure(self, task: Task) -> dict[str, int]:
        """This client's part in the run's statistics, exact sums of its training data. Raises SchemaMismatch, DataError."""
        self._require_fitting(task.spec)
        return self.source.measure(task.spec)

    def train(
        self,
        task: Task,
        flat: Flat,
        cancelled: Callable[[], bool],
        progress: Callable[[Progress], None] = lambda _: None,
        anew: int = 0,
    ) -> LocalUpdate | None:
        """Train from the global model `flat`; None if `cancelled()` became true. Raises what `check` does, TrainingFailed.

        progress: told now and then, in the calling thread, how far it is. anew: not 0 draws other batches than before.
        """
        from seqfed.client import training

        data = self.check(task).training
        spec = self._spec(task)
        if anew and len(data) <= spec.training.batch_size and not spec.model.dropout:
            raise MaskingRefused(
                f"client '{self.client}' trains on all its data at once, so another training of this round would make the same "
                "update, which was in a sum that may have been opened"
            )
        network = self._prepared(task, flat)
        given = spec.privacy.dp
        try:
            if given is not None and given.mode == "example":
                from seqfed.client import private_training

                key = noise.fresh_key()
                trained = private_training.train(network, data, spec, task.key.round, key, cancelled, progress)
            else:
                draw = generator(spec.seed, task.key.round, self.client, "batches", *((anew,) if anew else ()))
                trained = training.train(network, data, spec, task.key.round, draw, cancelled, progress)
        except training.Cancelled:
            return None
        if self._delta is None or self._delta.shape != flat.shape:
            self._delta = np.empty_like(flat)
        delta = network.save(out=self._delta).flat
        delta -= flat
        weight, tally = data.weight, trained.tally
        if given is not None and given.mode in {"local", "example"}:
            if given.mode == "local":
                delta[:] = self._hidden(delta, spec)
            # what the data's size and losses are is no more the server's to know than the update is
            weight, tally = 1, tally if given.is_public else dict.fromkeys(tally, 0)
        digest = blake3(delta.data.cast("B")).digest()
        return LocalUpdate(delta, digest, weight, tally, trained.seconds)

    @staticmethod
    def _hidden(delta: Flat, spec: RunSpec) -> Flat:
        """The update, clipped and with noise of its own: local differential privacy."""
        from seqfed.common.dp import accounting

        given, multiplier = spec.privacy.dp, accounting.noise_multiplier(spec)
        assert given is not None
        assert multiplier is not None  # there is one in all modes but `example`
        clip, length = given.first_clip, float(np.linalg.norm(delta.astype(np.float64)))
        if not np.isfinite(length):
            raise NonFiniteUpdate("an update has numbers that are not finite; lower the learning rate")
        clipped = np.multiply(delta, min(1.0, clip / length) if length else 1.0, dtype=np.float64)
        return noise.released(clipped, multiplier * clip * noise.ROUNDED, noise.fresh_key())

    def evaluate(self, task: Task, flat: Flat, progress: Callable[[Progress], None] = lambda _: None) -> dict[str, int]:
        """The global model's exact sums on this client's validation data; `progress` as in `train`."""
        from seqfed.client import training

        data = self.check(task).validation
        return training.evaluate(self._prepared(task, flat), data, self._spec(task), progress)

    def _prepared(self, task: Task, flat: Flat) -> Network:
        from seqfed.client.network import network_for, use_threads

        use_threads(self._threads)
        spec = self._spec(task)
        if self._network is None or self._network[0] is not spec:
            self._network = (spec, network_for(spec, device=self._device, allow_custom=self._allow_custom))
        network = self._network[1]
        network.load(Parameters(network.layout, np.asarray(flat)))
        return network


def _alike(one: RunSpec, other: RunSpec) -> bool:
    """Whether two runs make the same sequences of the same files."""
    return (one.data, one.task) == (other.data, other.task)
