"""Models that a person wrote: `module:function`, imported only if whoever runs this process has said so.

A run's specification comes over the wire, and importing a module runs its code. So a client imports one only if its own
setting `allow_custom` names it, and the operator's commands only what their own run.toml names.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from typing import cast

from seqfed.common.errors import ConfigError, PolicyRefused
from seqfed.common.spec import RunSpec


def require_allowed(name: str | None, allowed: Collection[str]) -> None:
    """Raise PolicyRefused if `name` is a custom model's and not among `allowed`."""
    if name is not None and name not in allowed:
        raise PolicyRefused(
            f"custom: the run's model.custom is '{name}', which is not allowed here; if you trust that code, pass "
            f"--allow-custom {name}"
        )


def builder(name: str, allowed: Collection[str]) -> Callable[[RunSpec], object]:
    """The function that `name`, as module:function, stands for.

    Raises PolicyRefused if it is not among `allowed` (nothing is then imported), ConfigError if it cannot be imported.
    """
    require_allowed(name, allowed)
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        raise ConfigError(
            f"model.custom = '{name}': importing {module} failed: {type(error).__name__}: {error}; "
            "is its folder on PYTHONPATH, and all that it imports installed?"
        ) from error
    if not callable(found):
        raise ConfigError(f"model.custom = '{name}': {module} has no function {function}")
    return cast("Callable[[RunSpec], object]", found)
