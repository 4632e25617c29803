"""The server's peak memory over a round, for differing numbers of clients: it must follow the model, not the clients."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.harness import federation, machine, spec_for, tell
from seqfed.common.model import layout_of


def megabytes(pid: int, field: str) -> float:
    """VmRSS or VmHWM of a process, in 10^6 bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"/proc/{pid}/status has no {field}")


def measure(clients: int, params: int, rounds: int) -> dict[str, float]:
    """One federation: memory before the run, and at its highest."""
    spec = spec_for(params, clients, rounds)
    print(f"{clients} clients, {layout_of(spec).size:,} parameters", file=sys.stderr)
    with federation(clients) as running:
        base = megabytes(running.server_pid, "VmRSS")
        running.run(spec)
        peak = megabytes(running.server_pid, "VmHWM")
    model = layout_of(spec).nbytes / 1e6
    found = {"base_mb": base, "model_mb": model, "peak_mb": peak, "peak_less_base_in_models": (peak - base) / model}
    return {"clients": clients, **{name: round(value, 2) for name, value in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, action="append", help="may be given several times")
    parser.add_argument("--params", type=int, default=25_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    given = parser.parse_args()
    results = [measure(clients, given.params, given.rounds) for clients in given.clients or (2, 8)]
    tell({"results": results, "machine": machine()}, given.json)


if __name__ == "__main__":
    main()
