"""The messages of a masked sum: each survives the wire, and what is of another form than theirs is refused there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqfed.common import wire_masking as wire
from seqfed.common.errors import MaskingRefused
from seqfed.common.masking import messages
from seqfed.common.views import TaskKey
from seqfed.v1 import federation_pb2 as pb

NAMES = tuple(f"site-{number:02}" for number in range(11))
KEY = TaskKey("0123456789abcdef", 3, 2)


def exactly(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


names = st.sampled_from(NAMES)
some = st.frozensets(names)
key, signature = exactly(32), exactly(64)
certified = st.tuples(st.just(b""), st.just(b"")) | st.tuples(
    st.binary(min_size=1, max_size=72), st.binary(min_size=1, max_size=99)
)


def advert(name: str, keys: tuple[bytes, bytes, bytes], both: tuple[bytes, bytes], signed: bytes) -> messages.Advert:
    return messages.Advert(name, *keys, *both, signed)


adverts = st.builds(advert, names, st.tuples(key, key, key), certified, signature)
requests = st.one_of(
    adverts,
    st.builds(
        messages.KeyShares,
        st.dictionaries(names, exactly(messages.SEALED)),
        key,
        st.dictionaries(names, exactly(messages.COMMITMENTS)),
        signature,
    ),
    st.builds(
        messages.MaskedInput,
        st.lists(exactly(8), max_size=9).map(b"".join),
        st.just(b"") | key,
        signature,
    ),
    st.builds(messages.Confirm, signature),
    st.builds(messages.Opening, st.dictionaries(names, exactly(messages.OPENED))),
)
rosters = st.lists(adverts, unique_by=lambda one: one.client).map(
    lambda found: messages.Roster(tuple(sorted(found, key=lambda one: one.client)))
)
replies = st.one_of(
    rosters,
    st.builds(messages.Delivery, some, st.dictionaries(names, exactly(messages.SEALED))),
    st.builds(messages.Survivors, some),
    st.builds(messages.Confirmed, st.dictionaries(names, signature)),
    st.just(messages.Done()),
)


@given(requests, st.integers(0, (1 << 64) - 1))
def test_what_a_client_sends_survives(step: messages.Request, number: int) -> None:
    message = wire.request_to_wire(KEY, number, step)
    assert wire.request_from_wire(pb.MaskRequest.FromString(message.SerializeToString())) == (KEY, number, step)


@given(replies)
def test_what_the_server_answers_survives(reply: messages.Reply) -> None:
    message = wire.reply_to_wire(reply, NAMES)
    assert wire.reply_from_wire(pb.MaskReply.FromString(message.SerializeToString()), NAMES) == reply


def an_advert(**change: Any) -> pb.MaskAdvert:
    whole = {"client": "a", "encryption_key": b"e" * 32, "mask_key": b"m" * 32, "identity_key": b"i" * 32}
    return pb.MaskAdvert(**{**whole, "signature": b"s" * 64, **change})


def shares(**change: Any) -> pb.MaskShares:
    whole = {
        "sealed": {"b": bytes(messages.SEALED)},
        "self_commitment": b"c" * 32,
        "commitments": {"b": bytes(messages.COMMITMENTS)},
        "signature": b"s" * 64,
    }
    return pb.MaskShares(**{**whole, **change})


def masked(**change: Any) -> pb.MaskInput:
    return pb.MaskInput(**{"scalars": bytes(16), "digest": bytes(32), "signature": bytes(64), **change})


HOSTILE_REQUESTS: dict[str, tuple[pb.MaskRequest, str]] = {
    "nothing": (pb.MaskRequest(), "says nothing"),
    "no name": (pb.MaskRequest(advert=an_advert(client="")), "cannot be one"),
    "a name for a log": (pb.MaskRequest(advert=an_advert(client="a\nb")), r"'a\\\\nb' came as a client's name"),
    "a long name": (pb.MaskRequest(advert=an_advert(client="x" * 65)), "cannot be one"),
    "a dotted name": (pb.MaskRequest(advert=an_advert(client="..")), "cannot be one"),
    "a short key": (pb.MaskRequest(advert=an_advert(mask_key=b"m" * 31)), "a mask key of 31 bytes came; it has 32"),
    "a long key": (pb.MaskRequest(advert=an_advert(encryption_key=bytes(33))), "an encryption key of 33 bytes"),
    "no identity": (pb.MaskRequest(advert=an_advert(identity_key=b"")), "an identity key of 0 bytes"),
    "no signature": (pb.MaskRequest(advert=an_advert(signature=b"")), "a signature of 0 bytes came; it has 64"),
    "half certified": (pb.MaskRequest(advert=an_advert(certificate=b"x")), "only one of a certificate"),
    "half bound": (pb.MaskRequest(advert=an_advert(binding=b"x")), "only one of a certificate"),
    "a long certificate": (
        pb.MaskRequest(advert=an_advert(certificate=bytes(16_385), binding=b"x")),
        "a certificate of 16,385 bytes came; it has 0 to 16,384",
    ),
    "a long binding": (pb.MaskRequest(advert=an_advert(certificate=b"x", binding=bytes(73))), "0 to 72"),
    "a short share": (pb.MaskRequest(shares=shares(sealed={"b": b""})), "a sealed share for 'b' of 0 bytes"),
    "a share for nobody": (pb.MaskRequest(shares=shares(sealed={"": bytes(messages.SEALED)})), "cannot be one"),
    "one commitment": (pb.MaskRequest(shares=shares(commitments={"b": bytes(32)})), "for 'b' of 32 bytes"),
    "no own commitment": (pb.MaskRequest(shares=shares(self_commitment=b"")), "a commitment of 0 bytes"),
    "cut scalars": (pb.MaskRequest(masked=masked(scalars=bytes(9))), "masked scalars of 9 bytes came; each has 8"),
    "too many scalars": (pb.MaskRequest(masked=masked(scalars=bytes((8 << 17) + 8))), "0 to 1,048,576"),
    "half a digest": (pb.MaskRequest(masked=masked(digest=bytes(16))), "the digest of a vector of 16 bytes"),
    "an input unsigned": (pb.MaskRequest(masked=masked(signature=b"")), "a signature of 0 bytes"),
    "a short confirmation": (pb.MaskRequest(confirm=pb.MaskConfirm(signature=bytes(63))), "a signature of 63"),
    "both secrets": (
        pb.MaskRequest(opening=pb.MaskOpening(shares={"b": bytes(2 * messages.OPENED)})),
        f"an opened share for 'b' of {2 * messages.OPENED} bytes",
    ),
}
HOSTILE_REPLIES: dict[str, tuple[pb.MaskReply, str]] = {
    "nothing": (pb.MaskReply(), "says nothing"),
    "a client twice": (
        pb.MaskReply(roster=pb.MaskRoster(adverts=[an_advert(), an_advert()])),
        "the roster has 'a' after 'a'",
    ),
    "out of order": (
        pb.MaskReply(roster=pb.MaskRoster(adverts=[an_advert(client="b"), an_advert()])),
        "the roster has 'a' after 'b'",
    ),
    "a bad advert": (pb.MaskReply(roster=pb.MaskRoster(adverts=[an_advert(signature=b"")])), "a signature of 0 bytes"),
    "a short bitmap": (pb.MaskReply(survivors=pb.MaskSurvivors(members=b"\1")), "a bitmap of 1 bytes"),
    "a long bitmap": (pb.MaskReply(survivors=pb.MaskSurvivors(members=b"\1\1\0")), "a bitmap of 3 bytes"),
    "members beyond": (pb.MaskReply(delivery=pb.MaskDelivery(members=b"\0\x08")), "beyond the roster's 11"),
    "a sender unknown": (
        pb.MaskReply(delivery=pb.MaskDelivery(members=b"\0\0", sealed={"eve": bytes(messages.SEALED)})),
        "names 'eve', who is not in the roster",
    ),
    "a cut share": (
        pb.MaskReply(delivery=pb.MaskDelivery(members=b"\0\0", sealed={NAMES[0]: bytes(20)})),
        "a sealed share for 'site-00' of 20 bytes",
    ),
    "a signer unknown": (pb.MaskReply(confirmed=pb.MaskConfirmed(signatures={"eve": bytes(64)})), "names 'eve'"),
    "a cut signature": (
        pb.MaskReply(confirmed=pb.MaskConfirmed(signatures={NAMES[0]: b"x"})),
        "a signature for 'site-00' of 1 bytes",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_REQUESTS)
def test_a_request_of_another_form_is_refused(case: str) -> None:
    message, why = HOSTILE_REQUESTS[case]
    with pytest.raises(MaskingRefused, match=why):
        wire.request_from_wire(pb.MaskRequest.FromString(message.SerializeToString()))


@pytest.mark.parametrize("case", HOSTILE_REPLIES)
def test_an_answer_of_another_form_is_refused(case: str) -> None:
    message, why = HOSTILE_REPLIES[case]
    with pytest.raises(MaskingRefused, match=why):
        wire.reply_from_wire(pb.MaskReply.FromString(message.SerializeToString()), NAMES)


READERS: tuple[tuple[type[Any], Callable[[Any], Any]], ...] = (
    (pb.MaskRequest, wire.request_from_wire),
    (pb.MaskReply, lambda message: wire.reply_from_wire(message, NAMES)),
)


@given(st.binary(max_size=200), st.sampled_from(READERS))
def test_any_bytes_are_a_message_or_refused(data: bytes, reader: tuple[type[Any], Callable[[Any], Any]]) -> None:
    kind, read = reader
    try:
        message = kind.FromString(data)
    except Exception:  # noqa: BLE001 - protobuf's own refusal; what it lets through is what counts
        return
    with contextlib.suppress(MaskingRefused):
        read(message)
