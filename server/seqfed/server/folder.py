"""The state folder: where models and complete updates lie, and what of it may be removed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from seqfed.common.checkpoint import replacing
from seqfed.common.errors import StorageError, storage_error


@dataclass(frozen=True)
class Folder:
    """One server's files; nobody else's to read."""

    path: Path

    def make(self) -> None:
        """Make it unless it is there; raises StorageError if it cannot be used."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name in ("models", "updates"):
                (self.path / name).mkdir(exist_ok=True)
        except OSError as error:
            raise storage_error(error, f"opening the state folder {self.path}") from error

    def model(self, run: str, file: str) -> Path:
        return self.path / "models" / run / file

    def update(self, run: str, base: int, client: str, digest: bytes) -> Path:
        return self.path / "updates" / run / f"{base}.{client}.{digest.hex()[:32]}.f32"

    def claim(self, database: str, *, unmarked: bool) -> None:
        """Mark it as belonging to the database of this name.

        Raises StorageError if it holds models and is another's, whose files `clear_up` would remove. `unmarked`: one
        without a mark is ours, as older versions made none.
        """
        mark = self.path / "database.id"
        try:
            marked = mark.read_text() if mark.exists() else ""
            if marked == database:
                return
            if any(self.path.glob("models/*")) and not (unmarked and not marked):
                raise StorageError(
                    f"the models in the state folder {self.path} belong to another database; pass another --state, or the "
                    "--database that they belong to"
                )
            with replacing(mark) as file:
                file.write(database.encode())
        except OSError as error:
            raise storage_error(error, f"opening the state folder {self.path}") from error

    def tidy(self, run: str, before: int, consumed: Sequence[Path], steps: int = 0) -> None:
        """Remove the models before this version, with what their payloads left out, the payloads before version `steps`, and
        these files of updates.
        """
        with contextlib.suppress(OSError):
            for file in (self.path / "models" / run).glob("[0-9]*"):
                if int(file.name.partition(".")[0]) < (steps if file.suffix == ".delta" else before):
                    file.unlink(missing_ok=True)
        for update in consumed:
            with contextlib.suppress(OSError):
                update.unlink(missing_ok=True)

    def clear_up(self, runs: Collection[str], models: Collection[Path], updates: Collection[Path]) -> None:
        """Remove whatever is of none of these: a killed server was in the middle of it."""
        with contextlib.suppress(OSError):
            for checkpoint in self.path.glob("tmp*.safetensors"):
                checkpoint.unlink()
            for folder in (*self.path.glob("models/*"), *self.path.glob("updates/*")):
                if folder.name not in runs:
                    shutil.rmtree(folder, ignore_errors=True)
            for file in self.path.glob("models/*/*"):
                if file.with_suffix(".safetensors") not in models:  # a model's payload stays where the model went
                    file.unlink()
            for file in self.path.glob("updates/*/*"):
                if file.is_dir():  # as an older version kept them
                    shutil.rmtree(file, ignore_errors=True)
                elif file not in updates:
                    file.unlink()
