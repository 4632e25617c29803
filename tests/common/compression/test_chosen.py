"""Which codec a run's payloads are of, by its settings, the model's size and the link."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from seqfed.common.compression import Codec, Key, chosen, decode, encode
from seqfed.common.config import validate
from seqfed.common.errors import ConfigError, MalformedPayload
from seqfed.common.layout import Layout
from seqfed.common.seeds import generator
from seqfed.common.spec import RunSpec
from seqfed.common.transfer import Pace

SECURE: dict[str, Any] = {"privacy": {"secure_aggregation": True}, "aggregation": {"weighting": "uniform"}}


def spec(compression: dict[str, Any], **tables: Any) -> RunSpec:
    cohort = {"min_clients": 5}
    data = {"features": 2, "classes": 2}
    return validate(RunSpec, {"data": data, "cohort": cohort, "compression": compression, **tables}, "test")


@pytest.mark.parametrize(
    ("given", "codec"),
    [
        ({"upload": "rotq8"}, Codec("rotq8")),
        ({"upload": "eden1", "fraction": 0.5}, Codec("eden1", 0.5)),
        ({"upload": "topk", "fraction": 0.1, "bits": 8}, Codec("topk", 0.1, 8)),
        ({"upload": "powersgd", "rank": 9}, Codec("powersgd", rank=9)),
    ],
)
def test_a_named_codec_is_the_only_one(given: dict[str, Any], codec: Codec) -> None:
    run = spec(given)
    assert chosen.uploads(run) == {codec.name: codec}
    assert chosen.chosen(run, 1, 1.0) == chosen.chosen(run, 1 << 30, math.inf) == chosen.named(run, codec.name) == codec
    for other in ("none", "", "rotsub", "delta8", "x" * 1000):
        with pytest.raises(MalformedPayload, match=f"this run takes payloads of {codec.name}"):
            chosen.named(run, other)


def test_auto_goes_by_size_and_link() -> None:
    run = spec({"upload": "auto"})
    assert tuple(chosen.uploads(run)) == chosen.AUTOMATIC
    million = 1_000_000
    for speed, name in (
        (math.inf, "none"),
        (4e6, "none"),
        (3.9e6, "rotq8"),
        (9.9e5, "rotq4"),
        (4.9e5, "eden1"),
        (1, "eden1"),
    ):
        assert chosen.chosen(run, million, speed) == Codec(name)
    assert chosen.chosen(run, 2_000, 1.0) == Codec("eden1")
    assert chosen.chosen(run, 1_000, 1.0) == Codec("none")  # a message costs more than the numbers


FORMS = {**chosen.BYTES_OF, "eden1": 0.02}


def uploads_over(size: int, bytes_per_s: float, rounds: int, pauses: dict[int, float]) -> list[tuple[str, float]]:
    """Codec and seconds of each round's upload over such a way of 50 ms, which stands still in some of them."""
    run, pace, found = spec({"upload": "auto"}), Pace(), []
    for round_ in range(rounds):
        codec = chosen.chosen(run, size, pace.bytes_per_s)
        assert codec is not None
        nbytes = round(size * FORMS[codec.name]) + 100
        seconds = 0.05 + nbytes / bytes_per_s + pauses.get(round_, 0.0)
        pace.carried(nbytes, seconds)
        found.append((codec.name, seconds))
    return found


@pytest.mark.parametrize("size", [2_000, 361_000, 5_000_000])
@pytest.mark.parametrize("pause", [1.0, 9.0, 1000.0])
def test_a_pause_costs_a_fast_link_few_rounds(size: int, pause: float) -> None:
    names = [name for name, _ in uploads_over(size, 1e9, 60, {0: pause, 30: pause})]
    assert names[0] == names[30] == "none"
    for after in (names[1:30], names[31:]):
        assert "none" in after[: 3 if pause < 10 else 14]
        first = after.index("none")
        assert set(after[first:]) == {"none"}


@pytest.mark.parametrize("size", [2_000, 361_000, 5_000_000])
@pytest.mark.parametrize("seconds", [1.5, 3.0, 30.0, 1e3, 1e5])
def test_a_slow_link_is_tried_again_but_seldom(size: int, seconds: float) -> None:
    """seconds: of float32. In the mean an upload takes at most as long as patience lasts and as one of a bit a number."""
    found = uploads_over(size, 4 * size / seconds, 200, {})[1:]
    assert sum(took for _, took in found) / len(found) < chosen.PATIENCE_S + 0.1 + seconds * (100 + 0.02 * size) / (
        4 * size
    )


def test_without_compression_nothing_is_a_payload() -> None:
    run = spec({})
    assert chosen.uploads(run) == {}
    assert chosen.chosen(run, 1 << 30, 1.0) is None
    assert chosen.download(run, 1 << 30) is None
    with pytest.raises(MalformedPayload, match="this run takes the numbers themselves"):
        chosen.named(run, "rotq8")


def test_what_a_masked_sum_is_of_goes_by_size_alone() -> None:
    for given, sizes in (
        ({}, {1: 1.0, 1 << 30: 1.0}),
        ({"upload": "rotsub"}, {1: 0.1, 1 << 30: 0.1}),
        ({"upload": "rotsub", "fraction": 0.25}, {1 << 20: 0.25}),
        ({"upload": "auto"}, {1: 1.0, 1 << 30: 1.0}),
    ):
        run = spec(given, **SECURE)
        assert {size: chosen.part_sent(run, size) for size in sizes} == sizes
        assert chosen.uploads(run) == {}


def test_a_download_by_name_or_size() -> None:
    assert chosen.download(spec({"download": "delta4"}), 1) == Codec("delta4")
    auto = spec({"download": "auto"})
    assert chosen.download(auto, chosen.LARGE - 1) is None
    assert chosen.download(auto, chosen.LARGE) == Codec("delta8")


BITS: dict[str, Any] = {"privacy": {"secure_aggregation": True, "b": 12}}
DP: dict[str, Any] = {"privacy": {"dp": {"mode": "central", "epsilon": 4.0, "delta": 1e-5}}, "evaluation": {"every": 0}}
CENTRAL = {**DP, "aggregation": {"weighting": "uniform"}, "cohort": {"min_clients": 5, "count": 5}}
EXAMPLE = {**CENTRAL, "privacy": {"dp": {"mode": "example", "epsilon": 4.0, "delta": 1e-5}}}
NORM: dict[str, Any] = {"aggregation": {"max_norm": 3.0}}


@pytest.mark.parametrize(
    ("given", "tables", "told"),
    [
        ({"upload": "gzip"}, {}, "compression.upload"),
        (
            {"upload": "rotq8", "fraction": 0.1},
            {},
            "compression.fraction belongs to upload = 'eden1' or 'rotsub' or 'topk'",
        ),
        ({"upload": "eden1", "rank": 2}, {}, "compression.rank belongs to upload = 'powersgd', not to 'eden1'"),
        ({"upload": "eden1", "bits": 8}, {}, "compression.bits belongs to upload = 'topk'"),
        ({"upload": "topk", "bits": 4}, {}, "compression.bits"),
        ({"upload": "eden1", "fraction": 0.0}, {}, "compression.fraction"),
        ({"upload": "rotsub"}, {}, "'rotsub' sends the same part of all updates, for masked sums; .* use 'eden1'"),
        ({"upload": "rotsub"}, NORM, "'rotsub' sends the same part of all updates, .* use 'rotq4'"),
        (
            {"upload": "rotq8"},
            {**SECURE, **BITS},
            "as many bits as 127 levels of each of its clients need; drop privacy.b",
        ),
        ({"upload": "rotq4"}, {**SECURE, **BITS}, "privacy.b = 12: .* as many bits as 7 levels of each"),
        ({"upload": "rotsub", "wrap": 0.02}, SECURE, "compression.wrap"),
        ({"upload": "auto", "wrap": 1e-4}, SECURE, "compression.wrap belongs to upload = 'rotsub', not to 'auto'"),
        ({"upload": "eden1"}, SECURE, "each client sends another part of its update"),
        ({"upload": "topk"}, SECURE, "needs the server to see which numbers are sent"),
        ({"upload": "topk"}, CENTRAL, "privacy.dp counts on each client's clipped update"),
        ({"upload": "powersgd"}, CENTRAL, "privacy.dp counts on .*; use 'rotq8' or 'rotq4'"),
        (
            {"upload": "eden1"},
            CENTRAL,
            "'eden1': .* some three times as long as the update, .*; use 'rotq8' or 'rotq4'",
        ),
        ({"upload": "eden1"}, EXAMPLE, "'eden1': .* some three times as long"),
        ({"upload": "eden1"}, NORM, "'eden1': .* some three times as long"),
        ({"upload": "topk"}, NORM, "'topk' sends what it left out .* aggregation.max_norm .*; use 'rotq8' or 'rotq4'"),
        ({"upload": "powersgd"}, NORM, "'powersgd' sends what it left out .* aggregation.max_norm"),
        (
            {"upload": "rotq4"},
            {**CENTRAL, "privacy": {"secure_aggregation": True, **DP["privacy"]}},
            "the noise of privacy.dp.mode = 'central' is for all numbers of a masked sum",
        ),
        (
            {"upload": "rotsub"},
            {**CENTRAL, "privacy": {"secure_aggregation": True, **DP["privacy"]}},
            "the noise of privacy.dp.mode = 'central' is for all numbers of a masked sum",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], tables: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        spec(given, **{"cohort": {"min_clients": 5}, **tables})


@pytest.mark.parametrize("tables", [CENTRAL, EXAMPLE, NORM], ids=["central", "example", "max_norm"])
@pytest.mark.parametrize("name", ["rotq8", "rotq4", "auto"])
def test_where_an_updates_norm_counts_what_decodes_is_hardly_longer(name: str, tables: dict[str, Any]) -> None:
    run = validate(
        RunSpec,
        {
            "data": {"features": 2, "classes": 2},
            "cohort": {"min_clients": 5},
            "compression": {"upload": name, "download": "delta8"},
            **tables,
        },
        "test",
    )
    layout, key = Layout((("w", (200, 100)),)), Key(1, "run", 1, "alice")
    update = generator(1, "update").standard_t(4, layout.size).astype(np.float32)
    allowed = chosen.uploads(run)
    assert "eden1" not in allowed
    assert chosen.chosen(run, 1 << 30, 1.0) == list(allowed.values())[-1]
    for codec in allowed.values():
        found = np.concatenate(list(decode(encode(update, layout, key, codec).payload, layout, key, codec)))
        assert np.linalg.norm(found) < 1.05 * np.linalg.norm(update)
