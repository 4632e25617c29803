"""What a round costs over its training: real processes, one local step, beside the same bytes over bare gRPC calls.

With --link-mbit instead: what it takes over slow links, one of each client's own, with and without compressed updates.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from typing import Any

from benchmarks import bare
from benchmarks.harness import federation, machine, spec_for, tell
from benchmarks.link import Quality, links, settle
from seqfed.common.model import layout_of
from seqfed.common.spec import AggregationSpec, CompressionSpec, DPSpec, PrivacySpec, RunSpec
from seqfed.common.views import RoundRecord

BLOCKS = 4  # bare and federated rounds take turns, so that both see the machine in the same moods


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--params", type=int, default=52_874, help="the model's size, met from above")
    parser.add_argument("--rounds", type=int, default=24, help="measured, of either kind")
    parser.add_argument(
        "--tls", action="store_true", help="also a federation with certificates, by turns with the others"
    )
    parser.add_argument(
        "--dp", action="store_true", help="also rounds with central differential privacy, by turns with the others"
    )
    parser.add_argument(
        "--link-mbit", type=float, help="Mbit/s of each client's link, either way; see benchmarks/link.py"
    )
    parser.add_argument("--network", default="auto", help="with --link-mbit: auto, netem, tun or proxy [auto]")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    given = parser.parse_args()
    if given.link_mbit is not None:
        return tell(over_links(given), given.json)
    a_block = max(1, given.rounds // BLOCKS)
    spec = spec_for(given.params, given.clients, a_block + 1)
    layout = layout_of(spec)
    print(f"{given.clients} clients, {layout.size:,} parameters", file=sys.stderr)
    kinds = {"": spec, **({"tls_": spec} if given.tls else {}), **({"dp_": private(spec)} if given.dp else {})}
    history: dict[str, list[RoundRecord]] = {kind: [] for kind in kinds}
    times: list[float] = []
    with bare.running(given.clients, layout.nbytes) as calls, contextlib.ExitStack() as stack:
        running = {"": stack.enter_context(federation(given.clients))}
        if given.tls:
            running["tls_"] = stack.enter_context(federation(given.clients, tls=True))
        for one in running.values():
            one.run(spec_for(given.params, given.clients, 1))  # loads torch
        for number in range(BLOCKS):
            times += calls.rounds(a_block + 1)[1:]
            for kind, turn in kinds.items():
                # the first round of a run builds the clients' networks
                history[kind] += running.get(kind, running[""]).run(turn).history[1:]
            print(f"block {number + 1} of {BLOCKS}", file=sys.stderr)
    bare_ms = 1000 * statistics.median(times)
    found: dict[str, Any] = {}
    for kind, records in history.items():
        overheads = [1000 * (one.seconds - one.slowest_training_seconds) for one in records]
        found |= {
            f"{kind}overhead_ms": round(statistics.median(overheads), 2),
            f"{kind}overhead_ms_worst": round(max(overheads), 2),
            f"{kind}training_ms": round(1000 * statistics.median(one.slowest_training_seconds for one in records), 2),
            f"{kind}ratio": round(statistics.median(overheads) / bare_ms, 3),
        }
    for kind in kinds:
        if kind:
            found[f"{kind}to_plain"] = round(found[f"{kind}overhead_ms"] / found["overhead_ms"], 3)
    told = {"clients": given.clients, "params": layout.size, "rounds": len(history[""])}
    return tell({**told, **found, "bare_ms": round(bare_ms, 2), "machine": machine()}, given.json)


def over_links(given: argparse.Namespace) -> dict[str, Any]:
    """Whole rounds over links of this rate, with the ways of compression by turns."""
    way = settle(given.network)
    a_block = max(1, given.rounds // BLOCKS)
    plain = spec_for(given.params, given.clients, a_block + 1)
    kinds = {
        "plain": plain,
        "eden1": with_changes(plain, compression=CompressionSpec(upload="eden1")),
        "eden1_delta8": with_changes(plain, compression=CompressionSpec(upload="eden1", download="delta8")),
    }
    history: dict[str, list[RoundRecord]] = {kind: [] for kind in kinds}
    with links(way) as net, federation(given.clients, net=net) as running:
        running.run(spec_for(given.params, given.clients, 1))  # loads torch
        for number in range(given.clients):
            net.shape(f"client-{number:03}", Quality(rate=1e6 * given.link_mbit))
        for number in range(BLOCKS):
            for kind, turn in kinds.items():
                # the first round of a run has no model to send a difference to
                history[kind] += running.run(turn).history[1:]
            print(f"block {number + 1} of {BLOCKS}", file=sys.stderr)
    found: dict[str, Any] = {"clients": given.clients, "params": layout_of(plain).size, "rounds": len(history["plain"])}
    found |= {"link_mbit": given.link_mbit, "way": way}
    for kind, records in history.items():
        found[f"{kind}_link_round_ms"] = round(1000 * statistics.median(one.seconds for one in records), 1)
        for side, sent in (("up", "bytes_up"), ("down", "bytes_down")):
            each = statistics.median(getattr(one, sent) for one in records) / given.clients
            found[f"{kind}_bytes_{side}"] = round(each)
    found["link_ratio"] = round(found["eden1_link_round_ms"] / found["plain_link_round_ms"], 3)
    found["both_ways_link_ratio"] = round(found["eden1_delta8_link_round_ms"] / found["plain_link_round_ms"], 3)
    return {**found, "machine": machine()}


def with_changes(spec: RunSpec, **changes: object) -> RunSpec:
    """The same run but for these settings."""
    return RunSpec.model_validate({**{name: getattr(spec, name) for name in RunSpec.model_fields}, **changes})


def private(spec: RunSpec) -> RunSpec:
    """The same run with central differential privacy, whose epsilon is of no interest here."""
    # the training's seconds are told where all is
    dp = DPSpec(mode="central", noise_multiplier=1.0, delta=1e-5, evaluation="public")
    return with_changes(spec, aggregation=AggregationSpec(weighting="uniform"), privacy=PrivacySpec(dp=dp))


if __name__ == "__main__":
    main()
