"""A server with TLS whose second round is half done, and what must hold of it after an attack.

Honest clients `a` and `b` have done round 1; in round 2 the update of `a` is in and that of `b` is not. The attack comes.
Then `b` sends its update, the run must end with the model that it would have had in peace, and the audit log must hold the
refusals that the test foretold and no other.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
from tests.server.conftest import SCHEMA, Site, averaged, flat_of, make_spec, some_delta, soon, typed
from tests.server.members import Guarded, guarded

from seqfed.common import chain, tokens, views, wire
from seqfed.common.authority import Authority
from seqfed.common.errors import SeqfedError
from seqfed.common.identity import Role, now
from seqfed.common.layout import Flat
from seqfed.server import audit
from seqfed.v1 import admin_pb2
from seqfed.v1.admin_pb2_grpc import AdminStub

FEDERATION: Final = "/seqfed.v1.Federation/"
ADMIN: Final = "/seqfed.v1.Admin/"
MODEL: Final = {"kind": "rnn", "hidden": 64, "layers": 1}  # some 18 KB, so that it has chunks
OTHER_SCHEMA: Final = SCHEMA.replace(b'"features": 2', b'"features": 3')  # fits no run here: is never asked

Line = tuple[str, str, str]  # who, method, error


@dataclass
class Siege:
    """The server and those who are in it. `lines`: what the audit log must say of refusals, in any order."""

    server: Guarded
    a: Site
    b: Site
    run: str
    before: views.Task  # b's in round 1
    task: views.Task  # b's in round 2
    first: Flat
    models: tuple[Flat, Flat]  # before each of the rounds
    lines: list[Line] = field(default_factory=list)
    perhaps: list[Line] = field(default_factory=list)  # what it may say besides: of calls that gRPC ends as they begin
    more: dict[str, int] = field(default_factory=dict)  # by who: refusals that are only counted
    over: bool = False

    @property
    def counter(self) -> str:
        """Where the server enrols."""
        assert self.server.settings.state is not None
        return str(json.loads((self.server.settings.state / "address.json").read_text())["enroll"])

    def delta(self, name: str, round_: int = 2) -> Flat:
        """What an honest client sends."""
        return some_delta(len(self.first), ord(name), round_)

    @contextlib.contextmanager
    def refused(
        self, error: type[SeqfedError], who: str, method: str, match: str = "", lines: int = 1
    ) -> Iterator[None]:
        """The block's call is refused with this error, exactly, and the audit log will have so many lines of it."""
        self.lines += [(who, method, error.__name__)] * lines
        try:
            with typed():
                yield
        except SeqfedError as refusal:
            assert type(refusal) is error, (type(refusal), str(refusal))
            assert match in str(refusal), str(refusal)
        else:
            raise AssertionError(f"{method} of {who} was not refused")

    @contextlib.contextmanager
    def unheard(self, *codes: grpc.StatusCode) -> Iterator[None]:
        """gRPC itself refuses the block's call with one of these codes: it never reaches the server's code or its log."""
        try:
            with typed():
                yield
        except grpc.aio.AioRpcError as error:
            assert error.code() in codes, error
        else:
            raise AssertionError("the call was not refused")

    async def outsider(self, name: str = "m", *, listens: bool = True) -> Site:
        """A client that belongs and is asked for nothing."""
        site = Site(await self.server.channel(Role.CLIENT, name), name)
        await site.join(data_schema=OTHER_SCHEMA)
        if listens:
            site.listen()
        return site

    async def desk(self, role: Role, name: str) -> Any:
        """The stub of the other service; of a viewer, who only looks, or of another operator."""
        return AdminStub(await self.server.channel(role, name))

    def files(self) -> list[Path]:
        """All that the server has on its disk."""
        assert self.server.settings.state is not None
        return [one for one in self.server.settings.state.rglob("*") if one.is_file()]

    async def listens(self, name: str) -> None:
        """Wait until this client does."""
        desk = await self.server.desk()
        while not [
            1 async for one in desk.ListClients(admin_pb2.ListClientsRequest()) if one.client == name and one.connected
        ]:
            pass

    async def waits(self) -> None:
        """The round is where it was before the attack."""
        view = await self.view()
        assert (view.phase, view.round, view.pending) == ("training", 2, ("b",)), (view.phase, view.pending)

    async def goes_on(self) -> None:
        """The round ends as if nothing had been; once."""
        if self.over:
            return
        await self.waits()
        there, _ = await self.b.status(
            self.task, self.delta("b").tobytes()
        )  # as a client does; an attack may have begun it
        assert await self.b.submit(self.task, self.delta("b"), offset=there) is False
        view = await self.end()
        assert view.phase == "finished", view.reason
        assert (await self.model() == self.peaceful).all()
        self.over = True

    @property
    def peaceful(self) -> Flat:
        """The model without any attack."""
        return averaged(self.models[1], (1, self.delta("a")), (1, self.delta("b")))

    async def view(self) -> views.RunView:
        found = [one async for one in (await self.server.desk()).ListRuns(admin_pb2.ListRunsRequest())]
        return next(wire.run_from_wire(one) for one in found if one.run == self.run)

    async def end(self) -> views.RunView:
        desk = await self.server.desk()

        async def last() -> views.RunView:
            seen = [one async for one in desk.WatchRun(admin_pb2.WatchRunRequest(run=self.run))]
            return wire.run_from_wire(seen[-1])

        return await soon(last())

    async def model(self) -> Flat:
        data = b""
        async for chunk in (await self.server.desk()).ExportModel(admin_pb2.ExportModelRequest(run=self.run)):
            data += chunk.data
        return flat_of(data, len(self.first))


async def prepared(server: Guarded) -> Siege:
    """The run, in the middle of its second round."""
    a, b = await server.arrive("a", "b")
    with typed():
        run = (await server.submit(make_spec(rounds=2, model=MODEL))).run
    tasks = {site: await site.task() for site in (a, b)}
    first = np.frombuffer(await b.fetch(tasks[b]), "<f4")
    deltas = {site: some_delta(len(first), ord(site.name), 1) for site in (a, b)}
    for site, task in tasks.items():
        await site.submit(task, deltas[site])
    second = averaged(first, *((1, delta) for delta in deltas.values()))
    task_of_a, task_of_b = await a.task(), await b.task()
    siege = Siege(server, a, b, run, tasks[b], task_of_b, first, (first, second))
    await a.submit(task_of_a, siege.delta("a"))
    return siege


@contextlib.asynccontextmanager
async def besieged(folder: Path, **changes: Any) -> AsyncIterator[Siege]:
    """Before the block the round is half done; after it, the run ends well and the audit log says what was refused."""
    settings = {"ca": folder / "ca", "enroll_port": 0, **changes}
    async with guarded(folder, **settings) as server:
        siege = await prepared(server)
        yield siege
        await siege.goes_on()
    check_log(folder / "state", siege)


def check_log(state: Path, siege: Siege) -> None:
    """The chain holds, and has the refusals that were foretold and no others."""
    with audit.reading(state, None) as pages:
        entries = list(pages)
    chain.verify(entries)
    told = [json.loads(one.body) for one in entries if one.kind == audit.Kind.REFUSED]
    more = {one["who"]: one["more"] for one in told if "error" not in one}
    assert more == siege.more, more
    found, foretold = Counter(refusals(entries)), Counter(siege.lines)
    others = found - foretold - Counter(siege.perhaps)
    assert not others, f"not foretold: {others}"
    assert not (foretold - found), f"missing: {foretold - found}"


def refusals(entries: Iterable[views.AuditEntry]) -> list[Line]:
    """What the log says of refused calls."""
    told = [json.loads(one.body) for one in entries if one.kind == audit.Kind.REFUSED]
    return [(one["who"], one["method"], one["error"]) for one in told if "error" in one]


def a_token(ca: Authority, client: str, seconds: float = 60.0) -> str:
    """An enrolment token."""
    return tokens.sign(tokens.new(client, ca.pem, now(), seconds), ca.key)
