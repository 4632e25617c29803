"""Log lines on standard error, for every long-lived process alike."""

from __future__ import annotations

import logging


def set_up() -> None:
    """Time, level, name, message."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
