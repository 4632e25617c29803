"""What a run's settings say of its payloads: the server and every client come to the same by this alone.

`upload = "auto"` lets a client choose, by the size of the model and by what its link has carried: float32 where a second
carries it, else 8, 4 or 1 bit a number, each a good deal more noise than the one before. All of these keep nothing at the
client, so that it may choose anew each time. For masked sums all clients would have to choose alike, and know only the model's
size: there it is `none`, in `privacy.b` bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from seqfed.common.compression import header
from seqfed.common.compression.codec import NAMES, Codec
from seqfed.common.errors import MalformedPayload

if TYPE_CHECKING:
    from seqfed.common.spec import RunSpec

AUTOMATIC: Final = ("none", "rotq8", "rotq4", "eden1")  # by falling number of bytes
BYTES_OF: Final = {"none": 4.0, "rotq8": 1.0, "rotq4": 0.5}  # a number, of those before the last
PATIENCE_S: Final = 1.0  # what an upload may take before it is worth noise to shorten it
WORTH: Final = 1 << 10  # numbers of a model: with fewer a message costs as much as what it carries
LARGE: Final = 1 << 16  # numbers of a model; a download's codec goes by them alone, since it is the same on all links
ROTSUB: Final = 0.1  # of the rotated numbers


def uploads(spec: RunSpec) -> dict[str, Codec]:
    """The codecs that a payload may be of, by name; none where updates come as they are, or masked."""
    given = spec.compression
    if given.upload == "none" or spec.privacy.secure_aggregation:
        return {}
    names: tuple[str, ...] = (given.upload,)
    if given.upload == "auto":  # what decodes from a bit a number is far longer than the update
        names = AUTOMATIC if spec.measured_by is None else AUTOMATIC[:-1]
    return {name: Codec(name, given.fraction or 0.0, given.bits or 0, given.rank or 0) for name in names}


def chosen(spec: RunSpec, size: int, bytes_per_s: float) -> Codec | None:
    """What a client makes of an update of `size` numbers; None if it sends it as it is.

    bytes_per_s: that its way up carries (`transfer.Pace`).
    """
    allowed = uploads(spec)
    if len(allowed) < 2:
        return next(iter(allowed.values()), None)
    fitting = (name for name, each in BYTES_OF.items() if size * each <= PATIENCE_S * bytes_per_s)
    return allowed["none" if size < WORTH else next(fitting, list(allowed)[-1])]


def named(spec: RunSpec, name: str) -> Codec:
    """The run's codec of this name; raises MalformedPayload if the run has none."""
    allowed = uploads(spec)
    if name not in allowed:
        due = f"payloads of {' or '.join(allowed)}" if allowed else "the numbers themselves"
        came = f"a payload of codec {name[:32]!r}" if name else "plain numbers"
        raise MalformedPayload(f"an update came as {came}; this run takes {due}")
    return allowed[name]


def of_payload(spec: RunSpec, payload: bytes | memoryview) -> Codec:
    """The codec that a payload says it is of; raises MalformedPayload unless the run allows it."""
    number = payload[len(header.MAGIC)] if len(payload) > len(header.MAGIC) else len(NAMES)
    return named(spec, NAMES[number] if number < len(NAMES) else f"number {number}")


def part_sent(spec: RunSpec, size: int) -> float:
    """Share of an update's rotated numbers that goes into a masked sum; 1 for all of them, as they stand."""
    given = spec.compression
    return (given.fraction or ROTSUB) if given.upload == "rotsub" else 1.0


def download(spec: RunSpec, size: int) -> Codec | None:
    """What a new model's difference to the one before is sent by; None if the model is sent."""
    name = spec.compression.download
    if name == "auto":
        name = "delta8" if size >= LARGE else "none"
    return None if name == "none" else Codec(name)
