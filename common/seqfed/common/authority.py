"""The federation's own CA: a key and a self-signed certificate in a folder, from which every certificate comes."""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from seqfed.common import identity
from seqfed.common.errors import ConfigError
from seqfed.common.identity import SCHEME, Credentials, Role
from seqfed.common.wire import check_client_name

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

CA_KEY: Final = "ca.key"
CA_DAYS: Final = 3650.0
DAYS: Final = {
    Role.SERVER: 365.0,
    Role.OPERATOR: 365.0,
    Role.VIEWER: 365.0,
    Role.CLIENT: 90.0,
}  # a client's renews itself
EARLIER: Final = timedelta(minutes=5)  # a certificate is valid since then: clocks differ


@dataclass(frozen=True)
class Authority:
    """A CA that can issue certificates. `pem`: its own one."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    pem: bytes

    def __repr__(self) -> str:
        return "Authority(...)"

    def issue(
        self,
        role: Role,
        name: str,
        public_key: ec.EllipticCurvePublicKey,
        *,
        now: datetime,
        days: float | None = None,
        hosts: tuple[str, ...] = (),
    ) -> bytes:
        """A certificate (PEM) for this key, valid for so many days, but not beyond the CA's own.

        hosts: DNS names and IP addresses under which a server may be dialled.
        Raises InvalidName, or ConfigError for a host that is neither.
        """
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.serialization import Encoding
        from cryptography.x509.oid import ExtendedKeyUsageOID as Usage

        check_client_name(name)
        usage = Usage.SERVER_AUTH if role is Role.SERVER else Usage.CLIENT_AUTH
        until = min(now + timedelta(days=DAYS[role] if days is None else days), self.certificate.not_valid_after_utc)
        uri = x509.UniformResourceIdentifier(f"{SCHEME}:{role}:{name}")
        parent = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = (
            x509.CertificateBuilder()
            .subject_name(_named(name))
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - EARLIER)
            .not_valid_after(until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_uses(issuing=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
            .add_extension(x509.SubjectAlternativeName([uri, *map(_host, hosts)]), critical=False)
            .add_extension(parent, critical=False)
        )
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def credentials(
        self, role: Role, name: str, *, now: datetime, days: float | None = None, hosts: tuple[str, ...] = ()
    ) -> Credentials:
        """A new key with its certificate: for somebody on this machine. Raises what `issue` raises."""
        key = identity.new_key()
        public = identity.load_key(key, "the new key").public_key()
        return Credentials(key, self.issue(role, name, public, now=now, days=days, hosts=hosts), self.pem)


def create(folder: Path, now: datetime, *, days: float = CA_DAYS, replace: bool = False) -> Authority:
    """A new CA in this folder; raises ConfigError if there is one and `replace` was not asked for."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding

    pem = identity.new_key()
    key = identity.load_key(pem, "the new key")
    own_name = _named(f"{SCHEME} CA {secrets.token_hex(4)}")  # so that people can tell two federations' apart
    builder = (
        x509.CertificateBuilder()
        .subject_name(own_name)
        .issuer_name(own_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_uses(issuing=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    certificate = builder.sign(key, hashes.SHA256())
    identity.make_folder(folder)
    identity.write_private(folder / CA_KEY, pem, replace=replace)
    identity.write_public(folder / identity.CA, certificate.public_bytes(Encoding.PEM))
    return Authority(key, certificate, certificate.public_bytes(Encoding.PEM))


def load(folder: Path) -> Authority:
    """The CA in this folder; raises ConfigError."""
    if not (folder / CA_KEY).exists():
        raise ConfigError(f"{folder} has no {CA_KEY}; make a CA with `seqfed ca init`, or name its folder with --ca")
    key = identity.load_key(identity.read_private(folder / CA_KEY), folder / CA_KEY)
    try:
        pem = (folder / identity.CA).read_bytes()
    except OSError as error:
        raise ConfigError(f"{folder / identity.CA}: {error.strerror or error}") from error
    certificate = identity.load_certificate(pem)
    if certificate.public_key() != key.public_key():
        raise ConfigError(f"{folder}: {CA_KEY} is not the key of {identity.CA}; restore both from one backup")
    return Authority(key, certificate, pem)


def server_name(hosts: tuple[str, ...]) -> str:
    """The name of a server's certificate: that of its first host, if it can be one."""
    from seqfed.common.errors import InvalidName

    try:
        return check_client_name(hosts[0])
    except InvalidName:  # an IPv6 address, a wildcard
        return "server"


def _named(name: str) -> x509.Name:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.removeprefix("*.").split(".")
    if len(host) > 253 or not all(
        0 < len(one) < 64 and one.isascii() and one.replace("-", "").replace("_", "").isalnum() for one in labels
    ):
        raise ConfigError(
            f"{host[:80]!r} is neither a DNS name nor an IP address, without a port (examples: fed.example.org, 192.0.2.1)"
        )
    return x509.DNSName(host)


def _uses(*, issuing: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not issuing,
        key_cert_sign=issuing,
        crl_sign=issuing,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
