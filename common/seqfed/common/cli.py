"""The root command `seqfed`: finds its commands by the entry-point group `seqfed.commands`, so it imports neither side.

A command whose entry point is `NAME.SUB` is run by `seqfed NAME SUB ...`; NAME alone stays the command that it is.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import typer
from typer.core import TyperCommand, TyperGroup

from seqfed.common.errors import SeqfedError

GROUP: Final = "seqfed.commands"
ORDER: Final = (
    *("demo", "server", "client", "data", "policy"),
    *("ca", "enroll"),
    *("submit", "runs", "watch", "pause", "resume", "stop", "clients", "health"),
    *("metrics", "export", "predict", "evaluate"),
    "audit",
)


class Branching(TyperCommand):
    """A command with others below it, which are loaded when one of them is named: then that one runs in its place."""

    below: ClassVar[Mapping[str, importlib.metadata.EntryPoint]] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.below:
            return super().parse_args(ctx, args)
        ctx.obj = (args[0], args[1:])
        return []

    def invoke(self, ctx: Any) -> Any:
        if ctx.obj is None:
            return super().invoke(ctx)
        name, args = ctx.obj
        command = self.branches()[name]
        with command.make_context(f"{ctx.info_name} {name}", list(args), parent=ctx.parent) as under:
            return command.invoke(under)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        super().format_epilog(ctx, formatter)
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.get_short_help_str()) for name, one in self.branches().items()])

    def branches(self) -> dict[str, Any]:
        group = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        group.callback()(lambda: None)  # so that one command alone makes a group too
        for name, point in self.below.items():
            group.command(name)(point.load())
        made = typer.main.get_command(group)
        assert isinstance(made, TyperGroup)
        return dict(made.commands)


def build(wanted: str | None = None) -> typer.Typer:
    """The root command with everything that the installed packages register, or with the wanted one alone if there is it."""
    app = typer.Typer(
        help="Federated learning for sequence models. Start with: seqfed demo",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_root)
    points = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    above = [name for name in points if "." not in name]
    found = [wanted] if wanted in above else above
    known = [name for name in ORDER if name in found]
    for name in (*known, *sorted(set(found) - set(known))):
        command = points[name].load()
        if isinstance(command, typer.Typer):  # a group of commands
            app.add_typer(command, name=name)
            continue
        below = {one.partition(".")[2]: points[one] for one in sorted(points) if one.startswith(f"{name}.")}
        if below:
            app.command(name, cls=type("Branched", (Branching,), {"below": below}))(command)
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
        build(sys.argv[1] if len(sys.argv) > 1 else None)()
    except SeqfedError as error:
        print(f"seqfed: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
