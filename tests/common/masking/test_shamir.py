"""Secret sharing against Lagrange's formula written out, and that too few shares fit every secret."""

from __future__ import annotations

import contextlib
import secrets

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfed.common.errors import MaskingFailed
from seqfed.common.masking.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, recover, split, weights

some_secrets = st.one_of(
    st.binary(min_size=32, max_size=32), st.sampled_from([bytes(32), b"\xff" * 32, b"\1" + bytes(31)])
)


def at_zero(points: list[int], values: list[int]) -> int:
    """The value at 0 of the polynomial through these points, by the textbook."""
    total = 0
    for own, value in zip(points, values, strict=True):
        term = value
        for other in points:
            if other != own:
                term = term * -other * pow(own - other, -1, PRIME)
        total += term
    return total % PRIME


@st.composite
def sharings(draw: st.DrawFn) -> tuple[bytes, list[int], int, list[int]]:
    """A secret, distinct points, a threshold, and at least so many places among the points, in any order."""
    points = draw(st.lists(st.integers(1, 2000), min_size=1, max_size=12, unique=True))
    threshold = draw(st.integers(1, len(points)))
    places = draw(st.permutations(range(len(points))))
    return draw(some_secrets), points, threshold, places[: draw(st.integers(threshold, len(points)))]


@given(sharings())
def test_any_threshold_of_shares_gives_the_secret_back(sharing: tuple[bytes, list[int], int, list[int]]) -> None:
    secret, points, threshold, places = sharing
    shares = split(secret, points, threshold)
    assert {len(share) for share in shares} == {SHARE_BYTES}
    chosen, used = [points[place] for place in places], [shares[place] for place in places]
    assert recover(weights(chosen), used) == secret
    assert at_zero(chosen, [int.from_bytes(share, "little") for share in used]).to_bytes(32, "little") == secret


@given(some_secrets, some_secrets, st.integers(2, 8))
def test_one_share_less_fits_every_secret(secret: bytes, other: bytes, threshold: int) -> None:
    points = list(range(1, threshold + 1))
    known = split(secret, points, threshold)[:-1]
    # the last share that would make the others those of another secret
    found = weights(points)
    rest = sum(w * int.from_bytes(s, "little") for w, s in zip(found, known, strict=False))
    last = (int.from_bytes(other, "little") - rest) * pow(found[-1], -1, PRIME) % PRIME
    assert recover(found, [*known, last.to_bytes(SHARE_BYTES, "little")]) == other


def test_shares_are_drawn_anew_every_time() -> None:
    secret = bytes(SECRET_BYTES)
    seen = {share for _ in range(20) for share in split(secret, [1, 2, 3], 2)}
    assert len(seen) == 60


def test_shares_are_spread_over_the_whole_field() -> None:
    tops = {int.from_bytes(split(bytes(32), [1], 1)[0], "little")} | {
        int.from_bytes(share, "little") * 16 // PRIME for _ in range(40) for share in split(bytes(32), [1, 2, 3], 2)
    }
    assert tops >= set(range(16))


def test_the_modulus_is_the_smallest_prime_above_all_secrets() -> None:
    def composite(number: int) -> bool:
        odd, halvings = number - 1, 0
        while odd % 2 == 0:
            odd, halvings = odd // 2, halvings + 1
        for _ in range(40):
            power = pow(secrets.randbelow(number - 3) + 2, odd, number)
            if power not in (1, number - 1) and all(
                (power := power * power % number) != number - 1 for _ in range(halvings - 1)
            ):
                return True
        return False

    assert PRIME > 1 << 256
    assert not composite(PRIME)
    assert all(composite(number) for number in range(2**256 + 1, PRIME, 2))


@settings(max_examples=20)
@given(st.integers(0, 5), st.integers(1, PRIME - 1))
def test_a_wrong_share_gives_another_secret_or_none(place: int, error: int) -> None:
    secret, points = bytes(range(32)), list(range(1, 7))
    shares = split(secret, points, 6)
    wrong = (int.from_bytes(shares[place], "little") + error) % PRIME
    shares[place] = wrong.to_bytes(SHARE_BYTES, "little")
    with contextlib.suppress(MaskingFailed):
        assert recover(weights(points), shares) != secret


@pytest.mark.parametrize("above", [2**256, PRIME - 1])
def test_what_is_no_secret_is_not_recovered(above: int) -> None:
    with pytest.raises(MaskingFailed, match="not of one secret"):
        recover([1], [above.to_bytes(SHARE_BYTES, "little")])


@pytest.mark.parametrize("share", [b"", bytes(32), bytes(34), PRIME.to_bytes(33, "little"), b"\xff" * 33])
def test_what_is_no_share_is_refused(share: bytes) -> None:
    with pytest.raises(MaskingFailed, match="not a number below"):
        recover([1], [share])


@pytest.mark.parametrize("points", [[0, 1], [1, 1], [-1, 1], [PRIME, 1]])
def test_points_that_would_tell_the_secret_or_nothing_are_refused(points: list[int]) -> None:
    with pytest.raises(ValueError, match="distinct and above 0"):
        split(bytes(32), points, 2)
    with pytest.raises(ValueError, match="distinct and above 0"):
        weights(points)


@pytest.mark.parametrize("threshold", [0, 4])
def test_thresholds_that_cannot_be_met_are_refused(threshold: int) -> None:
    with pytest.raises(ValueError, match=f"threshold of {threshold} with 3"):
        split(bytes(32), [1, 2, 3], threshold)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_secrets_of_another_size_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"secret of {size} bytes"):
        split(bytes(size), [1, 2], 2)


def test_shares_without_their_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="1 shares with the weights of 2"):
        recover([1, 1], [bytes(33)])
