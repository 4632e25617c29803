"""Runs, rounds and clients as people and programs read them: rich tables, and plain dictionaries for JSON."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from seqfed.common.metrics import main_metrics, summary
from seqfed.common.views import AuditEntry, ClientView, Progress, RoundRecord, RunView, Stage, TaskView
from seqfed.common.wire import clean

QUIET_S: Final = 15.0  # a client that works says so every 5 s, so after three times that its silence is news


def round_dict(record: RoundRecord) -> dict[str, Any]:
    """One finished round; `training_loss` is the clients' while training, the metrics are the evaluation of the new model."""
    return {
        "round": record.round,
        "attempt": record.attempt,
        "cohort": list(record.cohort),
        "folded": list(record.folded),
        "stale": dict(record.stale),
        "training_loss": summary(record.training).get("loss"),
        **record.evaluation,
        "spread": {
            metric: {"median": median, "worst_decile": worst} for metric, (median, worst) in record.spread.items()
        },
        "evaluated_examples": record.evaluated_examples,
        "evaluated_clients": record.evaluated_clients,
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
        "traffic": traffic_dict(record),
        "seconds": round(record.seconds, 4),
        "slowest_training_seconds": round(record.slowest_training_seconds, 4),
    }


def traffic_dict(record: RoundRecord) -> dict[str, dict[str, int]]:
    """What a round has moved, by client."""
    return {client: {"bytes_up": up, "bytes_down": down} for client, (up, down) in sorted(record.traffic.items())}


def run_dict(view: RunView) -> dict[str, Any]:
    """One run."""
    return {
        "run": view.run,
        "name": view.name,
        "phase": view.phase,
        "round": view.round,
        "rounds": view.rounds,
        "attempt": view.attempt,
        "cohort": list(view.cohort),
        "pending": list(view.pending),
        "reason": view.reason,
        "deadline_s": None if view.deadline_s is None else round(view.deadline_s, 1),
        "tasks": [task_dict(task) for task in view.tasks],
        "bytes_up": view.bytes_up,
        "bytes_down": view.bytes_down,
        "seconds": round(view.seconds, 3),
        "ended": view.ended,
        "metrics": dict(view.metrics),
        "history": [round_dict(record) for record in view.history],
    }


def task_dict(task: TaskView) -> dict[str, Any]:
    """One client's task under way; `stage` is null until the client has said anything of it."""
    progress = task.progress
    return {
        "client": task.client,
        "round": task.round,
        "stage": None if progress is None else progress.stage.name.lower(),
        "done": None if progress is None else progress.done,
        "total": None if progress is None else progress.total,
        "epoch": None if progress is None else progress.epoch,
        "loss": None if progress is None else progress.loss,
        "silent_s": round(task.silent_s, 1),
        "connected": task.connected,
    }


def client_dict(view: ClientView) -> dict[str, Any]:
    """One client."""
    return {
        "client": view.client,
        "connected": view.connected,
        "seconds": round(view.seconds, 1),
        "task": view.task,
        "software": view.software,
        "revoked": view.revoked,
        **({} if view.schema is None else view.schema.model_dump()),
    }


def entry_dict(entry: AuditEntry) -> dict[str, Any]:
    """One entry of the audit log."""
    when = datetime.datetime.fromtimestamp(entry.at, datetime.UTC).isoformat(timespec="milliseconds")
    body = json.loads(entry.body)
    return {"number": entry.number, "at": when, "kind": entry.kind, "body": body, "digest": entry.digest.hex()}


def entry_line(entry: AuditEntry) -> str:
    """The same for people, in one line, whatever it quotes."""
    when = datetime.datetime.fromtimestamp(entry.at, datetime.UTC).isoformat(sep=" ", timespec="seconds")
    said = (f"{name}={json.dumps(value, ensure_ascii=True)}" for name, value in json.loads(entry.body).items())
    return f"{entry.number:6} {when[:19]} {clean(entry.kind, 32):<9} {' '.join(said)}"


def size(count: int) -> str:
    """Bytes as people read them.

    >>> size(999), size(2_115_000)
    ('999 B', '2.1 MB')
    """
    number, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number /= 1000
    return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"


def runs_table(views: Iterable[RunView]) -> Group:
    """A row a run; beneath, in whole lines however narrow the terminal, why each stands where it does."""
    table = Table(
        *(Column("run", min_width=16, no_wrap=True), "name", Column("phase", min_width=10), "round"),
        *(Column("metrics", no_wrap=True), Column("moved", no_wrap=True), "seconds"),
    )
    reasons = []
    for view in views:
        table.add_row(
            view.run,
            view.name,
            view.phase,
            f"{view.round}/{view.rounds}",
            "\n".join(told(view.metrics, main_metrics(view.spec))),
            f"{size(view.bytes_up)} up\n{size(view.bytes_down)} down",
            f"{view.seconds:.1f}",
        )
        if view.phase != "finished":
            # As Text, not markup: it may quote what a client said.
            reasons.append(Text(f"{view.run} ({view.name}): {view.reason}", overflow="fold"))
    return Group(table, *reasons)


def clients_table(views: Iterable[ClientView]) -> Table:
    table = Table("client", "state", "since", "examples", "validation", "features", "task")
    for view in views:
        schema = view.schema
        told = ("-", "-", "-")
        if schema is not None:
            told = (str(schema.examples), str(schema.validation_examples), str(schema.features))
        state = "revoked" if view.revoked else "connected" if view.connected else "away"
        table.add_row(view.client, state, f"{view.seconds:.0f} s", *told, view.task or "-")
    return table


def told(found: Mapping[str, float], metrics: Iterable[str]) -> list[str]:
    """These metrics in words, those that there are.

    >>> told({"loss": 0.25, "accuracy": 0.75, "macro_f1": 0.5}, ("loss", "accuracy", "auroc"))
    ['loss 0.25', 'accuracy 0.75']
    """
    return [f"{name} {found[name]:.4g}" for name in metrics if name in found]


def columns(metrics: Sequence[str]) -> tuple[str, ...]:
    """The heads of `round_row`."""
    return ("round", "phase", "clients", *metrics, "bytes", "seconds")


def round_row(record: RoundRecord, metrics: Sequence[str]) -> tuple[str, ...]:
    """A finished round with these metrics; they are '-' where the round was not evaluated."""
    found = record.evaluation
    return (
        str(record.round),
        "done",
        f"{len(record.folded)}/{len(record.cohort)}",
        *(f"{found[name]:.4f}" if name in found else "-" for name in metrics),
        size(record.bytes_up + record.bytes_down),
        f"{record.seconds:.2f}",
    )


def span(seconds: float) -> str:
    """A time as people read it.

    >>> span(59.4), span(600), span(9000)
    ('59 s', '10 min', '2.5 h')
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


def progress_table(view: RunView, rounds: list[RoundRecord], last: int = 15) -> Table:
    """The run under way: its newest finished rounds, and the one that is being worked on."""
    metrics = main_metrics(view.spec)
    ends = "" if view.deadline_s is None else f", deadline in {span(view.deadline_s)}"
    title = Text(f"run {view.run} ({view.name}): {view.phase}{ends}")
    table = Table(*columns(metrics), title=title, caption=Text(view.reason))
    for record in rounds[-last:]:
        table.add_row(*round_row(record, metrics))
    if not view.ended:
        answered = len(view.cohort) - len(view.pending)
        blank = [""] * (len(metrics) + 2)
        table.add_row(str(view.round), view.phase, f"{answered}/{len(view.cohort)}", *blank, style="dim")
    return table


def tasks_table(view: RunView, most: int = 12) -> Group:
    """The clients at work, those first that the others may have to wait for, and how many more there are."""
    table = Table("client", "at", "done", "epoch", "loss", "silent for")
    ranked = sorted(view.tasks, key=_holding_up)
    for task in ranked[:most]:
        table.add_row(*_task_row(task, view.round))
    more = len(ranked) - most
    return Group(table, *([Text(f"and {more:,} more")] if more > 0 else []))


def traffic_table(last: RoundRecord, moved: Mapping[str, tuple[int, int]], most: int = 12) -> Group:
    """Bytes by client, in the last finished round and in all of them (`moved`), up and down; those with the most first."""
    table = Table("client", "up", "down", "up, all rounds", "down, all rounds")
    ranked = sorted(moved.items(), key=lambda one: (-sum(one[1]), one[0]))
    for client, whole in ranked[:most]:
        table.add_row(Text(client), *map(size, (*last.traffic.get(client, (0, 0)), *whole)))
    more = len(ranked) - most
    return Group(table, *([Text(f"and {more:,} more")] if more > 0 else []))


def live(view: RunView, rounds: list[RoundRecord], moved: Mapping[str, tuple[int, int]]) -> Group:
    """All that there is to see of a run under way; moved: bytes up and down by client, in all of its rounds."""
    parts: list[Table | Group] = [progress_table(view, rounds)]
    if view.tasks:
        parts.append(tasks_table(view))
    if moved:
        parts.append(traffic_table(rounds[-1], moved))
    return Group(*parts)


def _holding_up(task: TaskView) -> tuple[bool, float, int, float, str]:
    """Sorts who is away first, then who is silent, the longest first, then who has the most still to do."""
    silent = -task.silent_s if task.silent_s >= QUIET_S else 0.0
    progress = task.progress
    if progress is None:
        return task.connected, silent, -1, 0.0, task.client
    return task.connected, silent, list(Stage).index(progress.stage), _share(progress), task.client


def _share(progress: Progress) -> float:
    return progress.done / progress.total if progress.total else 0.0


def _task_row(task: TaskView, round_: int) -> tuple[Text, ...]:
    progress = task.progress
    at = "asked" if progress is None else progress.stage.value
    late = "" if task.round == round_ else f" (round {task.round})"
    cells = (
        task.client,
        f"{at}{late}" if task.connected else f"away; was {at}{late}",
        f"{_share(progress):.0%}" if progress is not None and progress.total else "-",
        str(progress.epoch) if progress is not None and progress.epoch else "-",
        f"{progress.loss:.4g}" if progress is not None and progress.loss is not None else "-",
        span(task.silent_s) if task.silent_s >= 1 else "-",
    )
    return tuple(Text(cell) for cell in cells)
