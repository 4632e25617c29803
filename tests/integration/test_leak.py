"""What can be read off an update, and off a model, with differential privacy and without."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from tests.client.ready import Ready

from seqfed.client.data import Sequences
from seqfed.client.secure import contribution
from seqfed.client.work import LocalUpdate, Workshop
from seqfed.common.config import validate
from seqfed.common.dp import accounting, skellam
from seqfed.common.dp.noise import derived, fresh_key
from seqfed.common.layout import Flat, Layout
from seqfed.common.masking import prg
from seqfed.common.masking.agreed import mechanism_of, rotation_seed, terms_of
from seqfed.common.masking.terms import Purpose, Terms
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.schema import DataSchema
from seqfed.common.spec import RunSpec
from seqfed.common.views import MaskingTerms, ModelVersion, Task, TaskKey, TaskKind
from seqfed.server import fedavg, private

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORST = 1e-6  # probability of a false alarm of one statistical test
CLIENTS, VICTIMS = 12, 4


class Text(Ready):
    """A source of token ids."""

    @property
    def schema(self) -> DataSchema:
        return DataSchema(tokens=True, examples=len(self.training))


def spec_of(privacy: dict[str, Any] | None = None, **more: Any) -> RunSpec:
    content = {
        "rounds": 1,
        "data": {"vocabulary": list(LETTERS), "steps": 12},
        "task": {"kind": "next_token"},
        "model": {"kind": "gru", "hidden": 12, "layers": 1, "embedding": 8},
        "training": {"optimizer": "sgd", "learning_rate": 0.5, "batch_size": 8},
        "cohort": {"min_clients": CLIENTS, "count": CLIENTS},
        "aggregation": {"weighting": "uniform"},
        "evaluation": {"every": 0},
        "privacy": privacy or {},
        **more,
    }
    return validate(RunSpec, content, "test")


def task_of(spec: RunSpec, round_: int = 1) -> Task:
    layout = layout_of(spec)
    model = ModelVersion(0, layout.nbytes, bytes(32), layout.digest)
    return Task(TaskKind.TRAIN, TaskKey("run", round_, 1), spec, model, masking=MaskingTerms(1, CLIENTS))


def text(client: int, count: int = 16, letters: int = 13) -> Sequences:
    """Sequences of a client's own 13 of the 26 letters."""
    draw = np.random.default_rng([7, client])
    own = draw.choice(np.arange(1, 27), letters, replace=False)
    rows = draw.choice(own, count * 13).astype(np.int32)
    return Sequences(rows, np.arange(count, dtype=np.int64) * 13, np.full(count, 12), target="next token")


def trained(spec: RunSpec, data: Sequences, flat: Flat, round_: int = 1, name: str = "ward") -> LocalUpdate:
    shop = Workshop(name, Text(data, data))
    update = shop.train(task_of(spec, round_), flat, lambda: False)
    assert update is not None
    return update


def letters_in(data: Sequences) -> NDArray[np.bool_]:
    """Which tokens the network reads; the last of a row is only foretold."""
    found = np.zeros(27, bool)
    found[data.rows.reshape(-1, 13)[:, :12].ravel().astype(np.intp)] = True
    return found


def rows_of(flat: Flat, layout: Layout) -> NDArray[np.float64]:
    """How far each token's embedding has moved."""
    found: NDArray[np.float64] = np.linalg.norm(layout.views(flat)["embedding.weight"].astype(np.float64), axis=1)
    return found


# The letters of a text, off an update -----------------------------------------------------------------------------------


def test_a_plain_update_tells_the_letters_of_the_text() -> None:
    """A token that was not read has no gradient (Melis et al. 2019, "Exploiting unintended feature leakage", 3.1)."""
    spec = spec_of()
    flat = initial_parameters(spec).flat
    for client in range(5):
        data = text(client)
        delta = trained(spec, data, flat).delta
        assert np.array_equal(rows_of(delta, layout_of(spec)) > 0, letters_in(data))
        assert 10 <= letters_in(data).sum() <= 13


DISTRIBUTED = {
    "secure_aggregation": True,
    "min_survivors": CLIENTS,
    "b": 18,
    "dp": {"mode": "distributed", "clip": 0.5, "delta": 1e-3, "noise_multiplier": 1.0},
}


def terms_for(spec: RunSpec) -> Terms:
    task = task_of(spec)
    size = layout_of(spec).size
    return terms_of(spec, task.key, Purpose.TRAIN, 1, CLIENTS, bytes(32), b"", size)


def test_what_the_server_has_of_secure_aggregation_tells_no_letter() -> None:
    """Neither a client's masked vector, decoded as if it were a sum, nor the opened sum with its noise.

    The attack orders tokens by their rows' lengths; the chance that one that was read comes before one that was not is then
    1/2 (Mann and Whitney), over a few clients and rounds together.
    """
    spec = spec_of(DISTRIBUTED)
    terms, task, layout = terms_for(spec), task_of(spec), layout_of(spec)
    mechanism, seed = mechanism_of(spec, terms), rotation_seed(spec, 1)
    assert mechanism is not None
    texts = [text(client) for client in range(CLIENTS)]
    flat = initial_parameters(spec).flat
    updates = [trained(spec, one, flat, name=f"ward-{nth}") for nth, one in enumerate(texts)]
    for one, data in zip(updates, texts, strict=True):  # without masks and noise it works on these as well
        assert np.array_equal(rows_of(one.delta, layout) > 0, letters_in(data))
    ranks: dict[str, list[float]] = {"masked": [], "sum": []}
    pairs = 0.0
    for _ in range(6):
        total = np.zeros(terms.dim, terms.dtype)
        for nth, update in enumerate(updates):
            vector, scalars = contribution(terms, task, f"ward-{nth}", update)
            assert vector is not None
            assert (
                sum(scalars) == 2
            )  # one client, with weight 1: no loss, no number of examples, not even who was clipped
            total += vector
            if nth < VICTIMS:
                prg.add_masks(vector, [fresh_key()], [])
                vector &= vector.dtype.type((1 << terms.bits) - 1)
                signed = (vector.astype(np.int64) + (1 << 17)) % (1 << 18) - (1 << 17)
                ranks["masked"].append(advantage(signed.astype(np.float32), texts[nth], layout))
        change = skellam.decode(total, mechanism, seed, clients=CLIENTS, target=CLIENTS)
        for nth in range(VICTIMS):
            ranks["sum"].append(advantage(change, texts[nth], layout))
            pairs += 1
    for found in ranks.values():
        # of one comparison of 13 with 14 rows: sqrt((13 + 14 + 1) / (12 * 13 * 14)); the sum's are not independent of each other,
        # so only one victim's count for its deviation
        spread = math.sqrt(28 / (12 * 13 * 14)) / math.sqrt(len(found) / VICTIMS)
        assert abs(float(np.mean(found)) - 0.5) <= stats.norm.isf(WORST / 2) * spread


def advantage(flat: Flat, data: Sequences, layout: Layout) -> float:
    """How often a token that was read has a longer row than one that was not."""
    lengths, read = rows_of(flat, layout), letters_in(data)
    return float((lengths[read][:, None] > lengths[~read][None, :]).mean())


# Whether a text was there, off the models -----------------------------------------------------------------------------

ROUNDS, RUNS, OTHERS, CLIP, DELTA = 2, 250, 2, 0.3, 1e-3


def audited(noise_multiplier: float) -> tuple[float, float]:
    """An empirical lower bound of epsilon, wrong with a probability of 2e-6 at most (Jagielski et al. 2020), and the share of
    canaries that are found less the share of runs without one that are held to have it.

    Half of the runs have a client with a text of its own (the canary) in each round, the others a zero in its place. Whoever
    attacks sees all models and knows all but that: the most that differential privacy allows for. It decides by the likelihood
    ratio of the models, whose noise is Gaussian around the one or the other sum.
    """
    spec = spec_of(rounds=ROUNDS, model={"kind": "gru", "hidden": 4, "layers": 1, "embedding": 3})
    others, canary = [text(nth, 4) for nth in range(OTHERS)], text(99, 4, 2)
    variance = max(noise_multiplier * CLIP, 1e-3) ** 2
    hits, known_deltas = {True: 0, False: 0}, dict[tuple[bytes, int, str], Flat]()

    def delta_of(data: Sequences, flat: Flat, round_: int, name: str) -> Flat:
        """Of a training, which is the same from the same model."""
        place = flat.tobytes(), round_, name
        if place not in known_deltas:
            known_deltas[place] = trained(spec, data, flat, round_, name).delta
        return known_deltas[place]

    for run in range(2 * RUNS):
        there = run % 2 == 0
        flat, ratio = initial_parameters(spec).flat.copy(), 0.0
        for round_ in range(1, ROUNDS + 1):
            deltas = [delta_of(one, flat, round_, f"ward-{nth}") for nth, one in enumerate(others)]
            known, own = folded(deltas), delta_of(canary, flat, round_, "canary")
            sum_ = folded([*deltas, own] if there else deltas)
            if noise_multiplier:
                key = derived(bytes(32), "canary", str(noise_multiplier), run, round_)
                private.noise_sum(sum_, CLIP, noise_multiplier, OTHERS + 1, key)
            sum_.weight = OTHERS + 1
            after = np.concatenate(list(fedavg.finish(sum_, [flat])))
            shift = folded([own]).total / 2.0**30
            seen = (after.astype(np.float64) - flat) * (OTHERS + 1) - known.total / 2.0**30
            ratio += float(seen @ shift - shift @ shift / 2) / variance
            flat = after
        hits[there] += ratio > 0
    # Clopper and Pearson 1934
    least = float(stats.beta.ppf(WORST, hits[True], RUNS - hits[True] + 1)) if hits[True] else 0.0
    most = float(stats.beta.ppf(1 - WORST, hits[False] + 1, RUNS - hits[False]))
    return math.log(max(least - DELTA, 1e-9) / most), (hits[True] - hits[False]) / RUNS


def folded(deltas: list[Flat]) -> fedavg.WeightedSum:
    found = fedavg.empty(deltas[0].size)
    for one in deltas:
        fedavg.fold(found, 1, [one], fedavg.shrink(fedavg.norm([one]), CLIP))
    return found


@pytest.mark.slow
def test_a_canary_is_found_as_often_as_epsilon_allows_and_without_noise_always() -> None:
    multiplier = 2.0
    claimed = accounting.gaussian_epsilon(multiplier / math.sqrt(ROUNDS), DELTA)
    assert claimed == pytest.approx(2.05, abs=0.01)
    bound, advantage_ = audited(0.0)
    assert advantage_ == 1
    assert bound > 2.8 > claimed
    bound, advantage_ = audited(multiplier)
    assert bound < claimed
    # the attack is the best there is: through the noise, too, it finds as many as it can (0.28, within 4.9 deviations)
    best = 2 * stats.norm.cdf(math.sqrt(ROUNDS) / multiplier / 2) - 1
    assert advantage_ == pytest.approx(best, abs=float(stats.norm.isf(WORST / 2)) * math.sqrt(0.5 / RUNS))
