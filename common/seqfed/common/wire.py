"""Between the records of `views` and the protobuf messages of seqfed.v1; what comes in is checked here or by pydantic."""

from __future__ import annotations

import functools
import math
import re
from typing import Any, Final

from google.protobuf.message import Message

from seqfed.common import views
from seqfed.common.config import validate_json
from seqfed.common.errors import ConfigError, InvalidName, VersionMismatch
from seqfed.common.logs import UNPRINTABLE
from seqfed.common.schema import DataSchema
from seqfed.common.spec import RunSpec
from seqfed.v1 import admin_pb2, federation_pb2

PROTOCOL: Final = 1  # version of the contract in protos/; raised when an old peer could misunderstand
SESSION_METADATA: Final = "seqfed-session"
ERROR_DOMAIN: Final = "seqfed"  # of google.rpc.ErrorInfo
CLIENT_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
PREFIX_BYTES: Final = 5  # of gRPC, before each message
FRAME_BYTES: Final = 9  # of HTTP/2 (RFC 9113, 4.1), before each frame
FRAME_MOST: Final = 1 << 14  # bytes of a message in a frame, unless the peer has asked for larger ones
# What else HTTP/2 needs, as counted of grpcio 1.85's frames; with these the sums are within 2 % of what TCP carries. Of a call,
# up: its headers, 66 to 107 bytes, and two or three WINDOW_UPDATEs of 13; down: headers and trailers, 37, and a WINDOW_UPDATE.
# Of a task, both ways: half a PING of 17, with which the client measures the link.
CALL_UP: Final = 100
CALL_DOWN: Final = 50
PING_BYTES: Final = 8
HEX: Final = re.compile(r"[0-9a-f]{32}")

_KINDS: Final = {
    views.TaskKind.TRAIN: federation_pb2.TASK_KIND_TRAIN,
    views.TaskKind.EVALUATE: federation_pb2.TASK_KIND_EVALUATE,
    views.TaskKind.CANCEL: federation_pb2.TASK_KIND_CANCEL,
    views.TaskKind.MEASURE: federation_pb2.TASK_KIND_MEASURE,
}
_KINDS_BACK: Final = {number: kind for kind, number in _KINDS.items()}
_STAGES: Final = {
    views.Stage.READING: federation_pb2.STAGE_READING,
    views.Stage.FETCHING: federation_pb2.STAGE_FETCHING,
    views.Stage.TRAINING: federation_pb2.STAGE_TRAINING,
    views.Stage.EVALUATING: federation_pb2.STAGE_EVALUATING,
    views.Stage.SENDING: federation_pb2.STAGE_SENDING,
}
_STAGES_BACK: Final = {number: stage for stage, number in _STAGES.items()}


def check_client_name(name: str) -> str:
    """The name itself; raises InvalidName. Names become parts of file names and log lines."""
    if not CLIENT_NAME.fullmatch(name) or name.startswith("."):
        raise InvalidName(f"client name {name[:80]!r}: use 1 to 64 of A-Z a-z 0-9 . _ - and no dot in front")
    return name


def clean(text: str, longest: int) -> str:
    """A peer's words, cut off and on one line: what could forge a line of a log, or steer a terminal, is escaped."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text[:longest])


def require_clean(value: object, what: str) -> None:
    """Raise InvalidName if any text in this content of JSON has a control character."""
    if isinstance(value, str):
        if UNPRINTABLE.search(value):
            raise InvalidName(f"{what}: {clean(value, 80)!r} has a character that cannot be printed; take it out")
    elif isinstance(value, dict):
        for key, one in value.items():
            require_clean(key, what)
            require_clean(one, what)
    elif isinstance(value, list | tuple):
        for one in value:
            require_clean(one, what)


def on_wire(size: int) -> int:
    """Bytes of a message of so many, on its way: with gRPC's prefix and HTTP/2's frames, without TLS."""
    whole = size + PREFIX_BYTES
    return whole + FRAME_BYTES * -(-whole // FRAME_MOST)


def request_bytes(message: Message) -> int:
    """Of a call with this one message, from the client."""
    return CALL_UP + on_wire(message.ByteSize())


def reply_bytes(message: Message) -> int:
    """Of a call with this one answer, to the client."""
    return CALL_DOWN + on_wire(message.ByteSize())


def task_bytes(message: Message) -> int:
    """Of a task that is pushed to a client that listens."""
    return PING_BYTES + on_wire(message.ByteSize())


def chunk_bytes(offset: int, size: int) -> int:
    """Of a Chunk, reckoned: protobuf would write the message to tell its size."""
    return (1 + _varint(offset) if offset else 0) + (1 + _varint(size) + size if size else 0)


def part_bytes(size: int) -> int:
    """Of a message of so many bytes, as the one field of another, on the wire."""
    return on_wire(1 + _varint(size) + size)


def _varint(number: int) -> int:
    return max(1, -(-number.bit_length() // 7))


def key_to_wire(key: views.TaskKey) -> federation_pb2.TaskKey:
    return federation_pb2.TaskKey(run=key.run, round=key.round, attempt=key.attempt)


def key_from_wire(message: federation_pb2.TaskKey) -> views.TaskKey:
    return views.TaskKey(message.run, message.round, message.attempt)


def task_to_wire(task: views.Task, known: RunSpec | None = None) -> federation_pb2.Task:
    """The message; without the specification if that is the `known` one, the last on the same stream.

    Its signature comes with every task, so that each can be judged by itself.
    """
    model = federation_pb2.ModelVersion(
        version=task.model.version,
        bytes=task.model.nbytes,
        digest=task.model.digest,
        layout_digest=task.model.layout_digest,
        data=task.model.data,
        steps=[
            federation_pb2.ModelStep(
                version=one.version, base=one.base, bytes=one.nbytes, digest=one.digest, data=one.data
            )
            for one in task.model.steps
        ],
    )
    spec = b"" if task.spec is known else task.spec.canonical
    masking = None
    if task.masking is not None:
        given = task.masking
        masking = federation_pb2.MaskingTerms(number=given.number, n_max=given.n_max, known=given.known)
    return federation_pb2.Task(
        kind=_KINDS[task.kind],
        key=key_to_wire(task.key),
        spec=spec,
        model=model,
        signature=task.signature,
        certificate=task.certificate,
        masking=masking,
        statistics=task.statistics,
    )


@functools.lru_cache(maxsize=16)
def _spec(text: bytes) -> RunSpec:
    """The same text gives the same object, so a run's tasks share one specification."""
    return validate_json(RunSpec, text, "the task's specification")


def task_from_wire(message: federation_pb2.Task, known: RunSpec | None = None) -> views.Task:
    """The task; `known` is the specification of the last one on the same stream.

    Raises ConfigError for a specification that does not validate, and for a masked sum of fewer than 2 clients, VersionMismatch
    for a kind from the future.
    """
    if message.kind not in _KINDS_BACK:
        raise VersionMismatch(
            f"this version of seqfed knows no task of kind {message.kind}; install the server's version"
        )
    model = message.model
    masking = None
    if message.HasField("masking"):
        if message.masking.n_max < 2:
            raise ConfigError(
                f"the task's masked sum is of {message.masking.n_max} clients at most, and one of fewer than 2 hides nothing"
            )
        masking = views.MaskingTerms(message.masking.number, message.masking.n_max, message.masking.known)
    return views.Task(
        _KINDS_BACK[message.kind],
        key_from_wire(message.key),
        known if known is not None and not message.spec else _spec(message.spec),
        views.ModelVersion(
            model.version,
            model.bytes,
            model.digest,
            model.layout_digest,
            model.data,
            tuple(views.ModelStep(one.version, one.base, one.bytes, one.digest, one.data) for one in model.steps),
        ),
        message.signature,
        message.certificate,
        masking,
        message.statistics,
    )


def progress_to_wire(key: views.TaskKey, progress: views.Progress) -> federation_pb2.ReportProgressRequest:
    return federation_pb2.ReportProgressRequest(
        key=key_to_wire(key),
        stage=_STAGES[progress.stage],
        done=progress.done,
        total=progress.total,
        epoch=progress.epoch,
        loss=math.nan if progress.loss is None else progress.loss,
    )


def progress_from_wire(message: federation_pb2.ReportProgressRequest) -> views.Progress:
    """The progress; raises VersionMismatch for a stage from the future."""
    if message.stage not in _STAGES_BACK:
        raise VersionMismatch(
            f"this version of seqfed knows no stage {message.stage} of a task; run the same on both sides"
        )
    loss = message.loss if math.isfinite(message.loss) else None
    return views.Progress(_STAGES_BACK[message.stage], message.done, message.total, message.epoch, loss)


def task_status_to_wire(view: views.TaskView) -> admin_pb2.TaskStatus:
    message = admin_pb2.TaskStatus(
        client=view.client, round=view.round, silent_s=view.silent_s, connected=view.connected, loss=math.nan
    )
    if view.progress is not None:
        message.stage = _STAGES[view.progress.stage]
        message.done, message.total = view.progress.done, view.progress.total
        message.epoch = view.progress.epoch
        message.loss = math.nan if view.progress.loss is None else view.progress.loss
    return message


def task_status_from_wire(message: admin_pb2.TaskStatus) -> views.TaskView:
    progress = None
    if message.stage in _STAGES_BACK:
        loss = message.loss if math.isfinite(message.loss) else None
        progress = views.Progress(_STAGES_BACK[message.stage], message.done, message.total, message.epoch, loss)
    return views.TaskView(message.client, message.round, progress, message.silent_s, message.connected)


def header_to_wire(header: views.UpdateHeader) -> federation_pb2.UpdateHeader:
    return federation_pb2.UpdateHeader(
        key=key_to_wire(header.key),
        weight=header.weight,
        layout_digest=header.layout_digest,
        bytes=header.nbytes,
        digest=header.digest,
        offset=header.offset,
        tally=header.tally,
        training_seconds=header.training_seconds,
        masked_number=header.masked_number,
        codec=header.codec,
    )


def header_from_wire(message: federation_pb2.UpdateHeader) -> views.UpdateHeader:
    return views.UpdateHeader(
        key=key_from_wire(message.key),
        weight=message.weight,
        layout_digest=message.layout_digest,
        nbytes=message.bytes,
        digest=message.digest,
        offset=message.offset,
        tally=dict(message.tally),
        training_seconds=message.training_seconds,
        masked_number=message.masked_number,
        codec=message.codec,
    )


def record_to_wire(record: views.RoundRecord) -> admin_pb2.RoundRecord:
    return admin_pb2.RoundRecord(
        round=record.round,
        attempt=record.attempt,
        cohort=record.cohort,
        folded=record.folded,
        training=record.training,
        evaluation=record.evaluation,
        bytes_up=record.bytes_up,
        bytes_down=record.bytes_down,
        seconds=record.seconds,
        slowest_training_seconds=record.slowest_training_seconds,
        spread={
            metric: admin_pb2.Spread(median=median, worst_decile=worst)
            for metric, (median, worst) in record.spread.items()
        },
        evaluated_examples=record.evaluated_examples,
        evaluated_clients=record.evaluated_clients,
        stale=record.stale,
        traffic={client: admin_pb2.Traffic(up=up, down=down) for client, (up, down) in record.traffic.items()},
    )


def record_from_wire(message: admin_pb2.RoundRecord) -> views.RoundRecord:
    return views.RoundRecord(
        round=message.round,
        attempt=message.attempt,
        cohort=tuple(message.cohort),
        folded=tuple(message.folded),
        training=dict(message.training),
        evaluation=dict(message.evaluation),
        bytes_up=message.bytes_up,
        bytes_down=message.bytes_down,
        seconds=message.seconds,
        slowest_training_seconds=message.slowest_training_seconds,
        spread={metric: (both.median, both.worst_decile) for metric, both in message.spread.items()},
        evaluated_examples=message.evaluated_examples,
        evaluated_clients=message.evaluated_clients,
        stale=dict(message.stale),
        traffic={client: (both.up, both.down) for client, both in message.traffic.items()},
    )


def run_to_wire(view: views.RunView) -> admin_pb2.RunStatus:
    return admin_pb2.RunStatus(
        run=view.run,
        name=view.name,
        phase=view.phase,
        round=view.round,
        rounds=view.rounds,
        attempt=view.attempt,
        cohort=view.cohort,
        pending=view.pending,
        reason=view.reason,
        history=[record_to_wire(record) for record in view.history],
        bytes_up=view.bytes_up,
        bytes_down=view.bytes_down,
        seconds=view.seconds,
        spec=view.spec.canonical,
        ended=view.ended,
        metrics=view.metrics,
        tasks=[task_status_to_wire(one) for one in view.tasks],
        deadline_s=-1.0 if view.deadline_s is None else view.deadline_s,
    )


def run_from_wire(message: admin_pb2.RunStatus) -> views.RunView:
    return views.RunView(
        run=message.run,
        name=message.name,
        phase=message.phase,
        round=message.round,
        rounds=message.rounds,
        attempt=message.attempt,
        cohort=tuple(message.cohort),
        pending=tuple(message.pending),
        reason=message.reason,
        history=tuple(record_from_wire(record) for record in message.history),
        bytes_up=message.bytes_up,
        bytes_down=message.bytes_down,
        seconds=message.seconds,
        spec=validate_json(RunSpec, message.spec, "the run's specification"),
        ended=message.ended,
        metrics=dict(message.metrics),
        tasks=tuple(task_status_from_wire(one) for one in message.tasks),
        deadline_s=message.deadline_s if message.deadline_s >= 0 else None,
    )


def client_to_wire(view: views.ClientView) -> admin_pb2.ClientStatus:
    return admin_pb2.ClientStatus(
        client=view.client,
        connected=view.connected,
        seconds=view.seconds,
        task=view.task,
        data_schema=b"" if view.schema is None else view.schema.model_dump_json().encode(),
        software=view.software,
        revoked=view.revoked,
    )


def client_from_wire(message: admin_pb2.ClientStatus) -> views.ClientView:
    schema = None
    if message.data_schema:
        schema = validate_json(DataSchema, message.data_schema, "a client's data schema")
    return views.ClientView(
        message.client, message.connected, message.seconds, message.task, schema, message.software, message.revoked
    )


def entry_to_wire(entry: views.AuditEntry) -> admin_pb2.AuditEntry:
    return admin_pb2.AuditEntry(
        number=entry.number, at=entry.at, kind=entry.kind, body=entry.body.encode(), digest=entry.digest
    )


def entry_from_wire(message: admin_pb2.AuditEntry) -> views.AuditEntry:
    """The entry; what is no UTF-8 in it is replaced, and the chain then does not hold."""
    body = message.body.decode("utf-8", "replace")
    return views.AuditEntry(message.number, message.at, message.kind, body, message.digest)


def privacy_to_wire(report: views.PrivacyReport) -> admin_pb2.PrivacyReport:
    return admin_pb2.PrivacyReport(
        runs=[
            admin_pb2.RunPrivacy(
                **{name: value for name, value in vars(one).items() if name not in {"entry", "holders"}},
                entry=admin_pb2.LedgerEntry(**vars(one.entry)),
                holders=[
                    admin_pb2.HolderPrivacy(holder=holder, releases=releases, epsilon=epsilon)
                    for holder, releases, epsilon in one.holders
                ],
            )
            for one in report.runs
        ],
        totals=[admin_pb2.SpentPrivacy(**vars(one)) for one in report.totals],
    )


def privacy_from_wire(message: admin_pb2.PrivacyReport) -> views.PrivacyReport:
    return views.PrivacyReport(
        tuple(
            views.PrivacyView(
                name=one.name,
                entry=views.LedgerEntry(
                    run=one.entry.run,
                    holder=one.entry.holder,
                    round=one.entry.round,
                    releases=one.entry.releases,
                    unit=one.entry.unit,
                    epsilon=_given(one.entry, "epsilon"),
                    delta=one.entry.delta,
                    noise_multiplier=_given(one.entry, "noise_multiplier"),
                    sampling=one.entry.sampling,
                    accountant=one.entry.accountant,
                ),
                mode=one.mode,
                mechanism=one.mechanism,
                neighbours=one.neighbours,
                goal=_given(one, "goal"),
                planned=_given(one, "planned"),
                rounds=one.rounds,
                clip=one.clip,
                population=one.population if one.HasField("population") else None,
                cohort=one.cohort,
                caveats=tuple(one.caveats),
                holders=tuple((each.holder, each.releases, _given(each, "epsilon")) for each in one.holders),
            )
            for one in message.runs
        ),
        tuple(
            views.SpentView(one.unit, one.holder, one.runs, _given(one, "epsilon"), one.delta, one.accountant)
            for one in message.totals
        ),
    )


def _given(message: Any, name: str) -> float | None:
    """An optional number of a message."""
    return float(getattr(message, name)) if message.HasField(name) else None
