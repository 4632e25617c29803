"""Sums of the training data's columns: those of the pooled numbers, read slowly, whoever holds which part of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfed.client.data import Sequences, Source, open_source
from seqfed.client.data import numbers as numbers_module
from seqfed.client.settings import DataSettings
from seqfed.common import metrics
from seqfed.common.errors import DataError, SchemaMismatch
from seqfed.common.spec import RunSpec
from seqfed.common.statistics import LIMBS, Statistics, applied, statistics_of

Row = tuple[int, float | None, float | None]  # whose, and two numbers
ROWS = st.lists(
    st.tuples(st.integers(0, 5), st.none() | st.floats(-1e6, 1e6, width=32), st.none() | st.integers(-9, 9).map(float)),
    min_size=1,
    max_size=40,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("measured")


def opened(file: Path | str, **given: Any) -> Source:
    return open_source(DataSettings.model_validate({"file": str(file), "validation_fraction": 0.0, **given}))


def run_of(data: dict[str, Any], **spec: Any) -> RunSpec:
    return RunSpec.model_validate({"data": {"normalise": "federated", "classes": 2, **data}, **spec})


def write(path: Path, rows: Sequence[Row]) -> Path:
    lines = ["who,a,b,label"] + [
        f"p{who},{'' if a is None else repr(a)},{'' if b is None else repr(b)},{who % 2}" for who, a, b in rows
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def windows_of(rows: list[Row], steps: int | None, stride: int | None, ahead: int = 0) -> list[list[int]]:
    """The rows of each window, as the page on data says."""
    found = []
    for who in sorted({row[0] for row in rows}):
        own = [place for place, row in enumerate(rows) if row[0] == who]
        room = len(own) - ahead
        if room < 1:
            continue
        if steps is None:
            found.append(own[:room])
        elif stride is None or room < steps:
            found.append(own[:room][-steps:])
        else:
            found += [own[first : first + steps] for first in range(0, room - steps + 1, stride)]
    return found


def sums_of(tally: dict[str, int]) -> dict[str, int]:
    """A tally of two columns without its limbs."""
    found = {f"count.{place}": tally.get(f"count.{place}", 0) for place in range(2)}
    for kind, limbs in LIMBS.items():
        for place in range(2):
            found[f"{kind}.{place}"] = sum(tally.get(f"{kind}.{place}.{i}", 0) * metrics.CARRY**i for i in range(limbs))
    return found


@settings(deadline=None, max_examples=50)
@given(
    ROWS,
    st.none() | st.integers(1, 5),
    st.none() | st.integers(1, 3),
    st.sampled_from(["refuse", "mask", "forward", "mean"]),
    st.lists(st.integers(0, 2), min_size=6, max_size=6),
)
def test_the_sums_are_those_of_the_numbers_in_the_sequences(
    folder: Path, rows: list[Row], steps: int | None, stride: int | None, missing: str, holders: list[int]
) -> None:
    if steps is None:
        stride = None
    spec = run_of({"columns": ("a", "b"), "steps": steps, "stride": stride, "missing": missing})
    windows = windows_of(rows, steps, stride)
    if missing == "refuse":
        windows = [one for one in windows if all(None not in rows[place] for place in one)]
    used = [rows[place] for place in sorted({place for one in windows for place in one})]
    flags: dict[str, Any] = {"group": "who", "label": "label", "columns": ("a", "b")}
    tallies = []
    for holder in (None, *sorted(set(holders))):
        own = [row for row in rows if holder is None or holders[row[0]] == holder]
        if not own:
            continue
        try:
            tallies.append(opened(write(folder / "part.csv", own), **flags).measure(spec))
        except DataError as error:
            assert "no sequence is left to train on" in str(error)
            tallies.append({})
    whole, *parts = (sums_of(one) for one in tallies)
    assert {name: sum(part[name] for part in parts) for name in whole} == whole
    columns = [[row[place] for row in used if row[place] is not None] for place in (1, 2)]
    assert [whole[f"count.{place}"] for place in range(2)] == [len(column) for column in columns]
    if all(columns):
        found = statistics_of(tallies[0], spec)
        for place, column in enumerate(columns):
            reals = np.array(column, np.float64)
            assert math.isclose(found.mean[place], reals.mean(), rel_tol=1e-9, abs_tol=1e-9)
            spread = reals.std() if reals.std() > 1e-9 else 1.0  # what is below the sums' unit is a constant column
            assert math.isclose(found.scale[place], spread, rel_tol=1e-6, abs_tol=1e-9) or reals.std() <= 1e-9


def test_blocks_make_no_difference(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(place % 4, float(place) ** 3, None if place % 5 == 0 else float(-place)) for place in range(90)]
    source = opened(write(folder / "blocks.csv", rows), group="who", label="label", columns=("a", "b"))
    found = []
    for missing in ("mask", "refuse"):
        spec = run_of({"columns": ("a", "b"), "steps": 3, "stride": 4, "missing": missing})
        found.append(source.measure(spec))
        monkeypatch.setattr(numbers_module, "CELLS", 7)
        assert source.measure(spec) == found[-1]
        monkeypatch.undo()
    assert 0 < found[1]["count.0"] < found[0]["count.0"]


def test_what_is_held_out_is_not_measured(folder: Path) -> None:
    rows = [(place % 6, float(place), float(place % 7)) for place in range(60)]
    flags: dict[str, Any] = {"group": "who", "label": "label"}
    spec = run_of({"columns": ("a", "b")})
    path = write(folder / "held.csv", rows)
    source = opened(path, **flags, validation_fraction=0.5)
    tally = source.measure(spec)
    raw = source.prepare(run_of({"columns": ("a", "b"), "normalise": "given"}))
    kept = {raw.entities[one] for one in raw.training.entities.tolist()} if raw.training.entities is not None else set()
    assert len(kept) == 3
    used = [row for row in rows if f"p{row[0]}" in kept]
    means = [sum(row[place] for row in used) / len(used) for place in (1, 2)]
    assert list(statistics_of(tally, spec).mean) == means
    apart = opened(path, **flags, validation=str(write(folder / "apart.csv", [(9, 1e6, 1e6)] * 3)))
    assert apart.measure(spec)["count.0"] == 60


def test_rows_are_trained_on_as_pooled_ones_would_be(folder: Path) -> None:
    """Two clients whose numbers are of different size: together they have mean 0 and deviation 1."""
    parts = [[(who, who * 100.0 + step**2, 1e-3 * step - who) for step in range(9)] for who in range(2)]
    sources = [
        opened(write(folder / f"site{who}.csv", rows), group="who", label="label") for who, rows in enumerate(parts)
    ]
    spec = run_of({"columns": ("a", "b")})
    found = applied(spec, statistics_of(metrics.add(one.measure(spec) for one in sources), spec))
    rows = np.concatenate([one.prepare(found).training.rows for one in sources])
    assert np.allclose(rows.mean(axis=0), 0, atol=1e-6)
    assert np.allclose(rows.std(axis=0), 1, atol=1e-6)


def test_a_missing_number_becomes_the_mean_that_was_found(folder: Path) -> None:
    rows: list[Row] = [(0, 1.0, 5.0), (0, None, 6.0), (1, 4.0, 7.0)]
    source = opened(write(folder / "mean.csv", rows), group="who", label="label")
    spec = run_of({"columns": ("a", "b"), "missing": "mean"})
    found = statistics_of(source.measure(spec), spec)
    assert found.mean == (2.5, 6.0)
    assert source.prepare(applied(spec, found)).training.rows[:, 0].tolist() == [-1, 0, 1]


def test_a_step_of_long_format_is_measured_as_its_average(folder: Path) -> None:
    path = folder / "long.csv"
    path.write_text("who,t,name,x,label\np,0,a,1,0\np,0.5,a,3,0\np,2.1,a,4,0\np,2.2,b,-1,0\n")
    source = opened(path, group="who", time="t", variable="name", value="x", label="label")
    spec = run_of({"columns": ("a", "b"), "grid": 1.0, "missing": "mask"})
    assert statistics_of(source.measure(spec), spec) == Statistics(mean=(3.0, -1.0), scale=(1.0, 1.0))


def test_a_wide_table_and_arrays(folder: Path) -> None:
    path = folder / "wide.csv"
    path.write_text("x1,x2,label\n1,2,0\n3,6,1\n")
    spec = run_of({"columns": ("x",)})
    assert statistics_of(opened(path, wide={"x": ["x1", "x2"]}, label="label").measure(spec), spec).mean == (3.0,)
    x = np.arange(24, dtype=np.float64).reshape(3, 4, 2)
    np.savez(folder / "x.npz", x=x, y=np.array([0, 1, 0]), lengths=np.array([4, 1, 2]))
    spec = run_of({"features": 2})
    found = statistics_of(opened(folder / "x.npz").measure(spec), spec)
    there = np.concatenate([x[0], x[1, :1], x[2, :2]])
    assert found.mean == tuple(there.mean(axis=0))
    assert np.allclose(found.scale, there.std(axis=0))


def test_in_forecasts_only_what_the_network_sees_counts(folder: Path) -> None:
    rows: list[Row] = [(0, float(place), 0.0) for place in range(6)]
    source = opened(write(folder / "ahead.csv", rows), group="who", columns=("a", "b"))
    spec = run_of(
        {"columns": ("a", "b"), "steps": 2, "stride": 2, "classes": None}, task={"kind": "forecast", "horizon": 2}
    )
    assert source.measure(spec)["count.0"] == 4


def test_a_number_too_large_is_named_by_its_place(folder: Path) -> None:
    rows: list[Row] = [(0, 1.0, 2.0), (0, 1.0, -3e18)]
    source = opened(write(folder / "large.csv", rows), group="who", label="label")
    with pytest.raises(
        DataError, match=r"large.csv, line 3, column 'b': is too large .*below 1.15e\+18.*missing_values"
    ):
        source.measure(run_of({"columns": ("a", "b")}))


def test_nothing_to_train_on_is_said_as_ever(folder: Path) -> None:
    source = opened(write(folder / "holes.csv", [(0, 1.0, 2.0), (0, None, 1.0)]), group="who", label="label")
    with pytest.raises(DataError, match="no sequence is left to train on: 1 of 1 sequences refused"):
        source.measure(run_of({"columns": ("a", "b")}))


def test_no_sequences_are_made_before_the_mean_is_known(folder: Path) -> None:
    source = opened(write(folder / "early.csv", [(0, 1.0, 2.0)]), group="who", label="label")
    with pytest.raises(SchemaMismatch, match="not known yet"):
        source.prepare(run_of({"columns": ("a", "b")}))


def test_data_without_columns_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "play.txt").write_text("to be or not to be\n")
    with pytest.raises(SchemaMismatch, match="has texts, the run wants numbers"):
        opened(folder / "play.txt").measure(run_of({"features": 2}))
    rows: list[Row] = [(0, 1.0, 2.0)]
    texts = RunSpec.model_validate({"data": {"vocabulary": ("a",), "steps": 2}, "task": {"kind": "next_token"}})
    with pytest.raises(SchemaMismatch, match="has numbers, the run wants texts"):
        opened(write(folder / "numbers.csv", rows), group="who", label="label").measure(texts)
    (tmp_path / "made_sequences.py").write_text(
        "import numpy as np\nfrom seqfed.client.data import Sequences\n"
        "def load():\n    return Sequences.of(np.ones((4, 3, 2), np.float32), np.zeros(4, np.int64))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "made_sequences", raising=False)
    source = opened("made_sequences:load")
    assert isinstance(source.prepare(run_of({"features": 2})).training, Sequences)
    with pytest.raises(SchemaMismatch, match="return x, y"):
        source.measure(run_of({"features": 2}))
