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
    database: str | None = Field(
        default=None, description="URL of a PostgreSQL database for the runs; left out: SQLite in the state folder"
    )
    models: str | None = Field(
        default=None, description="URL of any fsspec filesystem that gets a copy of every model; left out: none"
    )
    standby: bool = Field(default=False, description="wait while another server has the database, and then take over")
    lease_s: float = Field(
        default=10.0,
        ge=1,
        le=3600,
        description="seconds after which another server may take over from one that gives no sign of life",
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
    uploads_waiting: int = Field(
        default=1000, ge=1, description="updates that may wait for one in flight to end; more are told to come again"
    )
    max_clients: int = Field(default=10_000, ge=1, description="connected at the same time")
    joins_per_s: float = Field(default=200.0, gt=0, description="clients that may come in a second; more are told when")
    max_streams: int = Field(default=32, ge=4, le=10_000, description="calls at the same time over one connection")
    progress_s: float = Field(
        default=1.0, ge=0, le=3600, description="seconds between two views of a run to its watchers on mere progress"
    )
    max_model_bytes: int = Field(default=64 << 30, ge=4, description="of a run's model")
