"""The masked sums of all runs: one a run at a time, made with the phase that asks for it, and the clients' way to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final, Protocol

from seqfed.common import views
from seqfed.common.errors import DuplicateUpdate, SeqfedError, WrongRound
from seqfed.common.homomorphic.messages import Ready
from seqfed.common.masking.agreed import terms_of
from seqfed.common.masking.messages import Advert, Done
from seqfed.common.masking.terms import Purpose
from seqfed.common.wire_masking import Reply, Request
from seqfed.server import making
from seqfed.server import round as machine
from seqfed.server.encrypted import Ciphertexts
from seqfed.server.hub import Hub
from seqfed.server.intake import Intake
from seqfed.server.live import Live, Work
from seqfed.server.masked import MaskedSum, Masks, Vector
from seqfed.server.round import WORKING, Phase
from seqfed.server.store import Store

PURPOSES: Final[Mapping[views.TaskKind, Purpose]] = {
    views.TaskKind.MEASURE: Purpose.MEASURE,
    views.TaskKind.TRAIN: Purpose.TRAIN,
    views.TaskKind.EVALUATE: Purpose.EVALUATE,
}


class Hear(Protocol):
    """Note a sign of a client's work for a run."""

    def __call__(self, live: Live, client: str, progress: views.Progress | None = None) -> None: ...


class Ask(Protocol):
    """Give the run's machine an event, and wait until it is committed."""

    async def __call__(self, live: Live, event: machine.Event) -> None: ...


class Sums:
    """trust: raises what is wrong with whom an advert says it is of. post: gives the run's machine an event. spread: over how
    many seconds those come back who have lost their connection.
    """

    def __init__(
        self,
        hub: Hub,
        intake: Intake,
        store: Store,
        trust: Callable[[Advert], None],
        *,
        hear: Hear,
        post: Callable[[Live, machine.Event], None],
        ask: Ask,
        spread: Callable[[], float],
    ) -> None:
        self._hub, self._intake, self._store, self._trust = hub, intake, store, trust
        self._hear, self._post, self._ask, self._spread = hear, post, ask, spread

    def prepare(self, live: Live, task: views.Task) -> None:
        """A masked sum for the phase that begins with this task, unless it has one: so that who is ready can say so."""
        assert task.masking is not None
        if live.masked is not None and live.masked.terms.number == task.masking.number:
            return
        if live.masked is not None:
            live.masked.close()
        terms = terms_of(
            live.spec,
            task.key,
            PURPOSES[task.kind],
            task.masking.number,
            task.masking.n_max,
            task.model.digest,
            task.statistics,
            live.layout.size,
            task.masking.known,
        )

        def tell(event: machine.Unmasked | machine.MaskingEnded) -> None:
            self._post(live, event)

        def here(client: str) -> bool:
            return self._hub.get(client) is not None

        dp, target, noise = live.spec.privacy.dp, live.state.target, None
        if dp is not None:
            target = making.denominator(live)
            if dp.mode == "central":
                noise = making.noise_of(live.state, tree=dp.mechanism == "ftrl")
        live.masked = MaskedSum(
            live.spec,
            terms,
            Ciphertexts(terms) if live.spec.privacy.homomorphic else Masks(terms, self._trust),
            here,
            tell,
            size=live.layout.size,
            target=target,
            noise=noise,
            spread_s=self._spread(),
        )

    def begin(self, live: Live, clients: tuple[str, ...]) -> None:
        """The phase is over, and these are ready."""
        assert live.masked is not None  # they were asked, or else they would not be ready
        now = asyncio.get_running_loop().time()
        live.work |= {client: Work(now, now) for client in clients}
        live.masked.begin(clients)

    async def take(
        self, live: Live, client: str, key: views.TaskKey, number: int, message: Request
    ) -> tuple[Reply, tuple[str, ...]]:
        """Take a client's step of a masked sum; the answer to it, when everybody has taken theirs, and the roster's names.

        Raises MaskingRefused for what does not keep to the protocol, WrongRound if the sum goes on without the client.
        """
        found = of_task(live, key)
        if number != found.terms.number or client not in live.state.cohort:
            raise WrongRound(f"client '{client}' is not asked for masked sum {number} of run {key.run}")
        self._hear(live, client, views.Progress(views.Stage.SENDING))
        if isinstance(message, Advert | Ready):
            found.advert(client, message)
            await self._ready(live, client)
        reply = await found.say(client, message)
        if isinstance(reply, Done):
            self._hub.done(client)
        return reply, found.names

    async def _ready(self, live: Live, client: str) -> None:
        """The client can enter the sum of this phase."""
        state = live.state
        if state.phase not in WORKING or client not in state.pending:
            return
        work = live.work.get(client)
        seconds = asyncio.get_running_loop().time() - work.asked if work is not None else None
        event: machine.Event = machine.EvaluationArrived(state.round, client, ())
        if state.phase is Phase.TRAINING:
            event = machine.UpdateArrived(state.round, client, seconds)
        with contextlib.suppress(DuplicateUpdate):
            await self._ask(live, event)

    async def receive(
        self, live: Live, client: str, header: views.UpdateHeader, chunks: AsyncIterator[tuple[int, bytes]]
    ) -> bool:
        """Receive and keep a masked vector, which counts with the message that follows it; True if it is here already."""
        found = of_task(live, header.key)
        if not found.expects(client, header.masked_number, header.digest):
            return True

        def meter(_: int) -> None:
            self._hear(live, client, views.Progress(views.Stage.SENDING))

        path = self._store.update_path(live.run, header.key.round, client, header.digest)
        size = found.vector_bytes(client)
        await self._intake.receive(client, header, live.layout, 0, 1, path, chunks, meter, vector_bytes=size)
        try:
            if not found.expects(client, header.masked_number, header.digest):
                found.left_over(client, path)
                return True
        except SeqfedError:  # the sum has ended, or gone on without it, while the vector came
            found.left_over(client, path)
            raise
        found.received(client, Vector(path, header.digest, header.training_seconds))
        return False


def of_task(live: Live, key: views.TaskKey) -> MaskedSum:
    """The masked sum of the task; raises WrongRound."""
    if live.masked is None or (key.round, key.attempt) != (live.masked.terms.round, live.masked.terms.attempt):
        raise WrongRound(
            f"no masked sum of round {key.round}, attempt {key.attempt} is under way; run {live.run} is "
            f"{live.state.phase.value} in round {live.state.round}, attempt {live.state.attempt}"
        )
    return live.masked
