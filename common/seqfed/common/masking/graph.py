"""Who shares secrets with whom in a masked sum, and how many shares open a secret (Bell et al. 2020, section 3).

Up to 128 clients everybody shares with everybody. Beyond, each client has k neighbours, found by the roster's hash, so that no
single party chooses them and all compute the same; a client's work grows with k, hardly with the number of clients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, islice
from typing import Final

import numpy as np

from seqfed.common.masking.keys import derive
from seqfed.common.masking.prg import add_masks

COMPLETE: Final = 128  # clients up to whom everybody is everybody's neighbour
COLLUDING: Final = 0.2  # share of the clients that may tell the server all they know
PRIVACY: Final = 40  # a secret is open to the server and colluding clients with a chance of at most 2^-40
GROUND: Final = 80  # and of 2^-80 where the server can try rosters until it likes the graph
FAILURE: Final = 20  # a sum fails, though no more than the expected clients leave, with a chance of at most 2^-20
POINT: Final = 256  # bits of the likeliest chance: integers, so that all machines find the same
FINE: Final = 128  # every even k up to twice as many is looked at; beyond, only in steps of a 64th
TRIES: Final = 64  # of a draw whose chance is a quarter or more


@lru_cache(maxsize=1024)
def parameters(n: int, malicious: bool, drop: float) -> tuple[int, int]:
    """The number of neighbours k and the threshold t for n clients.

    A secret's shares are held by its owner and k neighbours, and t of them open it. Complete graph: k = n - 1, and t more than
    half of the n, or more than two thirds against a lying server. Otherwise the smallest even k for which some t does (above 256,
    to a 64th of its size), and the smallest such t, where of the n clients a fifth collude and the share `drop` leaves, and the k
    neighbours of one client are a random draw from the n - 1 others:

    - privacy, semi-honest: n P[colluding neighbours >= t] <= 2^-40, and 2 t > k + 1;
    - privacy, malicious: n P[colluding neighbours >= 2 t - k] <= 2^-80, and 3 t > 2 (k + 1). With x colluding neighbours, x
      shares of both of a client's secrets are known; the k - x honest ones give a share of one secret each, so both open only
      if k - x >= 2 (t - x). (That they give shares of different secrets of one client at all needs two sets of survivors with
      two thirds of all signatures each; so this is the second line of defence.);
    - failure: n P[neighbours that stay < t] <= 2^-20.

    Where that takes more than half of the others as neighbours, or nothing does, the graph is complete.
    """
    if n < 2:
        raise ValueError(f"a masked sum of {n} clients hides nothing; it needs 2 or more")
    if n > COMPLETE:
        colluding, leaving = math.floor(n * COLLUDING), math.ceil(n * drop)
        k = 2
        while k <= (n - 1) // 2:
            known = _unlikely(_chances(n - 1, colluding, k), n, GROUND if malicious else PRIVACY)
            enough, majority = (-(-(k + known) // 2), 2 * (k + 1) // 3) if malicious else (known, (k + 1) // 2)
            t = max(enough, majority + 1)
            # fewer than t stay if more than k - t leave
            if t <= k and _unlikely(_chances(n - 1, leaving, k), n, FAILURE) <= k - t + 1:
                return k, t
            k += max(k // FINE * 2, 2)
    return n - 1, (2 * n // 3 if malicious else n // 2) + 1


def _chances(others: int, marked: int, k: int) -> list[int]:
    """P[x of k are marked] for x = 0..k, of k drawn from the others (hypergeometric), all in one unit that goes unsaid.

    From the likeliest x outwards, by the quotient of one chance and the next.
    """
    low, high = max(0, k - (others - marked)), min(k, marked)
    middle = min(max((k + 1) * (marked + 1) // (others + 2), low), high)
    found = [0] * (k + 1)
    found[middle] = 1 << POINT
    for x in range(middle, high):
        found[x + 1] = found[x] * (marked - x) * (k - x) // ((x + 1) * (others - marked - k + x + 1))
    for x in range(middle, low, -1):
        found[x - 1] = found[x] * x * (others - marked - k + x) // ((marked - x + 1) * (k - x + 1))
    return found


def _unlikely(chances: Sequence[int], times: int, bits: int) -> int:
    """The smallest x for which times P[x or more] <= 2^-bits; it may be one beyond the chances there are."""
    whole = sum(chances)
    tails = accumulate(reversed(chances))
    return len(chances) - sum((times * tail) << bits <= whole for tail in tails)


def neighbours(n: int, k: int, roster_hash: bytes) -> tuple[tuple[int, ...], ...]:
    """The neighbours of each of n clients, in ascending order; the clients are numbered by their places in the sorted roster.

    Everybody if k >= n - 1, else the union of k / 2 Hamiltonian cycles without a common edge, drawn by a keystream of the
    roster's hash. Raises ValueError if k is odd, or more than half of the others but not all.
    """
    if k >= n - 1:
        return tuple(tuple(other for other in range(n) if other != one) for one in range(n))
    if k % 2 or not 2 <= k <= (n - 1) // 2:
        raise ValueError(f"{k} neighbours for each of {n} clients; it must be even and 2 to {(n - 1) // 2}, or {n - 1}")
    found: list[set[int]] = [set() for _ in range(n)]
    numbers = _numbers(derive(roster_hash, b"", "graph"), n)
    for _ in range(k // 2):
        order = _cycle(found, numbers)
        for one, other in zip(order, [*order[1:], order[0]], strict=True):
            found[one].add(other)
            found[other].add(one)
    return tuple(tuple(sorted(one)) for one in found)


def _numbers(key: bytes, n: int) -> Iterator[list[int]]:
    """The keystream's numbers of 64 bits, n at a time."""
    start = 0
    while True:
        found = np.zeros(n, np.uint64)
        add_masks(found, [key], [], start)
        yield found.tolist()
        start += n


def _cycle(taken: list[set[int]], numbers: Iterator[list[int]]) -> list[int]:
    """A random cycle through all clients without an edge that is taken.

    A random order first. Then, from its beginning, a taken edge goes by turning round the stretch after it, up to a place drawn
    at random, if neither of the two new edges is taken. What finds no such place, near the end, is in the middle next.
    """
    n = len(taken)
    while True:
        order = sorted(range(n), key=next(numbers).__getitem__)
        draws = (draw for batch in numbers for draw in batch)
        for _ in range(2):
            for at in range(n):
                before = order[at - 1]
                if order[at] not in taken[before]:
                    continue
                for draw in islice(draws, TRIES):
                    to = at + 1 + draw % max(n - 1 - at, 1)
                    if (
                        to < n - (at == 0)
                        and order[to] not in taken[before]
                        and order[(to + 1) % n] not in taken[order[at]]
                    ):
                        order[at : to + 1] = order[at : to + 1][::-1]
                        break
            if all(order[at] not in taken[order[at - 1]] for at in range(n)):
                return order
            order = order[n // 2 :] + order[: n // 2]
