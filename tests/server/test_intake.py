"""Updates on their way in: order, resumption, what is refused and what is kept, and how many move at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from tests.server.conftest import chunks, make_spec, some_delta, soon, turns_until

from seqfed.common.errors import (
    BrokenTransfer,
    ChecksumMismatch,
    LayoutMismatch,
    NonFiniteUpdate,
    RateLimited,
    SeqfedError,
    StorageError,
    TooLarge,
    UpdateOutOfRange,
)
from seqfed.common.layout import Layout
from seqfed.common.metrics import names
from seqfed.common.spec import AggregationSpec
from seqfed.common.transfer import CHUNK_BYTES
from seqfed.common.views import TaskKey, UpdateHeader
from seqfed.server import fedavg
from seqfed.server.intake import UNBOUNDED, Intake, Patience, check_header, check_tally, receive_file

LAYOUT = Layout((("w", (300_000,)),))  # three chunks, the last one shorter
DATA = some_delta(LAYOUT.size, 1).tobytes()
OTHER = some_delta(LAYOUT.size, 2).tobytes()
RUN = "0123456789abcdef"


def header(data: bytes = DATA, offset: int = 0, round_: int = 1, weight: int = 1) -> UpdateHeader:
    return UpdateHeader(
        TaskKey(RUN, round_, 1), weight, LAYOUT.digest, len(data), blake3(data).digest(), offset, {}, 0.0
    )


@dataclass
class Desk:
    """An intake and the folder that it fills."""

    folder: Path
    intake: Intake
    metered: list[int] = field(default_factory=list)

    def final(self, client: str = "a") -> Path:
        return self.folder / f"{client}.f32"

    async def take(
        self,
        one: UpdateHeader,
        parts: AsyncIterator[tuple[int, bytes]],
        client: str = "a",
        cohort: int = 2,
        rule: AggregationSpec = UNBOUNDED,
    ) -> None:
        await self.intake.receive(
            client, one, LAYOUT, one.weight, cohort, self.final(client), parts, self.metered.append, rule
        )

    def received(self, data: bytes = DATA, client: str = "a") -> int:
        return self.intake.received(client, RUN, blake3(data).digest())

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*") if path.suffix != ".f32")


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path / "updates", Intake(8, 100, Patience(60.0)))
    yield made
    made.intake.forget(RUN)  # closes what is incomplete


async def feed(*parts: tuple[int, bytes]) -> AsyncIterator[tuple[int, bytes]]:
    for part in parts:
        yield part


async def held(gate: asyncio.Event, *parts: tuple[int, bytes]) -> AsyncIterator[tuple[int, bytes]]:
    """The first of these chunks, and after the gate has opened the others."""
    for number, part in enumerate(parts):
        if number == 1:
            await gate.wait()
        yield part


async def arrived(desk: Desk, count: int, data: bytes = DATA) -> None:
    """Wait until so many bytes are here."""
    await turns_until(lambda: desk.received(data) >= count)


async def test_a_whole_update_lies_in_its_place(desk: Desk) -> None:
    await desk.take(header(), feed(*chunks(DATA)))
    assert desk.final().read_bytes() == DATA
    assert desk.leftovers() == []
    assert desk.received() == 0
    assert desk.metered == [len(data) for _, data in chunks(DATA)]


async def test_a_break_keeps_what_has_come_and_the_rest_completes_it(desk: Desk) -> None:
    parts = chunks(DATA)
    with pytest.raises(BrokenTransfer, match=f"ended at byte {CHUNK_BYTES:,} of {len(DATA):,}; go on from there"):
        await desk.take(header(), feed(parts[0]))
    assert desk.received() == CHUNK_BYTES
    assert not desk.final().exists()
    with pytest.raises(BrokenTransfer, match="is next, the upload began at 0"):
        await desk.take(header(), feed(*parts))
    with pytest.raises(BrokenTransfer, match="came where byte"):
        await desk.take(header(offset=CHUNK_BYTES), feed(parts[2]))
    assert desk.received() == CHUNK_BYTES
    await desk.take(header(offset=CHUNK_BYTES), feed(*parts[1:]))
    assert desk.final().read_bytes() == DATA


@pytest.mark.parametrize(
    "parts",
    [
        [(0, DATA[: CHUNK_BYTES - 4])],
        [(0, DATA[: CHUNK_BYTES + 4])],
        [(0, DATA[:3])],
        [(4, DATA[4 : CHUNK_BYTES + 4])],
        [(0, b"")],
        [(0, DATA[:CHUNK_BYTES]), (0, DATA[:CHUNK_BYTES])],
    ],
)
async def test_chunks_out_of_order_or_size_are_refused_and_nothing_is_lost(
    desk: Desk, parts: list[tuple[int, bytes]]
) -> None:
    with pytest.raises(BrokenTransfer):
        await desk.take(header(), feed(*parts))
    received = desk.received()
    await desk.take(header(offset=received), feed(*chunks(DATA, received)))
    assert desk.final().read_bytes() == DATA


def spoiled(bad: float, place: int) -> bytes:
    numbers = np.frombuffer(DATA, "<f4").copy()
    numbers[place] = bad
    return numbers.tobytes()


@pytest.mark.parametrize(
    ("kind", "data", "announced"),
    [
        (NonFiniteUpdate, spoiled(np.nan, 0), None),
        (NonFiniteUpdate, spoiled(np.inf, LAYOUT.size - 1), None),
        (UpdateOutOfRange, spoiled(2.0**32, 200_000), None),
        (ChecksumMismatch, OTHER, blake3(DATA).digest()),
    ],
)
async def test_a_bad_update_is_dropped(
    desk: Desk, kind: type[SeqfedError], data: bytes, announced: bytes | None
) -> None:
    one = header(data)
    if announced is not None:
        one = replace(one, digest=announced)
    with pytest.raises(kind):
        await desk.take(one, feed(*chunks(data)))
    assert not desk.final().exists()
    assert desk.leftovers() == []
    assert desk.received(data) == 0
    await desk.take(header(), feed(*chunks(DATA)))
    assert desk.final().read_bytes() == DATA


async def test_an_update_that_fits_a_small_cohort_need_not_fit_a_large_one(desk: Desk) -> None:
    data = spoiled(2.0**31, 5)
    with pytest.raises(UpdateOutOfRange):
        await desk.take(header(data), feed(*chunks(data)), cohort=3)
    await desk.take(header(data), feed(*chunks(data)), cohort=2)


def norm_of(data: bytes) -> float:
    return fedavg.norm([np.frombuffer(data, "<f4")])


@pytest.mark.parametrize("breaks", [False, True])
async def test_an_update_that_is_too_long_is_refused_and_dropped(desk: Desk, breaks: bool) -> None:
    bound = norm_of(DATA)
    long = (np.frombuffer(DATA, "<f4") * np.float32(1.001)).tobytes()
    rule = AggregationSpec(max_norm=bound, over_norm="refuse")
    parts = [(at, long[at : at + 100_000]) for at in range(0, len(long), 100_000)]
    if breaks:
        with pytest.raises(BrokenTransfer):
            await desk.take(header(long), feed(*parts[:5]), rule=rule)
    left = parts[5:] if breaks else parts
    with pytest.raises(UpdateOutOfRange) as refusal:
        await desk.take(header(long, left[0][0]), feed(*left), rule=rule)
    assert f"has the norm {norm_of(long):.6g}; the run takes {bound:.6g} at most" in str(refusal.value)
    assert (desk.final().exists(), desk.leftovers()) == (False, [])
    await desk.take(header(), feed(*chunks(DATA)), rule=rule)  # just as long as it may be
    assert desk.final().read_bytes() == DATA


async def test_where_long_updates_are_scaled_down_they_are_taken_whole(desk: Desk) -> None:
    data = spoiled(2.0**40, 5)  # by itself too large for the sum
    with pytest.raises(UpdateOutOfRange):
        await desk.take(header(data), feed(*chunks(data)))
    await desk.take(header(data), feed(*chunks(data)), rule=AggregationSpec(max_norm=1.0))
    assert desk.final().read_bytes() == data


@pytest.mark.parametrize("weight", [2, 1 << 40])
async def test_the_last_calls_weight_is_the_one_that_is_checked(desk: Desk, weight: int) -> None:
    data, parts = spoiled(2.0**31, 5), chunks(spoiled(2.0**31, 5))
    with pytest.raises(BrokenTransfer):
        await desk.take(header(data), feed(parts[0]))
    with pytest.raises(UpdateOutOfRange):
        await desk.take(header(data, CHUNK_BYTES, weight=weight), feed(*parts[1:]))


def test_a_header_of_something_else_is_refused() -> None:
    check_header(header(), LAYOUT, 2)
    for kind, changes in (
        (TooLarge, {"nbytes": len(DATA) + 4}),
        (LayoutMismatch, {"nbytes": len(DATA) - 4}),
        (LayoutMismatch, {"layout_digest": bytes(32)}),
        (UpdateOutOfRange, {"weight": 0}),
        (UpdateOutOfRange, {"training_seconds": float("nan")}),
    ):
        with pytest.raises(kind):
            check_header(replace(header(), **changes), LAYOUT, 2)


@pytest.mark.parametrize("cohort", [1, 3, 1000])
def test_a_tally_that_passes_adds_up_within_64_bits(cohort: int) -> None:
    highest = (1 << 62) // cohort
    check_tally({"loss": highest, "correct": -highest}, cohort, {"loss", "correct"})
    assert highest * cohort < 1 << 63
    for value in (highest + 1, -highest - 1):
        with pytest.raises(UpdateOutOfRange, match="'loss'"):
            check_tally({"loss": value}, cohort, {"loss"})


def test_a_sum_that_the_run_has_not_is_refused() -> None:
    kinds = [make_spec(), make_spec(task__kind="regression", data={"features": 2, "targets": 1})]
    for spec in kinds:
        check_tally(dict.fromkeys(names(spec), 1), 2, names(spec))
        for name in ("", "x" * 10_000, "pos.0.512", "tp.2", "actual.-1", "loss.higher"):
            with pytest.raises(UpdateOutOfRange, match="which this run has not") as refusal:
                check_tally({"examples": 1, name: 0}, 2, names(spec))
            assert len(str(refusal.value)) < 200
    with pytest.raises(UpdateOutOfRange, match="'correct'"):
        check_tally({"correct": 1}, 2, names(kinds[1]))
    for name in ("correct", "pos.0.1"):  # of an evaluation, and a training has none
        with pytest.raises(UpdateOutOfRange, match=name):
            check_header(replace(header(), tally={"examples": 1, name: 1}), LAYOUT, 2)


async def test_another_update_takes_the_place_of_an_incomplete_one(desk: Desk) -> None:
    with pytest.raises(BrokenTransfer):
        await desk.take(header(), feed(chunks(DATA)[0]))
    await desk.take(header(OTHER), feed(*chunks(OTHER)))
    assert desk.received() == 0
    assert desk.final().read_bytes() == OTHER
    assert desk.leftovers() == []


async def test_what_is_left_of_an_earlier_round_is_not_gone_on_with(desk: Desk) -> None:
    with pytest.raises(BrokenTransfer):
        await desk.take(header(), feed(chunks(DATA)[0]))
    await desk.take(header(round_=2), feed(*chunks(DATA)))
    assert desk.final().read_bytes() == DATA


async def test_another_update_ends_the_one_that_is_moving(desk: Desk) -> None:
    gate = asyncio.Event()
    moving = asyncio.create_task(desk.take(header(), held(gate, *chunks(DATA))))
    await arrived(desk, CHUNK_BYTES)
    await desk.take(header(OTHER), feed(*chunks(OTHER)))
    gate.set()
    with pytest.raises(BrokenTransfer, match="given up"):
        await soon(moving)
    assert desk.final().read_bytes() == OTHER
    assert desk.leftovers() == []


async def test_forgetting_a_run_ends_its_uploads(desk: Desk) -> None:
    gate = asyncio.Event()
    moving = asyncio.create_task(desk.take(header(), held(gate, *chunks(DATA))))
    await arrived(desk, CHUNK_BYTES)
    with pytest.raises(BrokenTransfer):
        await desk.take(header(OTHER), feed(chunks(OTHER)[0]), "b")
    desk.intake.forget("another run")
    assert desk.received(OTHER, "b") == CHUNK_BYTES
    desk.intake.forget(RUN)
    assert desk.received() == desk.received(OTHER, "b") == 0
    gate.set()
    with pytest.raises(BrokenTransfer, match="given up"):
        await soon(moving)
    assert desk.leftovers() == []
    assert not desk.final().exists()


async def test_a_billion_chunks_of_one_byte_are_no_upload(desk: Desk) -> None:
    for size in (1, 4, 4092):
        with pytest.raises(BrokenTransfer, match="all but the last have 4,096 at least"):
            await desk.take(header(), feed((0, DATA[:size])))
    await desk.take(header(), feed(*((offset, DATA[offset : offset + 4096]) for offset in range(0, len(DATA), 4096))))
    assert desk.final().read_bytes() == DATA  # whose last chunk is shorter
    assert len(DATA) % 4096


async def test_an_upload_that_trickles_makes_room_and_can_go_on(tmp_path: Path) -> None:
    desk = Desk(tmp_path, Intake(1, 100, Patience(0.02, 1 << 30)))

    async def trickle() -> AsyncIterator[tuple[int, bytes]]:
        for offset in range(0, len(DATA), 4096):
            await asyncio.sleep(0.001)  # never as long as a stall
            yield offset, DATA[offset : offset + 4096]

    with pytest.raises(
        BrokenTransfer, match=r"bytes came in .* less than 1,073,741,824 a second \(upload_bytes_per_s\)"
    ):
        await desk.take(header(), trickle())
    there = desk.intake.received("a", RUN, header().digest)
    assert 0 < there < len(DATA)
    await desk.take(header(offset=there), feed(*chunks(DATA, there)))
    assert desk.final().read_bytes() == DATA


async def test_one_client_cannot_take_all_places(tmp_path: Path) -> None:
    desk = Desk(tmp_path, Intake(8, 100, Patience(60.0), 2))
    gate = asyncio.Event()

    async def parts() -> AsyncIterator[tuple[int, bytes]]:
        await gate.wait()
        for part in chunks(DATA):
            yield part

    uploads = [asyncio.create_task(desk.take(header(), parts())) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(RateLimited, match=r"client 'a' has 2 uploads under way, the limit \(uploads_per_client\)"):
        await desk.take(header(), parts())
    gate.set()
    await desk.take(header(), feed(*chunks(DATA)), "b")
    for one in uploads:
        await one
    await desk.take(header(), feed(*chunks(DATA)))  # there is room again


async def test_further_streams_of_one_update_take_no_places_of_others(tmp_path: Path) -> None:
    desk = Desk(tmp_path, Intake(2, 16, Patience(60.0)))
    gate = asyncio.Event()
    first = chunks(DATA)[0]
    slow = [asyncio.ensure_future(desk.take(header(), held(gate, first))) for _ in range(3)]
    await arrived(desk, 1)
    await soon(desk.take(header(OTHER), feed(*chunks(OTHER)), client="b"))  # though three of another are under way
    assert desk.final("b").read_bytes() == OTHER
    gate.set()
    ended = await soon(asyncio.gather(*slow, return_exceptions=True))
    assert all(isinstance(one, BrokenTransfer) for one in ended)
    desk.intake.forget(RUN)


async def test_uploads_in_flight_are_bounded(desk: Desk) -> None:
    desk.intake = Intake(2, 100, Patience(60.0))
    gates = {name: asyncio.Event() for name in "abcd"}
    begun: list[str] = []

    async def parts(name: str) -> AsyncIterator[tuple[int, bytes]]:
        begun.append(name)
        await gates[name].wait()
        for part in chunks(DATA):
            yield part

    uploads = {name: asyncio.create_task(desk.take(header(), parts(name), name)) for name in gates}
    for finished in "abcd":
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(begun) <= 2 + "abcd".index(finished)
        gates[finished].set()
        await soon(uploads[finished])
        assert desk.final(finished).read_bytes() == DATA
    assert sorted(begun) == list("abcd")


async def test_a_stalled_upload_makes_room_and_can_go_on(tmp_path: Path) -> None:
    desk = Desk(tmp_path, Intake(1, 100, Patience(0.05)))

    async def stalling() -> AsyncIterator[tuple[int, bytes]]:
        yield chunks(DATA)[0]
        await asyncio.Event().wait()

    stalled = asyncio.create_task(desk.take(header(), stalling()))
    await turns_until(lambda: bool(desk.metered))
    other = asyncio.create_task(desk.take(header(OTHER), feed(*chunks(OTHER)), "b"))
    with pytest.raises(BrokenTransfer, match=r"nothing came for 0\.05 s"):
        await soon(stalled)
    await soon(other)
    assert desk.received() == CHUNK_BYTES
    await desk.take(header(offset=CHUNK_BYTES), feed(*chunks(DATA, CHUNK_BYTES)))
    assert desk.final().read_bytes() == DATA


async def test_an_update_cut_off_after_its_last_byte_is_found_whole(desk: Desk) -> None:
    gate = asyncio.Event()

    async def never_ending() -> AsyncIterator[tuple[int, bytes]]:
        for part in chunks(DATA):
            yield part
        await gate.wait()

    first = asyncio.create_task(desk.take(header(), never_ending()))
    await arrived(desk, len(DATA))
    first.cancel()
    await asyncio.wait([first])
    assert desk.received() == len(DATA)
    with pytest.raises(UpdateOutOfRange):
        await desk.take(header(offset=len(DATA), weight=1 << 41), feed())
    await desk.take(header(offset=len(DATA)), feed())
    assert desk.final().read_bytes() == DATA
    assert desk.received() == 0


async def test_a_disk_that_cannot_be_written_is_a_storage_error(desk: Desk) -> None:
    desk.folder.write_text("a file where a folder should be")
    with pytest.raises(StorageError, match="receiving an update"):
        await desk.take(header(), feed(*chunks(DATA)))
    desk.folder.unlink()
    assert desk.received() == 0
    await desk.take(header(), feed(*chunks(DATA)))
    desk.final("b").mkdir()
    (desk.final("b") / "full").touch()
    with pytest.raises(StorageError, match="keeping an update"):
        await desk.take(header(), feed(*chunks(DATA)), "b")
    assert desk.leftovers() == []


async def test_a_file_is_received_whole_or_refused(tmp_path: Path) -> None:
    path, digest = tmp_path / "file", blake3(DATA).digest()
    await receive_file(path, len(DATA), digest, feed(*chunks(DATA)), Patience(60.0))
    assert path.read_bytes() == DATA
    for kind, total, announced, parts in (
        (BrokenTransfer, len(DATA), digest, chunks(DATA)[:2]),
        (BrokenTransfer, len(DATA), digest, chunks(DATA)[1:]),
        (BrokenTransfer, len(DATA) - 4, digest, chunks(DATA)),
        (ChecksumMismatch, len(DATA), bytes(32), chunks(DATA)),
        (BrokenTransfer, len(DATA), b"", chunks(DATA)),
    ):
        with pytest.raises(kind):
            await receive_file(path, total, announced, feed(*parts), Patience(60.0))


async def test_an_upload_that_comes_again_has_a_file_of_its_own(desk: Desk) -> None:
    """The one that was given up for another may still be read, mapped: a file that is cut short under that ends the daemon."""

    def inodes() -> set[int]:
        return {path.stat().st_ino for path in desk.folder.glob("*.part")}

    gate = asyncio.Event()
    first = asyncio.create_task(desk.take(header(), held(gate, *chunks(DATA))))
    await arrived(desk, CHUNK_BYTES)
    other = asyncio.create_task(desk.take(header(OTHER), held(gate, *chunks(OTHER))))
    await arrived(desk, CHUNK_BYTES, OTHER)
    before = inodes()
    again = asyncio.create_task(desk.take(header(), held(gate, *chunks(DATA))))
    await arrived(desk, CHUNK_BYTES)
    assert len(inodes() - before) == 1
    gate.set()
    ended = await soon(asyncio.gather(first, other, again, return_exceptions=True))
    assert [type(one) for one in ended] == [BrokenTransfer, BrokenTransfer, type(None)]
    assert desk.final().read_bytes() == DATA
    assert desk.leftovers() == []
