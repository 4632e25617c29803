"""What a person meets at a terminal: the demo, its end by Ctrl-C, an idle client's size, and refusals in words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from tests.integration.cluster import Cluster, some_sequences

SEQFED = [sys.executable, "-m", "seqfed.common.cli"]


def seqfed(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SEQFED, *arguments], capture_output=True, text=True, timeout=100, cwd=cwd)


@pytest.mark.slow
def test_the_demo_trains_saves_and_tells_in_json(tmp_path: Path) -> None:
    flags = ("--rounds", "2", "--clients", "2", "--partition", "iid", "--model", "gru", "--out", "here", "--json")
    done = seqfed("demo", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    wanted = {"accuracy", "pooled_accuracy", "alone_accuracy_mean", "rounds", "seconds"}
    assert set(result) == wanted | {"clients", "bytes_up", "bytes_down", "model"}
    assert (result["rounds"], result["clients"], result["model"]) == (2, 2, "here/model.safetensors")
    assert result["accuracy"] > 0.15  # ten classes
    assert result["bytes_up"] > 2 * 2 * 4 * 10_000  # clients x rounds x bytes x parameters
    assert (tmp_path / "here" / "model.safetensors").stat().st_size > 100_000
    assert (tmp_path / "here" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "round 2" in done.stderr
    assert "next:" in done.stderr


@pytest.mark.slow
def test_the_demo_deals_ones_own_file(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    lines = ["pump,pressure,heat,fails"]
    for pump in range(18):
        heat = draw.normal(0, 1, 12)
        lines += [f"p{pump},{draw.normal():.3f},{one:.3f},{'soon' if heat.sum() > 0 else 'no'}" for one in heat]
    (tmp_path / "pumps.csv").write_text("\n".join(lines) + "\n")
    data = ("--data", "pumps.csv", "--group", "pump", "--label", "fails", "--partition", "iid")
    done = seqfed("demo", *data, "--rounds", "2", "--clients", "3", "--out", "here", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["clients"], result["rounds"]) == (3, 2)
    assert 0 <= result["accuracy"] <= 1
    out = tmp_path / "predictions.csv"
    use = ("--model", "here/model.safetensors", "--data", "pumps.csv", "--group", "pump")
    assert seqfed("predict", *use, "--out", str(out), cwd=tmp_path).returncode == 0
    assert len(out.read_text().splitlines()) == 1 + 18
    told = json.loads(seqfed("evaluate", *use, "--label", "fails", "--json", cwd=tmp_path).stdout)
    assert told["sequences"] == 18


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_ends_every_process_of_the_demo(tmp_path: Path, number: signal.Signals) -> None:
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(
            [*SEQFED, "demo", "--clients", "2"], cwd=tmp_path, stdout=out, stderr=out, start_new_session=True
        )
    demo = psutil.Process(process.pid)
    deadline = time.monotonic() + 60
    while len(demo.children()) < 3:  # a server and two clients
        assert time.monotonic() < deadline
        assert process.poll() is None, (tmp_path / "out").read_text()
    children = demo.children(recursive=True)
    os.kill(process.pid, number)
    assert process.wait(20) == 130
    assert not [one for one in children if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert "Traceback" not in (tmp_path / "out").read_text()


def test_an_idle_client_is_small_and_has_no_torch_nor_without_tls_cryptography(cluster: Cluster) -> None:
    cluster.start_client("idle", some_sequences(20, 1))
    deadline = time.monotonic() + 60
    while not json.loads(seqfed("clients", "--server", cluster.address, "--json").stdout):
        assert time.monotonic() < deadline
    for name, megabytes in (("idle", 100), ("server", 150)):
        process = psutil.Process(cluster.started.pid(name))
        assert process.memory_info().rss < megabytes * 1e6
        assert not [one.path for one in process.memory_maps() if "libtorch" in one.path]
    idle = psutil.Process(cluster.started.pid("idle"))
    assert not [one.path for one in idle.memory_maps() if "cryptography" in one.path]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("runs", "--server", "127.0.0.1:1"), "no server answers at 127.0.0.1:1"),
        (("runs", "--server", "192.0.2.1:7733"), "--insecure"),
        (("runs", "--server", "nowhere:port"), "is not HOST:PORT"),
        (("server", "--host", "0.0.0.0"), "--insecure"),
        (("client",), "pass --data FILE"),
        (("client", "--data", "missing.npz"), "missing.npz"),
        (("client", "--data", "x.npz", "--name", "a/b"), "client name"),
        (("submit", "missing.toml"), "missing.toml"),
    ],
)
def test_refusals_are_one_line_with_a_remedy(arguments: tuple[str, ...], told: str) -> None:
    done = seqfed(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("seqfed: ")
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_operators_commands_in_text_and_json(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text('name = "tiny"\nrounds = 2\n[data]\nfeatures = 3\nclasses = 3\n[model]\nhidden = 4\n')

    def call(*arguments: str, status: int = 0) -> str:
        done = seqfed(arguments[0], *arguments[1:], "--server", cluster.address)
        assert done.returncode == status, done.stderr
        return done.stdout

    assert "serving" in call("health")
    assert "no runs yet" in call("runs")
    waiting = json.loads(call("submit", str(run), "--json"))
    assert waiting["phase"] == "queued"
    assert waiting["reason"] == "waits for 2 more of 2 clients; nobody is here"
    cluster.start_client("a", some_sequences(30, 1))
    cluster.start_client("b", some_sequences(20, 2))
    lines = [json.loads(line) for line in call("watch", "tiny", "--json").splitlines()]
    assert lines[-1]["phase"] == "finished"
    assert [record["round"] for line in lines for record in line["history"]] == [1, 2]
    assert [one["client"] for one in json.loads(call("clients", "--json"))] == ["a", "b"]
    assert json.loads(call("runs", "--json"))[0]["ended"]
    assert "finished" in call("runs")
    out = tmp_path / "model.safetensors"
    assert json.loads(call("export", "tiny", "--out", str(out), "--json"))["bytes"] == out.stat().st_size
    call("stop", "tiny", status=1)
    again = call("submit", str(run), "--initial", str(out), "--wait")
    assert again.splitlines()[-1] == "finished: all 2 rounds are done"
