"""Host and port, and whether plaintext may be spoken there: only on the loopback interface, unless somebody insists."""

from __future__ import annotations

import ipaddress
from typing import Final

from seqfed.common.errors import ConfigError, InsecureRefused

DEFAULT_PORT: Final = 7733


def parse(address: str) -> tuple[str, int]:
    """'host', 'host:port' or '[v6]:port' as (host, port); raises ConfigError.

    >>> parse("localhost"), parse("[::1]:80")
    (('localhost', 7733), ('::1', 80))
    """
    host, separator, port = address.rpartition(":")
    if not separator or (address.count(":") > 1 and not address.startswith("[")) or address.endswith("]"):
        host, port = address, str(DEFAULT_PORT)
    if bracketed := host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    numeric = bracketed or ":" in host
    if not _is_host(host, numeric) or not port.isdecimal() or len(port) > 5 or int(port) > 65_535:
        raise ConfigError(
            f"'{address}' is not HOST:PORT with a port from 0 to 65535 (example: localhost:{DEFAULT_PORT})"
        )
    return host, int(port)


def _is_host(host: str, numeric: bool) -> bool:
    """Whether this can be a host: an IPv6 address if `numeric`, otherwise a name or an IPv4 address."""
    if not numeric:
        return bool(host) and not set(host) & set("[]/ ")
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def join(host: str, port: int) -> str:
    """The address as gRPC wants it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether what is said to this host stays on this machine, as far as its name tells."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


CLIENT_REMEDY: Final = "pass --credentials DIR, which `seqfed client enroll` or `seqfed ca issue` makes"
SERVER_REMEDY: Final = (
    "make a CA with `seqfed ca init` and a certificate with `seqfed ca issue server NAME...`, then pass --tls DIR"
)


def require_private(host: str, insecure: bool, remedy: str = CLIENT_REMEDY) -> None:
    """Raise InsecureRefused, with the remedy, if plaintext with this host would cross a network and nobody said that it may."""
    if not insecure and not is_loopback(host):
        raise InsecureRefused(
            f"'{host}' is not a loopback address and the connection would be plaintext, readable and alterable on the way; "
            f"{remedy}; or, inside an encrypted tunnel or a private network, pass --insecure"
        )
