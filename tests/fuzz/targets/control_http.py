"""Raw bytes on the real control socket: whatever comes, the next caller gets his answer.

The socket is this user's alone; what is proven is that a broken client harms nobody but itself.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import logging
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache

from geomirror.errors import NotFoundError
from geomirror.node.calls import Caller, MethodRegistry, Parameters
from geomirror.node.control_io import ControlServer
from geomirror.node.events import EventRing
from tests.fuzz.loop import LOOP
from tests.fuzz.source import Source, chunks

ANSWER_S_MAX = 5.0


class Echo(Parameters, frozen=True):
    """Parameters of the methods here."""

    text: str = ""


async def _echo(_caller: Caller, request: Echo) -> dict[str, object]:
    return {"text": request.text}


async def _refuse(_caller: Caller, _request: Echo) -> dict[str, object]:
    raise NotFoundError("nothing here")


def post(method: str, body: bytes, *more: str) -> bytes:
    """A call as the command line makes it."""
    head = [f"POST /v1/call/{method} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    return "\r\n".join([*head, *more, "", ""]).encode() + body


WORDS = [
    *(b"POST /v1/call/echo HTTP/1.1\r\n", b"GET /v1/events?follow=1&count=2 HTTP/1.1\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Content-Length: ", b"Connection: close\r\n"),
    *(
        b"Expect: 100-continue\r\n",
        b"Upgrade: websocket\r\n",
        b"\r\n\r\n",
        b"0\r\n\r\n",
        b"%2e%2e/",
    ),
    *(b"Content-Encoding: gzip\r\n", b"Content-Type: multipart/form-data; boundary=x\r\n"),
]


def seeds() -> list[bytes]:
    """Good calls, bad bodies, events, pipelined and chunked requests."""
    chunked = b"POST /v1/call/echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    stories = [
        post("echo", b'{"text":"a"}') * 2,
        post("refuse", b"{}", "Connection: close"),
        post("nothing", b"{"),
        chunked + b'd\r\n{"text":"abc"}\r\n0\r\n\r\n',
        b"GET /v1/events?follow=1&count=2 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/events?count=x HTTP/1.0\r\n\r\n",
        post("echo", b"\xff\xfe", "Content-Encoding: gzip"),
    ]
    return [b"\0" + story for story in stories] + [b"\2\3\7" + stories[0]]


@dataclass(frozen=True)
class _Served:
    server: ControlServer
    path: str


@cache
def _served() -> _Served:
    """One server for all inputs: what one of them broke, the next would notice."""
    registry, events = MethodRegistry(), EventRing()
    registry.add("echo", Echo, _echo)
    registry.add("refuse", Echo, _refuse)
    for number in range(3):
        events.publish("kind", "t", {"n": number})
    directory = tempfile.mkdtemp(prefix="geomirror-fuzz-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    server = ControlServer(registry, events)
    path = f"{directory}/control.sock"
    LOOP.run_until_complete(server.start(path))
    atexit.register(lambda: LOOP.run_until_complete(server.stop()))
    return _Served(server, path)


def run(data: bytes) -> None:
    """Send in pieces, take what comes, then make a good call on another connection."""
    source = Source(data)
    sizes = [source.number() + 1 for _ in range(source.below(4))]
    logging.disable(logging.CRITICAL)
    try:
        LOOP.run_until_complete(_talk(_served().path, chunks(source.rest(), sizes)))
    finally:
        logging.disable(logging.NOTSET)


async def _talk(path: str, pieces: list[bytes]) -> None:
    answer = await _exchange(path, pieces, is_ended=True)
    assert not answer or answer.startswith(b"HTTP/"), answer[:50]
    assert b" 500 " not in answer.partition(b"\r\n")[0], answer[:300]
    good = await _exchange(path, [post("echo", b'{"text":"still"}', "Connection: close")])
    assert json.loads(good.partition(b"\r\n\r\n")[2])["result"] == {"text": "still"}


async def _exchange(path: str, pieces: list[bytes], *, is_ended: bool = False) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if is_ended:
                writer.write_eof()
            async with asyncio.timeout(ANSWER_S_MAX):
                return await reader.read()
        return b""
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
