"""Log lines: what they are about in its place, and valid JSON whatever is logged."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqfed.common.logs import JsonLines, TextLines, about, set_up

NAME = "tests.logs"


def logged(formatter: logging.Formatter) -> tuple[logging.Logger, io.StringIO]:
    """A logger that writes to the buffer alone."""
    logger = logging.getLogger(NAME)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    buffer = io.StringIO()
    handler = logging.StreamHandler(buffer)
    handler.setFormatter(formatter)
    logger.handlers = [handler]
    return logger, buffer


def test_text_says_what_it_is_about_in_front() -> None:
    logger, out = logged(TextLines())
    about(logger, run="1f2e", round=3, client="a").info("trained on %d", 7)
    about(about(logger, run="1f2e"), client="b").warning("gone")
    logger.info("listening")
    ends = [line.split(" ", 2)[2] for line in out.getvalue().splitlines()]
    assert ends == [
        f"INFO    {NAME}: run 1f2e round 3 client a: trained on 7",
        f"WARNING {NAME}: run 1f2e client b: gone",
        f"INFO    {NAME}: listening",
    ]


def test_a_message_stays_on_its_line() -> None:
    logger, out = logged(TextLines())
    logger.warning("%s", "no\r\n2026-01-01 00:00:00,000 INFO forged\x1b[2J\u2028\u202e\x85 ü")
    (line,) = out.getvalue().splitlines()
    assert line.endswith(r"no\r\n2026-01-01 00:00:00,000 INFO forged\x1b[2J\u2028\u202e\x85 ü")


def test_json_says_it_in_fields() -> None:
    logger, out = logged(JsonLines())
    about(logger, run="1f2e", round=3, client="a").info("trained on %d", 7)
    logger.info("listening")
    first, second = (json.loads(line) for line in out.getvalue().splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "INFO",
        "logger": NAME,
        "message": "trained on 7",
        "run": "1f2e",
        "round": 3,
        "client": "a",
    }
    assert second.keys() == {"time", "level", "logger", "message"}


@given(st.text(), st.text(), st.text())
def test_any_message_is_one_line_of_json(message: str, run: str, client: str) -> None:
    logger, out = logged(JsonLines())
    about(logger, run=run, client=client).info("%s", message)
    (line,) = out.getvalue().splitlines()
    found = json.loads(line)
    assert found["message"] == message
    assert (found.get("run", ""), found.get("client", "")) == (run, client)


@pytest.mark.parametrize(
    ("message", "arguments", "said"),
    [
        ("100 % sure", (), "100 % sure"),
        ("%d rounds", ("three",), "%d rounds ('three',)"),  # the caller's mistake must not cost the line
        ('{"a": "b"}\n\ud800\u2028', (), '{"a": "b"}\n\ud800\u2028'),
        (ValueError("no"), (), "no"),
        ({"a": 1}, (), "{'a': 1}"),
    ],
)
def test_odd_messages(message: object, arguments: tuple[object, ...], said: str) -> None:
    logger, out = logged(JsonLines())
    logger.info(message, *arguments)
    assert json.loads(out.getvalue())["message"] == said


def test_an_error_is_a_field_with_its_traceback() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    logger, out = logged(JsonLines())
    for error in (ValueError('line\n"two"'), Odd()):
        try:
            raise error
        except Exception:
            logger.exception("failed")
    logger.info("there", stack_info=True)
    first, second, third = (json.loads(line) for line in out.getvalue().splitlines())
    assert first["message"] == second["message"] == "failed"
    assert first["error"].startswith("Traceback")
    assert first["error"].endswith('ValueError: line\n"two"')
    assert "Odd" in second["error"]
    assert "test_an_error_is_a_field" in third["stack"]


def test_attributes_of_others_that_mean_something_else_are_left_out() -> None:
    logger, out = logged(JsonLines())
    logger.info("called", extra={"client": object(), "run": float("nan"), "round": 0})
    assert json.loads(out.getvalue()).keys() == {"time", "level", "logger", "message"}


@contextlib.contextmanager
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What comes on standard error while the root logger is as in a new process."""
    root, out = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers, root.level
    root.handlers = []
    monkeypatch.setattr(sys, "stderr", out)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)  # catch_warnings puts its own hook in
        try:
            yield out
        finally:
            logging.captureWarnings(False)
            root.handlers = handlers
            root.setLevel(level)


def test_all_that_is_logged_or_warned_of_in_a_process_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    with fresh_process(monkeypatch) as out:
        set_up(as_json=True)
        logging.getLogger("somebody.else").info("hello")
        logging.getLogger("somebody.else").debug("not this")
        warnings.warn("old", stacklevel=1)
    entries: list[dict[str, Any]] = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [one["logger"] for one in entries] == ["somebody.else", "py.warnings"]
    assert "old" in entries[1]["message"]


def test_text_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    with fresh_process(monkeypatch) as out:
        set_up()
        logging.getLogger("seqfed.x").info("hello")
    assert out.getvalue().endswith("INFO    seqfed.x: hello\n")
