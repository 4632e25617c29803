"""The commands `seqfed client`, `seqfed client enroll` and `seqfed client key`."""

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
    policy: Annotated[
        Path | None,
        typer.Option(envvar="SEQFED_POLICY", help="policy.toml: which runs may have what of this client [any, all]."),
    ] = None,
    credentials: Annotated[
        Path | None,
        typer.Option(envvar="SEQFED_CREDENTIALS", help="Folder that `client enroll` made [credentials in --state]."),
    ] = None,
    peers: Annotated[
        Path | None,
        typer.Option(
            envvar="SEQFED_PEERS", help="peers.toml: the other clients' masking keys [those with certificates]."
        ),
    ] = None,
    homomorphic_key: Annotated[
        Path | None,
        typer.Option(
            envvar="SEQFED_HOMOMORPHIC_KEY", help="The clients' CKKS key (seqfed client key --homomorphic FILE) [none]."
        ),
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
    import functools
    import socket

    from seqfed.client import identity
    from seqfed.client.channel import connected
    from seqfed.client.consent import consent_of
    from seqfed.client.data import open_source
    from seqfed.client.enroll import Renewal, in_use
    from seqfed.client.masking import masking_of
    from seqfed.client.packing import Packer
    from seqfed.client.session import Session
    from seqfed.client.settings import ClientSettings
    from seqfed.client.work import Workshop
    from seqfed.common import addresses
    from seqfed.common.config import load_toml, validate
    from seqfed.common.errors import ConfigError
    from seqfed.common.identity import CREDENTIALS, client_folder
    from seqfed.common.logs import set_up
    from seqfed.common.wire import check_client_name

    flags: dict[str, Any] = {
        "server": server,
        "name": name,
        "state": state,
        "threads": threads,
        "device": device,
        "allow_custom": allow_custom or None,
        "policy": policy,
        "credentials": credentials,
        "peers": peers,
        "homomorphic_key": homomorphic_key,
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
    folder = in_use(settings.credentials, settings.insecure, client_folder(settings.state, own_name) / CREDENTIALS)
    if folder is not None:
        own_name = _name_in(folder, settings.name)
    for one in settings.server:
        host, _ = addresses.parse(one)
        if folder is None:
            addresses.require_private(host, settings.insecure)
    if settings.device == "cuda":  # now, not at the first task
        from seqfed.client.network import device_of

        device_of("cuda")
    set_up(settings.log_json)
    state_folder = client_folder(settings.state, own_name)
    named = ", ".join(Path(one).name for one in settings.data.file)
    consent = consent_of(settings.policy, state_folder, folder, settings.allow_custom, data=named)
    workshop = Workshop(
        own_name,
        open_source(settings.data),
        threads=settings.threads,
        device=settings.device,
        allow_custom=consent.custom,
    )
    instance = identity.take(settings.state, own_name)
    masking = masking_of(
        own_name, state_folder, folder, settings.peers, consent.policy.min_cohort, settings.homomorphic_key
    )
    session = Session(
        workshop,
        settings.server,
        instance,
        settings.insecure,
        dial=functools.partial(connected, credentials=folder),
        renewal=None if folder is None else Renewal(folder),
        consent=consent,
        masking=masking,
        packer=Packer(state_folder / "residuals"),
    )
    take_part(session)


def _name_in(folder: Path, wanted: str | None) -> str:
    """The name in the client's certificate; raises ConfigError if another is wanted or the certificate is not a client's."""
    from seqfed.client.channel import own
    from seqfed.common.errors import ConfigError
    from seqfed.common.identity import Role

    _, whose = own(folder)
    if whose.role is not Role.CLIENT:
        raise ConfigError(f"{folder} has the certificate of {whose}, and not a client's")
    if wanted is not None and wanted != whose.name:
        raise ConfigError(f"{folder} has the certificate of client '{whose.name}'; pass --name {whose.name}, or none")
    return whose.name


def enroll(
    token_file: Annotated[Path, typer.Option(help="What `seqfed enroll token` made.", metavar="FILE")],
    server: Annotated[str, typer.Option(envvar="SEQFED_SERVER", help="HOST:PORT of the server.")] = "127.0.0.1:7733",
    enroll_port: Annotated[
        int | None, typer.Option(min=1, max=65_535, help="The server's port to enrol at [the one after PORT].")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(envvar="SEQFED_STATE", help="The client's state folder, as for `seqfed client`.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="With a new key, in place of the key and certificate that are there.")
    ] = False,
) -> None:
    """Get this data holder's certificate, with a token file from the federation's operator. Its key is made here and stays here.

    Trusts no server but that of the federation that made the token. The certificate then renews itself.
    """
    import asyncio

    from seqfed.client.enroll import counter, load_token
    from seqfed.client.enroll import enroll as enrolling
    from seqfed.common.identity import CREDENTIALS, client_folder, day

    token, text, ca = load_token(token_file)
    folder = client_folder(state, token.client) / CREDENTIALS
    address = counter(server.partition(",")[0], enroll_port)
    whose = asyncio.run(enrolling(address, text, ca, token.client, folder, replace=force))
    print(
        f"{folder}: the credentials of {whose}, valid until {day(whose.not_after)}, renewed before\n"
        f"{token_file} is used up; delete it\n"
        f"next: seqfed client --name {whose.name} --server {server} --data FILE"
        + ("" if state is None else f" --state {state}")
    )


def key(
    name: Annotated[
        str | None, typer.Option(envvar="SEQFED_NAME", help="Name within the federation [this host's name].")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(envvar="SEQFED_STATE", help="The client's state folder, as for `seqfed client`.")
    ] = None,
    homomorphic: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Make instead the CKKS key that all clients share (privacy.homomorphic), or show FILE's.",
        ),
    ] = None,
) -> None:
    """Print this client's line in the other clients' peers.toml: its name and its masking key's public half.

    The key is made at first, in the state folder. With its peers listed, a client believes no server about who they are.
    """
    import socket

    if homomorphic is not None:
        _shared_key(homomorphic)
        return

    from seqfed.client.enroll import in_use
    from seqfed.client.masking import line, own_key
    from seqfed.common.identity import CREDENTIALS, client_folder
    from seqfed.common.wire import check_client_name

    own_name = check_client_name(name or socket.gethostname())
    folder = in_use(None, False, client_folder(state, own_name) / CREDENTIALS)
    if folder is not None:
        own_name = _name_in(folder, name)
    print(line(own_name, own_key(client_folder(state, own_name)).public))


def _shared_key(path: Path) -> None:
    from seqfed.client.ckks import load_key, make_key

    made = not path.exists()
    shared = (make_key if made else load_key)(path)
    print(f"{path}: the CKKS key {shared.digest.hex()[:16]}{', made now' if made else ''}")
    if made:
        print(
            "whoever has it and the server's traffic reads every client: carry it to the other clients by a way on which "
            "the server is not, and keep it from all others\n"
            'next, at each client: seqfed client --homomorphic-key FILE, or homomorphic_key = "FILE" in client.toml'
        )


def take_part(session: Session) -> None:
    """Run the session until SIGTERM or Ctrl-C, which let a batch of training end; a second signal ends the process at once."""
    import asyncio
    import logging

    from seqfed.common import loop

    async def run() -> None:
        task = asyncio.current_task()
        assert task is not None

        def stop() -> None:
            logging.getLogger("seqfed.client").info("stopping; a second signal stops at once")
            task.cancel()

        loop.on_first_signal(stop)
        try:
            await session.run()
        except asyncio.CancelledError:
            return

    loop.run(run())
