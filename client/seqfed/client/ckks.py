"""The CKKS key that a federation's clients share, and what they encrypt and decrypt with it: all of TenSEAL that there is.

The key is made once, by one client, in a file that the owners carry to each other; whoever has it, and the server's traffic,
reads everything. Ciphertexts travel as their bare words (see `scheme`), which are taken out of TenSEAL's envelope and put into it
again here: all about them is fixed, and an envelope that is not as expected is refused.

A decrypted number is rounded before it leaves this module. Not only for exactness: the noise in it would tell of
the key (Li and Micciancio 2021, "On the security of homomorphic encryption on approximate numbers").
"""

from __future__ import annotations

import hashlib
import importlib.util
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from seqfed.common import identity
from seqfed.common.errors import ConfigError, MaskingRefused
from seqfed.common.homomorphic.messages import CIPHERTEXT
from seqfed.common.homomorphic.scheme import DEGREE, PRIMES, SCALE, SLOTS, Slots, words_of

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX: Final = b"seqfed homomorphic key v1\n"
MOST_KEY: Final = 1 << 20  # bytes of a key's file; it has 131 kB
SEAL: Final = struct.Struct("<HBBBBHQ")  # magic, header's size, version (2), compression, reserved, size of all
MAGIC: Final = 0xA15E
PLAIN, ZSTD = 0, 2  # SEAL's names for how its bytes are compressed
ENVELOPE: Final = b"\x0a\x02\x80\x20\x12"  # TenSEAL's message: 4096 numbers, then a ciphertext, whose size comes next
SCALED: Final = b"\x19" + struct.pack("<d", SCALE)  # and its last field
CLOSE: Final = 0.25  # from a whole number; the noise in the sum over 1,000 clients has a deviation of 0.013
UNKNOWN: Final = "this TenSEAL makes ciphertexts in a form that is not known here; install tenseal 0.3.16 to 0.3.18"


def require_tenseal() -> None:
    """Raise ConfigError if it is not installed."""
    if importlib.util.find_spec("tenseal") is None:
        raise ConfigError("privacy.homomorphic needs TenSEAL at every client: pip install 'seqfed[he]'")


def make_key(path: Path) -> Key:
    """Make the key of a federation, in a file that only its owner can read.

    Raises ConfigError if there is a file already, or without TenSEAL; StorageError, StorageFull.
    """
    require_tenseal()
    context = _context()
    secret: bytes = context.serialize(
        save_public_key=False, save_secret_key=True, save_galois_keys=False, save_relin_keys=False
    )
    if path.exists():
        raise ConfigError(f"{path} is there already; a federation has one key, which all its clients share")
    identity.write_private(path, PREFIX + secret)
    return load_key(path)


def load_key(path: Path) -> Key:
    """The key in this file; raises ConfigError if there is none, if others may read it, or without TenSEAL."""
    require_tenseal()
    identity.read_private(path)  # raises unless it is only its owner's; it reads the beginning
    with path.open("rb") as file:
        data = file.read(MOST_KEY)
    if not data.startswith(PREFIX):
        raise ConfigError(
            f"{path} is no homomorphic key; copy the file of another client (seqfed client key --homomorphic)"
        )
    try:
        return Key(data)
    except (ValueError, RuntimeError, MaskingRefused) as error:
        raise ConfigError(f"{path} is damaged ({error}); copy the file of another client anew") from error


class Key:
    """The clients' one secret key. Raises ValueError or RuntimeError if the data are none, ConfigError for a TenSEAL that
    is not known. From any thread, one call at a time.

    Attributes:
        digest: SHA-256 of the key's file, by which all see that they have the same.
    """

    def __init__(self, data: bytes) -> None:
        import tenseal

        self.digest: Final = hashlib.sha256(data).digest()
        self._context = tenseal.context_from(data.removeprefix(PREFIX), n_threads=1)
        self._context.global_scale = SCALE
        if not self._context.has_secret_key():
            raise ValueError("it has no secret key")
        zeros = np.zeros(SLOTS)
        self._head, fresh = (
            self._opened(tenseal.ckks_vector(one, zeros).serialize())[0] for one in (self._context, _context())
        )
        if self._head != fresh:
            raise ValueError("it is of another scheme")
        test = np.arange(-SLOTS // 2, SLOTS // 2)[None]
        if not np.array_equal(self.decrypt(self.encrypt(test)), test):
            raise ConfigError(UNKNOWN)

    def __repr__(self) -> str:
        return f"Key({self.digest.hex()[:16]})"

    def encrypt(self, slots: Slots) -> bytes:
        """The ciphertexts of these whole numbers, (ciphertexts, SLOTS); each call draws fresh randomness from the system."""
        return b"".join(self._encrypted(slots))

    def _encrypted(self, slots: Slots) -> Iterator[bytes]:
        import tenseal

        for one in slots:
            head, words = self._opened(tenseal.ckks_vector(self._context, one.astype(np.float64)).serialize())
            if head != self._head:
                raise ConfigError(UNKNOWN)
            words_of(words)
            yield words

    def decrypt(self, data: bytes) -> Slots:
        """The whole numbers in these ciphertexts, (ciphertexts, SLOTS).

        Raises MaskingRefused for what is no ciphertext, or not under this key.
        """
        import tenseal

        words = words_of(data)
        found = np.empty((len(words), SLOTS), np.int64)
        for room, one in zip(found, words, strict=True):
            if not one[DEGREE:].any():  # SEAL refuses it: it would hide nothing
                raise MaskingRefused("a ciphertext that hides nothing came to be decrypted")
            numbers = np.array(tenseal.ckks_vector_from(self._context, self._closed(one.tobytes())).decrypt())
            whole = np.rint(numbers)
            if len(numbers) != SLOTS or not np.abs(numbers - whole).max() < CLOSE:
                raise MaskingRefused(
                    f"what came to be decrypted does not come out whole: it is no sum under this client's key ({self!r})"
                )
            room[:] = whole
        return found

    @staticmethod
    def _opened(vector: bytes) -> tuple[bytes, bytes]:
        """Of a vector as TenSEAL writes it: what stands before the words, uncompressed, and the words."""
        size, start = _varint(vector, len(ENVELOPE))
        seal = vector[start : start + size]
        if not vector.startswith(ENVELOPE) or len(seal) != size or vector[start + size :] != SCALED:
            raise ConfigError(UNKNOWN)
        magic, header, *version, compression, _, whole = SEAL.unpack_from(seal)
        if magic != MAGIC or header != SEAL.size or whole != len(seal) or compression not in {PLAIN, ZSTD}:
            raise ConfigError(UNKNOWN)
        raw = seal[SEAL.size :] if compression == PLAIN else _expanded(seal[SEAL.size :])
        if len(raw) <= CIPHERTEXT:
            raise ConfigError(UNKNOWN)
        return bytes(version) + raw[:-CIPHERTEXT], raw[-CIPHERTEXT:]

    def _closed(self, words: bytes) -> bytes:
        """The inverse, with nothing compressed."""
        version, head = self._head[:2], self._head[2:]
        size = SEAL.size + len(head) + len(words)
        return b"".join(
            (ENVELOPE, _as_varint(size), SEAL.pack(MAGIC, SEAL.size, *version, PLAIN, 0, size), head, words, SCALED)
        )


def _context() -> Any:
    """A new key and its scheme."""
    import tenseal

    symmetric = tenseal.ENCRYPTION_TYPE.SYMMETRIC
    found = tenseal.context(tenseal.SCHEME_TYPE.CKKS, DEGREE, 0, list(PRIMES), symmetric, n_threads=1)
    found.global_scale = SCALE
    return found


def _expanded(data: bytes) -> bytes:
    import pyarrow

    with pyarrow.input_stream(pyarrow.BufferReader(data), compression="zstd") as stream:
        return bytes(stream.read(2 * CIPHERTEXT))


def _varint(data: bytes, start: int) -> tuple[int, int]:
    """A number as protobuf writes it, and where it ends."""
    value = shift = 0
    for place in range(start, min(start + 5, len(data))):
        value |= (data[place] & 127) << shift
        shift += 7
        if data[place] < 128:
            return value, place + 1
    raise ConfigError(UNKNOWN)


def _as_varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes((*found, value))
