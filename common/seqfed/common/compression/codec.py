"""What names a payload: the codec with its parameters, and whose it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from seqfed.common.errors import ConfigError
from seqfed.common.layout import Flat
from seqfed.common.seeds import derive

NAMES: Final = ("none", "rotq8", "rotq4", "eden1", "topk", "powersgd", "delta8", "delta4")  # a header has the index
GRIDS: Final = {"rotq8": 8, "rotq4": 4, "delta8": 8, "delta4": 4}  # bits of those that round to a grid
RESIDUAL: Final = frozenset({"topk", "powersgd", "delta8", "delta4"})  # what they leave out comes with the next one
MAX_RANK: Final = 1 << 10


@dataclass(frozen=True)
class Codec:
    """A codec's name, and the parameters of those that have any; raises ConfigError for what there is not.

    Attributes:
        name: One of NAMES.
        fraction: eden1: share of the rotated numbers that are sent; topk: of the largest numbers.
        bits: topk: of each number that is sent, 1 (its sign) or 8.
        rank: powersgd: of what stands for each matrix.
    """

    name: str
    fraction: float = 0.0
    bits: int = 0
    rank: int = 0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ConfigError(f"there is no codec '{self.name}'; use {', '.join(NAMES)}")
        fixed: dict[str, float] = {"bits": GRIDS.get(self.name, 1 if self.name == "eden1" else 0)}
        if self.name in {"eden1", "topk"}:
            fixed["fraction"] = 0.16 if self.name == "eden1" else 0.02
        if self.name == "topk":
            fixed["bits"] = 1
        if self.name == "powersgd":
            fixed |= {"bits": 8, "rank": 4}
        free = {"eden1": {"fraction"}, "topk": {"fraction", "bits"}, "powersgd": {"rank"}}.get(self.name, set[str]())
        for one in ("fraction", "bits", "rank"):
            value, default = getattr(self, one), fixed.get(one, 0)
            if not value:
                object.__setattr__(self, one, default)
            elif value != default and one not in free:
                raise ConfigError(f"codec '{self.name}' has no {one} to choose; leave it out")
        if not 0 <= self.fraction <= 1:  # NaN is not, either
            raise ConfigError(f"codec '{self.name}' with fraction = {self.fraction}; it must be above 0 and at most 1")
        if self.name == "topk" and self.bits not in {1, 8}:
            raise ConfigError(f"codec 'topk' with bits = {self.bits}; it must be 1 or 8")
        if not 0 <= self.rank <= MAX_RANK:
            raise ConfigError(f"codec 'powersgd' with rank = {self.rank}; it must be 1 to {MAX_RANK:,}")

    @property
    def feeds_back(self) -> bool:
        """Whether what it leaves out is to be kept and given to the next `encode`."""
        return self.name in RESIDUAL


@dataclass(frozen=True)
class Key:
    """Whose payload it is. `client` is empty for what goes to all clients."""

    seed: int
    run: str
    round: int
    client: str = ""

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the key's one JSON text."""
        text = json.dumps([self.seed, self.run, self.round, self.client], separators=(",", ":"))
        return hashlib.sha256(text.encode()).digest()

    def draw(self, *labels: int | str) -> int:
        """A seed for this purpose."""
        return derive(self.seed, self.run, self.round, self.client, *labels)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A payload and, of a codec with error feedback, what it left out: float32, as long as the vector."""

    payload: bytes
    residual: Flat | None = None
