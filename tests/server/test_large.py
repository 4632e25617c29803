"""A model over 2 GiB passes both ways: no message, no file and no integer on the way is too small for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from tests.server.conftest import make_spec

from seqfed.client.admin import operating
from seqfed.client.channel import connected
from seqfed.client.connection import Connection
from seqfed.common import views
from seqfed.common.model import layout_of
from seqfed.common.schema import DataSchema
from seqfed.common.transfer import Reassembly
from seqfed.server.daemon import serving
from seqfed.server.settings import ServerSettings


@pytest.mark.large  # 10 GB of memory, 7 GB of disk, about a minute
@pytest.mark.timeout(900)
async def test_a_model_over_2_gib_passes_both_ways(tmp_path: Path) -> None:
    spec = make_spec(model__hidden=6_800, model__layers=2, model__kind="lstm", cohort__min_clients=1)
    layout = layout_of(spec)
    assert layout.nbytes > 2**31
    room = np.empty(layout.size, np.float32)
    view = room.data.cast("B")

    def sink(offset: int, data: bytes) -> None:
        view[offset : offset + len(data)] = data

    async with (
        serving(ServerSettings(port=0, state=tmp_path)) as address,
        operating(address, False) as operator,
        connected(address, False) as channel,
    ):
        client = Connection(channel, address)
        await client.join("a", "0" * 32, DataSchema(features=2, steps=1, classes=2, examples=1))
        tasks = client.listen()
        run = (await operator.submit(spec, None)).run
        task = await anext(tasks)
        await client.fetch_model(run, 0, Reassembly(task.model.nbytes, task.model.digest, sink))
        last = float(room[-1])
        room.fill(0)
        room[-1] = 0.5  # the delta: what lies beyond 2 GiB must count
        header = views.UpdateHeader(task.key, 1, layout.digest, layout.nbytes, blake3(view).digest(), 0, {}, 0.0)
        await client.submit_update(header, view)
        views_ = [one async for one in operator.watch(run)]
        assert views_[-1].phase == "finished", views_[-1].reason
        path = tmp_path / "models" / run / "000001.t1.safetensors"
        with path.open("rb") as file:
            file.seek(-4, 2)
            assert np.frombuffer(file.read(), "<f4")[0] == np.float32(last + 0.5)
