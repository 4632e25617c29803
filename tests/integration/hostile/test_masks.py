"""Steps of a masked sum that are not what the protocol says: forged, replayed, out of turn, another's, garbage, too large.

The attacker is `c`, one of three that are asked, and at each step its honest message follows its attacks; and `m`, who belongs
and is asked for nothing. Each is refused, and the round ends with the mean of the three.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from blake3 import blake3
from tests.integration.hostile.siege import FEDERATION, OTHER_SCHEMA, refusals
from tests.server.conftest import Site, chunks, flat_of, make_spec, some_delta, soon, typed
from tests.server.members import Guarded, guarded

from seqfed.client import secure
from seqfed.client.masking import Masking, masking_of
from seqfed.client.work import LocalUpdate
from seqfed.common import chain, views, wire, wire_masking
from seqfed.common.errors import DuplicateUpdate, MaskingRefused, RunEnded, SeqfedError, UnknownRun, WrongRound
from seqfed.common.identity import Role, save_credentials
from seqfed.common.masking.messages import Advert, Confirm, KeyShares, MaskedInput, Opening
from seqfed.common.wire_masking import Reply, Request
from seqfed.server import audit
from seqfed.v1 import admin_pb2
from seqfed.v1.federation_pb2 import MaskRequest

NAMES = ("a", "b", "c")
MASK = FEDERATION + "Mask"
HUGE = 80 << 20  # bytes
SPEC = make_spec(
    model={"kind": "rnn", "hidden": 8, "layers": 1},
    cohort={"min_clients": 3, "deadline_s": 600},
    aggregation={"weighting": "uniform"},
    privacy={"secure_aggregation": True, "min_survivors": 3, "clip": 10.0},
)


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def update(name: str, size: int) -> LocalUpdate:
    delta = some_delta(size, ord(name), 1)
    return LocalUpdate(delta, blake3(delta.tobytes()).digest(), 1, {"examples": 1, "loss": 1 << 20}, 0.25)


@dataclass
class Member:
    """One client, by hand but for the protocol's own arithmetic."""

    site: Site
    masking: Masking
    task: views.Task
    said: list[MaskRequest] = field(default_factory=list)
    before: Callable[[Request], Awaitable[None]] | None = None  # its honest step is sent after it

    @property
    def number(self) -> int:
        assert self.task.masking is not None
        return self.task.masking.number

    def message(self, step: Request, number: int | None = None, **key: Any) -> MaskRequest:
        task_key = replace(self.task.key, **key)
        return wire_masking.request_to_wire(task_key, self.number if number is None else number, step)

    async def call(self, message: MaskRequest, names: Sequence[str] = ()) -> Reply:
        with typed():
            reply = await soon(self.site.stub.Mask(message, metadata=self.site.metadata))
        return wire_masking.reply_from_wire(reply, names)

    async def take_part(self, size: int) -> None:
        async def ask(step: Request, names: Sequence[str]) -> Reply:
            if self.before is not None:
                await self.before(step)
            self.said.append(self.message(step))
            return await self.call(self.said[-1], names)

        async def send(packed: bytes, digest: bytes) -> None:
            header = self.site.header(self.task, packed, digest=digest, masked_number=self.number, weight=0, tally={})
            assert await self.site.send(header, chunks(packed)) is False

        await secure.take_part(self.masking, self.task, update(self.site.name, size), ask, send)


class Attack:
    """What `c` and `m` try before each honest step of `c`; `lines`: what the audit log has of it, by (who, method, error)."""

    def __init__(self, c: Member, m: Site) -> None:
        self.c, self.m = c, m
        self.lines: Counter[tuple[str, str, str]] = Counter()
        self.first: Advert | None = None

    @contextlib.contextmanager
    def refused(self, error: type[SeqfedError], match: str, who: str = "client:c") -> Iterator[None]:
        if error not in {WrongRound, RunEnded}:  # which an honest client hears as well, so it has no line
            self.lines[who, MASK, error.__name__] += 1
        try:
            yield
        except SeqfedError as found:
            assert type(found) is error, (error, type(found), str(found))
            assert match in str(found), str(found)
        else:
            raise AssertionError(f"not refused: {match}")

    async def tries(self, error: type[SeqfedError], match: str, message: MaskRequest) -> None:
        with self.refused(error, match):
            await self.c.call(message)

    async def __call__(self, step: Request) -> None:
        match step:
            case Advert():
                self.first = step
                await self.advertises(step)
            case KeyShares():
                await self.shares(step)
            case MaskedInput():
                await self.gives(step)
            case Confirm():
                forged = replace(step, signature=flipped(step.signature))
                await self.tries(MaskingRefused, "sign", self.c.message(forged))
            case Opening():
                await self.opens(step)

    async def advertises(self, step: Advert) -> None:
        message = self.c.message
        await self.tries(UnknownRun, "no run", message(step, run="0" * 16))
        await self.tries(WrongRound, "round 2", message(step, round=2))
        await self.tries(WrongRound, "is not asked", message(step, number=self.c.number + 1))
        await self.tries(MaskingRefused, "sent the keys of 'a'", message(replace(step, client="a")))
        await self.tries(MaskingRefused, "", message(replace(step, signature=flipped(step.signature))))
        await self.tries(MaskingRefused, "", message(replace(step, certificate=b"-----BEGIN")))
        await self.tries(MaskingRefused, "", message(replace(step, mask_key=bytes(32))))
        await self.tries(MaskingRefused, "", message(replace(step, mask_key=bytes(31))))
        await self.tries(MaskingRefused, "", MaskRequest(key=wire.key_to_wire(self.c.task.key), number=self.c.number))
        early = KeyShares({"a": bytes(200)}, bytes(32), {"a": bytes(64)}, bytes(64))
        with self.refused(MaskingRefused, ""):
            await self.c.call(message(early))
        huge = message(step)
        huge.advert.certificate = bytes(HUGE)
        try:
            await soon(self.c.site.stub.Mask(huge, metadata=self.c.site.metadata))
        except grpc.aio.AioRpcError as error:  # gRPC's own: nothing of it reaches the server's code
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error
        else:
            raise AssertionError("80 MiB were taken")
        with self.refused(WrongRound, "is not asked"), typed():
            await soon(self.m.stub.Mask(message(replace(step, client="m")), metadata=self.m.metadata))
        with self.refused(WrongRound, "is not asked"), typed():
            await soon(self.m.stub.Mask(message(step), metadata=self.m.metadata))

    async def shares(self, step: KeyShares) -> None:
        message = self.c.message
        assert self.first is not None
        other = replace(self.first, mask_key=flipped(self.first.mask_key))
        await self.tries(DuplicateUpdate, "other keys", message(other))
        await self.tries(MaskingRefused, "", message(replace(step, signature=flipped(step.signature))))
        stranger = dict(step.sealed) | {"m": next(iter(step.sealed.values()))}
        await self.tries(MaskingRefused, "", message(replace(step, sealed=stranger)))
        fewer = dict(list(step.sealed.items())[1:])
        await self.tries(MaskingRefused, "", message(replace(step, sealed=fewer)))
        shorter = {name: data[:-1] for name, data in step.sealed.items()}
        await self.tries(MaskingRefused, "", message(replace(step, sealed=shorter)))
        await self.tries(WrongRound, "has no place", message(Confirm(bytes(64))))

    async def gives(self, step: MaskedInput) -> None:
        message, site = self.c.message, self.c.site
        await self.tries(MaskingRefused, "", message(replace(step, digest=flipped(step.digest))))
        await self.tries(MaskingRefused, "", message(replace(step, scalars=step.scalars[:-8])))
        await self.tries(MaskingRefused, "", message(replace(step, scalars=flipped(step.scalars))))
        another = bytes(64)
        header = site.header(self.c.task, another, masked_number=self.c.number, weight=0, tally={})
        self.lines["client:c", FEDERATION + "SubmitUpdate", DuplicateUpdate.__name__] += 1
        try:
            await site.send(header, chunks(another))
        except DuplicateUpdate:
            pass
        else:
            raise AssertionError("another vector was taken")

    async def opens(self, step: Opening) -> None:
        message = self.c.message
        stranger = dict(step.shares) | {"m": next(iter(step.shares.values()))}
        await self.tries(MaskingRefused, "", message(Opening(stranger)))
        both = {name: flipped(share) for name, share in step.shares.items()}  # the other kind of secret
        await self.tries(MaskingRefused, "", message(Opening(both)))


async def member(server: Guarded, site: Site, folder: Path, task: views.Task) -> Member:
    own = server.issue(Role.CLIENT, site.name)
    save_credentials(folder / site.name / "credentials", own)
    return Member(site, masking_of(site.name, folder / site.name, folder / site.name / "credentials", None), task)


async def test_no_forged_step_of_a_masked_sum_is_taken_and_the_honest_ones_are(tmp_path: Path) -> None:
    async with guarded(tmp_path, ca=tmp_path / "ca") as server:
        sites = await server.arrive(*NAMES)
        m = Site(await server.channel(Role.CLIENT, "m"), "m")
        await m.join(data_schema=OTHER_SCHEMA)
        run = (await server.submit(SPEC)).run
        a, b, c = [await member(server, site, tmp_path, await site.task()) for site in sites]
        first = np.frombuffer(await a.site.fetch(a.task), "<f4")
        size = len(first)
        attack = Attack(c, m)
        c.before = attack
        await asyncio.gather(*(soon(one.take_part(size)) for one in (a, b, c)))
        desk = await server.desk()
        *_, view = [one async for one in desk.WatchRun(admin_pb2.WatchRunRequest(run=run))]
        told = wire.run_from_wire(view)
        assert told.phase == "finished", told.reason
        for message in c.said:
            with attack.refused(RunEnded, "is over"):
                await c.call(message)
        data = b""
        async for chunk in desk.ExportModel(admin_pb2.ExportModelRequest(run=run)):
            data += chunk.data
    mean = np.mean([some_delta(size, ord(name), 1) for name in NAMES], axis=0)
    np.testing.assert_allclose(flat_of(data, size) - first, mean, atol=0.01)
    with audit.reading(tmp_path / "state", None) as pages:
        entries = list(pages)
    chain.verify(entries)
    more = [json.loads(one.body) for one in entries if one.kind == audit.Kind.REFUSED]
    assert not [one for one in more if "error" not in one], more
    assert Counter(refusals(entries)) == attack.lines
