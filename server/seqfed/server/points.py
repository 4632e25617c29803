"""Named points of a round at which a test kills the daemon. Nothing but tests sets the hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

NAMES: Final = (
    "update-placed",  # its file is in its place, no row names it yet
    "update-committed",
    "asked",  # the cohort is committed, no task has gone out
    "folded",
    "model-written",  # its file is in its place, no row names it yet
    "model-committed",
    "evaluation-committed",
    "round-closed",
)

hook: Callable[[str], None] | None = None


def reached(name: str) -> None:
    """The work has come to this point."""
    if hook is not None:
        hook(name)
