"""Heads of HTTP messages and the answers of proxies: whole, byte by byte, damaged, endless."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomirror.errors import ConfigError, LinkError, RemoteProtocolError
from geomirror.tunnel.connect_proxy import (
    ConnectAnswer,
    Credentials,
    ProxyAnswer,
    connect_request,
    parse_credentials,
)
from geomirror.tunnel.http_head import HEAD_BYTES_MAX, HEADERS_MAX, Head, HeadReader

TOKEN = st.text("ABCXYZabcxyz0189-_!#$%&'*+.^`|~", min_size=1, max_size=20)
VALUE = st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=60
).map(lambda text: text.strip(" \t\x85\xa0"))
REASON = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=40)


def read(data: bytes, piece: int = 1 << 20) -> tuple[Head | None, bytes]:
    reader = HeadReader()
    for at in range(0, len(data), piece):
        head = reader.receive(data[at : at + piece])
        if head is not None:
            return head, reader.rest + data[at + piece :]
    return None, b""


@given(
    status=st.integers(200, 599),
    reason=REASON,
    headers=st.lists(st.tuples(TOKEN, VALUE), max_size=20),
    rest=st.binary(max_size=40),
    piece=st.integers(1, 64),
)
def test_a_head_is_read_the_same_in_any_pieces(status, reason, headers, rest, piece):
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers)]
    data = "\r\n".join([*lines, "", ""]).encode("latin-1") + rest
    for size in (1 << 20, 1, piece):
        head, behind = read(data, size)
        assert head is not None
        assert head.status() == status
        assert list(head.headers) == [(name.lower(), value) for name, value in headers]
        assert behind == rest


@given(st.binary(max_size=300))
def test_any_bytes_are_a_head_an_error_or_not_finished(data):
    for piece in (1 << 20, 3):
        with contextlib.suppress(RemoteProtocolError):
            head, _ = read(data, piece)
            assert head is None or b"\r\n\r\n" in data


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\n\n\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\rc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\x00\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nnothing\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n: b\r\n\r\n",
    ],
)
def test_what_servers_forgive_is_refused(data):
    with pytest.raises(RemoteProtocolError):
        read(data)


def test_an_endless_head_is_refused_and_little_of_it_is_kept():
    reader = HeadReader()
    with pytest.raises(RemoteProtocolError, match="over 8192 bytes"):
        for _ in range(100_000):
            reader.receive(b"HTTP/1.1 200 OK\r\nA: " + b"a" * 1000)
    assert len(reader._data) <= HEAD_BYTES_MAX
    with pytest.raises(RemoteProtocolError, match="more than"):
        read(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * (HEADERS_MAX + 1) + b"\r\n")
    with pytest.raises(RemoteProtocolError, match="over 8192 bytes"):
        HeadReader().receive(b"x" * (64 << 20))


def answer(data: bytes, piece: int = 1 << 20) -> ProxyAnswer | None:
    reading = ConnectAnswer()
    for at in range(0, len(data), piece):
        if (found := reading.receive(data[at : at + piece])) is not None:
            return found
    return None


@pytest.mark.parametrize("piece", [1, 5, 1 << 20])
def test_a_proxy_says_yes(piece):
    for data in (
        b"HTTP/1.1 200 Connection established\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nProxy-Agent: x\r\n\r\n",
        b"HTTP/1.1 200 \r\n\r\n",
        b"HTTP/1.1 200\r\n\r\n",
    ):
        found = answer(data, piece)
        assert found is not None and found.is_connected
        found.check("p:1", "t:2")


def test_every_truncation_of_an_answer_is_not_finished():
    data = b"HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=x\r\n\r\n"
    for length in range(len(data)):
        assert answer(data[:length]) is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'HTTP/1.1 407 x\r\nProxy-Authenticate: Basic realm="a"\r\n\r\n', r"it offers basic"),
        (b"HTTP/1.1 407 x\r\n\r\n", "no way of doing so"),
        (b"HTTP/1.1 403 Forbidden\r\n\r\nbody", r"refuses a connection to t:2 \(403\)"),
        (b"HTTP/1.1 503 x\r\n\r\n", "cannot reach t:2 itself"),
        (b"HTTP/1.1 302 x\r\nLocation: evil\r\n\r\n", "refuses"),
    ],
)
def test_a_proxy_says_no_and_the_words_say_why(data, message):
    found = answer(data)
    assert found is not None and not found.is_connected
    with pytest.raises(LinkError, match=message):
        found.check("p:1", "t:2")


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\n\r\nx",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
    ],
)
def test_nonsense_of_a_proxy_is_an_error(data):
    with pytest.raises(RemoteProtocolError):
        answer(data)


def test_credentials_go_into_the_request_and_into_no_message():
    credentials = parse_credentials(b"user:p:ss w\xc3\xb6rd\n", "file")
    request = connect_request("east.example:443", credentials)
    assert request.startswith(b"CONNECT east.example:443 HTTP/1.1\r\nHost: east.example:443\r\n")
    assert b"\r\nProxy-Authorization: Basic dXNlcjpwOnNzIHfDtnJk\r\n" in request
    assert request.endswith(b"\r\n\r\n") and request.count(b"\r\n\r\n") == 1
    assert "dXNl" not in repr(credentials)
    assert connect_request("[::1]:1", None) == b"CONNECT [::1]:1 HTTP/1.1\r\nHost: [::1]:1\r\n\r\n"


@pytest.mark.parametrize(
    "data", [b"", b"secret", b":secret", b"a:secret\nb:c", b"a:secret\x00", b"a:" + b"s" * 600]
)
def test_a_wrong_file_of_credentials_is_refused_without_showing_it(data):
    with pytest.raises(ConfigError, match="USER:PASSWORD") as caught:
        parse_credentials(data, "file")
    assert "secret" not in str(caught.value)


def test_credentials_cannot_add_lines_to_a_request():
    with pytest.raises(ConfigError):
        parse_credentials(b"a:b\r\nX: y\n", "file")
    assert isinstance(parse_credentials(b"a:b\r\n", "file"), Credentials)
