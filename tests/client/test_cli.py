"""The process of `seqfed client`: one signal stops it cleanly, a second one at once."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

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
