"""Connections of somebody who speaks HTTP/2 by hand, and so can begin what no gRPC library would leave undone."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from seqfed.common import addresses, identity
from seqfed.common.identity import Credentials

DATA: Final = 0
HEADERS: Final = 1
SETTINGS: Final = 4
END_STREAM: Final = 1
END_HEADERS: Final = 4
STREAMS: Final = 32  # over one connection (max_streams)
PATIENCE: Final = 20.0


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def headers(path: str, metadata: Sequence[tuple[str, str]] = ()) -> bytes:
    """Of a gRPC call, each a literal that the other side need not remember (RFC 7541, 6.2.2)."""
    fields = [(":method", "POST"), (":scheme", "https"), (":path", path), (":authority", "localhost")]
    made = b""
    for field in [*fields, ("content-type", "application/grpc"), ("te", "trailers"), *metadata]:
        made += b"\0"
        for word in field:
            assert len(word) < 127, word  # what fits into the length's one byte
            made += bytes([len(word)]) + word.encode()
    return made


class Line:
    """One connection. It is blocking, and reads only when asked to."""

    def __init__(self, wire: ssl.SSLSocket) -> None:
        self.wire = wire
        self.ended = 0  # calls that the server has ended
        self._heard = b""

    def begin(self, calls: int, head: bytes, data: bytes) -> None:
        words = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0)
        for stream in range(1, 2 * calls, 2):
            words += frame(HEADERS, END_HEADERS, stream, head) + frame(DATA, 0, stream, data) * bool(data)
        self.wire.sendall(words)

    def hear(self) -> None:
        """Take in what has come, or wait for something."""
        more = self.wire.recv(1 << 16)
        if not more:
            raise EOFError
        self._heard += more
        while len(self._heard) >= 9 and len(self._heard) >= (whole := 9 + int.from_bytes(self._heard[:3], "big")):
            kind, flags = self._heard[3], self._heard[4]
            self.ended += kind == HEADERS and bool(flags & END_STREAM)
            self._heard = self._heard[whole:]


def context(folder: Path, ca: bytes, own: Credentials | None) -> ssl.SSLContext:
    """A client's side of TLS, with this certificate or without any."""
    made = ssl.create_default_context(cadata=ca.decode())
    made.set_alpn_protocols(["h2"])
    if own is not None:
        identity.save_credentials(folder, own, replace=True)
        made.load_cert_chain(folder / identity.CERTIFICATE, folder / identity.KEY)
    return made


@contextlib.contextmanager
def begun(
    address: str, tls: ssl.SSLContext, head: bytes, data: bytes, calls: int, streams: int
) -> Iterator[list[Line]]:
    """So many calls, `streams` to a connection, whose headers are sent, and of their message no more than `data`."""
    with contextlib.ExitStack() as stack:
        lines = []
        for first in range(0, calls, streams):
            plain = stack.enter_context(socket.create_connection(addresses.parse(address), PATIENCE))
            lines.append(Line(stack.enter_context(tls.wrap_socket(plain, server_hostname="localhost"))))
            lines[-1].begin(min(streams, calls - first), head, data)
        yield lines


def until_ended(lines: Sequence[Line], calls: int) -> None:
    """Wait until the server has ended so many calls of these connections."""
    while sum(line.ended for line in lines) < calls:
        waiting = {line.wire: line for line in lines}
        ready, _, _ = select.select(waiting, [], [], PATIENCE)
        assert ready, f"{sum(line.ended for line in lines)} calls were ended"
        for wire in ready:
            waiting[wire].hear()
