"""What seqfed costs before it does anything: the time of `seqfed --help`, and the memory of an idle client and server."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import federation, machine, tell
from benchmarks.memory import megabytes


def seconds(*command: str, times: int = 7) -> float:
    """Median wall time of a command."""
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    given = parser.parse_args()
    help_s = seconds(sys.executable, "-m", "seqfed.common.cli", "--help")
    bare_s = seconds(sys.executable, "-c", "import typer")
    with federation(1) as running:
        client = running.started.pid("client-000")
        maps = Path(f"/proc/{client}/maps").read_text()
        result = {
            "help_s": round(help_s, 3),
            "bare_typer_s": round(bare_s, 3),
            "idle_client_mb": round(megabytes(client, "VmRSS"), 1),
            "idle_server_mb": round(megabytes(running.server_pid, "VmRSS"), 1),
            "client_has_torch": "libtorch" in maps,
            "machine": machine(),
        }
    tell(result, given.json)


if __name__ == "__main__":
    main()
