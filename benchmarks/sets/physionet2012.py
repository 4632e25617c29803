"""PhysioNet 2012: death in hospital from 48 hours of irregular measurements; the clients are four kinds of intensive care."""

from __future__ import annotations

import csv
import gzip
import math
import shutil
from pathlib import Path

from benchmarks.sets import Experiment

UNITS = {"1": "coronary", "2": "cardiac-surgery", "3": "medical", "4": "surgical"}
STEP = 120.0  # minutes
MISSING = "-1"  # how the source writes an unknown height or weight


def prepare(raw: Path, work: Path) -> Experiment:
    """Set a by unit for training, set b for testing; the outcomes are second tables."""
    for half in "ab":
        shutil.copyfile(raw / f"Outcomes-{half}.txt", work / f"outcomes-{half}.csv")
    shutil.copyfile(raw / "set-b.csv.gz", work / "test.csv.gz")
    with gzip.open(raw / "set-a.csv.gz", "rt", newline="") as file:
        header, *rows = csv.reader(file)
    unit = {stay: value for stay, _, variable, value in rows if variable == "ICUType"}
    clients = {name: work / f"train-{name}.csv" for name in UNITS.values()}
    for code, name in UNITS.items():
        with clients[name].open("w", newline="") as file:
            csv.writer(file).writerows([header, *(row for row in rows if unit[row[0]] == code)])
    numbers: dict[str, list[float]] = {}
    for _, _, variable, value in rows:
        if value != MISSING:
            numbers.setdefault(variable, []).append(float(value))
    means = {name: math.fsum(one) / len(one) for name, one in numbers.items()}
    scales = {
        name: math.sqrt(math.fsum((value - means[name]) ** 2 for value in one) / len(one)) or 1.0
        for name, one in numbers.items()
    }
    columns = sorted(numbers)
    reading = {
        "group": "RecordID",
        "time": "minute",
        "variable": "parameter",
        "value": "value",
        "label": "In-hospital_death",
        "missing_values": [MISSING],
    }
    return Experiment(
        metric="auroc",
        floor=0.855,
        floor_is="logistic regression",
        run={
            "data": {
                "columns": columns,
                "mean": [means[name] for name in columns],
                "scale": [scales[name] for name in columns],
                "missing": "mask",
                "grid": STEP,
                "classes": 2,
            },
            "model": {"kind": "gru", "hidden": 32, "layers": 1},
            "training": {
                "learning_rate": 3e-3,
                "batch_size": 32,
                "epochs": 1,
                "schedule": "cosine",
                "final": 0.1,
                "clip_norm": 1.0,
            },
        },
        reading={**reading, "label_file": str(work / "outcomes-a.csv")},
        clients=clients,
        pooled=str(work / "train-*.csv"),
        alone=tuple(clients),
        test={**reading, "file": str(work / "test.csv.gz"), "label_file": str(work / "outcomes-b.csv")},
        rounds=(20, 8, 8),
    )
