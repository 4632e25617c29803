"""Masks: the keystream of AES-256-CTR as unsigned integers, added to or subtracted from a vector in place.

A key is used for one vector only, so the counter starts at 0 and tells the place: number k of the mask is the bytes
k x size to (k + 1) x size of the keystream, little-endian. No mask is ever held whole: a piece of the vector stays in a core's
cache while the same piece of one mask after the other is made and added. Both lie at the beginning of a page, since additions
between two places that differ in their last twelve bits by a little take a fifth longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

KEY_BYTES: Final = 32
BLOCK: Final = 16  # bytes, AES's
PAGE: Final = 4096  # bytes
PIECE: Final = 192 << 10  # bytes of a vector at once; three times that must fit a core's second-level cache


def add_masks(out: NDArray[Any], plus: Sequence[bytes], minus: Sequence[bytes], start: int = 0) -> None:
    """out += the masks of `plus` - the masks of `minus`, modulo 2^(bits of out's type), in place.

    Args:
        out: Numbers start, start + 1, ... of the whole vector: unsigned, contiguous, one axis.
        plus: Keys of 32 bytes whose masks are added.
        minus: Keys whose masks are subtracted.
        start: Where in the whole vector `out` begins.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    if out.dtype.kind != "u" or out.ndim != 1 or not out.flags.c_contiguous:
        raise ValueError(f"masks are added to contiguous unsigned integers, not to {out.dtype} of shape {out.shape}")
    block, skipped = divmod(start * out.itemsize, BLOCK)
    counter = modes.CTR(block.to_bytes(BLOCK, "big"))
    streams = []
    for keys, add in ((plus, np.add), (minus, np.subtract)):
        for key in keys:
            if len(key) != KEY_BYTES:
                raise ValueError(f"a mask's key has {len(key)} bytes instead of {KEY_BYTES}")
            stream = Cipher(algorithms.AES256(key), counter).encryptor()
            stream.update(bytes(skipped))
            streams.append((stream.update_into, add))
    # pieces of about the same size, in whole blocks
    size = -(-out.nbytes // max(-(-out.nbytes // PIECE), 1) // BLOCK) * BLOCK
    zeros, made, sums = bytes(size), _page(size + BLOCK), _page(size).view(out.dtype)
    into, mask = made.data, made[:size].view(out.dtype.newbyteorder("<"))
    for first in range(0, len(out), max(len(sums), 1)):
        part = out[first : first + len(sums)]
        if len(part) < len(sums):
            zeros, mask, sums = zeros[: part.nbytes], mask[: len(part)], sums[: len(part)]
        # read from its place with the first mask, written there with the last
        before = part
        for left, (update_into, add) in zip(range(len(streams) - 1, -1, -1), streams, strict=True):
            update_into(zeros, into)
            add(before, mask, sums if left else part)
            before = sums


def threads(out: NDArray[Any], plus: Sequence[bytes], minus: Sequence[bytes], workers: int) -> None:
    """The same as `add_masks` from the vector's start, by so many threads with a range each."""
    # whole pieces each
    pieces = -(-out.nbytes // PIECE)
    step = -(-pieces // workers) * PIECE // out.itemsize
    if step >= len(out):
        add_masks(out, plus, minus)
        return
    starts = range(0, len(out), step)
    with ThreadPoolExecutor(workers) as pool:
        parts = [out[first : first + step] for first in starts]
        for _ in pool.map(add_masks, parts, repeat(plus), repeat(minus), starts):
            pass


def _page(size: int) -> NDArray[np.uint8]:
    """So many bytes from the beginning of a page."""
    memory = np.empty(size + PAGE, np.uint8)
    first = -memory.ctypes.data % PAGE
    return memory[first : first + size]
