"""The commands `seqfed server`, `seqfed ca` and `seqfed enroll`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from seqfed.common.identity import Role

ca = typer.Typer(
    help="""The federation's own certificates, on the machine that may say who belongs to it.

    From nothing to a federation with TLS:

    \b
      seqfed ca init
      seqfed ca issue server fed.example.org       every name or address that is dialled
      seqfed ca issue operator alice
      seqfed server --host 0.0.0.0 --tls DIR --ca DIR
      seqfed enroll token --client hospital-a      and bring that file to the hospital, where:
      seqfed client enroll --server fed.example.org --token-file hospital-a.token
    """,
    no_args_is_help=True,
    rich_markup_mode=None,
)
issue = typer.Typer(
    help="Make a key and a certificate in a credentials folder: for this machine, or to carry there by a safe way.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
ca.add_typer(issue, name="issue")
enroll = typer.Typer(
    help="Let a client into the federation without carrying its key around.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

CaFolder = Annotated[
    Path | None, typer.Option("--ca", envvar="SEQFED_CA", help="Folder of the CA [in the user's configuration].")
]
Out = Annotated[Path | None, typer.Option(help="Credentials folder to make [in the user's configuration].")]
Days = Annotated[float | None, typer.Option(min=0.001, max=3650, help="Days that it is valid [365].")]
Force = Annotated[bool, typer.Option("--force", help="Replace the key that is there.")]
UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


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
    tls: Annotated[
        Path | None,
        typer.Option(
            envvar="SEQFED_TLS", help="Credentials folder of the server, for TLS with certificates on both sides."
        ),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(envvar="SEQFED_CA", help="Folder of the CA, to enrol clients and renew certificates here."),
    ] = None,
    enroll_port: Annotated[
        int | None,
        typer.Option(envvar="SEQFED_ENROLL_PORT", help="Port to enrol at, with --ca [the one after --port]."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", envvar="SEQFED_INSECURE", help="Allow plaintext off the loopback interface.")
    ] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", envvar="SEQFED_LOG_JSON", help="Log lines as JSON objects.")
    ] = False,
) -> None:
    """Run the daemon: it queues runs, coordinates their rounds and aggregates what the clients send.

    Runs survive a restart. Stop it with Ctrl-C or SIGTERM. Anywhere but on loopback it wants --tls: see `seqfed ca --help`.
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
        "tls": tls,
        "ca": ca,
        "enroll_port": enroll_port,
        "insecure": insecure or None,
    }
    if config is not None:
        settings = load_toml(ServerSettings, config, flags)
    else:
        given = {key: value for key, value in flags.items() if value is not None}
        settings = validate(ServerSettings, given, "flags")
    set_up(log_json)
    run(serve(settings))


@ca.command("init")
def init(
    ca: CaFolder = None,
    days: Annotated[float, typer.Option(min=1, max=36_500, help="Days that the CA is valid.")] = 3650.0,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the CA that is there: all that it issued is then worth nothing.")
    ] = False,
) -> None:
    """Make the federation's CA: the key that says who belongs to it. Keep its folder to yourself, and a copy of it safe."""
    from seqfed.common import authority, identity, tokens

    folder = ca or identity.config_folder() / "ca"
    made = authority.create(folder, identity.now(), days=days, replace=force)
    print(
        f"{folder}: a CA, its key in {authority.CA_KEY} (mode 600), its certificate in {identity.CA}\n"
        f"fingerprint: {tokens.fingerprint(made.pem)}\n"
        "next: seqfed ca issue server NAME..., with every DNS name and IP address under which the server is dialled"
    )


@issue.command("server")
def issue_server(
    hosts: Annotated[list[str], typer.Argument(help="DNS names and IP addresses.", metavar="NAME...")],
    ca: CaFolder = None,
    out: Out = None,
    days: Days = None,
    force: Force = False,
) -> None:
    """The server's, for every name and address under which it is dialled. A running server takes the new one by itself."""
    from seqfed.common.authority import server_name
    from seqfed.common.identity import Role, config_folder

    folder = out or config_folder() / "server"
    where = _issue(Role.SERVER, server_name(tuple(hosts)), ca, folder, days, force, tuple(hosts))
    print(
        f"next: seqfed ca issue operator NAME, for who submits runs; and\n"
        f"      seqfed server --host 0.0.0.0 --tls {folder} --ca {where}"
    )


@issue.command("operator")
def issue_operator(
    name: Annotated[str, typer.Argument(help="Who it is.")],
    ca: CaFolder = None,
    out: Out = None,
    days: Days = None,
    force: Force = False,
) -> None:
    """An operator's: who may submit, stop and export runs, and revoke clients."""
    from seqfed.common.identity import Role, config_folder

    folder = out or config_folder() / "operator"
    _issue(Role.OPERATOR, name, ca, folder, days, force)
    _say_use(folder, out is None)


@issue.command("viewer")
def issue_viewer(
    name: Annotated[str, typer.Argument(help="Who it is.")],
    ca: CaFolder = None,
    out: Out = None,
    days: Days = None,
    force: Force = False,
) -> None:
    """A viewer's: who may see runs and clients, and change nothing."""
    from seqfed.common.identity import Role, config_folder

    folder = out or config_folder() / "viewer"
    _issue(Role.VIEWER, name, ca, folder, days, force)
    _say_use(folder, False)


@issue.command("client")
def issue_client(
    name: Annotated[str, typer.Argument(help="Its name within the federation.")],
    ca: CaFolder = None,
    out: Annotated[
        Path | None, typer.Option(help="Credentials folder to make [in the state folder of the client of this name].")
    ] = None,
    days: Annotated[float | None, typer.Option(min=0.001, max=3650, help="Days that it is valid [90].")] = None,
    force: Force = False,
) -> None:
    """A client's, where CA and client are one machine's; elsewhere enrol it: its key then never leaves it."""
    from seqfed.common.identity import CREDENTIALS, Role, client_folder

    folder = out or client_folder(None, name) / CREDENTIALS
    _issue(Role.CLIENT, name, ca, folder, days, force)
    print(f"next: seqfed client --name {name} --credentials {folder} --server HOST:PORT --data FILE")


def _issue(
    role: Role,
    name: str,
    ca: Path | None,
    out: Path,
    days: float | None,
    force: bool,
    hosts: tuple[str, ...] = (),
) -> Path:
    """Make the folder and say so; the CA's folder."""
    from seqfed.common import authority, identity
    from seqfed.common.errors import ConfigError

    where = ca or identity.config_folder() / "ca"
    found = authority.load(where)
    if (out / identity.KEY).exists() and not force:
        raise ConfigError(f"{out} has a key already; name another folder with --out, or pass --force to replace it")
    made = found.credentials(role, name, now=identity.now(), days=days, hosts=hosts)
    identity.save_credentials(out, made, replace=force)
    whose = identity.identity_of(made.certificate)
    print(f"{out}: the credentials of {whose}, valid until {identity.day(whose.not_after)}")
    return where


def _say_use(folder: Path, found_by_itself: bool) -> None:
    how = "seqfed runs --server HOST:PORT" + ("" if found_by_itself else f" --credentials {folder}")
    print(f"next: {how}")


@enroll.command("token")
def token(
    client: Annotated[str, typer.Option(help="The client's name within the federation.")],
    ca: CaFolder = None,
    valid: Annotated[str, typer.Option(help="For how long: 90s, 30m, 24h, 7d.")] = "24h",
    out: Annotated[
        Path | None, typer.Option(help="File to make [NAME.token]; - for the standard output.", metavar="FILE")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that is there.")] = False,
) -> None:
    """Make a token file, with which one client gets its certificate, once.

    Whoever has the file before the client can take its place, so bring it there by a way that you trust.
    """
    from seqfed.common import authority, identity, tokens

    seconds = _seconds(valid)
    made = authority.load(ca or identity.config_folder() / "ca")
    found = tokens.new(client, made.pem, identity.now(), seconds)
    content = tokens.to_file(tokens.sign(found, made.key), made.pem)
    if out == Path("-"):
        print(content.decode(), end="")
        return
    file = out or Path(f"{client}.token")
    identity.write_private(file, content, replace=force)
    print(
        f"{file}: for one enrolment of client '{client}', within {valid}\n"
        f"next, where its data are: seqfed client enroll --server HOST:PORT --token-file {file.name}"
    )


def _seconds(text: str) -> float:
    """'24h' as seconds; raises ConfigError.

    >>> _seconds("24h"), _seconds("1.5d")
    (86400.0, 129600.0)
    """
    from seqfed.common.errors import ConfigError

    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)([smhd])", text)
    seconds = float(found[1]) * UNITS[found[2]] if found else 0.0
    if not 0 < seconds <= 366 * UNITS["d"]:
        raise ConfigError(f"--valid {text!r}: a number and s, m, h or d, up to 366d (examples: 90s, 24h)")
    return seconds
