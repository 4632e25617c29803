"""The round machine: everything that decides what a run does next, in one place and without any input or output.

A run waits for enough clients, asks a cohort to train, folds what comes back, commits the new model, asks for its
evaluation, and begins again. Written out in coroutines that would be spread over every place where something can go wrong; here,
as in h11 and etcd's raft, it is a pure function: `on(spec, run, event) -> (run, effects)`. An event says what happened
(time is an event too), the returned state is the whole truth, and the effects are what the coordinator must now do. The
coordinator commits the state before it performs an effect, so a daemon killed at any moment starts again from the last
committed state with the event `Restarted`. The table at the end says which events mean something in which phase; any
other raises IllegalTransition and changes nothing.

Who is asked, and who is waited for:

- A round wants `target` updates and asks a few more clients if the run over-selects; it is over when it has them, or at the
  deadline (or the grace after the quorum) with at least the quorum. A client that is silent is no longer waited for; only
  progress keeps it in, not presence.
- Who declines a run (a data holder's policy, say) is not asked for it again until it connects anew (after a restart all
  do) or the run is resumed. If the others are too few for a round, the run pauses and says who declines and why.
- Who misses a round rests: for 0, 1, 3, 7, 15 rounds after so many misses in a row, unless too few others are there or it
  connects anew. So a round that is tried again has another cohort; its complete updates stay.
- Where late updates count, whoever has not answered when a round is over goes on, `owing` it; such an update is folded into
  the sum that is open when it comes, scaled down the more the older it is.
- An asynchronous run (FedBuff, Nguyen et al. 2022, Algorithm 1) is all that with a buffer for a target: every answer lets
  another idle client begin, whoever has not answered when the buffer is full owes, and late updates count like others.
- Without a quorum after the last attempt the run pauses; nothing is lost, and `ResumeRequested` queues it again.

Under secure aggregation an answer says only that a client is ready. Who is ready when a phase is over enters a masked sum
(`seqfed.common.masking`), a phase of its own, which ends with the sum or without. No number of a masked sum is used twice, so
whatever is tried again, after a restart too, has another one, and everybody must be ready anew.

Events that merely come too late (an update after the deadline) are not illegal: the machine itself raises WrongRound for
them, and again nothing changes.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final

from seqfed.common.dp.accounting import rate
from seqfed.common.errors import DuplicateUpdate, IllegalTransition, WrongRound
from seqfed.common.homomorphic.scheme import most_clients
from seqfed.common.metrics import SMALLER_IS_BETTER, add, spread, summary
from seqfed.common.seeds import generator
from seqfed.common.spec import RunSpec

FORGIVEN: Final = (
    2  # rounds missed in a row after which to connect anew no longer ends the rest: it may crash each time
)
LONGEST_REST: Final = 16  # rounds
TIMES: Final = 50  # answers that the adaptive deadline is made of
FEWEST_TIMES: Final = 5  # before there are so many, the deadline is the fixed one
SHORTEST_DEADLINE: Final = 1.0  # seconds: however quick the last answers were
BACK_S: Final = 60.0  # after a restart, for all who were there: a cohort of the first few back would be another one
NOT_TWICE: Final = (
    "what clients have sent may have been opened, and of the same data they give nothing twice; submit the run anew"
)
_TAKEN_PART: Final = "of the clients that are here too many have been in privacy.dp.participations rounds"
MOST_DRAWS: Final = 10_000  # of a round's cohort
MOST_WORDS: Final = 300  # letters of why a client declines: they are kept, and saved at every step


class Phase(Enum):
    """Where a run stands."""

    QUEUED = "queued"  # submitted or resumed; another run has its turn, or too few clients are there
    GATHERING = "gathering"  # has its turn and waits for enough clients to begin the next round
    MEASURING = "measuring"  # before the first round: the cohort sums up its data, to normalise them all alike
    TRAINING = "training"  # the cohort has been asked and updates arrive
    MASKING = "masking"  # who was ready in `masks`, the phase before, makes a sum that shows nothing of any one of them
    COMMITTING = "committing"  # enough updates are folded; the new model is being made durable
    EVALUATING = "evaluating"  # the new model is durable and is being scored
    PAUSED = "paused"  # by the operator, or since it cannot go on; until the operator resumes it
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


ENDED: Final = frozenset({Phase.FINISHED, Phase.STOPPED, Phase.FAILED})
WORKING: Final = frozenset({Phase.MEASURING, Phase.TRAINING, Phase.EVALUATING})  # the phases that have a task
ACTIVE: Final = WORKING | {Phase.GATHERING, Phase.MASKING, Phase.COMMITTING}


@dataclass(frozen=True)
class Run:
    """The whole state of a run's course. Client names stand in sorted order in `cohort`, in order of arrival elsewhere."""

    phase: Phase = Phase.QUEUED
    present: frozenset[str] = frozenset()  # fitting clients that are connected; not durable: a restart finds nobody
    round: int = 0  # under way or about to begin, or the last one; 0 before the first
    attempt: int = 0  # of this round; a restart of the daemon makes one more
    given_up: int = 0  # attempts of this round that were given up
    target: int = 0  # updates that this round wants
    here: int = 0  # how many clients were present when a cohort was last drawn
    back: int = 0  # after a restart: so many are waited for, up to BACK_S, before the next is drawn
    cohort: tuple[str, ...] = ()  # asked in this phase
    folded: tuple[str, ...] = ()  # their updates of this round are in its sum
    late: tuple[
        tuple[str, int], ...
    ] = ()  # (client, round of its task) of the others that are in the sum or go into the next
    owing: tuple[tuple[str, int], ...] = ()  # (client, round of its task) that may still answer an earlier round
    failed: tuple[tuple[str, str], ...] = ()  # (client, why) of this attempt
    declined: tuple[tuple[str, str], ...] = ()  # (client, why) that will do nothing for this run
    silent: tuple[str, ...] = ()  # of the pending: nothing has been heard of their work for too long
    missed: tuple[tuple[str, int, int], ...] = ()  # (client, rounds in a row, the round in which it may be asked again)
    times: tuple[float, ...] = ()  # seconds from the task to the update, of the last answers
    # 32 bytes in hex, of a run with differential privacy: who is drawn, and a tree's noise
    secret: str = field(default="", repr=False)
    opened: int = 0  # masked sums of trainings that may have been opened and made no model
    took: tuple[tuple[str, int], ...] = ()  # (client, rounds it has been in), where that is limited
    clip: float = 0.0  # of the next round's updates, where it adapts; 0: the first
    number: int = 0  # of the masked sum that this phase leads to, or of the last one; 0: there was none
    masks: str = ""  # MASKING: of which phase
    measured: tuple[tuple[str, int], ...] = ()  # the summed tally of the data, by name
    evaluated: tuple[str, ...] = ()  # have answered the evaluation, or the measuring
    evaluation: tuple[tuple[str, int], ...] = ()  # their summed tally, by name
    scores: tuple[tuple[str, tuple[float, ...]], ...] = ()  # each metric's values at those that have it
    newest: tuple[tuple[str, float], ...] = ()  # the metrics of the last round that was evaluated
    best: float | None = None  # the convergence metric's best value so far
    stale: int = 0  # evaluations since then
    reason: str = ""  # why it ended or paused, or why the last attempt was given up

    @property
    def pending(self) -> tuple[str, ...]:
        """The clients that were asked in this phase and have not answered."""
        answered = {name for name, _ in self.failed}
        if self.phase is Phase.MASKING:
            return tuple(name for name in self.ready if name not in answered)
        if self.phase not in WORKING:
            return ()
        answered.update(self.ready)
        return tuple(name for name in self.cohort if name not in answered)

    @property
    def ready(self) -> tuple[str, ...]:
        """The clients that have answered in this phase; in MASKING, those who had in the one before."""
        trained = Phase.TRAINING.value in (self.phase.value, self.masks)
        return self.folded if trained else self.evaluated

    @property
    def awaited(self) -> tuple[str, ...]:
        """The pending clients from which something is still heard."""
        return tuple(name for name in self.pending if name not in self.silent)

    @property
    def working(self) -> tuple[tuple[str, int], ...]:
        """(client, round of its task) of everybody who is at work for this run."""
        return (*((name, self.round) for name in self.pending), *self.owing)

    @property
    def sum_round(self) -> int:
        """The round into whose sum an update goes that comes now."""
        return self.round + 1 if self.phase in {Phase.COMMITTING, Phase.EVALUATING} else self.round

    def wants(self, client: str, round_: int) -> bool:
        """Whether this client's update for its task in that round would count."""
        if (client, round_) in self.owing:
            return self.phase in ACTIVE  # what comes while a model is being saved is taken next
        return (
            self.phase is Phase.TRAINING
            and round_ == self.round
            and client in self.cohort
            and client not in self.folded
        )


# Events ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """The run has its turn."""


@dataclass(frozen=True)
class ClientsChanged:
    """Fitting clients came, perhaps again, or went. `working`: (client, round) of the arrived that say they are at a task."""

    arrived: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    working: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class UpdateArrived:
    """A whole, valid update of this client lies on disk. `seconds`: since it was asked; None: not known."""

    round: int
    client: str
    seconds: float | None = None


@dataclass(frozen=True)
class EvaluationArrived:
    """A client has scored this round's model."""

    round: int
    client: str
    tally: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class TaskFailed:
    """A client cannot do what it was asked in this round. `lasting`: nor anything else for this run."""

    round: int
    client: str
    why: str
    lasting: bool = False


@dataclass(frozen=True)
class Silence:
    """Nothing has been heard of this client's work for too long; or (`over`) something is heard again."""

    client: str
    over: bool = False


@dataclass(frozen=True)
class Unmasked:
    """The masked sum of this number is there: who is in it, and the tally's part of it."""

    number: int
    survivors: tuple[str, ...]
    tally: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class MaskingEnded:
    """The masked sum of this number came to nothing; `missed`: because of these. `given`: some have sent their part of it."""

    number: int
    why: str
    missed: tuple[str, ...] = ()
    given: bool = False


@dataclass(frozen=True)
class ModelCommitted:
    """This round's model is durable. `clip`: the next round's, where it adapts."""

    round: int
    clip: float = 0.0


@dataclass(frozen=True)
class BudgetSpent:
    """The round that has just begun would spend more privacy than there is."""

    why: str


@dataclass(frozen=True)
class Broken:
    """An effect could not be performed (the model could not be saved, say); the last committed model is still good.

    `passing`: what hinders it may go away, so the run only pauses.
    """

    why: str
    passing: bool = False


@dataclass(frozen=True)
class DeadlinePassed:
    """The time for this phase of the round is over."""

    round: int
    attempt: int
    phase: Phase


@dataclass(frozen=True)
class PauseRequested:
    """The operator wants the run to wait."""


@dataclass(frozen=True)
class ResumeRequested:
    """The operator wants the run to go on."""


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
    | Silence
    | Unmasked
    | MaskingEnded
    | ModelCommitted
    | BudgetSpent
    | Broken
    | DeadlinePassed
    | PauseRequested
    | ResumeRequested
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
    """Tell these clients, each at work on its task of that round, that it is no longer wanted."""

    clients: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class StartDeadline:
    """Send DeadlinePassed for this phase of the round after so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Hasten:
    """Move the deadline to so many seconds from now, if it is not nearer already."""

    seconds: float


@dataclass(frozen=True)
class Mask:
    """Begin the masked sum of these clients, who are all ready; then send Unmasked or MaskingEnded."""

    clients: tuple[str, ...]


@dataclass(frozen=True)
class LeaveOut:
    """This client does no more for the masked sum that is under way."""

    client: str
    why: str


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
class Suspend:
    """Give up the turn for a while: no deadline, no sum."""


@dataclass(frozen=True)
class EndRun:
    """Give up the turn; clients and operators learn that the run is over."""


Effect = (
    OpenSum
    | Fold
    | Ask
    | Dismiss
    | StartDeadline
    | Hasten
    | Mask
    | LeaveOut
    | CommitModel
    | CloseRound
    | Suspend
    | EndRun
)
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
    measuring = spec.data.normalise == "federated" and not run.measured
    return _gather(spec, run) if run.round or measuring else _next_round(spec, run)


def _next_round(spec: RunSpec, run: Run) -> Step:
    number = run.round + 1
    return _gather(
        spec, replace(run, round=number, attempt=0, given_up=0, folded=(), evaluated=(), silent=(), reason="")
    )


def _gather(spec: RunSpec, run: Run) -> Step:
    """The next attempt at this round with a cohort drawn anew, or a wait for the clients that it needs."""
    if len(run.present) < run.back:
        waits = () if run.phase is Phase.GATHERING else (StartDeadline(BACK_S),)
        return replace(run, phase=Phase.GATHERING, masks="", cohort=(), failed=(), silent=()), waits
    run = replace(run, back=0)
    pool = _askable(spec, run)
    target = _target(spec, run, pool)
    if target is None:
        waiting = replace(run, phase=Phase.GATHERING, masks="", cohort=(), failed=(), silent=())
        if (spent := _spent_out(spec, run) & run.present) and _target(spec, run, (*pool, *spent)) is not None:
            return _end(waiting, Phase.FINISHED, f"before round {run.round}: {_TAKEN_PART}")
        if _target(spec, run, (*pool, *_declining(run))) is None:
            return waiting, ()
        return _suspend(replace(waiting, reason=f"round {run.round}: {refusals(run)}; `seqfed resume` asks them again"))
    if spec.privacy.secure_aggregation:
        run = replace(run, folded=())  # ready for a sum that is given up, not for the next
    ready = replace(run, target=target, here=len(run.present))
    if not run.round:
        return _measure(spec, ready, pool)
    return _begin_attempt(spec, ready, choose(spec, ready, pool))


def _measure(spec: RunSpec, run: Run, pool: tuple[str, ...]) -> Step:
    """The step before the first round: everybody there, as far as one sum bears them, sums up its data."""
    asked = _at_most(spec, run, pool)
    state = replace(_asking(run, Phase.MEASURING), attempt=run.attempt + 1, cohort=asked)
    return state, (StartDeadline(spec.cohort.deadline_s), Ask(state.cohort))


def _at_most(spec: RunSpec, run: Run, names: Iterable[str]) -> tuple[str, ...]:
    """These, or as many of them, drawn uniformly, as one masked sum of scores or statistics can be of."""
    found = sorted(names)
    if spec.privacy.secure_aggregation:
        draw = generator(spec.seed, run.round, run.attempt + 1, run.phase.value)
        found = _sample(draw, found, most_clients(spec, trained=False))
    return tuple(sorted(found))


def _asking(run: Run, phase: Phase) -> Run:
    """At the beginning of a phase in which the cohort is asked: nobody has answered, and a sum of it has a fresh number."""
    return replace(
        run, phase=phase, number=run.number + 1, masks="", failed=(), silent=(), evaluated=(), evaluation=(), scores=()
    )


def _askable(spec: RunSpec, run: Run) -> tuple[str, ...]:
    """Who may be asked: everybody present and idle who does not rest; if these are too few, those who rest the shortest."""
    busy = {name for name, _ in run.owing} | {name for name, _ in run.late} | _declining(run) | _spent_out(spec, run)
    until = {name: number for name, _, number in run.missed}
    idle = sorted(run.present - busy, key=lambda name: (max(until.get(name, 0), run.round), name))
    rested = sum(until.get(name, 0) <= run.round for name in idle)
    return tuple(idle[: max(rested, spec.cohort.required)])


def _spent_out(spec: RunSpec, run: Run) -> set[str]:
    """Who has been in as many rounds as the run's noise is made for."""
    most = None if spec.privacy.dp is None else spec.privacy.dp.participations
    return set() if most is None else {name for name, count in run.took if count >= most}


def _declining(run: Run) -> frozenset[str]:
    """Who is there and does nothing for the run."""
    return run.present & {name for name, _ in run.declined}


def refusals(run: Run, most: int = 8) -> str:
    """Who declines the run, and why, in words; empty if nobody does."""
    told = [f"{name} declines: {why}" for name, why in run.declined]
    return "; ".join((*told[:most], *((f"and {len(told) - most} more decline",) if len(told) > most else ())))


def _target(spec: RunSpec, run: Run, pool: tuple[str, ...]) -> int | None:
    """How many updates of its own the round wants of these clients; None if it cannot begin with them."""
    if len(run.present) < spec.cohort.required:
        return None
    if spec.asynchronous is not None:
        busy = {name for name, _ in (*run.owing, *run.late)}
        enough = len(busy.union(pool, run.folded)) >= spec.cohort.needed(spec.asynchronous.buffer)
        return spec.asynchronous.buffer if enough else None
    if _drawn_secretly(spec):
        return len(drawn(spec, run)) or None
    size = spec.cohort.size(len(run.present))
    if spec.privacy.secure_aggregation:
        size = min(size, most_clients(spec, trained=True))
    here = len(set(pool) | set(run.folded))
    least = min(spec.cohort.required, spec.cohort.needed(size))  # fewer than those present: some rest, or work already
    return min(size, here) if here + len(run.late) >= least else None


def choose(spec: RunSpec, run: Run, pool: Iterable[str]) -> tuple[str, ...]:
    """The cohort of the next attempt: whose updates are complete already, and a uniform sample of the others in the pool.

    It is drawn from (seed, round, attempt) only.
    """
    if _drawn_secretly(spec):
        return drawn(spec, run)
    names = sorted(set(pool) - set(run.folded))
    if spec.asynchronous is not None:
        size = spec.asynchronous.concurrency - len(run.owing)
    else:
        size = spec.cohort.asked(run.target, len(names) + len(run.folded)) - len(run.folded)
    if spec.privacy.secure_aggregation:
        size = min(size, most_clients(spec, trained=True) - len(run.folded))
    draw = generator(spec.seed, run.round, run.attempt + 1, "cohort")
    return tuple(sorted((*run.folded, *_sample(draw, names, size))))


def _drawn_secretly(spec: RunSpec) -> bool:
    """Whether the privacy of a run is reckoned with cohorts that nobody knows."""
    return spec.privacy.dp is not None and rate(spec) < 1


def drawn(spec: RunSpec, run: Run) -> tuple[str, ...]:
    """Each that is present by itself, with the probability that the run's privacy is reckoned with, from its secret and the round
    only; drawn again while they are fewer than the quorum.
    """
    names = run.present - _declining(run)
    key, least = bytes.fromhex(run.secret), math.ldexp(rate(spec), 64)
    for number in range(MOST_DRAWS):
        found = tuple(
            sorted(
                name
                for name in names
                if int.from_bytes(hmac.digest(key, f"{run.round}/{number}/{name}".encode(), "sha256")[:8]) < least
            )
        )
        if len(found) >= (spec.cohort.quorum or 1):
            return found
    return ()


def _sample(draw: Any, names: list[str], size: int) -> list[str]:
    size = max(0, min(size, len(names)))
    return [names[place] for place in draw.choice(len(names), size=size, replace=False)] if size else []


def _begin_attempt(spec: RunSpec, run: Run, cohort: tuple[str, ...]) -> Step:
    """One more try at this round; the updates that are complete already count."""
    if spec.privacy.secure_aggregation:
        run = replace(run, folded=())
    state = replace(_asking(run, Phase.TRAINING), attempt=run.attempt + 1, cohort=cohort)
    folds = tuple(Fold(name) for name in (*state.folded, *(name for name, _ in state.late)))
    if _counted(spec, state) >= state.target and (state.folded or state.late):  # full already, so nobody is asked
        full, effects = _commit(spec, replace(state, cohort=tuple(sorted(state.folded))), ())
        return full, (OpenSum(), *folds, *effects)
    if not state.pending and not (spec.asynchronous and state.owing):
        settled, effects = _settle(spec, state)
        return settled, (OpenSum(), *folds, *effects)
    asks = (Ask(state.pending),) if state.pending else ()
    return state, (OpenSum(), *folds, StartDeadline(deadline(spec, run)), *asks)


def deadline(spec: RunSpec, run: Run) -> float:
    """Seconds that a round's training may take: fixed, or a multiple of the time in which 90 % of the last answers came."""
    if spec.cohort.adaptive is None or len(run.times) < FEWEST_TIMES:
        return spec.cohort.deadline_s
    usual = sorted(run.times)[math.ceil(0.9 * len(run.times)) - 1]
    return min(spec.cohort.deadline_s, max(SHORTEST_DEADLINE, spec.cohort.adaptive * usual))


# Training -------------------------------------------------------------------------------------------------------------


def _update(spec: RunSpec, run: Run, event: UpdateArrived) -> Step:
    if (event.client, event.round) in run.owing:
        late, _ = _banked(spec, run, event)
        state, effects = _settle(spec, late)
        return state, (Fold(event.client), *effects)
    _require_round(run, event.round, event.client)
    if event.client in run.folded:
        raise DuplicateUpdate(f"client '{event.client}' has already been counted in round {run.round}")
    answered = replace(
        _answered(run, event),
        folded=(*run.folded, event.client),
        failed=tuple(one for one in run.failed if one[0] != event.client),
    )
    quorum = spec.cohort.needed(run.target)
    before, now = _counted(spec, run), _counted(spec, answered)
    grace = spec.cohort.grace_s
    hasten = (Hasten(grace),) if grace is not None and before < quorum <= now else ()
    state, effects = _settle(spec, answered)
    folds = () if spec.privacy.secure_aggregation else (Fold(event.client),)
    return state, (*folds, *hasten, *effects)


def _answered(run: Run, event: UpdateArrived) -> Run:
    """What a complete update says of its client: it is there, and so quick."""
    times = run.times if event.seconds is None else (*run.times, event.seconds)[-TIMES:]
    return replace(
        run,
        times=times,
        missed=tuple(one for one in run.missed if one[0] != event.client),
        silent=tuple(name for name in run.silent if name != event.client),
    )


def _banked(spec: RunSpec, run: Run, event: UpdateArrived) -> Step:
    """A late update: it goes into the sum that is open or opens next."""
    owed = (event.client, event.round)
    if owed not in run.owing:
        return _late(spec, run, event)
    left = tuple(one for one in run.owing if one != owed)
    return replace(_answered(run, event), owing=left, late=(*run.late, owed)), ()


def _counted(spec: RunSpec, run: Run) -> int:
    """Updates that the target counts: late ones only where there is no round to be late for."""
    return len(run.folded) + (len(run.late) if spec.asynchronous is not None else 0)


def _training_failed(spec: RunSpec, run: Run, event: TaskFailed) -> Step:
    if (event.client, event.round) in run.owing:
        return _settle(spec, _owes_no_more(_declined(run, event), event.client))
    _require_round(run, event.round, event.client)
    if event.client not in run.pending:
        return run, ()
    run = _declined(run, event)
    return _settle(spec, replace(run, failed=(*run.failed, (event.client, event.why))))


def _declined(run: Run, event: TaskFailed) -> Run:
    """With the client's word that it will do nothing for the run, if that is what it says."""
    if not event.lasting:
        return run
    others = tuple(one for one in run.declined if one[0] != event.client)
    return replace(run, declined=(*others, (event.client, event.why[:MOST_WORDS])))


def _gathering(handle: Callable[[RunSpec, Run, Any], Step]) -> Callable[[RunSpec, Run, Any], Step]:
    """The handler of an event that may leave enough clients idle for a waiting round to begin."""

    def handled(spec: RunSpec, run: Run, event: Any) -> Step:
        state, effects = handle(spec, run, event)
        if state is run:
            return run, effects
        begun, more = _gather(spec, state)
        return begun, (*effects, *more)

    return handled


def _owing_failed(spec: RunSpec, run: Run, event: TaskFailed) -> Step:
    if (event.client, event.round) not in run.owing:
        return _late(spec, run, event)
    return _owes_no_more(_declined(run, event), event.client), ()


def _owes_no_more(run: Run, client: str) -> Run:
    return replace(run, owing=tuple(one for one in run.owing if one[0] != client))


def _trainer_silent(spec: RunSpec, run: Run, event: Silence) -> Step:
    state, effects = _silence(spec, run, event)
    if state is run:
        return run, effects
    settled, more = _settle(spec, state)
    return settled, (*effects, *more)


def _silence(_: RunSpec, run: Run, event: Silence) -> Step:
    """Who is silent is not waited for; who owes and is silent owes no more."""
    owed = tuple(one for one in run.owing if one[0] == event.client)
    if event.over:
        if event.client not in run.silent:
            return run, ()
        return replace(run, silent=tuple(name for name in run.silent if name != event.client)), ()
    if owed:
        return _owes_no_more(_miss(run, (event.client,)), event.client), _dismiss(owed)
    if event.client in run.awaited:
        return replace(run, silent=(*run.silent, event.client)), ()
    return run, ()


def _settle(spec: RunSpec, run: Run) -> Step:
    """Commit if the round has what it wants; give the attempt up at once if the quorum is out of reach."""
    counted, awaited = _counted(spec, run), run.awaited
    if counted >= run.target and (run.folded or run.late):
        return _commit(spec, run, run.silent)
    if spec.asynchronous is not None:
        return _refill(spec, run)
    if counted + len(awaited) < max(1, spec.cohort.needed(run.target)):
        return _give_up(spec, run, _unanswered(spec, run), run.silent)
    return (run, ()) if awaited else _commit(spec, run, run.silent)


def _unanswered(spec: RunSpec, run: Run) -> str:
    silent = (f"{name}: nothing heard for {spec.cohort.silence_s:g} s" for name in run.silent)
    return "; ".join((*(f"{name}: {why}" for name, why in run.failed), *silent)) or "nobody is left to be asked"


def _refill(spec: RunSpec, run: Run) -> Step:
    """Asynchronous: as many idle clients begin as the limit of concurrent ones leaves room for."""
    assert spec.asynchronous is not None
    room = spec.asynchronous.concurrency - len(run.owing) - len(run.awaited)
    names = [name for name in _askable(spec, run) if name not in run.cohort]
    draw = generator(spec.seed, run.round, run.attempt, f"cohort from {len(run.cohort)}")
    fresh = _sample(draw, sorted(names), room)
    if fresh:
        return replace(run, cohort=tuple(sorted((*run.cohort, *fresh)))), (Ask(tuple(sorted(fresh))),)
    if not run.awaited and not run.owing:
        if run.declined and _counted(spec, run) >= spec.cohort.needed(run.target):
            return _commit(spec, run, run.silent)  # nobody is left for the rest
        return _give_up(spec, run, _unanswered(spec, run), run.silent)
    return run, ()


def _commit(spec: RunSpec, run: Run, missed: tuple[str, ...]) -> Step:
    """The sum is complete. Who has not answered owes its update where late ones count, and is dismissed elsewhere."""
    failed = tuple(name for name, _ in run.failed)
    if spec.privacy.secure_aggregation:
        return _mask(_miss(run, (*missed, *failed)))
    state = replace(_miss(run, (*missed, *failed)), phase=Phase.COMMITTING, silent=())
    if spec.folds_late and run.round < spec.rounds:
        owing = (*run.owing, *((name, run.round) for name in run.awaited))
        silent = tuple((name, run.round) for name in run.silent)
        return replace(state, owing=owing), (*_dismiss(silent), CommitModel())
    return replace(state, owing=()), (*_dismiss(run.working), CommitModel())


def _training_deadline(spec: RunSpec, run: Run, event: DeadlinePassed) -> Step:
    if (event.round, event.attempt, event.phase) != (run.round, run.attempt, run.phase):
        return run, ()
    counted = _counted(spec, run)
    if counted and counted >= spec.cohort.needed(run.target):
        return _commit(spec, run, run.silent if spec.folds_late else run.pending)
    late = ", ".join((*run.pending, *(name for name, _ in run.owing)))
    return _give_up(spec, run, f"no answer before the deadline from {late or 'anybody'}", run.pending)


def _give_up(spec: RunSpec, run: Run, why: str, missed: tuple[str, ...]) -> Step:
    """Try the round again with another cohort, or pause after the last attempt.

    One that nothing but refusals of the whole run has ended does not count: there are only so many who can refuse.
    """
    failed = {name for name, _ in run.failed}
    refused = failed and not missed and failed <= {name for name, _ in run.declined}
    given_up = run.given_up + (not refused)
    what = f"round {run.round}" if run.round else "measuring"
    reason = f"{what}, attempt {run.given_up + 1} of {spec.cohort.max_attempts}: {why}"
    state = _miss(replace(run, given_up=given_up, reason=reason), (*missed, *(name for name, _ in run.failed)))
    if given_up >= spec.cohort.max_attempts:
        return _suspend(state)
    fresh, effects = _gather(spec, state)
    gone = ((name, run.round) for name in run.pending if name not in fresh.cohort)
    return fresh, (*_dismiss(gone), *effects)


def _miss(run: Run, names: Iterable[str]) -> Run:
    """Note that these have missed the round: the more in a row, the longer they rest. Who declines the run misses nothing."""
    missed = {one[0]: one for one in run.missed}
    declined = {name for name, _ in run.declined}
    for name in (one for one in names if one not in declined):
        count = missed[name][1] + 1 if name in missed else 1
        missed[name] = (name, count, run.round + min(LONGEST_REST, 1 << min(count - 1, 10)))
    return replace(run, missed=tuple(missed.values()))


def _dismiss(clients: Iterable[tuple[str, int]]) -> tuple[Dismiss, ...]:
    found = tuple(clients)
    return (Dismiss(found),) if found else ()


# Masking --------------------------------------------------------------------------------------------------------------


def _mask(run: Run) -> Step:
    """Everybody who is ready makes the sum; who is not is dismissed."""
    state = replace(run, phase=Phase.MASKING, masks=run.phase.value, failed=(), silent=())
    return state, (*_dismiss((name, run.round) for name in run.pending), Mask(state.ready))


def _unmasked(spec: RunSpec, run: Run, event: Unmasked) -> Step:
    _require_number(run, event.number)
    gone = tuple(name for name in run.ready if name not in event.survivors)
    done = replace(run, phase=Phase.COMMITTING, masks="", failed=(), silent=())
    if run.masks == Phase.TRAINING.value:
        return replace(_miss(done, gone), folded=event.survivors), (CommitModel(),)
    scored = replace(done, evaluated=event.survivors, evaluation=event.tally)
    return _measured(spec, scored) if run.masks == Phase.MEASURING.value else _close(spec, scored)


def _masking_ended(spec: RunSpec, run: Run, event: MaskingEnded) -> Step:
    _require_number(run, event.number)
    if run.masks == Phase.EVALUATING.value:
        return _close(spec, replace(run, evaluated=()))  # a score is worth no second try
    if run.masks == Phase.MEASURING.value and event.given:
        return _end(run, Phase.FAILED, f"measuring: {event.why}; {NOT_TWICE}")
    opened = run.opened + (event.given and run.masks == Phase.TRAINING.value)
    return _give_up(spec, replace(run, opened=opened), event.why, event.missed)


def _require_number(run: Run, number: int) -> None:
    if number != run.number:
        raise WrongRound(f"masked sum {number} is over; {run.number} is under way")


def _masker_failed(_: RunSpec, run: Run, event: TaskFailed) -> Step:
    if event.round != run.round or event.client not in run.pending:
        return run, ()
    state = _declined(run, event)
    return replace(state, failed=(*state.failed, (event.client, event.why))), (LeaveOut(event.client, event.why),)


def _masker_silent(spec: RunSpec, run: Run, event: Silence) -> Step:
    if event.over or event.client not in run.pending:
        return run, ()
    why = f"nothing heard for {spec.cohort.silence_s:g} s"
    return replace(run, failed=(*run.failed, (event.client, why))), (LeaveOut(event.client, why),)


def _maskers_changed(_: RunSpec, run: Run, event: ClientsChanged) -> Step:
    """A lost connection alone costs nobody its place: it comes back. Who comes back without the work has lost its keys."""
    here = _presence(run, event)
    lost = tuple(name for name in event.arrived if name in run.pending and (name, run.round) not in event.working)
    why = "it was started anew"
    state = replace(here, failed=(*here.failed, *((name, why) for name in lost)))
    return state, tuple(LeaveOut(name, why) for name in lost)


# Measuring ------------------------------------------------------------------------------------------------------------


def _measuring_settled(spec: RunSpec, run: Run) -> Step:
    if run.awaited:
        return run, ()
    if len(run.evaluated) < spec.cohort.needed(run.target):
        return _give_up(spec, run, _unanswered(spec, run), run.silent)
    return _mask(run) if spec.privacy.secure_aggregation else _measured(spec, run)


def _measured(spec: RunSpec, run: Run) -> Step:
    """The data of all are known well enough to normalise them; the first round begins."""
    state = replace(run, measured=run.evaluation, attempt=0, given_up=0)
    begun, effects = _next_round(spec, state)
    return begun, (*_dismiss((name, run.round) for name in run.pending), *effects)


def _took(spec: RunSpec, run: Run) -> tuple[tuple[str, int], ...]:
    """The rounds that each client has been in, with the one that has just been committed."""
    if spec.privacy.dp is None or spec.privacy.dp.participations is None:
        return ()
    found = dict(run.took)
    for name in run.folded:
        found[name] = found.get(name, 0) + 1
    return tuple(sorted(found.items()))


# Committing and evaluating --------------------------------------------------------------------------------------------


def _committed(spec: RunSpec, run: Run, event: ModelCommitted) -> Step:
    if event.round != run.round:
        raise WrongRound(f"round {event.round} was committed while round {run.round} is under way")
    fresh = tuple(one for one in run.owing if run.sum_round - one[1] <= spec.cohort.max_staleness)
    dismissed = _dismiss(one for one in run.owing if one not in fresh)
    run = replace(run, late=(), owing=fresh, clip=event.clip or run.clip, took=_took(spec, run))
    every = spec.evaluation.every
    due = every > 0 and (run.round % every == 0 or run.round == spec.rounds)
    # After a restart nobody is there yet; the round's own clients will be, or fall silent.
    idle = (run.present or set(run.cohort)) - {name for name, _ in (*run.owing, *run.declined)}
    # A masked sum of fewer would be refused by everybody.
    if not due or len(idle) < (spec.privacy.min_survivors if spec.privacy.secure_aggregation else 1):
        state, effects = _close(spec, run)
        return state, (*dismissed, *effects)
    state = replace(_asking(run, Phase.EVALUATING), cohort=_at_most(spec, run, idle))
    return state, (*dismissed, StartDeadline(spec.cohort.deadline_s), Ask(state.cohort))


def _evaluation(spec: RunSpec, run: Run, event: EvaluationArrived) -> Step:
    _require_round(run, event.round, event.client)
    if event.client in run.evaluated:
        raise DuplicateUpdate(f"client '{event.client}' has already answered in round {run.round}")
    total = add([dict(run.evaluation), dict(event.tally)])
    scores = dict(run.scores)
    if run.phase is Phase.EVALUATING:
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
    if (event.client, event.round) in run.owing:
        return _owes_no_more(_declined(run, event), event.client), ()
    _require_round(run, event.round, event.client)
    if event.client not in run.pending:
        return run, ()
    return _evaluation_settled(spec, replace(_declined(run, event), failed=(*run.failed, (event.client, event.why))))


def _evaluator_silent(spec: RunSpec, run: Run, event: Silence) -> Step:
    state, effects = _silence(spec, run, event)
    if state is run:
        return run, effects
    settled, more = _evaluation_settled(spec, state)
    return settled, (*effects, *more)


def _evaluators_changed(spec: RunSpec, run: Run, event: ClientsChanged) -> Step:
    """A score is worth no wait: whoever leaves is not waited for."""
    here = _unready(spec, _presence(run, event))
    back = tuple(name for name in event.arrived if name in here.pending)
    gone = tuple((name, "left") for name in event.left if name in here.pending and name not in here.present)
    state, effects = _evaluation_settled(spec, replace(here, failed=(*run.failed, *gone)))
    return state, (*((Ask(back),) if back else ()), *effects)


def _evaluation_deadline(spec: RunSpec, run: Run, event: DeadlinePassed) -> Step:
    if (event.round, event.attempt, event.phase) != (run.round, run.attempt, run.phase):
        return run, ()
    return _evaluation_settled(spec, replace(run, silent=tuple(dict.fromkeys((*run.silent, *run.pending)))))


def _evaluation_settled(spec: RunSpec, run: Run) -> Step:
    if run.phase is Phase.MEASURING:
        return _measuring_settled(spec, run)
    if run.awaited:
        return run, ()
    if not spec.privacy.secure_aggregation:
        return _close(spec, run)
    return _mask(run) if len(run.evaluated) >= spec.privacy.min_survivors else _close(spec, replace(run, evaluated=()))


def _close(spec: RunSpec, run: Run, paused: str = "") -> Step:
    """The round is over: count towards convergence, then end the run, pause it for this reason, or begin the next round."""
    total, scores = dict(run.evaluation), dict(run.scores)
    metrics = summary(total)
    counted = max(map(len, scores.values()), default=0)
    if spec.privacy.secure_aggregation and metrics:
        counted = len(run.evaluated)
    record = CloseRound(run.round, metrics, spread(scores), total.get("examples", 0), counted)
    dismissed = _dismiss((name, run.round) for name in run.pending)
    run = replace(run, evaluation=(), scores=(), newest=tuple(metrics.items()) or run.newest)
    metric = metrics.get(spec.convergence.metric) if spec.convergence else None
    if spec.convergence and metric is not None and not paused:  # a pause has cut the evaluation short
        sign = 1 if spec.convergence.metric in SMALLER_IS_BETTER else -1
        better = run.best is None or sign * (run.best - metric) > spec.convergence.min_delta
        run = replace(run, best=metric if better else run.best, stale=0 if better else run.stale + 1)
        if run.stale >= spec.convergence.patience:
            reason = (
                f"converged: {spec.convergence.metric} has not improved on {run.best:.6g} "
                f"for {spec.convergence.patience} evaluations"
            )
            state, effects = _end(run, Phase.FINISHED, reason)
            return state, (record, *effects)
    if run.round >= spec.rounds:
        state, effects = _end(run, Phase.FINISHED, f"all {spec.rounds} rounds are done")
        return state, (record, *effects)
    if paused:
        ready = replace(
            run, round=run.round + 1, attempt=0, given_up=0, cohort=(), folded=(), evaluated=(), reason=paused
        )
        state, effects = _suspend(ready)
        return state, (record, *dismissed, *effects)
    state, effects = _next_round(spec, run)
    return state, (record, *dismissed, *effects)


# Anywhere -------------------------------------------------------------------------------------------------------------


def _presence(run: Run, event: ClientsChanged) -> Run:
    """Who comes may be asked at once, whatever it has missed; if it brings no work along, it owes none any more."""
    arrived = set(event.arrived)
    return replace(
        run,
        present=(run.present - set(event.left)) | arrived,
        missed=tuple(
            (name, count, 0 if name in arrived and count <= FORGIVEN else until) for name, count, until in run.missed
        ),
        declined=tuple(one for one in run.declined if one[0] not in arrived),
        owing=tuple(one for one in run.owing if one[0] not in arrived or one in event.working),
    )


def _present(_: RunSpec, run: Run, event: ClientsChanged) -> Step:
    return _presence(run, event), ()


def _waited_enough(spec: RunSpec, run: Run, event: DeadlinePassed) -> Step:
    if (event.round, event.attempt, event.phase) != (run.round, run.attempt, run.phase) or not run.back:
        return run, ()
    return _gather(spec, replace(run, back=0))


def _unready(spec: RunSpec, run: Run) -> Run:
    """Under secure aggregation, who is ready and leaves must come back and be ready again."""
    if not spec.privacy.secure_aggregation:
        return run
    return replace(
        run,
        folded=tuple(name for name in run.folded if name in run.present),
        evaluated=tuple(name for name in run.evaluated if name in run.present),
    )


def _trainers_changed(spec: RunSpec, run: Run, event: ClientsChanged) -> Step:
    here = _unready(spec, _presence(run, event))
    back = tuple(name for name in event.arrived if name in here.pending)
    state, effects = _settle(spec, here) if spec.asynchronous is not None else (here, ())
    return state, (*((Ask(back),) if back else ()), *effects)


def _unmoved(_: RunSpec, run: Run, __: Event) -> Step:
    return run, ()


def _late(_: RunSpec, run: Run, event: UpdateArrived | EvaluationArrived | TaskFailed) -> Step:
    raise WrongRound(
        f"an answer for round {event.round} is no longer wanted; the run is {run.phase.value} in round {run.round}"
    )


def _pause(spec: RunSpec, run: Run, _: PauseRequested) -> Step:
    reason = "paused by the operator; `seqfed resume` lets it go on"
    if Phase.EVALUATING.value in (run.phase.value, run.masks):
        return _close(spec, run, reason)
    if run.masks == Phase.MEASURING.value:
        return _end(run, Phase.FAILED, f"measuring: paused by the operator meanwhile; {NOT_TWICE}")
    return _suspend(replace(_in_vain(spec, run), reason=reason))


def _in_vain(spec: RunSpec, run: Run) -> Run:
    """Before a training's masked sum that is under way is dropped, which may have been opened."""
    lost = run.phase is Phase.COMMITTING or run.masks == Phase.TRAINING.value
    return replace(run, opened=run.opened + (spec.privacy.secure_aggregation and lost))


def _suspend(run: Run) -> Step:
    """Nobody works for the run any more; what has come stays."""
    rest = replace(run, phase=Phase.PAUSED, masks="", owing=(), failed=(), silent=())
    return rest, (*_dismiss(run.working), Suspend())


def _resume(_: RunSpec, run: Run, __: ResumeRequested) -> Step:
    return replace(run, phase=Phase.QUEUED, given_up=0, declined=(), reason=""), ()


def _stop(spec: RunSpec, run: Run, _: StopRequested) -> Step:
    return _end(_in_vain(spec, run), Phase.STOPPED, "stopped by the operator")


def _budget_spent(_: RunSpec, run: Run, event: BudgetSpent) -> Step:
    """It ends with what it has: the last model stands, and is worth what was spent."""
    return _end(run, Phase.FINISHED, f"before round {run.round}: {event.why}")


def _broken(spec: RunSpec, run: Run, event: Broken) -> Step:
    reason, state = f"round {run.round}, {run.phase.value}: {event.why}", _in_vain(spec, run)
    if event.passing and run.masks != Phase.MEASURING.value:
        return _suspend(replace(state, reason=f"{reason}; `seqfed resume` tries again"))
    return _end(state, Phase.FAILED, reason)


def _end(run: Run, phase: Phase, reason: str) -> Step:
    ended = replace(run, phase=phase, masks="", reason=reason, owing=(), silent=())
    return ended, (*_dismiss(run.working), EndRun())


def _restarted(spec: RunSpec, run: Run, event: Restarted) -> Step:
    """The same cohort and seeds, one more attempt; the updates on disk are folded again and not asked for again.

    Killing the daemon is no fault of the run, so this attempt does not count as given up.
    """
    alone, _ = _restarted_waiting(spec, run, event)
    secure = spec.privacy.secure_aggregation
    if run.masks == Phase.MEASURING.value:
        return _end(run, Phase.FAILED, f"measuring: the server was started anew meanwhile; {NOT_TWICE}")
    match Phase(run.masks or run.phase):
        case Phase.EVALUATING | Phase.MEASURING as phase:
            if secure:  # nobody has answered a sum of this number
                cohort = run.evaluated if run.masks else run.cohort
                alone = replace(_asking(alone, phase), cohort=cohort)
            return alone, (StartDeadline(spec.cohort.deadline_s), Ask(alone.pending))
        case _ if secure:
            return _begin_attempt(spec, _in_vain(spec, alone), run.cohort)
        case Phase.COMMITTING if (alone.folded, alone.late) == (run.folded, run.late):
            folds = tuple(Fold(name) for name in (*run.folded, *(name for name, _ in run.late)))
            return replace(alone, attempt=run.attempt + 1), (OpenSum(), *folds, CommitModel())
        case _:  # of a commit whose updates are lost in part, nobody owes: all are asked again
            owing = tuple(one for one in alone.owing if one[1] != run.round)
            return _begin_attempt(spec, replace(alone, owing=owing), run.cohort)


def _restarted_waiting(_: RunSpec, run: Run, event: Restarted) -> Step:
    kept = tuple(name for name in run.folded if name not in event.lost)
    late = tuple(one for one in run.late if one[0] not in event.lost)
    alone = replace(run, present=frozenset(), declined=(), folded=kept, late=late, back=run.here)
    return alone, (StartDeadline(BACK_S),) if run.phase is Phase.GATHERING and run.here else ()


def _require_round(run: Run, round_: int, client: str) -> None:
    if round_ != run.round:
        raise WrongRound(f"round {round_} is over or has not begun; round {run.round} is under way")
    if client not in run.cohort:
        raise WrongRound(f"client '{client}' was not asked in round {run.round}")


TRANSITIONS: Final[Mapping[Phase, Mapping[type, Callable[[RunSpec, Run, Any], Step]]]] = {
    Phase.QUEUED: {
        Turn: _turn,
        ClientsChanged: _present,
        UpdateArrived: _late,
        EvaluationArrived: _late,
        TaskFailed: _late,
        Silence: _unmoved,
        DeadlinePassed: _unmoved,
        PauseRequested: _pause,
        StopRequested: _stop,
        Broken: _broken,
        Restarted: _restarted_waiting,
    },
    Phase.GATHERING: {
        ClientsChanged: _gathering(_present),
        UpdateArrived: _gathering(_banked),
        EvaluationArrived: _late,
        TaskFailed: _gathering(_owing_failed),
        Silence: _gathering(_silence),
        DeadlinePassed: _waited_enough,
        PauseRequested: _pause,
        StopRequested: _stop,
        Broken: _broken,
        Restarted: _restarted_waiting,
    },
    Phase.MEASURING: {
        ClientsChanged: _evaluators_changed,
        UpdateArrived: _late,
        EvaluationArrived: _evaluation,
        TaskFailed: _evaluation_failed,
        Silence: _evaluator_silent,
        DeadlinePassed: _evaluation_deadline,
        PauseRequested: _pause,
        StopRequested: _stop,
        Broken: _broken,
        Restarted: _restarted,
    },
    Phase.TRAINING: {
        ClientsChanged: _trainers_changed,
        UpdateArrived: _update,
        EvaluationArrived: _late,
        TaskFailed: _training_failed,
        Silence: _trainer_silent,
        DeadlinePassed: _training_deadline,
        BudgetSpent: _budget_spent,
        PauseRequested: _pause,
        StopRequested: _stop,
        Broken: _broken,
        Restarted: _restarted,
    },
    Phase.MASKING: {
        ClientsChanged: _maskers_changed,
        UpdateArrived: _late,
        EvaluationArrived: _late,
        TaskFailed: _masker_failed,
        Silence: _masker_silent,
        DeadlinePassed: _unmoved,
        Unmasked: _unmasked,
        MaskingEnded: _masking_ended,
        PauseRequested: _pause,
        StopRequested: _stop,
        Broken: _broken,
        Restarted: _restarted,
    },
    Phase.COMMITTING: {
        ClientsChanged: _present,
        UpdateArrived: _late,
        EvaluationArrived: _late,
        TaskFailed: _late,
        Silence: _unmoved,
        DeadlinePassed: _unmoved,
        ModelCommitted: _committed,
        PauseRequested: _pause,
        StopRequested: _stop,
        Broken: _broken,
        Restarted: _restarted,
    },
    Phase.EVALUATING: {
        ClientsChanged: _evaluators_changed,
        UpdateArrived: _banked,
        EvaluationArrived: _evaluation,
        TaskFailed: _evaluation_failed,
        Silence: _evaluator_silent,
        DeadlinePassed: _evaluation_deadline,
        PauseRequested: _pause,
        StopRequested: _stop,
        Broken: _broken,
        Restarted: _restarted,
    },
    Phase.PAUSED: {
        ClientsChanged: _present,
        UpdateArrived: _late,
        EvaluationArrived: _late,
        TaskFailed: _late,
        Silence: _unmoved,
        DeadlinePassed: _unmoved,
        ResumeRequested: _resume,
        StopRequested: _stop,
        Broken: _broken,
        Restarted: _restarted_waiting,
    },
}
