"""What is told of a file, against numpy on the same rows; and that the [data] table made of it is one that the file fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seqfed.client.data import open_source
from seqfed.client.data.describe import data_section, describe, task_of, vocabulary
from seqfed.client.settings import DataSettings
from seqfed.common.errors import DataError
from seqfed.common.schema import misfit
from seqfed.common.spec import RunSpec


def opened(**settings: Any) -> tuple[Any, DataSettings]:
    given = DataSettings.model_validate({"validation_fraction": 0.0, **settings})
    return open_source(given), given


def fits(source: Any, section: dict[str, Any], kind: str) -> Any:
    spec = RunSpec.model_validate({"data": section, "task": {"kind": kind}})
    assert misfit(spec.data, source.schema) is None
    return source.prepare(spec)


def table(path: Path) -> Path:
    draw = np.random.default_rng(0)
    lines = ["who,t,a,flat,colour,empty,y"]
    for place in range(300):
        a = "" if place % 10 == 0 else f"{1e6 + draw.normal():.4f}"
        lines.append(f"p{place % 7},{place},{a},5,{'red' if place % 3 else 'blue'},,{1 + place % 3}")
    path.write_text("\n".join(lines))
    return path


def test_a_table(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv")
    source, settings = opened(file=str(path), group="who", time="t", label="y")
    found = describe(source, settings)
    assert (found.kind, found.rows, found.entities) == ("numbers", 300, 7)
    assert (found.lengths[0], found.lengths[-1]) == (42, 43)
    told = {one.name: one for one in found.columns}
    assert sorted(told) == ["a", "colour", "empty", "flat"]
    given = np.array([float(line.split(",")[2] or "nan") for line in path.read_text().splitlines()[1:]], np.float32)
    exact = given[~np.isnan(given)].astype(np.float64)
    assert (told["a"].count, told["a"].missing) == (270, 30)
    summary = (told["a"].low, told["a"].high, told["a"].mean, told["a"].scale)
    np.testing.assert_allclose(
        np.array(summary, np.float64), (exact.min(), exact.max(), exact.mean(), exact.std()), rtol=1e-9
    )
    assert told["colour"].categories == ("red", "blue")
    assert (told["empty"].count, told["empty"].missing) == (0, 300)
    assert found.labels[0].values == {"1": 100, "2": 100, "3": 100}
    section = data_section(source, settings, steps=12, stride=6)
    assert section["columns"] == ("a", "flat")
    assert section["mean"][1] == 5
    assert section["scale"][1] == 1  # a column that never changes
    assert section["categories"] == {"colour": ("blue", "red")}
    assert (section["missing"], section["labels"], section["steps"], section["stride"]) == (
        "mask",
        ("1", "2", "3"),
        12,
        6,
    )
    made = fits(source, section, "classification")
    rows = made.training.rows[:, 0]
    assert abs(rows.mean()) < 0.2
    assert set(np.asarray(made.training.y).tolist()) == {0, 1, 2}


def test_a_column_with_a_mistake_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,y\n1,0\n2,1\nhigh,0\n")
    source, settings = opened(file=str(path), label="y")
    assert "line 4, column 'a': 'high' is not a number" in describe(source, settings).columns[0].note


def test_regression_and_remaining(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,y\n" + "".join(f"{place},{place / 2}\n" for place in range(50)))
    source, settings = opened(file=str(path), label="y")
    assert task_of(describe(source, settings), settings) == "regression"
    section = data_section(source, settings)
    np.testing.assert_allclose(section["target_mean"], 12.25)
    fits(source, section, "regression")
    source, settings = opened(file=str(path), remaining=10)
    section = data_section(source, settings, steps=3, stride=1)
    assert (section["targets"], section["target_scale"]) == (1, (5.0,))
    y = fits(source, section, "regression").training.y
    assert (y.min(), y.max()) == (-1, 1)


def test_several_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("s,u,v\nCC,1,\nCO,0,1\n")
    source, settings = opened(file=str(path), text="s", label=["u", "v"])
    assert task_of(describe(source, settings), settings) == "multilabel"
    section = data_section(source, settings)
    assert section == {"vocabulary": ("C", "O"), "unit": "characters", "targets": 2}
    fits(source, section, "multilabel")


def test_long_and_wide(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("g,t,v,x\np,0,hr,60\np,5,bp,100\nq,1,hr,80\n")
    source, settings = opened(file=str(path), group="g", time="t", variable="v", value="x")
    told = {one.name: (one.count, one.mean) for one in describe(source, settings).columns}
    assert told == {"bp": (1, 100), "hr": (2, 70)}
    with pytest.raises(DataError, match="how long is a step"):
        data_section(source, settings, steps=2, stride=1)
    section = data_section(source, settings, steps=2, stride=1, grid=2.0)
    assert (section["columns"], section["missing"], section["grid"]) == (("bp", "hr"), "mask", 2.0)
    path.write_text("b1,b2,age,y\n1,2,30,no\n3,4,40,yes\n")
    source, settings = opened(file=str(path), wide={"b": ["b1", "b2"]}, label="y")
    found = describe(source, settings)
    assert [(one.name, one.mean) for one in found.columns] == [("b", 2.5), ("age", 35)]
    assert (found.entities, found.labels[0].values) == (2, {"no": 1, "yes": 1})
    section = data_section(source, settings)
    assert (section["columns"], section["labels"]) == (("b", "age"), ("no", "yes"))
    fits(source, section, "classification")


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 20)
    source, settings = opened(file=str(tmp_path / "a.txt"))
    assert vocabulary(source, "words") == ("be", "to", "not", "or")
    assert vocabulary(source, "words", 2) == ("be", "to")
    assert vocabulary(source, "characters", least=60) == (" ", "o", "t")
    section = data_section(source, settings)
    assert (section["steps"], section["vocabulary"][0]) == (80, " ")
    assert fits(source, section, "next_token").training.weight == 379
    assert describe(source, settings).lengths == (380,) * 6


def test_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(12.0).reshape(3, 2, 2), y=np.array([0, 1, 1]))
    source, settings = opened(file=str(tmp_path / "a.npz"))
    assert [(one.name, one.mean) for one in describe(source, settings).columns] == [("0", 5), ("1", 6)]
    section = data_section(source, settings)
    assert (section["features"], section["classes"], section["mean"]) == (2, 2, (5.0, 6.0))
    fits(source, section, "classification")
    np.savez(tmp_path / "a.npz", x=np.array([[1, 2]]), y=np.array([0]))
    source, settings = opened(file=str(tmp_path / "a.npz"))
    with pytest.raises(DataError, match="has token ids, and only who made them knows their vocabulary"):
        data_section(source, settings)
