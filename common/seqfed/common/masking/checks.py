"""What the server asks of each message of a masked sum before it counts: the due parts, of the due sizes, the client's own.

Each raises MaskingRefused and names the client.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from seqfed.common.errors import MaskingRefused
from seqfed.common.masking import keys
from seqfed.common.masking.messages import (
    COMMITMENTS,
    OF_KEY,
    OF_SELF,
    OPENED,
    SEALED,
    Advert,
    Confirm,
    KeyShares,
    MaskedInput,
    Opening,
)
from seqfed.common.masking.plan import Plan, Statement, advert_statement
from seqfed.common.masking.terms import Terms

DIGEST: Final = 32  # bytes of BLAKE3 and SHA-256


def kind_of(owner: str, survivors: Collection[str]) -> int:
    """Which of this client's two secrets is opened."""
    return OF_SELF if owner in survivors else OF_KEY


def check_advert(terms: Terms, advert: Advert, trust: Callable[[Advert], None]) -> None:
    """The keys are good ones, signed for these terms; and what `trust` raises."""
    keys.check_public(advert.encryption_key)
    keys.check_public(advert.mask_key)
    if len({advert.encryption_key, advert.mask_key, advert.identity_key}) < 3:
        raise MaskingRefused(f"client '{advert.client}' advertises one key twice")
    if not keys.verify(advert.identity_key, advert.signature, *advert_statement(terms, advert)):
        raise MaskingRefused(
            f"client '{advert.client}' has not signed its keys for these terms of masked sum {terms.number}"
        )
    trust(advert)


def check_shares(plan: Plan, client: str, message: KeyShares) -> None:
    """Shares sealed for each neighbour, and commitments to them and to its own."""
    due = (
        message.sealed.keys() == set(plan.neighbours(client)),
        message.commitments.keys() == set(plan.circle(client)),
        all(len(one) == SEALED for one in message.sealed.values()),
        all(len(one) == COMMITMENTS for one in message.commitments.values()),
        len(message.self_commitment) == DIGEST,
    )
    if not all(due):
        raise _refused(plan, client, "its shares are not one for each of its neighbours, of the due sizes")
    _check_signed(plan, client, message.signature, plan.shares_statement(client, message))


def check_input(plan: Plan, client: str, message: MaskedInput, sharers: Collection[str]) -> None:
    """As many masked scalars as the terms say, and a digest if there is a vector."""
    digest = DIGEST if plan.terms.dim else 0
    if len(message.scalars) != 8 * plan.terms.scalars or len(message.digest) != digest:
        raise _refused(plan, client, f"its input is not {plan.terms.scalars} scalars and a digest of {digest} bytes")
    _check_signed(plan, client, message.signature, plan.input_statement(client, message, sharers))


def check_confirm(
    plan: Plan, client: str, message: Confirm, sharers: Collection[str], survivors: Collection[str]
) -> None:
    """A signature of these very sharers and survivors."""
    _check_signed(plan, client, message.signature, plan.survivors_statement(client, plan.agreed(sharers, survivors)))


def check_opening(
    plan: Plan, client: str, message: Opening, sharers: Collection[str], survivors: Collection[str]
) -> None:
    """Of those in its circle who have shared, the share that is due, or none. Whether it is the right one is seen later."""
    if not all(owner in sharers for owner in message.shares) or not message.shares.keys() <= set(plan.circle(client)):
        raise _refused(plan, client, "it opens shares of clients of which it holds none")
    for owner, share in message.shares.items():
        if len(share) != OPENED or share[0] != kind_of(owner, survivors):
            raise _refused(plan, client, f"it opens something else than the share that is due of '{owner}'")


def _check_signed(plan: Plan, client: str, signature: bytes, statement: Statement) -> None:
    public = plan.roster.adverts[plan.roster.index(client)].identity_key
    if not keys.verify(public, signature, *statement):
        raise _refused(plan, client, f"its signature of its {statement[0]} does not hold")


def _refused(plan: Plan, client: str, what: str) -> MaskingRefused:
    return MaskingRefused(f"masked sum {plan.terms.number}: client '{client}': {what}")
