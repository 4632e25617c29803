"""A client's identity: kept over restarts, held by one process at a time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from seqfed.client import identity
from seqfed.common.errors import StorageError

TAKE = """
import resource, signal, sys
from pathlib import Path
from seqfed.client import identity
from seqfed.common.errors import SeqfedError
if sys.argv[2:]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    print(identity.take(Path(sys.argv[1]), "ward"))
except SeqfedError as error:
    print(type(error).__name__, error)
"""


def elsewhere(folder: Path, *limit: str) -> str:
    """What another process, ended by now, got."""
    command = [sys.executable, "-c", TAKE, str(folder), *limit]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def test_it_outlives_the_process(tmp_path: Path) -> None:
    first = elsewhere(tmp_path / "state")
    assert re.fullmatch("[0-9a-f]{32}", first)
    assert identity.take(tmp_path / "state", "ward") == first


def test_one_process_at_a_time(tmp_path: Path) -> None:
    identity.take(tmp_path, "ward")
    said = f"another client runs with the state folder {tmp_path}; give this one another --name or --state"
    assert elsewhere(tmp_path) == f"StorageError {said}"
    with pytest.raises(StorageError, match="another client runs"):
        identity.take(tmp_path, "ward")


def test_two_clients_are_two(tmp_path: Path) -> None:
    assert identity.take(tmp_path / "a", "ward") != identity.take(tmp_path / "b", "ward")


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 40, b"x" * 999, b"0123456789ABCDEF"])
def test_a_damaged_file_is_renewed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "instance").write_bytes(content)
    found = identity.take(tmp_path, "ward")
    assert re.fullmatch("[0-9a-f]{32}", found)
    assert (tmp_path / "instance").read_text() == found


def test_the_folder_is_the_owners_and_named_after_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    identity.take(None, "ward")
    (file,) = tmp_path.rglob("instance")
    assert file.parent.name == "ward"
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(StorageError, match="opening the client's state folder"):
        identity.take(tmp_path / "state", "ward")


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    assert elsewhere(tmp_path, "0") == f"StorageError saving {tmp_path / 'instance'}: File too large"
    assert re.fullmatch("[0-9a-f]{32}", elsewhere(tmp_path))  # and once there is room
