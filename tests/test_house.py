"""The repository's own rules: imports, stubs, and what its files may speak of."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import seqfed

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PACKAGES = (
    "common/seqfed/common",
    "common/seqfed/v1",
    "server/seqfed/server",
    "client/seqfed/client",
)


def run(*command: str | Path) -> None:
    """Run a command at the root; its output is the assertion's message if it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"


def committed() -> Iterator[tuple[Path, str]]:
    """Every text file that git tracks or would track, by its path below the root."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout: git knows which files are the project's")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if not path.is_file() or "\0" in (head := path.read_bytes().decode("utf-8", "replace")):
            continue
        yield Path(name), head


def findings(pattern: re.Pattern[str]) -> list[str]:
    """FILE:LINE: TEXT for every line that the pattern occurs in, generated stubs aside."""
    return [
        f"{path}:{number}: {line.strip()}"
        for path, text in committed()
        if path.parent != Path("common/seqfed/v1")
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def test_import_contracts_hold() -> None:
    run(BIN / "lint-imports", "--no-cache")


def test_stubs_are_what_the_protos_generate() -> None:
    run(sys.executable, "protos/generate.py", "--check")


def test_seqfed_is_a_namespace_over_three_roots() -> None:
    assert getattr(seqfed, "__file__", None) is None
    assert not list(ROOT.glob("*/seqfed/__init__.py"))
    for package in PACKAGES:
        assert (ROOT / package / "__init__.py").is_file(), package
        assert (ROOT / package / "py.typed").is_file(), package


def test_no_file_names_a_place_on_one_machine() -> None:
    home_or_workspace = re.compile(r"(?:^|[\s\"'`=(:,])/(?:home|root|Users|work|workspace|builds)/\w")
    assert findings(home_or_workspace) == []


def test_no_path_climbs_out_of_the_repository() -> None:
    climb = re.compile(r"(?:\.\./)+")
    out = [
        f"{path}: {found.group()}"
        for path, text in committed()
        for found in climb.finditer(text)
        if found.group().count("../") > len(path.parent.parts)
    ]
    assert out == []


def test_links_in_markdown_lead_to_files() -> None:
    link = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)")
    broken = [
        f"{path}: {target}"
        for path, text in committed()
        if path.suffix == ".md"
        for target in link.findall(text)
        if not (ROOT / path.parent / target).exists()
    ]
    assert broken == []


def test_nothing_is_left_half_done() -> None:
    # assembled, so that this file does not find itself
    marks = ["TO" + "DO", "FIX" + "ME", "X" * 3, "<" * 7 + " ", ">" * 7 + " "]
    assert findings(re.compile("|".join(marks))) == []
