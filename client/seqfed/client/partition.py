"""Splitting one data set among clients for trying things: evenly, or unevenly by label as Dirichlet shares; always seeded."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from seqfed.common.errors import DataError

Rows = NDArray[np.int64]

TRIES = 1000  # draws before giving up on shares in which nobody has too little


def iid(size: int, clients: int, draw: np.random.Generator) -> list[Rows]:
    """A random split into parts that differ in size by at most one; raises DataError if there are too few rows."""
    if size < clients:
        raise DataError(f"{size} sequences cannot be split among {clients} clients")
    return [np.sort(part) for part in np.array_split(draw.permutation(size), clients)]


def dirichlet(
    labels: NDArray[np.int64], clients: int, alpha: float, draw: np.random.Generator, smallest: int = 10
) -> list[Rows]:
    """Each label's rows split in shares drawn from Dirichlet(alpha, ..., alpha): the smaller alpha, the more uneven.

    Drawn anew until every client has `smallest` rows. Raises DataError if that does not come about. (Hsu, Qi, Brown
    2019, "Measuring the effects of non-identical data distribution", section 3.)
    """
    if len(labels) >= clients * smallest:
        for _ in range(TRIES):
            parts: list[list[Rows]] = [[] for _ in range(clients)]
            for label in np.unique(labels):
                rows = draw.permutation(np.flatnonzero(labels == label))
                cuts = np.round(np.cumsum(draw.dirichlet(np.full(clients, alpha)))[:-1] * len(rows)).astype(np.int64)
                for part, piece in zip(parts, np.split(rows, cuts), strict=True):
                    part.append(piece)
            if all(sum(map(len, part)) >= smallest for part in parts):
                return [np.sort(np.concatenate(part)) for part in parts]
    raise DataError(
        f"{len(labels)} sequences do not split among {clients} clients with Dirichlet({alpha:g}) and at least {smallest} "
        "for each; use fewer clients, a larger alpha, or an even split"
    )
