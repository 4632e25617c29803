"""The tree of errors."""

from __future__ import annotations

import errno
import inspect
import os

import pytest

from seqfed.common import errors
from seqfed.common.errors import SeqfedError, StorageError, StorageFull, every_error, storage_error


def test_every_class_is_found_by_its_name() -> None:
    written = {
        name: one for name, one in inspect.getmembers(errors, inspect.isclass) if one.__module__ == errors.__name__
    }
    assert every_error() == written
    assert all(issubclass(one, SeqfedError) and one.__doc__ for one in written.values())


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (errno.ENOSPC, StorageFull, "the disk is full; free some space; nothing saved before is lost"),
        (errno.EDQUOT, StorageFull, "the disk is full"),
        (errno.EACCES, StorageError, "Permission denied"),
        (errno.EIO, StorageError, "Input/output error"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", None, b"bytes"])
def test_an_oserror_becomes_typed(number: int, kind: type[SeqfedError], said: str, name: str | bytes | None) -> None:
    plain = OSError(number, os.strerror(number), *([] if name is None else [name]))
    found = storage_error(plain, "saving the model")
    assert type(found) is kind
    assert str(found).startswith("saving the model")
    assert said in str(found)
    assert name is None or (name if isinstance(name, str) else name.decode()) in str(found)
