"""What a client keeps for compression: residuals by run, which count once, and the newest model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from seqfed.client.packing import RUNS, STALE, Packer
from seqfed.common.compression import Codec, Key, decode, encode
from seqfed.common.layout import Flat, Layout
from seqfed.common.spec import DataSpec, RunSpec
from seqfed.common.views import ModelVersion, Task, TaskKey, TaskKind

LAYOUT, OTHER = Layout((("w", (100, 30)),)), Layout((("v", (3000,)),))
CODEC = Codec("topk", 0.05)
SPEC = RunSpec(seed=3, data=DataSpec(features=1, classes=2))
RUN = "0123456789abcdef"


def task(round_: int, run: str = RUN, model: bytes = b"m") -> Task:
    version = ModelVersion(round_ - 1, LAYOUT.nbytes, model, LAYOUT.digest)
    return Task(TaskKind.TRAIN, TaskKey(run, round_, 1), SPEC, version)


def delta(round_: int) -> Flat:
    return np.random.default_rng(round_).normal(0, 1, LAYOUT.size).astype(np.float32)


def expected(round_: int, left: Flat | None, layout: Layout = LAYOUT, run: str = RUN) -> tuple[bytes, Flat]:
    made = encode(delta(round_), layout, Key(SPEC.seed, run, round_, "ward"), CODEC, left)
    assert made.residual is not None
    return made.payload, made.residual


@pytest.fixture(params=["disk", "memory"])
def packer(request: pytest.FixtureRequest, tmp_path: Path) -> Packer:
    return Packer(tmp_path / "residuals" if request.param == "disk" else None)


def pack(packer: Packer, round_: int, layout: Layout = LAYOUT, run: str = RUN, model: bytes = b"m") -> bytes:
    return packer.pack(task(round_, run, model), "ward", layout, delta(round_), CODEC)


def test_what_was_left_out_comes_with_the_next_once_it_counts(packer: Packer) -> None:
    first, left = expected(1, None)
    assert pack(packer, 1) == first
    packer.counted(RUN, 1)
    second, left = expected(2, left)
    assert pack(packer, 2) == second
    packer.counted(RUN, 1)  # of another round
    packer.counted(RUN, 2)
    assert pack(packer, 3) == expected(3, left)[0]


def test_an_update_that_did_not_count_takes_nothing_along(packer: Packer) -> None:
    _, left = expected(1, None)
    pack(packer, 1)
    packer.counted(RUN, 1)
    pack(packer, 2)
    assert packer.unsettled(RUN, 2) is None
    assert packer.unsettled(RUN, 3) == (2, blake3(expected(2, left)[0]).digest())
    assert pack(packer, 3) == expected(3, left)[0]


def test_asked_again_the_same_bytes_are_sent(packer: Packer) -> None:
    first = pack(packer, 1)
    assert packer.pack(task(1), "ward", LAYOUT, delta(9), CODEC) == first
    packer.counted(RUN, 1)
    assert pack(packer, 1) == first
    other = packer.pack(task(1, model=b"n"), "ward", LAYOUT, delta(9), CODEC)
    assert other != first


def test_what_is_stale_or_of_another_layout_or_run_is_dropped(packer: Packer) -> None:
    _, left = expected(1, None)
    pack(packer, 1)
    packer.counted(RUN, 1)
    assert pack(packer, 1 + STALE) == expected(1 + STALE, left)[0]
    assert pack(packer, 2 + STALE) == expected(2 + STALE, None)[0]
    assert pack(packer, 2, OTHER) == expected(2, None, OTHER)[0]
    other = "f" * 16
    assert pack(packer, 2, run=other) == expected(2, None, run=other)[0]


def test_it_outlasts_the_process_and_a_damaged_file_counts_as_none(tmp_path: Path) -> None:
    packer = Packer(tmp_path)
    pack(packer, 1)
    packer.counted(RUN, 1)
    _, left = expected(1, None)
    assert pack(Packer(tmp_path), 2) == expected(2, left)[0]
    for damaged in (b"", b"{", b"[1]\n", b'{"bytes": "x"}\n', b'{"bytes": 1}\nxyz', b"\xff" * 100):
        (tmp_path / f"{RUN}.counted").write_bytes(damaged)
        (tmp_path / f"{RUN}.next").unlink(missing_ok=True)
        assert pack(Packer(tmp_path), 2) == expected(2, None)[0]


def test_a_file_that_was_cut_short_counts_as_none(tmp_path: Path) -> None:
    packer = Packer(tmp_path)
    pack(packer, 1)
    packer.counted(RUN, 1)
    kept = tmp_path / f"{RUN}.counted"
    whole = kept.read_bytes()
    for cut in (1, 4, 4 * LAYOUT.size):
        kept.write_bytes(whole[:-cut])
        (tmp_path / f"{RUN}.next").unlink(missing_ok=True)
        assert pack(Packer(tmp_path), 2) == expected(2, None)[0]


def test_of_runs_long_gone_nothing_is_kept(tmp_path: Path) -> None:
    packer = Packer(tmp_path)
    runs = [f"{number:016x}" for number in range(RUNS + 2)]
    for run in runs:
        pack(packer, 1, run=run)
        packer.counted(run, 1)
    pack(packer, 2, run=runs[-1])
    found = {path.stem for path in tmp_path.iterdir()}
    assert len(found) == RUNS
    assert runs[-1] in found


def kept(round_: int) -> Flat:
    return delta(100 + round_)


def taken(packer: Packer, round_: int) -> list[float] | None:
    found = packer.take(task(round_), LAYOUT)
    return None if found is None else found.tolist()


def test_what_a_masked_sum_left_out_is_taken_once(packer: Packer) -> None:
    assert packer.take(task(1), LAYOUT) is None
    packer.put_back(RUN)
    packer.keep(task(1), LAYOUT, kept(1))
    assert taken(packer, 2) == kept(1).tolist()
    assert packer.take(task(2), LAYOUT) is None  # it may be in a sum that was opened
    packer.put_back(RUN)
    assert packer.take(task(2), LAYOUT) is None


def test_what_no_sum_has_is_put_back(packer: Packer) -> None:
    packer.keep(task(1), LAYOUT, kept(1))
    for _ in range(2):
        assert taken(packer, 2) == kept(1).tolist()
        packer.put_back(RUN)
    packer.take(task(2), LAYOUT)
    packer.keep(task(2), LAYOUT, kept(2))
    packer.put_back("f" * 16)  # of another run
    assert taken(packer, 3) == kept(2).tolist()


def test_what_cannot_be_put_back_is_lost_and_hides_no_other_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packer = Packer(tmp_path)
    packer.keep(task(1), LAYOUT, kept(1))
    packer.take(task(2), LAYOUT)
    (tmp_path / f"{RUN}.counted").mkdir()
    packer.put_back(RUN)
    assert "keeping what an update left out" in caplog.text


def test_what_a_masked_sum_left_out_grows_stale(packer: Packer) -> None:
    for round_, layout in ((1, LAYOUT), (2 + STALE, LAYOUT), (2, OTHER)):
        packer.keep(task(1), LAYOUT, kept(1))
        assert packer.take(task(round_), layout) is None
    packer.keep(task(1), LAYOUT, kept(1))
    assert packer.take(task(1 + STALE), LAYOUT) is not None


def test_codecs_without_feedback_keep_nothing(tmp_path: Path) -> None:
    packer, codec = Packer(tmp_path / "kept"), Codec("eden1")
    payload = packer.pack(task(1), "ward", LAYOUT, delta(1), codec)
    assert sum(map(len, decode(payload, LAYOUT, Key(SPEC.seed, RUN, 1, "ward"), codec))) == LAYOUT.size
    assert not (tmp_path / "kept").exists()


def test_the_newest_model_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    packer, flat = Packer(tmp_path), delta(1)
    assert packer.kept_model() is None
    digest = blake3(flat.data.cast("B")).digest()
    packer.keep_model(digest, flat)
    found = Packer(tmp_path).kept_model()
    assert found is not None
    assert found[0] == digest
    assert (found[1] == flat).all()
    found[1][0] += 1  # a difference can be added to it
    data = (tmp_path / "model").read_bytes()
    for damaged in (b"", data[:32], data[:-1], bytes([data[0] ^ 1]) + data[1:]):
        (tmp_path / "model").write_bytes(damaged)
        assert packer.kept_model() is None
