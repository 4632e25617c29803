"""The command `seqfed audit verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(
    state: Annotated[
        Path | None, typer.Option(envvar="SEQFED_STATE", help="The server's state folder [the user's].")
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            envvar="SEQFED_DATABASE", help="URL of the server's PostgreSQL database [SQLite in the state folder]."
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="NUMBER:DIGEST of an entry seen before, as the server logs it; shows a log that was cut off."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Check the chain of a server's audit log, in its database; the server may go on meanwhile. Status 1 if it is broken."""
    import json

    import platformdirs

    from seqfed.common import chain
    from seqfed.server import audit

    folder = state or Path(platformdirs.user_state_dir("seqfed")) / "server"
    known = None if head is None else _head(head)
    with audit.reading(folder, database) as entries:
        number, last = chain.verify(entries, known=known)
    if as_json:
        typer.echo(json.dumps({"entries": number, "head": last.hex()}))
    else:
        typer.echo(f"the audit log is whole: {number:,} entries; head {number}:{last.hex()}")


def _head(text: str) -> tuple[int, bytes]:
    from seqfed.common.errors import ConfigError

    number, _, digest = text.partition(":")
    try:
        if not number.isascii() or not number.isdecimal() or len(digest) < 16:
            raise ValueError
        return int(number), bytes.fromhex(digest)
    except ValueError:
        raise ConfigError(f"--head {text[:100]!r} is not NUMBER:DIGEST, as the server logs it at its start") from None
