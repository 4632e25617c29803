"""The command `seqfed server`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def server(
    context: typer.Context,
    config: Annotated[Path | None, typer.Argument(help="server.toml; flags win over it")] = None,
    host: Annotated[str | None, typer.Option(envvar="SEQFED_HOST", help="Address to listen on [127.0.0.1].")] = None,
    port: Annotated[
        int | None, typer.Option(envvar="SEQFED_PORT", help="Port to listen on; 0 picks a free one [7733].")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(envvar="SEQFED_STATE", help="Folder for the database and models.")
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(envvar="SEQFED_DATABASE", help="URL of a PostgreSQL database [SQLite in the state folder]."),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(envvar="SEQFED_MODELS", help="URL of a filesystem (fsspec) that gets a copy of every model."),
    ] = None,
    standby: Annotated[
        bool,
        typer.Option(
            "--standby", envvar="SEQFED_STANDBY", help="Wait while another server has the database; then take over."
        ),
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", envvar="SEQFED_INSECURE", help="Allow plaintext off the loopback interface.")
    ] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", envvar="SEQFED_LOG_JSON", help="Log lines as JSON objects.")
    ] = False,
) -> None:
    """Run the daemon: it queues runs, coordinates their rounds and aggregates what the clients send.

    Runs survive a restart. Stop it with Ctrl-C or SIGTERM.
    """
    from seqfed.common.config import load_toml, validate
    from seqfed.common.errors import ConfigError
    from seqfed.common.logs import set_up
    from seqfed.common.loop import run
    from seqfed.server.daemon import serve
    from seqfed.server.settings import ServerSettings
    from seqfed.server.urls import has_password, hidden

    for name, value in (("database", database), ("models", models)):
        if (
            value is not None
            and has_password(value)
            and str(context.get_parameter_source(name)).endswith("COMMANDLINE")
        ):
            raise ConfigError(
                f"--{name} {hidden(value)}: everybody on this machine can read a password in a command line; put the URL "
                f"into SEQFED_{name.upper()} or server.toml"
                + (" or the password into PGPASSFILE" if name == "database" else "")
            )
    flags = {
        "host": host,
        "port": port,
        "state": state,
        "database": database,
        "models": models,
        "standby": standby or None,
        "insecure": insecure or None,
    }
    if config is not None:
        settings = load_toml(ServerSettings, config, flags)
    else:
        given = {key: value for key, value in flags.items() if value is not None}
        settings = validate(ServerSettings, given, "flags")
    set_up(log_json)
    run(serve(settings))
