"""The example files of a run: they are read, and say the defaults that the code has."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from seqfed.common.config import load_toml
from seqfed.common.dp import accounting
from seqfed.common.spec import DPSpec, RunSpec

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def told(given: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """What is known of just those keys that are given."""
    return {
        name: told(value, known[name]) if isinstance(value, dict) and value else known[name]
        for name, value in given.items()
    }


def test_run_toml_says_the_defaults() -> None:
    given = tomllib.loads((EXAMPLES / "run.toml").read_text())
    assert (given["data"].pop("features"), given["data"].pop("classes")) == (3, 2)  # its only keys without a default
    spec = RunSpec.model_validate({"data": {"features": 3, "classes": 2}})
    assert given == told(given, spec.model_dump())


def test_the_keys_without_a_value_in_run_toml_are_keys() -> None:
    """`# key = value  # what it is`, in tables that are left out too."""
    text = (EXAMPLES / "run.toml").read_text()
    commented = set(re.findall(r"^# (\w+) = ", text, re.MULTILINE))
    assert {"columns", "epochs", "buffer", "max_weight", "patience", "min_survivors"} <= commented
    every = {name for one in RunSpec.model_json_schema()["$defs"].values() for name in one["properties"]}
    assert commented <= every


def test_every_key_of_a_run_stands_in_run_toml() -> None:
    text = (EXAMPLES / "run.toml").read_text()
    given = set(re.findall(r"^(?:# )?\[?(?:\w+\.)?(\w+)(?: =|\])", text, re.MULTILINE))
    schema = RunSpec.model_json_schema()
    every = {name for one in (schema, *schema["$defs"].values()) for name in one["properties"]}
    assert every - given == {"tensors"}  # filled in by `seqfed submit`


def test_run_private_toml_is_a_run_that_has_an_epsilon() -> None:
    spec = load_toml(RunSpec, EXAMPLES / "run-private.toml")
    plan = accounting.plan(spec)
    assert plan.epsilon is not None
    assert 0.99 * 8 < plan.epsilon <= 8
    text = (EXAMPLES / "run-private.toml").read_text()
    assert set(re.findall(r"^(?:# )?(\w+) = ", text[text.index("[privacy.dp]") :], re.MULTILINE)) == set(
        DPSpec.model_fields
    )


def test_run_secure_toml_is_a_run() -> None:
    spec = load_toml(RunSpec, EXAMPLES / "run-secure.toml")
    assert spec.privacy.secure_aggregation
    # one may vanish: two thirds and one more of the clients make a sum
    assert spec.smallest_sum >= 2 * spec.cohort.min_clients // 3 + 1
