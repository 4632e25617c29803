"""A client's half of one encrypted sum: pure, but for the key's randomness. Each step comes once, in order.

It refuses a circle without itself, or smaller than its floor; and, if it is asked to open the sum, whatever does not come out as
the sum of just so many clients' numbers for this very sum. What it tells the server is rounded (see `seqfed.client.ckks`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from seqfed.common.errors import MaskingRefused
from seqfed.common.homomorphic.messages import CIPHERTEXT, Opened, Piece, Ready
from seqfed.common.homomorphic.scheme import SLOTS, Form
from seqfed.common.masking import packing

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from seqfed.client.ckks import Key
    from seqfed.common.masking.terms import Terms


class Half:
    """floor: the fewest clients in whose sum it lets itself be. begin: notes (run, number) durably; raises MaskingRefused
    unless the number is higher than any before. Raises ConfigError for a sum that the scheme cannot hold.
    """

    def __init__(self, terms: Terms, name: str, key: Key, floor: int, begin: Callable[[str, int], None]) -> None:
        terms.check()
        self._terms, self._name, self._key, self._floor, self._begin = terms, name, key, floor, begin
        self._form = Form(terms)
        self._names: frozenset[str] = frozenset()
        self._members: frozenset[str] = frozenset()
        self._slots = np.empty((self._form.ciphertexts, SLOTS), np.int64)
        self.next: int | None = 0  # the ciphertext of the sum that is to be decrypted next; None: all are

    def ready(self) -> Ready:
        return Ready(self._key.digest, self._form.agreed)

    def join(self, names: Sequence[str]) -> None:
        """Be in the sum of these. Raises what `begin` does, too."""
        most = self._terms.n_max
        if self._name not in names or not self._floor <= len(names) <= most:
            raise self._refused(f"{len(names)} clients; it must be this one and others, {self._floor} to {most} in all")
        self._begin(self._terms.run, self._terms.number)
        self._names = frozenset(names)

    def encrypt(self, vector: NDArray[np.unsignedinteger[Any]] | None, scalars: Sequence[int]) -> bytes:
        """What it gives: ciphertexts, one after the other."""
        return self._key.encrypt(self._form.fill(vector, scalars))

    def check_members(self, members: frozenset[str]) -> None:
        """Of the sum that it is to open."""
        if not members <= self._names or self._name not in members or len(members) < self._floor:
            raise self._refused(
                f"{len(members)} clients are in what it is to open; it must be this one and others of the "
                f"{len(self._names)}, {self._floor} or more in all"
            )
        self._members = members

    def decrypt(self, piece: Piece) -> None:
        """Take the next ciphertexts of the sum."""
        assert self.next is not None
        count = len(piece.data) // CIPHERTEXT
        end = self.next + count
        if not count or count * CIPHERTEXT != len(piece.data) or end > len(self._slots):
            raise self._refused(f"{len(piece.data):,} bytes of ciphertexts, where it has {len(self._slots)} in all")
        self._slots[self.next : end] = self._key.decrypt(piece.data)
        self.next = end if end < len(self._slots) else None

    def open(self) -> tuple[bytes, Opened]:
        """The packed sum of the vectors (empty if it has none), and what goes with it."""
        assert self.next is None
        vector, totals = self._form.read(self._slots, len(self._members))
        packed = packing.pack(vector, self._terms.bits) if self._terms.dim else b""
        return packed, Opened(np.array(totals, "<i8").tobytes(), blake3(packed).digest() if packed else b"")

    def _refused(self, why: str) -> MaskingRefused:
        return MaskingRefused(f"encrypted sum {self._terms.number} of run {self._terms.run}: {why}")
