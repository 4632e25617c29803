"""The audit log's chain: each entry's digest covers the digest before it, so none can be changed, removed or put in.

digest = SHA-256(the previous entry's digest, 32 zero bytes before the first || JSON of [number, at, kind, body]), where the
body is its JSON as text, to the byte. What no chain can show is that its end was cut off: whoever wants to notice that
remembers a head (the number and digest of some last entry, which the server logs) and hands it to the next verification.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Final

from seqfed.common.errors import AuditBroken
from seqfed.common.views import AuditEntry

START: Final = bytes(32)  # what stands before the first entry


def digest(before: bytes, number: int, at: float, kind: str, body: str) -> bytes:
    """The digest of the entry that follows the one with digest `before`."""
    return hashlib.sha256(before + json.dumps([number, at, kind, body]).encode()).digest()


def verify(
    entries: Iterable[AuditEntry], head: tuple[int, bytes] = (0, START), known: tuple[int, bytes] | None = None
) -> tuple[int, bytes]:
    """The number and digest of the last of these entries, which follow `head`.

    `known`: an earlier head; the digest of the entry with that number must begin with it. Raises AuditBroken with the number
    of the first entry that is not what the chain says.
    """
    number, before = head
    met = known is None or known[0] <= number
    for entry in entries:
        number += 1
        if entry.number != number:
            raise AuditBroken(f"entry {number} of the audit log is missing: entry {entry.number} stands in its place")
        if digest(before, number, entry.at, entry.kind, entry.body) != entry.digest:
            raise AuditBroken(f"entry {number} of the audit log, or what stands before it, was changed")
        before = entry.digest
        if known is not None and number == known[0]:
            met = True
            if not before.startswith(known[1]):
                raise AuditBroken(f"entry {number} of the audit log is another one than the head that is remembered")
    if not met:
        assert known is not None
        raise AuditBroken(
            f"entry {number + 1} of the audit log is missing, and so are all up to {known[0]}, a head seen before"
        )
    return number, before
