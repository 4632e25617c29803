"""A member of the cohort is revoked in the middle of its round, by which its part in it ends at once and that of nobody else."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.hostile.siege import FEDERATION, MODEL, refusals
from tests.server.conftest import Site, averaged, flat_of, make_spec, some_delta, soon, typed
from tests.server.members import Guarded, guarded

from seqfed.common import chain, views, wire
from seqfed.common.errors import Unauthenticated
from seqfed.common.layout import Flat
from seqfed.server import audit
from seqfed.v1 import admin_pb2, federation_pb2
from seqfed.v1.federation_pb2 import SubmitUpdateRequest

LISTEN, SUBMIT = FEDERATION + "Listen", FEDERATION + "SubmitUpdate"


@dataclass
class Round:
    """The first round of a run, for which `sites` were asked; `model`: what it starts from."""

    server: Guarded
    run: str
    sites: dict[str, Site]
    tasks: dict[str, views.Task]
    model: Flat

    def delta(self, name: str) -> Flat:
        return some_delta(len(self.model), ord(name))

    async def send(self, name: str) -> None:
        await self.sites[name].submit(self.tasks[name], self.delta(name))

    async def end(self) -> tuple[views.RunView, Flat]:
        """What the operator sees last, and the model."""
        desk = await self.server.desk()

        async def last() -> views.RunView:
            seen = [one async for one in desk.WatchRun(admin_pb2.WatchRunRequest(run=self.run))]
            return wire.run_from_wire(seen[-1])

        view, data = await soon(last()), b""
        async for chunk in desk.ExportModel(admin_pb2.ExportModelRequest(run=self.run)):
            data += chunk.data
        return view, flat_of(data, len(self.model))


@contextlib.asynccontextmanager
async def a_round(folder: Path, names: str, **changes: Any) -> AsyncIterator[Round]:
    """The clients in `names` were asked."""
    async with guarded(folder) as server:
        sites = {site.name: site for site in await server.arrive(*names)}
        with typed():
            run = (await server.submit(make_spec(model=MODEL, **changes))).run
        tasks = {name: await site.task() for name, site in sites.items()}
        model = np.frombuffer(await sites["a"].fetch(tasks["a"]), "<f4")
        yield Round(server, run, sites, tasks, model)


async def cut_off(round_: Round, name: str) -> None:
    """Revoke it amid its upload; then all that it had open has ended, and what it still sends is refused."""
    site, task = round_.sites[name], round_.tasks[name]
    data = round_.delta(name).tobytes()
    upload: Any = site.stub.SubmitUpdate(metadata=site.metadata)
    await upload.write(SubmitUpdateRequest(header=wire.header_to_wire(site.header(task, data))))
    await upload.write(SubmitUpdateRequest(chunk=federation_pb2.Chunk(offset=0, data=data[:8192])))
    while (await site.status(task, data))[0] < 8192:
        pass
    await round_.server.revoke(name)
    assert await soon(site.tasks.get()) is None
    with pytest.raises(Unauthenticated, match=f"the certificates of client '{name}' were revoked"), typed():
        await soon(upload)
    with pytest.raises(Unauthenticated, match="was revoked; enrol again"):  # over the connection that is open still
        await round_.send(name)


def check_log(folder: Path) -> None:
    """It says what was ended and what was refused, and nothing of anybody else."""
    with audit.reading(folder / "state", None) as pages:
        entries = list(pages)
    chain.verify(entries)
    error = Unauthenticated.__name__
    assert sorted(refusals(entries)) == [("client:b", LISTEN, error), *[("client:b", SUBMIT, error)] * 2]
    (committed,) = [json.loads(one.body) for one in entries if one.kind == audit.Kind.COMMITTED]
    assert committed["folded"] == ["a", "c"]


async def test_the_round_goes_on_without_the_revoked(tmp_path: Path) -> None:
    async with a_round(tmp_path, "abc", cohort__min_clients=3, cohort__quorum=2) as round_:
        await round_.send("a")
        await cut_off(round_, "b")
        await round_.send("c")
        view, model = await round_.end()
        assert (view.phase, view.attempt) == ("finished", 1), view.reason
        assert (model == averaged(round_.model, (1, round_.delta("a")), (1, round_.delta("c")))).all()
    check_log(tmp_path)


async def test_the_round_is_tried_again_with_whoever_comes_in_its_place(tmp_path: Path) -> None:
    async with a_round(tmp_path, "ab") as round_:
        await round_.send("a")
        await cut_off(round_, "b")
        (c,) = await round_.server.arrive("c")
        round_.sites["c"], round_.tasks["c"] = c, await c.task()
        await round_.send("c")
        view, model = await round_.end()
        assert (view.phase, view.attempt) == ("finished", 2), view.reason  # and what `a` has sent still counts
        assert (model == averaged(round_.model, (1, round_.delta("a")), (1, round_.delta("c")))).all()
    check_log(tmp_path)


async def test_what_was_sent_before_a_revocation_counts(tmp_path: Path) -> None:
    async with a_round(tmp_path, "ab") as round_:
        await round_.send("a")
        await round_.server.revoke("a")
        await round_.send("b")
        view, model = await round_.end()
        assert view.phase == "finished", view.reason
        assert (model == averaged(round_.model, (1, round_.delta("a")), (1, round_.delta("b")))).all()
