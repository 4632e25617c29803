"""Downloads by differences: what every client holds is the model, and each new one is the last plus what a payload says.

With `compression.download` a round's mean does not become the next model as it is. The difference between what it would be
and the last model is encoded, once for all clients, and the model is the last plus what decodes of that: the same bits at the
server and at every client that follows, so that all train from, score and export one model, whose digest the tasks announce.
What the payload leaves out lies beside the model (`.rest`) and is encoded with the next difference (error feedback); it is part
of no model. Encoding takes three vectors of the model's size in memory.

The payloads of the last rounds stay (`.delta`), as long as all of them are less than half a model: a client that has missed some
rounds takes as many; one that has missed more, or holds nothing, takes the model whole. Neither file is copied to `--models`: a
server that takes over on another machine sends the model whole once, and begins without a rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from blake3 import blake3

from seqfed.common import checkpoint, views
from seqfed.common.checkpoint import ModelFile, replacing
from seqfed.common.compression import Codec, Key, decode, encode
from seqfed.common.layout import BYTES_PER_PARAMETER, Flat, Layout
from seqfed.common.transfer import CHUNK_BYTES

MOST: Final = 8  # payloads that are kept: each task names them all
SHARE: Final = 0.5  # of a model's bytes, that they have together at most


@dataclass(frozen=True)
class Step:
    """The payload that leads to the model of this version. base: digest of the model that it starts from."""

    version: int
    base: bytes
    path: Path
    nbytes: int
    digest: bytes
    data: bytes = field(default=b"", repr=False)  # all of it, if that is one chunk

    def view(self, *, whole: bool = False) -> views.ModelStep:
        return views.ModelStep(self.version, self.base, self.nbytes, self.digest, self.data if whole else b"")

    def pieces(self, start: int, size: int) -> Iterator[bytes]:
        """The payload's bytes from `start` on."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(min(start, self.nbytes))
            while piece := file.read(size):
                yield piece


def write(
    path: Path, before: ModelFile, wanted: Iterable[Flat], codec: Codec, key: Key, metadata: Mapping[str, str]
) -> tuple[ModelFile, Step]:
    """The model that comes nearest to `wanted`, in parts as `before.pieces` cuts them, and the step to it, at `path` and
    beside it, fsynced. Raises StorageFull, StorageError.
    """
    layout = before.layout
    change, start = np.empty(layout.size, np.float32), 0
    for part, piece in zip(wanted, before.pieces(), strict=True):
        np.subtract(part, np.frombuffer(piece, "<f4"), out=change[start : start + len(part)])
        start += len(part)
    made = encode(change, layout, key, codec, _rest(before))
    assert made.residual is not None  # all codecs for downloads feed back
    _put(_payload_of(path), made.payload)
    _put(_rest_of(path), made.residual.astype("<f4", copy=False).data.cast("B"))
    model = checkpoint.write(path, layout, _added(before, decode(made.payload, layout, key, codec)), metadata)
    return model, _step(key.round, before.digest, _payload_of(path), made.payload)


def kept(steps: Sequence[Step], layout: Layout) -> tuple[Step, ...]:
    """Those of them that are worth keeping: the last ones."""
    found, room = list[Step](), SHARE * layout.nbytes
    for one in reversed(steps[-MOST:]):
        room -= one.nbytes
        if room < 0:
            break
        found.insert(0, one)
    return tuple(found)


def found(models: Sequence[tuple[int, Path, bytes]]) -> tuple[Step, ...]:
    """The steps between these models, each (version, file, digest), newest last, as far as their payloads are there."""
    steps: list[Step] = []
    for (before, _, base), (version, path, _) in itertools.pairwise(models):
        try:
            steps.append(_step(version, base, _payload_of(path), _payload_of(path).read_bytes()))
        except OSError:
            steps.clear()
        if version != before + 1:
            steps.clear()
    return tuple(steps)


def _step(version: int, base: bytes, path: Path, payload: bytes) -> Step:
    data = payload if len(payload) <= CHUNK_BYTES else b""
    return Step(version, base, path, len(payload), blake3(payload).digest(), data)


def _added(before: ModelFile, change: Iterator[Flat]) -> Iterator[Flat]:
    start = 0
    for part in change:
        old = before.read(BYTES_PER_PARAMETER * start, part.nbytes)
        yield np.frombuffer(old, "<f4") + part
        start += len(part)


def _rest(model: ModelFile) -> Flat | None:
    """What its payload left out; None if that is not known, or not whole."""
    try:
        rest = np.fromfile(_rest_of(model.path), "<f4")
    except OSError:
        return None
    return rest.astype(np.float32, copy=False) if len(rest) == model.layout.size else None


def _put(path: Path, data: bytes | memoryview) -> None:
    with replacing(path) as file:
        file.write(data)


def _payload_of(model: Path) -> Path:
    return model.with_suffix(".delta")


def _rest_of(model: Path) -> Path:
    return model.with_suffix(".rest")
