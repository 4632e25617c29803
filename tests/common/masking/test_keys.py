"""Keys against the standards' own formulas: what agrees, what is kept apart, what is refused."""

from __future__ import annotations

import hashlib
import hmac
import os

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfed.common.errors import MaskingRefused
from seqfed.common.masking.keys import (
    DOMAIN,
    FIELD,
    SEAL_BYTES,
    SIGNATURE_BYTES,
    Signer,
    agree,
    check_public,
    commit,
    commit_secret,
    derive,
    encode,
    mask_key,
    open_,
    public_of,
    seal,
    self_key,
    verify,
)

seeds = st.binary(min_size=32, max_size=32)
parts = st.lists(st.one_of(st.text(max_size=6), st.binary(max_size=6)), max_size=4)
ROSTER, CTX = hashlib.sha256(b"roster").digest(), hashlib.sha256(b"terms").digest()
# The points of order 1, 2, 4 and 8 on the curve and its twist (RFC 7748, section 6.1; https://cr.yp.to/ecdh.html).
LOW_ORDER = [
    bytes(32),
    b"\1" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    (FIELD - 1).to_bytes(32, "little"),
]


@given(seeds, seeds)
def test_two_agree_and_a_third_does_not(one: bytes, other: bytes) -> None:
    shared = agree(one, public_of(other))
    assert shared == agree(other, public_of(one))
    assert shared != agree(b"\5" * 32, public_of(other)) or public_of(one) == public_of(b"\5" * 32)
    check_public(public_of(one))


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point.hex()[:8])
def test_points_of_low_order_are_refused(point: bytes) -> None:
    for refuse in (check_public, lambda public: agree(os.urandom(32), public)):
        with pytest.raises(MaskingRefused, match="low order"):
            refuse(point)


@pytest.mark.parametrize(
    "public",
    [b"", bytes(31), bytes(33), FIELD.to_bytes(32, "little"), (FIELD + 9).to_bytes(32, "little"), b"\xff" * 32],
    ids=["none", "short", "long", "prime", "twin", "ones"],
)
def test_what_is_no_public_key_is_refused(public: bytes) -> None:
    with pytest.raises(MaskingRefused, match="not a number below"):
        check_public(public)


@given(seeds)
def test_a_key_has_one_encoding(seed: bytes) -> None:
    # the top bit does not count in X25519, so the same key could come twice under two names
    twin = bytearray(public_of(seed))
    twin[31] |= 0x80
    with pytest.raises(MaskingRefused, match="not a number below"):
        agree(seed, bytes(twin))


@given(st.binary(max_size=80), st.binary(max_size=80), parts)
def test_derived_keys_are_those_of_rfc_5869(secret: bytes, salt: bytes, info: list[str | bytes]) -> None:
    extracted = hmac.digest(salt or bytes(32), secret, "sha256")
    assert derive(secret, salt, *info) == hmac.digest(extracted, encode(DOMAIN, *info) + b"\1", "sha256")


@given(parts, parts)
def test_different_parts_are_written_differently(one: list[str | bytes], other: list[str | bytes]) -> None:
    assert (encode(*one) == encode(*other)) == (one == other)
    # also one before the other, as a prefix would let more be added to it
    assert encode(*one, *other) == encode(*one) + encode(*other)


def test_text_and_bytes_of_the_same_letters_are_two_things() -> None:
    assert encode("ab") != encode(b"ab") != encode("a", "b")


def test_both_ends_of_a_mask_have_the_same_key_and_no_others() -> None:
    shared = bytes(32)
    found = mask_key(shared, ROSTER, "ann", "bob", "vector")
    assert found == mask_key(shared, ROSTER, "bob", "ann", "vector")
    others = [
        mask_key(b"\1" * 32, ROSTER, "ann", "bob", "vector"),
        mask_key(shared, CTX, "ann", "bob", "vector"),
        mask_key(shared, ROSTER, "ann", "bo", "vector"),
        mask_key(shared, ROSTER, "ann", "bob", "scalars"),
        mask_key(shared, ROSTER, "annb", "ob", "vector"),
        self_key(shared, ROSTER, "vector"),
        self_key(shared, ROSTER, "scalars"),
        self_key(shared, CTX, "vector"),
        derive(shared, ROSTER, "share", "ann", "bob"),
        derive(shared, ROSTER, "share", "bob", "ann"),
    ]
    assert len({found, *others}) == 1 + len(others)


@settings(max_examples=20)
@given(st.binary(max_size=200))
def test_what_is_sealed_opens(text: bytes) -> None:
    shared = agree(b"\1" * 32, public_of(b"\2" * 32))
    sealed = seal(shared, ROSTER, CTX, "ann", "bob", text)
    assert len(sealed) == len(text) + SEAL_BYTES
    assert open_(shared, ROSTER, CTX, "ann", "bob", sealed) == text


def test_a_seal_holds_for_its_sender_receiver_roster_and_terms() -> None:
    shared = bytes(32)
    sealed = seal(shared, ROSTER, CTX, "ann", "bob", b"two shares")
    other = b"\1" * 32
    for arguments in (
        (other, ROSTER, CTX, "ann", "bob"),
        (shared, other, CTX, "ann", "bob"),
        (shared, ROSTER, other, "ann", "bob"),
        (shared, ROSTER, CTX, "eve", "bob"),
        (shared, ROSTER, CTX, "ann", "eve"),
        (shared, ROSTER, CTX, "bob", "ann"),
    ):
        with pytest.raises(MaskingRefused, match="not what was sealed"):
            open_(*arguments, sealed)


@settings(max_examples=50)
@given(st.data())
def test_a_changed_seal_does_not_open(data: st.DataObject) -> None:
    sealed = bytearray(seal(bytes(32), ROSTER, CTX, "ann", "bob", b"two shares"))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(sealed)))
    with pytest.raises(MaskingRefused, match="from 'ann' to 'bob'"):
        open_(bytes(32), ROSTER, CTX, "ann", "bob", bytes(sealed[:cut]))


def test_the_two_directions_have_two_keys() -> None:
    # with one key and one nonce the two texts' difference would lie open
    there = seal(bytes(32), ROSTER, CTX, "ann", "bob", bytes(64))
    back = seal(bytes(32), ROSTER, CTX, "bob", "ann", bytes(64))
    assert there[:64] != back[:64]


def test_the_text_is_sealed_with_the_derived_key() -> None:
    sealed = seal(bytes(32), ROSTER, CTX, "ann", "bob", b"text")
    key = derive(bytes(32), ROSTER, "share", "ann", "bob")
    assert AESGCM(key).decrypt(bytes(12), sealed, encode(DOMAIN, CTX, "ann", "bob")) == b"text"


def test_commitments_are_to_everything_in_them() -> None:
    base: tuple[bytes, str, str, str, bytes, bytes] = (CTX, "self", "ann", "bob", bytes(32), bytes(33))
    others: list[tuple[bytes, str, str, str, bytes, bytes]] = [
        (ROSTER, "self", "ann", "bob", bytes(32), bytes(33)),
        (CTX, "mask", "ann", "bob", bytes(32), bytes(33)),
        (CTX, "self", "anne", "bob", bytes(32), bytes(33)),
        (CTX, "self", "ann", "eve", bytes(32), bytes(33)),
        (CTX, "self", "ann", "bob", b"\1" + bytes(31), bytes(33)),
        (CTX, "self", "ann", "bob", bytes(32), b"\1" + bytes(32)),
        (CTX, "self", "ann", "bob", bytes(33), bytes(32)),
    ]
    found = {commit(*one) for one in (base, *others)}
    found |= {commit_secret(CTX, "self", "ann", bytes(32)), commit_secret(CTX, "self", "bob", bytes(32))}
    found |= {commit_secret(CTX, "mask", "ann", bytes(32)), commit_secret(ROSTER, "self", "ann", bytes(32))}
    found |= {commit_secret(CTX, "self", "ann", b"\1" * 32)}
    assert len(found) == 1 + len(others) + 5
    assert {len(one) for one in found} == {32}


@given(seeds, st.text(max_size=8), parts)
def test_a_signature_holds_for_its_label_and_parts(private: bytes, label: str, signed: list[str | bytes]) -> None:
    signer = Signer(private)
    signature = signer.sign(label, *signed)
    assert len(signature) == SIGNATURE_BYTES
    assert verify(signer.public, signature, label, *signed)
    assert not verify(signer.public, signature, label + "x", *signed)
    assert not verify(signer.public, signature, label, *signed, b"")
    assert not verify(Signer(b"\7" * 32).public, signature, label, *signed) or private == b"\7" * 32


@pytest.mark.parametrize("public", [b"", bytes(31), bytes(33), b"\xff" * 32])
@pytest.mark.parametrize("signature", [b"", bytes(64), bytes(63), b"\xff" * 64])
def test_what_is_no_key_or_signature_does_not_hold(public: bytes, signature: bytes) -> None:
    assert not verify(public, signature, "label")
    assert not verify(Signer(bytes(32)).public, signature, "label")


def test_a_signature_has_one_form() -> None:
    # s + the group's order is as good in the formula, and refused (RFC 8032, section 5.1.7)
    signer = Signer(bytes(32))
    signature = signer.sign("label")
    order = 2**252 + 27742317777372353535851937790883648493
    twin = signature[:32] + (int.from_bytes(signature[32:], "little") + order).to_bytes(32, "little")
    assert not verify(signer.public, twin, "label")


def test_who_signs_does_not_show_its_key() -> None:
    assert "07" * 4 not in repr(vars(Signer(b"\7" * 32)))
