"""What a round's masked sum tells of how the next one is made, beside the model that it has led to (`.known`).

It is as durable as that model on this machine, and not copied to `--models`: a server that takes over elsewhere begins without,
as the first round does.
"""

from __future__ import annotations

from pathlib import Path

from seqfed.common.checkpoint import replacing


def keep(model: Path, known: bytes) -> None:
    """Before the model of this path is committed. Raises StorageFull, StorageError."""
    if known:
        with replacing(_beside(model)) as file:
            file.write(known)


def read(model: Path) -> bytes:
    """Nothing if nothing was kept."""
    try:
        return _beside(model).read_bytes()
    except OSError:
        return b""


def _beside(model: Path) -> Path:
    return model.with_suffix(".known")
