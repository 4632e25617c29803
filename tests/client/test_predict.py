"""What a model says of sequences: in rows, against numbers worked out one sequence at a time; and through the commands."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import typer
from numpy.typing import NDArray
from typer.testing import CliRunner

from seqfed.client import predict as predicting
from seqfed.client import training, using
from seqfed.client.convert import convert
from seqfed.client.data import ClientData, Sequences
from seqfed.client.network import Network, network_for
from seqfed.client.predict import Predictor, write_csv, write_json
from seqfed.common import checkpoint
from seqfed.common.config import validate
from seqfed.common.errors import CheckpointError, ConfigError, DataError, PolicyRefused, SchemaMismatch
from seqfed.common.model import initial_parameters
from seqfed.common.spec import RunSpec

pytestmark = pytest.mark.usefixtures("one_thread")

NUMBERS: dict[str, Any] = {"columns": ["a", "b"], "mean": [10.0, -1.0], "scale": [4.0, 0.5]}
WINDOWS: dict[str, Any] = {**NUMBERS, "steps": 4, "stride": 2}


def spec(task: str = "classification", **data: Any) -> RunSpec:
    table = {"data": data, "task": {"kind": task}, "model": {"hidden": 5, "embedding": 4, "layers": 1}}
    if task == "forecast":
        table["task"]["horizon"] = 2
    return validate(RunSpec, table, "test")


def network_of(run: RunSpec) -> Network:
    network = network_for(run)
    network.load(initial_parameters(run))
    return network


def rows_of(run: RunSpec, data: ClientData, labels: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    predictor = Predictor(network_of(run), run, labels)
    told: list[int] = []
    rows = list(predictor.rows(data, told.append))
    assert sum(told) == len(rows) == len(data.training)
    assert all(tuple(row) == predictor.columns for row in rows)
    return rows


def numbers(count: int = 7, width: int = 2, **more: Any) -> ClientData:
    """Sequences of 1 to 5 steps, one an entity."""
    draw = np.random.default_rng(3)
    lengths = draw.integers(1, 6, count)
    rows = draw.standard_normal((int(lengths.sum()), width)).astype(np.float32)
    sequences = Sequences(rows, np.cumsum(lengths) - lengths, lengths, entities=np.arange(count), **more)
    return ClientData(sequences, sequences.take(np.arange(0)), tuple(f"ward {one}" for one in range(count)))


@torch.no_grad()
def alone(run: RunSpec, data: Sequences, index: int) -> NDArray[np.float64]:
    """The outputs for one sequence, without padding."""
    start, length = int(data.starts[index]), int(data.lengths[index])
    piece = np.array(data.rows[start : start + length])
    x = torch.from_numpy(piece.astype(np.int64) if piece.ndim == 1 else piece)
    outputs: NDArray[np.float64] = network_of(run).eval()(x[None])[0].double().numpy()
    return outputs


def close(found: Any, wanted: Any) -> bool:
    return bool(np.allclose(found, wanted, rtol=1e-5, atol=1e-6))


def test_classes_have_names_and_probabilities() -> None:
    run = spec(**NUMBERS, labels=["no", "perhaps", "yes"])
    data = numbers()
    for index, row in enumerate(rows_of(run, data)):
        shares = np.exp(alone(run, data.training, index))
        shares /= shares.sum()
        assert close([row["p_no"], row["p_perhaps"], row["p_yes"]], shares)
        assert row["class"] == ("no", "perhaps", "yes")[shares.argmax()]
        assert close(row["probability"], shares.max())
        assert (row["entity"], row["step"], row["steps"]) == (f"ward {index}", None, data.training.lengths[index])


def test_classes_without_names_are_numbers_and_nobody_need_be_named() -> None:
    run = spec(**NUMBERS, classes=3)
    data = numbers()
    data = replace(data, training=replace(data.training, entities=None), entities=())
    for row in rows_of(run, data):
        assert row["entity"] is None
        assert row["class"] in {0, 1, 2}
        assert close(row["p_0"] + row["p_1"] + row["p_2"], 1)


def test_many_classes_have_no_column_each() -> None:
    run = spec(**NUMBERS, classes=1001)
    assert Predictor(network_of(run), run).columns == ("entity", "step", "steps", "class", "probability")
    for index, row in enumerate(rows_of(run, numbers())):
        assert row["class"] == alone(run, numbers().training, index).argmax()


def test_labels() -> None:
    run = spec("multilabel", **NUMBERS, targets=2)
    data = numbers()
    rows, named = rows_of(run, data), rows_of(run, data, ("toxic", "soluble"))
    for index, (row, other) in enumerate(zip(rows, named, strict=True)):
        shares = 1 / (1 + np.exp(-alone(run, data.training, index)))
        assert close([row["p_0"], row["p_1"]], shares)
        assert (other["p_toxic"], other["p_soluble"]) == (row["p_0"], row["p_1"])


def test_numbers_are_in_their_own_units() -> None:
    run = spec("regression", **NUMBERS, targets=1, target_mean=[100.0], target_scale=[20.0])
    data = numbers()
    for index, row in enumerate(rows_of(run, data)):
        assert close(row["value"], alone(run, data.training, index)[0] * 20 + 100)
    plain = spec("regression", **NUMBERS, targets=2)
    for index, row in enumerate(rows_of(plain, data, ("x", "y"))):
        assert close([row["x"], row["y"]], alone(plain, data.training, index))


def windows() -> ClientData:
    """Two entities of 9 and 7 rows: windows of 4 steps every 2, with 2 rows after each."""
    rows = np.random.default_rng(5).standard_normal((16, 2)).astype(np.float32)
    starts = np.array([0, 2, 9])
    sequences = Sequences(
        rows,
        starts,
        np.full(3, 4),
        target="rows ahead",
        horizon=2,
        numbers=2,
        entities=np.array([0, 0, 1]),
    )
    return ClientData(sequences, sequences.take(np.arange(0)), ("p", "q"))


def test_forecasts_are_steps_ahead_in_their_own_units() -> None:
    run = spec("forecast", **WINDOWS)
    data = windows()
    rows = rows_of(run, data)
    assert [(row["entity"], row["step"], row["steps"]) for row in rows] == [("p", 4, 4), ("p", 6, 4), ("q", 4, 4)]
    for index, row in enumerate(rows):
        wanted = alone(run, data.training, index) * [4.0, 0.5, 4.0, 0.5] + [10.0, -1.0, 10.0, -1.0]
        assert close([row["a+1"], row["b+1"], row["a+2"], row["b+2"]], wanted)


def test_where_rows_were_refused_the_steps_are_not_guessed() -> None:
    rows = rows_of(spec("forecast", **WINDOWS), replace(windows(), refused="1 of 4 sequences refused"))
    assert [row["step"] for row in rows] == [None, None, None]


def test_an_anomalys_score_is_the_forecasts_squared_error() -> None:
    run = spec("anomaly", **WINDOWS)
    data = replace(windows(), training=replace(windows().training, horizon=1))
    rows = rows_of(run, data)
    for index, row in enumerate(rows):
        start = int(data.training.starts[index])
        after = data.training.rows[start + 4]
        assert close(row["score"], ((alone(run, data.training, index) - after) ** 2).mean())


def test_texts_have_a_perplexity_and_a_likeliest_next_token() -> None:
    vocabulary = tuple("abcdefg")
    run = spec("next_token", vocabulary=list(vocabulary), steps=5)
    ids = np.random.default_rng(2).integers(0, 8, 17).astype(np.int32)
    # documents of 12 and 5 tokens; each window has a token after it
    sequences = Sequences(
        ids, np.array([0, 5, 10, 12]), np.array([5, 5, 1, 4]), target="next token", entities=np.array([0, 0, 0, 1])
    )
    data = ClientData(sequences, sequences.take(np.arange(0)), ("one", "two"))
    rows = rows_of(run, data)
    assert [(row["entity"], row["step"], row["steps"]) for row in rows] == [
        ("one", 6, 6),
        ("one", 11, 6),
        ("one", 12, 2),
        ("two", 5, 5),
    ]
    network = network_of(run).eval()
    for row, start, length in zip(rows, sequences.starts, sequences.lengths, strict=True):
        tokens = torch.from_numpy(ids[start : start + length + 1].astype(np.int64))
        shares = network(tokens[None])[0].double().softmax(1).detach().numpy()
        losses = [-math.log(shares[step, tokens[step + 1]]) for step in range(length)]
        assert close(row["perplexity"], math.exp(sum(losses) / length))
        assert row["next"] == (None, *vocabulary)[shares[-1].argmax()]
        assert close(row["probability"], shares[-1].max())


def test_evaluation_in_pieces_is_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    run = spec(**NUMBERS, classes=3)
    data = numbers(50, y=np.random.default_rng(0).integers(0, 3, 50))
    whole = training.evaluate(network_of(run), data.training, run)
    monkeypatch.setattr(predicting, "EVALUATED", 7)
    told: list[int] = []
    found = predicting.evaluate(network_of(run), data, run, told.append)
    assert told == [7] * 7 + [1]
    assert found.keys() == whole.keys()
    assert {name: value for name, value in found.items() if name != "loss"} == {
        name: value for name, value in whole.items() if name != "loss"
    }
    assert abs(found["loss"] - whole["loss"]) <= 50  # a unit a sequence: torch adds in another order


def test_files(tmp_path: Path) -> None:
    rows = [{"entity": "Zürich, 1", "class": None, "p": 0.25}, {"entity": None, "class": "x", "p": 1e-7}] * 3000
    assert write_csv(tmp_path / "out.csv", ("entity", "class", "p"), iter(rows)) == 6000
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        back = list(csv.DictReader(file))
    assert back == [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
    assert write_json(tmp_path / "out.json", iter(rows)) == 6000
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == rows
    assert write_json(tmp_path / "none.json", []) == 0
    assert json.loads((tmp_path / "none.json").read_text(encoding="utf-8")) == []


def test_a_prediction_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    out.write_text("old")

    def broken() -> Any:
        yield {"a": 1}
        raise RuntimeError("midway")

    with pytest.raises(RuntimeError):
        write_csv(out, ("a",), broken())
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]
    assert out.read_text() == "old"


# The commands ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def app() -> typer.Typer:
    found = typer.Typer()
    found.command("predict")(using.predict)
    found.command("evaluate")(using.evaluate)
    return found


def run_command(app: typer.Typer, *arguments: str | Path) -> str:
    """What the command prints; its error, if it has one, is raised."""
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def saved(run: RunSpec, folder: Path) -> Path:
    metadata = {"run": "0123456789abcdef", "round": "3", "spec": run.canonical.decode(), "spec_digest": run.digest}
    return checkpoint.save(folder / "model.safetensors", initial_parameters(run), metadata).path


WARDS = ("north", "east", "south")
STAYS: dict[str, Any] = {**NUMBERS, "labels": ["no", "yes"], "steps": 4}


def stays() -> tuple[list[list[list[float]]], list[str]]:
    """Raw rows of three stays, and their labels."""
    draw = np.random.default_rng(7)
    return [draw.normal(5, 4, (length, 2)).round(3).tolist() for length in (3, 4, 6)], ["no", "yes", "yes"]


def write_table(path: Path, labelled: bool = True) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ward", "a", "b", *(["died"] if labelled else [])])
        for ward, rows, label in zip(WARDS, *stays(), strict=True):
            writer.writerows([ward, *row, *([label] if labelled else [])] for row in rows)
    return path


def shares_of(run: RunSpec) -> NDArray[np.float64]:
    """Each stay's class probabilities, from its last four rows, normalised by hand."""
    found = []
    network = network_of(run).eval()
    for rows in stays()[0]:
        x = (torch.tensor(rows[-4:], dtype=torch.float64) - torch.tensor([10.0, -1.0])) / torch.tensor([4.0, 0.5])
        found.append(network(x.float()[None])[0].double().softmax(0).detach().numpy())
    return np.stack(found)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", ["out.csv", "out.json"])
def test_a_table_is_predicted_with_labels_or_without(
    app: typer.Typer, tmp_path: Path, name: str, labelled: bool
) -> None:
    run = spec(**STAYS)
    table, out = write_table(tmp_path / "stays.csv", labelled), tmp_path / name
    flags = ["--group", "ward", *(["--label", "died"] if labelled else [])]
    said = run_command(app, "predict", "--model", saved(run, tmp_path), "--data", table, *flags, "--out", out)
    assert said == f"{out}: 3 sequences\n"
    if name.endswith("csv"):
        rows: list[dict[str, Any]] = list(csv.DictReader(out.read_text().splitlines()))
    else:
        rows = json.loads(out.read_text())
    assert [row["entity"] for row in rows] == list(WARDS)
    shares = shares_of(run)
    assert close([[float(row["p_no"]), float(row["p_yes"])] for row in rows], shares)
    assert [row["class"] for row in rows] == [("no", "yes")[one] for one in shares.argmax(1)]


def test_an_evaluation_takes_every_sequence(app: typer.Typer, tmp_path: Path) -> None:
    run = spec(**STAYS)
    table = write_table(tmp_path / "stays.csv")
    flags: list[str | Path] = ["--model", saved(run, tmp_path), "--data", table, "--group", "ward", "--label", "died"]
    found = json.loads(run_command(app, "evaluate", *flags, "--json"))
    shares, actual = shares_of(run), np.array([0, 1, 1])
    assert (found["sequences"], found["examples"]) == (3, 3)
    assert close(found["loss"], -np.log(shares[np.arange(3), actual]).mean())
    assert close(found["accuracy"], (shares.argmax(1) == actual).mean())
    shown = run_command(app, "evaluate", *flags)
    assert "3 sequences" in shown
    assert re.search(rf"accuracy\W+{found['accuracy']:.6g}", shown)


def test_forecasts_reach_beyond_the_file_and_the_stride_is_the_users(app: typer.Typer, tmp_path: Path) -> None:
    run = spec("forecast", **{**WINDOWS, "stride": 3})
    table = write_table(tmp_path / "stays.csv", labelled=False)
    command: list[str | Path] = ["predict", "--model", saved(run, tmp_path), "--data", table, "--group", "ward"]
    command += ["--out", tmp_path / "o.csv"]
    steps = {}
    for name, stride in (("run's", ()), ("user's", ("--stride", "1"))):
        run_command(app, *command, *stride)
        rows = list(csv.DictReader((tmp_path / "o.csv").read_text().splitlines()))
        steps[name] = [(row["entity"], row["step"]) for row in rows]
    # the first stay has but three rows: one short window
    assert steps["run's"] == [("north", "3"), ("east", "4"), ("south", "4")]
    assert steps["user's"] == [("north", "3"), ("east", "4"), ("south", "4"), ("south", "5"), ("south", "6")]
    x = (torch.tensor(stays()[0][2][2:6], dtype=torch.float64) - torch.tensor([10.0, -1.0])) / torch.tensor([4.0, 0.5])
    wanted = network_of(run).eval()(x.float()[None])[0].double().detach().numpy() * [4.0, 0.5, 4.0, 0.5] + [
        10.0,
        -1,
        10,
        -1,
    ]
    assert close([float(rows[-1][name]) for name in ("a+1", "b+1", "a+2", "b+2")], wanted)


def test_windows_of_ones_own_have_their_steps_where_the_run_has_none(app: typer.Typer, tmp_path: Path) -> None:
    table = write_table(tmp_path / "stays.csv", labelled=False)
    wanted = [("north", "3"), ("east", "4"), ("south", "4"), ("south", "5"), ("south", "6")]
    for name, steps, window in (("run's", 4, ()), ("own", None, ("--window", "4"))):
        model = saved(spec(**{**STAYS, "steps": steps}), tmp_path)
        command = ("predict", "--model", model, "--data", table, "--group", "ward", "--out", tmp_path / "o.csv")
        run_command(app, *command, "--stride", "1", *window)
        rows = list(csv.DictReader((tmp_path / "o.csv").read_text().splitlines()))
        assert [(row["entity"], row["step"]) for row in rows] == wanted, name
        run_command(app, *command, *window)
        rows = list(csv.DictReader((tmp_path / "o.csv").read_text().splitlines()))
        assert [(row["entity"], row["step"]) for row in rows] == [(ward, "") for ward in WARDS], name


def test_texts(app: typer.Typer, tmp_path: Path) -> None:
    run = spec("next_token", vocabulary=list("helo wrd"), steps=8)
    text = tmp_path / "talk.txt"
    text.write_text("hello world\nhello hello\n", encoding="utf-8")
    out = tmp_path / "out.json"
    run_command(app, "predict", "--model", saved(run, tmp_path), "--data", text, "--lines", "--out", out)
    rows = json.loads(out.read_text())
    assert [(row["entity"], row["step"], row["steps"]) for row in rows] == [
        (0, 9, 9),
        (0, 11, 3),
        (1, 9, 9),
        (1, 11, 3),
    ]
    found = json.loads(
        run_command(app, "evaluate", "--model", tmp_path / "model.safetensors", "--data", text, "--lines", "--json")
    )
    # a sequence's perplexity is of its own tokens, the evaluation's of all of them
    assert found["examples"] == 8 + 2 + 8 + 2
    losses = [math.log(row["perplexity"]) * (row["steps"] - 1) for row in rows]
    assert close(found["perplexity"], math.exp(sum(losses) / 20))


def test_an_onnx_file_says_of_a_table_what_the_command_says(app: typer.Typer, tmp_path: Path) -> None:
    run = spec(**STAYS)
    model, out = saved(run, tmp_path), tmp_path / "out.json"
    run_command(
        app,
        "predict",
        "--model",
        model,
        "--data",
        write_table(tmp_path / "t.csv", False),
        "--group",
        "ward",
        "--out",
        out,
    )
    convert(model, tmp_path / "model.onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for row, rows in zip(json.loads(out.read_text()), stays()[0], strict=True):
        x = np.array([rows[-4:]], np.float32)
        [logits] = np.asarray(session.run(["logits"], {"x": x, "lengths": np.array([x.shape[1]])})[0])
        shares = np.exp(logits) / np.exp(logits).sum()
        assert close([row["p_no"], row["p_yes"]], shares)


def test_refusals_name_the_file_and_the_remedy(app: typer.Typer, tmp_path: Path) -> None:
    run = spec(**STAYS)
    table, out = write_table(tmp_path / "stays.csv"), tmp_path / "out.csv"
    model = saved(run, tmp_path)
    with pytest.raises(ConfigError, match="which data\\? pass --data FILE"):
        run_command(app, "predict", "--model", model, "--out", out)
    with pytest.raises(CheckpointError, match="stays.csv: not a readable safetensors file"):
        run_command(app, "predict", "--model", table, "--data", table, "--out", out)
    with pytest.raises(ConfigError, match="--wide bill: not NAME=COLUMN"):
        run_command(app, "predict", "--model", model, "--data", table, "--wide", "bill", "--out", out)
    other = tmp_path / "other.csv"
    other.write_text("ward,a,c\nnorth,1,2\n")
    with pytest.raises(SchemaMismatch, match="other.csv has no number column 'b', which the run wants"):
        run_command(app, "predict", "--model", model, "--data", other, "--group", "ward", "--out", out)
    bare = checkpoint.save(tmp_path / "bare.safetensors", initial_parameters(run), {}).path
    with pytest.raises(CheckpointError, match="bare.safetensors: has no run specification.* `seqfed export`"):
        run_command(app, "evaluate", "--model", bare, "--data", table)
    with pytest.raises(DataError, match="stays.csv"):
        run_command(app, "evaluate", "--model", model, "--data", table, "--group", "ward")
    custom = {"custom": "own:net", "tensors": [("w", (2, 2))]}
    own = saved(validate(RunSpec, {"data": STAYS, "model": custom}, "test"), tmp_path)
    with pytest.raises(PolicyRefused, match="pass --allow-custom own:net$"):
        run_command(app, "predict", "--model", own, "--data", table, "--group", "ward", "--out", out)
    assert not out.exists()
