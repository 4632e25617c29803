"""Every attack on a masked sum that the protocol is meant to stop, and that the party stops it which must.

The server of these tests is the attacker, unless they say otherwise: it tells its clients what it likes, and it may have
clients of its own among them (insiders), whose identities it can sign with.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.common.masking.run import (
    EVENTS,
    Course,
    Log,
    client_of,
    masked_sum,
    names_of,
    pinned,
    signer_of,
    started,
    terms_for,
)

from seqfed.common.errors import MaskingRefused, Unauthenticated, WrongRound
from seqfed.common.masking import keys
from seqfed.common.masking.checks import check_advert, check_opening
from seqfed.common.masking.client import Client
from seqfed.common.masking.graph import parameters
from seqfed.common.masking.messages import (
    OF_KEY,
    OF_SELF,
    SALT,
    Advert,
    Confirm,
    Confirmed,
    Delivery,
    KeyShares,
    MaskedInput,
    Opening,
    Roster,
    Survivors,
)
from seqfed.common.masking.plan import Plan, advert_statement
from seqfed.common.masking.server import Confirming, Fail, Masked, Opened, Shared, Step, StepDeadline, on
from seqfed.common.masking.terms import Purpose, Terms
from seqfed.common.masking.unmasking import Unmasking, unmasking

NAMES = names_of(10)  # 7 of them open a secret, and must sign the survivors
TERMS = terms_for(10)
ALL = frozenset(NAMES)

# The points of small order on Curve25519 and its twist (https://cr.yp.to/ecdh.html), and encodings of them beyond the prime.
LOW_ORDER = [
    bytes(32),
    bytes([1, *bytes(31)]),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    (2**255 - 20).to_bytes(32, "little"),
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 18).to_bytes(32, "little"),
]


def roster_of(adverts: Collection[Advert]) -> Roster:
    return Roster(tuple(sorted(adverts, key=lambda advert: advert.client)))


def insider(advert: Advert, terms: Terms = TERMS, **changes: Any) -> Advert:
    """The advert as its client, who is in league with the server, signs it with these changes."""
    changed = replace(advert, **changes)
    return replace(changed, signature=signer_of(advert.client).sign(*advert_statement(terms, changed)))


def sharing(clients: Mapping[str, Client], roster: Roster) -> dict[str, KeyShares]:
    return {name: clients[name].share(roster) for name in roster.names if name in clients}


def delivery(shares: Mapping[str, KeyShares], client: str, members: frozenset[str] = ALL) -> Delivery:
    sealed = {name: one.sealed[client] for name, one in shares.items() if name in members and client in one.sealed}
    return Delivery(members, sealed)


def masking(client: Client, told: Delivery) -> MaskedInput:
    return client.mask(told, np.zeros(client.terms.dim, client.terms.dtype), [0] * client.terms.scalars)[1]


def advertised(terms: Terms = TERMS, **keywords: Any) -> tuple[dict[str, Client], Roster]:
    clients = {name: client_of(terms, name, NAMES, **keywords) for name in NAMES}
    return clients, roster_of([client.advertise() for client in clients.values()])


def masked(terms: Terms = TERMS, **keywords: Any) -> tuple[dict[str, Client], Roster, dict[str, KeyShares]]:
    """Up to and with step 2, by an honest server."""
    clients, roster = advertised(terms, **keywords)
    shares = sharing(clients, roster)
    for name in NAMES:
        masking(clients[name], delivery(shares, name))
    return clients, roster, shares


def signature_of(name: str, roster: Roster, sharers: Collection[str], survivors: Collection[str]) -> bytes:
    """That of an insider, who signs anything."""
    plan = Plan(TERMS, roster)
    return signer_of(name).sign(*plan.survivors_statement(name, plan.agreed(sharers, survivors)))


# The survivors: one set, and one secret of each ------------------------------------------------------------------------


def test_two_survivor_sets_open_nothing() -> None:
    clients, _, _ = masked()
    told = {name: ALL - {NAMES[0]} if place < 6 else ALL - {NAMES[1]} for place, name in enumerate(NAMES)}
    signed = {name: clients[name].confirm(Survivors(told[name])).signature for name in NAMES[2:]}
    for name in NAMES[2:]:
        with pytest.raises(MaskingRefused, match="must: the others were told something else"):
            clients[name].open(Confirmed(signed))


def test_a_client_signs_one_set_of_survivors_ever() -> None:
    clients, _, _ = masked()
    clients[NAMES[0]].confirm(Survivors(ALL))
    with pytest.raises(MaskingRefused, match="each comes once"):
        clients[NAMES[0]].confirm(Survivors(ALL - {NAMES[1]}))
    # nor does it open the first any more
    with pytest.raises(MaskingRefused, match="'none' is due"):
        clients[NAMES[0]].open(Confirmed({}))


def test_signatures_count_of_survivors_only_and_for_this_very_set() -> None:
    def refused(counterfeit: Callable[[str, bytes], bytes], survivors: frozenset[str] = ALL) -> bool:
        """Six sign, who are one too few; the others' signatures are counterfeited."""
        clients, roster, _ = masked()
        names = sorted(survivors)
        signed = {name: clients[name].confirm(Survivors(survivors)).signature for name in names}
        other = [name for name in NAMES if name not in names[:6]]
        signed |= {name: counterfeit(name, signature_of(name, roster, ALL, survivors)) for name in other}
        try:
            clients[names[0]].open(Confirmed(signed))
        except MaskingRefused:
            return True
        return False

    earlier, roster, _ = masked()
    assert not refused(lambda _, signature: signature)
    assert refused(lambda *_: secrets.token_bytes(64))
    assert refused(lambda *_: b"")
    assert refused(lambda *_: signature_of(NAMES[0], roster, ALL, ALL))
    assert refused(lambda name, _: earlier[name].confirm(Survivors(ALL)).signature)
    # who is not among the survivors has no say
    assert refused(lambda _, signature: signature, frozenset(NAMES[:7])) is False
    clients, roster, _ = masked()
    survivors = frozenset(NAMES[:7])
    signed = {name: signature_of(name, roster, ALL, survivors) for name in NAMES[4:]}
    clients[NAMES[0]].confirm(Survivors(survivors))
    with pytest.raises(MaskingRefused, match="3 clients have signed"):
        clients[NAMES[0]].open(Confirmed(signed))


def test_split_views_of_the_roster_open_nothing() -> None:
    """Half of the clients are shown a roster without one client: all signatures hold, and no step before the last fails."""
    clients, whole = advertised()
    part = Roster(whole.adverts[1:])
    views = {name: whole if place < 6 else part for place, name in enumerate(NAMES)}
    shares = {name: clients[name].share(views[name]) for name in NAMES}
    for name in NAMES:
        members = frozenset(views[name].names)
        masking(clients[name], delivery(shares, name, members))
    survivors = frozenset(part.names)
    signed = {name: clients[name].confirm(Survivors(survivors)).signature for name in part.names}
    for name in part.names:
        with pytest.raises(MaskingRefused, match="were told something else"):
            clients[name].open(Confirmed(signed))


def test_differing_sharers_open_nothing() -> None:
    """The same survivors, but not the same masks in the sum."""
    clients, roster = advertised()
    shares = sharing(clients, roster)
    for place, name in enumerate(NAMES[:9]):
        masking(clients[name], delivery(shares, name, ALL if place < 5 else ALL - {NAMES[9]}))
    signed = {name: clients[name].confirm(Survivors(frozenset(NAMES[:9]))).signature for name in NAMES[:9]}
    for name in NAMES[:9]:
        with pytest.raises(MaskingRefused, match="were told something else"):
            clients[name].open(Confirmed(signed))


def test_a_second_unmasking_is_refused() -> None:
    clients, roster, _ = masked()
    first, second = ALL, ALL - {NAMES[9]}
    signed = {name: clients[name].confirm(Survivors(first)).signature for name in NAMES}
    clients[NAMES[0]].open(Confirmed(signed))
    with pytest.raises(MaskingRefused, match="'none' is due"):
        clients[NAMES[0]].open(Confirmed(signed))
    with pytest.raises(MaskingRefused, match="'none' is due"):
        clients[NAMES[0]].confirm(Survivors(second))
    # were all others in league with the server and signed the other set, too
    clients[NAMES[1]].wipe()
    with pytest.raises(MaskingRefused):
        clients[NAMES[1]].open(Confirmed({name: signature_of(name, roster, ALL, second) for name in NAMES}))


def test_both_secrets_of_one_client_do_not_open_whomever_the_server_tells_what() -> None:
    """Three insiders of ten sign two sets of survivors, with the victim and without, and tell all that they hold."""
    victim, insiders, honest = NAMES[0], NAMES[1:4], NAMES[4:]
    clients, roster, _ = masked()
    told = {name: ALL if place < 4 else ALL - {victim} for place, name in enumerate(honest)}
    signed = {
        survivors: {name: signature_of(name, roster, ALL, survivors) for name in insiders}
        for survivors in (ALL, ALL - {victim})
    }
    for name in honest:
        signed[told[name]][name] = clients[name].confirm(Survivors(told[name])).signature
    holders: dict[int, set[str]] = {OF_SELF: set(insiders), OF_KEY: set(insiders)}
    refusing = set()
    for name in honest:
        try:
            opening = clients[name].open(Confirmed(signed[told[name]]))
        except MaskingRefused:
            refusing.add(name)
        else:
            holders[opening.shares[victim][0]].add(name)
    # only of one set are there enough, so of the other secret there are the insiders' shares alone
    assert refusing == set(honest[4:])
    assert holders[OF_KEY] == set(insiders)
    assert len(holders[OF_KEY]) < Plan(TERMS, roster).threshold <= len(holders[OF_SELF])


def test_of_each_client_the_opening_holds_one_secret_only() -> None:
    clients, roster, shares = masked()
    dead = NAMES[9]
    survivors = ALL - {dead}
    signed = {name: clients[name].confirm(Survivors(survivors)).signature for name in NAMES[:9]}
    plan = Plan(TERMS, roster)
    for name in NAMES[:9]:
        opening = clients[name].open(Confirmed(signed))
        assert opening.shares.keys() == ALL
        for owner, share in opening.shares.items():
            kind = OF_KEY if owner == dead else OF_SELF
            committed = shares[owner].commitments[name]
            assert share[0] == kind
            assert plan.commit(kind, owner, name, share[1:]) == committed[32 * (kind - 1) : 32 * kind]


def test_a_late_input_after_its_client_was_declared_dead_is_refused_by_the_server() -> None:
    course = started(TERMS, NAMES)
    course.step(Step.SHARING)
    late = course.say(NAMES[0])
    for name in NAMES[1:]:
        course.take(Masked(name, course.say(name)))
    course.take(StepDeadline(Step.MASKING))
    state = course.state
    with pytest.raises(WrongRound, match=NAMES[0]):
        on(state, Masked(NAMES[0], late))
    assert course.state is state


def test_who_was_declared_dead_signs_nothing_and_keeps_its_own_mask() -> None:
    """A server that has its input nevertheless, and the key of its masks with the others, still lacks its own mask."""
    clients, _, _ = masked()
    dead, survivors = NAMES[0], ALL - {NAMES[0]}
    with pytest.raises(MaskingRefused, match="not among those that are in the sum"):
        clients[dead].confirm(Survivors(survivors))
    signed = {name: clients[name].confirm(Survivors(survivors)).signature for name in NAMES[1:]}
    for name in NAMES[1:]:
        assert clients[name].open(Confirmed(signed)).shares[dead][0] == OF_KEY


# Too few ---------------------------------------------------------------------------------------------------------------


def test_a_client_is_in_no_sum_below_its_floor() -> None:
    clients, roster = advertised(floor=9)
    small = Roster(roster.adverts[:8])
    with pytest.raises(MaskingRefused, match="the roster has 8 clients; 9 to 10"):
        clients[NAMES[0]].share(small)

    clients, roster = advertised(floor=9)
    shares = sharing(clients, roster)
    with pytest.raises(MaskingRefused, match="only 8 clients have shared; this one wants 9"):
        masking(clients[NAMES[0]], delivery(shares, NAMES[0], frozenset(NAMES[:8])))

    clients, _, _ = masked(floor=9)
    with pytest.raises(MaskingRefused, match="only 8 clients are in the sum; this one wants 9"):
        clients[NAMES[0]].confirm(Survivors(frozenset(NAMES[:8])))


def test_the_terms_own_floor_holds_too() -> None:
    clients, _, _ = masked(terms_for(10, min_survivors=8))
    with pytest.raises(MaskingRefused, match="only 7 clients are in the sum; this one wants 8"):
        clients[NAMES[0]].confirm(Survivors(frozenset(NAMES[:7])))


@pytest.mark.parametrize(("malicious", "threshold"), [(True, 7), (False, 6)])
def test_a_low_threshold_is_refused_in_every_step(malicious: bool, threshold: int) -> None:
    terms = terms_for(10, malicious=malicious)
    few = frozenset(NAMES[: threshold - 1])
    clients, roster = advertised(terms)
    shares = sharing(clients, roster)
    with pytest.raises(MaskingRefused, match=f"fewer than {threshold} have shared"):
        masking(clients[NAMES[0]], delivery(shares, NAMES[0], few))

    clients, roster, _ = masked(terms)
    with pytest.raises(MaskingRefused, match=f"fewer than {threshold} are in the sum"):
        clients[NAMES[0]].confirm(Survivors(few))

    signed = {name: clients[name].confirm(Survivors(ALL)).signature for name in NAMES[2:]}
    with pytest.raises(MaskingRefused, match=f"{threshold - 1} clients have signed"):
        clients[NAMES[2]].open(Confirmed(dict(list(signed.items())[: threshold - 1])))


@given(n=st.integers(2, 2000), malicious=st.booleans(), drop=st.floats(0, 0.49))
def test_no_number_of_clients_has_a_low_threshold(n: int, malicious: bool, drop: float) -> None:
    k, threshold = parameters(n, malicious, drop)
    assert 3 * threshold > 2 * (k + 1) if malicious else 2 * threshold > k + 1
    assert threshold <= k + 1


def test_in_a_large_sum_the_threshold_is_of_a_clients_own_circle() -> None:
    """Nearly all have shared, as the server says; but of one client's neighbours too few."""
    names = names_of(300)
    terms = terms_for(300)
    client = client_of(terms, names[0], names)
    others = [client_of(terms, name, names).advertise() for name in names[1:]]
    roster = roster_of([client.advertise(), *others])
    client.share(roster)
    plan = Plan(terms, roster)
    missing = plan.neighbours(names[0])[: len(plan.circle(names[0])) - plan.threshold + 1]
    members = frozenset(names) - set(missing)
    assert len(members) > 270
    with pytest.raises(MaskingRefused, match=f"fewer than {plan.threshold} have shared"):
        client.mask(Delivery(members, {}), np.zeros(terms.dim, terms.dtype), [0, 0, 0])


# Who is in the roster --------------------------------------------------------------------------------------------------


def refusal(swap: Callable[[dict[str, Advert]], Any], error: type[Exception] = MaskingRefused, match: str = "") -> None:
    """An honest client refuses a roster that was changed so."""
    clients, roster = advertised()
    adverts = dict(zip(roster.names, roster.adverts, strict=True))
    swap(adverts)
    log = Log()
    client = clients[NAMES[0]]
    client._begin = log.begin
    with pytest.raises(error, match=match):
        client.share(Roster(tuple(adverts.values())))
    assert not log.highest


def test_a_substituted_key_is_refused() -> None:
    mine, public = signer_of("the server"), keys.public_of(secrets.token_bytes(32))
    name = NAMES[5]

    def swapped(**changes: Any) -> Callable[[dict[str, Advert]], None]:
        return lambda adverts: adverts.update({name: replace(adverts[name], **changes)})

    def signed_anew(adverts: dict[str, Advert]) -> None:
        changed = replace(adverts[name], mask_key=public, identity_key=mine.public)
        adverts[name] = replace(changed, signature=mine.sign(*advert_statement(TERMS, changed)))

    refusal(swapped(mask_key=public), match=f"'{name}' has not signed its keys")
    refusal(swapped(encryption_key=public), match=f"'{name}' has not signed its keys")
    refusal(swapped(signature=bytes(64)), match=f"'{name}' has not signed its keys")
    refusal(swapped(identity_key=mine.public), match=f"'{name}' has not signed its keys")
    refusal(signed_anew, Unauthenticated, f"'{name}' is not pinned")
    adverts = {name: client_of(TERMS, name, NAMES).advertise()}
    signed_anew(adverts)
    with pytest.raises(Unauthenticated):
        check_advert(TERMS, adverts[name], pinned(NAMES))


def test_a_client_whose_own_keys_were_changed_refuses() -> None:
    public = keys.public_of(secrets.token_bytes(32))
    own = "does not hold the keys that this client has advertised"
    refusal(lambda adverts: adverts.pop(NAMES[0]), match=own)
    refusal(lambda adverts: adverts.update({NAMES[0]: insider(adverts[NAMES[0]], mask_key=public)}), match=own)
    refusal(lambda adverts: adverts.update({NAMES[0]: replace(adverts[NAMES[0]], certificate=b"other")}), match=own)


def test_sybils_are_refused() -> None:
    def invented(name: str) -> Advert:
        return client_of(TERMS, name, [name]).advertise()

    def in_place(adverts: dict[str, Advert]) -> None:
        del adverts[NAMES[9]]
        adverts["sybil"] = invented("sybil")

    refusal(in_place, Unauthenticated, "'sybil' is not pinned")
    # more than may be in the sum, whoever they are
    refusal(lambda adverts: adverts.update({"sybil": invented("sybil")}), match="the roster has 11 clients; 2 to 10")


def test_nobody_is_in_a_roster_twice() -> None:
    def renamed(adverts: dict[str, Advert]) -> None:
        """One insider under a second name."""
        del adverts[NAMES[9]]
        adverts["zz"] = insider(replace(adverts[NAMES[8]], client="zz"))

    def key(place: int, **to: str) -> Callable[[dict[str, Advert]], None]:
        def swap(adverts: dict[str, Advert]) -> None:
            changes: dict[str, Any] = {field: getattr(adverts[NAMES[3]], one) for field, one in to.items()}
            adverts[NAMES[place]] = insider(adverts[NAMES[place]], **changes)

        return swap

    def twice(adverts: dict[str, Advert]) -> None:
        del adverts[NAMES[9]]
        adverts["again"] = adverts[NAMES[8]]

    refusal(renamed, match="two keys of the roster are the same")
    refusal(key(5, mask_key="mask_key"), match="two keys of the roster are the same")
    refusal(key(5, encryption_key="encryption_key"), match="two keys of the roster are the same")
    refusal(key(5, encryption_key="mask_key"), match="two keys of the roster are the same")
    refusal(twice, match="names a client twice")
    refusal(lambda adverts: adverts.update({NAMES[2]: adverts.pop(NAMES[2])}), match="not in ascending order")


@pytest.mark.parametrize("field", ["encryption_key", "mask_key"])
@pytest.mark.parametrize("point", LOW_ORDER, ids=range(len(LOW_ORDER)))
def test_points_of_low_order_are_refused_by_server_and_clients(field: str, point: bytes) -> None:
    """An insider's, so they are duly signed: everybody would know what is agreed with it."""
    changes: dict[str, Any] = {field: point}
    signed = insider(client_of(TERMS, NAMES[5], NAMES).advertise(), **changes)
    with pytest.raises(MaskingRefused, match="public key"):
        check_advert(TERMS, signed, pinned(NAMES))
    refusal(lambda adverts: adverts.update({NAMES[5]: signed}), match="public key")


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33)], ids=len)
def test_keys_of_another_length_are_refused_by_server_and_clients(key: bytes) -> None:
    signed = insider(client_of(TERMS, NAMES[5], NAMES).advertise(), mask_key=key)
    with pytest.raises(MaskingRefused, match="public key"):
        check_advert(TERMS, signed, pinned(NAMES))
    refusal(lambda adverts: adverts.update({NAMES[5]: signed}), match="public key")


# Which sum it is -------------------------------------------------------------------------------------------------------


def test_a_replayed_round_is_refused_also_after_the_clients_restart() -> None:
    log = Log()

    def share(number: int, run: str = "run") -> KeyShares:
        """By a client that has just started: all it has is its log."""
        terms = terms_for(10, number=number, run=run)
        others = [client_of(terms, name, NAMES).advertise() for name in NAMES[1:]]
        client = client_of(terms, NAMES[0], NAMES, log=log)
        return client.share(roster_of([client.advertise(), *others]))

    share(7)
    for number in (7, 6, 0):
        with pytest.raises(MaskingRefused, match="has been before"):
            share(number)
    share(8)
    share(7, "another run")
    with pytest.raises(MaskingRefused, match="has been before"):
        share(7)


def test_the_log_is_written_before_anything_is_shared() -> None:
    clients, roster = advertised()
    told: list[tuple[str, int]] = []

    def full(run: str, number: int) -> None:
        told.append((run, number))
        raise OSError(28, "no space left")

    clients[NAMES[0]]._begin = full
    with pytest.raises(OSError, match="no space"):
        clients[NAMES[0]].share(roster)
    assert told == [("run", 7)]
    with pytest.raises(MaskingRefused, match="'none' is due"):
        clients[NAMES[0]].share(roster)


def test_a_stale_advertisement_is_refused_by_server_and_clients() -> None:
    stale = client_of(terms_for(10, number=6), NAMES[5], NAMES).advertise()
    with pytest.raises(MaskingRefused, match="has not signed its keys for these terms"):
        check_advert(TERMS, stale, pinned(NAMES))
    refusal(lambda adverts: adverts.update({NAMES[5]: stale}), match=f"'{NAMES[5]}' has not signed its keys")


@pytest.mark.parametrize(
    "change",
    [
        {"model": bytes(32)},
        {"settings": bytes(32)},
        {"run": "another"},
        {"round": 4},
        {"attempt": 2},
        {"number": 8},
        {"purpose": Purpose.EVALUATE},
        {"dim": 12},
        {"bits": 12, "levels": 20},
        {"levels": 5},
        {"n_max": 9},
        {"min_survivors": 3},
        {"malicious": False},
        {"drop": 0.06},
        {"scalars": 4},
        {"codec": "another"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_clients_that_were_told_different_models_or_settings_refuse_each_other(change: dict[str, Any]) -> None:
    told = client_of(terms_for(10, **change), NAMES[5], NAMES).advertise()
    with pytest.raises(MaskingRefused, match="has not signed its keys for these terms"):
        check_advert(TERMS, told, pinned(NAMES))
    refusal(lambda adverts: adverts.update({NAMES[5]: told}), match=f"'{NAMES[5]}' has not signed its keys")


@pytest.mark.parametrize(
    "change",
    [
        {"levels": 3277},
        {"n_max": 100_000},
        {"levels": 1 << 40},
        {"levels": 0},
        {"bits": 8},
        {"bits": 7},
        {"bits": 64},
        {"min_survivors": 1},
        {"min_survivors": 11},
        {"n_max": 1},
        {"scalars": 1 << 18},
        {"dim": 1 << 34},
        {"model": b""},
    ],
    ids=str,
)
def test_terms_that_could_wrap_or_hide_nothing_are_refused_before_anything_is_sent(change: dict[str, Any]) -> None:
    terms = replace(TERMS, **change)
    with pytest.raises(MaskingRefused):
        client_of(terms, NAMES[0], NAMES)


# What is sealed, and what is opened of it ------------------------------------------------------------------------------


def tampering(tamper: Callable[[str, dict[str, bytes]], None]) -> Course:
    """A sum whose server, but for what it does to the sealed shares of the first client for the others, is honest."""
    course = started(TERMS, NAMES)
    course.step(Step.SHARING)
    for name in NAMES:
        sealed = {other: one.sealed[name] for other, one in course.state.shared.items() if name in one.sealed}
        tamper(name, sealed)
        course.take(EVENTS[Step.MASKING](name, course.heard(name, Delivery(ALL, sealed))))
    for step in (Step.CONFIRMING, Step.OPENING):
        course.step(step)
    return course


def test_tampered_ciphertexts_count_as_missing_and_the_sum_holds() -> None:
    owner, tampered = NAMES[0], NAMES[1:4]
    other: dict[str, bytes] = {}

    def tamper(name: str, sealed: dict[str, bytes]) -> None:
        other.setdefault("box", sealed.get(NAMES[2], b""))
        if name == tampered[0]:
            sealed[owner] = bytes([sealed[owner][0] ^ 1]) + sealed[owner][1:]
        elif name == tampered[1]:
            sealed[owner] = sealed[NAMES[9]]
        elif name == tampered[2]:
            sealed[owner] = other["box"]

    course = tampering(tamper)
    for name in NAMES:
        assert (owner in course.state.opened[name].shares) == (name not in tampered)
    (vector, scalars), (expected, expected_scalars) = course.total(), course.expected()
    np.testing.assert_array_equal(vector, expected)
    assert scalars == expected_scalars


def test_more_tampering_than_the_threshold_bears_ends_the_sum() -> None:
    def tamper(name: str, sealed: dict[str, bytes]) -> None:
        if name in NAMES[1:5]:
            sealed.pop(NAMES[0])

    found = unmasking(tampering(tamper).state)
    assert isinstance(found, Fail)
    assert found.missed == (NAMES[0],)
    assert NAMES[0] in found.why


@pytest.mark.parametrize("stranger", [NAMES[0], NAMES[9], "stranger"])
def test_shares_of_who_has_not_shared_are_refused(stranger: str) -> None:
    clients, roster = advertised()
    shares = sharing(clients, roster)
    told = delivery(shares, NAMES[0], ALL - {NAMES[9]})
    with pytest.raises(MaskingRefused, match="clients that have none for this one"):
        masking(clients[NAMES[0]], Delivery(told.members, {**told.sealed, stranger: bytes(146)}))


@pytest.mark.parametrize("what", ["sharers", "survivors"])
def test_members_from_nowhere_are_refused(what: str) -> None:
    clients, roster = advertised()
    shares = sharing(clients, roster)
    told = delivery(shares, NAMES[0], ALL if what == "survivors" else ALL | {"stranger"})
    if what == "sharers":
        with pytest.raises(MaskingRefused, match="cannot be"):
            masking(clients[NAMES[0]], told)
        return
    masking(clients[NAMES[0]], replace(told, members=ALL - {NAMES[9]}, sealed={}))
    with pytest.raises(MaskingRefused, match="cannot be"):
        clients[NAMES[0]].confirm(Survivors(ALL))


def lying(
    liars: Mapping[str, Callable[[str, bytes], bytes]], owners: Collection[str]
) -> tuple[Course, Unmasking | Fail]:
    """A sum, one client of which is gone after sharing, where these say something else of the owners' shares."""
    course = masked_sum(TERMS, NAMES, {Step.MASKING: NAMES[9:]})
    told = {}
    for name, opening in course.state.opened.items():
        lie = liars.get(name)
        shares = {
            owner: lie(owner, share) if lie and owner in owners else share for owner, share in opening.shares.items()
        }
        told[name] = Opening(shares)
    # the server's own check passes: nothing is wrong with their form
    course.state = replace(course.state, step=Step.OPENING, opened={})
    for name, opening in told.items():
        course.take(Opened(name, opening))
    return course, unmasking(course.state)


def another_share(_: str, share: bytes) -> bytes:
    return share[: 1 + SALT] + bytes([share[1 + SALT] ^ 1]) + share[2 + SALT :]


def beyond_the_prime(_: str, share: bytes) -> bytes:
    return share[: 1 + SALT] + b"\xff" * 33


def another_salt(_: str, share: bytes) -> bytes:
    return share[:1] + secrets.token_bytes(SALT) + share[1 + SALT :]


@pytest.mark.parametrize("lie", [another_share, beyond_the_prime, another_salt])
def test_lying_share_holders_are_tolerated_and_named(lie: Callable[[str, bytes], bytes]) -> None:
    course, found = lying({NAMES[0]: lie, NAMES[4]: lie}, NAMES)
    assert isinstance(found, Unmasking)
    assert set(found.disputes) == {(liar, owner) for liar in (NAMES[0], NAMES[4]) for owner in NAMES}
    (vector, scalars), (expected, expected_scalars) = course.total(), course.expected()
    np.testing.assert_array_equal(vector, expected)
    assert scalars == expected_scalars


@pytest.mark.parametrize("lie", [another_share, beyond_the_prime])
@pytest.mark.parametrize("owner", [NAMES[0], NAMES[9]])
def test_too_many_lying_share_holders_end_the_sum_and_are_named(owner: str, lie: Callable[[str, bytes], bytes]) -> None:
    liars = NAMES[2:5]
    _, found = lying(dict.fromkeys(liars, lie), [owner])
    assert isinstance(found, Fail)
    assert found.missed == tuple(sorted({owner, *liars}))  # nobody can tell which of them lies
    assert f"'{owner}'" in found.why


def test_a_wrong_salt_alone_costs_nothing_even_of_many() -> None:
    """The shares are right, whatever their commitments say, and what they give is what its owner has committed to."""
    _, found = lying(dict.fromkeys(NAMES[2:6], another_salt), NAMES)
    assert isinstance(found, Unmasking)


@pytest.mark.parametrize("what", ["self_commitment", "commitments"])
def test_an_owner_that_commits_to_something_else_ends_the_sum_and_is_named(what: str) -> None:
    """An insider among the clients is the attacker here: its shares are of no secret."""
    course = started(TERMS, NAMES)
    owner = NAMES[3]
    plan = course.state.plan
    for name in NAMES:
        message = course.say(name)
        if name == owner and what == "self_commitment":
            message = replace(message, self_commitment=bytes(32))
        elif name == owner:
            message = replace(
                message, self_commitment=bytes(32), commitments=dict.fromkeys(message.commitments, bytes(64))
            )
        course.take(
            Shared(name, replace(message, signature=signer_of(name).sign(*plan.shares_statement(name, message))))
        )
    for step in tuple(EVENTS)[1:]:
        course.step(step)
    found = unmasking(course.state)
    assert isinstance(found, Fail)
    # With no share as it was committed to, nobody can tell whether the owner lies or all of its holders.
    assert found.missed == ((owner,) if what == "self_commitment" else tuple(NAMES))


def test_an_owner_with_some_wrong_commitments_does_not_end_the_sum() -> None:
    course = started(TERMS, NAMES)
    plan = course.state.plan
    for name in NAMES:
        message = course.say(name)
        if name == NAMES[3]:
            message = replace(message, commitments=dict.fromkeys(message.commitments, bytes(64)))
        course.take(
            Shared(name, replace(message, signature=signer_of(name).sign(*plan.shares_statement(name, message))))
        )
    for step in tuple(EVENTS)[1:]:
        course.step(step)
    assert course.opened().disputes == tuple((name, NAMES[3]) for name in NAMES)


# Malformed uploads -----------------------------------------------------------------------------------------------------


def cut(message: Any, field: str, change: Callable[[dict[str, bytes]], Any]) -> Any:
    changed = dict(getattr(message, field))
    change(changed)
    return replace(message, **{field: changed})


def signed_shares(plan: Plan, name: str, message: KeyShares) -> KeyShares:
    return replace(message, signature=signer_of(name).sign(*plan.shares_statement(name, message)))


def refused_by_server(course: Course, events: Sequence[Any]) -> None:
    for event in events:
        state = course.state
        with pytest.raises(MaskingRefused, match=f"client '{event.client}'"):
            on(state, event)
        assert course.state is state


def test_malformed_shares_are_refused() -> None:
    course = started(TERMS, NAMES)
    plan, name, other = course.state.plan, NAMES[0], NAMES[1]
    good, others = course.say(name), course.say(other)
    bad = [
        cut(good, "sealed", lambda one: one.pop(other)),
        cut(good, "sealed", lambda one: one.update({name: one[other]})),
        cut(good, "sealed", lambda one: one.update({"stranger": one.pop(other)})),
        cut(good, "sealed", lambda one: one.update({other: one[other][:-1]})),
        cut(good, "sealed", lambda one: one.update({other: bytes(1 << 20)})),
        cut(good, "commitments", lambda one: one.pop(name)),
        cut(good, "commitments", lambda one: one.update({other: bytes(32)})),
        cut(good, "commitments", lambda one: one.update({"stranger": bytes(64)})),
        replace(good, self_commitment=bytes(31)),
    ]
    forged = [
        cut(good, "sealed", lambda one: one.update({other: bytes(len(one[other]))})),
        cut(good, "commitments", lambda one: one.update({other: bytes(64)})),
        replace(good, self_commitment=bytes(32)),
        replace(good, signature=bytes(64)),
        replace(good, signature=b""),
        replace(good, signature=others.signature),
    ]
    refused_by_server(course, [Shared(name, signed_shares(plan, name, one)) for one in bad])
    refused_by_server(course, [Shared(name, one) for one in forged])
    refused_by_server(course, [Shared(name, others)])
    course.take(Shared(name, good))


def test_malformed_inputs_are_refused() -> None:
    course = started(TERMS, NAMES)
    course.step(Step.SHARING)
    plan, name = course.state.plan, NAMES[0]
    good, others = course.say(name), course.say(NAMES[1])

    def signed(**changes: bytes) -> Masked:
        message = replace(good, **changes)
        statement = plan.input_statement(name, message, ALL)
        return Masked(name, replace(message, signature=signer_of(name).sign(*statement)))

    bad = [signed(scalars=b""), signed(scalars=good.scalars[:-1]), signed(scalars=good.scalars + bytes(8))]
    bad += [signed(digest=b""), signed(digest=bytes(33))]
    forged = [
        replace(good, scalars=bytes(24)),
        replace(good, digest=bytes(32)),
        replace(good, signature=bytes(64)),
        others,
        replace(good, signature=signer_of(name).sign(*plan.input_statement(name, good, ALL - {NAMES[9]}))),
    ]
    refused_by_server(course, [*bad, *(Masked(name, one) for one in forged)])
    course.take(Masked(name, good))
    alone = started(terms_for(10, dim=0, levels=0), NAMES)
    alone.step(Step.SHARING)
    message = replace(alone.say(name), digest=bytes(32))
    statement = alone.state.plan.input_statement(name, message, ALL)
    refused_by_server(alone, [Masked(name, replace(message, signature=signer_of(name).sign(*statement)))])


def test_malformed_confirmations_and_openings_are_refused() -> None:
    course = started(TERMS, NAMES)
    course.step(Step.SHARING, silent=NAMES[9:])
    course.step(Step.MASKING, silent=NAMES[8:9])
    name, other = NAMES[0], NAMES[1]
    good = course.say(name)
    roster = course.state.roster
    sharers, survivors = ALL - {NAMES[9]}, ALL - {NAMES[8], NAMES[9]}
    bad = [
        b"",
        bytes(64),
        signature_of(other, roster, sharers, survivors),
        signature_of(name, roster, ALL, survivors),
        signature_of(name, roster, sharers, sharers),
    ]
    refused_by_server(course, [Confirming(name, Confirm(one)) for one in bad])
    course.take(Confirming(name, good))
    for one in NAMES[1:8]:
        course.take(Confirming(one, course.say(one)))

    opening = course.say(name)
    swapped = bytes([OF_KEY]) + opening.shares[other][1:]
    both = bytes([OF_SELF]) + opening.shares[NAMES[8]][1:]
    wrong = [
        cut(opening, "shares", lambda one: one.update({other: swapped})),
        cut(opening, "shares", lambda one: one.update({NAMES[8]: both})),
        cut(opening, "shares", lambda one: one.update({other: one[other][:-1]})),
        cut(opening, "shares", lambda one: one.update({other: b""})),
        cut(opening, "shares", lambda one: one.update({NAMES[9]: one[NAMES[8]]})),
        cut(opening, "shares", lambda one: one.update({"stranger": one[other]})),
    ]
    refused_by_server(course, [Opened(name, one) for one in wrong])
    course.take(Opened(name, opening))


def test_in_a_large_sum_shares_of_who_is_no_neighbour_are_refused() -> None:
    names = names_of(300)
    terms = terms_for(300)
    plan = Plan(terms, roster_of([client_of(terms, name, []).advertise() for name in names]))
    share = bytes([OF_SELF]) + bytes(SALT + 33)
    neighbours = plan.neighbours(names[0])
    stranger = next(name for name in names[1:] if name not in neighbours)
    check_opening(plan, names[0], Opening({neighbours[0]: share}), names, names)
    with pytest.raises(MaskingRefused, match="of which it holds none"):
        check_opening(plan, names[0], Opening({stranger: share}), names, names)
