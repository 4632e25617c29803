"""The public data sets of `benchmarks.quality`: each file makes one into plain files for clients, and says what to run.

Nothing is computed of the data here but what a federation's operator would publish beforehand: the vocabulary, and each
column's mean and scale. The floors are what simple models without a neural network reach on the same test data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Table = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """One data set, ready to run.

    run: the content of run.toml but for `rounds` and [cohort]. reading: the keys of client.toml's [data] table that all
    share, but for `file`. clients: each client's file. pooled: all of them, as a glob. alone: the clients that are also
    trained by themselves. test: the [data] keys to evaluate with, `file` among them.
    rounds: federated, pooled, alone; of the last two each its own, since one client's round has more or fewer steps.
    """

    metric: str
    floor: float
    floor_is: str
    run: Table
    reading: Table
    clients: Mapping[str, Path]
    pooled: str
    alone: tuple[str, ...]
    test: Table
    rounds: tuple[int, int, int]


Prepare = Callable[[Path, Path], Experiment]  # (the raw set's folder, an empty folder for the clients' files)


def toml(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> str:
    """TOML text of a table of numbers, texts, lists and tables.

    >>> print(toml({"name": "a", "data": {"steps": 3, "mean": [0.5]}}))
    name = "a"
    <BLANKLINE>
    [data]
    steps = 3
    mean = [0.5]
    """
    lines = ["[" + ".".join(map(_key, path)) + "]"] if path else []
    lines += [f"{_key(key)} = {_value(one)}" for key, one in table.items() if not isinstance(one, Mapping)]
    inner = [toml(one, (*path, key)) for key, one in table.items() if isinstance(one, Mapping)]
    return "\n\n".join(["\n".join(lines), *inner])


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, str | Path):
        # TOML's basic strings are JSON's, but for DEL and for escapes of half a character
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)
