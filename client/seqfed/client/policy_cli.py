"""The commands `seqfed policy check` and `spent`: what a data holder's rules would say of a run, and what runs have had."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from seqfed.client.consent import Account
    from seqfed.client.policy import Spent
    from seqfed.common.spec import RunSpec
    from seqfed.common.views import Task

policy = typer.Typer(help="Try a data holder's policy.toml on a run; see what runs have had.", no_args_is_help=True)

Name = Annotated[
    str | None, typer.Option(envvar="SEQFED_NAME", help="The client's name within the federation [this host's name].")
]
State = Annotated[Path | None, typer.Option(envvar="SEQFED_STATE", help="The client's state folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@policy.command()
def check(
    rules: Annotated[Path, typer.Argument(help="policy.toml", metavar="POLICY.TOML")],
    run: Annotated[Path, typer.Argument(help="run.toml", metavar="RUN.TOML")],
    operator: Annotated[
        str | None, typer.Option(help="The operator who would submit it [nobody who has signed it].")
    ] = None,
    name: Name = None,
    state: State = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Sequences of this client, which privacy.dp.mode = 'example' depends on.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what of a run would be refused, and by which rule; status 1 if anything would be. Nothing is sent or written.

    With --state or --name what runs have had before counts too. Differential privacy counts with all of the run's rounds.
    """
    import json
    from dataclasses import replace

    from seqfed.client import traffic
    from seqfed.client.policy import Policy, Spent, refusals, whole_run
    from seqfed.common.config import load_toml
    from seqfed.common.errors import ConfigError
    from seqfed.common.model import layout_of
    from seqfed.common.spec import RunSpec

    known, spec = load_toml(Policy, rules), load_toml(RunSpec, run)
    try:
        size = layout_of(spec).nbytes
    except ConfigError:  # a custom model's, which `seqfed submit` finds out
        size = 0
    before = Spent(0, 0, 0, 0)
    if state is not None or name is not None:
        account = _account(state, name)
        before = replace(account.total(), released=account.released)
    first = Spent(
        before.runs + 1,
        1,
        before.rounds_total + 1,
        before.bytes_total + traffic.most(_first(spec, size)),
        lambda: (*before.released(), *whole_run(spec, examples)),
    )
    found = list(refusals(known, spec, size, operator, first, examples))
    dp = spec.privacy.dp
    limited = known.max_epsilon is not None or known.min_noise is not None
    unsure = limited and examples is None and dp is not None and dp.mode == "example"
    if as_json:
        typer.echo(json.dumps({"run": spec.name, "refused": found}))
    elif found:
        typer.echo("\n  ".join((f"run '{spec.name}' would be refused:", *found)))
    else:
        typer.echo(f"run '{spec.name}' would be done")
    if unsure and not as_json:
        typer.echo("  its noise and epsilon depend on the client's sequences; say how many with --examples")
    if found:
        raise typer.Exit(1)


@policy.command()
def spent(name: Name = None, state: State = None, as_json: Json = False) -> None:
    """List what runs have had of this client: all together, which a policy limits, and those of each operator."""
    import json

    from rich import print as rich_print
    from rich.table import Table

    account = _account(state, name)
    total, found = account.total(), account.operators()
    if as_json:
        each = {operator: _figures(one) for operator, one in sorted(found.items())}
        typer.echo(json.dumps({**_figures(total), "operators": each, "privacy": _privacy(account)}))
    elif not found:
        typer.echo("no run has had anything yet")
    else:
        table = Table("operator", "runs", "rounds", "bytes")
        for operator, one in (*sorted(found.items()), ("all together", total)):
            table.add_row(operator or "(not signed)", *(f"{figure:,}" for figure in _figures(one).values()))
        rich_print(table)
        for line in _privacy(account)["totals"]:
            epsilon = "not known" if line["epsilon"] is None else f"{line['epsilon']:.4g}"
            typer.echo(
                f"differential privacy, unit {line['unit']}: epsilon {epsilon}, delta {line['delta']:g}; {line['accountant']}"
            )


def _privacy(account: Account) -> dict[str, list[dict[str, Any]]]:
    """The client's own ledger: each run with differential privacy, and all together. Where the noise follows from the data, the
    least that there was.
    """
    from seqfed.client.policy import account as added_up
    from seqfed.client.policy import multiplier

    released = account.released()
    runs = [
        {
            "run": one.run,
            "name": one.spec.name,
            "data": one.data,
            "releases": one.releases,
            "noise_multiplier": min((noise for noise, _, _ in one.steps), default=one.noise or multiplier(one.spec)),
            **vars(added_up([one])[0]),
        }
        for one in released
    ]
    return {"runs": runs, "totals": [vars(one) for one in added_up(released)]}


def _first(spec: RunSpec, size: int) -> Task:
    """The training of a first round, with the fewest clients that may be asked."""
    from math import ceil

    from seqfed.common.views import MaskingTerms, ModelVersion, Task, TaskKey, TaskKind

    model = ModelVersion(0, size, b"initial", b"")
    masking = None
    if spec.privacy.secure_aggregation:
        masking = MaskingTerms(1, ceil(spec.cohort.required * spec.cohort.over_select))
    return Task(TaskKind.TRAIN, TaskKey("", 1, 1), spec, model, masking=masking)


def _figures(one: Spent) -> dict[str, int]:
    return {"runs": one.runs, "rounds": one.rounds_total, "bytes": one.bytes_total}


def _account(state: Path | None, name: str | None) -> Account:
    import socket

    from seqfed.client.consent import Account
    from seqfed.common.identity import client_folder
    from seqfed.common.wire import check_client_name

    return Account(client_folder(state, check_client_name(name or socket.gethostname())))
