"""Models' copies at a URL: there before their row is, fetched where the folder lacks them, and no harm when they fail."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from tests.server.test_store import RECORD, RUN, TRAINING, create, saved

from seqfed.common.checkpoint import ModelFile
from seqfed.common.errors import ConfigError, StorageError
from seqfed.server.copies import Copies
from seqfed.server.round import Phase, Run
from seqfed.server.store import Store, open_store


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield f"file://{tmp_path / 'copies'}" if request.param == "file" else "memory://models/of/runs"
    MemoryFileSystem.store.clear()


class Failing(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A filesystem that fails in what it is told to."""

    protocol = "failing"
    fails: frozenset[str] = frozenset()

    def _act(self, name: str, *arguments: Any, **options: Any) -> Any:
        if name in self.fails:
            raise RuntimeError("the far end\nhas gone")
        return getattr(super(), name)(*arguments, **options)

    def put_file(self, *arguments: Any, **options: Any) -> Any:
        return self._act("put_file", *arguments, **options)

    def mv(self, *arguments: Any, **options: Any) -> Any:
        return self._act("mv", *arguments, **options)

    def open(self, *arguments: Any, **options: Any) -> Any:
        return self._act("open", *arguments, **options)

    def ls(self, *arguments: Any, **options: Any) -> Any:
        return self._act("ls", *arguments, **options)


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[str]:
    fsspec.register_implementation("failing", Failing, clobber=True)
    yield f"failing://{tmp_path / 'copies'}"
    Failing.fails = frozenset()


def commit(store: Store, version: int) -> ModelFile:
    (found,) = store.runs()
    model = saved(store, RUN, version, found.spec)
    store.commit(RUN, replace(TRAINING, round=version), model=model, record=replace(RECORD, round=version))
    return model


def names(url: str) -> list[str]:
    files, root = fsspec.url_to_fs(url)
    return sorted(str(path).rpartition("/")[2] for path in files.find(root, withdirs=False))


def content(url: str, name: str) -> bytes:
    files, root = fsspec.url_to_fs(url)
    return bytes(files.cat_file(f"{root}/{RUN}/{name}"))


def test_every_model_is_copied_and_the_last_two_are_kept(tmp_path: Path, url: str) -> None:
    store = open_store(tmp_path / "state", models=url)
    create(store)
    assert names(url) == ["000000.t1.safetensors"]
    for version in (1, 2, 3):
        model = commit(store, version)
        assert content(url, model.path.name) == model.path.read_bytes()
        store.tidy(RUN, version, [])
    assert names(url) == ["000002.t1.safetensors", "000003.t1.safetensors"]
    store.close()


def test_the_copy_is_there_before_the_row(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path / "state", models=url)
    create(store)
    seen: list[int] = []
    put = Copies.put

    def watched(copies: Copies, run: str, file: Path) -> None:
        put(copies, run, file)
        seen.append(store.runs()[0].version)

    monkeypatch.setattr(Copies, "put", watched)
    commit(store, 1)
    assert (seen, store.runs()[0].version) == ([0], 1)
    store.close()


HARMS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "altered": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"),
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS.keys())
def test_a_model_that_is_not_whole_here_is_fetched(tmp_path: Path, url: str, harm: Callable[[Path], object]) -> None:
    store = open_store(tmp_path / "state", models=url)
    create(store)
    model = commit(store, 1)
    expected = model.path.read_bytes()
    store.close()
    harm(model.path)
    store = open_store(tmp_path / "state", models=url)
    assert model.path.read_bytes() == expected
    assert store.runs()[0].model == model
    store.close()


def test_a_copy_that_is_damaged_too_is_refused(tmp_path: Path, url: str) -> None:
    store = open_store(tmp_path / "state", models=url)
    create(store)
    model = store.model_path(RUN, 0)
    store.close()
    files, root = fsspec.url_to_fs(url)
    files.pipe_file(f"{root}/{RUN}/{model.name}", model.read_bytes()[:-1] + b"\x7f")
    model.unlink()
    with pytest.raises(StorageError, match=f"run {RUN}: its model {model.name} is damaged here, and so is its copy"):
        open_store(tmp_path / "state", models=url)


def test_without_copies_a_missing_model_is_named_with_the_remedy(tmp_path: Path) -> None:
    store = open_store(tmp_path / "state")
    create(store)
    model = store.model_path(RUN, 0)
    store.close()
    data = model.read_bytes()
    model.unlink()
    for _ in range(2):  # and the lease is let go
        with pytest.raises(StorageError, match=f"its model .*{model.name} is missing or damaged; .* the same --models"):
            open_store(tmp_path / "state")
    model.write_bytes(data)
    store = open_store(tmp_path / "state")
    store.commit(RUN, Run(Phase.STOPPED), ended=1.0)
    store.close()
    model.unlink()
    open_store(tmp_path / "state").close()  # a run that is over does not stand in the way


def test_a_copy_that_fails_is_an_error_and_nothing_is_lost(tmp_path: Path, failing: str) -> None:
    store = open_store(tmp_path / "state", models=failing)
    create(store)
    for fails in ("put_file", "mv"):
        before = store.runs()
        Failing.fails = frozenset({fails})
        with pytest.raises(
            StorageError, match=r"copying 000001.t1.safetensors of run .* to failing://.*: the far end has"
        ):
            commit(store, 1)
        assert store.runs() == before
        Failing.fails = frozenset()
    model = commit(store, 1)  # the next try is none the worse for it
    assert store.runs()[0].model == model
    assert content(failing, model.path.name) == model.path.read_bytes()
    store.close()


def test_old_copies_that_cannot_be_removed_hold_up_nothing(
    tmp_path: Path, failing: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path / "state", models=failing)
    create(store)
    for version in (1, 2):
        commit(store, version)
    Failing.fails = frozenset({"ls"})
    with caplog.at_level(logging.WARNING):
        store.tidy(RUN, 2, [])
    assert f"removing old models of run {RUN} from failing://" in caplog.text
    store.close()


def test_a_copy_that_cannot_be_fetched_is_an_error(tmp_path: Path, failing: str) -> None:
    store = open_store(tmp_path / "state", models=failing)
    create(store)
    model = store.model_path(RUN, 0)
    store.close()
    model.unlink()
    Failing.fails = frozenset({"open"})
    with pytest.raises(StorageError, match="fetching 000000.t1.safetensors of run .* from failing://.*: the far end"):
        open_store(tmp_path / "state", models=failing)
    Failing.fails = frozenset()
    open_store(tmp_path / "state", models=failing).close()
    assert model.exists()


@pytest.mark.parametrize(
    ("url", "told"), [("nothing://there", "Protocol not known"), ("absent://there", "pip install absent")]
)
def test_a_filesystem_that_is_not_there_is_a_mistake_in_the_settings(tmp_path: Path, url: str, told: str) -> None:
    fsspec.register_implementation("absent", "absent.Files", clobber=True, errtxt="pip install absent")
    with pytest.raises(ConfigError, match=f"models: {url} .*{told}"):
        open_store(tmp_path / "state", models=url)
    assert not (tmp_path / "state" / "seqfed.db").exists()
