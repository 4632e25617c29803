"""Runs, rounds and clients as people and programs read them: rich tables, and plain dictionaries for JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from seqfed.common.metrics import summary
from seqfed.common.views import ClientView, RoundRecord, RunView


def round_dict(record: RoundRecord) -> dict[str, Any]:
    """One finished round; `training_loss` is the clients' while training, the rest is the evaluation of the new model."""
    return {
        "round": record.round,
        "attempt": record.attempt,
        "cohort": list(record.cohort),
        "folded": list(record.folded),
        "training_loss": summary(record.training).get("loss"),
        **summary(record.evaluation),
        "evaluated_examples": record.evaluation.get("examples", 0),
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
        "seconds": round(record.seconds, 4),
        "slowest_training_seconds": round(record.slowest_training_seconds, 4),
    }


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
        "bytes_up": view.bytes_up,
        "bytes_down": view.bytes_down,
        "seconds": round(view.seconds, 3),
        "ended": view.ended,
        "history": [round_dict(record) for record in view.history],
    }


def client_dict(view: ClientView) -> dict[str, Any]:
    """One client."""
    return {
        "client": view.client,
        "connected": view.connected,
        "seconds": round(view.seconds, 1),
        "task": view.task,
        "software": view.software,
        **view.schema.model_dump(),
    }


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


def runs_table(views: Iterable[RunView]) -> Table:
    table = Table(
        Column("run", min_width=16), "name", Column("phase", min_width=10), "round", "up", "down", "seconds", "why"
    )
    for view in views:
        table.add_row(
            view.run,
            view.name,
            view.phase,
            f"{view.round}/{view.rounds}",
            size(view.bytes_up),
            size(view.bytes_down),
            f"{view.seconds:.1f}",
            Text(view.reason),  # not markup: it may quote what a client said
        )
    return table


def clients_table(views: Iterable[ClientView]) -> Table:
    table = Table("client", "state", "since", "examples", "validation", "features", "task")
    for view in views:
        table.add_row(
            view.client,
            "connected" if view.connected else "away",
            f"{view.seconds:.0f} s",
            str(view.schema.examples),
            str(view.schema.validation_examples),
            str(view.schema.features),
            view.task or "-",
        )
    return table


COLUMNS = ("round", "phase", "clients", "loss", "accuracy", "bytes", "seconds")


def round_row(record: RoundRecord) -> tuple[str, ...]:
    """A finished round under COLUMNS; loss and accuracy are '-' where the round was not evaluated."""
    found = summary(record.evaluation)
    return (
        str(record.round),
        "done",
        f"{len(record.folded)}/{len(record.cohort)}",
        f"{found['loss']:.4f}" if "loss" in found else "-",
        f"{found['accuracy']:.4f}" if "accuracy" in found else "-",
        size(record.bytes_up + record.bytes_down),
        f"{record.seconds:.2f}",
    )


def progress_table(view: RunView, rounds: list[RoundRecord], last: int = 15) -> Table:
    """The run under way: its newest finished rounds, and the one that is being worked on."""
    table = Table(*COLUMNS, title=f"run {view.run} ({view.name}): {view.phase}", caption=Text(view.reason))
    for record in rounds[-last:]:
        table.add_row(*round_row(record))
    if not view.ended:
        answered = len(view.cohort) - len(view.pending)
        table.add_row(str(view.round), view.phase, f"{answered}/{len(view.cohort)}", "", "", "", "", style="dim")
    return table
