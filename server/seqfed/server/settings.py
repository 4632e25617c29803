"""The server's settings: the content of server.toml; the first few also as flags."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from seqfed.common.addresses import DEFAULT_PORT
from seqfed.common.spec import Settings


class ServerSettings(Settings):
    """Where the daemon listens, where it keeps its state, and how much it takes from anybody."""

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(
        default=DEFAULT_PORT, ge=0, le=65_535, description="0 picks a free one; see address.json in the state folder"
    )
    state: Path | None = Field(
        strict=False, default=None, description="folder for the database and models; left out: the user's state folder"
    )
    insecure: bool = Field(default=False, description="allow plaintext off the loopback interface")
    uploads_in_flight: int = Field(
        default=8, ge=1, le=1024, description="updates received at the same time; others wait"
    )
    upload_stall_s: float = Field(
        default=60.0,
        gt=0,
        le=86_400,
        description="seconds without a chunk (512 KiB) after which an upload must make room; it can go on later",
    )
    max_clients: int = Field(default=10_000, ge=1, description="connected at the same time")
    max_model_bytes: int = Field(default=64 << 30, ge=4, description="of a run's model")
