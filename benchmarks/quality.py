"""What federating is worth on public data: federated beside pooled, alone, and a floor without a neural network.

Everything goes through the commands, over real processes: seqfed server, client, submit --wait, export, evaluate. `pooled`
is one client with all the training data, `alone` one client with its own; both by the same model and training, for their
own number of rounds. All models are scored on the same test data, which no client holds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import machine, tell
from benchmarks.sets import (
    Experiment,
    Prepare,
    Table,
    cmapss,
    credit_default,
    fdu_mtl,
    physionet2012,
    shakespeare,
    toml,
)
from seqfed.client.demo.processes import Processes, processes, server_address
from seqfed.common.metrics import SMALLER_IS_BETTER

SETS: Final[dict[str, Prepare]] = {
    "shakespeare": shakespeare.prepare,
    "cmapss": cmapss.prepare,
    "physionet2012": physionet2012.prepare,
    "credit_default": credit_default.prepare,
    "fdu_mtl": fdu_mtl.prepare,
}
NEAR: Final = 0.03  # the bar: how far from pooled, relative
FLAGS: Final = {"missing_values": "--missing-value"}  # where a flag is not called as its key in [data]


@dataclass
class Job:
    """One federation of its own: a server, its clients, and one run."""

    name: str
    run: Path  # run.toml
    clients: Mapping[str, Path]  # client.toml
    model: Path
    address: str = ""
    submitted: subprocess.Popen[bytes] | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder with a folder of each set")
    parser.add_argument("--set", action="append", choices=sorted(SETS), help="this one alone; may be given again")
    parser.add_argument("--work", type=Path, help="keep files, logs and models in this new folder")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    given = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="seqfed-quality-") as scratch:
        work = given.work or Path(scratch)
        results = [measure(name, given.data / name, work.resolve() / name) for name in given.set or SETS]
    tell(
        {
            "results": results,
            "near_pooled": sum(one["near_pooled"] for one in results),
            "above_floor_where_pooled_is": all(
                one["federated_above_floor"] for one in results if one["pooled_above_floor"]
            ),
            "better_than_alone": sum(one["better_than_alone"] for one in results),
            "seconds": round(time.monotonic() - begun, 1),
            "machine": machine(),
        },
        given.json,
    )


def measure(name: str, raw: Path, work: Path) -> dict[str, Any]:
    """One set's result."""
    begun = time.monotonic()
    if not raw.is_dir():
        raise SystemExit(f"{raw} is not a folder; --data names the folder that has {name}/")
    files = work / "files"
    files.mkdir(parents=True)
    experiment = SETS[name](raw, files)
    federated, pooled, alone = experiment.rounds
    everybody = {one: str(path) for one, path in experiment.clients.items()}
    together = _job(work, "federated", experiment, everybody, federated)
    others = [_job(work, "pooled", experiment, {"pooled": experiment.pooled}, pooled)]
    others += [_job(work, f"alone-{one}", experiment, {one: everybody[one]}, alone) for one in experiment.alone]
    with processes(work / "logs") as started:
        start = time.monotonic()
        _train([together], work, started)
        federated_s = time.monotonic() - start
        _train(others, work, started)
    scores = {job.name: _score(job, experiment, work) for job in (together, *others)}
    alone_scores = [value for job, value in scores.items() if job.startswith("alone-")]
    better = min if experiment.metric in SMALLER_IS_BETTER else max
    mean = sum(alone_scores) / len(alone_scores)
    fed, all_in_one = scores["federated"], scores["pooled"]
    behind = (all_in_one - fed) if better is max else (fed - all_in_one)
    result = {
        "set": name,
        "metric": experiment.metric,
        "pooled": round(all_in_one, 4),
        "federated": round(fed, 4),
        "alone_mean": round(mean, 4),
        "floor": round(experiment.floor, 4),
        "rounds": federated,
        "seconds": round(time.monotonic() - begun, 1),
        "floor_is": experiment.floor_is,
        "clients": len(experiment.clients),
        "alone": [round(one, 4) for one in alone_scores],
        "alone_best": round(better(alone_scores), 4),
        "pooled_rounds": pooled,
        "alone_rounds": alone,
        "federated_seconds": round(federated_s, 1),
        "behind_pooled": round(behind / all_in_one, 4),
        "near_pooled": behind <= NEAR * all_in_one,
        "pooled_above_floor": better(all_in_one, experiment.floor) == all_in_one,
        "federated_above_floor": better(fed, experiment.floor) == fed,
        "better_than_alone": better(fed, mean) == fed != mean,
    }
    print(json.dumps(result), file=sys.stderr)
    return result


def _job(work: Path, name: str, experiment: Experiment, files: Mapping[str, str], rounds: int) -> Job:
    """Write the run.toml and the client.toml files of one federation."""
    folder = work / name
    folder.mkdir()
    run: Table = {"name": name[:64], "seed": 1, "rounds": rounds, **experiment.run}
    run |= {"cohort": {"min_clients": len(files)}, "evaluation": {"every": 0}}
    (folder / "run.toml").write_text(toml(run), "utf-8")
    clients = {}
    for client, file in files.items():
        clients[client] = folder / f"{client}.toml"
        data = {"file": file, "validation_fraction": 0.0, **experiment.reading}
        clients[client].write_text(toml({"name": client, "state": str(folder / client), "data": data}), "utf-8")
    return Job(name, folder / "run.toml", clients, folder / "model.safetensors")


def _train(jobs: Sequence[Job], work: Path, started: Processes) -> None:
    """All these federations at the same time, each with its processes, up to the exported models."""
    names: list[str] = []
    for job in jobs:
        state = work / job.name / "server"
        names.append(f"{job.name}-server")
        started.start(names[-1], "server", "--port", "0", "--state", str(state))
        job.address = server_address(state, started)
        for client, config in job.clients.items():
            names.append(f"{job.name}-{client}")
            started.start(names[-1], "client", str(config), "--server", job.address)
        log = work / "logs" / f"{job.name}-submit.log"
        with log.open("wb") as out:
            job.submitted = subprocess.Popen(
                _command("submit", str(job.run), "--wait", "--json", "--server", job.address), stdout=out, stderr=out
            )
    waiting = list(jobs)
    while waiting:
        started.require_alive()
        for job in list(waiting):
            assert job.submitted is not None
            status = job.submitted.poll()
            if status is None:
                continue
            if status != 0:
                log = work / "logs" / f"{job.name}-submit.log"
                raise SystemExit(f"{job.name} ended with status {status}: {log.read_text()[-2000:]}")
            _call("export", job.name[:64], "--out", str(job.model), "--server", job.address, "--json")
            waiting.remove(job)
        time.sleep(0.2)
    for name in reversed(names):
        started.kill(name)


def _score(job: Job, experiment: Experiment, work: Path) -> float:
    """The metric of its model on the test data, by `seqfed evaluate`."""
    flags: list[str] = ["--data", experiment.test["file"]]
    for key, value in experiment.test.items():
        flag = FLAGS.get(key, "--" + key.replace("_", "-"))
        if key == "file":
            continue
        if isinstance(value, Mapping):
            flags += [part for name, columns in value.items() for part in (flag, f"{name}={','.join(columns)}")]
        elif key == "missing_values":
            flags += [f"{flag}={one}" for one in value]  # with a sign of equality, since a value may begin with a dash
        else:
            flags += [flag, ",".join(value) if isinstance(value, list) else str(value)]
    last = _call("evaluate", "--model", str(job.model), *flags, "--json").strip().splitlines()[-1]
    found = json.loads(last)
    return float(found.get("metrics", found)[experiment.metric])


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "seqfed.common.cli", *arguments]


def _call(*arguments: str) -> str:
    """Standard output of a command; SystemExit with its last words if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(_command(*arguments), capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"seqfed {' '.join(arguments)} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
