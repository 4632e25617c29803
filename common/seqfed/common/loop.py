"""The event loop of the long-lived processes: uvloop's, a sixth quicker a round than asyncio's own, where there is one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


def run(main: Coroutine[Any, Any, None]) -> None:
    """As asyncio.run."""
    try:
        import uvloop
    except ImportError:  # it does not exist for Windows
        asyncio.run(main)
    else:
        uvloop.run(main)
