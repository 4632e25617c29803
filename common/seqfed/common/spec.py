"""A run's specification: the frozen, validated content of run.toml, the same object on the server and on every client."""

from __future__ import annotations

import hashlib
import math
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Shape = Annotated[tuple[Annotated[int, Field(ge=1, le=1 << 40)], ...], Field(max_length=32, strict=False)]
Name = Annotated[str, Field(min_length=1, max_length=200)]  # of a column, or a value in one
LEVELS = {"rotq8": 127, "rotq4": 7}  # L of each client in a masked sum, whose bits follow


class Settings(BaseModel):
    """The base of every settings model: frozen, unknown keys refused, no text or truth values for numbers, all finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataSpec(Settings):
    """What a sequence and its label are, the same for every client: numbers a step, or tokens of a vocabulary."""

    # Numbers: columns by name, or only their count where they have no names (NPZ).
    features: Count | None = Field(default=None, description="numbers a step; with columns their count")
    columns: tuple[Name, ...] | None = Field(
        strict=False, default=None, description="the numbers by their columns' names, in this order"
    )
    categories: dict[Name, Annotated[tuple[Name, ...], Field(strict=False, min_length=1)]] = Field(
        default={}, description="text columns and their values: one more number a value, 1 where it is the step's"
    )
    missing: Literal["refuse", "mask", "forward", "mean"] = Field(
        default="refuse",
        description="a missing number: refuse its row; 0 and one more number a column that is 1 where it was there; "
        "the entity's last one before it; the mean",
    )
    normalise: Literal["given", "federated"] = Field(
        default="given",
        description="by mean and scale as they stand here; or by those of all clients' training data together, which a step "
        "before the first round finds",
    )
    mean: tuple[float, ...] | None = Field(strict=False, default=None, description="subtracted, one a column")
    scale: tuple[float, ...] | None = Field(strict=False, default=None, description="divided by, one a column")
    grid: float | None = Field(
        default=None, gt=0, description="long format: one step's length, in the unit of the time column"
    )
    # Tokens.
    vocabulary: tuple[str, ...] | None = Field(
        strict=False, default=None, description="the tokens, of ids 1, 2, ...; 0 is the unknown one"
    )
    unit: Literal["characters", "words"] = Field(default="characters", description="what a token is")
    unknown: Literal["token", "skip", "refuse"] = Field(
        default="token", description="a token that is not in the vocabulary: its own id 0, left out, or refused"
    )
    # Steps.
    steps: Count | None = Field(
        default=None, description="steps a sequence at most, its last ones; left out: any length"
    )
    stride: Count | None = Field(
        default=None, description="cut each entity into windows of `steps`, so far apart; left out: one sequence each"
    )
    horizon: int = Field(default=0, ge=0, le=1_000_000, description="rows from a window's last to its label's")
    # Labels.
    classes: int | None = Field(default=None, ge=2, le=1_000_000, description="labels are 0 to classes - 1")
    labels: tuple[Name, ...] | None = Field(
        strict=False, default=None, description="the classes by their names in the data, in this order"
    )
    targets: Count | None = Field(default=None, description="numbers or yes/no labels a sequence, if not one class")
    target_mean: tuple[float, ...] | None = Field(strict=False, default=None, description="of regression's targets")
    target_scale: tuple[float, ...] | None = Field(strict=False, default=None, description="of regression's targets")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.vocabulary is None and self.numbers == 0:
            raise ValueError(
                "data needs features, columns or a vocabulary: what is a step? (`seqfed data schema FILE`)"
            )
        if self.vocabulary is not None and (self.numbers or self.categories or self.missing != "refuse" or self.grid):
            raise ValueError("data.vocabulary excludes features, columns, categories, missing and grid; keep one kind")
        if self.columns is not None and self.features not in {None, len(self.columns)}:
            raise ValueError(f"data.features is {self.features}, data.columns names {len(self.columns)}; drop features")
        for name in ("columns", "vocabulary", "labels"):
            values = getattr(self, name) or ()
            if len(set(values)) != len(values):
                twice = next(one for one in values if values.count(one) > 1)
                raise ValueError(f"data.{name} has {twice!r} twice")
        for name, count in (
            ("mean", self.numbers),
            ("scale", self.numbers),
            ("target_mean", self.targets or 0),
            ("target_scale", self.targets or 0),
        ):
            values = getattr(self, name)
            if values is not None and len(values) != count:
                raise ValueError(f"data.{name} has {len(values)} numbers where {count} are due")
        if any(one <= 0 for one in (*(self.scale or ()), *(self.target_scale or ()))):
            raise ValueError("data.scale and data.target_scale must be above 0")
        self._check_normalised()
        if self.stride is not None and self.steps is None:
            raise ValueError("data.stride needs data.steps: windows of how many steps?")
        if self.labels is not None and self.classes not in {None, len(self.labels)}:
            raise ValueError(f"data.classes is {self.classes}, data.labels names {len(self.labels)}; drop classes")
        if self.vocabulary is not None and self.unit == "characters" and any(len(one) != 1 for one in self.vocabulary):
            raise ValueError("data.vocabulary has tokens of several characters; set unit = 'words'")
        return self

    def _check_normalised(self) -> None:
        if self.normalise == "federated" and (self.mean is not None or self.scale is not None or not self.numbers):
            raise ValueError(
                "data.normalise = 'federated' finds mean and scale of number columns by itself; drop data.mean and scale, "
                "or normalise"
            )
        if self.missing == "mean" and self.mean is None and self.normalise == "given":
            raise ValueError("data.missing = 'mean' needs data.mean, one number a column (`seqfed data schema FILE`)")

    @property
    def numbers(self) -> int:
        """Number columns a step; 0 for tokens."""
        return len(self.columns) if self.columns is not None else (self.features or 0)

    @property
    def inputs(self) -> int:
        """Width of a step as the network sees it: columns, their masks, categories; or the ids of tokens."""
        if self.vocabulary is not None:
            return len(self.vocabulary) + 1
        return self.numbers * (2 if self.missing == "mask" else 1) + sum(map(len, self.categories.values()))

    @property
    def class_count(self) -> int:
        """Classes of a label; 0 if there are none."""
        return len(self.labels) if self.labels is not None else (self.classes or 0)


class TaskSpec(Settings):
    """What the model learns to say of a sequence."""

    kind: Literal["classification", "multilabel", "regression", "forecast", "next_token", "anomaly"] = Field(
        default="classification",
        description="one class; several yes/no labels, some missing; numbers; the next `horizon` steps; at each step the "
        "token after it; a score: how badly the next step is forecast",
    )
    horizon: Count = Field(default=1, description="forecast: steps ahead")
    loss: Literal["cross_entropy", "focal", "mse", "mae", "huber"] | None = Field(
        default=None, description="left out: cross_entropy for classes, labels and tokens, mse for numbers"
    )
    class_weights: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        strict=False, default=None, description="of each class's (multilabel: each label's positive) loss in training"
    )

    @property
    def of_numbers(self) -> bool:
        """Whether the outputs are numbers, not scores of classes, labels or tokens."""
        return self.kind in {"regression", "forecast", "anomaly"}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.loss is not None and (self.loss in {"mse", "mae", "huber"}) != self.of_numbers:
            fitting = "mse, mae or huber" if self.of_numbers else "cross_entropy or focal"
            raise ValueError(f"task.loss = '{self.loss}' does not fit a {self.kind} task; use {fitting}")
        if self.horizon != 1 and self.kind != "forecast":
            raise ValueError("task.horizon belongs to kind = 'forecast'")
        if self.class_weights is not None and self.kind not in {"classification", "multilabel"}:
            raise ValueError("task.class_weights belong to classification and multilabel tasks")
        return self


class ModelSpec(Settings):
    """An embedding if the steps are tokens, recurrent layers over the steps, pooling, and a linear layer."""

    kind: Literal["rnn", "lstm", "gru"] = "lstm"
    hidden: int = Field(default=64, ge=1, le=65_536, description="units a layer")
    layers: int = Field(default=2, ge=1, le=64)
    nonlinearity: Literal["tanh", "relu"] = Field(default="tanh", description="of rnn")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of each layer's output but the last, in training")
    bidirectional: bool = False
    embedding: int = Field(default=64, ge=1, le=65_536, description="numbers a token")
    projection: int | None = Field(default=None, ge=1, le=65_536, description="of lstm: numbers a layer hands on")
    pooling: Literal["last", "mean", "attention"] = Field(
        default="last", description="of the last layer's states into one: the last real one, their mean, a learnt mean"
    )
    custom: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="module:function that makes the torch module from the RunSpec, instead of all the above",
    )
    tensors: tuple[tuple[Name, Shape], ...] | None = Field(
        strict=False, default=None, description="names and shapes of a custom model; `seqfed submit` fills them in"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.nonlinearity != "tanh" and self.kind != "rnn":
            raise ValueError(f"model.nonlinearity belongs to kind = 'rnn', not to '{self.kind}'")
        if self.projection is not None and (self.kind != "lstm" or self.projection >= self.hidden):
            raise ValueError("model.projection belongs to kind = 'lstm', and must be smaller than hidden")
        if self.tensors is not None and self.custom is None:
            raise ValueError("model.tensors belong to a custom model")
        names = [name for name, _ in self.tensors or ()]
        if self.tensors is not None and not names:
            raise ValueError("model.tensors names none; a model has at least one")
        if len(set(names)) != len(names) or "__metadata__" in names:
            raise ValueError("model.tensors has a name twice, or '__metadata__', which model files need for themselves")
        return self


class TrainingSpec(Settings):
    """One client's local training in one round."""

    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    learning_rate: float = Field(default=3e-3, gt=0, le=100)
    momentum: float = Field(default=0.0, ge=0, lt=1, description="of sgd")
    weight_decay: float = Field(default=0.0, ge=0, le=10)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="of the learning rate over the rounds, down to `final` of it in the last"
    )
    warmup: int = Field(default=0, ge=0, le=1_000_000, description="rounds in which it first grows to its full size")
    final: float = Field(
        default=0.1, ge=0, le=1, description="share of it in the last round, where the schedule is not constant"
    )
    clip_norm: float | None = Field(default=None, gt=0, description="of each batch's gradient; left out: no clipping")
    batch_size: Count = 32
    epochs: Count | None = Field(
        default=None, description="passes over the client's data a round; 1 if steps is left out too"
    )
    steps: Count | None = Field(default=None, description="batches a round, instead of epochs")
    truncate: Count | None = Field(
        default=None, description="back-propagate through so many steps at most (truncated BPTT); left out: through all"
    )
    mixed_precision: bool = Field(default=False, description="bfloat16 arithmetic on a client that trains on CUDA")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("training.epochs and training.steps exclude each other; keep one")
        if self.optimizer != "sgd" and self.momentum:
            raise ValueError(f"training.momentum belongs to optimizer = 'sgd', not to '{self.optimizer}'")
        return self


class CohortSpec(Settings):
    """Who is asked in a round, how many must answer until when, and what becomes of those who do not."""

    min_clients: Count = Field(
        default=2, description="how many fitting clients must be connected before a round begins"
    )
    # None, not 1.0, when left out: the canonical JSON names every key, and read back it must not contradict `count`.
    fraction: float | None = Field(
        default=None, gt=0, le=1, description="of the connected clients, at least min_clients of them; left out: all"
    )
    count: Count | None = Field(default=None, description="clients a round, instead of fraction")
    over_select: float = Field(
        default=1.0,
        ge=1,
        le=10,
        description="ask so many times the cohort and take the first answers: 1.3 asks 130 % (Bonawitz et al. 2019)",
    )
    quorum: Count | None = Field(
        default=None, description="updates that suffice at the deadline; left out: as many as the cohort has"
    )
    deadline_s: float = Field(
        default=3600.0, gt=0, le=30 * 86_400, description="seconds for a round's training; with adaptive at most"
    )
    adaptive: float | None = Field(
        default=None,
        ge=1,
        le=100,
        description="deadline: so many times the time in which 90 % of the last answers came; left out: deadline_s",
    )
    grace_s: float | None = Field(
        default=None, ge=0, le=30 * 86_400, description="seconds for the others once the quorum is in; left out: no end"
    )
    silence_s: float = Field(
        default=60.0,
        ge=5,
        le=86_400,
        description="seconds without any progress after which a client is not waited for (its answer still counts)",
    )
    late: Literal["drop", "fold"] = Field(
        default="drop",
        description="updates that miss their round: drop them, or fold them into the next with a staleness weight",
    )
    staleness: float = Field(
        default=0.5,
        ge=0,
        le=10,
        description="exponent a: an update s rounds old is scaled down by (1 + s)^-a (Nguyen et al. 2022, 5)",
    )
    max_staleness: int = Field(default=10, ge=1, le=1000, description="rounds after which a late update is dropped")
    max_attempts: int = Field(default=3, ge=1, le=1000, description="tries at one round before the run pauses")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.count is not None and self.fraction is not None:
            raise ValueError("cohort.count and cohort.fraction exclude each other; keep one")
        smallest = self.min_clients if self.count is None else self.count
        if self.quorum is not None and self.quorum > smallest:
            raise ValueError(
                f"cohort.quorum ({self.quorum}) is more than the smallest cohort ({smallest}); lower quorum"
            )
        if self.grace_s is not None and self.quorum is None:
            raise ValueError("cohort.grace_s begins when the quorum is in; set cohort.quorum")
        return self

    @property
    def required(self) -> int:
        """How many fitting clients must be connected before a round begins."""
        return max(self.min_clients, self.count or 1)

    def size(self, connected: int) -> int:
        """How many updates of so many connected clients make a round. Precondition: connected >= required."""
        if self.count is not None:
            return self.count
        share = 1.0 if self.fraction is None else self.fraction
        return max(self.min_clients, round(share * connected))

    def asked(self, size: int, connected: int) -> int:
        """How many of so many connected clients are asked so that `size` answer."""
        return min(connected, math.ceil(size * self.over_select))

    def needed(self, size: int) -> int:
        """How many updates suffice at the deadline of a round that would have `size`."""
        return size if self.quorum is None else min(self.quorum, size)


class AsynchronousSpec(Settings):
    """FedBuff instead of rounds that wait for a cohort (Nguyen et al. 2022, "Federated learning with buffered asynchronous
    aggregation", Algorithm 1): clients train all the time, each from the newest model when it begins, and every `buffer`
    updates make the next model. A round is then one buffer.
    """

    buffer: Count = Field(default=10, description="updates that make the next model, each of another client")
    concurrency: Count = Field(default=20, description="clients that train at the same time")


class AggregationSpec(Settings):
    """FedAvg's mean: every update counts the same, or as much as the examples behind it.

    Both numbers are the client's own word. `max_weight` and `max_norm` bound what one that lies can do with them.
    """

    weighting: Literal["examples", "uniform"] = "examples"
    max_weight: Annotated[int, Field(ge=1, le=1 << 40)] | None = Field(
        default=None,
        description="examples that one update counts for at most, whatever it says; left out: as many as it says",
    )
    max_norm: float | None = Field(
        default=None, gt=0, description="of each update, the L2 norm of all its numbers; left out: any"
    )
    over_norm: Literal["clip", "refuse"] = Field(
        default="clip", description="an update above max_norm: scale it down to that, or refuse it"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.over_norm == "refuse" and self.max_norm is None:
            raise ValueError("aggregation.over_norm = 'refuse' needs aggregation.max_norm: refuse what is above what?")
        if self.max_weight is not None and self.weighting == "uniform":
            raise ValueError(
                "aggregation.max_weight belongs to weighting = 'examples'; with 'uniform' each counts as one"
            )
        return self

    @property
    def clips_at(self) -> float | None:
        """The norm to which a longer update is scaled down; None if none is."""
        return self.max_norm if self.over_norm == "clip" else None

    @property
    def refuses_above(self) -> float | None:
        """The norm above which an update is refused; None if none is."""
        return self.max_norm if self.over_norm == "refuse" else None


class EvaluationSpec(Settings):
    """Federated evaluation: the connected clients score each new model on their own validation data."""

    every: int = Field(default=1, ge=0, le=1_000_000, description="rounds between evaluations; 0 for none")


class ConvergenceSpec(Settings):
    """Stop before the last round when a metric no longer improves."""

    metric: str = Field(default="loss", description="one of those that the run's task has")
    patience: Count = Field(default=5, description="evaluations without improvement")
    min_delta: float = Field(default=0.0, ge=0, description="a change that counts as improvement")


class DPSpec(Settings):
    """Differential privacy: what is clipped, who adds noise where, and how much may be spent (see `seqfed.common.dp`)."""

    mode: Literal["central", "distributed", "local", "example"] = Field(
        description="noise on the sum by the server; on the sum by all clients together, inside secure aggregation; on each "
        "update by its client; on each step's gradients by the client, for single examples (DP-SGD)"
    )
    mechanism: Literal["gaussian", "ftrl"] = Field(
        default="gaussian",
        description="of central: fresh noise each round; or that of a tree over the rounds, which claims nothing of sampling",
    )
    epsilon: Annotated[float, Field(gt=0, le=100)] | None = Field(
        default=None, description="the most that the run may spend; no round begins that would pass it"
    )
    delta: float = Field(gt=0, le=0.01, description="chance beyond epsilon; well below one in the number of clients")
    noise_multiplier: Annotated[float, Field(ge=0.05, le=1e6)] | None = Field(
        default=None, description="deviation of the noise in units of the clip; left out: solved for from epsilon"
    )
    clip: Annotated[float, Field(gt=0, le=1e6)] | Literal["adaptive"] = Field(
        default=1.0,
        description="L2 norm to which each update (example: each gradient) is scaled down; adaptive: the median of the norms",
    )
    population: Annotated[int, Field(ge=1, le=1 << 40)] | None = Field(
        default=None,
        description="draw each connected client by itself, secretly, with probability cohort.count / population; "
        "left out: whoever, and nothing is claimed of sampling",
    )
    participations: Count | None = Field(
        default=None, description="of ftrl: rounds that one client takes part in at most; left out: all"
    )
    colluding: Annotated[int, Field(ge=0, le=100_000)] | None = Field(
        default=None,
        description="of distributed: clients in a sum whose noise is not counted on, since whoever attacks knows it; left out: "
        "1, as each client knows its own; 0: against the server alone",
    )
    evaluation: Literal["refuse", "public"] = Field(
        default="refuse",
        description="what is told of clients' data without noise (metrics, training losses, statistics): nothing; or all, "
        "as the report then says",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError(
                "privacy.dp needs epsilon, the goal, or noise_multiplier; nothing is private without either"
            )
        for name, fits, owner in (
            ("mechanism", self.mechanism == "gaussian" or self.mode == "central", "mode = 'central'"),
            ("population", self.population is None or self._plain_central, "mode = 'central', mechanism = 'gaussian'"),
            ("clip = 'adaptive'", self.clip != "adaptive" or self._plain_central, "mode = 'central', mechanism = 'gaussian'"),
            ("participations", self.participations is None or self.mechanism == "ftrl", "mechanism = 'ftrl'"),
            # 0 is what earlier versions wrote for every mode
            ("colluding", not self.colluding or self.mode == "distributed", "mode = 'distributed'"),
        ):  # fmt: skip
            if not fits:
                raise ValueError(f"privacy.dp.{name} belongs to {owner}")
        return self

    @property
    def _plain_central(self) -> bool:
        return self.mode == "central" and self.mechanism == "gaussian"

    @property
    def first_clip(self) -> float:
        """The clip of the first round; the adaptive one begins low, where it grows quickly (Andrew et al. 2021, 3.2)."""
        return 0.1 if isinstance(self.clip, str) else self.clip

    @property
    def known(self) -> int:
        """Clients of a sum whose noise is not counted on."""
        return 1 if self.colluding is None else self.colluding

    @property
    def is_public(self) -> bool:
        """Whether numbers made of clients' data are told without noise."""
        return self.evaluation == "public"


class PrivacySpec(Settings):
    """What keeps the server from learning more of a client than it must (see `seqfed.common.masking`)."""

    secure_aggregation: bool = Field(
        default=False,
        description="the server learns the sums over a round's clients, and no one client's update, loss or scores",
    )
    mode: Literal["malicious", "semi_honest"] = Field(
        default="malicious",
        description="against a server that lies (two thirds of the clients must stay to the end), or one that only looks (half)",
    )
    min_survivors: int = Field(default=3, ge=2, le=100_000, description="smallest number of clients in a sum")
    b: Literal[4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 24, 32] = Field(
        default=16,
        description="bits a parameter in an upload; with compression.wrap and left out: those with the least noise",
    )
    clip: float = Field(
        default=10.0, gt=0, le=1e6, description="L2 norm of an update above which the client scales it down to that"
    )
    drop: float = Field(
        default=0.05,
        ge=0,
        lt=0.5,
        description="share of clients that may leave in the course of one sum, for large cohorts",
    )
    step_s: float = Field(default=60.0, gt=0, le=86_400, description="seconds that a client may take for one step")
    homomorphic: bool = Field(
        default=False,
        description="sums of ciphertexts under a key that the clients share, in place of masks; for small models, and a server "
        "that does not lie",
    )
    dp: DPSpec | None = Field(default=None, description="differential privacy; left out: none")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.secure_aggregation and self.model_copy(update={"dp": None}) != PrivacySpec.model_construct():
            raise ValueError(
                "privacy.mode, min_survivors, b, clip, drop, step_s and homomorphic are of secure_aggregation = true; set it"
            )
        if self.homomorphic and self.mode != "semi_honest":
            raise ValueError(
                "privacy.homomorphic = true holds against a server that looks, not against one that lies: it could have a client "
                "decrypt another's numbers; set privacy.mode = 'semi_honest', or use masks"
            )
        if self.dp is not None:
            self._check_dp(self.dp)
        return self

    def _check_dp(self, dp: DPSpec) -> None:
        """Raise ValueError where differential privacy and secure aggregation contradict each other."""
        if dp.mode == "distributed":
            if not self.secure_aggregation:
                raise ValueError(
                    "privacy.dp.mode = 'distributed' hides each client's small noise in a sum; it needs "
                    "privacy.secure_aggregation = true"
                )
            if self.b < 16:
                raise ValueError(
                    f"privacy.b = {self.b}: the noise of privacy.dp.mode = 'distributed' needs b = 16 or more to keep its scale"
                )
            if dp.known >= self.min_survivors:
                raise ValueError(
                    f"privacy.dp.colluding ({dp.known}) leaves nobody of privacy.min_survivors ({self.min_survivors}) to "
                    "add noise; raise min_survivors"
                )
        if self.secure_aggregation and dp.population is not None:
            raise ValueError(
                "privacy.dp.population: each client that is drawn for a masked sum learns who else was, so nothing is gained by "
                "drawing in secret; drop population, or secure_aggregation"
            )
        if self.homomorphic and dp.mode == "central":
            raise ValueError(
                "privacy.dp.mode = 'central': the clients that open an encrypted sum see it before the server adds noise; use "
                "'distributed', or masks"
            )
        if self.secure_aggregation and dp.clip == "adaptive":
            raise ValueError(
                "privacy.dp.clip = 'adaptive': under secure aggregation the clients clip, and no task tells them a clip that "
                "moves; set a number"
            )
        # The default stands in every canonical text, so it cannot be told from a clip that was left out.
        if self.secure_aggregation and self.clip not in {self.bound, PrivacySpec.model_fields["clip"].default}:
            raise ValueError(
                f"privacy.clip ({self.clip:g}) and privacy.dp.clip ({self.bound:g}) are two bounds of one norm; drop "
                "privacy.clip"
            )

    @property
    def bound(self) -> float:
        """The L2 norm that a client's update in a masked sum has at most."""
        if self.dp is not None and self.dp.mode in {"central", "distributed"} and not isinstance(self.dp.clip, str):
            return self.dp.clip
        return self.clip


class CompressionSpec(Settings):
    """Fewer bytes for updates and models (see `seqfed.common.compression`)."""

    upload: Literal["none", "rotq8", "rotq4", "eden1", "topk", "powersgd", "rotsub", "auto"] = Field(
        default="none",
        description="an update as: float32; 8, 4 or 1 bit of rotated numbers; the largest; of lower rank; a part that masked "
        "sums can be of; what fits model, link and masking",
    )
    fraction: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share that is sent of rotated (eden1: 0.16 if left out; rotsub: 0.1) or largest numbers (topk: 0.02)",
    )
    bits: Literal[1, 8] | None = Field(default=None, description="of topk: a number's sign (if left out), or a byte")
    wrap: Annotated[float, Field(ge=1e-12, le=0.01)] | None = Field(
        default=None,
        description="of rotsub: chance that a number of a sum wraps, with which 4 to 6 bits a number suffice, as the last sum "
        "tells: 6e-5, say; left out: none ever does",
    )
    rank: Annotated[int, Field(ge=1, le=1 << 10)] | None = Field(
        default=None, description="of powersgd: of what stands for a matrix; 4 if left out"
    )
    download: Literal["none", "delta8", "delta4", "auto"] = Field(
        default="none",
        description="a new model as: float32; 8 or 4 bits a number of its difference to the last; what fits its size",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, owners in (
            ("fraction", ("eden1", "rotsub", "topk")),
            ("bits", ("topk",)),
            ("wrap", ("rotsub",)),
            ("rank", ("powersgd",)),
        ):
            if getattr(self, name) is not None and self.upload not in owners:
                fitting = " or ".join(f"'{one}'" for one in owners)
                raise ValueError(f"compression.{name} belongs to upload = {fitting}, not to '{self.upload}'; drop it")
        return self

    @property
    def feeds_back(self) -> bool:
        """Whether a client sends with its next update what it left out of the last one."""
        return self.upload in {"topk", "powersgd"}


class RunSpec(Settings):
    """One training job. Its canonical JSON is what travels, and its digest stands in every model file.

    One that was read from JSON keeps that text to the byte as its canonical one: it is what its operator has signed, and a
    version of seqfed that knows more keys would write another.
    """

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="1 to 64 of A-Z a-z 0-9 . _ -")
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    rounds: Count = 10
    data: DataSpec
    task: TaskSpec = TaskSpec()
    model: ModelSpec = ModelSpec()
    training: TrainingSpec = TrainingSpec()
    cohort: CohortSpec = CohortSpec()
    asynchronous: AsynchronousSpec | None = None
    aggregation: AggregationSpec = AggregationSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    convergence: ConvergenceSpec | None = None
    privacy: PrivacySpec = PrivacySpec()
    compression: CompressionSpec = CompressionSpec()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.privacy.secure_aggregation:
            self._check_secure()
        if self.privacy.dp is not None:
            self._check_private(self.privacy.dp)
        self._check_compressed()
        if self.convergence is not None and self.evaluation.every == 0:
            raise ValueError("convergence needs evaluations; set evaluation.every to 1 or more")
        self._check_task()
        if self.asynchronous is not None:
            self._check_asynchronous(self.asynchronous)
        return self

    def _check_asynchronous(self, wanted: AsynchronousSpec) -> None:
        """Raise ValueError if the cohort's settings contradict the buffer's."""
        cohort = self.cohort
        if wanted.buffer > min(cohort.min_clients, wanted.concurrency):
            raise ValueError(
                f"asynchronous.buffer ({wanted.buffer}) is more than cohort.min_clients ({cohort.min_clients}) or "
                f"asynchronous.concurrency ({wanted.concurrency}); a client fills one place of it, so raise those"
            )
        if cohort.count is not None or cohort.fraction is not None or cohort.over_select != 1.0:
            raise ValueError(
                "cohort.count, fraction and over_select choose a round's cohort, and an asynchronous run has none; drop them"
            )
        if cohort.quorum is not None and cohort.quorum > wanted.buffer:
            raise ValueError(f"cohort.quorum ({cohort.quorum}) is more than asynchronous.buffer ({wanted.buffer})")

    def _check_secure(self) -> None:
        """Raise ValueError where a setting needs what secure aggregation hides."""
        single = "secure aggregation shows the server no single update"
        if self.asynchronous is not None:
            raise ValueError(
                f"[asynchronous]: {single}, and a sum needs its clients at the same time; drop one of the two"
            )
        if self.cohort.late == "fold":
            raise ValueError(f"cohort.late = 'fold': {single}, so none can be added later; use late = 'drop'")
        if self.aggregation.max_norm is not None:
            raise ValueError(
                f"aggregation.max_norm: {single}, so it can check no norm; privacy.clip bounds it at the client"
            )
        if self.aggregation.weighting == "examples" and self.aggregation.max_weight is None:
            raise ValueError(
                "secure aggregation needs to know the largest weight beforehand: set aggregation.max_weight (examples that "
                "one client counts for at most), or aggregation.weighting = 'uniform'"
            )
        if self.privacy.min_survivors > self.smallest_sum:
            raise ValueError(
                f"privacy.min_survivors ({self.privacy.min_survivors}) is more than a round may have "
                f"({self.smallest_sum}); raise cohort.min_clients and quorum, or lower it"
            )

    def _check_compressed(self) -> None:
        """Raise ValueError for a compression that does not go with what keeps updates private."""
        upload, dp = self.compression.upload, self.privacy.dp
        if not self.privacy.secure_aggregation:
            if upload == "rotsub":
                raise ValueError(
                    "compression.upload = 'rotsub' sends the same part of all updates, for masked sums; without "
                    f"privacy.secure_aggregation use '{'eden1' if self.measured_by is None else 'rotq4'}'"
                )
        elif upload in LEVELS:
            # The default stands in every canonical text, so it cannot be told from a number that was left out.
            if self.privacy.b != PrivacySpec.model_fields["b"].default:
                raise ValueError(
                    f"privacy.b = {self.privacy.b}: with compression.upload = '{upload}' a round's sum takes as many bits as "
                    f"{LEVELS[upload]} levels of each of its clients need; drop privacy.b, or use upload = 'none'"
                )
        elif upload == "eden1":
            raise ValueError(
                "compression.upload = 'eden1': each client sends another part of its update, which no masked sum can be of; use "
                "'rotsub'"
            )
        elif upload == "topk":
            raise ValueError(
                "compression.upload = 'topk' needs the server to see which numbers are sent; in masked sums use 'rotsub'"
            )
        if self.measured_by is not None:
            self._check_measured(self.measured_by)
        if dp is None:
            return
        if upload in (*LEVELS, "rotsub") and self.privacy.secure_aggregation and dp.mode in {"central", "distributed"}:
            raise ValueError(
                f"compression.upload = '{upload}': the noise of privacy.dp.mode = '{dp.mode}' is for all numbers of a masked "
                "sum, in its own steps; use 'none'"
            )

    def _check_measured(self, by: str) -> None:
        """Raise ValueError for an upload whose length is not the update's, where a setting is for that."""
        upload, use = self.compression.upload, "'none'" if self.privacy.secure_aggregation else "'rotq8' or 'rotq4'"
        if upload == "eden1":
            raise ValueError(
                "compression.upload = 'eden1': what the server decodes is some three times as long as the update, for which "
                f"{by} is set; use {use}"
            )
        if self.compression.feeds_back:
            why = (
                "privacy.dp counts on each client's clipped update of this round alone"
                if self.privacy.dp is not None
                else f"no client hears what {by} takes off"
            )
            raise ValueError(
                f"compression.upload = '{upload}' sends what it left out of earlier updates, and {why}; use {use}"
            )

    def _check_private(self, dp: DPSpec) -> None:
        """Raise ValueError where a setting breaks what the accounting of differential privacy assumes."""
        if self.aggregation.weighting != "uniform":
            raise ValueError(
                "privacy.dp needs aggregation.weighting = 'uniform': with clients' own weights no clip bounds what one of them "
                "does to the mean"
            )
        if self.asynchronous is not None or self.cohort.late == "fold":
            what = "[asynchronous]" if self.asynchronous is not None else "cohort.late = 'fold'"
            raise ValueError(
                f"{what}: privacy.dp counts each update in the round of its cohort, and a late one has none; drop one of the two"
            )
        if self.aggregation.max_norm is not None:
            raise ValueError(
                "aggregation.max_norm: privacy.dp.clip is the one bound of an update's norm; drop max_norm"
            )
        if not dp.is_public:
            self._check_silent()
        if dp.mode == "example":
            self._check_example()
        if dp.mode == "distributed" and self.cohort.count is None:
            raise ValueError(
                "privacy.dp.mode = 'distributed' fixes the noise's scale for a number of clients beforehand; set cohort.count"
            )
        if dp.participations is not None and dp.participations > self.rounds:
            raise ValueError(
                f"privacy.dp.participations ({dp.participations}) is more than rounds ({self.rounds}); drop it"
            )
        if dp.population is not None:
            self._check_population(dp.population)

    def _check_silent(self) -> None:
        """Raise ValueError if numbers of clients' data would be told without noise."""
        if self.evaluation.every:
            raise ValueError(
                f"evaluation.every = {self.evaluation.every}: metrics of clients' data are told without noise, which privacy.dp "
                "does not count; set evaluation.every = 0, or privacy.dp.evaluation = 'public' to tell them as not private"
            )
        if self.data.normalise == "federated":
            raise ValueError(
                "data.normalise = 'federated': mean and scale of clients' data are told without noise, which privacy.dp does "
                "not count; write them into [data], or set privacy.dp.evaluation = 'public' to tell them as not private"
            )

    def _check_example(self) -> None:
        """Raise ValueError if a training would use one example otherwise than DP-SGD does."""
        if self.training.truncate is not None:
            raise ValueError(
                "training.truncate: privacy.dp.mode = 'example' clips one gradient a sequence, not one a piece; drop truncate"
            )
        if self.model.custom is not None:
            raise ValueError(
                "model.custom: privacy.dp.mode = 'example' needs single examples' gradients, which it has of the built-in models"
            )

    def _check_population(self, population: int) -> None:
        """Raise ValueError unless cohorts can be drawn as the amplification by sampling assumes."""
        cohort = self.cohort
        if cohort.count is None or cohort.quorum is None:
            raise ValueError(
                "privacy.dp.population draws each client with probability cohort.count / population, so a cohort's size varies; "
                "set cohort.count, its mean, and a cohort.quorum well below"
            )
        if cohort.over_select != 1.0:
            raise ValueError(
                "cohort.over_select: privacy.dp.population counts everybody who is drawn, and takes all answers; drop one"
            )
        if not cohort.count <= population <= cohort.min_clients:
            raise ValueError(
                f"privacy.dp.population ({population:,}) must be from cohort.count ({cohort.count:,}) to cohort.min_clients "
                f"({cohort.min_clients:,}), the clients that are there before a round begins; raise min_clients"
            )

    @property
    def smallest_sum(self) -> int:
        """The fewest clients whose updates can make a new model of this run."""
        if self.asynchronous is not None:
            return self.cohort.needed(self.asynchronous.buffer)
        return self.cohort.needed(self.cohort.min_clients if self.cohort.count is None else self.cohort.count)

    @property
    def measured_by(self) -> str | None:
        """The setting that is for the length of each update; None if there is none."""
        if self.privacy.dp is not None:
            return "privacy.dp"
        return None if self.aggregation.max_norm is None else "aggregation.max_norm"

    @property
    def folds_late(self) -> bool:
        """Whether an update of an earlier round still counts."""
        return self.asynchronous is not None or self.cohort.late == "fold"

    def _check_task(self) -> None:
        """Raise ValueError unless the data have what the task needs."""
        data, kind = self.data, self.task.kind
        if kind == "classification" and not data.class_count:
            raise ValueError("a classification task needs data.classes or data.labels")
        if kind in {"multilabel", "regression"} and data.targets is None:
            raise ValueError(f"a {kind} task needs data.targets, the number of its labels")
        if kind in {"forecast", "anomaly"} and (data.vocabulary is not None or data.stride is None):
            raise ValueError(
                f"a {kind} task needs windows of numbers: data.columns or features, data.steps, data.stride"
            )
        if kind in {"forecast", "anomaly", "next_token"} and data.horizon:
            ahead = "task.horizon" if kind == "forecast" else "no horizon"
            raise ValueError(f"data.horizon is of labels, and a {kind} task has none; use {ahead}")
        if kind == "next_token" and (data.vocabulary is None or data.steps is None):
            raise ValueError("a next_token task needs data.vocabulary and data.steps")
        if kind == "next_token" and (self.model.bidirectional or self.model.pooling != "last"):
            raise ValueError("a next_token model may not see the tokens to come: no bidirectional, no pooling")
        if self.training.truncate is not None and (self.model.bidirectional or self.model.custom):
            raise ValueError("training.truncate needs a built-in model that reads in one direction; drop it")
        weights = self.task.class_weights
        due = data.targets if kind == "multilabel" else data.class_count
        if weights is not None and len(weights) != due:
            raise ValueError(f"task.class_weights has {len(weights)} numbers, the task has {due} classes or labels")

    @property
    def outputs(self) -> int:
        """Numbers that the network puts out: a sequence, or for next_token a step."""
        match self.task.kind:
            case "classification":
                return self.data.class_count
            case "multilabel" | "regression":
                return self.data.targets or 0
            case "next_token":
                return self.data.inputs
            case _:
                return self.task.horizon * self.data.numbers

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """The specification of this text, which it keeps; raises pydantic's ValidationError."""
        found = super().model_validate_json(json_data, **options)
        vars(found)["canonical"] = json_data.encode() if isinstance(json_data, str) else bytes(json_data)
        return found

    @cached_property
    def canonical(self) -> bytes:
        """The one JSON text of this specification: the one that it was read from, or as this version writes it."""
        return self.model_dump_json().encode()

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hex."""
        return hashlib.sha256(self.canonical).hexdigest()
