"""The daemon's own certificate: read from its credentials folder, and again whenever the files there have changed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

import grpc

from seqfed.common import identity
from seqfed.common.errors import ConfigError, NotAllowed, SeqfedError, Unauthenticated
from seqfed.common.identity import Role

log = logging.getLogger("seqfed.server")

DAY_S: Final = 86_400.0
REMEDY: Final = "seqfed ca issue server NAME..."

Stamp = tuple[tuple[int, int], ...]


class Certificate:
    """A credentials folder that TLS takes its certificate from; one that was renewed counts from the next connection on.

    Raises ConfigError for a folder that does not do for a server.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._warned = (
            -math.inf
        )  # when it was last said that the certificate will end, on the clock that never goes back
        self._stamp = self._look()
        self._now = self._load()

    @property
    def ca(self) -> bytes:
        """The CA's certificate, PEM."""
        return identity.load_credentials(self._folder).ca

    def credentials(self, *, mutual: bool) -> grpc.ServerCredentials:
        """For a port; `mutual`: only who has a certificate of the same CA comes in."""
        seen = self._stamp

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """Called by gRPC's threads at each handshake; None: as before."""
            nonlocal seen
            self._refresh()
            if self._stamp == seen:
                return None
            seen = self._stamp
            return self._now

        return grpc.dynamic_ssl_server_credentials(
            self._now,
            cast(Callable[[], grpc.ServerCertificateConfiguration], fetch),  # gRPC documents that it may be None
            require_client_authentication=mutual,
        )

    def _warn(self) -> None:
        """Say once a day that the certificate will end, when less than a third of its life is left."""
        if identity.now() > self._whose.renewable and time.monotonic() - self._warned > DAY_S:
            self._warned = time.monotonic()
            until = identity.day(self._whose.not_after)
            log.warning("the server's certificate ends on %s; before then: %s --force", until, REMEDY)

    def _refresh(self) -> None:
        self._warn()
        try:
            stamp = self._look()
            if stamp != self._stamp:
                self._now = self._load()
                self._stamp = stamp
                log.info("the certificate in %s is another one now; new connections get it", self._folder)
        except SeqfedError as error:
            log.error(
                "the certificate in %s has changed and cannot be used, so the old one stays: %s", self._folder, error
            )

    def _look(self) -> Stamp:
        try:
            found = [(self._folder / name).stat() for name in (identity.KEY, identity.CERTIFICATE, identity.CA)]
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}; make the folder with: {REMEDY}") from error
        return tuple((one.st_mtime_ns, one.st_ino) for one in found)

    def _load(self) -> grpc.ServerCertificateConfiguration:
        found = identity.load_credentials(self._folder)
        now = identity.now()
        try:
            whose = identity.holder(found, now, self._folder)
        except (Unauthenticated, NotAllowed) as error:
            raise ConfigError(f"{error}; make one with: {REMEDY}") from None
        if whose.role is not Role.SERVER:
            raise ConfigError(
                f"{self._folder} has the certificate of {whose}, and not a server's; make one with: {REMEDY}"
            )
        self._whose = whose
        self._warn()
        return grpc.ssl_server_certificate_configuration([(found.key, found.certificate)], found.ca)
