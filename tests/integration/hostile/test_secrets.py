"""No secret is to be seen: not in any process's log at its most talkative, not in `ps`, not in a refusal.

Real processes, each of which logs from the lowest level on, gRPC and asyncio included.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from seqfed.common import identity

TALKATIVE = """
import logging, sys
plain = logging.basicConfig
logging.basicConfig = lambda **given: plain(**{**given, "level": 1})
from seqfed.common import cli
cli.main()
"""
PASSWORD = "geheim-7f3a"  # noqa: S105 - a test's


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HOME": str(folder),
        "XDG_CONFIG_HOME": str(folder / "config"),
        "XDG_STATE_HOME": str(folder / "state"),
        "GRPC_VERBOSITY": "DEBUG",
        "GRPC_TRACE": "http,secure_endpoint,handshaker,tsi,channel,call_error",
        "PYTHONASYNCIODEBUG": "1",
        "NO_COLOR": "1",
    }


class Watched:
    """Commands of seqfed, what they write, and what `ps` shows of them meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: set[str] = set()  # command lines
        self._running: list[subprocess.Popen[bytes]] = []
        self._over = threading.Event()
        self._looking = threading.Thread(target=self._look)
        self._looking.start()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            for one in psutil.process_iter():
                try:
                    self.seen.add(" ".join(one.cmdline()))
                except psutil.Error:
                    continue

    def start(self, name: str, *arguments: str, **more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", TALKATIVE, *arguments]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**environment(self.folder), **more}
            )
        self._running.append(process)
        return process

    def run(self, name: str, *arguments: str, status: int = 0, **more: str) -> str:
        process = self.start(name, *arguments, **more)
        assert process.wait(60) == status, self.told(name)
        return self.told(name)

    def told(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def stop(self) -> None:
        for one in self._running:
            if one.poll() is None:
                one.terminate()
        for one in self._running:
            one.wait(20)

    def close(self) -> None:
        self.stop()
        self._over.set()
        self._looking.join()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    found = Watched(tmp_path)
    yield found
    found.close()


def eventually(watched: Watched, name: str, words: str) -> None:
    """Wait until this log has these words."""
    deadline = time.monotonic() + 60
    while words not in watched.told(name):
        assert time.monotonic() < deadline, watched.told(name)[-2000:]
        time.sleep(0.05)


def of_key(file: Path) -> list[str]:
    """What would betray this private key: lines of its PEM, its number in hex and in decimal, its bytes as Python shows them."""
    pem = file.read_bytes()
    lines = pem.decode().split("\n")[1:-2]
    number = identity.load_key(pem, file).private_numbers().private_value
    raw = number.to_bytes(32, "big")
    return [*lines, f"{number:x}", str(number), base64.b64encode(raw).decode(), repr(raw)[2:-1]]


@pytest.mark.slow
def test_no_secret_is_logged_or_shown_by_ps(watched: Watched, tmp_path: Path) -> None:
    ca, tls, token = tmp_path / "ca", tmp_path / "tls", tmp_path / "a.token"
    where = ("--ca", str(ca))
    watched.run("ca", "ca", "init", *where)
    watched.run("issue", "ca", "issue", "server", "localhost", "127.0.0.1", *where, "--out", str(tls))
    watched.run("token", "enroll", "token", "--client", "a", *where, "--out", str(token))
    state = tmp_path / "server"
    ports = ("--port", "0", "--enroll-port", "0")
    watched.start("server", "server", *ports, "--state", str(state), "--tls", str(tls), *where)
    eventually(watched, "server", "listening on")
    address = json.loads((state / "address.json").read_text())
    enrol = (
        *("client", "enroll", "--server", address["address"], "--token-file", str(token)),
        *("--enroll-port", address["enroll"].rpartition(":")[2], "--state", str(tmp_path / "a")),
    )
    watched.run("enroll", *enrol)
    watched.run("enroll-again", *enrol, "--force", status=1)  # the token was used: a refusal that speaks of it
    x = np.zeros((8, 3, 2), np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(8) % 2)
    watched.start(
        "client",
        *("client", "--server", address["address"], "--name", "a", "--state", str(tmp_path / "a")),
        *("--data", str(tmp_path / "data.npz")),
    )
    eventually(watched, "server", "client a")
    watched.stop()

    text = json.loads(token.read_text())["token"]
    secrets = [text, *text.split("."), *of_key(ca / "ca.key"), *of_key(tls / "key.pem")]
    secrets += of_key(tmp_path / "a" / "credentials" / "key.pem")
    assert min(map(len, secrets)) > 20
    logs = {one.name: one.read_text(errors="replace") for one in tmp_path.glob("*.log")}
    assert {"server.log", "client.log", "enroll.log", "enroll-again.log", "token.log"} <= set(logs)
    assert "was used before" in logs["enroll-again.log"]
    assert "DEBUG" in logs["server.log"]
    for secret in secrets:
        assert not [name for name, content in logs.items() if secret in content], "a log has a secret"
        assert not [one for one in watched.seen if secret in one], "ps shows a secret"
    assert [one for one in watched.seen if "enroll" in one]  # it did look
    assert not [one for one in state.rglob("*") if one.is_file() and text.encode() in one.read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize("url", ["postgresql://seqfed:{}@127.0.0.1:1/x", "postgresql://seqfed:{}@127.0.0.1:nan/x"])
def test_a_databases_password_is_neither_logged_nor_shown(watched: Watched, tmp_path: Path, url: str) -> None:
    """By the environment or server.toml it is not in `ps`; a server that cannot reach its database names it without it."""
    folder = str(tmp_path / "server")
    told = watched.run(
        "server", "server", "--port", "0", "--state", folder, status=1, SEQFED_DATABASE=url.format(PASSWORD)
    )
    assert "seqfed:" in told.splitlines()[-1]  # a refusal in words
    assert PASSWORD not in told
    (tmp_path / "server.toml").write_text(f'database = "{url.format(PASSWORD)}"\n')
    told = watched.run("again", "server", str(tmp_path / "server.toml"), "--state", folder, status=1)
    assert PASSWORD not in told
    told = watched.run("audit", "audit", "verify", "--state", folder, status=1, SEQFED_DATABASE=url.format(PASSWORD))
    assert PASSWORD not in told
    assert not [one for one in watched.seen if PASSWORD in one]
