"""What a round costs over its training: real processes, one local step, beside the same bytes over bare gRPC calls."""

from __future__ import annotations

import argparse
import statistics
import sys

from benchmarks import bare
from benchmarks.harness import federation, machine, spec_for, tell
from seqfed.common.model import layout_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--params", type=int, default=52_874, help="the model's size, met from above")
    parser.add_argument("--rounds", type=int, default=20, help="measured; one more warms up")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    given = parser.parse_args()
    spec = spec_for(given.params, given.clients, given.rounds + 1)
    layout = layout_of(spec)
    print(f"bare calls: {given.clients} clients, {layout.nbytes:,} bytes each way", file=sys.stderr)
    bare_ms = bare.measure(given.clients, layout.nbytes, given.rounds + 1)
    print(f"seqfed: {given.clients} clients, {layout.size:,} parameters", file=sys.stderr)
    with federation(given.clients) as running:
        history = running.run(spec).history[1:]
    overheads = [1000 * (one.seconds - one.slowest_training_seconds) for one in history]
    overhead_ms = statistics.median(overheads)
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
