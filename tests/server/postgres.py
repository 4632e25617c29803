"""A real PostgreSQL for tests: a cluster of one's own in a temporary folder, reached by a socket in it."""

from __future__ import annotations

import atexit
import functools
import os
import pwd
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

LINES = "listen_addresses = ''\nfsync = off\nmax_connections = 50\nshared_buffers = 16MB\nlog_min_messages = fatal\n"


@dataclass(frozen=True)
class Cluster:
    """A running server; it refuses to run as root, so root runs it as somebody else."""

    folder: Path
    programs: Path
    user: str | None

    def run(self, program: str, *arguments: str | Path) -> None:
        command: list[str | Path] = [self.programs / program, *arguments]
        if self.user is not None:  # not subprocess's `user`, for which it forks, and gRPC's threads do not like that
            command = ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--init-groups", *command]
        done = subprocess.run(
            command, cwd=self.folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=ENVIRONMENT
        )
        assert done.returncode == 0, done.stderr + done.stdout

    def control(self, *arguments: str) -> None:
        self.run("pg_ctl", "-D", self.folder / "data", "-l", self.folder / "log", "-w", *arguments)

    def start(self) -> None:
        self.control("start")

    def stop(self) -> None:
        """As a crash would: nobody is waited for."""
        self.control("stop", "-m", "immediate")

    @property
    def is_stopped(self) -> bool:
        return not (self.folder / "data" / "postmaster.pid").exists()

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"t{next(NUMBERS)}"
        self.run("createdb", "-h", self.folder, "-U", "seqfed", "-T", "template0", name)
        return f"postgresql://seqfed@/{name}?host={self.folder}"


NEEDED = ("initdb", "pg_ctl", "createdb")
NUMBERS = iter(range(1_000_000))
ENVIRONMENT = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"}


def programs() -> Path | None:
    """The folder of PostgreSQL's programs: Debian keeps it out of PATH."""
    on_path = shutil.which("initdb")
    folders = [
        *sorted(Path("/usr/lib/postgresql").glob("*/bin")),
        *([Path(on_path).resolve().parent] if on_path else []),
    ]
    return next((one for one in reversed(folders) if all((one / name).exists() for name in NEEDED)), None)


@functools.cache
def cluster() -> Cluster:
    """The one of this process, started when first asked for; skips the test where there is no PostgreSQL."""
    found = programs()
    if found is None:
        pytest.skip("no PostgreSQL here: neither initdb on PATH nor /usr/lib/postgresql/*/bin")
    user = None
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("PostgreSQL does not run as root, and setpriv is not here to run it as somebody else")
        known = {one.pw_name for one in pwd.getpwall()}
        user = next((one for one in ("postgres", "daemon") if one in known), None)
        if user is None:
            pytest.skip("PostgreSQL does not run as root, and there is no other user here")
    folder = Path(tempfile.mkdtemp(prefix="seqfed-pg-"))
    if user is not None:
        shutil.chown(folder, user)
    made = Cluster(folder, found, user)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made.run("initdb", "-D", folder / "data", "-U", "seqfed", "-A", "trust", "-E", "UTF8", "--no-sync")
    with (folder / "data" / "postgresql.conf").open("a") as file:
        file.write(f"{LINES}unix_socket_directories = '{folder}'\n")
    made.start()
    atexit.register(made.stop)
    return made
