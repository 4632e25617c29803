"""Passwords in URLs: found, and kept out of messages."""

from __future__ import annotations

import re


def hidden(url: str) -> str:
    """The URL without its password, if it has one.

    >>> hidden("postgresql://seqfed:geheim@db/runs"), hidden("postgresql://db/runs?password=geheim&user=seqfed")
    ('postgresql://seqfed:***@db/runs', 'postgresql://db/runs?password=***&user=seqfed')
    """
    return re.sub(r"(?i)((?:password|secret|token)=)[^&]*", r"\1***", re.sub(r"(://[^/@:]*):[^/]*@", r"\1:***@", url))


def has_password(url: str) -> bool:
    return hidden(url) != url
