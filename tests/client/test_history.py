"""A run's history as rows and as a picture."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from seqfed.client.history import as_csv, as_json, columns, draw, require_plots, rows, save
from seqfed.common.errors import ConfigError, StorageError
from seqfed.common.spec import RunSpec
from seqfed.common.views import RoundRecord, RunView

SPEC = RunSpec.model_validate(
    {"data": {"features": 1, "steps": 3, "stride": 1}, "task": {"kind": "forecast", "horizon": 2}}
)
SPREAD = {"loss": (0.5, 0.75), "rmse": (2.0, 8.5), "mse": (4.0, 70.0), "mae": (1.0, 7.0)}
HISTORY = (
    RoundRecord(1, 1, ("a", "b"), ("a", "b"), bytes_up=10, bytes_down=20, seconds=1.23456),  # not evaluated
    RoundRecord(
        round=2,
        attempt=1,
        cohort=("a", "b"),
        folded=("a",),
        evaluation={"loss": 0.1 + 0.2, "rmse": 3.0, "mse": 9.0, "mae": 2.5},
        bytes_up=11,
        bytes_down=21,
        seconds=2.0,
        spread=SPREAD,
        evaluated_examples=40,
        evaluated_clients=2,
        traffic={"b": (4, 9), "a": (7, 12)},
    ),
)


def view(*history: RoundRecord, name: str = "trial") -> RunView:
    return RunView("0" * 16, name, "finished", 2, 2, 1, (), (), "done", history, 1, 2, 3.0, SPEC, True)


def test_a_row_has_each_metric_with_its_spread_and_what_the_round_cost() -> None:
    first, second = rows(view(*HISTORY))
    assert list(second.items()) == [
        ("round", 2),
        *(("loss", 0.1 + 0.2), ("loss_median", 0.5), ("loss_worst_decile", 0.75)),
        *(("rmse", 3.0), ("rmse_median", 2.0), ("rmse_worst_decile", 8.5)),
        *(("mse", 9.0), ("mse_median", 4.0), ("mse_worst_decile", 70.0)),
        *(("mae", 2.5), ("mae_median", 1.0), ("mae_worst_decile", 7.0)),
        *(("evaluated_examples", 40), ("evaluated_clients", 2)),
        *(("bytes_up", 11), ("bytes_down", 21)),
        ("traffic", {"a": {"bytes_up": 7, "bytes_down": 12}, "b": {"bytes_up": 4, "bytes_down": 9}}),
        ("seconds", 2.0),
    ]
    assert list(second["traffic"]) == ["a", "b"]
    assert list(first) == list(second) == columns(view())
    assert (first["rmse"], first["rmse_median"], first["bytes_up"], first["seconds"]) == (None, None, 10, 1.2346)


def test_csv_and_json_are_read_as_they_were_written() -> None:
    expected = rows(view(*HISTORY))
    assert json.loads(as_json(view(*HISTORY))) == expected
    found = list(csv.DictReader(io.StringIO(as_csv(view(*HISTORY)))))
    assert [{name: json.loads(cell) if cell else None for name, cell in row.items()} for row in found] == expected


def test_a_run_without_rounds_has_a_header_and_no_rows() -> None:
    assert as_csv(view()) == ",".join(columns(view())) + "\n"
    assert json.loads(as_json(view())) == []


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_picture(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"curves{suffix}"
    draw(view(*HISTORY, name="cost $1 of $2"), path)  # a dollar begins no formula
    assert path.stat().st_size > 1000
    if suffix == ".svg":
        assert ElementTree.parse(path).getroot().tag.endswith("svg")  # noqa: S314 - our own file


def test_a_picture_of_nothing_and_names_that_are_no_picture_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no round of run 0{16} has been evaluated yet"):
        draw(view(HISTORY[0]), tmp_path / "curves.png")
    for name in ("curves", "curves.gif", "curves.png.txt"):
        with pytest.raises(ConfigError, match=r"a picture's name ends in \.png, \.svg, \.pdf"):
            require_plots(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"pip install 'seqfed\[plot\]'"):
        require_plots(Path("curves.png"))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "curves.png"
    with pytest.raises(StorageError, match="nowhere.*No such file"):
        draw(view(*HISTORY), path)


def test_a_file_takes_the_place_of_the_old_one_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "rounds.csv"
    save(path, "old ü\n")
    with pytest.raises(UnicodeEncodeError):
        save(path, "half\ud800")
    assert path.read_bytes() == "old ü\n".encode()
    path.unlink()
    (path / "full").mkdir(parents=True)
    with pytest.raises(StorageError, match="saving rounds.csv"):
        save(path, "new")
    assert [one.name for one in tmp_path.iterdir()] == ["rounds.csv"]


def test_what_is_drawn_is_finite_or_missing() -> None:
    for row in rows(view(*HISTORY)):
        figures = [value for name, value in row.items() if name != "traffic"]
        assert all(value is None or math.isfinite(value) for value in figures)
