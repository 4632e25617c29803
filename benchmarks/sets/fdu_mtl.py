"""FDU-MTL: is a review for or against; words; the clients are 16 kinds of goods and films."""

from __future__ import annotations

import gzip
import shutil
from collections import Counter
from pathlib import Path

from benchmarks.sets import Experiment

WORDS = 10_000  # of the vocabulary, the most frequent ones
STEPS = 80  # words of a review, its last ones


def prepare(raw: Path, work: Path) -> Experiment:
    """The files as they are, under names that say what they are; the tests, 400 of each domain, are scored together."""
    clients = {}
    counts: Counter[str] = Counter()
    for path in sorted(raw.glob("*.task.train.gz")):
        domain = path.name.split(".")[0]
        clients[domain] = work / f"train-{domain}.tsv.gz"
        shutil.copyfile(path, clients[domain])
        shutil.copyfile(raw / f"{domain}.task.test.gz", work / f"test-{domain}.tsv.gz")
        with gzip.open(path, "rt", encoding="latin-1", newline="\n") as file:
            for line in file:
                counts.update(line.rstrip("\n").partition("\t")[2].split())
    reading = {"names": ["label", "text"], "text": "text", "label": "label", "encoding": "latin-1"}
    return Experiment(
        metric="accuracy",
        floor=0.812,
        floor_is="naive Bayes on the pooled words",
        run={
            "data": {
                "vocabulary": [word for word, _ in counts.most_common(WORDS)],
                "unit": "words",
                "steps": STEPS,
                "classes": 2,
            },
            "model": {"kind": "lstm", "hidden": 16, "layers": 1, "embedding": 16, "pooling": "mean"},
            "training": {
                "learning_rate": 3e-2,
                "batch_size": 32,
                "epochs": 1,
                "schedule": "cosine",
                "final": 0.1,
                "clip_norm": 1.0,
            },
        },
        reading=reading,
        clients=clients,
        pooled=str(work / "train-*.tsv.gz"),
        alone=tuple(list(clients)[::5]),
        test={**reading, "file": str(work / "test-*.tsv.gz")},
        rounds=(20, 3, 3),
    )
