"""Compressed updates over real gRPC: every codec's run is the one that its functions alone come to, to the bit."""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from blake3 import blake3
from tests.integration.light import EXAMPLES, Formula, delta_of, exported, seen_through, submitted, undisturbed
from tests.integration.maskers import Masker, examples_of, introduce
from tests.integration.maskers import session_of as masked_session
from tests.integration.maskers import spec_of as masked_spec
from tests.integration.test_kill_points import CHILD, KILLED, start
from tests.server.conftest import Daemon, a_daemon, averaged, chunks, flat_of, make_spec, some_delta, soon

from seqfed.client.connection import Connection
from seqfed.client.masking import masking_of
from seqfed.client.packing import Packer
from seqfed.client.session import Session
from seqfed.client.work import LocalUpdate, Workshop
from seqfed.common import quantising
from seqfed.common.compression import Codec, Key, decode, encode, header, largest, lowrank, rotsub
from seqfed.common.compression.chosen import uploads
from seqfed.common.errors import (
    BrokenTransfer,
    ChecksumMismatch,
    LayoutMismatch,
    MalformedPayload,
    SeqfedError,
    TooLarge,
    UpdateOutOfRange,
)
from seqfed.common.layout import Flat
from seqfed.common.masking.messages import KeyShares
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.quantising import Lattice
from seqfed.common.seeds import derive, generator
from seqfed.common.spec import RunSpec
from seqfed.common.transfer import CHUNK_BYTES
from seqfed.common.views import ModelStep, RoundRecord, Task, TaskKey, TaskKind, UpdateHeader
from seqfed.server import steps

CLIENTS = ("a", "b", "c")
ONE = {"kind": "lstm", "hidden": 64, "layers": 1}  # 17,538 numbers, one chunk
SEVERAL = {"kind": "lstm", "hidden": 400, "layers": 1}  # 647,202 numbers, five chunks, a step of delta4 one
# Settings, and how far from float32's the model may end, in parts of the way that the four rounds go. What the formula adds is
# noise, of which top-k and low rank have the least that there can be, and 1 bit of a sixth leaves twice as much again.
CODECS: dict[str, tuple[dict[str, Any], float]] = {
    "rotq8": ({"upload": "rotq8"}, 0.01),
    "rotq4": ({"upload": "rotq4"}, 0.2),
    "eden1": ({"upload": "eden1"}, 2.0),
    "topk": ({"upload": "topk", "fraction": 0.05}, 1.0),
    "topk of bytes": ({"upload": "topk", "bits": 8}, 1.0),
    "powersgd": ({"upload": "powersgd", "rank": 2}, 1.0),
}


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with a_daemon(tmp_path / "state") as found:
        yield found


@pytest.fixture
def servers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Servers that the test started, ended with it."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for one in started:
        one.kill()
        one.wait()


def spec_of(compression: Mapping[str, Any], **changes: Any) -> RunSpec:
    """Four rounds of three clients with a small model; a dotted key changes one of a table's entries."""
    given = {"rounds": 4, "model": ONE, "cohort__min_clients": len(CLIENTS)}
    return make_spec(compression=dict(compression), **{**given, **changes})


def replayed(spec: RunSpec, run: str, records: Iterable[RoundRecord]) -> Flat:
    """The model after these rounds, by the codec's functions and numpy's integers."""
    layout, model = layout_of(spec), initial_parameters(spec).flat
    (codec,) = uploads(spec).values()
    left: dict[str, Flat | None] = {}
    for record in records:
        total = np.zeros(layout.size, np.int64)
        for client in record.folded:
            key = Key(spec.seed, run, record.round, client)
            made = encode(delta_of(client, record.round, model), layout, key, codec, left.get(client))
            left[client] = made.residual
            sent = np.concatenate(list(decode(made.payload, layout, key, codec)))
            total += np.rint(sent.astype(np.float64) * (EXAMPLES * 2.0**30)).astype(np.int64)
        model = (model + total / (EXAMPLES * len(record.folded) * 2.0**30)).astype(np.float32)
    return model


def session_of(formula: Formula, address: str, packer: Packer | None = None) -> Session:
    instance = blake3(formula.client.encode()).hexdigest()[:32]
    draw = random.Random(formula.client)  # noqa: S311 - not a secret
    return Session(cast(Workshop, formula), (address,), instance, insecure=False, rng=draw, packer=packer)


@contextlib.asynccontextmanager
async def running(*sessions: Session) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(one.run()) for one in sessions]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def model_of(daemon: Daemon, run: str, spec: RunSpec) -> Flat:
    return flat_of(await daemon.export(run), layout_of(spec).size)


def distance(one: Flat, other: Flat) -> float:
    return float(np.linalg.norm(one - other))


@pytest.mark.parametrize(("given", "near"), CODECS.values(), ids=CODECS)
async def test_a_run_is_what_its_codecs_functions_come_to(daemon: Daemon, given: dict[str, Any], near: float) -> None:
    spec = spec_of(given)
    async with running(*(session_of(Formula(name), daemon.address) for name in CLIENTS)):
        run = (await daemon.submit(spec)).run
        view = await daemon.end(run)
    assert view.phase == "finished"
    model, plain = await model_of(daemon, run, spec), undisturbed(spec, CLIENTS)
    assert model.tobytes() == replayed(spec, run, view.history).tobytes()
    assert distance(model, plain) < near * distance(initial_parameters(spec).flat, plain)
    (codec,) = uploads(spec).values()
    assert sum(one.bytes_up for one in view.history) < 1.1 * 4 * 3 * largest(codec, layout_of(spec)) + 4 * 3 * 2000


# What comes by hand ---------------------------------------------------------------------------------------------------


def payload_of(spec: RunSpec, run: str, client: str, codec: Codec, round_: int = 1, **changes: Any) -> bytes:
    layout = changes.get("layout", layout_of(spec))
    return encode(some_delta(layout.size, round_), layout, Key(spec.seed, run, round_, client), codec).payload


async def test_payloads_that_are_none_are_refused_and_the_round_goes_on(daemon: Daemon) -> None:
    spec, codec = spec_of({"upload": "rotq8"}, rounds=1, cohort__min_clients=2), Codec("rotq8")
    layout = layout_of(spec)
    bad, good = await daemon.arrive("bad", "good")
    run = (await daemon.submit(spec)).run
    task, right = await bad.task(), payload_of(spec, run, "bad", codec)
    flipped = right[:-1] + bytes([right[-1] ^ 1])
    wild = header.write(codec, layout, Key(spec.seed, run, 1, "bad"), 0, layout.size, b"\xff" * (4 + layout.size))
    other = layout_of(spec_of({"upload": "rotq8"}, model={"kind": "gru", "hidden": 64, "layers": 1}))

    async def send(data: bytes, **changes: Any) -> None:
        await bad.send(bad.header(task, data, **{"codec": "rotq8", **changes}), chunks(data))

    plain = some_delta(layout.size, 1).tobytes()
    refused: list[tuple[type[SeqfedError], str, bytes, dict[str, Any]]] = [
        (MalformedPayload, "an update came as plain numbers; this run takes payloads of rotq8", plain, {"codec": ""}),
        (MalformedPayload, "a payload of codec 'eden1'; this run takes", right, {"codec": "eden1"}),
        (MalformedPayload, "a payload of codec 'x", right, {"codec": "x" * 1000}),
        (MalformedPayload, "this run's is 'rotq8'", payload_of(spec, run, "bad", Codec("rotq4")), {}),
        (TooLarge, "one of codec 'rotq8' has .* at most", right, {"nbytes": largest(codec, layout) + 1}),
        (TooLarge, "at most", right, {"nbytes": 1 << 60}),
        (MalformedPayload, "its header alone has 84", right[:84], {}),
        (ChecksumMismatch, "SHA-256", right[:-1], {}),
        (ChecksumMismatch, "SHA-256", flipped, {}),
        (ChecksumMismatch, "BLAKE3", right, {"digest": b"x" * 32}),
        (MalformedPayload, "do not begin as", b"x" * len(right), {}),
        (LayoutMismatch, "layout", right, {"layout_digest": b"x" * 32}),
        (LayoutMismatch, "layout", payload_of(spec, run, "bad", codec, layout=other), {}),
        (MalformedPayload, "another run or round, or by another client", payload_of(spec, run, "good", codec), {}),
        (MalformedPayload, "another run or round", payload_of(spec, run, "bad", codec, 2), {}),
        (MalformedPayload, "another run or round", payload_of(spec, "0" * 16, "bad", codec), {}),
        (UpdateOutOfRange, "it must be 0 to", wild, {}),
    ]
    for error, told, data, changes in refused:
        with pytest.raises(error, match=told):
            await send(data, **changes)
        assert await bad.status(task, data) == (0, False)
    assert list((daemon.state / "updates" / run).iterdir()) == []
    await send(right)
    task, right = await good.task(), payload_of(spec, run, "good", codec)
    assert not await good.send(good.header(task, right, codec="rotq8"), chunks(right))
    assert (await daemon.end(run)).phase == "finished"


async def test_a_plain_run_takes_no_payload_and_a_norm_is_that_of_the_numbers(daemon: Daemon) -> None:
    codec, spec = Codec("rotq8"), spec_of({}, rounds=1, cohort__min_clients=1)
    (site,) = await daemon.arrive("a")
    run = (await daemon.submit(spec)).run
    task, data = await site.task(), payload_of(spec, run, "a", codec)
    with pytest.raises(MalformedPayload, match="this run takes the numbers themselves"):
        await site.send(site.header(task, data, codec="rotq8"), chunks(data))
    await daemon.stop(run)
    rule = {"max_norm": 1.0, "over_norm": "refuse"}
    spec = spec_of({"upload": "rotq8"}, rounds=1, cohort__min_clients=1, aggregation=rule)
    run = (await daemon.submit(spec)).run
    await site.task(TaskKind.CANCEL)
    task, data = await site.task(), payload_of(spec, run, "a", codec)  # about 1.3 long
    with pytest.raises(UpdateOutOfRange, match=r"an update has the norm 1\.3.*; the run takes 1 at most"):
        await site.send(site.header(task, data, codec="rotq8"), chunks(data))
    await daemon.stop(run)


async def test_a_broken_upload_of_a_payload_goes_on_where_it_broke(daemon: Daemon) -> None:
    spec = spec_of(
        {"upload": "rotq8"}, model={"kind": "lstm", "hidden": 420, "layers": 1}, rounds=1, cohort__min_clients=1
    )
    (site,) = await daemon.arrive("a")
    run = (await daemon.submit(spec)).run
    task, data = await site.task(), payload_of(spec, run, "a", Codec("rotq8"))
    what, parts = site.header(task, data, codec="rotq8"), chunks(data)
    assert len(parts) == 2
    with pytest.raises(BrokenTransfer, match="go on from there"):
        await site.send(what, parts[:1])
    assert await site.status(task, data) == (CHUNK_BYTES, False)
    upload = await site.begin(replace(what, offset=CHUNK_BYTES))
    await upload.write(*parts[1])
    await daemon.until(run, lambda view: view.bytes_up >= len(data))
    upload.cut()  # between the last byte and the end of the stream
    assert not await site.send(replace(what, offset=len(data)), [])
    assert (await daemon.end(run)).phase == "finished"
    key = Key(spec.seed, run, 1, "a")
    sent = np.concatenate(list(decode(data, layout_of(spec), key, Codec("rotq8"))))
    assert (await model_of(daemon, run, spec) == averaged(initial_parameters(spec).flat, (1, sent))).all()


# Restarts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["update-committed", "model-written", "model-committed"])
async def test_a_killed_server_ends_with_the_same_bits(
    tmp_path: Path, servers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setattr("seqfed.client.session.LONGEST_WAIT", 0.2)  # seconds between two dials
    spec = spec_of(CODECS["topk"][0])
    address = await start(servers, tmp_path, "0", [*KILLED, point, "2"])
    async with running(*(session_of(Formula(name), address, Packer(tmp_path / name)) for name in CLIENTS)):
        run = await submitted(address, spec)
        seeing = asyncio.create_task(seen_through(address, run))
        assert await asyncio.to_thread(servers[0].wait) == -9
        await start(servers, tmp_path, address.rpartition(":")[2], CHILD)
        view, records = await soon(seeing)
        assert view.phase == "finished"
        model = await exported(address, run, spec, tmp_path)
    assert model.tobytes() == replayed(spec, run, [one for _, one in sorted(records.items())]).tobytes()


@pytest.mark.parametrize("kept", [True, False])
async def test_what_a_client_left_out_outlasts_it(daemon: Daemon, tmp_path: Path, kept: bool) -> None:
    spec = spec_of(CODECS["topk"][0])
    packers = {name: Packer(tmp_path / name) for name in CLIENTS}
    formula = Formula("c")
    begun, may_go_on = formula.gate(3)
    async with running(*(session_of(Formula(name), daemon.address, packers[name]) for name in "ab")):
        async with running(session_of(formula, daemon.address, packers["c"])):
            run = (await daemon.submit(spec)).run
            assert await asyncio.to_thread(begun.wait, 30)
        may_go_on.set()
        again = Packer(tmp_path / "c" if kept else None)
        async with running(session_of(Formula("c"), daemon.address, again)):
            view = await daemon.end(run)
    assert view.phase == "finished"
    same = (await model_of(daemon, run, spec)).tobytes() == replayed(spec, run, view.history).tobytes()
    assert same == kept


async def test_whether_an_update_counted_is_asked_where_the_answer_was_lost(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(CODECS["topk"][0], aggregation={"weighting": "uniform"})
    submit, lost = Connection.submit_update, list[int]()

    async def unheard(self: Connection, header: UpdateHeader, *rest: Any) -> float:
        found = await submit(self, header, *rest)
        if header.weight == 7 and header.key.round in {1, 3}:
            lost.append(header.key.round)
            await asyncio.Event().wait()  # until the next round's task puts an end to it
        return found

    class Marked(Formula):
        def train(self, *given: Any) -> LocalUpdate:  # pyright: ignore[reportIncompatibleMethodOverride]
            return replace(super().train(*given), weight=7)

    monkeypatch.setattr(Connection, "submit_update", unheard)
    formulas = [Formula("a"), Formula("b"), Marked("c")]
    async with running(*(session_of(one, daemon.address) for one in formulas)):
        run = (await daemon.submit(spec)).run
        view = await daemon.end(run)
    assert lost == [1, 3]
    assert (await model_of(daemon, run, spec)).tobytes() == replayed(spec, run, view.history).tobytes()


async def test_left_to_the_client_a_small_update_goes_whole(daemon: Daemon) -> None:
    spec = spec_of({"upload": "auto", "download": "auto"})
    async with running(*(session_of(Formula(name), daemon.address) for name in CLIENTS)):
        run = (await daemon.submit(spec)).run
        view = await daemon.end(run)
    assert view.phase == "finished"
    assert (await model_of(daemon, run, spec)).tobytes() == undisturbed(spec, CLIENTS).tobytes()
    for record in view.history:
        assert sum(up for up, _ in record.traffic.values()) == record.bytes_up
        assert sum(down for _, down in record.traffic.values()) == record.bytes_down
        assert sorted(record.traffic) == list(CLIENTS)


# Masked sums ----------------------------------------------------------------------------------------------------------


WIDE = {"kind": "rnn", "hidden": 64, "layers": 1}  # 4,482 numbers
# Settings, and the bits of a number in a sum of four.
MASKED: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "rotq8": ({"upload": "rotq8"}, {}, 10),
    "rotq4": ({"upload": "rotq4"}, {}, 6),
    "rotsub": ({"upload": "rotsub", "fraction": 0.25}, {"b": 8}, 8),
    "rotsub, tuned": ({"upload": "rotsub", "fraction": 0.25, "wrap": 6e-5}, {}, 5),
    "all of it, tuned": ({"upload": "rotsub", "fraction": 1.0, "wrap": 1e-3}, {"b": 6}, 6),
    "powersgd": ({"upload": "powersgd", "rank": 2}, {"b": 12}, 12),
}


def masked_replay(spec: RunSpec, bits: int, records: Iterable[RoundRecord]) -> Flat:
    """As `maskers.replayed`, of what the uploads are."""
    given, private, model = spec.compression, spec.privacy, initial_parameters(spec).flat
    deviation: float | None = None
    factor: Flat | None = None
    left = {client: np.zeros_like(model) for client in "abcd"}
    for record in records:
        code: Any = rotsub if given.upload == "rotsub" else quantising
        how: Any
        seed, clients, size = derive(spec.seed, record.round, "rotation"), len(record.cohort), len(model)
        updates = {client: delta_of(client, record.round, model) for client in record.folded}
        side = None
        if given.upload == "powersgd":
            side = lowrank.side(lowrank.Plan(layout_of(spec), given.rank or 4), record.round, factor, spec.seed)
            for client, delta in updates.items():
                whole, _ = quantising.shortened(delta + left[client], private.clip)
                updates[client] = side.project(whole)
                left[client] = whole - side.rebuild(updates[client])
            how = Lattice(side.size, bits, quantising.levels(bits, clients), private.clip)
        elif given.fraction is None:
            how = Lattice(size, bits, {"rotq8": 127, "rotq4": 7}[given.upload], private.clip)
        elif given.wrap is None:
            how = rotsub.bounded(size, given.fraction, bits, clients, private.clip)
        else:
            how = rotsub.tuned(size, given.fraction, bits, clients, private.clip, deviation, given.wrap)
        total, weights = np.zeros(how.size if isinstance(how, rotsub.Part) else how.dim, np.int64), 0
        for client in record.folded:
            weight = min(examples_of(client), 25)
            rounding = generator(spec.seed, record.round, client, "rounding")
            residues, _ = code.quantise(updates[client], weight / 25, how, seed, rounding)
            total += residues.astype(np.int64)
            weights += weight
        residues = (total % (1 << bits)).astype(how.dtype)
        if given.wrap is not None:
            deviation = rotsub.deviation_of(residues, how, len(record.folded))
        mean = code.decode(residues, how, seed, clients=len(record.folded), weight=weights, max_weight=25)
        if side is not None:
            factor, mean = mean[: side.factor], side.rebuild(mean)
        model = model + mean
    return model


def maskers_of(address: str, folder: Path, names: str) -> list[Session]:
    introduce(folder, names)
    return [
        masked_session(Masker(name), address, masking_of(name, folder / name, None, folder / "peers.toml"))
        for name in names
    ]


@pytest.mark.parametrize(("compression", "private", "bits"), MASKED.values(), ids=MASKED)
async def test_a_masked_run_is_what_its_uploads_functions_come_to(
    daemon: Daemon, tmp_path: Path, compression: dict[str, Any], private: dict[str, Any], bits: int
) -> None:
    spec = masked_spec(
        rounds=4,
        model=WIDE,
        evaluation={"every": 0},
        privacy=private,
        compression=compression,
    )
    async with running(*maskers_of(daemon.address, tmp_path, "abcd")):
        run = (await daemon.submit(spec)).run
        view = await daemon.end(run)
    assert (view.phase, view.reason) == ("finished", "all 4 rounds are done")
    assert (await model_of(daemon, run, spec)).tobytes() == masked_replay(spec, bits, view.history).tobytes()
    size, plan = compression.get("fraction", 1.0) * layout_of(spec).size, lowrank.Plan(layout_of(spec), 2)
    for record in view.history:
        if compression["upload"] == "powersgd":
            size = (plan.first if record.round % 2 else plan.middle) + plan.whole
        assert 0 < record.bytes_up / 4 - size * bits / 8 < 4000  # beside the numbers: keys, shares, signatures


@pytest.mark.parametrize("name", ["rotsub, tuned", "powersgd"])
async def test_a_killed_server_goes_on_with_what_the_last_sum_told(
    tmp_path: Path, servers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("seqfed.client.session.LONGEST_WAIT", 0.2)  # seconds between two dials
    compression, private, bits = MASKED[name]
    spec = masked_spec(
        rounds=4,
        model=WIDE,
        evaluation={"every": 0},
        privacy=private,
        compression=compression,
        cohort={"count": 4, "min_clients": 4},
    )
    address = await start(servers, tmp_path, "0", [*KILLED, "model-committed", "2"])
    async with running(*maskers_of(address, tmp_path, "abcd")):
        run = await submitted(address, spec)
        seeing = asyncio.create_task(seen_through(address, run))
        assert await asyncio.to_thread(servers[0].wait) == -9
        await start(servers, tmp_path, address.rpartition(":")[2], CHILD)
        view, records = await soon(seeing)
        assert view.phase == "finished"
        model = await exported(address, run, spec, tmp_path)
    history = [one for _, one in sorted(records.items())]
    assert model.tobytes() == masked_replay(spec, bits, history).tobytes()
    left = sorted(path.suffix for path in (tmp_path / "state" / "models" / run).iterdir())
    assert left.count(".known") <= 2


async def test_what_was_left_out_comes_back_from_a_sum_that_came_to_nothing(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compression, private, bits = MASKED["powersgd"]
    spec = masked_spec(
        survivors=4,
        rounds=3,
        model=WIDE,
        evaluation={"every": 0},
        privacy={**private, "step_s": 1.0},
        compression=compression,
    )
    mask, held = Connection.mask, list[int]()

    async def holding(self: Connection, key: TaskKey, number: int, step: Any, *rest: Any) -> Any:
        if isinstance(step, KeyShares) and key.round == 2 and not held:
            held.append(number)
            await asyncio.Event().wait()  # until the sum is given up for another
        return await mask(self, key, number, step, *rest)

    monkeypatch.setattr(Connection, "mask", holding)
    async with running(*maskers_of(daemon.address, tmp_path, "abcd")):
        run = (await daemon.submit(spec)).run
        view = await daemon.end(run)
    assert (view.phase, held) == ("finished", [2])
    assert (await model_of(daemon, run, spec)).tobytes() == masked_replay(spec, bits, view.history).tobytes()


async def test_a_sum_that_outgrew_its_step_leaves_the_model_as_it_is(
    daemon: Daemon, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And the steps after it are larger until they suffice."""

    class Growing(Masker):
        def train(self, task: Task, *given: Any, **more: Any) -> LocalUpdate:  # pyright: ignore[reportIncompatibleMethodOverride]
            found = super().train(task, *given, **more)
            return replace(found, delta=found.delta * np.float32(0.05 if task.key.round < 4 else 1.0))

    spec = masked_spec(
        rounds=8,
        model=WIDE,
        evaluation={"every": 0},
        compression=MASKED["rotsub, tuned"][0],
    )
    introduce(tmp_path, "abcd")
    sessions = [
        masked_session(Growing(one), daemon.address, masking_of(one, tmp_path / one, None, tmp_path / "peers.toml"))
        for one in "abcd"
    ]
    async with running(*sessions):
        run = (await daemon.submit(spec)).run
        view = await daemon.end(run)
    assert (view.phase, view.reason) == ("finished", "all 8 rounds are done")
    told = [one.getMessage() for one in caplog.records if "the model stays as it is" in one.getMessage()]
    assert 1 <= len(told) <= 4
    assert [one.round for one in view.history] == list(range(1, 9))


# Downloads ------------------------------------------------------------------------------------------------------------


def arrived(spec: RunSpec, run: str, round_: int, client: str, model: Flat) -> Flat:
    """A client's update as the server has it, by a codec that keeps nothing."""
    delta, key, layout = delta_of(client, round_, model), Key(spec.seed, run, round_, client), layout_of(spec)
    for codec in uploads(spec).values():
        return np.concatenate(list(decode(encode(delta, layout, key, codec).payload, layout, key, codec)))
    return delta


def followed(spec: RunSpec, run: str, records: Iterable[RoundRecord]) -> Flat:
    """The model after these rounds, if each is the last plus what the difference's payload says."""
    layout, model = layout_of(spec), initial_parameters(spec).flat
    codec, left = Codec(spec.compression.download), None
    for record in records:
        deltas = [(EXAMPLES, arrived(spec, run, record.round, client, model)) for client in record.folded]
        key = Key(spec.seed, run, record.round)
        made = encode(averaged(model, *deltas) - model, layout, key, codec, left)
        model, left = model + np.concatenate(list(decode(made.payload, layout, key, codec))), made.residual
    return model


@pytest.mark.parametrize("given", ["delta8", "delta4"])
@pytest.mark.parametrize("model", [ONE, SEVERAL], ids=["one chunk", "several"])
async def test_models_come_as_differences(daemon: Daemon, given: str, model: dict[str, Any]) -> None:
    spec = spec_of({"download": given}, rounds=6, model=model, evaluation__every=1)
    async with running(*(session_of(Formula(name), daemon.address) for name in CLIENTS)):
        run = (await daemon.submit(spec)).run
        view = await daemon.end(run)
    assert view.phase == "finished"
    assert (await model_of(daemon, run, spec)).tobytes() == followed(spec, run, view.history).tobytes()
    whole, step = layout_of(spec).nbytes, largest(Codec(given), layout_of(spec))
    assert view.bytes_down < 3 * (whole + 6 * step + 6 * 2 * 4000)


@pytest.mark.parametrize("back", [5, 10])
async def test_a_client_that_missed_rounds_takes_the_steps_or_the_whole_model(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: int
) -> None:
    spec = spec_of({"download": "delta4"}, rounds=back + 1, cohort__min_clients=2, model=SEVERAL)
    fetched: list[tuple[str, int, bool]] = []
    fetch = Connection.fetch_model

    async def noted(self: Connection, run: str, version: int, *rest: Any, step: bool = False) -> None:
        fetched.append((self.name, version, step))  # type: ignore[attr-defined]
        await fetch(self, run, version, *rest, step=step)

    join = Connection.join

    async def named(self: Connection, client: str, *rest: Any) -> float:
        self.name = client  # type: ignore[attr-defined]
        return await join(self, client, *rest)

    monkeypatch.setattr(Connection, "fetch_model", noted)
    monkeypatch.setattr(Connection, "join", named)
    slow = Formula("a")
    (begun, may_go_on), (again, and_again) = slow.gate(3), slow.gate(back)
    async with running(session_of(slow, daemon.address), session_of(Formula("b"), daemon.address)):
        async with running(session_of(Formula("c"), daemon.address, Packer(tmp_path / "c"))):
            await connected(daemon, 3)
            run = (await daemon.submit(spec)).run
            assert await asyncio.to_thread(begun.wait, 30)
            await daemon.until(run, lambda view: view.round == 3 and view.pending == ("a",))
        await connected(daemon, 2)
        may_go_on.set()
        assert await asyncio.to_thread(again.wait, 30)
        before = len(fetched)
        late = Formula("c")
        async with running(session_of(late, daemon.address, Packer(tmp_path / "c"))):
            await connected(daemon, 3)
            and_again.set()
            view = await daemon.end(run)
    assert [round_ for round_, _ in late.trained] == [back + 1]
    mine = [(version, step) for name, version, step in fetched[before:] if name == "c"]
    assert mine == ([(3, True), (4, True), (5, True)] if back == 5 else [(10, False)])
    assert (await model_of(daemon, run, spec)).tobytes() == followed(spec, run, view.history).tobytes()


async def connected(daemon: Daemon, count: int) -> None:
    """Wait until just so many clients are."""
    async with asyncio.timeout(30):
        while sum(one.connected for one in (await daemon.clients()).values()) != count:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.02)


async def test_a_server_that_lies_about_its_steps_is_asked_for_the_whole_model(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of({"download": "delta8"})
    view_of = steps.Step.view

    def lying(self: steps.Step, *, whole: bool = False) -> ModelStep:
        found = view_of(self, whole=whole)
        return {
            1: replace(found, nbytes=1 << 40, data=b""),
            2: replace(found, digest=bytes(32)),
            3: replace(found, data=found.data[:-1], nbytes=found.nbytes - 1, digest=blake3(found.data[:-1]).digest()),
        }[self.version]

    monkeypatch.setattr(steps.Step, "view", lying)
    async with running(*(session_of(Formula(name), daemon.address) for name in CLIENTS)):
        run = (await daemon.submit(spec)).run
        view = await daemon.end(run)
    assert view.phase == "finished"
    assert (await model_of(daemon, run, spec)).tobytes() == followed(spec, run, view.history).tobytes()


@pytest.mark.parametrize("point", ["folded", "model-written", "model-committed"])
async def test_a_killed_server_goes_on_with_what_its_payloads_left_out(
    tmp_path: Path, servers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setattr("seqfed.client.session.LONGEST_WAIT", 0.2)  # seconds between two dials
    spec = spec_of({"download": "delta4", "upload": "rotq8"})
    address = await start(servers, tmp_path, "0", [*KILLED, point, "2"])
    async with running(*(session_of(Formula(name), address) for name in CLIENTS)):
        run = await submitted(address, spec)
        seeing = asyncio.create_task(seen_through(address, run))
        assert await asyncio.to_thread(servers[0].wait) == -9
        await start(servers, tmp_path, address.rpartition(":")[2], CHILD)
        view, records = await soon(seeing)
        assert view.phase == "finished"
        model = await exported(address, run, spec, tmp_path)
    assert model.tobytes() == followed(spec, run, [one for _, one in sorted(records.items())]).tobytes()
    left = sorted(path.suffix for path in (tmp_path / "state" / "models" / run).iterdir())
    assert left.count(".rest") <= 2
    assert left.count(".safetensors") <= 2
