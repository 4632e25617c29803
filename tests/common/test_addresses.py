"""Addresses, and where plaintext may be spoken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqfed.common.addresses import DEFAULT_PORT, is_loopback, join, parse, require_private
from seqfed.common.errors import ConfigError, InsecureRefused


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("localhost", ("localhost", DEFAULT_PORT)),
        ("fed.example.org:80", ("fed.example.org", 80)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("10.0.0.1:65535", ("10.0.0.1", 65_535)),
        ("::1", ("::1", DEFAULT_PORT)),
        ("[::1]", ("::1", DEFAULT_PORT)),
        ("[fe80::1%eth0]:80", ("fe80::1%eth0", 80)),
    ],
)
def test_addresses_that_are(address: str, expected: tuple[str, int]) -> None:
    assert parse(address) == expected


@pytest.mark.parametrize(
    "address",
    [
        "",
        ":80",
        "host:",
        "host:http",
        "host:-1",
        "host:65536",
        "[::1]:70000",
        "[]:80",
        "[host]:80",
        "[::1",
        "a]:1",
        "http://localhost:80",
        "localhost/x:80",
        "a:1:2",
        "a b:1",
    ],
)
def test_addresses_that_are_not(address: str) -> None:
    with pytest.raises(ConfigError, match="is not HOST:PORT") as refused:
        parse(address)
    assert f"'{address}'" in str(refused.value)
    assert "localhost:7733" in str(refused.value)


@given(
    st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map(str) | st.text("abc019.-", min_size=1, max_size=9),
    st.integers(0, 65_535),
)
def test_join_and_parse_are_inverses(host: str, port: int) -> None:
    assert parse(join(host, port)) == (host, port)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("128.0.0.1", False),
        ("::", False),
        ("localhost.example.org", False),
        ("LAN", False),
    ],
)
def test_plaintext_stays_on_this_machine(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback
    require_private(host, insecure=True)
    if loopback:
        require_private(host, insecure=False)
    else:
        with pytest.raises(
            InsecureRefused, match=f"'{host}' is not a loopback .*pass --credentials DIR.* pass --insecure$"
        ):
            require_private(host, insecure=False)
