"""The process of `seqfed client`: one signal stops it cleanly, a second one at once."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from seqfed.client import cli, masking
from seqfed.common import authority, identity
from seqfed.common.errors import ConfigError
from seqfed.common.identity import CREDENTIALS, Role

SCRIPT = """
import asyncio, time
from seqfed.client.cli import take_part
from seqfed.common.logs import set_up

class Session:
    async def run(self):
        print("begun", flush=True)
        await asyncio.{waits}

set_up()
take_part(Session())
print("ended", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_cleanly(number: signal.Signals) -> None:
    script = SCRIPT.format(waits="sleep(600)")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        assert process.stdout.readline() == "ended\n"
        assert process.wait(30) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait_for_the_work_in_hand(number: signal.Signals) -> None:
    script = SCRIPT.format(waits="to_thread(time.sleep, 600)")
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        assert "a second signal stops at once" in process.stderr.readline()
        process.send_signal(number)
        assert process.wait(30) == 130
        assert process.stdout.read() == ""


def test_a_clients_key_is_printed_as_its_peers_list_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        cli.key("ward", tmp_path)
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    (tmp_path / "peers.toml").write_text(f"[peers]\n{first}\n")
    assert masking.load_peers(tmp_path / "peers.toml") == {"ward": masking.own_key(tmp_path).public}


def test_its_name_is_that_of_the_certificate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ca = authority.create(tmp_path / "ca", identity.now())
    found = ca.credentials(Role.CLIENT, "ward", now=identity.now())
    identity.save_credentials(tmp_path / CREDENTIALS, found)
    cli.key(None, tmp_path)
    assert capsys.readouterr().out.startswith('"ward" = "ed25519:')
    with pytest.raises(ConfigError, match="pass --name ward"):
        cli.key("icu", tmp_path)
