"""The client's life, as far as it goes without a server: waits, which tasks count, and what cannot be mended."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.client.ready import Ready

from seqfed.client.data import Sequences
from seqfed.client.session import FIRST_WAIT, HOPELESS, LONGEST_WAIT, OUTDATED, PASSING, Backoff, Session
from seqfed.client.work import Workshop
from seqfed.common.errors import ConfigError, InsecureRefused, SeqfedError
from seqfed.common.spec import DataSpec, RunSpec
from seqfed.common.views import ModelVersion, Task, TaskKey, TaskKind

TRAIN = Task(
    TaskKind.TRAIN, TaskKey("run", 1, 1), RunSpec(data=DataSpec(features=1, classes=2)), ModelVersion(0, 4, b"", b"")
)
CANCEL = replace(TRAIN, kind=TaskKind.CANCEL)
EVALUATE = replace(TRAIN, kind=TaskKind.EVALUATE)
RETRY = replace(TRAIN, key=TaskKey("run", 1, 2))
NEXT = replace(TRAIN, key=TaskKey("run", 2, 1))
OTHER = replace(TRAIN, key=TaskKey("other", 1, 1))


def session(server: str = "127.0.0.1:1") -> Session:
    data = Sequences.of(np.zeros((1, 1, 1), np.float32), np.zeros(1, np.int64))
    return Session(Workshop("ward", Ready(data, data, 1)), server, "0" * 32, insecure=False)


@given(st.integers(1, 20))
def test_waits_double_up_to_a_cap_and_are_cut_by_up_to_a_half(tries: int) -> None:
    backoff = Backoff()
    for place in range(tries):
        longest = min(FIRST_WAIT * 2**place, LONGEST_WAIT)
        assert longest / 2 <= backoff.wait() <= longest
    backoff.reset()
    assert backoff.wait() <= FIRST_WAIT


def test_clients_do_not_come_in_step() -> None:
    assert len({Backoff().wait() for _ in range(20)}) > 10


@pytest.mark.parametrize(
    ("current", "offered", "queued", "cancelled"),
    [
        (None, [TRAIN], [TRAIN], False),
        (None, [CANCEL], [], False),
        (TRAIN, [TRAIN], [], False),  # told again after a reconnection
        (TRAIN, [RETRY], [], False),  # the work in hand serves the new attempt too
        (TRAIN, [EVALUATE], [EVALUATE], True),
        (TRAIN, [NEXT], [NEXT], True),
        (TRAIN, [OTHER], [OTHER], True),
        (TRAIN, [CANCEL], [], True),
        (TRAIN, [replace(CANCEL, key=NEXT.key)], [], False),
        (TRAIN, [replace(CANCEL, key=OTHER.key)], [], False),
        (TRAIN, [CANCEL, RETRY], [RETRY], True),  # the attempt was given up, and the round begins anew
        (TRAIN, [CANCEL, CANCEL], [], True),
        (TRAIN, [NEXT, CANCEL], [NEXT], True),
    ],
)
def test_which_tasks_count(current: Task | None, offered: list[Task], queued: list[Task], cancelled: bool) -> None:
    client = session()
    client._current = current
    for task in offered:
        client._offer(task)
    assert [client._next.get_nowait() for _ in range(client._next.qsize())] == queued
    assert client._cancelled == cancelled


@pytest.mark.parametrize(("server", "kind"), [("10.0.0.1:1", InsecureRefused), ("nowhere:x", ConfigError)])
async def test_what_trying_again_cannot_mend_ends_the_client(server: str, kind: type[SeqfedError]) -> None:
    with pytest.raises(kind):
        await session(server).run()


def test_no_error_is_both_passing_and_final() -> None:
    groups = (HOPELESS, PASSING, OUTDATED)
    assert len({kind for group in groups for kind in group}) == sum(map(len, groups))
