"""Names and words of strangers in every text field: no line of a log is forged, no file written that is not the server's own."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.hostile.siege import ADMIN, FEDERATION, OTHER_SCHEMA, Siege, besieged
from tests.server.conftest import Site, make_spec, typed

from seqfed.common import logs
from seqfed.common.errors import SeqfedError
from seqfed.common.identity import Role
from seqfed.v1 import admin_pb2, federation_pb2
from seqfed.v1.federation_pb2 import TaskKey

EVIL = (
    "../" * 8 + "tmp/evil",
    "/etc/passwd",
    "x\n2026-01-01 00:00:00,000 INFO    seqfed.server: all is well",
    "x\r\nforged",
    "x\x1b[2J\x1b]0;owned\x07",
    "x\x00y",
    "x\u2028y\u202ez\x85",
    "..",
    "%s%n%d{0}{x.__class__}",
    "' OR 1=1; DROP TABLE audit; --",
    "x" * 100_000,
    "",
)

Field = Callable[[Siege, Site, str], Awaitable[object]]


def key_of(siege: Siege, **changes: Any) -> TaskKey:
    return TaskKey(**{"run": siege.run, "round": 2, "attempt": 1, **changes})


async def all_of(answers: Any) -> None:
    async for _ in answers:
        pass


async def joined(site: Site, **changes: Any) -> None:
    await site.join(**changes)


async def submitted(siege: Siege, **changes: Any) -> None:
    """A run that waits for ever, if it is taken."""
    content = json.loads(make_spec().canonical)
    content["cohort"]["min_clients"] = 99
    for name, value in changes.items():
        content[name] = value
    header = admin_pb2.SubmitHeader(spec=json.dumps(content).encode())
    await (await siege.server.desk()).Submit(iter([admin_pb2.SubmitRequest(header=header)]))


FIELDS: dict[str, tuple[str, Field]] = {
    "Join.client": (FEDERATION + "Join", lambda _, m, text: joined(m, client=text)),
    "Join.instance": (FEDERATION + "Join", lambda _, m, text: joined(m, instance=text)),
    "Join.data_schema": (
        FEDERATION + "Join",
        lambda _, m, text: joined(m, data_schema=text.encode("utf-8", "replace")),
    ),
    "a column": (
        FEDERATION + "Join",
        lambda _, m, text: joined(m, data_schema=json.dumps({"columns": [text], "examples": 1}).encode()),
    ),
    "working.run": (
        FEDERATION + "Join",
        lambda _, m, text: joined(m, data_schema=OTHER_SCHEMA, working=TaskKey(run=text)),
    ),
    "FetchModel.run": (
        FEDERATION + "FetchModel",
        lambda _, m, text: all_of(m.stub.FetchModel(federation_pb2.FetchModelRequest(run=text), metadata=m.metadata)),
    ),
    "SubmitUpdate.run": (
        FEDERATION + "SubmitUpdate",
        lambda siege, m, text: m.stub.SubmitUpdate(
            iter([federation_pb2.SubmitUpdateRequest(header=federation_pb2.UpdateHeader(key=key_of(siege, run=text)))]),
            metadata=m.metadata,
        ),
    ),
    "SubmitEvaluation.run": (
        FEDERATION + "SubmitEvaluation",
        lambda siege, m, text: m.stub.SubmitEvaluation(
            federation_pb2.SubmitEvaluationRequest(key=key_of(siege, run=text)), metadata=m.metadata
        ),
    ),
    "SubmitEvaluation.tally": (
        FEDERATION + "SubmitEvaluation",
        lambda siege, m, text: m.stub.SubmitEvaluation(
            federation_pb2.SubmitEvaluationRequest(key=key_of(siege), tally={text: 1}), metadata=m.metadata
        ),
    ),
    "ReportProgress.run": (
        FEDERATION + "ReportProgress",
        lambda siege, m, text: m.stub.ReportProgress(
            federation_pb2.ReportProgressRequest(key=key_of(siege, run=text), stage=federation_pb2.STAGE_TRAINING),
            metadata=m.metadata,
        ),
    ),
    "ReportFailure.run": (
        FEDERATION + "ReportFailure",
        lambda siege, m, text: m.stub.ReportFailure(
            federation_pb2.ReportFailureRequest(key=key_of(siege, run=text), reason=text, message=text),
            metadata=m.metadata,
        ),
    ),
    "ReportFailure.message": (
        FEDERATION + "ReportFailure",
        # Of one that was asked, and has answered: it changes nothing, but its words reach the log.
        lambda siege, _, text: siege.a.stub.ReportFailure(
            federation_pb2.ReportFailureRequest(key=key_of(siege), reason=text, message=text),
            metadata=siege.a.metadata,
        ),
    ),
    "StopRun.run": (ADMIN + "StopRun", lambda siege, _, text: stopped(siege, text)),
    "WatchRun.run": (ADMIN + "WatchRun", lambda siege, _, text: watched(siege, text)),
    "ExportModel.run": (ADMIN + "ExportModel", lambda siege, _, text: exported(siege, text)),
    "RevokeClient.client": (ADMIN + "RevokeClient", lambda siege, _, text: siege.server.revoke(text, text)),
    "Submit.spec": (ADMIN + "Submit", lambda siege, _, text: submitted(siege, **{text: 1})),
    "Submit.name": (ADMIN + "Submit", lambda siege, _, text: submitted(siege, name=text)),
}


def misplaced(folder: Path) -> list[Path]:
    """Files where the names point."""
    there = (*folder.rglob("*"), *Path("/tmp").iterdir())  # noqa: S108
    return [one for one in there if "evil" in one.name or "forged" in one.name]


TAKEN = {"a column", "working.run", "ReportFailure.message"}  # may be anything that can be printed; words are made so


async def stopped(siege: Siege, run: str) -> None:
    await (await siege.server.desk()).StopRun(admin_pb2.StopRunRequest(run=run))


async def watched(siege: Siege, run: str) -> None:
    await all_of((await siege.server.desk()).WatchRun(admin_pb2.WatchRunRequest(run=run)))


async def exported(siege: Siege, run: str) -> None:
    await all_of((await siege.server.desk()).ExportModel(admin_pb2.ExportModelRequest(run=run)))


@pytest.fixture(params=[logs.TextLines, logs.JsonLines])
def log(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """What the server's log says, in either form, from the lowest level on."""
    text, seqfed = io.StringIO(), logging.getLogger("seqfed")
    handler, before = logging.StreamHandler(text), seqfed.level
    handler.setFormatter(request.param())
    seqfed.addHandler(handler)
    seqfed.setLevel(1)
    yield text
    seqfed.removeHandler(handler)
    seqfed.setLevel(before)


async def test_no_name_is_more_than_a_name(tmp_path: Path, log: io.StringIO) -> None:
    async with besieged(tmp_path, refusals_per_minute=10_000) as siege:
        m = await siege.outsider()
        ours = {one.parent for one in siege.files()}
        for name, (method, call) in FIELDS.items():
            for text in EVIL:
                try:
                    with typed():
                        await call(siege, m, text)
                except SeqfedError as refusal:
                    who = "operator:ops" if method.startswith(ADMIN) else "client:m"
                    siege.lines.append((who, method, type(refusal).__name__))
                    told = str(refusal)
                    assert len(told) < 4_000, (method, told)
                    assert type(refusal) is not SeqfedError
                    assert type(refusal).__name__ != "InternalError", (method, text)
                else:
                    assert name in TAKEN, (name, text)
                    assert name != "a column" or text.isprintable(), (name, text)
        await siege.waits()
        assert {one.parent for one in siege.files()} == ours
        await m.leave()
    assert not misplaced(tmp_path)
    lines = log.getvalue().split("\n")
    assert len(lines) > 10
    assert any("forged" in line for line in lines)  # a failure's words are there, within a line of ours
    for line in lines:
        assert not set(line) & set(map(chr, (*range(32), 127, 0x85, 0x2028, 0x202E))), repr(line)
        assert line[:1] in {"", "{", "2"}, line
        assert not line.startswith("2026-01-01 00:00:00,000"), line


async def test_what_an_operator_reads_of_a_client_is_one_line(tmp_path: Path) -> None:
    """The words that reach a terminal: a client's software, its failure, the reason of a run."""
    async with besieged(tmp_path) as siege:
        m = Site(await siege.server.channel(Role.CLIENT, "m"), "m")
        await m.join(software="1.0\n\x1b[2J\u202e")
        m.listen()
        await siege.listens("m")
        found = (await siege.server.desk()).ListClients(admin_pb2.ListClientsRequest())
        told = [one.software async for one in found if one.client == "m"]
        assert len(told) == 1
        assert told[0].isprintable(), told
        assert (await siege.view()).reason.isprintable()
        await m.leave()
