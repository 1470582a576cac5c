"""Links over loopback TCP: two nodes, real connections, cut and disturbed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from geomirror.environment import MS, SECOND, SeededEntropy, SystemClock
from geomirror.errors import (
    GeomirrorError,
    LinkError,
    NotFoundError,
    RefusedError,
    RemoteProtocolError,
    UnreachableError,
)
from geomirror.limits import PRODUCTION
from geomirror.tunnel.handover_io import connect_stream
from geomirror.wan_protocol.frame import KIND_FRAME, KIND_MESSAGE, pack_header
from geomirror.wan_protocol.messages import Hello, Message, SessionRefuse, encode_message
from geomirror.wan_protocol.streams_io import PeerAddress, PeerLinks

FAST = replace(PRODUCTION, hello_interval_ns=60 * MS, reconnect_interval_ns=100 * MS)
NOTE = SessionRefuse(7, 1, "note")


class PlainListener:
    def __init__(self, sock: socket.socket, task: asyncio.Task[None]) -> None:
        self._sock, self._task = sock, task
        self.endpoint = f"127.0.0.1:{sock.getsockname()[1]}"

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._sock.close()


class PlainDriver:
    """Plain TCP: the dialling side sends its name and waits for one byte."""

    name = "plain"

    def __init__(self, node: str) -> None:
        self.node = node
        self.transports: list[asyncio.Transport] = []

    async def dial(
        self,
        peer: str,
        endpoint: str,
        factory: Callable[[], asyncio.BaseProtocol],
        connected: Callable[[], None] = lambda: None,
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        loop = asyncio.get_running_loop()
        host, _, port = endpoint.rpartition(":")
        sock = socket.socket()
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, (host, int(port)))
            connected()
            await loop.sock_sendall(sock, self.node.encode().ljust(16))
            if await loop.sock_recv(sock, 1) != b"+":
                raise LinkError(f"{endpoint} closed")
            transport, protocol = await connect_stream(factory, sock)
        except OSError as error:
            sock.close()
            raise LinkError(str(error)) from error
        except BaseException:
            sock.close()
            raise
        self.transports.append(transport)
        return transport, protocol

    async def listen(
        self, endpoint: str, factory: Callable[[str], asyncio.BaseProtocol]
    ) -> PlainListener:
        host, _, port = endpoint.rpartition(":")
        sock = socket.create_server((host, int(port)))
        sock.setblocking(False)
        return PlainListener(sock, asyncio.create_task(self._accept(sock, factory)))

    async def _accept(
        self, listening: socket.socket, factory: Callable[[str], asyncio.BaseProtocol]
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(listening)
            try:
                name = (await loop.sock_recv(sock, 16)).decode().strip()
                await loop.sock_sendall(sock, b"+")
            except OSError:
                sock.close()
                continue
            try:
                protocol = factory(name)
            except GeomirrorError:
                sock.close()
                continue
            transport, _ = await loop.connect_accepted_socket(lambda p=protocol: p, sock)
            self.transports.append(transport)

    def cut(self) -> None:
        for transport in self.transports:
            transport.abort()
        self.transports.clear()


class Events:
    """Writes down what happens; frames and messages can be waited for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.messages: list[tuple[str, int, Message]] = []
        self.frames: list[tuple[int, int, int, bool, bytes]] = []
        self.frame_bytes = 0
        self.on_writable: Callable[[str], None] = lambda peer: None
        self.on_call: Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]] | None = None
        self.is_message_refused = False

    def link_up(self, peer: str, now_ns: int) -> None:
        self.log.append(f"up {peer}")

    def link_down(self, peer: str, reason: str, now_ns: int) -> None:
        self.log.append(f"down {peer}")

    def link_stalled(self, peer: str, reason: str, now_ns: int) -> None:
        self.log.append(f"stalled {peer}")

    def message(self, peer: str, session: int, message: Message) -> None:
        if self.is_message_refused:
            raise RemoteProtocolError("not now")
        self.messages.append((peer, session, message))

    def frame(
        self, peer: str, session: int, epoch: int, sequence: int, is_resync: bool, body: bytes
    ) -> None:
        self.frames.append((session, epoch, sequence, is_resync, body))
        self.frame_bytes += len(body)

    def writable(self, peer: str) -> None:
        self.on_writable(peer)

    async def call(self, peer: str, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        assert self.on_call is not None
        return await self.on_call(method, parameters)


class Node:
    def __init__(self, name: str, limits: Any = FAST) -> None:
        self.name = name
        self.events = Events()
        self.driver = PlainDriver(name)
        self.links = PeerLinks(
            name, limits, SystemClock(), SeededEntropy(name), self.driver, self.events
        )

    def is_up(self, peer: str) -> bool:
        return self.links.state(peer).is_established


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Node, Node]]:
    """a dials, b listens; the link is up."""
    a, b = Node("a"), Node("b")
    await a.links.start(None)
    await b.links.start("127.0.0.1:0")
    assert b.links.endpoint is not None
    b.links.set_peers([PeerAddress("a")])
    a.links.set_peers([PeerAddress("b", [b.links.endpoint])])
    try:
        await until(lambda: a.is_up("b") and b.is_up("a"))
        yield a, b
    finally:
        await a.links.stop()
        await b.links.stop()


async def test_a_link_comes_up_with_all_its_connections(pair: tuple[Node, Node]) -> None:
    a, b = pair
    await until(lambda: a.links.state("b").connections == 4 == b.links.state("a").connections)
    await until(lambda: a.links.state("b").rtt_ns > 0)
    status = a.links.state("b")
    assert status.is_dialled and status.endpoint == b.links.endpoint
    assert status.congestion in ("bbr", "cubic", "reno")
    assert status.bytes_sent > 0 and status.bytes_received > 0
    assert len(status.incarnation) == 16
    assert b.links.state("a").endpoint.startswith("127.0.0.1:")
    assert a.events.log == ["up b"] and b.events.log == ["up a"]


async def test_messages_arrive_in_order_both_ways(pair: tuple[Node, Node]) -> None:
    a, b = pair
    for session in range(50):
        a.links.send_message("b", session, NOTE)
        b.links.send_message("a", session, NOTE)
    await until(lambda: len(a.events.messages) == len(b.events.messages) == 50)
    assert [session for _, session, _ in b.events.messages] == list(range(50))
    assert a.events.messages[0] == ("b", 0, NOTE)


async def test_every_frame_arrives_once_and_unchanged(pair: tuple[Node, Node]) -> None:
    a, b = pair
    for number in range(200):
        body = bytes([number]) * (number * 400)
        a.links.send_frame("b", number % 3, 9, number, body, is_resync=number % 2 == 1)
    await until(lambda: len(b.events.frames) == 200)
    for session, epoch, sequence, is_resync, body in b.events.frames:
        assert body == bytes([sequence]) * (sequence * 400)
        assert (session, epoch, is_resync) == (sequence % 3, 9, sequence % 2 == 1)
    assert sorted(frame[2] for frame in b.events.frames) == list(range(200))


async def test_the_queue_is_bounded_and_tells_when_it_has_room(pair: tuple[Node, Node]) -> None:
    a, b = pair
    body = bytes(65_000)
    total = 3000  # 195 MB, ten times what may wait
    sent = 0

    def fill(peer: str = "b") -> None:
        nonlocal sent
        while sent < total and a.links.writable_bytes("b") >= len(body) + 32:
            a.links.send_frame("b", 1, 1, sent, body)
            sent += 1

    a.events.on_writable = fill
    fill()
    assert sent * len(body) <= PRODUCTION.queue_bytes_max * 4
    assert a.links.state("b").queued_bytes > 0
    core = a.links._peers["b"].core
    assert core.current is not None
    before_ns = core.current.moved_ns
    await until(lambda: len(b.events.frames) == total, 30)
    assert a.links.state("b").queued_bytes == 0
    assert core.current.moved_ns > before_ns  # a sign of life


async def test_a_call_returns_a_result_or_the_error_of_the_other_side(
    pair: tuple[Node, Node],
) -> None:
    a, b = pair

    async def serve(method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        if method == "refuse":
            raise RefusedError("no", hint="do that")
        if method == "sleep":
            await asyncio.sleep(60)
        if method == "large":
            return {"text": "x" * parameters["count"]}
        return {"method": method, **parameters}

    b.events.on_call = serve
    assert await a.links.call("b", "echo", {"x": [1, None]}, 5) == {
        "method": "echo",
        "x": [1, None],
    }
    with pytest.raises(RefusedError) as caught:
        await a.links.call("b", "refuse", {}, 5)
    assert (caught.value.message, caught.value.hint) == ("no", "do that")
    with pytest.raises(UnreachableError, match="did not answer"):
        await a.links.call("b", "sleep", {}, 0.05)
    assert len((await a.links.call("b", "large", {"count": 1_000_000}, 5))["text"]) == 1_000_000
    with pytest.raises(GeomirrorError, match="at most"):
        await a.links.call("b", "large", {"count": 2_000_000}, 5)
    with pytest.raises(GeomirrorError, match="at most"):
        await a.links.call("b", "echo", {"x": "y" * 2_000_000}, 5)
    with pytest.raises(UnreachableError, match="not connected"):
        a.links.set_peers([*map(PeerAddress, ["b", "c"])])
        await a.links.call("c", "echo", {}, 5)
    with pytest.raises(NotFoundError):
        await a.links.call("d", "echo", {}, 5)


async def test_calls_under_way_are_bounded_and_fail_with_the_link(pair: tuple[Node, Node]) -> None:
    a, b = pair

    async def serve(method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    b.events.on_call = serve
    calls = [asyncio.create_task(a.links.call("b", "x", {}, 30)) for _ in range(66)]
    await asyncio.sleep(0)
    await until(lambda: sum(task.done() for task in calls) == 2)
    a.driver.cut()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, UnreachableError) for result in results)


async def test_a_cut_link_comes_back_and_goes_on(pair: tuple[Node, Node]) -> None:
    a, b = pair
    a.driver.cut()
    await until(lambda: "down b" in a.events.log and "down a" in b.events.log)
    await until(lambda: a.is_up("b") and b.is_up("a"))
    assert a.events.log == ["up b", "down b", "up b"]
    assert b.events.log == ["up a", "down a", "up a"]
    a.links.send_frame("b", 1, 2, 3, b"after")
    await until(lambda: b.events.frames == [(1, 2, 3, False, b"after")])


async def test_what_was_not_sent_when_a_set_is_given_up_is_discarded(
    pair: tuple[Node, Node],
) -> None:
    a, b = pair
    link = a.links._peers["b"]
    assert link.core.current is not None
    link.core.set_lost(link.core.current.link, "given up", SystemClock().now_ns())
    link._execute()
    assert a.events.log == ["up b", "down b"]
    await until(lambda: "down a" in b.events.log)
    assert b.links.state("a").last_error == "reset by the peer"


async def test_a_lost_data_connection_is_no_event_and_is_replaced(pair: tuple[Node, Node]) -> None:
    a, b = pair
    await until(lambda: a.links.state("b").connections == 4 == b.links.state("a").connections)
    (data,) = [item for item in a.links._peers["b"]._open if item.index == 2]
    data._transport.abort()
    await until(lambda: b.links.state("a").connections == 3)
    a.links.send_frame("b", 1, 2, 3, b"still")
    await until(lambda: len(b.events.frames) == 1)
    await until(lambda: a.links.state("b").connections == 4 == b.links.state("a").connections)
    assert a.events.log == ["up b"] and b.events.log == ["up a"]


async def test_a_lone_packet_is_followed_by_another_once(pair: tuple[Node, Node]) -> None:
    a, b = pair
    await until(lambda: a.links.state("b").connections == 4)
    await asyncio.sleep(0.05)  # the hellos' followers
    data = [item for item in a.links._peers["b"]._open if item.index >= 0]
    before = sum(item.bytes_sent for item in data)
    a.links.send_frame("b", 1, 2, 3, b"12345678")
    await until(lambda: sum(item.bytes_sent for item in data) - before == 32 + 8 + 32)
    await asyncio.sleep(0.05)
    assert sum(item.bytes_sent for item in data) - before == 32 + 8 + 32
    assert len(b.events.frames) == 1


async def test_the_rate_of_a_link_is_divided_over_its_data_connections(
    pair: tuple[Node, Node],
) -> None:
    a, _ = pair
    await until(lambda: a.links.state("b").connections == 4)

    def paces() -> list[int]:
        data = [item for item in a.links._peers["b"]._open if item.index >= 0]
        return [item.socket.getsockopt(socket.SOL_SOCKET, 47) & 0xFFFF_FFFF for item in data]

    a.links.set_rate("b", 100_000_000)
    assert paces() == [23_500_000] * 4
    a.links.set_rate("b", None)
    assert set(paces()) == {0xFFFF_FFFF}
    with pytest.raises(NotFoundError):
        a.links.set_rate("nobody", 1)


async def test_both_may_dial_and_end_with_one_set() -> None:
    a, b = Node("a"), Node("b")
    await a.links.start("127.0.0.1:0")
    await b.links.start("127.0.0.1:0")
    a.links.set_peers([PeerAddress("b", [b.links.endpoint or ""])])
    b.links.set_peers([PeerAddress("a", [a.links.endpoint or ""])])
    try:
        await until(lambda: a.is_up("b") and b.is_up("a"))
        await until(lambda: len(a.links._peers["b"]._sets) == len(b.links._peers["a"]._sets) == 1)
        assert a.links._peers["b"]._sets.keys() == b.links._peers["a"]._sets.keys()
        assert a.is_up("b") and b.is_up("a")
        a.links.send_message("b", 1, NOTE)
        b.links.send_message("a", 1, NOTE)
        await until(lambda: len(a.events.messages) == len(b.events.messages) == 1)
        assert a.events.log == ["up b"] and b.events.log == ["up a"]
    finally:
        await a.links.stop()
        await b.links.stop()


async def test_a_goodbye_takes_the_link_down_at_once(pair: tuple[Node, Node]) -> None:
    a, b = pair
    await a.links.stop()
    await until(lambda: b.events.log == ["up a", "down a"], 0.5)
    assert "goodbye" in b.links.state("a").last_error


async def test_a_peer_that_is_no_longer_one_is_disconnected_and_refused(
    pair: tuple[Node, Node],
) -> None:
    a, b = pair
    b.links.set_peers([])
    await until(lambda: a.events.log[:2] == ["up b", "down b"])
    await asyncio.sleep(0.5)
    assert not a.is_up("b")
    assert b.events.log == ["up a", "down a"]
    with pytest.raises(UnreachableError):
        await a.links.call("b", "x", {}, 1)


async def test_endpoints_are_tried_in_turn(pair: tuple[Node, Node]) -> None:
    _, b = pair
    c = Node("c")
    await c.links.start(None)
    b.links.set_peers([PeerAddress("a"), PeerAddress("c")])
    c.links.set_peers([PeerAddress("b", ["127.0.0.1:1", b.links.endpoint or ""])])
    try:
        await until(lambda: c.is_up("b") and b.is_up("c"))
        assert c.links.state("b").endpoint == b.links.endpoint
    finally:
        await c.links.stop()


async def test_a_message_that_the_node_refuses_closes_the_connections(
    pair: tuple[Node, Node],
) -> None:
    a, b = pair
    b.events.is_message_refused = True
    a.links.send_message("b", 1, NOTE)
    await until(lambda: b.events.log[:2] == ["up a", "down a"])
    assert "not now" in b.links.state("a").last_error
    b.events.is_message_refused = False
    await until(lambda: a.is_up("b") and b.is_up("a"))


def message(content: Message) -> bytes:
    body = encode_message(content)
    return pack_header(KIND_MESSAGE, len(body)) + body


def hello(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "version": 1,
        "version_min": 1,
        "features": ["unknown-feature"],
        "node": "a",
        "incarnation": b"i" * 16,
        "link": b"l" * 16,
        "role": "control",
        "index": -1,
        "wall_ns": 0,
    }
    return message(Hello(**(fields | changes)))


STRANGERS = {
    "garbage": b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: x\r\n\r\n",
    "frame first": pack_header(KIND_FRAME, 3) + b"abc",
    "not a hello": pack_header(KIND_MESSAGE, 1) + b"\xc0",
    "oversized": pack_header(KIND_MESSAGE, 2**30),
    "another name": hello(node="z"),
    "another version": hello(version=9, version_min=9),
    "short link": hello(link=b"x"),
    "unknown role": hello(role="both"),
    "control with a number": hello(index=2),
    "data number too large": hello(role="data", index=8),
    "a rank that is none": hello(rank=4),
    "a negative rank": hello(rank=-1),
    "data without control": hello(role="data", index=0),
    "second hello": hello() + hello(),
    "message before use": hello() + message(NOTE),
    "frame on control": hello() + pack_header(KIND_FRAME, 3) + b"abc",
}


@pytest.mark.parametrize("name", STRANGERS)
async def test_a_stranger_is_disconnected_and_nothing_else_is_disturbed(
    pair: tuple[Node, Node], name: str
) -> None:
    a, b = pair
    host, _, port = (b.links.endpoint or "").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(b"a".ljust(16))
        assert await reader.readexactly(1) == b"+"
        writer.write(STRANGERS[name])
        with contextlib.suppress(ConnectionResetError):
            async with asyncio.timeout(5):
                while await reader.read(65_536):
                    pass
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    assert a.is_up("b") and b.is_up("a")
    a.links.send_frame("b", 1, 2, 3, b"still")
    await until(lambda: len(b.events.frames) == 1)
    assert b.events.log == ["up a"]


class Relay:
    """Forwards TCP until it is told to swallow everything, as a link that went dead."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self.is_dead = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._host, self._port)
        self._writers |= {writer, back}
        for source, target in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._copy(source, target))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65_536):
                while self.is_dead:
                    await asyncio.sleep(0.01)
                target.write(data)
                await target.drain()
        target.close()

    async def stop(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        await self._server.wait_closed()


@pytest.mark.system
async def test_a_silent_link_is_noticed_and_comes_back_with_the_path() -> None:
    a, b = Node("a"), Node("b")
    await a.links.start(None)
    await b.links.start("127.0.0.1:0")
    relay = Relay(b.links.endpoint or "")
    b.links.set_peers([PeerAddress("a")])
    a.links.set_peers([PeerAddress("b", [await relay.start()])])
    loop = asyncio.get_running_loop()
    try:
        await until(lambda: a.is_up("b") and b.is_up("a"))
        await asyncio.sleep(0.5)
        relay.is_dead = True
        dead_at = loop.time()
        await until(lambda: not a.is_up("b") and not b.is_up("a"))
        assert 0.15 < loop.time() - dead_at < 3  # 5 × 60 ms, plus what this machine adds
        await asyncio.sleep(0.5)
        relay.is_dead = False
        back_at = loop.time()
        await until(lambda: a.is_up("b") and b.is_up("a"))
        assert loop.time() - back_at < 1.5
        await asyncio.sleep(1.3)
        assert a.is_up("b") and b.is_up("a")
        a.links.send_frame("b", 1, 2, 3, b"again")
        await until(lambda: len(b.events.frames) == 1)
    finally:
        await a.links.stop()
        await b.links.stop()
        await relay.stop()


@pytest.mark.system
async def test_a_silence_that_only_one_side_noticed_starts_both_sides_anew() -> None:
    a, b = Node("a", PRODUCTION), Node("b")  # patience of 750 and of 300 ms
    await a.links.start(None)
    await b.links.start("127.0.0.1:0")
    relay = Relay(b.links.endpoint or "")
    b.links.set_peers([PeerAddress("a")])
    a.links.set_peers([PeerAddress("b", [await relay.start()])])
    try:
        await until(lambda: a.is_up("b") and b.is_up("a"))
        await asyncio.sleep(0.5)
        relay.is_dead = True
        await until(lambda: b.events.log == ["up a", "down a"])
        assert "nothing heard for" in b.links.state("a").last_error
        relay.is_dead = False
        await until(lambda: len(a.events.log) == len(b.events.log) == 3)
        assert a.events.log == ["up b", "down b", "up b"]
        assert b.events.log == ["up a", "down a", "up a"]
        for one, other in ((a, b), (b, a)):
            one.links.send_message(other.name, 1, NOTE)
        await until(lambda: len(a.events.messages) == len(b.events.messages) == 1)
    finally:
        await a.links.stop()
        await b.links.stop()
        await relay.stop()


@pytest.mark.system
async def test_frames_go_faster_than_any_wide_area_link(pair: tuple[Node, Node]) -> None:
    a, b = pair
    body = bytes(65_536)
    total, sent = 3000, 0

    def fill(peer: str = "b") -> None:
        nonlocal sent
        while sent < total and a.links.writable_bytes("b") >= len(body) + 32:
            a.links.send_frame("b", sent % 3, 1, sent, body)
            sent += 1

    b.events.frame = lambda *args: setattr(  # type: ignore[method-assign]
        b.events, "frame_bytes", b.events.frame_bytes + len(args[-1])
    )
    a.events.on_writable = fill
    started_ns = SystemClock().now_ns()
    fill()
    await until(lambda: b.events.frame_bytes == total * len(body), 60)
    seconds = (SystemClock().now_ns() - started_ns) / SECOND
    # 3 to 8 Gbit/s when nothing else runs; a tenth of that still fills a gigabit link's half.
    assert b.events.frame_bytes * 8 / seconds > 300e6
