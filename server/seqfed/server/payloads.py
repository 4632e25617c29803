"""Updates that lie in their files as payloads of a codec: read part by part, never held whole."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from seqfed.common.compression import Codec, Key, chosen, decode, header, largest
from seqfed.common.errors import BrokenTransfer, MalformedPayload, TooLarge
from seqfed.common.layout import Flat, Layout
from seqfed.common.spec import RunSpec


@dataclass(frozen=True)
class Packing:
    """Of one client's update of one round: what its bytes are a payload of."""

    codec: Codec
    key: Key
    layout: Layout

    def check_size(self, nbytes: int) -> None:
        """Raise TooLarge or MalformedPayload unless a payload of so many bytes could be one."""
        if nbytes > (most := largest(self.codec, self.layout)):
            raise TooLarge(
                f"a payload of {nbytes:,} bytes came; one of codec '{self.codec.name}' has {most:,} at most here"
            )
        if nbytes <= header.SIZE:
            raise MalformedPayload(f"a payload of {nbytes:,} bytes came; its header alone has {header.SIZE:,}")

    def parts(self, path: Path) -> Iterator[Flat]:
        """The update's numbers, float32, in their order.

        Raises what `decode` does, with MalformedPayload for what it calls broken: sending on mends nothing of that.
        """
        try:
            yield from decode(_mapped(path), self.layout, self.key, self.codec)
        except BrokenTransfer as error:
            raise MalformedPayload(str(error)) from error


def packing_of(spec: RunSpec, layout: Layout, run: str, base: int, client: str, path: Path) -> Packing | None:
    """Of an update that was received; None if its file has the numbers themselves. Raises MalformedPayload."""
    if not chosen.uploads(spec):
        return None
    return Packing(chosen.of_payload(spec, _mapped(path)), Key(spec.seed, run, base, client), layout)


def announced(spec: RunSpec, layout: Layout, run: str, base: int, client: str, codec: str) -> Packing | None:
    """Of an update whose header names this codec; None if it comes as it is. Raises MalformedPayload."""
    if not codec and not chosen.uploads(spec):
        return None
    return Packing(chosen.named(spec, codec), Key(spec.seed, run, base, client), layout)


def _mapped(path: Path) -> memoryview:
    with path.open("rb", buffering=0) as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
