"""Every message type with any content, and any bytes as every type: what reads them does its work or raises a SeqfedError."""

from __future__ import annotations

import contextlib

import pytest
from benchmarks.targets import MESSAGES, READERS, record_of
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fuzz import messages

from seqfed.common.errors import SeqfedError
from seqfed.v1 import admin_pb2, federation_pb2

EVERY = messages.every(federation_pb2, admin_pb2)
READ = [one for one in EVERY if one in READERS]
SPECS = st.sampled_from(
    [b'{"data":{"features":2,"classes":2}}', b'{"data":{"features":2,"classes":2},"seed":-1}', b'{"data":{}}', b"{"]
)
HINTS: messages.Hints = {
    "seqfed.v1.Task.spec": SPECS,
    "seqfed.v1.RunStatus.spec": SPECS,
    "seqfed.v1.Task.kind": st.sampled_from([1, 2, 3]),
    "seqfed.v1.ReportProgressRequest.stage": st.sampled_from([1, 5]),
    "seqfed.v1.ClientStatus.data_schema": st.sampled_from([b'{"examples":1}', b'{"examples":0}', b'{"examples":1e3}']),
}
quick = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_the_fuzzer_knows_every_message_and_the_wire_reads_those_it_should() -> None:
    assert set(EVERY) == set(MESSAGES)
    assert set(READERS) < set(EVERY)


@pytest.mark.parametrize("kind", READ, ids=[one.DESCRIPTOR.name for one in READ])
def test_any_content_is_a_record_or_is_refused(kind: type[Message]) -> None:
    @quick
    @given(messages.of(kind.DESCRIPTOR, HINTS))
    def look(message: Message) -> None:
        with contextlib.suppress(SeqfedError):
            record_of(message)

    look()


@settings(quick, max_examples=150)
@given(st.sampled_from(EVERY), st.binary(max_size=200))
def test_any_bytes_are_a_message_or_none(kind: type[Message], data: bytes) -> None:
    with contextlib.suppress(SeqfedError, DecodeError):
        record_of(kind.FromString(data))


@settings(quick, max_examples=60)
@given(st.data())
def test_a_message_with_bytes_changed_is_one_or_none(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(EVERY))
    good = bytearray(data.draw(messages.of(kind.DESCRIPTOR, HINTS)).SerializeToString())
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=4)):
        if good:
            good[at % len(good)] = byte
    with contextlib.suppress(SeqfedError, DecodeError):
        record_of(kind.FromString(bytes(good[: data.draw(st.integers(0, len(good)))])))
