"""What several files of these tests need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("seqfed", deadline=None, max_examples=50)  # a busy machine is no failure
settings.load_profile("seqfed")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread: bits are compared, and other tests want the other core."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
