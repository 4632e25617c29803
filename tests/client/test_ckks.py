"""The key that clients share: sums under it come out whole, and what is not under it is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tenseal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqfed.client import ckks, cli
from seqfed.client.ckks import PREFIX, Key, load_key, make_key
from seqfed.common.errors import ConfigError, MaskingRefused
from seqfed.common.homomorphic.messages import CIPHERTEXT
from seqfed.common.homomorphic.scheme import DEGREE, HOLD, MOST_CLIENTS, SCALE, SLOTS, Slots, add, words_of

TOP = 1 << (HOLD - 1)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("key") / "federation.key"
    make_key(found)
    return found


@pytest.fixture(scope="module")
def key(file: Path) -> Key:
    return load_key(file)


def slots_of(*values: int) -> Slots:
    found = np.zeros((1, SLOTS), np.int64)
    found[0, : len(values)] = values
    return found


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.lists(st.integers(-TOP // 5, TOP // 5), min_size=8, max_size=8), min_size=2, max_size=5))
def test_sums_of_ciphertexts_are_those_of_the_numbers(key: Key, given_: list[list[int]]) -> None:
    total = np.zeros((1, CIPHERTEXT // 8), np.uint64)
    for one in given_:
        add(total, words_of(key.encrypt(slots_of(*one))))
    assert np.array_equal(
        key.decrypt(total.tobytes()), slots_of(*(sum(column) for column in zip(*given_, strict=True)))
    )


def test_full_slots_come_out_at_both_ends_of_what_they_hold(key: Key) -> None:
    rng = np.random.default_rng(1)
    for slots in (np.full((2, SLOTS), TOP), np.full((2, SLOTS), -TOP), rng.integers(-TOP, TOP, (2, SLOTS))):
        assert np.array_equal(key.decrypt(key.encrypt(slots)), slots)


def test_the_noise_of_as_many_clients_as_there_may_be_rounds_to_nothing(key: Key) -> None:
    raw = [tenseal.ckks_vector(key._context, np.zeros(SLOTS)).decrypt() for _ in range(4)]
    deviation = float(np.std(raw))
    assert deviation == pytest.approx(3.2 * SLOTS**0.5 / SCALE, rel=0.1)
    assert 15 * deviation * MOST_CLIENTS**0.5 < ckks.CLOSE


def test_no_two_ciphertexts_are_alike(key: Key) -> None:
    one, other = (words_of(key.encrypt(slots_of(7))) for _ in range(2))
    assert not (one == other).any(axis=1).any() or (one == other).mean() < 0.01


# What is refused --------------------------------------------------------------------------------------------------------


def test_what_is_under_another_key_or_garbage_does_not_come_out_whole(key: Key, tmp_path: Path) -> None:
    good = key.encrypt(slots_of(1, 2, 3))
    with pytest.raises(MaskingRefused, match=r"no sum under this client's key \(Key\([0-9a-f]{16}\)\)"):
        make_key(tmp_path / "other.key").decrypt(good)
    words = words_of(good).copy()
    words[0, 17] ^= np.uint64(1 << 40)
    with pytest.raises(MaskingRefused, match="does not come out whole"):
        key.decrypt(words.tobytes())
    for cut in (good[:-8], good[1:], good + bytes(8)):
        with pytest.raises(MaskingRefused, match="are no ciphertexts"):
            key.decrypt(cut)
    with pytest.raises(MaskingRefused, match="not below its modulus"):
        key.decrypt(b"\xff" * CIPHERTEXT)
    with pytest.raises(MaskingRefused, match="hides nothing"):
        key.decrypt(good[: CIPHERTEXT // 2] + bytes(CIPHERTEXT // 2))


def test_the_file_is_its_owners_alone_and_made_once(file: Path) -> None:
    assert file.stat().st_mode & 0o777 == 0o600
    assert load_key(file).digest == load_key(file).digest
    with pytest.raises(ConfigError, match="is there already; a federation has one key"):
        make_key(file)


def no_key(content: bytes) -> bytes:
    return content.removeprefix(PREFIX)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def garbage(content: bytes) -> bytes:
    return PREFIX + np.random.default_rng(1).bytes(1000)


def without_secret(_: bytes) -> bytes:
    context = ckks._context()
    shown: bytes = context.serialize(save_secret_key=False, save_galois_keys=False, save_relin_keys=False)
    return PREFIX + shown


def of_another_scheme(_: bytes) -> bytes:
    symmetric = tenseal.ENCRYPTION_TYPE.SYMMETRIC
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, DEGREE, 0, [50, 50], symmetric, n_threads=1)
    other: bytes = context.serialize(save_secret_key=True, save_galois_keys=False, save_relin_keys=False)
    return PREFIX + other


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (no_key, "is no homomorphic key; copy the file of another client"),
        (cut, "is damaged"),
        (garbage, "is damaged"),
        (without_secret, "is damaged"),
        (of_another_scheme, "is damaged .it is of another scheme"),
    ],
)
def test_another_file_is_no_key(file: Path, tmp_path: Path, spoil: Callable[[bytes], bytes], why: str) -> None:
    other = tmp_path / "other.key"
    other.write_bytes(spoil(file.read_bytes()))
    other.chmod(0o600)
    with pytest.raises(ConfigError, match=why):
        load_key(other)


def test_others_may_not_read_it(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.key"
    other.write_bytes(file.read_bytes())
    other.chmod(0o640)
    with pytest.raises(ConfigError, match=r"may read or write it \(mode 640\); chmod 600"):
        load_key(other)
    with pytest.raises(ConfigError, match="No such file"):
        load_key(tmp_path / "none.key")


def test_without_tenseal_the_remedy_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenseal", None)
    for call in (load_key, make_key):
        with pytest.raises(ConfigError, match=r"needs TenSEAL at every client: pip install 'seqfed\[he\]'"):
            call(file)


def test_the_command_makes_the_key_and_shows_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "federation.key"
    cli.key(homomorphic=path)
    made = capsys.readouterr().out
    shown = load_key(path).digest.hex()[:16]
    assert made.startswith(f"{path}: the CKKS key {shown}, made now\n")
    assert "carry it to the other clients" in made
    assert "--homomorphic-key FILE" in made
    cli.key(homomorphic=path)
    assert capsys.readouterr().out == f"{path}: the CKKS key {shown}\n"
