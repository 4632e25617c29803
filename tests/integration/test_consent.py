"""Data holders' rules over TLS: an operator signs, the server passes it on, each client judges, and the operator is told."""

from __future__ import annotations

import asyncio
import functools
import json
import random
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from tests.integration.light import Formula, replayed
from tests.integration.test_tls import Place, a_server, running

from seqfed.client.admin import Operator, operating
from seqfed.client.channel import connected
from seqfed.client.consent import Consent
from seqfed.client.policy import Policy
from seqfed.client.session import Session
from seqfed.client.work import Workshop
from seqfed.common import checkpoint, identity, views
from seqfed.common.config import validate_json
from seqfed.common.identity import Role
from seqfed.common.model import layout_of
from seqfed.common.spec import RunSpec

T = TypeVar("T")


def spec_of(**changes: Any) -> RunSpec:
    return RunSpec.model_validate(
        {
            "rounds": 3,
            "data": {"features": 2, "classes": 2},
            "model": {"kind": "rnn", "hidden": 4, "layers": 1},
            "cohort": {"min_clients": 2, "deadline_s": 600},
            "evaluation": {"every": 1},
            **changes,
        }
    )


def client(place: Place, address: str, formula: Formula, policy: Policy | None) -> Session:
    folder = place.credentials(Role.CLIENT, formula.client)
    found = identity.load_credentials(folder)
    return Session(
        cast(Workshop, formula),
        (address,),
        formula.client.encode().hex().ljust(32, "0"),
        insecure=False,
        dial=functools.partial(connected, credentials=folder),
        rng=random.Random(1),  # noqa: S311 - not a secret
        consent=Consent(policy, folder, found.ca),
    )


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place.at(tmp_path)


async def soon(work: Awaitable[T]) -> T:
    return await asyncio.wait_for(work, 30.0)


async def until(calls: Operator, run: str, *phases: str) -> tuple[views.RunView, list[views.RoundRecord]]:
    """The first view in one of these phases, and all rounds that were finished before."""
    records: list[views.RoundRecord] = []

    async def look(watched: AsyncIterator[views.RunView]) -> views.RunView:
        async for view in watched:
            records.extend(view.history)
            if view.phase in phases:
                return view
        raise AssertionError("the run ended")

    return await soon(look(calls.watch(run))), records


async def test_a_run_goes_on_without_those_who_decline_it(place: Place, tmp_path: Path) -> None:
    alice = place.credentials(Role.OPERATOR, "alice")
    formulas = {name: Formula(name) for name in "abc"}
    policies = {"a": None, "b": Policy(operators=("alice",), max_rounds=3, min_cohort=2), "c": Policy(max_rounds=2)}
    async with a_server(place) as server:
        sessions = [client(place, server.address, formulas[name], policies[name]) for name in "abc"]
        async with running(*sessions), operating(server.address, False, alice) as calls:
            while len([one for one in await calls.clients() if one.connected]) < 3:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.05)
            spec = spec_of()
            run = (await calls.submit(spec, None)).run
            last, records = await until(calls, run, "finished")
            assert {name for one in records for name in one.folded} == {"a", "b"}
            assert all(one.evaluated_clients == 2 for one in records)
            await calls.export(run, tmp_path / "model.safetensors")
    assert formulas["c"].trained == []
    assert [number for number, _ in formulas["b"].trained] == [1, 2, 3]
    assert last.reason == "all 3 rounds are done"
    flat = checkpoint.load(tmp_path / "model.safetensors", layout_of(spec)).flat
    assert (flat == replayed(spec, records)).all()


async def test_where_too_many_decline_the_operator_reads_each_rule(place: Place) -> None:
    bob = place.credentials(Role.OPERATOR, "bob")
    formulas = {name: Formula(name) for name in "ab"}
    policies = {"a": Policy(operators=("alice",)), "b": Policy(max_epochs=1, min_cohort=5)}
    async with a_server(place) as server:
        sessions = [client(place, server.address, formulas[name], policies[name]) for name in "ab"]
        async with running(*sessions), operating(server.address, False, bob) as calls:
            run = (await calls.submit(spec_of(training={"epochs": 4}), None)).run
            view, _ = await until(calls, run, "paused")
    assert "a declines: PolicyRefused: operators: the run is of 'bob', and allowed are alice" in view.reason or (
        "b declines: PolicyRefused: max_epochs: 4 epochs a round, and the limit is 1; min_cohort: as few as 2"
        in view.reason
    )
    assert formulas["a"].trained == []
    assert formulas["b"].trained == []


async def test_a_run_that_an_older_version_signed_goes_on_after_an_upgrade(place: Place) -> None:
    content = json.loads(spec_of().canonical)
    del content["privacy"]  # which has come since, with a default
    old = validate_json(RunSpec, json.dumps(content).encode(), "test")
    formulas = {name: Formula(name) for name in "ab"}
    alice = place.credentials(Role.OPERATOR, "alice")
    async with a_server(place) as server, operating(server.address, False, alice) as calls:
        run = (await calls.submit(old, None)).run
    policy = Policy(operators=("alice",))
    async with a_server(place) as server:
        sessions = [client(place, server.address, formulas[name], policy) for name in "ab"]
        async with running(*sessions), operating(server.address, False, alice) as calls:
            last, _ = await until(calls, run, "finished")
    assert last.spec.canonical == old.canonical
    assert [number for number, _ in formulas["a"].trained] == [1, 2, 3]


async def test_what_was_spent_outlives_a_client_and_a_run(place: Place) -> None:
    alice = place.credentials(Role.OPERATOR, "alice")
    policy = Policy(max_rounds_total=4)
    async with a_server(place) as server, operating(server.address, False, alice) as calls:
        first = client(place, server.address, Formula("a"), policy)
        assert first._consent is not None
        consent = first._consent
        async with running(first, client(place, server.address, Formula("b"), None)):
            run = (await calls.submit(spec_of(), None)).run
            await until(calls, run, "finished")
        again = client(place, server.address, Formula("a"), policy)
        again._consent = Consent(policy, consent._account.path.parent, consent._ca)
        async with running(again, client(place, server.address, Formula("b"), None)):
            run = (await calls.submit(spec_of(), None)).run
            view, _ = await until(calls, run, "paused")
            assert view.round == 2
            assert (
                "a declines: PolicyRefused: max_rounds_total: 5 rounds in all runs together, and the limit is 4"
                in view.reason
            )
