"""Masks made and added (`seqfed.common.masking.prg`) beside a bare loop of AES-256-CTR over as many bytes, in GB/s.

`python -m benchmarks.prg [--json]`. One thread, in turns, each time with ciphers from scratch; of each the quickest turn by
processor time, since whatever else the machine does can only make one slower. Fields: `expand_add_gb_s`, `bare_gb_s` (10^9 bytes
of masks a second), `ratio` (the first by the second; the bar is 0.8), `piece_bytes` at once in both.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from benchmarks.harness import machine, tell
from seqfed.common.masking.prg import BLOCK, PIECE, add_masks


def bare(keys: list[bytes], size: int) -> None:
    """As many bytes of keystream for each key, all to the same place."""
    streams = [Cipher(algorithms.AES256(key), modes.CTR(bytes(BLOCK))).encryptor() for key in keys]
    zeros, made = bytes(PIECE), bytearray(PIECE + BLOCK)
    for first in range(0, size, PIECE):
        some = zeros[: size - first]
        for stream in streams:
            stream.update_into(some, made)


def measure(neighbours: int, numbers: int, bits: int, turns: int) -> dict[str, Any]:
    """Both over the masks of so many neighbours and a vector of so many numbers of so many bits."""
    keys = [os.urandom(32) for _ in range(neighbours)]
    vector = np.zeros(numbers, f"u{bits // 8}")
    half = neighbours // 2

    def seconds(work: Callable[[], None]) -> float:
        begun = time.thread_time()
        work()
        return time.thread_time() - begun

    taken = [
        (seconds(lambda: add_masks(vector, keys[:half], keys[half:])), seconds(lambda: bare(keys, vector.nbytes)))
        for _ in range(turns)
    ]
    ours, theirs = (neighbours * vector.nbytes / 1e9 / min(times) for times in zip(*taken, strict=True))
    return {
        "benchmark": "prg",
        "neighbours": neighbours,
        "numbers": numbers,
        "bits": bits,
        "turns": turns,
        "piece_bytes": PIECE,
        "expand_add_gb_s": round(ours, 2),
        "bare_gb_s": round(theirs, 2),
        "ratio": round(ours / theirs, 3),
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--neighbours", type=int, default=99, help="masks; 99 are a complete graph's of 100 clients")
    parser.add_argument("--numbers", type=int, default=1_000_000)
    parser.add_argument("--bits", type=int, choices=(8, 16, 32), default=16)
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    given = parser.parse_args()
    tell(measure(given.neighbours, given.numbers, given.bits, given.turns), given.json)


if __name__ == "__main__":
    main()
