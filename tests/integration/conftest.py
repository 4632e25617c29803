"""Fixtures: a cluster of real processes, stopped at the end of the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.cluster import Cluster

from seqfed.client.demo.processes import processes


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A running server without clients."""
    with processes(tmp_path / "logs") as started:
        found = Cluster(tmp_path, started)
        found.start_server()
        yield found
