"""The arithmetic of encrypted sums: what stands in the slots, so that sums are exact, and how ciphertexts are added.

A ciphertext is two polynomials of DEGREE coefficients modulo one prime, as SEAL has them in NTT form: sums are taken word by
word. It holds SLOTS numbers with noise, of a deviation of 3.2 sqrt(SLOTS) / SCALE = 2^-11 in each, and 2^-6 in the sum over
1,000 clients: rounding would be wrong at 40 deviations, so it never is. What stands in the slots are whole numbers, and their
sums come out exactly. All of this is fixed; 128 bits of security allow a modulus of 218 bits for this DEGREE, which is of 120
here (Albrecht et al. 2018, "Homomorphic encryption security standard").

Of whole numbers of `bits` bits, signed, a slot holds as many as fit HOLD bits: each has the room for the sum over n_max
clients, whatever they are, so that none runs into its neighbour.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from seqfed.common.errors import ConfigError, MaskingRefused
from seqfed.common.homomorphic.messages import CIPHERTEXT
from seqfed.common.masking.agreed import grid_of

if TYPE_CHECKING:
    from seqfed.common.masking.terms import Terms
    from seqfed.common.spec import RunSpec

CODEC: Final = "ckks-1"  # of all that is fixed here
DEGREE: Final = 8192
SLOTS: Final = DEGREE // 2
PRIMES: Final = (60, 60)  # bits of the ciphertexts' modulus, and of SEAL's special prime, which stands in none
MODULUS: Final = (
    0xFFFFFFFFFFE8001  # the second largest prime of 60 bits that is 1 modulo 2 DEGREE: SEAL keeps the largest
)
SCALE: Final = 2.0**19  # so that |slot| < 2^39 stays below MODULUS / 2
HOLD: Final = 40  # bits of a slot's whole number, with its sign
MOST_CLIENTS: Final = 1_000
MANY: Final = 100_000  # clients, of which masks bear as many as anybody has
MOST_NUMBERS: Final = 2_000_000  # in an update: 64 MB of ciphertexts
WORDS: Final = CIPHERTEXT // 8
LIMB: Final = 16  # bits of a part of a scalar
LIMBS: Final = 4  # in a scalar modulo 2^64
MARKS: Final = 4  # slots before all others: 1, and 48 bits of what was agreed on
CONSTANTS: Final = {
    "codec": CODEC,
    "degree": DEGREE,
    "primes": PRIMES,
    "modulus": MODULUS,
    "scale": SCALE,
    "hold": HOLD,
    "limb": LIMB,
}
Words = NDArray[np.uint64]  # (ciphertexts, WORDS), each below MODULUS
Slots = NDArray[np.int64]


def check(spec: RunSpec, size: int) -> None:
    """Raise ConfigError if the run's updates, of `size` numbers each, are more than encrypted sums are for."""
    if size > MOST_NUMBERS:
        raise ConfigError(
            f"privacy.homomorphic is for models of {MOST_NUMBERS:,} numbers at most, and this one has {size:,}; drop it: masks "
            "are for models of any size"
        )
    most = spec.cohort.required
    fits(grid_of(spec, most)[0], most)


def most_clients(spec: RunSpec, *, trained: bool) -> int:
    """The most clients that a masked or encrypted sum of this run can be of, MANY at most.

    trained: of updates; otherwise of scores or statistics.
    """
    return _most_clients(spec.canonical, trained)


@lru_cache(maxsize=64)
def _most_clients(canonical: bytes, trained: bool) -> int:
    from seqfed.common.spec import RunSpec

    spec, low, high = RunSpec.model_validate_json(canonical), 1, MANY

    def bears(clients: int) -> bool:
        try:
            bits = grid_of(spec, clients)[0] if trained else LIMB + 1
            return not spec.privacy.homomorphic or fits(bits, clients) > 0
        except ConfigError:
            return False

    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if bears(middle) else (low, middle - 1)
    return low


def fits(bits: int, clients: int) -> int:
    """How many numbers of so many bits a slot holds; raises ConfigError if the sum of so many clients fits none."""
    if clients > MOST_CLIENTS or not (found := HOLD // _width(bits, clients)):
        most = min(MOST_CLIENTS, 1 << (HOLD - bits))
        raise ConfigError(
            f"privacy.homomorphic with privacy.b = {bits} is for {most:,} clients in a sum at most, and there may be "
            f"{clients:,}; have fewer (cohort.min_clients, count, over_select), or use masks"
        )
    return found


def nbytes_of(dim: int, bits: int, scalars: int, n_max: int) -> int:
    """Bytes of one client's ciphertexts in a sum of so many clients; raises ConfigError as `fits` does."""
    return CIPHERTEXT * -(-(MARKS + sum(_parts(dim, bits, scalars, n_max))) // SLOTS)


def _parts(dim: int, bits: int, scalars: int, n_max: int) -> tuple[int, int]:
    """Slots of the scalars, and of the vector."""
    return -(-LIMBS * scalars // fits(LIMB + 1, n_max)), -(-dim // fits(bits, n_max))


@dataclass(frozen=True)
class Form:
    """What stands where in the slots of one sum's ciphertexts."""

    terms: Terms

    @cached_property
    def agreed(self) -> bytes:
        """SHA-256 of the terms and of all that is fixed here: every party says it before anything is encrypted."""
        fixed = json.dumps(CONSTANTS, sort_keys=True, separators=(",", ":")).encode()
        return hashlib.sha256(b"seqfed homomorphic sum\0" + fixed + self.terms.digest).digest()

    @cached_property
    def nbytes(self) -> int:
        """Of one client's ciphertexts, or of the sum's."""
        terms = self.terms
        return nbytes_of(terms.dim, terms.bits, terms.scalars, terms.n_max)

    @property
    def ciphertexts(self) -> int:
        return self.nbytes // CIPHERTEXT

    @property
    def _marks(self) -> Slots:
        return np.array([1, *np.frombuffer(self.agreed[: 2 * (MARKS - 1)], "<u2")], np.int64)

    def fill(self, vector: NDArray[np.unsignedinteger[Any]] | None, scalars: Sequence[int]) -> Slots:
        """The slots, (ciphertexts, SLOTS), of one client's vector of residues modulo 2^bits and of its scalars.

        Raises MaskingRefused unless they are as many as the terms say, and the scalars small enough for n_max of them.
        """
        terms = self.terms
        most = ((1 << 63) - 1) // terms.n_max
        if (0 if vector is None else len(vector)) != terms.dim or len(scalars) != terms.scalars:
            raise MaskingRefused(f"an encrypted sum is of {terms.dim:,} numbers and {terms.scalars:,} scalars")
        if not all(-most <= value <= most for value in scalars):
            raise MaskingRefused(f"a scalar is beyond {most}: the sum of {terms.n_max} clients' could wrap")
        limbs = np.array([value % (1 << 64) for value in scalars], "<u8").view("<u2").astype(np.int64)
        parts = [self._marks, _packed(limbs, LIMB + 1, terms.n_max)]
        if vector is not None:
            half = np.int64(1) << (terms.bits - 1)
            signed = ((vector.astype(np.int64) + half) & (2 * half - 1)) - half
            parts.append(_packed(signed, terms.bits, terms.n_max))
        room = np.zeros(self.ciphertexts * SLOTS, np.int64)
        np.concatenate(parts, out=room[: sum(map(len, parts))])
        return room.reshape(-1, SLOTS)

    def read(self, slots: Slots, clients: int) -> tuple[NDArray[np.unsignedinteger[Any]], tuple[int, ...]]:
        """The inverse, of the sum of so many clients' slots: the vectors' sum modulo 2^bits, and the scalars'.

        Raises MaskingRefused if the slots are not the sum of so many clients' under the same terms.
        """
        terms, flat = self.terms, slots.reshape(-1)
        of_scalars, of_vector = _parts(terms.dim, terms.bits, terms.scalars, terms.n_max)
        marks, rest = flat[:MARKS], flat[MARKS:]
        if marks.tolist() != (clients * self._marks).tolist():
            raise MaskingRefused(
                f"what came to be decrypted is not the sum of {clients} clients' numbers for masked sum {terms.number}"
            )
        limbs = _unpacked(rest[:of_scalars], LIMBS * terms.scalars, LIMB + 1, terms.n_max)
        vector = _unpacked(rest[of_scalars : of_scalars + of_vector], terms.dim, terms.bits, terms.n_max)
        if rest[of_scalars + of_vector :].any():
            raise MaskingRefused("the slots after the last number of an encrypted sum are not 0")
        totals = []
        for one in limbs.reshape(-1, LIMBS).tolist():
            total = sum(limb << (LIMB * place) for place, limb in enumerate(one)) % (1 << 64)
            totals.append(total - (1 << 64) * (total >> 63))
        return (vector & ((1 << terms.bits) - 1)).astype(terms.dtype), tuple(totals)


def _width(bits: int, clients: int) -> int:
    """Bits of the sum of so many clients' signed numbers of `bits` bits."""
    return bits + (clients - 1).bit_length()


def _packed(numbers: Slots, bits: int, clients: int) -> Slots:
    count, width = fits(bits, clients), _width(bits, clients)
    columns = np.zeros((-(-len(numbers) // count), count), np.int64)
    columns.reshape(-1)[: len(numbers)] = numbers
    found: Slots = (columns << (width * np.arange(count))).sum(axis=1)
    return found


def _unpacked(slots: Slots, count: int, bits: int, clients: int) -> Slots:
    each, width = fits(bits, clients), _width(bits, clients)
    half, rest = 1 << (width - 1), slots.copy()
    columns = np.empty((len(slots), each), np.int64)
    for place in range(each):
        columns[:, place] = ((rest + half) & (2 * half - 1)) - half
        rest = (rest - columns[:, place]) >> width
    flat = columns.reshape(-1)
    if rest.any() or flat[count:].any():
        raise MaskingRefused("a slot of an encrypted sum holds more than clients can have put there")
    return flat[:count]


# Ciphertexts ----------------------------------------------------------------------------------------------------------


def words_of(data: bytes | memoryview) -> Words:
    """The ciphertexts in these bytes; raises MaskingRefused if they are none."""
    if len(data) % CIPHERTEXT:
        raise MaskingRefused(f"{len(data):,} bytes are no ciphertexts of {CIPHERTEXT:,} bytes each")
    words = np.frombuffer(data, "<u8").reshape(-1, WORDS)
    if words.size and int(words.max()) >= MODULUS:
        raise MaskingRefused("a ciphertext has a word that is not below its modulus")
    return words


def add(total: Words, words: Words) -> None:
    """Add ciphertexts to those of a sum, in place."""
    total += words  # below 2^61
    _wrap(total)


def subtract(total: Words, words: Words) -> None:
    """Take away again what was added."""
    total += np.uint64(MODULUS) - words
    _wrap(total)


def _wrap(total: Words) -> None:
    np.subtract(total, np.uint64(MODULUS), out=total, where=total >= MODULUS)
