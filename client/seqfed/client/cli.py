"""The command `seqfed client`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seqfed.client.data_flags import DataTable, with_data_flags

if TYPE_CHECKING:
    from seqfed.client.session import Session


@functools.partial(with_data_flags, splitting=True)
def client(
    data: DataTable,
    config: Annotated[Path | None, typer.Argument(help="client.toml; flags win over it")] = None,
    server: Annotated[
        str | None,
        typer.Option(
            envvar="SEQFED_SERVER", help="HOST:PORT of the server, or HOST:PORT,HOST:PORT of several [127.0.0.1:7733]."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(envvar="SEQFED_NAME", help="Name within the federation [this host's name].")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(envvar="SEQFED_STATE", help="Folder for what this client keeps.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads for training [1].")] = None,
    device: Annotated[str | None, typer.Option(help="Where to train: auto, cpu or cuda [auto].")] = None,
    allow_custom: Annotated[
        list[str] | None,
        typer.Option(help="module:function whose code runs may use as their model. Again for more. [none]"),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", envvar="SEQFED_INSECURE", help="Allow plaintext off the loopback interface.")
    ] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", envvar="SEQFED_LOG_JSON", help="Log a JSON object a line instead of text.")
    ] = False,
) -> None:
    """Take part in a federation with the data in a file. The data never leave this process.

    Dials the server, waits for its tasks, trains, sends back updates; comes back by itself when the server was away.
    Ctrl-C stops it; what it was at is begun anew when it comes back. A second Ctrl-C does not wait for the batch in hand.
    What a run would see of a file: seqfed data check FILE.
    """
    import socket

    from seqfed.client import identity
    from seqfed.client.data import open_source
    from seqfed.client.session import Session
    from seqfed.client.settings import ClientSettings
    from seqfed.client.work import Workshop
    from seqfed.common import addresses
    from seqfed.common.config import load_toml, validate
    from seqfed.common.errors import ConfigError
    from seqfed.common.logs import set_up
    from seqfed.common.wire import check_client_name

    flags: dict[str, Any] = {
        "server": server,
        "name": name,
        "state": state,
        "threads": threads,
        "device": device,
        "allow_custom": allow_custom or None,
        "insecure": insecure or None,
        "log_json": log_json or None,
    }
    if config is not None:
        settings = load_toml(ClientSettings, config, flags, tables={"data": data})
    elif "file" not in data:
        raise ConfigError("which data? pass --data FILE, or a client.toml with a [data] table")
    else:
        given = {key: value for key, value in flags.items() if value is not None}
        settings = validate(ClientSettings, {**given, "data": data}, "flags")
    own_name = check_client_name(settings.name or socket.gethostname())
    for one in settings.server:
        addresses.require_private(addresses.parse(one)[0], settings.insecure)
    if settings.device == "cuda":  # now, not at the first task
        from seqfed.client.network import device_of

        device_of("cuda")
    set_up(settings.log_json)
    workshop = Workshop(
        own_name,
        open_source(settings.data),
        threads=settings.threads,
        device=settings.device,
        allow_custom=settings.allow_custom,
    )
    instance = identity.take(settings.state, own_name)
    session = Session(workshop, settings.server, instance, settings.insecure)

    take_part(session)


def take_part(session: Session) -> None:
    """Run the session until SIGTERM or Ctrl-C, which let a batch of training end; a second signal ends the process at once."""
    import asyncio
    import logging
    import os
    import signal

    from seqfed.common import loop

    async def run() -> None:
        task = asyncio.current_task()
        assert task is not None
        asked = False

        def stop() -> None:
            nonlocal asked
            if asked:
                os._exit(130)
            asked = True
            logging.getLogger("seqfed.client").info("stopping; a second signal stops at once")
            task.cancel()

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        try:
            await session.run()
        except asyncio.CancelledError:
            return

    loop.run(run())
