"""What a seed stands for: a federation, its runs and their policies, what the operator does, and every fault with its moment."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any, Final

from seqfed.common.spec import RunSpec
from seqfed.server import points

CHUNK: Final = 64  # bytes, in the worlds in which a vector is several chunks
SERVER_FAULTS: Final = ("kill-server", "kill-at-point", "stop-server", "hang-server", "cut-server", "full-disk")
CLIENT_FAULTS: Final = ("kill-client", "hang-client", "part-client", "break-client", "slow-client")
# Moments of a masked sum: a client has made its message of a step; a server has taken one, has all of them, has the sum.
STEPS: Final = ("advertise", "share", "mask", "confirm", "open")
SUMMING: Final = ("sum-sharing", "sum-masking", "sum-confirming", "sum-opening", "sum-done", "sum-opened")


@dataclass(frozen=True)
class ClientPlan:
    """One client. `pace`: how long its trainings take, as a factor."""

    name: str
    examples: int
    pace: float
    latency: float
    rate: float
    arrives: float


@dataclass(frozen=True)
class RunPlan:
    """A run, submitted at this moment; its trainings take about `training_s`."""

    at: float
    spec: RunSpec
    training_s: float


@dataclass(frozen=True)
class Fault:
    """`seconds`: how long the process is down or still, the line cut, or the disk full.

    `point`: at which the server is to die next, or the step of its next masked sum in which this strikes a client.
    """

    at: float
    kind: str
    target: str
    seconds: float
    point: str = ""


@dataclass(frozen=True)
class Order:
    """What the operator tells a run, by its number."""

    at: float
    what: str
    run: int


@dataclass(frozen=True)
class Plan:
    """`heal`: from then on nothing fails any more."""

    seed: int
    clients: tuple[ClientPlan, ...]
    runs: tuple[RunPlan, ...]
    faults: tuple[Fault, ...]
    orders: tuple[Order, ...]
    heal: float
    standby: bool
    lease_s: float
    chunks: bool
    thread_s: float
    settings: dict[str, Any] = field(default_factory=dict)


def plan(seed: int) -> Plan:
    """Everything that is decided beforehand; what depends on the moment is drawn in the world."""
    draw = random.Random(f"{seed}/plan")  # noqa: S311 - not a secret
    clients = tuple(
        ClientPlan(
            name=f"c{number}",
            examples=draw.randint(1, 1000),
            pace=draw.uniform(0.5, 2.0),
            latency=draw.choice((0.0005, 0.01, 0.1, 0.5)),
            rate=draw.choice((1e9, 1e9, 1e4, 200.0)),
            arrives=draw.choice((0.0, 0.0, draw.uniform(0, 20))),
        )
        for number in range(draw.randint(2, 8))
    )
    more = random.Random(f"{seed}/secure plan")  # noqa: S311 - apart from the others, so that plain worlds are as they were
    secure = more.random() < 0.35
    count = draw.choice((1, 1, 1, 2, 3))
    if secure:
        count = min(count, more.choice((1, 1, 1, 2)))  # they take longer
    runs = tuple(_run(draw, number, len(clients), more if secure else None) for number in range(count))
    length = sum(run.spec.rounds * (2 * run.training_s + 2) for run in runs)
    heal = min(600.0, draw.uniform(0.3, 1.5) * length + 20)
    many = draw.choice((0, 3, 8, 20, 50))
    standby = draw.random() < 0.25
    names = [client.name for client in clients]
    faults = [_fault(draw, heal, names, standby) for _ in range(draw.randint(0, many))]
    if secure:
        faults = [_summing(more, one) for one in faults]
        faults += _together(more, heal, names)
    return Plan(
        seed=seed,
        clients=clients,
        runs=runs,
        faults=tuple(sorted(faults, key=lambda one: one.at)),
        orders=tuple(_orders(draw, heal, len(runs))),
        heal=heal,
        standby=standby,
        lease_s=15.0 if standby else 60.0,
        chunks=draw.random() < 0.4,
        thread_s=draw.choice((0.0005, 0.005, 0.05)),
        settings={
            "uploads_in_flight": draw.choice((1, 2, 8)),
            "uploads_waiting": draw.choice((1, 4, 1000)),
            "upload_stall_s": draw.choice((10.0, 60.0)),
            "joins_per_s": draw.choice((0.5, 200.0)),
        },
    )


def _run(draw: random.Random, number: int, clients: int, more: random.Random | None) -> RunPlan:
    deadline = draw.choice((20.0, 60.0, 200.0))
    smallest = draw.randint(1, clients)
    cohort: dict[str, Any] = {
        "min_clients": smallest,
        "deadline_s": deadline,
        "silence_s": draw.choice((12.0, 20.0, 60.0)),
        "late": draw.choice(("drop", "fold")),
        "staleness": draw.choice((0.0, 0.5, 2.0)),
        "max_staleness": draw.choice((1, 2, 10)),
        "max_attempts": draw.randint(1, 4),
    }
    content: dict[str, Any] = {}
    most = smallest
    if draw.random() < 0.2:
        most = draw.randint(1, smallest)
        content["asynchronous"] = {"buffer": most, "concurrency": draw.randint(most, clients + 1)}
    else:
        match draw.randint(0, 2):
            case 0:
                cohort["fraction"] = draw.uniform(0.1, 1.0)
            case 1:
                cohort["count"] = most = draw.randint(1, clients)
        cohort["over_select"] = draw.choice((1.0, 1.0, 1.3, 2.0))
    if draw.random() < 0.6:
        cohort["quorum"] = draw.randint(1, most)
        if draw.random() < 0.5:
            cohort["grace_s"] = draw.choice((0.0, 1.0, 10.0))
    if draw.random() < 0.4:
        cohort["adaptive"] = draw.uniform(2.0, 5.0)
    spec = {
        "name": f"run{number}",
        "seed": draw.randrange(1 << 62),
        "rounds": draw.randint(2, 6),
        "data": {"features": 2, "classes": 2},
        "model": {"kind": "lstm", "hidden": 2, "layers": 1},
        "cohort": cohort,
        "aggregation": {"weighting": draw.choice(("examples", "uniform"))},
        "evaluation": {"every": draw.choice((0, 1, 2))},
        **content,
    }
    if more is not None:
        spec["data"]["normalise"] = more.choice(("given", "given", "federated"))
        if more.random() < 0.8:
            _secure(more, spec)
    training = draw.uniform(0.2, 0.2 * deadline)
    return RunPlan(draw.choice((0.0, draw.uniform(0, 30))), RunSpec.model_validate(spec), training)


def _secure(draw: random.Random, content: dict[str, Any]) -> None:
    """Make it a run with secure aggregation, which has no late updates, no buffer, and no cohort of one."""
    content.pop("asynchronous", None)
    cohort = content["cohort"]
    cohort["late"] = "drop"
    for size in {"min_clients", "count", "quorum"} & cohort.keys():
        cohort[size] = max(2, cohort[size])
    if content["aggregation"]["weighting"] == "examples":
        content["aggregation"]["max_weight"] = draw.choice((1, 300, 1 << 20))
    content["rounds"] = min(3, content["rounds"])
    smallest = cohort.get("quorum", cohort.get("count", cohort["min_clients"]))
    content["privacy"] = {
        "secure_aggregation": True,
        "mode": draw.choice(("malicious", "semi_honest")),
        "min_survivors": draw.randint(2, smallest),
        "b": draw.choice((8, 12, 16, 20, 24, 32)),
        "clip": draw.choice((0.05, 1.0)),
        "step_s": draw.choice((30.0, 60.0, 300.0)),
    }


def _summing(draw: random.Random, fault: Fault) -> Fault:
    """Now and then at a moment of a masked sum."""
    if draw.random() < 0.5:
        return fault
    if fault.kind in CLIENT_FAULTS:
        return replace(fault, point=draw.choice(STEPS))
    if fault.kind in {"kill-server", "kill-at-point"}:
        return replace(fault, kind="kill-at-point", point=draw.choice(SUMMING))
    return fault


def _together(draw: random.Random, heal: float, names: list[str]) -> list[Fault]:
    """Of one masked sum, it may be: a client is lost, and the server dies later in it."""
    at = draw.uniform(0, heal / 2)
    lost = draw.choice(("hang-client", "part-client", "slow-client", "kill-client"))
    found = [
        Fault(at, lost, draw.choice(names), draw.uniform(5, 60), draw.choice(STEPS)),
        Fault(at, "kill-at-point", "A", draw.uniform(0, 30), draw.choice(SUMMING)),
    ]
    return [one for one in found if draw.random() < 0.6]


def _fault(draw: random.Random, heal: float, names: list[str], standby: bool) -> Fault:
    kind = draw.choice(SERVER_FAULTS if draw.random() < 0.4 else CLIENT_FAULTS)
    target = draw.choice(names)
    if kind in SERVER_FAULTS:
        target = draw.choice("AB") if standby else "A"
    seconds = draw.choice((draw.uniform(0, 2), draw.uniform(0, 30), draw.uniform(0, 120)))
    point = draw.choice(points.NAMES) if kind == "kill-at-point" else ""
    return Fault(draw.uniform(0, heal), kind, target, min(seconds, heal / 2), point)


def _orders(draw: random.Random, heal: float, runs: int) -> list[Order]:
    found = []
    for number in range(runs):
        if draw.random() < 0.15:
            at = draw.uniform(0, heal)
            found.append(Order(at, "pause", number))
            found.append(Order(at + draw.uniform(0, 40), "resume", number))
        if draw.random() < 0.05:
            found.append(Order(draw.uniform(0, heal), "stop", number))
    return sorted(found, key=lambda one: one.at)
