"""What must never change without a new version of the protocol: two clients that differ in one bit here cannot be summed.

The keystreams and derived keys are those of OpenSSL's command line (`openssl enc -aes-256-ctr`, `openssl kdf HKDF`), the key
agreement is RFC 7748's example, and the packed numbers can be read off by hand.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from seqfed.common.masking.graph import neighbours
from seqfed.common.masking.keys import (
    DOMAIN,
    Signer,
    agree,
    commit,
    commit_secret,
    derive,
    encode,
    mask_key,
    public_of,
    seal,
    self_key,
)
from seqfed.common.masking.packing import pack, unpack
from seqfed.common.masking.prg import add_masks
from seqfed.common.masking.shamir import recover, weights
from seqfed.common.masking.terms import GENERATOR, VERSION, WIDTHS, Purpose, Terms

KEY, SALT, CTX = bytes(range(32)), bytes(range(32, 64)), b"\7" * 32
NUMBERS = (0x89ABCDEF, 1, 0xFFFFFFFF, 0x12345678, 0)


def test_version() -> None:
    assert (VERSION, GENERATOR, DOMAIN) == (1, "aes-256-ctr", "seqfed masking v1")


def test_terms() -> None:
    terms = Terms(
        run="r1",
        round=3,
        attempt=1,
        number=7,
        purpose=Purpose.TRAIN,
        dim=1000,
        bits=16,
        levels=327,
        n_max=100,
        min_survivors=3,
        malicious=True,
        drop=0.05,
        scalars=4,
        codec="rotq-1",
        model=bytes(32),
        settings=KEY,
    )
    text = (
        '{"attempt":1,"bits":16,"codec":"rotq-1","dim":1000,"drop":0.05,"generator":"aes-256-ctr","levels":327,'
        '"malicious":true,"min_survivors":3,"model":"' + bytes(32).hex() + '","n_max":100,"number":7,'
        '"purpose":"train","round":3,"run":"r1","scalars":4,"settings":"' + KEY.hex() + '","version":1}'
    )
    assert terms.digest == hashlib.sha256(text.encode()).digest()
    assert terms.digest.hex() == "d90834f943f47524c5d0007027654ca0e79015556a46475ff8981aa62b35ac67"


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8"])
def test_masks(dtype: str) -> None:
    stream = bytes.fromhex(
        "f29000b62a499fd0a9f39a6add2e7780f05d76ae4ab99fe5a6f69b3148c2363d"
        "0ebcb5deb52c83bd08a8a935182c9199d24356532881602f809eb383c5ff5d56"
    )
    mask = np.zeros(64 // np.dtype(dtype).itemsize, dtype)
    add_masks(mask, [KEY], [])
    assert mask.tobytes() == np.frombuffer(stream, np.dtype(dtype).newbyteorder("<")).astype(dtype).tobytes()
    add_masks(mask, [], [KEY])
    assert not mask.any()


def test_masks_far_along_a_vector() -> None:
    mask = np.zeros(4, "u4")
    add_masks(mask, [KEY], [], 4 << 33)  # block 2^33, beyond a counter of 32 bits
    assert mask.astype("<u4").tobytes().hex() == "39e6e71913826a5599dc0e5121816b2a"


def test_encoding() -> None:
    assert encode("ann", b"\x00\xff").hex() == "730300000000000000616e6e62020000000000000000ff"


def test_agreement() -> None:
    # RFC 7748, section 6.1
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    alice = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert public_of(bob).hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    assert agree(bob, alice).hex() == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"


def test_derived_keys() -> None:
    assert mask_key(KEY, SALT, "bob", "ann", "vector").hex() == (
        "a3214a70b3d74e8f945d9dbd87b87d865efa4f75168b3c42a77355db84de0078"
    )
    assert self_key(KEY, SALT, "scalars").hex() == "f05899f94ae180b7c755736ae3e17664be9eab9ad357d4eecf06593a00f7f3a6"
    assert derive(KEY, SALT, "share", "ann", "bob").hex() == (
        "0666515cb653766cb619704e98f2a6c28b9adfaeff16391a850003f75b58b9b8"
    )


def test_seal() -> None:
    assert seal(KEY, SALT, CTX, "ann", "bob", b"two shares").hex() == (
        "219a022542881d4efa079e657cae89201b81163eb208094384f6"
    )


def test_commitments() -> None:
    assert commit(CTX, "self", "ann", "bob", KEY, bytes(range(33))).hex() == (
        "17fc97e603e2d318c03b16011f2db11ab3961a7e3f1c63396b35baddf90e0ad1"
    )
    assert commit_secret(CTX, "self", "ann", KEY).hex() == (
        "243bec5f8e9fcc5c2005e6b50b050b553d68ab40fcdfcd4355e11ef4a7517611"
    )


def test_signature() -> None:
    signer = Signer(KEY)
    assert signer.public.hex() == "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"
    assert signer.sign("advert", CTX, "ann").hex() == (
        "8f1abbc07082acefacc5c229178c9bd42afb2c472ac8ed04671efd37d96d4fba"
        "95e96820c4cbb3b870af135851c3d3bae6dda99c60f7af12a60dd098f60bdd06"
    )


@pytest.mark.parametrize(
    ("bits", "packed"),
    [
        (4, "1f 8f 00"),
        (5, "2f7c0c00"),
        (6, "6ff0e3 00"),
        (8, "ef 01 ff 78 00"),
        (10, "ef05f03f9e 0000"),
        (12, "ef1d00 ff8f67 0000"),
        (14, "ef4d00f0ffe359 0000"),
        (16, "efcd 0100 ffff 7856 0000"),
        (18, "efcd0700f0ff3f9e15000000"),
        (20, "efcd1b0000 ffff8f6745 000000"),
        (24, "efcdab 010000 ffffff 785634 000000"),
        (32, "efcdab89 01000000 ffffffff 78563412 00000000"),
    ],
)
def test_packed_numbers(bits: int, packed: str) -> None:
    dtype = np.dtype(WIDTHS[bits])
    data = bytes.fromhex(packed)
    assert pack(np.array(NUMBERS, "u8").astype(dtype), bits) == data
    assert unpack(data, bits, len(NUMBERS), dtype).tolist() == [number % (1 << bits) for number in NUMBERS]


def test_shares() -> None:
    # p(x) = 7 + 3 x
    shares = [(7 + 3 * point).to_bytes(33, "little") for point in (2, 9)]
    assert recover(weights([2, 9]), shares) == (7).to_bytes(32, "little")


def test_graph() -> None:
    assert neighbours(11, 4, KEY) == (
        (1, 7, 9, 10),
        (0, 2, 4, 10),
        (1, 6, 8, 9),
        (5, 7, 8, 9),
        (1, 6, 7, 10),
        (3, 8, 9, 10),
        (2, 4, 7, 8),
        (0, 3, 4, 6),
        (2, 3, 5, 6),
        (0, 2, 3, 5),
        (0, 1, 4, 5),
    )
    assert hashlib.sha256(repr(neighbours(200, 38, KEY)).encode()).hexdigest() == (
        "71d1f45f5598887d492073d676795e90188d378ca932016c416953cda8e7a1a1"
    )
