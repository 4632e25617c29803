"""Why a run stands where it stands, in words for its operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from seqfed.common.spec import RunSpec
from seqfed.server.round import ENDED, Phase, Run


def explain(spec: RunSpec, run: Run, fitting: Sequence[str], misfits: Mapping[str, str], turn_of: str | None) -> str:
    """One sentence or two.

    `fitting`: connected clients whose data suit the run; `misfits`: the other connected ones and why they do not suit;
    `turn_of`: the run that has its turn now, if any.
    """
    if run.phase in ENDED:
        return run.reason
    before = f" (before: {run.reason})" if run.reason else ""
    match run.phase:
        case Phase.QUEUED | Phase.GATHERING:
            missing = spec.cohort.required - len(fitting)
            if missing > 0:
                return _too_few(spec, missing, fitting, misfits) + before
            if run.phase is Phase.QUEUED and turn_of is not None:
                return f"queued: run {turn_of} has its turn"
            return "about to begin" + before
        case Phase.TRAINING | Phase.EVALUATING:
            verb = "train" if run.phase is Phase.TRAINING else "evaluate"
            waits = [name if name in fitting else f"{name} (away)" for name in run.pending]
            return f"waits for {len(waits)} of {len(run.cohort)} to {verb}: {_some(waits)}{before}"
        case _:
            return "saving the new model"


def _too_few(spec: RunSpec, missing: int, fitting: Sequence[str], misfits: Mapping[str, str]) -> str:
    here = f"here: {_some(fitting)}" if fitting else ("nobody that fits is here" if misfits else "nobody is here")
    unfit = "".join(f"; {name} does not fit: it {why}" for name, why in sorted(misfits.items())[:5])
    return f"waits for {missing} more of {spec.cohort.required} clients; {here}{unfit}"


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
