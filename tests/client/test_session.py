"""The client's life on a hurried clock: which tasks count, how it dials, what it tells, and what no loss can take from it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.client.hurried import at_once, hurry
from tests.client.ready import Ready
from tests.client.table import Table, be_in, parties, party, secure_spec, update

from seqfed.client import session as under_test
from seqfed.client.consent import Account, Consent
from seqfed.client.data import ClientData, Sequences
from seqfed.client.masking import LOG, Log, Masking
from seqfed.client.policy import Policy
from seqfed.client.secure import Given, contribution, rest_of
from seqfed.client.session import (
    BEAT_S,
    BROKEN,
    FIRST_WAIT,
    HOPELESS,
    LONGEST_WAIT,
    OUTDATED,
    PASSING,
    Backoff,
    Session,
    _Hand,
)
from seqfed.client.work import LocalUpdate, Workshop
from seqfed.common.config import validate
from seqfed.common.dp import accounting
from seqfed.common.errors import (
    BrokenTransfer,
    ConfigError,
    InsecureRefused,
    MaskingFailed,
    MaskingRefused,
    NoModel,
    Overloaded,
    PolicyRefused,
    RunEnded,
    SeqfedError,
    ServerUnavailable,
    TrainingFailed,
    UnknownRun,
    WrongRound,
)
from seqfed.common.layout import Flat
from seqfed.common.masking.messages import (
    Advert,
    Confirm,
    Delivery,
    KeyShares,
    MaskedInput,
    Opening,
    Survivors,
)
from seqfed.common.model import layout_of
from seqfed.common.spec import DataSpec, RunSpec
from seqfed.common.transfer import CHUNK_BYTES, Reassembly, split
from seqfed.common.views import MaskingTerms, ModelVersion, Progress, Stage, Task, TaskKey, TaskKind, UpdateHeader
from seqfed.common.wire_masking import Reply, Request

MODEL = np.arange(400_000, dtype="<f4")  # three chunks and a bit
VERSION = ModelVersion(0, MODEL.nbytes, blake3(MODEL.tobytes()).digest(), b"layout")
TRAIN = Task(TaskKind.TRAIN, TaskKey("run", 1, 1), RunSpec(data=DataSpec(features=1, classes=2)), VERSION)
CANCEL = replace(TRAIN, kind=TaskKind.CANCEL)
EVALUATE = replace(TRAIN, kind=TaskKind.EVALUATE)
RETRY = replace(TRAIN, key=TaskKey("run", 1, 2))
NEXT = replace(TRAIN, key=TaskKey("run", 2, 1))
NEXT_EVALUATE = replace(NEXT, kind=TaskKind.EVALUATE)
CANCEL_NEXT = replace(CANCEL, key=NEXT.key)
OTHER = replace(TRAIN, key=TaskKey("other", 1, 1))
SEQUENCES = Sequences.of(np.zeros((1, 1, 1), np.float32), np.zeros(1, np.int64))


def plain(server: str = "127.0.0.1:1") -> Session:
    return Session(Workshop("ward", Ready(SEQUENCES, SEQUENCES, 1)), (server,), "0" * 32, insecure=False)


def seeded(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - not a secret


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


def test_the_same_seed_gives_the_same_waits() -> None:
    one, other = Backoff(seeded(1)), Backoff(seeded(1))
    assert [one.wait() for _ in range(9)] == [other.wait() for _ in range(9)]


# Which tasks count ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hand", "offered", "waiting", "dropped"),
    [
        (None, [TRAIN], [TRAIN], False),
        (None, [CANCEL], [], False),
        (None, [TRAIN, CANCEL], [], False),
        (None, [TRAIN, RETRY], [RETRY], False),
        (None, [TRAIN, EVALUATE], [TRAIN, EVALUATE], False),
        (None, [EVALUATE, NEXT], [NEXT], False),  # the federation did not wait for the evaluation
        (TRAIN, [TRAIN], [], False),  # told again after a reconnection
        (TRAIN, [RETRY], [], False),  # the work in hand serves the new attempt too
        (TRAIN, [EVALUATE], [EVALUATE], False),  # the update may still count late
        (TRAIN, [EVALUATE, NEXT_EVALUATE], [NEXT_EVALUATE], False),
        (TRAIN, [CANCEL, EVALUATE], [EVALUATE], True),
        (TRAIN, [NEXT], [NEXT], True),
        (TRAIN, [OTHER], [OTHER], True),
        (TRAIN, [CANCEL], [], True),
        (TRAIN, [CANCEL_NEXT], [], False),
        (TRAIN, [replace(CANCEL, key=OTHER.key)], [], False),
        (TRAIN, [CANCEL, RETRY], [RETRY], True),  # the attempt was given up, and the round begins anew
        (TRAIN, [CANCEL, CANCEL], [], True),
        (TRAIN, [NEXT, CANCEL], [NEXT], True),
        (TRAIN, [NEXT, CANCEL_NEXT], [], True),
        (EVALUATE, [EVALUATE], [], False),
        (EVALUATE, [NEXT], [NEXT], True),
        (EVALUATE, [NEXT_EVALUATE], [NEXT_EVALUATE], True),
        (EVALUATE, [CANCEL], [], True),
    ],
)
async def test_which_tasks_count(hand: Task | None, offered: list[Task], waiting: list[Task], dropped: bool) -> None:
    client = plain()
    held = client._hand = None if hand is None else _Hand(hand, hand.key)
    for task in offered:
        client._offer(task)
    assert client._waiting == waiting
    assert client._offered.is_set() == bool(waiting)
    assert (held is not None and held.dropped.done()) == dropped


async def test_the_newest_attempt_is_the_one_that_is_answered() -> None:
    client = plain()
    client._hand = _Hand(TRAIN, TRAIN.key)
    client._offer(RETRY)
    assert client._working() == RETRY.key
    client._offer(CANCEL)
    assert client._working() is None


@pytest.mark.parametrize(("server", "kind"), [("10.0.0.1:1", InsecureRefused), ("nowhere:x", ConfigError)])
async def test_what_trying_again_cannot_mend_ends_the_client(server: str, kind: type[SeqfedError]) -> None:
    with pytest.raises(kind):
        await plain(server).run()


def test_no_error_is_both_passing_and_final() -> None:
    groups = (HOPELESS, PASSING, OUTDATED)
    assert len({kind for group in groups for kind in group}) == sum(map(len, groups))
    assert set(BROKEN) <= set(PASSING)


# A server, as far as the client can see it ------------------------------------------------------------------------------


@dataclass
class Server:
    """What is behind the addresses: answers every call by `answers`, and remembers what came and when."""

    spread: float = 0.0
    tasks: list[Task] = field(default_factory=list)  # sent to whoever listens
    answers: dict[str, list[SeqfedError]] = field(default_factory=dict)  # by call: what the next ones are refused with
    stands: list[float] = field(default_factory=list)  # seconds that the next connections stand; then for ever
    cuts: list[int] = field(default_factory=list)  # chunks that the next transfers carry
    told: list[tuple[float, str, Any]] = field(default_factory=list)  # (when, call, with what)
    received: bytearray = field(default_factory=bytearray)
    tables: dict[int, Table] = field(default_factory=dict)  # masked sums, by number; another is over
    lost: list[type] = field(default_factory=list)  # steps of masked sums, the answer to which is lost once

    def note(self, call: str, content: Any) -> None:
        self.told.append((asyncio.get_running_loop().time(), call, content))
        if errors := self.answers.get(call):
            raise errors.pop(0)

    def all(self, call: str) -> list[Any]:
        return [content for _, one, content in self.told if one == call]

    def times(self, call: str) -> list[float]:
        return [when for when, one, _ in self.told if one == call]

    def cut(self, chunks: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        most = self.cuts.pop(0) if self.cuts else None
        for number, chunk in enumerate(chunks):
            if number == most:
                raise BrokenTransfer("the line is dead")
            yield chunk


class Line:
    """Instead of a Connection."""

    def __init__(self, channel: Server, address: str) -> None:
        self._server, self._address = channel, address

    async def join(self, client: str, instance: str, schema: Any, working: TaskKey | None, holds: bytes) -> float:
        self._server.note("join", (self._address, working))
        return self._server.spread

    async def listen(self) -> AsyncIterator[Task]:
        for task in list(self._server.tasks):
            yield task
        await asyncio.sleep(self._server.stands.pop(0) if self._server.stands else 1e6)
        raise ServerUnavailable("gone")

    async def fetch_model(self, run: str, version: int, into: Reassembly, size: int, *, step: bool) -> None:
        assert not step
        self._server.note("fetch", (into.received, size))
        for offset, data in self._server.cut(split(MODEL.data.cast("B"), into.received, size)):
            into.add(offset, data)
        into.finish()

    async def upload_status(self, key: TaskKey, digest: bytes) -> tuple[int, bool]:
        self._server.note("status", key)
        return len(self._server.received), False

    async def submit_update(
        self, header: UpdateHeader, delta: memoryview, size: int, sent: Callable[[int], None]
    ) -> float:
        self._server.note("update", (header, size))
        for offset, data in self._server.cut(split(delta, header.offset, size)):
            sent(offset)
            assert offset == len(self._server.received)
            self._server.received += data
        if header.masked_number:
            self._server.tables[header.masked_number].take("ward", bytes(self._server.received))
            self._server.received.clear()
        return 0.0

    async def mask(self, key: TaskKey, number: int, step: Request, names: Sequence[str]) -> Reply:
        self._server.note("mask", (key, number, type(step)))
        if number not in self._server.tables:
            raise WrongRound(f"masked sum {number} is over")
        reply = await self._server.tables[number].say("ward", step)
        if type(step) in self._server.lost:
            self._server.lost.remove(type(step))
            raise ServerUnavailable("lost")
        return reply

    async def submit_evaluation(self, key: TaskKey, version: int, tally: dict[str, int]) -> bool:
        self._server.note("evaluation", key)
        return False

    async def report_progress(self, key: TaskKey, progress: Progress) -> None:
        self._server.note("progress", (key, progress))

    async def report_failure(self, key: TaskKey, error: SeqfedError) -> None:
        self._server.note("failure", (key, type(error)))


@dataclass
class Bench:
    """A workshop whose work takes time on the loop's own clock."""

    seconds: float = 1.0
    stuck: bool = False  # works, and tells nothing new
    error: Exception | None = None
    done: list[TaskKey] = field(default_factory=list)
    begun: list[TaskKey] = field(default_factory=list)
    anew: list[int] = field(default_factory=list)  # of the trainings that were done
    client: str = "ward"
    source: Ready = field(default_factory=lambda: Ready(SEQUENCES, SEQUENCES, 1))

    def check(self, task: Task) -> ClientData:
        return self.source.prepare(task.spec)

    async def _work(
        self, task: Task, stage: Stage, cancelled: Callable[[], bool], tell: Callable[[Progress], None]
    ) -> None:
        self.begun.append(task.key)
        for second in range(int(self.seconds)):
            tell(Progress(stage, 0 if self.stuck else second, int(self.seconds), 1))
            await asyncio.sleep(1.0)
            if cancelled():
                return
        if self.error is not None:
            raise self.error
        self.done.append(task.key)

    async def train(
        self, task: Task, flat: Flat, cancelled: Callable[[], bool], tell: Callable[[Progress], None], anew: int = 0
    ) -> LocalUpdate | None:
        assert flat.tobytes() == MODEL.tobytes()
        await self._work(task, Stage.TRAINING, cancelled, tell)
        self.anew += [] if cancelled() else [anew]
        return None if cancelled() else LocalUpdate(MODEL, b"digest %d" % anew, 1, {"examples": 1}, self.seconds)

    async def evaluate(self, task: Task, flat: Flat, tell: Callable[[Progress], None]) -> dict[str, int]:
        await self._work(task, Stage.EVALUATING, lambda: False, tell)
        return {"examples": 5}

    async def measure(self, task: Task) -> dict[str, int]:
        await self._work(task, Stage.READING, lambda: False, lambda _: None)
        return {"count.0": 5}


@dataclass
class Says:
    """Instead of a Consent: what is said of each task."""

    asked: Callable[[Task], None]

    def __call__(self, task: Task, holds: bytes = b"") -> None:
        self.asked(task)


def live(
    monkeypatch: pytest.MonkeyPatch,
    server: Server,
    bench: Bench,
    until: float,
    *,
    addresses: tuple[str, ...] = ("a:1",),
    away: Callable[[str], bool] = lambda _: False,
    then: Callable[[Session], Awaitable[None]] | None = None,
    seed: int = 1,
    consent: Consent | Says | None = None,
    masking: Masking | None = None,
) -> None:
    """The client's life for so many seconds; `away`: whether nothing answers at an address just now."""

    @contextlib.asynccontextmanager
    async def dial(address: str, insecure: bool) -> AsyncIterator[grpc.aio.Channel]:
        server.note("dial", address)
        if away(address):
            raise ServerUnavailable("away")
        yield cast(grpc.aio.Channel, server)

    async def main() -> None:
        client = Session(
            cast(Workshop, bench),
            addresses,
            "0" * 32,
            False,
            dial=dial,
            rng=seeded(seed),
            consent=cast(Consent, consent),
            masking=masking,
        )
        life = asyncio.ensure_future(client.run())
        if then is not None:
            await then(client)
        done, _ = await asyncio.wait([life], timeout=until)
        life.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await life
        assert not done

    monkeypatch.setattr(under_test, "Connection", Line)
    monkeypatch.setattr(asyncio, "to_thread", at_once)
    hurry(main)


# Dialling ---------------------------------------------------------------------------------------------------------------


def test_the_servers_are_dialled_in_turn_and_the_waits_are_between_the_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    live(monkeypatch, server, Bench(), 20, addresses=("a:1", "b:1", "c:1"), away=lambda _: True)
    assert server.all("dial")[:9] == ["a:1", "b:1", "c:1"] * 3
    when = server.times("dial")
    waits = [later - sooner for sooner, later in pairwise(when[:9])]
    for place, wait in enumerate(waits):
        turn, last = divmod(place, 3)
        longest = FIRST_WAIT * 2**turn if last == 2 else 0.0
        assert longest / 2 <= wait <= longest + 0.1, waits


def test_the_standby_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    live(monkeypatch, server, Bench(), 1, addresses=("a:1", "b:1"), away=lambda address: address == "a:1")
    assert server.all("join") == [("b:1", None)]
    assert server.times("join")[0] - server.times("dial")[0] < 0.1


def test_a_lost_server_is_dialled_again_after_a_random_part_of_its_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    for seed in range(20):
        server = Server(spread=10.0, stands=[LONGEST_WAIT + 1])
        live(monkeypatch, server, Bench(), 60, seed=seed)
        joined = server.times("join")
        assert len(joined) == 2
        waits.append(joined[1] - joined[0] - LONGEST_WAIT - 1)
    assert all(-0.1 <= wait <= 10.1 for wait in waits)
    assert min(waits) < 2
    assert max(waits) > 8


def test_a_server_that_flickers_is_not_dialled_ever_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(stands=[0.01] * 100)
    live(monkeypatch, server, Bench(), 60)
    assert 5 <= len(server.all("join")) <= 10


def test_one_that_is_told_to_come_later_comes_later_to_the_same_server(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(answers={"join": [Overloaded("try again in 1 s")] * 3})
    live(monkeypatch, server, Bench(), 20, addresses=("a:1", "b:1"))
    assert server.all("dial") == ["a:1"] * 4
    assert server.times("dial")[-1] - server.times("dial")[0] >= (0.5 + 1 + 2) / 2


# The work -----------------------------------------------------------------------------------------------------------------


def test_a_short_task_costs_no_word_about_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tasks=[TRAIN])
    live(monkeypatch, server, Bench(seconds=BEAT_S - 1), 20)
    assert bytes(server.received) == MODEL.tobytes()
    assert [header.key for header, _ in server.all("update")] == [TRAIN.key]
    assert server.all("progress") == []


def test_progress_is_told_as_long_as_there_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tasks=[TRAIN])
    live(monkeypatch, server, Bench(seconds=21), 30)
    assert [(key, one.stage, one.total) for key, one in server.all("progress")] == [(TRAIN.key, Stage.TRAINING, 21)] * 4
    done = [one.done for _, one in server.all("progress")]
    assert done == sorted(set(done))


def test_a_training_that_hangs_falls_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tasks=[TRAIN])
    live(monkeypatch, server, Bench(seconds=100, stuck=True), 60)
    assert len(server.all("progress")) == 1


def test_what_the_server_did_not_hear_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tasks=[TRAIN], answers={"progress": [ServerUnavailable("lost"), Overloaded("busy")]})
    live(monkeypatch, server, Bench(seconds=100, stuck=True), 60)
    assert len(server.all("progress")) == 3


@pytest.mark.parametrize("kind", [WrongRound, RunEnded, NoModel, UnknownRun])
def test_a_task_whose_progress_nobody_wants_is_dropped(
    kind: type[SeqfedError], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, bench = Server(tasks=[TRAIN], answers={"progress": [kind("gone on")]}), Bench(seconds=100)
    live(monkeypatch, server, bench, 200)
    assert (bench.begun, bench.done) == ([TRAIN.key], [])
    assert len(server.all("progress")) == 1
    assert server.all("update") == server.all("failure") == []


def test_the_work_goes_on_without_a_server_and_is_not_begun_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    server, bench = Server(tasks=[TRAIN], stands=[3.0, 3.0]), Bench(seconds=20)
    live(monkeypatch, server, bench, 40)  # each new connection sends the task again
    assert bench.begun == bench.done == [TRAIN.key]
    assert [working for _, working in server.all("join")] == [None, TRAIN.key, TRAIN.key]
    assert bytes(server.received) == MODEL.tobytes()


def test_an_evaluation_waits_for_the_training_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    server, bench = Server(tasks=[TRAIN, NEXT_EVALUATE]), Bench(seconds=3)
    live(monkeypatch, server, bench, 20)
    assert bench.done == [TRAIN.key, NEXT_EVALUATE.key]
    assert [call for _, call, _ in server.told if call in ("update", "evaluation")] == ["update", "evaluation"]


def test_a_newer_training_overtakes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def then(client: Session) -> None:
        await asyncio.sleep(2.5)
        client._offer(NEXT)

    server, bench = Server(tasks=[TRAIN]), Bench(seconds=10)
    live(monkeypatch, server, bench, 40, then=then)
    assert (bench.begun, bench.done) == ([TRAIN.key, NEXT.key], [NEXT.key])


def test_an_evaluation_that_is_not_wanted_stops_at_its_next_word(monkeypatch: pytest.MonkeyPatch) -> None:
    async def then(client: Session) -> None:
        await asyncio.sleep(2.5)
        client._offer(CANCEL)

    server, bench = Server(tasks=[EVALUATE]), Bench(seconds=10)
    live(monkeypatch, server, bench, 40, then=then)
    assert (bench.begun, bench.done) == ([EVALUATE.key], [])


@pytest.mark.parametrize(
    ("error", "told"), [(TrainingFailed("nan"), TrainingFailed), (ZeroDivisionError(), TrainingFailed)]
)
def test_what_cannot_be_done_is_told_in_the_servers_own_time(
    error: Exception, told: type[SeqfedError], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: dict[str, list[SeqfedError]] = {"failure": [ServerUnavailable("lost"), Overloaded("busy")]}
    server = Server(tasks=[TRAIN], answers=answers)
    live(monkeypatch, server, Bench(error=error), 20)
    assert server.all("failure") == [(TRAIN.key, told)] * 3


@pytest.mark.parametrize("task", [TRAIN, EVALUATE])
def test_a_task_without_consent_touches_neither_the_data_nor_the_model(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Task) -> None:
        raise PolicyRefused("max_rounds: 10 rounds in this run, and the limit is 5")

    def check(_: Bench, __: Task) -> ClientData:
        raise AssertionError("the data were read")

    monkeypatch.setattr(Bench, "check", check)
    server, bench = Server(tasks=[task]), Bench()
    live(monkeypatch, server, bench, 20, consent=Says(refuse))
    assert server.all("failure") == [(task.key, PolicyRefused)]
    assert server.all("fetch") == server.all("update") == server.all("evaluation") == bench.begun == []


def test_consent_is_asked_once_for_each_task_that_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[TaskKey] = []
    server = Server(tasks=[TRAIN, NEXT_EVALUATE], stands=[1.0, 1.0])  # each new connection sends them again
    live(monkeypatch, server, Bench(seconds=3), 30, consent=Says(lambda task: asked.append(task.key)))
    assert asked[:2] == [TRAIN.key, NEXT_EVALUATE.key]
    assert asked.count(TRAIN.key) == len([one for one, _ in server.all("update")])


# Transfers ----------------------------------------------------------------------------------------------------------------


def test_both_ways_go_on_where_they_broke_in_smaller_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tasks=[TRAIN], cuts=[1, 0, 1, 99, 1, 1, 99])
    live(monkeypatch, server, Bench(), 60)
    kib = 1 << 10
    assert server.all("fetch") == [
        (0, 512 * kib),
        (512 * kib, 256 * kib),  # nothing came
        (512 * kib, 128 * kib),
        (640 * kib, 64 * kib),  # whole: the next is twice as large
    ]
    assert [(header.offset, size) for header, size in server.all("update")] == [
        (0, 128 * kib),
        (128 * kib, 64 * kib),
        (192 * kib, 32 * kib),
    ]
    assert bytes(server.received) == MODEL.tobytes()


def test_a_server_that_is_only_busy_says_nothing_about_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[str, list[SeqfedError]] = {"update": [Overloaded("no room")] * 3, "fetch": [Overloaded("busy")]}
    server = Server(tasks=[TRAIN], answers=answers)
    live(monkeypatch, server, Bench(), 60)
    assert {size for _, size in server.all("fetch") + server.all("update")} == {CHUNK_BYTES}
    assert bytes(server.received) == MODEL.tobytes()


@pytest.mark.parametrize("busy_s", [0.0, 96.0])
def test_of_an_uploads_time_the_servers_is_not_the_links(busy_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    async def slowly(*_: Any) -> float:
        await asyncio.sleep(100)
        return busy_s

    async def then(client: Session) -> None:
        clients.append(client)

    clients = list[Session]()
    monkeypatch.setattr(Line, "submit_update", slowly)
    live(monkeypatch, Server(tasks=[TRAIN]), Bench(), 200, then=then)
    assert clients[0]._pace.bytes_per_s == pytest.approx(MODEL.nbytes / (100 - busy_s), rel=1e-3)


def test_an_upload_that_waits_is_told_although_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tasks=[TRAIN], answers={"update": [ServerUnavailable("no room")] * 5})
    live(monkeypatch, server, Bench(), 60)
    stages = [progress.stage for _, progress in server.all("progress")]
    assert len(stages) >= 2
    assert set(stages) == {Stage.SENDING}


def test_a_transfer_is_broken_off_when_its_task_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(*_: Any) -> float:
        await asyncio.sleep(1e6)
        return 0.0

    async def then(client: Session) -> None:
        await asyncio.sleep(10)
        client._offer(CANCEL)
        client._offer(NEXT)

    monkeypatch.setattr(Line, "submit_update", hang)
    server, bench = Server(tasks=[TRAIN]), Bench()
    live(monkeypatch, server, bench, 10, then=then)
    assert bench.done == [TRAIN.key, NEXT.key]


# Masked sums ------------------------------------------------------------------------------------------------------------

SECURE = replace(TRAIN, spec=secure_spec(), masking=MaskingTerms(1, 5))
AGAIN = replace(SECURE, key=RETRY.key, masking=MaskingTerms(2, 5))
RESTARTED = replace(SECURE, masking=MaskingTerms(2, 5))  # the server forgot the sum, and not the attempt
STEPS = [Advert, KeyShares, MaskedInput, Confirm, Opening]


@dataclass
class Company:
    """Two more clients, who are in each of these sums, one after the other."""

    folder: Path
    tables: list[Table]
    after: float = 0.0

    def __post_init__(self) -> None:
        self.people = parties(self.folder, "ward", "anna", "bert")

    def given(self, place: int) -> Given:
        return update(place, MODEL.size) if self.tables[place].dim else {"examples": 1 + place}

    async def join(self, _: Session) -> None:
        self._parts = [asyncio.ensure_future(self._part(self.people[name])) for name in ("anna", "bert")]

    async def _part(self, one: Masking) -> None:
        await asyncio.sleep(self.after)
        for place, table in enumerate(self.tables):
            await be_in(table, one, self.given(place))

    def live(self, monkeypatch: pytest.MonkeyPatch, server: Server, bench: Bench, until: float, **how: Any) -> None:
        server.tables |= {table.terms.number: table for table in self.tables}
        live(monkeypatch, server, bench, until, **{"masking": self.people["ward"], "then": self.join, **how})


def steps(server: Server) -> list[tuple[int, type]]:
    return [(number, step) for _, number, step in server.all("mask")]


def test_a_training_goes_into_a_masked_sum_and_tells_nothing_beside_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = Table(SECURE, 3, MODEL.size)
    server = Server(tasks=[SECURE])
    Company(tmp_path, [table], after=20).live(monkeypatch, server, Bench(seconds=21), 60)
    assert steps(server) == [(1, step) for step in STEPS]
    whole, tally = table.sums()
    given = [LocalUpdate(MODEL, b"", 1, {"examples": 1}, 0), *[update(0, MODEL.size)] * 2]
    plain = [
        contribution(table.terms, SECURE, name, one) for name, one in zip(("ward", "anna", "bert"), given, strict=True)
    ]
    np.testing.assert_array_equal(
        whole, sum(vector.astype(np.int64) for vector, _ in plain if vector is not None) & 0xFFFF
    )
    assert [tally[name] for name in ("weight", "examples", "clients")] == [15, 15, 3]
    assert tally["clipped"] == 3  # all are longer than privacy.clip
    ((header, _),) = server.all("update")
    assert (header.key, header.masked_number, header.nbytes) == (SECURE.key, 1, 2 * MODEL.size)
    assert (header.weight, header.tally) == (0, {})
    told = [progress for _, progress in server.all("progress")]
    assert {one.stage for one in told} == {Stage.TRAINING}
    assert {(one.total, one.epoch, one.loss) for one in told} == {(100, 0, None)}
    assert len(told) == 4
    assert {one.done for one in told} <= {100 * second // 21 for second in range(21)}
    assert server.all("failure") == []


def test_a_client_that_waits_for_the_others_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = Server(tasks=[SECURE])
    Company(tmp_path, [Table(SECURE, 3, MODEL.size)], after=60).live(monkeypatch, server, Bench(), 40)
    assert steps(server) == [(1, Advert)]
    assert [(one.stage, one.total) for _, one in server.all("progress")] == [(Stage.SENDING, 0)] * 7


@pytest.mark.parametrize("kind", [TaskKind.EVALUATE, TaskKind.MEASURE])
def test_sums_over_data_are_masked_too(kind: TaskKind, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = {TaskKind.EVALUATE: "examples", TaskKind.MEASURE: "count.0"}[kind]
    task = replace(SECURE, kind=kind, spec=secure_spec("federated"))
    table, server = Table(task, 3), Server(tasks=[task])
    company = Company(tmp_path, [table])
    monkeypatch.setattr(company, "given", lambda _: {name: 1})
    company.live(monkeypatch, server, Bench(), 20)
    assert table.sums()[1][name] == 7
    assert server.all("update") == server.all("evaluation") == server.all("failure") == []
    assert len(server.all("fetch")) == (kind is TaskKind.EVALUATE)


def test_a_measuring_of_a_run_without_secure_aggregation_is_answered_as_an_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(tasks=[replace(TRAIN, kind=TaskKind.MEASURE)])
    live(monkeypatch, server, Bench(), 20)
    assert (server.all("evaluation"), server.all("fetch")) == ([TRAIN.key], [])


def test_a_lost_answer_is_asked_for_again_and_is_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table, server = Table(SECURE, 3, MODEL.size), Server(tasks=[SECURE], lost=list(STEPS), cuts=[9, 1])
    Company(tmp_path, [table]).live(monkeypatch, server, Bench(), 60)
    assert steps(server) == [(1, step) for step in STEPS for _ in range(2)]
    assert len(server.all("update")) == 2  # the upload broke, too, and went on
    assert table.sums()[1]["clients"] == 3


@pytest.mark.parametrize("next_", [AGAIN, RESTARTED])
@pytest.mark.parametrize("over", [False, True])
def test_for_another_number_the_sum_is_begun_anew_and_not_the_training(
    next_: Task, over: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = Table(SECURE, 4, MODEL.size), Table(next_, 3, MODEL.size)  # nobody has the fourth seat
    company = Company(tmp_path, [second])

    async def then(client: Session) -> None:
        await first.heard(1)
        if over:
            del server.tables[1]  # what the client asks is refused, and the new task comes later
            server.answers["progress"] = [WrongRound("over")]
            await asyncio.sleep(60)
        client._offer(next_)
        await company.join(client)

    server, bench = Server(tasks=[SECURE]), Bench()
    server.tables[1] = first
    company.live(monkeypatch, server, bench, 60, then=then)
    assert steps(server) == [(1, Advert), *((2, step) for step in STEPS)]
    assert bench.done == [SECURE.key]
    assert {key for key, number, _ in server.all("mask") if number == 2} == {next_.key}
    assert second.sums()[1]["clients"] == 3
    assert server.all("failure") == []


def test_what_may_have_been_opened_is_trained_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second = Table(SECURE, 3, MODEL.size), Table(AGAIN, 3, MODEL.size)

    async def then(client: Session) -> None:
        await company.join(client)
        await first.heard(15)  # five steps of three clients
        client._offer(AGAIN)

    company = Company(tmp_path, [first, second])
    server, bench = Server(tasks=[SECURE]), Bench()
    company.live(monkeypatch, server, bench, 60, then=then)
    assert bench.anew == [0, 2]
    assert second.sums()[1]["clients"] == 3
    log = Log(tmp_path / "ward")
    assert log.opened(SECURE.key) == {b"digest 0", b"digest 2"}


def test_a_sum_that_came_to_nothing_is_no_failure_of_the_clients(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers: dict[str, list[SeqfedError]] = {"mask": [MaskingFailed("too few"), WrongRound("over")]}
    server, bench = (
        Server(tasks=[SECURE], answers=answers, stands=[5.0, 5.0]),
        Bench(),
    )  # each connection sends it again
    table = Table(SECURE, 3, MODEL.size)
    Company(tmp_path, [table]).live(monkeypatch, server, bench, 60)
    assert server.all("failure") == []
    assert bench.done == [SECURE.key]  # and what was trained is still there
    assert table.sums()[1]["clients"] == 3


def test_a_cancelled_task_leaves_its_sum(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def then(client: Session) -> None:
        await table.heard(1)
        client._offer(replace(CANCEL, key=SECURE.key))
        client._offer(NEXT)

    table, server = Table(SECURE, 3, MODEL.size), Server(tasks=[SECURE])
    Company(tmp_path, [table]).live(monkeypatch, server, Bench(), 30, then=then)
    assert steps(server) == [(1, Advert)]
    assert [header.key for header, _ in server.all("update")] == [NEXT.key]


def test_a_server_that_lies_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lie(client: str, reply: Reply) -> Reply:
        return Survivors(frozenset(["ward", "anna"])) if isinstance(reply, Survivors) and client == "ward" else reply

    server = Server(tasks=[SECURE])
    Company(tmp_path, [Table(SECURE, 3, MODEL.size, lie=lie)]).live(monkeypatch, server, Bench(), 20)
    assert server.all("failure") == [(SECURE.key, MaskingRefused)]
    assert steps(server) == [(1, step) for step in STEPS[:3]]


@pytest.mark.parametrize("known", [False, True])
def test_what_cannot_be_masked_is_not_even_trained(
    known: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server, bench = Server(tasks=[SECURE]), Bench()
    live(monkeypatch, server, bench, 20, masking=party("ward", tmp_path) if known else None)
    assert server.all("failure") == [(SECURE.key, PolicyRefused if known else MaskingRefused)]
    assert bench.begun == server.all("fetch") == []


def test_without_a_number_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = Server(tasks=[replace(SECURE, masking=None)])
    live(monkeypatch, server, Bench(), 20, masking=party("ward", tmp_path, {}))
    assert server.all("failure") == [(SECURE.key, MaskingRefused)]
    assert server.all("update") == server.all("mask") == []


@pytest.mark.parametrize(
    ("heard", "lasts", "comes"),
    [(Delivery, True, True), (Delivery, False, True), (Survivors, True, False), (Survivors, False, False)],
    ids=[
        "before it is sent",
        "before it is sent, without a log",
        "after it was sent",
        "after it was sent, without a log",
    ],
)
def test_what_a_sum_left_out_comes_with_the_next_one_unless_it_may_have_been_opened(
    heard: type, lasts: bool, comes: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three rounds of powersgd; the second one's sum ends amid it. lasts: whether masking.db can be used then."""
    content = {
        "data": {"features": 3, "classes": 2},
        "model": {"hidden": 30, "layers": 1},
        "cohort": {"min_clients": 3},
        "aggregation": {"weighting": "uniform"},
        "privacy": {"secure_aggregation": True, "clip": 1e6, "b": 24},
        "compression": {"upload": "powersgd", "rank": 2},
    }
    spec = validate(RunSpec, content, "test")
    model = np.random.default_rng(1).standard_normal(layout_of(spec).size).astype("<f4")
    monkeypatch.setattr(sys.modules[__name__], "MODEL", model)
    version = ModelVersion(0, model.nbytes, blake3(model.tobytes()).digest(), b"layout")
    # the last is of the other side, in which what was left out has a part
    tasks = [
        replace(SECURE, spec=spec, model=version, key=TaskKey("run", round_, 1), masking=MaskingTerms(number, 3))
        for number, round_ in ((1, 1), (2, 3), (3, 4))
    ]
    log, aside, ended = tmp_path / "ward" / LOG, tmp_path / "aside", list[type]()

    def end(client: str, reply: Reply) -> Reply:
        if client != "ward" or not isinstance(reply, heard):
            return reply
        if not lasts:
            company.people["ward"].log.close()
            log.rename(aside)
            log.mkdir()
        ended.append(type(reply))
        raise WrongRound("masked sum 2 is over")

    first, second, third = (
        Table(task, 3, model.size, lie=end if task is tasks[1] else lambda _, reply: reply) for task in tasks
    )
    company = Company(tmp_path, [first, third])

    async def then(client: Session) -> None:
        await company.join(client)
        await asyncio.sleep(20)
        others = [
            asyncio.ensure_future(be_in(second, company.people[name], update(0, model.size)))
            for name in ("anna", "bert")
        ]
        client._offer(tasks[1])
        await asyncio.sleep(20)
        if not lasts:
            log.rmdir()
            aside.rename(log)
        for other in others:
            other.cancel()
        client._offer(tasks[2])

    server, bench = Server(tasks=[tasks[0]]), Bench()
    server.tables[2] = second
    company.live(monkeypatch, server, bench, 60, then=then)
    assert bench.done == [task.key for task in tasks]
    assert (server.all("failure"), ended) == ([], [heard])
    own = LocalUpdate(model, b"", 1, {"examples": 1}, 0)
    more = replace(own, delta=model + rest_of(tasks[0], own))

    def vector(name: str, one: LocalUpdate) -> NDArray[np.int64]:
        found, _ = contribution(third.terms, tasks[2], name, one)
        assert found is not None
        return found.astype(np.int64)

    with_it, without = vector("ward", more), vector("ward", own)
    assert not np.array_equal(with_it, without)
    others = sum(vector(name, update(1, model.size)) for name in ("anna", "bert"))
    expected = others + (with_it if comes else without)
    np.testing.assert_array_equal(third.sums()[0], expected & 0xFFFFFF)


def private(mode: str, size: int, **dp: Any) -> RunSpec:
    """Of as many parameters, about."""
    content = {
        "rounds": 1,
        "data": {"features": 1, "classes": 2},
        "cohort": {"min_clients": 3, "count": 3},
        "aggregation": {"weighting": "uniform"},
        "evaluation": {"every": 0},
        "model": {"hidden": size, "layers": 1},
        "privacy": {
            "secure_aggregation": mode == "distributed",
            **({"b": 18} if mode == "distributed" else {}),
            "dp": {"mode": mode, "delta": 1e-5, **dp},
        },
    }
    return validate(RunSpec, content, "test")


def test_each_masked_sum_is_on_the_account_before_anything_is_in_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A server that opens a sum, answers nobody, and asks for the same round in another one."""
    spec = private("distributed", 32, noise_multiplier=4.0)
    model = np.arange(layout_of(spec).size, dtype="<f4")
    monkeypatch.setattr(sys.modules[__name__], "MODEL", model)
    version = ModelVersion(0, model.nbytes, blake3(model.tobytes()).digest(), b"layout")
    tasks = [
        replace(SECURE, spec=spec, model=version, key=TaskKey("run", 1, place), masking=MaskingTerms(place, 3))
        for place in range(1, 6)
    ]
    tables = [Table(task, 3, model.size) for task in tasks]
    company = Company(tmp_path, tables)
    opened = 3

    async def then(client: Session) -> None:
        await company.join(client)
        for table, task in zip(tables[:opened], tasks[1:], strict=False):
            await table.heard(15)  # five steps of three clients: the server can open it
            client._offer(task)

    limit = accounting.spent(spec, opened, 4.0) * 1.0001
    consent = Consent(Policy(max_epsilon=limit, unsigned=True), tmp_path / "ward", None)
    server, bench = Server(tasks=[tasks[0]]), Bench()
    company.live(monkeypatch, server, bench, 100, then=then, consent=consent)
    for table in tables[:opened]:
        table.sums()
    (found,) = Account(tmp_path / "ward").released()
    assert (found.releases, [number for number, step in steps(server) if step is Opening]) == (opened, [1, 2, 3])
    assert bench.anew == [0, 2, 3]  # the fourth is neither made nor given
    assert {name for name, _ in tables[opened].said} == {"anna", "bert"}
    assert server.all("failure") == [(tasks[opened].key, PolicyRefused)]


@pytest.mark.parametrize("mode", ["local", "example"])
def test_each_noise_that_is_drawn_is_on_the_account_and_an_update_is_sent_again(
    mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task = replace(TRAIN, spec=private(mode, 8, noise_multiplier=8.0))

    async def then(client: Session) -> None:
        for attempt in range(2, 5):
            await asyncio.sleep(10)
            server.received.clear()
            client._offer(replace(task, key=TaskKey("run", 1, attempt)))

    for life in (1, 2):  # after a restart the update is not there any more, and there is but one noise to a training
        server, bench = Server(tasks=[task]), Bench()
        live(monkeypatch, server, bench, 10, then=then, consent=Consent(None, tmp_path, None))
        assert [header.key.attempt for header, _ in server.all("update")] == [1, 2, 3, 4]
        assert len({header.digest for header, _ in server.all("update")}) == 1
        assert bench.done == [task.key]
        (found,) = Account(tmp_path).released()
        assert found.releases == life


def test_what_is_not_on_the_account_is_not_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the noise follows from the number of sequences, that is only known when the data are read."""
    task = replace(TRAIN, spec=private("example", 8, noise_multiplier=0.05))
    server, bench = Server(tasks=[task]), Bench()
    live(monkeypatch, server, bench, 20, consent=Consent(Policy(max_epsilon=1.0), tmp_path, None))
    assert server.all("failure") == [(task.key, PolicyRefused)]
    assert bench.begun == server.all("update") == []
    assert Account(tmp_path).released() == ()


@pytest.mark.parametrize("kind", [TaskKind.EVALUATE, TaskKind.MEASURE])
@pytest.mark.parametrize("mode", ["central", "local", "example"])
def test_a_private_run_gets_no_sums_without_noise(
    mode: str, kind: TaskKind, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task = replace(TRAIN, kind=kind, spec=private(mode, 8, epsilon=2.0))
    server, bench = Server(tasks=[task]), Bench()
    live(monkeypatch, server, bench, 20, consent=Consent(None, tmp_path, None))
    assert server.all("failure") == [(task.key, PolicyRefused)]
    assert server.all("evaluation") == server.all("fetch") == bench.begun == []


@pytest.mark.parametrize(
    ("dp", "told"),
    [
        (None, "the loss became inf after 64 examples"),
        ({"evaluation": "public"}, "the loss became inf after 64 examples"),
        ({}, "the client's log has the reason"),
    ],
)
def test_of_a_failure_a_private_run_learns_the_name(
    dp: dict[str, Any] | None, told: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def report(line: Line, key: TaskKey, error: SeqfedError) -> None:
        line._server.note("failure", (type(error), str(error)))

    task = TRAIN if dp is None else replace(TRAIN, spec=private("local", 8, noise_multiplier=8.0, **dp))
    monkeypatch.setattr(Line, "report_failure", report)
    server = Server(tasks=[task])
    live(monkeypatch, server, Bench(error=TrainingFailed("the loss became inf after 64 examples")), 20)
    assert server.all("failure") == [(TrainingFailed, told)]
    assert "the loss became inf after 64 examples" in caplog.text


@pytest.mark.parametrize("error", [PolicyRefused("max_rounds: 9"), ConfigError("pip install"), MaskingRefused("no")])
def test_what_rules_say_is_told_of_private_runs_too(error: SeqfedError, monkeypatch: pytest.MonkeyPatch) -> None:
    async def report(line: Line, key: TaskKey, error: SeqfedError) -> None:
        line._server.note("failure", str(error))

    monkeypatch.setattr(Line, "report_failure", report)
    server = Server(tasks=[replace(TRAIN, spec=private("local", 8, noise_multiplier=8.0))])
    live(monkeypatch, server, Bench(error=error), 20)
    assert server.all("failure") == [str(error)]


def test_an_update_of_before_does_not_outlive_another_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The workshop trains into the same memory each time."""

    async def then(client: Session) -> None:
        await first.heard(1)
        client._offer(OTHER)
        await asyncio.sleep(20)
        client._offer(AGAIN)
        await company.join(client)

    first, second = Table(SECURE, 4, MODEL.size), Table(AGAIN, 3, MODEL.size)
    company = Company(tmp_path, [second])
    server, bench = Server(tasks=[SECURE]), Bench()
    server.tables[1] = first
    company.live(monkeypatch, server, bench, 60, then=then)
    assert bench.done == [SECURE.key, OTHER.key, AGAIN.key]
    assert bench.anew == [0, 0, 0]
