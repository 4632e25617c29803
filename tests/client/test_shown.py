"""Runs and clients as people and programs read them."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from seqfed.client.shown import (
    client_dict,
    clients_table,
    columns,
    live,
    progress_table,
    round_dict,
    round_row,
    run_dict,
    runs_table,
    size,
)
from seqfed.common.metrics import main_metrics
from seqfed.common.schema import DataSchema
from seqfed.common.spec import DataSpec, RunSpec
from seqfed.common.views import ClientView, Progress, RoundRecord, RunView, Stage, TaskView

RECORD = RoundRecord(
    round=2,
    attempt=1,
    cohort=("a", "b", "c"),
    folded=("a", "b"),
    training={"examples": 4, "loss": 2 << 20},
    evaluation={"loss": 0.125, "accuracy": 0.75, "macro_f1": 0.7, "auroc": 0.9},
    bytes_up=1_000_000,
    bytes_down=500_000,
    seconds=1.23456,
    slowest_training_seconds=0.5,
    spread={"loss": (0.25, 0.5), "auroc": (0.875, 0.625)},
    evaluated_examples=8,
    evaluated_clients=3,
    stale={"b": 2},
    traffic={"a": (7, 8)},
)
TASKS = (
    TaskView("a", 3, Progress(Stage.TRAINING, 61, 100, 2, 0.375), 1.2, connected=True),
    TaskView("b", 2, Progress(Stage.SENDING, 5, 10), 40.0, connected=True),
    TaskView("c", 3, None, 0.25, connected=True),
    TaskView("d", 3, Progress(Stage.READING), 7_200.0, connected=False),
)
SPEC = RunSpec(data=DataSpec(features=1, classes=2))


def view(reason: str = "waiting for 1 more", ended: bool = False) -> RunView:
    return RunView(
        run="0123456789abcdef",
        name="trial",
        phase="training",
        round=3,
        rounds=9,
        attempt=1,
        cohort=("a", "b", "c"),
        pending=("c",),
        reason=reason,
        history=(RECORD,),
        bytes_up=1_000_000,
        bytes_down=2_000_000,
        seconds=61.5,
        spec=SPEC,
        ended=ended,
        metrics={"loss": 0.125, "accuracy": 0.75, "macro_f1": 0.7},
    )


def text(table: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_round_for_programs() -> None:
    assert json.loads(json.dumps(round_dict(RECORD))) == {
        "round": 2,
        "attempt": 1,
        "cohort": ["a", "b", "c"],
        "folded": ["a", "b"],
        "stale": {"b": 2},
        "training_loss": 0.5,
        "loss": 0.125,
        "accuracy": 0.75,
        "macro_f1": 0.7,
        "auroc": 0.9,
        "spread": {
            "loss": {"median": 0.25, "worst_decile": 0.5},
            "auroc": {"median": 0.875, "worst_decile": 0.625},
        },
        "evaluated_examples": 8,
        "evaluated_clients": 3,
        "bytes_up": 1_000_000,
        "bytes_down": 500_000,
        "traffic": {"a": {"bytes_up": 7, "bytes_down": 8}},
        "seconds": 1.2346,
        "slowest_training_seconds": 0.5,
    }


def test_a_round_without_evaluation_has_no_metrics() -> None:
    bare = RoundRecord(1, 1, ("a",), ("a",))
    assert round_dict(bare).keys().isdisjoint({"loss", "accuracy"})
    assert round_dict(bare)["training_loss"] is None
    assert round_row(bare, ("loss", "auroc")) == ("1", "done", "1/1", "-", "-", "0 B", "0.00")


def test_a_round_for_people() -> None:
    metrics = main_metrics(SPEC)
    assert columns(metrics) == ("round", "phase", "clients", "loss", "accuracy", "auroc", "bytes", "seconds")
    assert round_row(RECORD, metrics) == ("2", "done", "2/3", "0.1250", "0.7500", "0.9000", "1.5 MB", "1.23")


@pytest.mark.parametrize(
    ("kind", "data", "heads"),
    [
        ("classification", {"features": 1, "classes": 3}, ["loss", "accuracy"]),
        ("multilabel", {"features": 1, "targets": 3}, ["loss", "accuracy", "auroc"]),
        ("regression", {"features": 1, "targets": 3}, ["rmse", "mae"]),
        ("forecast", {"features": 1, "steps": 3, "stride": 1}, ["rmse", "mae"]),
        ("next_token", {"vocabulary": ("a",), "steps": 3}, ["loss", "perplexity", "accuracy"]),
    ],
)
def test_the_live_table_has_the_metrics_of_the_task(kind: str, data: dict[str, Any], heads: list[str]) -> None:
    spec = RunSpec.model_validate({"data": data, "task": {"kind": kind}})
    table = progress_table(replace(view(), spec=spec), [RECORD])
    assert [column.header for column in table.columns] == ["round", "phase", "clients", *heads, "bytes", "seconds"]
    assert table.row_count == 2


def test_a_run_for_programs() -> None:
    found = json.loads(json.dumps(run_dict(view())))
    assert found["history"] == [json.loads(json.dumps(round_dict(RECORD)))]
    assert found.keys() == vars(view()).keys() - {"spec"}
    assert (found["run"], found["pending"], found["ended"]) == ("0123456789abcdef", ["c"], False)


def test_tasks_for_programs() -> None:
    found = json.loads(json.dumps(run_dict(replace(view(), tasks=TASKS, deadline_s=19.96))))
    assert found["deadline_s"] == 20.0
    assert found["tasks"][0] == {
        "client": "a",
        "round": 3,
        "stage": "training",
        "done": 61,
        "total": 100,
        "epoch": 2,
        "loss": 0.375,
        "silent_s": 1.2,
        "connected": True,
    }
    assert [one["stage"] for one in found["tasks"]] == ["training", "sending", None, "reading"]
    assert run_dict(view())["deadline_s"] is None


def test_tasks_for_people() -> None:
    shown = text(live(replace(view(), tasks=TASKS, deadline_s=600.0), [], {}))
    assert "training, deadline in 10 min" in shown
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert rows[-4:] == [  # who is waited for most first: away, silent, at the beginning
        ["d", "away; was preparing", "-", "-", "-", "2.0 h"],
        ["b", "sending its update (round 2)", "50%", "-", "-", "40 s"],
        ["c", "asked", "-", "-", "-", "-"],
        ["a", "training", "61%", "2", "0.375", "1 s"],
    ]


def test_of_many_tasks_the_slowest_are_shown() -> None:
    tasks = [TaskView(f"c{place}", 3, Progress(Stage.TRAINING, place, 100), 0.0, connected=True) for place in range(40)]
    shown = text(live(replace(view(), tasks=tuple(tasks)), [], {}))
    assert [f"c{place} " in shown for place in range(40)] == [True] * 12 + [False] * 28
    assert "and 28 more" in shown


@pytest.mark.parametrize("reason", ["waiting for 1 more", "client a: [/red] [bold]x[0, 1] is not finite", "[link=a]b"])
def test_reasons_are_shown_as_they_are(reason: str) -> None:
    assert reason in text(runs_table([view(reason)]))
    assert reason in text(progress_table(view(reason), []))


def test_a_narrow_terminal_still_says_why() -> None:
    reason = "waits for 2 more of 2 clients; nobody is here; site-a does not fit: it has 3 features a step"
    console = Console(width=60, file=io.StringIO())
    console.print(runs_table([view(reason)]))
    assert isinstance(console.file, io.StringIO)
    assert reason.replace(" ", "") in "".join(console.file.getvalue().split())


def test_the_runs_table() -> None:
    shown = text(runs_table([view()]))
    for said in (
        "0123456789abcdef",
        "trial",
        "training",
        "3/9",
        "loss 0.125 ",
        "accuracy 0.75 ",
        "1.0 MB",
        "2.0 MB",
        "61.5",
    ):
        assert said in shown


def test_progress_shows_the_newest_rounds_and_the_one_under_way() -> None:
    rounds = [RoundRecord(number, 1, ("a",), ("a",)) for number in range(101, 121)]
    lines = [line.split("│")[1:3] for line in text(progress_table(view(), rounds, last=2)).splitlines() if "│" in line]
    assert [(one.strip(), other.strip()) for one, other in lines] == [
        ("119", "done"),
        ("120", "done"),
        ("3", "training"),
    ]
    assert "2/3" in text(progress_table(view(), []))
    assert "2/3" not in text(progress_table(view(ended=True), []))


def test_what_each_client_moved_both_ways() -> None:
    rounds = [replace(RECORD, round=1, traffic={"a": (1, 2), "b": (3_000, 4_000)}), RECORD]
    shown = text(live(view(), rounds, {"a": (8, 10), "b": (3_000, 4_000)}))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert lines[-2:] == [["b", "0 B", "0 B", "3.0 kB", "4.0 kB"], ["a", "7 B", "8 B", "8 B", "10 B"]]
    many = {f"site-{number:03}": (number, 0) for number in range(40)}
    shown = text(live(view(), rounds, many))
    assert "site-039" in shown
    assert "site-027" not in shown
    assert "and 28 more" in shown


def test_clients() -> None:
    schema = DataSchema(features=4, steps=None, classes=2, examples=77, validation_examples=11)
    client = ClientView("ward-1", connected=False, seconds=12.345, task="", schema=schema, software="0.1.0")
    assert json.loads(json.dumps(client_dict(client))) == {
        "client": "ward-1",
        "connected": False,
        "seconds": 12.3,
        "task": "",
        "software": "0.1.0",
        "revoked": False,
        "features": 4,
        "steps": None,
        "classes": 2,
        "columns": None,
        "categories": [],
        "tokens": False,
        "examples": 77,
        "validation_examples": 11,
    }
    shown = text(clients_table([client]))
    for said in ("ward-1", "away", "12 s", "77", "11", "4"):
        assert said in shown


@given(st.integers(0, 10**15))
def test_sizes_are_within_their_last_digit(count: int) -> None:
    number, unit = size(count).split()
    factor = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}[unit]
    assert abs(float(number) * factor - count) <= factor / 20 * (unit != "B") + 1e-9 * count
