"""The server's ledger of differential privacy, as pure functions: what a round adds to it, whether another may begin, and the
account of one run and of all.

An entry is made with the round's model and stands in its transaction, so what was spent is there if and only if the model is; or
with an update that has its noise already, whatever becomes of it. Of the data holders that were in a round each has an entry of
its own, where a run claims nothing of sampling. Where it does, what counts is that a client may have been drawn, and the one
entry of the federation is everybody's.

Several runs' releases of one client compose, whatever its data were there: the unit is the client, and the server does not know
of which data set they are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from seqfed.common.dp import accounting
from seqfed.common.dp.accounting import Gaussian, Release
from seqfed.common.errors import ConfigError
from seqfed.common.spec import DPSpec, RunSpec
from seqfed.common.views import FEDERATION, LedgerEntry, PrivacyReport, PrivacyView, SpentView
from seqfed.server.audit import Kind, Note

ROUNDING = 1e-9  # relative: the last round's epsilon is the goal itself, computed again

# Modes in which each update is a release, and not the sum of a round.
BY_UPDATE: Final = frozenset({"local", "example"})

Ledger = Mapping[str, LedgerEntry]  # of one run, by holder


class Booked(NamedTuple):
    """A run and its ledger."""

    name: str
    spec: RunSpec
    ledger: Ledger


def opened(run: str, spec: RunSpec, limit: float | None = None) -> tuple[LedgerEntry, ...]:
    """The first entry of a run with differential privacy; none of another. Blocking: it solves for the noise, once for all.

    Raises ConfigError if no noise gives what the run asks for, or if it alone would pass the server's limit.
    """
    dp = spec.privacy.dp
    if dp is None:
        if limit is not None:
            raise ConfigError(
                f"the run has no [privacy.dp], so no epsilon, and this server's max_epsilon is {limit:g}; add the table"
            )
        return ()
    plan = accounting.plan(spec)
    goal = min((one for one in (plan.epsilon, dp.epsilon) if one is not None), default=math.inf)
    if limit is not None and goal > limit:
        raise ConfigError(
            f"the run's epsilon is {goal:.4g}, and this server's max_epsilon, for all runs together, is {limit:g}; lower "
            "privacy.dp.epsilon, which the noise is then solved for or the run ends at"
        )
    spent = None if plan.unit == "example" else 0.0
    noise, words = plan.noise_multiplier, (plan.sampling, plan.accountant)
    return (LedgerEntry(run, FEDERATION, 0, 0, plan.unit, spent, plan.delta, noise, *words),)


def after(
    spec: RunSpec, ledger: Ledger, round_: int, clients: Collection[str], releases: int = 1
) -> tuple[LedgerEntry, ...]:
    """The entries that this changes: so many releases of each of these clients, in sums, those of no use included, or in updates.

    Where each update is a release, the federation's account is that of whoever has sent most.
    """
    dp, before = _dp(spec), ledger[FEDERATION]
    own = {name: ledger[name].releases if name in ledger else 0 for name in clients}
    if dp.mode in BY_UPDATE:
        count = max((before.releases, *(one + releases for one in own.values())))
    else:
        count = before.releases + releases
    found = []
    if (count, round_) != (before.releases, before.round):
        found.append(_entry(spec, before, FEDERATION, round_, count, None))
    if dp.population is None:
        # A tree's later noise is given together with what went in before: then everybody's account moves with each round.
        others = ledger.keys() - {FEDERATION, *clients} if dp.mechanism == "ftrl" else set[str]()
        taken = {name: one + releases for name, one in own.items()} | {name: ledger[name].releases for name in others}
        found += [_entry(spec, before, name, round_, taken[name], count) for name in sorted(taken)]
    return tuple(found)


def sent(spec: RunSpec, ledger: Ledger, round_: int, asked: Collection[str]) -> tuple[LedgerEntry, ...]:
    """The entries that the end of a round changes where each update is a release: those of whoever was asked and has none for the
    round, since its update may have come too late to count.
    """
    return after(spec, ledger, round_, [name for name in asked if name not in ledger or ledger[name].round < round_])


def _entry(
    spec: RunSpec, first: LedgerEntry, holder: str, round_: int, releases: int, among: int | None
) -> LedgerEntry:
    """among: of how many releases of the run; None for the federation's, who was in all of them."""
    noise, words = first.noise_multiplier, (first.sampling, first.accountant)
    epsilon = None
    if first.unit == "client" and noise is not None:
        rounds, taken = (releases, None) if among is None else (among, releases)
        epsilon = accounting.spent(spec, rounds, noise, taken)
    return LedgerEntry(first.run, holder, round_, releases, first.unit, epsilon, first.delta, noise, *words)


def notes(entries: Iterable[LedgerEntry]) -> list[Note]:
    """What the audit log says of these: the federation's account only, in which everybody's is contained."""
    return [
        Note(
            Kind.PRIVACY,
            {
                "run": one.run,
                "round": one.round,
                "client": one.holder,
                "epsilon": one.epsilon,
                "delta": one.delta,
                "unit": one.unit,
            },
        )
        for one in entries
        if one.holder == FEDERATION
    ]


def allows(spec: RunSpec, ledger: Ledger, next_round: int) -> str | None:
    """Why this round may not begin, in words; None if it may. It spends one release more."""
    dp = spec.privacy.dp
    before = ledger.get(FEDERATION)
    if dp is None or dp.epsilon is None or before is None or before.epsilon is None or before.noise_multiplier is None:
        return None
    then = accounting.spent(spec, before.releases + 1, before.noise_multiplier)
    if then <= dp.epsilon * (1 + ROUNDING):
        return None
    return (
        f"privacy budget spent: epsilon {before.epsilon:.4g} of {dp.epsilon:g} (delta {dp.delta:g}, unit {before.unit}) after "
        f"{before.round} rounds; round {next_round} would make it {then:.4g}"
    )


def affords(
    limit: float, booked: Booked, others: Sequence[Booked], next_round: int, cohort: Collection[str]
) -> str | None:
    """Why this round of a run may not begin with these clients, where `limit` is the most that may be spent of any data holder
    over all runs, in words; None if it may.
    """
    fresh = {one.holder: one for one in after(booked.spec, booked.ledger, next_round, cohort)}
    unit = booked.ledger[FEDERATION].unit
    runs = [*_begun(others, unit), booked._replace(ledger={**booked.ledger, **fresh})]
    if unit == "example":
        (epsilon, delta), holder = max((_goals([one for one in runs if name in one.ledger]), name) for name in cohort)
    else:
        delta = max(one.ledger[FEDERATION].delta for one in runs)
        among = None if _dp(booked.spec).population is not None else fresh.keys() - {FEDERATION}
        (epsilon, _), holder = _most_spent(runs, delta, among)
    if epsilon <= limit * (1 + ROUNDING):
        return None
    whose = "any data holder" if holder == FEDERATION else f"client '{holder}'"
    return (
        f"privacy budget spent: round {next_round} would make epsilon {epsilon:.4g} of {whose} over all runs of this server "
        f"(delta {delta:g}, unit {unit}), and its max_epsilon is {limit:g}"
    )


def spent_out(spec: RunSpec, ledger: Ledger) -> frozenset[str]:
    """The clients that have been in as many rounds as the run's noise is made for: they are not asked again."""
    most = spec.privacy.dp.participations if spec.privacy.dp is not None else None
    if most is None:
        return frozenset()
    return frozenset(name for name, one in ledger.items() if name != FEDERATION and one.releases >= most)


# The account ----------------------------------------------------------------------------------------------------------


def report(runs: Sequence[Booked], every: Sequence[Booked] | None = None) -> PrivacyReport:
    """The account of these runs, in this order; the totals are over `every` run of the server, or over these. Blocking.

    With `every` given, each run's data holders are told too.
    """
    with_privacy = [one for one in runs if one.spec.privacy.dp is not None and FEDERATION in one.ledger]
    views = tuple(_view(one, holders=every is not None) for one in with_privacy)
    return PrivacyReport(views, tuple(totals(runs if every is None else every)))


def _view(booked: Booked, holders: bool) -> PrivacyView:
    plan, entry = accounting.plan(booked.spec), booked.ledger[FEDERATION]
    each = ((one.holder, one.releases, one.epsilon) for one in booked.ledger.values() if one is not entry)
    return PrivacyView(
        name=booked.name,
        entry=entry,
        mode=plan.mode,
        mechanism=plan.mechanism,
        neighbours=plan.neighbours,
        goal=_dp(booked.spec).epsilon,
        planned=plan.epsilon,
        rounds=plan.rounds,
        clip=plan.clip if isinstance(plan.clip, str) else f"{plan.clip:g}",
        population=plan.population,
        cohort=plan.cohort,
        caveats=plan.caveats,
        holders=tuple(sorted(each)) if holders else (),
    )


def totals(runs: Sequence[Booked]) -> list[SpentView]:
    """One for each unit that these runs have: of the client of whom most was spent, at the largest of the runs' deltas."""
    found = []
    if of_clients := _begun(runs, "client"):
        delta = max(one.ledger[FEDERATION].delta for one in of_clients)
        (epsilon, accountant), holder = _most_spent(of_clients, delta)
        found.append(SpentView("client", holder, len(of_clients), epsilon, delta, accountant))
    if of_examples := _begun(runs, "example"):
        epsilon, delta = _goals(of_examples)
        words = "the runs' goals and deltas added up; each client's own account is below"
        known = epsilon if math.isfinite(epsilon) else None
        found.append(SpentView("example", FEDERATION, len(of_examples), known, delta, words))
    return found


def _goals(runs: Iterable[Booked]) -> tuple[float, float]:
    """The epsilons that these runs' clients keep to, and their deltas, added up; infinite if one has none."""
    both = [(_dp(one.spec).epsilon or math.inf, _dp(one.spec).delta) for one in runs]
    return math.fsum(one for one, _ in both), math.fsum(one for _, one in both)


def _begun(runs: Iterable[Booked], unit: str) -> list[Booked]:
    """Those of this unit that have spent something."""
    begun = [one for one in runs if FEDERATION in one.ledger and one.ledger[FEDERATION].releases]
    return [one for one in begun if one.ledger[FEDERATION].unit == unit]


def _most_spent(
    runs: Sequence[Booked], delta: float, among: Collection[str] | None = None
) -> tuple[tuple[float, str], str]:
    """The largest epsilon of any client, or of one of these, over the runs; the accountant, and whose it is."""
    everybody: list[Release] = []  # what counts for whoever may have been drawn
    own: dict[str, list[Release]] = defaultdict(list)
    for one in runs:
        total = one.ledger[FEDERATION]
        assert total.noise_multiplier is not None  # only `example` mode leaves it to the clients
        if _dp(one.spec).population is not None:
            everybody += accounting.releases(one.spec, total.releases, total.noise_multiplier)
            continue
        for entry in one.ledger.values():
            if entry is not total and (among is None or entry.holder in among):
                parts = (one.spec, total.releases, total.noise_multiplier, entry.releases)
                own[entry.holder] += accounting.releases(*parts)
    most, holder = accounting.epsilon_of(everybody, delta), FEDERATION
    for name in _candidates(own):
        found = accounting.epsilon_of([*everybody, *own[name]], delta)
        if found[0] > most[0]:
            most, holder = found, name
    return most, holder


def _candidates(own: Mapping[str, Sequence[Release]]) -> list[str]:
    """Among whom the one with the most is: of clients with Gaussian releases only, the one with the most precise ones."""
    precision = {
        name: math.fsum(one.count / one.noise**2 for one in parts if isinstance(one, Gaussian))
        for name, parts in own.items()
        if all(isinstance(one, Gaussian) for one in parts)
    }
    others = sorted(own.keys() - precision.keys())
    return [*others, min(precision, key=lambda name: (-precision[name], name))] if precision else others


def _dp(spec: RunSpec) -> DPSpec:
    assert spec.privacy.dp is not None  # whoever has a ledger
    return spec.privacy.dp
