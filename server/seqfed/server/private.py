"""The arithmetic of a round with central differential privacy: DP-FedAvg (McMahan et al. 2018, "Learning differentially private
recurrent language models"), its model being the old one plus

    (sum of the updates, each clipped to C, + noise of deviation z C) / target,

with a target that was fixed before the round: how many did answer is then no part of the sum's scale. Instead of fresh noise, a
tree's (`seqfed.common.dp.tree`). The noise is added to the whole numbers that the sum is of, in units of 2^-30, or of the step of
a masked sum, so that no floating point tells what is under it.

C may follow the median of the norms (Andrew et al. 2021, "Differentially private learning with adaptive clipping").
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from seqfed.common.dp import noise, skellam, tree
from seqfed.common.dp.skellam import Mechanism
from seqfed.common.errors import MaskingFailed
from seqfed.common.fixedpoint import SCALE
from seqfed.common.layout import Flat
from seqfed.server.fedavg import WeightedSum

ROUNDED: Final = 1 + 2.0**-20  # by how much a clipped update may be too long, of floating point: 1e-7 were seen
COUNTED: Final = (
    20  # the clipped are counted with a deviation of one in so many of the cohort (Andrew et al. 2021, 3.1)
)
PACE: Final = 0.2  # of the clip's logarithm, a round, if all are on one side (the same, 3.2)
LOWEST, HIGHEST = 1e-6, 1e6  # of a clip


def noise_sum(
    sum_: WeightedSum,
    clip: float,
    multiplier: float,
    target: int,
    key: bytes,
    *,
    tree_round: int | None = None,
    workers: int = 1,
) -> None:
    """Add the noise, and divide by `target` from now on; in place, and once only.

    sum_: of updates with weight 1, each times `fedavg.shrink` of its norm and `clip`. key: fresh (`noise.fresh_key`); with
    tree_round, which is the round from 1, the run's secret one. Raises ValueError if the noise does not fit the sum's numbers.
    """
    if sum_.weight == 0:
        sum_.total[:] = 0
    # the sum's numbers are each update's, rounded to whole ones
    bound = clip * ROUNDED * SCALE + math.sqrt(len(sum_.total)) / 2
    _add(sum_.total, multiplier * bound, key, tree_round, workers)
    sum_.weight = target


def decode(
    total: NDArray[np.unsignedinteger[Any]],
    mechanism: Mechanism,
    seed: int,
    *,
    clients: int,
    target: int,
    multiplier: float,
    key: bytes,
    tree_round: int | None = None,
    workers: int = 1,
) -> Flat:
    """The sum of a round's updates with noise, divided by `target`, of the opened sum of `skellam.encode(..., noisy=False)`.

    `total` gets the noise in place. mechanism: `masking.agreed.mechanism_of`. The rest as in noise_sum and `skellam.decode`.
    Raises MaskingFailed, which says no number of the sum: a tree's noise is the same at the next try. A sum that ends so is spent
    like another, since that it did is seen.
    """
    _add(total, multiplier * mechanism.bound2, key, tree_round, workers)
    try:
        return skellam.decode(total, mechanism, seed, clients=clients, target=target)
    except MaskingFailed:
        raise MaskingFailed(
            f"the sum of {clients:,} updates is longer than those of clients that keep to the settings and its noise can be: a "
            "client sent something else"
        ) from None


def vector_multiplier(multiplier: float, target: int) -> float:
    """The sum's noise multiplier where the clipped are counted too, so that both together are worth `multiplier`.

    (z^-2 - (2 sigma_b)^-2)^(-1/2) with sigma_b = target / 20 (Andrew et al. 2021, theorem 1). Raises ValueError if the count
    alone spends more.

    >>> round(vector_multiplier(1.0, 100), 4)
    1.005
    """
    left = multiplier**-2 - (2 * target / COUNTED) ** -2
    if left <= 0:
        raise ValueError(
            f"counting the clipped of {target} clients with a deviation of {target / COUNTED:g} spends more than a noise "
            f"multiplier of {multiplier:g} allows; it takes {math.floor(multiplier * COUNTED / 2) + 1} clients"
        )
    return float(left**-0.5)


def next_clip(clip: float, within: int, clients: int, target: int, key: bytes) -> float:
    """The next round's clip: exp(-0.2 (share - 1/2)) times this one, for the share of updates that were not longer.

    within: how many of the `clients` in the sum were not longer than `clip`. key: fresh.
    """
    count = np.array([within - clients / 2], np.float32)
    share = float(noise.released(count, target / COUNTED, key)[0]) / target
    return min(max(clip * math.exp(-PACE * share), LOWEST), HIGHEST)


def _add(out: NDArray[Any], std: float, key: bytes, tree_round: int | None, workers: int) -> None:
    law = noise.gaussian(std)
    if tree_round is None:
        noise.add(out, law, key, workers=workers)
    else:
        tree.add(out, law, key, tree_round, workers)
