"""Models on disk: safetensors, never pickle, written in pieces and put in place by one rename.

The data section of our files is the flat vector itself, in the layout's order, so the server streams a model to clients
straight from the file, and a model larger than memory could be written. The header is written here (the format is eight
bytes of length and a JSON object) because the library serialises only whole tensors held in memory; the library reads.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blake3 import blake3

from seqfed.common.errors import CheckpointError, LayoutMismatch, storage_error
from seqfed.common.layout import BYTES_PER_PARAMETER, Flat, Layout, Parameters

PIECE_BYTES: Final = 1 << 20  # read, computed and written at once: it stays in a core's cache on its way
ALIGNMENT: Final = 8  # the safetensors format pads its header to a multiple of 8 bytes


@dataclass(frozen=True)
class ModelFile:
    """A model at rest: where its flat vector starts in which file, and the vector's BLAKE3 digest."""

    path: Path
    layout: Layout
    data_start: int
    digest: bytes

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes of the flat vector from byte `offset`."""
        with self.path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), max(0, min(size, self.layout.nbytes - offset)), self.data_start + offset)

    def pieces(self, start: int = 0, piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
        """The flat vector's bytes from `start` on, in pieces; raises CheckpointError if the file ends too early."""
        with self.path.open("rb", buffering=0) as file:
            offset = start
            while offset < self.layout.nbytes:
                piece = os.pread(file.fileno(), min(piece_bytes, self.layout.nbytes - offset), self.data_start + offset)
                if not piece:
                    raise CheckpointError(f"{self.path}: ends at byte {offset:,} of {self.layout.nbytes:,}")
                yield piece
                offset += len(piece)


def write(path: Path, layout: Layout, pieces: Iterable[Flat], metadata: Mapping[str, str]) -> ModelFile:
    """Write a model so that `path` is at every moment either the old file or the whole new one, also after a power cut.

    `pieces` are consecutive parts of the flat vector. Raises StorageFull or StorageError; `path` is then unchanged.
    """
    header = _header(layout, metadata)
    hasher = blake3()
    written = 0
    with replacing(path) as file:
        file.write(header)
        # The next piece is computed while this one is hashed and written: a round waits for nothing else meanwhile.
        with ThreadPoolExecutor(1) as writer:

            def put(data: memoryview) -> None:
                hasher.update(data)
                file.write(data)

            last: Future[None] | None = None
            for piece in pieces:
                data = piece.astype("<f4", copy=False).data.cast("B")
                if last is not None:
                    last.result()
                last = writer.submit(put, data)
                written += len(data)
            if last is not None:
                last.result()
        if written != layout.nbytes:
            raise LayoutMismatch(f"{written:,} bytes came for a model of {layout.nbytes:,}")
    return ModelFile(path, layout, len(header), hasher.digest())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[_Writer]:
    """A file to write that takes the place of `path` when the block ends well, fsynced; otherwise nothing has happened."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise storage_error(error, f"saving {path.name}") from error
    try:
        yield _Writer(descriptor)
        os.fsync(descriptor)
        os.close(descriptor)
        descriptor = -1
        Path(temporary).replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        if descriptor >= 0:
            os.close(descriptor)
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        if isinstance(error, OSError):
            raise storage_error(error, f"saving {path.name}") from error
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename inside this folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class _Writer:
    descriptor: int

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self.descriptor, view) :]


def save(path: Path, parameters: Parameters, metadata: Mapping[str, str]) -> ModelFile:
    """Write a model that is in memory; see `write`."""
    step = PIECE_BYTES // BYTES_PER_PARAMETER
    pieces = (parameters.flat[start : start + step] for start in range(0, parameters.layout.size, step))
    return write(path, parameters.layout, pieces, metadata)


def load(path: Path, layout: Layout) -> Parameters:
    """The model in any safetensors file with exactly the tensors of `layout`, in whatever order.

    Raises CheckpointError naming the file and the first thing that does not fit.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            for name in names:  # before any is read: numpy has no bfloat16
                if (kind := file.get_slice(name).get_dtype()) != "F32":
                    raise CheckpointError(f"{path}: tensor '{name}' is {kind}; convert the checkpoint to float32 (F32)")
            arrays = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    try:
        return Parameters(layout, layout.flatten(arrays))
    except LayoutMismatch as error:
        raise CheckpointError(f"{path}: the checkpoint is of another model: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The free-form strings in a safetensors file's header; raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


def _header(layout: Layout, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {**metadata, "layout_digest": layout.digest.hex()}}
    for name, shape, part in layout.parts():
        offsets = [BYTES_PER_PARAMETER * part.start, BYTES_PER_PARAMETER * part.stop]
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
