"""Model files: readable by the safetensors library bit for bit, and replaced whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from seqfed.common import checkpoint
from seqfed.common.errors import CheckpointError, LayoutMismatch, StorageError
from seqfed.common.layout import Flat, Layout, Parameters

SMALL = Layout((("w", (2, 3)), ("b", (2,))))
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
tensor_names = st.text(max_size=5).filter(lambda name: name != "__metadata__")
layouts = st.dictionaries(tensor_names, shapes, max_size=5).map(lambda found: Layout(tuple(found.items())))


def numbers(layout: Layout) -> Flat:
    """Every kind of bit pattern: subnormals, infinities and NaNs with payloads among them."""
    return np.random.default_rng(0).integers(0, 1 << 32, layout.size, np.uint32).view(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@given(layout=layouts, metadata=st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3))
def test_the_library_reads_what_is_written(folder: Path, layout: Layout, metadata: dict[str, str]) -> None:
    flat = numbers(layout)
    path = folder / "model.safetensors"
    file = checkpoint.save(path, Parameters(layout, flat), metadata)
    found = load_file(path)
    assert {name: (one.shape, one.dtype, one.tobytes()) for name, one in found.items()} == {
        name: (one.shape, np.dtype(np.float32), one.tobytes()) for name, one in layout.views(flat).items()
    }
    assert checkpoint.read_metadata(path) == {**metadata, "layout_digest": layout.digest.hex()}
    assert checkpoint.load(path, layout).flat.tobytes() == flat.tobytes()
    assert file.data_start % 8 == 0
    assert path.read_bytes()[file.data_start :] == flat.tobytes()
    assert file.digest == blake3(flat.tobytes()).digest()


@given(layout=layouts)
def test_what_the_library_writes_is_read_in_any_order(folder: Path, layout: Layout) -> None:
    flat = numbers(layout)
    path = folder / "theirs.safetensors"
    save_file(dict(reversed(layout.views(flat).items())), path)
    assert checkpoint.load(path, layout).flat.tobytes() == flat.tobytes()


def test_tensors_in_any_place_of_the_file(tmp_path: Path) -> None:
    flat = np.arange(8, dtype=np.float32)
    header = {
        "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "theirs.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + flat[6:].tobytes() + flat[:6].tobytes())
    assert checkpoint.load(path, SMALL).flat.tolist() == flat.tolist()


def test_the_header_stays_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    file = checkpoint.save(path, Parameters(SMALL, np.arange(8, dtype=np.float32)), {"round": "3"})
    assert path.read_bytes()[: file.data_start] == (
        b'\xe0\0\0\0\0\0\0\0{"__metadata__":{"round":"3",'
        b'"layout_digest":"ae2886598d7f57a4ca3bcc76461daf4237e6e3954bcebd4b423b62f8e818863e"},'
        b'"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"F32","shape":[2],"data_offsets":[24,32]}}'
    )


@given(start=st.integers(0, 9), size=st.integers(1, 40), cut=st.integers(0, 8))
def test_reading_in_pieces(folder: Path, start: int, size: int, cut: int) -> None:
    flat = np.arange(8, dtype=np.float32)
    file = checkpoint.write(folder / "pieces.safetensors", SMALL, (flat[:cut], flat[cut:]), {})
    assert b"".join(file.pieces(4 * start, size)) == flat.tobytes()[4 * start :]
    assert file.read(4 * start, size) == flat.tobytes()[4 * start : 4 * start + size]


def test_a_file_that_shrank_under_the_server(tmp_path: Path) -> None:
    file = checkpoint.save(tmp_path / "model.safetensors", Parameters(SMALL, np.zeros(8, np.float32)), {})
    file.path.write_bytes(file.path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="ends at byte 27 of 32"):
        list(file.pieces())


def raw(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def typed(kind: str, size: int) -> bytes:
    """A file of the small model's shapes in another number format."""
    w = {"dtype": kind, "shape": [2, 3], "data_offsets": [0, 6 * size]}
    b = {"dtype": kind, "shape": [2], "data_offsets": [6 * size, 8 * size]}
    return raw({"w": w, "b": b}, bytes(8 * size))


BROKEN = {
    "empty": (b"", "not a readable safetensors file"),
    "not safetensors": (b"PK\x03\x04" + bytes(100), "not a readable safetensors file"),
    "pickle": (b"\x80\x04K\x01." + bytes(20), "not a readable safetensors file"),
    "truncated": (typed("F32", 4)[:-1], "not a readable safetensors file"),
    "too long": (typed("F32", 4) + b"\0", "not a readable safetensors file"),
    "header beyond the end": ((1 << 40).to_bytes(8, "little") + b"{}", "not a readable safetensors file"),
    "float64": (typed("F64", 8), "tensor '[wb]' is F64; convert the checkpoint to float32"),
    "bfloat16": (typed("BF16", 2), "tensor '[wb]' is BF16; convert the checkpoint to float32"),
    "integers": (typed("I64", 8), "tensor '[wb]' is I64; convert"),
    "no tensors": (raw({}), r"of another model: tensor 'w' \(2, 3\) is missing"),
    "another model": (
        raw({"w": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}}, bytes(24)),
        r"of another model: tensor 'b' \(2,\) is missing; is this another model\?",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_not_the_model(tmp_path: Path, case: str) -> None:
    content, said = BROKEN[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"model.safetensors: .*{said}"):
        checkpoint.load(path, SMALL)


@pytest.mark.parametrize(
    "read", [lambda path: checkpoint.load(path, SMALL), checkpoint.read_metadata], ids=["load", "metadata"]
)
def test_a_file_that_is_not_there(tmp_path: Path, read: Callable[[Path], object]) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=path.name):
            read(path)


def old_model(path: Path) -> bytes:
    checkpoint.save(path, Parameters(SMALL, np.ones(8, np.float32)), {})
    return path.read_bytes()


def failing(after: Exception) -> Iterator[Flat]:
    yield np.zeros(4, np.float32)
    raise after


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        (lambda: failing(ValueError("a bug")), ValueError),
        (lambda: failing(OSError(5, "Input/output error")), StorageError),
        (lambda: iter([np.zeros(7, np.float32)]), LayoutMismatch),
        (lambda: iter([np.zeros(9, np.float32)]), LayoutMismatch),
    ],
    ids=["bug", "disk", "too short", "too long"],
)
def test_a_write_that_fails_changes_nothing(
    tmp_path: Path, pieces: Callable[[], Iterator[Flat]], kind: type[Exception]
) -> None:
    path = tmp_path / "model.safetensors"
    before = old_model(path)
    with pytest.raises(kind):
        checkpoint.write(path, SMALL, pieces(), {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


WITH_A_LIMIT = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from seqfed.common import checkpoint
from seqfed.common.errors import SeqfedError
from seqfed.common.layout import Layout, Parameters

layout = Layout((("w", (100_000,)),))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    checkpoint.save(Path(sys.argv[1]), Parameters(layout, np.zeros(100_000, np.float32)), {})
except SeqfedError as error:
    print(type(error).__name__, error)
"""


def test_a_disk_that_takes_no_more_leaves_the_old_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    before = old_model(path)
    command = [sys.executable, "-c", WITH_A_LIMIT, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "StorageError saving model.safetensors: File too large\n"
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"saving model\.safetensors .*Not a directory|File exists"):
        checkpoint.save(tmp_path / "file" / "model.safetensors", Parameters(SMALL, np.zeros(8, np.float32)), {})
