"""Who is connected: sessions, the tasks pushed to them, and the news of their coming and going."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from seqfed.common.errors import NameTaken, Overloaded, UnknownSession
from seqfed.common.schema import DataSchema
from seqfed.common.views import Task, TaskKey


@dataclass(eq=False)
class Connection:
    """One client's session, from its Join to its end."""

    client: str
    instance: str
    software: str
    schema: DataSchema
    session: str
    since: float  # seconds since the epoch
    working: TaskKey | None = None  # what it was at when it joined
    tasks: asyncio.Queue[Task | None] = field(default_factory=asyncio.Queue)  # None ends the stream
    listening: bool = False
    holds: bytes = b""  # the digest of the model that was last pushed whole
    task: Task | None = None  # the last one pushed and not yet answered


class Hub:
    """The connected clients by name. `on_change(arrived, left)` hears of each that begins or ceases to listen."""

    def __init__(self, max_clients: int, on_change: Callable[[str | None, str | None], None]) -> None:
        self._max_clients = max_clients
        self._on_change = on_change
        self._by_name: dict[str, Connection] = {}
        self._by_session: dict[str, Connection] = {}
        self.changes = 0  # how often somebody has begun or ceased to listen

    def join(
        self,
        client: str,
        instance: str,
        software: str,
        schema: DataSchema,
        now: float,
        working: TaskKey | None = None,
    ) -> Connection:
        """A new session. The same instance takes the place of its own earlier one, whose stream then ends.

        Raises NameTaken if another instance is connected under this name, Overloaded if there is no room.
        """
        old = self._by_name.get(client)
        if old is not None and old.listening and old.instance != instance:
            raise NameTaken(
                f"another client is connected as '{client}'; give this one another --name, or stop the other one"
            )
        if old is None and len(self._by_name) >= self._max_clients:
            self._forget_idle()
        if old is None and len(self._by_name) >= self._max_clients:
            raise Overloaded(f"{len(self._by_name):,} clients are connected, the limit (max_clients); try again later")
        connection = Connection(client, instance, software, schema, secrets.token_hex(16), now, working)
        if old is not None:
            self._by_session.pop(old.session, None)
            old.tasks.put_nowait(None)
        self._by_name[client] = connection
        self._by_session[connection.session] = connection
        return connection

    def _forget_idle(self) -> None:
        """Make room: the oldest that has joined and does not listen loses its session; it can join again."""
        idle = next((one for one in self._by_name.values() if not one.listening), None)
        if idle is not None:
            del self._by_name[idle.client]
            del self._by_session[idle.session]

    def dismiss(self, client: str) -> None:
        """End the client's session; it may join again."""
        connection = self._by_name.get(client)
        if connection is not None:
            self._by_session.pop(connection.session, None)
            if connection.listening:
                connection.tasks.put_nowait(None)  # its stream then ends, and is missed
            else:
                del self._by_name[client]

    def connection(self, session: str) -> Connection:
        """The session's connection; raises UnknownSession."""
        try:
            return self._by_session[session]
        except KeyError:
            raise UnknownSession("this session is not known here (any more); join again") from None

    def get(self, client: str) -> Connection | None:
        """The connection of a client that listens, if it does."""
        connection = self._by_name.get(client)
        return connection if connection is not None and connection.listening else None

    def connected(self) -> list[Connection]:
        """All that listen, by name."""
        return [one for _, one in sorted(self._by_name.items()) if one.listening]

    async def listen(self, session: str) -> AsyncGenerator[Task, None]:
        """The tasks of this session as they come, until it is replaced or the caller stops listening."""
        connection = self.connection(session)
        if connection.listening:  # another stream of the same session takes the first one's place
            connection.tasks.put_nowait(None)
            connection.tasks = asyncio.Queue()
        tasks = connection.tasks
        connection.listening = True
        self.changes += 1
        self._on_change(connection.client, None)
        try:
            while (task := await tasks.get()) is not None:
                yield task
        finally:
            if connection.tasks is tasks:
                self._ended(connection)

    def _ended(self, connection: Connection) -> None:
        connection.listening = False
        self.changes += 1
        successor = self._by_name.get(connection.client)
        if successor is connection:
            del self._by_name[connection.client]
            self._by_session.pop(connection.session, None)
        if successor is connection or successor is None or not successor.listening:
            self._on_change(None, connection.client)

    def push(self, client: str, task: Task) -> None:
        """Send a task to a client; to one that is away nothing, since it is asked when it comes back."""
        connection = self.get(client)
        if connection is not None:
            connection.task = task
            connection.tasks.put_nowait(task)

    def done(self, client: str) -> None:
        """The client has answered its task."""
        connection = self._by_name.get(client)
        if connection is not None:
            connection.task = None

    def close(self) -> None:
        """End every stream."""
        for connection in self._by_session.values():
            connection.tasks.put_nowait(None)
