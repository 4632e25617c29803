"""What makes a client the same one after a restart: its state folder, held by one process at a time."""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path

from seqfed.common.errors import StorageError, storage_error
from seqfed.common.identity import client_folder
from seqfed.common.wire import HEX


def take(folder: Path | None, name: str) -> str:
    """The instance id (32 hex digits) kept in the client's state folder, which this process now holds until it ends.

    Raises StorageError if another process holds the folder or it cannot be written.
    """
    folder = client_folder(folder, name)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(folder / "instance", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise storage_error(error, "opening the client's state folder") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StorageError(
            f"another client runs with the state folder {folder}; give this one another --name or --state"
        ) from error
    instance = os.read(descriptor, 64).decode("ascii", "replace").strip()
    if not HEX.fullmatch(instance):
        instance = secrets.token_hex(16)
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, instance.encode(), 0)
            os.fsync(descriptor)
        except OSError as error:
            os.close(descriptor)
            raise storage_error(error, f"saving {folder / 'instance'}") from error
    return instance  # the descriptor stays open: the lock lasts as long as the process
