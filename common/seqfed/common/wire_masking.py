"""Between the messages of `masking` and `homomorphic` and the protobuf messages of seqfed.v1.

Whatever a peer sends is checked for its form here.

What a message means, and whether it may come now, is for the two halves of the protocol. Raises MaskingRefused throughout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Final

from seqfed.common import wire
from seqfed.common.errors import MaskingRefused
from seqfed.common.homomorphic import messages as encrypted
from seqfed.common.masking import messages as masked
from seqfed.common.masking.messages import (
    COMMITMENTS,
    OPENED,
    SEALED,
    Advert,
    Confirm,
    Confirmed,
    Delivery,
    Done,
    KeyShares,
    MaskedInput,
    Opening,
    Roster,
    Survivors,
    bitmap,
    members_of,
)
from seqfed.common.views import TaskKey
from seqfed.v1 import federation_pb2

KEY_BYTES: Final = 32
DIGEST_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64  # Ed25519
MOST_BINDING: Final = 72  # bytes of DER: two numbers of 33
MOST_CERTIFICATE: Final = 16 << 10
MOST_SCALARS: Final = 8 << 17

Request = masked.Request | encrypted.Request
Reply = masked.Reply | encrypted.Reply


def request_to_wire(key: TaskKey, number: int, step: Request) -> federation_pb2.MaskRequest:
    message = federation_pb2.MaskRequest(key=wire.key_to_wire(key), number=number)
    match step:
        case Advert():
            message.advert.CopyFrom(_advert_to_wire(step))
        case KeyShares():
            message.shares.self_commitment, message.shares.signature = step.self_commitment, step.signature
            message.shares.sealed.update(step.sealed)
            message.shares.commitments.update(step.commitments)
        case MaskedInput():
            message.masked.scalars, message.masked.digest = step.scalars, step.digest
            message.masked.signature = step.signature
        case Confirm():
            message.confirm.signature = step.signature
        case Opening():
            message.opening.SetInParent()
            message.opening.shares.update(step.shares)
        case encrypted.Ready():
            message.ready.key, message.ready.agreed = step.key, step.agreed
        case encrypted.Encrypted():
            message.encrypted.digest = step.digest
        case encrypted.Fetch():
            message.fetch.SetInParent()
            message.fetch.start = step.start
        case encrypted.Opened():
            message.opened.scalars, message.opened.digest = step.scalars, step.digest
    return message


def request_from_wire(message: federation_pb2.MaskRequest) -> tuple[TaskKey, int, Request]:
    """(task, number of the masked sum, a client's step in it)."""
    return wire.key_from_wire(message.key), message.number, _step(message)


def _step(message: federation_pb2.MaskRequest) -> Request:
    match message.WhichOneof("step"):
        case "advert":
            return _advert_from_wire(message.advert)
        case "shares":
            one = message.shares
            return KeyShares(
                _by_name(one.sealed, "a sealed share", SEALED),
                _sized(one.self_commitment, "a commitment", DIGEST_BYTES),
                _by_name(one.commitments, "the commitments to a share", COMMITMENTS),
                _sized(one.signature, "a signature", SIGNATURE_BYTES),
            )
        case "masked":
            return MaskedInput(
                _scalars(message.masked.scalars, "masked scalars"),
                _sized(message.masked.digest, "the digest of a vector", DIGEST_BYTES) if message.masked.digest else b"",
                _sized(message.masked.signature, "a signature", SIGNATURE_BYTES),
            )
        case "confirm":
            return Confirm(_sized(message.confirm.signature, "a signature", SIGNATURE_BYTES))
        case "opening":
            return Opening(_by_name(message.opening.shares, "an opened share", OPENED))
        case "ready":
            return encrypted.Ready(
                _sized(message.ready.key, "the digest of a key", DIGEST_BYTES),
                _sized(message.ready.agreed, "the digest of the terms", DIGEST_BYTES),
            )
        case "encrypted":
            return encrypted.Encrypted(_sized(message.encrypted.digest, "the digest of ciphertexts", DIGEST_BYTES))
        case "fetch":
            return encrypted.Fetch(message.fetch.start)
        case "opened":
            return encrypted.Opened(
                _scalars(message.opened.scalars, "sums of scalars"),
                _sized(message.opened.digest, "the digest of a vector", DIGEST_BYTES) if message.opened.digest else b"",
            )
        case _:
            raise MaskingRefused("a message of a masked sum says nothing; run the same version of seqfed on both sides")


def reply_to_wire(reply: Reply, names: Sequence[str]) -> federation_pb2.MaskReply:
    """names: the roster's, in its order."""
    message = federation_pb2.MaskReply()
    match reply:
        case Roster():
            message.roster.adverts.extend(_advert_to_wire(one) for one in reply.adverts)
        case Delivery():
            message.delivery.members = bitmap(reply.members, names)
            message.delivery.sealed.update(reply.sealed)
        case Survivors():
            message.survivors.members = bitmap(reply.members, names)
        case Confirmed():
            message.confirmed.SetInParent()
            message.confirmed.signatures.update(reply.signatures)
        case Done():
            message.done.SetInParent()
        case encrypted.Circle():
            message.circle.names.extend(reply.names)
        case encrypted.ToOpen():
            message.to_open.members = bitmap(reply.members, names)
        case encrypted.Piece():
            message.piece.data = reply.data
    return message


def reply_from_wire(message: federation_pb2.MaskReply, names: Sequence[str]) -> Reply:
    """The server's answer; `names`: the roster's, in its order, empty as long as there is none."""
    match message.WhichOneof("step"):
        case "roster":
            adverts = tuple(_advert_from_wire(one) for one in message.roster.adverts)
            _rising([one.client for one in adverts])
            return Roster(adverts)
        case "delivery":
            sealed = _by_name(message.delivery.sealed, "a sealed share", SEALED)
            _known(sealed, names)
            return Delivery(members_of(message.delivery.members, names), sealed)
        case "survivors":
            return Survivors(members_of(message.survivors.members, names))
        case "confirmed":
            signatures = _by_name(message.confirmed.signatures, "a signature", SIGNATURE_BYTES)
            _known(signatures, names)
            return Confirmed(signatures)
        case "done":
            return Done()
        case "circle":
            circle = tuple(_name(one) for one in message.circle.names)
            _rising(circle)
            return encrypted.Circle(circle)
        case "to_open":
            return encrypted.ToOpen(members_of(message.to_open.members, names))
        case "piece":
            data = _sized(
                message.piece.data,
                "a piece of an encrypted sum",
                encrypted.CIPHERTEXT,
                encrypted.MOST_PIECE * encrypted.CIPHERTEXT,
            )
            return encrypted.Piece(data)
        case _:
            raise MaskingRefused("the server's answer in a masked sum says nothing; run the same version on both sides")


def _advert_to_wire(advert: Advert) -> federation_pb2.MaskAdvert:
    return federation_pb2.MaskAdvert(
        client=advert.client,
        encryption_key=advert.encryption_key,
        mask_key=advert.mask_key,
        identity_key=advert.identity_key,
        binding=advert.binding,
        certificate=advert.certificate,
        signature=advert.signature,
    )


def _advert_from_wire(message: federation_pb2.MaskAdvert) -> Advert:
    if bool(message.binding) != bool(message.certificate):
        raise MaskingRefused(
            "an advertisement has only one of a certificate and the signature that binds its key to it"
        )
    return Advert(
        _name(message.client),
        _sized(message.encryption_key, "an encryption key", KEY_BYTES),
        _sized(message.mask_key, "a mask key", KEY_BYTES),
        _sized(message.identity_key, "an identity key", KEY_BYTES),
        _sized(message.binding, "a binding", 0, MOST_BINDING),
        _sized(message.certificate, "a certificate", 0, MOST_CERTIFICATE),
        _sized(message.signature, "a signature", SIGNATURE_BYTES),
    )


def _name(text: str) -> str:
    if not wire.CLIENT_NAME.fullmatch(text) or text.startswith("."):
        raise MaskingRefused(f"{wire.clean(text, 80)!r} came as a client's name, which cannot be one")
    return text


def _sized(data: bytes, what: str, least: int, most: int | None = None) -> bytes:
    most = least if most is None else most
    if not least <= len(data) <= most:
        due = f"{least}" if least == most else f"{least} to {most:,}"
        raise MaskingRefused(f"{what} of {len(data):,} bytes came; it has {due}")
    return data


def _scalars(data: bytes, what: str) -> bytes:
    if len(data) % 8:
        raise MaskingRefused(f"{what} of {len(data):,} bytes came; each has 8")
    return _sized(data, what, 0, MOST_SCALARS)


def _rising(names: Sequence[str]) -> None:
    for one, other in pairwise(names):
        if one >= other:
            raise MaskingRefused(f"the roster has '{other}' after '{one}'; its names must rise, each once")


def _by_name(found: Mapping[str, bytes], what: str, least: int, most: int | None = None) -> dict[str, bytes]:
    return {_name(name): _sized(data, f"{what} for '{_name(name)}'", least, most) for name, data in found.items()}


def _known(found: Iterable[str], names: Sequence[str]) -> None:
    if strangers := set(found) - set(names):
        raise MaskingRefused(f"the server's answer names '{min(strangers)}', who is not in the roster")
