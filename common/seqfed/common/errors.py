"""Every error that seqfed raises on purpose, in one tree that knows no transport.

A message names the thing, the value, the permitted range and the remedy, because the person who reads it is often not the
one who can read this code. The server's table (`seqfed.server.status`) says how each class travels; the class's name is what
travels, so that the other side raises the same class again.
"""

from __future__ import annotations

import os


class SeqfedError(Exception):
    """The root: catch this to catch what seqfed refuses, and nothing that is a bug."""


class ConfigError(SeqfedError):
    """A run's, server's or client's settings are unknown, contradictory or out of range."""


class DataError(SeqfedError):
    """A data file cannot be read as sequences: wrong columns, text where numbers belong, empty, not finite."""


class SchemaMismatch(SeqfedError):
    """A client's data are not of the kind that the run is about."""


class CheckpointError(SeqfedError):
    """A model file is damaged, or holds another model than the one asked for."""


class LayoutMismatch(SeqfedError):
    """An update or a model does not have the tensors, shapes and order that the run has."""


class NonFiniteUpdate(SeqfedError):
    """An update holds a NaN or an infinity."""


class UpdateOutOfRange(SeqfedError):
    """An update, its weight, or both together do not fit the exact sum."""


class EmptyRound(SeqfedError):
    """A round has gathered no weight, so it has no mean."""


class WrongRound(SeqfedError):
    """The call belongs to a round that is not the one under way, or to a client that was not asked in it."""


class DuplicateUpdate(SeqfedError):
    """The same client sent two different updates for one round; the first stands."""


class TooLarge(SeqfedError):
    """Something that a peer controls is over its limit."""


class Overloaded(SeqfedError):
    """The server is at one of its limits just now; the same call later will do."""


class ChecksumMismatch(SeqfedError):
    """What arrived is not what was sent."""


class BrokenTransfer(SeqfedError):
    """A stream's chunks are missing, out of order or of the wrong size."""


class MalformedPayload(SeqfedError):
    """A compressed update is not what its codec makes, or of another codec than its run has."""


class InvalidName(SeqfedError):
    """A name or key has characters or a length that it must not have."""


class NameTaken(SeqfedError):
    """Another process is connected under this client's name."""


class UnknownSession(SeqfedError):
    """The server does not know this session: it restarted, or the client joined again. Join again."""


class Unauthenticated(SeqfedError):
    """Whoever calls has no certificate or token of this federation, or one that has ended or was revoked."""


class NotAllowed(SeqfedError):
    """This identity may not do that."""


class PolicyRefused(SeqfedError):
    """A data holder's own policy forbids what a run asks of it."""


class RateLimited(SeqfedError):
    """The same peer calls too often; later it may again."""


class AuditBroken(SeqfedError):
    """The audit log's chain does not hold: an entry was changed, removed or put in."""


class MaskingRefused(SeqfedError):
    """A party of a masked sum refuses a step: what came does not keep to the protocol, or to this party's own rules."""


class MaskingFailed(SeqfedError):
    """A masked sum did not come about: too few clients stayed to its end, or what they sent does not open it."""


class UnknownRun(SeqfedError):
    """No run, or more than one, answers to this name."""


class RunEnded(SeqfedError):
    """The run is over, so it takes nothing more."""


class NoModel(SeqfedError):
    """The run has no such model version."""


class VersionMismatch(SeqfedError):
    """The two sides speak different versions of the protocol."""


class TrainingFailed(SeqfedError):
    """A client's local training stopped with an error of its own."""


class StorageFull(SeqfedError):
    """A disk is full; what was saved before is still good."""


class StorageError(SeqfedError):
    """A file or database of seqfed's own state cannot be read or written."""


class LeaseLost(SeqfedError):
    """Another daemon has taken over this one's store, so this one must not write any more."""


class PortInUse(SeqfedError):
    """Another process listens where the server wants to listen."""


class ServerUnavailable(SeqfedError):
    """No server answers at this address."""


class InsecureRefused(SeqfedError):
    """Plaintext off the loopback interface was asked for without saying so."""


class IllegalTransition(SeqfedError):
    """An event came that the round machine does not allow in its phase; the state is unchanged."""


class InternalError(SeqfedError):
    """The server met a surprise; its log has it, the stranger has not."""


def every_error() -> dict[str, type[SeqfedError]]:
    """All classes of the tree by name, the root included."""
    found: dict[str, type[SeqfedError]] = {}
    todo: list[type[SeqfedError]] = [SeqfedError]
    while todo:
        kind = todo.pop()
        found[kind.__name__] = kind
        todo.extend(kind.__subclasses__())
    return found


def storage_error(error: OSError, doing: str) -> SeqfedError:
    """The typed error for an OSError met while `doing` something with a file of our own."""
    import errno

    where = f" ({os.fsdecode(error.filename)})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"{doing}{where}: the disk is full; free some space; nothing saved before is lost")
    return StorageError(f"{doing}{where}: {error.strerror or error}")
