"""What clients give into masked sums of compressed updates, and what comes of it: the plain mean of the same numbers."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from seqfed.client.secure import contribution, rest_of
from seqfed.client.work import LocalUpdate
from seqfed.common.compression import lowrank, rotsub
from seqfed.common.config import validate
from seqfed.common.errors import ConfigError, MaskingRefused
from seqfed.common.layout import Flat
from seqfed.common.masking.agreed import grid_of, known_of, lattice_of, part_of, rotation_seed, side_of, terms_of
from seqfed.common.masking.terms import Purpose, Terms
from seqfed.common.model import layout_of
from seqfed.common.quantising import decode
from seqfed.common.rotation import rotate, unrotate
from seqfed.common.spec import RunSpec
from seqfed.common.views import MaskingTerms, ModelVersion, Task, TaskKey, TaskKind

CLIP = 2.0


def spec_of(compression: dict[str, Any], **private: Any) -> RunSpec:
    content = {
        "data": {"features": 3, "classes": 2},
        "model": {"hidden": 30, "layers": 1},
        "cohort": {"min_clients": 3},
        "aggregation": {"weighting": "uniform"},
        "privacy": {"secure_aggregation": True, "clip": CLIP, **private},
        "compression": compression,
    }
    return validate(RunSpec, content, "test")


def task_of(spec: RunSpec, clients: int, known: bytes = b"", round_: int = 1) -> Task:
    layout = layout_of(spec)
    model = ModelVersion(round_ - 1, layout.nbytes, bytes(32), layout.digest)
    return Task(TaskKind.TRAIN, TaskKey("run", round_, 1), spec, model, masking=MaskingTerms(1, clients, known))


def terms_for(spec: RunSpec, clients: int, known: bytes = b"", round_: int = 1) -> Terms:
    key, size = TaskKey("run", round_, 1), layout_of(spec).size
    return terms_of(spec, key, Purpose.TRAIN, 1, clients, bytes(32), b"", size, known)


def update(nth: int, dim: int, long: float = 1.0) -> LocalUpdate:
    found = np.random.default_rng(nth).standard_normal(dim)
    return LocalUpdate((found * (long / np.linalg.norm(found))).astype(np.float32), bytes(32), 1, {}, 1.0)


def signed(residues: Any, bits: int) -> Any:
    half = 1 << bits - 1
    return (residues.astype(np.int64) + half) % (1 << bits) - half


@pytest.mark.parametrize("upload", ["rotq8", "rotq4"])
@pytest.mark.parametrize("clients", [3, 10, 40])
def test_the_sum_is_that_of_each_clients_own_levels(upload: str, clients: int) -> None:
    spec = spec_of({"upload": upload})
    terms, dim, most = terms_for(spec, clients), layout_of(spec).size, {"rotq8": 127, "rotq4": 7}[upload]
    total, plain = np.zeros(dim, terms.dtype), np.zeros(dim, np.int64)
    seed, step = rotation_seed(spec, 1), lattice_of(spec, terms).step
    for nth in range(clients):
        vector, _ = contribution(terms, task_of(spec, clients), f"c{nth}", update(nth, dim))
        assert vector is not None
        numbers = signed(vector, terms.bits)
        assert np.abs(numbers).max() <= most
        turned = update(nth, dim).delta.copy()
        rotate(turned, seed)
        assert np.abs(numbers - turned / step).max() <= 1.001
        total, plain = total + vector, plain + numbers
    assert np.array_equal(signed(total, terms.bits), plain)
    assert 2 * clients * most < 1 << terms.bits  # of no clients could it wrap
    wanted = (plain * (step / clients)).astype(np.float32)
    unrotate(wanted, seed)
    found = decode(total, lattice_of(spec, terms), seed, clients=clients, weight=clients, max_weight=1)
    assert np.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("compression", "private", "by_clients"),
    [
        ({"upload": "none"}, {"b": 12}, {2: (12, 1023), 10: (12, 204)}),
        ({"upload": "rotq8"}, {}, {2: (10, 127), 4: (10, 127), 5: (12, 127), 16: (12, 127), 17: (14, 127), 65: (16, 127)}),
        ({"upload": "rotq4"}, {}, {2: (5, 7), 3: (6, 7), 4: (6, 7), 5: (8, 7), 18: (8, 7), 19: (10, 7), 300: (14, 7)}),
        ({"upload": "rotsub"}, {}, {10: (16, 3276)}),
        ({"upload": "rotsub", "wrap": 6e-5}, {}, {3: (4, 7), 10: (5, 15), 30: (6, 31), 100: (8, 127)}),
        ({"upload": "rotsub", "wrap": 6e-5}, {"b": 12}, {3: (12, 2047), 100: (12, 2047)}),
        ({"upload": "powersgd"}, {"b": 8}, {10: (8, 12)}),
    ],
)  # fmt: skip
def test_bits_and_levels_follow_from_the_upload(
    compression: dict[str, Any], private: dict[str, Any], by_clients: dict[int, tuple[int, int]]
) -> None:
    spec = spec_of(compression, **private)
    assert {clients: grid_of(spec, clients) for clients in by_clients} == by_clients
    for clients in by_clients:
        terms = terms_for(spec, clients + 1)  # min_survivors is 3
        assert (terms.bits, terms.levels) == grid_of(spec, clients + 1)
        assert bool(terms.step) == ("wrap" in compression)


@pytest.mark.parametrize(
    ("compression", "private", "clients", "told"),
    [
        ({"upload": "none"}, {"b": 5}, 8, "privacy.b = 5: a sum of 5 bits is for 7 clients at most"),
        ({"upload": "rotsub", "wrap": 1e-4}, {"b": 4}, 14, "privacy.b = 4: a tuned sum of 4 bits over 14 clients wraps by"),
    ],
)  # fmt: skip
def test_what_no_sum_can_be_of_is_refused(
    compression: dict[str, Any], private: dict[str, Any], clients: int, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        grid_of(spec_of(compression, **private), clients)


def test_columns_that_no_task_can_bring_are_refused() -> None:
    spec = spec_of({"upload": "powersgd", "rank": 9})
    grid_of(spec, 3)
    wide = spec.model_copy(update={"model": spec.model.model_copy(update={"hidden": 4096})})
    with pytest.raises(
        ConfigError, match="rank = 9: each task would bring 589,824 bytes of columns, and 524,288 is the most"
    ):
        grid_of(wide, 3)


def test_a_tuned_sum_follows_the_last_one() -> None:
    spec, clients, deviation = spec_of({"upload": "rotsub", "fraction": 0.5, "wrap": 6e-5}), 10, None
    dim, known, steps = layout_of(spec).size, b"", []
    for _ in range(4):
        terms = terms_for(spec, clients, known)
        part = part_of(spec, terms, dim)
        assert part is not None
        assert part == rotsub.tuned(dim, 0.5, 5, clients, CLIP, deviation, 6e-5)
        assert (part.step, part.wrap, part.size) == (terms.step, 6e-5, terms.dim)
        total = np.zeros(part.size, terms.dtype)
        for nth in range(clients):
            vector, _ = contribution(terms, task_of(spec, clients, known), f"c{nth}", update(nth, dim, 0.1))
            assert vector is not None
            total += vector
        steps.append(part.step)
        if deviation is not None:
            assert rotsub.tuned_for(part, clients) == pytest.approx(deviation)
        deviation = rotsub.deviation_of(total & total.dtype.type(31), part, clients)
        known = known_of(deviation, clients)
        deviation = clients * (deviation / clients)
    assert steps[0] > 10 * steps[-1]


@pytest.mark.parametrize(
    "known", [b"x", bytes(8), struct.pack("<d", -1.0), struct.pack("<d", float("nan")), struct.pack("<d", float("inf")), bytes(9)]
)  # fmt: skip
def test_a_deviation_that_is_none_is_refused(known: bytes) -> None:
    with pytest.raises(MaskingRefused, match="deviation of the last one's"):
        terms_for(spec_of({"upload": "rotsub", "wrap": 6e-5}), 10, known)


@pytest.mark.parametrize("upload", ["none", "rotq8", "rotsub"])
def test_what_needs_nothing_of_the_last_sum_is_told_nothing(upload: str) -> None:
    with pytest.raises(MaskingRefused, match="of which it needs nothing"):
        terms_for(spec_of({"upload": upload}), 10, bytes(8))


def columns(spec: RunSpec, round_: int) -> Flat:
    plan = lowrank.Plan(layout_of(spec), 2)
    return np.random.default_rng(round_).standard_normal(plan.middle if round_ % 2 else plan.first).astype(np.float32)


@pytest.mark.parametrize("round_", [1, 2, 3])
def test_a_sum_of_lower_rank_is_the_mean_on_the_known_side(round_: int) -> None:
    spec, clients = spec_of({"upload": "powersgd", "rank": 2}, b=24), 4
    known = columns(spec, round_).tobytes() if round_ > 1 else b""
    task, terms = task_of(spec, clients, known, round_), terms_for(spec, clients, known, round_)
    dim, side = layout_of(spec).size, side_of(spec, terms)
    assert side is not None
    assert terms.dim == side.size < dim / 4
    total, mean = np.zeros(terms.dim, terms.dtype), np.zeros(dim)
    for nth in range(clients):
        given = update(nth, dim, 1.0 if nth else 3.0)
        vector, _ = contribution(terms, task, f"c{nth}", given)
        assert vector is not None
        total += vector
        clipped = given.delta * (1.0 if nth else CLIP / 3.0)
        mean += clipped / clients
        rest = rest_of(task, given)
        assert np.allclose(rest + side.rebuild(side.project(clipped.astype(np.float32))), clipped, atol=1e-6)
    found = decode(
        total, lattice_of(spec, terms), rotation_seed(spec, round_), clients=clients, weight=clients, max_weight=1
    )
    assert np.allclose(found, side.project(mean.astype(np.float32)), atol=1e-4)


def test_everybody_has_the_same_columns_or_no_sum() -> None:
    spec = spec_of({"upload": "powersgd", "rank": 2})
    known = columns(spec, 2).tobytes()
    terms = terms_for(spec, 4, known, 2)
    other = bytes([known[0] ^ 1]) + known[1:]
    assert terms_for(spec, 4, other, 2).digest != terms.digest
    assert terms_for(spec, 4, b"", 2).digest != terms.digest
    for wrong in (known[:-4], known + bytes(4), columns(spec, 3).tobytes(), b"\xff" * len(known)):
        with pytest.raises(MaskingRefused, match="bytes of the last one's columns"):
            terms_for(spec, 4, wrong, 2)
