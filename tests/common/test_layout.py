"""The waist: a layout and a flat vector are two ways to see the same numbers."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqfed.common.errors import LayoutMismatch
from seqfed.common.layout import Flat, Layout, Parameters, require_same

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
layouts = st.dictionaries(st.text(max_size=3), shapes, max_size=5).map(lambda found: Layout(tuple(found.items())))
SMALL = Layout((("w", (2, 3)), ("b", (2,))))


@given(layouts)
def test_flatten_and_views_are_inverses(layout: Layout) -> None:
    flat = np.arange(layout.size, dtype=np.float32)
    tensors = layout.views(flat)
    slow = [number for name, _ in layout.tensors for number in tensors[name].ravel().tolist()]
    assert slow == flat.tolist()
    assert {name: array.shape for name, array in tensors.items()} == dict(layout.tensors)
    backwards = dict(reversed(tensors.items()))
    assert layout.flatten(backwards).tobytes() == flat.tobytes()


@given(layouts)
def test_parts_tile_the_vector(layout: Layout) -> None:
    places = [place for _, _, part in layout.parts() for place in range(part.start, part.stop)]
    assert places == list(range(layout.size))
    assert layout.size == sum(math.prod(shape) for _, shape in layout.tensors)
    assert layout.nbytes == np.zeros(layout.size, np.float32).nbytes


def test_views_share_memory_with_the_vector() -> None:
    flat = np.zeros(8, np.float32)
    SMALL.views(flat)["b"][1] = 5
    assert flat[7] == 5


@given(layouts, layouts)
def test_digests_are_equal_exactly_if_the_layouts_are(one: Layout, other: Layout) -> None:
    assert (one.digest == other.digest) == (one.tensors == other.tensors)


def test_digest_is_the_one_that_files_and_peers_have() -> None:
    layout = Layout((("w", (2, 3)), ("b", (2,)), ("é", ())))
    assert layout.digest.hex() == "2235bedf4457cdd406d643b8d0d0dbe22542494e7c2cad9a39f4af194572a0be"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ((("w", (2, 3)),), "tensor 'b' (2,) is missing"),
        ((("w", (2, 3)), ("b", (2,)), ("c", (1,))), "tensor 'c' (1,) is not part"),
        ((("w", (3, 2)), ("b", (2,))), "tensor 'w' has shape (3, 2), the expected model has (2, 3)"),
        ((("b", (2,)), ("w", (2, 3))), "another order"),
    ],
)
def test_the_first_difference_is_named(found: tuple[tuple[str, tuple[int, ...]], ...], said: str) -> None:
    with pytest.raises(LayoutMismatch, match=re.escape(said)):
        require_same(SMALL, Layout(found))


def test_the_same_layout_passes() -> None:
    require_same(SMALL, Layout(SMALL.tensors))
    require_same(SMALL, Layout(SMALL.tensors[::-1]), ordered=False)


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(LayoutMismatch, match="twice"):
        Layout((("w", (1,)), ("w", (2,))))


@pytest.mark.parametrize("size", [0, 7, 9])
def test_views_refuse_a_vector_of_another_size(size: int) -> None:
    with pytest.raises(LayoutMismatch, match=f"a vector of {size} numbers came for a model of 8"):
        SMALL.views(np.zeros(size, np.float32))


@pytest.mark.parametrize("flat", [np.zeros(7, np.float32), np.zeros((8, 1), np.float32), np.zeros(8, np.float64)])
def test_parameters_refuse_another_shape_or_type(flat: Flat) -> None:
    with pytest.raises(LayoutMismatch, match="float32 model of 8 parameters"):
        Parameters(SMALL, flat)
