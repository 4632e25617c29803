"""`seqfed server` as a process: how it begins, waits for its turn, and ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ENDS_S = 20.0  # a process that should end by itself and does not


@contextlib.contextmanager
def a_server(state: Path, *flags: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command on a free port of the loopback interface."""
    command = [sys.executable, "-m", "seqfed.common.cli", "server", "--port", "0", "--state", state, *flags]
    settings = {"env": {**os.environ, **environment}, "text": True}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, **settings) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str], wanted: str) -> str:
    """The first line of its log with these words."""
    assert process.stderr is not None
    seen = []
    for one in process.stderr:
        seen.append(one)
        if wanted in one:
            return one
    raise AssertionError("".join(seen))


def refusal(state: Path, *flags: str, **environment: str) -> str:
    with a_server(state, *flags, **environment) as process:
        _, said = process.communicate(timeout=ENDS_S)
        assert process.returncode == 1, said
    return str(said)


def replace_holder(state: Path) -> None:
    with contextlib.closing(sqlite3.connect(state / "seqfed.db", isolation_level=None)) as database:
        database.execute("UPDATE lease SET term = term + 1, holder = 'machine/1/2/3', host = 'far', pid = 1")


@pytest.mark.parametrize(
    ("flag", "url", "shown"),
    [
        ("--database", "postgresql://seqfed:geheim@db/runs", "postgresql://seqfed:***@db/runs"),
        (
            "--database",
            "postgresql://db/runs?user=seqfed&password=geheim",
            "postgresql://db/runs?user=seqfed&password=***",
        ),
        ("--models", "sftp://seqfed:geheim@files/models", "sftp://seqfed:***@files/models"),
    ],
)
def test_a_password_in_a_command_line_is_refused_with_the_remedy(
    tmp_path: Path, flag: str, url: str, shown: str
) -> None:
    said = refusal(tmp_path / "state", flag, url)
    variable = f"SEQFED_{flag.removeprefix('--').upper()}"
    assert f"{flag} {shown}: " in said
    assert variable in said
    assert "server.toml" in said
    assert ("PGPASSFILE" in said) == (flag == "--database")
    assert "geheim" not in said
    assert not (tmp_path / "state").exists()


def test_a_password_in_the_environment_is_taken_and_not_shown(tmp_path: Path) -> None:
    url = f"postgresql://seqfed:geheim@/runs?host={tmp_path}"
    said = refusal(tmp_path / "state", SEQFED_DATABASE=url)
    assert said.startswith("seqfed: the database postgresql://seqfed:***@/runs")
    assert "geheim" not in said


def test_one_that_stands_by_says_so_does_not_listen_and_stops_at_once(tmp_path: Path) -> None:
    with a_server(tmp_path) as first:
        address = line(first, "listening on").split()[-1]
        with a_server(tmp_path, "--standby") as second:
            told = line(second, "standing by")
            assert f"process {first.pid} on " in told
            assert address in told
            second.send_signal(signal.SIGTERM)
            assert second.wait(ENDS_S) == 0
        assert json.loads((tmp_path / "address.json").read_text())["pid"] == first.pid
        first.send_signal(signal.SIGTERM)
        assert first.wait(ENDS_S) == 0


def test_one_that_stands_by_takes_over_from_one_that_was_killed(tmp_path: Path) -> None:
    with a_server(tmp_path) as first:
        line(first, "listening on")
        with a_server(tmp_path, "--standby", SEQFED_LOG_JSON="1") as second:
            assert "standing by" in json.loads(line(second, "standing by"))["message"]
            first.kill()
            assert json.loads(line(second, "listening on"))["level"] == "INFO"
            assert json.loads((tmp_path / "address.json").read_text())["pid"] == second.pid


def test_one_that_was_replaced_ends_with_status_1_and_words(tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text("lease_s = 1.0\n")
    with a_server(tmp_path / "state", str(config)) as server:
        line(server, "listening on")
        replace_holder(tmp_path / "state")
        told = line(server, "seqfed: ")
        assert server.wait(ENDS_S) == 1
    assert "lease of its database is lost: process 1 on far" in told
    assert "start it with --standby" in told


def test_one_that_was_halted_for_longer_than_its_lease_finds_a_successor_and_ends(tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text("lease_s = 1.0\n")
    with a_server(tmp_path / "state", str(config)) as first:
        line(first, "listening on")
        with a_server(tmp_path / "state", str(config), "--standby") as second:
            line(second, "standing by")
            first.send_signal(signal.SIGSTOP)
            assert f"taken over from process {first.pid} on" in line(second, "taken over")
            line(second, "listening on")
            first.send_signal(signal.SIGCONT)
            assert "lease of its database is lost" in line(first, "seqfed: ")
            assert first.wait(ENDS_S) == 1
            assert json.loads((tmp_path / "state" / "address.json").read_text())["pid"] == second.pid


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with a_server(tmp_path) as server:
        line(server, "listening on")
        with contextlib.closing(sqlite3.connect(tmp_path / "seqfed.db", isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")  # so it cannot let go of its lease, which a clean stop does
            server.send_signal(signal.SIGINT)
            line(server, "stopping")
            server.send_signal(signal.SIGINT)
            assert server.wait(ENDS_S) == 130
    with a_server(tmp_path) as server:
        line(server, "taken over from process")
        line(server, "listening on")
