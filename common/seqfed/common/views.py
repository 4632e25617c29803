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
class ModelStep:
    """A payload that makes the model of `version` of the one with digest `base`. `data`: itself, if it comes with the task."""

    version: int
    base: bytes
    nbytes: int
    digest: bytes
    data: bytes = b""


@dataclass(frozen=True)
class ModelVersion:
    """One committed global model: `version` rounds are folded into it. `data`: the vector, if it comes with the task.

    steps: the last ones that lead to it, in order, where downloads are compressed.
    """

    version: int
    nbytes: int
    digest: bytes
    layout_digest: bytes
    data: bytes = b""
    steps: tuple[ModelStep, ...] = ()


@dataclass(frozen=True)
class MaskingTerms:
    """What the server chooses of a masked sum: its number in the run, and how many clients can be in it.

    known: what the last round's sum tells of how this one is made, where that matters (see `seqfed.common.masking.agreed`).
    """

    number: int
    n_max: int
    known: bytes = b""


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

    masked_number: of the masked sum that the bytes are for; 0: they are a delta. codec: what the bytes are a payload of; empty:
    they are the delta itself.
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
    codec: str = ""


@dataclass(frozen=True)
class RoundRecord:
    """One finished round. Seconds are wall time. Bytes are those of all messages about the run, with what gRPC and HTTP/2 add
    (`seqfed.common.wire`); what TLS adds is not counted, nor what errors say. traffic: the same by client, up and down.

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
    traffic: Mapping[str, tuple[int, int]] = field(default_factory=dict)


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


FEDERATION = "*"  # in a ledger: every data holder, the one of whom most was spent among them; no client is called so


@dataclass(frozen=True)
class LedgerEntry:
    """What a run has spent of one data holder's privacy, up to a round.

    holder: a client's name, or FEDERATION. releases: sums and updates with its data that noise has made fit to be seen.
    epsilon, noise_multiplier: None where only the client itself can tell.
    """

    run: str
    holder: str
    round: int
    releases: int
    unit: str
    epsilon: float | None
    delta: float
    noise_multiplier: float | None
    sampling: str
    accountant: str


@dataclass(frozen=True)
class PrivacyView:
    """A run's account: `entry` is that of all data holders. goal: the most it may spend. planned: after all its rounds.

    holders: each one's releases and epsilon, where the account of one run is asked for.
    """

    name: str
    entry: LedgerEntry
    mode: str
    mechanism: str
    neighbours: str
    goal: float | None
    planned: float | None
    rounds: int
    clip: str
    population: int | None
    cohort: int
    caveats: tuple[str, ...]
    holders: tuple[tuple[str, int, float | None], ...] = ()


@dataclass(frozen=True)
class SpentView:
    """What all runs together have spent of the data holder of whom they have spent most; holder: its name, or FEDERATION."""

    unit: str
    holder: str
    runs: int
    epsilon: float | None
    delta: float
    accountant: str


@dataclass(frozen=True)
class PrivacyReport:
    """The ledger as an operator sees it: the runs with differential privacy, oldest first, and one total a unit."""

    runs: tuple[PrivacyView, ...]
    totals: tuple[SpentView, ...]
