"""Copies of the models outside this machine, at any URL that fsspec knows (file, s3, gs, abfs, sftp, hdfs, ...).

A server that takes over on another machine, or after this one's disk was lost, fetches from there what its own folder lacks.
The folder's shape is the local one, `<url>/<run>/<file>`, and so are the file names: each is written once by one server.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from seqfed.common.checkpoint import PIECE_BYTES, replacing
from seqfed.common.errors import ConfigError, SeqfedError, StorageError
from seqfed.server.urls import hidden

log = logging.getLogger("seqfed.server")

# Where a file appears only when it is whole, and where a move would be another upload.
OBJECT_STORES: Final = frozenset(
    {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "cos", "r2", "hf"}
)


class Copies:
    """The folder at this URL. Blocking; whatever the filesystem raises becomes a StorageError."""

    def __init__(self, url: str) -> None:
        import fsspec

        self._shown = hidden(url)
        try:
            self._fs, self._root = fsspec.url_to_fs(url)
        except ImportError as error:
            raise ConfigError(f"models: {self._shown} needs a driver that is not installed: {error}") from error
        except ValueError as error:
            raise ConfigError(f"models: {self._shown} is no URL of a known filesystem: {error}") from error
        except Exception as error:
            raise self._error("opening", error) from error

    def put(self, run: str, file: Path) -> None:
        """Copy a model there: under its name is then the whole file, or what was there before."""
        place = self._place(run, file.name)
        with self._typed(f"copying {file.name} of run {run} to"):
            self._fs.makedirs(self._place(run), exist_ok=True)
            if OBJECT_STORES.intersection(_protocols(self._fs)):
                self._fs.put_file(str(file), place)
                return
            beside = self._place(run, f".{file.name}.part")
            self._fs.put_file(str(file), beside)
            if self._fs.exists(place):  # of an attempt that was not committed; not every filesystem moves onto a file
                self._fs.rm_file(place)
            self._fs.mv(beside, place)

    def get(self, run: str, file: Path) -> None:
        """Fetch a model of this name to this place, fsynced."""
        name = self._place(run, file.name)
        with (
            self._typed(f"fetching {file.name} of run {run} from"),
            self._fs.open(name, "rb") as there,
            replacing(file) as here,
        ):
            while piece := there.read(PIECE_BYTES):
                here.write(piece)

    def tidy(self, run: str, before: int) -> None:
        """Remove the models before this version; what cannot be removed stays, and the log says so."""
        try:
            for place in self._fs.ls(self._place(run), detail=False):
                number = str(place).rstrip("/").rpartition("/")[2].lstrip(".").partition(".")[0]
                if number.isdecimal() and int(number) < before:
                    self._fs.rm_file(place)
        except FileNotFoundError:
            pass  # none was ever copied
        except Exception as error:  # noqa: BLE001 - see `_typed`
            log.warning("%s", self._error(f"removing old models of run {run} from", error))

    def _place(self, run: str, *name: str) -> str:
        return "/".join((self._root.rstrip("/"), run, *name))

    @contextlib.contextmanager
    def _typed(self, doing: str) -> Iterator[None]:
        try:
            yield
        except SeqfedError:
            raise
        except Exception as error:  # every filesystem's library raises errors of its own
            raise self._error(doing, error) from error

    def _error(self, doing: str, error: Exception) -> StorageError:
        return StorageError(f"{doing} {self._shown}: {' '.join(str(error).split()) or type(error).__name__}")


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
