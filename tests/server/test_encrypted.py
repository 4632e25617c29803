"""Ciphertexts at the server: what it adds, what it shows to whom, and what it takes at which step."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from tests.client.hurried import at_once, hurry
from tests.client.table import secure_spec
from tests.common.homomorphic.test_scheme import TERMS

from seqfed.common.errors import ConfigError, MaskingRefused, WrongRound
from seqfed.common.homomorphic import scheme
from seqfed.common.homomorphic.messages import CIPHERTEXT, MOST_PIECE, Encrypted, Opened, Ready
from seqfed.common.homomorphic.scheme import MODULUS, SLOTS, WORDS, Form, Words
from seqfed.common.masking import packing
from seqfed.common.masking.messages import Confirm
from seqfed.common.masking.server import Left, Step
from seqfed.server.encrypted import AT_ONCE, Ciphertexts
from seqfed.server.masked import AWAY_S, MaskedSum, Vector
from seqfed.server.round import MaskingEnded, Unmasked

LARGE = replace(TERMS, dim=11 * 2 * SLOTS)  # 12 ciphertexts: more than are added, or shown, at once
DIGEST = bytes(32)


def words(seed: int, count: int = 12) -> Words:
    return np.random.default_rng(seed).integers(0, MODULUS, (count, WORDS), np.uint64)


def kept(folder: Path, content: Words) -> Path:
    path = folder / blake3(content.tobytes()).hexdigest()
    path.write_bytes(content.astype("<u8").tobytes())
    return path


def begun(names: str = "abc") -> Ciphertexts:
    way = Ciphertexts(LARGE)
    ready = Ready(DIGEST, Form(LARGE).agreed)
    for name in names:
        way.greet(name, ready, {})
    way.begin(dict.fromkeys(names, ready))
    return way


def opening(way: Ciphertexts, folder: Path, names: str = "abc") -> Words:
    """The sum, of which everybody has given a part."""
    total = np.zeros((12, WORDS), np.uint64)
    for seed, name in enumerate(names):
        way.fold(kept(folder, words(seed)))
        way.on(way.event(name, Encrypted(DIGEST)))
        scheme.add(total, words(seed))
    return total


def test_openers_are_shown_the_sum_in_pieces_and_others_nothing(tmp_path: Path) -> None:
    way = begun()
    assert len(words(0)) > AT_ONCE > MOST_PIECE
    with pytest.raises(WrongRound, match="is not client 'a's to open, or not now"):
        way.fetch("a", 0)
    total = opening(way, tmp_path)
    for name in "ab":
        shown = b"".join(way.fetch(name, start).data for start in range(0, 12, MOST_PIECE))
        assert shown == total.tobytes()
    assert len(way.fetch("a", 11).data) == CIPHERTEXT
    for name in "cx":
        with pytest.raises(WrongRound, match=f"is not client '{name}'s to open"):
            way.fetch(name, 0)
    for start in (12, 1 << 31):
        with pytest.raises(MaskingRefused, match="which has 12"):
            way.fetch("a", start)
    way.on(Left("a", "gone"))
    assert way.fetch("c", 0).data == total[:MOST_PIECE].tobytes()


def test_what_is_no_ciphertext_changes_nothing(tmp_path: Path) -> None:
    way = begun()
    way.fold(kept(tmp_path, words(1)))
    before = way._total.copy()
    for place in ((0, 0), (11, WORDS - 1)):
        bad = words(2)
        bad[place] = MODULUS
        with pytest.raises(MaskingRefused, match="not below its modulus"):
            way.fold(kept(tmp_path, bad))
        assert np.array_equal(way._total, before)
    way.fold(kept(tmp_path, words(2)))
    way.fold(kept(tmp_path, words(2)), back=True)
    assert np.array_equal(way._total, before)


def test_each_step_takes_its_own_vectors(tmp_path: Path) -> None:
    way = begun()
    assert [way.due(name) for name in "ax"] == [Step.MASKING, None]
    assert way.vector_bytes(Step.MASKING) == 12 * CIPHERTEXT
    opening(way, tmp_path)
    assert [way.due(name) for name in "abc"] == [Step.OPENING, Step.OPENING, None]
    assert way.vector_bytes(Step.OPENING) == packing.packed_bytes(LARGE.dim, 16)
    without = Ciphertexts(replace(TERMS, dim=0, levels=0))
    ready = Ready(DIGEST, Form(without._terms).agreed)
    without.begin(dict.fromkeys("ab", ready))
    for name in "ab":
        without.on(without.event(name, Encrypted(DIGEST)))
    assert without.due("a") is None  # its scalars are in the message


def test_what_two_openers_say_is_the_sum(tmp_path: Path) -> None:
    way = begun()
    opening(way, tmp_path)
    sums = np.arange(LARGE.dim).astype(LARGE.dtype)
    path = tmp_path / "opened"
    path.write_bytes(packing.pack(sums, LARGE.bits))
    opened = Opened(np.array([5, -7, 3], "<i8").tobytes(), DIGEST)
    for name in "ba":
        way.on(way.event(name, opened))
    found = way.open({("a", Step.OPENING): Vector(path, DIGEST, 0.0), ("b", Step.OPENING): Vector(path, DIGEST, 0.0)})
    assert isinstance(found, tuple)
    assert np.array_equal(found[0], sums)
    assert found[1] == [5, -7, 3]


def test_who_has_another_key_is_told_so_even_if_it_has_begun_meanwhile() -> None:
    way = Ciphertexts(LARGE)
    agreed = Form(LARGE).agreed
    way.begin({"a": Ready(DIGEST, agreed), "b": Ready(DIGEST, agreed), "c": Ready(b"\1" * 32, agreed)})
    assert way.names == ("a", "b")
    with pytest.raises(ConfigError, match="client 'c' has another CKKS key"):
        way.refuse("c")
    way.refuse("d")  # it came too late


def test_messages_of_masked_sums_are_nothing_to_it() -> None:
    with pytest.raises(MaskingRefused, match="client 'a': a Confirm is nothing to an encrypted sum"):
        begun().event("a", Confirm(bytes(64)))


# Who opens it, and when --------------------------------------------------------------------------------------------------

STEP_S = 30.0
PLAIN = replace(TERMS, dim=0, levels=0, scalars=1)  # its scalars are in the messages
SPEC = secure_spec(homomorphic=True, mode="semi_honest", min_survivors=2, step_s=STEP_S)


@dataclass
class Sum:
    """One in which everybody's numbers are, on the running loop; those who are `gone` have no connection."""

    folder: Path
    names: str = "abcd"
    gone: set[str] = field(default_factory=set)
    told: list[Unmasked | MaskingEnded] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = asyncio.get_running_loop().time()
        self.way = Ciphertexts(PLAIN)
        self.it = MaskedSum(SPEC, PLAIN, self.way, lambda name: name not in self.gone, self.told.append, size=0)

    async def run(self) -> None:
        for name in self.names:
            self.it.advert(name, Ready(DIGEST, Form(PLAIN).agreed))
        self.it.begin(tuple(self.names))
        for seed, name in enumerate(self.names):
            self.it.received(name, Vector(kept(self.folder, words(seed, self.way._form.ciphertexts)), DIGEST, 0.0))
        self.calls = {name: asyncio.ensure_future(self.it.say(name, Encrypted(DIGEST))) for name in self.names}
        await asyncio.sleep(0.01)
        assert self.openers == ("a", "b")

    async def until(self, seconds: float) -> None:
        """So many from its beginning on."""
        await asyncio.sleep(self._began + seconds - asyncio.get_running_loop().time())

    @property
    def openers(self) -> tuple[str, ...]:
        """Whom it still has hope of."""
        assert self.way.state is not None
        return tuple(name for name in self.way.state.openers if name not in self.way.state.left)

    def close(self) -> None:
        self.it.close()
        for call in self.calls.values():
            call.cancel()


def test_an_opener_that_is_asked_late_has_a_whole_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def main() -> None:
        one = Sum(tmp_path)
        await one.run()
        await one.until(STEP_S - 1)
        one.it.leave("a", "gone")
        assert one.openers == ("b", "c")
        await one.until(STEP_S + 1)
        assert one.openers == ("c", "d")  # b has had its time, c has not
        await one.until(2 * STEP_S - 2)
        assert (one.openers, one.told) == (("c", "d"), [])
        await one.until(2 * STEP_S + 1)
        assert [type(event) for event in one.told] == [MaskingEnded]
        assert one.way.state is not None
        assert one.way.state.why.endswith(
            "no 2 clients are left to open it; missing: a (gone), b (no answer in time), c (no answer in time)"
        )
        one.close()

    monkeypatch.setattr(asyncio, "to_thread", at_once)
    hurry(main)


def test_an_opener_that_is_asked_late_and_is_not_there_is_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def main() -> None:
        one = Sum(tmp_path)
        await one.run()
        one.gone |= {"c"}
        one.it.away("c")  # it had said all that it was asked
        await one.until(1)
        one.it.leave("a", "gone")
        assert one.openers == ("b", "c")
        await one.until(1 + AWAY_S + 0.1)
        assert one.openers == ("b", "d")
        one.close()

    monkeypatch.setattr(asyncio, "to_thread", at_once)
    hurry(main)
