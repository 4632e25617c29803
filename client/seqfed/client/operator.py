"""The operator's commands: submit, runs, watch, metrics, pause, resume, stop, clients, export, health."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Awaitable, Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from seqfed.client.using import Format

if TYPE_CHECKING:
    from seqfed.client.admin import Operator
    from seqfed.common.spec import RunSpec
    from seqfed.common.views import RunView

T = TypeVar("T")

Server = Annotated[
    str, typer.Option(envvar="SEQFED_SERVER", help="HOST:PORT of the server, or HOST:PORT,HOST:PORT of several.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", envvar="SEQFED_INSECURE", help="Allow plaintext off the loopback interface.")
]
CredentialsFolder = Annotated[
    Path | None,
    typer.Option(
        "--credentials",
        envvar="SEQFED_CREDENTIALS",
        help="Folder that `seqfed ca issue operator` made [operator in the user's configuration].",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
RunName = Annotated[str, typer.Argument(help="Its id, the beginning of it, or its name.", metavar="RUN")]

LOCAL = "127.0.0.1:7733"


def on_server(server: str, insecure: bool, credentials: Path | None, call: Callable[[Operator], Awaitable[T]]) -> T:
    """The result of calls to the server; Ctrl-C ends with status 130 and no traceback."""
    import asyncio

    from seqfed.client.admin import operating
    from seqfed.client.enroll import in_use
    from seqfed.common.identity import config_folder

    folder = in_use(credentials, insecure, config_folder() / "operator")

    async def run() -> T:
        async with operating(server, insecure, folder) as operator:
            return await call(operator)

    try:
        return asyncio.run(run())
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def submit(
    config: Annotated[Path, typer.Argument(help="run.toml", metavar="RUN.TOML")],
    initial: Annotated[
        Path | None, typer.Option(help="Start from this safetensors checkpoint instead of the run's seed.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Watch the run until it ends; status 1 unless it finished.")
    ] = False,
    server: Server = LOCAL,
    insecure: Insecure = False,
    credentials: CredentialsFolder = None,
    as_json: Json = False,
) -> None:
    """Queue a run described by a TOML file. It starts when its turn has come and its clients are there."""
    from seqfed.client.watching import follow
    from seqfed.common.config import load_toml
    from seqfed.common.metrics import require_metric
    from seqfed.common.spec import RunSpec

    spec = load_toml(RunSpec, config)
    require_metric(spec)

    if spec.model.custom is not None:
        spec, initial = custom_run(spec, initial)

    async def call(operator: Operator) -> bool:
        view = await operator.submit(spec, initial)
        if not wait:
            _tell(view, as_json)
            return True
        last = await follow(operator, view.run, as_json=as_json, paused=_say_paused)
        return last.phase == "finished"

    if not on_server(server, insecure, credentials, call):
        raise typer.Exit(1)


def _say_paused(view: RunView) -> None:
    print(f"seqfed: run {view.run} is paused: {view.reason}", file=sys.stderr)


def custom_run(spec: RunSpec, initial: Path | None) -> tuple[RunSpec, Path]:
    """A custom model's run with its tensors filled in, and a checkpoint to start from: the server never imports the module."""
    import tempfile

    from seqfed.client.network import custom_parameters
    from seqfed.common import checkpoint

    first = custom_parameters(spec)
    model = spec.model.model_copy(update={"tensors": first.layout.tensors})
    spec = type(spec)(**{**dict(spec), "model": model})  # made anew: a copy would keep the old one's canonical text
    if initial is None:
        folder = tempfile.TemporaryDirectory(prefix="seqfed-submit-")
        atexit.register(folder.cleanup)
        initial = Path(folder.name) / "initial.safetensors"
        checkpoint.save(initial, first, {})
    return spec, initial


def runs(
    server: Server = LOCAL, insecure: Insecure = False, credentials: CredentialsFolder = None, as_json: Json = False
) -> None:
    """List the server's runs, and in words what each one is waiting for."""
    import json

    from rich import print as rich_print

    from seqfed.client.shown import run_dict, runs_table

    found = on_server(server, insecure, credentials, lambda operator: operator.runs())
    if as_json:
        print(json.dumps([run_dict(view) for view in found]))
    else:
        rich_print(runs_table(found) if found else "no runs yet; queue one with: seqfed submit run.toml")


def watch(
    run: RunName,
    server: Server = LOCAL,
    insecure: Insecure = False,
    credentials: CredentialsFolder = None,
    as_json: Json = False,
) -> None:
    """Follow a run live until it ends. Ctrl-C stops watching, not the run."""
    from seqfed.client.watching import follow

    last = on_server(server, insecure, credentials, lambda operator: follow(operator, run, as_json=as_json))
    if last.phase != "finished":
        raise typer.Exit(1)


def metrics(
    run: RunName,
    kind: Annotated[Format, typer.Option("--format", help="How to write the rows.")] = Format.CSV,
    out: Annotated[Path | None, typer.Option(help="Write them here [standard output].")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw them over the rounds, to this .png, .svg or .pdf.", metavar="FILE.png"),
    ] = None,
    server: Server = LOCAL,
    insecure: Insecure = False,
    credentials: CredentialsFolder = None,
) -> None:
    """Write a run's history: a row a round, with each metric, its median and worst decile over the clients, bytes, seconds."""
    from seqfed.client import history

    if plot is not None:
        history.require_plots(plot)
    view = on_server(server, insecure, credentials, lambda operator: operator.history(run))
    text = history.as_csv(view) if kind is Format.CSV else history.as_json(view)
    if out is None:
        print(text, end="")
    else:
        history.save(out, text)
    if plot is not None:
        history.draw(view, plot)


def pause(
    run: RunName,
    server: Server = LOCAL,
    insecure: Insecure = False,
    credentials: CredentialsFolder = None,
    as_json: Json = False,
) -> None:
    """Hold a run where it is: its clients are free for other runs, and what they have sent stays."""
    _tell(on_server(server, insecure, credentials, lambda operator: operator.pause(run)), as_json)


def resume(
    run: RunName,
    server: Server = LOCAL,
    insecure: Insecure = False,
    credentials: CredentialsFolder = None,
    as_json: Json = False,
) -> None:
    """Queue a paused run again; it goes on in the round in which it was paused."""
    _tell(on_server(server, insecure, credentials, lambda operator: operator.resume(run)), as_json)


def stop(
    run: RunName,
    server: Server = LOCAL,
    insecure: Insecure = False,
    credentials: CredentialsFolder = None,
    as_json: Json = False,
) -> None:
    """End a run; the model of its last finished round stays."""
    _tell(on_server(server, insecure, credentials, lambda operator: operator.stop(run)), as_json)


def _tell(view: RunView, as_json: bool) -> None:
    import json

    from seqfed.client.shown import run_dict

    print(json.dumps(run_dict(view)) if as_json else f"run {view.run} ({view.name}): {view.phase}: {view.reason}")


def clients(
    server: Server = LOCAL, insecure: Insecure = False, credentials: CredentialsFolder = None, as_json: Json = False
) -> None:
    """List the clients that the server has seen, and what each is doing."""
    import json

    from rich import print as rich_print

    from seqfed.client.shown import client_dict, clients_table

    found = on_server(server, insecure, credentials, lambda operator: operator.clients())
    if as_json:
        print(json.dumps([client_dict(view) for view in found]))
    else:
        rich_print(
            clients_table(found) if found else "no client has been here; start one with: seqfed client --data FILE"
        )


def revoke(
    name: Annotated[
        str,
        typer.Argument(help="The client's name; or operator:NAME, viewer:NAME.", metavar="NAME", show_default=False),
    ],
    reason: Annotated[str, typer.Option(help="Why, for the audit log.")] = "",
    server: Server = LOCAL,
    insecure: Insecure = False,
    credentials: CredentialsFolder = None,
    as_json: Json = False,
) -> None:
    """Shut somebody out: certificates issued so far are worth nothing from now on, open connections included.

    To let a client in again, make it a new token: seqfed enroll token.
    """
    import json

    view = on_server(server, insecure, credentials, lambda operator: operator.revoke(name, reason))
    print(json.dumps({"client": view.client, "revoked": view.revoked}) if as_json else f"{view.client}: revoked")


def audit(
    after: Annotated[int, typer.Option(min=0, help="Only entries after the one of this number.")] = 0,
    server: Server = LOCAL,
    insecure: Insecure = False,
    credentials: CredentialsFolder = None,
    as_json: Json = False,
) -> None:
    """Print a server's audit log, oldest first; status 1 if its chain does not hold.

    From the server's own database, without asking the server: seqfed audit verify.
    """
    import json

    from seqfed.client.shown import entry_dict, entry_line
    from seqfed.common import chain

    async def call(operator: Operator) -> None:
        head: tuple[int, bytes] | None = None if after else (0, chain.START)
        async for entry in operator.audit(after):
            if head is not None:
                chain.verify([entry], head)
            head = (entry.number, entry.digest)
            print(json.dumps(entry_dict(entry)) if as_json else entry_line(entry))

    on_server(server, insecure, credentials, call)


class ModelFormat(StrEnum):
    """What `seqfed export` writes."""

    SAFETENSORS = "safetensors"
    TORCHSCRIPT = "torchscript"
    ONNX = "onnx"


def export(
    run: RunName,
    out: Annotated[Path, typer.Option(help="Where to write it.")] = Path("model.safetensors"),
    kind: Annotated[
        ModelFormat,
        typer.Option("--format", help="safetensors, which seqfed itself reads; torchscript and onnx run without it."),
    ] = ModelFormat.SAFETENSORS,
    allow_custom: Annotated[
        list[str] | None,
        typer.Option(help="module:function whose code may be run to convert a custom model. Again for more. [none]"),
    ] = None,
    server: Server = LOCAL,
    insecure: Insecure = False,
    credentials: CredentialsFolder = None,
    as_json: Json = False,
) -> None:
    """Save a run's newest model, with all that is needed to use it.

    A torchscript or onnx file takes raw numbers or token ids and the sequences' lengths; what it gives is in its metadata.
    """
    import json
    import tempfile

    if kind is ModelFormat.SAFETENSORS:
        size = on_server(server, insecure, credentials, lambda operator: operator.export(run, out))
    else:
        from seqfed.client.convert import convert, require

        onnx = kind is ModelFormat.ONNX
        require("onnx" if onnx else "torchscript")
        if out == Path("model.safetensors"):  # nobody named one
            out = Path("model.onnx" if onnx else "model.pt")
        with tempfile.TemporaryDirectory(prefix="seqfed-") as folder:
            fetched = Path(folder, "model.safetensors")
            on_server(server, insecure, credentials, lambda operator: operator.export(run, fetched))
            size = convert(fetched, out, "onnx" if onnx else "torchscript", allow_custom or ())
    print(json.dumps({"model": str(out), "bytes": size}) if as_json else f"{out}: {size:,} bytes")


def health(
    server: Server = LOCAL, insecure: Insecure = False, credentials: CredentialsFolder = None, as_json: Json = False
) -> None:
    """Ask whether a server is there and serves; status 1 if not."""
    import json

    from seqfed.common.errors import ServerUnavailable

    try:
        serving, why = on_server(server, insecure, credentials, lambda operator: operator.healthy()), ""
    except ServerUnavailable as error:
        serving, why = False, str(error)
    print(
        json.dumps({"server": server, "serving": serving}) if as_json else f"{server}: {'serving' if serving else why}"
    )
    if not serving:
        raise typer.Exit(1)
