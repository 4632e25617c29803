"""A run's model as it was exported: its numbers, and the specification in the file's header that says what they are of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from seqfed.common import checkpoint
from seqfed.common.config import validate_json
from seqfed.common.errors import CheckpointError, ConfigError
from seqfed.common.layout import Parameters
from seqfed.common.model import layout_of
from seqfed.common.spec import RunSpec


@dataclass(frozen=True, eq=False)
class Model:
    """What `seqfed export` writes. metadata: run, round, spec, spec_digest and layout_digest, as they stand in the file."""

    spec: RunSpec
    parameters: Parameters
    metadata: Mapping[str, str]


def read_model(path: Path) -> Model:
    """The model in a safetensors file that was exported from a run.

    Raises CheckpointError for a file that carries no specification, another one than its digest says, one without the
    mean and scale that the run was to find, or other tensors.
    """
    try:
        metadata = checkpoint.read_metadata(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; use the one that `seqfed export --format safetensors` writes") from error
    text = metadata.get("spec")
    if text is None:
        raise CheckpointError(
            f"{path}: has no run specification, which says what its numbers are of; use a file that `seqfed export` wrote"
        )
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get("spec_digest"):
        raise CheckpointError(f"{path}: its run specification is not the one of its digest; export the run again")
    try:
        spec = validate_json(RunSpec, text.encode(), str(path))
        layout = layout_of(spec)
    except ConfigError as error:
        raise CheckpointError(
            f"{error}; this version of seqfed does not read the file's run specification, use the one that wrote it"
        ) from error
    if spec.data.normalise == "federated":
        raise CheckpointError(
            f"{path}: was written before the run had found the mean and scale of its columns (data.normalise = 'federated'), "
            "so its numbers mean nothing yet; export the run once a round has ended"
        )
    if metadata.get("layout_digest") != layout.digest.hex():
        raise CheckpointError(f"{path}: its tensors are not those of its run specification; export the run again")
    return Model(spec, checkpoint.load(path, layout), metadata)
