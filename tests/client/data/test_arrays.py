"""NPZ arrays and a data holder's own function: as they are, windowed, and every refusal with its place."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from seqfed.client.data import ClientData, Sequences, open_source
from seqfed.client.settings import DataSettings
from seqfed.common.errors import DataError, SchemaMismatch
from seqfed.common.spec import RunSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arrays")


def read(path: Path | str, data: dict[str, Any], settings: dict[str, Any] | None = None, **spec: Any) -> ClientData:
    given = DataSettings.model_validate({"file": str(path), "validation_fraction": 0.0, **(settings or {})})
    return open_source(given).prepare(RunSpec.model_validate({"data": data, **spec}))


def whole(made: Sequences) -> Any:
    return made.batch(np.arange(len(made)))


def arrays(size: int = 10, steps: int = 4, features: int = 2) -> dict[str, NDArray[Any]]:
    draw = np.random.default_rng(size)
    return {
        "x": draw.normal(size=(size, steps, features)).astype(np.float32),
        "y": draw.integers(0, 3, size),
        "lengths": draw.integers(1, steps + 1, size),
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_arrays_come_as_they_are(tmp_path: Path, packed: bool, mapped: bool, order: Literal["C", "F"]) -> None:
    given = arrays(50)
    stored = {**given, "x": np.asarray(given["x"], order=order)}
    (np.savez_compressed if packed else np.savez)(tmp_path / "a.npz", **stored)  # type: ignore[arg-type] # a dictionary of arrays is no flag
    made = read(tmp_path / "a.npz", {"features": 2, "classes": 3}, {"memory_mib": 0.0 if mapped else 1.0}).training
    batch = whole(made)
    assert isinstance(made.rows, np.memmap) == mapped
    assert [one.dtype.name for one in (batch.x, batch.y, batch.lengths)] == ["float32", "int64", "int64"]
    real = np.arange(4) < given["lengths"][:, None]
    assert batch.x.tobytes() == np.where(real[..., None], given["x"], 0).tobytes()
    assert (batch.y.tolist(), batch.lengths.tolist()) == (given["y"].tolist(), given["lengths"].tolist())


@given(size=st.integers(1, 20), held_out=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 3))
def test_the_held_out_sequences_are_a_seeded_share(folder: Path, size: int, held_out: float, seed: int) -> None:
    path = folder / "split.npz"
    np.savez(path, x=np.arange(size).reshape(size, 1, 1), y=np.arange(size), lengths=np.ones(size, np.int8))
    settings = {"validation_fraction": held_out, "seed": seed}
    made, again = (read(path, {"features": 1, "classes": 20}, settings) for _ in range(2))
    assert len(made.validation) == min(int(held_out * size), size - 1)
    sides = [made.training, made.validation]
    assert sorted(label for side in sides for label in np.asarray(side.y).tolist()) == list(range(size))
    for one, other in zip(sides, (again.training, again.validation), strict=True):
        assert np.asarray(one.y).tolist() == np.asarray(other.y).tolist()
        assert not len(one) or whole(one).x.ravel().tolist() == np.asarray(one.y).tolist()


def test_no_group_is_on_both_sides(tmp_path: Path) -> None:
    groups = np.array(["b", "a", "b", "c", "a", "d"])
    np.savez(tmp_path / "a.npz", x=np.ones((6, 1, 1)), y=np.arange(6), group=groups)
    made = read(tmp_path / "a.npz", {"features": 1, "classes": 6}, {"validation_fraction": 0.5})
    sides = [{str(groups[place]) for place in np.asarray(side.y)} for side in (made.training, made.validation)]
    assert (len(sides[0]), len(sides[1]), sides[0] & sides[1]) == (2, 2, set())
    assert made.training.entities is not None
    assert [made.entities[one] for one in made.training.entities] == groups[np.asarray(made.training.y)].tolist()


def test_a_validation_file_is_only_scored(tmp_path: Path) -> None:
    for name, size in (("a", 7), ("b", 3)):
        np.savez(tmp_path / f"{name}.npz", x=np.ones((size, 2, 1)), y=np.full(size, size))
    settings = {"validation": str(tmp_path / "b.npz"), "validation_fraction": 0.5}
    made = read(tmp_path / "a.npz", {"features": 1, "classes": 8}, settings)
    assert (np.asarray(made.training.y).tolist(), np.asarray(made.validation.y).tolist()) == ([7] * 7, [3] * 3)
    schema = open_source(DataSettings.model_validate({"file": str(tmp_path / "a.npz"), **settings})).schema
    assert schema.model_dump() == {
        "features": 1,
        "steps": 2,
        "classes": 8,
        "columns": None,
        "categories": (),
        "tokens": False,
        "examples": 7,
        "validation_examples": 3,
    }


def test_the_schema_of_sequences_of_differing_length(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays())  # type: ignore[arg-type] # a dictionary of arrays is no flag
    schema = open_source(DataSettings(file=(str(tmp_path / "a.npz"),))).schema
    assert (schema.steps, schema.examples, schema.validation_examples) == (None, 8, 2)


def test_a_validation_file_of_another_width(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((2, 2, 1)), y=np.zeros(2, int))
    np.savez(tmp_path / "b.npz", x=np.ones((2, 2, 3)), y=np.zeros(2, int))
    with pytest.raises(DataError, match=r"b\.npz: has 3 features a step, .*a\.npz has 1"):
        read(tmp_path / "a.npz", {"features": 1, "classes": 2}, {"validation": str(tmp_path / "b.npz")})


def test_missing_numbers_and_normalisation(tmp_path: Path) -> None:
    x = np.array([[[1, np.nan], [3, 4]], [[5, 6], [7, 8]]])
    np.savez(tmp_path / "a.npz", x=x, y=np.array([[0.0, np.nan], [1, 2]]))
    data = {
        "features": 2,
        "missing": "mask",
        "mean": [1.0, 2.0],
        "scale": [2.0, 1.0],
        "targets": 2,
        "target_scale": [1.0, 2.0],
    }
    batch = whole(read(tmp_path / "a.npz", data, task={"kind": "regression"}).training)
    assert batch.x.tolist() == [[[0, 0, 1, 0], [1, 2, 1, 1]], [[2, 4, 1, 1], [3, 6, 1, 1]]]
    np.testing.assert_array_equal(batch.y, np.array([[0, np.nan], [1, 1]], np.float32))
    made = read(tmp_path / "a.npz", {"features": 2, "targets": 2}, task={"kind": "regression"})
    assert (len(made.training), made.refused is not None and "x[0, 0], column '1' has no value" in made.refused) == (
        1,
        True,
    )


def test_windows_of_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(8).reshape(2, 4, 1), lengths=np.array([4, 3]))
    made = read(tmp_path / "a.npz", {"features": 1, "steps": 2, "stride": 1}, task={"kind": "forecast"})
    batch = whole(made.training)
    assert (batch.x[..., 0].tolist(), batch.y.ravel().tolist()) == ([[0, 1], [1, 2], [4, 5]], [2, 3, 6])


def test_token_ids(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([[1, 2, 0, 3], [2, 2, 2, 2]]), lengths=np.array([4, 2]), y=np.array([1, 0]))
    data = {"vocabulary": ["a", "b", "c"]}
    batch = whole(read(tmp_path / "a.npz", {**data, "classes": 2, "steps": 3}).training)
    assert (batch.x.tolist(), batch.y.tolist()) == ([[2, 0, 3], [2, 2, 0]], [1, 0])
    batch = whole(read(tmp_path / "a.npz", {**data, "steps": 2}, task={"kind": "next_token"}).training)
    assert (batch.x.tolist(), batch.y.tolist()) == ([[1, 2], [0, 0], [2, 0]], [[2, 0], [3, -1], [2, -1]])
    assert open_source(DataSettings(file=(str(tmp_path / "a.npz"),))).schema.tokens
    with pytest.raises(DataError, match=r"a\.npz: x\[0, 3\] is 3; the run's token ids end at 2"):
        read(tmp_path / "a.npz", {"vocabulary": ["a", "b"], "classes": 2})
    with pytest.raises(SchemaMismatch, match="has texts, the run wants numbers"):
        read(tmp_path / "a.npz", {"features": 1, "classes": 2})


# Refusals -------------------------------------------------------------------------------------------------------------

X, Y = np.ones((3, 2, 1)), np.zeros(3, int)
HOLED = np.where(np.arange(6).reshape(3, 2, 1) == 3, np.inf, X)
BAD_NPZ: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "has no array 'x'; it has none"),
    "no x": ({"X": X, "y": Y}, "has no array 'x'; it has X, y"),
    "no y": ({"x": X, "labels": Y}, "which column is the label?"),
    "flat x": ({"x": X[..., 0], "y": Y}, "x is float64 of shape (3, 2); it must be numbers of shape (N, T, F)"),
    "no rows": ({"x": X[:0], "y": Y}, "x is float64 of shape (0, 2, 1); it must be numbers of shape (N, T, F)"),
    "no features": ({"x": X[..., :0], "y": Y}, "of shape (3, 2, 0)"),
    "text": ({"x": X.astype(str), "y": Y}, "x is <U32; it must be numbers"),
    "complex": ({"x": X.astype(complex), "y": Y}, "x is complex128"),
    "short y": ({"x": X, "y": Y[:2]}, "y is int64 of shape (2,); it must be numbers of shape (3,) or (3, K)"),
    "one-hot y": ({"x": X, "y": np.eye(3, dtype=int)}, "a class is one column; data.label names 3"),
    "real y": ({"x": X, "y": Y + 0.5}, "y[0]: 0.5 is not a label (3 such labels)"),
    "negative y": (
        {"x": X, "y": np.array([0, -2, -1])},
        "y[1]: -2 is not a label (2 such labels); the run's are whole",
    ),
    "huge y": ({"x": X, "y": np.array([0, 2**63, 0], np.uint64)}, "y[1]: 9223372036854775808 is not a label"),
    "infinite y": ({"x": X, "y": Y + np.inf}, "y[0, 0] is not a finite float32 number"),
    "infinity": ({"x": HOLED, "y": Y}, "x[1, 1, 0] is not a finite float32 number; mend it, or make it NaN: missing"),
    "beyond float32": ({"x": X * 1e39, "y": Y}, "x[0, 0, 0] is not a finite"),
    "missing": (
        {"x": X * np.nan, "y": Y},
        "3 of 3 sequences refused; the first: {path}: x[0, 0], column '0' has no value",
    ),
    "length 0": ({"x": X, "y": Y, "lengths": np.array([1, 0, 2])}, "lengths[1] is 0; lengths must be from 1 to 2"),
    "length over T": ({"x": X, "y": Y, "lengths": np.array([1, 2, 3])}, "lengths[2] is 3; lengths must be from 1 to 2"),
    "real lengths": ({"x": X, "y": Y, "lengths": np.ones(3)}, "lengths must be whole numbers of shape (3,)"),
    "few lengths": ({"x": X, "y": Y, "lengths": np.ones(2, int)}, "lengths must be whole numbers of shape (3,)"),
    "few groups": ({"x": X, "y": Y, "group": np.ones(2, int)}, "group is of shape (2,); it must be one name or number"),
    "pickled objects": ({"x": np.array([[[None]]]), "y": Y}, "not a readable NPZ file of plain arrays: Object arrays"),
    "negative token": ({"x": np.array([[1], [2], [-3]]), "y": Y}, "x[2, 0] is -3; token ids are from 0"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_an_npz_file_that_is_refused(tmp_path: Path, case: str) -> None:
    content, said = BAD_NPZ[case]
    path = tmp_path / "ward.npz"
    np.savez(path, **content)
    with pytest.raises(DataError) as refused:
        read(path, {"features": 1, "classes": 3})
    assert str(refused.value).startswith(f"{path}: ") or case == "one-hot y"
    assert said.replace("{path}", str(path)) in str(refused.value)


def damaged(path: Path) -> None:
    np.savez_compressed(path, x=np.random.default_rng(0).random((30, 20, 1)), y=np.zeros(30, int))
    content = bytearray(path.read_bytes())
    content[200:220] = b"\xff" * 20
    path.write_bytes(content)


def truncated(path: Path) -> None:
    np.savez(path, x=X, y=Y)
    path.write_bytes(path.read_bytes()[:-30])


def single(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, X)


def foreign(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "not an array")
        archive.writestr("y", "not an array")


def lying(path: Path) -> None:
    """A header of a petabyte, and no content."""
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000, 1000, 100), }"
    header += b" " * (117 - len(header)) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


@pytest.mark.parametrize(
    "write",
    [
        damaged,
        truncated,
        single,
        foreign,
        lying,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"x,y\n1,2\n"),
        lambda path: path.write_bytes(b"\x80\x04K\x01."),
        lambda path: path.mkdir(),
        lambda path: None,
    ],
    ids=["damaged", "truncated", "single", "foreign zip", "lying", "empty", "text", "pickle", "folder", "not there"],
)
def test_a_file_that_is_no_npz(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "ward.npz"
    write(path)
    with pytest.raises(DataError, match=r"ward\.npz: "):
        read(path, {"features": 1, "classes": 2})


def test_an_npz_bomb(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((1000, 1000, 4), np.float32))
    with pytest.raises(DataError, match="unfolds to more than the 0.01 GiB allowed"):
        read(tmp_path / "a.npz", {"features": 4, "classes": 2}, {"unpacked_gib": 0.01})


def test_only_one_npz_file(tmp_path: Path) -> None:
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", x=X, y=Y)
    with pytest.raises(DataError, match="only one NPZ file can be read; join them with numpy"):
        read(tmp_path / "*.npz", {"features": 1, "classes": 2})


# A function -----------------------------------------------------------------------------------------------------------

MODULE = """
import numpy as np
from seqfed.client.data import Sequences
x, y = np.arange(8.0).reshape(4, 2, 1), np.array([0, 1, 0, 1])
def pair(): return x, y
def triple(): return x, y, np.array([1, 2, 2, 2])
def mapping(): return {"x": x, "y": y}
def sequences(): return Sequences.of(x.astype(np.float32), y)
def both(): return sequences(), sequences()
def nothing(): return None
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "ward_reader.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "ward_reader", raising=False)
    return "ward_reader"


@pytest.mark.parametrize("function", ["pair", "triple", "mapping", "sequences", "both"])
def test_a_function_gives_the_sequences(module: str, function: str) -> None:
    made = read(f"{module}:{function}", {"features": 1, "classes": 2})
    batch = whole(made.training)
    assert batch.y.tolist() == [0, 1, 0, 1]
    assert batch.x[1:, :, 0].tolist() == [[2, 3], [4, 5], [6, 7]]
    assert len(made.validation) == (4 if function == "both" else 0)
    schema = open_source(DataSettings(file=(f"{module}:{function}",))).schema
    assert (schema.features, schema.classes) == (1, 2)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("ward_reader:nothing", "ward_reader:nothing: returned NoneType; return x, y[, lengths], or Sequences"),
        ("ward_reader:none", "has no attribute 'none'; give an importable module and a function in it"),
        ("no_such_module:load", "No module named 'no_such_module'"),
    ],
)
def test_a_function_that_is_refused(module: str, named: str, said: str) -> None:
    assert module
    with pytest.raises(DataError) as refused:
        read(named, {"features": 1, "classes": 2})
    assert said in str(refused.value)
