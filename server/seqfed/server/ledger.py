"""The server's ledger of differential privacy, as pure functions: what a round adds to it, whether another may begin, and the
account of one run and of all.

An entry is made with the round's model and stands in its transaction, so what was spent is there if and only if the model is.
Of the data holders that were in a round each has an entry of its own, where a run claims nothing of sampling. Where it does,
what counts is that a client may have been drawn, and the one entry of the federation is everybody's.

Several runs' releases of one client compose, whatever its data were there: the unit is the client.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from seqfed.common.dp import accounting
from seqfed.common.dp.accounting import Gaussian, Release
from seqfed.common.spec import DPSpec, RunSpec
from seqfed.common.views import FEDERATION, LedgerEntry, PrivacyReport, PrivacyView, SpentView
from seqfed.server.audit import Kind, Note

ROUNDING = 1e-9  # relative: the last round's epsilon is the goal itself, computed again

Ledger = Mapping[str, LedgerEntry]  # of one run, by holder


class Booked(NamedTuple):
    """A run and its ledger."""

    name: str
    spec: RunSpec
    ledger: Ledger


def opened(run: str, spec: RunSpec) -> tuple[LedgerEntry, ...]:
    """The first entry of a run with differential privacy; none of another. Blocking: it solves for the noise, once for all.

    Raises ConfigError if no noise gives what the run asks for.
    """
    if spec.privacy.dp is None:
        return ()
    plan = accounting.plan(spec)
    spent = None if plan.unit == "example" else 0.0
    noise, words = plan.noise_multiplier, (plan.sampling, plan.accountant)
    return (LedgerEntry(run, FEDERATION, 0, 0, plan.unit, spent, plan.delta, noise, *words),)


def after(
    spec: RunSpec, ledger: Ledger, round_: int, clients: Collection[str], releases: int = 1
) -> tuple[LedgerEntry, ...]:
    """The entries that this round changes. clients: who was in it. releases: sums opened for it, those of no use included."""
    dp, before = _dp(spec), ledger[FEDERATION]
    count = before.releases + releases
    found = [_entry(spec, before, FEDERATION, round_, count, None)]
    if dp.population is None:
        # A tree's later noise is given together with what went in before: then everybody's account moves with each round.
        others = ledger.keys() - {FEDERATION} if dp.mechanism == "ftrl" else set[str]()
        for name in sorted({*clients, *others}):
            own = ledger[name].releases if name in ledger else 0
            found.append(_entry(spec, before, name, round_, own + releases * (name in clients), count))
    return tuple(found)


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
    begun = [one for one in runs if FEDERATION in one.ledger and one.ledger[FEDERATION].releases]
    of_clients = [one for one in begun if one.ledger[FEDERATION].unit == "client"]
    if of_clients:
        delta = max(one.ledger[FEDERATION].delta for one in of_clients)
        (epsilon, accountant), holder = _most_spent(of_clients, delta)
        found.append(SpentView("client", holder, len(of_clients), epsilon, delta, accountant))
    of_examples = [one for one in begun if one.ledger[FEDERATION].unit == "example"]
    if of_examples:
        goals = [_dp(one.spec).epsilon for one in of_examples]
        epsilon_ = None if None in goals else math.fsum(goal or 0 for goal in goals)
        delta = math.fsum(one.ledger[FEDERATION].delta for one in of_examples)
        words = "the runs' goals and deltas added up; each client's own account is below"
        found.append(SpentView("example", FEDERATION, len(of_examples), epsilon_, delta, words))
    return found


def _most_spent(runs: Sequence[Booked], delta: float) -> tuple[tuple[float, str], str]:
    """The largest epsilon of any client over these runs, the accountant, and whose it is."""
    everybody: list[Release] = []  # what counts for whoever may have been drawn
    own: dict[str, list[Release]] = defaultdict(list)
    for one in runs:
        total = one.ledger[FEDERATION]
        assert total.noise_multiplier is not None  # only `example` mode leaves it to the clients
        if _dp(one.spec).population is not None:
            everybody += accounting.releases(one.spec, total.releases, total.noise_multiplier)
            continue
        for entry in one.ledger.values():
            if entry is not total:
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
