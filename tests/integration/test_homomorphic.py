"""Encrypted sums over real gRPC: the very bits of masked ones, and each party refusing what it must."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from blake3 import blake3
from tests.integration.maskers import Masker, examples_of, replayed, score_of, session_of, spec_of, undisturbed
from tests.integration.tapping import files_of, tapped
from tests.integration.test_masking import Seen, a_plain_server, seen_through
from tests.integration.test_tls import running

from seqfed.client.admin import operating
from seqfed.client.ckks import load_key, make_key
from seqfed.client.connection import Connection
from seqfed.client.encrypted import Half
from seqfed.client.masking import masking_of
from seqfed.client.policy import Policy, Spent, refusals
from seqfed.common import metrics
from seqfed.common.errors import ServerUnavailable
from seqfed.common.homomorphic import messages, scheme
from seqfed.common.spec import RunSpec
from seqfed.common.wire_masking import Reply

T = TypeVar("T")

CLIENTS = ("a", "b", "c", "d")
PATIENCE = 60.0


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for who is gone."""
    monkeypatch.setattr("seqfed.client.session.LONGEST_WAIT", 0.2)
    monkeypatch.setattr("seqfed.server.masked.AWAY_S", 0.2)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("key") / "federation.key"
    make_key(found)
    return found


async def soon(work: Awaitable[T]) -> T:
    return await asyncio.wait_for(work, PATIENCE)


def encrypted(clients: int = 4, **changes: Any) -> RunSpec:
    privacy = {"homomorphic": True, "mode": "semi_honest", **changes.pop("privacy", {})}
    return spec_of(clients, privacy=privacy, **changes)


@contextlib.asynccontextmanager
async def taking_part(
    folder: Path,
    address: str,
    key: Path | None,
    others: Mapping[str, Path | None] | None = None,
    names: Iterable[str] = CLIENTS,
) -> AsyncIterator[dict[str, Masker]]:
    """Clients with this key, but for those with others."""
    maskers = {name: Masker(name) for name in names}
    keys = {name: (others or {}).get(name, key) for name in names}
    sessions = [
        session_of(one, address, masking_of(name, folder / name, None, None, shared=keys[name]))
        for name, one in maskers.items()
    ]
    async with running(*sessions):
        yield maskers


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"normalise": "federated"}},
        {"privacy": {"b": 12}, "rounds": 1},
        {"compression": {"upload": "rotsub", "fraction": 0.3}, "model": {"hidden": 64}, "rounds": 1},
        {"compression": {"upload": "powersgd", "rank": 2}, "model": {"hidden": 32}, "rounds": 3},
    ],
    ids=["16 bits", "12 bits", "rotsub", "powersgd"],
)
async def test_the_model_is_that_of_masks_to_the_bit(tmp_path: Path, key: Path, changes: dict[str, Any]) -> None:
    spec = encrypted(**changes)
    async with (
        a_plain_server(tmp_path) as address,
        taking_part(tmp_path, address, key),
        operating(address, insecure=False) as calls,
    ):
        seen = await soon(seen_through(calls, spec, tmp_path))
        masks = RunSpec.model_validate(
            spec.model_dump() | {"privacy": {**spec.privacy.model_dump(), "homomorphic": False}}
        )
        masked = await soon(seen_through(calls, masks, tmp_path))
    assert (seen.view.phase, masked.view.phase) == ("finished", "finished"), seen.view.reason
    assert seen.flat.tobytes() == masked.flat.tobytes()
    if spec.compression.upload == "none":
        assert seen.flat.tobytes() == undisturbed(spec, CLIENTS).tobytes()
    everything = metrics.summary(metrics.add(score_of(name) for name in CLIENTS))
    for one, other in zip(seen.records, masked.records, strict=True):
        assert sorted(one.folded) == list(CLIENTS)
        assert one.evaluation == other.evaluation == everything
        assert one.evaluated_examples == sum(map(examples_of, CLIENTS))
        assert one.training == other.training


async def test_clients_own_noise_goes_into_encrypted_sums(tmp_path: Path, key: Path) -> None:
    """Its numbers may be any modulo 2^b, so sums of them wrap."""
    dp = {"mode": "distributed", "noise_multiplier": 1.0, "delta": 1e-5, "clip": 1.0}
    spec = encrypted(
        privacy={"dp": dp, "b": 18},
        cohort={"count": 4},
        aggregation={"weighting": "uniform", "max_weight": None},
        evaluation={"every": 0},
        rounds=2,
    )
    seen = await ended(tmp_path, spec, key)
    assert seen.view.phase == "finished", seen.view.reason
    assert [sorted(record.folded) for record in seen.records] == [list(CLIENTS)] * 2


# Who is gone ------------------------------------------------------------------------------------------------------------


@dataclass
class Leaver:
    """A client that is gone, or falls silent, as soon as the server has answered its message of this kind for the first time."""

    name: str
    step: type
    silent: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        mask, join = Connection.mask, Connection.join
        names: dict[Connection, str] = {}

        async def joined(one: Connection, client: str, *rest: Any) -> Any:
            names[one] = client
            return await join(one, client, *rest)

        async def answered(one: Connection, key: Any, number: int, step: Any, circle: Sequence[str] = ()) -> Reply:
            reply = await mask(one, key, number, step, circle)
            if names[one] == self.name and type(step) is self.step and not self.gone.is_set():
                self.gone.set()
                await asyncio.Event().wait()
            return reply

        monkeypatch.setattr(Connection, "join", joined)
        monkeypatch.setattr(Connection, "mask", answered)


@pytest.mark.parametrize(
    ("leaver", "folded"),
    [
        (Leaver("d", messages.Ready), "abc"),
        (Leaver("d", messages.Ready, silent=True), "abc"),
        (Leaver("a", messages.Encrypted), "abcd"),  # whoever has given its numbers is in the sum; another opens it
        (Leaver("b", messages.Fetch), "abcd"),
        (Leaver("b", messages.Fetch, silent=True), "abcd"),
        (Leaver("a", messages.Opened), "abcd"),
    ],
    ids=lambda one: f"{one.step.__name__}{'-silent' * one.silent}" if isinstance(one, Leaver) else one,
)
async def test_a_client_that_is_gone_is_done_without(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch, leaver: Leaver, folded: str
) -> None:
    leaver.watch(monkeypatch)
    others = [name for name in CLIENTS if name != leaver.name]
    spec = encrypted(
        privacy={"step_s": 2.0}, cohort={"max_attempts": 1, "quorum": 3}, rounds=1, evaluation={"every": 0}
    )
    async with (
        a_plain_server(tmp_path) as address,
        taking_part(tmp_path, address, key, names=others),
        operating(address, insecure=False) as calls,
    ):
        async with taking_part(tmp_path, address, key, names=[leaver.name]):
            seeing = asyncio.create_task(seen_through(calls, spec, tmp_path))
            await soon(leaver.gone.wait())
            if leaver.silent:
                await soon(seeing)
        seen = await soon(seeing)
    assert seen.view.phase == "finished", seen.view.reason
    assert "".join(sorted(seen.records[0].folded)) == folded
    assert seen.flat.tobytes() == replayed(spec, seen.records).tobytes()


async def test_an_answer_that_is_lost_on_the_way_is_had_again(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask, lost = Connection.mask, set[type]()

    async def answered(one: Connection, key: Any, number: int, step: Any, circle: Sequence[str] = ()) -> Reply:
        reply = await mask(one, key, number, step, circle)
        if type(step) not in lost:
            lost.add(type(step))
            raise ServerUnavailable("the answer was lost")
        return reply

    monkeypatch.setattr(Connection, "mask", answered)
    monkeypatch.setattr("seqfed.client.session.FIRST_WAIT", 0.1)
    spec = encrypted(rounds=2)
    async with (
        a_plain_server(tmp_path) as address,
        taking_part(tmp_path, address, key),
        operating(address, insecure=False) as calls,
    ):
        seen = await soon(seen_through(calls, spec, tmp_path))
    assert lost == {messages.Ready, messages.Encrypted, messages.Fetch, messages.Opened}
    assert seen.flat.tobytes() == undisturbed(spec, CLIENTS).tobytes()


# Who is refused ---------------------------------------------------------------------------------------------------------


async def ended(folder: Path, spec: RunSpec, key: Path | None, others: Mapping[str, Path | None] | None = None) -> Seen:
    async with (
        a_plain_server(folder) as address,
        taking_part(folder, address, key, others),
        operating(address, insecure=False) as calls,
    ):
        return await soon(seen_through(calls, spec, folder))


async def test_who_has_another_key_is_told_and_done_without(
    tmp_path: Path, key: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other.key"
    make_key(other)
    spec = encrypted(cohort={"max_attempts": 1, "quorum": 3}, rounds=2)
    seen = await ended(tmp_path, spec, key, {"b": other})
    assert seen.view.phase == "finished", seen.view.reason
    assert [sorted(record.folded) for record in seen.records] == [["a", "c", "d"]] * 2
    assert seen.flat.tobytes() == replayed(spec, seen.records).tobytes()
    told = "ConfigError: client 'b' has another CKKS key ({}) than 'a', 'c', 'd' ({}); put the same file in both places"
    assert told.format(*(load_key(one).digest.hex()[:16] for one in (other, key))) in caplog.text
    assert caplog.text.count("ConfigError: client 'b' has another CKKS key") == 1  # it is not asked again
    assert "has begun without client 'b'" not in caplog.text


async def test_who_has_no_key_declines_for_good(tmp_path: Path, key: Path) -> None:
    spec = encrypted(survivors=4, cohort={"max_attempts": 1})
    seen = await ended(tmp_path, spec, key, {"b": None})
    assert (seen.view.phase, seen.records) == ("paused", [])
    assert "client 'b' has no CKKS key" in seen.view.reason


def lying(monkeypatch: pytest.MonkeyPatch, client: str, name: str, change: Callable[[Any], Any]) -> None:
    """What this client's half makes in this step is changed."""
    honest = getattr(Half, name)

    def changed(half: Half, *args: Any) -> Any:
        made = honest(half, *args)
        return change(made) if half._name == client else made

    monkeypatch.setattr(Half, name, changed)


def garbage(data: bytes) -> bytes:
    words = np.random.default_rng(1).integers(0, scheme.MODULUS, len(data) // 8)
    return words.astype("<u8").tobytes()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda data: b"\xff" * len(data), "a ciphertext has a word that is not below its modulus"),
        (lambda data: data + bytes(8), "an update of 131,080 bytes came; one of this run has 131,072"),
        (lambda data: data[:-8], "the update's layout"),
    ],
    ids=["words", "oversized", "truncated"],
)
async def test_what_is_no_ciphertext_is_refused_by_the_server_and_the_others_go_on(
    tmp_path: Path,
    key: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[bytes], bytes],
    why: str,
) -> None:
    lying(monkeypatch, "b", "encrypt", change)
    spec = encrypted(cohort={"max_attempts": 1, "quorum": 3}, rounds=1)
    seen = await ended(tmp_path, spec, key)
    assert seen.view.phase == "finished", seen.view.reason
    assert sorted(seen.records[0].folded) == ["a", "c", "d"]
    assert seen.flat.tobytes() == replayed(spec, seen.records).tobytes()
    assert why in caplog.text


@pytest.mark.parametrize("change", [garbage, lambda data: bytes(len(data))], ids=["garbage", "zeros"])
async def test_ciphertexts_of_nothing_are_refused_by_those_who_open_the_sum(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes]
) -> None:
    lying(monkeypatch, "d", "encrypt", change)
    seen = await ended(tmp_path, encrypted(cohort={"max_attempts": 1}), key)
    assert (seen.view.phase, seen.records) == ("paused", [])
    assert "no 2 clients are left to open it; missing: a (MaskingRefused: what came to be decrypted" in seen.view.reason


async def test_an_opener_that_lies_gets_no_model_through(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lie(made: tuple[bytes, messages.Opened]) -> tuple[bytes, messages.Opened]:
        packed, opened = made
        other = bytes([packed[0] ^ 1]) + packed[1:]
        return other, messages.Opened(opened.scalars, blake3(other).digest())

    lying(monkeypatch, "b", "open", lie)
    seen = await ended(tmp_path, encrypted(cohort={"max_attempts": 1}), key)
    assert (seen.view.phase, seen.records) == ("paused", [])
    assert "'a' and 'b' have decrypted it to different sums" in seen.view.reason


async def test_the_server_sees_ciphertexts_and_the_sum_only(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the wire is neither any client's update nor anything quantised of it, nor the key."""
    given: list[bytes] = []
    honest = Half.encrypt

    def noted(half: Half, vector: Any, scalars: Sequence[int]) -> bytes:
        if vector is not None:
            given.extend((vector[:8].tobytes(), vector[-8:].tobytes(), np.array(scalars, "<i8").tobytes()))
        return honest(half, vector, scalars)

    monkeypatch.setattr(Half, "encrypt", noted)
    spec = encrypted(rounds=2, evaluation={"every": 0})
    async with (
        a_plain_server(tmp_path) as address,
        tapped(address) as line,
        taking_part(tmp_path, line.address, key),
        operating(address, insecure=False) as calls,
    ):
        seen = await soon(seen_through(calls, spec, tmp_path))
    assert seen.view.phase == "finished"
    assert len(given) == 3 * len(CLIENTS) * spec.rounds
    secret = await asyncio.to_thread(key.read_bytes)
    needles = [*given, secret[1000:1064]]
    assert not any(map(line.holds, needles))
    assert line.holds(load_key(key).digest)  # it would be found
    assert not any(needle in file for file in files_of(tmp_path / "state") for needle in needles)


@pytest.mark.parametrize("allowed", [True, False])
def test_a_policy_has_to_allow_a_server_that_is_trusted_not_to_lie(allowed: bool) -> None:
    policy = Policy(operators=("alice",), secure_aggregation=True, semi_honest=allowed)
    found = list(refusals(policy, encrypted(), 1000, "alice", Spent()))
    assert [one.partition(":")[0] for one in found] == ([] if allowed else ["semi_honest"])
