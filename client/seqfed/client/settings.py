"""The client's settings: the content of client.toml; all of them also as flags."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from seqfed.common.spec import Count, Settings


class DataSettings(Settings):
    """Which file holds the sequences, and how its rows become them."""

    file: Path = Field(
        strict=False, description="NPZ with x (N, T, F), y (N,) and perhaps lengths (N,); or CSV with a header line"
    )
    validation: Path | None = Field(
        strict=False, default=None, description="a file of the same kind to score models on, never trained on"
    )
    validation_fraction: float = Field(
        default=0.2, ge=0, lt=1, description="held out of `file` if there is no validation file"
    )
    label: str | None = Field(
        default=None, description="CSV: the column with the label; a window's is that of its last row"
    )
    columns: tuple[str, ...] | None = Field(
        strict=False, default=None, description="CSV: the feature columns; left out: all the others"
    )
    group: str | None = Field(
        default=None, description="CSV: the column that tells entities apart; no window crosses two"
    )
    window: Count | None = Field(default=None, description="CSV: rows in a sequence")
    stride: Count = Field(default=1, description="CSV: rows from the start of one window to the next")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.file.suffix == ".csv":
            if self.label is None or self.window is None:
                raise ValueError(f"{self.file} is CSV: name its label column and the rows a sequence (label, window)")
            if self.columns is not None and (self.label in self.columns or len(set(self.columns)) < len(self.columns)):
                raise ValueError(f"columns must name each feature once, and not the label '{self.label}'")
        elif self.label or self.columns or self.group or self.window:
            raise ValueError(f"label, columns, group and window are for CSV files, and {self.file} is not .csv")
        if self.validation is not None and self.validation.suffix != self.file.suffix:
            raise ValueError(f"validation {self.validation} must be of the same kind as file {self.file}")
        return self


class ClientSettings(Settings):
    """One data holder's process."""

    server: str = Field(default="127.0.0.1:7733", description="HOST:PORT")
    name: str | None = Field(default=None, description="within the federation; left out: this machine's host name")
    data: DataSettings
    state: Path | None = Field(
        strict=False, default=None, description="folder for what this client keeps; left out: the user's state folder"
    )
    threads: int = Field(
        default=1, ge=1, le=1024, description="for training; small recurrent networks gain little from more"
    )
    insecure: bool = Field(default=False, description="allow plaintext off the loopback interface")
