"""An encrypted sum at the server: ciphertexts are added up, word by word, and two clients say what the sum comes to.

The server has no key, parses nothing and needs no TenSEAL. Of a sum of the usual 16 bits it holds 16 bytes a number in memory, 32
for more than 16 clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from seqfed.common.errors import ConfigError, MaskingRefused, WrongRound
from seqfed.common.homomorphic import scheme
from seqfed.common.homomorphic import server as half
from seqfed.common.homomorphic.messages import CIPHERTEXT, MOST_PIECE, Encrypted, Opened, Piece, Ready
from seqfed.common.masking import packing, server
from seqfed.common.masking.server import Step
from seqfed.common.masking.terms import Terms
from seqfed.common.wire_masking import Reply, Request
from seqfed.server.masked import Hello, Totals, Vectors

AT_ONCE: Final = 8  # ciphertexts added at once: 1 MiB


class Ciphertexts:
    """The way of `seqfed.common.homomorphic`."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._form = scheme.Form(terms)
        self._total: scheme.Words = np.zeros((self._form.ciphertexts, scheme.WORDS), np.uint64)
        self.state: half.State | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return () if self.state is None else self.state.names

    def greet(self, client: str, hello: Hello, others: Mapping[str, Hello]) -> None:
        if not isinstance(hello, Ready):
            raise MaskingRefused(
                f"client '{client}' masks for an encrypted sum; run the same version of seqfed on both sides"
            )
        half.check_ready(self._form, client, hello)

    def begin(self, hellos: Mapping[str, Hello]) -> tuple[server.Effect, ...]:
        ready = {name: one for name, one in hellos.items() if isinstance(one, Ready)}
        self.state, effects = half.begin(self._terms, ready)
        return effects

    def event(self, client: str, message: Request) -> half.Event:
        match message:
            case Encrypted():
                return half.Added(client, message)
            case Opened():
                return half.Decrypted(client, message)
            case _:
                raise MaskingRefused(f"client '{client}': a {type(message).__name__} is nothing to an encrypted sum")

    def on(self, event: half.Event, *, trying: bool = False) -> tuple[server.Effect, ...]:
        assert self.state is not None
        state, effects = half.on(self.state, event)
        if trying:
            return ()
        self.state = state
        return effects

    def answer(self, client: str) -> Reply | None:
        assert self.state is not None
        return half.answer(self.state, client)

    def refuse(self, client: str) -> None:
        assert self.state is not None
        if client in self.state.strangers:
            raise ConfigError(self.state.strangers[client])

    def fetch(self, client: str, start: int) -> Piece:
        state = self.state
        if state is None or state.step is not Step.OPENING or client not in state.openers:
            raise WrongRound(f"encrypted sum {self._terms.number} is not client '{client}'s to open, or not now")
        if not start < self._form.ciphertexts:
            raise MaskingRefused(
                f"ciphertext {start} of encrypted sum {self._terms.number}, which has {self._form.ciphertexts}"
            )
        return Piece(self._total[start : start + MOST_PIECE].astype("<u8", copy=False).tobytes())

    def due(self, client: str) -> Step | None:
        state = self.state
        if state is None or client not in state.members:
            return None
        return state.step if state.step is Step.MASKING or self._terms.dim else None

    def vector_bytes(self, step: Step) -> int:
        if step is Step.MASKING:
            return self._form.nbytes
        return packing.packed_bytes(self._terms.dim, self._terms.bits)

    def fold(self, path: Path, *, back: bool = False) -> None:
        """Look at all of it before anything is added."""
        into = scheme.subtract if back else scheme.add
        for look in (True, False):
            with path.open("rb", buffering=0) as file:
                for start in range(0, self._form.ciphertexts, AT_ONCE):
                    words = scheme.words_of(file.read(AT_ONCE * CIPHERTEXT))
                    if not look:
                        into(self._total[start : start + AT_ONCE], words)

    def open(self, vectors: Vectors) -> Totals | server.Fail:
        """What the two openers say; their vectors are of one digest."""
        assert self.state is not None
        terms, opener = self._terms, next(iter(self.state.opened))
        total = np.zeros(0, terms.dtype)
        if terms.dim:
            data = vectors[opener, Step.OPENING].path.read_bytes()
            total = packing.unpack(data, terms.bits, terms.dim, terms.dtype)
        return total, np.frombuffer(self.state.opened[opener].scalars, "<i8").tolist()
