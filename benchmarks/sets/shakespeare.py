"""Shakespeare: the next character of a speaking role; the clients are the largest roles."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.sets import Experiment

ROLES = 12  # of 1,129: what the time suffices for
STEPS = 80  # characters, as in LEAF
ORDER = 6  # of the floor: characters of an n-gram


def prepare(raw: Path, work: Path) -> Experiment:
    """Each role's first symbols are its training text, the rest its test, as the set itself says."""
    with np.load(raw / "shards" / "clients.npz") as archive:
        text, start, length, split, vocabulary = (
            archive[name] for name in ("text", "start", "length", "split", "vocab")
        )
    symbols = np.array(list(str(vocabulary)))
    train, test, clients = [], [], {}
    for number, role in enumerate(np.argsort(-length, kind="stable")[:ROLES]):
        whole = "".join(symbols[text[start[role] :][: length[role]]])
        train.append(whole[: split[role]])
        test.append(whole[split[role] :])
        clients[f"role-{number:02}"] = work / f"train-{number:02}.txt"
        (work / f"train-{number:02}.txt").write_bytes(train[-1].encode())
        (work / f"test-{number:02}.txt").write_bytes(test[-1].encode())
    return Experiment(
        metric="accuracy",
        floor=ngram_accuracy(train, test, ORDER),
        floor_is=f"{ORDER}-gram with back-off on the same roles",
        run={
            "data": {"vocabulary": symbols.tolist(), "unit": "characters", "steps": STEPS},
            "task": {"kind": "next_token"},
            "model": {"kind": "lstm", "hidden": 128, "layers": 1, "embedding": 16},
            "training": {
                "learning_rate": 2e-2,
                "batch_size": 8,
                "epochs": 1,
                "schedule": "cosine",
                "final": 0.1,
                "clip_norm": 5.0,
            },
        },
        reading={},
        clients=clients,
        pooled=str(work / "train-*.txt"),
        alone=tuple(list(clients)[::4]),
        test={"file": str(work / "test-*.txt")},
        rounds=(20, 6, 6),
    )


def ngram_accuracy(train: Iterable[str], test: Iterable[str], order: int) -> float:
    """Share of the test's characters that are the most frequent ones after the longest context seen in training.

    The first character of each text is not asked for. A context has at most order - 1 characters.

    >>> ngram_accuracy(["abcabd"], ["abc", "xb"], 3)
    0.6666666666666666
    """
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for text in train:
        for place, after in enumerate(text):
            for size in range(min(place, order - 1) + 1):
                seen[text[place - size : place]][after] += 1
    likely = {context: max(counts, key=counts.__getitem__) for context, counts in seen.items()}
    right = asked = 0
    for text in test:
        for place in range(1, len(text)):
            contexts = (text[place - size : place] for size in range(min(place, order - 1), -1, -1))
            right += text[place] == likely[next(one for one in contexts if one in likely)]
            asked += 1
    return right / asked
