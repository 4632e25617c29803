"""What must not be in the repository, and what the pins must be: private keys, tokens, passwords in URLs; exact versions.

Works offline and in a second. A line that needs such text, as tests do, says `audit: fixture`. With --online also asks
pip-audit, where it is installed and reaches the network, for known vulnerabilities of the pinned versions.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).resolve().parents[1]
MARKERS: Final = ("audit: fixture", "noqa: S105")  # ruff's mark means the same
BINARY: Final = b"-----BEGIN "  # looked for in files that are no text too
LARGEST: Final = 4 << 20  # bytes of a file that is looked into
SECRETS: Final = {
    "a private key": re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----"),
    "an enrolment token": re.compile(r"\beyJ[\w-]{60,}\.[\w-]{60,}"),  # base64url of {" and a signature
    "an AWS key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_\w{36,}|github_pat_\w{50,})"),
    "a GitLab token": re.compile(r"\bglpat-[\w-]{20,}"),
    "a Slack token": re.compile(r"\bxox[abprs]-[\w-]{10,}"),
    "a PyPI token": re.compile(r"\bpypi-AgE[\w-]{50,}"),
    "a Google key": re.compile(r"\bAIza[\w-]{35}\b"),
    # Names in brackets, braces and capitals stand for something; so do the words that everybody uses for it.
    "a password in a URL": re.compile(
        r"\b[a-z][a-z0-9+.-]*://[^\s/:@\"'<>{}$]+:(?!(?:password|secret|geheim|\.{3}|\*+|[A-Z_]+)@)[^\s/@\"'<>{}$]+@[\w\[]"
    ),
    "a password": re.compile(
        r"""(?i)\b(?:password|passwd|secret_key|api_key)["']?\s*[:=]\s*["'][^"'\s{}$<>]{8,}["']"""
    ),
}
PIN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.!]*")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--online", action="store_true", help="ask pip-audit too")
    given = parser.parse_args()
    found = [*secrets(given.root), *pins(given.root), *(vulnerabilities(given.root) if given.online else ())]
    for one in found:
        print(one)
    if found:
        raise SystemExit(1)
    if not given.online:
        print(
            "no secrets; pins are exact. Known vulnerabilities: not looked for; `make audit` asks where there is a network"
        )


# Secrets --------------------------------------------------------------------------------------------------------------


def secrets(root: Path) -> Iterator[str]:
    """FILE:LINE: what, for every line that has one; the secret itself is not shown."""
    for name in tracked(root):
        path = root / name
        if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST:
            continue
        if path.suffix in {".key", ".p12", ".pfx"} or path.name == "key.pem":
            yield f"{name}: a file of this name is a key, and has no place here"
        data = path.read_bytes()
        if b"\0" in data and BINARY not in data:
            continue
        for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
            if not any(one in line for one in MARKERS):
                yield from (f"{name}:{number}: looks like {what}" for what, one in SECRETS.items() if one.search(line))


def tracked(root: Path) -> list[str]:
    """What git tracks or would track; outside of a checkout every file."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        text = subprocess.run(listed, cwd=root, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return [str(one.relative_to(root)) for one in sorted(root.rglob("*")) if one.is_file()]
    return [one for one in text.split("\0") if one]


# Pins -----------------------------------------------------------------------------------------------------------------


def pins(root: Path) -> Iterator[str]:
    """What is wrong with constraints.txt, by itself and beside the ranges of pyproject.toml."""
    path = root / "constraints.txt"
    pinned: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if not PIN.fullmatch(line):  # hashes, URLs, ranges, paths, options
            yield f"{path.name}:{number}: {line[:80]!r} is not NAME==VERSION and no more; run `make pins`"
            continue
        name, _, version = line.partition("==")
        if (known := canonicalize_name(name)) in pinned:
            yield f"{path.name}:{number}: {name} stands here twice; run `make pins`"
        pinned[known] = version
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    for where, text in wanted(project):
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            yield f"pyproject.toml: {where}: {text!r} is no requirement"
            continue
        version = pinned.get(canonicalize_name(requirement.name), "")
        if requirement.url is not None:
            yield f"pyproject.toml: {where}: {requirement.name} comes from a URL; no pin holds it"
        elif not version:
            yield f"constraints.txt: {requirement.name} ({where}) has no pin; run `make pins`"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"constraints.txt: {requirement.name}=={version} is not {requirement.specifier} ({where}); run `make pins`"


def wanted(project: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every requirement in pyproject.toml, and which table it stands in."""
    yield from (("build-system", one) for one in project["build-system"]["requires"])
    yield from (("dependencies", one) for one in project["project"].get("dependencies", ()))
    tables = {
        "optional-dependencies": project["project"].get("optional-dependencies", {}),
        "dependency-groups": project.get("dependency-groups", {}),
    }
    for title, table in tables.items():
        for name, requirements in table.items():
            yield from ((f"{title}.{name}", one) for one in requirements if isinstance(one, str))


# Vulnerabilities ------------------------------------------------------------------------------------------------------


def vulnerabilities(root: Path) -> Iterator[str]:
    """What pip-audit knows of the pinned versions; nothing, said on stderr, where it cannot be asked."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(root / "constraints.txt")]
    command += ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        told, complaint = done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        told, complaint = "", ""
    try:
        answer = json.loads(told)["dependencies"]
    except (json.JSONDecodeError, KeyError, TypeError):
        why = "is not installed" if "No module named pip_audit" in complaint else "had no answer; is there a network?"
        print(f"known vulnerabilities: not looked for, as pip-audit {why}", file=sys.stderr)
        return
    for one in answer:
        for known in one.get("vulns", ()):
            fixed = ", ".join(known.get("fix_versions", ())) or "none yet"
            yield f"constraints.txt: {one['name']}=={one['version']}: {known['id']}; fixed in: {fixed}"


if __name__ == "__main__":
    main()
