"""Settings from TOML: each mistake is one typed error that says where, what and what instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from seqfed.common.config import load_toml, validate, validate_json
from seqfed.common.errors import ConfigError
from seqfed.common.spec import RunSpec

GOOD = "rounds = 3\n[data]\nfeatures = 2\nclasses = 3\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.toml"


def test_a_file_becomes_settings(file: Path) -> None:
    file.write_text(GOOD)
    spec = load_toml(RunSpec, file)
    assert (spec.rounds, spec.data.features, spec.data.classes) == (3, 2, 3)


def test_flags_win_and_none_does_not(file: Path) -> None:
    file.write_text(GOOD)
    spec = load_toml(RunSpec, file, {"rounds": 7, "seed": None}, {"data": {"classes": 9}, "model": {"layers": 1}})
    assert (spec.rounds, spec.seed, spec.data.features, spec.data.classes, spec.model.layers) == (7, 0, 2, 9, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("roundz = 1\n" + GOOD, "unknown key 'roundz'; did you mean 'rounds'?"),
        (GOOD + "feature = 1\n", "unknown key 'data.feature'; did you mean 'features'?"),
        (GOOD + "[convergence]\npatient = 1\n", "unknown key 'convergence.patient'; did you mean 'patience'?"),
        (GOOD + "[evaluation]\nqqq = 1\n", "unknown key 'evaluation.qqq'; known keys: every"),
        ("rounds = 3\n", "'data' is missing"),
        ("[data]\nfeatures = 2\n", "a classification task needs data.classes or data.labels"),
        ("rounds = 'three'\n" + GOOD[11:], "'rounds' = 'three': Input should be a valid integer"),
        ("rounds = 1.5\n" + GOOD[11:], "'rounds' = 1.5: Input should be a valid integer"),
        ("data = 3\n", "'data' = 3: Input should be a valid dictionary"),
        ("name = '" + "x" * 500 + "'\n" + GOOD, "..."),
        ("rounds = \n", "not valid TOML: Invalid value (at line 1, column 10)"),
        ("rounds = 1\nrounds = 2\n", "not valid TOML: Cannot overwrite a value (at line 2"),
        ("", "'data' is missing"),
    ],
)
def test_a_mistake_is_named(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_toml(RunSpec, file)
    assert str(refused.value).startswith(f"{file}: ")
    assert said in str(refused.value)
    assert len(str(refused.value)) < len(str(file)) + 300


def test_every_mistake_is_told_at_once(file: Path) -> None:
    file.write_text("seed = -1\nsede = 1\n" + GOOD.replace("3", "'x'"))
    with pytest.raises(ConfigError) as refused:
        load_toml(RunSpec, file)
    for said in ("'seed' = -1", "unknown key 'sede'", "'rounds' = 'x'", "'data.classes' = 'x'"):
        assert said in str(refused.value)


def test_a_flag_for_a_table_that_is_none(file: Path) -> None:
    file.write_text("data = 3\n")
    with pytest.raises(ConfigError, match="'data' = 3: Input should be a valid dictionary"):
        load_toml(RunSpec, file, tables={"data": {"features": 2}})


def test_a_file_that_is_not_there(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.toml: No such file"):
        load_toml(RunSpec, file)


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        load_toml(RunSpec, tmp_path)


def test_a_file_that_is_not_text(file: Path) -> None:
    file.write_bytes(b"name = '\xff'\n")
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 8\); is it a TOML file\?"):
        load_toml(RunSpec, file)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b'{"data": {"features": NaN, "classes": 2}}'])
def test_json_that_is_not_a_specification(text: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^the task: "):
        validate_json(RunSpec, text, "the task")


def test_the_error_does_not_drag_the_library_along() -> None:
    with pytest.raises(ConfigError) as refused:
        validate(RunSpec, {}, "flags")
    assert str(refused.value) == "flags: 'data' is missing"
