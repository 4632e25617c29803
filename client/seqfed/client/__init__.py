"""The data holder's process, which trains on data that never leave it, and the operator's commands."""

from __future__ import annotations

import importlib.metadata

__version__ = importlib.metadata.version("seqfed")
