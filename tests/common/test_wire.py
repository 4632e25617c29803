"""The wire: every record survives it, and its bytes stay what peers of this protocol read."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqfed.common import views, wire
from seqfed.common.errors import ConfigError, InvalidName, VersionMismatch
from seqfed.common.schema import DataSchema
from seqfed.common.spec import CohortSpec, ConvergenceSpec, DataSpec, EvaluationSpec, ModelSpec, RunSpec, TrainingSpec
from seqfed.v1 import admin_pb2, federation_pb2

u32, u64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
texts = st.text(max_size=8)
names = st.lists(texts, max_size=3).map(tuple)
seconds = st.floats(0, 1e12)
tallies = st.dictionaries(texts, st.integers(-(1 << 63), (1 << 63) - 1), max_size=3)
reals = st.floats(allow_nan=False)
metrics = st.dictionaries(texts, reals, max_size=3)
spreads = st.dictionaries(texts, st.tuples(reals, reals), max_size=3)
counts = st.integers(1, 1_000_000)
positive = st.floats(0, 1, exclude_min=True)

training = st.builds(TrainingSpec, learning_rate=positive, batch_size=counts, steps=st.none() | counts) | st.builds(
    TrainingSpec, optimizer=st.just("sgd"), momentum=st.floats(0, 1, exclude_max=True), epochs=counts
)
cohorts = st.builds(
    CohortSpec, min_clients=st.integers(3, 9), fraction=st.none() | positive, quorum=st.none() | st.integers(1, 3)
) | st.builds(CohortSpec, count=st.integers(3, 9), deadline_s=st.floats(1e-3, 1e6), quorum=st.integers(1, 3))
specs = st.builds(
    RunSpec,
    name=st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True),
    seed=st.integers(0, (1 << 63) - 1),
    rounds=counts,
    data=st.builds(DataSpec, features=counts, classes=st.integers(2, 9), steps=st.none() | counts),
    model=st.builds(ModelSpec, kind=st.sampled_from(["rnn", "lstm", "gru"]), hidden=st.integers(1, 99)),
    training=training,
    cohort=cohorts,
    evaluation=st.builds(EvaluationSpec, every=counts),
    convergence=st.none()
    | st.builds(ConvergenceSpec, metric=st.sampled_from(["loss", "accuracy"]), min_delta=positive),
)
keys = st.builds(views.TaskKey, texts, u32, u32)
digests = st.binary(max_size=32)
steps = st.lists(st.builds(views.ModelStep, u32, digests, u64, digests, digests), max_size=3).map(tuple)
versions = st.builds(views.ModelVersion, u32, u64, digests, digests, digests, steps)
signatures = st.binary(max_size=72)
masking = st.none() | st.builds(views.MaskingTerms, u64, st.integers(2, (1 << 32) - 1), st.binary(max_size=20))
tasks = st.builds(
    views.Task,
    st.sampled_from(views.TaskKind),
    keys,
    specs,
    versions,
    signatures,
    signatures,
    masking,
    st.binary(max_size=9),
)
headers = st.builds(
    views.UpdateHeader,
    keys,
    u64,
    st.binary(max_size=32),
    u64,
    st.binary(max_size=32),
    u64,
    tallies,
    seconds,
    u64,
    texts,
)
traffic = st.dictionaries(texts, st.tuples(u64, u64), max_size=3)
records = st.builds(
    views.RoundRecord,
    u32,
    u32,
    names,
    names,
    tallies,
    metrics,
    u64,
    u64,
    seconds,
    seconds,
    spreads,
    u64,
    u32,
    traffic=traffic,
)
schemas = st.builds(DataSchema, features=counts, steps=st.none() | counts, classes=counts, examples=counts)
runs = st.builds(
    views.RunView,
    run=texts,
    name=texts,
    phase=texts,
    round=u32,
    rounds=u32,
    attempt=u32,
    cohort=names,
    pending=names,
    reason=texts,
    history=st.lists(records, max_size=2).map(tuple),
    bytes_up=u64,
    bytes_down=u64,
    seconds=seconds,
    spec=specs,
    ended=st.booleans(),
    metrics=metrics,
)
clients = st.builds(views.ClientView, texts, st.booleans(), seconds, texts, st.none() | schemas, texts, st.booleans())

several = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@several
@given(tasks)
def test_tasks_survive(task: views.Task) -> None:
    message = wire.task_to_wire(task)
    assert wire.task_from_wire(type(message).FromString(message.SerializeToString())) == task
    again = wire.task_to_wire(task, task.spec)  # the next one of the same run on the same stream
    assert not again.spec
    assert wire.task_from_wire(again, task.spec) == task


@several
@given(headers)
def test_headers_survive(header: views.UpdateHeader) -> None:
    message = wire.header_to_wire(header)
    assert wire.header_from_wire(type(message).FromString(message.SerializeToString())) == header


@several
@given(runs)
def test_runs_survive(run: views.RunView) -> None:
    message = wire.run_to_wire(run)
    assert wire.run_from_wire(type(message).FromString(message.SerializeToString())) == run


@several
@given(clients)
def test_clients_survive(client: views.ClientView) -> None:
    message = wire.client_to_wire(client)
    assert wire.client_from_wire(type(message).FromString(message.SerializeToString())) == client


def test_the_bytes_of_a_task_stay_what_they_were() -> None:
    spec = RunSpec(data=DataSpec(features=2, classes=3))
    model = views.ModelVersion(2, 516, bytes(range(32)), b"\xff" * 32)
    task = views.Task(views.TaskKind.TRAIN, views.TaskKey("0123456789abcdef", 3, 1), spec, model)
    text = spec.canonical  # itself held in test_spec
    length = bytes([len(text) & 0x7F | 0x80, len(text) >> 7])
    assert wire.task_to_wire(task).SerializeToString(deterministic=True) == (
        bytes.fromhex("0801 1216 0a10 30313233343536373839616263646566 1003 1801 1a")
        + length
        + text
        + bytes.fromhex(f"2249 0802 108404 1a20 {bytes(range(32)).hex()} 2220 {'ff' * 32}")
    )


def test_the_number_of_the_protocol_and_the_names_in_it() -> None:
    assert (wire.PROTOCOL, wire.SESSION_METADATA, wire.ERROR_DOMAIN) == (1, "seqfed-session", "seqfed")


@pytest.mark.parametrize("spec", [b"", b"{}", b"\xff", b'{"data": {"features": 1, "classes": 2}, "new": 1}'])
def test_a_specification_that_is_none_is_refused(spec: bytes) -> None:
    message = federation_pb2.Task(kind=federation_pb2.TASK_KIND_TRAIN, spec=spec)
    with pytest.raises(ConfigError, match=r"^the task's specification: "):
        wire.task_from_wire(message)


@pytest.mark.parametrize("n_max", [0, 1])
def test_a_masked_sum_of_one_is_refused(n_max: int) -> None:
    spec = RunSpec(data=DataSpec(features=2, classes=3))
    task = views.Task(views.TaskKind.TRAIN, views.TaskKey("r", 3, 1), spec, views.ModelVersion(2, 516, b"", b""))
    message = wire.task_to_wire(replace(task, masking=views.MaskingTerms(1, n_max)))
    with pytest.raises(
        ConfigError, match=f"the task's masked sum is of {n_max} clients at most, and one of fewer than 2"
    ):
        wire.task_from_wire(message)


def test_a_kind_from_the_future_is_refused() -> None:
    with pytest.raises(VersionMismatch, match="no task of kind"):
        wire.task_from_wire(federation_pb2.Task(spec=b"{}"))


@pytest.mark.parametrize("name", ["a", "site-1.ward_B", "x" * 64])
def test_client_names_that_are(name: str) -> None:
    assert wire.check_client_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "é", "x" * 65, "a\n", "a\0"])
def test_client_names_that_are_not(name: str) -> None:
    with pytest.raises(InvalidName, match=r"use 1 to 64 of A-Z a-z 0-9 \. _ - and no dot in front"):
        wire.check_client_name(name)


def test_an_entry_of_the_audit_log_there_and_back() -> None:
    entry = views.AuditEntry(7, 1.25, "refused", '{"who":"a"}', bytes(range(32)))
    assert wire.entry_from_wire(wire.entry_to_wire(entry)) == entry
    assert wire.entry_from_wire(admin_pb2.AuditEntry(body=b"\xff")).body == "\ufffd"


@pytest.mark.parametrize("text", ["a\nb", "\x00", "\x1b[2J", "\u2028", "\u202e", "\ud800", "\x7f", "\x9b"])
def test_words_of_a_peer_are_made_clean_or_refused(text: str) -> None:
    assert wire.clean(text, 10).isprintable()
    assert len(wire.clean(text * 1000, 10)) <= 60
    for content in (text, [text], {"a": {text: 1}}, {"a": ({"b": text},)}):
        with pytest.raises(InvalidName, match="cannot be printed"):
            wire.require_clean(content, "it")
    wire.require_clean({"a": ["ü", 1, None, 0.5]}, "it")


@given(st.one_of(st.integers(0, 300), u64), st.one_of(st.integers(0, 300), st.integers(0, 1 << 19)))
def test_what_a_chunk_has_on_the_wire_is_reckoned_right(offset: int, size: int) -> None:
    chunk = federation_pb2.Chunk(offset=offset, data=bytes(size))
    assert wire.chunk_bytes(offset, size) == chunk.ByteSize()
    message = federation_pb2.SubmitUpdateRequest(chunk=chunk)
    assert wire.part_bytes(chunk.ByteSize()) == wire.on_wire(message.ByteSize())


def test_a_message_has_a_prefix_and_as_many_frames_as_it_takes() -> None:
    most = 16_384 - 5
    assert [wire.on_wire(size) for size in (0, 1, most, most + 1)] == [14, 15, 16_384 + 9, 16_385 + 18]
