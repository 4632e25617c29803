"""`seqfed export` from a real server: every format of the same model says the same."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from seqfed.client.admin import operating
from seqfed.client.model_file import read_model
from seqfed.client.network import network_for
from seqfed.common.config import validate
from seqfed.common.model import initial_parameters
from seqfed.common.spec import RunSpec
from seqfed.server.daemon import serving
from seqfed.server.settings import ServerSettings


async def test_every_format_of_a_runs_model(tmp_path: Path) -> None:
    data = {"columns": ["a", "b"], "mean": [3.0, -2.0], "scale": [2.0, 0.5], "classes": 3}
    spec = validate(RunSpec, {"name": "wards", "data": data, "model": {"kind": "gru", "hidden": 5}}, "test")

    async def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return await asyncio.to_thread(
            subprocess.run, command, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )

    async def export(*arguments: str) -> subprocess.CompletedProcess[str]:
        return await python("-m", "seqfed.common.cli", "export", "wards", "--server", address, *arguments)

    async with serving(ServerSettings(port=0, state=tmp_path / "server")) as address:
        async with operating(address, insecure=False) as operator:
            await operator.submit(spec, None)
        done = await asyncio.gather(
            export(), export("--format", "onnx", "--json"), export("--format", "torchscript", "--out", "own/name.pt")
        )
    for one in done:
        assert one.returncode == 0, one.stderr
    model = read_model(tmp_path / "model.safetensors")
    assert model.spec == spec
    assert model.parameters.flat.tobytes() == initial_parameters(spec).flat.tobytes()
    size = (tmp_path / "model.onnx").stat().st_size
    assert json.loads(done[1].stdout) == {"model": "model.onnx", "bytes": size}
    assert done[2].stdout.startswith("own/name.pt: ")

    x = np.random.default_rng(0).normal(3, 2, (4, 6, 2)).astype(np.float32)
    lengths = np.array([6, 1, 4, 3])
    network = network_for(spec)
    network.load(model.parameters)
    normalised = torch.from_numpy(((x - np.array([3.0, -2.0])) / np.array([2.0, 0.5])).astype(np.float32))
    wanted = network(normalised, torch.from_numpy(lengths)).detach().numpy()
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    outputs = np.asarray(session.run(None, {"x": x, "lengths": lengths})[0])
    np.testing.assert_allclose(outputs, wanted, rtol=1e-4, atol=1e-5)
    arguments = json.dumps([x.tolist(), lengths.tolist()])
    found = await python("-W", "ignore", "-c", LOADED, "own/name.pt", arguments)  # torch: TorchScript is deprecated
    assert found.returncode == 0, found.stderr
    np.testing.assert_allclose(json.loads(found.stdout), wanted, rtol=1e-4, atol=1e-5)


# In a process that has torch and nothing of seqfed.
LOADED = """
import json, sys, torch
module = torch.jit.load(sys.argv[1])
x, lengths = json.loads(sys.argv[2])
print(json.dumps(module(torch.tensor(x), torch.tensor(lengths)).tolist()))
assert not any(name.startswith("seqfed") for name in sys.modules)
"""
