"""client.toml: its rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from seqfed.client.settings import ClientSettings, DataSettings
from seqfed.common.config import load_toml, validate
from seqfed.common.errors import ConfigError


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            {"file": "a.npz", "label": "y"},
            "a.npz has arrays; label, columns, group and the like are for CSV and Parquet files",
        ),
        ({"file": ["a.csv", "b.npz"], "group": "g"}, "b.npz has arrays"),
        ({"file": "a.csv", "columns": ["a", "y"], "label": "y"}, "columns must name the inputs, and not the label 'y'"),
        ({"file": "a.csv", "columns": ["a", "a"]}, "columns has 'a' twice"),
        ({"file": "a.csv", "label": ["u", "v", "u"]}, "label has 'u' twice"),
        ({"file": "a.csv", "variable": "v", "value": "x"}, "long format needs all of variable, value and time"),
        ({"file": "a.csv", "value": "x", "time": "t"}, "long format needs all of"),
        ({"file": "a.csv", "wide": {"a": ["a1"]}, "text": "s"}, "wide, text and lines exclude each other; keep one"),
        ({"file": "a.csv", "wide": {"a": ["a1", "a2"], "b": ["b1"]}}, "wide needs as many columns for each input"),
        ({"file": "a.csv", "wide": {"a": ["a1"]}, "time": "t"}, "and no time column"),
        ({"file": "a.csv", "label_file": "b.csv", "label": "y"}, "label_file needs group and label"),
        (
            {"file": "a.csv", "label_file": "b.npz", "label": "y", "group": "g"},
            "b.npz has arrays; label, columns, group",
        ),
        ({"file": "a.csv", "remaining": 9, "label": "y"}, "remaining is itself the label"),
        ({"file": "a.csv", "delimiter": "tabs"}, "delimiter = 'tabs' is not one character, 'tab' or 'whitespace'"),
        ({"file": "a.csv", "encoding": "utf8000"}, "encoding = 'utf8000' is not known; try utf-8, latin-1 or utf-16"),
        ({"file": "a.npz", "validation_fraction": 1.0}, "'data.validation_fraction' = 1.0"),
        ({"file": "a.csv", "window": 0}, "'data.window' = 0"),
        ({"file": "a.csv", "stride": 0}, "'data.stride' = 0"),
        ({"file": "a.csv", "unpacked_gib": 0.0}, "'data.unpacked_gib' = 0.0"),
        ({"file": "a.npz", "vaildation": "b.npz"}, "unknown key 'data.vaildation'; did you mean 'validation'?"),
        ({"file": 3}, "'data.file' = 3"),
        ({"file": []}, "'data.file' = ()"),
        ({}, "'data.file' is missing"),
    ],
)
def test_what_contradicts_is_named(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(ClientSettings, {"data": data}, "client.toml")
    assert str(refused.value).startswith("client.toml: ")
    assert said in str(refused.value)


def test_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "client.toml"
    path.write_text(
        'server = "fed.example.org:7733"\nname = "ward-1"\nthreads = 2\ninsecure = true\nstate = "state"\n'
        '[data]\nfile = "a.csv"\nlabel = "y"\ngroup = "who"\nwindow = 24\nstride = 12\ncolumns = ["a", "b"]\n'
        'delimiter = "tab"\nwide = {}\n'
    )
    found = load_toml(ClientSettings, path, {"threads": 3}, {"data": {"stride": 1}})
    assert (found.server, found.name, found.threads, found.insecure) == (
        ("fed.example.org:7733",),
        "ward-1",
        3,
        True,
    )
    assert (found.data.window, found.data.stride, found.data.columns) == (24, 1, ("a", "b"))
    assert (found.data.file, found.data.label, found.data.separator) == (("a.csv",), ("y",), "\t")


def test_one_name_or_several() -> None:
    one = validate(DataSettings, {"file": Path("a.csv"), "wide": {"a": ["a1", "a2"], "b": ["b1", "b2"]}}, "flags")
    assert (one.file, one.wide) == (("a.csv",), {"a": ("a1", "a2"), "b": ("b1", "b2")})
    assert validate(DataSettings, {"file": [Path("a.csv"), "b.csv"]}, "flags").file == ("a.csv", "b.csv")


@pytest.mark.parametrize("given", ["a:1,b:2", "a:1, b:2", ["a:1", "b:2"], ("a:1", "b:2")])
def test_several_servers(given: Any) -> None:
    found = validate(ClientSettings, {"server": given, "data": {"file": "a.csv"}}, "test")
    assert found.server == ("a:1", "b:2")


def test_no_server_is_refused() -> None:
    with pytest.raises(ConfigError, match="server"):
        validate(ClientSettings, {"server": [], "data": {"file": "a.csv"}}, "test")
