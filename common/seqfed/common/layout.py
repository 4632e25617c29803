"""The narrow waist: a model is a layout (ordered names and shapes) and one flat float32 vector.

Everything between the two torch models (delta, sum, mask, compression, files) is a function over such vectors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from seqfed.common.errors import LayoutMismatch

Flat = NDArray[np.float32]
BYTES_PER_PARAMETER: Final = 4  # float32, little-endian, everywhere outside torch


@dataclass(frozen=True)
class Layout:
    """The tensors of a model in their order.

    >>> layout = Layout((("w", (2, 3)), ("b", (2,))))
    >>> layout.size, [(name, part) for name, _, part in layout.parts()]
    (8, [('w', slice(0, 6, None)), ('b', slice(6, 8, None))])
    """

    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.tensors]
        if len(set(names)) != len(names):
            raise LayoutMismatch(f"a layout has a tensor name twice: {sorted(names)}")

    def parts(self) -> Iterator[tuple[str, tuple[int, ...], slice]]:
        """Each tensor's name, shape and place in the flat vector."""
        start = 0
        for name, shape in self.tensors:
            stop = start + math.prod(shape)
            yield name, shape, slice(start, stop)
            start = stop

    @cached_property
    def size(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for _, shape in self.tensors)

    @property
    def nbytes(self) -> int:
        """Size of the flat vector, in bytes."""
        return BYTES_PER_PARAMETER * self.size

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the layout's canonical JSON: equal digests, equal layouts."""
        text = json.dumps(self.tensors, separators=(",", ":"))
        return hashlib.sha256(text.encode()).digest()

    def flatten(self, arrays: Mapping[str, NDArray[np.float32]], out: Flat | None = None) -> Flat:
        """The flat vector of these arrays, in `out` if given; raises LayoutMismatch naming the first that does not fit."""
        require_same(self, Layout(tuple((name, tuple(array.shape)) for name, array in arrays.items())), ordered=False)
        flat = np.empty(self.size, np.float32) if out is None else out
        for name, _, part in self.parts():
            flat[part] = arrays[name].reshape(-1)
        return flat

    def views(self, flat: Flat) -> dict[str, NDArray[np.float32]]:
        """The tensors as views into `flat` (shape (size,)); raises LayoutMismatch if its size is another."""
        if flat.shape != (self.size,):
            raise LayoutMismatch(f"a vector of {flat.size:,} numbers came for a model of {self.size:,} parameters")
        return {name: flat[part].reshape(shape) for name, shape, part in self.parts()}


@dataclass(frozen=True, eq=False)
class Parameters:
    """A model's or an update's numbers: `flat` has shape (layout.size,), float32."""

    layout: Layout
    flat: Flat

    def __post_init__(self) -> None:
        if self.flat.shape != (self.layout.size,) or self.flat.dtype != np.float32:
            raise LayoutMismatch(
                f"a {self.flat.dtype} vector of shape {self.flat.shape} came for a float32 model of "
                f"{self.layout.size:,} parameters"
            )


def require_same(expected: Layout, found: Layout, ordered: bool = True) -> None:
    """Raise LayoutMismatch naming the first difference between two layouts, if there is one."""
    want, have = dict(expected.tensors), dict(found.tensors)
    for name in _missing(want, have):
        raise LayoutMismatch(f"tensor '{name}' {want[name]} is missing; is this another model?")
    for name in _missing(have, want):
        raise LayoutMismatch(f"tensor '{name}' {have[name]} is not part of the expected model")
    for name, shape in want.items():
        if have[name] != shape:
            raise LayoutMismatch(f"tensor '{name}' has shape {have[name]}, the expected model has {shape}")
    if ordered and expected.tensors != found.tensors:
        raise LayoutMismatch("the tensors stand in another order than in the expected model")


def _missing(names: Iterable[str], among: Mapping[str, object]) -> Iterator[str]:
    return (name for name in names if name not in among)
