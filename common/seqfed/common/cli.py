"""The root command `seqfed`: finds its commands by the entry-point group `seqfed.commands`, so it imports neither side."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from typing import Final

import typer

from seqfed.common.errors import SeqfedError

GROUP: Final = "seqfed.commands"
ORDER: Final = (
    *("demo", "server", "client", "data"),
    *("submit", "runs", "watch", "pause", "resume", "stop", "clients", "health"),
    *("metrics", "export", "predict", "evaluate"),
)


def build() -> typer.Typer:
    """The root command with everything that the installed packages register."""
    app = typer.Typer(
        help="Federated learning for sequence models. Start with: seqfed demo",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_root)
    found = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    known = [name for name in ORDER if name in found]
    for name in (*known, *sorted(found.keys() - set(known))):
        command = found[name].load()
        if isinstance(command, typer.Typer):  # a group of commands
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"seqfed {importlib.metadata.version('seqfed')}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    pass


def main() -> None:
    """Run a command; a refusal is one line on standard error and exit status 1."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # our own one line says what gRPC's log would say in three
    try:
        build()()
    except SeqfedError as error:
        print(f"seqfed: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
