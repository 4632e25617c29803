"""Calls that are not what a round asked for: replayed, reordered, of another round, cut short, too long, poisoned.

The attacker is `b` itself, whose update is still awaited: after every refusal its honest one counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.hostile.siege import FEDERATION, Siege, besieged
from tests.server.conftest import soon, typed

from seqfed.common import wire
from seqfed.common.errors import (
    BrokenTransfer,
    ChecksumMismatch,
    DuplicateUpdate,
    LayoutMismatch,
    NonFiniteUpdate,
    RateLimited,
    SeqfedError,
    TooLarge,
    UnknownRun,
    UnknownSession,
    UpdateOutOfRange,
    WrongRound,
)
from seqfed.v1.federation_pb2 import Chunk, SubmitUpdateRequest

SUBMIT = FEDERATION + "SubmitUpdate"
PIECE = 4 << 10  # bytes of the smallest chunk that a server takes

Attack = Callable[[Siege], Awaitable[object]]


def honest(siege: Siege) -> bytes:
    return siege.delta("b").tobytes()


def changed(**changes: Any) -> Attack:
    """The honest update under another header."""
    return lambda siege: siege.b.submit(siege.task, siege.delta("b"), **changes)


def sent(alter: Callable[[bytes], Iterable[tuple[int, bytes]]]) -> Attack:
    """The honest update's header, and other chunks than it announces."""
    return lambda siege: siege.b.send(siege.b.header(siege.task, honest(siege)), alter(honest(siege)))


def poisoned(value: float, at: int = 17) -> Attack:
    """One number is this."""

    def attack(siege: Siege) -> Awaitable[object]:
        delta = siege.delta("b").copy()
        delta[at] = value
        return siege.b.submit(siege.task, delta)

    return attack


def raw(*parts: Callable[[Siege], SubmitUpdateRequest]) -> Attack:
    """Exactly these messages."""

    async def attack(siege: Siege) -> object:
        messages = iter([part(siege) for part in parts])
        return await soon(siege.b.stub.SubmitUpdate(messages, metadata=siege.b.metadata))

    return attack


def header(siege: Siege) -> SubmitUpdateRequest:
    return SubmitUpdateRequest(header=wire.header_to_wire(siege.b.header(siege.task, honest(siege))))


def body(siege: Siege) -> SubmitUpdateRequest:
    return SubmitUpdateRequest(chunk=Chunk(offset=0, data=honest(siege)))


def half(siege: Siege) -> SubmitUpdateRequest:
    return SubmitUpdateRequest(chunk=Chunk(offset=0, data=honest(siege)[: 2 * PIECE]))


def cut(data: bytes, size: int = PIECE) -> list[tuple[int, bytes]]:
    return [(at, data[at : at + size]) for at in range(0, len(data), size)]


def longer(by: int) -> Attack:
    """The header announces so many bytes more, or fewer."""
    return lambda siege: siege.b.submit(siege.task, siege.delta("b"), nbytes=len(honest(siege)) + by)


REFUSED: dict[type[SeqfedError], dict[str, tuple[Attack, str]]] = {
    WrongRound: {
        "an earlier round's": (changed(round=1), "round 1"),
        "round 0": (changed(round=0), "round 0"),
        "a later round's": (changed(round=3), "round 3"),
        "the last number's": (changed(round=(1 << 32) - 1), "round 4294967295"),
        "a later attempt's": (changed(attempt=9), "attempt 9"),
        "attempt 0": (changed(attempt=0), "attempt 0"),
        "last round's key": (lambda siege: siege.b.submit(siege.before, siege.delta("b")), "round 1"),
        "last round's update": (lambda siege: siege.b.submit(siege.before, siege.delta("b", 1)), "round 1"),
    },
    UnknownRun: {
        "no run's": (changed(run="0" * 16), "no run"),
        "a path for a run": (changed(run="../../etc"), "no run"),
        "a line for a run": (changed(run="x\n2026-01-01 INFO all is well"), "no run"),
    },
    BrokenTransfer: {
        "a chunk before the header": (raw(body, header), "did not begin with a header"),
        "an empty message": (raw(lambda _: SubmitUpdateRequest()), "did not begin with a header"),
        "two headers": (raw(header, half, header, body), "something else than a chunk"),
        "an empty message amid": (raw(header, half, lambda _: SubmitUpdateRequest()), "something else than a chunk"),
        "chunks in the wrong order": (sent(lambda data: cut(data)[2:0:-1]), "where byte 0 was next"),
        "a chunk twice": (sent(lambda data: [cut(data)[0]] * 2), "where byte 4,096 was next"),
        "a chunk left out": (sent(lambda data: cut(data)[::2]), "where byte 4,096 was next"),
        "an offset far away": (sent(lambda data: [((1 << 64) - 4, data)]), "where byte 0 was next"),
        "begun in the middle": (changed(offset=PIECE), "byte 0 is next"),
        "cut short": (sent(lambda data: cut(data)[:2]), "the stream ended at byte 8,192"),
        "longer than announced": (sent(lambda data: [(0, data + bytes(4))]), "a multiple of 4 up to"),
        "more after the end": (sent(lambda data: [(0, data), (len(data), bytes(4))]), "a multiple of 4 up to 0"),
        "empty chunks": (sent(lambda _: [(0, b"")] * 100), "a chunk of 0 bytes"),
        "a byte a chunk": (sent(lambda data: cut(data, 1)), "a chunk of 1 bytes came at byte 0"),
        "a number a chunk": (sent(lambda data: cut(data, 4)), "a chunk of 4 bytes came at byte 0"),
        "a number cut in two": (sent(lambda data: cut(data, PIECE + 2)), "a chunk of 4,098 bytes"),
        "no checksum": (changed(digest=b""), "a BLAKE3 digest has 32 bytes, 0 came"),
        "a long checksum": (changed(digest=bytes(1 << 16)), "a BLAKE3 digest has 32 bytes, 65536 came"),
    },
    TooLarge: {
        "16 EiB announced": (changed(nbytes=(1 << 64) - 4), "one of this run has"),
        "a number too many announced": (longer(4), "one of this run has"),
    },
    LayoutMismatch: {
        "a number too few announced": (longer(-4), "is not the run's"),
        "another model's": (changed(layout_digest=bytes(32)), "is not the run's"),
        "no layout": (changed(layout_digest=b""), "is not the run's"),
    },
    ChecksumMismatch: {
        "a wrong checksum": (changed(digest=bytes(32)), "digest is not the announced one"),
        "a flipped bit": (sent(lambda data: [(0, bytes([data[0] ^ 1]) + data[1:])]), "digest is not the announced one"),
    },
    NonFiniteUpdate: {
        "NaN": (poisoned(math.nan), "an update holds"),
        "a NaN at the end": (poisoned(math.nan, at=-1), "an update holds"),
        "infinity": (poisoned(math.inf), "an update holds"),
        "minus infinity": (poisoned(-math.inf), "an update holds"),
    },
    UpdateOutOfRange: {
        "the largest number": (poisoned(float(np.finfo(np.float32).max)), ""),
        "no weight": (changed(weight=0), "weight"),
        "the heaviest weight": (changed(weight=(1 << 64) - 1), "weight"),
        "a tally that overflows": (changed(tally={"examples": (1 << 63) - 1}), "it may be"),
        "a tally of no such sum": (changed(tally={"x\n../\x1b[2J" * 1000: 1}), "which this run has not"),
        "NaN seconds": (changed(training_seconds=math.nan), "nan s"),
        "seconds before the start": (changed(training_seconds=-1.0), "-1.0 s"),
    },
}


@pytest.mark.parametrize("error", REFUSED)
async def test_an_update_that_is_not_the_one_asked_for_is_refused(tmp_path: Path, error: type[SeqfedError]) -> None:
    async with besieged(tmp_path, refusals_per_minute=1000) as siege:
        for attack, (call, match) in REFUSED[error].items():
            with siege.refused(BrokenTransfer, "client:b", SUBMIT, "the stream ended at byte 0"):
                await siege.b.send(siege.b.header(siege.task, honest(siege), digest=attack.encode()[:32].ljust(32)), [])
            with siege.refused(error, "client:b", SUBMIT, match):
                await call(siege)
            await siege.waits()
        left = [one for one in siege.files() if one.suffix == ".part"]
        assert not left or error is BrokenTransfer, left  # what can go on is kept, one of a client at a time
        assert len(left) <= 1


async def test_a_broken_upload_goes_on_where_it_broke(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        with siege.refused(BrokenTransfer, "client:b", SUBMIT, "go on from there"):
            await siege.b.send(siege.b.header(siege.task, honest(siege)), cut(honest(siege))[:2])
        assert await siege.b.status(siege.task, honest(siege)) == (2 * PIECE, False)


async def test_a_replay_counts_once(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        assert await siege.a.submit(siege.task, siege.delta("a")) is True
        assert await siege.a.submit(siege.task, siege.delta("a")) is True  # `a` has sent it before, in peace


async def test_another_update_in_place_of_the_first_is_refused(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        with siege.refused(DuplicateUpdate, "client:a", SUBMIT, "the first one stands"):
            await siege.a.submit(siege.task, siege.delta("a") * np.float32(2))


async def test_an_old_session_is_worth_nothing(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        old = siege.b.metadata
        await siege.b.leave()
        await siege.b.come(working=wire.key_to_wire(siege.task.key))
        now, siege.b.metadata = siege.b.metadata, old
        with siege.refused(UnknownSession, "client:b", SUBMIT):
            await siege.b.submit(siege.task, siege.delta("b"))
        siege.b.metadata = now


async def test_an_upload_of_nothing_is_refused_without_a_line(tmp_path: Path) -> None:
    """So do those look whose connection is lost."""
    async with besieged(tmp_path) as siege:
        with pytest.raises(BrokenTransfer, match="did not begin with a header"), typed():
            await raw()(siege)


async def test_calls_before_their_time_are_refused(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        with siege.refused(WrongRound, "client:b", FEDERATION + "SubmitEvaluation"):
            await siege.b.score(siege.task, {"examples": 1})
        siege.b.metadata, kept = (), siege.b.metadata
        with siege.refused(UnknownSession, "client:b", FEDERATION + "SubmitEvaluation", "join first"):
            await siege.b.score(siege.task, {"examples": 1})
        siege.b.metadata = kept


async def test_a_failure_of_another_round_harms_nothing(tmp_path: Path) -> None:
    async with besieged(tmp_path) as siege:
        for round_ in (0, 1, 3, (1 << 32) - 1):
            key = replace(siege.task.key, round=round_)
            with contextlib.suppress(WrongRound):  # of which there is no line: an honest report may be late
                await siege.b.fail(replace(siege.task, key=key))


# Floods of one client -------------------------------------------------------------------------------------------------


async def test_a_slow_loris_makes_room(tmp_path: Path) -> None:
    """It sends a header and no more; with one place for all, honest `b` gets it when the patience is over."""
    async with besieged(tmp_path, uploads_in_flight=1, upload_stall_s=0.3) as siege:
        upload: Any = siege.b.stub.SubmitUpdate(metadata=siege.b.metadata)
        await upload.write(header(siege))
        with siege.refused(BrokenTransfer, "client:b", SUBMIT, "nothing came for 0.3 s"):
            await soon(upload)


async def test_a_trickle_makes_room(tmp_path: Path) -> None:
    """It never stalls, and brings a chunk now and then: less than the server asks for on average."""
    async with besieged(tmp_path, uploads_in_flight=1, upload_stall_s=0.3, upload_bytes_per_s=1 << 20) as siege:

        async def drops() -> AsyncIterator[SubmitUpdateRequest]:
            yield header(siege)
            for offset, data in cut(honest(siege)):
                yield SubmitUpdateRequest(chunk=Chunk(offset=offset, data=data))
                await asyncio.sleep(0.15)

        with siege.refused(BrokenTransfer, "client:b", SUBMIT, "less than 1,048,576 a second (upload_bytes_per_s)"):
            await soon(siege.b.stub.SubmitUpdate(drops(), metadata=siege.b.metadata))


async def test_one_client_has_so_many_uploads_and_no_more(tmp_path: Path) -> None:
    async with besieged(tmp_path, uploads_per_client=1, upload_stall_s=1.0) as siege:
        calls: list[Any] = [siege.b.stub.SubmitUpdate(metadata=siege.b.metadata) for _ in range(2)]
        for one in calls:
            await one.write(header(siege))
        for error, match in ((RateLimited, "uploads_per_client"), (BrokenTransfer, "nothing came for 1 s")):
            done, _ = await asyncio.wait(
                [asyncio.ensure_future(one.code()) for one in calls], return_when=asyncio.FIRST_COMPLETED
            )
            assert done  # whichever of them the server saw second is the first to end
            over = next(one for one in calls if one.done())
            calls.remove(over)
            with siege.refused(error, "client:b", SUBMIT, match):
                await over
