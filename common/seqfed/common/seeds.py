"""Every random draw's origin: a generator derived from (run seed, labels), so that nothing depends on who drew before.

Labels are typically (round, client, purpose). Derivation is SHA-256 over a canonical JSON list, so that no two different
lists of labels can collide by concatenation. Not for secrets: whoever knows the run's seed knows every draw.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np


def derive(seed: int, *labels: int | str) -> int:
    """An integer in [0, 2^63) that depends on the seed and every label, and on their types.

    >>> derive(1, "a", 2) == derive(1, "a", 2), derive(1, "a", 2) == derive(1, "a", "2")
    (True, False)
    """
    text = json.dumps([seed, *labels], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *labels: int | str) -> np.random.Generator:
    """A numpy generator (Philox, whose stream is fixed across numpy versions) for these labels."""
    return np.random.Generator(np.random.Philox(key=derive(seed, *labels)))
