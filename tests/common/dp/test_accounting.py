"""What noise is worth: published values, other accountants, a direct formula, and a slow oracle of the tree."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from typing import Any

import dp_accounting
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant as OpacusAccountant
from scipy.stats import norm

from seqfed.common.config import validate
from seqfed.common.dp import accounting
from seqfed.common.dp.accounting import EXACT, PLD, RDP, RDP_SKELLAM, Gaussian, Skellam, epsilon_of
from seqfed.common.errors import ConfigError
from seqfed.common.spec import RunSpec

NEAR = 0.01  # what two accountants of the same thing may differ by


def spec_of(
    dp: dict[str, Any], *, cohort: dict[str, Any] | None = None, secure: bool = False, survivors: int = 3, **tables: Any
) -> RunSpec:
    privacy: dict[str, Any] = {"dp": {"delta": 1e-5, **dp}}
    if secure:
        privacy |= {"secure_aggregation": True, "min_survivors": survivors, "b": 18}
    return validate(
        RunSpec,
        {
            "data": {"features": 2, "classes": 3},
            "aggregation": {"weighting": "uniform"},
            "evaluation": {"every": 0},
            "cohort": {"min_clients": 100, "count": 100, "quorum": 50, **(cohort or {})},
            "privacy": privacy,
            **tables,
        },
        "test",
    )


def sampled(noise: float, rounds: int, delta: float = 1e-5, quorum: int = 30) -> RunSpec:
    """100 of 10,000 clients a round."""
    return spec_of(
        {"mode": "central", "noise_multiplier": noise, "population": 10_000, "delta": delta},
        cohort={"min_clients": 10_000, "quorum": quorum},
        rounds=rounds,
    )


def direct_delta(noise: float, epsilon: float) -> float:
    """Delta of one Gaussian release (Balle and Wang 2018, theorem 8)."""
    a, b = 1 / (2 * noise), epsilon * noise
    return float(norm.cdf(a - b) - math.exp(epsilon + norm.logcdf(-a - b)))


# Gaussian -------------------------------------------------------------------------------------------------------------


def test_the_published_value_with_sampling() -> None:
    found, accountant = epsilon_of([Gaussian(1.0, 1000, 0.01)], 1e-5)
    assert accountant == PLD
    assert found == pytest.approx(1.828, rel=1e-3)
    plan = accounting.plan(sampled(1.0, 1000))
    assert plan.epsilon == found
    assert (plan.population, plan.cohort, plan.rounds, plan.unit) == (10_000, 100, 1000, "client")
    assert "probability 0.01 (100 of 10,000)" in plan.sampling


def test_renyi_of_the_same_is_the_published_one_and_that_of_opacus() -> None:
    ours = accounting._epsilon_of_renyi(tuple(accounting.renyi([Gaussian(1.0, 1000, 0.01)])), 1e-5)
    opacus = OpacusAccountant()
    opacus.history = [(1.0, 0.01, 1000)]
    assert ours == pytest.approx(2.101, rel=NEAR)
    assert opacus.get_epsilon(1e-5) == pytest.approx(2.101, rel=NEAR)


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("rounds", [1, 10, 300])
def test_without_sampling_it_is_the_direct_formula(noise: float, rounds: int) -> None:
    found, accountant = epsilon_of([Gaussian(noise, rounds)], 1e-6)
    assert accountant == EXACT
    assert direct_delta(noise / math.sqrt(rounds), found) == pytest.approx(1e-6, rel=1e-6)
    if found < 50:
        pld = dp_accounting.pld.PLDAccountant()
        pld.compose(dp_accounting.GaussianDpEvent(noise), rounds)
        assert pld.get_epsilon(1e-6) == pytest.approx(found, rel=NEAR)


@pytest.mark.parametrize(("noise", "rate", "rounds"), [(1.0, 0.01, 100), (3.0, 0.1, 300), (5.0, 0.5, 50)])
def test_with_sampling_it_is_near_a_finer_grid_and_never_below(noise: float, rate: float, rounds: int) -> None:
    fine = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-4)
    fine.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), rounds)
    found, _ = epsilon_of([Gaussian(noise, rounds, rate)], 1e-5)
    assert fine.get_epsilon(1e-5) * (1 - 1e-9) <= found <= fine.get_epsilon(1e-5) * (1 + NEAR)


def test_whoever_is_drawn_always_gains_nothing() -> None:
    always, _ = epsilon_of([Gaussian(2.0, 10, 1.0)], 1e-5)
    nearly, _ = epsilon_of([Gaussian(2.0, 10, 0.9999)], 1e-5)
    assert nearly == pytest.approx(always, rel=NEAR)


def test_many_releases_are_composed_as_few_are() -> None:
    whole = dp_accounting.pld.PLDAccountant(value_discretization_interval=accounting.GRID)
    whole.compose(dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(2.0)), 2500)
    found, accountant = epsilon_of([Gaussian(2.0, 2500, 0.01)], 1e-5)
    assert accountant == PLD
    assert found == pytest.approx(whole.get_epsilon(1e-5), rel=1e-6)


@pytest.mark.parametrize(
    ("release", "accountant"),
    [
        (Gaussian(1.0, 1_000_000, 0.9), RDP),  # a grid of 10^9 points
        (Gaussian(0.05, 1, 0.9), RDP),
        (Gaussian(0.5, 1, 1e-6), PLD),
        (Gaussian(100.0, 1_000_000, 0.9), PLD),
    ],
)
def test_no_run_makes_the_accountant_take_all_memory(release: Gaussian, accountant: str) -> None:
    """Whoever submits a run, or shows one to a client, chooses these numbers."""
    tracemalloc.start()
    try:
        found = epsilon_of([release], 1e-5)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found[1] == accountant
    assert found[0] <= accounting._epsilon_of_renyi(tuple(accounting.renyi([release])), 1e-5)
    assert most < 1 << 29


def test_runs_compose_and_less_than_by_adding() -> None:
    first, second = spec_of({"mode": "central", "noise_multiplier": 3.0}), sampled(1.0, 100)
    apart = [accounting.spent(one, 10, noise) for one, noise in ((first, 3.0), (second, 1.0))]
    whole, accountant = accounting.together([(first, 10, 3.0, None), (second, 10, 1.0, None)], 1e-5)
    assert accountant == PLD
    assert max(apart) < whole < sum(apart)
    twice, accountant = accounting.together([(first, 10, 3.0, None), (first, 10, 3.0, None)], 1e-5)
    assert (twice, accountant) == epsilon_of([Gaussian(3.0, 20)], 1e-5)
    assert accounting.together([], 1e-5)[0] == 0
    assert accounting.together([(first, 10, 3.0, 0)], 1e-5)[0] == 0


# The goal -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 4.0, 10.0])
@pytest.mark.parametrize(
    "dp", [{"mode": "central"}, {"mode": "local"}, {"mode": "central", "mechanism": "ftrl", "participations": 2}]
)
def test_the_noise_for_a_goal_is_the_smallest_of_four_digits(dp: dict[str, Any], epsilon: float) -> None:
    spec = spec_of({**dp, "epsilon": epsilon}, rounds=20)
    plan = accounting.plan(spec)
    assert plan.noise_multiplier is not None
    assert plan.epsilon is not None
    assert epsilon * 0.99 < plan.epsilon <= epsilon
    digit = 10.0 ** (math.floor(math.log10(plan.noise_multiplier)) - 3)
    assert plan.noise_multiplier == pytest.approx(round(plan.noise_multiplier / digit) * digit)
    assert accounting.spent(spec, 20, plan.noise_multiplier - digit) > epsilon


def test_the_noise_for_a_goal_with_sampling() -> None:
    spec = spec_of(
        {"mode": "central", "epsilon": 1.828, "population": 10_000},
        cohort={"min_clients": 10_000, "quorum": 30},
        rounds=1000,
    )
    plan = accounting.plan(spec)
    assert plan.noise_multiplier == pytest.approx(1.0, rel=2e-3)
    assert plan.epsilon is not None
    assert plan.epsilon <= 1.828


def test_a_goal_beyond_all_noise_is_refused() -> None:
    with pytest.raises(ConfigError, match="no noise multiplier up to 1e\\+06 gives epsilon 1e-09"):
        accounting.solve(lambda _: 1.0, 1e-9)


def test_an_epsilon_that_says_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="'privacy.dp.epsilon' = 101"):
        spec_of({"mode": "central", "epsilon": 101.0})


@given(st.floats(0.3, 3), st.integers(1, 200))
def test_each_round_spends_more(noise: float, rounds: int) -> None:
    spec = spec_of({"mode": "central", "noise_multiplier": 1.0}, rounds=1000)
    assert accounting.spent(spec, rounds, noise) < accounting.spent(spec, rounds + 1, noise)
    assert accounting.spent(spec, rounds, noise) < accounting.spent(spec, rounds, noise * 0.9)
    assert accounting.spent(spec, rounds + 5, noise, taken=rounds) == accounting.spent(spec, rounds, noise)
    assert accounting.spent(spec, 0, noise) == 0


def test_a_run_without_privacy_has_no_plan() -> None:
    with pytest.raises(ConfigError, match="no \\[privacy.dp\\]"):
        accounting.plan(validate(RunSpec, {"data": {"features": 2, "classes": 3}}, "test"))


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ConfigError, match="needs dp_accounting; pip install 'seqfed\\[dp\\]'"):
        accounting.gaussian_epsilon(1.25, 1.5e-5)  # of which nothing is remembered


# The tree -------------------------------------------------------------------------------------------------------------


def blocks_of(rounds: int) -> set[tuple[int, int]]:
    """(first, last + 1) of the blocks that make up each prefix, from its binary digits."""
    found = set()
    for prefix in range(1, rounds + 1):
        start = 0
        for level in reversed(range(prefix.bit_length())):
            if prefix >> level & 1:
                found.add((start, start + (1 << level)))
                start += 1 << level
    return found


@pytest.mark.parametrize("rounds", [*range(1, 13)])
def test_the_tree_moves_no_more_than_its_bound(rounds: int) -> None:
    blocks = blocks_of(rounds)
    for times in range(1, rounds + 1):
        worst = max(
            sum(sum(first <= one < last for one in chosen) ** 2 for first, last in blocks)
            for chosen in itertools.combinations(range(rounds), times)
        )
        bound = accounting.tree_sensitivity(rounds, times) ** 2
        assert worst <= bound + 1e-9
        assert bound <= worst * 1.3
        if times in {1, rounds}:
            assert bound == pytest.approx(worst)


def test_a_client_that_comes_once_is_in_as_many_blocks_as_the_tree_is_high() -> None:
    assert accounting.tree_sensitivity(1000, 1) ** 2 == pytest.approx(10)
    spec = spec_of({"mode": "central", "mechanism": "ftrl", "noise_multiplier": 4.0, "participations": 1}, rounds=1000)
    single, _ = epsilon_of([Gaussian(4.0 / math.sqrt(10))], 1e-5)
    assert accounting.plan(spec).epsilon == single
    assert accounting.spent(spec, 1, 4.0) == epsilon_of([Gaussian(4.0)], 1e-5)[0]


# The other modes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variance", "rounds"), [(1e4, 1), (1e6, 50)])
def test_skellam_is_the_gaussian_of_its_variance_where_it_is_wide(variance: float, rounds: int) -> None:
    l2 = math.sqrt(variance) / 3  # a noise multiplier of 3
    found, accountant = epsilon_of([Skellam(variance, l2, l2 * 10, rounds)], 1e-5)
    gaussian = accounting._epsilon_of_renyi(tuple(accounting.renyi([Gaussian(3.0, rounds)])), 1e-5)
    assert accountant == RDP_SKELLAM
    assert gaussian <= found <= gaussian * (1 + NEAR)


def test_skellam_where_it_is_narrow_costs_more() -> None:
    wide, narrow = (accounting.rdp_of_skellam([2, 8], variance, math.sqrt(variance), 50.0) for variance in (1e6, 10.0))
    assert all(one > other for one, other in zip(narrow, wide, strict=True))
    # By hand: order 2, variance 10, L2 = sqrt(10), L1 = 50: 1 + min((3 10 + 300) / 400, 150 / 20)
    assert narrow[0] == pytest.approx(1 + 330 / 400)


def test_distributed_costs_about_what_central_does() -> None:
    cohort = {"min_clients": 100, "quorum": 80}
    tables: dict[str, Any] = {"rounds": 20, "model": {"hidden": 8, "layers": 1}}
    central = accounting.plan(spec_of({"mode": "central", "epsilon": 4.0}, cohort=cohort, **tables))
    spread = accounting.plan(spec_of({"mode": "distributed", "epsilon": 4.0}, cohort=cohort, secure=True, **tables))
    assert central.noise_multiplier is not None
    assert spread.noise_multiplier is not None
    assert spread.accountant == RDP_SKELLAM
    assert central.noise_multiplier < spread.noise_multiplier < central.noise_multiplier * 1.15  # RDP, and whole orders


@pytest.mark.parametrize("survivors", [3, 5, 10])
def test_distributed_holds_against_one_of_the_clients_who_knows_its_own_noise(survivors: int) -> None:
    """The others' noise alone is worth what is said; with colluding = 0 it takes everybody's, and that is said."""
    cohort = {"min_clients": survivors, "count": survivors, "quorum": survivors}

    def epsilons(**dp: Any) -> tuple[float, float, str]:
        """As planned, against a client that takes its noise away, and the words."""
        given = {"mode": "distributed", "epsilon": 2.0, **dp}
        spec = spec_of(given, cohort=cohort, secure=True, survivors=survivors, model={"hidden": 64, "layers": 1})
        plan = accounting.plan(spec)
        assert plan.epsilon is not None
        assert plan.noise_multiplier is not None
        found = accounting.mechanism(spec, plan.noise_multiplier)
        left = found.client_variance * (survivors - 1)
        seen, _ = epsilon_of([Skellam(left, found.bound2, found.bound1, spec.rounds)], 1e-5)
        return plan.epsilon, seen, plan.caveats[0]

    claimed, seen, told = epsilons()
    assert seen <= claimed * (1 + 1e-9) <= 2.0 * (1 + 1e-9)
    assert f"the server and 1 of the clients in a sum together, while the {survivors - 1} others" in told
    claimed, seen, told = epsilons(colluding=0)
    assert seen > claimed * 1.05
    assert "holds against the server alone" in told


def test_local_counts_any_two_updates_as_neighbours() -> None:
    local = accounting.plan(spec_of({"mode": "local", "noise_multiplier": 4.0}, rounds=3))
    assert local.epsilon == epsilon_of([Gaussian(2.0, 3)], 1e-5)[0]
    assert "any two updates" in local.neighbours


def test_examples_are_counted_as_opacus_does() -> None:
    spec = spec_of({"mode": "example", "noise_multiplier": 1.1}, rounds=5, training={"batch_size": 10, "epochs": 2})
    assert accounting.example_batches(spec, 1000) == (0.01, 200)
    plan = accounting.plan(spec, examples=1000)
    opacus = OpacusAccountant()
    opacus.history = [(1.1, 0.01, 1000)]
    assert plan.unit == "example"
    assert plan.epsilon == pytest.approx(opacus.get_epsilon(1e-5))
    pld, _ = epsilon_of([Gaussian(1.1, 1000, 0.01)], 1e-5)
    assert plan.epsilon is not None
    assert plan.epsilon > pld  # Renyi's is never below
    unknown = accounting.plan(spec)
    assert (unknown.epsilon, unknown.noise_multiplier) == (None, 1.1)
    with pytest.raises(ConfigError, match="how many sequences"):
        accounting.spent(spec, 1, 1.1)


def test_examples_solve_for_their_own_noise() -> None:
    spec = spec_of({"mode": "example", "epsilon": 3.0}, rounds=5, training={"batch_size": 32})
    few, many = (accounting.noise_multiplier(spec, examples) for examples in (200, 20_000))
    assert few is not None
    assert many is not None
    assert few > many
    assert accounting.spent(spec, 5, few, examples=200) <= 3.0
    assert accounting.plan(spec).epsilon == 3.0


# What it is not -------------------------------------------------------------------------------------------------------


def test_an_adaptive_clip_needs_clients_to_count() -> None:
    with pytest.raises(ConfigError, match="below 101 clients a round \\(it has 100\\)"):
        accounting.plan(spec_of({"mode": "central", "noise_multiplier": 10.0, "clip": "adaptive"}))
    assert accounting.plan(spec_of({"mode": "central", "noise_multiplier": 1.0, "clip": "adaptive"})).clip == "adaptive"


def test_noise_that_no_sum_can_be_given_is_refused() -> None:
    def planned(clip: float) -> accounting.Plan:
        return accounting.plan(spec_of({"mode": "central", "noise_multiplier": 16.0, "clip": clip}))

    assert planned(4096.0).clip == 4096.0
    with pytest.raises(ConfigError, match="noise of 16 times the clip of 4100 is more than 65,536"):
        planned(4100.0)


def test_a_quorum_that_makes_draws_anew_likely_is_refused() -> None:
    with pytest.raises(ConfigError, match="cohort.quorum \\(80\\) is too near"):
        accounting.plan(sampled(1.0, 1000, quorum=80))
    plan = accounting.plan(sampled(1.0, 1000, quorum=30))
    again = next(one for one in plan.caveats if "drawn again" in one)
    assert float(again.split(" to delta")[0].rsplit(" ", 1)[1]) <= 1e-7


def test_noise_that_drowns_the_model_is_said_with_a_cohort_that_would_not() -> None:
    big: dict[str, Any] = {"model": {"hidden": 256, "layers": 2}}
    loud = accounting.plan(spec_of({"mode": "central", "noise_multiplier": 1.0}, **big))
    assert loud.dim is not None
    assert loud.noise_norm == pytest.approx(math.sqrt(loud.dim) / 100)
    assert "will drown the model" in accounting.judge(loud)
    size = math.ceil(math.sqrt(loud.dim))
    assert f"a cohort of {size:,} would" in accounting.judge(loud)
    cohort = {"min_clients": size, "count": size}
    quiet = accounting.plan(spec_of({"mode": "central", "noise_multiplier": 1.0}, cohort=cohort, **big))
    assert "the model can learn" in accounting.judge(quiet)


def test_a_batch_that_would_not_drown_is_reckoned_from_the_batch() -> None:
    run = {"mode": "example", "noise_multiplier": 1.0}
    loud = accounting.plan(spec_of(run, training={"batch_size": 32}, model={"hidden": 64, "layers": 1}), examples=5000)
    assert loud.noise_norm is not None
    assert loud.noise_norm > 1
    size = math.ceil(32 * loud.noise_norm)
    assert f"training.batch_size of {size:,} (of as many times the sequences) would bring it down" in accounting.judge(
        loud
    )
    quiet = spec_of(run, training={"batch_size": size}, model={"hidden": 64, "layers": 1})
    assert "the model can learn" in accounting.judge(accounting.plan(quiet, examples=5000))


def test_an_adaptive_clip_is_judged_by_its_first() -> None:
    big: dict[str, Any] = {"model": {"hidden": 256, "layers": 2}}
    loud = accounting.plan(spec_of({"mode": "central", "noise_multiplier": 5.0, "clip": "adaptive"}, **big))
    assert loud.dim is not None
    assert loud.noise_norm == pytest.approx(5.0 * 0.1 * math.sqrt(loud.dim) / 100)
    assert "will drown the model" in accounting.judge(loud)


def test_caveats_name_what_the_number_does_not_say() -> None:
    dp = {"mode": "central", "noise_multiplier": 1.0, "evaluation": "public", "delta": 0.01}
    told = " ".join(accounting.plan(spec_of(dp, cohort={"min_clients": 200, "count": 200})).caveats)
    assert "NOT private" in told
    assert "not against the server" in told
    assert "too large to mean much" in told
    assert "how many sequences each client says it has" in told


def test_examples_are_told_apart_by_their_number_and_that_is_said() -> None:
    told = accounting.plan(spec_of({"mode": "example", "epsilon": 2.0})).caveats
    assert any("tells the server how many sequences it has, without noise" in one for one in told)


def test_neighbours_are_one_client_more_or_less() -> None:
    """What moves by one half with a client is a count about one half of the clients, not of those within alone."""
    assert accounting.plan(spec_of({"mode": "central", "noise_multiplier": 1.0})).neighbours == (
        "one client in a round's sums, or not"
    )
