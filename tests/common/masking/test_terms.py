"""The terms of a masked sum: what is refused, and that everything in them is in their digest."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqfed.common.errors import ConfigError, MaskingRefused
from seqfed.common.masking.terms import MAX_DIM, MAX_SCALARS, WIDTHS, Purpose, Terms, width

TERMS = Terms(
    run="r1",
    round=3,
    attempt=1,
    number=7,
    purpose=Purpose.TRAIN,
    dim=1000,
    bits=16,
    levels=327,
    n_max=100,
    min_survivors=3,
    malicious=True,
    drop=0.05,
    scalars=4,
    codec="rotq-1",
    model=bytes(32),
    settings=bytes(range(32)),
)
OTHERS: dict[str, Any] = {
    "run": "r2",
    "purpose": Purpose.EVALUATE,
    "malicious": False,
    "drop": 0.0500001,
    "codec": "rotq-2",
    "model": b"\1" + bytes(31),
    "settings": bytes(32),
    "known": b"\1",
}


@pytest.mark.parametrize("name", [one.name for one in fields(Terms)])
def test_every_term_is_in_the_digest(name: str) -> None:
    changes = {name: OTHERS[name] if name in OTHERS else getattr(TERMS, name) + 1}
    other = replace(TERMS, **changes)
    assert other.digest != TERMS.digest
    assert len(other.digest) == 32


def test_the_same_terms_have_the_same_digest() -> None:
    assert replace(TERMS).digest == TERMS.digest


@pytest.mark.parametrize("bits", list(WIDTHS))
def test_the_type_is_the_smallest_that_holds_the_bits_in_the_machines_own_order(bits: int) -> None:
    dtype = replace(TERMS, bits=bits).dtype
    assert dtype.isnative
    assert dtype.kind == "u"
    assert bits <= 8 * dtype.itemsize
    assert dtype.itemsize == 1 or bits > 4 * dtype.itemsize


@given(st.sampled_from(list(WIDTHS)), st.integers(2, 200), st.integers(-1, 1 << 32))
def test_a_sum_that_could_wrap_is_refused(bits: int, clients: int, levels: int) -> None:
    terms = replace(TERMS, bits=bits, n_max=clients, min_survivors=2, levels=levels)
    # the largest and the smallest sum are told apart from each other and from no other
    if levels >= 1 and clients * levels < (1 << bits) - clients * levels:
        terms.check()
    else:
        with pytest.raises(MaskingRefused, match="do not fit"):
            terms.check()


def test_what_privacy_needs_of_levels_is_what_fits() -> None:
    for bits in WIDTHS:
        for clients in (2, 3, 64, 127):
            levels = ((1 << (bits - 1)) - 1) // clients
            if levels:
                replace(TERMS, bits=bits, n_max=clients, min_survivors=2, levels=levels).check()
            with pytest.raises(MaskingRefused, match="do not fit"):
                replace(TERMS, bits=bits, n_max=clients, min_survivors=2, levels=levels + 1).check()


@given(st.sampled_from([1, 7, 127]), st.integers(2, 1 << 20))
def test_the_width_is_the_smallest_in_which_nothing_wraps(levels: int, clients: int) -> None:
    bits, widths = width(levels, clients), list(WIDTHS)
    replace(TERMS, bits=bits, n_max=clients, min_survivors=2, levels=levels).check()
    if bits != widths[0]:
        narrower = widths[widths.index(bits) - 1]
        with pytest.raises(MaskingRefused, match="do not fit"):
            replace(TERMS, bits=narrower, n_max=clients, min_survivors=2, levels=levels).check()


def test_there_may_be_no_width() -> None:
    with pytest.raises(ConfigError, match=r"20,000,000 clients with 127 levels each are too many for a sum of 32 bits"):
        width(127, 20_000_000)


@pytest.mark.parametrize(("step", "levels"), [(0.5, 6), (0.5, 8), (-1.0, 7), (float("inf"), 7), (float("nan"), 7)])
def test_a_tuned_sum_has_a_step_and_all_levels(step: float, levels: int) -> None:
    tuned = replace(TERMS, bits=4, levels=7, step=0.5)
    tuned.check()
    with pytest.raises(MaskingRefused, match="a tuned sum of 4 bits"):
        replace(tuned, step=step, levels=levels).check()


def test_scalars_alone_need_no_levels_and_a_measurement_no_model() -> None:
    replace(TERMS, dim=0, levels=0).check()
    replace(TERMS, dim=0, levels=0, purpose=Purpose.MEASURE, model=b"").check()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 9}, "of 9 bits"),
        ({"bits": 64}, "of 64 bits"),
        ({"dim": -1}, "dim = -1"),
        ({"dim": MAX_DIM + 1}, "dim ="),
        ({"scalars": 0}, "scalars = 0"),
        ({"scalars": MAX_SCALARS + 1}, "scalars ="),
        ({"round": -1}, "round = -1"),
        ({"attempt": -1}, "attempt = -1"),
        ({"number": -1}, "number = -1"),
        ({"min_survivors": 1}, "min_survivors = 1"),
        ({"min_survivors": 101}, "min_survivors = 101"),
        ({"drop": 0.5}, "50%"),
        ({"drop": -0.1}, "-10%"),
        ({"drop": float("nan")}, "nan"),
        ({"model": b""}, "digest of the model"),
        ({"model": bytes(31)}, "digest of the model"),
        ({"model": bytes(31), "purpose": Purpose.MEASURE}, "digest of the model"),
        ({"settings": b""}, "digest of the settings"),
    ],
)
def test_terms_beyond_measure_are_refused(changes: dict[str, Any], said: str) -> None:
    TERMS.check()
    with pytest.raises(MaskingRefused, match=said):
        replace(TERMS, **changes).check()


def test_the_types_are_unsigned_integers_of_numpy() -> None:
    assert {bits: np.iinfo(replace(TERMS, bits=bits).dtype).bits for bits in WIDTHS} == {
        4: 8,
        5: 8,
        6: 8,
        8: 8,
        10: 16,
        12: 16,
        14: 16,
        16: 16,
        18: 32,
        20: 32,
        24: 32,
        32: 32,
    }
