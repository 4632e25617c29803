"""Who is connected: names, instances, sessions, and the news of coming and going."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.server.conftest import make_spec, soon, turns_until

from seqfed.common.errors import NameTaken, Overloaded, UnknownSession
from seqfed.common.model import layout_of
from seqfed.common.schema import DataSchema
from seqfed.common.views import ModelVersion, Task, TaskKey, TaskKind
from seqfed.server.hub import Connection, Hub

SCHEMA = DataSchema(features=2, steps=5, classes=2, examples=10)


def a_task(number: int) -> Task:
    spec = make_spec()
    layout = layout_of(spec)
    return Task(TaskKind.TRAIN, TaskKey("0" * 16, number, 1), spec, ModelVersion(0, layout.nbytes, b"", layout.digest))


@dataclass
class House:
    """A hub, what it has told, and the streams that listen to it."""

    hub: Hub
    news: list[tuple[str | None, str | None]]
    streams: list[asyncio.Task[None]] = field(default_factory=list)
    got: dict[str, list[Task]] = field(default_factory=dict)

    def join(self, client: str, instance: str = "1" * 32) -> Connection:
        return self.hub.join(client, instance, "test", SCHEMA, 0.0)

    async def listen(self, connection: Connection) -> asyncio.Task[None]:
        async def stream() -> None:
            async for task in self.hub.listen(connection.session):
                self.got.setdefault(connection.session, []).append(task)

        told = len(self.news)
        work = asyncio.create_task(stream())
        await turns_until(lambda: len(self.news) > told)
        return work


def a_house(max_clients: int = 10) -> House:
    news: list[tuple[str | None, str | None]] = []
    return House(Hub(max_clients, lambda arrived, left: news.append((arrived, left))), news)


async def ended(stream: asyncio.Future[Any]) -> None:
    stream.cancel()
    await asyncio.wait([stream])


async def test_coming_and_going_is_told_once() -> None:
    house = a_house()
    connection = house.join("a")
    assert house.news == []  # not before it listens
    assert house.hub.get("a") is None
    stream = await house.listen(connection)
    assert house.news == [("a", None)]
    assert house.hub.get("a") is connection
    assert house.hub.connected() == [connection]
    await ended(stream)
    assert house.news == [("a", None), (None, "a")]
    assert house.hub.connected() == []
    with pytest.raises(UnknownSession):
        house.hub.connection(connection.session)


async def test_a_session_nobody_has_is_unknown() -> None:
    house = a_house()
    with pytest.raises(UnknownSession, match="join again"):
        house.hub.connection("0" * 32)
    with pytest.raises(UnknownSession):
        await anext(house.hub.listen("0" * 32))


async def test_sessions_are_not_to_be_guessed() -> None:
    house = a_house(200)
    sessions = {house.join(f"site-{number}").session for number in range(100)}
    assert len(sessions) == 100
    assert {len(session) for session in sessions} == {32}


async def test_the_name_of_a_listening_client_is_taken() -> None:
    house = a_house()
    stream = await house.listen(house.join("a"))
    with pytest.raises(NameTaken, match="another client is connected as 'a'"):
        house.join("a", "2" * 32)
    assert house.hub.get("a") is not None
    await ended(stream)
    assert house.join("a", "2" * 32).instance == "2" * 32


async def test_the_name_of_a_client_that_never_listened_is_free() -> None:
    house = a_house()
    first = house.join("a")
    second = house.join("a", "2" * 32)
    assert house.hub.connection(second.session) is second
    with pytest.raises(UnknownSession):
        house.hub.connection(first.session)


async def test_the_same_instance_takes_its_own_place() -> None:
    house = a_house()
    first = house.join("a")
    old = await house.listen(first)
    second = house.join("a")
    new = await house.listen(second)
    await soon(old)  # its stream has ended by itself
    assert house.hub.get("a") is second
    assert house.news == [("a", None), (None, "a"), ("a", None)]
    with pytest.raises(UnknownSession):
        house.hub.connection(first.session)
    await ended(new)
    assert house.news[3:] == [(None, "a")]


async def test_whoever_listens_anew_before_its_old_stream_has_ended_has_not_left() -> None:
    house = a_house()
    old = asyncio.ensure_future(anext(house.hub.listen(house.join("a").session), None))
    await turns_until(lambda: house.news == [("a", None)])
    second = house.join("a")
    new = asyncio.ensure_future(anext(house.hub.listen(second.session), None))
    second.listening = True  # its call begins in the same turn of the loop
    assert await soon(old) is None
    await turns_until(lambda: len(house.news) == 2)
    assert house.news == [("a", None), ("a", None)]
    await ended(new)


async def test_an_instance_that_joins_again_without_listening_has_left() -> None:
    house = a_house()
    old = await house.listen(house.join("a"))
    second = house.join("a")
    await soon(old)
    assert house.news == [("a", None), (None, "a")]
    await ended(await house.listen(second))
    assert house.news[2:] == [("a", None), (None, "a")]


async def test_tasks_go_to_whom_they_are_for_in_order() -> None:
    house = a_house()
    connections = [house.join("a"), house.join("b")]
    streams = [await house.listen(one) for one in connections]
    for number in (1, 2):
        house.hub.push("a", a_task(number))
    house.hub.push("b", a_task(3))
    house.hub.push("nobody", a_task(4))
    assert connections[0].task is not None
    assert connections[0].task.key.round == 2
    house.hub.done("a")
    house.hub.done("nobody")
    assert [one.task is None for one in connections] == [True, False]
    house.hub.close()
    for stream in streams:
        await soon(stream)  # every stream ends, after what was pushed before
    assert [[task.key.round for task in house.got[one.session]] for one in connections] == [[1, 2], [3]]


async def test_no_task_is_kept_for_one_that_is_away() -> None:
    house = a_house()
    connection = house.join("a")
    house.hub.push("a", a_task(1))
    assert connection.tasks.empty()


async def test_more_clients_than_the_limit_are_refused() -> None:
    house = a_house(2)
    streams = [await house.listen(house.join(name)) for name in "ab"]
    with pytest.raises(Overloaded, match=r"2 clients are connected, the limit \(max_clients\)"):
        house.join("c")
    again = house.join("a")  # one that is counted already
    await soon(streams[0])
    await ended(streams[1])
    house.join("c")
    assert house.hub.connection(again.session) is again


async def test_clients_that_never_listen_do_not_use_up_the_room() -> None:
    house = a_house(2)
    stream = await house.listen(house.join("a"))
    idle = [house.join(f"idle-{number}") for number in range(5)]
    fresh = house.join("b")
    assert house.hub.connection(fresh.session) is fresh
    for one in idle:
        with pytest.raises(UnknownSession):
            house.hub.connection(one.session)
    await ended(stream)
