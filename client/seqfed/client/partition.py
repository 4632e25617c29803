"""Splitting one data set among clients for trying things: evenly, by label, by a column, by size; pure and seeded.

Each function deals units (sequences, rows, or whole entities) to clients: client i gets the units at the indices of the i-th
array, in rising order; every unit goes to exactly one client, and no client goes without.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from seqfed.common.errors import DataError

Rows = NDArray[np.int64]

TRIES = 1000  # draws before giving up on shares in which nobody has too little


def iid(size: int, clients: int, draw: np.random.Generator) -> list[Rows]:
    """A random split into parts that differ in size by at most one; raises DataError if there are too few rows."""
    _require(size, clients)
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


def by_key(keys: NDArray[np.int64], clients: int, draw: np.random.Generator) -> list[Rows]:
    """All units of one key (a hospital, a region, a speaker) to one client; several keys to one where there are more.

    The largest keys are dealt first, each to the client that has least so far, so that sizes come out as even as whole keys
    allow (Graham 1969, "Bounds on multiprocessing timing anomalies"); the draw settles ties and the clients' order.
    Raises DataError if there are fewer keys than clients.
    """
    codes, sizes = np.unique(keys, return_inverse=True, return_counts=True)[1:]
    if len(sizes) < clients:
        raise DataError(f"{len(sizes)} different values cannot be split among {clients} clients; use fewer clients")
    owner = np.empty(len(sizes), np.int64)
    least = [(0, int(client)) for client in draw.permutation(clients)]
    heapq.heapify(least)
    shuffled = draw.permutation(len(sizes))
    for key in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        size, client = heapq.heappop(least)
        owner[key] = client
        heapq.heappush(least, (size + int(sizes[key]), client))
    return [np.flatnonzero(owner[codes] == client) for client in range(clients)]


def by_size(size: int, clients: int, exponent: float, draw: np.random.Generator) -> list[Rows]:
    """Random units, but unevenly many: the k-th largest client's share is as k^-exponent (a power law; 0 is even).

    Each client has one at least. Raises DataError if there are too few units.
    """
    _require(size, clients)
    shares = np.arange(1, clients + 1, dtype=np.float64) ** -exponent
    cuts = np.round(np.cumsum(shares)[:-1] / shares.sum() * (size - clients)).astype(np.int64)
    order = draw.permutation(size)
    parts = np.split(order[clients:], cuts)  # the first units are everybody's own one
    return [np.sort(np.append(parts[place], order[place])) for place in draw.permutation(clients)]


def _require(size: int, clients: int) -> None:
    if size < clients:
        raise DataError(f"{size} sequences cannot be split among {clients} clients")
