"""What stands in the slots: sums of them come out exactly, whatever clients give; and words are added as whole numbers are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.client.table import secure_spec

from seqfed.common.errors import ConfigError, MaskingRefused
from seqfed.common.homomorphic import scheme
from seqfed.common.homomorphic.messages import CIPHERTEXT
from seqfed.common.homomorphic.scheme import HOLD, MODULUS, MOST_CLIENTS, MOST_NUMBERS, SLOTS, WORDS, Form
from seqfed.common.masking.terms import WIDTHS, Purpose, Terms

TERMS = Terms(
    run="r1",
    round=3,
    attempt=1,
    number=7,
    purpose=Purpose.TRAIN,
    dim=10,
    bits=16,
    levels=3,
    n_max=4,
    min_survivors=2,
    malicious=False,
    drop=0.05,
    scalars=3,
    codec="rotq-1",
    model=bytes(32),
    settings=bytes(range(32)),
)


@st.composite
def sums(draw: st.DrawFn) -> tuple[Terms, list[list[int]], list[list[int]]]:
    """Terms, and of each client the numbers and the scalars."""
    bits, n_max = draw(st.sampled_from(list(WIDTHS))), draw(st.sampled_from((2, 3, 4, 5, 16, 17, 256)))
    dim, count = draw(st.integers(0, 20)), draw(st.integers(2, min(n_max, 6)))
    most, high = ((1 << 63) - 1) // n_max, (1 << bits) - 1
    number = st.one_of(st.sampled_from((0, high, 1 << (bits - 1), (1 << (bits - 1)) - 1)), st.integers(0, high))
    scalar = st.one_of(st.sampled_from((most, -most, 0)), st.integers(-most, most))
    scalars = draw(st.integers(1, 5))
    terms = replace(TERMS, bits=bits, n_max=n_max, dim=dim, levels=1, scalars=scalars)
    vectors = [draw(st.lists(number, min_size=dim, max_size=dim)) for _ in range(count)]
    return terms, vectors, [draw(st.lists(scalar, min_size=scalars, max_size=scalars)) for _ in range(count)]


@given(sums())
def test_sums_of_slots_are_those_of_the_numbers(case: tuple[Terms, list[list[int]], list[list[int]]]) -> None:
    terms, vectors, scalars = case
    form, total = Form(terms), np.zeros(SLOTS, np.int64)
    for vector, own in zip(vectors, scalars, strict=True):
        slots = form.fill(np.array(vector, terms.dtype) if terms.dim else None, own)
        assert slots.shape == (form.ciphertexts, SLOTS) == (1, SLOTS)
        total += slots[0]
    assert np.abs(total).max(initial=0) <= 1.01 * (1 << (HOLD - 1))
    found, totals = form.read(total[None], len(vectors))
    assert found.dtype == terms.dtype
    assert found.tolist() == [sum(column) % (1 << terms.bits) for column in zip(*vectors, strict=True)]
    assert list(totals) == [sum(column) for column in zip(*scalars, strict=True)]


@pytest.mark.parametrize("bits", list(WIDTHS))
def test_as_many_clients_as_there_may_be_at_their_extremes(bits: int) -> None:
    n_max = min(MOST_CLIENTS, 1 << (HOLD - bits))
    for number in (1 << (bits - 1), (1 << (bits - 1)) - 1):
        terms = replace(TERMS, bits=bits, n_max=n_max, levels=1)
        slots = n_max * Form(terms).fill(np.full(10, number, terms.dtype), [5, -5, 0])
        assert np.abs(slots).max() * scheme.SCALE < MODULUS / 2
        found, totals = Form(terms).read(slots, n_max)
        assert set(found.tolist()) == {n_max * number % (1 << bits)}
        assert totals == (5 * n_max, -5 * n_max, 0)


@pytest.mark.parametrize(("bits", "clients", "each"), [(16, 16, 2), (16, 17, 1), (8, 4, 4), (8, 10, 3), (32, 256, 1)])
def test_a_slot_holds_several_numbers_where_there_is_room(bits: int, clients: int, each: int) -> None:
    assert scheme.fits(bits, clients) == each
    terms = replace(TERMS, bits=bits, n_max=clients, levels=1, dim=each * SLOTS)
    assert Form(terms).ciphertexts == 2  # with the scalars
    assert Form(terms).nbytes == 2 * CIPHERTEXT


def test_more_clients_than_a_slot_has_room_for_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"privacy.b = 32 is for 256 clients in a sum at most, and there may be 257"):
        scheme.fits(32, 257)
    with pytest.raises(ConfigError, match="is for 1,000 clients in a sum at most"):
        scheme.fits(8, 1001)


def test_models_that_are_too_large_are_refused_with_the_remedy() -> None:
    spec = secure_spec(homomorphic=True, mode="semi_honest")
    scheme.check(spec, MOST_NUMBERS)
    with pytest.raises(ConfigError, match=r"2,000,000 numbers at most, and this one has 2,000,001; drop it: masks"):
        scheme.check(spec, MOST_NUMBERS + 1)


def test_what_a_client_gives_is_of_the_terms() -> None:
    form, vector = Form(TERMS), np.zeros(10, np.uint16)
    most = ((1 << 63) - 1) // 4
    for wrong, scalars in ((None, [0] * 3), (vector[:9], [0] * 3), (vector, [0] * 2)):
        with pytest.raises(MaskingRefused, match="is of 10 numbers and 3 scalars"):
            form.fill(wrong, scalars)
    form.fill(vector, [most, -most, 0])
    with pytest.raises(MaskingRefused, match="could wrap"):
        form.fill(vector, [most + 1, 0, 0])


def filled() -> Any:
    return 2 * Form(TERMS).fill(np.arange(10, dtype=np.uint16), [1, 2, 3])


def test_what_is_no_sum_of_so_many_under_these_terms_is_refused() -> None:
    form = Form(TERMS)
    form.read(filled(), 2)
    for terms, clients in (
        (TERMS, 1),
        (TERMS, 3),
        (replace(TERMS, number=8), 2),
        (replace(TERMS, model=b"\1" * 32), 2),
    ):
        with pytest.raises(MaskingRefused, match=f"not the sum of {clients} clients' numbers"):
            Form(terms).read(filled(), clients)
    more = "holds more than clients"
    for place, what in ((SLOTS - 1, "after the last number"), (scheme.MARKS, more), (scheme.MARKS + 6, more)):
        slots = filled()
        slots[0, place] = 1 << 45
        with pytest.raises(MaskingRefused, match=what):
            form.read(slots, 2)


def test_all_say_the_same_of_the_terms_and_the_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Form(TERMS).agreed
    assert Form(replace(TERMS)).agreed == before
    assert Form(replace(TERMS, round=4)).agreed != before
    for name in scheme.CONSTANTS:
        monkeypatch.setitem(scheme.CONSTANTS, name, 0)
        assert Form(TERMS).agreed != before
        monkeypatch.undo()


# Words ------------------------------------------------------------------------------------------------------------------

WORD = st.one_of(st.sampled_from((0, 1, MODULUS - 1)), st.integers(0, MODULUS - 1))


@example([MODULUS - 1], [MODULUS - 1])
@given(st.lists(WORD, min_size=1, max_size=5), st.lists(WORD, min_size=1, max_size=5))
def test_words_are_added_modulo_the_prime(one: list[int], other: list[int]) -> None:
    count = min(len(one), len(other))
    first, second = np.array(one[:count], np.uint64), np.array(other[:count], np.uint64)
    total = first.copy()
    scheme.add(total, second)
    assert total.tolist() == [(a + b) % MODULUS for a, b in zip(one, other, strict=False)]
    scheme.subtract(total, second)
    assert total.tolist() == first.tolist()


def test_bytes_that_are_no_ciphertexts_are_refused() -> None:
    words = np.zeros((2, WORDS), "<u8")
    assert np.array_equal(scheme.words_of(words.tobytes()), words)
    with pytest.raises(MaskingRefused, match="are no ciphertexts of 131,072 bytes each"):
        scheme.words_of(bytes(CIPHERTEXT + 8))
    words[1, -1] = MODULUS
    with pytest.raises(MaskingRefused, match="not below its modulus"):
        scheme.words_of(words.tobytes())


def test_the_modulus_is_the_second_largest_prime_of_its_kind() -> None:
    def is_prime(number: int) -> bool:
        odd, twos = number - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):  # enough below 2^64
            power = pow(base, odd, number)
            squares = [pow(power, 1 << nth, number) for nth in range(twos)]
            if power != 1 and number - 1 not in squares:
                return False
        return True

    step = 2 * scheme.DEGREE
    candidates = (number for number in range((1 << 60) + 1 - step, MODULUS - 1, -step) if is_prime(number))
    assert list(candidates)[1:] == [MODULUS]
