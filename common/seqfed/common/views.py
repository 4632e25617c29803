"""What crosses between the parts of a federation, as plain records: tasks for clients, and what operators are shown.

The protobuf messages of the same content appear only in `wire`, in the server's servicers and in the client's connections.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from seqfed.common.schema import DataSchema
from seqfed.common.spec import RunSpec


class TaskKind(Enum):
    """What a client is asked for."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    CANCEL = "cancel"
    MEASURE = "measure"


@dataclass(frozen=True)
class TaskKey:
    """Names one task of one client: with the client's own name, the key under which every call is idempotent."""

    run: str
    round: int
    attempt: int


@dataclass(frozen=True)
class ModelVersion:
    """One committed global model: `version` rounds are folded into it. `data`: the vector, if it comes with the task."""

    version: int
    nbytes: int
    digest: bytes
    layout_digest: bytes
    data: bytes = b""


@dataclass(frozen=True)
class MaskingTerms:
    """What the server chooses of a masked sum: its number in the run, and how many clients can be in it."""

    number: int
    n_max: int


@dataclass(frozen=True)
class Task:
    """One piece of work for one client. `signature`: of the specification by the holder of `certificate` (PEM), if any.

    masking: in a run with secure aggregation. statistics: JSON, once the run has measured its data, see
    `seqfed.common.statistics`.
    """

    kind: TaskKind
    key: TaskKey
    spec: RunSpec
    model: ModelVersion
    signature: bytes = b""
    certificate: bytes = b""
    masking: MaskingTerms | None = None
    statistics: bytes = b""


class Stage(Enum):
    """What a client is at with its task."""

    READING = "preparing"
    FETCHING = "fetching the model"
    TRAINING = "training"
    EVALUATING = "evaluating"
    SENDING = "sending its update"


@dataclass(frozen=True)
class Progress:
    """How far a client's task is; units as in federation.proto."""

    stage: Stage
    done: int = 0
    total: int = 0
    epoch: int = 0
    loss: float | None = None


@dataclass(frozen=True)
class UpdateHeader:
    """What a client says of its update before it sends the bytes; units as in federation.proto.

    masked_number: of the masked sum that the bytes are for; 0: they are a delta.
    """

    key: TaskKey
    weight: int
    layout_digest: bytes
    nbytes: int
    digest: bytes
    offset: int
    tally: Mapping[str, int]
    training_seconds: float
    masked_number: int = 0


@dataclass(frozen=True)
class RoundRecord:
    """One finished round. Seconds are wall time, bytes are payload messages.

    training: the summed tally of the local trainings, as in `seqfed.common.metrics`. evaluation: the new model's metrics over
    all `evaluated_examples`; not their sums, which with histograms are a hundred times the size and of no further use: no
    round is ever added to another. spread: metric -> (median, worst decile) over the `evaluated_clients`.
    """

    round: int
    attempt: int
    cohort: tuple[str, ...]
    folded: tuple[str, ...]
    training: Mapping[str, int] = field(default_factory=dict)
    evaluation: Mapping[str, float] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    slowest_training_seconds: float = 0.0
    spread: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    evaluated_examples: int = 0
    evaluated_clients: int = 0
    stale: Mapping[str, int] = field(default_factory=dict)  # of `folded`: trained on a model so many rounds older


@dataclass(frozen=True)
class TaskView:
    """A client's task under way: `progress` is None until it has said anything of it, `silent_s` since it last did."""

    client: str
    round: int
    progress: Progress | None
    silent_s: float
    connected: bool


@dataclass(frozen=True)
class RunView:
    """A run as its operator sees it; `metrics` are of the last round that was evaluated.

    `deadline_s`: until the deadline of this phase, None if it has none.
    """

    run: str
    name: str
    phase: str
    round: int
    rounds: int
    attempt: int
    cohort: tuple[str, ...]
    pending: tuple[str, ...]
    reason: str
    history: tuple[RoundRecord, ...]
    bytes_up: int
    bytes_down: int
    seconds: float
    spec: RunSpec
    ended: bool
    metrics: Mapping[str, float] = field(default_factory=dict)
    tasks: tuple[TaskView, ...] = ()
    deadline_s: float | None = None


@dataclass(frozen=True)
class ClientView:
    """A client as the operator sees it."""

    client: str
    connected: bool
    seconds: float
    task: str
    schema: DataSchema | None  # None: it has been revoked, or enrolled, and was never here
    software: str
    revoked: bool = False


@dataclass(frozen=True)
class AuditEntry:
    """One line of the audit log; `seqfed.common.chain` says what the digest covers. `at`: seconds since the epoch."""

    number: int
    at: float
    kind: str
    body: str  # JSON
    digest: bytes
