"""Files that are broken, or made to break who reads them: a typed error with file, place and remedy, and no memory eaten."""

from __future__ import annotations

import gzip
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seqfed.client.data import ClientData, open_source
from seqfed.client.settings import DataSettings
from seqfed.common.errors import DataError
from seqfed.common.spec import RunSpec


def read(path: Path, settings: dict[str, Any] | None = None, data: dict[str, Any] | None = None) -> ClientData:
    given = {"file": str(path), "label": "y", "validation_fraction": 0.0, **(settings or {})}
    spec = RunSpec.model_validate({"data": {"features": 1, "classes": 3, **(data or {})}})
    return open_source(DataSettings.model_validate(given)).prepare(spec)


def pack(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


BIG = b"1,0\n" * 400_000  # more than a block
PACKED = pack(b"a,y\n" + BIG)

CSV: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "empty file": (b"", {}, ": is empty; a header line and rows are needed"),
    "blank file": (b"\n \n", {}, ": is empty; a header line and rows are needed"),
    "header only": (b"a,y\n", {}, ": has no rows below its header line; is it the right file?"),
    "no label column": (b"a,b\n1,0\n", {}, ": has no column 'y'; it has a, b"),
    "no feature column": (b"a,y\n1,0\n", {"columns": ["b"]}, ": has no column 'b'; it has a, y"),
    "no group column": (b"a,y\n1,0\n", {"group": "who"}, ": has no column 'who'; it has a, y"),
    "only a label": (b"y\n0\n", {}, ": has no column of numbers or categories besides label, group and time"),
    "columns twice": (b"a,b,a,y\n1,2,3,0\n", {}, ": columns appear twice: a; rename or remove one of each"),
    "text": (
        b"a,y\n1,0\nhigh,0\n",
        {},
        ", line 3, column 'a': 'high' is not a number; mend it, name it in data.missing",
    ),
    "texts": (
        b"a,y\n1,0\nhigh,0\n2,0\nlow,0\n",
        {},
        ", line 3, column 'a': 'high' is not a number (2 such values); mend",
    ),
    "text far down": (b"a,y\n" + BIG + b"high,0\n", {}, ", line 400002, column 'a': 'high' is not a number"),
    "dates": (b"a,b,y\n2024-01-01,1,0\n", {"columns": ["a"]}, ", line 2, column 'a': '2024-01-01' is not a number"),
    "long text": (b"a,y\n1,0\n" + b"x" * 99 + b",0\n", {}, ": '" + "x" * 37 + "...' is not"),
    "infinity": (b"a,y\n1,0\n-inf,0\n", {}, ", line 3, column 'a': '-inf' is not a finite float32 number"),
    "beyond float32": (b"a,y\n1e39,0\n", {}, ", line 2, column 'a': '1e39' is not a finite float32"),
    "beyond float64": (b"a,y\n1e999,0\n", {}, ", line 2, column 'a': '1e999' is not a finite float32"),
    "Python's own digits": (b"a,y\n1,0\n1_000,0\n", {}, ", line 3, column 'a': '1_000' is not a number"),
    "decimal comma": (b'a,y\n1,0\n"1,5",0\n', {}, ", line 3, column 'a': '1,5' is not a number"),
    "negative label": (b"a,y\n1,0\n1,-1\n", {}, ", line 3, column 'y': -1 is not a label; the run's are whole numbers"),
    "high labels": (
        b"a,y\n1,0\n1,3\n2,9\n",
        {},
        ", line 3, column 'y': 3 is not a label (2 such labels); the run's are",
    ),
    "fractional label": (b"a,y\n1,0.5\n", {}, ", line 2, column 'y': 0.5 is not a label; the run's are whole numbers"),
    "text label": (b"a,y\n1,ill\n", {}, ", line 2, column 'y': 'ill' is not a number; mend it"),
    "infinite label": (b"a,y\n1,0\n1,inf\n", {}, ", line 3, column 'y': 'inf' is not a finite"),
    "short row": (b"a,y\n1,0\n2\n", {}, ", line 3: 1 fields where 2 are due: '2'; mend the line, its quoting, or"),
    "long rows": (b"a,y\n1,0,\n2,0\n3,0,0\n", {}, ", line 2: 3 fields where 2 are due (2 such rows): '1,0,'; mend"),
    "ragged far down": (b"a,y\n" + BIG + b"1,2,3\n", {}, ", line 400002: 3 fields where 2 are due"),
    "line after a quoted break": (b'a,b,y\n1,2,0\n"1\n",2,0,4\n', {}, ", line 3: 4 fields"),
    "open quote": (b'a,y\n1,0\n"1,0\n', {}, ", line 3: 1 fields where 2 are due"),
    "open quote in a large file": (
        b'a,y\n1,0\n"1,0\n' + BIG * 3,
        {},
        ": has a row of over 4 MiB; is a line's end or a c",
    ),
    "endless line": (b"a,y\n" + b"1," * 4_000_000, {}, ": has a row of over 4 MiB; is a line's end"),
    "not UTF-8": (
        b"a,y\n" + b"1,0\n" * 9000 + b"\xff,0\n",
        {},
        ", line 9002: not utf-8 text; name its encoding (data.enc",
    ),
    "not UTF-8 header": (b"\xff\xfea\0,\0y\0", {}, ", line 1: not utf-8 text"),
    "cut-off character": (b"a,y\n1,0\n1,\xc3", {}, ", line 3: not utf-8 text"),
    "not UTF-16": (b"a,y\n1,0\n\n", {"encoding": "utf-16"}, ", line 1: not utf-16 text"),
    "no gzip": (b"a,y\n1,0\n", {"suffix": ".csv.gz"}, ": is not gzip, though its name says so"),
    "truncated gzip": (PACKED[:-900], {"suffix": ".csv.gz"}, ": is truncated or damaged gzip"),
    "damaged gzip": (PACKED[:90] + b"\0" * 90 + PACKED[180:], {"suffix": ".csv.gz"}, ": is truncated or damaged gzip"),
    "gzip bomb": (
        pack(b"a,y\n" + BIG * 8),
        {"suffix": ".csv.gz", "unpacked_gib": 0.01},
        ": unfolds to more than the 0.01 GiB allowed",
    ),
    "hidden gzip bomb": (
        pack(b"a,y\n" + BIG * 8),
        {"unpacked_gib": 0.01},
        ": unfolds to more than the 0.01 GiB allowed",
    ),
    "no group": (b"g,a,y\np,1,0\n,1,0\n", {"group": "g"}, ", line 3, column 'g': has no value; say whose the row is"),
    "no time": (b"t,a,y\n1,1,0\n,1,0\n", {"time": "t"}, ", line 3, column 't': has no value; say when the row was"),
    "endless time": (b"t,a,y\n1,1,0\ninf,1,0\n", {"time": "t"}, ", line 3, column 't': is not finite; mend it"),
    "mixed times": (b"t,a,y\n1,1,0\n2024-01-01,1,0\n", {"time": "t"}, ", line 3, column 't': mixes numbers and dates"),
    "odd times": (
        b"t,a,y\n01/02/24,1,0\n",
        {"time": "t"},
        ", line 2, column 't': '01/02/24' is neither a number nor an ISO",
    ),
    "a name like a book": (b"x" * 300 + b",y\n1,0\n", {}, ": a column's name has 300 characters"),
    "no value": (
        b"a,y\n,0\n",
        {},
        "1 of 1 sequences refused; the first: {path}, line 2, column 'a' has no value, and the run",
    ),
    "no label": (b"a,y\n1,\n", {}, "1 of 1 sequences refused; the first: {path}, line 2: '{path}' has no label"),
    "a wide row": (
        b",".join(b"c%d" % n for n in range(20_000)) + b"\n",
        {},
        ": has 20,000 columns, at most 16,384 can be",
    ),
    "a very wide row": (
        b"c," * 1_500_000,
        {},
        ": its header goes on for over a million characters; a table has at most",
    ),
    "binary": (bytes(range(128, 256)) * 99, {}, ", line 1: not utf-8 text"),
}


@pytest.mark.parametrize("case", CSV)
def test_a_csv_file_that_is_refused(tmp_path: Path, case: str) -> None:
    content, settings, said = CSV[case]
    path = tmp_path / ("ward" + settings.get("suffix", ".csv"))
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        read(path, {key: value for key, value in settings.items() if key != "suffix"})
    assert str(refused.value).startswith(str(path))
    assert said.replace("{path}", str(path)) in str(refused.value)
    assert len(str(refused.value)) < 600


def test_a_number_that_the_runs_scale_makes_infinite(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,y\n1,0\n1e30,0\n")
    with pytest.raises(DataError, match="line 3, column 'a': is too large for float32 after the run's mean and scale"):
        read(path, data={"scale": [1e-20]})


def test_two_files_that_are_no_one_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,y\n1,0\n")
    (tmp_path / "b.csv").write_text("b,y\n1,0\n")
    with pytest.raises(DataError, match=r"b\.csv: has no column 'a', which .*a\.csv has; files of one table"):
        read(tmp_path / "*.csv")
    (tmp_path / "b.csv").unlink()
    pq.write_table(pa.table({"a": [1.0], "y": [0]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet is parquet, .*a\.csv is csv; give files of one kind"):
        read(tmp_path / "*.*")


# Parquet --------------------------------------------------------------------------------------------------------------


def parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


PARQUET: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no label column": ({"a": [1.0]}, {}, ": has no column 'y'; it has a"),
    "text": ({"a": ["1", "high", "2"], "y": [0, 0, 0]}, {}, ", row 2, column 'a': 'high' is not a number"),
    "infinity": ({"a": [1.0, np.inf], "y": [0, 0]}, {}, ", row 2, column 'a': 'inf' is not a finite float32"),
    "lists": ({"a": [[1.0]], "y": [0]}, {"columns": ["a"]}, ", column 'a': is of type list<"),
    "dates": (
        {"a": pa.array([0], pa.date32()), "y": [0]},
        {"columns": ["a"]},
        ", column 'a': is of type date32[day], not",
    ),
    "label": ({"a": [1.0, 2.0], "y": [0, 7]}, {}, ", row 2, column 'y': 7 is not a label"),
    "no rows": ({"a": pa.array([], pa.float64()), "y": pa.array([], pa.int64())}, {}, ": has no rows"),
    "no name": ({"": [1.0], "y": [0]}, {}, ": column 1 has no name; give it one"),
}


@pytest.mark.parametrize("case", PARQUET)
def test_a_parquet_file_that_is_refused(tmp_path: Path, case: str) -> None:
    columns, settings, said = PARQUET[case]
    path = parquet(tmp_path / "ward.parquet", **columns)
    with pytest.raises(DataError) as refused:
        read(path, settings, {"features": None, "columns": ["a"]})
    assert str(refused.value).startswith(str(path))
    assert said in str(refused.value)


def test_parquet_columns_twice(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array([1.0])] * 2, names=["a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: columns appear twice: a"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("cut", [0, 3, 100, -1, -9])
def test_truncated_parquet(tmp_path: Path, cut: int) -> None:
    path = parquet(tmp_path / "a.parquet", a=np.arange(1000.0), y=np.zeros(1000, int))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file: "):
        read(path)


def test_damaged_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", a=np.random.default_rng(0).random(5000), y=np.zeros(5000, int))
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file: "):
        read(path)


def test_parquet_of_another_schema(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", a=[1.0], y=[0])
    parquet(tmp_path / "b.parquet", a=["x"], y=[0])
    with pytest.raises(DataError, match=r"b\.parquet, column 'a': holds texts, in .*a\.parquet it holds numbers"):
        read(tmp_path / "*.parquet")


def test_a_parquet_bomb(tmp_path: Path) -> None:
    """A million equal rows take a few hundred bytes."""
    path = parquet(tmp_path / "a.parquet", a=np.zeros(4_000_000), y=np.zeros(4_000_000, int))
    assert path.stat().st_size < 50_000
    with pytest.raises(
        DataError, match="unfolds to more than the 0.02 GiB allowed; if it is meant to, raise data.unpacked_gib"
    ):
        read(path, {"unpacked_gib": 0.02})


# Paths ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.csv", "none.csv: No such file or directory"),
        ("none*.csv", "none*.csv: no file matches; check the path"),
        ("folder.csv", "folder.csv: Is a directory"),
        ("none.parquet", "none.parquet: No such file or directory"),
        ("folder.parquet", "folder.parquet: Is a directory"),
        ("a.parquet.gz", "a.parquet.gz: such a file is compressed inside; unpack it with gunzip"),
    ],
)
def test_a_path_that_is_no_file(tmp_path: Path, name: str, said: str) -> None:
    for one in ("folder.csv", "folder.parquet"):
        (tmp_path / one).mkdir()
    with pytest.raises(DataError) as refused:
        read(tmp_path / name)
    assert said in str(refused.value)


def test_an_unknown_kind_of_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown kind of file '\.h5'; use \.npz, \.csv, \.tsv, \.parquet or \.txt"):
        open_source(DataSettings(file=(str(tmp_path / "a.h5"),)))


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,y\n" + "1,0\n" * 20_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # a file of ours may not be longer
    try:
        with pytest.raises(DataError, match=r"no room for 0 MiB of data in .*data\.cache"):
            read(path, {"memory_mib": 0.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Memory ---------------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from seqfed.client.data import open_source
from seqfed.client.settings import DataSettings
from seqfed.common.errors import DataError
import pyarrow.csv, pyarrow.compute, pyarrow.parquet
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) >> 10
before = peak()
try:
    open_source(DataSettings.model_validate({"file": sys.argv[1], "label": "y", "unpacked_gib": 0.5}))
except DataError as error:
    print(peak() - before, error)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read there")
@pytest.mark.parametrize("case", ["a row of 1e9 columns", "a header of 1e9 columns", "text without end"])
def test_a_bomb_is_refused_within_little_memory(tmp_path: Path, case: str) -> None:
    """Gigabytes in a file of a megabyte: the reader may look at a few blocks of them."""
    path = tmp_path / "bomb.csv.gz"
    unit, first = {
        "a row of 1e9 columns": (b"1,", b"a,y\n"),
        "a header of 1e9 columns": (b"c,", b""),
        "text without end": (b"xx", b"a,y\n"),
    }[case]
    block = pack(unit * (1 << 20))
    with path.open("wb") as file:  # gzip files one after the other are a gzip file
        file.write(pack(first))
        for _ in range(1000):
            file.write(block)
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    megabytes, said = ran.stdout.split(" ", 1)
    assert str(path) in said
    assert int(megabytes) < 80


def test_no_file_is_both_trained_on_and_scored_on(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,y\n1,0\n2,1\n")
    other = tmp_path / "link.csv"
    other.symlink_to(path)
    for validation in (path, other):
        with pytest.raises(DataError, match="is among the files to train on and those to score on"):
            open_source(DataSettings(file=(str(path),), validation=(str(validation),), label=("y",)))
