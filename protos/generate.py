"""Generate the Python stubs of protos/ into common/seqfed/v1, or with --check prove that the committed ones are current."""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
STUBS = PROTOS.parent / "common"
PLUGINS = Path(sys.executable).parent  # mypy-protobuf's scripts stand beside the interpreter, on PATH or not


def generate(out: Path) -> None:
    """Write every stub under `out`; raises SystemExit with protoc's own status if it refuses."""
    sources = sorted(str(path) for path in PROTOS.glob("seqfed/v1/*.proto"))
    well_known = str(resources.files("grpc_tools") / "_proto")
    status = protoc.main(
        [
            "protoc",
            f"-I{PROTOS}",
            f"-I{well_known}",
            *(f"--plugin={PLUGINS / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")),
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out=quiet:{out}",
            f"--mypy_grpc_out=quiet:{out}",
            *sources,
        ]
    )
    if status != 0:
        raise SystemExit(status)


def stubs(root: Path) -> dict[str, bytes]:
    """The stubs below `root` by their relative names."""
    files = [path for pattern in ("*_pb2*.py", "*_pb2*.pyi") for path in root.glob(f"seqfed/v1/{pattern}")]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the committed stubs are stale")
    check = parser.parse_args().check
    if not check:
        generate(STUBS)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = stubs(Path(folder))
    committed = stubs(STUBS)
    stale = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    for name in stale:
        print(f"stale: common/{name} (run `make stubs`)", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
