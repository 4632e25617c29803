"""The services over real gRPC: what good clients and operators get, and how each wrong call is refused."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from blake3 import blake3
from tests.server.conftest import (
    BIG,
    SCHEMA,
    Daemon,
    Site,
    a_daemon,
    averaged,
    chunks,
    flat_of,
    make_spec,
    some_delta,
    soon,
    typed,
)

from seqfed.common import checkpoint, views, wire
from seqfed.common.errors import (
    BrokenTransfer,
    CheckpointError,
    ChecksumMismatch,
    ConfigError,
    DuplicateUpdate,
    InvalidName,
    LayoutMismatch,
    NameTaken,
    NoModel,
    NonFiniteUpdate,
    RunEnded,
    SeqfedError,
    TooLarge,
    UnknownRun,
    UnknownSession,
    UpdateOutOfRange,
    VersionMismatch,
    WrongRound,
)
from seqfed.common.layout import Flat, Parameters
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.spec import RunSpec
from seqfed.common.transfer import CHUNK_BYTES
from seqfed.common.views import TaskKind
from seqfed.v1 import admin_pb2, federation_pb2

SIZE = 42  # parameters of the small model


def schema(**changes: Any) -> bytes:
    return json.dumps({**json.loads(SCHEMA), **changes}).encode()


async def train(sites: list[Site], round_: int = 1, size: int = SIZE) -> None:
    """Every site does its training task of this round well."""
    for number, site in enumerate(sites):
        task = await site.task()
        assert task.key.round == round_
        assert not await site.submit(task, some_delta(size, number, round_), weight=number + 1)


async def model_of(daemon: Daemon, run: str, size: int = SIZE) -> Flat:
    return flat_of(await daemon.export(run), size)


# Join and Listen ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a b", "../x", ".hidden", "x" * 65, "a/b", "ä", "a\n", "a\0"])
async def test_a_bad_name_is_refused(daemon: Daemon, name: str) -> None:
    with pytest.raises(InvalidName, match="use 1 to 64 of"):
        await daemon.site("a").join(client=name)


@pytest.mark.parametrize("instance", ["", "0", "xyz", "A" * 32, "0" * 33])
async def test_a_bad_instance_is_refused(daemon: Daemon, instance: str) -> None:
    with pytest.raises(InvalidName, match="32 hex digits"):
        await daemon.site("a").join(instance=instance)


@pytest.mark.parametrize("version", [0, 2, 4_000_000_000])
async def test_another_version_of_the_protocol_is_refused(daemon: Daemon, version: int) -> None:
    with pytest.raises(VersionMismatch, match=f"speaks version {version} .* this server 1; run the same version"):
        await daemon.site("a").join(protocol=version)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "Invalid JSON"),
        (b"\xff\xfe", "Invalid JSON"),
        (b"[" * 10_000, "Invalid JSON"),
        (b"[]", "data schema"),
        (b"{}", "'examples' is missing"),
        (schema(features=0), "'features' = 0"),
        (schema(features="many"), "'features' = 'many'"),
        (schema(features=1e400), "features"),
        (schema(featuers=1), "unknown key 'featuers'; did you mean 'features'"),
    ],
)
async def test_a_bad_schema_is_refused_with_its_mistake(daemon: Daemon, content: bytes, told: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        await daemon.site("a").join(data_schema=content)
    assert told in str(refusal.value)


async def test_a_refusal_of_any_length_arrives_as_what_it_is(daemon: Daemon) -> None:
    garbage = schema(**{f"key-{number}": number for number in range(5000)})
    with pytest.raises(ConfigError, match="unknown key 'key-0'") as refusal:
        await daemon.site("a").join(data_schema=garbage)
    assert len(str(refusal.value)) < 8000  # HTTP/2 peers refuse longer headers


async def test_a_name_in_use_is_refused_and_free_again_later(daemon: Daemon) -> None:
    await daemon.arrive("a")
    run = await daemon.submit(make_spec())
    await daemon.until(run.run, lambda view: "here: a" in view.reason)
    other = daemon.site("a")
    with pytest.raises(NameTaken, match="another client is connected as 'a'; give this one another --name"):
        await other.join(instance="f" * 32)
    await daemon.sites[0].leave()
    await daemon.until(run.run, lambda view: "nobody is here" in view.reason)
    await other.join(instance="f" * 32)


def calls(site: Site) -> list[Callable[[], Any]]:
    """Every call that needs a session."""
    key = federation_pb2.TaskKey(run="0" * 16, round=1, attempt=1)

    async def no_updates() -> AsyncIterator[federation_pb2.SubmitUpdateRequest]:
        yield federation_pb2.SubmitUpdateRequest(header=federation_pb2.UpdateHeader(key=key))

    async def first(stream: Any) -> None:
        async for _ in stream:
            return

    def meta() -> Any:
        return {"metadata": site.metadata}

    return [
        lambda: first(site.stub.Listen(federation_pb2.ListenRequest(), **meta())),
        lambda: first(site.stub.FetchModel(federation_pb2.FetchModelRequest(run="0"), **meta())),
        lambda: site.stub.UploadStatus(federation_pb2.UploadStatusRequest(key=key), **meta()),
        lambda: site.stub.SubmitUpdate(no_updates(), **meta()),
        lambda: site.stub.SubmitEvaluation(federation_pb2.SubmitEvaluationRequest(key=key), **meta()),
        lambda: site.stub.ReportFailure(federation_pb2.ReportFailureRequest(key=key), **meta()),
    ]


@pytest.mark.parametrize("number", range(6))
async def test_a_call_needs_a_session(daemon: Daemon, number: int) -> None:
    site = daemon.site("a")
    for metadata, told in (
        ((), "no 'seqfed-session' metadata; join first"),
        (((wire.SESSION_METADATA, "0" * 32),), "join again"),
    ):
        site.metadata = metadata
        with pytest.raises(UnknownSession, match=told), typed():
            await soon(calls(site)[number]())


async def test_the_same_instance_replaces_its_session(daemon: Daemon) -> None:
    spec = make_spec(cohort__min_clients=1)
    (site,) = await daemon.arrive("a")
    await daemon.submit(spec)
    await site.task()
    old = daemon.site("a")
    old.metadata, old.tasks = site.metadata, site.tasks
    await site.come()
    assert await soon(old.tasks.get()) is None  # its stream has ended
    with pytest.raises(UnknownSession):
        await old.fail(await site.task())  # and the new session is asked what the old one was asked


async def test_a_client_that_joins_again_and_never_listens_is_absent(daemon: Daemon) -> None:
    sites = await daemon.arrive("a", "b")
    run = await daemon.submit(make_spec(rounds=2, evaluation__every=1))
    await train(sites)
    task = await sites[0].task(TaskKind.EVALUATE)
    await sites[1].join()
    await sites[0].score(task, {"examples": 1})
    view = await daemon.until(run.run, lambda view: view.round == 2)
    assert "here: a" in view.reason
    assert view.history[0].evaluated_examples == 1


# FetchModel -----------------------------------------------------------------------------------------------------------


async def test_a_model_is_fetched_from_any_offset(daemon: Daemon) -> None:
    spec = make_spec(model=BIG, cohort__min_clients=1)
    (site,) = await daemon.arrive("a")
    await daemon.submit(spec)
    task = await site.task()
    whole = initial_parameters(spec).flat.tobytes()
    assert task.model == views.ModelVersion(0, len(whole), blake3(whole).digest(), layout_of(spec).digest)
    for offset in (0, 4, CHUNK_BYTES, CHUNK_BYTES + 8, 2 * CHUNK_BYTES, len(whole) - 4, len(whole), len(whole) + 4):
        assert await site.fetch(task, offset) == whole[offset:]
    assert await site.fetch(task, (1 << 64) - 4) == b""


async def test_no_message_holds_more_than_a_chunk(daemon: Daemon) -> None:
    (site,) = await daemon.arrive("a")
    await daemon.submit(make_spec(model=BIG, cohort__min_clients=1))
    task = await site.task()
    request = federation_pb2.FetchModelRequest(run=task.key.run, version=0)
    sizes = [len(chunk.data) async for chunk in site.stub.FetchModel(request, metadata=site.metadata)]
    assert sizes == [CHUNK_BYTES, CHUNK_BYTES, task.model.nbytes - 2 * CHUNK_BYTES]


async def test_only_the_current_version_is_served(daemon: Daemon) -> None:
    sites = await daemon.arrive("a", "b")
    await daemon.submit(make_spec(rounds=2))
    old = [await site.task() for site in sites]
    for site, task in zip(sites, old, strict=True):
        await site.submit(task, some_delta(SIZE, 1))
    new = await sites[0].task()
    assert (new.key.round, new.model.version) == (2, 1)
    with pytest.raises(NoModel, match=r"version 0 .* is not served; the current one is 1"):
        await sites[0].fetch(old[0])
    with pytest.raises(NoModel):
        await sites[0].fetch(replace(new, model=replace(new.model, version=7)))
    with pytest.raises(UnknownRun):
        await sites[0].fetch(replace(new, key=replace(new.key, run="0" * 16)))


# SubmitUpdate ---------------------------------------------------------------------------------------------------------


async def test_a_round_is_the_weighted_mean_of_its_updates(daemon: Daemon) -> None:
    spec = make_spec()
    sites = await daemon.arrive("a", "b")
    run = await daemon.submit(spec)
    await train(sites)
    view = await daemon.end(run.run)
    assert (view.phase, view.reason) == ("finished", "all 1 rounds are done")
    deltas = [(number + 1, some_delta(SIZE, number, 1)) for number in range(2)]
    assert (await model_of(daemon, run.run) == averaged(initial_parameters(spec).flat, *deltas)).all()
    (record,) = view.history
    assert (record.round, record.attempt, record.cohort) == (1, 1, ("a", "b"))
    assert sorted(record.folded) == ["a", "b"]
    assert record.training == {"examples": 2, "loss": 2 << 20}
    assert (record.bytes_up, record.slowest_training_seconds) == (sum(site.up for site in sites), 0.25)
    assert {name: up for name, (up, _) in record.traffic.items()} == {site.name: site.up for site in sites}
    assert 0 <= record.seconds < 60


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
async def test_every_order_of_arrival_gives_the_same_bits(daemon: Daemon, weighting: str) -> None:
    sites = {site.name: site for site in await daemon.arrive(*"abc")}
    models = set()
    for order in itertools.permutations("abc"):
        run = await daemon.submit(make_spec(cohort__min_clients=3, aggregation__weighting=weighting))
        tasks = {name: await site.task() for name, site in sites.items()}
        for name in order:
            await sites[name].submit(tasks[name], some_delta(SIZE, ord(name)), weight=ord(name))
        view = await daemon.end(run.run)
        assert view.history[0].folded == order
        models.add((await model_of(daemon, run.run)).tobytes())
    assert len(models) == 1


async def test_uniform_weighting_counts_every_update_the_same(daemon: Daemon) -> None:
    spec = make_spec(aggregation={"weighting": "uniform"})
    sites = await daemon.arrive("a", "b")
    run = await daemon.submit(spec)
    deltas = [some_delta(SIZE, 1), some_delta(SIZE, 2)]
    for site, delta, weight in zip(sites, deltas, (1, 1 << 40), strict=True):
        await site.submit(await site.task(), delta, weight=weight)
    assert (await daemon.end(run.run)).phase == "finished"
    expected = averaged(initial_parameters(spec).flat, *((1, delta) for delta in deltas))
    assert (await model_of(daemon, run.run) == expected).all()


async def test_long_updates_count_scaled_down_the_same_in_any_order_and_after_a_restart(tmp_path: Path) -> None:
    spec = make_spec(cohort__min_clients=3, aggregation={"max_norm": 0.03})
    factors = {"a": 0.1, "b": 1, "c": 1e6}
    deltas = {name: some_delta(SIZE, ord(name)) * np.float32(factor) for name, factor in factors.items()}
    norms = {name: np.sqrt(np.sum(delta.astype(np.float64) ** 2)) for name, delta in deltas.items()}
    assert norms["a"] < 0.03 < norms["b"]
    near = np.zeros(SIZE)
    for name, delta in deltas.items():
        near += ord(name) * min(1.0, 0.03 / norms[name]) * delta.astype(np.float64)
    near = initial_parameters(spec).flat + near / sum(map(ord, deltas))
    models = set()
    for order, stop in (("abc", None), ("cba", 2), ("bca", 1)):
        async with contextlib.AsyncExitStack() as stack:
            daemon = await stack.enter_async_context(a_daemon(tmp_path / order))
            run = (await daemon.submit(spec)).run
            sites = {site.name: site for site in await daemon.arrive(*"abc")}
            for name in order[:stop]:
                await sites[name].submit(await sites[name].task(), deltas[name], weight=ord(name))
            if stop is not None:
                await stack.aclose()
                daemon = await stack.enter_async_context(a_daemon(tmp_path / order))
                sites = {site.name: site for site in await daemon.arrive(*"abc")}
                for name in order[stop:]:
                    await sites[name].submit(await sites[name].task(), deltas[name], weight=ord(name))
            assert (await daemon.end(run)).phase == "finished"
            models.add((await model_of(daemon, run)).tobytes())
    (model,) = models
    assert np.frombuffer(model, "<f4") == pytest.approx(near, abs=1e-7)


async def test_a_long_update_is_refused_where_the_run_says_so_and_the_round_goes_on(daemon: Daemon) -> None:
    spec = make_spec(
        cohort={"min_clients": 3, "quorum": 2}, aggregation={"max_norm": 1.0, "over_norm": "refuse"}, rounds=1
    )
    a, b, c = await daemon.arrive(*"abc")
    run = (await daemon.submit(spec)).run
    task = await c.task()
    with pytest.raises(UpdateOutOfRange, match=r"has the norm 1\.\d+e\+08; the run takes 1 at most") as refusal:
        await c.submit(task, np.full(SIZE, 2e7, np.float32))
    await c.fail(task, "UpdateOutOfRange", str(refusal.value))
    deltas = [some_delta(SIZE, 1), some_delta(SIZE, 2)]
    for site, delta in zip((a, b), deltas, strict=True):
        await site.submit(await site.task(), delta)
    assert (await daemon.end(run)).history[0].folded == ("a", "b")
    expected = averaged(initial_parameters(spec).flat, *((1, delta) for delta in deltas))
    assert (await model_of(daemon, run) == expected).all()


async def test_no_update_counts_for_more_examples_than_the_run_allows(daemon: Daemon) -> None:
    spec = make_spec(aggregation={"max_weight": 3})
    deltas = [some_delta(SIZE, 1), some_delta(SIZE, 2)]
    sites = await daemon.arrive("a", "b")
    run = (await daemon.submit(spec)).run
    for site, delta, weight in zip(sites, deltas, (2, 1 << 40), strict=True):
        await site.submit(await site.task(), delta, weight=weight)
    assert (await daemon.end(run)).phase == "finished"
    expected = averaged(initial_parameters(spec).flat, (2, deltas[0]), (3, deltas[1]))
    assert (await model_of(daemon, run) == expected).all()


async def test_a_client_whose_policy_forbids_the_run_is_asked_once_and_its_operator_sees_the_rule(
    daemon: Daemon,
) -> None:
    spec = make_spec(rounds=3, cohort={"min_clients": 2, "count": 2})
    sites = {site.name: site for site in await daemon.arrive(*"abc")}
    run = (await daemon.submit(spec)).run
    refusing = (await daemon.until(run, lambda view: view.phase == "training")).cohort[0]
    await sites[refusing].fail(await sites[refusing].task(), "PolicyRefused", "max_rounds: 3, and the limit is 2")
    view = await daemon.until(run, lambda view: view.attempt == 2)
    assert f"{refusing} declines: PolicyRefused: max_rounds: 3, and the limit is 2" in view.reason
    for number, attempt in ((1, 2), (2, 1), (3, 1)):
        for name in sorted({*"abc"} - {refusing}):
            task = await sites[name].task()
            while (task.key.round, task.key.attempt) != (number, attempt):  # of the attempt that was given up
                task = await soon_trains(sites[name])
            await sites[name].submit(task, some_delta(SIZE, ord(name), number))
    assert (await daemon.end(run)).phase == "finished"
    assert sites[refusing].tasks.empty()
    again = (await daemon.submit(spec)).run  # of another run all are asked anew
    asked = (await daemon.until(again, lambda view: view.phase == "training")).cohort
    assert len(asked) == 2
    assert (await daemon.stop(again)).phase == "stopped"


async def test_a_run_that_too_many_decline_pauses_and_leaves_its_turn_to_the_next(daemon: Daemon) -> None:
    sites = await daemon.arrive("a", "b")
    run, other = (await daemon.submit(make_spec())).run, (await daemon.submit(make_spec(name="other"))).run
    await sites[0].fail(await sites[0].task(), "PolicyRefused", "operators: not you")
    view = await daemon.until(run, lambda view: view.phase == "paused")
    assert view.reason == ("round 1: a declines: PolicyRefused: operators: not you; `seqfed resume` asks them again")
    assert (await daemon.until(other, lambda view: view.phase == "training")).cohort == ("a", "b")


async def soon_trains(site: Site) -> views.Task:
    """The site's next training, whatever it is told before."""
    while True:
        task = await soon(site.tasks.get())
        assert task is not None
        if task.kind is TaskKind.TRAIN:
            return task


def with_bad_number(bad: float) -> bytes:
    numbers = some_delta(SIZE, 9)
    numbers[17] = bad
    return numbers.tobytes()


GOOD = some_delta(SIZE, 0, 1).tobytes()
REFUSALS: dict[str, tuple[type[SeqfedError], dict[str, Any], bytes, list[tuple[int, bytes]] | None]] = {
    "a later round": (WrongRound, {"round": 2}, GOOD, None),
    "an earlier round": (WrongRound, {"round": 0}, GOOD, None),
    "a later attempt": (WrongRound, {"attempt": 2}, GOOD, None),
    "no attempt": (WrongRound, {"attempt": 0}, GOOD, None),
    "no such run": (UnknownRun, {"run": "0" * 16}, GOOD, None),
    "nan": (NonFiniteUpdate, {}, with_bad_number(np.nan), None),
    "inf": (NonFiniteUpdate, {}, with_bad_number(-np.inf), None),
    "another layout": (LayoutMismatch, {"layout_digest": bytes(32)}, GOOD, None),
    "no layout": (LayoutMismatch, {"layout_digest": b""}, GOOD, None),
    "too few bytes": (LayoutMismatch, {}, GOOD[:-4], None),
    "no bytes": (LayoutMismatch, {}, b"", None),
    "too many bytes": (TooLarge, {}, GOOD + bytes(4), None),
    "far too many bytes": (TooLarge, {"nbytes": 1 << 63}, GOOD, None),
    "a wrong checksum": (ChecksumMismatch, {"digest": bytes(32)}, GOOD, None),
    "half a checksum": (BrokenTransfer, {"digest": bytes(16)}, GOOD, None),
    "no weight": (UpdateOutOfRange, {"weight": 0}, GOOD, None),
    "too much weight": (UpdateOutOfRange, {"weight": (1 << 40) + 1}, GOOD, None),
    "a huge delta": (UpdateOutOfRange, {}, with_bad_number(1e30), None),
    "a huge product": (UpdateOutOfRange, {"weight": 1 << 40}, with_bad_number(1.0), None),
    "an offset out of nowhere": (BrokenTransfer, {"offset": 8}, GOOD, None),
    "no chunks": (BrokenTransfer, {}, GOOD, []),
    "an empty chunk": (BrokenTransfer, {}, GOOD, [(0, b""), (0, GOOD)]),
    "a short chunk": (BrokenTransfer, {}, GOOD, [(0, GOOD[:6]), (6, GOOD[6:])]),
    "a chunk too long": (BrokenTransfer, {}, GOOD, [(0, GOOD + bytes(4))]),
    "a chunk too late": (BrokenTransfer, {}, GOOD, [(4, GOOD)]),
    "a chunk too many": (BrokenTransfer, {}, GOOD, [(0, GOOD), (len(GOOD), bytes(4))]),
    "the same chunk twice": (BrokenTransfer, {}, GOOD, [(0, GOOD), (0, GOOD)]),
    "a sum beyond its room": (UpdateOutOfRange, {"tally": {"loss": (1 << 63) - 1}}, GOOD, None),
    "a negative sum beyond its room": (UpdateOutOfRange, {"tally": {"loss": -(1 << 63)}}, GOOD, None),
    "sums that it has not": (UpdateOutOfRange, {"tally": {f"name-{number}": 1 for number in range(1000)}}, GOOD, None),
    "a sum's name too long": (UpdateOutOfRange, {"tally": {"x" * 10_000: 1}}, GOOD, None),
    "sums of an evaluation": (UpdateOutOfRange, {"tally": {"examples": 1, "pos.0.3": 1}}, GOOD, None),
    "no number of seconds": (UpdateOutOfRange, {"training_seconds": float("nan")}, GOOD, None),
    "endless seconds": (UpdateOutOfRange, {"training_seconds": float("inf")}, GOOD, None),
    "negative seconds": (UpdateOutOfRange, {"training_seconds": -1.0}, GOOD, None),
}


@pytest.mark.parametrize("case", REFUSALS)
async def test_a_bad_update_is_refused_and_the_round_finishes_with_a_good_one(daemon: Daemon, case: str) -> None:
    kind, changes, data, sent = REFUSALS[case]
    spec = make_spec()
    sites = await daemon.arrive("a", "b")
    run = await daemon.submit(spec)
    tasks = [await site.task() for site in sites]
    await sites[1].submit(tasks[1], some_delta(SIZE, 1, 1))
    with pytest.raises(kind) as refusal:
        await sites[0].send(sites[0].header(tasks[0], data, **changes), chunks(data) if sent is None else sent)
    assert type(refusal.value) is kind
    view = (await daemon.runs())[0]
    assert (view.phase, view.pending) == ("training", ("a",))
    received, complete = await sites[0].status(tasks[0], GOOD)
    assert not complete
    assert not await sites[0].send(sites[0].header(tasks[0], GOOD, offset=received), chunks(GOOD, received))
    assert (await daemon.end(run.run)).phase == "finished"
    expected = averaged(initial_parameters(spec).flat, *((1, some_delta(SIZE, number, 1)) for number in range(2)))
    assert (await model_of(daemon, run.run) == expected).all()


async def test_a_stream_must_begin_with_one_header(daemon: Daemon) -> None:
    sites = await daemon.arrive("a", "b")
    await daemon.submit(make_spec())
    task = await sites[0].task()
    header = federation_pb2.SubmitUpdateRequest(header=wire.header_to_wire(sites[0].header(task, GOOD)))
    chunk = federation_pb2.SubmitUpdateRequest(chunk=federation_pb2.Chunk(offset=0, data=GOOD))
    nothing = federation_pb2.SubmitUpdateRequest()
    for messages in ([], [chunk, header], [nothing], [header, header, chunk], [header, nothing]):
        with pytest.raises(BrokenTransfer), typed():
            await soon(sites[0].stub.SubmitUpdate(iter_of(messages), metadata=sites[0].metadata))


async def iter_of(messages: list[Any]) -> AsyncIterator[Any]:
    for message in messages:
        yield message


async def test_the_same_update_is_counted_once(daemon: Daemon) -> None:
    spec = make_spec(rounds=2)
    sites = await daemon.arrive("a", "b")
    run = await daemon.submit(spec)
    task, delta = await sites[0].task(), some_delta(SIZE, 0, 1)
    assert not await sites[0].submit(task, delta)
    assert await sites[0].submit(task, delta)
    assert await sites[0].status(task, delta.tobytes()) == (0, True)
    assert await sites[0].submit(task, delta)
    with pytest.raises(DuplicateUpdate, match="'a' has already sent another update for round 1; the first one stands"):
        await sites[0].submit(task, some_delta(SIZE, 5))
    await sites[1].submit(await sites[1].task(), some_delta(SIZE, 1, 1))
    assert (await sites[0].task()).key.round == 2
    with pytest.raises(WrongRound):
        await sites[0].submit(task, delta)
    await daemon.stop(run.run)
    expected = averaged(initial_parameters(spec).flat, *((1, some_delta(SIZE, number, 1)) for number in range(2)))
    assert (await model_of(daemon, run.run) == expected).all()


async def test_an_update_is_told_how_long_it_waited_for_the_server(tmp_path: Path) -> None:
    """Not for the link, on which its sender takes as long."""
    clock = asyncio.get_running_loop().time
    async with a_daemon(tmp_path / "state", uploads_in_flight=1) as daemon:
        a, b = await daemon.arrive("a", "b")
        await daemon.submit(make_spec())
        data = some_delta(SIZE, 1).tobytes()
        tasks = {site: await site.task() for site in (a, b)}

        async def calls() -> float:
            began = clock()
            for _ in range(20):
                await a.status(tasks[a], data)
            return clock() - began

        first = await a.begin(a.header(tasks[a], data))
        began = clock()
        on_its_way = await calls()
        second = await b.begin(b.header(tasks[b], data))
        await second.write(0, data)
        await b.status(tasks[b], data)  # so the second one waits for the first one's place by now
        queued = await calls()
        await first.finish((0, data))
        assert 0 < first.busy_s <= clock() - began - on_its_way - queued
        await second.finish()
        assert second.busy_s >= queued


async def test_the_same_update_sent_twice_at_once_is_counted_once(daemon: Daemon) -> None:
    spec = make_spec(model=BIG)
    size = layout_of(spec).size
    sites = await daemon.arrive("a", "b")
    run = await daemon.submit(spec)
    task, delta = await sites[0].task(), some_delta(size, 0, 1)
    found = await asyncio.gather(*(sites[0].submit(task, delta) for _ in range(4)), return_exceptions=True)
    assert found.count(False) == 1
    assert all(isinstance(one, (bool, BrokenTransfer)) for one in found), found
    assert await sites[0].status(task, delta.tobytes()) == (0, True)
    await sites[1].submit(await sites[1].task(), some_delta(size, 1, 1))
    assert (await daemon.end(run.run)).phase == "finished"
    expected = averaged(initial_parameters(spec).flat, *((1, some_delta(size, number, 1)) for number in range(2)))
    assert (await model_of(daemon, run.run, size) == expected).all()


async def test_whoever_was_not_asked_is_refused(daemon: Daemon) -> None:
    sites = await daemon.arrive("a", "b", "c")
    run = await daemon.submit(make_spec(cohort={"count": 2, "min_clients": 3}))
    view = await daemon.until(run.run, lambda view: view.phase == "training")
    asked = [site for site in sites if site.name in view.cohort]
    (other,) = (site for site in sites if site.name not in view.cohort)
    task = await asked[0].task()
    with pytest.raises(WrongRound, match=f"client '{other.name}' was not asked in round 1"):
        await other.submit(task, some_delta(SIZE, 1))
    with pytest.raises(WrongRound, match="was not asked"):
        await other.fail(task)
    await asked[0].submit(task, some_delta(SIZE, 1))
    await asked[1].submit(await asked[1].task(), some_delta(SIZE, 2))
    assert (await daemon.end(run.run)).phase == "finished"


async def test_an_upload_goes_on_at_the_byte_where_it_broke(daemon: Daemon) -> None:
    spec = make_spec(model=BIG)
    size = layout_of(spec).size
    sites = await daemon.arrive("a", "b")
    run = await daemon.submit(spec)
    task, data = await sites[0].task(), some_delta(size, 0, 1).tobytes()
    header, parts = sites[0].header(task, data), chunks(data)
    assert await sites[0].status(task, data) == (0, False)
    with pytest.raises(BrokenTransfer, match=f"ended at byte {CHUNK_BYTES:,} of {len(data):,}; go on from there"):
        await sites[0].send(header, parts[:1])
    assert await sites[0].status(task, data) == (CHUNK_BYTES, False)
    assert await sites[0].status(task, data[:-1]) == (0, False)  # another update has nothing here
    read = sites[0].up
    with pytest.raises(BrokenTransfer, match=f"byte {CHUNK_BYTES:,} is next, the upload began at 0"):
        await sites[0].send(header, parts)
    # It is refused by its header; what more was sent, the server has not read, and does not count.
    first = federation_pb2.SubmitUpdateRequest(header=wire.header_to_wire(header))
    sites[0].up = read + wire.request_bytes(first) + wire.FRAME_BYTES
    assert await sites[0].status(task, data) == (CHUNK_BYTES, False)
    await sites[0].come()  # it joins again, as it does after a loss of connection
    assert (await sites[0].task()).key == task.key
    assert await sites[0].status(task, data) == (CHUNK_BYTES, False)
    assert not await sites[0].send(replace(header, offset=CHUNK_BYTES), parts[1:])
    await sites[1].submit(await sites[1].task(), some_delta(size, 1, 1))
    view = await daemon.end(run.run)
    assert view.phase == "finished"
    assert view.history[0].bytes_up == sum(one.up for one in sites)
    expected = averaged(initial_parameters(spec).flat, *((1, some_delta(size, number, 1)) for number in range(2)))
    assert (await model_of(daemon, run.run, size) == expected).all()


async def test_a_broken_connection_keeps_what_has_come(daemon: Daemon) -> None:
    spec = make_spec(model=BIG, cohort__min_clients=1)
    data = some_delta(layout_of(spec).size, 1).tobytes()
    (site,) = await daemon.arrive("a")
    run = await daemon.submit(spec)
    task, parts = await site.task(), chunks(data)
    upload = await site.begin(site.header(task, data))
    await upload.write(*parts[0])
    while (await site.status(task, data))[0] == 0:  # each call is a turn of the server's loop
        pass
    upload.cut()
    received, complete = await site.status(task, data)
    assert (received, complete) == (CHUNK_BYTES, False)
    assert not await site.send(site.header(task, data, offset=received), parts[1:])
    assert (await daemon.end(run.run)).phase == "finished"


async def test_an_upload_cannot_change_its_weight_on_the_way(daemon: Daemon) -> None:
    spec = make_spec(model=BIG, cohort__min_clients=1)
    numbers = some_delta(layout_of(spec).size, 1)
    numbers[0] = 1.0
    data = numbers.tobytes()
    (site,) = await daemon.arrive("a")
    await daemon.submit(spec)
    task, parts = await site.task(), chunks(data)
    with pytest.raises(BrokenTransfer):
        await site.send(site.header(task, data), parts[:1])
    with pytest.raises(UpdateOutOfRange, match="the product"):
        await site.send(site.header(task, data, weight=1 << 40, offset=CHUNK_BYTES), parts[1:])


async def test_another_update_takes_the_place_of_an_incomplete_one(daemon: Daemon) -> None:
    spec = make_spec(model=BIG, cohort__min_clients=1)
    size = layout_of(spec).size
    old, new = some_delta(size, 1).tobytes(), some_delta(size, 2)
    (site,) = await daemon.arrive("a")
    run = await daemon.submit(spec)
    task = await site.task()
    upload = await site.begin(site.header(task, old))
    await upload.write(*chunks(old)[0])
    while (await site.status(task, old))[0] == 0:
        pass
    assert not await site.submit(task, new)
    assert (await daemon.end(run.run)).phase == "finished"
    with pytest.raises(BrokenTransfer, match="given up"):
        await upload.finish(chunks(old)[1])
    expected = averaged(initial_parameters(spec).flat, (1, new))
    assert (await model_of(daemon, run.run, size) == expected).all()


async def test_an_upload_that_outlives_its_run_is_given_up(daemon: Daemon) -> None:
    spec = make_spec(model=BIG, cohort__min_clients=1)
    data = some_delta(layout_of(spec).size, 1).tobytes()
    (site,) = await daemon.arrive("a")
    run = await daemon.submit(spec)
    task, parts = await site.task(), chunks(data)
    upload = await site.begin(site.header(task, data))
    await upload.write(*parts[0])
    while (await site.status(task, data))[0] == 0:
        pass
    assert (await daemon.stop(run.run)).phase == "stopped"
    assert (await site.task(TaskKind.CANCEL)).key == task.key
    with pytest.raises(BrokenTransfer, match="given up"):
        await upload.finish(parts[1])
    with pytest.raises(RunEnded, match="is over: stopped by the operator"):
        await site.status(task, data)
    with pytest.raises(RunEnded):
        await site.submit(task, some_delta(layout_of(spec).size, 1))


def reached(attempt: int, view: views.RunView) -> bool:
    return view.attempt == attempt


async def test_an_update_of_an_earlier_attempt_counts_in_the_next_one(daemon: Daemon) -> None:
    """Of three clients two are asked; the first answers, the second fails, and the third takes its place."""
    sites = {site.name: site for site in await daemon.arrive("a", "b", "c")}
    spec = make_spec(cohort={"count": 2, "min_clients": 2})
    run = await daemon.submit(spec)
    deltas = {name: some_delta(SIZE, ord(name)) for name in sites}
    view = await daemon.until(run.run, lambda view: view.phase == "training")
    first, second = view.cohort
    (third,) = {*sites} - {first, second}
    task = await sites[first].task()
    await sites[first].submit(task, deltas[first])
    await sites[second].fail(await sites[second].task())
    view = await daemon.until(run.run, partial(reached, 2))
    assert (set(view.cohort), view.pending) == ({first, third}, (third,))
    await sites[third].submit(await sites[third].task(), deltas[third])
    assert (await daemon.end(run.run)).phase == "finished"
    expected = averaged(initial_parameters(spec).flat, *((1, deltas[name]) for name in (first, third)))
    assert (await model_of(daemon, run.run) == expected).all()


# The other answers ----------------------------------------------------------------------------------------------------


async def test_an_evaluation_is_the_exact_sum_of_its_scores(daemon: Daemon) -> None:
    sites = await daemon.arrive("a", "b")
    run = await daemon.submit(make_spec(evaluation__every=1))
    await train(sites)
    tasks = [await site.task(TaskKind.EVALUATE) for site in sites]
    assert tasks[0].model.version == 1
    assert not await sites[0].score(tasks[0], {"examples": 3, "loss": 7, "correct": 1})
    assert await sites[0].score(tasks[0], {"examples": 3, "loss": 7, "correct": 1})
    for version in (0, 2):
        with pytest.raises(WrongRound):
            await sites[1].score(tasks[1], {"examples": 1}, version)
    with pytest.raises(WrongRound):
        await sites[1].score(replace(tasks[1], key=replace(tasks[1].key, round=2)), {"examples": 1})
    with pytest.raises(UnknownRun):
        await sites[1].score(replace(tasks[1], key=replace(tasks[1].key, run="0" * 16)), {"examples": 1})
    for tally, kind in (({"loss": (1 << 63) - 1}, UpdateOutOfRange), ({"x" * 10_000: 1}, UpdateOutOfRange)):
        with pytest.raises(kind):
            await sites[1].score(tasks[1], tally)
    assert not await sites[1].score(tasks[1], {"examples": 2, "loss": 1, "correct": 2})
    view = await daemon.end(run.run)
    (record,) = view.history
    assert record.evaluation == view.metrics == {"loss": 8 / 2**20 / 5, "accuracy": 3 / 5}
    assert (record.evaluated_examples, record.evaluated_clients) == (5, 2)
    assert record.spread["accuracy"] == pytest.approx(((1 / 3 + 1) / 2, 1 / 3 + 2 / 3 * 0.1))


async def test_a_client_that_cannot_train_says_why(daemon: Daemon) -> None:
    sites = await daemon.arrive("a", "b")
    run = await daemon.submit(make_spec(cohort__max_attempts=2))
    task = await sites[0].task()
    await sites[0].fail(task, "DataError", "no.csv: no such file " + "x" * 10_000)
    view = await daemon.until(run.run, lambda view: view.attempt == 2)
    assert "a: DataError: no.csv: no such file" in view.reason
    assert len(view.reason) < 4000
    again = await sites[0].task()
    assert (again.key.round, again.key.attempt) == (1, 2)
    await sites[0].fail(again)
    view = await daemon.until(run.run, lambda view: view.phase == "paused")
    assert view.reason == "round 1, attempt 2 of 2: a: DataError: no data"
    assert (await sites[1].task()).kind is TaskKind.TRAIN
    with pytest.raises(SeqfedError):
        await sites[1].fail(again)


async def test_a_late_update_has_the_wrong_round_whatever_the_run_does_meanwhile(daemon: Daemon) -> None:
    spec = make_spec(model=BIG, evaluation__every=1, cohort={"min_clients": 2, "quorum": 1, "deadline_s": 0.6})
    size = layout_of(spec).size
    sites = await daemon.arrive("a", "b")
    run = await daemon.submit(spec)
    tasks = [await site.task() for site in sites]
    late = some_delta(size, 1).tobytes()
    upload = await sites[1].begin(sites[1].header(tasks[1], late))
    for part in chunks(late):
        await upload.write(*part)
    await sites[0].submit(tasks[0], some_delta(size, 2))
    await sites[1].task(TaskKind.CANCEL)
    await sites[1].task(TaskKind.EVALUATE)
    with pytest.raises(WrongRound, match="is no longer wanted"):
        await upload.finish()
    view = await daemon.end(run.run)
    assert (view.phase, view.history[0].folded) == ("finished", ("a",))


# Submit ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (b"", "Invalid JSON"),
        (b"\xff", "Invalid JSON"),
        (b"{}", "'data' is missing"),
        (b'{"data": {"features": 2, "classes": 1}}', "'data.classes' = 1"),
        (b'{"data": {"features": 2, "classes": 2}, "ruonds": 3}', "did you mean 'rounds'"),
        (b'{"data": {"features": 2, "classes": 2}, "cohort": {"min_clients": 2, "quorum": 3}}', "lower quorum"),
        (b'{"data": {"features": 2, "classes": 2}, "name": "../x"}', "'name' = '../x'"),
    ],
)
async def test_a_bad_specification_is_refused_with_its_mistake(daemon: Daemon, spec: bytes, told: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        await daemon.submit_raw(spec)
    assert told in str(refusal.value)
    assert await daemon.runs() == []


def a_checkpoint(daemon: Daemon, spec: RunSpec, flat: Flat) -> bytes:
    path = daemon.state.parent / "given.safetensors"
    checkpoint.save(path, Parameters(layout_of(spec), flat), {"made": "by hand"})
    return path.read_bytes()


async def test_a_good_checkpoint_is_the_initial_model_bit_for_bit(daemon: Daemon) -> None:
    spec = make_spec(model=BIG, cohort__min_clients=1)
    flat = some_delta(layout_of(spec).size, 3)
    (site,) = await daemon.arrive("a")
    run = await daemon.submit(spec, a_checkpoint(daemon, spec, flat))
    assert await site.fetch(await site.task()) == flat.tobytes()
    assert (await model_of(daemon, run.run, flat.size) == flat).all()
    assert sorted(path.name for path in daemon.state.glob("*.safetensors")) == []


async def test_a_checkpoint_of_another_model_is_refused(daemon: Daemon) -> None:
    other = make_spec(model__hidden=5)
    given = a_checkpoint(daemon, other, some_delta(layout_of(other).size, 3))
    with pytest.raises(
        CheckpointError, match=r"of another model: tensor 'recurrent.weight_ih_l0' has shape"
    ) as refusal:
        await daemon.submit(make_spec(), given)
    assert str(daemon.state) not in str(refusal.value)  # where the server keeps things is nobody's business
    for garbage in (b"x", bytes(100), given[:-4]):
        with pytest.raises(CheckpointError, match="not a readable safetensors file") as refusal:
            await daemon.submit(other, garbage)
        assert str(daemon.state) not in str(refusal.value)
    with pytest.raises(ChecksumMismatch):
        await daemon.submit(other, given, bytes(32))
    with pytest.raises(BrokenTransfer):
        await daemon.submit(other, given, b"")
    assert await daemon.runs() == []
    assert sorted(path.name for path in daemon.state.glob("*.safetensors")) == []


async def test_a_model_over_the_servers_limit_is_refused(daemon: Daemon) -> None:
    async with a_daemon(daemon.state.parent / "small", max_model_bytes=4 * SIZE) as small:
        assert (await small.submit(make_spec())).phase == "queued"
        with pytest.raises(TooLarge, match=r"the server's limit \(max_model_bytes\) is 168"):
            await small.submit(make_spec(model__hidden=5))
        with pytest.raises(TooLarge, match="max_model_bytes"):
            await small.submit(make_spec(), bytes(10_000))


async def test_a_long_reason_of_refusal_names_a_run_shortly(daemon: Daemon) -> None:
    for name in ("nope", "x" * 100_000, ""):
        with pytest.raises(UnknownRun, match="`seqfed runs` lists the ids") as refusal:
            await daemon.stop(name)
        assert len(str(refusal.value)) < 200


async def test_runs_are_found_by_id_beginning_and_name(daemon: Daemon) -> None:
    first = await daemon.submit(make_spec(name="first"))
    second = await daemon.submit(make_spec(name="second"))
    await daemon.submit(make_spec(name="second"))
    for name in (first.run, first.run[:8], "first"):
        assert (await anext(aiter(daemon.watch(name)))).run == first.run
    with pytest.raises(UnknownRun, match="2 runs answer to 'second'"):
        await daemon.stop("second")
    assert (await daemon.stop(second.run)).phase == "stopped"


# Watch, Stop, Export --------------------------------------------------------------------------------------------------


async def watched(daemon: Daemon, run: str, after: int = 0) -> list[views.RunView]:
    return [view async for view in daemon.watch(run, after)]


async def test_a_watcher_sees_every_round_once_complete_and_in_order(daemon: Daemon) -> None:
    rounds = 55  # more than one message holds
    run = await daemon.submit(make_spec(rounds=rounds, cohort__min_clients=1, evaluation__every=1))
    live = asyncio.create_task(watched(daemon, run.run))
    (site,) = await daemon.arrive("a")
    for number in range(1, rounds + 1):
        await site.submit(await site.task(), some_delta(SIZE, number))
        await site.score(await site.task(TaskKind.EVALUATE), {"examples": 1, "loss": number})
    for after, seen in (
        (0, await soon(live)),
        (0, await soon(watched(daemon, run.run))),
        (7, await soon(watched(daemon, run.run, 7))),
        (rounds, await soon(watched(daemon, run.run, rounds))),
    ):
        records = [record for view in seen for record in view.history]
        assert [record.round for record in records] == list(range(after + 1, rounds + 1))
        if not after:
            assert sum(record.bytes_up for record in records) == site.up
        for record in records:
            assert record.evaluation == {"loss": record.round / 2**20}
            assert record.spread == {"loss": (record.round / 2**20, record.round / 2**20)}
            assert record.evaluated_examples == 1
            assert (record.cohort, record.folded) == (("a",), ("a",))
            assert record.training == {"examples": 1, "loss": 1 << 20}
            assert record.bytes_up == record.traffic["a"][0] > 4 * SIZE
            assert record.bytes_down == record.traffic["a"][1] > 4 * SIZE
        assert seen[-1].ended
        assert (seen[-1].phase, seen[-1].round) == ("finished", rounds)


async def test_a_run_can_be_stopped_once(daemon: Daemon) -> None:
    sites = await daemon.arrive("a", "b")
    run = await daemon.submit(make_spec(rounds=3))
    await train(sites)
    tasks = [await site.task() for site in sites]
    view = await daemon.stop(run.run)
    assert (view.phase, view.reason, view.ended) == ("stopped", "stopped by the operator", True)
    for site, task in zip(sites, tasks, strict=True):
        assert (await site.task(TaskKind.CANCEL)).key == task.key
        with pytest.raises(RunEnded):
            await site.submit(task, some_delta(SIZE, 1))
    with pytest.raises(RunEnded, match="is over already: stopped by the operator"):
        await daemon.stop(run.run)
    view = await daemon.end(run.run)
    assert [record.round for record in view.history] == [1]
    deltas = [(number + 1, some_delta(SIZE, number, 1)) for number in range(2)]
    assert (await model_of(daemon, run.run) == averaged(initial_parameters(view.spec).flat, *deltas)).all()


async def test_export_goes_on_from_any_offset(daemon: Daemon) -> None:
    run = await daemon.submit(make_spec(model=BIG))
    whole = await daemon.export(run.run)
    assert len(whole) > 2 * CHUNK_BYTES
    for offset in (1, CHUNK_BYTES, len(whole) - 1, len(whole), len(whole) + 1):
        assert await daemon.export(run.run, offset) == whole[offset:]
    with pytest.raises(UnknownRun):
        await daemon.export("nope")


async def test_clients_are_listed_with_what_they_do(daemon: Daemon) -> None:
    sites = await daemon.arrive("a", "b")
    run = await daemon.submit(make_spec())
    task = await sites[0].task()
    await sites[1].task()
    found = await daemon.clients()
    assert {name: (one.connected, one.software) for name, one in found.items()} == {
        "a": (True, "test"),
        "b": (True, "test"),
    }
    assert found["a"].task == f"train in round 1 of {run.run}"
    assert found["a"].schema is not None
    assert found["a"].schema.examples == 10
    await sites[0].submit(task, some_delta(SIZE, 1))
    assert (await daemon.clients())["a"].task == ""
    await sites[1].leave()
    await daemon.until(run.run, lambda view: "b (away)" in view.reason)
    assert not (await daemon.clients())["b"].connected


async def test_a_surprise_is_logged_and_tells_the_stranger_nothing(
    daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    run = await daemon.submit(make_spec())
    (file,) = daemon.state.glob(f"models/{run.run}/*")
    file.unlink()
    with caplog.at_level(logging.ERROR), pytest.raises(grpc.aio.AioRpcError) as refusal:
        async for _ in daemon.stub.ExportModel(admin_pb2.ExportModelRequest(run=run.run)):
            pass
    assert refusal.value.code() is grpc.StatusCode.INTERNAL
    assert refusal.value.details() == "internal error"
    trailers = str(refusal.value.trailing_metadata())
    assert "FileNotFound" not in trailers
    assert str(file.parent) not in trailers
    assert "FileNotFoundError" in caplog.text


async def test_a_small_model_comes_with_the_task_and_only_once(daemon: Daemon) -> None:
    sites = await daemon.arrive("a", "b")
    await daemon.submit(make_spec(rounds=2, evaluation__every=1))
    first = {site.name: await site.task() for site in sites}
    for site in sites:
        model = first[site.name].model
        assert model.data == await site.fetch(first[site.name])
        assert blake3(model.data).digest() == model.digest
        await site.submit(first[site.name], some_delta(SIZE, 1))
    for site in sites:
        scored = await site.task(views.TaskKind.EVALUATE)
        assert scored.model.data == await site.fetch(scored)
        await site.score(scored, {"examples": 1, "correct": 1, "loss": 0})
    for site in sites:
        again = await site.task()
        assert (again.model.version, again.model.data) == (1, b"")  # it came with the evaluation
