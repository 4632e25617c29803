"""The root command: quick to answer, and a refusal is one line and a status."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "grpc", "pydantic", "numpy", "sqlalchemy", "safetensors", "cryptography"}


def seqfed(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "seqfed.common.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def modules(statement: str) -> set[str]:
    """The modules loaded once the statement has run in a fresh interpreter."""
    script = f"import sys\ntry:\n    {statement}\nexcept SystemExit: pass\nprint('\\n', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_help_loads_nothing_heavy() -> None:
    loaded = modules("sys.argv = ['seqfed', '--help']; import seqfed.common.cli as cli; cli.main()")
    assert "typer" in loaded
    assert loaded & HEAVY == set()


@pytest.mark.parametrize(
    "module", ["seqfed.client.session", "seqfed.client.data", "seqfed.client.work", "seqfed.client.consent"]
)
def test_an_idle_client_loads_neither_torch_nor_without_tls_cryptography(module: str) -> None:
    assert modules(f"import {module}") & {"torch", "cryptography"} == set()


def test_help_lists_every_registered_command() -> None:
    done = seqfed("--help")
    assert done.returncode == 0
    listed = [line.split()[0] for line in done.stdout.partition("Commands:")[2].splitlines() if line.strip()]
    registered = {point.name for point in importlib.metadata.entry_points(group="seqfed.commands")}
    assert {name for name in registered if "." not in name} <= set(listed)
    assert listed[0] == "demo"
    assert not any("." in name for name in listed)


def test_a_command_may_have_others_below_it_and_stays_what_it_is() -> None:
    above, below = seqfed("client", "--help"), seqfed("client", "enroll", "--help")
    assert " client [OPTIONS] [config]\n" in above.stdout
    assert "--validation" in above.stdout
    assert "Commands:\n  enroll " in above.stdout
    assert " client enroll [OPTIONS]\n" in below.stdout
    assert "--token-file" in below.stdout
    assert "Missing option '--token-file'" in seqfed("client", "enroll").stderr


def test_version() -> None:
    assert seqfed("--version").stdout == f"seqfed {importlib.metadata.version('seqfed')}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("submit", "none.toml"), "seqfed: none.toml: No such file or directory\n"),
        (("client",), "seqfed: which data? pass --data FILE, or a client.toml with a [data] table\n"),
        (("client", "--data", "none.npz"), "seqfed: none.npz: No such file or directory\n"),
        (("runs", "--server", "nowhere:x"), "seqfed: 'nowhere:x' is not HOST:PORT"),
    ],
)
def test_a_refusal_is_one_line_and_status_1(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = seqfed(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


def test_a_command_that_there_is_not() -> None:
    done = seqfed("sumbit")
    assert done.returncode == 2
    assert "No such command 'sumbit'" in done.stderr
