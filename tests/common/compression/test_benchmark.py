"""The benchmark's learning rate and clip: trained with, and told apart in what is measured already."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from benchmarks.compression import CLIP, COHORT, RATE, WAYS, State, Texts, _measured, spec_of

from seqfed.common.layout import Layout
from seqfed.common.seeds import generator

TEXTS = Texts([np.ones(200, np.int32)], np.ones(200, np.int32), 40)


def test_the_rate_is_the_settings() -> None:
    assert spec_of(TEXTS, 3, 1).training.learning_rate == RATE
    assert spec_of(TEXTS, 3, 1, 0.08).training.learning_rate == 0.08


def test_figures_of_another_rate_or_clip_are_not_taken_for_these(tmp_path: Path) -> None:
    out, same = tmp_path / "out.jsonl", {"rounds": 80, "text": "generated", "lr": 0.08, "clip": 12.0}
    others = [{**same, "lr": RATE}, {**same, "clip": CLIP}, {**same, "text": "shakespeare"}]
    lines = [{"codec": "none", "seed": 1, "ce": float(nth), **one} for nth, one in enumerate([*others, same, *others])]
    out.write_text("".join(json.dumps(one) + "\n" for one in lines))
    ((pair, found),) = _measured([("none", 1)], None, same, out)
    assert pair == ("none", 1)
    assert found["ce"] == 3.0


def test_masked_updates_are_shortened_to_the_clip() -> None:
    layout = Layout((("w", (1 << 12,)),))
    updates = [generator(1, nth).standard_normal(layout.size, np.float32) for nth in range(COHORT)]  # 64 long
    lengths = {}
    for clip in (8.0, 32.0):
        mean = WAYS["rotq8-masked"].up(range(COHORT), updates, layout, 1, 1, State(clip))
        lengths[clip] = float(np.linalg.norm(mean.update))
    assert 3.5 < lengths[32.0] / lengths[8.0] < 4.5
