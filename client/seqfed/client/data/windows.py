"""The arithmetic of sequences, without any file: cutting, filling, coding, binning and splitting; pure functions of arrays.

Rows lie entity by entity; entity e has rows[begins[e] : ends[e]].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from seqfed.common.seeds import generator

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
MOST_BINS: Final = 1_000_000  # steps that one entity may have: as many as a run's `steps` may ask for


def cut(begins: Ints, ends: Ints, steps: int | None, stride: int | None, ahead: int = 0) -> tuple[Ints, Ints, Ints]:
    """Windows as (starts, lengths, entities), each int64 (N,), in the order of the rows.

    Without stride an entity gives one, its last `steps` rows; with it, windows of `steps` rows every `stride` rows, or a
    single shorter one if the entity has fewer rows. After each window come `ahead` more rows of the same entity.

    >>> [one.tolist() for one in cut(np.array([0, 5]), np.array([5, 7]), 3, 2)]
    [[0, 2, 5], [3, 3, 2], [0, 0, 1]]
    >>> [one.tolist() for one in cut(np.array([0, 5]), np.array([5, 7]), 3, None, ahead=1)]
    [[1, 5], [3, 1], [0, 1]]
    """
    room = ends - begins - ahead
    if stride is None or steps is None:
        lengths = room if steps is None else np.minimum(room, steps)
        entities = np.flatnonzero(room >= 1)
        return (begins + room - lengths)[entities], lengths[entities], entities
    counts = np.where(room >= steps, (room - steps) // stride + 1, (room >= 1).astype(np.int64))
    entities, nth = _spread(counts)
    return begins[entities] + nth * stride, np.minimum(room[entities], steps), entities


def cut_tokens(begins: Ints, ends: Ints, steps: int, stride: int | None = None) -> tuple[Ints, Ints, Ints]:
    """Windows to foretell each next token in, as `cut`; every token of them has a successor in its document.

    Every `stride` tokens (left out: `steps`), and at the end a shorter one for the tokens that no other holds.

    >>> [one.tolist() for one in cut_tokens(np.array([0]), np.array([8]), 3)]
    [[0, 3, 6], [3, 3, 1], [0, 0, 0]]
    """
    stride = steps if stride is None else stride
    room = ends - begins - 1
    whole = np.where(room >= steps, (room - steps) // stride + 1, 0)
    held = np.where(whole > 0, (whole - 1) * stride + steps, 0)
    counts = whole + ((held < room) & (whole * stride < room))
    documents, nth = _spread(counts)
    return begins[documents] + nth * stride, np.minimum(steps, room[documents] - nth * stride), documents


def _spread(counts: Ints) -> tuple[Ints, Ints]:
    """For each of sum(counts) items whose it is, and which of its owner's: [2, 1] -> [0, 0, 1], [0, 1, 0]."""
    owners = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    firsts = np.cumsum(counts) - counts
    return owners, np.arange(len(owners), dtype=np.int64) - firsts[owners]


def held_out(names: Sequence[str], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which of the entities are held out: a share of them, rounded down, at least one being kept; bool (E,).

    It depends on the set of names and the seed, not on the order of the names. Precondition: no name twice.
    """
    order = sorted(range(len(names)), key=names.__getitem__)
    return np.isin(np.arange(len(names)), np.array(order, np.int64)[_share(len(names), fraction, seed)])


def held_out_rows(count: int, fraction: float, seed: int) -> NDArray[np.bool_]:
    """The same of so many rows without a name, bool (count,)."""
    return np.isin(np.arange(count), _share(count, fraction, seed))


def _share(count: int, fraction: float, seed: int) -> Ints:
    out = min(int(fraction * count), count - 1)
    return generator(seed, "validation split").permutation(count)[: max(out, 0)]


def forward_fill(block: Floats, firsts: NDArray[np.bool_], carry: Floats) -> tuple[Floats, Floats]:
    """Each missing number as its entity's last one before it, and the numbers that the next block's first row follows.

    block: (R, C), NaN where missing; firsts: bool (R,), whether a row begins an entity; carry: (C,), the numbers before
    the block. What has none before it stays NaN. Precondition: R >= 1.
    """
    places = np.where(~np.isnan(block) | firsts[:, None], np.arange(len(block))[:, None], -1)
    places = np.maximum.accumulate(places, axis=0)
    found = np.take_along_axis(block, np.maximum(places, 0), axis=0)
    filled = np.where(places < 0, carry, found)
    return filled, filled[-1]


def normalised(block: Floats, mean: Sequence[float] | None, scale: Sequence[float] | None) -> Floats:
    """(block - mean) / scale by column, computed in double precision; what float32 cannot hold becomes infinite."""
    if mean is None and scale is None:
        return block
    exact = block.astype(np.float64)
    if mean is not None:
        exact -= np.asarray(mean)
    if scale is not None:
        exact /= np.asarray(scale)
    with np.errstate(over="ignore"):
        return exact.astype(np.float32)


def one_hot(codes: NDArray[np.int32], values: Sequence[str], categories: Sequence[str]) -> Floats:
    """float32 (R, len(categories)): 1 where the row's value is the category; a missing or other value is all 0.

    codes: int32 (R,), indices into `values`, -1 where missing.
    """
    known = {name: place for place, name in enumerate(categories)}
    table = np.array([*(known.get(value, -1) for value in values), -1], np.int64)  # the last is for code -1
    places = table[codes]
    out = np.zeros((len(codes), len(categories)), np.float32)
    rows = np.flatnonzero(places >= 0)
    out[rows, places[rows]] = 1
    return out


def grid_steps(times: NDArray[np.float64], begins: Ints, ends: Ints, grid: float) -> tuple[Ints, Ints]:
    """The step of each observation, int64 (R,), from its entity's first; and each entity's number of steps, int64 (E,).

    A step is [k * grid, (k + 1) * grid) for a whole k; an entity's first step is that of its first observation. Raises
    ValueError with the entity's index if one has over MOST_BINS steps. Preconditions: times finite and in order within an
    entity; no entity is empty.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        bins = np.floor(times / grid)
        first, last = bins[begins], bins[ends - 1]
        wide = ~(last - first < MOST_BINS)  # nor if a tiny grid made them infinite
    if wide.any():
        raise ValueError(int(np.argmax(wide)))
    owners = np.repeat(np.arange(len(begins)), ends - begins)
    return (bins - first[owners]).astype(np.int64), (last - first).astype(np.int64) + 1


def bin_means(places: Ints, columns: Ints, values: Floats, shape: tuple[int, int]) -> Floats:
    """The mean of the observations in each cell, float32 `shape`, NaN where there is none.

    places and columns: each observation's row and column; a column of -1 and a NaN value are left out.
    """
    known = (columns >= 0) & ~np.isnan(values)
    cells = places[known] * shape[1] + columns[known]
    size = shape[0] * shape[1]
    counts = np.bincount(cells, minlength=size)
    sums = np.bincount(cells, weights=values[known].astype(np.float64), minlength=size)
    with np.errstate(invalid="ignore"):
        return (sums / counts).astype(np.float32).reshape(shape)
