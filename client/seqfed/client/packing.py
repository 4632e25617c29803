"""What a client keeps for compression: what an update's codec left out, to be sent with the next one (error feedback), and the
newest model, to which differences are added.

Of each run there are two files at most: `next`, made before the update is sent, and `counted`, that file once the server has
said that the update counts. An update builds on what `counted` has; whether or not the one of a round before has come through,
nothing is added twice. Asked again in the same round, the client sends the same bytes. Where the server's word did not come,
because the federation went on or the client ended, the client asks for it before it makes the next update (`unsettled`).

Of a masked sum nobody can say later whether an update is in it. So what was left out is taken away (`take`, to `given`) before an
update with it goes into one: it comes back if the sum certainly was not opened, and is lost if the client ends meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from blake3 import blake3

from seqfed.common.checkpoint import replacing
from seqfed.common.compression import Codec, Key, encode
from seqfed.common.errors import StorageError, StorageFull, storage_error
from seqfed.common.layout import Flat, Layout
from seqfed.common.transfer import DIGEST_BYTES
from seqfed.common.views import Task

log = logging.getLogger("seqfed.client")

STALE: Final = 10  # rounds after which what was left out says nothing of the model any more
RUNS: Final = 4  # of which something is kept: those that were at work last
LONGEST_HEAD: Final = 4096  # bytes
NEXT, COUNTED, GIVEN = "next", "counted", "given"
MODEL: Final = "model"


@dataclass(frozen=True)
class _Of:
    """Which update it is: `model` and `layout` are digests in hex."""

    run: str
    round: int
    model: str
    layout: str


@dataclass(frozen=True, eq=False)
class _Kept:
    of: _Of
    payload: bytes
    residual: Flat


class Packer:
    """`folder`: where it keeps what must outlast the process; None for memory only. Blocking, one call at a time."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._memory: dict[tuple[str, str], _Kept] = {}  # by run and name; without a folder all that there is

    def pack(self, task: Task, client: str, layout: Layout, delta: Flat, codec: Codec) -> bytes:
        """The payload of the task's update. Raises what `encode` does, StorageFull, StorageError."""
        key = Key(task.spec.seed, task.key.run, task.key.round, client)
        if not codec.feeds_back:
            return encode(delta, layout, key, codec).payload
        of = _of(task, layout)
        kept = {name: self._load(of.run, name) for name in (NEXT, COUNTED)}
        for one in kept.values():
            if one is not None and one.of == of:
                return one.payload
        made = encode(delta, layout, key, codec, _fresh(kept[COUNTED], of))
        assert made.residual is not None  # the codec feeds back
        self._save(NEXT, _Kept(of, made.payload, made.residual))
        return made.payload

    def unsettled(self, run: str, before: int) -> tuple[int, bytes] | None:
        """Round and BLAKE3 of the run's last update, if it is of a round before this one and not known to count."""
        kept = self._load(run, NEXT)
        return None if kept is None or kept.of.round >= before else (kept.of.round, blake3(kept.payload).digest())

    def counted(self, run: str, round_: int) -> None:
        """The server has counted the run's update of this round. Raises StorageFull, StorageError."""
        kept = self._load(run, NEXT)
        if kept is None or kept.of.round != round_:
            return
        self._move(run, NEXT, COUNTED)

    def take(self, task: Task, layout: Layout) -> Flat | None:
        """What the run's last masked update left out, to be added to the task's; None if there is nothing fresh. It is taken away
        until `put_back` or `keep`.
        """
        of = _of(task, layout)
        found = _fresh(self._load(of.run, COUNTED), of)
        self._drop(of.run, GIVEN)  # of a sum in which the client ended
        self._move(of.run, COUNTED, GIVEN)
        return found

    def put_back(self, run: str) -> None:
        """What was taken is in no sum. Where it cannot be put back it is lost."""
        try:
            self._move(run, GIVEN, COUNTED)
        except (StorageFull, StorageError) as error:
            log.warning("%s", error)

    def keep(self, task: Task, layout: Layout, rest: Flat) -> None:
        """The task's masked update is in its sum, and left this out. Raises StorageFull, StorageError."""
        self._save(COUNTED, _Kept(_of(task, layout), b"", rest))

    def keep_model(self, digest: bytes, flat: Flat) -> None:
        """Keep the newest model, in place of the one before; without it a client that was restarted fetches a whole one."""
        if self._folder is None:
            return
        try:
            with replacing(self._folder / MODEL) as file:
                file.write(digest)
                file.write(flat.astype("<f4", copy=False).data.cast("B"))
        except (StorageFull, StorageError) as error:
            log.warning("%s", error)

    def kept_model(self) -> tuple[bytes, Flat] | None:
        """The BLAKE3 and the numbers of the newest model, if it is whole."""
        if self._folder is None:
            return None
        try:
            with (self._folder / MODEL).open("rb") as file:
                digest, data = file.read(DIGEST_BYTES), bytearray(file.read())
        except OSError:
            return None
        if blake3(data).digest() != digest:
            return None
        return digest, np.frombuffer(data, "<f4")

    def _move(self, run: str, old: str, new: str) -> None:
        """Nothing if there is none of the old name."""
        if self._folder is None:
            if (run, old) in self._memory:
                self._memory[run, new] = self._memory.pop((run, old))
            return
        try:
            self._path(run, old).replace(self._path(run, new))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise storage_error(error, "keeping what an update left out") from error

    def _drop(self, run: str, name: str) -> None:
        self._memory.pop((run, name), None)
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._path(run, name).unlink(missing_ok=True)

    def _path(self, run: str, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{run}.{name}"

    def _save(self, name: str, kept: _Kept) -> None:
        if self._folder is None:
            self._memory[kept.of.run, name] = kept
            return
        residual = kept.residual.astype("<f4", copy=False).data.cast("B")
        head = {**vars(kept.of), "bytes": len(kept.payload), "digest": _digest(kept.payload, residual)}
        with replacing(self._path(kept.of.run, name)) as file:
            for part in (json.dumps(head).encode() + b"\n", kept.payload, residual):
                file.write(part)
        self._tidy(kept.of.run)

    def _load(self, run: str, name: str) -> _Kept | None:
        """What is kept under this name, if it is whole."""
        if self._folder is None:
            return self._memory.get((run, name))
        path = self._path(run, name)
        try:
            with path.open("rb") as file:
                head = json.loads(file.readline(LONGEST_HEAD))
                payload, residual = file.read(head.pop("bytes")), file.read()
            if head.pop("digest") != _digest(payload, residual):
                raise ValueError("it is damaged")
            return _Kept(_Of(**head), payload, np.frombuffer(residual, "<f4").astype(np.float32, copy=False))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s cannot be read, so what it has left out is lost: %s", path, error)
            return None

    def _tidy(self, run: str) -> None:
        """Remove what is of runs that others have followed."""
        with contextlib.suppress(OSError):
            files = sorted(self._files(), key=lambda one: one.stat().st_mtime, reverse=True)
            recent = list(dict.fromkeys([run, *(one.stem for one in files)]))[:RUNS]
            for one in files:
                if one.stem not in recent:
                    one.unlink(missing_ok=True)

    def _files(self) -> Iterator[Path]:
        assert self._folder is not None
        for name in (NEXT, COUNTED, GIVEN):
            yield from self._folder.glob(f"*.{name}")


def _of(task: Task, layout: Layout) -> _Of:
    return _Of(task.key.run, task.key.round, task.model.digest.hex(), layout.digest.hex())


def _fresh(kept: _Kept | None, of: _Of) -> Flat | None:
    """What it left out, if an update of this kind can still take it along."""
    if kept is None or kept.of.layout != of.layout or not 0 < of.round - kept.of.round <= STALE:
        return None
    return kept.residual


def _digest(payload: bytes, residual: bytes | memoryview) -> str:
    return blake3(payload).update(residual).hexdigest()
