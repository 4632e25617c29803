"""What a client brings to masked sums: whose keys it trusts, what it has been in before, and its way through one."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.client.table import Table, again, be_in, parties, party, secure_spec, secure_task, update

from seqfed.client import secure
from seqfed.client.ckks import make_key
from seqfed.client.masking import KEY, LOG, Log, Masking, Trust, line, load_peers, masking_of, own_key
from seqfed.client.secure import contribution
from seqfed.common import authority, identity
from seqfed.common.authority import Authority
from seqfed.common.errors import ConfigError, InvalidName, MaskingRefused, PolicyRefused, StorageError
from seqfed.common.homomorphic.messages import Circle, Ready
from seqfed.common.identity import Credentials, Role
from seqfed.common.masking.keys import Signer
from seqfed.common.masking.messages import Advert, Done, Survivors
from seqfed.common.masking.trust import bind
from seqfed.common.views import TaskKey, TaskKind
from seqfed.common.wire_masking import Reply, Request

NOW = identity.now()
KEY_OF_RUN = TaskKey("0123456789abcdef", 1, 1)
OWN = Signer(b"m" * 32)
MINE, YOURS, THEIRS = OWN.public, b"o" * 32, b"t" * 32
NAMES = ("anna", "bert", "cleo", "dora")
SPEC = secure_spec()


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority.create(tmp_path_factory.mktemp("ca"), NOW)


@pytest.fixture(scope="module")
def bert(ca: Authority) -> Credentials:
    return ca.credentials(Role.CLIENT, "bert", now=NOW, days=10)


def advert(name: str, key: bytes, certificate: bytes = b"", binding: bytes = b"") -> Advert:
    return Advert(name, bytes(32), bytes(32), key, binding, certificate, bytes(64))


def certified(name: str, key: bytes, whose: Credentials) -> Advert:
    return advert(name, key, whose.certificate, bind(name, key, whose.key))


# Its own key --------------------------------------------------------------------------------------------------------------


def test_a_client_has_one_key_for_ever_and_shows_it_to_nobody(tmp_path: Path) -> None:
    first = own_key(tmp_path / "state").public
    path = tmp_path / "state" / KEY
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert own_key(tmp_path / "state").public == first
    assert own_key(tmp_path / "other").public != first


def test_a_key_that_others_could_have_read_or_that_is_damaged_is_not_used(tmp_path: Path) -> None:
    own_key(tmp_path)
    (tmp_path / KEY).chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        own_key(tmp_path)
    (tmp_path / KEY).chmod(0o600)
    (tmp_path / KEY).write_bytes(b"short")
    with pytest.raises(ConfigError, match="5 bytes, and a masking key has 32"):
        own_key(tmp_path)


# Whose keys it trusts -----------------------------------------------------------------------------------------------------


def test_a_key_that_is_bound_to_a_certificate_is_its_clients(ca: Authority, bert: Credentials) -> None:
    trust = Trust(("anna", OWN), ca.pem)
    assert trust.knows
    for _ in range(2):
        trust(certified("bert", YOURS, bert))


def test_after_a_renewal_the_new_certificate_counts(ca: Authority, bert: Credentials) -> None:
    trust = Trust(("anna", OWN), ca.pem)
    trust(certified("bert", YOURS, bert))
    public = identity.load_key(bert.key, "it").public_key()
    newer = ca.issue(Role.CLIENT, "bert", public, now=NOW + timedelta(minutes=1))
    trust(replace(certified("bert", YOURS, bert), certificate=newer))  # the same key, so the same binding


CASES = {
    "no certificate": "comes without a certificate",
    "another federation's": "of another CA",
    "an operator's": "comes with the certificate of operator 'bert'",
    "another client's": "comes with the certificate of client 'cleo'",
    "another key": "is not bound to its certificate",
    "another name's binding": "is not bound to its certificate",
    "a broken binding": "is not bound to its certificate",
    "no binding": "is not bound to its certificate",
    "no certificate at all": "no certificate in PEM form",
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("known", [False, True])
def test_any_other_key_is_refused(case: str, known: bool, ca: Authority, bert: Credentials, tmp_path: Path) -> None:
    elsewhere = authority.create(tmp_path, NOW)
    good = certified("bert", YOURS, bert)
    shown = {
        "no certificate": advert("bert", YOURS),
        "another federation's": certified("bert", YOURS, elsewhere.credentials(Role.CLIENT, "bert", now=NOW)),
        "an operator's": certified("bert", YOURS, ca.credentials(Role.OPERATOR, "bert", now=NOW)),
        "another client's": certified("bert", YOURS, ca.credentials(Role.CLIENT, "cleo", now=NOW)),
        "another key": replace(good, identity_key=THEIRS),
        "another name's binding": replace(good, binding=bind("cleo", YOURS, bert.key)),
        "a broken binding": replace(good, binding=good.binding[:-1]),
        "no binding": replace(good, binding=b""),
        "no certificate at all": replace(good, certificate=b"x"),
    }[case]
    trust = Trust(("anna", OWN), ca.pem)
    if known:
        trust(good)
    with pytest.raises(MaskingRefused, match=CASES[case]):
        trust(shown)
    with pytest.raises(MaskingRefused, match=CASES[case]):  # and it was not taken for known
        trust(shown)


def test_what_was_verified_ends_with_its_certificate(ca: Authority, bert: Credentials) -> None:
    clock: list[datetime] = [NOW]
    trust = Trust(("anna", OWN), ca.pem, clock=lambda: clock[0])
    shown = certified("bert", YOURS, bert)
    trust(shown)
    clock[0] += timedelta(days=11)
    with pytest.raises(MaskingRefused, match="the masking key of 'bert': the certificate ended on"):
        trust(shown)


def test_a_list_is_believed_and_nothing_beside_it(ca: Authority, bert: Credentials) -> None:
    trust = Trust(("anna", OWN), None, {"bert": YOURS})
    assert trust.knows
    trust(advert("bert", YOURS))
    with pytest.raises(MaskingRefused, match="the masking key of 'bert' is not the one in this client's list"):
        trust(advert("bert", THEIRS))
    with pytest.raises(MaskingRefused, match="the masking key of 'eve' is not in this client's list"):
        trust(advert("eve", THEIRS))
    both = Trust(("anna", OWN), ca.pem, {"bert": YOURS})
    both(certified("bert", YOURS, bert))
    with pytest.raises(MaskingRefused, match="comes without a certificate"):
        both(advert("bert", YOURS))
    with pytest.raises(MaskingRefused, match="is not the one in"):  # a CA that has gone over to the server
        both(certified("bert", THEIRS, bert))


@pytest.mark.parametrize("pinned", [None, {"anna": THEIRS}, {}])
def test_nobody_else_is_this_client(pinned: dict[str, bytes] | None) -> None:
    trust = Trust(("anna", OWN), None, pinned)
    trust(advert("anna", MINE))
    with pytest.raises(MaskingRefused, match="another masking key for 'anna', which is this client"):
        trust(advert("anna", THEIRS))


def test_without_certificates_and_without_a_list_only_an_honest_server_is_dealt_with(tmp_path: Path) -> None:
    alone = party("anna", tmp_path)
    with pytest.raises(PolicyRefused, match=r'set peers = "peers.toml".*privacy.mode = .semi_honest.'):
        alone.require(SPEC)
    alone.require(secure_spec(mode="semi_honest"))
    party("anna", tmp_path, {}).require(SPEC)


def test_a_list_of_peers_is_made_of_the_lines_that_they_print(tmp_path: Path) -> None:
    keys = {name: own_key(tmp_path / name).public for name in ("anna", "site-1.ward_B")}
    path = tmp_path / "peers.toml"
    path.write_text("\n".join(["[peers]", *(line(name, key) for name, key in keys.items())]))
    assert load_peers(path) == keys


@pytest.mark.parametrize(
    ("content", "kind", "why"),
    [
        ("", ConfigError, "'peers' is missing"),
        ('[peers]\n"../x" = "ed25519:' + "0" * 64 + '"', InvalidName, "no dot in front"),
        ('[peers]\na = "ed25519:' + "0" * 62 + '"', ConfigError, "peers.a"),
        ('[peers]\na = "' + "0" * 64 + '"', ConfigError, "peers.a"),
        ("[peers]\na = 1", ConfigError, "peers.a"),
        ('[keys]\na = "x"', ConfigError, "did you mean|known keys"),
    ],
)
def test_a_list_of_something_else_is_refused(content: str, kind: type[Exception], why: str, tmp_path: Path) -> None:
    path = tmp_path / "peers.toml"
    path.write_text(content)
    with pytest.raises(kind, match=why):
        load_peers(path)


# What it was in before ----------------------------------------------------------------------------------------------------


def test_no_number_is_taken_twice_whatever_restarts(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.begin("one", 3)
    log.begin("two", 1)
    for number in (3, 2):
        with pytest.raises(MaskingRefused, match=f"masked sum {number} of run one: this client was in number 3"):
            log.begin("one", number)
    log.close()
    later = Log(tmp_path)
    with pytest.raises(MaskingRefused, match="takes none twice"):
        later.begin("one", 3)
    later.begin("one", 4)
    later.begin("two", 2)


def test_what_was_opened_is_known_for_ever(tmp_path: Path) -> None:
    log = Log(tmp_path)
    assert log.opened(KEY_OF_RUN) == frozenset()
    log.note_opened(KEY_OF_RUN, b"one")
    log.note_opened(KEY_OF_RUN, b"one")
    log.note_opened(replace(KEY_OF_RUN, attempt=2), b"two")
    log.close()
    assert Log(tmp_path).opened(replace(KEY_OF_RUN, attempt=9)) == {b"one", b"two"}
    assert Log(tmp_path).opened(replace(KEY_OF_RUN, round=2)) == frozenset()


def test_where_nothing_can_be_noted_nothing_is_done(tmp_path: Path) -> None:
    (tmp_path / LOG).write_bytes(b"this is no database" * 100)
    with pytest.raises(StorageError, match="takes part in none; put the file back"):
        Log(tmp_path).begin("one", 1)
    with pytest.raises(StorageError, match="takes part in none; put the file back"):
        Log(tmp_path).note_opened(KEY_OF_RUN, b"one")


# Its way through a sum ----------------------------------------------------------------------------------------------------


async def test_the_sum_is_that_of_the_quantised_updates_and_of_what_is_told_of_them(tmp_path: Path) -> None:
    task = secure_task(SPEC)
    table, given = (
        Table(task, 4, dim=100),
        {name: update(place, weight=400 * place + 1) for place, name in enumerate(NAMES)},
    )
    people = parties(tmp_path, *NAMES)
    await asyncio.gather(*(be_in(table, one, given[name]) for name, one in people.items()))
    whole, tally = table.sums()
    plain = [contribution(table.terms, task, name, one) for name, one in given.items()]
    expected = sum(vector.astype(np.int64) for vector, _ in plain if vector is not None) & 0xFFFF
    np.testing.assert_array_equal(whole, expected)
    told = {"weight": 1 + 401 + 801 + 1000, "clients": 4, "clipped": 0}  # max_weight = 1000
    assert tally == {**told, "examples": 4 + 2400, "loss": 3 * 2404, "loss.high": 0, "tokens": 0}
    assert {len(one) for one in table.vectors.values()} == {200}  # 16 bits a number


@pytest.mark.parametrize("kind", [TaskKind.EVALUATE, TaskKind.MEASURE])
async def test_tallies_are_summed_without_a_vector(kind: TaskKind, tmp_path: Path) -> None:
    table = Table(secure_task(secure_spec(mode="semi_honest"), kind), 3)
    first = {TaskKind.EVALUATE: "examples", TaskKind.MEASURE: "count.0"}[kind]
    people = {name: party(name, tmp_path) for name in NAMES[:3]}
    await asyncio.gather(*(be_in(table, one, {first: place}) for place, one in enumerate(people.values())))
    _, tally = table.sums()
    assert {name: value for name, value in tally.items() if value} == {first: 3}
    assert table.vectors == {}


async def refused(table: Table, one: Masking, given: Any, **people: Masking) -> str:
    """Why the one refuses, while the others wait."""
    others = [asyncio.ensure_future(be_in(table, other, update(9))) for other in people.values()]
    try:
        with pytest.raises(MaskingRefused) as caught:
            await be_in(table, one, given)
    finally:
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    return str(caught.value)


async def test_a_sum_of_fewer_than_its_own_floor_is_refused(tmp_path: Path) -> None:
    people = parties(tmp_path, *NAMES[:3])
    people["anna"] = parties(tmp_path, *NAMES[:3], min_cohort=4)["anna"]
    table = Table(secure_task(SPEC), 3, dim=100)
    why = await refused(table, people.pop("anna"), update(1), **people)
    assert "the roster has 3 clients; 4 to 5 may be in it" in why


async def test_a_client_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    people = parties(tmp_path, *NAMES[:3])
    people["eve"] = party("eve", tmp_path, {name: own_key(tmp_path / name).public for name in (*NAMES, "eve")})
    table = Table(secure_task(SPEC), 4, dim=100)
    why = await refused(table, people.pop("anna"), update(1), **people)
    assert "the masking key of 'eve' is not in this client's list" in why


async def test_a_sum_that_was_begun_is_not_begun_again_after_a_restart(tmp_path: Path) -> None:
    task, people = secure_task(SPEC), parties(tmp_path, *NAMES[:3])
    table = Table(task, 3, dim=100)
    broken = [asyncio.ensure_future(be_in(table, one, update(1))) for one in people.values()]
    await table.heard(6)  # three adverts, three shares
    for one in broken:
        one.cancel()
    await asyncio.gather(*broken, return_exceptions=True)
    people = parties(tmp_path, *NAMES[:3])
    why = await refused(Table(task, 3, dim=100), people.pop("anna"), update(1), **people)
    assert why == (
        "masked sum 1 of run 0123456789abcdef: this client was in number 1, and takes none twice; "
        "was the server's store put back from a copy, or was this client restarted within it?"
    )


async def test_what_was_opened_is_not_masked_again_but_something_new_is(tmp_path: Path) -> None:
    task, people = secure_task(SPEC), parties(tmp_path, *NAMES[:3])
    table = Table(task, 3, dim=100)
    await asyncio.gather(*(be_in(table, one, update(place)) for place, one in enumerate(people.values())))
    retry = again(task, 2)
    people = parties(tmp_path, *NAMES[:3])
    why = await refused(Table(retry, 3, dim=100), people["anna"], update(0))
    assert "it gives nothing twice" in why
    table = Table(retry, 3, dim=100)
    await asyncio.gather(*(be_in(table, one, update(7 + place)) for place, one in enumerate(people.values())))
    assert table.sums()[1]["clients"] == 3


@pytest.mark.parametrize("homomorphic", [False, True])
async def test_it_is_noted_before_anything_of_it_is_sent(homomorphic: bool, tmp_path: Path) -> None:
    """From the first byte on it may come to stand in a sum that others open."""
    task, given = secure_task(secure_spec(homomorphic=homomorphic, mode="semi_honest")), update(1)
    table, noted = Table(task, 3, dim=100), list[frozenset[bytes]]()
    path = tmp_path / "federation.key"
    make_key(path)

    async def be(own: Masking) -> None:
        one = Masking(own.name, own._signer, own._trust, own.log, shared=path)

        async def ask(step: Request, names: Sequence[str]) -> Reply:
            if not homomorphic:
                return await table.say(one.name, step)
            return Circle(tuple(NAMES[:3])) if isinstance(step, Ready) else Done()

        async def send(packed: bytes, digest: bytes) -> None:
            noted.append(Log(tmp_path / one.name).opened(task.key))
            table.take(one.name, packed)

        await secure.take_part(one, task, given, ask, send)

    await asyncio.gather(*(be(one) for one in parties(tmp_path, *NAMES[:3]).values()))
    assert noted == [frozenset([given.digest])] * 3


async def test_an_evaluation_that_was_opened_is_not_told_again(tmp_path: Path) -> None:
    task, people = secure_task(SPEC, TaskKind.EVALUATE), parties(tmp_path, *NAMES[:3])
    table = Table(task, 3)
    await asyncio.gather(*(be_in(table, one, {"examples": 5}) for one in people.values()))
    retry = again(task, 2)
    assert "gives nothing twice" in await refused(Table(retry, 3), people["anna"], {"examples": 5})
    other = replace(retry, model=replace(retry.model, digest=bytes(32)))  # nor of another model in the same round
    assert "gives nothing twice" in await refused(Table(other, 3), people["bert"], {"examples": 5})
    table = Table(replace(again(task, 3), key=replace(task.key, round=task.key.round + 1)), 3)
    await asyncio.gather(*(be_in(table, one, {"examples": 5}) for one in people.values()))
    assert table.sums()[1]["examples"] == 15


@pytest.mark.parametrize("answer", [Done(), Survivors(frozenset(NAMES))])
async def test_an_answer_to_another_step_is_refused(answer: Reply, tmp_path: Path) -> None:
    people = parties(tmp_path, *NAMES[:3])
    table = Table(secure_task(SPEC), 3, dim=100, lie=lambda client, reply: answer if client == "anna" else reply)
    why = await refused(table, people.pop("anna"), update(1), **people)
    assert why == f"the server answers with {type(answer).__name__} where Roster is due"


async def test_a_server_that_shows_each_another_model_is_found_out(tmp_path: Path) -> None:
    people, task = parties(tmp_path, *NAMES[:3]), secure_task(SPEC)
    table = Table(task, 3, dim=100, checks=False)
    other = replace(task, model=replace(task.model, digest=bytes(32)))
    bert = asyncio.ensure_future(be_in(table, people.pop("bert"), update(1), other))
    why = await refused(table, people.pop("anna"), update(1), **people)
    assert "client 'bert' has not signed its keys for these terms" in why
    with pytest.raises(MaskingRefused, match="has not signed its keys for these terms"):
        await bert


async def test_without_a_number_there_is_no_sum(tmp_path: Path) -> None:
    task = replace(secure_task(SPEC), masking=None)
    with pytest.raises(MaskingRefused, match="has no number of a masked sum"):
        await be_in(Table(task, 3, dim=100), party("anna", tmp_path, {}), update(1))


async def test_certificates_are_shown_and_judged(tmp_path: Path, ca: Authority) -> None:
    people = {}
    for name in NAMES[:3]:
        identity.save_credentials(tmp_path / name / "c", ca.credentials(Role.CLIENT, name, now=NOW))
        people[name] = masking_of(name, tmp_path / name, tmp_path / name / "c", None)
    table = Table(secure_task(SPEC), 3, dim=100)
    await asyncio.gather(*(be_in(table, one, update(1)) for one in people.values()))
    assert table.sums()[1]["clients"] == 3
    assert all(one.certificate and one.binding for one in table.adverts.values())
