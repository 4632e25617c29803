"""Any bytes at all into what reads bytes: the model files, the settings, the messages, the chunks, the certificates.

With atheris (`pip install --group fuzz`) the inputs are guided by coverage; without it they are plain mutations of the seeds
and the corpus, the same for the same --seed. Each target runs in a process of its own, so that a crash ends nothing else. An
input after which anything but a SeqfedError comes out is kept in benchmarks/corpus and tried again in every test run.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import hashlib
import importlib
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

CORPUS: Final = Path(__file__).parent / "corpus"
NAMES: Final = ("checkpoint", "config", "spec", "wire", "chunks", "identity", "payload")
INSTRUMENTED: Final = (
    "seqfed.common",
    "seqfed.client.policy",
    "seqfed.client.settings",
    "seqfed.server.settings",
    "tomllib",
)
LONGEST: Final = 8192  # bytes of an input
INPUT_S: Final = 20  # seconds after which one input counts as a crash
MEMORY_MB: Final = 2048  # the same
SMALL: Final = 512  # bytes of an input that is kept for its coverage
KEPT: Final = 20  # inputs of a target that are kept, and only the first for one place in the code
GRACE_S: Final = 90.0  # for a process to start and end, above its own time


@dataclass
class Outcome:
    """What came of one target. `untyped`: the place in the code and the error, of each kind one."""

    inputs: int = 0
    crashes: int = 0
    untyped: int = 0
    found: dict[str, str] = field(default_factory=dict)  # place and error: name of the input in the corpus
    coverage: int | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="of wall time in all")
    parser.add_argument(
        "--inputs", type=int, default=0, help="stop each target after so many; 0: when its time is over"
    )
    parser.add_argument("--target", action="append", choices=NAMES, help="only this one; may be given again")
    parser.add_argument("--plain", action="store_true", help="mutate without coverage, also where atheris is installed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="targets at the same time")
    parser.add_argument("--save", type=Path, default=CORPUS, help="folder for the inputs that find something")
    parser.add_argument(
        "--keep", type=int, default=0, help="so many small inputs a target that coverage found worth it, too"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--child", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        _child(given)
        return

    from benchmarks.harness import machine, tell

    guided = importlib.util.find_spec("atheris") is not None and not given.plain
    if not guided and not given.plain:
        print("atheris is not installed (pip install --group fuzz): plain mutations, which coverage does not guide")
    names = given.target or list(NAMES)
    jobs = max(1, min(given.jobs, len(names)))
    seconds = given.minutes * 60 * jobs / len(names)
    begun = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = dict(zip(names, pool.map(lambda name: _target(name, seconds, given, guided), names), strict=True))
    for name, outcome in outcomes.items():
        for what, file in outcome.found.items():
            print(f"{name}: {what}: {file}", file=sys.stderr)
    tell(
        {
            "targets": {name: _shown(outcome) for name, outcome in outcomes.items()},
            "inputs": sum(one.inputs for one in outcomes.values()),
            "crashes": sum(one.crashes for one in outcomes.values()),
            "untyped": sum(one.untyped for one in outcomes.values()),
            "seconds": round(time.monotonic() - begun, 1),
            "guided": guided,
            "machine": machine(),
        },
        given.json,
    )
    if any(one.crashes or one.untyped for one in outcomes.values()):
        raise SystemExit(1)


def _shown(outcome: Outcome) -> dict[str, int]:
    shown = {"inputs": outcome.inputs, "crashes": outcome.crashes, "untyped": outcome.untyped}
    return shown if outcome.coverage is None else {**shown, "coverage": outcome.coverage}


def _target(name: str, seconds: float, given: argparse.Namespace, guided: bool) -> Outcome:
    """Run one target in a process of its own, and again with what is left of its time after a crash."""
    outcome, until, again = Outcome(), time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory(prefix="seqfed-fuzz-") as work:
        folder = Path(work)
        (folder / "new").mkdir()
        while again == 0 or (again < KEPT and until - time.monotonic() > 1 and not _enough(outcome, given.inputs)):
            command = [sys.executable, "-m", "benchmarks.fuzz", "--child", work, "--target", name]
            command += ["--seconds", str(max(1.0, until - time.monotonic())), "--seed", str(given.seed + again)]
            command += ["--inputs", str(max(0, given.inputs - outcome.inputs)), *(["--plain"] if not guided else [])]
            command += ["--again"] if again else []  # without the corpus, which may now have what ended the last one
            ended = _run(command, folder / "log", seconds + GRACE_S)
            _count(outcome, folder, ended, given.save / name)
            again += 1
            if ended == 0:
                break
        # A certificate or key that is made anew each time has no place in a corpus.
        small = sorted(
            (one for one in (folder / "new").iterdir() if name != "identity"), key=lambda one: one.stat().st_size
        )
        for one in small[: given.keep]:
            (given.save / name).mkdir(parents=True, exist_ok=True)
            if one.stat().st_size <= SMALL:
                (given.save / name / f"new-{one.name[:12]}").write_bytes(one.read_bytes())
    return outcome


def _enough(outcome: Outcome, inputs: int) -> bool:
    return 0 < inputs <= outcome.inputs


def _run(command: Sequence[str], log: Path, timeout_s: float) -> int:
    with log.open("wb") as file:
        try:
            return subprocess.run(command, stdout=file, stderr=file, timeout=timeout_s, check=False).returncode
        except subprocess.TimeoutExpired:
            return -1


def _count(outcome: Outcome, folder: Path, ended: int, save: Path) -> None:
    """Add what a process has left behind."""
    told = (folder / "log").read_text(errors="replace")
    figures = _lines(folder / "figures")
    outcome.inputs += max([one["inputs"] for one in figures], default=0)
    if seen := re.findall(r"\bcov: (\d+)", told):
        outcome.coverage = max(outcome.coverage or 0, int(seen[-1]))
    for one in _lines(folder / "found"):
        outcome.untyped += 1
        _keep(outcome, one["what"], bytes.fromhex(one["input"]), save)
    if ended != 0:
        outcome.crashes += 1
        last = folder / "last"
        data = next(iter(folder.glob("crash-*")), last)
        words = " | ".join(told.strip().splitlines()[-12:])
        _keep(outcome, f"ended with {ended}: {words[-600:]}", data.read_bytes() if data.exists() else b"", save)
    for name in ("figures", "found", *(one.name for one in folder.glob("crash-*"))):
        (folder / name).unlink(missing_ok=True)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _keep(outcome: Outcome, what: str, data: bytes, save: Path) -> None:
    if what in outcome.found or len(outcome.found) >= KEPT:
        return
    name = f"found-{hashlib.sha256(data).hexdigest()[:12]}"
    save.mkdir(parents=True, exist_ok=True)
    (save / name).write_bytes(data)
    outcome.found[what] = str(save / name)


# In the process of one target -----------------------------------------------------------------------------------------


def _child(given: argparse.Namespace) -> None:
    (name,) = given.target
    faulthandler.enable()
    if given.plain:
        targets = importlib.import_module("benchmarks.targets")
        watch = _Watch(targets.TARGETS[name], given.child)
        _mutate(watch, _start(given, targets), targets.WORDS[name], given)
        watch.tell()
        return
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        for module in INSTRUMENTED[1:]:
            importlib.import_module(module)
        targets = importlib.import_module("benchmarks.targets")
    first = given.child / "seeds"
    first.mkdir(exist_ok=True)
    for number, data in enumerate(_start(given, targets)):
        (first / str(number)).write_bytes(data)
    words = given.child / "words"
    words.write_text("".join(f'"{"".join(f"{chr(92)}x{byte:02x}" for byte in one)}"\n' for one in targets.WORDS[name]))
    watch = _Watch(targets.TARGETS[name], given.child)
    flags = [
        f"-max_total_time={max(1, round(given.seconds))}",
        f"-max_len={LONGEST}",
        f"-timeout={INPUT_S}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-dict={words}",
        f"-artifact_prefix={given.child}/crash-",
        f"-seed={given.seed + 1}",
        *([f"-runs={given.inputs}"] if given.inputs else []),
    ]
    atheris.Setup([sys.argv[0], *flags, str(given.child / "new"), str(first)], watch)
    atheris.Fuzz()  # does not return


def _start(given: argparse.Namespace, targets: Any) -> list[bytes]:
    (name,) = given.target
    return [*targets.seeds(name).values(), *(data for _, data in kept(name) if not given.again)]


def kept(name: str) -> Iterator[tuple[str, bytes]]:
    """The inputs of a target in the corpus, by name."""
    for path in sorted((CORPUS / name).glob("*")):
        yield path.name, path.read_bytes()


class _Watch:
    """The target as a fuzzer calls it: an error without a type of ours is noted, and the next input comes."""

    def __init__(self, target: Callable[[bytes], None], folder: Path) -> None:
        from seqfed.common.errors import SeqfedError

        self._typed = SeqfedError
        self._target = target
        self._folder = folder
        self._seen: collections.Counter[str] = collections.Counter()
        self._told = 0.0
        self.inputs = 0
        self._last = os.open(folder / "last", os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    def __call__(self, data: bytes) -> None:
        os.pwrite(self._last, data, 0)  # what is at work when the process dies
        os.truncate(self._last, len(data))
        self.inputs += 1
        try:
            self._target(data)
        except self._typed:
            pass
        except BaseException as error:
            # pyo3 turns a Rust panic into a BaseException.
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            self._note(error, data)
        if (now := time.monotonic()) - self._told > 0.5:
            self._told = now
            self.tell()

    def _note(self, error: BaseException, data: bytes) -> None:
        place = f"{type(error).__name__} at {_place(error)}"
        self._seen[place] += 1
        if self._seen[place] <= KEPT:
            with (self._folder / "found").open("a") as file:
                file.write(json.dumps({"what": place, "input": data.hex()}) + "\n")

    def tell(self) -> None:
        """Leave the figures for the parent, however this process ends."""
        with (self._folder / "figures").open("a") as file:
            file.write(json.dumps({"inputs": self.inputs}) + "\n")


def _place(error: BaseException) -> str:
    """Where our code was when the error came: the innermost frame of the packages, or of the targets."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [one for one in frames if "seqfed" in Path(one.filename).parts] or frames[-1:]
    return f"{Path(ours[-1].filename).name}:{ours[-1].name}"


def _mutate(watch: _Watch, start: Sequence[bytes], words: Sequence[bytes], given: argparse.Namespace) -> None:
    """Plain mutations until the time is over, or so many; every seed as it is comes first."""
    draw = random.Random(f"{given.seed}/{given.target}")  # noqa: S311 - not a secret
    until = time.monotonic() + given.seconds
    for data in start:
        watch(data)
    while time.monotonic() < until and not 0 < given.inputs <= watch.inputs:
        watch(mutated(draw, start, words))


def mutated(draw: random.Random, start: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """One of these inputs, changed in a few places."""
    data = bytearray(draw.choice(start))
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << draw.randrange(8)
            case 1 if data:
                data[at % len(data)] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
            case 2:
                del data[at : at + draw.choice((1, 2, 4, 16, 256))]
            case 3:
                data[at:at] = data[at : at + draw.choice((1, 4, 32, 256))] * draw.choice((1, 2, 8))
            case 4:
                other = draw.choice(start)
                data[at:] = other[draw.randrange(len(other) + 1) :]
            case 5:
                data[at:at] = draw.choice(words)
            case _:
                data[at:at] = draw.randbytes(draw.choice((1, 4, 8)))
        del data[LONGEST:]
    return bytes(data)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
