"""Real processes over real gRPC on loopback: a server and its clients."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqfed.client.admin import operating
from seqfed.client.data import Sequences
from seqfed.client.demo.processes import Processes, server_address
from seqfed.common import checkpoint
from seqfed.common.layout import Flat
from seqfed.common.model import layout_of
from seqfed.common.seeds import generator
from seqfed.common.spec import RunSpec
from seqfed.common.views import RoundRecord, RunView


def some_sequences(size: int, seed: int) -> Sequences:
    """Sequences of 4 steps of 3 numbers whose label (of 3) is the feature with the highest sum."""
    x = generator(seed, "test data").standard_normal((size, 4, 3)).astype(np.float32)
    return Sequences.of(x, x.sum(axis=1).argmax(axis=1))


def labels(data: Sequences) -> NDArray[Any]:
    """What `some_sequences` labelled."""
    assert data.y is not None
    return data.y


@dataclass
class Cluster:
    """A server process and its client processes."""

    work: Path
    started: Processes
    address: str = ""
    names: list[str] = field(default_factory=list)

    @property
    def server_pid(self) -> int:
        return int(json.loads((self.work / "server" / "address.json").read_text())["pid"])

    def start_server(self, port: str = "0") -> None:
        (self.work / "server" / "address.json").unlink(missing_ok=True)
        self.started.start("server", "server", "--port", port, "--state", str(self.work / "server"))
        self.address = server_address(self.work / "server", self.started)

    def start_client(self, name: str, data: Sequences, validation: Sequences | None = None) -> None:
        np.savez(self.work / f"{name}.npz", x=data.rows.reshape(len(data), 4, 3), y=labels(data))
        flags = ["--data", str(self.work / f"{name}.npz")]
        if validation is not None:
            np.savez(
                self.work / f"{name}-validation.npz",
                x=validation.rows.reshape(len(validation), 4, 3),
                y=labels(validation),
            )
            flags += ["--validation", str(self.work / f"{name}-validation.npz")]
        else:
            flags += ["--validation-fraction", "0"]
        identity = ("--name", name, "--state", str(self.work / name))
        self.started.start(name, "client", "--server", self.address, *identity, *flags)
        self.names.append(name)

    def run(self, spec: RunSpec) -> tuple[RunView, Flat]:
        """Submit, wait for the end, export: the last view with the whole history, and the model's numbers."""
        return asyncio.run(self._run(spec))

    async def _run(self, spec: RunSpec) -> tuple[RunView, Flat]:
        async with operating(self.address, insecure=False) as operator:
            run = (await operator.submit(spec, None)).run
            history: list[RoundRecord] = []
            view = None
            async for view in operator.watch(run):
                history.extend(view.history)
            assert view is not None
            await operator.export(run, self.work / "model.safetensors")
        flat = checkpoint.load(self.work / "model.safetensors", layout_of(spec)).flat
        return RunView(**{**vars(view), "history": tuple(history)}), flat
