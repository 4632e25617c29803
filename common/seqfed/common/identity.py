"""Who somebody is: an X.509 certificate of the federation's own CA, and the folder in which it lies beside its key.

The role and the name stand in one URI of the certificate's subject alternative names, `seqfed:<role>:<name>`. Everything
else about a certificate follows from the role, so what does not agree with it is refused: a certificate of a federation says
one thing only. P-256 and SHA-256 throughout. `cryptography` is loaded at the first call that needs it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

import platformdirs

from seqfed.common.errors import ConfigError, InvalidName, NotAllowed, Unauthenticated, storage_error
from seqfed.common.wire import check_client_name

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

SCHEME: Final = "seqfed"
KEY, CERTIFICATE, CA = "key.pem", "cert.pem", "ca.pem"  # the files of a credentials folder
CREDENTIALS: Final = "credentials"  # that folder's name in a client's state folder
MAX_PEM: Final = 16 << 10  # bytes; ours have under 1 KiB


class Role(StrEnum):
    """What a certificate's holder is in the federation."""

    SERVER = "server"
    CLIENT = "client"
    OPERATOR = "operator"  # submits runs and decides about them
    VIEWER = "viewer"  # looks


@dataclass(frozen=True)
class Identity:
    """What a certificate says. `serial` tells it from others of the same name; the times are of its validity, in UTC."""

    role: Role
    name: str
    serial: int
    not_before: datetime
    not_after: datetime

    def __str__(self) -> str:
        return f"{self.role} '{self.name}'"

    @property
    def renewable(self) -> datetime:
        """From when on less than a third of its life is left."""
        return self.not_after - (self.not_after - self.not_before) / 3


def now() -> datetime:
    """This moment, in UTC."""
    return datetime.now(UTC)


def day(moment: datetime) -> str:
    """The moment as messages say it."""
    return moment.strftime("%Y-%m-%d %H:%M UTC")


# Certificates -------------------------------------------------------------------------------------------------------


def load_certificate(pem: bytes) -> x509.Certificate:
    """The first certificate in PEM text; raises Unauthenticated."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm

    if len(pem) > MAX_PEM:
        raise Unauthenticated(f"a certificate of {len(pem):,} bytes; {MAX_PEM:,} is the limit")
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm):
        raise Unauthenticated("this is no certificate in PEM form") from None


def identity_of(certificate: x509.Certificate | bytes) -> Identity:
    """Who the holder of this certificate (or of its PEM) is, whoever issued it and whenever it is valid.

    Raises NotAllowed if it is not the certificate of one name in one role; Unauthenticated if it is none.
    """
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID as Usage

    if isinstance(certificate, bytes):
        certificate = load_certificate(certificate)
    try:
        extensions = certificate.extensions
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        usages = list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        common = [str(one.value) for one in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        serial = certificate.serial_number
    except x509.ExtensionNotFound as error:
        raise NotAllowed(f"the certificate has no {error.oid._name}: it is not one of a federation") from None
    except (ValueError, TypeError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, x509.InvalidVersion):
        raise NotAllowed("the certificate's extensions cannot be read: it is not one of a federation") from None
    if constraints.ca:
        raise NotAllowed("this is a CA's certificate, which issues others and is nobody's own")
    if len(uris) != 1:
        raise NotAllowed(f"the certificate has {len(uris)} URIs; one, {SCHEME}:ROLE:NAME, says whose it is")
    scheme, _, rest = uris[0].partition(":")
    role, _, name = rest.partition(":")
    if scheme != SCHEME or role not in list(Role):
        raise NotAllowed(f"the certificate is for {uris[0][:80]!r}, and not for {SCHEME}:ROLE:NAME with a known role")
    try:
        check_client_name(name)
    except InvalidName as error:
        raise NotAllowed(f"the certificate's name cannot be one: {error}") from None
    if common != [name]:
        raise NotAllowed(f"the certificate's common name is not '{name}', as its URI has it")
    if usages != [Usage.SERVER_AUTH if role == Role.SERVER else Usage.CLIENT_AUTH]:
        raise NotAllowed(f"the certificate's extended key usage is not that of a {role}")
    return Identity(Role(role), name, serial, certificate.not_valid_before_utc, certificate.not_valid_after_utc)


def verify_chain(pem: bytes, ca_pem: bytes, now: datetime) -> Identity:
    """Who holds this certificate of this CA.

    Raises Unauthenticated if the CA did not issue it or one of the two is not valid now, NotAllowed as `identity_of` does.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

    certificate, ca = load_certificate(pem), load_certificate(ca_pem)
    try:
        is_ca = ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (
        x509.ExtensionNotFound,
        x509.DuplicateExtension,
        x509.UnsupportedGeneralNameType,
        ValueError,
        UnsupportedAlgorithm,
    ):
        is_ca = False
    if not is_ca:
        raise Unauthenticated("what should be the CA's certificate is not one")
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        raise Unauthenticated("the certificate is of another CA than this federation's") from None
    for one, what in ((ca, "the CA's certificate"), (certificate, "the certificate")):
        if now < one.not_valid_before_utc:
            raise Unauthenticated(
                f"{what} is not valid before {day(one.not_valid_before_utc)}, and here it is {day(now)}; are the clocks right?"
            )
        if now > one.not_valid_after_utc:
            raise Unauthenticated(f"{what} ended on {day(one.not_valid_after_utc)}; it needs a new one")
    return identity_of(certificate)


def public_key_of(csr: bytes) -> ec.EllipticCurvePublicKey:
    """The key for which this PKCS #10 request (PEM), signed with it, asks a certificate; raises Unauthenticated."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        if len(csr) > MAX_PEM:
            raise ValueError("too long")
        request = x509.load_pem_x509_csr(csr)
        if not request.is_signature_valid:
            raise ValueError("not signed with its own key")
        key = request.public_key()
    except Exception as error:
        # The parsers of signatures have errors of their own for what they do not know; a stranger's bytes come here.
        if not isinstance(error, ValueError) and not type(error).__module__.startswith("cryptography"):
            raise
        raise Unauthenticated("the request for a certificate cannot be read, or its signature is not right") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Unauthenticated("a certificate is asked for a key that is not of the curve P-256")
    return key


# Keys ---------------------------------------------------------------------------------------------------------------


def new_key() -> bytes:
    """A new private key: PKCS #8, PEM."""
    from cryptography.hazmat.primitives.asymmetric import ec

    return _pem(ec.generate_private_key(ec.SECP256R1()))


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization as form

    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())


def load_key(pem: bytes, place: Path | str) -> ec.EllipticCurvePrivateKey:
    """The private key in this PEM text, which lies at `place`; raises ConfigError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{place}: not a private key in PEM form without a password") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(f"{place}: the key is not of the curve P-256")
    return key


def request(key: bytes, name: str) -> bytes:
    """A PKCS #10 request (PEM) for the certificate of this private key (PEM)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding

    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder(subject)
    return builder.sign(load_key(key, "the key"), hashes.SHA256()).public_bytes(Encoding.PEM)


# Files --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _written(path: Path, data: bytes, mode: int) -> Iterator[Path]:
    """The data, durable, in a file of this mode beside `path`, which the block puts into its place."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        beside.unlink(missing_ok=True)
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        yield beside
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise storage_error(error, f"saving {path}") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_private(path: Path, data: bytes, *, replace: bool = False) -> None:
    """Save a secret so that nobody else can read it at any moment.

    Raises ConfigError if there is one already and `replace` was not asked for, StorageError, StorageFull.
    """
    with _written(path, data, 0o600) as beside:
        if replace:
            beside.replace(path)
            return
        try:
            os.link(beside, path)  # unlike a renaming, fails if something is there
        except FileExistsError:
            raise ConfigError(
                f"{path} is there already, and what was issued for it would be worth nothing without it; "
                "name another folder, or pass --force to replace it"
            ) from None


def write_public(path: Path, data: bytes) -> None:
    """Save what everybody may read: whole, or as it was before. Raises StorageError, StorageFull."""
    with _written(path, data, 0o644) as beside:
        beside.replace(path)


def read_private(path: Path) -> bytes:
    """A secret; raises ConfigError if it is not there, or somebody else could have read it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{path}: not a file")
            if status.st_mode & 0o077:
                raise ConfigError(
                    f"{path}: others on this machine may read or write it (mode {stat.S_IMODE(status.st_mode):o}); "
                    f"chmod 600 {path}, and if somebody may have read it, make a new one"
                )
            return file.read(MAX_PEM)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error


def make_folder(folder: Path) -> None:
    """Make a folder for secrets, which is only its owner's. Raises StorageError, StorageFull."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise storage_error(error, f"making the folder {folder}") from error


@dataclass(frozen=True)
class Credentials:
    """The content of a credentials folder, each in PEM form: a key, the certificate for it, and the CA's."""

    key: bytes
    certificate: bytes
    ca: bytes

    def __repr__(self) -> str:  # a key has no place in a log
        return "Credentials(...)"


def load_credentials(folder: Path) -> Credentials:
    """What a credentials folder holds, not looked into; raises ConfigError."""
    found = {}
    for name in (CERTIFICATE, CA):
        path = folder / name
        try:
            with path.open("rb") as file:
                found[name] = file.read(MAX_PEM)
        except OSError as error:
            raise ConfigError(
                f"{path}: {error.strerror or error}; a credentials folder has {KEY}, {CERTIFICATE} and {CA}, "
                "as `seqfed ca issue` and `seqfed client enroll` make it"
            ) from error
    return Credentials(read_private(folder / KEY), found[CERTIFICATE], found[CA])


def holder(found: Credentials, now: datetime, place: Path | str) -> Identity:
    """Whose credentials these are.

    Raises ConfigError if the key is not the certificate's, and as `verify_chain` does; `place` is named.
    """
    try:
        identity = verify_chain(found.certificate, found.ca, now)
    except (Unauthenticated, NotAllowed) as error:
        raise type(error)(f"{place}: {error}") from None
    if load_key(found.key, place).public_key() != load_certificate(found.certificate).public_key():
        raise ConfigError(f"{place}: {KEY} is not the key of {CERTIFICATE}; issue the certificate anew")
    return identity


def save_credentials(folder: Path, found: Credentials, *, replace: bool = False) -> None:
    """Make or complete a credentials folder; raises ConfigError if it has another key and `replace` was not asked for."""
    make_folder(folder)
    path = folder / KEY
    if replace or not path.exists() or read_private(path) != found.key:
        write_private(path, found.key, replace=replace)
    write_public(folder / CA, found.ca)
    write_public(folder / CERTIFICATE, found.certificate)  # last: with it the folder is whole


def config_folder() -> Path:
    """Where the CA and an operator's credentials lie when no folder is named."""
    return Path(platformdirs.user_config_dir("seqfed"))


def client_folder(state: Path | None, name: str) -> Path:
    """A client's state folder, which is named after the client where none was given."""
    return state or Path(platformdirs.user_state_dir("seqfed")) / "clients" / name
