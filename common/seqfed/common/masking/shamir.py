"""Shamir's secret sharing (1979): a secret of 32 bytes in shares, of which `threshold` give it back and fewer say nothing.

Over the integers modulo 2^256 + 297, the smallest prime above all secrets, so that one polynomial holds one secret whole.
A share is the polynomial's value at its holder's point, as 33 bytes little-endian; the secret is the value at 0.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from seqfed.common.errors import MaskingFailed

PRIME: Final = 2**256 + 297
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33


def split(secret: bytes, points: Sequence[int], threshold: int) -> list[bytes]:
    """The shares of a secret of 32 bytes, one a point, in the points' order.

    Preconditions: the points are distinct and in 1..PRIME - 1; 1 <= threshold <= len(points). Raises ValueError otherwise.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret of {len(secret)} bytes cannot be shared; it must have {SECRET_BYTES}")
    _check_points(points)
    if not 1 <= threshold <= len(points):
        raise ValueError(f"a threshold of {threshold} with {len(points)} shares; it must be 1 to as many")
    # highest power first
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)] + [int.from_bytes(secret, "little")]
    return [_value(coefficients, point).to_bytes(SHARE_BYTES, "little") for point in points]


def weights(points: Sequence[int]) -> list[int]:
    """What each point's share counts in the secret (Lagrange's basis at 0), in the points' order.

    Precondition as for `split`. The last few lists of points are remembered: in a complete graph all secrets have the same.
    """
    return list(_weights(tuple(points)))


def recover(weights: Sequence[int], shares: Sequence[bytes]) -> bytes:
    """The secret of exactly `threshold` or more shares that stand in the order of their points' weights.

    Raises MaskingFailed if they are of no secret; shares of another secret give another secret, which only a commitment
    tells from the right one.
    """
    if len(weights) != len(shares):
        raise ValueError(f"{len(shares)} shares with the weights of {len(weights)}")
    total = 0
    for weight, share in zip(weights, shares, strict=True):
        value = int.from_bytes(share, "little")
        if len(share) != SHARE_BYTES or value >= PRIME:
            raise MaskingFailed(f"a share of a secret is not a number below 2^256 + 297 in {SHARE_BYTES} bytes")
        total += weight * value
    total %= PRIME
    if total >> (8 * SECRET_BYTES):
        raise MaskingFailed("the shares are not of one secret")
    return total.to_bytes(SECRET_BYTES, "little")


def _value(coefficients: Sequence[int], point: int) -> int:
    """The polynomial at a point, by Horner's rule; reduced once, since points are small and reductions dear."""
    value = 0
    for one in coefficients:
        value = value * point + one
    return value % PRIME


def _check_points(points: Sequence[int]) -> None:
    if len(set(points)) != len(points) or not all(0 < point < PRIME for point in points):
        raise ValueError("the points of shares must be distinct and above 0")


@lru_cache(maxsize=64)
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    _check_points(points)
    product = 1
    for point in points:
        product = product * point % PRIME
    found = []
    for own in points:
        # the product over the others of other / (other - own)
        below = own
        for other in points:
            if other != own:
                below = below * (other - own) % PRIME
        found.append(product * pow(below, -1, PRIME) % PRIME)
    return tuple(found)
