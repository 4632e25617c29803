"""What the terms and the roster of a masked sum entail, for its clients and its server alike.

The graph, the thresholds, and what exactly is committed to and signed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from seqfed.common.masking import graph, keys
from seqfed.common.masking.messages import OF_SELF, SALT, Advert, KeyShares, MaskedInput, Roster, bitmap
from seqfed.common.masking.terms import Terms

Statement = tuple[str, *tuple[str | bytes, ...]]  # a label and its parts, as keys.Signer.sign and keys.verify take them


def advert_statement(terms: Terms, advert: Advert) -> Statement:
    """What a client signs with its keys, before there is a roster."""
    return "advert", terms.digest, advert.client, advert.encryption_key, advert.mask_key


@dataclass(frozen=True)
class Plan:
    """One masked sum of these terms among the clients of this roster. Precondition: two or more of them, in ascending order."""

    terms: Terms
    roster: Roster

    @cached_property
    def hash(self) -> bytes:
        """Of the terms and the roster: it is in everything that is derived, sealed, committed to or signed from here on."""
        return keys.derive(self.roster.hash, self.terms.digest, "plan")

    @cached_property
    def parameters(self) -> tuple[int, int]:
        """k, the most neighbours that a client has, and t: so many of the shares of a secret open it."""
        return graph.parameters(len(self.roster.names), self.terms.malicious, self.terms.drop)

    @property
    def threshold(self) -> int:
        return self.parameters[1]

    @property
    def quorum(self) -> int:
        """The fewest clients of the roster that must agree on the survivors: any two such sets have an honest one in common."""
        count = len(self.roster.names)
        return 2 * count // 3 + 1 if self.terms.malicious else count // 2 + 1

    def neighbours(self, name: str) -> tuple[str, ...]:
        """Who shares masks with this client, in ascending order."""
        names = self.roster.names
        return tuple(names[place] for place in self._graph[self.roster.index(name)])

    def circle(self, name: str) -> tuple[str, ...]:
        """Who holds a share of each of this client's two secrets, in ascending order: its neighbours and itself."""
        return tuple(sorted((name, *self.neighbours(name))))

    def point(self, name: str) -> int:
        """Where this holder's shares are values of the polynomials."""
        return self.roster.index(name) + 1

    def supported(self, name: str, members: Collection[str]) -> bool:
        """Whether enough of the client's circle are members for its secrets to be opened."""
        return sum(holder in members for holder in self.circle(name)) >= self.threshold

    def commit(self, kind: int, owner: str, holder: str, salted: bytes) -> bytes:
        """The owner's commitment to a holder's share of the secret of that kind (OF_SELF, OF_KEY); the share with its salt."""
        return keys.commit(self.hash, str(kind), owner, holder, salted[:SALT], salted[SALT:])

    def commit_own(self, owner: str, seed: bytes) -> bytes:
        """The owner's commitment to the seed of its own mask."""
        return keys.commit_secret(self.hash, str(OF_SELF), owner, seed)

    @cached_property
    def _graph(self) -> tuple[tuple[int, ...], ...]:
        return graph.neighbours(len(self.roster.names), self.parameters[0], self.hash)

    def shares_statement(self, client: str, message: KeyShares) -> Statement:
        sealed = [part for name in sorted(message.sealed) for part in (name, message.sealed[name])]
        commitments = [part for name in sorted(message.commitments) for part in (name, message.commitments[name])]
        return "shares", self.hash, client, message.self_commitment, keys.encode(*sealed), keys.encode(*commitments)

    def input_statement(self, client: str, message: MaskedInput, sharers: Collection[str]) -> Statement:
        return "input", self.hash, client, bitmap(sharers, self.roster.names), message.scalars, message.digest

    def agreed(self, sharers: Collection[str], survivors: Collection[str]) -> bytes:
        """What the clients sign each by itself and together must have the same of; two bitmaps of one length."""
        return bitmap(sharers, self.roster.names) + bitmap(survivors, self.roster.names)

    def survivors_statement(self, client: str, agreed: bytes) -> Statement:
        return "survivors", self.hash, client, agreed
