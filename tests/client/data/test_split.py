"""`seqfed data split`: every record in exactly one shard, untouched; entities whole; refusals named."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from seqfed.client.data import split as module
from seqfed.client.data.split import How, Plan, write_shards
from seqfed.client.data_cli import split
from seqfed.common.errors import ConfigError, DataError

FIELD = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)  # quotes, commas, line ends and all
ROWS = st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("xyz"), FIELD), min_size=12, max_size=60)


def text_of(rows: list[Any], header: tuple[str, ...] = ("who", "kind", "note")) -> bytes:
    written = io.StringIO(newline="")
    csv.writer(written).writerows([header, *rows])
    return written.getvalue().encode()


def rows_of(data: bytes) -> list[tuple[str, ...]]:
    return [tuple(row) for row in csv.reader(io.StringIO(data.decode(), newline=""))]


def plans(clients: int, seed: int) -> list[Plan]:
    return [
        Plan(How.IID, clients, seed=seed),
        Plan(How.SIZE, clients, alpha=1.5, seed=seed),
        Plan(How.DIRICHLET, clients, label="kind", alpha=1e3, seed=seed),
        Plan(How.IID, clients, group="who", seed=seed),
        Plan(How.SIZE, clients, group="who", seed=seed),
        Plan(How.COLUMN, clients, by="who", seed=seed),
    ]


@settings(max_examples=40)
@given(ROWS, st.integers(1, 3), st.integers(0, 5), st.integers(0, 5))
def test_every_csv_record_is_in_exactly_one_shard(
    rows: list[tuple[str, str, str]], clients: int, seed: int, which: int
) -> None:
    plan = plans(clients, seed)[which]
    whole = {row[0] for row in rows}
    if plan.group is not None or plan.by is not None:
        rows = [*rows, *((name, "x", "") for name in "abc" if name not in whole)]
    rows = [(who, kind, f"{place}{note}") for place, (who, kind, note) in enumerate(rows)]  # no two alike
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "all.csv"
        file.write_bytes(text_of(rows))
        shards = write_shards(file, plan, Path(folder) / "out")
        found = [rows_of(shard.file.read_bytes()) for shard in shards]
        again = write_shards(file, plan, Path(folder) / "again")
        assert [one.file.read_bytes() for one in again] == [one.file.read_bytes() for one in shards]
    assert len(found) == clients
    assert all(part[0] == ("who", "kind", "note") for part in found)
    assert sorted(itertools.chain.from_iterable(part[1:] for part in found)) == sorted(rows)
    for part in found:  # in the file's own order
        assert part[1:] == [row for row in rows if row in part[1:]]
    assert [shard.rows for shard in shards] == [len(part) - 1 for part in found]
    if plan.group is not None or plan.by is not None:
        holders = [{row[0] for row in part[1:]} for part in found]
        assert sum(map(len, holders)) == len(set.union(*holders))


def test_records_are_copied_byte_by_byte(tmp_path: Path) -> None:
    file = tmp_path / "all.csv"
    lines = [b'1,"a ""b"", c\r\nsecond line"\r\n', b"2,  plain \r\n", b"\r\n", b"3,\xc3\xa9\r\n", b"4,no end"]
    file.write_bytes(b"\xef\xbb\xbfid,text\r\n" + b"".join(lines))
    shards = write_shards(file, Plan(How.COLUMN, None, by="id"), tmp_path)
    bodies = {one.file.read_bytes() for one in shards}
    head = b"\xef\xbb\xbfid,text\r\n"
    assert bodies == {head + line + (b"\n" if line.endswith(b"end") else b"") for line in lines if line != b"\r\n"}


def test_zipped_and_tab_separated_files_stay_so(tmp_path: Path) -> None:
    zipped = tmp_path / "all.tsv.gz"
    zipped.write_bytes(gzip.compress("who\tx\na\t1\nb\t2\né\t3\n".encode("latin-1")))
    shards = write_shards(zipped, Plan(How.COLUMN, None, by="who"), tmp_path / "out", encoding="latin-1")
    assert [one.file.name for one in shards] == ["all-0.tsv.gz", "all-1.tsv.gz", "all-2.tsv.gz"]
    assert {gzip.decompress(one.file.read_bytes()).decode("latin-1") for one in shards} == {
        f"who\tx\n{row}\n" for row in ("a\t1", "b\t2", "é\t3")
    }


def test_files_without_a_header_line_get_none(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_bytes(b"1  0.5 \n1 0.6\n2\t0.7\n")
    plan = Plan(How.COLUMN, None, by="unit")
    shards = write_shards(tmp_path / "all.txt", plan, tmp_path, delimiter="whitespace", names=("unit", "speed"))
    assert {one.file.read_bytes() for one in shards} == {b"1  0.5 \n1 0.6\n", b"2\t0.7\n"}
    with pytest.raises(DataError, match="line 1: 2 fields, named are 1"):
        write_shards(tmp_path / "all.txt", plan, tmp_path / "b", delimiter="whitespace", names=("unit",))


def test_a_quote_between_tabs_is_only_a_character(tmp_path: Path) -> None:
    (tmp_path / "all.tsv").write_bytes(b'kind\ttext\nx\t"un\ny\tb"\n')
    shards = write_shards(tmp_path / "all.tsv", Plan(How.COLUMN, None, by="kind"), tmp_path)
    assert {one.file.read_bytes() for one in shards} == {b'kind\ttext\nx\t"un\n', b'kind\ttext\ny\tb"\n'}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([*"abc", None]), st.integers(0, 2)), min_size=12, max_size=60),
    st.integers(1, 3),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_every_parquet_row_is_in_exactly_one_shard(
    rows: list[tuple[str | None, int]], clients: int, seed: int, which: int
) -> None:
    rows = [*rows, ("a", 0), ("b", 1), ("c", 2)]
    columns: dict[str, Any] = {"who": [who for who, _ in rows], "kind": [kind for _, kind in rows]}
    table = pa.table({**columns, "at": range(len(rows))})
    plan = plans(clients, seed)[which]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "all.parquet"
        pq.write_table(table, file, row_group_size=7)
        parts = [pq.read_table(one.file) for one in write_shards(file, plan, Path(folder) / "out")]
    assert len(parts) == clients
    assert all(part.schema == table.schema and part.num_rows for part in parts)
    places = [place for part in parts for place in part["at"].to_pylist()]
    assert sorted(places) == list(range(len(rows)))
    assert pa.concat_tables(parts).equals(table.take(places))
    if plan.group is not None or plan.by is not None:
        holders = [set(part["who"].to_pylist()) for part in parts]
        assert sum(map(len, holders)) == len(set.union(*holders))


@pytest.mark.parametrize("plan", plans(3, 0), ids=lambda plan: f"{plan.how}-{plan.group}")
def test_every_npz_sequence_is_in_exactly_one_shard(plan: Plan, tmp_path: Path) -> None:
    x = np.arange(60, dtype=np.float32).reshape(20, 3, 1)
    who, kind = np.array(list("abcde") * 4), np.arange(20) % 3
    np.savez(tmp_path / "all.npz", x=x, y=np.arange(20), who=who, kind=kind, names=np.array(["speed"]))
    parts = [np.load(one.file) for one in write_shards(tmp_path / "all.npz", plan, tmp_path / "out")]
    assert sorted(row for part in parts for row in part["y"].tolist()) == list(range(20))
    for part in parts:
        rows = part["y"]
        assert (part["x"] == x[rows]).all()
        assert (part["who"] == who[rows]).all()
        assert (part["kind"] == kind[rows]).all()
        assert part["names"].tolist() == ["speed"]


def test_dirichlet_deals_entities_by_what_most_of_their_rows_are(tmp_path: Path) -> None:
    # 40 entities of five rows: three as their label says, two not; a tiny alpha gives each label to one client
    rows = [(f"e{entity}", "xy"[(entity + (step > 2)) % 2], "") for entity in range(40) for step in range(5)]
    (tmp_path / "all.csv").write_bytes(text_of(rows))
    plan = Plan(How.DIRICHLET, 2, label="kind", group="who", alpha=0.05, seed=3)
    shards = write_shards(tmp_path / "all.csv", plan, tmp_path / "out")
    assert sum(one.entities for one in shards) == 40
    assert all(one.rows == 5 * one.entities for one in shards)
    shares = [
        np.mean([int(who[1:]) % 2 for who, _, _ in rows_of(one.file.read_bytes())[1:]]).round(6) for one in shards
    ]
    assert abs(shares[0] - shares[1]) > 0.9


def test_the_seed_decides(tmp_path: Path) -> None:
    file = tmp_path / "all.csv"
    file.write_bytes(text_of([(str(row), "x", "") for row in range(50)]))

    def bodies(seed: int, out: str) -> list[bytes]:
        return [one.file.read_bytes() for one in write_shards(file, Plan(How.IID, 2, seed=seed), tmp_path / out)]

    assert bodies(1, "a") == bodies(1, "b") != bodies(2, "c")


@pytest.mark.parametrize(
    ("name", "content", "plan", "message"),
    [
        ("a.csv", b"", Plan(How.IID, 2), "is empty; a header line"),
        ("a.csv", b"x,y\n", Plan(How.IID, 2), "no rows below its header"),
        ("a.csv", b"x,y\n1,2\n3\n", Plan(How.IID, 2), "line 3: 1 fields, the header has 2"),
        ("a.csv", b'x,y\n1,"2\n', Plan(How.IID, 2), "line 2: unexpected end of data"),
        ("a.csv", b"x,y\n1,\xe9\n", Plan(How.IID, 2), "line 2: not utf-8 text; name its encoding"),
        ("a.csv", b"x,y\n1,2\n", Plan(How.COLUMN, 1, by="z"), "has no column 'z'; it has x, y"),
        ("a.csv", b"x,x\n1,2\n", Plan(How.COLUMN, 1, by="x"), "column 'x' is there 2 times"),
        ("a.csv", b"x,y\n1,2\n", Plan(How.IID, 2), "1 sequences cannot be split among 2 clients"),
        ("a.csv", b"x,y\n" + b"1,2\n" * 9, Plan(How.COLUMN, 2, by="x"), "1 different values cannot be split among 2"),
        (
            "a.csv",
            b"x,y\n1,2\n1,3\n",
            Plan(How.COLUMN, 1, by="y", group="x"),
            "entity '1' of column 'x' has '2' and '3'",
        ),
        ("a.csv.gz", b"x,y\n1,2\n", Plan(How.IID, 1), "damaged or cut off"),
        ("a.csv.gz", gzip.compress(b"x,y\n" * 99)[:-9], Plan(How.IID, 1), "damaged or cut off"),
        ("a.parquet", b"PAR1 or not", Plan(How.IID, 1), "not a readable Parquet file"),
        ("a.npz", b"PK or not", Plan(How.IID, 1), "not a readable NPZ file"),
        ("a.xlsx", b"", Plan(How.IID, 1), "unknown kind of file '.xlsx'; use .csv"),
    ],
    ids=itertools.count(),
)
def test_refusals_name_file_and_place(name: str, content: bytes, plan: Plan, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        write_shards(tmp_path / name, plan, tmp_path / "out")
    assert str(tmp_path / name) in str(caught.value)
    assert message in str(caught.value)
    assert not list(tmp_path.glob("out/*"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: No such file"):
        write_shards(tmp_path / "none.csv", Plan(How.IID, 1), tmp_path)


def test_a_line_without_end_is_refused_before_it_fills_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_LINE", 1000)
    (tmp_path / "wide.csv").write_bytes(b"a,b\n" + b"1," * 5000)
    with pytest.raises(DataError, match="line 2: longer than 1000 bytes"):
        write_shards(tmp_path / "wide.csv", Plan(How.IID, 1), tmp_path / "out")


def test_numbers_are_no_classes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(text_of([(str(row), "x", "") for row in range(1001)]))
    with pytest.raises(DataError, match="1001 different values; a Dirichlet split is by class"):
        write_shards(tmp_path / "a.csv", Plan(How.DIRICHLET, 2, label="who"), tmp_path / "out")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"x\n1\n2\n")
    (tmp_path / "a-1.csv").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"a-1\.csv exists already; remove it, or name another folder"):
        write_shards(tmp_path / "a.csv", Plan(How.IID, 2), tmp_path)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a-1.csv", "a.csv"]
    assert (tmp_path / "a-1.csv").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"how": How.COLUMN}, "needs the column: --by"),
        ({"how": How.IID, "by": "x"}, "leave one of the two out"),
        ({"how": How.DIRICHLET}, "name its column with --label"),
        ({"how": How.IID, "clients": None}, "needs --clients N"),
        ({"how": How.SIZE, "clients": 0}, "must be 1 or more"),
        ({"how": How.SIZE, "alpha": 0.0}, "must be above 0"),
    ],
    ids=itertools.count(),
)
def test_contradictions_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(**{"clients": 2, **arguments})


def test_the_command_tells_the_shards(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(split)
    (tmp_path / "all.csv").write_bytes(text_of([("a", "x", ""), ("b", "x", ""), ("a", "y", "")]))
    made = CliRunner().invoke(app, [str(tmp_path / "all.csv"), "--by", "who", "--json"])
    assert made.exit_code == 0, made.output
    shards = json.loads(made.stdout)
    assert sorted(one["rows"] for one in shards) == [1, 2]
    assert {Path(one["file"]).parent for one in shards} == {tmp_path / "all-shards"}
    plain = CliRunner().invoke(
        app, [str(tmp_path / "all.csv"), "--clients", "2", "--group", "who", "--out", str(tmp_path / "b")]
    )
    assert "rows of 1 entities" in plain.stdout
