"""docker-compose.yml trains a federation from nothing to its end, in containers; its scripts also without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD_AND_TRAIN = 1500  # seconds; most of it is the image's first build


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


@pytest.mark.compose
@pytest.mark.timeout(BUILD_AND_TRAIN + 120)
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
    assert "for holders of a certificate" in logs.stdout  # it was TLS all the way


def test_what_the_containers_share_is_made_once(tmp_path: Path) -> None:
    for site in ("site-00", "site-01"):
        (tmp_path / "data" / site).mkdir(parents=True)
    (tmp_path / "federation" / "tokens").mkdir(parents=True)
    here = {"DATA": str(tmp_path / "data"), "FEDERATION": str(tmp_path / "federation")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def made() -> dict[str, bytes]:
        script = ROOT / "examples" / "compose" / "certificates.sh"
        subprocess.run(["sh", str(script)], env={**os.environ, **here, "PATH": path}, check=True, timeout=100)
        files = (tmp_path / "federation").rglob("*")
        return {str(one.relative_to(tmp_path / "federation")): one.read_bytes() for one in files if one.is_file()}

    first = made()
    assert {"ca/ca.key", "server/cert.pem", "viewer/cert.pem", "operator/cert.pem"} < first.keys()
    assert {"tokens/site-00.token", "tokens/site-01.token"} < first.keys()
    assert made() == first
    (tmp_path / "federation" / "server" / "cert.pem").unlink()  # as one that was stopped before its end
    again = made()
    assert again.pop("server/cert.pem") != first.pop("server/cert.pem")
    assert again.pop("server/key.pem") != first.pop("server/key.pem")
    assert again == first
