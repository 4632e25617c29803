"""Tables in blocks of whole rows: the same records as Python's csv module reads, wherever the blocks end."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqfed.client.data import reading
from seqfed.client.data.reading import Bound, TableFile
from seqfed.client.settings import DataSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blocks")


fields = st.text(alphabet='ab,"\n\té', max_size=8)


@given(
    rows=st.lists(st.tuples(fields, fields), min_size=1, max_size=40),
    every=st.booleans(),
    stray=st.booleans(),
    end=st.sampled_from(("\n", "\r\n")),
)
def test_records(folder: Path, rows: list[tuple[str, str]], every: bool, stray: bool, end: str) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL if every else csv.QUOTE_MINIMAL, lineterminator=end)
    writer.writerow(["a", "b"])
    for place, row in enumerate(rows):
        writer.writerow(row)
        if stray and place % 3 == 0:
            buffer.write("5'11\",high" + end)  # a quote that quotes nothing
    path = folder / "a.csv"
    path.write_bytes(buffer.getvalue().encode())
    expected = [row for row in csv.reader(io.StringIO(buffer.getvalue(), newline="")) if row][1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK", 256)
        file = TableFile.of(path, "csv", DataSettings(file=(str(path),)))
        found = [list(row.values()) for batch in file.batches(("a", "b"), Bound(1.0)) for row in batch.to_pylist()]
    assert found == expected


@given(
    st.lists(st.lists(st.sampled_from(("1", "-2.5", "x")), min_size=2, max_size=2), min_size=1, max_size=60), st.data()
)
def test_white_space(folder: Path, rows: list[list[str]], data: st.DataObject) -> None:
    gaps = st.text(alphabet=" \t", min_size=1, max_size=3)
    ends = st.text(alphabet=" \t", max_size=3)
    lines = [data.draw(ends) + data.draw(gaps).join(row) + data.draw(ends) for row in rows]
    path = folder / "a.txt"
    path.write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK", 64)
        file = TableFile.of(path, "csv", DataSettings(file=(str(path),), names=("a", "b"), delimiter="whitespace"))
        found = [list(row.values()) for batch in file.batches(("a", "b"), Bound(1.0)) for row in batch.to_pylist()]
    assert found == rows
