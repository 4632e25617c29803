"""Sequences of tokens: plain text for the next token, and labelled strings, against the run's vocabulary.

Texts are kept as UTF-8; a run's unit and vocabulary make them token ids: characters are code points, words are what white
space separates, as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from seqfed.client.data.arrays import TokenRows
from seqfed.client.data.frame import Frame, short
from seqfed.client.data.labels import Labels, targets
from seqfed.client.data.numbers import Refused, no_label, reach
from seqfed.client.data.reading import Bound, text_of
from seqfed.client.data.sequences import ClientData, Sequences
from seqfed.client.data.store import Growing, Store
from seqfed.client.data.windows import Ints, cut, cut_tokens, held_out, held_out_rows
from seqfed.client.settings import DataSettings
from seqfed.common.errors import DataError, SchemaMismatch
from seqfed.common.schema import DataSchema
from seqfed.common.spec import DataSpec, RunSpec

CHUNK: Final = 1 << 20  # characters read, or bytes decoded, at once


@dataclass(frozen=True, eq=False)
class Texts:
    """D documents: UTF-8 bytes, and where each begins, int64 (D + 1,).

    entities, owners: as of Frame. place(d): where the d-th stands, for people.
    """

    content: NDArray[np.uint8]
    offsets: Ints
    source: str
    place: Callable[[int], str]
    labels: Labels | None = None
    entities: tuple[str, ...] = ()
    owners: Ints | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, document: int) -> str:
        return bytes(self.content[self.offsets[document] : self.offsets[document + 1]]).decode()

    def pieces(self, document: int) -> Iterator[str]:
        """One document in parts, cut between characters; words may be cut through."""
        first, end = int(self.offsets[document]), int(self.offsets[document + 1])
        while first < end:
            cut_at = min(first + CHUNK, end)
            while cut_at < end and self.content[cut_at] & 0xC0 == 0x80:  # within a character
                cut_at += 1
            yield bytes(self.content[first:cut_at]).decode()
            first = cut_at


def of_frame(frame: Frame, labels: Labels | None) -> Texts:
    """A table's column of strings, each row a document."""
    assert frame.texts is not None  # read with settings.text
    content, offsets = frame.texts
    return Texts(content, offsets, frame.source, frame.place, labels, frame.entities, frame.owners)


def read_texts(paths: list[Path], settings: DataSettings) -> Texts:
    """Plain text files, each a document, or each of their lines; raises DataError with file and line."""
    store = Store.of(settings)
    content, sizes, places = Growing(store, np.uint8), [], list[tuple[Path, int]]()
    bound = Bound(settings.unpacked_gib)
    for path in paths:
        with text_of(path, settings, bound, newline=None) as text:
            size = 0
            if settings.lines:
                for number, line in enumerate(_lines(path, text), 1):
                    if line:
                        content.add(np.frombuffer(line.encode(), np.uint8))
                        sizes.append(len(line.encode()))
                        places.append((path, number))
                continue
            while part := text.read(CHUNK):
                encoded = part.encode()
                content.add(np.frombuffer(encoded, np.uint8))
                size += len(encoded)
        if size == 0:
            raise DataError(f"{path}: is empty; text is needed")
        sizes.append(size)
        places.append((path, 0))
    if not sizes:
        raise DataError(f"{paths[0]}: has no line with any text")
    source = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"

    def place(document: int) -> str:
        path, line = places[document]
        return f"{path}, line {line}" if line else str(path)

    entities = () if settings.lines else tuple(str(path) for path in paths)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Texts(content.finish(), offsets, source, place, None, entities)


def _lines(path: Path, text: object) -> Iterator[str]:
    while line := text.readline(CHUNK + 1):  # type: ignore[attr-defined]
        if len(line) > CHUNK and not line.endswith("\n"):
            raise DataError(f"{path}: has a line of over a million characters; leave out data.lines, or break it")
        yield line.rstrip("\n")


@dataclass(frozen=True, eq=False)
class Coded:
    """Documents as token ids: the d-th is rows[begins[d] : ends[d]]. bad: bool (D,), whether it is refused; said: the first."""

    rows: NDArray[np.int32]
    begins: Ints
    ends: Ints
    bad: NDArray[np.bool_]
    said: str = ""


def code(texts: Texts, data: DataSpec, store: Store) -> Coded:
    """Token ids under the run's vocabulary and its rule for what is not in it."""
    assert data.vocabulary is not None  # DataSpec sees to it
    ids = {token: place for place, token in enumerate(data.vocabulary, 1)}
    coder = _Words(ids) if data.unit == "words" else _Characters(ids)
    rows = Growing(store, np.int32)
    ends = np.empty(len(texts), np.int64)
    bad = np.zeros(len(texts), np.bool_)
    said = ""
    for document in range(len(texts)):
        for found, unknown in coder.codes(texts.pieces(document)):
            if data.unknown == "skip":
                found = found[found > 0]  # noqa: PLW2901 -- the same tokens without the unknown ones
            elif data.unknown == "refuse" and unknown is not None:
                said = (
                    said or f"{texts.place(document)}: {short(unknown)} is not in the run's vocabulary (data.unknown)"
                )
                bad[document] = True
            rows.add(found)
        ends[document] = rows.size
    begins = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    return Coded(rows.finish(), begins, ends, bad, said)


class _Characters:
    """Code points to ids, through a table."""

    def __init__(self, ids: dict[str, int]) -> None:
        self._table = np.zeros(max(map(ord, ids), default=0) + 2, np.int32)
        for token, place in ids.items():
            self._table[ord(token)] = place

    def codes(self, pieces: Iterator[str]) -> Iterator[tuple[NDArray[np.int32], str | None]]:
        for piece in pieces:
            points = np.frombuffer(piece.encode("utf-32-le"), np.uint32)
            found = self._table[np.minimum(points, len(self._table) - 1)]
            yield found, piece[int(np.argmin(found))] if len(found) and found.min() == 0 else None


@dataclass
class _Words:
    """Words to ids; a word that ends a piece waits for the next."""

    ids: dict[str, int]
    waiting: str = field(default="", init=False)

    def codes(self, pieces: Iterator[str]) -> Iterator[tuple[NDArray[np.int32], str | None]]:
        for piece in pieces:
            words = (self.waiting + piece).split()
            self.waiting = words.pop() if words and not piece[-1].isspace() else ""
            yield self._of(words)
        if self.waiting:
            yield self._of([self.waiting])
            self.waiting = ""

    def _of(self, words: list[str]) -> tuple[NDArray[np.int32], str | None]:
        found = np.array([self.ids.get(word, 0) for word in words], np.int32)
        return found, words[int(np.argmin(found))] if len(found) and found.min() == 0 else None


class Tokens:
    """A Source of texts, or of token ids that are made already."""

    def __init__(
        self, settings: DataSettings, training: Texts | TokenRows, validation: Texts | TokenRows | None = None
    ) -> None:
        self._settings = settings
        self.training = training
        self.validation = validation
        self._store = Store.of(settings)

    @property
    def schema(self) -> DataSchema:
        """What the server is told: that they are texts, how many, and the highest class."""
        count = _count(self.training)
        both = [one.labels.highest() for one in (self.training, self.validation) if one and one.labels]
        held = 0 if self.validation is not None else int(_held(self.training, self._settings).sum())
        if count == 1 and self.validation is None and self._settings.validation_fraction > 0:
            return DataSchema(tokens=True, examples=1, validation_examples=1)  # its end
        return DataSchema(
            tokens=True,
            classes=max(one for one in both if one is not None) + 1 if both and None not in both else None,
            examples=count - held,
            validation_examples=held if self.validation is None else _count(self.validation),
        )

    def prepare(self, spec: RunSpec) -> ClientData:
        """The run's sequences; raises SchemaMismatch or DataError with file, row and remedy."""
        if spec.data.vocabulary is None:
            raise SchemaMismatch(f"{self.training.source} has texts, the run wants numbers")
        coded = self._coded(self.training, spec)
        out = (
            _held(self.training, self._settings)
            if self.validation is None
            else np.zeros(_count(self.training), np.bool_)
        )
        begins, ends = coded.begins, coded.ends
        if len(begins) == 1 and self.validation is None and spec.task.kind == "next_token":  # one long text: its end
            middle = ends - (self._settings.validation_fraction * (ends - begins)).astype(np.int64)
            training, refused = self._cut(self.training, coded, begins, middle, np.array([0]), spec)
            validation, more = self._cut(self.training, coded, middle, ends, np.array([0]), spec)
        else:
            kept, held = np.flatnonzero(~out), np.flatnonzero(out)
            training, refused = self._cut(self.training, coded, begins[kept], ends[kept], kept, spec)
            validation, more = self._cut(self.training, coded, begins[held], ends[held], held, spec)
        if self.validation is not None:
            coded = self._coded(self.validation, spec)
            every = np.arange(len(coded.begins))
            base = len(self.training.entities)
            validation, more = self._cut(self.validation, coded, coded.begins, coded.ends, every, spec, base)
        if len(training) == 0:
            why = refused.said(0) or "every text is empty, or has a single token"
            raise DataError(f"{self.training.source}: no sequence is left to train on: {why}")
        entities = self.training.entities + (self.validation.entities if self.validation is not None else ())
        return ClientData(training, validation, entities, (refused + more).said(len(training) + len(validation)))

    def measure(self, spec: RunSpec) -> dict[str, int]:
        """Raises SchemaMismatch: tokens have no mean."""
        raise SchemaMismatch(f"{self.training.source} has texts, the run wants numbers")

    def _coded(self, texts: Texts | TokenRows, spec: RunSpec) -> Coded:
        if isinstance(texts, Texts):
            return code(texts, spec.data, self._store)
        most = spec.data.inputs - 1
        if texts.rows.max(initial=0) > most:
            place = int(np.argmax(texts.rows > most))
            row = int(np.searchsorted(texts.begins, place, "right")) - 1
            step = place - int(texts.begins[row])
            raise DataError(
                f"{texts.source}: x[{row}, {step}] is {texts.rows[place]}; the run's token ids end at {most}"
            )
        return Coded(texts.rows, texts.begins, texts.ends, np.zeros(len(texts.begins), np.bool_))

    def _cut(
        self,
        texts: Texts | TokenRows,
        coded: Coded,
        begins: Ints,
        ends: Ints,
        which: Ints,
        spec: RunSpec,
        base: int = 0,
    ) -> tuple[Sequences, Refused]:
        """Sequences of some documents; which: int64 (E,), those that the stretches of tokens are of."""
        settings = self._settings
        steps, stride, _ = reach(spec.data, settings)
        bad = coded.bad[which]
        refused = Refused(int(bad.sum()), coded.said)
        begins, ends, which = begins[~bad], ends[~bad], which[~bad]
        if spec.task.kind == "next_token":
            starts, lengths, owners = cut_tokens(begins, ends, steps or 1, stride)
            documents = which[owners]
            owned = self._owned(texts, documents, base)
            return Sequences(coded.rows, starts, lengths, target="next token", entities=owned), refused
        empty = begins == ends
        if empty.any():
            first = _place(texts, int(which[int(np.argmax(empty))]))
            known = " of the vocabulary" if spec.data.unknown == "skip" else ""
            refused += Refused(int(empty.sum()), f"{first}: has no token{known}")
        starts, lengths, owners = cut(begins, ends, steps, spec.data.stride)
        documents = which[owners]
        y = None
        if not settings.unlabelled:
            if texts.labels is None:
                raise no_label(texts.source, spec)
            rows = documents if texts.labels.stretch_rows is None else texts.labels.stretch_rows[documents]
            y, there = targets(texts.labels, spec, rows)
            if not there.all():
                first = _place(texts, int(documents[int(np.argmin(there))]))
                refused += Refused(int((~there).sum()), f"{first}: has no label")
                starts, lengths, documents, y = starts[there], lengths[there], documents[there], y[there]
        return Sequences(coded.rows, starts, lengths, y, entities=self._owned(texts, documents, base)), refused

    @staticmethod
    def _owned(texts: Texts | TokenRows, documents: Ints, base: int) -> Ints:
        return (documents if texts.owners is None else texts.owners[documents]) + base


def _count(texts: Texts | TokenRows) -> int:
    return len(texts) if isinstance(texts, Texts) else len(texts.begins)


def _place(texts: Texts | TokenRows, document: int) -> str:
    return texts.place(document) if isinstance(texts, Texts) else f"{texts.source}: x[{document}]"


def _held(texts: Texts | TokenRows, settings: DataSettings) -> NDArray[np.bool_]:
    """Which documents are held out: whole entities where they have names."""
    if texts.entities:
        out = held_out(texts.entities, settings.validation_fraction, settings.seed)
        return out if texts.owners is None else out[texts.owners]
    return held_out_rows(_count(texts), settings.validation_fraction, settings.seed)
