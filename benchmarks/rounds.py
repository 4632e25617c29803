"""What a round costs over its training: real processes, one local step, beside the same bytes over bare gRPC calls."""

from __future__ import annotations

import argparse
import statistics
import sys

from benchmarks import bare
from benchmarks.harness import federation, machine, spec_for, tell
from seqfed.common.model import layout_of
from seqfed.common.views import RoundRecord

BLOCKS = 4  # bare and federated rounds take turns, so that both see the machine in the same moods


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--params", type=int, default=52_874, help="the model's size, met from above")
    parser.add_argument("--rounds", type=int, default=24, help="measured, of either kind")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    given = parser.parse_args()
    a_block = max(1, given.rounds // BLOCKS)
    spec = spec_for(given.params, given.clients, a_block + 1)
    layout = layout_of(spec)
    print(f"{given.clients} clients, {layout.size:,} parameters", file=sys.stderr)
    history: list[RoundRecord] = []
    times: list[float] = []
    with bare.running(given.clients, layout.nbytes) as calls, federation(given.clients) as running:
        running.run(spec_for(given.params, given.clients, 1))  # loads torch
        for number in range(BLOCKS):
            times += calls.rounds(a_block + 1)[1:]
            history += running.run(spec).history[1:]  # the first round of a run builds the clients' networks
            print(f"block {number + 1} of {BLOCKS}", file=sys.stderr)
    overheads = [1000 * (one.seconds - one.slowest_training_seconds) for one in history]
    overhead_ms = statistics.median(overheads)
    bare_ms = 1000 * statistics.median(times)
    tell(
        {
            "clients": given.clients,
            "params": layout.size,
            "rounds": len(history),
            "overhead_ms": round(overhead_ms, 2),
            "overhead_ms_worst": round(max(overheads), 2),
            "training_ms": round(1000 * statistics.median(one.slowest_training_seconds for one in history), 2),
            "bare_ms": round(bare_ms, 2),
            "ratio": round(overhead_ms / bare_ms, 3),
            "machine": machine(),
        },
        given.json,
    )


if __name__ == "__main__":
    main()
