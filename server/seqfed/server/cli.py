"""The command `seqfed server`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def server(
    config: Annotated[Path | None, typer.Argument(help="server.toml; flags win over it")] = None,
    host: Annotated[str | None, typer.Option(envvar="SEQFED_HOST", help="Address to listen on [127.0.0.1].")] = None,
    port: Annotated[
        int | None, typer.Option(envvar="SEQFED_PORT", help="Port to listen on; 0 picks a free one [7733].")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(envvar="SEQFED_STATE", help="Folder for the database and models.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", envvar="SEQFED_INSECURE", help="Allow plaintext off the loopback interface.")
    ] = False,
) -> None:
    """Run the daemon: it queues runs, coordinates their rounds and aggregates what the clients send.

    Runs survive a restart. Stop it with Ctrl-C or SIGTERM.
    """
    from seqfed.common.config import load_toml, validate
    from seqfed.common.logs import set_up
    from seqfed.common.loop import run
    from seqfed.server.daemon import serve
    from seqfed.server.settings import ServerSettings

    flags = {"host": host, "port": port, "state": state, "insecure": insecure or None}
    if config is not None:
        settings = load_toml(ServerSettings, config, flags)
    else:
        given = {key: value for key, value in flags.items() if value is not None}
        settings = validate(ServerSettings, given, "flags")
    set_up()
    run(serve(settings))
