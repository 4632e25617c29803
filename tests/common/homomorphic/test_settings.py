"""Which runs may be encrypted."""

from __future__ import annotations

from typing import Any

import pytest
from tests.client.table import secure_spec

from seqfed.common.config import validate
from seqfed.common.errors import ConfigError
from seqfed.common.spec import RunSpec

ENCRYPTED: dict[str, Any] = {"homomorphic": True, "mode": "semi_honest"}


def test_against_a_server_that_lies_there_are_masks_only() -> None:
    with pytest.raises(ConfigError, match=r"not against one that lies.*set privacy.mode = 'semi_honest', or use masks"):
        secure_spec(homomorphic=True)
    assert secure_spec(**ENCRYPTED).privacy.homomorphic


def test_it_belongs_to_secure_aggregation() -> None:
    with pytest.raises(ConfigError, match=r"and homomorphic are of secure_aggregation = true; set it"):
        secure_spec(**ENCRYPTED, secure_aggregation=False)


@pytest.mark.parametrize(("mode", "fits"), [("central", False), ("distributed", True), ("local", True)])
def test_clients_that_open_a_sum_see_it_without_the_servers_noise(mode: str, fits: bool) -> None:
    dp: dict[str, Any] = {"mode": mode, "noise_multiplier": 1.0, "delta": 1e-5, "evaluation": "public"}
    content = {
        "data": {"features": 1, "classes": 2},
        "cohort": {"min_clients": 3, "count": 3},
        "aggregation": {"weighting": "uniform"},
        "privacy": {**ENCRYPTED, "secure_aggregation": True, "dp": dp},
    }
    if fits:
        validate(RunSpec, content, "test")
        return
    with pytest.raises(ConfigError, match="see it before the server adds noise; use 'distributed', or masks"):
        validate(RunSpec, content, "test")
