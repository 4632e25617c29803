"""The client's life: join, listen, work, and come back after every loss of connection without losing the work in hand.

Two coroutines: one keeps the connection, to whichever of the servers answers; the other does the tasks and waits for a
connection whenever it needs one. A loss of connection therefore never stops a training, and an upload goes on at the byte
where it broke.

Which task counts. One is in hand, others may wait. A training puts an end to whatever is in hand and empties the queue: the
federation has gone on. An evaluation waits for its turn behind a training in hand, because that training may still be wanted
(its update may count late); if it is not, the server says so, by CANCEL or by refusing its progress. A CANCEL ends its own
task wherever that is. The same task again, perhaps for another attempt, is the one in hand; if it brings the number of a new
masked sum, the one under way is given up for it.

In a private run the server is told how far a task is in per cent, nothing of its loss, and of an error that may tell of the data
its name. What a training has made is kept for another attempt at its round, unless a sum that it was in may have been opened:
then it is made anew. With differential privacy consent is asked for each noise that is drawn and each masked sum.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, TypeVar

import grpc
import numpy as np
from blake3 import blake3

from seqfed.client import secure
from seqfed.client.channel import connected
from seqfed.client.connection import Connection
from seqfed.client.enroll import Renewal
from seqfed.client.packing import Packer
from seqfed.client.traffic import missed
from seqfed.client.work import LocalUpdate, Workshop
from seqfed.common import views
from seqfed.common.compression import Key, decode, largest
from seqfed.common.compression.chosen import chosen, download
from seqfed.common.errors import (
    BrokenTransfer,
    ChecksumMismatch,
    ConfigError,
    DuplicateUpdate,
    InsecureRefused,
    InvalidName,
    LayoutMismatch,
    LeaseLost,
    MaskingFailed,
    MaskingRefused,
    NoModel,
    Overloaded,
    PolicyRefused,
    RateLimited,
    RunEnded,
    SeqfedError,
    ServerUnavailable,
    StorageError,
    StorageFull,
    TooLarge,
    TrainingFailed,
    Unauthenticated,
    UnknownRun,
    UnknownSession,
    UpdateOutOfRange,
    VersionMismatch,
    WrongRound,
)
from seqfed.common.identity import day
from seqfed.common.layout import BYTES_PER_PARAMETER, Flat
from seqfed.common.logs import about
from seqfed.common.model import layout_of
from seqfed.common.transfer import Pace, Reassembly
from seqfed.common.views import Progress, Stage, TaskKind

if TYPE_CHECKING:
    from seqfed.client.consent import Consent
    from seqfed.client.masking import Masking
    from seqfed.common.wire_masking import Reply, Request

log = logging.getLogger("seqfed.client")

T = TypeVar("T")
G = TypeVar("G", bound="secure.Given")
Dial = Callable[
    [str, bool], contextlib.AbstractAsyncContextManager[grpc.aio.Channel]
]  # (HOST:PORT, whether insecure is allowed)

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between tries
BUSY_WAITS: Final = (1.0, 4.0)  # seconds, when a server has no room just now
LOOK_S: Final = (
    600.0  # seconds between two looks at the certificate: while a machine sleeps, its own clock stands still
)
BEAT_S: Final = 5.0  # seconds from one word about the progress to the next: a task shorter than that costs none
HOPELESS = (ConfigError, InsecureRefused, InvalidName, VersionMismatch)  # trying again cannot help
BROKEN = (ServerUnavailable, BrokenTransfer)  # what a transfer ends with if the link does not carry it
# Trying again may. Also where our certificate is refused: the server may be mended, or this client enrolled anew.
PASSING = (*BROKEN, UnknownSession, Unauthenticated, Overloaded, RateLimited, LeaseLost, StorageFull, StorageError)
# The federation has gone on without this work; where a masked sum did not come about, to another try at it.
OUTDATED = (WrongRound, RunEnded, NoModel, UnknownRun, DuplicateUpdate, MaskingFailed)
# What following the steps to a model ends with where the whole model is then the remedy.
FELL_SHORT = (NoModel, BrokenTransfer, ChecksumMismatch, LayoutMismatch, TooLarge, UpdateOutOfRange, VersionMismatch)
OF_RULES = (PolicyRefused, ConfigError, MaskingRefused)  # their words are of the run and of rules, not of data
UNHURRIED: Final = (Stage.FETCHING, Stage.SENDING)  # told even if nothing moved: what they wait for is elsewhere
READING_S: Final = 600.0  # so long may the data be read without a sign of it


class Backoff:
    """Waits that double up to a cap, each shortened by up to a half at random so that clients do not come in step."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = random.Random() if rng is None else rng  # noqa: S311 - not a secret
        self._next = FIRST_WAIT

    def wait(self) -> float:
        """Seconds until the next try."""
        wait, self._next = self._next, min(2 * self._next, LONGEST_WAIT)
        return wait * self._rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        self._next = FIRST_WAIT


@dataclass(eq=False)
class _Turn:
    """The masked sum that a task is for; `over` is done once it is for another."""

    key: views.TaskKey
    masking: views.MaskingTerms | None
    over: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(eq=False)
class _Hand:
    """The task in hand. `key` is of the newest attempt that it serves; `dropped` is done once it is not wanted any more."""

    task: views.Task
    key: views.TaskKey
    progress: Progress = field(default_factory=lambda: Progress(Stage.READING))
    reads_until: float = 0.0  # clock reading until which it may read its data without any progress
    dropped: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def __post_init__(self) -> None:
        self.turn = _Turn(self.key, self.task.masking)

    def serve(self, task: views.Task) -> None:
        """The same task came again, perhaps for another attempt."""
        self.key = task.key
        if task.masking != self.turn.masking:
            self.turn.over.set_result(None)
            self.turn = _Turn(task.key, task.masking)

    def drop(self) -> None:
        if not self.dropped.done():
            self.dropped.set_result(None)

    def tell(self, progress: Progress) -> None:
        """Note how far it is; from any thread."""
        self.progress = progress

    def tell_wanted(self, progress: Progress) -> None:
        """The same, for a computation that nothing else stops: raises _Overtaken if the task is not wanted."""
        if self.dropped.done():
            raise _Overtaken
        self.progress = progress


class Session:
    """One client and its federation's servers, of which one at a time serves.

    `dial` opens a channel to one of them; every wait is drawn from `rng` and measured by the running loop's clock.
    """

    def __init__(
        self,
        workshop: Workshop,
        servers: tuple[str, ...],
        instance: str,
        insecure: bool,
        *,
        dial: Dial = connected,
        renewal: Renewal | None = None,
        rng: random.Random | None = None,
        consent: Consent | None = None,
        masking: Masking | None = None,
        packer: Packer | None = None,
    ) -> None:
        self._workshop = workshop
        self._packer = Packer() if packer is None else packer
        self._consent = consent
        self._masking = masking
        self._servers = servers
        self._instance = instance
        self._insecure = insecure
        self._dial = dial
        self._renewal = renewal
        self._renewed = False  # the connection ends because there is a new certificate to show
        self._rng = random.Random() if rng is None else rng  # noqa: S311 - not a secret
        self._connection: Connection | None = None
        self._joined = asyncio.Event()  # set while there is a connection
        self._hand: _Hand | None = None
        self._waiting: list[views.Task] = []
        self._offered = asyncio.Event()  # set while a task waits
        self._pace = Pace()
        self._model: tuple[bytes, Flat] | None = None  # the newest model fetched, by its BLAKE3 digest
        self._trained: tuple[tuple[str, int, bytes], LocalUpdate] | None = None  # the last, by (run, round, model)
        self._log = about(log, client=workshop.client)

    async def run(self) -> None:
        """Take part until cancelled; raises only what trying again cannot mend."""
        self._model = self._model or await asyncio.to_thread(self._packer.kept_model)
        parts = [asyncio.ensure_future(part) for part in (self._keep_connected(), self._work())]
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)  # neither ends but by an error
            for part in parts:
                if part.done():
                    part.result()
        finally:
            if self._hand is not None:
                self._hand.drop()  # the thread that trains sees it after its batch
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    # The connection -----------------------------------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        """Dial the servers in turn. After a connection that stood, wait a random part of the spread that its server asked
        for, since all the others have lost theirs too; after each time round the list without any, ever longer.
        """
        backoff, clock = Backoff(self._rng), asyncio.get_running_loop().time
        place = failed = 0
        while True:
            address = self._servers[place % len(self._servers)]
            spread: float | None = None
            began, settled = clock(), False
            try:
                async with self._dial(address, self._insecure) as channel:
                    connection = Connection(channel, address)
                    schema, working = self._workshop.source.schema, self._working()
                    holds = b"" if self._model is None else self._model[0]
                    spread = await connection.join(self._workshop.client, self._instance, schema, working, holds)
                    began = clock()
                    self._log.info("connected to %s; waiting for tasks", address)
                    self._have(connection)
                    renewing = asyncio.ensure_future(self._renew(connection, channel))
                    try:
                        async for task in connection.listen():
                            settled = True
                            self._offer(task)
                    finally:
                        self._have(None)
                        renewing.cancel()
                    raise ServerUnavailable(f"the server at {address} ended the connection")
            except HOPELESS:
                raise
            except SeqfedError as error:  # whatever it is, it may be mended on the server's side
                if self._renewed:
                    self._renewed = False
                    continue  # the same server again, at once, with the new certificate
                stays = isinstance(error, Overloaded)  # it is the right one, only busy
                if spread is None:
                    failed += 1
                    wait = backoff.wait() if failed % len(self._servers) == 0 else 0.0
                    if stays:  # in a moment it has room: no longer waits for those who were unlucky
                        wait = self._rng.uniform(*BUSY_WAITS)
                else:
                    failed, wait = 0, self._rng.uniform(0.0, spread)
                    if settled or clock() - began > LONGEST_WAIT:
                        backoff.reset()
                    else:  # one that only flickers is not dialled ever faster
                        wait += backoff.wait()
                place += not stays
                self._log.warning("%s; trying again in %.1f s", error, wait)
                await asyncio.sleep(wait)

    async def _renew(self, connection: Connection, channel: grpc.aio.Channel) -> None:
        """Wait until the certificate is due, get a new one, and close the channel for one that shows it.

        Whatever was under way over it goes on over the next, as after every loss of connection.
        """
        if self._renewal is None:
            return
        while True:
            try:
                if (wait := self._renewal.wait()) > 0:
                    await asyncio.sleep(min(wait, LOOK_S))
                    continue
                whose = await self._renewal.renew(connection.renew)
            except SeqfedError as error:
                self._log.warning("the certificate could not be renewed: %s; again in %.0f min", error, LOOK_S / 60)
                await asyncio.sleep(LOOK_S)
                continue
            self._log.info("the certificate was renewed; it is valid until %s", day(whose.not_after))
            self._renewed = True
            await channel.close()
            return

    def _working(self) -> views.TaskKey | None:
        """The task in hand, if it is still wanted."""
        hand = self._hand
        return None if hand is None or hand.dropped.done() else hand.key

    def _have(self, connection: Connection | None) -> None:
        self._connection = connection
        if connection is None:
            self._joined.clear()
        else:
            self._joined.set()

    async def _connected(self) -> Connection:
        while self._connection is None:
            await self._joined.wait()
        return self._connection

    # The work -----------------------------------------------------------------------------------------------------

    def _offer(self, task: views.Task) -> None:
        """Take note of a task, as the module's header says."""
        hand = self._hand
        if task.kind is TaskKind.CANCEL:
            if hand is not None and _same(hand.task, task):
                hand.drop()
            self._waiting = [one for one in self._waiting if not _same(one, task)]
        elif hand is not None and not hand.dropped.done() and hand.task.kind is task.kind and _same(hand.task, task):
            hand.serve(task)
        elif task.kind is TaskKind.TRAIN:
            if hand is not None:
                hand.drop()
            self._waiting = [task]
        else:
            if hand is not None and hand.task.kind is task.kind:
                hand.drop()
            self._waiting = [*(one for one in self._waiting if one.kind is not task.kind), task]
        if self._waiting:
            self._offered.set()
        else:
            self._offered.clear()

    async def _work(self) -> None:
        while True:
            while not self._waiting:  # what was offered may have been taken back in the same turn of the loop
                await self._offered.wait()
            task = self._waiting.pop(0)
            if not self._waiting:
                self._offered.clear()
            self._hand = hand = _Hand(task, task.key)
            lines = about(self._log, run=task.key.run, round=task.key.round)
            beat = asyncio.ensure_future(self._beat(hand))
            try:
                await self._do(hand)
            except _Overtaken:
                lines.info("no longer wanted")
            except OUTDATED as error:
                lines.info("%s", error)
            except SeqfedError as error:
                lines.error("%s", error)
                self._hand = None  # before telling: the server may ask again at once
                await self._tell_failure(hand, error)
            except Exception:  # noqa: BLE001 - it is in the log, and in a sentence at the server
                lines.exception("the task met an error that has no name")
                self._hand = None
                await self._tell_failure(hand, TrainingFailed("the client met an unexpected error; its log has it"))
            finally:
                self._hand = None
                beat.cancel()

    async def _do(self, hand: _Hand) -> None:
        task, masking = hand.task, self._masking_for(hand.task)
        if self._consent is not None:
            await asyncio.to_thread(self._consent, task, b"" if self._model is None else self._model[0])
        hand.reads_until = asyncio.get_running_loop().time() + READING_S
        if task.kind is TaskKind.MEASURE:
            tally = await asyncio.to_thread(self._workshop.measure, task)
            hand.reads_until = 0.0
        else:
            await asyncio.to_thread(self._workshop.check, task)  # the first of a run reads the data
            hand.reads_until = 0.0
            flat = await self._fetch(hand)
            if task.kind is TaskKind.TRAIN:
                await self._train(hand, flat, masking)
                return
            tally = await asyncio.to_thread(self._workshop.evaluate, task, flat, hand.tell_wanted)
        if masking is None:
            await self._persist(hand, lambda server: server.submit_evaluation(hand.key, task.model.version, tally))
        else:
            await self._mask(hand, masking, lambda _: _made(tally))

    async def _train(self, hand: _Hand, flat: Flat, masking: Masking | None) -> None:
        task = hand.task
        if masking is None:
            update = await self._update(hand, flat)
            await self._submit(hand, update)
        else:
            update = await self._mask(hand, masking, lambda number: self._update(hand, flat, masking, number))
        about(self._log, run=task.key.run, round=task.key.round).info(
            "of %d rounds of '%s': trained on %d examples in %.2f s",
            task.spec.rounds,
            task.spec.name,
            update.weight,
            update.training_seconds,
        )

    async def _fetch(self, hand: _Hand) -> Flat:
        """The task's global model, from the last task if it is the same one, or by the steps to it if they are known."""
        model = hand.task.model
        flat = None
        if self._model is not None:
            digest, flat = self._model
            if digest == model.digest:
                return flat
            self._model = None
            if steps := missed(model, digest):
                if await self._follow(hand, flat, steps):
                    return await self._have_model(hand, flat)
                if self._consent is not None:
                    await asyncio.to_thread(self._consent.more, hand.task, model.nbytes)
        if flat is None or flat.nbytes != model.nbytes:
            flat = np.empty(model.nbytes // BYTES_PER_PARAMETER, "<f4")
        room = flat.data.cast("B")

        def sink(offset: int, data: bytes) -> None:
            end = offset + len(data)
            room[offset:end] = data
            hand.tell(Progress(Stage.FETCHING, end, model.nbytes))

        into = Reassembly(model.nbytes, model.digest, sink)
        if model.data:
            into.add(0, model.data)
            into.finish()
        else:
            hand.tell(Progress(Stage.FETCHING, 0, model.nbytes))
            await self._take(hand, model.version, into)
        return await self._have_model(hand, flat)

    async def _take(self, hand: _Hand, version: int, into: Reassembly, *, step: bool = False) -> None:
        """Fetch a model, or the payload that leads to it, over whatever connections there are."""

        async def fetch(server: Connection) -> None:
            had, clock = into.received, asyncio.get_running_loop().time
            began = clock()
            with self._paced():
                await server.fetch_model(hand.key.run, version, into, self._pace.size, step=step)
            self._pace.timed(into.received - had, clock() - began)

        await self._persist(hand, fetch)

    async def _have_model(self, hand: _Hand, flat: Flat) -> Flat:
        digest = hand.task.model.digest
        if hand.task.spec.compression.download != "none":
            await asyncio.to_thread(self._packer.keep_model, digest, flat)
        self._model = (digest, flat)
        hand.tell(Progress(Stage.READING))  # until the first batch: the network is built, torch perhaps loaded
        return flat

    async def _follow(self, hand: _Hand, flat: Flat, missed: Sequence[views.ModelStep]) -> bool:
        """Add these steps to the model, in its place; False if that does not make the task's model: `flat` is then void."""
        task, layout = hand.task, layout_of(hand.task.spec)
        codec = download(task.spec, layout.size)
        if codec is None or flat.size != layout.size:
            return False
        try:
            for step in missed:
                if step.nbytes > (most := largest(codec, layout)):
                    raise TooLarge(
                        f"a step of {step.nbytes:,} bytes was announced; {most:,} is the most that it can have"
                    )
                room = bytearray(step.nbytes)
                into = Reassembly(step.nbytes, step.digest, _sink(room))
                if step.data:
                    into.add(0, step.data)
                    into.finish()
                else:
                    hand.tell(Progress(Stage.FETCHING, 0, step.nbytes))
                    await self._take(hand, step.version, into, step=True)
                key = Key(task.spec.seed, task.key.run, step.version)
                await asyncio.to_thread(_add, flat, decode(memoryview(room), layout, key, codec))
            found = await asyncio.to_thread(lambda: blake3(flat.data.cast("B")).digest())
            if found != task.model.digest:
                raise ChecksumMismatch("the steps to the model do not end at the one that the server announces")
        except FELL_SHORT as error:
            about(self._log, run=task.key.run, round=task.key.round).info("%s; fetching the whole model", error)
            return False
        return True

    async def _update(self, hand: _Hand, flat: Flat, masking: Masking | None = None, number: int = 0) -> LocalUpdate:
        """What the training makes, or has made before unless a masked sum that it was in may have been opened; number: of the
        masked sum that it is for.
        """
        task = hand.task
        of = (task.key.run, task.key.round, task.model.digest)
        opened = () if masking is None else await asyncio.to_thread(masking.log.opened, task.key)
        update = None if self._trained is None or self._trained[0] != of else self._trained[1]
        if update is not None and update.digest in opened:
            update = None
        if self._consent is not None and task.spec.privacy.dp is not None:
            examples = len((await asyncio.to_thread(self._workshop.check, task)).training)
            await asyncio.to_thread(self._consent.release, task, number, examples, update is None)
        if update is not None:
            return update
        self._trained = None  # its memory is used again
        anew = (number,) if opened else ()
        made = await asyncio.to_thread(self._workshop.train, task, flat, hand.dropped.done, hand.tell, *anew)
        if made is None:
            raise _Overtaken
        self._trained = (of, made)
        return made

    async def _submit(self, hand: _Hand, update: LocalUpdate) -> None:
        task, codec = hand.task, chosen(hand.task.spec, update.delta.size, self._pace.bytes_per_s)
        if codec is None:
            data, digest = update.delta.astype("<f4", copy=False).data.cast("B"), update.digest
        else:
            if codec.feeds_back:
                await self._settle(hand)
            layout = layout_of(task.spec)
            data = memoryview(
                await asyncio.to_thread(self._packer.pack, task, self._workshop.client, layout, update.delta, codec)
            )
            digest = blake3(data).digest()

        def header() -> views.UpdateHeader:
            return views.UpdateHeader(
                key=hand.key,
                weight=update.weight,
                layout_digest=task.model.layout_digest,
                nbytes=len(data),
                digest=digest,
                offset=0,
                tally=update.tally,
                training_seconds=update.training_seconds,
                codec="" if codec is None else codec.name,
            )

        await self._send(hand, header, data)
        if codec is not None and codec.feeds_back:
            await asyncio.to_thread(self._packer.counted, task.key.run, task.key.round)

    async def _settle(self, hand: _Hand) -> None:
        """Ask what became of the run's update before this one, where the answer was missed."""
        run = hand.key.run
        open_ = await asyncio.to_thread(self._packer.unsettled, run, hand.key.round)
        if open_ is None:
            return
        key, digest = views.TaskKey(run, open_[0], 1), open_[1]
        with contextlib.suppress(*OUTDATED):  # it did not count
            _, complete = await self._persist(hand, lambda server: server.upload_status(key, digest))
            if complete:
                await asyncio.to_thread(self._packer.counted, run, key.round)

    async def _send(
        self, hand: _Hand, header: Callable[[], views.UpdateHeader], data: memoryview, turn: _Turn | None = None
    ) -> None:
        """Send an update, or a masked vector; `header` is asked anew at each try."""
        first = True

        def sent(size: int) -> None:
            hand.tell(Progress(Stage.SENDING, size, len(data)))

        async def send(server: Connection) -> None:
            nonlocal first
            what = header()
            offset, complete = (0, False) if first else await server.upload_status(what.key, what.digest)
            first = False
            if complete:
                return
            clock = asyncio.get_running_loop().time
            began = clock()
            with self._paced():
                busy_s = await server.submit_update(replace(what, offset=offset), data, self._pace.size, sent)
            self._pace.carried(len(data) - offset, clock() - began - busy_s)

        sent(0)
        await self._persist(hand, send, turn)

    # Masked sums --------------------------------------------------------------------------------------------------

    def _masking_for(self, task: views.Task) -> Masking | None:
        """What masks this task's answer; None if that goes to the server as it is. Raises MaskingRefused."""
        if not task.spec.privacy.secure_aggregation:
            return None
        if self._masking is None:
            raise MaskingRefused("this client has no masking key, which a run with secure aggregation needs")
        self._masking.require(task.spec)
        return self._masking

    async def _mask(self, hand: _Hand, masking: Masking, make: Callable[[int], Awaitable[G]]) -> G:
        """Be in the masked sum that the task is for, with what `make` makes for its number; if the server gives it up for
        another one, in that.
        """
        while True:
            turn = hand.turn
            number = 0 if turn.masking is None else turn.masking.number
            given = await make(number)
            try:
                await self._be_in(hand, masking, turn, number, given)
            except (_Overtaken, *OUTDATED):
                if hand.dropped.done() or not turn.over.done():
                    raise
            else:
                if not turn.over.done():
                    return given
            if self._consent is not None:
                task = replace(hand.task, key=hand.turn.key, masking=hand.turn.masking)
                await asyncio.to_thread(self._consent.more, task)

    async def _be_in(self, hand: _Hand, masking: Masking, turn: _Turn, number: int, given: secure.Given) -> None:
        key = turn.key

        async def ask(step: Request, names: Sequence[str]) -> Reply:
            return await self._persist(hand, lambda server: server.mask(key, number, step, names), turn)

        sent = False  # from then on it may be in a sum that is opened

        async def send(packed: bytes, digest: bytes) -> None:
            nonlocal sent
            sent = True
            header = views.UpdateHeader(
                key=key,
                weight=0,
                layout_digest=hand.task.model.layout_digest,
                nbytes=len(packed),
                digest=digest,
                offset=0,
                tally={},
                training_seconds=given.training_seconds if isinstance(given, LocalUpdate) else 0.0,
                masked_number=number,
            )
            await self._send(hand, lambda: header, memoryview(packed), turn)

        hand.tell(Progress(Stage.SENDING))
        task = replace(hand.task, key=key, masking=turn.masking)
        if not isinstance(given, LocalUpdate) or not task.spec.compression.feeds_back:
            await secure.take_part(masking, task, given, ask, send)
            return
        layout = layout_of(task.spec)
        rest = await asyncio.to_thread(self._packer.take, task, layout)
        if rest is not None:
            given = replace(given, delta=given.delta + rest)
        try:
            await secure.take_part(masking, task, given, ask, send)
        except BaseException:
            if not sent:
                self._packer.put_back(key.run)
            raise
        left = await asyncio.to_thread(secure.rest_of, task, given)
        await asyncio.to_thread(self._packer.keep, task, layout, left)

    @contextlib.contextmanager
    def _paced(self) -> Iterator[None]:
        """Learn from how the transfer in the block ends how large the next one's chunks should be."""
        try:
            yield
        except BROKEN:
            self._pace.broken()
            raise
        self._pace.whole()

    async def _persist(self, hand: _Hand, call: Callable[[Connection], Awaitable[T]], turn: _Turn | None = None) -> T:
        """Make this call, again after every passing failure, on whatever connection there then is.

        Raises _Overtaken, with the call broken off, as soon as the task is not wanted any more, or the masked sum is over for
        which it is.
        """

        async def persisting() -> T:
            backoff = Backoff(self._rng)
            while True:
                try:
                    return await call(await self._connected())
                except PASSING as error:
                    wait = backoff.wait()
                    about(self._log, run=hand.key.run, round=hand.key.round).warning(
                        "%s; going on in %.1f s", error, wait
                    )
                    await asyncio.sleep(wait)

        ends = (hand.dropped,) if turn is None else (hand.dropped, turn.over)
        if any(end.done() for end in ends):
            raise _Overtaken
        done = asyncio.ensure_future(persisting())
        try:
            await asyncio.wait((done, *ends), return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise _Overtaken
            return done.result()
        finally:
            if not done.done():
                done.cancel()
                await asyncio.wait((done,))  # nothing is read from the update's memory any more
                if not done.cancelled():
                    done.exception()  # it is of no interest, and asyncio need not complain that nobody looked

    async def _beat(self, hand: _Hand) -> None:
        """Tell the server every BEAT_S how far the task is, as long as it goes on; what it does not want is dropped."""
        told: tuple[Connection, Progress] | None = None
        secret = _is_secret(hand.task)
        while True:
            await asyncio.sleep(BEAT_S)
            connection, progress = self._connection, hand.progress
            unhurried = progress.stage in UNHURRIED or asyncio.get_running_loop().time() < hand.reads_until
            if connection is None or (told == (connection, progress) and not unhurried):
                continue
            try:
                await connection.report_progress(hand.key, _coarse(progress) if secret else progress)
                told = (connection, progress)
            except OUTDATED as error:
                about(self._log, run=hand.key.run, round=hand.key.round).info("%s", error)
                hand.drop()
                return
            except SeqfedError:  # the next beat tries again
                continue

    async def _tell_failure(self, hand: _Hand, error: SeqfedError) -> None:
        if _is_secret(hand.task) and not isinstance(error, OF_RULES):
            error = type(error)("the client's log has the reason")
        try:
            await self._persist(hand, lambda server: server.report_failure(hand.key, error))
        except (_Overtaken, SeqfedError):
            about(self._log, run=hand.key.run, round=hand.key.round).info("the server no longer asks")


def _sink(room: bytearray) -> Callable[[int, bytes], None]:
    def sink(offset: int, data: bytes) -> None:
        room[offset : offset + len(data)] = data

    return sink


def _add(flat: Flat, change: Iterator[Flat]) -> None:
    start = 0
    for part in change:
        flat[start : start + len(part)] += part
        start += len(part)


def _same(one: views.Task, other: views.Task) -> bool:
    """Whether two tasks are of the same round, in whichever attempt."""
    return (one.key.run, one.key.round) == (other.key.run, other.key.round)


def _is_secret(task: views.Task) -> bool:
    """Whether the server is to learn nothing of the data but what is made for it."""
    private = task.spec.privacy
    return private.secure_aggregation or (private.dp is not None and not private.dp.is_public)


def _coarse(progress: Progress) -> Progress:
    """In per cent: neither how many data there are, nor how well they are learnt."""
    done, total = (100 * progress.done // progress.total, 100) if progress.total else (0, 0)
    return Progress(progress.stage, done, total)


async def _made(given: G) -> G:
    return given


class _Overtaken(Exception):
    """A newer task or a cancellation made this one unwanted."""
