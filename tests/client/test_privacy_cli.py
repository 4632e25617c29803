"""The commands `seqfed privacy plan` and `report`, the second against a real server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tests.server.conftest import make_spec
from typer.testing import CliRunner

from seqfed.client.privacy_cli import privacy
from seqfed.common import checkpoint
from seqfed.common.dp import accounting
from seqfed.common.errors import ConfigError, UnknownRun
from seqfed.common.model import initial_parameters
from seqfed.common.spec import RunSpec
from seqfed.common.views import FEDERATION
from seqfed.server import ledger
from seqfed.server.daemon import serving
from seqfed.server.round import Phase, Run
from seqfed.server.settings import ServerSettings
from seqfed.server.store import open_store

RUN_TOML = """
name = "wards"
rounds = 100
data = {{ features = 2, classes = 3 }}
model = {{ hidden = {hidden}, layers = 1 }}
aggregation = {{ weighting = "uniform" }}
evaluation = {{ every = 0 }}
cohort = {{ min_clients = 10000, count = 100, quorum = 30 }}
[privacy.dp]
mode = "central"
delta = 1e-5
{dp}
"""


def asked(*arguments: str) -> str:
    done = CliRunner().invoke(privacy, list(arguments), catch_exceptions=False, env={"COLUMNS": "200"})
    assert done.exit_code == 0
    return done.output


def written(folder: Path, dp: str, hidden: int = 8) -> str:
    (folder / "run.toml").write_text(RUN_TOML.format(dp=dp, hidden=hidden))
    return str(folder / "run.toml")


def test_a_plan_shows_noise_beside_clip_for_this_epsilon_and_others(tmp_path: Path) -> None:
    told = asked("plan", written(tmp_path, "epsilon = 3.0"))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in told.splitlines() if line.startswith("│")]
    assert [round(float(row[0]), 1) for row in rows] == [1.5, 3.0, 6.0]
    noise = [float(row[1]) for row in rows]
    assert noise == sorted(noise, reverse=True)
    assert {tuple(row[2:4]) for row in rows} == {("100", "100")}
    assert "sampling: none: a client may take part in every round" in told
    assert "accountant: exact Gaussian" in told
    assert "caveats:\n    - central: holds against whoever sees models, not against the server" in told


def test_a_plan_as_json_has_the_published_figure(tmp_path: Path) -> None:
    arguments = written(tmp_path, "noise_multiplier = 1.0\npopulation = 10000")
    text = Path(arguments).read_text().replace("rounds = 100", "rounds = 1000")
    Path(arguments).write_text(text)
    found = json.loads(asked("plan", arguments, "--json"))
    assert found["epsilon"] == pytest.approx(1.828, rel=1e-3)
    assert (found["unit"], found["delta"], found["population"], found["cohort"]) == ("client", 1e-5, 10_000, 100)
    assert found["noise_norm"] == pytest.approx(found["dim"] ** 0.5 / 100)
    assert [one["epsilon"] for one in found["others"]] == pytest.approx([0.914, 3.657], rel=1e-2)


def test_a_plan_says_when_noise_drowns_the_model_and_what_population_would_not(tmp_path: Path) -> None:
    told = asked("plan", written(tmp_path, "noise_multiplier = 2.0\npopulation = 10000", hidden=256))
    assert "will drown the model" in told
    assert "(population 10" in told


def test_a_plan_for_examples_asks_how_many_there_are(tmp_path: Path) -> None:
    path = written(tmp_path, "epsilon = 3.0")
    Path(path).write_text(Path(path).read_text().replace('"central"', '"example"'))
    assert "name a client's number of sequences with --examples" in asked("plan", path)
    found = json.loads(asked("plan", path, "--examples", "5000", "--json"))
    assert found["noise_multiplier"] > 0.3
    assert 2.9 < found["epsilon"] <= 3.0


def test_a_plan_of_a_run_without_privacy_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("data = { features = 2, classes = 3 }")
    with pytest.raises(ConfigError, match="no \\[privacy.dp\\]"):
        asked("plan", str(tmp_path / "run.toml"))


# The report -----------------------------------------------------------------------------------------------------------


def private(**dp: Any) -> RunSpec:
    return make_spec(
        name="wards",
        rounds=5,
        aggregation={"weighting": "uniform"},
        cohort={"min_clients": 3, "count": 3},
        privacy={"dp": {"mode": "central", "delta": 1e-5, **dp}},
    )


def spend(folder: Path, run: str, spec: RunSpec, *rounds: str) -> None:
    """A run that has ended after these rounds, each given as the names of its clients, one letter each."""
    store = open_store(folder)
    entries = {one.holder: one for one in ledger.opened(run, spec)}
    model = checkpoint.save(store.model_path(run, 0), initial_parameters(spec), {})
    store.create(run, spec, model, ledger=list(entries.values()))
    for number, clients in enumerate(rounds, 1):
        fresh = ledger.after(spec, entries, number, tuple(clients))
        store.commit(run, Run(Phase.STOPPED, round=number, reason="enough"), notes=ledger.notes(fresh), ledger=fresh)
        entries |= {one.holder: one for one in fresh}
    store.close()


async def reported(folder: Path, *arguments: str) -> str:
    async with serving(ServerSettings(port=0, state=folder)) as address:
        return await asyncio.to_thread(asked, "report", *arguments, "--server", address)


async def test_a_report_names_everything_that_an_epsilon_needs(tmp_path: Path) -> None:
    spec = private(epsilon=4.0)
    spend(tmp_path, "a" * 16, spec, "xyz", "xy")
    noise = accounting.noise_multiplier(spec)
    assert noise is not None
    epsilon = accounting.spent(spec, 2, noise)
    told = await reported(tmp_path, "wards")
    assert told.splitlines()[:6] == [
        f"run {'a' * 16} (wards): central (gaussian)",
        f"  epsilon spent: {epsilon:.4g} of 4, delta 1e-05, after 2 of 5 rounds",
        "  unit: client: one client in a round's sums, or not",
        f"  noise: multiplier {noise:.4g}, clip 1, cohort 3",
        "  sampling: none: a client may take part in every round",
        "  accountant: exact Gaussian (Balle and Wang 2018)",
    ]
    assert "not against the server" in told
    assert f"    - z: {accounting.spent(spec, 2, noise, 1):.4g} in 1 releases" in told
    assert f"all runs of this server together (1), unit client: epsilon {epsilon:.4g}, delta 1e-05, of x;" in told


async def test_a_report_as_json_adds_up_all_runs(tmp_path: Path) -> None:
    spec = private(noise_multiplier=3.0)
    spend(tmp_path, "a" * 16, spec, "xyz", "xy")
    spend(tmp_path, "b" * 16, spec, "yz")
    spend(tmp_path, "c" * 16, make_spec())
    found = json.loads(await reported(tmp_path, "--json"))
    assert [(one["run"], one["holder"], one["round"]) for one in found["runs"]] == [
        ("a" * 16, FEDERATION, 2),
        ("b" * 16, FEDERATION, 1),
    ]
    (total,) = found["totals"]
    assert (total["holder"], total["runs"]) == ("y", 2)
    assert total["epsilon"] == pytest.approx(accounting.gaussian_epsilon(3.0 / 3**0.5, 1e-5))


async def test_a_report_of_runs_without_privacy_says_so(tmp_path: Path) -> None:
    assert "no run has differential privacy" in await reported(tmp_path)
    spend(tmp_path, "c" * 16, make_spec(name="plain"))
    assert "run 'plain' has no differential privacy" in await reported(tmp_path, "plain")
    with pytest.raises(UnknownRun):
        await reported(tmp_path, "nothing")
