"""A data holder's own rules, the content of policy.toml: which runs its client takes part in, and how much they get in all.

Rules only: `seqfed.client.consent` finds out whose run it is and what has been spent, and applies them before anything is read
of the data. What a run says of itself (its cohort, say) is its operator's word; the operator's signature keeps the server from
changing it, and nothing here can make either of them keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import Field

from seqfed.common.errors import ConfigError, PolicyRefused
from seqfed.common.spec import Count, DPSpec, Name, RunSpec, Settings

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
        default=None, description="of all models fetched and updates sent, as the run compresses them"
    )
    max_epsilon: Positive | None = Field(
        default=None, description="differential privacy's epsilon of all that was sent"
    )


@dataclass(frozen=True)
class Released:
    """What a run with differential privacy has had of this data holder. data: of which data set; noise: its multiplier, None if
    the run's accounting tells it (`multiplier`).

    round: the last one that it was asked for. releases: what it has been given, and what is in question. steps: of these in
    `example` mode, DP-SGD's with the same noise and the same probability of a sequence: (noise, probability, how many).
    """

    run: str
    data: str
    spec: RunSpec
    noise: float | None
    round: int
    releases: int
    steps: tuple[tuple[float, float, int], ...] = ()


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


def check(
    policy: Policy, spec: RunSpec, model_bytes: int, operator: str | None, spent: Spent, *, costly: bool = True
) -> None:
    """Raise PolicyRefused, with the rules that are broken, if this run may not have what it asks for.

    operator: who has signed the run; None if nobody is known to have. The rules that take accounting come last, and only if no
    other is broken: what it takes is in the run's hand. costly: whether they come at all.
    """
    _refuse(_plain(policy, spec, model_bytes, operator, spent))
    if costly:
        check_release(policy, spec, spent.released)


def check_promised(policy: Policy, spec: RunSpec, examples: int | None = None) -> None:
    """The same for what the run promises of its noise. examples: the client's sequences, which tell in `example` mode."""
    _refuse(_promises(policy, spec, examples))


def check_release(
    policy: Policy, spec: RunSpec, released: Callable[[], Sequence[Released]], examples: int | None = None
) -> None:
    """The same for that, and for all that was and is to be released."""
    check_promised(policy, spec, examples)
    _refuse(_ledger(policy, released))


def refusals(
    policy: Policy, spec: RunSpec, model_bytes: int, operator: str | None, spent: Spent, examples: int | None = None
) -> Iterator[str]:
    """Each rule that is broken, with the value and the limit, in words."""
    yield from _plain(policy, spec, model_bytes, operator, spent)
    yield from _promises(policy, spec, examples)
    yield from _ledger(policy, spent.released)


def _refuse(found: Iterable[str]) -> None:
    if words := "; ".join(found):
        raise PolicyRefused(words)


def _plain(policy: Policy, spec: RunSpec, model_bytes: int, operator: str | None, spent: Spent) -> Iterator[str]:
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
    yield from _hidden(policy, spec)


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


def _hidden(policy: Policy, spec: RunSpec) -> Iterator[str]:
    """What the run's operator has signed of its clip and of what the server sees. An adaptive clip is none to rely on."""
    privacy = spec.privacy
    if policy.secure_aggregation and not privacy.secure_aggregation:
        yield (
            "secure_aggregation: required, and the server sees every single update of this run; "
            "set privacy.secure_aggregation = true in it"
        )
    elif policy.secure_aggregation and privacy.mode == "semi_honest" and not policy.semi_honest:
        yield (
            "semi_honest: the run hides updates only from a server that does not lie (privacy.mode = 'semi_honest'), and that is "
            "not allowed here"
        )
    clip = privacy.clip if privacy.secure_aggregation else None
    if privacy.dp is not None:
        clip = None if isinstance(privacy.dp.clip, str) else privacy.dp.clip
    if policy.max_clip is not None and (clip is None or clip > policy.max_clip):
        yield f"max_clip: {_own('clip', clip)}, and the limit is {policy.max_clip:g}"


def _promises(policy: Policy, spec: RunSpec, examples: int | None) -> Iterator[str]:
    """Noise and epsilon of the whole run. In `example` mode they follow from the client's data: as far as they are known, and
    without figures, which would tell how many sequences there are.
    """
    dp = spec.privacy.dp
    open_ = dp is not None and dp.mode == "example" and examples is None
    if policy.min_noise is not None:
        noise, why = _multiplier(spec, examples)
        if not (open_ and noise is None) and (noise is None or noise < policy.min_noise):
            yield f"min_noise: {why or _own('noise', noise, examples)}, and the least is {policy.min_noise:g}"
    if policy.max_epsilon is not None:
        epsilon, why = (None, "") if dp is None else (dp.epsilon, "")
        if dp is not None and dp.noise_multiplier is not None:
            _, epsilon, why = _reckoned(spec.canonical, examples)
        if not (open_ and epsilon is None) and (epsilon is None or epsilon > policy.max_epsilon):
            yield f"max_epsilon: {why or _own('epsilon', epsilon, examples)}, and the limit is {policy.max_epsilon:g}"


def multiplier(spec: RunSpec, examples: int | None = None) -> float | None:
    """The run's noise multiplier; None if it has none, or only the client's data tell, or it takes the extra seqfed[dp]."""
    return _multiplier(spec, examples)[0]


def _multiplier(spec: RunSpec, examples: int | None) -> tuple[float | None, str]:
    """The same, and why there is none, if that is not the run's own fault."""
    dp = spec.privacy.dp
    if dp is None or dp.noise_multiplier is not None:
        return (None if dp is None else dp.noise_multiplier), ""
    noise, _, why = _reckoned(spec.canonical, examples)
    return noise, why


@lru_cache(maxsize=64)
def _reckoned(canonical: bytes, examples: int | None) -> tuple[float | None, float | None, str]:
    """Noise multiplier and epsilon of the whole run, as far as they are known, or why they are not."""
    from seqfed.common.dp import accounting

    try:
        found = accounting.plan(RunSpec.model_validate_json(canonical), examples)
    except ConfigError as error:
        return None, None, str(error)
    return found.noise_multiplier, found.epsilon, ""


def whole_run(spec: RunSpec, examples: int | None = None) -> tuple[Released, ...]:
    """What all of the run's rounds would release of one client, as far as it is known; `example` mode takes its sequences."""
    dp, steps = spec.privacy.dp, list[tuple[float, float, int]]()
    if dp is None or (dp.mode == "example" and examples is None):
        return ()
    noise = multiplier(spec, examples)
    if dp.mode == "example" and noise is not None:
        from seqfed.common.dp import accounting

        rate, count = accounting.example_batches(spec, examples)
        steps.append((noise, rate, count * spec.rounds))
    taken = min(spec.rounds, dp.participations or spec.rounds)
    return (Released("", "", spec, noise, spec.rounds, taken, tuple(steps)),)


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
    count, and sampling is what the run's operator has signed. What a tree has taken in is in its noise up to the last round.
    """
    from seqfed.common.dp import accounting

    of_clients, of_examples = list[tuple[Released, DPSpec]](), list[tuple[Released, DPSpec]]()
    for one in released:
        dp = one.spec.privacy.dp
        assert dp is not None  # or it would not be in the ledger
        (of_examples if dp.mode == "example" else of_clients).append((one, dp))
    found = []
    if of_clients:
        delta, parts = max(dp.delta for _, dp in of_clients), []
        for one, dp in of_clients:
            noise = multiplier(one.spec) if one.noise is None else one.noise
            rounds = max(one.releases, one.spec.rounds if dp.mechanism == "ftrl" else one.round)
            if noise is not None:
                parts.append((one.spec, rounds, noise, None if dp.population is not None else one.releases))
        known = len(parts) == len(of_clients)
        whole = accounting.together(parts, delta) if known else (None, "unknown noise")
        found.append(Account("client", whole[0], delta, whole[1]))
    if of_examples:
        delta = max(dp.delta for _, dp in of_examples)
        epsilon = None
        if all(one.steps for one, _ in of_examples):
            epsilon = accounting.epsilon_of_histories((step for one, _ in of_examples for step in one.steps), delta)
        found.append(Account("example", epsilon, delta, accounting.RDP_OPACUS))
    return found


def _ledger(policy: Policy, released: Callable[[], Sequence[Released]]) -> Iterator[str]:
    limit = policy.max_epsilon
    if limit is None:
        return
    try:
        accounts = account(released())
    except ConfigError as error:
        yield f"max_epsilon: {error}"
        return
    for one in accounts:
        if one.epsilon is None:
            yield f"max_epsilon: what is spent of the privacy of each {one.unit} is not known, and the limit is {limit:g}"
        elif one.epsilon > limit:
            # how much it is of each sequence tells how many there are
            much = "a larger epsilon" if one.unit == "example" else f"epsilon {one.epsilon:.4g}"
            yield (
                f"max_epsilon: all runs together, with this round, have {much} (delta {one.delta:g}, unit {one.unit}), "
                f"and the limit is {limit:g}"
            )


def _own(what: str, value: float | None, examples: int | None = None) -> str:
    if value is None:
        return f"the run has no {what}"
    how = f"is {value:g}" if examples is None else "is not enough, or too much, for as many sequences as are here"
    return f"the run's {what} {how}"


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"
