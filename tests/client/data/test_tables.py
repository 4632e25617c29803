"""Tables of every form against slow readings of the same rows; in memory, and mapped from a file, in CSV and in Parquet."""

from __future__ import annotations

import csv
import gzip
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from seqfed.client.data import ClientData, Sequences, open_source
from seqfed.client.data import numbers as numbers_module
from seqfed.client.settings import DataSettings
from seqfed.common.errors import DataError, SchemaMismatch
from seqfed.common.spec import RunSpec

Window = tuple[list[list[float]], list[float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


def prepared(settings: dict[str, Any], data: dict[str, Any], **spec: Any) -> ClientData:
    given = DataSettings.model_validate(settings)
    return open_source(given).prepare(RunSpec.model_validate({"data": data, **spec}))


def windows(made: Sequences) -> list[Window]:
    """Each sequence's real steps, and its label or targets, in the order of the sequences."""
    found = []
    for one in range(len(made)):
        batch = made.batch(np.array([one]))
        found.append((batch.x[0].tolist(), np.atleast_1d(batch.y[0]).tolist()))
    return found


def write_csv(path: Path, names: list[str], rows: list[tuple[Any, ...]], **form: Any) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, **form)
        writer.writerow(names)
        writer.writerows(rows)
    return path


# One row a step: the oracle -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row of the table under test: its place is one of its numbers, so that every window tells its origin."""

    who: int
    when: int
    value: float | None
    sort: str | None
    label: int


rows_of = st.lists(
    st.builds(
        Row,
        who=st.integers(0, 3),
        when=st.integers(0, 9),
        value=st.none() | st.integers(-9, 9).map(float),
        sort=st.none() | st.sampled_from(("red", "blue", "other")),
        label=st.integers(0, 2),
    ),
    min_size=1,
    max_size=30,
)
policies = st.sampled_from(("refuse", "mask", "forward", "mean"))


def slow_entities(rows: list[Row]) -> dict[str, list[tuple[int, Row]]]:
    """Each entity's rows in the order of time, equal times as they stand, with their places."""
    names = dict.fromkeys(f"p,{row.who}" for row in rows)
    placed = list(enumerate(rows))
    return {
        name: sorted((one for one in placed if f"p,{one[1].who}" == name), key=lambda one: one[1].when)
        for name in names
    }


def slow_rows(entity: list[tuple[int, Row]], policy: str) -> list[list[float]]:
    """An entity's rows as the network should see them: place, (value - 1) / 2, their masks, red, blue."""
    out, last = [], None
    for place, row in entity:
        value = row.value
        if policy == "forward":
            last = value = last if value is None else value
        cells = [place / 1.0, 0.0 if value is None else (value - 1) / 2]
        if policy == "mask":
            cells += [1.0, float(row.value is not None)]
        out.append([*cells, float(row.sort == "red"), float(row.sort == "blue")])
    return out


def slow_windows(
    entity: list[tuple[int, Row]], policy: str, steps: int, stride: int | None, horizon: int
) -> list[Window]:
    cells, room = slow_rows(entity, policy), len(entity) - horizon
    if room < 1:
        return []
    if stride is None or room < steps:
        size = min(steps, room)
        starts = [room - size]
    else:
        size, starts = steps, list(range(0, room - steps + 1, stride))
    return [
        (cells[at : at + size], [float(entity[at + size - 1 + horizon][1].label)])
        for at in starts
        if policy != "refuse" or all(row.value is not None for _, row in entity[at : at + size])
    ]


def table_of(path: Path, rows: list[Row], form: str) -> Path:
    columns: dict[str, list[Any]] = {
        "who": [f"p,{row.who}" for row in rows],
        "when": [row.when for row in rows],
        "place": list(range(len(rows))),
        "value": [row.value for row in rows],
        "sort": [row.sort for row in rows],
        "label": [row.label for row in rows],
    }
    if form == "parquet":
        kinds = {"value": pa.float64(), "sort": pa.string()}
        made = pa.table({name: pa.array(column, kinds.get(name)) for name, column in columns.items()})
        pq.write_table(made, path.with_suffix(".parquet"), row_group_size=7)
        return path.with_suffix(".parquet")
    shown = [tuple("NA" if cell is None else cell for cell in row) for row in zip(*columns.values(), strict=True)]
    return write_csv(path.with_suffix(".csv"), list(columns), shown)


@given(
    rows=rows_of,
    policy=policies,
    steps=st.integers(1, 5),
    stride=st.none() | st.integers(1, 4),
    horizon=st.integers(0, 2),
    held_out=st.sampled_from((0.0, 0.3, 0.6)),
    form=st.sampled_from(("csv", "parquet")),
    mapped=st.booleans(),
    cells=st.sampled_from((1, 7, 1 << 20)),
)
def test_windows_of_entities(
    folder: Path,
    rows: list[Row],
    policy: str,
    steps: int,
    stride: int | None,
    horizon: int,
    held_out: float,
    form: str,
    mapped: bool,
    cells: int,
) -> None:
    path = table_of(folder / "rows", rows, form)
    settings = {
        "file": str(path),
        "label": "label",
        "group": "who",
        "time": "when",
        "validation_fraction": held_out,
        "memory_mib": 0.0 if mapped else 64.0,
    }
    data = {
        "columns": ["place", "value"],
        "categories": {"sort": ["red", "blue"]},
        "missing": policy,
        "mean": [0.0, 1.0],
        "scale": [1.0, 2.0],
        "steps": steps,
        "stride": stride,
        "horizon": horizon,
        "classes": 3,
    }
    entities = slow_entities(rows)
    expected = {name: slow_windows(one, policy, steps, stride, horizon) for name, one in entities.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbers_module, "CELLS", cells)
        try:
            made = prepared(settings, data)
        except DataError as error:
            assert "no sequence is left to train on" in str(error)
            assert held_out or not any(expected.values())
            return
    assert mapped == isinstance(made.training.rows, np.memmap)
    if len(entities) == 1 and held_out:  # split by time: tested below
        return
    sides = [
        {made.entities[one] for one in side.entities.tolist()} if side.entities is not None else set()
        for side in (made.training, made.validation)
    ]
    assert sides[0] & sides[1] == set()
    assert len(sides[1]) <= min(int(held_out * len(entities)), len(entities) - 1)
    for side in (made.training, made.validation):
        assert side.entities is not None
        found: dict[str, list[Window]] = {}
        for whose, window in zip(side.entities.tolist(), windows(side), strict=True):
            found.setdefault(made.entities[whose], []).append(window)
        assert found == {name: expected[name] for name in found}
    left = sum(len(one) for name, one in expected.items() if name in sides[0] | sides[1])
    assert len(made.training) + len(made.validation) == left
    assert (made.refused is not None) == (
        sum(len(slow_windows(one, "mask", steps, stride, horizon)) for one in entities.values())
        > sum(map(len, expected.values()))
    )


@given(
    count=st.integers(1, 30),
    steps=st.integers(1, 4),
    stride=st.integers(1, 3),
    horizon=st.integers(0, 2),
    held_out=st.floats(0, 1, exclude_max=True),
)
def test_of_a_single_entity_the_last_rows_are_held_out(
    folder: Path, count: int, steps: int, stride: int, horizon: int, held_out: float
) -> None:
    path = write_csv(folder / "series.csv", ["t", "y"], [(place, place % 3) for place in range(count)])
    middle = count - int(held_out * count)
    assume(middle > horizon)
    made = prepared(
        {"file": str(path), "label": "y", "validation_fraction": held_out},
        {"columns": ["t"], "classes": 3, "steps": steps, "stride": stride, "horizon": horizon},
    )
    train, held = windows(made.training), windows(made.validation)
    last = max(int(x[-1][0]) + horizon for x, _ in train)
    assert last < middle
    assert all(x[0][0] >= middle for x, _ in held)
    assert all(y == [(x[-1][0] + horizon) % 3] for x, y in train + held)


# What a row's label, its text and its time may be ---------------------------------------------------------------------


def test_several_files_are_one_table_and_no_window_crosses_two(tmp_path: Path) -> None:
    write_csv(tmp_path / "b1.csv", ["a", "y"], [(1, 0), (2, 1)])
    write_csv(tmp_path / "b2.csv", ["y", "a"], [(0, 3), (1, 4), (0, 5)])  # the same columns in another order
    made = prepared(
        {"file": str(tmp_path / "b*.csv"), "label": "y", "validation_fraction": 0.0},
        {"columns": ["a"], "classes": 2, "steps": 2, "stride": 1},
    )
    assert windows(made.training) == [([[1], [2]], [1]), ([[3], [4]], [1]), ([[4], [5]], [0])]
    assert made.entities == (str(tmp_path / "b1.csv"), str(tmp_path / "b2.csv"))


def test_an_entity_goes_on_in_the_next_file(tmp_path: Path) -> None:
    write_csv(tmp_path / "b1.csv", ["g", "a", "y"], [("p", 1, 0), ("q", 2, 1)])
    write_csv(tmp_path / "b2.csv", ["g", "a", "y"], [("q", 3, 0), ("p", 4, 1)])
    made = prepared(
        {
            "file": [str(tmp_path / "b1.csv"), str(tmp_path / "b2.csv")],
            "label": "y",
            "group": "g",
            "validation_fraction": 0.0,
        },
        {"columns": ["a"], "classes": 2},
    )
    assert windows(made.training) == [([[1], [4]], [1]), ([[2], [3]], [0])]


@pytest.mark.parametrize(
    "times",
    [
        ["2024-01-03", "2024-01-01", "2024-01-02"],
        ["2024-01-01T10:00:00+02:00", "2024-01-01T07:00:00Z", "2024-01-01 09:30:00+02:00"],
        ["1e3", "-2", "7.5"],
    ],
)
def test_time_is_numbers_or_dates(tmp_path: Path, times: list[str]) -> None:
    path = write_csv(tmp_path / "a.csv", ["t", "a", "y"], [(when, place, 0) for place, when in enumerate(times)])
    made = prepared(
        {"file": str(path), "label": "y", "time": "t", "validation_fraction": 0.0}, {"columns": ["a"], "classes": 2}
    )
    assert windows(made.training)[0][0] == [[1], [2], [0]]


def test_dates_of_parquet(tmp_path: Path) -> None:
    stamps = np.array(["2024-01-03", "2024-01-01", "2024-01-02"], "datetime64[ns]")
    for kind in (pa.timestamp("ns"), pa.date32(), pa.timestamp("s", "UTC")):
        pq.write_table(
            pa.table({"t": pa.array(stamps).cast(kind), "a": [0, 1, 2], "y": [0, 1, 0]}), tmp_path / "a.parquet"
        )
        made = prepared(
            {"file": str(tmp_path / "a.parquet"), "label": "y", "time": "t", "validation_fraction": 0.0},
            {"columns": ["a"], "classes": 2},
        )
        assert windows(made.training)[0][0] == [[1], [2], [0]]


def test_labels_by_name_and_numbers_as_categories(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["sex", "a", "y"], [(1, 5, "ill"), (2, 6, "well"), (1, 7, "")])
    made = prepared(
        {"file": str(path), "label": "y", "validation_fraction": 0.0},
        {"columns": ["a"], "categories": {"sex": ["1", "2"]}, "labels": ["well", "ill"], "steps": 1, "stride": 1},
    )
    assert windows(made.training) == [([[5, 1, 0]], [1]), ([[6, 0, 1]], [0])]
    assert made.refused == f"1 of 3 sequences refused; the first: {path}, line 4: '{path}' has no label"


def test_several_labels_some_missing(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["a", "u", "v"], [(5, 1, ""), (6, "", ""), (7, 0, 1)])
    made = prepared(
        {"file": str(path), "label": ["u", "v"], "validation_fraction": 0.0},
        {"columns": ["a"], "targets": 2, "steps": 1, "stride": 1},
        task={"kind": "multilabel"},
    )
    assert [x for x, _ in windows(made.training)] == [[[5]], [[7]]]
    np.testing.assert_array_equal(made.training.y, np.array([[1, np.nan], [0, 1]], np.float32))
    assert made.refused is not None


def test_regression_is_in_the_runs_units(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["a", "y"], [(5, 10), (6, 30)])
    made = prepared(
        {"file": str(path), "label": "y", "validation_fraction": 0.0},
        {"columns": ["a"], "targets": 1, "target_mean": [20.0], "target_scale": [5.0], "steps": 1, "stride": 1},
        task={"kind": "regression"},
    )
    assert [y for _, y in windows(made.training)] == [[-2.0], [2.0]]


def test_remaining_rows_as_the_label(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["g", "a"], [("p", 1), ("p", 2), ("p", 3), ("p", 4), ("q", 5), ("q", 6)])
    made = prepared(
        {"file": str(path), "group": "g", "remaining": 2, "validation_fraction": 0.0},
        {"columns": ["a"], "targets": 1, "steps": 2, "stride": 1},
        task={"kind": "regression"},
    )
    assert windows(made.training) == [([[1], [2]], [2]), ([[2], [3]], [1]), ([[3], [4]], [0]), ([[5], [6]], [0])]


def test_remaining_rows_are_those_of_the_whole_entity(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["a"], [(place,) for place in range(10)])
    made = prepared(
        {"file": str(path), "remaining": 99, "validation_fraction": 0.5},
        {"columns": ["a"], "targets": 1, "steps": 1, "stride": 1},
        task={"kind": "regression"},
    )
    assert [y for _, y in windows(made.training) + windows(made.validation)] == [
        [float(left)] for left in range(9, -1, -1)
    ]


def test_labels_from_a_second_table(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["id", "a"], [(2, 1), (1, 2), (1, 3), (3, 9)])
    other = write_csv(tmp_path / "outcomes.txt", ["id", "x", "died"], [(1, 7, 1), (2, 7, 0), (8, 7, 0)])
    made = prepared(
        {"file": str(path), "group": "id", "label": "died", "label_file": str(other), "validation_fraction": 0.0},
        {"columns": ["a"], "classes": 2},
    )
    assert windows(made.training) == [([[1]], [0]), ([[2], [3]], [1])]
    assert made.refused == f"1 of 3 sequences refused; the first: {path}, line 5: '3' has no label"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([(1, 1), (1, 0)], "outcomes.csv, line 3: '1' is there twice"),
        ([(7, 1)], "outcomes.csv: knows none of the entities of"),
        ([(1, 5)], "outcomes.csv, line 2, column 'y': 5 is not a label"),
    ],
)
def test_a_second_table_that_is_refused(tmp_path: Path, rows: list[tuple[int, int]], said: str) -> None:
    path = write_csv(tmp_path / "a.csv", ["id", "a"], [(1, 1)])
    other = write_csv(tmp_path / "outcomes.csv", ["id", "y"], rows)
    with pytest.raises(DataError) as refused:
        prepared(
            {"file": str(path), "group": "id", "label": "y", "label_file": str(other)}, {"columns": ["a"], "classes": 2}
        )
    assert said in str(refused.value)


def test_wide(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "a.csv",
        ["id", "p1", "p2", "q1", "q2", "age", "sex", "y"],
        [(1, 1, 2, 3, 4, 50, "m", 0), (2, 5, 6, 7, 8, 60, "f", 1)],
    )
    settings = {
        "file": str(path),
        "wide": {"p": ["p1", "p2"], "q": ["q1", "q2"]},
        "label": "y",
        "validation_fraction": 0.5,
    }
    data = {"columns": ["q", "age", "p"], "categories": {"sex": ["f"]}, "classes": 2}
    for group in ({}, {"group": "id"}):
        made = prepared({**settings, **group}, data)
        both = windows(made.training) + windows(made.validation)
        assert sorted(both) == [([[3, 50, 1, 0], [4, 50, 2, 0]], [0]), ([[7, 60, 5, 1], [8, 60, 6, 1]], [1])]
        assert len(made.validation) == 1
    schema = open_source(DataSettings.model_validate(settings)).schema
    assert (schema.columns, schema.examples, schema.validation_examples) == (("p", "q", "id", "age"), 1, 1)


def test_rows_ahead(tmp_path: Path) -> None:
    rows = [("p", 1, 10), ("p", 2, ""), ("p", 3, 30), ("p", 4, 40), ("q", 5, 50)]
    path = write_csv(tmp_path / "a.csv", ["g", "a", "b"], rows)
    settings = {"file": str(path), "group": "g", "validation_fraction": 0.0}
    data = {"columns": ["a", "b"], "missing": "mask", "steps": 2, "stride": 1}
    made = prepared(settings, data, task={"kind": "forecast", "horizon": 2})
    assert windows(made.training) == [([[1, 10, 1, 1], [2, 0, 1, 0]], [3, 30, 4, 40])]
    made = prepared(settings, data, task={"kind": "forecast"})
    assert [y for _, y in windows(made.training)] == [[3, 30], [4, 40]]
    made = prepared({**settings, "unlabelled": True}, data, task={"kind": "forecast"})  # the last rows, to go on from
    assert [x[-1][0] for x, _ in windows(made.training)] == [2, 3, 4, 5]
    with pytest.raises(DataError, match="2 of 2 sequences refused; the first: .*line 3, column 'b' has no value"):
        prepared(settings, {**data, "missing": "refuse"}, task={"kind": "forecast"})


def test_known_anomalies(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["a", "odd"], [(1, 1), (2, 0), (3, 1), (4, ""), (5, 0)])
    made = prepared(
        {"file": str(path), "label": "odd", "validation_fraction": 0.0},
        {"columns": ["a"], "steps": 2, "stride": 1},
        task={"kind": "anomaly"},
    )
    assert made.training.anomalies is not None
    assert made.training.anomalies.tolist() == [1, -1, 0]  # of the row that is foretold
    assert [y for _, y in windows(made.training)] == [[3], [4], [5]]


# Long format ----------------------------------------------------------------------------------------------------------

measurements = st.lists(
    st.tuples(
        st.integers(0, 2), st.integers(0, 20), st.sampled_from(("hr", "bp", "other")), st.none() | st.integers(0, 99)
    ),
    min_size=1,
    max_size=40,
)


@given(measurements, st.sampled_from((1.0, 4.0)), st.sampled_from(("mask", "forward")), st.booleans())
def test_long_format(
    folder: Path, given: list[tuple[int, int, str, int | None]], grid: float, policy: str, mapped: bool
) -> None:
    rows = [(who, when, what, "" if much is None else much) for who, when, what, much in given]
    path = write_csv(folder / "long.csv", ["who", "when", "what", "much"], rows)
    labels = write_csv(folder / "labels.csv", ["who", "y"], [(who, who % 2) for who in range(3)])
    settings = {
        "file": str(path),
        "group": "who",
        "time": "when",
        "variable": "what",
        "value": "much",
        "label": "y",
        "label_file": str(labels),
        "validation_fraction": 0.0,
        "memory_mib": 0.0 if mapped else 64.0,
    }
    names = ["hr", "bp"]
    try:
        made = prepared(settings, {"columns": names, "grid": grid, "missing": policy, "classes": 2})
    except DataError as error:
        assert "has no variable" in str(error)
        assert {row[2] for row in given} & set(names) != set(names)
        return
    expected = []
    for who in dict.fromkeys(row[0] for row in given):
        mine = [row for row in given if row[0] == who]
        first, last = (int(at(row[1] for row in mine) // grid) for at in (min, max))
        steps, carry = [], [math.nan, math.nan]
        for step in range(first, last + 1):
            cells = []
            for place, name in enumerate(names):
                there = [row[3] for row in mine if row[1] // grid == step and row[2] == name and row[3] is not None]
                mean = sum(there) / len(there) if there else math.nan
                carry[place] = mean if there else carry[place]
                cells.append(mean if policy == "mask" else carry[place])
            shown = [0.0 if math.isnan(cell) else float(np.float32(cell)) for cell in cells]
            steps.append([*shown, *(float(not math.isnan(cell)) for cell in cells)] if policy == "mask" else shown)
        expected.append((steps, [who % 2]))
    assert windows(made.training) == expected


def test_long_format_without_a_grid_or_with_wild_times(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["g", "t", "v", "x"], [("p", 0, "a", 1), ("p", 1e12, "a", 2)])
    settings = {"file": str(path), "group": "g", "time": "t", "variable": "v", "value": "x", "unlabelled": True}
    with pytest.raises(SchemaMismatch, match="names no grid"):
        prepared(settings, {"columns": ["a"], "classes": 2})
    with pytest.raises(DataError, match="'p' has over a million steps of 1; check the column 't'"):
        prepared(settings, {"columns": ["a"], "classes": 2, "grid": 1.0})
    assert open_source(DataSettings.model_validate(settings)).schema.columns == ("a",)


# What the server is told, and what a run may ask ----------------------------------------------------------------------


def test_the_schema_of_a_table(tmp_path: Path) -> None:
    rows = [("p", 1, 1.5, "red", 0), ("p", 2, 2.5, "blue", 4), ("q", 1, 3.5, "", 1)]
    path = write_csv(tmp_path / "a.csv", ["g", "t", "a", "colour", "y"], rows)
    source = open_source(DataSettings(file=(str(path),), group="g", time="t", label=("y",), validation_fraction=0.5))
    assert source.schema.model_dump() == {
        "features": 1,
        "steps": None,
        "classes": 5,
        "columns": ("a", "t"),
        "categories": ("colour",),
        "tokens": False,
        "examples": source.schema.examples,
        "validation_examples": 3 - source.schema.examples,
    }


def test_a_run_that_only_counts_its_features(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["b", "text", "a", "y"], [(1, "x", 2, 0), (3, "y", 4, 1)])
    settings = {"file": str(path), "label": "y", "validation_fraction": 0.0}
    made = prepared(settings, {"features": 2, "classes": 2})
    assert windows(made.training) == [([[1, 2], [3, 4]], [1])]
    made = prepared({**settings, "columns": ["a", "b"]}, {"features": 2, "classes": 2})
    assert windows(made.training) == [([[2, 1], [4, 3]], [1])]
    with pytest.raises(SchemaMismatch, match=r"has 2 features a step \(b, a\), the run wants 3"):
        prepared(settings, {"features": 3, "classes": 2})


def test_a_validation_file_is_only_scored(tmp_path: Path) -> None:
    a = write_csv(tmp_path / "a.csv", ["a", "y"], [(1, 0), (2, 1)])
    b = write_csv(tmp_path / "b.csv", ["a", "y"], [(3, 1)])
    made = prepared(
        {"file": str(a), "validation": str(b), "label": "y"}, {"columns": ["a"], "classes": 2, "steps": 1, "stride": 1}
    )
    assert windows(made.training) == [([[1]], [0]), ([[2]], [1])]
    assert windows(made.validation) == [([[3]], [1])]
    assert [made.entities[one] for one in made.validation.entities or ()] == [str(b)]


def test_files_of_many_sorts(tmp_path: Path) -> None:
    """Packed, another encoding, other delimiters, no header, spreadsheets' marks and line ends, quoted line breaks."""
    forms: dict[str, tuple[bytes, dict[str, Any]]] = {
        "a.csv.gz": (gzip.compress(b"a,y\n1,0\n2,1\n"), {}),
        "b.csv": ("a\u00e9,y\n1,0\n2,1\n".encode("latin-1"), {"encoding": "latin-1"}),
        "c.csv": ("a,y\n1,0\n2,1\n".encode("utf-16"), {"encoding": "utf-16"}),
        "d.tsv": (b"a\ty\n1\t0\n2\t1\n", {}),
        "e.txt": (b"  1   0  \n2 \t 1\n", {"names": ["a", "y"], "delimiter": "whitespace"}),
        "f.csv": ('\ufeffa,"y"\r\n"1",0\r\n 2e0 ,"1"\r\n\r\n'.encode(), {}),
        "g.dat": (b"1;0\n2;1\n", {"names": ["a", "y"], "delimiter": ";"}),
        "h.csv": (b'"a\nb",y\n1,0\n2,1\n', {}),
        "i.csv": (b"a,y\r1,0\r2,1\r", {}),
    }
    for name, (content, settings) in forms.items():
        (tmp_path / name).write_bytes(content)
        made = prepared(
            {"file": str(tmp_path / name), "label": "y", "validation_fraction": 0.0, **settings},
            {"features": 1, "classes": 2, "steps": 1, "stride": 1},
        )
        assert windows(made.training) == [([[1]], [0]), ([[2]], [1])], name


def test_words_for_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b,y\n1,?,0\n-1.0,2,1\nnull,,0\nNaN,NA,1\n")
    made = prepared(
        {"file": str(path), "label": "y", "missing_values": ["-1", "?"], "validation_fraction": 0.0},
        {"columns": ["a", "b"], "missing": "mask", "classes": 2},
    )
    assert windows(made.training)[0][0] == [[1, 0, 1, 0], [0, 2, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_a_columns_kind_is_decided_by_the_whole_file(tmp_path: Path) -> None:
    rows = [(f"{place}", place, 0) for place in range(3000)]
    path = write_csv(tmp_path / "a.csv", ["code", "a", "y"], [*rows, *[("x", 1, 1)] * 3001])
    made = prepared(
        {"file": str(path), "label": "y", "validation_fraction": 0.0},
        {"columns": ["a"], "categories": {"code": ["0", "2999", "x"]}, "classes": 2, "steps": 1, "stride": 1},
    )
    found = [x[0][1:] for x, _ in windows(made.training.take(np.array([0, 1, 2999, 3000])))]
    assert found == [[1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]]


LARGER = """
import resource, sys
import numpy as np
from seqfed.client.data import open_source
from seqfed.client.settings import DataSettings
from seqfed.common.spec import RunSpec
import pyarrow.compute, pyarrow.parquet
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + (140 << 20), -1))
source = open_source(DataSettings.model_validate({"file": sys.argv[1], "label": "y", "memory_mib": 1.0}))
data = {"features": 64, "scale": [2.0] * 64, "classes": 2, "steps": 10, "stride": 10}
made = source.prepare(RunSpec.model_validate({"data": data}))
print(made.training.rows.nbytes >> 20, type(made.training.rows).__name__, made.training.batch(np.array([7])).x[0, :, 3].tolist())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory in use is read there")
def test_features_larger_than_memory(tmp_path: Path) -> None:
    """Twice 122 MiB of numbers, read and normalised with 140 MiB of memory for everything."""
    rows = 500_000
    columns = {f"c{place}": pa.array(np.full(rows, place, np.float32)) for place in range(64)}
    pq.write_table(pa.table({**columns, "y": np.zeros(rows, np.int8)}), tmp_path / "a.parquet", row_group_size=50_000)
    command = [sys.executable, "-c", LARGER, str(tmp_path / "a.parquet")]
    counted = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}  # the default one reserves what it does not use
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=counted)
    assert ran.stdout.split(" ", 2)[:2] == ["122", "memmap"], ran.stderr
    assert ran.stdout.endswith(f"{[1.5] * 10}\n")


def test_times_finer_than_a_microsecond_are_read(tmp_path: Path) -> None:
    times = pa.array([1_700_000_000_000_000_001, 1_700_000_000_000_001_999], pa.timestamp("ns"))
    pq.write_table(pa.table({"t": times, "a": [1.0, 2.0], "y": [0, 1]}), tmp_path / "a.parquet")
    settings = DataSettings(file=(str(tmp_path / "a.parquet"),), time="t", columns=("a",), label=("y",))
    assert open_source(settings).schema.examples >= 1
