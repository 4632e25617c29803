"""The server's settings: the content of server.toml; the first few also as flags."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

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
    tls: Path | None = Field(
        strict=False,
        default=None,
        description="credentials folder of the server (seqfed ca issue server); left out: plaintext, on loopback only",
    )
    ca: Path | None = Field(
        strict=False,
        default=None,
        description="folder of the federation's CA (seqfed ca init), to enrol clients and renew certificates here",
    )
    enroll_port: int | None = Field(
        default=None,
        ge=0,
        le=65_535,
        description="where clients enrol, if there is a CA; left out: the port after `port`",
    )
    enrolments_per_s: float = Field(
        default=5.0, gt=0, description="enrolments refused in a second that are told why; good ones always pass"
    )
    certificate_days: float = Field(
        default=90.0, ge=0.01, le=3650, description="days that a certificate lasts; it is renewed when a third is left"
    )
    insecure: bool = Field(default=False, description="allow plaintext off the loopback interface")
    uploads_in_flight: int = Field(
        default=32, ge=1, le=1024, description="updates received at the same time; others wait"
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
    joins_per_minute: int = Field(
        default=60, ge=1, description="times that one client may come in a minute; more are refused"
    )
    calls_per_s: float = Field(
        default=200.0, gt=0, description="calls of one client or operator in a second, over a while; more are refused"
    )
    calls_burst: int = Field(default=1000, ge=1, description="calls that it may make at once after a pause")
    calls_open: int = Field(default=32, ge=4, description="calls of one client or operator at the same time")
    message_s: float = Field(
        default=30.0, gt=0, le=3600, description="seconds within which a call's message must come once it has begun"
    )
    uploads_per_client: int = Field(
        default=4, ge=1, description="uploads of one client at the same time, broken ones too"
    )
    upload_bytes_per_s: int = Field(
        default=1024,
        ge=0,
        description="what an upload must bring on average or make room, as one that stalls; 0: nothing",
    )
    max_message_bytes: int = Field(
        default=4 << 20, ge=1 << 20, le=64 << 20, description="of a message, unpacked; a chunk of a model has 512 KiB"
    )
    max_metadata_bytes: int = Field(
        default=8 << 10, ge=1 << 10, le=1 << 20, description="of what goes along with a call"
    )
    refusals_per_minute: int = Field(
        default=20,
        ge=1,
        description="refused calls of one member, or of all strangers, that get a line each in the audit log; more are counted",
    )
    max_streams: int = Field(default=32, ge=4, le=10_000, description="calls at the same time over one connection")
    progress_s: float = Field(
        default=1.0, ge=0, le=3600, description="seconds between two views of a run to its watchers on mere progress"
    )
    max_model_bytes: int = Field(default=64 << 30, ge=4, description="of a run's model")
    max_epsilon: float | None = Field(
        default=None,
        gt=0,
        description="differential privacy's epsilon of any data holder over all runs: no round begins that would pass it, and "
        "runs without are refused; left out: each run's own",
    )

    @property
    def counter(self) -> int:
        """The port of enrolments; 0 for a free one."""
        return self.enroll_port if self.enroll_port is not None else self.port and self.port + 1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.ca is not None and self.tls is None:
            raise ValueError("ca needs tls: who enrols must see by a certificate that this is the server")
        if self.ca is not None and self.enroll_port is None and self.port == 65_535:
            raise ValueError("enroll_port is missing: there is no port after 65535")
        return self
