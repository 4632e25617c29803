"""The server's settings: what they are when left out, their ranges, and how mistakes are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from seqfed.common.config import load_toml, validate
from seqfed.common.errors import ConfigError
from seqfed.server.settings import ServerSettings


def test_left_out_they_are_safe() -> None:
    settings = ServerSettings()
    assert (settings.host, settings.insecure, settings.state) == ("127.0.0.1", False, None)
    assert settings.port == 7733
    assert (settings.database, settings.models, settings.standby, settings.lease_s) == (None, None, False, 10)
    assert (settings.joins_per_s, settings.max_streams, settings.uploads_waiting) == (200, 32, 1000)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"port": -1}, "'port' = -1"),
        ({"port": 65_536}, "'port' = 65536"),
        ({"port": "many"}, "'port' = 'many'"),
        ({"uploads_in_flight": 0}, "'uploads_in_flight' = 0"),
        ({"max_clients": 0}, "'max_clients' = 0"),
        ({"uploads_waiting": 0}, "'uploads_waiting' = 0"),
        ({"joins_per_s": 0}, "'joins_per_s' = 0"),
        ({"max_streams": 3}, "'max_streams' = 3"),
        ({"progress_s": -1}, "'progress_s' = -1"),
        ({"lease_s": 0.5}, "'lease_s' = 0.5"),
        ({"lease_s": 3601}, "'lease_s' = 3601"),
        ({"max_model_bytes": 0}, "'max_model_bytes' = 0"),
        ({"max_epsilon": 0}, "'max_epsilon' = 0"),
        ({"prot": 1}, "unknown key 'prot'; did you mean 'port'?"),
    ],
)
def test_a_mistake_is_named_with_its_key(content: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        validate(ServerSettings, content, "server.toml")
    assert told in str(refusal.value)
    assert str(refusal.value).startswith("server.toml: ")


def test_a_file_may_say_everything_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_text(
        'host = "localhost"\nport = 1\nstate = "state"\ninsecure = true\nuploads_in_flight = 2\nmax_clients = 3\n'
        "upload_stall_s = 5.5\nmax_model_bytes = 4\n"
        'database = "postgresql://db/runs"\nmodels = "s3://models"\nstandby = true\nlease_s = 30\n'
        "joins_per_s = 7\nmax_streams = 8\nuploads_waiting = 9\nprogress_s = 0.5\n"
        'tls = "tls"\nca = "ca"\nenroll_port = 6\nenrolments_per_s = 1\ncertificate_days = 2\n'
        "calls_per_s = 10\ncalls_burst = 11\ncalls_open = 12\nuploads_per_client = 13\nupload_bytes_per_s = 14\n"
        "max_message_bytes = 2097152\nmax_metadata_bytes = 2048\nrefusals_per_minute = 15\nmessage_s = 16\n"
        "joins_per_minute = 17\nmax_epsilon = 18.5\n"
    )
    settings = load_toml(ServerSettings, path, {"port": 5, "host": None})
    assert settings == ServerSettings(
        host="localhost",
        port=5,
        state=Path("state"),
        insecure=True,
        uploads_in_flight=2,
        upload_stall_s=5.5,
        max_clients=3,
        max_model_bytes=4,
        database="postgresql://db/runs",
        models="s3://models",
        standby=True,
        lease_s=30,
        joins_per_s=7,
        max_streams=8,
        uploads_waiting=9,
        progress_s=0.5,
        tls=Path("tls"),
        ca=Path("ca"),
        enroll_port=6,
        enrolments_per_s=1,
        certificate_days=2,
        calls_per_s=10,
        calls_burst=11,
        calls_open=12,
        uploads_per_client=13,
        upload_bytes_per_s=14,
        max_message_bytes=2 << 20,
        max_metadata_bytes=2 << 10,
        refusals_per_minute=15,
        message_s=16,
        joins_per_minute=17,
        max_epsilon=18.5,
    )
    assert set(settings.model_fields_set) == set(ServerSettings.model_fields)


def test_they_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ServerSettings().port = 1  # type: ignore[misc]  # that it cannot be set is the point
