"""Data files as sequences: CSV and NPZ against slow readings of the same file, and every refusal with its place."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from seqfed.client.data import ClientData, Sequences, load
from seqfed.client.settings import DataSettings
from seqfed.common.errors import DataError

Window = tuple[list[list[float]], int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def windows(data: Sequences) -> list[Window]:
    return sorted(zip(data.x.tolist(), data.y.tolist(), strict=True))


def slow_windows(rows: list[list[float]], window: int, stride: int) -> list[Window]:
    """Each run of `window` rows, without its labels, and the label of its last row."""
    return [
        ([row[:-1] for row in rows[start : start + window]], int(rows[start + window - 1][-1]))
        for start in range(0, len(rows) - window + 1, stride)
    ]


# CSV ------------------------------------------------------------------------------------------------------------------

# (entity, label) of each row in file order; the rows' numbers are their places, so that every window tells its origin.
entity_rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=30)
fractions = st.floats(0, 1, exclude_max=True)


@given(rows=entity_rows, window=st.integers(1, 5), stride=st.integers(1, 4), held_out=fractions)
def test_windows_never_cross_entities_and_no_entity_is_on_both_sides(
    folder: Path, rows: list[tuple[int, int]], window: int, stride: int, held_out: float
) -> None:
    path = folder / "entities.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["place", "patient", "age", "outcome"])
        writer.writerows([place, f"p,{who}", who, label] for place, (who, label) in enumerate(rows))
    settings = DataSettings(
        file=path, label="outcome", group="patient", window=window, stride=stride, validation_fraction=held_out
    )
    entities: dict[int, list[list[float]]] = {}
    for place, (who, label) in enumerate(rows):
        entities.setdefault(who, []).append([place, who, label])
    try:
        data = load(settings)
    except DataError as error:
        assume("use a smaller window" not in str(error))
        raise
    sides = [{int(age) for x, _ in windows(side) for _, age in x} for side in (data.training, data.validation)]
    assert sides[0] & sides[1] == set()
    assert len(sides[1]) <= min(int(held_out * len(entities)), len(entities) - 1)
    for side, names in zip((data.training, data.validation), sides, strict=True):
        expected = [one for name in names for one in slow_windows(entities[name], window, stride)]
        assert windows(side) == sorted(expected)
    assert load(settings).training.x.tobytes() == data.training.x.tobytes()  # the same split every time


@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=30),
    window=st.integers(1, 4),
    stride=st.integers(1, 3),
    held_out=fractions,
)
def test_without_entities_the_validation_rows_come_after_the_training_rows(
    folder: Path, labels: list[int], window: int, stride: int, held_out: float
) -> None:
    path = folder / "series.csv"
    path.write_text("t,y\n" + "".join(f"{t},{label}\n" for t, label in enumerate(labels)))
    cut = len(labels) - int(held_out * len(labels))
    assume(cut >= window)
    data = load(DataSettings(file=path, label="y", window=window, stride=stride, validation_fraction=held_out))
    rows = [[float(t), float(label)] for t, label in enumerate(labels)]
    assert windows(data.training) == slow_windows(rows[:cut], window, stride)
    assert windows(data.validation) == slow_windows(rows[cut:], window, stride)
    assert len(data.validation) == 0 or data.training.x.max() < data.validation.x.min()


def read_csv(path: Path, content: str | bytes, **settings: Any) -> ClientData:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    given = {"file": path, "label": "y", "window": 1, "validation_fraction": 0.0, **settings}
    return load(DataSettings.model_validate(given))


def test_columns_are_taken_in_the_order_asked_for(tmp_path: Path) -> None:
    data = read_csv(tmp_path / "a.csv", "a,y,b,note\n1,0,2,x\n3,1,4,y\n", columns=("b", "a"))
    assert windows(data.training) == [([[2.0, 1.0]], 0), ([[4.0, 3.0]], 1)]


def test_a_spreadsheets_export_is_read(tmp_path: Path) -> None:
    content = '\ufeffa,"y"\r\n"1.5",0\r\n 2e-3 ,"1"\r\n'.encode()
    data = read_csv(tmp_path / "a.csv", content)
    assert data.training.x.ravel().tolist() == [1.5, np.float32(2e-3)]
    assert data.training.y.tolist() == [0, 1]


BAD_CSV: dict[str, tuple[str | bytes, dict[str, Any], str]] = {
    "empty file": ("", {}, ": is empty; a header line and rows are needed"),
    "header only": ("a,y\n", {}, ": has no rows below its header line; is it the right file?"),
    "no label column": ("a,b\n1,0\n", {}, ": has no column 'y'; it has a, b"),
    "no feature column": ("a,y\n1,0\n", {"columns": ("b",)}, ": has no column 'b'; it has a, y"),
    "no group column": ("a,y\n1,0\n", {"group": "who"}, ": has no column 'who'; it has a, y"),
    "only a label": ("y\n0\n", {}, ": has no feature column besides the label and the group"),
    "columns twice": ("a,b,a,y\n1,2,3,0\n", {}, ": columns appear twice: a; rename or remove one of each"),
    "text": ("a,y\n1,0\nhigh,0\n", {}, ", line 3, column 'a': 'high' is not a finite float32 number; fill or drop"),
    "no value": ("a,y\n1,0\n,0\n", {}, ", line 3, column 'a': '' is not a finite"),
    "long text": ("a,y\n" + "x" * 99 + ",0\n", {}, ": '" + "x" * 37 + "...' is not"),
    "NaN": ("a,y\nNaN,0\n", {}, ", line 2, column 'a': 'NaN' is not a finite"),
    "infinity": ("a,y\n-inf,0\n", {}, ", line 2, column 'a': '-inf' is not a finite"),
    "beyond float32": ("a,y\n1e39,0\n", {}, ", line 2, column 'a': '1e39' is not a finite float32"),
    "Python's own digits": ("a,y\n1_000,0\n", {}, ", line 2, column 'a': '1_000' is not a finite"),
    "NaN label": ("a,y\n1,nan\n", {}, ", line 2, column 'y': 'nan' is not a finite"),
    "negative label": ("a,y\n1,0\n1,-1\n", {}, ", line 3, column 'y': '-1' is not a label; labels are whole numbers"),
    "fractional label": ("a,y\n1,0.5\n", {}, ", line 2, column 'y': '0.5' is not a label"),
    "huge label": ("a,y\n1,1000000\n", {}, ", line 2, column 'y': '1000000' is not a label; labels are whole numbers"),
    "short row": ("a,y\n1,0\n2\n", {}, ", line 3: 1 fields, the header has 2; mend the line or its quoting"),
    "long row": ("a,y\n1,0,\n", {}, ", line 2: 3 fields, the header has 2"),
    "line after a quoted break": ('a,b,y\n1,2,0\n"1\n",2,0,4\n', {}, ", line 4: 4 fields"),
    "open quote": ('a,y\n1,0\n"1,0\n', {}, ", line 3: unexpected end of data"),
    "not UTF-8": (b"a,y\n" + b"1,0\n" * 9000 + b"\xff,0\n", {}, ", line 9002: not UTF-8 text; convert the file"),
    "not UTF-8 header": (b"\xff\xfea\0,\0y\0", {}, ", line 1: not UTF-8 text"),
    "long window": (
        "a,y\n1,0\n2,0\n",
        {"window": 3},
        ": no entity has 3 rows (the longest has 2); use a smaller window",
    ),
    "long window for all": ("a,g,y\n1,p,0\n2,q,0\n", {"window": 2, "group": "g"}, "(the longest has 1); use a smaller"),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_a_csv_file_that_is_refused(tmp_path: Path, case: str) -> None:
    content, settings, said = BAD_CSV[case]
    path = tmp_path / "ward.csv"
    with pytest.raises(DataError) as refused:
        read_csv(path, content, **settings)
    assert str(refused.value).startswith(str(path))
    assert said in str(refused.value)


# NPZ ------------------------------------------------------------------------------------------------------------------


def arrays(size: int = 10, steps: int = 4, features: int = 2) -> dict[str, NDArray[Any]]:
    draw = np.random.default_rng(size)
    return {
        "x": draw.normal(size=(size, steps, features)).astype(np.float32),
        "y": draw.integers(0, 3, size),
        "lengths": draw.integers(1, steps + 1, size),
    }


def test_the_arrays_come_as_they_are(tmp_path: Path) -> None:
    given = arrays()
    np.savez(tmp_path / "a.npz", **given)  # type: ignore[arg-type] # a dictionary of arrays is no flag
    data = load(DataSettings(file=tmp_path / "a.npz", validation_fraction=0.0)).training
    assert data.lengths is not None
    assert [one.dtype.name for one in (data.x, data.y, data.lengths)] == ["float32", "int64", "int64"]
    assert data.x.tobytes() == given["x"].tobytes()
    assert (data.y.tolist(), data.lengths.tolist()) == (given["y"].tolist(), given["lengths"].tolist())


@given(size=st.integers(1, 20), held_out=fractions)
def test_the_held_out_sequences_are_a_seeded_share(folder: Path, size: int, held_out: float) -> None:
    path = folder / "split.npz"
    np.savez(path, x=np.arange(size).reshape(size, 1, 1), y=np.arange(size), lengths=np.ones(size, np.int8))
    data, again = (load(DataSettings(file=path, validation_fraction=held_out)) for _ in range(2))
    assert len(data.validation) == min(int(held_out * size), size - 1)
    assert sorted(data.training.y.tolist() + data.validation.y.tolist()) == list(range(size))
    for one, other in ((data.training, again.training), (data.validation, again.validation)):
        assert one.x.ravel().tolist() == one.y.tolist() == other.y.tolist()


def test_a_validation_file_is_only_scored(tmp_path: Path) -> None:
    for name, size in (("a", 7), ("b", 3)):
        np.savez(tmp_path / f"{name}.npz", x=np.ones((size, 2, 1)), y=np.full(size, size))
    data = load(DataSettings(file=tmp_path / "a.npz", validation=tmp_path / "b.npz", validation_fraction=0.5))
    assert (data.training.y.tolist(), data.validation.y.tolist()) == ([7] * 7, [3] * 3)
    assert data.schema.model_dump() == {
        "features": 1,
        "steps": 2,
        "classes": 8,
        "examples": 7,
        "validation_examples": 3,
    }


def test_the_schema_of_sequences_of_differing_length(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays())  # type: ignore[arg-type]
    assert load(DataSettings(file=tmp_path / "a.npz")).schema.steps is None


def test_a_validation_file_of_another_width(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((2, 2, 1)), y=np.zeros(2, int))
    np.savez(tmp_path / "b.npz", x=np.ones((2, 2, 3)), y=np.zeros(2, int))
    with pytest.raises(DataError, match=r"b\.npz: has 3 features a step, .*a\.npz has 1"):
        load(DataSettings(file=tmp_path / "a.npz", validation=tmp_path / "b.npz"))


X, Y = np.ones((3, 2, 1)), np.zeros(3, int)
HOLED = np.where(np.arange(6).reshape(3, 2, 1) == 3, np.nan, X)
BAD_NPZ: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "has no array 'x'; it has none"),
    "no x": ({"X": X, "y": Y}, "has no array 'x'; it has X, y"),
    "no y": ({"x": X, "labels": Y}, "has no array 'y'; it has labels, x"),
    "flat x": ({"x": X[..., 0], "y": Y}, "x is float64 of shape (3, 2); it must be numbers of shape (N, T, F)"),
    "no rows": (
        {"x": X[:0], "y": Y[:0]},
        "x is float64 of shape (0, 2, 1); it must be numbers of shape (N, T, F), none",
    ),
    "no features": ({"x": X[..., :0], "y": Y}, "of shape (3, 2, 0)"),
    "text": ({"x": X.astype(str), "y": Y}, "x is <U32 of shape"),
    "complex": ({"x": X.astype(complex), "y": Y}, "x is complex128"),
    "short y": ({"x": X, "y": Y[:2]}, "y is int64 of shape (2,); it must be whole numbers of shape (3,)"),
    "one-hot y": ({"x": X, "y": np.eye(3, dtype=int)}, "y is int64 of shape (3, 3)"),
    "real y": ({"x": X, "y": Y.astype(float)}, "y is float64 of shape (3,); it must be whole numbers"),
    "negative y": ({"x": X, "y": np.array([0, -2, -1])}, "y[1] is -2; labels start at 0"),
    "huge y": ({"x": X, "y": np.array([0, 2**63, 0], np.uint64)}, "y[1] is 9223372036854775808; labels end at 999999"),
    "NaN": ({"x": HOLED, "y": Y}, "x[1, 1, 0] is not finite; fill or drop missing values first"),
    "infinity": ({"x": X * np.inf, "y": Y}, "x[0, 0, 0] is not finite"),
    "beyond float32": ({"x": X * 1e39, "y": Y}, "x[0, 0, 0] is not finite"),
    "length 0": ({"x": X, "y": Y, "lengths": np.array([0, 1, 2])}, "lengths must be from 1 to 2"),
    "length over T": ({"x": X, "y": Y, "lengths": np.array([1, 2, 3])}, "lengths must be from 1 to 2"),
    "real lengths": ({"x": X, "y": Y, "lengths": np.ones(3)}, "lengths must be whole numbers of shape (3,)"),
    "few lengths": ({"x": X, "y": Y, "lengths": np.ones(2, int)}, "lengths must be whole numbers of shape (3,)"),
    "pickled objects": ({"x": np.array([[[None]]]), "y": Y}, "not a readable NPZ file of plain arrays: Object arrays"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_an_npz_file_that_is_refused(tmp_path: Path, case: str) -> None:
    content, said = BAD_NPZ[case]
    path = tmp_path / "ward.npz"
    np.savez(path, **content)
    with pytest.raises(DataError) as refused:
        load(DataSettings(file=path))
    assert str(refused.value).startswith(f"{path}: ")
    assert said in str(refused.value)


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


@pytest.mark.parametrize(
    "write",
    [
        damaged,
        truncated,
        single,
        foreign,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"x,y\n1,2\n"),
        lambda path: path.write_bytes(b"\x80\x04K\x01."),
        lambda path: path.mkdir(),
        lambda path: None,
    ],
    ids=["damaged", "truncated", "single array", "foreign zip", "empty", "text", "pickle", "folder", "not there"],
)
def test_a_file_that_is_no_npz(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "ward.npz"
    write(path)
    with pytest.raises(DataError, match=r"ward\.npz: "):
        load(DataSettings(file=path))


def test_a_csv_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: No such file"):
        load(DataSettings(file=tmp_path / "none.csv", label="y", window=1))


def test_another_kind_of_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown kind of file '\.parquet'; use \.npz or \.csv"):
        load(DataSettings(file=tmp_path / "a.parquet"))
