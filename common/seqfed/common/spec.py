"""A run's specification: the frozen, validated content of run.toml, the same object on the server and on every client."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, le=1_000_000)]


class Settings(BaseModel):
    """The base of every settings model: frozen, unknown keys refused, no text or truth values for numbers, all finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataSpec(Settings):
    """What every participating client's data must look like."""

    features: Count = Field(description="numbers a step")
    classes: int = Field(ge=2, le=1_000_000, description="labels are 0 to classes - 1")
    steps: Count | None = Field(default=None, description="steps a sequence; left out: any length")


class ModelSpec(Settings):
    """A recurrent network over the steps and a linear layer on the last one."""

    kind: Literal["rnn", "lstm", "gru"] = "lstm"
    hidden: int = Field(default=64, ge=1, le=65_536, description="units a layer")
    layers: int = Field(default=2, ge=1, le=64)


class TrainingSpec(Settings):
    """One client's local training in one round."""

    optimizer: Literal["sgd", "adam"] = "adam"
    learning_rate: float = Field(default=3e-3, gt=0, le=100)
    momentum: float = Field(default=0.0, ge=0, lt=1, description="of sgd")
    batch_size: Count = 32
    epochs: Count | None = Field(
        default=None, description="passes over the client's data a round; 1 if steps is left out too"
    )
    steps: Count | None = Field(default=None, description="batches a round, instead of epochs")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("training.epochs and training.steps exclude each other; keep one")
        if self.optimizer != "sgd" and self.momentum:
            raise ValueError(f"training.momentum belongs to optimizer = 'sgd', not to '{self.optimizer}'")
        return self


class CohortSpec(Settings):
    """Who is asked in a round, and how many must answer until when."""

    min_clients: Count = Field(
        default=2, description="how many fitting clients must be connected before a round begins"
    )
    # None, not 1.0, when left out: the canonical JSON names every key, and read back it must not contradict `count`.
    fraction: float | None = Field(
        default=None, gt=0, le=1, description="of the connected clients, at least min_clients of them; left out: all"
    )
    count: Count | None = Field(default=None, description="clients a round, instead of fraction")
    quorum: Count | None = Field(
        default=None, description="updates that suffice at the deadline; left out: all that were asked"
    )
    deadline_s: float = Field(default=3600.0, gt=0, le=30 * 86_400, description="seconds for a round's training")
    max_attempts: int = Field(default=3, ge=1, le=1000, description="tries at one round before the run fails")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.count is not None and self.fraction is not None:
            raise ValueError("cohort.count and cohort.fraction exclude each other; keep one")
        smallest = self.min_clients if self.count is None else self.count
        if self.quorum is not None and self.quorum > smallest:
            raise ValueError(
                f"cohort.quorum ({self.quorum}) is more than the smallest cohort ({smallest}); lower quorum"
            )
        return self

    @property
    def required(self) -> int:
        """How many fitting clients must be connected before a round begins."""
        return max(self.min_clients, self.count or 1)

    def size(self, connected: int) -> int:
        """How many of so many connected clients are asked. Precondition: connected >= required."""
        if self.count is not None:
            return self.count
        share = 1.0 if self.fraction is None else self.fraction
        return max(self.min_clients, round(share * connected))

    def needed(self, asked: int) -> int:
        """How many updates of so many asked suffice."""
        return asked if self.quorum is None else self.quorum


class AggregationSpec(Settings):
    """FedAvg's mean: every update counts the same, or as much as the examples behind it."""

    weighting: Literal["examples", "uniform"] = "examples"


class EvaluationSpec(Settings):
    """Federated evaluation: the connected clients score each new model on their own validation data."""

    every: int = Field(default=1, ge=0, le=1_000_000, description="rounds between evaluations; 0 for none")


class ConvergenceSpec(Settings):
    """Stop before the last round when a metric no longer improves."""

    metric: Literal["loss", "accuracy"] = "loss"
    patience: Count = Field(default=5, description="evaluations without improvement")
    min_delta: float = Field(default=0.0, ge=0, description="a change that counts as improvement")


class RunSpec(Settings):
    """One training job. Its canonical JSON is what travels, and its digest stands in every model file."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="1 to 64 of A-Z a-z 0-9 . _ -")
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    rounds: Count = 10
    data: DataSpec
    model: ModelSpec = ModelSpec()
    training: TrainingSpec = TrainingSpec()
    cohort: CohortSpec = CohortSpec()
    aggregation: AggregationSpec = AggregationSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    convergence: ConvergenceSpec | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.convergence is not None and self.evaluation.every == 0:
            raise ValueError("convergence needs evaluations; set evaluation.every to 1 or more")
        return self

    @cached_property
    def canonical(self) -> bytes:
        """The one JSON text of this specification."""
        return self.model_dump_json().encode()

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hex."""
        return hashlib.sha256(self.canonical).hexdigest()
