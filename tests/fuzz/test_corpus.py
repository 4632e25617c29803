"""The fuzzers' seeds and everything they have found: each input is done or refused with a type. And the fuzzers themselves."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.fuzz import CORPUS, NAMES, kept, mutated
from benchmarks.targets import TARGETS, WORDS, seeds

from seqfed.common.errors import SeqfedError

ROOT = Path(__file__).resolve().parents[2]
KNOWN: set[tuple[str, str]] = set()  # target and name of what is found and not mended yet
EVERY = [
    pytest.param(
        target, data, id=f"{target}/{name}", marks=[pytest.mark.xfail(strict=True)] if (target, name) in KNOWN else []
    )
    for target in NAMES
    for name, data in kept(target)
]


@pytest.mark.parametrize(("target", "data"), EVERY)
def test_what_was_found_is_done_or_refused(target: str, data: bytes) -> None:
    with contextlib.suppress(SeqfedError):
        TARGETS[target](data)


@pytest.mark.parametrize("target", NAMES)
def test_seeds_and_their_mutations_are_done_or_refused(target: str) -> None:
    draw, start = random.Random(5), list(seeds(target).values())  # noqa: S311 - not a secret
    changed = [mutated(draw, start, WORDS[target]) for _ in range(150)]
    for data in (*start, *changed):
        with contextlib.suppress(SeqfedError):
            TARGETS[target](data)


def test_good_seeds_are_done() -> None:
    for target, names in {
        "checkpoint": ("good", "other-order"),
        "config": ("run", "tokens", "server", "client", "policy"),
        "spec": ("run", "small", "custom"),
        "wire": tuple(seeds("wire")),
        "chunks": tuple(seeds("chunks")),
        "identity": ("certificate", "request", "key", "token-file", "address"),
        "payload": tuple(seeds("payload")),
    }.items():
        for name in names:
            TARGETS[target](seeds(target)[name])


def test_the_corpus_is_small_and_of_these_targets() -> None:
    files = [one for one in CORPUS.rglob("*") if one.is_file()]
    assert {one.parent.name for one in files} <= set(NAMES) == set(TARGETS)
    assert len(files) < 200
    assert sum(one.stat().st_size for one in files) < 200_000
    assert {(one.parent.name, one.name) for one in files} >= KNOWN


def test_the_fuzzer_tells_what_it_did(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.fuzz", "--plain", "--target", "chunks", "--inputs", "50", "--json"]
    done = subprocess.run([*command, "--save", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["targets"] == {"chunks": {"inputs": 50, "crashes": 0, "untyped": 0}}
    assert (result["inputs"], result["crashes"], result["untyped"], result["guided"]) == (50, 0, 0, False)
    assert not list(tmp_path.iterdir())
