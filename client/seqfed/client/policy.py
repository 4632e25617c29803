"""A data holder's own rules, the content of policy.toml: which runs its client takes part in, and how much they get in all.

Rules only: `seqfed.client.consent` finds out whose run it is and what has been spent, and applies them before anything is read
of the data. What a run says of itself (its cohort, say) is its operator's word; the operator's signature keeps the server from
changing it, and nothing here can make either of them keep it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import Field

from seqfed.common.errors import ConfigError, PolicyRefused
from seqfed.common.spec import Count, Name, RunSpec, Settings

Total = Annotated[int, Field(ge=0, le=1 << 62)]
Positive = Annotated[float, Field(gt=0)]
Names = Annotated[tuple[Name, ...], Field(strict=False)]


class Policy(Settings):
    """What is allowed. A rule that is left out allows everything, but code of strangers, unsigned runs over TLS aside."""

    # Whose, and which.
    operators: Names = Field(
        default=(), description="only runs that one of these has signed; empty: of any operator of the federation"
    )
    unsigned: bool = Field(default=False, description="over TLS too, take part in runs that nobody has signed")
    runs: Names = Field(default=(), description="only runs of these names; empty: any")
    tasks: (
        Annotated[
            tuple[Literal["classification", "multilabel", "regression", "forecast", "next_token", "anomaly"], ...],
            Field(strict=False),
        ]
        | None
    ) = Field(default=None, description="only these kinds; left out: any")
    models: Annotated[tuple[Literal["rnn", "lstm", "gru"], ...], Field(strict=False)] | None = Field(
        default=None, description="only these kinds; left out: any that is built in"
    )
    custom: Names = Field(
        default=(), description="module:function whose code runs may use as their model, as allow_custom in client.toml"
    )
    # One run.
    max_epochs: Count | None = Field(default=None, description="passes over the data a round")
    max_steps: Count | None = Field(default=None, description="batches a round, of runs that count in batches")
    max_rounds: Count | None = Field(default=None, description="of one run")
    max_model_bytes: Total | None = Field(default=None, description="of one model, four a parameter")
    min_cohort: Count | None = Field(
        default=None, description="smallest number of clients behind a new model, or in a masked sum"
    )
    secure_aggregation: bool = Field(default=False, description="only runs whose server sees no single update")
    semi_honest: bool = Field(
        default=False,
        description="with secure_aggregation: also runs that hide updates only from a server that does not lie",
    )
    max_clip: Positive | None = Field(default=None, description="L2 norm to which this client clips its update")
    min_noise: Positive | None = Field(default=None, description="noise multiplier, in units of the clip")
    # All runs together, of whomever, for ever: the account is kept in the client's state folder.
    max_runs: Total | None = Field(default=None, description="runs")
    max_rounds_total: Total | None = Field(
        default=None, description="rounds; trainings and evaluations are counted apart"
    )
    max_bytes_total: Total | None = Field(
        default=None, description="of all models fetched and updates sent, as they are before compression"
    )
    max_epsilon: Positive | None = Field(
        default=None, description="differential privacy's epsilon of all that was sent"
    )


@dataclass(frozen=True)
class Released:
    """What a run with differential privacy has had of this data holder. data: of which data set; noise: its multiplier.

    round: the last one that it was asked for. releases: updates that it has been given, and the one in question.
    """

    run: str
    data: str
    spec: RunSpec
    noise: float | None
    round: int
    releases: int


@dataclass(frozen=True)
class Spent:
    """What a run, and all runs together, have had of this client, the task in question included.

    rounds: different models that the run has had trained, or for an evaluation scored; rounds_total: the same of all runs.
    """

    runs: int = 1
    rounds: int = 1
    rounds_total: int = 1
    bytes_total: int = 0
    released: Callable[[], Sequence[Released]] = field(default=tuple, compare=False, repr=False)


def check(policy: Policy, spec: RunSpec, model_bytes: int, operator: str | None, spent: Spent) -> None:
    """Raise PolicyRefused, with every rule that is broken, if this run may not have what it asks for.

    operator: who has signed the run; None if nobody is known to have.
    """
    found = "; ".join(refusals(policy, spec, model_bytes, operator, spent))
    if found:
        raise PolicyRefused(found)


def refusals(policy: Policy, spec: RunSpec, model_bytes: int, operator: str | None, spent: Spent) -> Iterator[str]:
    """Each rule that is broken, with the value and the limit, in words."""
    yield from _whose(policy, spec, operator)
    yield from _work(policy, spec)
    limits: tuple[tuple[str, str, int, int | None], ...] = (
        ("max_rounds", "rounds in this run", max(spec.rounds, spent.rounds), policy.max_rounds),
        ("max_model_bytes", "bytes of a model", model_bytes, policy.max_model_bytes),
        ("max_runs", "runs", spent.runs, policy.max_runs),
        ("max_rounds_total", "rounds in all runs together", spent.rounds_total, policy.max_rounds_total),
        ("max_bytes_total", "bytes in all runs together", spent.bytes_total, policy.max_bytes_total),
    )
    for rule, what, value, limit in limits:
        if limit is not None and value > limit:
            yield f"{rule}: {value:,} {what}, and the limit is {limit:,}"
    secure = spec.privacy.secure_aggregation
    smallest = spec.privacy.min_survivors if secure else spec.smallest_sum
    if policy.min_cohort is not None and smallest < policy.min_cohort:
        what = "privacy.min_survivors" if secure else "cohort.min_clients and quorum"
        yield (
            f"min_cohort: as few as {smallest:,} clients can be behind a model of this run, "
            f"and the limit is {policy.min_cohort:,}; raise {what}"
        )
    yield from _privacy(policy, promised(spec))
    if policy.max_epsilon is not None:
        yield from _ledger(policy.max_epsilon, spent.released())


def _whose(policy: Policy, spec: RunSpec, operator: str | None) -> Iterator[str]:
    if policy.operators and operator not in policy.operators:
        whose = "of nobody who has signed it" if operator is None else f"of '{operator}'"
        yield f"operators: the run is {whose}, and allowed are {_list(policy.operators)}"
    if policy.runs and spec.name not in policy.runs:
        yield f"runs: the run's name is '{spec.name}', and allowed are {_list(policy.runs)}"
    if policy.tasks is not None and spec.task.kind not in policy.tasks:
        yield f"tasks: the run's task is {spec.task.kind}, and allowed are {_list(policy.tasks)}"
    if spec.model.custom is not None:
        if spec.model.custom not in policy.custom:
            yield f"custom: the run's model is '{spec.model.custom}', and allowed are {_list(policy.custom)}"
    elif policy.models is not None and spec.model.kind not in policy.models:
        yield f"models: the run's model is {spec.model.kind}, and allowed are {_list(policy.models)}"


def _work(policy: Policy, spec: RunSpec) -> Iterator[str]:
    """A limit in one unit would be none if a run could count in the other, so that needs a limit of its own."""
    steps = spec.training.steps
    if steps is None:
        epochs = spec.training.epochs or 1
        if policy.max_epochs is not None and epochs > policy.max_epochs:
            yield f"max_epochs: {epochs:,} epochs a round, and the limit is {policy.max_epochs:,}"
        if policy.max_epochs is None and policy.max_steps is not None:
            yield f"max_steps: the run counts in epochs ({epochs:,} a round), for which max_epochs sets no limit"
    elif policy.max_steps is None:
        if policy.max_epochs is not None:
            yield f"max_epochs: the run counts in batches ({steps:,} steps a round), for which max_steps sets no limit"
    elif steps > policy.max_steps:
        yield f"max_steps: {steps:,} batches a round, and the limit is {policy.max_steps:,}"


@dataclass(frozen=True)
class Promised:
    """What a run does for its data holders' privacy; None: nothing. epsilon: of the whole run."""

    secure: bool = False
    clip: float | None = None
    noise: float | None = None
    epsilon: float | None = None
    semi_honest: bool = False  # secure, but only from a server that does not lie


def promised(spec: RunSpec) -> Promised:
    """What the run's operator has signed of this. An adaptive clip is none that can be relied on."""
    secure, dp, weak = spec.privacy.secure_aggregation, spec.privacy.dp, spec.privacy.mode == "semi_honest"
    if dp is None:
        return Promised(secure, spec.privacy.clip if secure else None, semi_honest=weak)
    clip = None if isinstance(dp.clip, str) else dp.clip
    epsilon = dp.epsilon if dp.noise_multiplier is None else _planned(spec)
    return Promised(secure, clip, multiplier(spec), epsilon, semi_honest=weak)


def multiplier(spec: RunSpec) -> float | None:
    """The run's noise multiplier; None if it has none, or only this client's data tell, or it takes the extra seqfed[dp]."""
    dp = spec.privacy.dp
    if dp is None or dp.noise_multiplier is not None:
        return None if dp is None else dp.noise_multiplier
    return _reckoned(spec.canonical)[0]


def _planned(spec: RunSpec) -> float | None:
    return _reckoned(spec.canonical)[1]


@lru_cache(maxsize=64)
def _reckoned(canonical: bytes) -> tuple[float | None, float | None]:
    """Noise multiplier and epsilon of the whole run, as far as they are known."""
    from seqfed.common.dp import accounting

    try:
        found = accounting.plan(RunSpec.model_validate_json(canonical))
    except ConfigError:
        return None, None
    return found.noise_multiplier, found.epsilon


@dataclass(frozen=True)
class Account:
    """What was spent of this data holder in one unit of privacy; epsilon: None where it is not known."""

    unit: str
    epsilon: float | None
    delta: float
    accountant: str


def account(released: Sequence[Released]) -> list[Account]:
    """The ledger added up, one account a unit. Raises ConfigError without the extra seqfed[dp].

    Releases of one client compose, whatever data set they are of. Where the server draws clients in secret, all rounds so far
    count, and sampling is what the run's operator has signed.
    """
    from seqfed.common.dp import accounting

    found, parts, deltas, goals = [], [], [], list[tuple[float | None, float]]()
    for one in released:
        dp = one.spec.privacy.dp
        assert dp is not None  # or it would not be in the ledger
        if dp.mode == "example":
            goals.append((dp.epsilon, dp.delta))
            continue
        deltas.append(dp.delta)
        drawn = dp.population is not None
        taken = None if drawn else one.releases
        parts.append((one.spec, one.round if drawn else max(one.round, one.releases), one.noise, taken))
    if parts:
        known = [(spec, rounds, noise, taken) for spec, rounds, noise, taken in parts if noise is not None]
        whole = accounting.together(known, max(deltas)) if len(known) == len(parts) else (None, "unknown noise")
        found.append(Account("client", whole[0], max(deltas), whole[1]))
    if goals:
        known_goals = [epsilon for epsilon, _ in goals if epsilon is not None]
        whole_goal = math.fsum(known_goals) if len(known_goals) == len(goals) else None
        found.append(Account("example", whole_goal, math.fsum(delta for _, delta in goals), "the runs' goals added up"))
    return found


def _ledger(limit: float, released: Sequence[Released]) -> Iterator[str]:
    try:
        accounts = account(released)
    except ConfigError as error:
        yield f"max_epsilon: {error}"
        return
    for one in accounts:
        if one.epsilon is None:
            yield f"max_epsilon: what is spent of the privacy of each {one.unit} is not known, and the limit is {limit:g}"
        elif one.epsilon > limit:
            yield (
                f"max_epsilon: all runs together, with this round, have epsilon {one.epsilon:.4g} (delta {one.delta:g}, unit "
                f"{one.unit}), and the limit is {limit:g}"
            )


def _privacy(policy: Policy, run: Promised) -> Iterator[str]:
    if policy.secure_aggregation and not run.secure:
        yield (
            "secure_aggregation: required, and the server sees every single update of this run; "
            "set privacy.secure_aggregation = true in it"
        )
    if policy.secure_aggregation and run.secure and run.semi_honest and not policy.semi_honest:
        yield (
            "semi_honest: the run hides updates only from a server that does not lie (privacy.mode = 'semi_honest'), and that is "
            "not allowed here"
        )
    if policy.max_clip is not None and (run.clip is None or run.clip > policy.max_clip):
        yield f"max_clip: {_own('clip', run.clip)}, and the limit is {policy.max_clip:g}"
    if policy.min_noise is not None and (run.noise is None or run.noise < policy.min_noise):
        yield f"min_noise: {_own('noise', run.noise)}, and the least is {policy.min_noise:g}"
    if policy.max_epsilon is not None and (run.epsilon is None or run.epsilon > policy.max_epsilon):
        yield f"max_epsilon: {_own('epsilon', run.epsilon)}, and the limit is {policy.max_epsilon:g}"


def _own(what: str, value: float | None) -> str:
    return f"the run has no {what}" if value is None else f"the run's {what} is {value:g}"


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"
