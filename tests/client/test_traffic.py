"""What a task is taken to move, beside what it moves: over real gRPC, as the server counts it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.integration.light import Formula
from tests.integration.maskers import Masker, introduce
from tests.integration.maskers import session_of as masked_session
from tests.integration.maskers import spec_of as masked_spec
from tests.integration.test_compression import ONE, WIDE, running, session_of, spec_of
from tests.server.conftest import Daemon, a_daemon

from seqfed.client.consent import Account, Consent
from seqfed.client.masking import masking_of
from seqfed.client.packing import Packer
from seqfed.client.policy import Policy
from seqfed.client.traffic import answer, most
from seqfed.common.compression import Codec, largest
from seqfed.common.errors import PolicyRefused
from seqfed.common.homomorphic import scheme
from seqfed.common.masking.agreed import terms_of
from seqfed.common.masking.packing import packed_bytes
from seqfed.common.masking.terms import Purpose
from seqfed.common.model import layout_of
from seqfed.common.spec import RunSpec
from seqfed.common.views import MaskingTerms, ModelStep, ModelVersion, Task, TaskKey, TaskKind
from seqfed.server.steps import Step

TASKS = 6_500  # bytes of the tasks of a run of four rounds, the first of which brings the specification, and of calls


def task(spec: RunSpec, kind: TaskKind = TaskKind.TRAIN, **model: Any) -> Task:
    masking = MaskingTerms(1, 10) if spec.privacy.secure_aggregation else None
    version = ModelVersion(3, layout_of(spec).nbytes, b"three", b"layout", **model)
    return Task(kind, TaskKey("run", 4, 1), spec, version, masking=masking)


def test_a_model_that_is_there_costs_nothing_and_steps_to_it_what_they_have() -> None:
    spec, steps = spec_of({"download": "delta8"}), (ModelStep(2, b"one", 70, b""), ModelStep(3, b"two", 50, b""))
    size = layout_of(spec).nbytes
    found = {
        holds: most(task(spec, TaskKind.EVALUATE, steps=steps), holds) for holds in (b"one", b"two", b"three", b"?")
    }
    assert found == {b"one": 120, b"two": 50, b"three": 0, b"?": size}
    assert most(task(spec, steps=steps), b"two") == 50 + size  # and the update
    steps = (ModelStep(2, b"one", 70, b""), ModelStep(3, b"two", 1 << 40, b""))  # a server that lies
    assert most(task(spec, TaskKind.EVALUATE, steps=steps), b"one") == size
    assert most(task(spec, TaskKind.MEASURE)) == 0


def test_an_update_costs_what_its_codec_makes_at_most() -> None:
    for name, given in (("rotq4", {}), ("eden1", {"fraction": 0.25}), ("topk", {"fraction": 0.02, "bits": 8})):
        spec = spec_of({"upload": name, **given})
        due = largest(Codec(name, given.get("fraction", 0.0), given.get("bits", 0), 0), layout_of(spec))  # type: ignore[arg-type]
        assert answer(task(spec)) == due < layout_of(spec).nbytes / 7
    assert answer(task(spec_of({}))) == layout_of(spec_of({})).nbytes
    assert answer(task(spec_of({"upload": "auto"}))) == largest(Codec("none"), layout_of(spec_of({})))


def test_what_cannot_be_reckoned_counts_as_the_model() -> None:
    spec = masked_spec(model=WIDE, privacy={"b": 8})
    many = replace(task(spec), masking=MaskingTerms(1, 1_000_000))  # too many for 8 bits
    assert answer(many) == layout_of(spec).nbytes


def test_an_encrypted_sum_costs_the_ciphertexts_of_who_opens_it() -> None:
    spec = masked_spec(model=WIDE, privacy={"homomorphic": True, "mode": "semi_honest", "b": 16})
    asked = task(spec)
    terms = terms_of(spec, asked.key, Purpose.TRAIN, 1, 10, bytes(32), b"", layout_of(spec).size)
    form, numbers = scheme.Form(terms), packed_bytes(terms.dim, terms.bits) + 8 * terms.scalars
    assert 0 < answer(asked) - 2 * form.nbytes - numbers < 5_000


@pytest.fixture
async def daemon(tmp_path: Path) -> Any:
    async with a_daemon(tmp_path / "state") as found:
        yield found


RUNS: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"upload": "eden1", "download": "delta8"}, False),
    ({"upload": "powersgd", "rank": 2}, False),
    ({"download": "delta8"}, True),
]


@pytest.mark.parametrize(("given", "lies"), RUNS)
async def test_a_client_is_charged_what_it_moves(
    daemon: Daemon, tmp_path: Path, given: dict[str, Any], lies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lies:  # about its steps, so that the whole model is fetched after each
        view_of = Step.view
        monkeypatch.setattr(Step, "view", lambda one, **how: replace(view_of(one, **how), digest=bytes(32)))
    spec, sessions = spec_of(given, evaluation__every=2), []
    for name in "abc":
        (tmp_path / name).mkdir()
        session = session_of(Formula(name), daemon.address, Packer(tmp_path / name))
        session._consent = Consent(None, tmp_path / name, None)
        sessions.append(session)
    async with running(*sessions):
        view = await daemon.end((await daemon.submit(spec)).run)
    assert view.phase == "finished"
    for name in "abc":
        moved = sum(sum(record.traffic[name]) for record in view.history)
        charged = Account(tmp_path / name).total().bytes_total
        assert moved - TASKS < charged < moved, (name, moved, charged)


@pytest.mark.parametrize("given", [{}, {"upload": "rotq8"}, {"upload": "rotsub", "fraction": 0.25}])
async def test_a_client_is_charged_for_masked_sums_what_it_moves(
    daemon: Daemon, tmp_path: Path, given: dict[str, Any]
) -> None:
    spec = masked_spec(rounds=4, model=ONE, evaluation={"every": 1}, compression=given)
    introduce(tmp_path, "abcd")
    sessions = []
    for name in "abcd":
        masking = masking_of(name, tmp_path / name, None, tmp_path / "peers.toml")
        consent = Consent(None, tmp_path / name, None)
        sessions.append(masked_session(Masker(name), daemon.address, masking, None, consent))
    async with running(*sessions):
        view = await daemon.end((await daemon.submit(spec)).run)
    assert view.phase == "finished"
    for name in "abcd":
        moved = sum(sum(record.traffic[name]) for record in view.history)
        charged = Account(tmp_path / name).total().bytes_total
        assert moved < charged < 1.1 * moved, (name, moved, charged)


def test_what_was_not_foreseen_is_charged_before_it_moves(tmp_path: Path) -> None:
    spec = spec_of({"upload": "eden1"})
    asked, size = task(spec, TaskKind.EVALUATE), layout_of(spec).nbytes
    consent = Consent(Policy(max_bytes_total=2 * size), tmp_path, None)
    consent(replace(asked, spec=spec_of({"upload": "eden1"}, evaluation__every=1)))
    consent.more(asked, size)
    with pytest.raises(PolicyRefused, match="max_bytes_total: .* bytes in all runs together"):
        consent.more(replace(asked, kind=TaskKind.TRAIN))
    assert Account(tmp_path).total().bytes_total == 2 * size
