"""The data holder's rules, one by one: what each refuses, and that it says the rule, the value and the limit."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from seqfed.client.consent import Account, Consent
from seqfed.client.policy import Policy, Spent, check, refusals
from seqfed.client.policy_cli import policy as command
from seqfed.common.config import load_toml, validate
from seqfed.common.dp import accounting
from seqfed.common.errors import ConfigError, PolicyRefused
from seqfed.common.spec import RunSpec
from seqfed.common.views import ModelVersion, Task, TaskKey, TaskKind

DATA: dict[str, Any] = {"features": 3, "classes": 2}
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "policy.toml"
WINDOWS: dict[str, Any] = {"features": 3, "steps": 9, "stride": 1}


def rules(**content: Any) -> Policy:
    return validate(Policy, content, "policy.toml")


def run(**content: Any) -> RunSpec:
    return validate(RunSpec, {"data": DATA, **content}, "run.toml")


def told(policy: Policy, spec: RunSpec, **spent: Any) -> list[str]:
    return list(refusals(policy, spec, 1000, "anna", Spent(**spent)))


def test_without_rules_every_run_is_done_that_needs_no_strange_code() -> None:
    for spec in (run(), run(rounds=1_000_000, training={"epochs": 1_000_000}), run(cohort={"min_clients": 1})):
        assert not told(Policy(), spec)
        check(Policy(), spec, 1 << 60, None, Spent(10**9, 10**9, 10**9, 1 << 60))


@pytest.mark.parametrize(
    ("policy", "allowed", "refused", "words"),
    [
        ({"runs": ["sepsis"]}, {"name": "sepsis"}, {}, "runs: the run's name is 'run', and allowed are sepsis"),
        (
            {"tasks": ["classification", "regression"]},
            {},
            {"data": WINDOWS, "task": {"kind": "forecast"}},
            "tasks: the run's task is forecast, and allowed are classification, regression",
        ),
        (
            {"models": ["gru"]},
            {"model": {"kind": "gru"}},
            {"model": {"kind": "rnn"}},
            "models: the run's model is rnn, and allowed are gru",
        ),
        (
            {"custom": ["ours:net"]},
            {"model": {"custom": "ours:net"}},
            {"model": {"custom": "ours:other"}},
            "custom: the run's model is 'ours:other', and allowed are ours:net",
        ),
        ({}, {}, {"model": {"custom": "a:b"}}, "custom: the run's model is 'a:b', and allowed are none"),
        (
            {"max_epochs": 5},
            {"training": {"epochs": 5}},
            {"training": {"epochs": 6}},
            "max_epochs: 6 epochs a round, and the limit is 5",
        ),
        (
            {"max_steps": 50},
            {"training": {"steps": 50}},
            {"training": {"steps": 1000}},
            "max_steps: 1,000 batches a round, and the limit is 50",
        ),
        (
            {"max_epochs": 5},
            {},
            {"training": {"steps": 1}},
            "max_epochs: the run counts in batches (1 steps a round), for which max_steps sets no limit",
        ),
        (
            {"max_steps": 50},
            {"training": {"steps": 1}},
            {},
            "max_steps: the run counts in epochs (1 a round), for which max_epochs sets no limit",
        ),
        (
            {"max_rounds": 10},
            {"rounds": 10},
            {"rounds": 11},
            "max_rounds: 11 rounds in this run, and the limit is 10",
        ),
        (
            {"min_cohort": 3},
            {"cohort": {"min_clients": 3}},
            {"cohort": {"min_clients": 3, "quorum": 2}},
            (
                "min_cohort: as few as 2 clients can be behind a model of this run, and the limit is 3; "
                "raise cohort.min_clients and quorum"
            ),
        ),
    ],
)
def test_each_rule_allows_and_refuses(
    policy: dict[str, Any], allowed: dict[str, Any], refused: dict[str, Any], words: str
) -> None:
    assert not told(rules(**policy), run(**allowed))
    assert told(rules(**policy), run(**refused)) == [words]
    with pytest.raises(PolicyRefused) as refusal:
        check(rules(**policy), run(**refused), 1000, "anna", Spent())
    assert str(refusal.value) == words


def test_only_the_named_operators_and_never_nobody() -> None:
    policy = rules(operators=["anna", "berta"])
    for named in policy.operators:
        check(policy, run(), 1, named, Spent())
    for operator, whose in (("eve", "of 'eve'"), (None, "of nobody who has signed it"), ("", "of ''")):
        with pytest.raises(PolicyRefused, match=f"operators: the run is {whose}, and allowed are anna, berta"):
            check(policy, run(), 1, operator, Spent())


@pytest.mark.parametrize(
    ("rule", "field", "what"),
    [
        ("max_rounds", "rounds", "rounds in this run"),
        ("max_runs", "runs", "runs"),
        ("max_rounds_total", "rounds_total", "rounds in all runs together"),
        ("max_bytes_total", "bytes_total", "bytes in all runs together"),
    ],
)
def test_what_was_spent_counts(rule: str, field: str, what: str) -> None:
    policy = rules(**{rule: 5000})
    assert not told(policy, run(), **{field: 5000})
    assert told(policy, run(), **{field: 5001}) == [f"{rule}: 5,001 {what}, and the limit is 5,000"]


def test_a_model_has_its_size() -> None:
    assert not told(rules(max_model_bytes=1000), run())
    assert told(rules(max_model_bytes=999), run()) == ["max_model_bytes: 1,000 bytes of a model, and the limit is 999"]


SECURE: dict[str, Any] = {
    "cohort": {"min_clients": 8},
    "aggregation": {"weighting": "uniform"},
    "privacy": {"secure_aggregation": True, "min_survivors": 4, "clip": 2.5},
}


def test_where_secure_aggregation_is_required_only_runs_are_done_that_have_it() -> None:
    assert told(rules(secure_aggregation=True), run(**SECURE)) == []
    (words,) = told(rules(secure_aggregation=True), run())
    assert words.startswith("secure_aggregation: required, and the server sees every single update of this run; set ")


def test_of_a_masked_sum_the_least_number_of_clients_counts_whose_sum_is_learnt() -> None:
    assert told(rules(min_cohort=4), run(**SECURE)) == []
    assert told(rules(min_cohort=5), run(**SECURE)) == [
        "min_cohort: as few as 4 clients can be behind a model of this run, and the limit is 5; raise privacy.min_survivors"
    ]


def test_a_masked_update_is_clipped() -> None:
    assert told(rules(max_clip=2.5), run(**SECURE)) == []
    assert told(rules(max_clip=2.25), run(**SECURE)) == ["max_clip: the run's clip is 2.5, and the limit is 2.25"]


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"max_clip": 1}, "max_clip: the run has no clip, and the limit is 1"),
        ({"min_noise": 0.5}, "min_noise: the run has no noise, and the least is 0.5"),
        ({"max_epsilon": 8.0}, "max_epsilon: the run has no epsilon, and the limit is 8"),
    ],
)
def test_privacy_that_a_run_does_not_have_is_refused(policy: dict[str, Any], words: str) -> None:
    assert told(rules(**policy), run()) == [words]


def test_all_that_is_broken_is_told_at_once() -> None:
    policy = rules(operators=["berta"], max_rounds=1, min_cohort=9)
    with pytest.raises(PolicyRefused, match="^operators: .*; max_rounds: .*; min_cohort: "):
        check(policy, run(), 1, "anna", Spent())


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("max_epoch = 5", "unknown key 'max_epoch'; did you mean 'max_epochs'?"),
        ("max_rounds = 0", "'max_rounds' = 0"),
        ("max_clip = 0.0", "'max_clip' = 0.0"),
        ("min_noise = inf", "'min_noise' = inf"),
        ("max_epsilon = -1", "'max_epsilon' = -1"),
        ('max_rounds = "10"', "'max_rounds' = '10'"),
        ('models = ["transformer"]', "transformer"),
        ('operators = "anna"', "'operators' = 'anna'"),
        ("[limits]\nmax_rounds = 1", "unknown key 'limits'"),
    ],
)
def test_a_policy_that_is_not_understood_is_no_policy(content: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"policy\.toml: ") as refusal:
        load_toml(Policy, path)
    assert why in str(refusal.value)


def test_the_example_names_every_rule_with_its_default() -> None:
    text = EXAMPLE.read_text()
    assert load_toml(Policy, EXAMPLE) == Policy()
    everything = "\n".join(
        line.removeprefix("# ") if " = " in line.partition("#")[2] else line for line in text.splitlines()
    )
    assert set(tomllib.loads(everything)) == set(Policy.model_fields)
    load = validate(Policy, tomllib.loads(everything), "example")
    assert load.max_epochs is not None


# The command ------------------------------------------------------------------------------------------------------------


def written(folder: Path, policy: str, spec: str = "") -> list[str]:
    (folder / "policy.toml").write_text(policy)
    (folder / "run.toml").write_text(f"{spec}\n[data]\nfeatures = 3\nclasses = 2\n")
    return ["check", str(folder / "policy.toml"), str(folder / "run.toml")]


def test_a_dry_run_says_what_would_be_refused(tmp_path: Path) -> None:
    arguments = written(tmp_path, 'max_rounds = 5\nmax_epochs = 1\noperators = ["anna"]', "rounds = 6")
    done = CliRunner().invoke(command, arguments)
    assert (done.exit_code, done.output.splitlines()) == (
        1,
        [
            "run 'run' would be refused:",
            "  operators: the run is of nobody who has signed it, and allowed are anna",
            "  max_rounds: 6 rounds in this run, and the limit is 5",
        ],
    )
    done = CliRunner().invoke(command, [*arguments, "--operator", "anna", "--json"])
    assert json.loads(done.output) == {
        "run": "run",
        "refused": ["max_rounds: 6 rounds in this run, and the limit is 5"],
    }


PRIVATE = """
rounds = 4
aggregation.weighting = "uniform"
evaluation.every = 0
cohort = {{ min_clients = 3 }}
privacy.dp = {{ delta = 1e-5, {} }}
"""


@pytest.mark.parametrize(
    ("dp", "limit", "examples", "refused"),
    [
        ('mode = "central", noise_multiplier = 4.0', 2.2, None, 0),
        ('mode = "central", noise_multiplier = 4.0', 1.5, None, 2),  # the run itself, and all together
        ('mode = "central", mechanism = "ftrl", participations = 1, noise_multiplier = 4.0', 1.8, None, 0),
        ('mode = "example", noise_multiplier = 4.0', 0.2, None, 0),
        ('mode = "example", noise_multiplier = 4.0', 0.2, 300, 2),
        ('mode = "example", noise_multiplier = 4.0', 2.0, 300, 0),
        ('mode = "example", epsilon = 2.0', 1.0, None, 1),
        ('mode = "example", epsilon = 2.0', 2.0, 300, 0),
    ],
)
def test_a_dry_run_counts_all_rounds_of_a_private_run(
    dp: str, limit: float, examples: int | None, refused: int, tmp_path: Path
) -> None:
    arguments = written(tmp_path, f"max_epsilon = {limit}", PRIVATE.format(dp))
    sequences = [] if examples is None else ["--examples", str(examples)]
    done = CliRunner().invoke(command, [*arguments, *sequences])
    lines = done.output.splitlines()
    assert (done.exit_code, len([line for line in lines if "max_epsilon: " in line])) == (bool(refused), refused)
    assert ("say how many with --examples" in done.output) == ("example" in dp and examples is None)


def test_a_dry_run_of_a_run_that_would_be_done(tmp_path: Path) -> None:
    done = CliRunner().invoke(command, written(tmp_path, "max_rounds = 5", "rounds = 5"))
    assert (done.exit_code, done.output) == (0, "run 'run' would be done\n")


def test_a_dry_run_counts_what_was_spent_and_spends_nothing(tmp_path: Path) -> None:
    account = Account(tmp_path / "state")
    account.path.parent.mkdir()
    task = Task(TaskKind.TRAIN, TaskKey("r" * 16, 1, 1), run(), ModelVersion(0, 400, b"m", b"l"))
    for number in range(1, 4):
        account.charge(replace(task, key=TaskKey("r" * 16, number, 1)), "anna", lambda _: None)
    account.close()
    arguments = [*written(tmp_path, "max_rounds_total = 3"), "--operator", "anna"]
    assert CliRunner().invoke(command, arguments).exit_code == 0
    for _ in range(2):
        done = CliRunner().invoke(command, [*arguments, "--state", str(tmp_path / "state")])
        assert done.output.splitlines()[1:] == ["  max_rounds_total: 4 rounds in all runs together, and the limit is 3"]


def test_what_was_spent_is_listed_by_operator_and_together(tmp_path: Path) -> None:
    account = Account(tmp_path)
    task = Task(TaskKind.TRAIN, TaskKey("r" * 16, 1, 1), run(), ModelVersion(0, 400, b"m", b"l"))
    account.charge(task, "anna", lambda _: None)
    account.charge(replace(task, kind=TaskKind.EVALUATE), "anna", lambda _: None)
    account.charge(replace(task, key=TaskKey("q" * 16, 1, 1)), "", lambda _: None)
    account.close()
    done = CliRunner().invoke(command, ["spent", "--state", str(tmp_path), "--json"])
    assert json.loads(done.output) == {
        "runs": 2,
        "rounds": 2,
        "bytes": 2000,
        "operators": {"": {"runs": 1, "rounds": 1, "bytes": 800}, "anna": {"runs": 1, "rounds": 1, "bytes": 1200}},
        "privacy": {"runs": [], "totals": []},
    }
    lines = CliRunner().invoke(command, ["spent", "--state", str(tmp_path)]).output.splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert rows == [["(not signed)", "1", "1", "800"], ["anna", "1", "1", "1,200"], ["all together", "2", "2", "2,000"]]


def test_what_was_spent_of_single_sequences_is_computed_of_what_was_done(tmp_path: Path) -> None:
    spec = run(
        rounds=4,
        aggregation={"weighting": "uniform"},
        evaluation={"every": 0},
        cohort={"min_clients": 3},
        privacy={"dp": {"mode": "example", "delta": 1e-5, "epsilon": 2.0}},
    )
    task = Task(TaskKind.TRAIN, TaskKey("r" * 16, 1, 1), spec, ModelVersion(0, 400, b"m", b"l"))
    ask = Consent(None, tmp_path, None, data="wards.csv")
    for number in (1, 2, 3):
        turn = replace(task, key=TaskKey("r" * 16, number, 1))
        ask(turn)
        ask.release(turn, 0, 300)
    done = CliRunner().invoke(command, ["spent", "--state", str(tmp_path), "--json"])
    found = json.loads(done.output)["privacy"]
    noise = accounting.noise_multiplier(spec, 300)
    assert noise is not None
    epsilon = accounting.spent(spec, 3, noise, None, 300)
    whole = {"unit": "example", "epsilon": pytest.approx(epsilon), "delta": 1e-5, "accountant": "RDP (Opacus)"}
    of_run = {"run": "r" * 16, "name": "run", "data": "wards.csv", "releases": 3, "noise_multiplier": noise}
    assert found == {"runs": [{**of_run, **whole}], "totals": [whole]}
    assert epsilon < 2.0
    line = CliRunner().invoke(command, ["spent", "--state", str(tmp_path)]).output.splitlines()[-1]
    assert line == f"differential privacy, unit example: epsilon {epsilon:.4g}, delta 1e-05; RDP (Opacus)"


def test_where_nothing_was_spent_nothing_is_made(tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["spent", "--state", str(tmp_path / "state")])
    assert done.output == "no run has had anything yet\n"
    assert not (tmp_path / "state").exists()
