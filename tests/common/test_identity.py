"""Certificates of a federation: what makes one, and everything that does not; key files and their modes."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage
from hypothesis import given
from hypothesis import strategies as st

from seqfed.common import authority, identity
from seqfed.common.authority import Authority
from seqfed.common.errors import ConfigError, InvalidName, NotAllowed, StorageError, Unauthenticated
from seqfed.common.identity import Role

NOW = datetime.datetime(2031, 5, 6, 7, 8, 9, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)


@pytest.fixture(scope="session")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority.create(tmp_path_factory.mktemp("ca"), NOW)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority.create(tmp_path_factory.mktemp("other"), NOW)


def uri(text: str) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(text)


@dataclass(frozen=True)
class Odd:
    """A certificate by hand: a good client's but for what a test changes."""

    common: str = "a"
    names: tuple[x509.GeneralName, ...] = (uri("seqfed:client:a"),)
    usages: tuple[x509.ObjectIdentifier, ...] = (Usage.CLIENT_AUTH,)
    is_ca: bool | None = False
    begins: datetime.datetime = NOW - DAY
    ends: datetime.datetime = NOW + DAY

    def by(self, ca: Authority) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, self.common)]))
            .issuer_name(ca.certificate.subject)
            .public_key(ec.generate_private_key(ec.SECP256R1()).public_key())
            .serial_number(7)
            .not_valid_before(self.begins)
            .not_valid_after(self.ends)
        )
        if self.names:
            builder = builder.add_extension(x509.SubjectAlternativeName(self.names), critical=False)
        if self.usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(self.usages), critical=False)
        if self.is_ca is not None:
            builder = builder.add_extension(x509.BasicConstraints(self.is_ca, None), critical=True)
        return builder.sign(ca.key, hashes.SHA256()).public_bytes(Encoding.PEM)


# Certificates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", list(Role))
def test_who_somebody_is_stands_in_the_certificate(ca: Authority, role: Role) -> None:
    made = ca.credentials(role, "ward-3.b_c", now=NOW, days=2, hosts=("fed.example.org", "::1"))
    found = identity.holder(made, NOW, "here")
    assert (found.role, found.name) == (role, "ward-3.b_c")
    assert found.not_before == NOW - authority.EARLIER
    assert found.not_after == NOW + 2 * DAY
    assert found.serial == x509.load_pem_x509_certificate(made.certificate).serial_number
    assert str(found) == f"{role} 'ward-3.b_c'"
    assert found.renewable == NOW + 2 * DAY - (2 * DAY + authority.EARLIER) / 3


def test_a_certificate_of_ours_has_what_the_design_says_and_no_more(ca: Authority) -> None:
    found = x509.load_pem_x509_certificate(
        ca.credentials(Role.SERVER, "s", now=NOW, hosts=("a.org", "192.0.2.1")).certificate
    )
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [
        x509.UniformResourceIdentifier("seqfed:server:s"),
        x509.DNSName("a.org"),
        x509.IPAddress(ipaddress.ip_address("192.0.2.1")),
    ]
    assert isinstance(key := found.public_key(), ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    assert isinstance(found.signature_hash_algorithm, hashes.SHA256)
    uses = found.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (uses.digital_signature, uses.key_cert_sign, uses.crl_sign) == (True, False, False)


def test_no_certificate_outlives_its_ca(tmp_path: Path) -> None:
    brief = authority.create(tmp_path, NOW, days=3)
    made = brief.credentials(Role.CLIENT, "a", now=NOW, days=30)
    assert identity.identity_of(made.certificate).not_after == NOW + 3 * DAY


def test_the_by_hand_certificate_is_good_as_long_as_nothing_is_changed(ca: Authority) -> None:
    assert identity.verify_chain(Odd().by(ca), ca.pem, NOW).name == "a"


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        (Odd(is_ca=True), "a CA's certificate"),
        (Odd(is_ca=None), "has no basicConstraints"),
        (Odd(names=()), "has no subjectAltName"),
        (Odd(usages=()), "has no extendedKeyUsage"),
        (Odd(names=(x509.DNSName("a"),)), "has 0 URIs"),
        (Odd(names=(uri("seqfed:client:a"), uri("seqfed:operator:a"))), "has 2 URIs"),
        (Odd(names=(uri("seqfed:client:a"), uri("https://example.org"))), "has 2 URIs"),
        (Odd(names=(uri("seqfed:root:a"),)), "known role"),
        (Odd(names=(uri("seqfed:CLIENT:a"),)), "known role"),
        (Odd(names=(uri("https://example.org"),)), "not for seqfed:ROLE:NAME"),
        (Odd(names=(uri("seqfed:client"),)), "name cannot be one"),
        (Odd(names=(uri("seqfed:client:a:b"),), common="a:b"), "name cannot be one"),
        (Odd(names=(uri("seqfed:client:../a"),), common="../a"), "name cannot be one"),
        (Odd(names=(uri("seqfed:client:a\nb"),), common="a\nb"), "name cannot be one"),
        (Odd(names=(uri("seqfed:client:.a"),), common=".a"), "name cannot be one"),
        (Odd(common="b"), "common name is not 'a'"),
        (Odd(usages=(Usage.SERVER_AUTH,)), "extended key usage"),
        (Odd(usages=(Usage.CLIENT_AUTH, Usage.SERVER_AUTH)), "extended key usage"),
        (Odd(names=(uri("seqfed:server:a"),)), "extended key usage"),
    ],
)
def test_a_certificate_that_says_anything_else_is_nobodys(ca: Authority, odd: Odd, told: str) -> None:
    with pytest.raises(NotAllowed, match=re.escape(told)):
        identity.verify_chain(odd.by(ca), ca.pem, NOW)


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        (Odd(begins=NOW - 9 * DAY, ends=NOW - DAY), "ended on 2031-05-05 07:08 UTC"),
        (Odd(begins=NOW + DAY, ends=NOW + 9 * DAY), "not valid before 2031-05-07 07:08 UTC"),
    ],
    ids=["expired", "not yet valid"],
)
def test_out_of_its_time_a_certificate_is_worth_nothing(ca: Authority, odd: Odd, told: str) -> None:
    with pytest.raises(Unauthenticated, match=told):
        identity.verify_chain(odd.by(ca), ca.pem, NOW)


def test_another_cas_certificate_is_worth_nothing_whatever_it_says(ca: Authority, other: Authority) -> None:
    masked = replace(other, certificate=ca.certificate)  # its own key under the CA's name
    for forged in (Odd().by(other), Odd().by(masked)):
        with pytest.raises(Unauthenticated, match="of another CA"):
            identity.verify_chain(forged, ca.pem, NOW)


def test_a_clients_certificate_issues_nothing(ca: Authority) -> None:
    made = ca.credentials(Role.CLIENT, "a", now=NOW)
    own = Authority(
        identity.load_key(made.key, "x"), x509.load_pem_x509_certificate(made.certificate), made.certificate
    )
    with pytest.raises(Unauthenticated, match="should be the CA's certificate"):
        identity.verify_chain(Odd().by(own), made.certificate, NOW)
    with pytest.raises(Unauthenticated, match="of another CA"):
        identity.verify_chain(Odd().by(own), ca.pem, NOW)


def test_with_its_ca_a_certificate_ends(tmp_path: Path) -> None:
    brief = authority.create(tmp_path, NOW, days=1)
    with pytest.raises(Unauthenticated, match="the CA's certificate ended"):
        identity.verify_chain(Odd(ends=NOW + 9 * DAY).by(brief), brief.pem, NOW + 2 * DAY)


@given(st.binary(max_size=400))
def test_bytes_that_are_no_certificate_are_refused_in_words(data: bytes) -> None:
    with pytest.raises(Unauthenticated):
        identity.identity_of(data)
    with pytest.raises(Unauthenticated):
        identity.public_key_of(data)


@given(place=st.integers(0, 10_000), change=st.integers(1, 255))
def test_a_certificate_with_a_changed_byte_is_refused_in_words(ca: Authority, place: int, change: int) -> None:
    der = bytearray(x509.load_pem_x509_certificate(Odd().by(ca)).public_bytes(Encoding.DER))
    der[place % len(der)] ^= change
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(bytes(der)) + b"-----END CERTIFICATE-----\n"
    with pytest.raises((Unauthenticated, NotAllowed)):
        identity.verify_chain(pem, ca.pem, NOW)


def test_endless_text_is_not_even_parsed(ca: Authority) -> None:
    with pytest.raises(Unauthenticated, match="16,384 is the limit"):
        identity.identity_of(ca.pem + b"\n" * (16 << 10))


# Requests and keys ----------------------------------------------------------------------------------------------------


def test_a_request_carries_the_key_and_its_subject_counts_for_nothing(ca: Authority) -> None:
    key = identity.new_key()
    public = identity.public_key_of(identity.request(key, "operator"))
    pem = ca.issue(Role.CLIENT, "a", public, now=NOW)
    assert identity.holder(identity.Credentials(key, pem, ca.pem), NOW, "x").name == "a"


def test_a_request_that_its_key_did_not_sign_is_refused() -> None:
    der = bytearray(x509.load_pem_x509_csr(identity.request(identity.new_key(), "a")).public_bytes(Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM)
    with pytest.raises(Unauthenticated, match="signature is not right"):
        identity.public_key_of(forged)


@pytest.mark.parametrize(
    "make",
    [lambda: rsa.generate_private_key(65537, 2048), lambda: ec.generate_private_key(ec.SECP384R1())],
    ids=["RSA", "P-384"],
)
def test_only_keys_of_p_256_are_known(make: Callable[[], Any]) -> None:
    key = make()
    csr = x509.CertificateSigningRequestBuilder(x509.Name([])).sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    with pytest.raises(Unauthenticated, match="P-256"):
        identity.public_key_of(csr)
    with pytest.raises(ConfigError, match="place: the key is not of the curve P-256"):
        identity.load_key(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), "place")


@pytest.mark.parametrize("name", ["", ".", "../x", "a b", "a\n", "a" * 65, "ä", "a/b", ".hidden"])
def test_a_weird_name_gets_no_certificate(ca: Authority, name: str) -> None:
    with pytest.raises(InvalidName):
        ca.credentials(Role.CLIENT, name, now=NOW)


@pytest.mark.parametrize("host", ["", "a b", "http://a", "a:80", "a..b", "-" * 300, "ä.org", "*.*.org", "a/24"])
def test_a_weird_host_gets_no_certificate(ca: Authority, host: str) -> None:
    with pytest.raises(ConfigError, match="neither a DNS name nor an IP address"):
        ca.credentials(Role.SERVER, "s", now=NOW, hosts=(host,))


# Files ----------------------------------------------------------------------------------------------------------------


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_key_is_its_owners_from_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    whole = os.fsync

    def look(file: int) -> None:
        seen.append(stat.S_IMODE(os.fstat(file).st_mode))
        whole(file)

    monkeypatch.setattr(os, "fsync", look)
    before = os.umask(0)
    try:
        identity.write_private(tmp_path / "key", b"secret")
    finally:
        os.umask(before)
    assert seen[0] == 0o600
    assert mode_of(tmp_path / "key") == 0o600
    assert identity.read_private(tmp_path / "key") == b"secret"
    assert [one.name for one in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_key_that_others_can_reach_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    identity.write_private(path, b"secret")
    path.chmod(mode)
    with pytest.raises(ConfigError, match=re.escape(f"(mode {mode:o}); chmod 600 {path}")):
        identity.read_private(path)


def test_a_key_is_not_replaced_unless_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "key"
    identity.write_private(path, b"one")
    with pytest.raises(ConfigError, match="is there already.*--force"):
        identity.write_private(path, b"two")
    assert path.read_bytes() == b"one"
    identity.write_private(path, b"two", replace=True)
    assert path.read_bytes() == b"two"
    assert [one.name for one in tmp_path.iterdir()] == ["key"]


def test_a_folder_that_is_not_there_or_is_a_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="saving"):
        identity.write_private(tmp_path / "none" / "key", b"")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="making the folder"):
        identity.make_folder(tmp_path / "file")
    with pytest.raises(ConfigError, match="Is a directory"):
        identity.read_private(tmp_path)


def test_credentials_are_read_as_they_were_saved(ca: Authority, tmp_path: Path) -> None:
    made = ca.credentials(Role.OPERATOR, "o", now=NOW)
    identity.save_credentials(tmp_path / "c", made)
    assert identity.load_credentials(tmp_path / "c") == made
    assert mode_of(tmp_path / "c") == 0o700
    identity.save_credentials(tmp_path / "c", made)  # the same key
    with pytest.raises(ConfigError, match="--force"):
        identity.save_credentials(tmp_path / "c", ca.credentials(Role.OPERATOR, "o", now=NOW))
    assert identity.load_credentials(tmp_path / "c") == made


def test_no_key_is_shown_by_a_slip(ca: Authority) -> None:
    made = ca.credentials(Role.OPERATOR, "o", now=NOW)
    assert "PRIVATE" not in f"{made!r} {ca!r}"


@pytest.mark.parametrize("name", [identity.KEY, identity.CERTIFICATE, identity.CA])
def test_a_folder_that_lacks_a_file_is_told_by_its_name(ca: Authority, tmp_path: Path, name: str) -> None:
    identity.save_credentials(tmp_path, ca.credentials(Role.OPERATOR, "o", now=NOW))
    (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / name))):
        identity.load_credentials(tmp_path)


def test_a_key_of_another_certificate_is_told(ca: Authority) -> None:
    one, two = (ca.credentials(Role.OPERATOR, "o", now=NOW) for _ in range(2))
    with pytest.raises(ConfigError, match="here: key.pem is not the key of cert.pem"):
        identity.holder(replace(one, key=two.key), NOW, "here")


# The CA's folder ------------------------------------------------------------------------------------------------------


def test_a_ca_is_loaded_as_it_was_made(tmp_path: Path) -> None:
    made = authority.create(tmp_path / "ca", NOW)
    assert (tmp_path / "ca" / "ca.pem").read_bytes() == made.pem
    assert mode_of(tmp_path / "ca" / "ca.key") == 0o600
    found = authority.load(tmp_path / "ca")
    assert identity.verify_chain(found.credentials(Role.CLIENT, "a", now=NOW).certificate, made.pem, NOW).name == "a"


def test_a_ca_is_not_replaced_unless_asked_for(tmp_path: Path) -> None:
    made = authority.create(tmp_path, NOW)
    with pytest.raises(ConfigError, match="ca.key is there already"):
        authority.create(tmp_path, NOW)
    assert authority.load(tmp_path).pem == made.pem
    assert authority.create(tmp_path, NOW, replace=True).pem != made.pem


def test_a_ca_that_is_not_there_or_not_whole_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no ca.key; make a CA with `seqfed ca init`"):
        authority.load(tmp_path)
    authority.create(tmp_path, NOW)
    (tmp_path / "ca.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        authority.load(tmp_path)
    (tmp_path / "ca.key").chmod(0o600)
    authority.create(tmp_path / "other", NOW)
    (tmp_path / "ca.pem").write_bytes((tmp_path / "other" / "ca.pem").read_bytes())
    with pytest.raises(ConfigError, match="ca.key is not the key of ca.pem"):
        authority.load(tmp_path)


def test_a_server_is_named_after_its_first_host_if_that_can_be_a_name() -> None:
    assert authority.server_name(("fed.example.org", "::1")) == "fed.example.org"
    assert authority.server_name(("::1", "fed.example.org")) == "server"
    assert authority.server_name(("*.example.org",)) == "server"
