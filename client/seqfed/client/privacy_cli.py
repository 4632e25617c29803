"""The commands `seqfed privacy plan` and `report`: what a run's privacy will cost, and what runs have spent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seqfed.client.operator import LOCAL, CredentialsFolder, Insecure, Json, Server, on_server

if TYPE_CHECKING:
    from seqfed.common.dp.accounting import Plan
    from seqfed.common.spec import RunSpec
    from seqfed.common.views import PrivacyReport, PrivacyView

privacy = typer.Typer(
    help="Plan a run's differential privacy before it begins; see what runs have spent.", no_args_is_help=True
)


@privacy.command()
def plan(
    config: Annotated[Path, typer.Argument(help="run.toml", metavar="RUN.TOML")],
    examples: Annotated[
        int | None, typer.Option(min=1, help="Sequences of one client, which mode 'example' depends on.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what noise a run's epsilon needs, or what epsilon its noise gives, and how loud that is beside its clip.

    Also for half and twice that epsilon. Nothing is sent or written.
    """
    import json

    from rich import print as rich_print
    from rich.table import Table

    from seqfed.common.config import load_toml
    from seqfed.common.dp import accounting
    from seqfed.common.spec import RunSpec

    spec = load_toml(RunSpec, config)
    found = accounting.plan(spec, examples)
    others = [] if found.epsilon is None else _others(spec, found.epsilon, examples)
    judged = accounting.judge(found)
    if as_json:
        rows = [_row(one) for one in others]
        typer.echo(json.dumps({"run": spec.name, **vars(found), "judgement": judged, "others": rows}))
        return
    table = Table("epsilon", "noise multiplier", "rounds", "cohort", "noise norm", "clip", "noise / clip")
    for one in sorted([found, *others], key=lambda each: each.epsilon or 0.0):
        table.add_row(*(_shown(value) for value in _row(one).values()), style="bold" if one is found else None)
    rich_print(table)
    typer.echo(_facts(_of_plan(found)))
    if judged:
        typer.echo(f"  {judged}")
    if found.noise_multiplier is None:
        typer.echo("  name a client's number of sequences with --examples to see its noise")


def _others(spec: RunSpec, epsilon: float, examples: int | None) -> list[Plan]:
    """Plans for half and twice the epsilon, as far as there are any."""
    from seqfed.common.dp import accounting
    from seqfed.common.errors import ConfigError

    found, dp = [], spec.privacy.dp
    assert dp is not None  # or there was no plan
    for goal in (epsilon / 2, epsilon * 2):
        changed = dp.model_copy(update={"epsilon": goal, "noise_multiplier": None})
        private = spec.privacy.model_copy(update={"dp": changed})
        try:
            keys = {name: getattr(spec, name) for name in type(spec).model_fields}
            found.append(accounting.plan(type(spec)(**{**keys, "privacy": private}), examples))
        except ConfigError:  # no noise is that small, or large
            continue
    return found


def _row(one: Plan) -> dict[str, Any]:
    clip = 0.1 if isinstance(one.clip, str) else one.clip
    return {
        "epsilon": one.epsilon,
        "noise_multiplier": one.noise_multiplier,
        "rounds": one.rounds,
        "cohort": one.cohort,
        "noise_norm": one.noise_norm,
        "clip": one.clip,
        "noise_over_clip": None if one.noise_norm is None else one.noise_norm / clip,
    }


def _shown(value: float | str | None) -> str:
    if value is None:
        return "?"
    return f"{value:,}" if isinstance(value, int) else value if isinstance(value, str) else f"{value:.4g}"


def _of_plan(found: Plan) -> dict[str, Any]:
    return {
        "mode": found.mode if found.mode != "central" else f"central ({found.mechanism})",
        "epsilon": f"{_shown(found.epsilon)} after {found.rounds:,} rounds, delta {found.delta:g}",
        "unit": f"{found.unit}: {found.neighbours}",
        "sampling": found.sampling,
        "accountant": found.accountant,
        "caveats": found.caveats,
    }


def _facts(facts: dict[str, Any]) -> str:
    lines = []
    for name, value in facts.items():
        if isinstance(value, tuple):
            lines += [f"  {name}:", *(f"    - {one}" for one in value)]
        else:
            lines.append(f"  {name}: {value}")
    return "\n".join(lines)


@privacy.command()
def report(
    run: Annotated[
        str,
        typer.Argument(
            help="Its id, the beginning of it, or its name [all runs].", metavar="[RUN]", show_default=False
        ),
    ] = "",
    server: Server = LOCAL,
    insecure: Insecure = False,
    credentials: CredentialsFolder = None,
    as_json: Json = False,
) -> None:
    """Say what runs have spent of their data holders' privacy: each run, and all of this server's together.

    Of one run, also what it has spent of each data holder.
    """  # fmt: skip
    import json

    found = on_server(server, insecure, credentials, lambda operator: operator.privacy(run))
    if as_json:
        typer.echo(json.dumps(report_dict(found)))
    elif found.runs:
        typer.echo("\n".join((*map(_told, found.runs), *_totals(found))))
    else:
        typer.echo(
            f"run '{run}' has no differential privacy: it has no epsilon, and is not private in that sense"
            if run
            else "no run has differential privacy; see [privacy.dp] in run.toml"
        )


def report_dict(found: PrivacyReport) -> dict[str, Any]:
    """The report as JSON has it; `holder` * is every data holder."""
    return {
        "runs": [
            {
                **{name: value for name, value in vars(one).items() if name not in {"entry", "holders"}},
                **vars(one.entry),
                "holders": [
                    {"holder": holder, "releases": releases, "epsilon": epsilon}
                    for holder, releases, epsilon in one.holders
                ],
            }
            for one in found.runs
        ],
        "totals": [vars(one) for one in found.totals],
    }


def _told(one: PrivacyView) -> str:
    entry = one.entry
    spent = "known to each client only" if entry.epsilon is None else f"{entry.epsilon:.4g}"
    goal = "" if one.goal is None else f" of {one.goal:g}"
    extra = "" if entry.releases == entry.round else f", {entry.releases:,} releases"
    facts: dict[str, Any] = {
        "epsilon spent": f"{spent}{goal}, delta {entry.delta:g}, after {entry.round:,} of {one.rounds:,} rounds{extra}",
        "unit": f"{entry.unit}: {one.neighbours}",
        "noise": f"multiplier {_shown(entry.noise_multiplier)}, clip {one.clip}, cohort {one.cohort:,}",
        "sampling": entry.sampling,
        "accountant": entry.accountant,
        "caveats": one.caveats,
    }
    if one.holders:
        facts["data holders"] = tuple(
            f"{holder}: {_shown(epsilon)} in {releases:,} releases" for holder, releases, epsilon in one.holders
        )
    mode = one.mode if one.mode != "central" else f"central ({one.mechanism})"
    return f"run {entry.run} ({one.name}): {mode}\n{_facts(facts)}"


def _totals(found: PrivacyReport) -> list[str]:
    return [
        f"all runs of this server together ({one.runs:,}), unit {one.unit}: epsilon {_shown(one.epsilon)}, delta {one.delta:g}, "
        f"of {'any data holder' if one.holder == '*' else one.holder}; {one.accountant}"
        for one in found.totals
    ]
