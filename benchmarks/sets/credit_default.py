"""Taiwan's credit cards: default next month from six monthly steps; the clients are banks by education and age."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from benchmarks.sets import Experiment
from seqfed.common.seeds import generator

WIDE = {
    "PAY": ["PAY_6", "PAY_5", "PAY_4", "PAY_3", "PAY_2", "PAY_0"],  # the oldest month first; the source has no PAY_1
    "BILL_AMT": [f"BILL_AMT{month}" for month in range(6, 0, -1)],
    "PAY_AMT": [f"PAY_AMT{month}" for month in range(6, 0, -1)],
    "LIMIT_BAL": ["LIMIT_BAL"] * 6,
}
LABEL = "default.payment.next.month"
TEST_SHARE = 0.2


def prepare(raw: Path, work: Path) -> Experiment:
    """A fifth of the customers is the test; the others go to nine banks."""
    with (raw / "UCI_Credit_Card.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    test = set(generator(0, "credit test").permutation(len(rows))[: int(TEST_SHARE * len(rows))].tolist())
    place = {name: number for number, name in enumerate(header)}
    banks: dict[str, list[list[str]]] = {}
    for number, row in enumerate(rows):
        if number not in test:
            school = {"1": "graduate", "2": "university"}.get(row[place["EDUCATION"]], "other")
            age = float(row[place["AGE"]])
            band = "under-30" if age < 30 else "under-40" if age < 40 else "over-40"
            banks.setdefault(f"{school}-{band}", []).append(row)
    clients = {name: work / f"train-{name}.csv" for name in sorted(banks)}
    for name, path in clients.items():
        _write(path, header, banks[name])
    _write(work / "test.csv", header, [rows[number] for number in sorted(test)])
    kept = [row for bank in banks.values() for row in bank]
    numbers = [np.array([[float(row[place[name]]) for name in columns] for row in kept]) for columns in WIDE.values()]
    reading = {"wide": WIDE, "label": LABEL}
    return Experiment(
        metric="auroc",
        floor=0.726,
        floor_is="logistic regression",
        run={
            "data": {
                "columns": list(WIDE),
                "mean": [float(one.mean()) for one in numbers],
                "scale": [float(one.std()) for one in numbers],
                "steps": 6,
                "classes": 2,
            },
            "model": {"kind": "lstm", "hidden": 32, "layers": 1},
            "training": {
                "learning_rate": 3e-3,
                "batch_size": 64,
                "epochs": 1,
                "schedule": "cosine",
                "final": 0.1,
            },
        },
        reading=reading,
        clients=clients,
        pooled=str(work / "train-*.csv"),
        alone=tuple(list(clients)[::4]),
        test={**reading, "file": str(work / "test.csv")},
        rounds=(20, 10, 10),
    )


def _write(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
