"""What every committed model must be, reckoned anew from the round records, in plain Python integers and fractions.

Slow and obvious, and it shares no arithmetic with the server: who was folded, trained on which round's model, is read from
the records, everything else from the specification.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from seqfed.client.secure import Given
from seqfed.client.work import LocalUpdate
from seqfed.common import metrics, statistics
from seqfed.common.layout import Flat
from seqfed.common.masking.terms import Terms
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.quantising import Lattice, decode, levels, quantise
from seqfed.common.seeds import derive, generator
from seqfed.common.spec import RunSpec
from seqfed.common.views import RoundRecord


@dataclass(frozen=True)
class OpenSum:
    """A masked sum that the server has opened, and what each survivor had given for it."""

    terms: Terms
    given: Mapping[str, Given]

    @property
    def tally(self) -> dict[str, int]:
        """The plain sums of what they gave."""
        return metrics.add(one.tally if isinstance(one, LocalUpdate) else one for one in self.given.values())


def delta_of(spec: RunSpec, round_: int, client: str, model: bytes, anew: int = 0) -> Flat:
    """What a simulated client's training makes of a model, given by its bytes' digest, as its task of this round."""
    draw = generator(spec.seed, round_, client, model.hex(), "simulated training", *((anew,) if anew else ()))
    return draw.normal(0, 0.01, layout_of(spec).size).astype("<f4")


def measured(spec: RunSpec, client: str) -> dict[str, int]:
    """A simulated client's sums over its data."""
    sums = statistics.Sums(spec.data.numbers)
    rows = generator(spec.seed, client, "simulated data").normal(3, 2, (5, spec.data.numbers))
    sums.add(rows.astype(np.float32))
    return sums.tally()


def digest(flat: Flat) -> bytes:
    return blake3(flat.astype("<f4").tobytes()).digest()


class Replay:
    """The models of one run, version by version."""

    def __init__(self, spec: RunSpec, examples: Mapping[str, int]) -> None:
        self._spec = spec
        self._examples = examples
        self.models: list[Flat] = [initial_parameters(spec).flat]
        self.digests = [digest(self.models[0])]
        self.scores: dict[int, Mapping[str, float]] = {}  # as they were first seen, by round
        self.counted: dict[tuple[str, int], int] = {}  # (client, round of its task) -> the round it was folded in

    def add(self, record: RoundRecord, opened: OpenSum | None = None) -> bytes:
        """The digest of the model that this round must have made; raises AssertionError if the record cannot be right.

        opened: under secure aggregation, the round's masked sum.
        """
        assert record.round == len(self.models), f"round {record.round} comes after {len(self.models) - 1} rounds"
        assert len(set(record.folded)) == len(record.folded) > 0, record
        if self._spec.privacy.secure_aggregation:
            assert opened is not None, f"round {record.round} is committed, and no masked sum of it was opened"
            new = self._masked(record, opened)
        else:
            new = self._folded(record)
        self.models.append(np.array(new, np.float32))
        self.digests.append(digest(self.models[-1]))
        return self.digests[-1]

    def _masked(self, record: RoundRecord, opened: OpenSum) -> list[np.float32]:
        """The model plus what is decoded from the survivors' plain quantised updates, added up as integers."""
        spec, private, terms = self._spec, self._spec.privacy, opened.terms
        assert (record.attempt, sorted(record.folded)) == (terms.attempt, sorted(opened.given)), (record, opened)
        assert set(record.folded) <= set(record.cohort), record
        assert not record.stale, record
        assert len(record.folded) >= private.min_survivors, record
        uniform = spec.aggregation.weighting == "uniform"
        most = 1 if uniform else spec.aggregation.max_weight
        assert most is not None
        old = self.models[-1]
        lattice = Lattice(len(old), private.b, levels(private.b, len(record.cohort)), private.clip)
        rotation = derive(spec.seed, record.round, "rotation")
        total, weights, wraps = [0] * len(old), 0, 1 << private.b
        for client, update in opened.given.items():
            assert isinstance(update, LocalUpdate)
            every = (
                delta_of(spec, record.round, client, self.digests[-1], number) for number in range(terms.number + 1)
            )
            assert any(np.array_equal(one, update.delta) for one in every), f"{client}'s update is of another task"
            weight = 1 if uniform else min(self._examples[client], most)
            rounding = generator(spec.seed, record.round, client, "rounding")
            residues, _ = quantise(update.delta, weight / most, lattice, rotation, rounding)
            weights += weight
            for place, residue in enumerate(residues.tolist()):
                total[place] += residue if residue < wraps // 2 else residue - wraps
        assert record.training["examples"] == sum(self._examples[client] for client in record.folded), record
        plain = np.array([number % wraps for number in total], lattice.dtype)
        change = decode(plain, lattice, rotation, clients=len(record.folded), weight=weights, max_weight=most)
        return [was + more for was, more in zip(old, change, strict=True)]

    def _folded(self, record: RoundRecord) -> list[np.float32]:
        """The model plus the weighted mean of the updates."""
        assert set(record.stale) <= set(record.folded), record
        total = [0] * len(self.models[0])
        weights = 0
        examples = 0
        for client in record.folded:
            age = record.stale.get(client, 0)
            base = record.round - age
            assert base >= 1, record
            assert age <= self._oldest, f"{client}'s update is {age} rounds old in round {record.round}"
            before = self.counted.setdefault((client, base), record.round)
            assert before == record.round, (
                f"{client}'s update of round {base} counts in round {before} and again in {record.round}"
            )
            weight = self._examples[client] if self._spec.aggregation.weighting == "examples" else 1
            share = weight * (1 + age) ** -self._spec.cohort.staleness * 2.0**30
            weights += weight
            examples += self._examples[client]
            for place, number in enumerate(delta_of(self._spec, base, client, self.digests[base - 1])):
                total[place] += round(float(number) * share)
        assert record.training["examples"] == examples, record
        old = self.models[-1]
        return [np.float32(float(was) + float(total[at]) / (weights * 2**30)) for at, was in enumerate(old)]

    @property
    def _oldest(self) -> int:
        late = self._spec.asynchronous is not None or self._spec.cohort.late == "fold"
        return self._spec.cohort.max_staleness if late else 0
