"""Wide tables, one row an entity: an input's columns in the order of time become steps; all other columns repeat at each."""

from __future__ import annotations

import numpy as np

from seqfed.client.data.frame import Frame
from seqfed.client.data.store import Store
from seqfed.client.settings import DataSettings


def widen(frame: Frame, settings: DataSettings) -> Frame:
    """Each row of the table as T rows of its wide inputs and then its other columns; raises DataError for a bad column."""
    steps = len(next(iter(settings.wide.values())))
    used = {name for columns in settings.wide.values() for name in columns}
    for name in used:
        frame.check(name)
        frame.number(name)
    others = [name for name in frame.number_names if name not in used and name not in settings.wide]
    repeated = [frame.number_names.index(name) for name in others]
    per_step = [
        [frame.number_names.index(columns[step]) for columns in settings.wide.values()] for step in range(steps)
    ]
    store, count, inputs = Store.of(settings), len(frame), len(settings.wide)
    numbers = store.empty((count * steps, inputs + len(others)), np.float32)
    codes = store.empty((count * steps, len(frame.text_names)), np.int32)
    size = max(1, (1 << 20) // (steps * numbers.shape[1]))
    for first in range(0, count, size):
        block = np.asarray(frame.numbers[first : first + size])
        out = numbers[first * steps : (first + len(block)) * steps].reshape(len(block), steps, -1)
        for step, places in enumerate(per_step):
            out[:, step, :inputs] = block[:, places]
            out[:, step, inputs:] = block[:, repeated]
        codes[first * steps : (first + len(block)) * steps] = np.repeat(
            frame.codes[first : first + size], steps, axis=0
        )
    begins = np.arange(count, dtype=np.int64) * steps
    return Frame(
        numbers=numbers,
        number_names=(*settings.wide, *others),
        begins=begins,
        ends=begins + steps,
        entities=frame.entities,
        source=frame.source,
        place=lambda row: frame.place(row // steps),
        codes=codes,
        text_names=frame.text_names,
        values=frame.values,
        columns={name: column for name, column in frame.columns.items() if name not in used},
        owners=frame.owners,
        place_in_files=frame.place_in_files,
    )
