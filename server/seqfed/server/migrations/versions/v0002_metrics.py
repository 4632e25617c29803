"""Rounds keep the metrics of their evaluation and its spread over the clients, no longer the sums of loss and hits."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

RUNS = sa.table("runs", sa.column("number"), sa.column("state"))
ROUNDS = sa.table("rounds", sa.column("run"), sa.column("round"), sa.column("record"))
NEW_IN_STATES: dict[str, list[Any]] = {"scores": [], "newest": []}
NEW_IN_RECORDS = ("spread", "evaluated_examples", "evaluated_clients")


def upgrade() -> None:
    _rewrite(RUNS, ("number",), "state", lambda state: {**state, **NEW_IN_STATES})
    _rewrite(ROUNDS, ("run", "round"), "record", _with_metrics)


def downgrade() -> None:
    # The sums are gone: an older version shows these rounds as not evaluated.
    _rewrite(RUNS, ("number",), "state", lambda state: _without(state, NEW_IN_STATES))
    _rewrite(ROUNDS, ("run", "round"), "record", lambda one: {**_without(one, NEW_IN_RECORDS), "evaluation": {}})


def _with_metrics(record: dict[str, Any]) -> dict[str, Any]:
    sums = record["evaluation"]
    examples = sums.get("examples", 0)
    metrics = {}
    if examples and "loss" in sums:
        metrics["loss"] = sums["loss"] / (1 << 20) / examples
    if examples and "correct" in sums:
        metrics["accuracy"] = sums["correct"] / examples
    added = {"spread": {}, "evaluated_examples": examples, "evaluated_clients": 0}
    return {**record, "evaluation": metrics, **added}


def _without(fields: dict[str, Any], names: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _rewrite(table: sa.TableClause, key: tuple[str, ...], column: str, change: Callable[[Any], Any]) -> None:
    connection = op.get_bind()
    for row in connection.execute(sa.select(table)).mappings().all():
        changed = json.dumps(change(json.loads(row[column])))
        this = [table.c[name] == row[name] for name in key]
        connection.execute(table.update().where(*this).values({column: changed}))
