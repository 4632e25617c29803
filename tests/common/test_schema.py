"""Whether a client's data fit a run."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from seqfed.common.schema import DataSchema, misfit
from seqfed.common.spec import DataSpec


@pytest.mark.parametrize(
    ("run", "steps", "classes", "said"),
    [
        (DataSpec(features=3, classes=4), 7, 4, None),
        (DataSpec(features=3, classes=4), None, 2, None),
        (DataSpec(features=3, classes=4, steps=7), 7, 4, None),
        (DataSpec(features=2, classes=4), 7, 4, "has 3 features a step, the run wants 2"),
        (DataSpec(features=3, classes=4, steps=8), 7, 4, "has 7 steps a sequence, the run wants 8 steps"),
        (DataSpec(features=3, classes=4, steps=8), None, 4, None),
        (DataSpec(features=3, classes=4), 7, 5, "has labels up to 4, the run's end at 3"),
    ],
)
def test_a_misfit_is_said_in_words(run: DataSpec, steps: int | None, classes: int, said: str | None) -> None:
    assert misfit(run, DataSchema(features=3, steps=steps, classes=classes, examples=1)) == said


@pytest.mark.parametrize("change", [{"features": 0}, {"steps": 0}, {"classes": 0}, {"examples": 0}, {"extra": 1}])
def test_an_impossible_schema_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        DataSchema.model_validate({"features": 1, "steps": 1, "classes": 1, "examples": 1, **change})
