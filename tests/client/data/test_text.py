"""Texts as tokens against slow readings: characters and words, the unknown ones, windows, labels, the split."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqfed.client.data import ClientData, Sequences, open_source
from seqfed.client.data import text as text_module
from seqfed.client.settings import DataSettings
from seqfed.common.errors import DataError, SchemaMismatch
from seqfed.common.spec import RunSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


def read(settings: dict[str, Any], data: dict[str, Any], kind: str = "classification") -> ClientData:
    given = DataSettings.model_validate({"validation_fraction": 0.0, **settings})
    return open_source(given).prepare(RunSpec.model_validate({"data": data, "task": {"kind": kind}}))


def sequences(made: Sequences) -> list[tuple[list[int], list[int]]]:
    found = []
    for one in range(len(made)):
        batch = made.batch(np.array([one]))
        found.append((batch.x[0].tolist(), np.atleast_1d(batch.y[0]).tolist()))
    return found


def slow_ids(text: str, unit: str, vocabulary: list[str], unknown: str) -> list[int]:
    tokens = text.split() if unit == "words" else list(text)
    ids = [vocabulary.index(token) + 1 if token in vocabulary else 0 for token in tokens]
    return [one for one in ids if one] if unknown == "skip" else ids


texts = st.text(alphabet="abé\U0001f642 \n", min_size=1, max_size=40)


@given(
    documents=st.lists(texts, min_size=1, max_size=4),
    unit=st.sampled_from(("characters", "words")),
    unknown=st.sampled_from(("token", "skip")),
    steps=st.integers(1, 6),
    chunk=st.sampled_from((1, 5, 1 << 20)),
    mapped=st.booleans(),
)
def test_next_token(
    folder: Path, documents: list[str], unit: str, unknown: str, steps: int, chunk: int, mapped: bool
) -> None:
    for old in folder.glob("d*.txt"):
        old.unlink()
    for place, text in enumerate(documents):
        (folder / f"d{place}.txt").write_bytes(text.encode())
    vocabulary = ["a", "é", "\U0001f642"]
    data = {"vocabulary": vocabulary, "unit": unit, "unknown": unknown, "steps": steps}
    expected = []
    for text in documents:
        ids = slow_ids(text, unit, vocabulary, unknown)
        for at in range(0, len(ids) - 1, steps):
            size = min(steps, len(ids) - 1 - at)
            expected.append((ids[at : at + size], ids[at + 1 : at + size + 1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "CHUNK", chunk)
        try:
            made = read({"file": str(folder / "d*.txt"), "memory_mib": 0.0 if mapped else 64.0}, data, "next_token")
        except DataError as error:
            assert not expected
            assert "no sequence is left to train on: every text is empty, or has a single token" in str(error)
            return
    assert sequences(made.training) == expected
    assert made.training.weight == sum(len(x) for x, _ in expected)


def test_of_a_single_text_the_end_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"abababababcdcdc"))
    settings = {"file": str(path), "validation_fraction": 0.34}
    made = read(settings, {"vocabulary": list("abcd"), "steps": 4}, "next_token")
    assert [x for x, _ in sequences(made.training)] == [[1, 2, 1, 2], [1, 2, 1, 2], [1]]
    assert [x for x, _ in sequences(made.validation)] == [[3, 4, 3, 4]]
    schema = open_source(DataSettings.model_validate(settings)).schema
    assert (schema.tokens, schema.examples, schema.validation_examples) == (True, 1, 1)


def test_each_line_a_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"ab\r\n\r\nba\nb\n")
    made = read({"file": str(path), "lines": True}, {"vocabulary": ["a", "b"], "steps": 9}, "next_token")
    assert sequences(made.training) == [([1], [2]), ([2], [1])]


def test_line_ends_are_one_character(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc\n")
    made = read({"file": str(tmp_path / "a.txt")}, {"vocabulary": ["\n"], "steps": 9}, "next_token")
    assert sequences(made.training) == [([0, 1, 0, 1, 0], [1, 0, 1, 0, 1])]


def test_documents_are_held_out_whole(tmp_path: Path) -> None:
    for place in range(4):
        (tmp_path / f"{place}.txt").write_text(str(place) * 5)
    made = read(
        {"file": str(tmp_path / "*.txt"), "validation_fraction": 0.5},
        {"vocabulary": list("0123"), "steps": 2},
        "next_token",
    )
    sides = [{x[0] for x, _ in sequences(side)} for side in (made.training, made.validation)]
    assert (len(sides[0]), len(sides[1]), sides[0] & sides[1]) == (2, 2, set())
    assert made.training.entities is not None
    assert {made.entities[one] for one in made.training.entities} == {
        str(tmp_path / f"{one - 1}.txt") for one in sides[0]
    }


# Labelled strings -----------------------------------------------------------------------------------------------------


def test_labelled_strings(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('smiles,toxic,soluble\nCCO,1,\n"C,N",0,1\n,1,1\nOO,,\nNCX,0,0\n')
    settings = {"file": str(path), "text": "smiles", "label": ["toxic", "soluble"]}
    made = read(settings, {"vocabulary": ["C", "O", "N"], "targets": 2, "steps": 2}, "multilabel")
    assert [x for x, _ in sequences(made.training)] == [[1, 2], [0, 3], [1, 0]]
    np.testing.assert_array_equal(made.training.y, np.array([[1, np.nan], [0, 1], [0, 0]], np.float32))
    assert made.refused == f"2 of 5 sequences refused; the first: {path}, line 4: has no token"
    made = read(settings, {"vocabulary": ["C", "O", "N"], "targets": 2, "unknown": "refuse"}, "multilabel")
    assert [x for x, _ in sequences(made.training)] == [[1, 1, 2]]
    assert made.refused is not None
    assert made.refused.startswith(
        f"4 of 5 sequences refused; the first: {path}, line 3: ',' is not in the run's vocabulary"
    )


def test_reviews_by_words(tmp_path: Path) -> None:
    path = tmp_path / "a.task"
    path.write_bytes('1\tgood "caf\xe9" , good\n0\tbad\n'.encode("latin-1"))
    settings = {
        "file": str(path),
        "text": "review",
        "label": "y",
        "names": ["y", "review"],
        "delimiter": "tab",
        "encoding": "latin-1",
    }
    made = read(
        settings, {"vocabulary": ["good", '"caf\xe9"'], "unit": "words", "unknown": "skip", "labels": ["0", "1"]}
    )
    assert sequences(made.training) == [([1, 2, 1], [1])]
    assert made.refused == f"1 of 2 sequences refused; the first: {path}, line 2: has no token of the vocabulary"
    schema = open_source(DataSettings.model_validate(settings)).schema
    assert (schema.tokens, schema.classes, schema.examples, schema.validation_examples) == (True, 2, 2, 0)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.floats(0, 1, exclude_max=True), st.booleans())
def test_the_split_of_strings(folder: Path, groups: list[int], held_out: float, grouped: bool) -> None:
    path = folder / "strings.csv"
    path.write_text("g,s,y\n" + "".join(f"{group},{'a' * (place + 1)},0\n" for place, group in enumerate(groups)))
    settings = {"file": str(path), "text": "s", "label": "y", "validation_fraction": held_out}
    made = read({**settings, **({"group": "g"} if grouped else {})}, {"vocabulary": ["a"], "classes": 2})
    places = [[int(one) - 1 for one in side.lengths] for side in (made.training, made.validation)]
    assert sorted(places[0] + places[1]) == list(range(len(groups)))
    count = len(set(groups)) if grouped else len(groups)
    if grouped:
        sides = [{groups[place] for place in side} for side in places]
        assert sides[0] & sides[1] == set()
        assert len(sides[1]) == min(int(held_out * count), count - 1)
    else:
        assert len(places[1]) == min(int(held_out * count), count - 1)


@pytest.mark.parametrize(
    ("content", "settings", "said"),
    [
        (b"", {}, "a.txt: is empty; text is needed"),
        (b"\n\n", {"lines": True}, "a.txt: has no line with any text"),
        (
            b"x" * 1_100_000,
            {"lines": True},
            "a.txt: has a line of over a million characters; leave out data.lines, or break it",
        ),
        (b"ab\ncd\xff", {}, "a.txt, line 2: not utf-8 text"),
        (b"ab", {}, "a.txt: which column is the label? The run's task is classification"),
    ],
)
def test_texts_that_are_refused(tmp_path: Path, content: bytes, settings: dict[str, Any], said: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError) as refused:
        read({"file": str(tmp_path / "a.txt"), **settings}, {"vocabulary": ["a"], "classes": 2})
    assert said in str(refused.value)


def test_texts_for_a_run_of_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab")
    with pytest.raises(SchemaMismatch, match="has texts, the run wants numbers"):
        read({"file": str(tmp_path / "a.txt")}, {"features": 1, "classes": 2})
