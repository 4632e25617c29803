"""What secure aggregation costs: masked rounds beside plain ones of the same clients, and the protocol's steps by themselves.

`python -m benchmarks.masking [--clients 10] [--params 1000000]`: real client processes, which train one step a round.
`... --clients 100 --params 100000 --drop 0.3`: clients with an update made of a seed, some hundred in a few processes (see
benchmarks/leavers.py); that share of them vanishes in every masked sum, once all have shared their keys.

Both over TLS and gRPC with a server of their own. The model after a masked round is held against the mean of the same clients'
quantised updates, made here without any masks.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import numpy as np

from benchmarks.harness import EXAMPLES, Federation, federation, machine, spec_for, tell
from benchmarks.leavers import MOST_EXAMPLES, name_of, update_of
from benchmarks.memory import megabytes
from seqfed.client.admin import operating
from seqfed.client.data import open_source
from seqfed.client.demo.processes import processes, server_address
from seqfed.client.demo.run import certify, masked
from seqfed.client.masking import Masking, masking_of
from seqfed.client.settings import DataSettings
from seqfed.client.work import LocalUpdate, Workshop
from seqfed.common import checkpoint, identity, quantising, wire
from seqfed.common.layout import Flat
from seqfed.common.masking import agreed, packing, prg, server, trust
from seqfed.common.masking.checks import check_advert
from seqfed.common.masking.messages import Advert, Confirmed, Delivery, Roster, Survivors
from seqfed.common.masking.terms import Purpose
from seqfed.common.masking.unmasking import Unmasking, scalar_totals, unmasking
from seqfed.common.model import initial_parameters, layout_of
from seqfed.common.seeds import generator
from seqfed.common.spec import CohortSpec, PrivacySpec, RunSpec
from seqfed.common.transfer import split
from seqfed.common.views import ModelVersion, RoundRecord, RunView, Task, TaskKey, TaskKind, UpdateHeader
from seqfed.common.wire_masking import request_to_wire
from seqfed.v1 import federation_pb2

P = ParamSpec("P")
T = TypeVar("T")

BLOCKS: Final = 8  # plain and masked rounds take turns, so that both see the machine in the same moods
LEAVING_TURNS: Final = 3  # runs of one round, of either kind: who has left stays away for a while


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--params", type=int, default=1_000_000, help="the model's size, met from above")
    parser.add_argument("--drop", type=float, help="share of the clients that vanish in a sum; under a third")
    parser.add_argument("--rounds", type=int, default=24, help="measured, of either kind, where nobody vanishes")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    if given.drop is None:
        spec = masked(spec_for(given.params, given.clients, 1), EXAMPLES)
        found = staying(spec, given.rounds)
    else:
        spec = leaving_spec(given.params, given.clients, given.drop)
        found = leaving(spec, round(given.drop * given.clients))
    found |= steps(spec, round((given.drop or 0.0) * given.clients))
    told = {"clients": given.clients, "params": layout_of(spec).size, "drop": given.drop or 0.0}
    tell({**told, **found, "load": round(load, 1), "machine": machine()}, given.json)


# Whole rounds ---------------------------------------------------------------------------------------------------------


class Turns:
    """Runs of both kinds, by turns: their rounds, and the server's memory in those with masks."""

    def __init__(self, running: Federation) -> None:
        self.running = running
        self.peak_mb = 0.0
        self.history: dict[str, list[RoundRecord]] = {"plain": [], "masked": []}

    def take(self, kind: str, spec: RunSpec, first: int) -> None:
        """One run; its rounds from the one at place `first` on count."""
        Path(f"/proc/{self.running.server_pid}/clear_refs").write_text("5")  # forgets how high its memory once was
        self.history[kind] += self.running.run(spec).history[first:]
        if kind == "masked":
            self.peak_mb = max(self.peak_mb, megabytes(self.running.server_pid, "VmHWM"))

    def figures(self, spec: RunSpec, error: float) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for kind, records in self.history.items():
            found[f"{kind}_round_ms"] = _median(one.seconds - one.slowest_training_seconds for one in records)
            found[f"{kind}_whole_ms"] = _median(one.seconds for one in records)
        sent = [one.bytes_up / len(one.folded) / layout_of(spec).size for one in self.history["masked"]]
        return {
            **found,
            "ratio": round(found["masked_round_ms"] / found["plain_round_ms"], 3),
            "rounds": len(self.history["masked"]),
            "counted_bytes_per_param": round(max(sent), 4),
            "max_abs_error": error,
            "server_peak_mb": round(self.peak_mb, 1),
        }


def staying(spec: RunSpec, rounds: int) -> dict[str, Any]:
    """Client processes that train, and stay."""
    clients, a_block = spec.cohort.min_clients, max(1, rounds // BLOCKS)
    kinds = {"plain": _plain(spec, a_block + 1), "masked": _anew(spec, rounds=a_block + 1)}
    print(f"{clients} clients, {layout_of(spec).size:,} parameters", file=sys.stderr)
    with federation(clients, tls=True) as running:
        assert running.credentials is not None
        work = running.credentials.parent
        running.run(_plain(spec, 1))  # loads torch
        error = _error(running, spec, work, lambda name, task, model: _trained(work, name, task, model))
        print(f"exact to {error}", file=sys.stderr)
        turns = Turns(running)
        for number in range(BLOCKS):
            for kind, one in kinds.items():
                turns.take(kind, one, 1)  # the first round of a run builds the clients' networks
            print(f"block {number + 1} of {BLOCKS}", file=sys.stderr)
        return turns.figures(spec, error)


def leaving_spec(params: int, clients: int, drop: float) -> RunSpec:
    """One round of all clients, with as many at the end as are left."""
    spec = masked(spec_for(params, clients, 1), MOST_EXAMPLES)
    left = clients - round(drop * clients)
    privacy = spec.privacy.model_copy(update={"drop": drop})
    return _anew(spec, cohort=CohortSpec(min_clients=clients, quorum=left), privacy=privacy)


def leaving(spec: RunSpec, leave: int) -> dict[str, Any]:
    """Clients with updates of a seed, the first of which vanish in every masked sum."""
    clients = spec.cohort.min_clients
    print(f"{clients} clients, {layout_of(spec).size:,} parameters; {leave} vanish", file=sys.stderr)
    with crowd(clients, leave) as running:
        assert running.credentials is not None
        work = running.credentials.parent
        connected(running, clients)
        running.run(_plain(spec, 1))
        size = layout_of(spec).size
        error = _error(running, spec, work, lambda name, *_: update_of(int(name.rpartition("-")[2]), size))
        print(f"exact to {error}", file=sys.stderr)
        turns = Turns(running)
        for number in range(LEAVING_TURNS):
            for kind, one in {"plain": _plain(spec, 1), "masked": spec}.items():
                connected(running, clients)
                turns.take(kind, one, 0)
            print(f"turn {number + 1} of {LEAVING_TURNS}", file=sys.stderr)
        folded = {len(one.folded) for one in turns.history["masked"]}
        if folded != {clients - leave}:
            raise SystemExit(f"{folded} clients were in masked sums, of {clients} of which {leave} had vanished")
        return turns.figures(spec, error)


@contextlib.contextmanager
def crowd(clients: int, leave: int) -> Iterator[Federation]:
    """A server, and so many sessions in as many processes as there are cores."""
    names = [name_of(number) for number in range(clients)]
    count = os.cpu_count() or 2
    edges = [clients * number // count for number in range(count + 1)]
    quiet = {**os.environ, "GRPC_VERBOSITY": "NONE"}
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="seqfed-benchmark-") as folder:
        work = Path(folder)
        tls, credentials = certify(work, names)
        with processes(work / "logs") as started:
            started.start("server", "server", "--port", "0", "--state", str(work / "server"), "--tls", str(tls))
            address = server_address(work / "server", started)
            try:
                for first, last in itertools.pairwise(edges):
                    numbers = (first, last - first, leave)
                    command = [sys.executable, "-m", "benchmarks.leavers", str(os.getpid()), address, folder]
                    children.append(subprocess.Popen([*command, *map(str, numbers)], env=quiet))
                yield Federation(address, started.pid("server"), started, credentials)
            finally:
                for one in children:
                    one.kill()
                    one.wait()


def connected(running: Federation, clients: int) -> None:
    """Wait until all are."""

    async def wait() -> None:
        async with operating(running.address, insecure=False, credentials=running.credentials) as operator:
            while sum(one.connected for one in await operator.clients()) < clients:
                running.started.require_alive()
                await asyncio.sleep(0.2)

    asyncio.run(wait())


# The oracle -----------------------------------------------------------------------------------------------------------


def _error(running: Federation, spec: RunSpec, work: Path, update: Callable[[str, Task, Flat], LocalUpdate]) -> float:
    """How far the model of a masked run of one round is from that of the same updates without masks, at most."""
    view = running.run(spec)
    path = work / "model.safetensors"

    async def export() -> None:
        async with operating(running.address, insecure=False, credentials=running.credentials) as operator:
            await operator.export(view.run, path)

    asyncio.run(export())
    found = checkpoint.load(path, layout_of(spec)).flat
    return float(np.abs(found.astype(np.float64) - unmasked(view, update)).max())


def unmasked(view: RunView, update: Callable[[str, Task, Flat], LocalUpdate]) -> Flat:
    """The model after a run's first round, from the integer sum of its clients' quantised updates."""
    spec, record = view.spec, view.history[0]
    layout, model = layout_of(spec), initial_parameters(spec).flat
    task = Task(
        TaskKind.TRAIN, TaskKey(view.run, 1, record.attempt), spec, ModelVersion(0, layout.nbytes, b"", layout.digest)
    )
    bits, most = spec.privacy.b, agreed.largest_weight(spec)
    lattice = quantising.Lattice(layout.size, bits, quantising.levels(bits, len(record.cohort)), spec.privacy.clip)
    seed, total, weights = agreed.rotation_seed(spec, 1), np.zeros(layout.size, np.int64), 0
    for name in record.folded:
        made = update(name, task, model)
        weight = agreed.weight_of(spec, made.weight)
        draw = generator(spec.seed, 1, name, "rounding")
        residues, _ = quantising.quantise(made.delta, weight / most, lattice, seed, draw)
        half = 1 << (bits - 1)
        total += (residues.astype(np.int64) + half) % (1 << bits) - half
        weights += weight
    residue = (total % (1 << bits)).astype(lattice.dtype)
    change = quantising.decode(residue, lattice, seed, clients=len(record.folded), weight=weights, max_weight=most)
    return model + change


def _trained(work: Path, name: str, task: Task, model: Flat) -> LocalUpdate:
    """What a client of `harness.federation` makes of its data."""
    file = work / f"{int(name.rpartition('-')[2])}.npz"
    source = open_source(DataSettings(file=(str(file),), validation_fraction=0.0))
    made = Workshop(name, source).train(task, model, lambda: False)
    assert made is not None
    return made


# The steps by themselves ----------------------------------------------------------------------------------------------


def steps(spec: RunSpec, leave: int) -> dict[str, Any]:
    """CPU time of each step over the pure halves, of the second of two sums: in the first, certificates are new, too."""
    names = [name_of(number) for number in range(spec.cohort.min_clients)]
    with tempfile.TemporaryDirectory(prefix="seqfed-benchmark-") as folder:
        work = Path(folder)
        certify(work, names)
        ca = identity.load_credentials(work / "tls").ca
        maskings = [masking_of(name, work / name, work / name / identity.CREDENTIALS, None) for name in names]
        first = one_sum(spec, maskings, ca, 1, leave)
        return {**one_sum(spec, maskings, ca, 2, leave), "first_share_ms": first["share_ms"]}


def one_sum(spec: RunSpec, maskings: list[Masking], ca: bytes, number: int, leave: int) -> dict[str, Any]:
    """One masked sum of zeros in one thread, but for the server's at its end; the first so many clients leave amid it."""
    layout, key = layout_of(spec), TaskKey(16 * "0", 1, 1)
    terms = agreed.terms_of(spec, key, Purpose.TRAIN, number, len(maskings), bytes(32), b"", layout.size)
    halves = {one.name: one.begin(spec, terms) for one in maskings}
    sent, vectors = Counter[str](), set[int]()
    spent: dict[str, dict[str, float]] = {"share": {}, "mask": {}, "unmask": {}}
    total = np.zeros(terms.dim, terms.dtype)

    def certified(advert: Advert) -> None:
        trust.bound(advert, ca, identity.now())

    adverts = [half.advertise() for half in halves.values()]
    for advert in adverts:
        check_advert(terms, advert, certified)
        sent[advert.client] += request_to_wire(key, number, advert).ByteSize()
    state = server.begin(terms, adverts)

    def timed(step: str, name: str, work: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
        begun = time.thread_time()
        found = work(*given, **named)
        spent[step][name] = spent[step].get(name, 0.0) + 1000 * (time.thread_time() - begun)
        return found

    def take(event: server.Shared | server.Masked | server.Confirming | server.Opened) -> None:
        nonlocal state
        sent[event.client] += request_to_wire(key, number, event.message).ByteSize()
        state, _ = server.on(state, event)

    for name, half in halves.items():
        roster = Roster(state.roster.adverts)  # one of its own: what it remembers, no other has
        take(server.Shared(name, timed("share", name, half.share, roster)))
    for name in list(halves)[:leave]:
        del halves[name]
        state, _ = server.on(state, server.Left(name, "it has left"))
    for name, half in halves.items():
        delivery, vector = _due(Delivery, state, name), np.zeros(terms.dim, terms.dtype)
        packed, message = timed("mask", name, half.mask, delivery, vector, [1] * terms.scalars)
        vectors.add(len(packed))
        sent[name] += _upload_bytes(layout.digest, key, number, packed)
        total += packing.unpack(packed, terms.bits, terms.dim, terms.dtype)
        take(server.Masked(name, message))
    for name, half in halves.items():
        survivors = _due(Survivors, state, name)
        take(server.Confirming(name, timed("unmask", name, half.confirm, survivors)))
    for name, half in halves.items():
        confirmed = _due(Confirmed, state, name)
        take(server.Opened(name, timed("unmask", name, half.open, confirmed)))
    began, begun = time.perf_counter(), time.process_time()
    found = unmasking(state)
    assert isinstance(found, Unmasking), found
    scalars = scalar_totals(state, found)
    prg.threads(total, found.plus, found.minus, os.cpu_count() or 1)
    cpu, wall = 1000 * (time.process_time() - begun), 1000 * (time.perf_counter() - began)
    if scalars != (len(halves),) * terms.scalars or (total & ((1 << terms.bits) - 1)).any():
        raise SystemExit("a masked sum of zeros is not zero")
    return {
        **{
            f"{step}_ms": round(statistics.median(spent[step][name] for name in halves), 1)
            for step in ("share", "mask")
        },
        "unmask_client_ms": round(statistics.median(spent["unmask"].values()), 1),
        "unmask_server_ms": round(cpu, 1),
        "unmask_server_wall_ms": round(wall, 1),
        "upload_bytes_per_param": round(max(vectors) / layout.size, 4),
        "messages_bytes_per_param": round(max(sent.values()) / terms.dim, 4),
    }


def _due(kind: type[T], state: server.State, name: str) -> T:
    """The server's answer to this client."""
    reply = server.answer(state, name)
    assert isinstance(reply, kind), reply
    return reply


def _upload_bytes(layout_digest: bytes, key: TaskKey, number: int, packed: bytes) -> int:
    """Of the messages in which a masked vector is sent."""
    said = UpdateHeader(key, 0, layout_digest, len(packed), bytes(32), 0, {}, 1.0, number)
    header = federation_pb2.SubmitUpdateRequest(header=wire.header_to_wire(said))
    chunks = (federation_pb2.Chunk(offset=offset, data=data) for offset, data in split(memoryview(packed), 0))
    return header.ByteSize() + sum(federation_pb2.SubmitUpdateRequest(chunk=one).ByteSize() for one in chunks)


# Small things ---------------------------------------------------------------------------------------------------------


def _plain(spec: RunSpec, rounds: int) -> RunSpec:
    """The same run with that many rounds, and without masks."""
    return _anew(spec, rounds=rounds, privacy=PrivacySpec())


def _anew(spec: RunSpec, **changes: Any) -> RunSpec:
    """The run with these changes, checked and with a canonical text of its own."""
    return RunSpec.model_validate({**{name: getattr(spec, name) for name in RunSpec.model_fields}, **changes})


def _median(seconds: Iterable[float]) -> float:
    """In milliseconds."""
    return round(1000 * statistics.median(seconds), 1)


if __name__ == "__main__":
    main()
