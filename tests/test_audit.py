"""The scan for secrets and the look at the pins, on this repository and on planted mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (
    '[build-system]\nrequires = ["hatchling>=1"]\n[project]\ndependencies = ["A-b>=2,<3; sys_platform != \'x\'"]\n'
)
PINS = "# pins\na.b==2.5\nhatchling==1.27.0\n"
# assembled, so that this file does not find itself
SECRETS = {
    "a private key": "-----BEGIN EC PRIVATE " + "KEY-----",
    "an enrolment token": "ey" + "J" + "a" * 80 + "." + "b" * 80,
    "an AWS key": "AK" + "IA" + "A" * 16,
    "a GitHub token": "gh" + "p_" + "a" * 36,
    "a password in a URL": "postgresql://alice:" + "hunter2@db/runs",
    "a password": "pass" + 'word = "correct-horse"',
}


def audit(root: Path, *flags: str) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / ".ci" / "audit.py"), "--root", str(root), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.stderr or flags, done.stderr
    return done.returncode, done.stdout


def plant(root: Path, text: str = "", pins: str = PINS, project: str = PROJECT) -> Path:
    (root / "constraints.txt").write_text(pins)
    (root / "pyproject.toml").write_text(project)
    (root / "notes.md").write_text(text)
    return root


def test_this_repository_has_no_secrets_and_exact_pins() -> None:
    status, told = audit(ROOT)
    assert status == 0, told


@pytest.mark.parametrize("what", SECRETS)
def test_a_secret_is_found_by_its_line_and_not_shown(tmp_path: Path, what: str) -> None:
    assert audit(plant(tmp_path, f"one\n{SECRETS[what]}\n")) == (1, f"notes.md:2: looks like {what}\n")
    assert audit(plant(tmp_path, f"one\n{SECRETS[what]} # audit: fixture\n"))[0] == 0


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org:80/a@b",
        "postgresql://u:PASSWORD@db/runs",
        "postgresql://$USER:$PASS@db",
        "a@b:c",
        "password = ''",
    ],
)
def test_what_only_looks_like_one_is_not_found(tmp_path: Path, text: str) -> None:
    assert audit(plant(tmp_path, text))[0] == 0


def test_a_key_file_is_found_by_its_name(tmp_path: Path) -> None:
    (plant(tmp_path) / "ca.key").write_bytes(b"\0")
    assert audit(tmp_path) == (1, "ca.key: a file of this name is a key, and has no place here\n")


@pytest.mark.parametrize(
    ("pins", "told"),
    [
        (PINS + "c>=1\n", "constraints.txt:4: 'c>=1' is not NAME==VERSION"),
        (PINS + "c==1 --hash=sha256:00\n", "is not NAME==VERSION"),
        (PINS + "c @ https://example.org/c.whl\n", "is not NAME==VERSION"),
        (PINS + "A-B==2.5\n", "A-B stands here twice"),
        ("hatchling==1.27.0\n", "A-b (dependencies) has no pin"),
        (PINS.replace("2.5", "3.0"), "A-b==3.0 is not <3,>=2 (dependencies)"),
        (PINS.replace("hatchling", "other"), "hatchling (build-system) has no pin"),
    ],
)
def test_a_pin_that_is_none_or_not_in_its_range_is_told(tmp_path: Path, pins: str, told: str) -> None:
    status, found = audit(plant(tmp_path, pins=pins))
    assert status == 1
    assert told in found
