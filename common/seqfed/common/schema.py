"""What a client says of its data when it joins, and whether a run can use them; no value of the data is in it."""

from __future__ import annotations

from pydantic import Field

from seqfed.common.spec import DataSpec, Settings


class DataSchema(Settings):
    """The shape of one client's sequences."""

    features: int = Field(ge=1, le=1_000_000, description="numbers a step")
    steps: int | None = Field(ge=1, description="steps of every sequence; None when they differ")
    classes: int = Field(ge=1, le=1_000_000, description="highest label + 1")
    examples: int = Field(ge=1, description="sequences to train on")
    validation_examples: int = Field(default=0, ge=0, description="sequences to score models on")


def misfit(data: DataSpec, schema: DataSchema) -> str | None:
    """Why this client's data do not fit the run, in words; None if they fit."""
    if schema.features != data.features:
        return f"has {schema.features} features a step, the run wants {data.features}"
    if data.steps is not None and schema.steps != data.steps:
        has = "sequences of differing length" if schema.steps is None else f"{schema.steps} steps a sequence"
        return f"has {has}, the run wants {data.steps} steps"
    if schema.classes > data.classes:
        return f"has labels up to {schema.classes - 1}, the run's end at {data.classes - 1}"
    return None
