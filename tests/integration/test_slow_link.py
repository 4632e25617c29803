"""A client at 256 kbit/s with 200 ms delay and 2 % loss takes part, through cuts of its link, and holds nobody up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.link import best
from tests.integration.slow_link import CUT_AT, GRACE_S, TRAIN_S

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MARGIN_S = 1.5  # for a round's own work on a busy machine


@pytest.mark.parametrize("network", ["namespaces", "proxy"])
def test_a_slow_client_takes_part_and_nobody_waits_for_it(tmp_path: Path, network: str) -> None:
    kind = best() if network == "namespaces" else "proxy"
    if network == "namespaces" and kind == "proxy":
        pytest.skip("this machine allows no network namespaces")
    command = [sys.executable, "-m", "tests.integration.slow_link", kind, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    logs = "".join(one.read_text() for one in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    told = json.loads(done.stdout.splitlines()[-1])
    history = told["history"]
    of_slow = [one for one in history if "slow" in one["folded"]]
    assert len(of_slow) == 1, logs
    assert all(one["stale"]["slow"] > 0 for one in of_slow)  # late, and it counts all the same
    assert told["equal"]
    # The others wait as the policy says and no longer.
    assert max(one["seconds"] for one in history[1:]) < TRAIN_S + GRACE_S + MARGIN_S
    assert all({"a", "b", "c"} <= set(one["folded"]) for one in history)
    # The link was cut while it sent, and it went on where it broke: the cuts cost less than a quarter of the update.
    assert told["cuts"] == len(CUT_AT)
    sent = sum(one["traffic"].get("slow", (0, 0))[0] for one in history)
    assert told["nbytes"] <= sent < 1.25 * told["nbytes"]
