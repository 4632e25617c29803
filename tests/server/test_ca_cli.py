"""`seqfed ca` and `seqfed enroll token`: what they make, what they say next, and what they do not replace."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from seqfed.common import authority, cli, identity, tokens
from seqfed.common.errors import ConfigError, InvalidName, SeqfedError
from seqfed.common.identity import Role


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's configuration and state, and the folder in which the commands run."""
    for name in ("config", "state", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("SEQFED_CA", "SEQFED_STATE", "SEQFED_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "config" / "seqfed"


def seqfed(*arguments: str) -> str:
    """What the command prints; raises what it refuses with."""
    done = CliRunner().invoke(cli.build(), arguments)
    if isinstance(done.exception, SeqfedError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def whose(folder: Path) -> tuple[Role, str]:
    found = identity.holder(identity.load_credentials(folder), identity.now(), folder)
    assert stat.S_IMODE((folder / "key.pem").stat().st_mode) == 0o600
    return found.role, found.name


def test_each_command_makes_its_folder_and_says_what_comes_next(home: Path, tmp_path: Path) -> None:
    said = seqfed("ca", "init")
    ca = authority.load(home / "ca")
    assert f"fingerprint: {tokens.fingerprint(ca.pem)}" in said
    assert "next: seqfed ca issue server NAME" in said
    said = seqfed("ca", "issue", "server", "fed.example.org", "192.0.2.1")
    assert whose(home / "server") == (Role.SERVER, "fed.example.org")
    assert f"seqfed server --host 0.0.0.0 --tls {home / 'server'} --ca {home / 'ca'}" in said
    said = seqfed("ca", "issue", "operator", "alice")
    assert whose(home / "operator") == (Role.OPERATOR, "alice")
    assert "seqfed runs --server HOST:PORT\n" in said  # the folder is found by itself
    said = seqfed("ca", "issue", "viewer", "bob")
    assert whose(home / "viewer") == (Role.VIEWER, "bob")
    assert f"--credentials {home / 'viewer'}" in said
    seqfed("ca", "issue", "client", "a")
    assert whose(tmp_path / "state" / "seqfed" / "clients" / "a" / "credentials") == (Role.CLIENT, "a")
    said = seqfed("enroll", "token", "--client", "b")
    assert "b.token: for one enrolment of client 'b', within 24h" in said
    token, _, pem = tokens.from_file(Path("b.token").read_bytes(), "b.token", identity.now())
    assert (token.client, pem) == ("b", ca.pem)
    assert 86_300 < token.expires - identity.now().timestamp() <= 86_400
    assert stat.S_IMODE(Path("b.token").stat().st_mode) == 0o600


def test_folders_and_times_can_be_chosen() -> None:
    seqfed("ca", "init", "--ca", "x", "--days", "100")
    seqfed("ca", "issue", "operator", "alice", "--ca", "x", "--out", "o", "--days", "2")
    found = identity.identity_of(identity.load_credentials(Path("o")).certificate)
    assert (found.not_after - found.not_before).total_seconds() == 2 * 86_400 + authority.EARLIER.total_seconds()
    said = seqfed("enroll", "token", "--client", "b", "--ca", "x", "--valid", "90s", "--out", "-")
    token, _, _ = tokens.from_file(said.encode(), "-", identity.now())
    assert token.expires - token.issued == 90
    assert json.loads(said)["fingerprint"] == token.fingerprint


@pytest.mark.parametrize(
    "again",
    [
        ("ca", "init"),
        ("ca", "issue", "server", "other.org"),
        ("ca", "issue", "operator", "mallory"),
        ("enroll", "token", "--client", "b"),
    ],
)
def test_nothing_is_replaced_unless_asked_for(again: tuple[str, ...], home: Path, tmp_path: Path) -> None:
    for first in (
        ("ca", "init"),
        ("ca", "issue", "server", "a.org"),
        ("ca", "issue", "operator", "alice"),
        ("enroll", "token", "--client", "b"),
    ):
        seqfed(*first)
    before = everything(tmp_path)
    with pytest.raises(ConfigError, match="--force"):
        seqfed(*again)
    assert everything(tmp_path) == before
    seqfed(*again, "--force")
    assert everything(tmp_path) != before


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "kind", "told"),
    [
        (
            ("ca", "issue", "operator", "alice", "--ca", "none"),
            ConfigError,
            "none has no ca.key; make a CA with `seqfed",
        ),
        (("enroll", "token", "--client", "a", "--ca", "none"), ConfigError, "make a CA with `seqfed ca init`"),
        (("ca", "issue", "operator", "a b"), InvalidName, "client name 'a b'"),
        (("enroll", "token", "--client", "../a"), InvalidName, "client name '../a'"),
        (("ca", "issue", "server", "http://fed.org"), ConfigError, "neither a DNS name nor an IP address"),
        (("enroll", "token", "--client", "a", "--valid", "soon"), ConfigError, "examples: 90s, 24h"),
        (("enroll", "token", "--client", "a", "--valid", "0h"), ConfigError, "examples: 90s, 24h"),
        (("enroll", "token", "--client", "a", "--valid", "9999d"), ConfigError, "up to 366d"),
        (("client", "enroll", "--token-file", "none"), ConfigError, "none: No such file or directory"),
    ],
)
def test_a_refusal_says_what_to_do(arguments: tuple[str, ...], kind: type[SeqfedError], told: str) -> None:
    seqfed("ca", "init")
    with pytest.raises(kind) as refused:
        seqfed(*arguments)
    assert told in str(refused.value)


def test_a_client_has_the_name_that_its_certificate_has() -> None:
    seqfed("ca", "init")
    seqfed("ca", "issue", "client", "a", "--out", "a")
    seqfed("ca", "issue", "operator", "o", "--out", "o")
    with pytest.raises(ConfigError, match="certificate of client 'a'; pass --name a, or none"):
        seqfed("client", "--credentials", "a", "--name", "b", "--data", "x.npz")
    with pytest.raises(ConfigError, match="certificate of operator 'o', and not a client's"):
        seqfed("client", "--credentials", "o", "--data", "x.npz")


def test_a_ca_that_others_can_read_issues_nothing(home: Path) -> None:
    seqfed("ca", "init")
    (home / "ca" / "ca.key").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        seqfed("ca", "issue", "operator", "alice")
    with pytest.raises(ConfigError, match="chmod 600"):
        seqfed("enroll", "token", "--client", "a")


def test_off_loopback_a_server_names_the_way_to_certificates(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "seqfed.common.cli", "server", "--host", "0.0.0.0", "--state", str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "make a CA with `seqfed ca init`" in done.stderr
    assert done.stderr.count("\n") == 1
