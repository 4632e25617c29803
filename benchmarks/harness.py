"""What the benchmarks share: a model of about so many parameters, a federation of real processes, and the JSON line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.link import Links
from seqfed.client.admin import operating
from seqfed.client.demo.processes import Processes, processes, server_address
from seqfed.client.demo.run import certify
from seqfed.common.seeds import generator
from seqfed.common.spec import CohortSpec, DataSpec, EvaluationSpec, ModelSpec, RunSpec, TrainingSpec
from seqfed.common.views import RoundRecord, RunView

FEATURES, STEPS, CLASSES = 8, 8, 10  # of the digits as sequences, so that 52,874 parameters are the demo's model
EXAMPLES = 32  # a client: one batch


def spec_for(params: int, clients: int, rounds: int) -> RunSpec:
    """One local step a round of the two-layer LSTM whose size comes nearest to `params` from above."""
    # 12 h^2 + (4 x 8 + 26) h + 10 parameters at hidden size h
    hidden = math.ceil((-58 + math.sqrt(58 * 58 + 48 * (params - 10))) / 24)
    return RunSpec(
        name="benchmark",
        rounds=rounds,
        data=DataSpec(features=FEATURES, steps=STEPS, classes=CLASSES),
        model=ModelSpec(hidden=hidden),
        training=TrainingSpec(optimizer="sgd", learning_rate=0.1, batch_size=EXAMPLES, steps=1),
        cohort=CohortSpec(min_clients=clients),
        evaluation=EvaluationSpec(every=0),
    )


@dataclass(frozen=True)
class Federation:
    """A server and connected clients, idle."""

    address: str
    server_pid: int
    started: Processes
    credentials: Path | None  # the operator's, with TLS

    def run(self, spec: RunSpec) -> RunView:
        """Submit a run and wait for its end; the last view with the whole history."""
        return asyncio.run(self._run(spec))

    async def _run(self, spec: RunSpec) -> RunView:
        async with operating(self.address, insecure=False, credentials=self.credentials) as operator:
            view = await operator.submit(spec, None)
            history: list[RoundRecord] = []
            run = view.run
            async for view in operator.watch(run):
                history.extend(view.history)
            if view.phase != "finished":
                raise SystemExit(f"the run {view.phase}: {view.reason}")
        return RunView(**{**vars(view), "history": tuple(history)})


@contextlib.contextmanager
def federation(clients: int, *, tls: bool = False, net: Links | None = None) -> Iterator[Federation]:
    """A server and so many client processes on loopback, all connected; with `tls` by certificates of a CA of their own, with
    `net` each over a link of its own that has the client's name, client-000 and so on.
    """
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="seqfed-benchmark-")))
        with processes(work / "logs") as started:
            state, secure, credentials = work / "server", list[str](), None
            names = [f"client-{number:03}" for number in range(clients)]
            if tls:
                folder, credentials = certify(work, names)
                secure = ["--tls", str(folder)]
            listen = ("--host", net.host, *net.flags) if net else ()
            started.start("server", "server", "--port", "0", "--state", str(state), *secure, *listen)
            address = server_address(state, started)
            port = int(address.rpartition(":")[2])
            if net:
                address = f"127.0.0.1:{port}"  # not as the clients see it
            for number, client in enumerate(names):
                draw = generator(number, "benchmark data")
                x = draw.random((EXAMPLES, STEPS, FEATURES), np.float32)
                np.savez(work / f"{number}.npz", x=x, y=draw.integers(0, CLASSES, EXAMPLES))
                flags = ["--name", client, "--state", str(work / client), "--data", str(work / f"{number}.npz")]
                flags += ["--validation-fraction", "0"]
                if net is None:
                    started.start(client, "client", "--server", address, *flags)
                    continue
                place = net.add(client, [port])
                flags += ["--server", place.addresses[0], *net.flags]
                behind = Actor(client, work / "logs", "client", *flags, prefix=place.prefix)
                stack.callback(behind.kill)
                behind.start()
            pid = int(json.loads((state / "address.json").read_text())["pid"])
            made = Federation(address, pid, started, credentials)
            asyncio.run(_connected(made, clients))
            yield made


async def _connected(made: Federation, clients: int) -> None:
    async with operating(made.address, insecure=False, credentials=made.credentials) as operator:
        while sum(one.connected for one in await operator.clients()) < clients:
            made.started.require_alive()
            await asyncio.sleep(0.1)


class Actor:
    """A `seqfed` process that faults are done to: killed, suspended, started again. All its output goes to one log."""

    def __init__(self, name: str, folder: Path, *arguments: str, prefix: Sequence[str] = ()) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        child = [sys.executable, "-m", "seqfed.client.demo.child", str(os.getpid())]  # ends with this process
        self._command = [*prefix, *child, *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; nothing if it is over."""
        if self._process is not None:
            self._process.send_signal(number)

    def ended(self) -> int | None:
        """Its exit status, if it is over."""
        return None if self._process is None else self._process.poll()

    def wait(self, seconds: float = 20.0) -> int:
        """Its exit status, after SIGKILL if it does not end in time."""
        assert self._process is not None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait()

    def kill(self) -> None:
        """End it without warning, also when it is suspended."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def last_words(self) -> str:
        return (self.log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]


def free_port() -> int:
    """A port that nobody listens on, so that a server can come back to it."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def tell(result: dict[str, Any], as_json: bool) -> None:
    """Print the result: one JSON object as the last line, or one line a field."""
    if as_json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:>24}: {value}")


def machine() -> str:
    """This machine in a few words."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        return f"{sum(line.startswith('processor') for line in lines)} cores of {model}"
    return platform.machine()
