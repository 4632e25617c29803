"""Settings, schemas, model files, chunks, tokens, certificates, saved states, damaged in every way: done, or a SeqfedError."""

from __future__ import annotations

import contextlib
import json
import math
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from benchmarks import targets
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqfed.client.policy import Policy, Spent, check
from seqfed.client.settings import ClientSettings
from seqfed.common import checkpoint, identity, tokens, transfer
from seqfed.common.config import load_toml, validate, validate_json
from seqfed.common.errors import (
    BrokenTransfer,
    CheckpointError,
    ChecksumMismatch,
    ConfigError,
    PolicyRefused,
    SeqfedError,
    Unauthenticated,
)
from seqfed.common.identity import Role
from seqfed.common.layout import Layout, Parameters
from seqfed.common.schema import DataSchema
from seqfed.common.spec import RunSpec, Settings
from seqfed.common.transfer import Reassembly
from seqfed.server.round import Phase, Run
from seqfed.server.settings import ServerSettings
from seqfed.server.store import dump_state, load_state

quick = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)

texts = st.text(st.characters(codec="utf-8"), max_size=8)
plain = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | texts
    | st.sampled_from(["utf-8", "tab", "a:b", "lstm", "auto", "../..", "a\0", 10**400, -1, 0, 1])
)
trees = st.recursive(
    plain, lambda one: st.lists(one, max_size=3) | st.dictionaries(texts, one, max_size=3), max_leaves=8
)
KINDS: list[type[Settings]] = [RunSpec, ServerSettings, ClientSettings, Policy, DataSchema]


def contents(kind: type[Settings]) -> st.SearchStrategy[dict[str, Any]]:
    """Tables with the right keys, each with anything in it, and inner tables likewise; seldom another key."""
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for name, one in kind.model_fields.items():
        inner = one.annotation
        fields[name] = trees
        if isinstance(inner, type) and issubclass(inner, Settings):
            fields[name] = contents(inner) | contents(inner) | trees
        elif one.default is not None:
            fields[name] = trees | st.just(one.default)
    nothing: st.SearchStrategy[dict[str, Any]] = st.just({})
    extra = nothing | nothing | st.dictionaries(texts, trees, max_size=1)
    return st.builds(lambda found, more: {**more, **found}, st.fixed_dictionaries({}, optional=fields), extra)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_any_table_is_settings_or_refused_and_the_refusal_is_short(kind: type[Settings]) -> None:
    @quick
    @given(contents(kind))
    def look(content: dict[str, Any]) -> None:
        text = json.dumps(content, default=str).encode()
        for read in (partial(validate, kind, content, "any"), partial(validate_json, kind, text, "any")):
            try:
                found = read()
            except ConfigError as refusal:
                assert len(str(refusal)) < 20_000
            else:
                assert isinstance(found, kind)

    look()


@settings(quick, max_examples=70)
@given(st.data())
def test_any_toml_is_settings_or_refused(data: st.DataObject) -> None:
    path = targets.scratch() / "any.toml"
    kind = data.draw(st.sampled_from(KINDS))
    content = data.draw(contents(kind))
    with contextlib.suppress(TypeError, ValueError, OverflowError):  # TOML has no None, and no such number
        path.write_text(tomli_w.dumps(content), encoding="utf-8")
        text = bytearray(path.read_bytes())
        for at in data.draw(st.lists(st.integers(0, 1 << 12), max_size=3)):
            text[at % (len(text) + 1) : at % (len(text) + 1) + 1] = data.draw(st.binary(max_size=2))
        path.write_bytes(text)
    if path.exists():
        with contextlib.suppress(ConfigError):
            load_toml(kind, path)


@quick
@given(contents(Policy), st.integers(0, 1 << 62), st.none() | texts, st.integers(0, 1 << 62))
def test_any_policy_allows_or_refuses(content: dict[str, Any], size: int, operator: str | None, spent: int) -> None:
    spec = RunSpec.model_validate({"data": {"features": 2, "classes": 2}})
    with contextlib.suppress(ConfigError, PolicyRefused):
        policy = validate(Policy, content, "any")
        check(policy, spec, size, operator, Spent(spent, spent, spent, spent))


# Model files ----------------------------------------------------------------------------------------------------------

LAYOUT = Layout((("w", (3, 2)), ("b", (3,)), ("s", ())))


def a_file(folder: Path) -> bytes:
    path = folder / "good.safetensors"
    checkpoint.save(path, Parameters(LAYOUT, np.arange(LAYOUT.size, dtype=np.float32)), {"spec": "{}"})
    return path.read_bytes()


def load(folder: Path, data: bytes) -> Parameters:
    path = folder / "any.safetensors"
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        checkpoint.read_metadata(path)
    return checkpoint.load(path, LAYOUT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def test_a_file_cut_anywhere_or_with_more_behind_is_refused(folder: Path) -> None:
    good = a_file(folder)
    assert load(folder, good).flat.tolist() == list(range(LAYOUT.size))
    for end in range(len(good)):
        with pytest.raises(CheckpointError):
            load(folder, good[:end])
    for more in (b"\0", b"0" * 8, good):
        with pytest.raises(CheckpointError):
            load(folder, good + more)


@pytest.mark.parametrize("length", [0, 1, 7, 1 << 20, 100_000_001, 1 << 31, 1 << 62, (1 << 64) - 1])
def test_a_header_of_another_length_is_refused(folder: Path, length: int) -> None:
    with pytest.raises(CheckpointError):
        load(folder, length.to_bytes(8, "little") + a_file(folder)[8:])


dtypes = st.sampled_from(["F32", "F32", "F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E5M2", "F4", "C64", "", "f32"])
dimensions = st.lists(st.integers(0, 4) | st.sampled_from([-1, 1 << 31, 1 << 62, 1 << 64, 1 << 80]), max_size=4)
offsets = st.lists(st.integers(0, 40) | st.sampled_from([-4, 1 << 62, (1 << 64) - 1, 1 << 64]), max_size=3)
entries = st.fixed_dictionaries({}, optional={"dtype": dtypes, "shape": dimensions, "data_offsets": offsets}) | trees
GOOD = {
    "w": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
    "b": {"dtype": "F32", "shape": [3], "data_offsets": [24, 36]},
    "s": {"dtype": "F32", "shape": [], "data_offsets": [36, 40]},
}


@settings(quick, max_examples=120)
@given(
    st.dictionaries(st.sampled_from(["w", "b", "s", "__metadata__", ""]) | texts, entries, max_size=3),
    st.binary(max_size=8),
)
def test_any_header_is_this_model_or_refused(folder: Path, changes: dict[str, Any], more: bytes) -> None:
    text = json.dumps({**GOOD, **changes}).encode()
    with contextlib.suppress(CheckpointError):
        found = load(folder, len(text).to_bytes(8, "little") + text + bytes(40) + more)
        assert found.layout == LAYOUT
        assert not found.flat.any()


@settings(quick, max_examples=120)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_file_with_bytes_changed_is_a_model_or_refused(folder: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(a_file(folder))
    for at, byte in changes:
        data[at % len(data)] = byte
    with contextlib.suppress(CheckpointError):
        assert load(folder, bytes(data)).flat.shape == (LAYOUT.size,)


# Chunks ---------------------------------------------------------------------------------------------------------------


class Oracle:
    """Reassembly as one would write it without a thought of speed: the bytes by their places."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.bytes: dict[int, int] = {}

    def takes(self, offset: int, data: bytes, largest: int) -> bool:
        places = range(offset, offset + len(data))
        return (
            len(data) > 0
            and len(data) <= largest
            and all(place < self.total and place not in self.bytes for place in places)
            and all(place in self.bytes for place in range(offset))
            and (len(data) % 4 == 0 or offset + len(data) == self.total)
        )

    def add(self, offset: int, data: bytes) -> None:
        self.bytes.update(enumerate(data, offset))

    @property
    def whole(self) -> bytes:
        return bytes(self.bytes[place] for place in sorted(self.bytes))


@settings(quick, max_examples=120)
@given(st.data())
def test_chunks_in_any_order_and_of_any_size_are_as_a_slow_reader_has_them(data: st.DataObject) -> None:
    whole = data.draw(st.binary(max_size=64))
    largest = data.draw(st.sampled_from([4, 8, 16, 1 << 19]))
    digest = data.draw(st.sampled_from([blake3(whole).digest(), bytes(32)]))
    got: list[tuple[int, bytes]] = []
    oracle = Oracle(len(whole))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "CHUNK_BYTES", largest)
        reassembly = Reassembly(len(whole), digest, lambda offset, part: got.append((offset, part)))
        for _ in range(data.draw(st.integers(0, 12))):
            offset = data.draw(st.just(reassembly.received) | st.integers(0, 70))
            size = data.draw(st.sampled_from([0, 4, 8]) | st.integers(0, 70))
            part = whole[offset : offset + size] if data.draw(st.integers(0, 9)) else bytes(size)
            if oracle.takes(offset, part, largest):
                reassembly.add(offset, part)
                oracle.add(offset, part)
            else:
                with pytest.raises(BrokenTransfer):
                    reassembly.add(offset, part)
            assert reassembly.received == len(oracle.bytes)
            assert b"".join(part for _, part in got) == oracle.whole
    if len(oracle.bytes) < len(whole):
        with pytest.raises(BrokenTransfer):
            reassembly.finish()
    elif blake3(oracle.whole).digest() != digest:
        with pytest.raises(ChecksumMismatch):
            reassembly.finish()
    else:
        reassembly.finish()
        assert oracle.whole == whole


@given(st.binary(max_size=40).filter(lambda one: len(one) != 32))
def test_a_digest_of_another_length_is_refused(digest: bytes) -> None:
    with pytest.raises(BrokenTransfer):
        Reassembly(4, digest, lambda _, __: None)


# Who somebody is ------------------------------------------------------------------------------------------------------

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@settings(quick, max_examples=70)
@given(st.integers(0, 1 << 12), st.sampled_from(list(b"aA0-_.=\n \xff\0")), st.booleans())
def test_a_token_with_a_character_changed_is_refused_or_the_same_token(at: int, byte: int, cut: bool) -> None:
    ca = targets.an_authority()
    token = tokens.new("alice", ca.pem, NOW, 60.0)
    text = bytearray(tokens.sign(token, ca.key).encode())
    text[at % len(text) :] = [byte] if cut else [byte, *text[at % len(text) + 1 :]]
    with contextlib.suppress(Unauthenticated):
        assert tokens.verify(text.decode("latin-1"), ca.pem, NOW) == token


@settings(quick, max_examples=70)
@given(st.text(max_size=60) | st.from_regex(r"[A-Za-z0-9_-]{0,40}\.[A-Za-z0-9_-]{0,40}", fullmatch=True))
def test_any_text_is_no_token(text: str) -> None:
    with pytest.raises(Unauthenticated):
        tokens.verify(text, targets.an_authority().pem, NOW)
    with pytest.raises(SeqfedError):
        tokens.from_file(text.encode("utf-8", "surrogatepass"), "any", NOW)


@quick
@given(
    st.binary(max_size=60)
    | st.sampled_from(["CERTIFICATE", "CERTIFICATE REQUEST", "PRIVATE KEY", "EC PRIVATE KEY", "X"]).flatmap(
        lambda what: st.binary(max_size=40).map(lambda der: targets.pem(der, what))
    )
)
def test_any_text_is_no_certificate_no_request_and_no_key(text: bytes) -> None:
    for what in (identity.identity_of, identity.public_key_of):
        with pytest.raises(Unauthenticated):
            what(text)
    with pytest.raises(Unauthenticated):
        identity.verify_chain(text, targets.an_authority().pem, NOW)
    with pytest.raises(Unauthenticated):
        identity.verify_chain(targets.an_authority().pem, text, NOW)
    with pytest.raises(ConfigError):
        identity.load_key(text, "any")


def test_a_certificate_or_request_cut_anywhere_is_refused() -> None:
    ca = targets.an_authority()
    found = ca.credentials(Role.CLIENT, "alice", now=NOW)
    request = identity.request(found.key, "alice")
    assert identity.verify_chain(found.certificate, ca.pem, NOW).name == "alice"
    for end in range(0, len(found.certificate) - 1, 7):
        with pytest.raises(Unauthenticated):
            identity.verify_chain(found.certificate[:end], ca.pem, NOW)
    for end in range(0, len(request) - 1, 7):
        with pytest.raises(Unauthenticated):
            identity.public_key_of(request[:end])


# Saved states ---------------------------------------------------------------------------------------------------------

STATE = dump_state(Run(Phase.TRAINING, round=3, attempt=1, cohort=("a", "b"), times=(math.pi,)))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"phase": "unheard of"}', '{"phase": "training", "new": 1}', STATE[:-1], "[" * 100_000],
    ids=["empty", "list", "no-phase", "phase", "field", "cut", "deep"],
)
def test_a_damaged_state_is_refused(text: str) -> None:
    with pytest.raises(SeqfedError):
        load_state(text)


@quick
@given(trees | st.dictionaries(st.sampled_from(sorted(json.loads(STATE))), trees, max_size=4), st.binary(max_size=30))
def test_any_text_is_a_state_or_refused(content: object, more: bytes) -> None:
    with contextlib.suppress(SeqfedError):
        load_state(json.dumps(content))
    with contextlib.suppress(SeqfedError):
        load_state(STATE[: len(more)] + more.decode("latin-1"))


def test_a_state_is_read_again() -> None:
    assert load_state(STATE).cohort == ("a", "b")
