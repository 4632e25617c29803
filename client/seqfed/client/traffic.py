"""What a task moves at most: its model or the steps to it, its update as the run's codec makes it, and all of a masked sum.

Reckoned before anything moves, from what the operator has signed and the server announces: a budget is asked beforehand. Left out
are the tasks themselves, the sums of an evaluation that is not masked, words about the progress, and what a broken connection has
sent twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from seqfed.common.compression import largest
from seqfed.common.compression.chosen import uploads
from seqfed.common.errors import SeqfedError
from seqfed.common.homomorphic import scheme
from seqfed.common.layout import BYTES_PER_PARAMETER
from seqfed.common.masking import graph
from seqfed.common.masking.agreed import scalar_names, vector_of
from seqfed.common.masking.messages import COMMITMENTS, OPENED, SEALED
from seqfed.common.masking.packing import packed_bytes
from seqfed.common.masking.terms import Purpose, Terms
from seqfed.common.model import layout_of
from seqfed.common.spec import RunSpec
from seqfed.common.views import ModelStep, ModelVersion, Task, TaskKind

NAME: Final = 64  # bytes of a client's name at most
ENTRY: Final = NAME + 10  # of a protobuf map, beside its value
SIGNED: Final = 64 + ENTRY
ADVERT: Final = 4 * 34 + 74 + 64 + ENTRY  # three keys, a digest's room, its binding, its signature and name
FIXED: Final = 2000  # of a masked sum's messages: their keys and framing, whoever else takes part


def most(task: Task, holds: bytes = b"") -> int:
    """Bytes of this task, both ways. holds: BLAKE3 of the model that the client has."""
    down = 0 if task.kind is TaskKind.MEASURE else _down(task.model, holds)
    return down + answer(task)


def answer(task: Task) -> int:
    """Bytes of what a task is answered with; of a masked sum all that its parties say and hear.

    Where the run's settings cannot be followed, those of the model: the task itself then fails.
    """
    spec = task.spec
    try:
        if spec.privacy.secure_aggregation:
            return _masked(task)
        return _update(spec, task.model.nbytes) if task.kind is TaskKind.TRAIN else 0
    except SeqfedError:
        return task.model.nbytes


def _down(model: ModelVersion, holds: bytes) -> int:
    if holds == model.digest:
        return 0
    return sum(one.nbytes for one in missed(model, holds)) or model.nbytes


def missed(model: ModelVersion, holds: bytes) -> Sequence[ModelStep]:
    """The steps to the model from the one that is held; none if they do not begin there, or are longer than the model."""
    place = next((at for at, one in enumerate(model.steps) if one.base == holds), len(model.steps))
    steps = model.steps[place:]
    return steps if sum(one.nbytes for one in steps) <= model.nbytes else ()


def _update(spec: RunSpec, nbytes: int) -> int:
    """The largest that one of the run's codecs makes."""
    allowed = uploads(spec)
    return max(largest(one, layout_of(spec)) for one in allowed.values()) if allowed else nbytes


def _masked(task: Task) -> int:
    spec, n, purpose = task.spec, 2 if task.masking is None else task.masking.n_max, Purpose(task.kind.value)
    size = task.model.nbytes // BYTES_PER_PARAMETER if purpose is Purpose.TRAIN else 0
    dim, bits = vector_of(spec, size, task.key.round, n)
    scalars = len(scalar_names(spec, purpose))
    numbers = packed_bytes(dim, bits) + 8 * scalars
    known = 0 if task.masking is None else len(task.masking.known)
    if not spec.privacy.homomorphic:
        return known + numbers + _messages(spec, n, len(task.certificate))
    form = scheme.Form(
        Terms(
            *("", 1, 1, 1, purpose),
            dim,
            bits,
            0,
            n,
            2,
            malicious=False,
            drop=0,
            scalars=scalars,
            codec="",
            model=b"",
            settings=b"",
        )
    )
    # Its own ciphertexts; and, if it is one of the two who open the sum, that one's, and what it comes to.
    return known + 2 * form.nbytes + numbers + n * ENTRY + FIXED


def _messages(spec: RunSpec, n: int, certificate: int) -> int:
    """Of a masked sum of n clients, beside the numbers; certificate: bytes of one, about, which all have or none."""
    near, _ = graph.parameters(n, spec.privacy.mode == "malicious", spec.privacy.drop)
    advert, sealed = ADVERT + certificate, near * (SEALED + ENTRY)
    up = advert + sealed + (near + 1) * (COMMITMENTS + OPENED + 2 * ENTRY)
    down = n * (advert + SIGNED) + sealed
    return up + down + FIXED
