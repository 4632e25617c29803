"""What every committed model must be, reckoned anew from the round records, in plain Python integers and fractions.

Slow and obvious, and it shares no arithmetic with the server: who was folded, trained on which round's model, is read from
the records, everything else from the specification.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from blake3 import blake3

from seqfed.common.layout import Flat
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.seeds import generator
from seqfed.common.spec import RunSpec
from seqfed.common.views import RoundRecord


def delta_of(spec: RunSpec, round_: int, client: str, model: bytes) -> Flat:
    """What a simulated client's training makes of a model, given by its bytes' digest, as its task of this round."""
    draw = generator(spec.seed, round_, client, model.hex(), "simulated training")
    return draw.normal(0, 0.01, layout_of(spec).size).astype("<f4")


def digest(flat: Flat) -> bytes:
    return blake3(flat.astype("<f4").tobytes()).digest()


class Replay:
    """The models of one run, version by version."""

    def __init__(self, spec: RunSpec, examples: Mapping[str, int]) -> None:
        self._spec = spec
        self._examples = examples
        self.models: list[Flat] = [initial_parameters(spec).flat]
        self.digests = [digest(self.models[0])]
        self.counted: dict[tuple[str, int], int] = {}  # (client, round of its task) -> the round it was folded in

    def add(self, record: RoundRecord) -> bytes:
        """The digest of the model that this round must have made; raises AssertionError if the record cannot be right."""
        assert record.round == len(self.models), f"round {record.round} comes after {len(self.models) - 1} rounds"
        assert len(set(record.folded)) == len(record.folded) > 0, record
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
        new = [np.float32(float(was) + float(total[at]) / (weights * 2**30)) for at, was in enumerate(old)]
        self.models.append(np.array(new, np.float32))
        self.digests.append(digest(self.models[-1]))
        return self.digests[-1]

    @property
    def _oldest(self) -> int:
        late = self._spec.asynchronous is not None or self._spec.cohort.late == "fold"
        return self._spec.cohort.max_staleness if late else 0
