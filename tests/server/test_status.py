"""How errors travel: the table is complete, and a surprise tells nothing."""

from __future__ import annotations

import logging

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from seqfed.common import errors
from seqfed.common.errors import StorageError, StorageFull, every_error
from seqfed.server.status import MAX_MESSAGE, STATUS, rich_status

DETAILS = "grpc-status-details-bin"


def details(status: grpc.Status) -> tuple[status_pb2.Status, error_details_pb2.ErrorInfo]:
    """The google.rpc.Status that travels with a gRPC status, and the ErrorInfo in it."""
    found = {key: value for key, value in status.trailing_metadata or () if isinstance(value, bytes)}
    rich = status_pb2.Status.FromString(found[DETAILS])
    info = error_details_pb2.ErrorInfo()
    assert rich.details[0].Unpack(info)
    return rich, info


def test_every_error_has_its_status_and_nothing_else_has() -> None:
    assert set(STATUS) == set(every_error().values())


def test_no_error_travels_as_success() -> None:
    assert grpc.StatusCode.OK not in STATUS.values()


@pytest.mark.parametrize("name", sorted(every_error()))
def test_an_error_travels_with_its_class_and_its_words(name: str) -> None:
    kind = every_error()[name]
    status = rich_status(kind("what it was, and what to do"))
    rich, info = details(status)
    assert (info.reason, info.domain) == (name, "seqfed")
    assert status.code is STATUS[kind]
    assert status.details == rich.message
    if issubclass(kind, (StorageError, StorageFull)):
        assert "what it was" not in status.details  # it names the server's own files
    else:
        assert status.details == "what it was, and what to do"
    assert rich.code == STATUS[kind].value[0]


@pytest.mark.parametrize("surprise", [ValueError("the password is hunter2"), KeyError("hunter2"), MemoryError()])
def test_a_surprise_is_logged_and_answered_with_two_words(
    surprise: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "seqfed.server"):
        status = rich_status(surprise)
    rich, info = details(status)
    assert (status.code, status.details) == (grpc.StatusCode.INTERNAL, "internal error")
    assert info.reason == "InternalError"
    assert "hunter2" not in str(rich) + str(status)
    assert caplog.records[0].exc_info is not None
    assert caplog.records[0].exc_info[1] is surprise


def test_a_long_message_is_cut_to_what_trailers_hold() -> None:
    status = rich_status(errors.ConfigError("ä" * 100_000))
    rich, _ = details(status)
    assert str(status.details).startswith("ä" * MAX_MESSAGE)
    assert len(str(status.details)) < MAX_MESSAGE + 10
    assert len(rich.SerializeToString()) < 8192
