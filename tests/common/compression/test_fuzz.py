"""Payloads with mutations, as `benchmarks.fuzz` feeds them: done or refused by name."""

from __future__ import annotations

import contextlib
import random

import pytest
from benchmarks.fuzz import mutated
from benchmarks.targets import WORDS, read_payload, seeds

from seqfed.common.compression import NAMES
from seqfed.common.errors import SeqfedError


@pytest.mark.parametrize("name", NAMES)
def test_good_payloads_are_decoded_and_changed_ones_decoded_or_refused(name: str) -> None:
    found = [data for codec, data in seeds("payload").items() if codec.removesuffix("-whole") == name]
    assert len(found) == 2
    for data in found:
        read_payload(data)
    draw = random.Random(5)  # noqa: S311 - not a secret
    for _ in range(400):
        with contextlib.suppress(SeqfedError):
            read_payload(mutated(draw, found, WORDS["payload"]))
