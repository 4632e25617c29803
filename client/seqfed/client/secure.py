"""A client's way through one masked sum: each step of `seqfed.common.masking.client`, sent to the server and answered by it; or
through an encrypted one, by `seqfed.client.encrypted`.

The server is asked through `ask` and `send` only, which go on over lost connections; what it answers is the half's to judge.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from blake3 import blake3

from seqfed.client.work import LocalUpdate
from seqfed.common.compression import rotsub
from seqfed.common.dp import noise, skellam
from seqfed.common.errors import MaskingRefused
from seqfed.common.homomorphic.messages import Circle, Encrypted, Fetch, Piece, ToOpen
from seqfed.common.masking.agreed import (
    clip_of,
    largest_weight,
    lattice_of,
    left_out,
    mechanism_of,
    part_of,
    rotation_seed,
    scalar_names,
    side_of,
    terms_of,
    weight_of,
)
from seqfed.common.masking.messages import Confirmed, Delivery, Done, Roster, Survivors
from seqfed.common.masking.terms import Purpose, Terms
from seqfed.common.quantising import quantise, shortened
from seqfed.common.seeds import generator
from seqfed.common.wire_masking import Reply, Request

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from seqfed.client.encrypted import Half
    from seqfed.client.masking import Masking
    from seqfed.common.layout import Flat
    from seqfed.common.masking.client import Client
    from seqfed.common.views import Task

R = TypeVar("R", Roster, Delivery, Survivors, Confirmed, Done, Circle, Piece)
Given = LocalUpdate | Mapping[str, int]  # what goes into the sum: a training's update, or the sums over its own data
Ask = Callable[[Request, Sequence[str]], Awaitable[Reply]]  # (a step, the roster's names) -> the server's answer
Send = Callable[[bytes, bytes], Awaitable[None]]  # (the packed vector, its BLAKE3)
Note = Callable[[], Awaitable[None]]
Made = asyncio.Future[tuple["NDArray[np.unsignedinteger[Any]] | None", list[int]]]  # see `contribution`


async def take_part(masking: Masking, task: Task, given: Given, ask: Ask, send: Send) -> None:
    """Be in the masked sum of task.key and task.masking, from the advertisement to the opening.

    Raises MaskingRefused, ConfigError for terms that cannot be, and what `ask` and `send` raise; the secrets are then forgotten.
    """
    threads, log, key = asyncio.to_thread, masking.log, task.key
    # Of what an evaluation or a measuring gives, one sum a round: it is the same each time, whatever the server sends before.
    digest = given.digest if isinstance(given, LocalUpdate) else blake3(task.kind.value.encode()).digest()
    if digest in await threads(log.opened, key):
        raise MaskingRefused(
            "what this client has to give was in a sum of this round that may have been opened, and it gives nothing twice"
        )
    terms = _terms(task, given)
    # Needs nothing of the others, so it is made while they are waited for.
    made = asyncio.ensure_future(threads(contribution, terms, task, masking.name, given))

    async def note() -> None:
        """From here on the others can open the sum, whether this client hears of it or not."""
        await threads(log.note_opened, key, digest)

    try:
        if task.spec.privacy.homomorphic:
            half = await threads(masking.encrypting, task.spec, terms)
            await _encrypted(half, made, note, ask, send)
        else:
            await _masked(masking.begin(task.spec, terms), made, note, ask, send)
    finally:
        await asyncio.wait((made,))  # it reads the update, whose memory the next training takes
        if not made.cancelled():
            made.exception()


async def _masked(half: Client, made: Made, note: Note, ask: Ask, send: Send) -> None:
    threads = asyncio.to_thread
    try:
        roster = _due(Roster, await ask(half.advertise(), ()))
        names = roster.names
        delivery = _due(Delivery, await ask(await threads(half.share, roster), names))
        packed, masked = await threads(half.mask, delivery, *await asyncio.shield(made))
        await note()
        if packed:
            await send(packed, masked.digest)
        del packed
        survivors = _due(Survivors, await ask(masked, names))
        confirmed = _due(Confirmed, await ask(half.confirm(survivors), names))
        opening = await threads(half.open, confirmed)
        _due(Done, await ask(opening, names))
    finally:
        half.wipe()


async def _encrypted(half: Half, made: Made, note: Note, ask: Ask, send: Send) -> None:
    threads = asyncio.to_thread
    names = _due(Circle, await ask(half.ready(), ())).names
    await threads(half.join, names)
    data = await threads(half.encrypt, *await asyncio.shield(made))
    digest = blake3(data).digest()
    await note()
    await send(data, digest)
    del data
    reply = await ask(Encrypted(digest), names)
    if isinstance(reply, ToOpen):
        half.check_members(reply.members)
        while half.next is not None:
            piece = _due(Piece, await ask(Fetch(half.next), names))
            await threads(half.decrypt, piece)
        packed, opened = await threads(half.open)
        if packed:
            await send(packed, opened.digest)
        reply = await ask(opened, names)
    _due(Done, reply)


def contribution(
    terms: Terms, task: Task, client: str, given: Given
) -> tuple[NDArray[np.unsignedinteger[Any]] | None, list[int]]:
    """This client's vector (None if the sum has none) and scalars, before they are masked."""
    spec, round_ = task.spec, task.key.round
    vector = None
    if isinstance(given, LocalUpdate):
        weight, seed, private = weight_of(spec, given.weight), rotation_seed(spec, round_), spec.privacy.dp
        mechanism = mechanism_of(spec, terms)
        part = part_of(spec, terms, given.delta.size)
        if mechanism is not None:
            noisy = private is not None and private.mode == "distributed"
            vector, clipped = skellam.encode(given.delta, mechanism, seed, noise.fresh_key(), noisy=noisy)
        else:
            draw, share = generator(spec.seed, round_, client, "rounding"), weight / largest_weight(spec)
            side = side_of(spec, terms)
            if part is not None:
                vector, clipped = rotsub.quantise(given.delta, share, part, seed, draw)
            elif side is not None:
                whole, clipped = shortened(given.delta, clip_of(spec, given.delta.size))
                vector, _ = quantise(side.project(whole), share, lattice_of(spec, terms), seed, draw)
            else:
                vector, clipped = quantise(given.delta, share, lattice_of(spec, terms), seed, draw)
        tally = {**given.tally, "weight": weight, "clients": 1, "clipped": int(clipped)}
        if private is not None and not private.is_public:
            # nothing of the data without noise, not even whether an update was clipped
            tally = {"weight": weight, "clients": 1}
    else:
        tally = dict(given)
    names = scalar_names(spec, terms.purpose)
    if strange := set(tally) - set(names):
        raise MaskingRefused(
            f"this client's sums have '{min(strange)}', for which the run's masked scalars have no place"
        )
    return vector, [tally.get(name, 0) for name in names]


def rest_of(task: Task, given: LocalUpdate) -> Flat:
    """What the task's sum does not have of an update, where that comes with the next one."""
    return left_out(task.spec, _terms(task, given), given.delta)


def _terms(task: Task, given: Given) -> Terms:
    if task.masking is None:
        raise MaskingRefused("the server's task has no number of a masked sum; run the same version on both sides")
    dim = given.delta.size if isinstance(given, LocalUpdate) else 0
    chosen, purpose = task.masking, Purpose(task.kind.value)
    model = task.model.digest
    return terms_of(
        task.spec, task.key, purpose, chosen.number, chosen.n_max, model, task.statistics, dim, chosen.known
    )


def _due(kind: type[R], reply: Reply) -> R:
    if not isinstance(reply, kind):
        raise MaskingRefused(f"the server answers with {type(reply).__name__} where {kind.__name__} is due")
    return reply
