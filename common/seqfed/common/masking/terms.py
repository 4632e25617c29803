"""The terms of one masked sum: everything that all of its parties must have the same of, before any of them says a word.

Their digest (`ctx` in privacy papers) is in every signature, derived key and sealed share, so that a server that tells
different clients different things is found out by the first signature that fails.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cached_property
from typing import Any, Final

import numpy as np

from seqfed.common.errors import ConfigError, MaskingRefused

VERSION: Final = 1
GENERATOR: Final = "aes-256-ctr"  # what makes masks of keys (see prg)
WIDTHS: Final = {
    4: "u1",
    5: "u1",
    6: "u1",
    8: "u1",
    10: "u2",
    12: "u2",
    14: "u2",
    16: "u2",
    18: "u4",
    20: "u4",
    24: "u4",
    32: "u4",
}  # bits in an upload: type in memory
MAX_DIM: Final = 1 << 33
MAX_SCALARS: Final = 1 << 17
DIGEST_BYTES: Final = 32


def width(levels: int, n_max: int) -> int:
    """The fewest bits in which n_max clients' numbers from -levels to levels never wrap; raises ConfigError if there are none.

    >>> width(127, 10), width(7, 10)
    (12, 8)
    """
    for bits in WIDTHS:
        if n_max * levels < 1 << (bits - 1):
            return bits
    raise ConfigError(
        f"{n_max:,} clients with {levels} levels each are too many for a sum of {max(WIDTHS)} bits; have fewer"
    )


class Purpose(StrEnum):
    """What a masked sum is of."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    MEASURE = "measure"  # statistics of the data, before the first round


@dataclass(frozen=True)
class Terms:
    """The terms of one masked sum.

    Attributes:
        run: The run's identifier.
        round: The round that the sum belongs to.
        attempt: How often that round was begun anew.
        number: Counts all masked sums of the run; no two of them ever have the same.
        purpose: What is summed.
        dim: Numbers in the masked vector; 0 if there are only scalars.
        bits: b, of each number of the vector; sums are modulo 2^b.
        levels: L: every number of the vector is in -L..L.
        n_max: The most clients in the sum.
        min_survivors: The fewest clients in the sum.
        malicious: Whether it must hold against a server that lies, or only one that looks.
        drop: Share of the clients that may leave in the course of the sum.
        scalars: Numbers in the second vector, whose sums are modulo 2^64.
        codec: How the vector was made of an update.
        model: BLAKE3 of the model's bytes; empty for MEASURE, where there is none.
        settings: SHA-256 of the run's canonical JSON and statistics.
        step: What one stands for, where that follows the last sum: this one may then wrap, as seldom as the settings say. 0: it
            follows from the levels, and no sum wraps.
        known: What the last round's sum tells of how this one is made; empty where it tells nothing.
    """

    run: str
    round: int
    attempt: int
    number: int
    purpose: Purpose
    dim: int
    bits: int
    levels: int
    n_max: int
    min_survivors: int
    malicious: bool
    drop: float
    scalars: int
    codec: str
    model: bytes
    settings: bytes
    step: float = 0.0
    known: bytes = b""

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the terms' one JSON text."""
        content: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        content |= {"model": self.model.hex(), "settings": self.settings.hex()}
        content |= {"version": VERSION, "generator": GENERATOR}
        if not self.step:
            del content["step"]
        del content["known"]
        if self.known:
            content["known"] = hashlib.sha256(self.known).hexdigest()
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).digest()

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned type that holds a number of the vector, in this machine's byte order."""
        return np.dtype(WIDTHS[self.bits])

    def check(self) -> None:
        """Raise MaskingRefused if a sum of these terms could wrap, would hide nothing, or is beyond all measure."""
        if self.bits not in WIDTHS:
            raise MaskingRefused(f"a masked sum of {self.bits} bits; there are {', '.join(map(str, WIDTHS))}")
        for name, low, high in (
            ("round", 0, 1 << 62),
            ("attempt", 0, 1 << 62),
            ("number", 0, 1 << 62),
            ("dim", 0, MAX_DIM),
            ("scalars", 1, MAX_SCALARS),
            ("min_survivors", 2, self.n_max),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise MaskingRefused(f"a masked sum with {name} = {value}; it must be {low} to {high}")
        if self.step:
            if not 0 < self.step < math.inf or self.levels != (1 << (self.bits - 1)) - 1:
                raise MaskingRefused(
                    f"a tuned sum of {self.bits} bits with a step of {self.step} and {self.levels} levels; the step must be "
                    f"above 0, and the levels {(1 << (self.bits - 1)) - 1}"
                )
        elif self.dim and not 1 <= self.n_max * self.levels < 1 << (self.bits - 1):
            raise MaskingRefused(
                f"{self.n_max} clients with {self.levels} levels each do not fit a sum of {self.bits} bits: "
                f"their product must be 1 to {(1 << (self.bits - 1)) - 1}; use more bits or fewer clients"
            )
        if not 0 <= self.drop < 0.5:
            raise MaskingRefused(f"a masked sum that {self.drop:.0%} of the clients may leave; it must be under 50%")
        without_model = self.purpose is Purpose.MEASURE and not self.model
        for name, digest in (("model", self.model), ("settings", self.settings)):
            if len(digest) != DIGEST_BYTES and not (name == "model" and without_model):
                raise MaskingRefused(
                    f"the digest of the {name} of a masked sum has {len(digest)} bytes instead of {DIGEST_BYTES}"
                )
