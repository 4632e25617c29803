"""What can be read off an update, and off a model, with differential privacy and without."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
from seqfed.common.spec import DPSpec, RunSpec
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

    Half of the runs have a client with a text of its own (the canary) in each round, the others are without it. Whoever
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


# The same off so many releases that little noise too few shows -----------------------------------------------------------

COPIES = 200  # releases whose noise is drawn at once
SEQUENCES = 6  # of a client of mode "example"


class Attack(NamedTuple):
    """trials: with a canary, and as many without. alarms: share of those without that are held to have one. too_little: share of
    the noise with which epsilon is not kept, and that is seen. near: the bound is more than so much of what is claimed.
    """

    releases: Callable[[RunSpec, float, list[Flat], Flat, bool, int], NDArray[np.float64]]
    trials: int
    alarms: float
    too_little: float
    near: float


def claiming(mode: str) -> RunSpec:
    """A run that says epsilon 2 of all its rounds."""
    masks = {"secure_aggregation": True, "min_survivors": OTHERS + 1, "b": 18} if mode == "distributed" else {}
    kind = {"mode": "central", "mechanism": "ftrl"} if mode == "ftrl" else {"mode": mode}
    return spec_of(
        {**masks, "dp": {**kind, "epsilon": 2.0, "delta": DELTA, "clip": CLIP}},
        rounds=2 if mode == "ftrl" else 1,
        model={"kind": "gru", "hidden": 4, "layers": 1, "embedding": 3},
        cohort={"min_clients": OTHERS + 1, "count": OTHERS + 1},
    )


def off_sums(
    spec: RunSpec, multiplier: float, known: list[Flat], canary: Flat, there: bool, trials: int
) -> NDArray[np.float64]:
    """The server's noise on the canary's round, or on two rounds of a tree: model by model, that of the second twice as far."""
    total = folded([*known, canary] if there else known).total
    base, own = folded(known).total / 2.0**30, folded([canary]).total / 2.0**30
    found = []
    for trial in range(trials // COPIES):
        key, score, seen = derived(bytes(32), "sums", trial, there), np.zeros(COPIES), np.zeros((COPIES, own.size))
        for round_ in range(1, spec.rounds + 1):
            sum_ = fedavg.empty(COPIES * own.size)
            sum_.total[:], sum_.weight = np.tile(total, COPIES), OTHERS + there
            private.noise_sum(sum_, CLIP, multiplier, 1, key, tree_round=round_ if spec.rounds > 1 else None)
            seen += sum_.total.reshape(COPIES, -1) / 2.0**30 - base
            score += round_ * (seen @ own)
        found.append(score)
    return np.concatenate(found)


def off_masked_sums(
    spec: RunSpec, multiplier: float, known: list[Flat], canary: Flat, there: bool, trials: int
) -> NDArray[np.float64]:
    """All clients' noise but that of one who helps the server. In place of the canary there is a client with a zero."""
    mechanism = accounting.mechanism(spec, multiplier)
    own, _ = skellam.encode(canary, mechanism, 5, fresh_key(), noisy=False)
    places = 1 << mechanism.bits
    shift = (own.astype(np.int64) + places // 2) % places - places // 2
    found = np.empty(trials)
    for trial in range(trials):
        total = np.zeros(own.shape, own.dtype)
        for nth, one in enumerate((known[1], canary if there else np.zeros_like(canary))):
            total += skellam.encode(one, mechanism, 5, derived(bytes(32), "masked", trial, there, nth))[0]
        found[trial] = ((total.astype(np.int64) + places // 2) % places - places // 2) @ shift
    return found


def off_updates(
    spec: RunSpec, multiplier: float, _: list[Flat], canary: Flat, there: bool, trials: int
) -> NDArray[np.float64]:
    """One client's update, or the opposite one."""
    less = spec.model_copy(update={"privacy": spec.privacy.model_copy(update={"dp": given(spec, multiplier)})})
    update = canary if there else -canary
    own = canary.astype(np.float64)
    return np.array([float(Workshop._hidden(update, less) @ own) for _ in range(trials)])


def off_steps(
    spec: RunSpec, multiplier: float, _: list[Flat], __: Flat, there: bool, trials: int
) -> NDArray[np.float64]:
    """One step of DP-SGD on all sequences, of which the last is the canary or missing."""
    less = spec.model_copy(update={"privacy": spec.privacy.model_copy(update={"dp": given(spec, multiplier)})})
    flat, rate = initial_parameters(spec).flat, spec.training.learning_rate
    others, single = text(0, SEQUENCES - 1), text(99, 1, 2)
    alone = trained(spec_of(model=spec.model.model_dump()), single, flat).delta.astype(np.float64)
    tokens = [others.rows, single.rows] if there else [others.rows]
    rows = np.concatenate([one.astype(np.int32, copy=False) for one in tokens])
    size = len(rows) // 13
    data = Sequences(rows, np.arange(size, dtype=np.int64) * 13, np.full(size, 12), target="next token")
    shop = Workshop("ward", Text(data, data))
    found = np.empty(trials)
    for trial in range(trials):
        update = shop.train(task_of(less), flat, lambda: False)
        assert update is not None
        found[trial] = update.delta @ alone * (size / rate)
    return found


def given(spec: RunSpec, multiplier: float) -> DPSpec:
    assert spec.privacy.dp is not None
    return spec.privacy.dp.model_copy(update={"noise_multiplier": multiplier})


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("mode", "attack"),
    [
        ("central", Attack(off_sums, 20_000, 0.005, 0.6, 0.4)),
        ("ftrl", Attack(off_sums, 20_000, 0.005, 0.6, 0.4)),
        ("distributed", Attack(off_masked_sums, 4_000, 0.02, 0.35, 0.1)),
        # these two have noise of the system's randomness, another each time: their margins are wider
        ("local", Attack(off_updates, 20_000, 0.005, 0.5, 0.2)),
        ("example", Attack(off_steps, 300, 0.01, 0.1, -3.0)),
    ],
)
def test_many_attacks_bound_epsilon_from_below(mode: str, attack: Attack) -> None:
    """By the likelihood ratio, at few false alarms, where the bound is nearest: what is claimed is kept, and too little noise is
    seen.
    """
    spec = claiming(mode)
    flat = initial_parameters(spec).flat
    plain = spec_of(model=spec.model.model_dump(), training={"optimizer": "sgd", "learning_rate": 2.0, "batch_size": 2})
    canary, *known = (trained(plain, one, flat).delta.copy() for one in (text(99, 4, 2), text(0, 4), text(1, 4)))
    assert np.linalg.norm(canary) > CLIP
    examples = SEQUENCES if mode == "example" else None
    multiplier = accounting.noise_multiplier(spec, examples)
    assert multiplier is not None
    claimed, bounds = accounting.spent(spec, spec.rounds, multiplier, examples=examples), list[float]()
    assert 1.98 < claimed <= 2
    for share in (1.0, attack.too_little):
        there, not_there = (
            attack.releases(spec, share * multiplier, known, canary, one, attack.trials) for one in (True, False)
        )
        # Where noise that is due has so many false alarms; the attacker knows its law, and nothing of these releases.
        middle, spread = float(np.mean(not_there)), float(np.std(not_there))
        bounds.append(least_epsilon(there, not_there, middle + spread * float(stats.norm.isf(attack.alarms))))
    assert attack.near * claimed < bounds[0] < claimed < bounds[1]


def least_epsilon(there: NDArray[np.float64], not_there: NDArray[np.float64], threshold: float) -> float:
    """Of which epsilon is not below, but for a chance of 2e-6 (Clopper and Pearson 1934)."""
    hits, alarms = int((there > threshold).sum()), int((not_there > threshold).sum())
    least = float(stats.beta.ppf(WORST, hits, len(there) - hits + 1))
    most = float(stats.beta.ppf(1 - WORST, alarms + 1, len(not_there) - alarms))
    return math.log(max(least - DELTA, 1e-9) / most)
