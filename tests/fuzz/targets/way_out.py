"""HTTP heads, proxies' answers and WebSocket frames: the same in one piece as byte by byte."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from geomirror.environment import SeededEntropy
from geomirror.errors import GeomirrorError, RefusedError, RemoteProtocolError
from geomirror.tunnel.connect_proxy import ConnectAnswer
from geomirror.tunnel.http_head import HEAD_BYTES_MAX, HeadReader
from geomirror.tunnel.websocket import WebSocketFrames, answer_upgrade, upgrade_request
from tests.fuzz.source import Source

KEY = "dGhlIHNhbXBsZSBub25jZQ=="


def seeds() -> list[bytes]:
    """An answer of a proxy, a request, and frames of both sides."""
    client = WebSocketFrames(is_client=True, entropy=SeededEntropy(1))
    server = WebSocketFrames(is_client=False, entropy=SeededEntropy(1))
    answer = b'HTTP/1.1 407 Who\r\nProxy-Authenticate: Basic realm="a", Digest x\r\n\r\n'
    return [
        b"\0" + answer,
        b"\0HTTP/1.1 200 Connection established\r\n\r\n",
        b"\1" + upgrade_request("h", "/x", KEY),
        b"\2" + client.encode(b"hello") + client.ping() + client.close(),
        b"\3" + server.encode(bytes(200)) + b"\x02\x01a\x89\x00\x80\x01b" + server.close(),
    ]


def _in_pieces(make: Callable[[], Callable[[bytes], Any]], data: bytes, size: int) -> Any:
    """What comes out until an error, and the error's class."""
    take = make()
    found = []
    try:
        for at in range(0, len(data), size):
            found.append(take(data[at : at + size]))  # noqa: PERF401 - kept when one fails
    except GeomirrorError as error:
        assert isinstance(error, RemoteProtocolError), error
        return found, type(error)
    return found, None


def _first(outcome: tuple[list[Any], type | None]) -> Any:
    answers = [answer for answer in outcome[0] if answer is not None]
    return answers[0] if answers else outcome[1]


def _frames(is_client: bool) -> Callable[[], Callable[[bytes], bytes]]:
    def make() -> Callable[[bytes], bytes]:
        frames = WebSocketFrames(is_client=is_client, entropy=SeededEntropy(2))
        return lambda data: b"".join(frames.receive(data, lambda reply: None))

    return make


def run(data: bytes) -> None:
    """One of the readers, chosen by the first byte."""
    source = Source(data)
    kind = source.number() % 4
    rest = source.rest()[: 2 * HEAD_BYTES_MAX]
    if kind == 0:
        # A good answer with bytes behind it is refused if they come with it: by its end, then.
        end = rest.find(b"\r\n\r\n")
        rest = rest[: end + 4] if end >= 0 else rest
        outcomes = [
            _first(_in_pieces(lambda: ConnectAnswer().receive, rest, n)) for n in (1, 1 << 20)
        ]
        assert outcomes[0] == outcomes[1]
    elif kind == 1:
        outcomes = [_first(_in_pieces(lambda: HeadReader().receive, rest, n)) for n in (1, 1 << 20)]
        assert outcomes[0] == outcomes[1]
        if not isinstance(outcomes[0], type) and outcomes[0] is not None:
            with contextlib.suppress(RefusedError, RemoteProtocolError):
                assert answer_upgrade(outcomes[0], "/x").startswith(b"HTTP/1.1 101 ")
    else:
        whole = _in_pieces(_frames(kind == 3), rest, 1 << 20)
        single = _in_pieces(_frames(kind == 3), rest, 1)
        assert whole[1] == single[1]
        if whole[1] is None:
            assert b"".join(whole[0]) == b"".join(single[0])
