"""The client's life: join, listen, work, and come back after every loss of connection without losing the work in hand.

Two coroutines: one keeps the connection, the other does the tasks and waits for a connection whenever it needs one. A loss
of connection therefore never stops a training, and an upload goes on at the byte where it broke.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import numpy as np

from seqfed.client.channel import connected
from seqfed.client.connection import Connection
from seqfed.client.work import LocalUpdate, Workshop
from seqfed.common import views
from seqfed.common.errors import (
    BrokenTransfer,
    ConfigError,
    DuplicateUpdate,
    InsecureRefused,
    InvalidName,
    NoModel,
    RunEnded,
    SeqfedError,
    ServerUnavailable,
    StorageError,
    StorageFull,
    TrainingFailed,
    UnknownSession,
    VersionMismatch,
    WrongRound,
)
from seqfed.common.layout import BYTES_PER_PARAMETER, Flat
from seqfed.common.transfer import Reassembly
from seqfed.common.views import TaskKind

log = logging.getLogger("seqfed.client")

T = TypeVar("T")

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between tries
HOPELESS = (ConfigError, InsecureRefused, InvalidName, VersionMismatch)  # trying again cannot help
PASSING = (ServerUnavailable, UnknownSession, BrokenTransfer, StorageFull, StorageError)  # trying again may
OUTDATED = (WrongRound, RunEnded, NoModel, DuplicateUpdate)  # the federation has gone on without this work


class Backoff:
    """Waits that double up to a cap, each shortened by up to a half at random so that clients do not come in step."""

    def __init__(self) -> None:
        self._next = FIRST_WAIT

    def wait(self) -> float:
        """Seconds until the next try."""
        wait, self._next = self._next, min(2 * self._next, LONGEST_WAIT)
        return wait * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret

    def reset(self) -> None:
        self._next = FIRST_WAIT


class Session:
    """One client and its server."""

    def __init__(self, workshop: Workshop, server: str, instance: str, insecure: bool) -> None:
        self._workshop = workshop
        self._server = server
        self._instance = instance
        self._insecure = insecure
        self._connection: asyncio.Future[Connection] | None = None
        self._next: asyncio.Queue[views.Task] = asyncio.Queue()
        self._current: views.Task | None = None
        self._cancelled = False
        self._model: tuple[bytes, Flat] | None = None  # the newest model fetched, by its BLAKE3 digest

    async def run(self) -> None:
        """Take part until cancelled; raises only what trying again cannot mend."""
        self._connection = asyncio.get_running_loop().create_future()
        worker = asyncio.create_task(self._work())
        try:
            await self._keep_connected()
        finally:
            self._cancelled = True
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker

    # The connection -----------------------------------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        backoff, clock = Backoff(), asyncio.get_running_loop().time
        stood = math.inf  # since when the connection has stood
        while True:
            try:
                async with connected(self._server, self._insecure) as channel:
                    connection = Connection(channel, self._server)
                    await connection.join(self._workshop.client, self._instance, self._workshop.source.schema)
                    log.info("connected to %s as '%s'; waiting for tasks", self._server, self._workshop.client)
                    self._have(connection)
                    stood = clock()
                    async for task in connection.listen():
                        backoff.reset()
                        self._offer(task)
                    raise ServerUnavailable(f"the server at {self._server} ended the connection")
            except HOPELESS:
                raise
            except SeqfedError as error:  # whatever it is, it may be mended on the server's side
                if clock() - stood > LONGEST_WAIT:  # a server that only flickers is not dialled ever faster
                    backoff.reset()
                stood = math.inf
                wait = backoff.wait()
                log.warning("%s; trying again in %.1f s", error, wait)
                self._have(None)
                await asyncio.sleep(wait)

    def _have(self, connection: Connection | None) -> None:
        if self._connection is None or self._connection.done():
            self._connection = asyncio.get_running_loop().create_future()
        if connection is not None:
            self._connection.set_result(connection)

    async def _connected(self) -> Connection:
        assert self._connection is not None
        while True:
            connection = await asyncio.shield(self._connection)
            if self._connection.done():
                return connection

    # The work -----------------------------------------------------------------------------------------------------

    def _offer(self, task: views.Task) -> None:
        """Queue a task; one that the current task is overtaken by cancels it.

        The same task again (after a reconnection, or for another attempt) is the current one, unless that is cancelled.
        """
        current = self._current
        same = current is not None and (current.key.run, current.key.round) == (task.key.run, task.key.round)
        if task.kind is TaskKind.CANCEL:
            self._cancelled = self._cancelled or same
        elif current is None or not same or current.kind is not task.kind or self._cancelled:
            self._cancelled = current is not None
            self._next.put_nowait(task)

    async def _work(self) -> None:
        while True:
            task = await self._next.get()
            while not self._next.empty():  # only the newest is still wanted
                task = self._next.get_nowait()
            self._current, self._cancelled = task, False
            try:
                await self._do(task)
            except _Overtaken:
                log.info("round %d of run %s: no longer wanted", task.key.round, task.key.run)
            except OUTDATED as error:
                log.info("round %d of run %s: %s", task.key.round, task.key.run, error)
            except SeqfedError as error:
                log.error("round %d of run %s: %s", task.key.round, task.key.run, error)
                self._current = None  # before telling: the server may ask again at once
                await self._tell_failure(task, error)
            except Exception:
                log.exception("round %d of run %s", task.key.round, task.key.run)
                self._current = None
                await self._tell_failure(task, TrainingFailed("the client met an unexpected error; its log has it"))
            finally:
                self._current = None

    async def _do(self, task: views.Task) -> None:
        await asyncio.to_thread(self._workshop.check, task)  # the first of a run reads the data
        flat = await self._fetch(task)
        if task.kind is TaskKind.EVALUATE:
            tally = await asyncio.to_thread(self._workshop.evaluate, task, flat)
            await self._persist(lambda server: server.submit_evaluation(task.key, task.model.version, tally))
            return
        update = await asyncio.to_thread(self._train, task, flat)
        if update is None:
            raise _Overtaken
        await self._submit(task, update)
        log.info(
            "round %d of %d, run %s: trained on %d examples in %.2f s",
            task.key.round,
            task.spec.rounds,
            task.spec.name,
            update.weight,
            update.training_seconds,
        )

    def _train(self, task: views.Task, flat: Flat) -> LocalUpdate | None:
        from seqfed.client.training import Cancelled

        try:
            return self._workshop.train(task, flat, lambda: self._cancelled)
        except Cancelled:
            return None

    async def _fetch(self, task: views.Task) -> Flat:
        """The task's global model, from the last task if it is the same one."""
        flat = None
        if self._model is not None:
            digest, flat = self._model
            if digest == task.model.digest:
                return flat
            self._model = None
        if flat is None or flat.nbytes != task.model.nbytes:
            flat = np.empty(task.model.nbytes // BYTES_PER_PARAMETER, "<f4")
        room = flat.data.cast("B")

        def sink(offset: int, data: bytes) -> None:
            room[offset : offset + len(data)] = data

        into = Reassembly(task.model.nbytes, task.model.digest, sink)
        if task.model.data:
            into.add(0, task.model.data)
            into.finish()
        else:
            await self._persist(lambda server: server.fetch_model(task.key.run, task.model.version, into))
        self._model = (task.model.digest, flat)
        return flat

    async def _submit(self, task: views.Task, update: LocalUpdate) -> None:
        delta = update.delta.astype("<f4", copy=False).data.cast("B")
        tries = 0

        async def send(server: Connection) -> None:
            nonlocal tries
            tries += 1
            offset, complete = (0, False) if tries == 1 else await server.upload_status(task.key, update.digest)
            if complete:
                return
            header = views.UpdateHeader(
                key=task.key,
                weight=update.weight,
                layout_digest=task.model.layout_digest,
                nbytes=len(delta),
                digest=update.digest,
                offset=offset,
                tally=update.tally,
                training_seconds=update.training_seconds,
            )
            await server.submit_update(header, delta)

        await self._persist(send)

    async def _persist(self, call: Callable[[Connection], Awaitable[T]]) -> T:
        """Make this call, again after every passing failure, on whatever connection there then is."""
        backoff = Backoff()
        while True:
            connection = await self._connected()
            if self._cancelled:
                raise _Overtaken
            try:
                return await call(connection)
            except PASSING as error:
                wait = backoff.wait()
                log.warning("%s; going on in %.1f s", error, wait)
                await asyncio.sleep(wait)

    async def _tell_failure(self, task: views.Task, error: SeqfedError) -> None:
        try:
            await self._persist(lambda server: server.report_failure(task.key, error))
        except (_Overtaken, SeqfedError):
            log.info("round %d of run %s: the server no longer asks", task.key.round, task.key.run)


class _Overtaken(Exception):
    """A newer task or a cancellation made this one unwanted."""
