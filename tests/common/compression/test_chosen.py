"""Which codec a run's payloads are of, by its settings, the model's size and the link."""

from __future__ import annotations

import math
from typing import Any

import pytest

from seqfed.common.compression import Codec, chosen
from seqfed.common.config import validate
from seqfed.common.errors import ConfigError, MalformedPayload
from seqfed.common.spec import RunSpec

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
    assert chosen.chosen(run, chosen.WORTH - 1, 1.0) == Codec("none")  # a message costs more than the numbers


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
        ({"upload": "auto"}, {chosen.WORTH - 1: 1.0, chosen.WORTH: 0.1}),
    ):
        run = spec(given, **SECURE)
        assert {size: chosen.part_sent(run, size) for size in sizes} == sizes
        assert chosen.uploads(run) == {}


def test_a_download_by_name_or_size() -> None:
    assert chosen.download(spec({"download": "delta4"}), 1) == Codec("delta4")
    auto = spec({"download": "auto"})
    assert chosen.download(auto, chosen.WORTH - 1) is None
    assert chosen.download(auto, chosen.WORTH) == Codec("delta8")


DP: dict[str, Any] = {"privacy": {"dp": {"mode": "central", "epsilon": 4.0, "delta": 1e-5}}, "evaluation": {"every": 0}}
CENTRAL = {**DP, "aggregation": {"weighting": "uniform"}, "cohort": {"min_clients": 5, "count": 5}}


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
        ({"upload": "rotsub"}, {}, "'rotsub' sends the same part of all updates, for masked sums"),
        ({"upload": "rotq8"}, SECURE, "rotated and rounded already, to privacy.b bits"),
        ({"upload": "eden1"}, SECURE, "each client sends another part of its update"),
        ({"upload": "topk"}, SECURE, "needs the server to see which numbers are sent"),
        ({"upload": "powersgd"}, SECURE, "needs two masked sums a round"),
        ({"upload": "topk"}, CENTRAL, "privacy.dp counts on each client's clipped update"),
        ({"upload": "powersgd"}, CENTRAL, "privacy.dp counts on"),
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


@pytest.mark.parametrize("name", ["rotq8", "rotq4", "eden1", "auto"])
def test_noise_of_the_server_goes_with_codecs_that_keep_nothing(name: str) -> None:
    given = {"compression": {"upload": name, "download": "delta8"}, "data": {"features": 2, "classes": 2}}
    assert validate(RunSpec, {**given, **CENTRAL}, "test").compression.upload == name
