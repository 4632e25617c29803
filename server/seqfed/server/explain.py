"""Why a run stands where it stands, in words for its operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from seqfed.common.spec import RunSpec
from seqfed.common.views import Stage, TaskView
from seqfed.server.round import BACK_S, ENDED, Phase, Run, refusals

QUIET_S: Final = 15.0  # a client that works says so every 5 s, so after three times that its silence is news


def explain(
    spec: RunSpec,
    run: Run,
    fitting: Sequence[str],
    misfits: Mapping[str, str],
    turn_of: str | None,
    tasks: Sequence[TaskView] = (),
    deadline_s: float | None = None,
) -> str:
    """One sentence or two.

    `fitting`: connected clients whose data suit the run; `misfits`: the other connected ones and why they do not suit;
    `turn_of`: the run that has its turn now, if any; `tasks`: of the clients at work; `deadline_s`: until the deadline, if
    there is one.
    """
    if run.phase in ENDED or run.phase is Phase.PAUSED:
        return run.reason
    before = f" (before: {run.reason})" if run.reason else ""
    before = f"; {refusals(run)}{before}" if run.declined else before
    match run.phase:
        case Phase.QUEUED | Phase.GATHERING:
            missing = spec.cohort.required - len(fitting)
            if missing > 0:
                return _too_few(spec, missing, fitting, misfits) + before
            if run.phase is Phase.QUEUED and turn_of is not None:
                return f"queued: run {turn_of} has its turn"
            if len(fitting) < run.back:
                return (
                    f"after the restart waits up to {BACK_S:g} s for the {run.back} clients that were there; "
                    f"{len(fitting)} are back"
                )
            if run.owing:
                late = [name for name, _ in run.owing]
                return f"waits for {len(late)} that still work on an earlier round: {_some(late)}{before}"
            return "about to begin" + before
        case Phase.MEASURING | Phase.TRAINING | Phase.EVALUATING:
            return _at_work(spec, run, tasks, deadline_s) + before
        case Phase.MASKING:
            left = f"; left out: {'; '.join(f'{name}: {why}' for name, why in run.failed[:5])}" if run.failed else ""
            return f"{_what(run)}: the masked sum of {len(run.ready)} clients is under way{left}" + before
        case _:
            return f"round {run.round}: saving the new model"


def _what(run: Run) -> str:
    """Of which phase the masked sum is."""
    return {Phase.MEASURING.value: "the data", Phase.EVALUATING.value: f"the scores of round {run.round}"}.get(
        run.masks, f"round {run.round}"
    )


def _at_work(spec: RunSpec, run: Run, tasks: Sequence[TaskView], deadline_s: float | None) -> str:
    of = {one.client: one for one in tasks if one.round == run.round}
    told = [_told(name, of.get(name)) for name in run.awaited]
    told += [f"{_told(name, of.get(name))} (no longer waited for)" for name in run.silent]
    if run.phase is Phase.EVALUATING:
        head = f"the model of round {run.round} waits for {len(run.awaited)} of {len(run.cohort)} to score it"
    elif run.phase is Phase.MEASURING:
        head = f"before the first round waits for {len(run.awaited)} of {len(run.cohort)} to sum up their data"
    elif spec.asynchronous is not None:
        head = f"round {run.round} has {len(run.folded) + len(run.late)} of {run.target} updates"
    else:
        head = f"round {run.round} waits for {len(run.awaited)} of {len(run.cohort)}"
    late = [f"{_told(one.client, one)} (of round {one.round})" for one in tasks if one.round != run.round]
    ends = [f"deadline in {deadline_s:.0f} s"] if deadline_s is not None else []
    return f"{head}: {', '.join([_some([*told, *late]), *ends])}"


def _told(name: str, task: TaskView | None) -> str:
    """A client and what it is at, as far as that is known."""
    if task is None:
        return name
    if not task.connected:
        return f"{name} away for {task.silent_s:.0f} s" if task.silent_s >= 1 else f"{name} (away)"
    if task.silent_s >= QUIET_S:
        return f"{name} silent for {task.silent_s:.0f} s"
    if task.progress is None:
        return name
    share = f" {100 * task.progress.done // task.progress.total} %" if task.progress.total else ""
    verb = {Stage.FETCHING: "fetching", Stage.SENDING: "sending"}.get(task.progress.stage, task.progress.stage.value)
    return f"{name} {verb}{share}"


def _too_few(spec: RunSpec, missing: int, fitting: Sequence[str], misfits: Mapping[str, str]) -> str:
    here = f"here: {_some(fitting)}" if fitting else ("nobody that fits is here" if misfits else "nobody is here")
    unfit = "".join(f"; {name} does not fit: it {why}" for name, why in sorted(misfits.items())[:5])
    return f"waits for {missing} more of {spec.cohort.required} clients; {here}{unfit}"


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
