"""A run with one client behind a slow link that is cut twice while it sends: `python -m tests.integration.slow_link KIND FOLDER`.

Prints what came of it as JSON. In a process of its own, since it may have to begin anew in a network namespace.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness import Actor, free_port
from benchmarks.link import Links, Quality, links, settle
from tests.integration.light import arrived, exported, replayed, serves, submitted, taking_part

from seqfed.client.admin import operating
from seqfed.common.model import layout_of
from seqfed.common.spec import RunSpec
from seqfed.common.views import RoundRecord, RunView, Stage

SLOW = Quality(rate=256_000, delay_s=0.2, loss=0.02)
TRAIN_S, GRACE_S = 0.5, 1.0
SPEC = RunSpec.model_validate(
    {
        "rounds": 1000,
        "data": {"features": 2, "classes": 2},
        "model": {
            "kind": "lstm",
            "hidden": 186,
            "layers": 1,
        },  # 141,734 parameters, 567 kB: 18 s on the link, either way
        "cohort": {"min_clients": 3, "quorum": 3, "grace_s": GRACE_S, "late": "fold", "max_staleness": 1000},
        "evaluation": {"every": 0},
    }
)
CUT_AT = (0.25, 0.6)  # shares of the update that are sent when the link breaks,
CUT_S = 2.0  # for so long


async def scenario(net: Links, folder: Path) -> dict[str, Any]:
    port = free_port()
    listen = ("--host", net.host, "--port", str(port), "--state", str(folder / "state"), *net.flags)
    server = Actor("server", folder, "server", *listen)
    place = net.add("slow", [port])
    net.shape("slow", SLOW)
    command = [*place.prefix, sys.executable, "-m", "tests.integration.light", str(os.getpid()), "slow"]
    server.start()
    with (folder / "slow.log").open("wb") as log:
        slow = await asyncio.to_thread(subprocess.Popen, [*command, place.addresses[0]], stdout=log, stderr=log)
    address = f"127.0.0.1:{port}"
    try:
        await serves(address)
        async with (
            taking_part(("a", "b", "c"), address, train_s=TRAIN_S),
            operating(address, insecure=False) as operator,
        ):
            await arrived(address, 4)
            run = await submitted(address, SPEC)
            cuts, began = 0, time.monotonic()
            async for view in operator.watch(run):
                if cuts < len(CUT_AT) and sent(view) >= CUT_AT[cuts]:
                    cuts += 1
                    net.cut("slow", reset=True)
                    asyncio.get_running_loop().call_later(CUT_S, net.mend, "slow")
                if any("slow" in one.folded for one in view.history):
                    await operator.stop(run)
            history = [asdict(one) for one in (await operator.history(run)).history]
            flat = await exported(address, run, SPEC, folder)
    finally:
        slow.kill()
        server.kill()
    return {
        "network": net.kind,
        "cuts": cuts,
        "seconds": time.monotonic() - began,
        "history": history,
        "nbytes": layout_of(SPEC).nbytes,
        "equal": flat.tobytes() == replayed(SPEC, [RoundRecord(**one) for one in history]).tobytes(),
    }


def sent(view: RunView) -> float:
    """The share of its update that the slow client says it has sent."""
    for task in view.tasks:
        told = task.progress
        if task.client == "slow" and told is not None and told.stage is Stage.SENDING and told.total:
            return told.done / told.total
    return 0.0


def main() -> None:
    kind = settle(sys.argv[1])
    with links(kind, seed=1) as net:
        sys.stdout.write(json.dumps(asyncio.run(scenario(net, Path(sys.argv[2])))))


if __name__ == "__main__":
    main()
