"""A run's signature holds for one specification and one operator of one federation, and nobody else can make a second."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from hypothesis import given
from hypothesis import strategies as st

from seqfed.common import authority, identity
from seqfed.common.authority import Authority
from seqfed.common.errors import ConfigError, NotAllowed, SeqfedError, Unauthenticated
from seqfed.common.identity import Credentials, Role
from seqfed.common.signing import ORDER, PREFIX, sign, verify

NOW = identity.now()
SPEC = b'{"name":"run","seed":1}'


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority.create(tmp_path_factory.mktemp("ca"), NOW)


@pytest.fixture(scope="module")
def anna(ca: Authority) -> Credentials:
    return ca.credentials(Role.OPERATOR, "anna", now=NOW, days=10)


def test_an_operators_signature_says_who_it_is(anna: Credentials) -> None:
    who = verify(anna.certificate, anna.ca, SPEC, sign(SPEC, anna.key), NOW)
    assert (who.role, who.name) == (Role.OPERATOR, "anna")


@given(place=st.integers(0, len(SPEC) - 1), byte=st.integers(1, 255))
def test_it_does_not_hold_for_any_other_specification(anna: Credentials, place: int, byte: int) -> None:
    other = bytearray(SPEC)
    other[place] ^= byte
    with pytest.raises(Unauthenticated, match="operator 'anna' is not of this specification"):
        verify(anna.certificate, anna.ca, bytes(other), sign(SPEC, anna.key), NOW)


@given(flip=st.lists(st.tuples(st.integers(0, 71), st.integers(1, 255)), max_size=3), cut=st.integers(0, 80))
def test_no_other_bytes_are_its_signature(
    anna: Credentials, signed: bytes, flip: list[tuple[int, int]], cut: int
) -> None:
    other = bytearray(signed)
    for place, byte in flip:
        other[place % len(other)] ^= byte
    changed = bytes(other[:cut])
    if changed == signed:
        assert verify(anna.certificate, anna.ca, SPEC, changed, NOW).name == "anna"
    else:
        with pytest.raises(Unauthenticated):
            verify(anna.certificate, anna.ca, SPEC, changed, NOW)


@pytest.fixture(scope="module")
def signed(anna: Credentials) -> bytes:
    return sign(SPEC, anna.key)


@pytest.mark.parametrize("more", [b"\0", b"x" * 100_000])
def test_nothing_may_follow_it(anna: Credentials, signed: bytes, more: bytes) -> None:
    with pytest.raises(Unauthenticated):
        verify(anna.certificate, anna.ca, SPEC, signed + more, NOW)


def test_its_mirror_image_is_no_second_signature(anna: Credentials) -> None:
    for _ in range(8):  # half of all signatures have the larger s at first
        signature = sign(SPEC, anna.key)
        r, s = utils.decode_dss_signature(signature)
        assert s <= ORDER // 2
        mirrored = utils.encode_dss_signature(r, ORDER - s)
        key = identity.load_certificate(anna.certificate).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        key.verify(mirrored, PREFIX + SPEC, ec.ECDSA(hashes.SHA256()))  # as good as the other, to anybody else
        with pytest.raises(Unauthenticated):
            verify(anna.certificate, anna.ca, SPEC, mirrored, NOW)


def test_each_signature_is_another(anna: Credentials) -> None:
    assert len({sign(SPEC, anna.key) for _ in range(5)}) == 5


def test_what_the_key_signed_for_something_else_is_no_signature_of_a_run(anna: Credentials) -> None:
    key = identity.load_key(anna.key, "here")
    r, s = utils.decode_dss_signature(key.sign(SPEC, ec.ECDSA(hashes.SHA256())))
    with pytest.raises(Unauthenticated):
        verify(anna.certificate, anna.ca, SPEC, utils.encode_dss_signature(r, min(s, ORDER - s)), NOW)


@pytest.mark.parametrize("role", [Role.CLIENT, Role.VIEWER, Role.SERVER])
def test_only_an_operator_may_sign(ca: Authority, role: Role) -> None:
    own = ca.credentials(role, "eve", now=NOW)
    with pytest.raises(NotAllowed, match=f"signed by {role} 'eve', and only an operator may"):
        verify(own.certificate, own.ca, SPEC, sign(SPEC, own.key), NOW)


def test_another_operators_certificate_does_not_fit(ca: Authority, anna: Credentials) -> None:
    berta = ca.credentials(Role.OPERATOR, "berta", now=NOW)
    with pytest.raises(Unauthenticated, match="operator 'berta' is not of this"):
        verify(berta.certificate, berta.ca, SPEC, sign(SPEC, anna.key), NOW)


def test_another_ca_is_refused(anna: Credentials, tmp_path: Path) -> None:
    other = authority.create(tmp_path, NOW).credentials(Role.OPERATOR, "anna", now=NOW)
    for certificate, its_ca in ((other.certificate, anna.ca), (anna.certificate, other.ca)):
        with pytest.raises(Unauthenticated, match="another CA"):
            verify(certificate, its_ca, SPEC, sign(SPEC, other.key), NOW)


@pytest.mark.parametrize(("days", "why"), [(11, "ended on"), (-1, "is not valid before")])
def test_a_certificate_has_its_time(anna: Credentials, days: int, why: str) -> None:
    with pytest.raises(Unauthenticated, match=why):
        verify(anna.certificate, anna.ca, SPEC, sign(SPEC, anna.key), NOW + timedelta(days=days))


@pytest.mark.parametrize("certificate", [b"", b"no certificate", b"x" * 100_000])
def test_what_is_no_certificate_is_refused_in_words(anna: Credentials, certificate: bytes) -> None:
    with pytest.raises(SeqfedError, match="certificate"):
        verify(certificate, anna.ca, SPEC, sign(SPEC, anna.key), NOW)


def test_a_key_that_is_none_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="the operator's key: not a private key"):
        sign(SPEC, b"nothing")
