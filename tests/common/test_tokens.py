"""Enrolment tokens: good ones, and every way in which one is not."""

from __future__ import annotations

import base64
import datetime
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from seqfed.common import authority, tokens
from seqfed.common.authority import Authority
from seqfed.common.errors import ConfigError, InvalidName, Unauthenticated

NOW = datetime.datetime(2031, 5, 6, 7, 8, 9, tzinfo=datetime.UTC)
HOUR = datetime.timedelta(hours=1)


@pytest.fixture(scope="session")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority.create(tmp_path_factory.mktemp("ca"), NOW)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority.create(tmp_path_factory.mktemp("other"), NOW)


def text_of(ca: Authority, client: str = "a") -> str:
    return tokens.sign(tokens.new(client, ca.pem, NOW, 3600), ca.key)


def test_a_token_says_whom_it_is_for_and_until_when(ca: Authority) -> None:
    found = tokens.verify(text_of(ca, "hospital-a"), ca.pem, NOW + HOUR)
    assert (found.client, found.role) == ("hospital-a", "client")
    assert (found.issued, found.expires) == (NOW.timestamp(), (NOW + HOUR).timestamp())
    assert found.fingerprint == tokens.fingerprint(ca.pem) == ca.certificate.fingerprint(hashes.SHA256()).hex()


def test_no_two_tokens_are_the_same(ca: Authority) -> None:
    assert tokens.new("a", ca.pem, NOW, 1).nonce != tokens.new("a", ca.pem, NOW, 1).nonce


def test_after_its_time_a_token_is_refused(ca: Authority) -> None:
    with pytest.raises(Unauthenticated, match="token for 'a' expired on 2031-05-06 08:08 UTC.*seqfed enroll token"):
        tokens.verify(text_of(ca), ca.pem, NOW + 2 * HOUR)


def test_another_cas_token_is_refused(ca: Authority, other: Authority) -> None:
    with pytest.raises(Unauthenticated, match="not one of this federation's CA"):
        tokens.verify(text_of(other), ca.pem, NOW)


def test_a_token_for_another_certificate_of_the_same_key_is_refused(ca: Authority, other: Authority) -> None:
    odd = tokens.sign(tokens.new("a", other.pem, NOW, 3600), ca.key)
    with pytest.raises(Unauthenticated, match="made for another certificate of the CA"):
        tokens.verify(odd, ca.pem, NOW)


@pytest.mark.parametrize(
    "change",
    [{"client": "../x"}, {"role": "operator"}, {"nonce": "x"}, {"expires": "never"}, {"more": 1}, {"expires": None}],
)
def test_what_the_ca_would_not_say_is_refused_though_it_signed_it(ca: Authority, change: dict[str, object]) -> None:
    content = json.loads(tokens.new("a", ca.pem, NOW, 3600).model_dump_json()) | change
    payload = json.dumps(content).encode()
    signature = ca.key.sign(tokens.PREFIX + payload, ec.ECDSA(hashes.SHA256()))
    text = ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (payload, signature))
    with pytest.raises(Unauthenticated, match="not one of this federation's CA"):
        tokens.verify(text, ca.pem, NOW)


def test_another_signature_of_the_ca_is_no_token(ca: Authority) -> None:
    payload = tokens.new("a", ca.pem, NOW, 3600).model_dump_json().encode()
    signature = ca.key.sign(payload, ec.ECDSA(hashes.SHA256()))
    text = ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (payload, signature))
    with pytest.raises(Unauthenticated):
        tokens.verify(text, ca.pem, NOW)


@given(place=st.integers(0, 10_000), letter=st.sampled_from("AZaz09-_.=\n"))
def test_an_altered_token_is_refused(ca: Authority, place: int, letter: str) -> None:
    text = text_of(ca)
    dot = text.index(".")
    place %= len(text)
    if text[place] == letter or place in (dot - 1, len(text) - 1):  # a part's last sign may hold bits that mean nothing
        return
    with pytest.raises(Unauthenticated):
        tokens.verify(text[:place] + letter + text[place + 1 :], ca.pem, NOW)


@given(st.text(max_size=200))
def test_any_text_is_refused_in_words(ca: Authority, text: str) -> None:
    with pytest.raises(Unauthenticated):
        tokens.verify(text, ca.pem, NOW)


@pytest.mark.parametrize("name", ["", "a b", "../x", ".a", "a" * 65])
def test_a_weird_name_gets_no_token(ca: Authority, name: str) -> None:
    with pytest.raises(InvalidName):
        tokens.new(name, ca.pem, NOW, 3600)


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_token_file_brings_token_and_ca(ca: Authority) -> None:
    text = text_of(ca)
    content = tokens.to_file(text, ca.pem)
    assert content.count(b"\n") == 1
    token, again, pem = tokens.from_file(content, "a.token", NOW)
    assert (token.client, again, pem) == ("a", text, ca.pem)


def test_a_file_whose_ca_was_exchanged_is_refused(ca: Authority, other: Authority) -> None:
    with pytest.raises(Unauthenticated):
        tokens.from_file(tokens.to_file(text_of(ca), other.pem), "a.token", NOW)


def test_a_file_whose_fingerprint_was_altered_is_refused(ca: Authority) -> None:
    content = json.loads(tokens.to_file(text_of(ca), ca.pem)) | {"fingerprint": "0" * 64}
    with pytest.raises(Unauthenticated, match="fingerprint is not that of its CA"):
        tokens.from_file(json.dumps(content).encode(), "a.token", NOW)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[1]", b'{"ca": 1, "fingerprint": "", "token": ""}'])
def test_a_file_that_is_none_is_told_by_its_name(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a.token"):
        tokens.from_file(content, "a.token", NOW)
