"""How many clients one server holds: thousands of light ones over real gRPC, a TCP connection each, in several processes.

connected         Clients that the server says are connected, when all have had time to come.
server_rss_mb     Its resident memory (MB of 10^6 bytes), at its highest of: all connected, after the rounds, all back.
idle_cpu_percent  Of one core, over 20 s in which all are connected and there is no run.
round_ms          Median wall time of a round: `cohort` clients are asked, each sends its update, the model is committed.
reconnect_s       From the kill -9 of the server, which is started again at once, until all are connected to it again.

The clients are real sessions, which compute nothing (see benchmarks/peers.py). They share the machine with the server, so
round_ms and reconnect_s hold their time too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import Actor, free_port, machine, tell
from benchmarks.peers import CLASSES, FEATURES
from seqfed.client.admin import operating
from seqfed.common.errors import SeqfedError
from seqfed.common.spec import CohortSpec, DataSpec, EvaluationSpec, ModelSpec, RunSpec
from seqfed.common.views import RoundRecord

IDLE_S = 20.0
PATIENCE_S = 300.0  # for all to come
A_PROCESS = 1250  # clients at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=2000)
    parser.add_argument("--cohort", type=int, default=200, help="clients a round [200]")
    parser.add_argument("--rounds", type=int, default=10, help="measured [10]")
    parser.add_argument("--idle-s", type=float, default=IDLE_S, help="seconds of idling that are measured [20]")
    parser.add_argument("--joins-per-s", type=float, help="the server's own setting [its default]")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    given = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # for the processes started from here
    with tempfile.TemporaryDirectory(prefix="seqfed-fleet-") as name:
        port, work = free_port(), Path(name)
        settings = [f"port = {port}", f"max_clients = {max(10_000, given.clients)}", f'state = "{work / "server"}"']
        if given.joins_per_s is not None:
            settings.append(f"joins_per_s = {given.joins_per_s}")
        (work / "server.toml").write_text("\n".join(settings))
        server = Actor("server", work, "server", str(work / "server.toml"))
        server.start()
        try:
            with peers(f"127.0.0.1:{port}", given.clients):
                result = asyncio.run(measure(given, server, f"127.0.0.1:{port}"))
        except BaseException:
            print(server.log.read_text()[-3000:], file=sys.stderr)
            raise
        finally:
            server.kill()
    tell({**result, "clients": given.clients, "cohort": given.cohort, "machine": machine()}, given.json)


@contextlib.contextmanager
def peers(address: str, clients: int) -> Iterator[None]:
    """So many clients in as few processes as can hold them, but two at least."""
    count = max(2, -(-clients // A_PROCESS))
    edges = [clients * number // count for number in range(count + 1)]
    command = [sys.executable, "-m", "benchmarks.peers", str(os.getpid()), address]
    quiet = {**os.environ, "GRPC_VERBOSITY": "NONE"}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for first, last in itertools.pairwise(edges):
            flags = [*command, str(first), str(last - first)]
            started.append(subprocess.Popen(flags, env=quiet, stdout=subprocess.DEVNULL))
        yield
    finally:
        for one in started:
            one.kill()
            one.wait()


async def measure(given: argparse.Namespace, server: Actor, address: str) -> dict[str, Any]:
    begun = time.monotonic()
    await connected(address, server, given.clients)
    print(f"all connected after {time.monotonic() - begun:.1f} s", file=sys.stderr)
    rss = [resident(server)]
    idle = await idle_cpu(server, given.idle_s)
    print(f"idle {idle:.1f} %, {rss[0]:.0f} MB", file=sys.stderr)
    rounds = await run(address, given.cohort, given.rounds)
    rss.append(resident(server))
    print(f"rounds of {1000 * statistics.median(rounds):.0f} ms, {rss[1]:.0f} MB", file=sys.stderr)
    killed = time.monotonic()
    server.kill()
    server.start()
    count = await connected(address, server, given.clients)
    back = time.monotonic() - killed
    rss.append(resident(server))
    return {
        "connected": count,
        "server_rss_mb": round(max(rss)),
        "idle_cpu_percent": round(idle, 1),
        "round_ms": round(1000 * statistics.median(rounds)),
        "reconnect_s": round(back, 1),
    }


async def connected(address: str, server: Actor, clients: int) -> int:
    """Wait until all are; how many the server says there are.

    It is asked only once the kernel shows as many connections to it: the answer about thousands costs it time.
    """
    begun = time.monotonic()
    count = -1
    while time.monotonic() - begun < PATIENCE_S:
        if server.ended() is not None:
            raise SystemExit(f"the server ended: {server.last_words()}")
        if established(int(address.rpartition(":")[2])) >= clients:
            with contextlib.suppress(SeqfedError):
                async with operating(address, insecure=False) as operator:
                    count = sum(one.connected for one in await operator.clients())
            if count >= clients:
                break
            await asyncio.sleep(0.5)
        await asyncio.sleep(0.2)
    return count


def established(port: int) -> int:
    """TCP connections to this port of the loopback interface."""
    local, state, found = f":{port:04X}", "01", 0
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):  # gRPC listens on both with one socket
        with contextlib.suppress(FileNotFoundError), table.open() as lines:
            rows = (line.split() for line in lines)
            found += sum(row[1].endswith(local) and row[3] == state for row in rows)
    return found


def resident(server: Actor) -> float:
    return psutil.Process(server.pid).memory_info().rss / 1e6


async def idle_cpu(server: Actor, seconds: float) -> float:
    """Per cent of a core."""
    await asyncio.sleep(3.0)  # for what the arrivals have left behind
    process, begun = psutil.Process(server.pid), time.monotonic()
    before = process.cpu_times()
    await asyncio.sleep(seconds)
    after = process.cpu_times()
    used = after.user + after.system - before.user - before.system
    return 100 * used / (time.monotonic() - begun)


async def run(address: str, cohort: int, rounds: int) -> list[float]:
    """A run of so many rounds and one before; the seconds of each round but the first."""
    spec = RunSpec(
        name="fleet",
        rounds=rounds + 1,
        data=DataSpec(features=FEATURES, classes=CLASSES),
        model=ModelSpec(kind="gru", hidden=32, layers=1),
        cohort=CohortSpec(min_clients=cohort, count=cohort),
        evaluation=EvaluationSpec(every=0),
    )
    history: list[RoundRecord] = []
    async with operating(address, insecure=False) as operator:
        submitted = await operator.submit(spec, None)
        view = submitted
        async for view in operator.watch(submitted.run):
            history.extend(view.history)
        if view.phase != "finished":
            raise SystemExit(f"the run {view.phase}: {view.reason}")
    return [one.seconds for one in history[1:]]


if __name__ == "__main__":
    main()
