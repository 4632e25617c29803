"""C-MAPSS FD001: how many cycles a turbofan has left, at most 125; 100 engines at five airlines."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.sets import Experiment

NAMES = ["engine", "cycle", "setting1", "setting2", "setting3", *(f"sensor{number}" for number in range(1, 22))]
CAP = 125  # cycles: as in the literature, since a new engine shows nothing of its end
WINDOW = 30  # cycles: the shortest test engine has 31
AIRLINES = 5


def prepare(raw: Path, work: Path) -> Experiment:
    """Engines in blocks of 20 a client; of each test engine the last window, and its remaining life in a second table."""
    train, test = (np.loadtxt(raw / f"{name}_FD001.txt") for name in ("train", "test"))
    left = np.minimum(np.loadtxt(raw / "RUL_FD001.txt"), CAP)
    used = [place for place in range(2, len(NAMES)) if np.ptp(train[:, place]) > 0]
    engines = train[:, 0].astype(int)
    clients = {}
    for number in range(AIRLINES):
        clients[f"airline-{number}"] = work / f"train-{number}.csv"
        _write(work / f"train-{number}.csv", train[(engines - 1) * AIRLINES // engines.max() == number])
    _write(work / "test.csv", np.concatenate([test[test[:, 0] == one][-WINDOW:] for one in np.unique(test[:, 0])]))
    with (work / "left.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("engine", "left"), *zip(range(1, len(left) + 1), map(int, left), strict=True)])
    lives = np.concatenate([np.minimum(np.arange(count)[::-1], CAP) for count in np.bincount(engines)[1:]])
    reading = {"group": "engine", "time": "cycle"}
    return Experiment(
        metric="rmse",
        floor=16.36,
        floor_is="ridge regression",
        run={
            "data": {
                "columns": [NAMES[place] for place in used],
                "mean": train[:, used].mean(0).tolist(),
                "scale": train[:, used].std(0).tolist(),
                "steps": WINDOW,
                "stride": 2,
                "targets": 1,
                "target_mean": [float(lives.mean())],
                "target_scale": [float(lives.std())],
            },
            "task": {"kind": "regression"},
            "model": {"kind": "lstm", "hidden": 32, "layers": 1},
            "training": {
                "learning_rate": 3e-3,
                "batch_size": 64,
                "epochs": 1,
                "schedule": "cosine",
                "final": 0.1,
                "clip_norm": 1.0,
            },
        },
        reading={**reading, "remaining": CAP},
        clients=clients,
        pooled=str(work / "train-*.csv"),
        alone=tuple(clients),
        test={**reading, "file": str(work / "test.csv"), "label_file": str(work / "left.csv"), "label": "left"},
        rounds=(30, 10, 10),
    )


def _write(path: Path, rows: NDArray[np.float64]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([NAMES, *([*map(int, row[:2]), *map(float, row[2:])] for row in rows)])
