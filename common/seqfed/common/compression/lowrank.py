"""PowerSGD: a matrix M of an update as P Q^T of rank r (Vogels et al. 2019, "PowerSGD: practical low-rank gradient compression
for distributed optimization", Algorithm 1). Both steps are linear in M, so that sums over clients can be masked:

    P = M Q, summed; orthonormal columns P^ of that, which everybody finds alike; Q' = M^T P^, summed; the mean is P^ Q'^T / n.

Tensors that have no lower rank worth the name (vectors, small matrices) go whole with the second sum. What is left out of M is
the residual. The codec "powersgd" is this for one client, whose iterations cost no message.

Masked sums have one of the two steps a round (`Side`), in turns, so that a round is one sum: M Q^ with the orthonormal columns of
the last round's Q', or M^T P^ with those of its P; these are public, and the mean is on their one side. The update changes less
from round to round than its other half costs: with two sums a round, rank 4, a model was no better at 1.7 times the bytes.

Sums of products here are numpy's matrix products, so that P and Q' may differ from machine to machine in their last bits; what
both sides have to find alike, `orthonormal` and `rebuild`, is made of additions and products in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from seqfed.common.compression.pieces import PIECE
from seqfed.common.layout import Flat, Layout
from seqfed.common.seeds import generator

CODEC: Final = "powersgd-1"  # of a side, in masked sums
ITERATIONS: Final = 2  # of one client alone, from random columns
TINY: Final = 1e-12  # a column shorter than that part of the longest was dependent of the ones before it
Columns = NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """What is sent for a layout at a rank.

    first: numbers of all P. middle: of all Q'. whole: of the tensors that go whole.
    """

    layout: Layout
    rank: int

    def lowered(self, shape: tuple[int, ...]) -> int:
        """The rank that stands for a tensor of this shape; 0 if it goes whole."""
        if len(shape) < 2 or math.prod(shape) == 0:
            return 0
        rows, columns = shape[0], math.prod(shape[1:])
        rank = min(self.rank, rows, columns)
        return rank if 2 * rank * (rows + columns) <= rows * columns else 0

    def matrices(self) -> Iterator[tuple[int, int, int, slice]]:
        """Rows, columns, rank and place of each tensor that is lowered."""
        for _, shape, part in self.layout.parts():
            if rank := self.lowered(shape):
                yield shape[0], math.prod(shape[1:]), rank, part

    @property
    def first(self) -> int:
        return sum(rows * rank for rows, _, rank, _ in self.matrices())

    @property
    def middle(self) -> int:
        return sum(columns * rank for _, columns, rank, _ in self.matrices())

    @property
    def whole(self) -> int:
        return self.layout.size - sum(rows * columns for rows, columns, _, _ in self.matrices())

    @property
    def second(self) -> int:
        """Numbers of the second sum."""
        return self.middle + self.whole


@dataclass(frozen=True, eq=False)
class Side:
    """One factor of each matrix is known: `basis`, P^ (left) or Q^. The other is sent, with the tensors that go whole: a linear
    map of the vector, which gets no longer by it.
    """

    plan: Plan
    left: bool
    basis: Flat

    @property
    def factor(self) -> int:
        """Numbers of all that is sent of matrices: the next round's other side is made of their sum."""
        return self.plan.middle if self.left else self.plan.first

    @property
    def size(self) -> int:
        """Numbers that are sent."""
        return self.factor + self.plan.whole

    def project(self, vector: Flat) -> Flat:
        """What is sent of a vector (layout.size,): float32 (size,)."""
        if self.left:
            return second(vector, self.plan, self.basis)
        return np.concatenate([first(vector, self.plan, self.basis), *_whole(vector, self.plan)])

    def rebuild(self, sent: Flat) -> Flat:
        """The vector that it stands for, float32 (layout.size,)."""
        one, other = self.basis, sent
        if not self.left:
            one, other = sent[: self.factor], np.concatenate([self.basis, sent[self.factor :]])
        return np.concatenate(list(rebuild(one, other, self.plan)))


def side(plan: Plan, round_: int, before: Flat | None, seed: int) -> Side:
    """That of this round: left in even ones. before: the factor that the last round's sum was of; None: signs are drawn."""
    left = round_ % 2 == 0
    if before is None:
        before = _signs(plan.first if left else plan.middle, seed)
    return Side(plan, left, (orthonormal if left else orthonormal_middle)(before, plan))


def start(plan: Plan, seed: int) -> Flat:
    """Q to begin with, float32 (plan.middle,)."""
    return _signs(plan.middle, seed)


def _signs(count: int, seed: int) -> Flat:
    """Of the raw stream, which numpy promises for all its versions."""
    raw: NDArray[np.uint64] = generator(seed, "columns").bit_generator.random_raw(-(-count // 64))
    bits = np.unpackbits(raw.astype("<u8").view(np.uint8), count=count)
    return (2 * bits.astype(np.float32) - 1).astype(np.float32)


def first(vector: Flat, plan: Plan, middle: Flat) -> Flat:
    """All P = M Q of a vector (layout.size,), float32 (plan.first,)."""
    found, at = [np.empty(0, np.float32)], 0
    for rows, columns, rank, part in plan.matrices():
        q = middle[at : at + columns * rank].reshape(rank, columns)
        at += columns * rank
        found.append((vector[part].reshape(rows, columns) @ q.T).T.reshape(-1))
    return np.concatenate(found)


def orthonormal(summed: Flat, plan: Plan) -> Flat:
    """All P^, float32 (plan.first,), of the sum or any multiple: Gram-Schmidt, twice, in float64. A column that depends on the
    ones before it becomes zeros.
    """
    return _orthonormal(summed, [(rows, rank) for rows, _, rank, _ in plan.matrices()])


def orthonormal_middle(middle: Flat, plan: Plan) -> Flat:
    """The same of all Q', float32 (plan.middle,): with these P is no longer than the vector, as a clipped sum wants it."""
    return _orthonormal(middle, [(columns, rank) for _, columns, rank, _ in plan.matrices()])


def second(vector: Flat, plan: Plan, basis: Flat) -> Flat:
    """All Q' = M^T P^, then the tensors that go whole: float32 (plan.second,). basis: of `orthonormal`."""
    found, at = [np.empty(0, np.float32)], 0
    for rows, columns, rank, part in plan.matrices():
        p = basis[at : at + rows * rank].reshape(rank, rows)
        at += rows * rank
        found.append((p @ vector[part].reshape(rows, columns)).reshape(-1))
    return np.concatenate([*found, *_whole(vector, plan)])


def _whole(vector: Flat, plan: Plan) -> list[Flat]:
    return [vector[part] for _, shape, part in plan.layout.parts() if not plan.lowered(shape)]


def rebuild(basis: Flat, second_: Flat, plan: Plan) -> Iterator[Flat]:
    """The vector P^ Q'^T in parts, from `orthonormal`'s and `second`'s (or its mean's) numbers."""
    p_at, q_at, whole_at = 0, 0, plan.middle
    for _, shape, part in plan.layout.parts():
        rank = plan.lowered(shape)
        if not rank:
            yield second_[whole_at : whole_at + part.stop - part.start]
            whole_at += part.stop - part.start
            continue
        rows, columns = shape[0], math.prod(shape[1:])
        p = basis[p_at : p_at + rows * rank].reshape(rank, rows)
        q = second_[q_at : q_at + columns * rank].reshape(rank, columns)
        p_at, q_at = p_at + rows * rank, q_at + columns * rank
        step = max(1, PIECE // columns)
        for top in range(0, rows, step):
            block = p[0, top : top + step, None] * q[0]
            for nth in range(1, rank):
                block += p[nth, top : top + step, None] * q[nth]
            yield block.reshape(-1)


def alone(vector: Flat, plan: Plan, seed: int) -> tuple[Flat, Flat]:
    """P^ and the second vector of one client by itself."""
    middle = start(plan, seed)
    for _ in range(ITERATIONS - 1):
        middle = second(vector, plan, _basis(vector, plan, middle))[: plan.middle]
    basis = _basis(vector, plan, middle)
    return basis, second(vector, plan, basis)


def _basis(vector: Flat, plan: Plan, middle: Flat) -> Flat:
    return orthonormal(first(vector, plan, orthonormal_middle(middle, plan)), plan)


def _orthonormal(numbers: Flat, shapes: list[tuple[int, int]]) -> Flat:
    found, at = numbers.astype(np.float64), 0
    for length, rank in shapes:
        _gram_schmidt(found[at : at + length * rank].reshape(rank, length))
        at += length * rank
    return found.astype(np.float32)


def _gram_schmidt(columns: Columns) -> None:
    """In place; columns: (r, rows), each a row of the array, so that sums run over contiguous numbers in a fixed order."""
    longest = 0.0
    for nth in range(len(columns)):
        column = columns[nth]
        longest = max(longest, _length(column))
        for before in [*columns[:nth], *columns[:nth]]:
            column -= before * float(np.add.reduce(before * column))
        rest = _length(column)
        column *= 1 / rest if rest > TINY * longest else 0.0


def _length(column: Columns) -> float:
    return math.sqrt(float(np.add.reduce(np.square(column))))
