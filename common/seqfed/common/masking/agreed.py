"""What a run's settings say of each of its masked sums: the server and every client come to the same by this alone."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from seqfed.common import metrics, seeds, statistics
from seqfed.common.errors import MaskingRefused
from seqfed.common.masking.terms import Purpose, Terms
from seqfed.common.quantising import CODEC, Lattice, levels

if TYPE_CHECKING:
    from seqfed.common.spec import RunSpec
    from seqfed.common.views import TaskKey


def terms_of(
    spec: RunSpec, key: TaskKey, purpose: Purpose, number: int, n_max: int, model: bytes, measured: bytes, dim: int
) -> Terms:
    """The terms of the run's masked sum of this number over at most n_max clients.

    spec: as the operator has signed it. model: BLAKE3 of its bytes. measured: the run's statistics as they travel, empty
    before there are any. dim: numbers in the update; of a training only. Raises MaskingRefused if they cannot be, ConfigError if
    n_max clients are too many for privacy.b.
    """
    if n_max < 2:
        raise MaskingRefused(f"a masked sum of {n_max} clients would hide nothing; it has 2 or more")
    private, canonical = spec.privacy, spec.canonical
    if purpose is not Purpose.TRAIN:
        dim = 0
    terms = Terms(
        run=key.run,
        round=key.round,
        attempt=key.attempt,
        number=number,
        purpose=purpose,
        dim=dim,
        bits=private.b,
        levels=levels(private.b, n_max) if dim else 0,
        n_max=n_max,
        min_survivors=private.min_survivors,
        malicious=private.mode == "malicious",
        drop=private.drop,
        scalars=len(scalar_names(spec, purpose)),
        codec=CODEC if dim else "",
        model=b"" if purpose is Purpose.MEASURE else model,
        settings=hashlib.sha256(len(canonical).to_bytes(8, "little") + canonical + measured).digest(),
    )
    terms.check()
    return terms


def scalar_names(spec: RunSpec, purpose: Purpose) -> tuple[str, ...]:
    """What the masked scalars are, in their order. Of a training: its weight and tally, and how many clients have sent (1) and
    had to clip (0 or 1) an update.
    """
    match purpose:
        case Purpose.TRAIN:
            return ("weight", *sorted(metrics.TRAINED), "clients", "clipped")
        case Purpose.EVALUATE:
            return metrics.names(spec)
        case Purpose.MEASURE:
            return statistics.names(spec)


def largest_weight(spec: RunSpec) -> int:
    """W: what one update counts for at most."""
    given = spec.aggregation
    return 1 if given.weighting == "uniform" or given.max_weight is None else given.max_weight


def weight_of(spec: RunSpec, examples: int) -> int:
    """What an update with so many examples behind it counts for: 1 to W."""
    return max(1, min(examples, largest_weight(spec)))


def lattice_of(spec: RunSpec, terms: Terms) -> Lattice:
    """How the vector is made of an update. Precondition: terms.dim > 0."""
    return Lattice(terms.dim, terms.bits, terms.levels, spec.privacy.clip)


def rotation_seed(spec: RunSpec, round_: int) -> int:
    """Of the rotation that all updates of a round have in common."""
    return seeds.derive(spec.seed, round_, "rotation")
