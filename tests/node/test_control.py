"""The control socket: calls, errors, events; with the real client in a thread."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from geomirror.errors import (
    LocalProtocolError,
    NotFoundError,
    RefusedError,
    UnreachableError,
    UsageError,
    all_errors,
)
from geomirror.node.calls import Caller, MethodRegistry, Parameters
from geomirror.node.control_client_io import ControlClient
from geomirror.node.control_io import ControlServer
from geomirror.node.error_json import error_from_object, error_object, error_word
from geomirror.node.events import EVENTS_MAX, SUBSCRIBER_EVENTS_MAX, EventRing
from geomirror.node.lock_io import DaemonLock
from geomirror.node.paths import DataDir


class Echo(Parameters, frozen=True):
    text: str
    count: int = 1


async def echo(caller, request):
    return {"text": request.text * request.count, "caller": caller.name}


async def refuse(_caller, request):
    raise NotFoundError(f"no {request.text}", hint="look elsewhere")


async def fail(_caller, _request):
    raise ZeroDivisionError("a bug")


def methods() -> MethodRegistry:
    registry = MethodRegistry()
    registry.add("echo", Echo, echo, from_peers=True)
    registry.add("refuse", Echo, refuse)
    registry.add("fail", Parameters, fail)
    return registry


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[ControlClient, EventRing, ControlServer]]:
    events = EventRing()
    server = ControlServer(methods(), events)
    await server.start(str(tmp_path / "control.sock"))
    yield ControlClient(DataDir(tmp_path)), events, server
    await server.stop()


async def test_a_call_gives_its_result_and_the_socket_is_ours_alone(served, tmp_path):
    client, _, _ = served
    result = await asyncio.to_thread(client.call, "echo", {"text": "ab", "count": 2})
    assert result == {"text": "abab", "caller": "operator"}
    mode = (tmp_path / "control.sock").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600


@pytest.mark.parametrize(
    ("method", "parameters", "error", "text"),
    [
        ("refuse", {"text": "x"}, NotFoundError, "no x; look elsewhere"),
        ("nothing", {}, UsageError, "unknown method"),
        ("echo", {}, UsageError, "text"),
        ("echo", {"text": 1}, UsageError, "text"),
        ("echo", {"text": "x", "size": 1}, UsageError, "size"),
        ("fail", {}, LocalProtocolError, "a bug"),
    ],
)
async def test_errors_arrive_as_their_own_class(served, method, parameters, error, text):
    with pytest.raises(error) as caught:
        await asyncio.to_thread(served[0].call, method, parameters)
    assert text in str(caught.value)


async def test_a_peer_gets_only_what_is_open_to_peers():
    assert (await methods().dispatch(Caller("b"), "echo", {"text": "x"}))["caller"] == "b"
    with pytest.raises(RefusedError, match="not open"):
        await methods().dispatch(Caller("b"), "refuse", {"text": "x"})


async def test_a_body_that_is_not_json_is_a_usage_error(served, tmp_path):
    def talk(body: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as channel:
            channel.connect(str(tmp_path / "control.sock"))
            head = f"POST /v1/call/echo HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
            channel.sendall(head.encode() + body)
            return b"".join(iter(lambda: channel.recv(4096), b""))

    for body in (b"{", b"[]", b"\xff", b"[" * 200_000):
        answer = await asyncio.to_thread(talk, body)
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "usage"
    answer = await asyncio.to_thread(talk, b" " * (2 << 20))
    assert b" 413 " in answer.splitlines()[0]


async def test_events_are_streamed_and_end_with_the_daemon(served):
    client, events, server = served
    events.publish("first", "t", {"a": 1})
    found = []

    def follow() -> None:
        found.extend(client.events(follow=True, count=10))

    reading = asyncio.ensure_future(asyncio.to_thread(follow))
    async with asyncio.timeout(5):
        while not events._subscribers:
            await asyncio.sleep(0.005)
    events.publish("second", "t", {})
    await asyncio.sleep(0.05)
    await server.stop()
    await reading
    assert [event["kind"] for event in found] == ["first", "second"]
    assert found[0] == {"number": 1, "time": "t", "kind": "first", "a": 1}


async def test_without_follow_the_stream_ends_by_itself(served):
    client, events, _ = served
    for number in range(5):
        events.publish(f"e{number}", "t", {})
    found = await asyncio.to_thread(lambda: list(client.events(follow=False, count=2)))
    assert [event["kind"] for event in found] == ["e3", "e4"]


async def test_a_slow_reader_loses_the_oldest_events_and_memory_is_bounded():
    ring = EventRing()
    queue = ring.subscribe()
    for number in range(EVENTS_MAX + 500):
        ring.publish("e", "t", {"n": number})
    assert queue is not None
    assert queue.qsize() == SUBSCRIBER_EVENTS_MAX
    assert len(ring.recent()) == EVENTS_MAX
    assert queue.get_nowait()["number"] == EVENTS_MAX + 500 - SUBSCRIBER_EVENTS_MAX + 1


def test_without_a_daemon_the_error_names_the_directory_and_the_next_command(tmp_path):
    with pytest.raises(UnreachableError) as caught:
        ControlClient(DataDir(tmp_path)).call("status")
    assert str(tmp_path) in caught.value.message
    assert "node run" in caught.value.hint
    with pytest.raises(UnreachableError, match="network create"):
        ControlClient(DataDir(tmp_path / "none")).call("status")


async def test_a_starting_daemon_is_waited_for(tmp_path):
    lock = DaemonLock(DataDir(tmp_path))
    calling = asyncio.ensure_future(
        asyncio.to_thread(ControlClient(DataDir(tmp_path)).call, "echo", {"text": "x"})
    )
    await asyncio.sleep(0.1)
    server = ControlServer(methods(), EventRing())
    await server.start(str(tmp_path / "control.sock"))
    assert (await calling)["text"] == "x"
    await server.stop()
    lock.release()


def test_every_error_keeps_its_class_message_and_hint_through_json():
    words = [error_word(kind) for kind in all_errors()]
    assert len(set(words)) == len(words)
    for kind in all_errors():
        again = error_from_object(error_object(kind("what", hint="next")))
        assert (type(again), again.message, again.hint) == (kind, "what", "next")
