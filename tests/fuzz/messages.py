"""Arbitrary messages of any protobuf type, from its descriptor: fields that say nothing sensible, and some that nearly do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

Kind = FieldDescriptor  # its constants name the types

TEXTS: Final = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["a", ".", "..", "../x", "a/b", "a\0", "a\n\x1b[2J", "\u202e", "%s", "{0}", "x" * 300, "0" * 32, "-1"]
)
BYTES: Final = st.binary(max_size=40) | st.sampled_from(
    [b"", b"{}", b"[]", b"null", bytes(32), b"\xff" * 32, b"[" * 3000]
)
REALS: Final = st.floats() | st.sampled_from([-0.0, 1e308, float("nan"), float("inf"), -1.0])


def _whole(bits: int, signed: bool) -> st.SearchStrategy[int]:
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    near = [low, low + 1, high, high - 1, 0, 1, 2, 4, 1 << (bits // 2), (1 << bits - 2) + 1]
    return st.sampled_from([one for one in near if low <= one <= high]) | st.integers(low, high)


SCALARS: Final[Mapping[int, st.SearchStrategy[Any]]] = {
    Kind.TYPE_STRING: TEXTS,
    Kind.TYPE_BYTES: BYTES,
    Kind.TYPE_BOOL: st.booleans(),
    Kind.TYPE_DOUBLE: REALS,
    Kind.TYPE_FLOAT: st.floats(width=32),
    Kind.TYPE_UINT32: _whole(32, signed=False),
    Kind.TYPE_UINT64: _whole(64, signed=False),
    Kind.TYPE_INT32: _whole(32, signed=True),
    Kind.TYPE_INT64: _whole(64, signed=True),
    Kind.TYPE_SINT32: _whole(32, signed=True),
    Kind.TYPE_SINT64: _whole(64, signed=True),
    Kind.TYPE_ENUM: st.integers(0, 9) | _whole(32, signed=True),
}

Hints = Mapping[str, st.SearchStrategy[Any]]  # by a field's full name: what comes there every other time


def of(descriptor: Any, hints: Hints | None = None) -> st.SearchStrategy[Any]:
    """Messages of this type, given by its descriptor; `hints` are values that lead further in."""
    kind = message_factory.GetMessageClass(descriptor)
    return _content(descriptor, hints or {}).map(lambda content: kind(**content))


def _content(descriptor: Descriptor, hints: Hints) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={one.name: _field(one, hints) for one in descriptor.fields}).map(
        _one_of_each
    )


def _one_of_each(content: dict[str, Any]) -> dict[str, Any]:
    """Without the second of two parts that exclude each other: protobuf keeps the last in any case."""
    if {"header", "chunk"} <= set(content):
        del content["chunk"]
    return content


def _field(field: FieldDescriptor, hints: Hints) -> st.SearchStrategy[Any]:
    inner = field.message_type
    if inner is not None and inner.GetOptions().map_entry:
        keys, values = (_value(one, hints) for one in inner.fields)
        found: st.SearchStrategy[Any] = st.dictionaries(keys, values, max_size=3)
    else:
        found = _value(field, hints)
        if field.is_repeated:
            found = st.lists(found, max_size=3)
    hint = hints.get(field.full_name)
    return found if hint is None else hint | found


def _value(field: FieldDescriptor, hints: Hints) -> st.SearchStrategy[Any]:
    return SCALARS[field.type] if field.message_type is None else of(field.message_type, hints)


def every(*files: Any) -> list[type[Message]]:
    """The classes of all messages of these proto files."""
    return [
        message_factory.GetMessageClass(one)
        for file in files
        for _, one in sorted(file.DESCRIPTOR.message_types_by_name.items())
    ]
