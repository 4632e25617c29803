"""The command `seqfed client`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def client(
    config: Annotated[Path | None, typer.Argument(help="client.toml; flags win over it")] = None,
    server: Annotated[
        str | None, typer.Option(envvar="SEQFED_SERVER", help="HOST:PORT of the server [127.0.0.1:7733].")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="NPZ with x (N, T, F), y (N,) and perhaps lengths (N,); or CSV with a header line."),
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(help="File of the same kind to score models on; never trained on.")
    ] = None,
    validation_fraction: Annotated[
        float | None, typer.Option(help="Share of --data held out when there is no --validation [0.2].")
    ] = None,
    label: Annotated[str | None, typer.Option(help="CSV: the label's column.")] = None,
    columns: Annotated[str | None, typer.Option(help="CSV: feature columns, comma-separated [all others].")] = None,
    group: Annotated[str | None, typer.Option(help="CSV: the column that tells entities apart.")] = None,
    window: Annotated[int | None, typer.Option(help="CSV: rows in a sequence.")] = None,
    stride: Annotated[int | None, typer.Option(help="CSV: rows from one window's start to the next's [1].")] = None,
    name: Annotated[
        str | None, typer.Option(envvar="SEQFED_NAME", help="Name within the federation [this host's name].")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(envvar="SEQFED_STATE", help="Folder for what this client keeps.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads for training [1].")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", envvar="SEQFED_INSECURE", help="Allow plaintext off the loopback interface.")
    ] = False,
) -> None:
    """Take part in a federation with the data in a file. The data never leave this process.

    Dials the server, waits for its tasks, trains, sends back updates; comes back by itself when the server was away.
    """
    import asyncio
    import signal
    import socket

    from seqfed.client import identity
    from seqfed.client.data import load
    from seqfed.client.session import Session
    from seqfed.client.settings import ClientSettings
    from seqfed.client.work import Workshop
    from seqfed.common import addresses, loop
    from seqfed.common.config import load_toml, validate
    from seqfed.common.errors import ConfigError
    from seqfed.common.logs import set_up
    from seqfed.common.wire import check_client_name

    flags: dict[str, Any] = {
        "server": server,
        "name": name,
        "state": state,
        "threads": threads,
        "insecure": insecure or None,
    }
    table: dict[str, Any] = {
        "file": data,
        "validation": validation,
        "validation_fraction": validation_fraction,
        "label": label,
        "columns": columns.split(",") if columns is not None else None,
        "group": group,
        "window": window,
        "stride": stride,
    }
    table = {key: value for key, value in table.items() if value is not None}
    if config is not None:
        settings = load_toml(ClientSettings, config, flags, tables={"data": table})
    elif "file" not in table:
        raise ConfigError("which data? pass --data FILE, or a client.toml with a [data] table")
    else:
        given = {key: value for key, value in flags.items() if value is not None}
        settings = validate(ClientSettings, {**given, "data": table}, "flags")
    own_name = check_client_name(settings.name or socket.gethostname())
    addresses.require_private(addresses.parse(settings.server)[0], settings.insecure)
    set_up()
    workshop = Workshop(own_name, load(settings.data), settings.threads)
    instance = identity.take(settings.state, own_name)
    session = Session(workshop, settings.server, instance, settings.insecure)

    async def run() -> None:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        try:
            await session.run()
        except asyncio.CancelledError:
            return

    loop.run(run())
