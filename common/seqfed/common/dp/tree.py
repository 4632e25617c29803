"""Noise for the sums of rounds 1 to t, for every t, from a tree of them: DP-FTRL (Kairouz et al. 2021, "Practical and private
(deep) learning without sampling or shuffling"; the tree: Dwork et al. 2010, Chan et al. 2011).

The model after round t is the first one plus the sum of all changes, with noise N_t on it. N_t is the sum of the noise of
the nodes of t's binary decomposition: [1, 4], [5, 6], [7, 7] for t = 7. So each change gets N_t - N_(t-1) beside it: new noise
for the one node that ends with t, and the nodes inside that one are taken away. Which clients take part in which round may be
anybody's choice: no privacy is claimed of it.

Nothing is stored but the run's secret key, of which each node's noise is derived anew.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from seqfed.common.dp.noise import Law, derived
from seqfed.common.dp.noise import add as add_noise

Node = tuple[int, int]  # (level, index): the rounds from index 2^level + 1 to (index + 1) 2^level


def nodes(round_: int) -> tuple[Node, ...]:
    """The nodes whose rounds together are 1 to round_, the largest first.

    >>> nodes(7), nodes(0)
    (((2, 0), (1, 2), (0, 6)), ())
    """
    levels = range(round_.bit_length() - 1, -1, -1)
    return tuple((level, (round_ >> level) - 1) for level in levels if round_ >> level & 1)


def add(out: NDArray[Any], law: Law, key: bytes, round_: int, workers: int = 1) -> None:
    """out += N_t - N_(t-1) for t = round_, from 1, of nodes' noise by this law; in place, as in `noise.add`."""
    before = nodes(round_ - 1)
    after = nodes(round_)
    for node in set(before) ^ set(after):
        add_noise(out, law, derived(key, "tree", *node), negative=node in before, workers=workers)
