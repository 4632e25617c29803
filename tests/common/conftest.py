"""Property tests of this folder: fewer cases than by default, and no clock."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("seqfed", deadline=None, max_examples=50)  # a busy machine is no failure
settings.load_profile("seqfed")
