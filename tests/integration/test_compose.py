"""docker-compose.yml trains a federation from nothing to its end, in containers."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD_AND_TRAIN = 1500  # seconds; most of it is the image's first build

pytestmark = [pytest.mark.compose, pytest.mark.timeout(BUILD_AND_TRAIN + 120)]


def compose_command() -> list[str] | None:
    """Compose as a program of its own (1.29) or as docker's plugin (2), if either is here."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose"]
    return None


@pytest.fixture
def compose() -> Iterator[list[str]]:
    """The compose command of a project that no other has the name of; gone afterwards."""
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed")
    info = subprocess.run(["docker", "info"], capture_output=True, text=True)
    if info.returncode != 0:
        pytest.skip(f"no container engine answers: {(info.stderr or info.stdout).strip()}")
    command = compose_command()
    if command is None:
        pytest.skip("neither docker-compose nor docker's compose plugin is installed")
    command += ["--project-name", f"seqfed-test-{uuid.uuid4().hex[:8]}"]
    yield command
    subprocess.run([*command, "down", "--volumes", "--remove-orphans", "--rmi", "local"], cwd=ROOT)


def test_compose_trains_to_the_end(compose: list[str]) -> None:
    up = ["up", "--build", "--abort-on-container-exit", "--exit-code-from", "submit", "submit"]
    done = subprocess.run(
        [*compose, *up],
        cwd=ROOT,
        env=os.environ | {"SHARDS": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_AND_TRAIN,
    )
    logs = subprocess.run([*compose, "logs", "--no-color"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n--- logs ---\n{logs.stdout[-20000:]}"
    for site in ("site-00", "site-01", "site-02"):
        assert f"holding {site}" in logs.stdout, f"no replica held {site}:\n{logs.stdout[-20000:]}"
