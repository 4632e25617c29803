"""Log lines on standard error, for every long-lived process alike: text for people, or a JSON object a line for programs.

Who tells of a run, a round or a client says so with `about`, so that both forms show it in the same place and a program finds
all lines of one round without reading the words.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
from collections.abc import Mapping
from typing import Any, Final

FIELDS: Final = ("run", "round", "client")  # attributes of a record that `about` sets; empty or 0: it is not about one

# C0, DEL and C1; what ends a line in Unicode; what turns the direction of writing round; half a character.
UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

AnyLogger = logging.Logger | logging.LoggerAdapter[logging.Logger]


def set_up(as_json: bool = False) -> None:
    """From INFO on: time, level, logger, what it is about, message; of everybody who logs, Python's warnings included."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if as_json else TextLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(as_json)  # otherwise they would stand between the objects
    logging.getLogger("alembic").setLevel(logging.WARNING)


def about(
    logger: AnyLogger,
    *,
    run: str = "",
    round: int = 0,  # noqa: A002 - the field's one name
    client: str = "",
) -> logging.LoggerAdapter[logging.Logger]:
    """A logger whose lines carry these, and those that the one given carries already."""
    known: Mapping[str, object] = {}
    if isinstance(logger, logging.LoggerAdapter):
        known, logger = logger.extra or {}, logger.logger
    mine = {"run": run, "round": round, "client": client}
    return logging.LoggerAdapter(logger, {**known, **{name: value for name, value in mine.items() if value}})


class TextLines(logging.Formatter):
    """'2026-01-31 12:00:00,000 INFO    seqfed.server: run 1f2e round 3 client a: message'.

    A message stays on its one line, whatever of a peer's it quotes: nothing in it can pass for a line of its own.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(prefix)s%(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        told = " ".join(f"{name} {value}" for name, value in _fields(record).items())
        record.prefix = f"{told}: " if told else ""
        record.message = UNPRINTABLE.sub(_escaped, record.message)
        return super().formatMessage(record)


class JsonLines(logging.Formatter):
    """One JSON object a line, in ASCII, whatever is logged: time (ISO 8601, UTC), level, logger, message; run, round and
    client where the line is about one; error, a traceback, where there is one.
    """

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
            **_fields(record),
        }
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        elif record.exc_text:  # another handler's formatter has made it
            entry["error"] = record.exc_text
        if record.stack_info:
            entry["stack"] = self.formatStack(record.stack_info)
        return json.dumps(entry)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def _fields(record: logging.LogRecord) -> dict[str, str | int]:
    """What the record is about, of those in FIELDS; others may log attributes of these names that mean something else."""
    found = {name: getattr(record, name, None) for name in FIELDS}
    return {name: value for name, value in found.items() if isinstance(value, str | int) and value}


def _message(record: logging.LogRecord) -> str:
    """The message; of one whose arguments do not fit its format, both as they are."""
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - logging's own answer to it is a traceback between the objects
        return f"{record.msg!s} {record.args!r}"
