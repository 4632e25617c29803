"""TOML and JSON into frozen settings, once, at the edge: every mistake is named with its key, its range and a suggestion."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from seqfed.common.errors import ConfigError

S = TypeVar("S", bound=BaseModel)


def load_toml(
    kind: type[S],
    path: Path,
    overrides: Mapping[str, Any] | None = None,
    tables: Mapping[str, Mapping[str, Any]] | None = None,
) -> S:
    """The settings in the file at `path`.

    `overrides` that are not None win over its top-level keys, and the entries of `tables` over those of its tables.
    Raises ConfigError for a file that is not there, is not TOML, or does not validate.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); is it a TOML file?") from error
    except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits, and arrays as deep
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    for name, table in (tables or {}).items():
        there = content.get(name, {})
        if table and isinstance(there, dict):  # what is no table is left for validation to name
            content[name] = {**there, **table}
    return validate(kind, {**content, **given}, str(path))


def validate(kind: type[S], content: Mapping[str, Any], source: str) -> S:
    """`content` as settings of this kind; raises ConfigError listing every mistake."""
    try:
        return kind.model_validate(dict(content))
    except ValidationError as error:
        raise ConfigError(_explain(kind, error, source)) from None


def validate_json(kind: type[S], text: bytes, source: str) -> S:
    """JSON text as settings of this kind; raises ConfigError listing every mistake."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(_explain(kind, error, source)) from None


def _explain(kind: type[BaseModel], error: ValidationError, source: str) -> str:
    lines = []
    for mistake in error.errors(include_url=False, include_context=False):
        key = ".".join(str(part) for part in mistake["loc"])
        match mistake["type"]:
            case "extra_forbidden":
                known = _fields_at(kind, mistake["loc"][:-1])
                close = difflib.get_close_matches(str(mistake["loc"][-1]), known, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(sorted(known))}"
                lines.append(f"unknown key '{key}'; {hint}")
            case "missing":
                lines.append(f"'{key}' is missing")
            case "value_error":
                lines.append(str(mistake["msg"]).removeprefix("Value error, "))
            case _:
                lines.append(f"'{key}' = {_short(mistake['input'])}: {mistake['msg']}")
    return f"{source}: " + "; ".join(lines)


def _fields_at(kind: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """The keys that the settings model allows at this place."""
    for part in place:
        field = kind.model_fields.get(str(part))
        inner = field.annotation if field is not None else None
        options = getattr(inner, "__args__", (inner,))
        models = [one for one in options if isinstance(one, type) and issubclass(one, BaseModel)]
        if not models:
            return []
        kind = models[0]
    return list(kind.model_fields)


def _short(value: object) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
