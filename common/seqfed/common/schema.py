"""What a client says of its data when it joins, and whether a run can use them; no value of the data is in it."""

from __future__ import annotations

from pydantic import Field

from seqfed.common.spec import DataSpec, Name, Settings


class DataSchema(Settings):
    """One client's data: arrays have features, steps and classes; tables have columns by name; texts have tokens."""

    features: int | None = Field(default=None, ge=1, le=1_000_000, description="numbers a step; None for texts")
    steps: int | None = Field(
        default=None, ge=1, description="steps of every sequence; None when they differ or are cut"
    )
    classes: int | None = Field(
        default=None, ge=1, le=1_000_000, description="highest label + 1; None if not known yet"
    )
    columns: tuple[Name, ...] | None = Field(
        strict=False,
        default=None,
        max_length=100_000,
        description="a table's columns of numbers; None for arrays and texts",
    )
    categories: tuple[Name, ...] = Field(
        strict=False, default=(), max_length=100_000, description="its columns of text"
    )
    tokens: bool = Field(default=False, description="texts, to be cut into tokens")
    examples: int = Field(ge=1, description="sequences to train on, or rows or texts that are yet to be cut into some")
    validation_examples: int = Field(default=0, ge=0, description="the same, to score models on")


def misfit(data: DataSpec, schema: DataSchema) -> str | None:
    """Why this client's data do not fit the run, in words; None if they fit."""
    if schema.tokens != (data.vocabulary is not None):
        return (
            "has texts, the run wants numbers" if schema.tokens else "has numbers, the run wants texts (a vocabulary)"
        )
    if schema.tokens:
        return None
    if data.columns is not None and schema.columns is not None:
        for kind, wanted, found in (
            ("number", data.columns, schema.columns),
            ("text", tuple(data.categories), schema.categories),
        ):
            lacking = [name for name in wanted if name not in found]
            if lacking:
                return f"has no {kind} column '{lacking[0]}', which the run wants"
        return None
    if schema.features != data.numbers:
        return f"has {schema.features} features a step, the run wants {data.numbers}"
    if schema.steps is not None and data.steps is not None and data.stride is None and schema.steps != data.steps:
        return f"has {schema.steps} steps a sequence, the run wants {data.steps} steps"
    if schema.classes is not None and data.class_count and schema.classes > data.class_count:
        return f"has labels up to {schema.classes - 1}, the run's end at {data.class_count - 1}"
    return None
