"""The one table of how errors travel, and the only place where an error becomes a gRPC status.

A surprise (anything that is not a SeqfedError) is logged here and answered with two words: grpc.aio would otherwise send the
exception's text to the stranger.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

import grpc
import grpc_status.rpc_status
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from seqfed.common import errors
from seqfed.common.wire import ERROR_DOMAIN

log = logging.getLogger("seqfed.server")

MAX_MESSAGE: Final = 2_000  # characters: the status travels twice in trailers, of which gRPC takes 8 KiB in all

STATUS: Final[Mapping[type[errors.SeqfedError], grpc.StatusCode]] = {
    errors.SeqfedError: grpc.StatusCode.UNKNOWN,
    errors.ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.DataError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.SchemaMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.CheckpointError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.LayoutMismatch: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NonFiniteUpdate: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UpdateOutOfRange: grpc.StatusCode.INVALID_ARGUMENT,
    errors.EmptyRound: grpc.StatusCode.FAILED_PRECONDITION,
    errors.WrongRound: grpc.StatusCode.FAILED_PRECONDITION,
    errors.DuplicateUpdate: grpc.StatusCode.ALREADY_EXISTS,
    errors.TooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ChecksumMismatch: grpc.StatusCode.DATA_LOSS,
    errors.BrokenTransfer: grpc.StatusCode.ABORTED,
    errors.MalformedPayload: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidName: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NameTaken: grpc.StatusCode.ALREADY_EXISTS,
    errors.UnknownSession: grpc.StatusCode.UNAUTHENTICATED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.NotAllowed: grpc.StatusCode.PERMISSION_DENIED,
    errors.PolicyRefused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.RateLimited: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.AuditBroken: grpc.StatusCode.DATA_LOSS,
    errors.MaskingRefused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.MaskingFailed: grpc.StatusCode.ABORTED,
    errors.UnknownRun: grpc.StatusCode.NOT_FOUND,
    errors.RunEnded: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NoModel: grpc.StatusCode.NOT_FOUND,
    errors.VersionMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.TrainingFailed: grpc.StatusCode.ABORTED,
    errors.StorageFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.StorageError: grpc.StatusCode.UNAVAILABLE,
    errors.LeaseLost: grpc.StatusCode.UNAVAILABLE,
    errors.PortInUse: grpc.StatusCode.UNAVAILABLE,
    errors.ServerUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.InsecureRefused: grpc.StatusCode.PERMISSION_DENIED,
    errors.IllegalTransition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.InternalError: grpc.StatusCode.INTERNAL,
}


def rich_status(error: BaseException) -> grpc.Status:
    """The status to abort a call with."""
    if not isinstance(error, errors.SeqfedError):
        log.error("a call failed unexpectedly", exc_info=error)
        error = errors.InternalError("internal error")
    message = str(error)
    if isinstance(error, (errors.StorageError, errors.StorageFull)):
        log.error("a call failed: %s", message)
        full = isinstance(error, errors.StorageFull)
        message = (
            f"the server {'has no room' if full else 'cannot write'} on its disk; its log says where; try again later"
        )
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=ERROR_DOMAIN))
    code = getattr(code_pb2, STATUS[type(error)].name)
    if len(message) > MAX_MESSAGE:
        message = message[:MAX_MESSAGE] + " ..."
    return grpc_status.rpc_status.to_status(status_pb2.Status(code=code, message=message, details=[info]))
