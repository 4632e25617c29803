"""From a client's tally to the operator's command: metrics and their spread over real gRPC, in words, CSV, JSON, pictures."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import json
import sqlite3
from pathlib import Path

import pytest
from tests.server.conftest import Daemon, a_daemon, make_spec, some_delta
from typer.testing import CliRunner

from seqfed.client.admin import operating
from seqfed.client.operator import metrics, submit
from seqfed.common.cli import build
from seqfed.common.errors import ConfigError
from seqfed.common.metrics import names, units
from seqfed.common.views import TaskKind

LOSSES = {"a": 1.0, "b": 2.0, "c": 4.0}
TALLIES = {
    name: {"examples": 10, "loss": units(loss * 10), "correct": int(10 / loss), "pos.0.400": 3, f"neg.0.{place}": 7}
    for (name, loss), place in zip(LOSSES.items(), (300, 400, 500), strict=True)
}


async def a_round(daemon: Daemon, number: int) -> None:
    for site in daemon.sites:
        await site.submit(await site.task(), some_delta(42, number))
    for site in daemon.sites:
        await site.score(await site.task(TaskKind.EVALUATE), TALLIES[site.name])


async def test_the_command_has_every_finished_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with a_daemon(tmp_path / "state") as daemon:
        await daemon.arrive(*LOSSES)
        spec = make_spec(rounds=60, evaluation__every=1, cohort__min_clients=3)
        run = (await daemon.submit(spec)).run
        for number in range(1, 53):  # more rounds than one message holds
            await a_round(daemon, number)
        async with operating(daemon.address, insecure=False) as operator:
            view = await operator.history(run)
        assert [record.round for record in view.history] == list(range(1, 53))
        assert (view.round, view.ended) == (53, False)
        assert view.metrics == view.history[-1].evaluation
        metrics_of = view.history[0].evaluation
        assert metrics_of["loss"] == pytest.approx(7 / 3)
        assert metrics_of["accuracy"] == 17 / 30
        assert metrics_of["auroc"] == 0.5  # above a's negatives, level with b's, below c's
        assert metrics_of["average_precision"] == pytest.approx(
            9 / 23
        )  # all nine come with the 14 negatives at or above
        assert view.history[0].spread["loss"] == pytest.approx((2.0, 3.6))
        assert view.history[0].spread["auroc"] == pytest.approx((0.5, 0.1))  # of 1, 1/2 and 0

        def ask() -> str:
            metrics(run[:6], server=daemon.address)
            return capsys.readouterr().out

        table = list(csv.DictReader(io.StringIO(await asyncio.to_thread(ask))))
        assert [int(row["round"]) for row in table] == list(range(1, 53))
        assert float(table[0]["loss_worst_decile"]) == pytest.approx(3.6)
        await daemon.stop(run)
        async with operating(daemon.address, insecure=False) as operator:
            assert len((await operator.history(run)).history) == 52


async def test_histograms_are_not_kept(tmp_path: Path) -> None:
    full = dict.fromkeys(names(make_spec()), 1)
    assert len(full) > 1000
    async with a_daemon(tmp_path) as daemon:
        sites = await daemon.arrive("a", "b")
        run = (await daemon.submit(make_spec(rounds=2, evaluation__every=1))).run
        for site in sites:
            await site.submit(await site.task(), some_delta(42, 1))
        for site in sites:
            await site.score(await site.task(TaskKind.EVALUATE), full)
        await daemon.until(run, lambda view: view.round == 2)
        with contextlib.closing(sqlite3.connect(tmp_path / "seqfed.db")) as database:
            sizes = [
                len(text) for (text,) in database.execute("SELECT record FROM rounds UNION SELECT state FROM runs")
            ]
    assert len(sizes) == 2
    assert max(sizes) < 1000


async def test_the_commands_flags(tmp_path: Path) -> None:
    async with a_daemon(tmp_path / "state") as daemon:
        await daemon.arrive(*LOSSES)
        run = (await daemon.submit(make_spec(evaluation__every=1, cohort__min_clients=3, name="trial"))).run
        await a_round(daemon, 1)
        await daemon.end(run)
        app = build()
        app.command("metrics")(metrics)

        def call(*flags: str) -> str:
            found = CliRunner().invoke(app, [*flags, "--server", daemon.address], catch_exceptions=False)
            assert found.exit_code == 0, found.output
            return found.stdout

        out, picture = tmp_path / "rounds.json", tmp_path / "rounds.png"
        flags = ("--format", "json", "--out", str(out), "--plot", str(picture))
        assert await asyncio.to_thread(call, "metrics", "trial", *flags) == ""
        (row,) = json.loads(out.read_text())
        assert row["loss"] == pytest.approx(7 / 3)
        assert picture.read_bytes().startswith(b"\x89PNG")
        (listed,) = json.loads(await asyncio.to_thread(call, "runs", "--json"))
        assert listed["metrics"]["loss"] == pytest.approx(7 / 3)
        assert "loss 2.333" in " ".join((await asyncio.to_thread(call, "runs")).split())
        (last,) = (await asyncio.to_thread(call, "watch", run, "--json")).splitlines()
        assert json.loads(last)["history"][0]["spread"]["loss"] == pytest.approx({"median": 2.0, "worst_decile": 3.6})


async def test_a_metric_that_the_task_has_not_is_refused_on_both_sides(tmp_path: Path) -> None:
    async with a_daemon(tmp_path / "other") as daemon:
        spec = make_spec(evaluation__every=1, convergence={"metric": "acuracy"})
        with pytest.raises(ConfigError, match="did you mean 'accuracy'"):
            await daemon.submit(spec)
        assert await daemon.runs() == []
    text = '[data]\nfeatures = 2\nclasses = 2\n[convergence]\nmetric = "rmse"\n'
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match="this classification run has loss, accuracy, macro_f1, auroc"):
        submit(tmp_path / "run.toml", server="127.0.0.1:1")  # refused before anybody is asked
