"""Who acts in a world besides the server: a client's workshop, and the operator."""

from __future__ import annotations

import asyncio
import contextlib
import types
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final

from tests.simulation import oracle
from tests.simulation.loop import Takes
from tests.simulation.network import Channel
from tests.simulation.plan import ClientPlan, Order, RunPlan

from seqfed.client.channel import ANSWER_S, raising
from seqfed.client.work import LocalUpdate
from seqfed.common import views
from seqfed.common.errors import IllegalTransition, RunEnded, SeqfedError
from seqfed.common.layout import Flat
from seqfed.common.schema import DataSchema
from seqfed.v1 import admin_pb2
from seqfed.v1.admin_pb2_grpc import AdminStub

if TYPE_CHECKING:
    from tests.simulation.world import World

ADDRESSES: Final = {"A": "127.0.0.1:7080", "B": "127.0.0.1:7081"}


class Violation(AssertionError):
    """Something that must never be."""


class Workshop:
    """In place of a client's workshop: an update is reckoned at once, and takes its time."""

    def __init__(self, world: World, client: ClientPlan) -> None:
        self.client = client.name
        self.source = types.SimpleNamespace(
            schema=DataSchema(features=2, steps=5, classes=2, examples=client.examples, validation_examples=10)
        )
        self._world = world
        self._plan = client
        self._begun: tuple[views.TaskKey, views.TaskKind] | None = None
        self._until = 0.0
        self._since = 0.0

    def check(self, task: views.Task) -> None:
        """All data fit."""

    def train(
        self,
        task: views.Task,
        flat: Flat,
        cancelled: Callable[[], bool],
        progress: Callable[[views.Progress], None] = lambda _: None,
        anew: int = 0,
    ) -> LocalUpdate | None:
        if not self._work(task, cancelled, progress, views.Stage.TRAINING):
            return None
        self._world.require_statistics(task)
        delta = oracle.delta_of(task.spec, task.key.round, self.client, oracle.digest(flat), anew)
        tally = {"examples": self._plan.examples, "loss": 1 << 20}
        return LocalUpdate(delta, oracle.digest(delta), self._plan.examples, tally, self._until - self._since)

    def evaluate(
        self, task: views.Task, flat: Flat, progress: Callable[[views.Progress], None] = lambda _: None
    ) -> dict[str, int]:
        self._work(task, lambda: False, progress, views.Stage.EVALUATING)
        self._world.require_statistics(task)
        return {"examples": 10, "correct": flat[:1].tobytes()[0] % 11, "loss": 5 << 20}

    def measure(self, task: views.Task) -> dict[str, int]:
        self._work(task, lambda: False, lambda _: None, views.Stage.READING)
        return oracle.measured(task.spec, self.client)

    def _work(
        self, task: views.Task, cancelled: Callable[[], bool], progress: Callable[[views.Progress], None], stage: Any
    ) -> bool:
        now = self._world.loop.time()
        if self._begun != (task.key, task.kind):
            self._begun = (task.key, task.kind)
            self._since = now
            self._until = now + self._world.training_s(task.spec, self._plan) * (1 if stage is stage.TRAINING else 0.1)
        if cancelled():
            self._begun = None
            return False
        length = max(self._until - self._since, 1e-9)
        progress(views.Progress(stage, int(100 * (now - self._since) / length), 100, 1, 0.5))
        if now < self._until:
            raise Takes(min(2.0, self._until - now))
        self._begun = None
        return True


class Operator:
    """Submits the runs, gives the plan's orders, and lets go on what has paused; done when every run has ended."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.process = world.loop.process("operator")
        self._ids: dict[int, str] = {}
        self._to_resume: dict[str, float] = {}

    async def work(self) -> None:
        plan = self.world.plan
        tasks = [asyncio.ensure_future(self._submit(number, run)) for number, run in enumerate(plan.runs)]
        tasks += [asyncio.ensure_future(self._give(order)) for order in plan.orders]
        watching: dict[str, asyncio.Task[None]] = {}
        while True:
            await asyncio.sleep(self.world.draw.uniform(3, 9))
            ordered = all(
                task.done() for task in tasks
            )  # before the list is asked for: a run may be submitted meanwhile
            with contextlib.suppress(SeqfedError):
                found = await self._list()
                for view in found:
                    require_reason(view)
                    if view.run not in watching:
                        watching[view.run] = asyncio.ensure_future(self._watch(view))
                    await self._let_go_on(view)
                if ordered and all(view.ended for view in found):
                    break
        for task in (*tasks, *watching.values()):
            await task

    async def _watch(self, run: admin_pb2.RunStatus) -> None:
        """Every round is shown once, in order, whatever breaks in between; the last view says that the run has ended."""
        seen = 0
        while True:
            with contextlib.suppress(SeqfedError):
                async with self._stub() as stub:
                    request = admin_pb2.WatchRunRequest(run=run.run, after_round=seen)
                    with raising("the server"):
                        async for message in stub.WatchRun(request):
                            require_reason(message)
                            for record in message.history:
                                if record.round != seen + 1:
                                    raise Violation(f"{run.name}: round {record.round} is shown after round {seen}")
                                seen = record.round
                            if message.ended:
                                return
            await asyncio.sleep(1)

    async def _let_go_on(self, view: admin_pb2.RunStatus) -> None:
        now = self.world.loop.time()
        if view.phase != "paused":
            self._to_resume.pop(view.run, None)
        elif now >= self._to_resume.setdefault(view.run, now + self.world.draw.uniform(1, 60)):
            self.world.say(f"{view.name} is resumed: {view.reason}")
            await self._order("resume", view.run)

    async def _submit(self, number: int, run: RunPlan) -> None:
        await asyncio.sleep(run.at)
        header = admin_pb2.SubmitHeader(spec=run.spec.canonical)

        async def parts() -> AsyncIterator[admin_pb2.SubmitRequest]:
            yield admin_pb2.SubmitRequest(header=header)

        while True:
            try:
                known = [view.run for view in await self._list() if view.name == run.spec.name]
                if known:  # the answer to an earlier try was lost
                    self._ids[number] = known[0]
                    return
                async with self._stub() as stub:
                    with raising("the server"):
                        reply = await stub.Submit(parts(), timeout=ANSWER_S)
                self._ids[number] = reply.run.run
                self.world.say(f"{run.spec.name} is submitted")
                return
            except SeqfedError:
                await asyncio.sleep(1)

    async def _give(self, order: Order) -> None:
        await asyncio.sleep(order.at)
        while order.run not in self._ids:  # noqa: ASYNC110 - a person looks now and then
            await asyncio.sleep(1)
        self.world.say(f"run{order.run}: {order.what}")
        with contextlib.suppress(SeqfedError):
            await self._order(order.what, self._ids[order.run])

    async def _order(self, what: str, run: str) -> None:
        async with self._stub() as stub:
            with raising("the server"), contextlib.suppress(RunEnded, IllegalTransition):
                match what:
                    case "pause":
                        await stub.PauseRun(admin_pb2.PauseRunRequest(run=run), timeout=ANSWER_S)
                    case "resume":
                        await stub.ResumeRun(admin_pb2.ResumeRunRequest(run=run), timeout=ANSWER_S)
                    case _:
                        await stub.StopRun(admin_pb2.StopRunRequest(run=run), timeout=ANSWER_S)

    async def _list(self) -> list[admin_pb2.RunStatus]:
        async with self._stub() as stub:
            with raising("the server"):
                calls = stub.ListRuns(admin_pb2.ListRunsRequest(), timeout=ANSWER_S)
                return [message async for message in calls]

    @contextlib.asynccontextmanager
    async def _stub(self) -> AsyncIterator[Any]:
        """Of whichever server listens."""
        network = self.world.network
        address = next(iter(network.listening), ADDRESSES["A"])
        async with Channel(network, address) as channel:
            stub: Any = AdminStub
            yield stub(channel)


def require_reason(view: views.RunView | admin_pb2.RunStatus) -> None:
    if not view.reason:
        raise Violation(f"{view.name} is {view.phase} in round {view.round} and does not say why")
