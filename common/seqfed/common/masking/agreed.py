"""What a run's settings say of each of its masked sums: the server and every client come to the same by this alone."""

from __future__ import annotations

import hashlib
import math
import struct
from typing import TYPE_CHECKING, Final

import numpy as np

from seqfed.common import metrics, seeds, statistics
from seqfed.common.compression import lowrank, rotsub
from seqfed.common.compression.chosen import part_sent
from seqfed.common.compression.pieces import drawn
from seqfed.common.errors import ConfigError, MaskingRefused
from seqfed.common.layout import BYTES_PER_PARAMETER
from seqfed.common.masking.terms import Purpose, Terms, width
from seqfed.common.model import layout_of
from seqfed.common.quantising import CODEC, Lattice, levels, shortened
from seqfed.common.spec import LEVELS
from seqfed.common.transfer import CHUNK_BYTES

if TYPE_CHECKING:
    from seqfed.common.compression.rotsub import Part
    from seqfed.common.dp.skellam import Mechanism
    from seqfed.common.layout import Flat
    from seqfed.common.spec import RunSpec
    from seqfed.common.views import TaskKey

KNOWN: Final = struct.Struct("<d")
RANK: Final = 4


def terms_of(
    spec: RunSpec,
    key: TaskKey,
    purpose: Purpose,
    number: int,
    n_max: int,
    model: bytes,
    measured: bytes,
    dim: int,
    known: bytes = b"",
) -> Terms:
    """The terms of the run's masked sum of this number over at most n_max clients.

    spec: as the operator has signed it. model: BLAKE3 of its bytes. measured: the run's statistics as they travel, empty
    before there are any. dim: numbers in the update; of a training only. known: `known_of` the last one's sum, empty before there
    is any. Raises MaskingRefused if they cannot be, ConfigError if n_max clients, or their noise, are too many for privacy.b.
    """
    if n_max < 2:
        raise MaskingRefused(f"a masked sum of {n_max} clients would hide nothing; it has 2 or more")
    private, canonical = spec.privacy, spec.canonical
    if purpose is not Purpose.TRAIN:
        dim = 0
    bits, most = grid_of(spec, n_max) if dim else (private.b, 0)
    terms = Terms(
        run=key.run,
        round=key.round,
        attempt=key.attempt,
        number=number,
        purpose=purpose,
        dim=_sent(spec, dim, key.round),
        bits=bits,
        levels=most,
        n_max=n_max,
        min_survivors=private.min_survivors,
        malicious=private.mode == "malicious",
        drop=private.drop,
        scalars=len(scalar_names(spec, purpose)),
        codec=_codec(spec, dim) if dim else "",
        model=b"" if purpose is Purpose.MEASURE else model,
        settings=hashlib.sha256(len(canonical).to_bytes(8, "little") + canonical + measured).digest(),
        step=_step(spec, bits, n_max, dim, known),
        known=known,
    )
    terms.check()
    if dim:
        mechanism_of(spec, terms)
        side_of(spec, terms)
    return terms


def grid_of(spec: RunSpec, n_max: int) -> tuple[int, int]:
    """b and L of a sum of at most n_max clients' updates; raises ConfigError if they are too many for it."""
    bits: int = spec.privacy.b
    wrap = spec.compression.wrap
    if spec.compression.upload == "powersgd":
        plan = _plan(spec)
        if (nbytes := BYTES_PER_PARAMETER * max(plan.first, plan.middle)) > CHUNK_BYTES:
            raise ConfigError(
                f"compression.rank = {plan.rank}: each task would bring {nbytes:,} bytes of columns, and {CHUNK_BYTES:,} is the "
                "most; lower it"
            )
    if most := LEVELS.get(spec.compression.upload):
        return width(most, n_max), most
    if wrap is not None:
        if bits == type(spec.privacy).model_fields["b"].default:
            bits = rotsub.bits_of(n_max, wrap)
        rotsub.tuned(1, 1.0, bits, n_max, 1.0, wrap=wrap)
        return bits, (1 << bits - 1) - 1
    return bits, levels(bits, n_max)


def _step(spec: RunSpec, bits: int, n_max: int, dim: int, known: bytes) -> float:
    """Of a sum that is tuned by the last one's; else 0."""
    wrap, upload = spec.compression.wrap, spec.compression.upload
    if wrap is None or not dim:
        if known and (upload != "powersgd" or not dim):
            raise MaskingRefused(f"a masked sum with {len(known)} bytes of the last one's, of which it needs nothing")
        return 0.0
    deviation = None
    if known:
        if len(known) != KNOWN.size or not 0 < (each := KNOWN.unpack(known)[0]) < math.inf:
            raise MaskingRefused("a masked sum whose task does not tell the deviation of the last one's")
        deviation = n_max * each
    return rotsub.tuned(dim, part_sent(spec, dim), bits, n_max, clip_of(spec, dim), deviation, wrap).step


def known_of(deviation: float, n_max: int) -> bytes:
    """What the next sum is tuned by: this one's deviation, as a share of a client's."""
    return KNOWN.pack(deviation / n_max)


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
    return Lattice(terms.dim, terms.bits, terms.levels, clip_of(spec, terms.dim))


def part_of(spec: RunSpec, terms: Terms, size: int) -> Part | None:
    """How the vector is made of a part of an update of `size` numbers; None if it goes whole."""
    if terms.codec != rotsub.CODEC:
        return None
    fraction, clip, wrap = part_sent(spec, size), clip_of(spec, size), spec.compression.wrap
    if wrap is not None:
        return rotsub.Part(size, fraction, terms.bits, terms.levels, clip, terms.step, wrap)
    return rotsub.bounded(size, fraction, terms.bits, terms.n_max, clip)


def side_of(spec: RunSpec, terms: Terms) -> lowrank.Side | None:
    """The factors of the update's matrices that are known; None if it is not of lower rank. Precondition: terms.dim > 0.

    Raises MaskingRefused if what is known are no factors.
    """
    if spec.compression.upload != "powersgd":
        return None
    before = None
    if terms.known:
        plan = _plan(spec)
        due = BYTES_PER_PARAMETER * (plan.middle if terms.round % 2 else plan.first)
        before = np.frombuffer(terms.known[:due], "<f4").astype(np.float32) if len(terms.known) == due else None
        if before is None or not np.isfinite(before).all():
            raise MaskingRefused(f"a masked sum whose task does not tell {due:,} bytes of the last one's columns")
    return lowrank.side(_plan(spec), terms.round, before, spec.seed)


def left_out(spec: RunSpec, terms: Terms, update: Flat) -> Flat:
    """What a sum of lower rank does not have of an update, which comes with the next one."""
    side, (whole, _) = side_of(spec, terms), shortened(update, clip_of(spec, len(update)))
    assert side is not None
    return np.subtract(whole, side.rebuild(side.project(whole)), out=whole)


def _plan(spec: RunSpec) -> lowrank.Plan:
    return lowrank.Plan(layout_of(spec), spec.compression.rank or RANK)


def clip_of(spec: RunSpec, size: int) -> float:
    """The L2 norm that an update of `size` numbers has at most."""
    given, clip = spec.privacy.dp, spec.privacy.bound
    if given is not None and given.mode == "local":
        # room for the client's own noise, whose norm is 1.5 times the expected one in less than one of 2^40 for 100 numbers
        from seqfed.common.dp.accounting import noise_multiplier

        clip = given.first_clip * (1 + 1.5 * (noise_multiplier(spec) or 0.0) * math.sqrt(size))
    return clip


def _sent(spec: RunSpec, size: int, round_: int) -> int:
    """Numbers of the vector that is made of an update of `size`."""
    match _codec(spec, size) if size else "":
        case lowrank.CODEC:
            plan = _plan(spec)
            return (plan.first if round_ % 2 else plan.middle) + plan.whole
        case rotsub.CODEC:
            run, _, runs = drawn(size, part_sent(spec, size))
            return run * runs
        case _:
            return size


def vector_of(spec: RunSpec, size: int, round_: int, n_max: int) -> tuple[int, int]:
    """Numbers, and bits of each, of what is made of an update of `size`; before there are terms. Raises as `grid_of`."""
    return _sent(spec, size, round_), grid_of(spec, n_max)[0]


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
    if spec.compression.upload == "powersgd":
        return lowrank.CODEC
    if part_sent(spec, size) < 1 or spec.compression.wrap is not None:
        return rotsub.CODEC
    if given is None or given.mode not in {"central", "distributed"}:
        return CODEC
    from seqfed.common.dp.skellam import CODEC as NOISY

    return NOISY


def rotation_seed(spec: RunSpec, round_: int) -> int:
    """Of the rotation that all updates of a round have in common, or those of all rounds if they share a tree of noise."""
    given = spec.privacy.dp
    return seeds.derive(spec.seed, 0 if given is not None and given.mechanism == "ftrl" else round_, "rotation")
