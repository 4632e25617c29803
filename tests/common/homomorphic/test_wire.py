"""The messages of an encrypted sum: each survives the wire, and what is of another form is refused there."""

from __future__ import annotations

import pytest

from seqfed.common import wire_masking
from seqfed.common.errors import MaskingRefused
from seqfed.common.homomorphic.messages import CIPHERTEXT, Circle, Encrypted, Fetch, Opened, Piece, Ready, ToOpen
from seqfed.common.views import TaskKey
from seqfed.v1 import federation_pb2 as pb

KEY = TaskKey("0123456789abcdef", 2, 1)
NAMES = ("a", "b", "c")
D = bytes(range(32))


@pytest.mark.parametrize(
    "step", [Ready(D, D[::-1]), Encrypted(D), Fetch(0), Fetch(7), Opened(bytes(16), D), Opened(bytes(8), b"")]
)
def test_a_request_survives(step: wire_masking.Request) -> None:
    message = wire_masking.request_to_wire(KEY, 9, step)
    assert wire_masking.request_from_wire(pb.MaskRequest.FromString(message.SerializeToString())) == (KEY, 9, step)


@pytest.mark.parametrize("reply", [Circle(NAMES), ToOpen(frozenset("ac")), Piece(bytes(CIPHERTEXT))])
def test_a_reply_survives(reply: wire_masking.Reply) -> None:
    message = wire_masking.reply_to_wire(reply, NAMES)
    assert wire_masking.reply_from_wire(pb.MaskReply.FromString(message.SerializeToString()), NAMES) == reply


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (pb.MaskRequest(ready=pb.SumReady(key=D[:31], agreed=D)), "the digest of a key of 31 bytes came; it has 32"),
        (pb.MaskRequest(ready=pb.SumReady(key=D)), "the digest of the terms of 0 bytes"),
        (pb.MaskRequest(encrypted=pb.SumEncrypted()), "the digest of ciphertexts of 0 bytes"),
        (pb.MaskRequest(opened=pb.SumOpened(scalars=bytes(9))), "sums of scalars of 9 bytes came; each has 8"),
        (pb.MaskRequest(opened=pb.SumOpened(scalars=bytes((8 << 17) + 8))), "0 to 1,048,576"),
        (pb.MaskRequest(opened=pb.SumOpened(digest=D[1:])), "the digest of a vector of 31 bytes"),
    ],
)
def test_a_malformed_request_is_refused(message: pb.MaskRequest, why: str) -> None:
    message.key.CopyFrom(wire_masking.request_to_wire(KEY, 1, Fetch(0)).key)
    with pytest.raises(MaskingRefused, match=why):
        wire_masking.request_from_wire(message)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (pb.MaskReply(circle=pb.SumCircle(names=["b", "a"])), "the roster has 'a' after 'b'"),
        (pb.MaskReply(circle=pb.SumCircle(names=["a", "a"])), "each once"),
        (pb.MaskReply(circle=pb.SumCircle(names=["../a"])), "cannot be one"),
        (pb.MaskReply(to_open=pb.SumToOpen(members=b"\xff")), "bits beyond the roster's 3 clients"),
        (pb.MaskReply(piece=pb.SumPiece(data=bytes(CIPHERTEXT - 1))), "a piece of an encrypted sum of 131,071 bytes"),
        (pb.MaskReply(piece=pb.SumPiece(data=bytes(4 * CIPHERTEXT + 1))), "131072 to 524,288"),
    ],
)
def test_a_malformed_reply_is_refused(message: pb.MaskReply, why: str) -> None:
    with pytest.raises(MaskingRefused, match=why):
        wire_masking.reply_from_wire(message, NAMES)
