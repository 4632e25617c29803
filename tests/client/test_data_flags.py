"""The data flags: one for every setting, in every command the same."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from seqfed.client.data_flags import FLAGS, SPLITTING, DataTable, settings_of, with_data_flags
from seqfed.client.settings import DataSettings
from seqfed.common.errors import ConfigError

OF_COMMANDS = {"unlabelled"}  # set by the command, not by its user


def command(first: Annotated[str, typer.Argument()], data: DataTable, seedling: bool = False) -> None:
    """Show what was given."""
    typer.echo(json.dumps([first, data, seedling]))


def given(*arguments: str, splitting: bool = False) -> Any:
    app = typer.Typer()
    app.command()(with_data_flags(command, splitting=splitting))
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_every_setting_has_a_flag() -> None:
    assert set(FLAGS) | set(SPLITTING) == set(DataSettings.model_fields) - OF_COMMANDS
    assert not set(FLAGS) & set(SPLITTING)


def test_only_what_was_given_is_in_the_table() -> None:
    assert given("x", "--seedling") == ["x", {}, True]
    assert given("--data", "a.csv", "x") == ["x", {"file": "a.csv"}, False]


def test_every_flag_arrives_as_settings_take_it() -> None:
    arguments = (
        *("--data", "a.csv", "--data", "b.csv", "--label", "y", "--columns", 'v,"a,b"', "--group", "g", "--time", "t"),
        *("--window", "5", "--stride", "2", "--horizon", "1", "--names", "v,w", "--missing-value", "?"),
        *("--missing-value", "-9", "--delimiter", "tab", "--no-quotes", "--encoding", "latin-1", "--unpacked-gib", "2"),
        *("--validation", "c.csv", "--validation-fraction", "0.3", "--split-seed", "4", "--memory-mib", "0.5"),
    )
    _, data, _ = given("x", *arguments, splitting=True)
    settings = settings_of(data)
    assert settings == DataSettings(
        file=("a.csv", "b.csv"),
        label=("y",),
        columns=("v", "a,b"),
        group="g",
        time="t",
        window=5,
        stride=2,
        horizon=1,
        names=("v", "w"),
        missing_values=("?", "-9"),
        delimiter="tab",
        quotes=False,
        encoding="latin-1",
        unpacked_gib=2.0,
        validation=("c.csv",),
        validation_fraction=0.3,
        seed=4,
        memory_mib=0.5,
    )
    assert settings_of(data, validation_fraction=0.0).validation_fraction == 0


def test_other_forms_of_files() -> None:
    _, wide, _ = given("x", "--data", "a.csv", "--wide", "bill=b1,b2", "--wide", "paid=p1,p2", "--label", "y,z")
    assert settings_of(wide).wide == {"bill": ("b1", "b2"), "paid": ("p1", "p2")}
    assert settings_of(wide).label == ("y", "z")
    _, long, _ = given("x", "--data", "a.csv", "--variable", "what", "--value", "much", "--time", "t", "--group", "g")
    assert (settings_of(long).variable, settings_of(long).value) == ("what", "much")
    _, text, _ = given("x", "--data", "a.txt", "--lines")
    assert settings_of(text).lines is True


def test_holding_out_is_for_those_who_train() -> None:
    app = typer.Typer()
    app.command()(with_data_flags(command))
    assert "No such option" in CliRunner().invoke(app, ["x", "--validation", "c.csv"]).output


@pytest.mark.parametrize("wrong", ["bill", "=b1", "bill="])
def test_a_wide_flag_that_names_no_columns(wrong: str) -> None:
    with pytest.raises(ConfigError, match=f"--wide {wrong}: not NAME=COLUMN,COLUMN,...; for instance"):
        given("x", "--wide", wrong)


def test_no_data() -> None:
    with pytest.raises(ConfigError, match="which data\\? pass --data FILE"):
        settings_of({})
