"""What a run's settings say of each of its masked sums: the server and every client come to the same by this alone."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

from seqfed.common import metrics, seeds, statistics
from seqfed.common.compression import rotsub
from seqfed.common.compression.chosen import part_sent
from seqfed.common.compression.pieces import drawn
from seqfed.common.errors import ConfigError, MaskingRefused
from seqfed.common.masking.terms import Purpose, Terms
from seqfed.common.quantising import CODEC, Lattice, levels

if TYPE_CHECKING:
    from seqfed.common.compression.rotsub import Part
    from seqfed.common.dp.skellam import Mechanism
    from seqfed.common.spec import RunSpec
    from seqfed.common.views import TaskKey


def terms_of(
    spec: RunSpec, key: TaskKey, purpose: Purpose, number: int, n_max: int, model: bytes, measured: bytes, dim: int
) -> Terms:
    """The terms of the run's masked sum of this number over at most n_max clients.

    spec: as the operator has signed it. model: BLAKE3 of its bytes. measured: the run's statistics as they travel, empty
    before there are any. dim: numbers in the update; of a training only. Raises MaskingRefused if they cannot be, ConfigError if
    n_max clients, or their noise, are too many for privacy.b.
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
        dim=_sent(spec, dim),
        bits=private.b,
        levels=levels(private.b, n_max) if dim else 0,
        n_max=n_max,
        min_survivors=private.min_survivors,
        malicious=private.mode == "malicious",
        drop=private.drop,
        scalars=len(scalar_names(spec, purpose)),
        codec=_codec(spec, dim) if dim else "",
        model=b"" if purpose is Purpose.MEASURE else model,
        settings=hashlib.sha256(len(canonical).to_bytes(8, "little") + canonical + measured).digest(),
    )
    terms.check()
    if dim:
        mechanism_of(spec, terms)
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
    """How the vector is made of an update that needs no mechanism, and goes whole. Precondition: terms.dim > 0."""
    return Lattice(terms.dim, terms.bits, terms.levels, _clip(spec, terms.dim))


def part_of(spec: RunSpec, terms: Terms, size: int) -> Part | None:
    """How the vector is made of a part of an update of `size` numbers; None if it goes whole."""
    if terms.codec != rotsub.CODEC:
        return None
    return rotsub.bounded(size, part_sent(spec, size), terms.bits, terms.n_max, _clip(spec, size))


def _clip(spec: RunSpec, size: int) -> float:
    """The L2 norm that an update of `size` numbers has at most."""
    given, clip = spec.privacy.dp, spec.privacy.bound
    if given is not None and given.mode == "local":
        # room for the client's own noise, whose norm is 1.5 times the expected one in less than one of 2^40 for 100 numbers
        from seqfed.common.dp.accounting import noise_multiplier

        clip = given.first_clip * (1 + 1.5 * (noise_multiplier(spec) or 0.0) * math.sqrt(size))
    return clip


def _sent(spec: RunSpec, size: int) -> int:
    """Numbers of the vector that is made of an update of `size`."""
    if not size or (fraction := part_sent(spec, size)) == 1:
        return size
    run, _, runs = drawn(size, fraction)
    return run * runs


def mechanism_of(spec: RunSpec, terms: Terms) -> Mechanism | None:
    """How the vector is made of an update whose sum gets noise, the server's or the clients'; None if it gets none.

    Precondition: terms.dim > 0. Raises ConfigError if the noise needs more bits than privacy.b.
    """
    given = spec.privacy.dp
    if given is None or given.mode not in {"central", "distributed"}:
        return None
    from seqfed.common.dp import accounting
    from seqfed.common.dp.skellam import Mechanism

    noise = accounting.noise_multiplier(spec)
    assert noise is not None  # there is one in all modes but `example`
    if given.mode == "distributed":
        found = accounting.mechanism(spec, noise)
        if terms.n_max > found.n_max:
            raise MaskingRefused(
                f"a masked sum of up to {terms.n_max} clients, whose noise is counted for {found.n_max} at most"
            )
        return found
    most, nodes = terms.n_max, 1
    if given.mechanism == "ftrl":
        # What one round's noise has added another's takes away, in the same steps, and as many nodes at once.
        if spec.cohort.count is None:
            raise ConfigError(
                "privacy.dp.mechanism = 'ftrl' on masked sums needs the same steps in all rounds; set cohort.count"
            )
        most, nodes = math.ceil(spec.cohort.count * spec.cohort.over_select), spec.rounds.bit_length()
    return Mechanism(terms.dim, terms.bits, spec.privacy.bound, most, most, noise * math.sqrt(nodes))


def _codec(spec: RunSpec, size: int) -> str:
    given = spec.privacy.dp
    if part_sent(spec, size) < 1:
        return rotsub.CODEC
    if given is None or given.mode not in {"central", "distributed"}:
        return CODEC
    from seqfed.common.dp.skellam import CODEC as NOISY

    return NOISY


def rotation_seed(spec: RunSpec, round_: int) -> int:
    """Of the rotation that all updates of a round have in common, or those of all rounds if they share a tree of noise."""
    given = spec.privacy.dp
    return seeds.derive(spec.seed, 0 if given is not None and given.mechanism == "ftrl" else round_, "rotation")
