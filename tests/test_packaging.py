"""What a user installs, the wheel or the sdist, carries everything and runs outside the tree."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = Path("lib", f"python{sysconfig.get_python_version()}", "site-packages")
SUBPACKAGES = ("v1", "common", "server", "client")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed, without this tree on its path; its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that was built from it, made offline."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return out


def only(folder: Path, pattern: str) -> Path:
    """The one file that matches."""
    (found,) = folder.glob(pattern)
    return found


def sources() -> set[str]:
    """The files of the three roots, by the names they have in a wheel."""
    return {
        str(path.relative_to(root))
        for root in (ROOT / "common", ROOT / "server", ROOT / "client")
        for path in root.glob("seqfed/**/*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_carries_every_source_file(dist: Path) -> None:
    with ZipFile(only(dist, "*.whl")) as wheel:
        names = {name for name in wheel.namelist() if name.startswith("seqfed/")}
    assert names == sources()
    assert "seqfed/__init__.py" not in names
    assert {f"seqfed/{package}/py.typed" for package in SUBPACKAGES} <= names
    assert any(name.startswith("seqfed/server/migrations/versions/") for name in names)


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"], ids=["wheel", "sdist"])
def test_an_install_runs_outside_the_tree(dist: Path, tmp_path: Path, pattern: str) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    # Dependencies come from the environment of the tests. A .pth file only adds the folder to
    # sys.path, so the .pth of the editable seqfed in there is not read.
    (home / SITE / "outer.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "--disable-pip-version-check",
        "--quiet",
    )
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    run(*pip, "install", *offline, only(dist, pattern), cwd=tmp_path)

    assert "Usage: seqfed" in run(home / "bin" / "seqfed", "--help", cwd=tmp_path)
    imports = "\n".join(f"import seqfed.{package}" for package in SUBPACKAGES)
    script = f"{imports}\nassert seqfed.__file__ is None\nprint(*seqfed.__path__, sep='\\n')"
    assert run(python, "-c", script, cwd=tmp_path).split() == [str(home / SITE / "seqfed")]
