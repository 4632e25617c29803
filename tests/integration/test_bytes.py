"""The bytes that a round's record tells of, beside those of the connections themselves, in plaintext."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.integration.light import Formula
from tests.integration.maskers import spec_of as masked_spec
from tests.integration.tapping import Line, tapped
from tests.integration.test_compression import CLIENTS, ONE, maskers_of, running, session_of, spec_of
from tests.server.conftest import Daemon, a_daemon, turns_until

from seqfed.client.session import Session
from seqfed.common.spec import RunSpec

NEAR = 0.04  # of what the connections carried; 0.014 at most was measured, and pings are sent by the clock
SMALL = {"kind": "rnn", "hidden": 4, "layers": 1}  # 42 numbers
Clients = Callable[[str, Path], list[Session]]


def plain(address: str, _: Path) -> list[Session]:
    return [session_of(Formula(name), address) for name in CLIENTS]


def masked(address: str, folder: Path) -> list[Session]:
    return maskers_of(address, folder, "abcd")


MASKED: dict[str, Any] = {"rounds": 6, "model": ONE, "compression": {"upload": "rotsub"}, "evaluation": {"every": 0}}
RUNS: dict[str, tuple[RunSpec, Clients]] = {
    "float32": (spec_of({}, evaluation__every=1), plain),
    "eden1": (spec_of({"upload": "eden1", "fraction": 0.25}, rounds=10), plain),
    "mostly framing": (spec_of({}, model=SMALL, evaluation__every=1, rounds=10), plain),
    "masked": (masked_spec(**MASKED), masked),
}


@pytest.mark.parametrize(("spec", "clients"), RUNS.values(), ids=RUNS)
async def test_a_runs_bytes_are_those_of_its_connections(spec: RunSpec, clients: Clients, tmp_path: Path) -> None:
    async with a_daemon(tmp_path / "state") as daemon, tapped(daemon.address) as line:
        sessions = clients(line.address, tmp_path)
        async with running(*sessions):
            await _here(daemon, len(sessions))
            before = _carried(line)
            view = await daemon.end((await daemon.submit(spec)).run)
            up, down = (now - then for now, then in zip(_carried(line), before, strict=True))
    assert view.phase == "finished"
    counted = sum(record.bytes_up for record in view.history), sum(record.bytes_down for record in view.history)
    assert counted == (view.bytes_up, view.bytes_down)
    assert list(counted) == pytest.approx([up, down], rel=NEAR)


async def _here(daemon: Daemon, many: int) -> None:
    while sum(one.connected for one in (await daemon.clients()).values()) < many:
        await turns_until(lambda: True)


def _carried(line: Line) -> tuple[int, int]:
    return sum(map(len, line.heard)), sum(map(len, line.answered))
