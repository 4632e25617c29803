"""client.toml: its rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from seqfed.client.settings import ClientSettings
from seqfed.common.config import load_toml, validate
from seqfed.common.errors import ConfigError

CSV = {"file": "a.csv", "label": "y", "window": 3}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"file": "a.csv"}, "a.csv is CSV: name its label column and the rows a sequence (label, window)"),
        ({"file": "a.csv", "label": "y"}, "(label, window)"),
        ({"file": "a.npz", "label": "y"}, "label, columns, group and window are for CSV files, and a.npz is not .csv"),
        ({"file": "a.npz", "window": 3}, "and a.npz is not .csv"),
        ({**CSV, "columns": ["a", "y"]}, "columns must name each feature once, and not the label 'y'"),
        ({**CSV, "columns": ["a", "a"]}, "columns must name each feature once"),
        ({**CSV, "validation": "b.npz"}, "validation b.npz must be of the same kind as file a.csv"),
        ({"file": "a.npz", "validation": "b.csv"}, "validation b.csv must be of the same kind as file a.npz"),
        ({"file": "a.npz", "validation_fraction": 1.0}, "'data.validation_fraction' = 1.0"),
        ({**CSV, "window": 0}, "'data.window' = 0"),
        ({**CSV, "stride": 0}, "'data.stride' = 0"),
        ({"file": "a.npz", "vaildation": "b.npz"}, "unknown key 'data.vaildation'; did you mean 'validation'?"),
        ({"file": 3}, "'data.file' = 3"),
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
    )
    found = load_toml(ClientSettings, path, {"threads": 3}, {"data": {"stride": 1}})
    assert (found.server, found.name, found.threads, found.insecure) == ("fed.example.org:7733", "ward-1", 3, True)
    assert (found.data.window, found.data.stride, found.data.columns) == (24, 1, ("a", "b"))
