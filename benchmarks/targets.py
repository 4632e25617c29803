"""What `benchmarks.fuzz` feeds: each target takes any bytes and either does its work or raises a SeqfedError.

An assertion that fails here is a wrong result, and everything else that comes out an error without a type of ours.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import dataclasses
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from blake3 import blake3
from google.protobuf.message import DecodeError, Message

from seqfed.client.policy import Policy
from seqfed.client.settings import ClientSettings
from seqfed.common import addresses, authority, checkpoint, identity, signing, tokens, wire
from seqfed.common.compression import NAMES as CODECS
from seqfed.common.compression import Codec, Key, decode, encode, header
from seqfed.common.config import load_toml, validate_json
from seqfed.common.errors import BrokenTransfer, CheckpointError, ChecksumMismatch, SeqfedError
from seqfed.common.identity import Role
from seqfed.common.layout import Layout, Parameters
from seqfed.common.model import layout_of
from seqfed.common.schema import DataSchema, misfit
from seqfed.common.spec import RunSpec, Settings
from seqfed.common.transfer import CHUNK_BYTES, DIGEST_BYTES, GRAIN, Reassembly
from seqfed.server.settings import ServerSettings
from seqfed.v1 import admin_pb2, federation_pb2

LAYOUT: Final = Layout((("w", (2, 3)), ("b", (2,))))
SPARSE: Final = Layout((("w", (12, 33)), ("b", (17,))))  # of compressed updates
KEY: Final = Key(1, "fuzz", 1, "alice")
NOW: Final = datetime(2030, 1, 1, tzinfo=UTC)
KINDS: Final[tuple[type[Settings], ...]] = (RunSpec, ServerSettings, ClientSettings, Policy)
MESSAGES: Final[tuple[type[Message], ...]] = tuple(
    getattr(module, name)
    for module in (federation_pb2, admin_pb2)
    for name in sorted(module.DESCRIPTOR.message_types_by_name)
)
READERS: Final[Mapping[type[Message], Callable[[Any], object]]] = {
    federation_pb2.TaskKey: wire.key_from_wire,
    federation_pb2.Task: wire.task_from_wire,
    federation_pb2.ReportProgressRequest: wire.progress_from_wire,
    federation_pb2.UpdateHeader: wire.header_from_wire,
    admin_pb2.TaskStatus: wire.task_status_from_wire,
    admin_pb2.RoundRecord: wire.record_from_wire,
    admin_pb2.RunStatus: wire.run_from_wire,
    admin_pb2.ClientStatus: wire.client_from_wire,
    admin_pb2.AuditEntry: wire.entry_from_wire,
}
WRITERS: Final[Mapping[type[Message], Callable[[Any], Message]]] = {
    federation_pb2.TaskKey: wire.key_to_wire,
    federation_pb2.Task: wire.task_to_wire,
    federation_pb2.UpdateHeader: wire.header_to_wire,
    admin_pb2.TaskStatus: wire.task_status_to_wire,
    admin_pb2.RoundRecord: wire.record_to_wire,
    admin_pb2.RunStatus: wire.run_to_wire,
    admin_pb2.ClientStatus: wire.client_to_wire,
    admin_pb2.AuditEntry: wire.entry_to_wire,
}


@functools.cache
def scratch() -> Path:
    """A folder of this process, in memory where the system has such a place; it goes with the process."""
    memory = Path("/dev/shm")  # noqa: S108 - a folder of its own is made there
    path = Path(tempfile.mkdtemp(prefix="seqfed-fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _file(name: str, data: bytes) -> Path:
    path = scratch() / name
    path.write_bytes(data)
    return path


def read_checkpoint(data: bytes) -> None:
    """A file as a model of LAYOUT; what can be read is written and read again the same."""
    path = _file("model.safetensors", data)
    with contextlib.suppress(CheckpointError):
        checkpoint.read_metadata(path)
    found = checkpoint.load(path, LAYOUT)
    again = checkpoint.save(path.with_name("again.safetensors"), found, {})
    assert b"".join(again.pieces()) == found.flat.tobytes()
    assert checkpoint.load(again.path, LAYOUT).flat.tobytes() == found.flat.tobytes()


def read_config(data: bytes) -> None:
    """TOML as one of the kinds of settings, which the first byte chooses; a run's is the same again from its JSON."""
    kind = KINDS[data[0] % len(KINDS)] if data else RunSpec
    found = load_toml(kind, _file("settings.toml", data[1:]))
    if isinstance(found, RunSpec):
        _same_spec(found)


def read_spec(data: bytes) -> None:
    """JSON as a run's specification or as a client's data schema, and the one against the other."""
    for kind in (DataSchema, RunSpec):
        try:
            found = validate_json(kind, data, "fuzz")
        except SeqfedError:
            if kind is RunSpec:
                raise
            continue
        wire.require_clean(found.model_dump(), "fuzz")
        if isinstance(found, RunSpec):
            _same_spec(found)
            misfit(found.data, DataSchema(features=2, examples=10))


def _same_spec(spec: RunSpec) -> None:
    assert validate_json(RunSpec, spec.canonical, "canonical").canonical == spec.canonical
    layout = layout_of(spec)
    assert layout.nbytes > 0, "a model without parameters"
    assert all(one >= 0 for _, shape in layout.tensors for one in shape), "a tensor of a negative size"


def read_message(data: bytes) -> None:
    """Bytes as one of the messages, which the first byte chooses, and as the record that it stands for, and back."""
    kind = MESSAGES[data[0] % len(MESSAGES)] if data else MESSAGES[0]
    try:
        message = kind.FromString(data[1:])
    except DecodeError:  # gRPC answers it before any code of ours
        return
    record_of(message)


def record_of(message: Message) -> None:
    """The message's record, if it stands for one; written and read again it is the same."""
    reader, writer = _of(READERS, message), _of(WRITERS, message)
    if reader is None:
        return
    record = reader(message)
    if writer is not None:
        assert _content(reader(writer(record))) == _content(record)


def _of(functions: Mapping[type[Message], Callable[[Any], Any]], message: Message) -> Callable[[Any], Any] | None:
    return functions.get(type(message))


def _content(value: object) -> object:
    """What a record says: a map of protobuf has no order, and NaN is not itself."""
    if dataclasses.is_dataclass(value):
        return [(name, _content(one)) for name, one in vars(value).items()]
    if isinstance(value, dict):
        return sorted((repr(key), repr(one)) for key, one in value.items())
    return [_content(one) for one in value] if isinstance(value, tuple) else repr(value)


def reassemble(data: bytes) -> None:
    """Chunks of a vector, held against a slow reader. Two bytes of size, then four a chunk: of what kind, and how long."""
    if len(data) < 2:
        return
    total = GRAIN * ((data[0] & 15) << 8 | data[1]) + (
        CHUNK_BYTES if data[0] & 0x60 == 0x60 else 0
    )  # seldom a long one
    whole = np.random.default_rng(total).bytes(total)
    got = bytearray()
    digest = blake3(whole).digest() if data[0] % 8 else bytes(DIGEST_BYTES)
    reassembly = Reassembly(
        total, digest, lambda offset, part: got.__setitem__(slice(offset, offset + len(part)), part)
    )
    for start in range(2, len(data) - 3, 4):
        where, most, kind = len(got), data[start + 1] << 8 | data[start + 2], data[start]
        if kind % 4 == 1:  # another place than the next one
            where = GRAIN * (kind << 8 | data[start + 3])
        size = {2: most, 3: CHUNK_BYTES + GRAIN * most}.get(kind % 4, GRAIN * most)
        chunk = (whole[where : where + size]) if kind & 64 else bytes(size)
        fits = (
            where == len(got)
            and 0 < len(chunk) <= min(CHUNK_BYTES, total - where)
            and (len(chunk) % GRAIN == 0 or where + len(chunk) == total)
        )
        before = bytes(got)
        try:
            reassembly.add(where, chunk)
        except BrokenTransfer:
            assert not fits, "a chunk that fits was refused"
            assert bytes(got) == before, "what a refused chunk brought was kept"
        else:
            assert fits, "a chunk that does not fit was taken"
            assert bytes(got) == before + chunk
        assert reassembly.received == len(got)
    try:
        reassembly.finish()
    except (BrokenTransfer, ChecksumMismatch) as error:
        right = len(got) == total and blake3(got).digest() == digest
        assert not right, "the right bytes were refused"
        missing = isinstance(error, BrokenTransfer)
        assert missing == (len(got) != total)
    else:
        assert blake3(got).digest() == digest


@functools.cache
def an_authority() -> authority.Authority:
    """A CA of this process."""
    return authority.create(scratch() / "ca", NOW)


def read_identity(data: bytes) -> None:
    """DER as a certificate, a request or a key, and text as a token, a token file or an address; the first byte chooses."""
    kind, rest = (data[0] % 6, data[1:]) if data else (0, b"")
    ca = an_authority().pem
    match kind:
        case 0:
            found = _outcome(lambda: identity.verify_chain(pem(rest), ca, NOW))
            assert not isinstance(found, identity.Identity) or str(found) == "operator 'alice'", "a stranger passed"
            _outcome(lambda: identity.identity_of(pem(rest)))
            _outcome(lambda: identity.verify_chain(pem(rest), pem(rest), NOW))
            _outcome(lambda: identity.verify_chain(ca, pem(rest), NOW))
            _outcome(lambda: signing.verify(pem(rest), ca, b"data", rest[-70:], NOW))
            _outcome(lambda: tokens.verify("a.b", pem(rest), NOW))
        case 1:
            identity.public_key_of(pem(rest, "CERTIFICATE REQUEST"))
        case 2:
            identity.load_key(pem(rest, "PRIVATE KEY"), "fuzz")
        case 3:
            assert tokens.verify(rest.decode("utf-8", "surrogateescape"), ca, NOW).client == "alice", (
                "a stranger passed"
            )
        case 4:
            tokens.from_file(rest, "fuzz", NOW)
        case _:
            text = rest.decode("utf-8", "replace")
            host, port = addresses.parse(text)
            assert addresses.parse(addresses.join(host, port)) == (host, port)
            addresses.is_loopback(host)


def _outcome(work: Callable[[], object]) -> object:
    try:
        return work()
    except SeqfedError as error:
        return error


def pem(der: bytes, what: str = "CERTIFICATE") -> bytes:
    """The DER in PEM form, so that what is mutated is the content and not its armour."""
    return f"-----BEGIN {what}-----\n".encode() + base64.encodebytes(der) + f"-----END {what}-----\n".encode()


def read_payload(data: bytes) -> None:
    """A compressed update. The first byte chooses the codec, and whether the rest is all of the payload; else a byte of flags,
    two of how many numbers it says it has, and a body, to which the right hash is made.
    """
    if len(data) < 4:
        return
    codec = Codec(CODECS[data[0] % len(CODECS)])
    payload = data[1:]
    if data[0] < 128:
        payload = header.write(codec, SPARSE, KEY, data[1], int.from_bytes(data[2:4], "little"), data[4:])
    found = np.concatenate([np.empty(0, np.float32), *decode(payload, SPARSE, KEY, codec)])
    assert found.shape == (SPARSE.size,)
    assert codec.name == "none" or np.isfinite(found).all(), "a number that is not finite came of finite ones"


TARGETS: Final[Mapping[str, Callable[[bytes], None]]] = {
    "checkpoint": read_checkpoint,
    "config": read_config,
    "spec": read_spec,
    "wire": read_message,
    "chunks": reassemble,
    "identity": read_identity,
    "payload": read_payload,
}

# Words that a mutation may put in; a fuzzer would find most of them by itself, late.
WORDS: Final[Mapping[str, tuple[bytes, ...]]] = {
    "checkpoint": (b'"dtype"', b'"F32"', b'"BF16"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b"[0,24]", b"-1"),
    "config": (b"[data]", b"[model]", b"[cohort]", b"= ", b"nan", b"inf", b"1e400", b"0x", b'"""', b"[[", b"\n", b"{"),
    "spec": (
        b'"data"',
        b'"model"',
        b'"custom"',
        b'"tensors"',
        b"null",
        b"1e400",
        b"-1",
        b"NaN",
        b"[",
        b"{}",
        b'"\\ud800"',
    ),
    "wire": (b"\xff\xff\xff\xff\x0f", b"\x0a\x00", b"\x80", b"{}"),
    "chunks": (b"\x41", b"\x40", b"\x00\x00"),
    "payload": (b"sfc1", b"\x00\x00\x80\x7f", b"\xff\xff\xff\xff", b"\x80", b"\x00"),
    "identity": (b"\x30\x82", b"\x06\x03\x55\x1d", b"seqfed:", b"\xa3", b"\x02\x01", b"ey", b"."),
}


def seeds(target: str) -> dict[str, bytes]:
    """Good inputs and near misses to begin with, by name."""
    return _SEEDS[target]()


def _checkpoints() -> dict[str, bytes]:
    path = scratch() / "seed.safetensors"
    flat = np.arange(LAYOUT.size, dtype=np.float32)
    checkpoint.save(path, Parameters(LAYOUT, flat), {"run": "0"})
    good = path.read_bytes()

    def with_header(entries: object, data: bytes = flat.tobytes()) -> bytes:
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + data

    w = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    b = {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]}
    return {
        "good": good,
        "truncated": good[:-1],
        "trailing": good + b"0",
        "huge-header": b"\xff" * 8 + good[8:],
        "other-order": with_header({"b": {**b, "data_offsets": [0, 8]}, "w": {**w, "data_offsets": [8, 32]}}),
        "overlap": with_header({"w": w, "b": {**b, "data_offsets": [16, 24]}}),
        "half": with_header(
            {"w": {**w, "dtype": "BF16", "data_offsets": [0, 12]}, "b": {**b, "data_offsets": [12, 20]}}
        ),
        "negative": with_header({"w": {**w, "shape": [-2, -3]}, "b": b}),
        "overflow": with_header({"w": {**w, "shape": [1 << 62, 1 << 62]}, "b": b}),
        "scalar": with_header({"w": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, bytes(4)),
        "empty": b"",
    }


def _configs() -> dict[str, bytes]:
    run = (
        b'name = "a"\nrounds = 3\n[data]\nfeatures = 2\nclasses = 2\nsteps = 5\n[model]\nkind = "rnn"\nhidden = 4\n'
        b"[training]\nlearning_rate = 0.1\n[cohort]\nmin_clients = 2\ncount = 3\nquorum = 2\n[aggregation]\nmax_norm = 1.5\n"
    )
    custom = b'[data]\nfeatures = 2\nclasses = 2\n[model]\ncustom = "a:b"\ntensors = [["w", [2, 3]], ["b", [2]]]\n'
    client = b'server = "a:1, b:2"\nname = "a"\n[data]\nfile = ["a.csv", "b.csv"]\nlabel = "y"\ngroup = "g"\ndelimiter = "tab"\n'
    return {
        "run": b"\0" + run,
        "custom": b"\0" + custom,
        "tokens": b"\0" + b'[data]\nvocabulary = ["a", "b"]\nsteps = 4\n[task]\nkind = "next_token"\n',
        "server": b'\1host = "0.0.0.0"\nport = 1\nstate = "s"\ntls = "t"\nca = "c"\nlease_s = 5.0\n',
        "client": b"\2" + client,
        "policy": b'\3operators = ["a"]\ntasks = ["regression"]\nmax_epochs = 2\nmax_bytes_total = 10\ncustom = ["a:b"]\n',
        "unknown": b"\0[data]\nfeaturse = 2\n",
        "not-text": b"\0\xff",
        "date": b"\1port = 1979-05-27T07:32:00Z\n",
    }


def _specs() -> dict[str, bytes]:
    data = {"features": 2, "classes": 2}
    custom = {"data": data, "model": {"custom": "a:b", "tensors": [["w", [2, 3]]]}}
    return {
        "run": RunSpec.model_validate({"data": data}).canonical,
        "small": b'{"data":{"features":2,"classes":2}}',
        "custom": json.dumps(custom).encode(),
        "schema": b'{"features":2,"steps":5,"classes":2,"columns":["a","b"],"examples":10}',
        "list": b"[]",
        "big": b'{"seed":1' + b"0" * 30 + b"}",
    }


def _messages() -> dict[str, bytes]:
    spec = b'{"data":{"features":2,"classes":2}}'
    key = federation_pb2.TaskKey(run="0123456789abcdef", round=1, attempt=1)
    model = federation_pb2.ModelVersion(version=1, bytes=8, digest=bytes(32), layout_digest=bytes(32))
    header = federation_pb2.UpdateHeader(key=key, weight=3, bytes=8, digest=bytes(32), tally={"examples": 1})
    record = admin_pb2.RoundRecord(round=1, cohort=["a"], folded=["a"], evaluation={"loss": 0.5})
    record.spread["loss"].median = 0.25
    good: list[Message] = [
        federation_pb2.Task(kind=federation_pb2.TASK_KIND_TRAIN, key=key, spec=spec, model=model),
        federation_pb2.SubmitUpdateRequest(header=header),
        federation_pb2.ReportProgressRequest(key=key, stage=federation_pb2.STAGE_TRAINING, done=1, total=2, loss=0.5),
        header,
        admin_pb2.RunStatus(run="a", spec=spec, history=[record], tasks=[admin_pb2.TaskStatus(client="a", round=1)]),
        admin_pb2.ClientStatus(client="a", data_schema=b'{"examples":1}'),
        admin_pb2.AuditEntry(number=1, kind="refused", body=b"{}", digest=bytes(32)),
    ]
    return {
        type(one).__name__: bytes([MESSAGES.index(type(one))]) + one.SerializeToString(deterministic=True)
        for one in good
    }


def _chunks() -> dict[str, bytes]:
    return {
        "whole": bytes([1, 0]) + bytes([64, 1, 0, 0]),
        "parts": bytes([1, 0]) + bytes([64, 0, 128, 0]) * 2,
        "twice": bytes([1, 0]) + bytes([64, 1, 0, 0]) * 2,
        "skipped": bytes([1, 0]) + bytes([65, 1, 0, 0]),
        "cut": bytes([1, 0]) + bytes([66, 0, 3, 0]),
        "nothing": bytes([0, 0]),
        "wrong-digest": bytes([0, 8]) + bytes([64, 0, 8, 0]),
    }


def _identities() -> dict[str, bytes]:
    """Made anew each time: keys are random, and none is kept in the corpus."""
    ca = an_authority()
    found = ca.credentials(Role.OPERATOR, "alice", now=NOW)
    token = tokens.sign(tokens.new("alice", ca.pem, NOW, 60.0), ca.key)
    return {
        "certificate": b"\0" + _der(found.certificate),
        "ca": b"\0" + _der(ca.pem),
        "request": b"\1" + _der(identity.request(found.key, "alice")),
        "key": b"\2" + _der(found.key),
        "token": b"\3" + token[:-1].encode(),
        "token-file": b"\4" + tokens.to_file(token, ca.pem),
        "address": b"\5[::1]:80",
    }


def _payloads() -> dict[str, bytes]:
    """Of each codec a whole payload, and one whose hash is made anew; two rows are zero."""
    vector = np.sin(np.arange(SPARSE.size, dtype=np.float32) ** 2).astype(np.float32)
    vector[33:99] = 0
    found = {}
    for number, name in enumerate(CODECS):
        made = encode(vector, SPARSE, KEY, Codec(name)).payload
        whole = 128 + (number - 128) % len(CODECS)
        found[f"{name}-whole"] = bytes([whole]) + made
        found[name] = bytes([number, made[7]]) + made[32:34] + made[header.SIZE :]
    return found


def _der(armoured: bytes) -> bytes:
    return base64.b64decode(b"".join(line for line in armoured.splitlines() if not line.startswith(b"-----")))


_SEEDS: Final[Mapping[str, Callable[[], dict[str, bytes]]]] = {
    "checkpoint": _checkpoints,
    "config": _configs,
    "spec": _specs,
    "wire": _messages,
    "chunks": _chunks,
    "identity": _identities,
    "payload": _payloads,
}
