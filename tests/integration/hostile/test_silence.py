"""Calls that are begun and not gone on with: headers without a message or half of one, at both ports, by whoever can.

The server ends each in its time; what is tested here is above all that nobody has to wait for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from pathlib import Path

import pytest
from tests.integration.hostile import raw
from tests.integration.hostile.siege import FEDERATION, Siege, a_token, besieged
from tests.integration.hostile.test_enrolment import HERE, METHOD, ask, csr
from tests.server.conftest import soon

from seqfed.common.identity import Credentials, Role
from seqfed.server import audit, enrollment

SILENCE = {"nothing": b"", "half a message": b"\0" + (8_000).to_bytes(4, "big") + bytes(1_000)}
AT_ONCE = 2.0  # seconds within which an honest call is served, whatever others do
SHORT = 0.2  # for a message, where a test waits for its end
LINES = 20  # of one member in a minute (refusals_per_minute)


@contextlib.asynccontextmanager
async def silent(
    siege: Siege,
    own: Credentials | None,
    method: str,
    calls: int,
    data: bytes,
    *,
    metadata: Sequence[tuple[str, str]] = (),
    streams: int = raw.STREAMS,
) -> AsyncIterator[list[raw.Line]]:
    """So many calls for as long as the block lasts; without a certificate at the enrolment port."""
    assert siege.server.settings.state is not None
    tls = raw.context(siege.server.settings.state.parent / "silent", siege.server.ca.pem, own)
    address = siege.counter if own is None else siege.server.address
    begun = raw.begun(address, tls, raw.headers(method, metadata), data, calls, streams)
    lines = await asyncio.to_thread(begun.__enter__)
    try:
        yield lines
    finally:
        await asyncio.to_thread(begun.__exit__, None, None, None)


async def ended(lines: list[raw.Line], calls: int) -> None:
    await soon(asyncio.to_thread(raw.until_ended, lines, calls))


async def at_once(work: Awaitable[object]) -> None:
    begun = time.monotonic()
    await soon(work)
    assert time.monotonic() - begun < AT_ONCE


@pytest.mark.parametrize("data", SILENCE)
@pytest.mark.parametrize("method", ["Join", "SubmitUpdate"])
async def test_a_thousand_silent_calls_of_one_member_keep_nobody_out(tmp_path: Path, method: str, data: str) -> None:
    """Where there is room for some thousand calls in all."""
    async with besieged(tmp_path, max_clients=4) as siege:
        m, most = await siege.outsider(listens=False), siege.server.settings.calls_open
        own = siege.server.issue(Role.CLIENT, "m")
        async with silent(siege, own, FEDERATION + method, 1_000, SILENCE[data], metadata=m.metadata) as lines:
            await at_once(siege.outsider("late"))
            await ended(lines, 1_000 - most)  # the others are its share
            await at_once(siege.goes_on())
        siege.lines += [("client:m", FEDERATION + method, "RateLimited")] * LINES
        siege.more["client:m"] = 1_000 - most - LINES


@pytest.mark.parametrize("data", SILENCE)
async def test_a_thousand_silent_calls_of_the_revoked_hold_no_place_at_all(tmp_path: Path, data: str) -> None:
    async with besieged(tmp_path, max_clients=4) as siege:
        own = siege.server.issue(Role.CLIENT, "m")
        await siege.server.revoke("m")
        async with silent(siege, own, FEDERATION + "Join", 1_000, SILENCE[data]) as lines:
            await at_once(siege.outsider("late"))
            await ended(lines, 1_000)
            await at_once(siege.goes_on())
        siege.lines += [("client:m", FEDERATION + "Join", "Unauthenticated")] * LINES
        siege.more["client:m"] = 1_000 - LINES


async def test_many_members_who_take_all_places_and_send_nothing_lose_them_to_who_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Forty conspire, each within its share. That the server is full says nothing of whom it refuses: no line is written."""
    async with besieged(tmp_path, max_clients=4) as siege, contextlib.AsyncExitStack() as stack:
        taken, most = [], siege.server.settings.calls_open
        for number in range(40):
            own = siege.server.issue(Role.CLIENT, f"m{number}")
            taken += await stack.enter_async_context(silent(siege, own, FEDERATION + "Join", most, b""))
        await ended(taken, 40 * most - (2 * 4 + 1_000))  # so many there is no room for
        await at_once(siege.outsider("late"))
        await at_once(siege.goes_on())
    assert len([one for one in caplog.messages if "all 1008 places for calls are taken" in one]) == 1  # in a minute


@pytest.mark.parametrize("data", SILENCE)
@pytest.mark.parametrize(("lines", "streams"), [(200, 1), (200, 4)])
async def test_silent_strangers_keep_nobody_from_enrolling(tmp_path: Path, lines: int, streams: int, data: str) -> None:
    """All from one address, which is the honest one's too; 800 calls are more than there are places."""
    calls = lines * streams
    async with besieged(tmp_path) as siege, silent(siege, None, METHOD, calls, SILENCE[data], streams=streams) as taken:
        await ended(taken, max(0, calls - enrollment.PLACES))
        await at_once(ask(siege, a_token(siege.server.ca, "new"), csr()))
        await at_once(siege.outsider("late"))


@pytest.mark.parametrize("data", SILENCE)
async def test_who_sends_nothing_is_told_so_and_written_down(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrollment, "MESSAGE_S", SHORT)
    async with besieged(tmp_path, message_s=SHORT, refusals_per_minute=3) as siege:
        own = siege.server.issue(Role.OPERATOR, "m")
        for who, name, method in ((own, "operator:m", "/seqfed.v1.Admin/StopRun"), (None, HERE, METHOD)):
            async with silent(siege, who, method, 4, SILENCE[data]) as lines:
                await ended(lines, 4)
            siege.lines += [(name, method, "BrokenTransfer")] * 3
        siege.more |= {"operator:m": 1, audit.STRANGERS: 1}
