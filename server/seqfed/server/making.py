"""How a round's model is made: updates are folded into a sum, a private run's noise is added, and the mean changes the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from seqfed.common.checkpoint import PIECE_BYTES
from seqfed.common.dp import accounting, noise
from seqfed.common.layout import Flat
from seqfed.server import fedavg, private
from seqfed.server.live import Live
from seqfed.server.payloads import packing_of
from seqfed.server.round import Run
from seqfed.server.store import UpdateRow


def fold(live: Live, updates: Iterable[tuple[UpdateRow, Path]]) -> None:
    """Add these updates, each from its file, to the run's sum.

    Nothing but the files decides what is added, so what a restart folds again comes out the same.
    """
    assert live.sum is not None
    bound = clip_of(live)
    for update, path in updates:
        packing = packing_of(live.spec, live.layout, live.run, update.base, update.client, path)
        numbers = _numbers if packing is None else packing.parts
        scale = 1.0 if bound is None else fedavg.shrink(fedavg.norm(numbers(path)), bound)
        if scale < 1.0:
            live.log(update.client).info("its update is scaled down to %.3g of itself", scale)
        live.within += scale == 1.0
        scale *= live.staleness(live.state.round - update.base)
        fedavg.fold(live.sum, live.weight(update.weight), numbers(path), scale)


def clip_of(live: Live) -> float | None:
    """The norm that an update has at most in the run's sum; None if it may be any."""
    dp = live.spec.privacy.dp
    if dp is None or dp.mode != "central":
        return live.spec.aggregation.clips_at
    return live.state.clip or dp.first_clip


def parts(live: Live) -> Iterator[Flat]:
    """The next model in parts, from the one before and the round's sum; the sum is then of no more use."""
    old = (np.frombuffer(piece, "<f4") for piece in live.model.pieces())
    if live.spec.privacy.secure_aggregation:
        assert live.masked is not None
        assert live.masked.change is not None
        return applied(old, live.masked.change)
    assert live.sum is not None
    dp = live.spec.privacy.dp
    if dp is not None and dp.mode == "central":
        target, clip = denominator(live), clip_of(live)
        multiplier = accounting.noise_multiplier(live.spec)
        assert multiplier is not None
        assert clip is not None
        if dp.clip == "adaptive":
            multiplier = private.vector_multiplier(multiplier, target)
            following = private.next_clip(clip, live.within, live.sum.weight, target, noise.fresh_key())
            live.next_clip = min(following, accounting.LOUDEST / multiplier)
        key, tree_round = noise_of(live.state, tree=dp.mechanism == "ftrl")
        private.noise_sum(live.sum, clip, multiplier, target, key, tree_round=tree_round)
    return fedavg.finish(live.sum, old)


def denominator(live: Live) -> int:
    """What a private run's sum is divided by: fixed before anybody answers, and never less than was planned with."""
    planned = accounting.clients_of(live.spec)
    return planned if accounting.rate(live.spec) < 1 else max(planned, live.state.target)


def noise_of(run: Run, *, tree: bool) -> tuple[bytes, int | None]:
    """The key of this round's noise; with the round, if the noise is a tree's, whose key is the run's."""
    return (bytes.fromhex(run.secret), run.round) if tree else (noise.fresh_key(), None)


def applied(model: Iterator[Flat], change: Flat) -> Iterator[Flat]:
    """The model plus the change, in the model's parts."""
    start = 0
    for part in model:
        yield part + change[start : start + len(part)]
        start += len(part)


def _numbers(path: Path) -> Iterator[Flat]:
    """A complete update's numbers from its file, in parts."""
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            yield np.frombuffer(piece, "<f4")
