"""A federated run's model: of no use before its mean and scale are known, and afterwards as if they had been given."""

from __future__ import annotations

from pathlib import Path

import pytest

from seqfed.client.model_file import read_model
from seqfed.common import checkpoint
from seqfed.common.errors import CheckpointError
from seqfed.common.model import initial_parameters
from seqfed.common.spec import RunSpec
from seqfed.common.statistics import Statistics, applied


def saved(run: RunSpec, path: Path) -> Path:
    metadata = {"spec": run.canonical.decode(), "spec_digest": run.digest}
    return checkpoint.save(path, initial_parameters(run), metadata).path


def test_a_model_carries_the_mean_and_scale_that_its_run_has_found(tmp_path: Path) -> None:
    data = {"columns": ["a", "b"], "classes": 2, "missing": "mean", "normalise": "federated"}
    run = RunSpec.model_validate({"data": data})
    with pytest.raises(CheckpointError, match="before the run had found the mean and scale.* once a round has ended"):
        read_model(saved(run, tmp_path / "early.safetensors"))
    found = applied(run, Statistics(mean=(1 / 3, -2e12), scale=(1e-9, 7.0)))
    assert read_model(saved(found, tmp_path / "model.safetensors")).spec == found
