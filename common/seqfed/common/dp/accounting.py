"""What a run's noise is worth: the epsilon of so many rounds, the noise for a goal, and several runs together.

Each round releases something of a client with noise: a *release*. One is Gaussian, perhaps of clients that were drawn at random,
or Skellam; a whole tree of DP-FTRL is a single Gaussian one. Any releases compose, whatever runs they are of:

- Gaussians that claim nothing of sampling make one Gaussian, whose epsilon is exact (Balle and Wang 2018, "Improving the
  Gaussian mechanism for differential privacy", theorem 8);
- with sampling the privacy loss distribution is computed on a grid, rounded to the safe side (PLD; Doroshenko et al. 2022);
- where a Skellam is among them, or so little noise that the grid would take seconds and gigabytes, Renyi differential privacy of
  whole orders (Mironov 2017; Agarwal et al. 2021, "The Skellam mechanism for differentially private federated learning",
  corollary 3.1).

Neighbours: rounds with one client in their sums, and the same without it. A sum is divided by a number that hangs on neither, so
it moves by the clip at most, and a count about one half by one half; who is connected, and takes part, is no secret. Locally any
two updates are neighbours, which are twice the clip apart. In `example` mode they differ by one sequence.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal

from seqfed.common.errors import ConfigError
from seqfed.common.model import layout_of
from seqfed.common.spec import DPSpec, RunSpec

if TYPE_CHECKING:
    from seqfed.common.dp.skellam import Mechanism

GRID: Final = (
    5e-4  # of privacy losses: rounding 1,000 rounds up costs 0.01 % of epsilon; ten times finer takes ten times longer
)
# A grid is made up to this epsilon, by Renyi divergences (more than runs may ask for), and from this noise multiplier on.
WIDEST, QUIETEST = 130.0, 0.25
AT_ONCE: Final = 1 << 10  # releases composed at once: dp-accounting takes the grid's size to the power of their number
ORDERS: Final = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)  # whole ones: the bound of Skellam noise is of these
LEAST, MOST = 0.05, 1e6  # noise multipliers looked at
DROWNS: Final = (
    5.0  # a round's noise over the clip: a rule of thumb, since orthogonal noise averages out over the rounds
)
SPARE: Final = 0.01  # of delta that cohorts which are drawn again may take, beyond it

LOUDEST: Final = 65536.0  # of the noise on a plain sum: half of what `dp.noise` makes of units of 2^-30
EXACT: Final = "exact Gaussian (Balle and Wang 2018)"
PLD: Final = "PLD (dp-accounting)"
RDP: Final = "RDP (dp-accounting)"
RDP_SKELLAM: Final = "RDP (Agarwal et al. 2021)"
RDP_OPACUS: Final = "RDP (Opacus)"
ITSELF: Final = "each client's own (Opacus)"


# Releases -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gaussian:
    """noise: deviation in units of the sensitivity. rate: probability with which a client was drawn each time, by itself."""

    noise: float
    count: int = 1
    rate: float = 1.0


@dataclass(frozen=True)
class Skellam:
    """In units of the lattice: variance of the whole noise; how far one client moves a sum, in L2 and in L1."""

    variance: float
    l2: float
    l1: float
    count: int = 1


Release = Gaussian | Skellam


def epsilon_of(releases: Iterable[Release], delta: float) -> tuple[float, str]:
    """Epsilon of all of these together, and the accountant's name. Raises ConfigError without the extra seqfed[dp]."""
    found = [one for one in releases if one.count]
    if any(isinstance(one, Skellam) for one in found):
        return _epsilon_of_renyi(tuple(renyi(found)), delta), RDP_SKELLAM
    plain = math.fsum(one.count / one.noise**2 for one in found if isinstance(one, Gaussian) and one.rate == 1)
    drawn = [one for one in found if isinstance(one, Gaussian) and one.rate != 1]
    if not drawn:
        return gaussian_epsilon(1 / math.sqrt(plain), delta) if plain else 0.0, EXACT
    if plain:
        drawn.append(Gaussian(1 / math.sqrt(plain)))
    bound = _epsilon_of_renyi(tuple(renyi(drawn)), delta)
    if bound > WIDEST or min(one.noise for one in drawn) < QUIETEST:
        return bound, RDP
    whole: Any = None
    for one in drawn:
        part = _composed(one)
        whole = part if whole is None else whole.compose(part)
    return max(0.0, float(whole.get_epsilon_for_delta(delta))), PLD


@lru_cache(maxsize=1024)
def gaussian_epsilon(noise: float, delta: float) -> float:
    """Epsilon of one Gaussian release without sampling, exactly; noise in units of the sensitivity."""
    return float(_library("dp_accounting").get_epsilon_gaussian(noise, delta))


def _composed(release: Gaussian) -> Any:
    """The privacy loss of all of these together."""
    one = _losses(release.noise, release.rate)
    many, rest = divmod(release.count, AT_ONCE)
    if not many:
        return one.self_compose(rest)
    found = one.self_compose(AT_ONCE).self_compose(many)
    return found.compose(one.self_compose(rest)) if rest else found


@lru_cache(maxsize=64)
def _losses(noise: float, rate: float) -> Any:
    made = _library("dp_accounting.pld.privacy_loss_distribution").from_gaussian_mechanism
    return made(noise, sampling_prob=rate, value_discretization_interval=GRID)


def renyi(releases: Iterable[Release]) -> list[float]:
    """The Renyi divergence of all of these together, at each of ORDERS."""
    total = [0.0] * len(ORDERS)
    for one in releases:
        if isinstance(one, Skellam):
            each = rdp_of_skellam(ORDERS, one.variance, one.l2, one.l1)
        elif one.rate == 1:
            each = [order / (2 * one.noise**2) for order in ORDERS]
        else:
            each = _renyi_of_drawn(one.noise, one.rate)
        total = [sum_ + one.count * part for sum_, part in zip(total, each, strict=True)]
    return total


def rdp_of_skellam(orders: Sequence[int], variance: float, l2: float, l1: float) -> list[float]:
    """The Renyi divergence of one sum with Skellam noise at each order, a whole number above 1 (Agarwal et al. 2021)."""
    return [
        order * l2**2 / (2 * variance)
        + min(((2 * order - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
        for order in orders
    ]


@lru_cache(maxsize=64)
def _renyi_of_drawn(noise: float, rate: float) -> list[float]:
    dp, module = _library("dp_accounting"), _library("dp_accounting.rdp.rdp_privacy_accountant")
    accountant = module.RdpAccountant(ORDERS)
    accountant.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)))
    return [float(one) for one in accountant.rdp]


@lru_cache(maxsize=1024)
def _epsilon_of_renyi(values: tuple[float, ...], delta: float) -> float:
    found, _ = _library("dp_accounting.rdp.rdp_privacy_accountant").compute_epsilon(ORDERS, values, delta)
    return float(found)


def tree_sensitivity(rounds: int, participations: int) -> float:
    """How far one client moves all sums of a tree over so many rounds together, in L2 and units of the clip, at most.

    A prefix of the rounds is a sum of whole blocks of 2^i rounds that begin at multiples of 2^(i + 1), so of no others is
    anything released. Those of one size do not overlap, and a client that is in c of a block's rounds moves its sum by c: the
    squares' sum is largest with as many full blocks as its participations fill. Kairouz et al. 2021, "Practical and private
    (deep) learning without sampling or shuffling", section 4.
    """
    total = 0
    for level in range(rounds.bit_length()):
        size = 1 << level
        blocks = ((rounds >> level) + 1) // 2
        full = min(blocks, participations // size)
        rest = participations - full * size if full < blocks else 0
        total += full * size**2 + rest**2
    return math.sqrt(total)


# Runs -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a run is to spend, before it has begun, and on what assumptions; `epsilon` after all its rounds.

    noise_multiplier and epsilon: None in `example` mode as far as only a client that knows its own number of examples can tell.
    cohort: the clients that a sum is divided by, at least. batch: sequences that a step's gradient is of. noise_norm: expected L2
    norm of the noise in a round's change of the model (example: in a step's gradient), to be held against first_clip, the clip of
    the first round; None for a model whose size is not known yet.
    """

    mode: str
    mechanism: str
    unit: Literal["client", "example"]
    neighbours: str
    sampling: str
    accountant: str
    noise_multiplier: float | None
    epsilon: float | None
    delta: float
    clip: float | str
    first_clip: float
    population: int | None
    cohort: int
    batch: int
    rounds: int
    dim: int | None
    noise_norm: float | None
    caveats: tuple[str, ...]


def plan(spec: RunSpec, examples: int | None = None) -> Plan:
    """The noise for the run's epsilon, or the epsilon of its noise. examples: of one client, in `example` mode.

    Raises ConfigError if the run has no [privacy.dp], if no noise gives what it asks for, or without the extra seqfed[dp].
    """
    dp = _dp(spec)
    noise = noise_multiplier(spec, examples)
    epsilon, accountant = dp.epsilon, ITSELF
    if noise is not None and (dp.mode != "example" or examples is not None):
        epsilon, accountant = _spent(spec, spec.rounds, noise, None, examples)
    dim = _dim(spec)
    return Plan(
        mode=dp.mode,
        mechanism=dp.mechanism,
        unit="example" if dp.mode == "example" else "client",
        neighbours=_NEIGHBOURS[dp.mode],
        sampling=sampling(spec),
        accountant=accountant,
        noise_multiplier=noise,
        epsilon=epsilon,
        delta=dp.delta,
        clip=dp.clip,
        first_clip=dp.first_clip,
        population=dp.population,
        cohort=clients_of(spec),
        batch=spec.training.batch_size,
        rounds=spec.rounds,
        dim=dim,
        noise_norm=None if dim is None or noise is None else noise_norm(spec, dim, noise),
        caveats=caveats(spec, noise, epsilon),
    )


def spent(spec: RunSpec, rounds: int, noise: float, taken: int | None = None, examples: int | None = None) -> float:
    """Epsilon of the first so many rounds (releases, where one was repeated), at the run's delta.

    taken: of a client that was in only so many of them. The clip and the cohort do not matter.
    """
    return _spent(spec, rounds, noise, taken, examples)[0]


def _spent(spec: RunSpec, rounds: int, noise: float, taken: int | None, examples: int | None) -> tuple[float, str]:
    dp = _dp(spec)
    if dp.mode == "example":
        rate, steps = example_batches(spec, examples)
        return epsilon_of_histories([(noise, rate, steps * rounds)], dp.delta), RDP_OPACUS
    return epsilon_of(releases(spec, rounds, noise, taken), dp.delta)


def releases(spec: RunSpec, rounds: int, noise: float, taken: int | None = None) -> tuple[Release, ...]:
    """What the first so many rounds release of a client that was in `taken` of them, or as the run allows in all of them.

    Where clients are drawn, it counts that a client may have been, not that it was. Not of `example` mode.
    """
    dp = _dp(spec)
    if not rounds or taken == 0:
        return ()
    if dp.mechanism == "ftrl":
        times = min(rounds, dp.participations or rounds) if taken is None else min(taken, rounds)
        return (Gaussian(noise / tree_sensitivity(rounds, times)),)
    count = rounds if taken is None else taken
    if dp.mode == "distributed":
        found = mechanism(spec, noise)
        return (Skellam(found.variance, found.bound2, found.bound1, count),)
    if dp.mode == "local":
        return (Gaussian(noise / 2, count),)
    if dp.population is not None:
        return (Gaussian(noise, rounds, rate(spec)),)
    return (Gaussian(noise, count),)


def together(parts: Iterable[tuple[RunSpec, int, float, int | None]], delta: float) -> tuple[float, str]:
    """Epsilon of several runs' rounds of one client at this delta, and the accountant: their releases composed.

    Each part: specification, rounds, noise multiplier, and of how many rounds it was (see `spent`). Not of `example` mode.
    """
    return epsilon_of([release for part in parts for release in releases(*part)], delta)


def rate(spec: RunSpec) -> float:
    """The probability with which each connected client is drawn in a round, by itself; 1 where nothing is claimed of it."""
    population = _dp(spec).population
    return 1.0 if population is None else min(1.0, (spec.cohort.count or population) / population)


def noise_multiplier(spec: RunSpec, examples: int | None = None) -> float | None:
    """The run's noise multiplier: its own, or the smallest, of four digits, whose epsilon after all rounds is within the goal.

    None in `example` mode for clients that solve for their own. Raises ConfigError if there is none.
    """
    dp = _dp(spec)
    if dp.mode == "example" and examples is None:
        return dp.noise_multiplier
    return _noise_multiplier(spec.model_dump_json(), examples)


@lru_cache(maxsize=64)
def _noise_multiplier(text: str, examples: int | None) -> float:
    spec = RunSpec.model_validate_json(text)
    noise, goal = _dp(spec).noise_multiplier, _dp(spec).epsilon
    if noise is None:
        assert goal is not None  # it has one of them
        noise = solve(lambda one: spent(spec, spec.rounds, one, None, examples), goal)
    _check_noise(spec, noise)
    return noise


def solve(epsilon_at: Callable[[float], float], goal: float) -> float:
    """The smallest noise multiplier of four digits with epsilon_at(noise) <= goal, to 0.1 %; epsilon_at must fall."""
    low = high = 1.0
    while epsilon_at(high) > goal:
        low, high = high, high * 2
        if high > MOST:
            raise ConfigError(
                f"no noise multiplier up to {MOST:g} gives epsilon {goal:g}; raise epsilon, or lower rounds"
            )
    while low == high or (epsilon_at(low) <= goal and low > LEAST):
        low, high = max(LEAST, low / 2), low
    brent = _library("scipy.optimize").brentq

    def gap(log: float) -> float:
        return math.log(max(epsilon_at(math.exp(log)), 1e-9) / goal)

    found = LEAST if epsilon_at(low) <= goal else math.exp(brent(gap, math.log(low), math.log(high), xtol=1e-5))
    digit = 10.0 ** (math.floor(math.log10(found)) - 3)
    steps = math.floor(found / digit)
    while epsilon_at(round(steps * digit, 9)) > goal:
        steps += 1
    return round(steps * digit, 9)


def noise_norm(spec: RunSpec, dim: int, noise: float) -> float:
    """Expected L2 norm of the noise in a round's mean; `example`: in a step's gradient."""
    dp, cohort = _dp(spec), clients_of(spec)
    one = noise * dp.first_clip * math.sqrt(dim)
    match dp.mode:
        case "central":
            # From one prefix of the tree to the next, on average one block ends and one begins.
            return one / cohort * (math.sqrt(2) if dp.mechanism == "ftrl" else 1.0)
        case "distributed":
            return one / cohort * math.sqrt(cohort / honest(spec))
        case "local":
            return one / math.sqrt(cohort)
        case "example":
            return one / spec.training.batch_size


def honest(spec: RunSpec) -> int:
    """Clients of a sum whose noise is counted on."""
    return spec.privacy.min_survivors - _dp(spec).known


# Words ----------------------------------------------------------------------------------------------------------------

_NEIGHBOURS: Final = {
    "central": "one client in a round's sums, or not",
    "distributed": "one client in a round's sums, or not",
    "local": "any two updates of one client",
    "example": "one sequence of a client's data, there or not",
}


def sampling(spec: RunSpec) -> str:
    """What is assumed of how clients (in `example` mode sequences) come into a sum, in words."""
    dp = _dp(spec)
    if dp.mode == "example":
        return "Poisson: each step takes each sequence of a client by itself with probability batch_size / examples"
    if dp.population is not None:
        return (
            f"Poisson: each round draws each connected client by itself, in secret, with probability {rate(spec):.4g} "
            f"({spec.cohort.count} of {dp.population:,})"
        )
    if dp.mechanism == "ftrl":
        times = "all rounds" if dp.participations is None else f"{dp.participations:,} of the rounds at most"
        return f"none: a client takes part in {times}"
    return "none: a client may take part in every round"


def caveats(spec: RunSpec, noise: float | None, epsilon: float | None) -> tuple[str, ...]:
    """What the epsilon does not say, one sentence each."""
    dp = _dp(spec)
    said = [f"{dp.mode}: {_whom(spec)}"]
    if dp.mode == "example":
        said.append(
            "each client solves for its own noise, and keeps its own account; this server's account has the goal only"
        )
        said.append(
            "each client tells the server how many sequences it has, without noise; one more or less there is seen in that, "
            "whatever epsilon is"
        )
    if dp.population is not None:
        said.append(
            "operators and viewers see who was drawn (round records, audit log); against them, and against the server, nothing "
            "is gained by sampling"
        )
        if epsilon is not None:
            said.append(
                f"a cohort below the quorum is drawn again, which adds {drawn_again(spec, epsilon):.1g} to delta at most"
            )
    if dp.clip == "adaptive":
        said.append(
            "the clip follows the median of the norms, whose noisy count is a part of the release that is counted"
        )
    if dp.is_public:
        said.append(
            "metrics, training losses and statistics of clients' data are told without noise: they are NOT private"
        )
    clients = dp.population or clients_of(spec)
    if dp.mode != "example" and dp.delta * clients > 1:
        said.append(f"delta is more than one in the {clients:,} clients: too large to mean much")
    said.append(
        "not counted: who takes part and when, how many sequences each client says it has, times and sizes of messages, other "
        "runs' choice of settings by the same data"
    )
    said.append("several clients of one data holder, or its data at several clients, count as several")
    return tuple(said)


def _whom(spec: RunSpec) -> str:
    """From whom it protects what."""
    dp = _dp(spec)
    match dp.mode:
        case "central":
            sees = "each sum before its noise" if spec.privacy.secure_aggregation else "the updates"
            return f"holds against whoever sees models, not against the server, which sees {sees}"
        case "distributed" if dp.known:
            return (
                f"holds against the server and {dp.known:,} of the clients in a sum together, while the {honest(spec):,} others "
                "that are counted on keep to the rules"
            )
        case "distributed":
            return (
                f"holds against the server alone, while the {honest(spec):,} clients that are counted on keep to the rules; less "
                "against another client, which knows its own noise (colluding = 0)"
            )
        case "local":
            return "holds against the server and everybody else; the noise is the largest of all modes"
        case "example":
            return "holds for single sequences, not for all that a client has; a client with many alike is not hidden"


def drawn_again(spec: RunSpec, epsilon: float) -> float:
    """What it adds to delta, at most, that a round's cohort is drawn again while it is below the quorum.

    Given that it is not, a round's law is within the probability of that, p, of the assumed one; so are both neighbours', each
    round: rounds p (1 + e^epsilon).
    """
    dp, quorum = _dp(spec), spec.cohort.quorum
    assert dp.population is not None
    assert quorum is not None  # RunSpec sees to it
    short = float(_library("scipy.stats").binom.cdf(quorum - 1, dp.population, rate(spec)))
    return spec.rounds * short * (1 + math.exp(min(epsilon, 700)))


def judge(found: Plan) -> str:
    """In words, whether the noise leaves anything of the model, and what cohort (and population) would."""
    if found.noise_norm is None:
        return ""
    ratio = found.noise_norm / found.first_clip
    if ratio <= 1:
        return f"a round's noise is {ratio:.2g} of the clip: the model can learn"
    # In these two there is more noise in the sum of more.
    power = 2 if found.mode in {"local", "distributed"} else 1
    whole, what, size = "", "a cohort", math.ceil(found.cohort * ratio**power)
    if found.mode == "example":
        what, size = "training.batch_size", math.ceil(found.batch * ratio)
        whole = " (of as many times the sequences)"
    if found.population is not None:
        whole = f" (population {math.ceil(found.population * size / found.cohort):,} at the same rate)"
    loud = "will drown the model" if ratio > DROWNS else "will slow the model down, and more rounds average it out"
    return (
        f"a round's noise is {ratio:.3g} times as long as the clip, the longest that what is learnt can be: it {loud}; "
        f"{what} of {size:,}{whole} would bring it down to the clip, as would a smaller model or a larger epsilon"
    )


# Parts ----------------------------------------------------------------------------------------------------------------


def _dp(spec: RunSpec) -> DPSpec:
    if spec.privacy.dp is None:
        raise ConfigError("the run has no [privacy.dp], so it has no noise and no epsilon")
    return spec.privacy.dp


def _check_noise(spec: RunSpec, noise: float) -> None:
    """Raise ConfigError if this noise cannot be what the run asks for."""
    dp, cohort = _dp(spec), clients_of(spec)
    # A round's clipped share is counted with deviation cohort / 20, which alone has a multiplier of cohort / 10.
    if dp.clip == "adaptive" and 10 * noise >= cohort:
        raise ConfigError(
            f"privacy.dp.clip = 'adaptive' counts who is below the clip with noise of its own, and a noise multiplier of "
            f"{noise:g} leaves nothing for the model below {math.floor(10 * noise) + 1:,} clients a round (it has {cohort:,}); "
            "raise cohort.count or epsilon, or set a clip"
        )
    if dp.mode == "central" and not spec.privacy.secure_aggregation and noise * dp.first_clip > LOUDEST:
        raise ConfigError(
            f"privacy.dp: noise of {noise:g} times the clip of {dp.first_clip:g} is more than {LOUDEST:,.0f}, the most a sum "
            "can be given; lower clip, or noise_multiplier (raise epsilon)"
        )
    if dp.population is None:
        return
    more = drawn_again(spec, spent(spec, spec.rounds, noise))
    if more > SPARE * dp.delta:
        raise ConfigError(
            f"cohort.quorum ({spec.cohort.quorum}) is too near to cohort.count ({cohort}): small cohorts would be drawn again "
            f"so often that it adds {more:.2g} to delta ({dp.delta:g}); lower cohort.quorum, or raise cohort.count, and "
            "min_clients and population with it"
        )


def clients_of(spec: RunSpec) -> int:
    """The clients that a round's sum is divided by, at least."""
    if spec.cohort.count is not None:
        return spec.cohort.count
    return spec.cohort.min_clients


def _dim(spec: RunSpec) -> int | None:
    try:
        return layout_of(spec).size
    except ConfigError:  # a custom model's, which `seqfed submit` finds out
        return None


def mechanism(spec: RunSpec, noise: float) -> Mechanism:
    """What the clients of a masked sum do, and what is counted, for this noise multiplier."""
    from seqfed.common.dp.skellam import Mechanism

    dim = layout_of(spec).size
    most = math.ceil(clients_of(spec) * spec.cohort.over_select)
    return Mechanism(dim, spec.privacy.b, spec.privacy.bound, most, honest(spec), noise)


def example_batches(spec: RunSpec, examples: int | None) -> tuple[float, int]:
    """The probability with which a step takes a sequence, and the steps a round, of a client with so many."""
    if examples is None:
        raise ConfigError("privacy.dp.mode = 'example' depends on how many sequences a client has; say how many")
    each = min(1.0, spec.training.batch_size / examples)
    return each, spec.training.steps or (spec.training.epochs or 1) * math.ceil(1 / each)


def epsilon_of_histories(parts: Iterable[tuple[float, float, int]], delta: float) -> float:
    """Epsilon of all of one client's DP-SGD together, whatever runs it is of; each part: noise multiplier, probability of a
    sequence, steps. Raises ConfigError without the extra seqfed[dp].
    """
    accountant = _library("opacus.accountants").RDPAccountant()
    accountant.history = [one for one in parts if one[2]]
    return float(accountant.get_epsilon(delta)) if accountant.history else 0.0


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"the accounting of differential privacy needs {name.partition('.')[0]}; pip install 'seqfed[dp]'"
        ) from error
