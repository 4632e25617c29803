"""`seqfed data check`, `schema` and `split`, as a person types them."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from seqfed.client.data_cli import data
from seqfed.common.errors import ConfigError, DataError, SchemaMismatch
from seqfed.common.spec import RunSpec


def run(*arguments: object) -> str:
    done = CliRunner().invoke(data, [str(one) for one in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def stays(tmp_path: Path) -> Path:
    """Six stays of four hours each; the label is a text, a third of the pulses is missing."""
    lines = ["stay,hour,pulse,ward,died"]
    for stay in range(6):
        for hour in range(4):
            pulse = "" if (stay + hour) % 3 == 0 else 60 + stay + hour
            lines.append(f"s{stay},{hour},{pulse},{'icu' if stay % 2 else 'ccu'},{'yes' if stay in {1, 4} else 'no'}")
    path = tmp_path / "stays.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


OF_STAYS = ("--group", "stay", "--time", "hour", "--label", "died")


def test_schema_writes_tables_that_a_run_takes(stays: Path, tmp_path: Path) -> None:
    tables = tomllib.loads(run("schema", stays, *OF_STAYS))
    spec = RunSpec.model_validate(tables)
    assert spec.data.columns == ("pulse",)
    assert spec.data.categories == {"ward": ("ccu", "icu")}
    assert (spec.data.labels, spec.data.missing, spec.task.kind) == (("no", "yes"), "mask", "classification")
    out = tmp_path / "run.toml"
    assert not run("schema", stays, *OF_STAYS, "--out", out)
    assert tomllib.loads(out.read_text()) == tables
    with pytest.raises(ConfigError, match="exists already"):
        run("schema", stays, *OF_STAYS, "--out", out)


def test_check_shows_the_file_and_what_a_run_sees(stays: Path, tmp_path: Path) -> None:
    told = json.loads(run("check", stays, *OF_STAYS, "--validation-fraction", "0.34", "--json"))
    assert (told["rows"], told["entities"]) == (24, 6)
    (pulse,) = (one for one in told["columns"] if one["name"] == "pulse")
    assert (pulse["count"], pulse["missing"], pulse["low"], pulse["high"]) == (16, 8, 61, 68)
    assert told["labels"][0]["values"] == {"no": 16, "yes": 8}
    seen = told["run"]
    assert (seen["training sequences"], seen["validation sequences"], seen["steps"]) == (4, 2, "4 to 4")
    assert sum(seen["classes"]["training"].values()) == 4
    text = run("check", stays, *OF_STAYS)
    assert "24 rows, 6 entities" in text
    assert "a classification run would see:" in text
    other = tmp_path / "run.toml"
    other.write_text("[data]\ncolumns = ['weight']\nclasses = 2\n")
    with pytest.raises(SchemaMismatch, match="has no number column 'weight'"):
        run("check", stays, *OF_STAYS, "--run", other)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "which data"),
        (("a.csv", "--data", "b.csv"), "named twice"),
    ],
)
def test_a_call_that_cannot_be_meant_is_refused(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run("check", *flags)


def test_data_without_label_ask_for_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 3, 2)))
    with pytest.raises(ConfigError, match=r"a\.npz: no label is named.*--steps N"):
        run("check", tmp_path / "a.npz")
    assert "a forecast run would see" in run("check", tmp_path / "a.npz", "--steps", 2)


@pytest.mark.parametrize("flags", [("--missing", "drop"), ("--task", "guess")])
def test_a_value_that_is_none_of_the_choices_is_refused_in_words(stays: Path, flags: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"these data: .*'{flags[1]}': Input should be"):
        run("schema", stays, *OF_STAYS, *flags)


def test_split_says_which_value_went_where(stays: Path, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = json.loads(
        run("split", stays, "--by", "ward", "--group", "stay", "--out", tmp_path / "shards", "--json")
    )
    assert [(one["rows"], one["entities"], one["values"]) for one in told] == [(12, 3, ["ccu"]), (12, 3, ["icu"])]
    with pytest.raises(ConfigError, match="use one of iid"):
        run("split", stays, "--clients", 2, "--how", "fairly")


def test_a_mean_far_from_0_keeps_its_digits(tmp_path: Path) -> None:
    lines = ["a,b,y"] + [f"{1_700_123_456 + 7 * k},{101_325.4 + (k % 5) / 10},{k % 2}" for k in range(40)]
    (tmp_path / "far.csv").write_text("\n".join(lines) + "\n")
    section = tomllib.loads(run("schema", tmp_path / "far.csv", "--label", "y"))["data"]
    columns = np.array([[float(one) for one in line.split(",")[:2]] for line in lines[1:]])
    columns[:, 0] = columns[:, 0].astype(np.float32)  # which is what is left of it
    for mean, scale, exact in zip(section["mean"], section["scale"], columns.mean(axis=0), strict=True):
        assert abs(mean - exact) < 0.1 * scale
    assert "float32 tells few of its values apart" in "".join(
        run("check", tmp_path / "far.csv", "--label", "y", "--json")
    )


def test_a_federated_run_has_no_mean_of_this_file(stays: Path, tmp_path: Path) -> None:
    """And is checked with this file's own mean, which is also what stands for a missing number."""
    out = tmp_path / "run.toml"
    run("schema", stays, *OF_STAYS, "--normalise", "federated", "--missing", "mean", "--out", out)
    tables = tomllib.loads(out.read_text())
    assert tables["data"]["normalise"] == "federated"
    assert not {"mean", "scale"} & set(tables["data"])
    assert json.loads(run("check", stays, *OF_STAYS, "--run", out, "--json"))["run"]["training sequences"] == 5
    with pytest.raises(ConfigError, match="data.normalise.*'given' or 'federated'"):
        run("schema", stays, *OF_STAYS, "--normalise", "mine")
    (tmp_path / "play.txt").write_text("to be or not to be\n")
    with pytest.raises(ConfigError, match="finds mean and scale of number columns"):
        run("schema", tmp_path / "play.txt", "--normalise", "federated")
    stays.write_text("stay,hour,pulse,ward,died\ns0,0,1e30,ccu,no\ns1,0,61,icu,yes\n")
    with pytest.raises(DataError, match="line 2, column 'pulse': is too large for data.normalise"):
        run("check", stays, *OF_STAYS, "--run", out)


def test_a_forecasts_horizon_is_the_tasks(stays: Path) -> None:
    flags = (stays, "--group", "stay", "--columns", "pulse", "--task", "forecast", "--window", 2, "--horizon", 2)
    tables = tomllib.loads(run("schema", *flags))
    assert tables["task"] == {"kind": "forecast", "horizon": 2}
    assert json.loads(run("check", *flags, "--json"))["run"]["outputs"] == 2


def test_check_shows_the_columns_before_it_asks_for_more(stays: Path) -> None:
    done = CliRunner().invoke(data, ["check", str(stays), "--group", "stay"])
    assert isinstance(done.exception, ConfigError)
    assert "24 rows, 6 entities" in done.output
    assert "pulse" in done.output
