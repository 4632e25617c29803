"""A client's half of an encrypted sum: what it refuses to be in, and to open."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from tests.client.table import party, secure_spec, secure_task
from tests.common.homomorphic.test_scheme import TERMS

from seqfed.client.ckks import Key, make_key
from seqfed.client.encrypted import Half
from seqfed.client.masking import Masking
from seqfed.common.errors import ConfigError, MaskingRefused
from seqfed.common.homomorphic import scheme
from seqfed.common.homomorphic.messages import CIPHERTEXT, Piece
from seqfed.common.homomorphic.scheme import WORDS, Form
from seqfed.common.masking import packing


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return make_key(tmp_path_factory.mktemp("key") / "federation.key")


def half(key: Key, name: str = "a", floor: int = 2, noted: list[tuple[str, int]] | None = None) -> Half:
    def begin(run: str, number: int) -> None:
        if noted is not None:
            noted.append((run, number))

    found = Half(TERMS, name, key, floor, begin)
    found.join(("a", "b", "c"))
    return found


def vector(seed: int) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    return np.random.default_rng(seed).integers(0, 1 << 16, 10).astype(np.uint16)


def summed(key: Key, *seeds: int) -> Piece:
    total = np.zeros((1, WORDS), np.uint64)
    for seed in seeds:
        scheme.add(total, scheme.words_of(half(key).encrypt(vector(seed), [seed, -seed, 1])))
    return Piece(total.tobytes())


def test_what_it_opens_is_the_sum(key: Key) -> None:
    noted: list[tuple[str, int]] = []
    one = half(key, noted=noted)
    assert noted == [("r1", 7)]
    assert (one.ready().key, one.ready().agreed) == (key.digest, Form(TERMS).agreed)
    one.check_members(frozenset("abc"))
    one.decrypt(summed(key, 1, 2, 3))
    assert one.next is None
    packed, opened = one.open()
    expected = vector(1) + vector(2) + vector(3)  # modulo 2^16
    assert packing.unpack(packed, 16, 10, TERMS.dtype).tolist() == expected.tolist()
    assert np.frombuffer(opened.scalars, "<i8").tolist() == [6, -6, 3]
    assert opened.digest == blake3(packed).digest()


@pytest.mark.parametrize("names", ["bc", "a", "", "abcde"])
def test_it_is_in_no_circle_without_itself_or_below_its_floor(key: Key, names: str) -> None:
    noted: list[tuple[str, int]] = []
    one = Half(TERMS, "a", key, 2, lambda run, number: noted.append((run, number)))
    with pytest.raises(MaskingRefused, match="it must be this one and others, 2 to 4 in all"):
        one.join(tuple(names))
    assert not noted


@pytest.mark.parametrize("members", ["bc", "ab", "abd"])
def test_it_opens_no_sum_of_too_few_or_of_others(key: Key, members: str) -> None:
    with pytest.raises(MaskingRefused, match="others of the 3, 3 or more in all"):
        half(key, floor=3).check_members(frozenset(members))


def test_a_number_that_it_was_in_is_not_taken_twice(key: Key, tmp_path: Path) -> None:
    log = party("a", tmp_path).log
    for number, fits in ((7, True), (7, False), (6, False), (8, True)):
        one = Half(replace(TERMS, number=number), "a", key, 2, log.begin)
        if fits:
            one.join(("a", "b"))
            continue
        with pytest.raises(MaskingRefused, match="and takes none twice"):
            one.join(("a", "b"))


def test_it_opens_what_it_was_told_and_nothing_else(key: Key) -> None:
    for seeds in ((1,), (1, 2), (1, 2, 3, 3)):
        one = half(key)
        one.check_members(frozenset("abc"))
        one.decrypt(summed(key, *seeds))
        with pytest.raises(MaskingRefused, match="is not the sum of 3 clients' numbers for masked sum 7"):
            one.open()
    stale = half(key)
    stale.check_members(frozenset("ab"))
    other = Half(replace(TERMS, number=6), "a", key, 2, lambda *_: None)
    stale.decrypt(Piece(_twice(other.encrypt(vector(1), [0, 0, 0]))))
    with pytest.raises(MaskingRefused, match="is not the sum of 2"):
        stale.open()


def _twice(data: bytes) -> bytes:
    total = scheme.words_of(data).copy()
    scheme.add(total, scheme.words_of(data))
    return total.tobytes()


def test_a_client_is_in_no_sum_of_a_model_that_is_too_large(key: Key, tmp_path: Path) -> None:
    path = tmp_path / "federation.key"
    make_key(path)
    own = party("a", tmp_path)
    spec = secure_spec(homomorphic=True, mode="semi_honest")
    large = spec.model_copy(update={"model": spec.model.model_copy(update={"hidden": 1000})})
    with_key = Masking("a", own._signer, own._trust, own.log, None, None, path)
    with_key.require(spec)
    with pytest.raises(ConfigError, match="is for models of 2,000,000 numbers at most"):
        with_key.require(large)


@pytest.mark.parametrize("data", [b"", bytes(CIPHERTEXT - 8), bytes(2 * CIPHERTEXT)], ids=len)
def test_pieces_of_another_size_are_refused_before_they_are_read(key: Key, data: bytes) -> None:
    with pytest.raises(MaskingRefused, match="bytes of ciphertexts, where it has 1 in all"):
        half(key).decrypt(Piece(data))


def test_a_client_without_a_key_says_so_before_it_trains(key: Key, tmp_path: Path) -> None:
    spec = secure_spec(homomorphic=True, mode="semi_honest")
    own = party("a", tmp_path)
    why = r"client 'a' has no CKKS key.*one client makes it \(seqfed client key --homomorphic FILE\), all get a copy"
    with pytest.raises(ConfigError, match=why):
        own.require(spec)
    own.require(secure_spec(mode="semi_honest"))


def test_a_policys_floor_holds_here_too(key: Key, tmp_path: Path) -> None:
    path = tmp_path / "federation.key"
    make_key(path)
    own = party("a", tmp_path)
    spec = secure_spec(homomorphic=True, mode="semi_honest", min_survivors=2)
    for least, fits in ((None, True), (4, False)):
        floored = Masking("a", own._signer, own._trust, own.log, None, least, path)
        task = secure_task(spec, number=1 + (least or 0))
        one = floored.encrypting(spec, replace(TERMS, number=task.masking.number if task.masking else 0))
        if fits:
            one.join(("a", "b", "c"))
            continue
        with pytest.raises(MaskingRefused, match="3 clients; it must be this one and others, 4 to 4 in all"):
            one.join(("a", "b", "c"))
