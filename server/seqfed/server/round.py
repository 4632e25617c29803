"""The round machine: everything that decides what a run does next, in one place and without any input or output.

A run waits for enough clients, asks a cohort to train, folds what comes back, commits the new model, asks for its
evaluation, and begins again. Written out in coroutines that would be spread over every place where something can go wrong; here,
as in h11 and etcd's raft, it is a pure function: `on(spec, run, event) -> (run, effects)`. An event says what happened
(time is an event too), the returned state is the whole truth, and the effects are what the coordinator must now do. The
coordinator commits the state before it performs an effect, so a daemon killed at any moment starts again from the last
committed state with the event `Restarted`. The table at the end says which events mean something in which phase; any
other raises IllegalTransition and changes nothing.

Events that merely come too late (an update after the deadline) are not illegal: the machine itself raises WrongRound for
them, and again nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final

from seqfed.common.errors import DuplicateUpdate, IllegalTransition, WrongRound
from seqfed.common.metrics import SMALLER_IS_BETTER, add, spread, summary
from seqfed.common.seeds import generator
from seqfed.common.spec import RunSpec


class Phase(Enum):
    """Where a run stands."""

    QUEUED = "queued"  # submitted; another run has its turn, or too few clients are there
    GATHERING = "gathering"  # has its turn and waits for enough clients to begin the next round
    TRAINING = "training"  # the cohort has been asked and updates arrive
    COMMITTING = "committing"  # enough updates are folded; the new model is being made durable
    EVALUATING = "evaluating"  # the new model is durable and is being scored
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


ENDED: Final = frozenset({Phase.FINISHED, Phase.STOPPED, Phase.FAILED})
ACTIVE: Final = frozenset({Phase.GATHERING, Phase.TRAINING, Phase.COMMITTING, Phase.EVALUATING})


@dataclass(frozen=True)
class Run:
    """The whole state of a run's course. Client names stand in sorted order in `cohort`, in order of arrival elsewhere."""

    phase: Phase = Phase.QUEUED
    present: frozenset[str] = frozenset()  # fitting clients that are connected; not durable: a restart finds nobody
    round: int = 0  # under way or about to begin, or the last one; 0 while queued
    attempt: int = 0  # of this round; a restart of the daemon makes one more
    given_up: int = 0  # attempts of this round that were given up
    cohort: tuple[str, ...] = ()  # asked in this phase
    folded: tuple[str, ...] = ()  # their updates are in this round's sum
    failed: tuple[tuple[str, str], ...] = ()  # (client, why) of this attempt
    evaluated: tuple[str, ...] = ()  # have answered the evaluation
    evaluation: tuple[tuple[str, int], ...] = ()  # their summed tally, by name
    scores: tuple[tuple[str, tuple[float, ...]], ...] = ()  # each metric's values at those that have it
    newest: tuple[tuple[str, float], ...] = ()  # the metrics of the last round that was evaluated
    best: float | None = None  # the convergence metric's best value so far
    stale: int = 0  # evaluations since then
    reason: str = ""  # why it ended, or why the last attempt was given up

    @property
    def pending(self) -> tuple[str, ...]:
        """The clients that were asked and have not answered."""
        answered = {name for name, _ in self.failed}
        if self.phase is Phase.TRAINING:
            answered.update(self.folded)
        elif self.phase is Phase.EVALUATING:
            answered.update(self.evaluated)
        else:
            return ()
        return tuple(name for name in self.cohort if name not in answered)


# Events ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """The run has its turn."""


@dataclass(frozen=True)
class ClientsChanged:
    """Fitting clients came, perhaps again, or went."""

    arrived: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class UpdateArrived:
    """A whole, valid update of this client lies on disk."""

    round: int
    client: str


@dataclass(frozen=True)
class EvaluationArrived:
    """A client has scored this round's model."""

    round: int
    client: str
    tally: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class TaskFailed:
    """A client cannot do what it was asked in this round."""

    round: int
    client: str
    why: str


@dataclass(frozen=True)
class ModelCommitted:
    """This round's model is durable."""

    round: int


@dataclass(frozen=True)
class Broken:
    """An effect could not be performed (the model could not be saved, say); the last committed model is still good."""

    why: str


@dataclass(frozen=True)
class DeadlinePassed:
    """The time for this phase of the round is over."""

    round: int
    attempt: int
    phase: Phase


@dataclass(frozen=True)
class StopRequested:
    """The operator wants the run to end."""


@dataclass(frozen=True)
class Restarted:
    """The daemon begins anew with this state; no client is connected yet. `lost`: their updates did not outlive it."""

    lost: tuple[str, ...] = ()


Event = (
    Turn
    | ClientsChanged
    | UpdateArrived
    | EvaluationArrived
    | TaskFailed
    | ModelCommitted
    | Broken
    | DeadlinePassed
    | StopRequested
    | Restarted
)

# Effects --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenSum:
    """Begin the sum of this round anew."""


@dataclass(frozen=True)
class Fold:
    """Add this client's update to the sum."""

    client: str


@dataclass(frozen=True)
class Ask:
    """Push the phase's task (train or evaluate) to these clients; to those that are away, when they come."""

    clients: tuple[str, ...]


@dataclass(frozen=True)
class Dismiss:
    """Tell these clients that their task is no longer wanted."""

    clients: tuple[str, ...]


@dataclass(frozen=True)
class StartDeadline:
    """Send DeadlinePassed for this phase of the round after so many seconds."""

    seconds: float


@dataclass(frozen=True)
class CommitModel:
    """Make the sum's mean the next model, durably, then send ModelCommitted."""


@dataclass(frozen=True)
class CloseRound:
    """The round is over: complete its record, in the same transaction as the state.

    metrics: of all examples that were scored; empty if there were none. spread: of each metric the median and the worst
    decile over the clients. examples, clients: how many examples and clients that is.
    """

    round: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    spread: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    examples: int = 0
    clients: int = 0


@dataclass(frozen=True)
class EndRun:
    """Give up the turn; clients and operators learn that the run is over."""


Effect = OpenSum | Fold | Ask | Dismiss | StartDeadline | CommitModel | CloseRound | EndRun
Step = tuple[Run, tuple[Effect, ...]]


def on(spec: RunSpec, run: Run, event: Event) -> Step:
    """What the event makes of the run, and what must be done about it.

    Raises IllegalTransition if the table has no place for it, WrongRound or DuplicateUpdate if it comes too late.
    """
    handler = TRANSITIONS.get(run.phase, {}).get(type(event))
    if handler is None:
        raise IllegalTransition(f"{type(event).__name__} means nothing to a run that is {run.phase.value}")
    return handler(spec, run, event)


# Waiting --------------------------------------------------------------------------------------------------------------


def _turn(spec: RunSpec, run: Run, _: Event) -> Step:
    return _next_round(spec, run)


def _next_round(spec: RunSpec, run: Run) -> Step:
    return _gather(spec, replace(run, round=run.round + 1, attempt=0, given_up=0, folded=(), evaluated=(), reason=""))


def _gather(spec: RunSpec, run: Run) -> Step:
    """The next attempt at this round with a cohort drawn anew, or a wait for the clients that it needs."""
    if len(run.present) < spec.cohort.required:
        return replace(run, phase=Phase.GATHERING, cohort=(), failed=()), ()
    return _begin_attempt(spec, run, choose(spec, run.round, run.attempt + 1, run.present))


def _begin_attempt(spec: RunSpec, run: Run, cohort: tuple[str, ...]) -> Step:
    """One more try at this round; the updates of this cohort's members that are complete already count."""
    state = replace(
        run,
        phase=Phase.TRAINING,
        attempt=run.attempt + 1,
        cohort=cohort,
        folded=tuple(name for name in run.folded if name in cohort),
        failed=(),
    )
    folds = tuple(Fold(name) for name in state.folded)
    settled, effects = _settle(spec, state)
    asks = (StartDeadline(spec.cohort.deadline_s), Ask(state.pending)) if settled is state else ()
    return settled, (OpenSum(), *folds, *asks, *effects)


def choose(spec: RunSpec, round_: int, attempt: int, present: Iterable[str]) -> tuple[str, ...]:
    """The cohort: a uniform sample of the clients present, drawn from (seed, round, attempt) only."""
    names = sorted(present)
    size = spec.cohort.size(len(names))
    draw = generator(spec.seed, round_, attempt, "cohort")
    return tuple(sorted(names[place] for place in draw.choice(len(names), size=size, replace=False)))


# Training -------------------------------------------------------------------------------------------------------------


def _update(spec: RunSpec, run: Run, event: UpdateArrived) -> Step:
    _require_round(run, event.round, event.client)
    if event.client in run.folded:
        raise DuplicateUpdate(f"client '{event.client}' has already been counted in round {run.round}")
    failed = tuple(one for one in run.failed if one[0] != event.client)
    state, effects = _settle(spec, replace(run, folded=(*run.folded, event.client), failed=failed))
    return state, (Fold(event.client), *effects)


def _training_failed(spec: RunSpec, run: Run, event: TaskFailed) -> Step:
    _require_round(run, event.round, event.client)
    if event.client not in run.pending:
        return run, ()
    return _settle(spec, replace(run, failed=(*run.failed, (event.client, event.why))))


def _settle(spec: RunSpec, run: Run) -> Step:
    """Commit if everybody has answered; give the attempt up at once if the quorum is out of reach."""
    if len(run.cohort) - len(run.failed) < spec.cohort.needed(len(run.cohort)):
        return _give_up(spec, run, "; ".join(f"{name}: {why}" for name, why in run.failed))
    if run.pending:
        return run, ()
    return replace(run, phase=Phase.COMMITTING), (CommitModel(),)


def _training_deadline(spec: RunSpec, run: Run, event: DeadlinePassed) -> Step:
    if (event.round, event.attempt, event.phase) != (run.round, run.attempt, run.phase):
        return run, ()
    late = run.pending
    if run.folded and len(run.folded) >= spec.cohort.needed(len(run.cohort)):
        return replace(run, phase=Phase.COMMITTING), (Dismiss(late), CommitModel())
    return _give_up(spec, run, f"no answer in {spec.cohort.deadline_s:g} s from {', '.join(late)}")


def _give_up(spec: RunSpec, run: Run, why: str) -> Step:
    """Try the round again with a cohort drawn anew, or fail after the last attempt."""
    given_up = run.given_up + 1
    reason = f"round {run.round}, attempt {given_up} of {spec.cohort.max_attempts}: {why}"
    if given_up >= spec.cohort.max_attempts:
        return replace(run, phase=Phase.FAILED, reason=reason), (Dismiss(run.pending), EndRun())
    state, effects = _gather(spec, replace(run, given_up=given_up, reason=reason))
    gone = tuple(name for name in run.pending if name not in state.cohort)
    return state, (Dismiss(gone), *effects)


# Committing and evaluating --------------------------------------------------------------------------------------------


def _committed(spec: RunSpec, run: Run, event: ModelCommitted) -> Step:
    if event.round != run.round:
        raise WrongRound(f"round {event.round} was committed while round {run.round} is under way")
    every = spec.evaluation.every
    due = every > 0 and (run.round % every == 0 or run.round == spec.rounds)
    if not due or not run.present:
        return _close(spec, run)
    state = replace(run, phase=Phase.EVALUATING, cohort=tuple(sorted(run.present)), failed=())
    return state, (StartDeadline(spec.cohort.deadline_s), Ask(state.cohort))


def _evaluation(spec: RunSpec, run: Run, event: EvaluationArrived) -> Step:
    _require_round(run, event.round, event.client)
    if event.client in run.evaluated:
        raise DuplicateUpdate(f"client '{event.client}' has already scored round {run.round}")
    total = add([dict(run.evaluation), dict(event.tally)])
    scores = dict(run.scores)
    for metric, value in summary(dict(event.tally)).items():
        scores[metric] = (*scores.get(metric, ()), value)
    state = replace(
        run,
        evaluated=(*run.evaluated, event.client),
        evaluation=tuple(sorted(total.items())),
        scores=tuple(scores.items()),
    )
    return _evaluation_settled(spec, state)


def _evaluation_failed(spec: RunSpec, run: Run, event: TaskFailed) -> Step:
    _require_round(run, event.round, event.client)
    if event.client not in run.pending:
        return run, ()
    return _evaluation_settled(spec, replace(run, failed=(*run.failed, (event.client, event.why))))


def _evaluators_changed(spec: RunSpec, run: Run, event: ClientsChanged) -> Step:
    """A score is worth no wait: whoever leaves is not waited for."""
    here = _presence(run, event)
    back = tuple(name for name in event.arrived if name in run.pending)
    gone = tuple((name, "left") for name in event.left if name in run.pending and name not in here.present)
    state, effects = _evaluation_settled(spec, replace(here, failed=(*run.failed, *gone)))
    return state, (*((Ask(back),) if back else ()), *effects)


def _evaluation_deadline(spec: RunSpec, run: Run, event: DeadlinePassed) -> Step:
    if (event.round, event.attempt, event.phase) != (run.round, run.attempt, run.phase):
        return run, ()
    state, effects = _close(spec, run)
    return state, (Dismiss(run.pending), *effects)


def _evaluation_settled(spec: RunSpec, run: Run) -> Step:
    return (run, ()) if run.pending else _close(spec, run)


def _close(spec: RunSpec, run: Run) -> Step:
    """The round is over: count towards convergence, then end the run or begin the next round."""
    total, scores = dict(run.evaluation), dict(run.scores)
    metrics = summary(total)
    counted = max(map(len, scores.values()), default=0)
    record = CloseRound(run.round, metrics, spread(scores), total.get("examples", 0), counted)
    run = replace(run, evaluation=(), scores=(), newest=tuple(metrics.items()) or run.newest)
    metric = metrics.get(spec.convergence.metric) if spec.convergence else None
    if spec.convergence and metric is not None:
        sign = 1 if spec.convergence.metric in SMALLER_IS_BETTER else -1
        better = run.best is None or sign * (run.best - metric) > spec.convergence.min_delta
        run = replace(run, best=metric if better else run.best, stale=0 if better else run.stale + 1)
        if run.stale >= spec.convergence.patience:
            reason = (
                f"converged: {spec.convergence.metric} has not improved on {run.best:.6g} "
                f"for {spec.convergence.patience} evaluations"
            )
            return replace(run, phase=Phase.FINISHED, reason=reason), (record, EndRun())
    if run.round >= spec.rounds:
        done = f"all {spec.rounds} rounds are done"
        return replace(run, phase=Phase.FINISHED, reason=done), (record, EndRun())
    state, effects = _next_round(spec, run)
    return state, (record, *effects)


# Anywhere -------------------------------------------------------------------------------------------------------------


def _presence(run: Run, event: ClientsChanged) -> Run:
    return replace(run, present=(run.present - set(event.left)) | set(event.arrived))


def _present(_: RunSpec, run: Run, event: ClientsChanged) -> Step:
    return _presence(run, event), ()


def _gathered(spec: RunSpec, run: Run, event: ClientsChanged) -> Step:
    return _gather(spec, _presence(run, event))


def _trainers_changed(_: RunSpec, run: Run, event: ClientsChanged) -> Step:
    back = tuple(name for name in event.arrived if name in run.pending)
    return _presence(run, event), (Ask(back),) if back else ()


def _unmoved(_: RunSpec, run: Run, __: Event) -> Step:
    return run, ()


def _late(_: RunSpec, run: Run, event: UpdateArrived | EvaluationArrived | TaskFailed) -> Step:
    raise WrongRound(
        f"an answer for round {event.round} is no longer wanted; the run is {run.phase.value} in round {run.round}"
    )


def _stop(_: RunSpec, run: Run, __: StopRequested) -> Step:
    reason = "stopped by the operator"
    return replace(run, phase=Phase.STOPPED, reason=reason), (Dismiss(run.pending), EndRun())


def _broken(_: RunSpec, run: Run, event: Broken) -> Step:
    reason = f"round {run.round}, {run.phase.value}: {event.why}"
    return replace(run, phase=Phase.FAILED, reason=reason), (Dismiss(run.pending), EndRun())


def _restarted(spec: RunSpec, run: Run, event: Restarted) -> Step:
    """The same cohort and seeds, one more attempt; the updates on disk are folded again and not asked for again.

    Killing the daemon is no fault of the run, so this attempt does not count as given up.
    """
    alone, _ = _restarted_waiting(spec, run, event)
    match run.phase:
        case Phase.EVALUATING:
            return alone, (StartDeadline(spec.cohort.deadline_s), Ask(run.pending))
        case Phase.COMMITTING if alone.folded == run.folded:
            folds = tuple(Fold(name) for name in run.folded)
            return replace(alone, attempt=run.attempt + 1), (OpenSum(), *folds, CommitModel())
        case _:
            return _begin_attempt(spec, alone, run.cohort)


def _restarted_waiting(_: RunSpec, run: Run, event: Restarted) -> Step:
    kept = tuple(name for name in run.folded if name not in event.lost)
    return replace(run, present=frozenset(), folded=kept), ()


def _require_round(run: Run, round_: int, client: str) -> None:
    if round_ != run.round:
        raise WrongRound(f"round {round_} is over or has not begun; round {run.round} is under way")
    if client not in run.cohort:
        raise WrongRound(f"client '{client}' was not asked in round {run.round}")


TRANSITIONS: Final[Mapping[Phase, Mapping[type, Callable[[RunSpec, Run, Any], Step]]]] = {
    Phase.QUEUED: {
        Turn: _turn,
        ClientsChanged: _present,
        StopRequested: _stop,
        Broken: _broken,
        Restarted: _unmoved,
    },
    Phase.GATHERING: {
        ClientsChanged: _gathered,
        UpdateArrived: _late,
        EvaluationArrived: _late,
        TaskFailed: _late,
        DeadlinePassed: _unmoved,
        StopRequested: _stop,
        Broken: _broken,
        Restarted: _restarted_waiting,
    },
    Phase.TRAINING: {
        ClientsChanged: _trainers_changed,
        UpdateArrived: _update,
        EvaluationArrived: _late,
        TaskFailed: _training_failed,
        DeadlinePassed: _training_deadline,
        StopRequested: _stop,
        Broken: _broken,
        Restarted: _restarted,
    },
    Phase.COMMITTING: {
        ClientsChanged: _present,
        UpdateArrived: _late,
        EvaluationArrived: _late,
        TaskFailed: _late,
        DeadlinePassed: _unmoved,
        ModelCommitted: _committed,
        StopRequested: _stop,
        Broken: _broken,
        Restarted: _restarted,
    },
    Phase.EVALUATING: {
        ClientsChanged: _evaluators_changed,
        UpdateArrived: _late,
        EvaluationArrived: _evaluation,
        TaskFailed: _evaluation_failed,
        DeadlinePassed: _evaluation_deadline,
        StopRequested: _stop,
        Broken: _broken,
        Restarted: _restarted,
    },
}
