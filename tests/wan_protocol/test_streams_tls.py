"""The links over the embedded mutual-TLS driver: what plain TCP does not show."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from geomirror.environment import SECOND, SeededEntropy, SystemClock
from geomirror.lab.ports_io import free_port
from geomirror.limits import PRODUCTION
from geomirror.tunnel.network_io import NetworkState, create_network, create_token, join
from geomirror.tunnel.tls_io import TlsDriver
from geomirror.wan_protocol.messages import Message, SessionRefuse
from geomirror.wan_protocol.streams_io import PeerAddress, PeerLinks

CLOCK = SystemClock()


def free_endpoint() -> str:
    return f"127.0.0.1:{free_port()}"


class Node:
    """A node of the network and what its links told it."""

    def __init__(self, state: NetworkState) -> None:
        self.name = state.node
        self.listen = state.listen
        self.changes: list[str] = []
        self.messages: list[int] = []
        self.frame_bytes = 0
        self.on_writable: Callable[[], None] = lambda: None
        entropy = SeededEntropy(self.name)
        self.driver = TlsDriver(state, CLOCK, entropy)
        self.links = PeerLinks(self.name, PRODUCTION, CLOCK, entropy, self.driver, self)

    def link_up(self, peer: str, now_ns: int) -> None:
        self.changes.append("up")

    def link_down(self, peer: str, reason: str, now_ns: int) -> None:
        self.changes.append("down")

    def link_stalled(self, peer: str, reason: str, now_ns: int) -> None:
        pass

    def message(self, peer: str, session: int, message: Message) -> None:
        self.messages.append(session)

    def frame(
        self, peer: str, session: int, epoch: int, sequence: int, is_resync: bool, body: bytes
    ) -> None:
        self.frame_bytes += len(body)

    def writable(self, peer: str) -> None:
        self.on_writable()

    async def call(self, peer: str, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        return {"method": method, "peer": peer}


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Node, Node]]:
    """Two joined nodes that dial each other."""
    state = create_network(
        tmp_path / "a",
        network="acme",
        site="east",
        node="east-1",
        listen=free_endpoint(),
        cidr=None,
        clock=CLOCK,
        entropy=SeededEntropy("a"),
    )
    token = create_token(
        state, node="west-1", site="west", expires_seconds=600, wall_ns=CLOCK.wall_ns()
    )
    east = Node(state)
    await east.links.start(east.listen)
    try:
        listen = free_endpoint()
        west = Node(
            await join(
                tmp_path / "b", token, listen=listen, clock=CLOCK, entropy=SeededEntropy("b")
            )
        )
        await west.links.start(listen)
        try:
            east.links.set_peers([PeerAddress("west-1", [listen])])
            west.links.set_peers([PeerAddress("east-1", [east.listen or ""])])
            await until(lambda: east.links.state("west-1").is_established)
            await until(lambda: west.links.state("east-1").is_established)
            yield east, west
        finally:
            await west.links.stop()
    finally:
        await east.links.stop()


async def test_messages_frames_and_calls_cross_a_tls_link(pair: tuple[Node, Node]) -> None:
    east, west = pair
    sets = east.links._peers["west-1"]._sets, west.links._peers["east-1"]._sets
    await until(lambda: len(sets[0]) == len(sets[1]) == 1)  # both dialled
    for session in range(20):
        east.links.send_message("west-1", session, SessionRefuse(session, 1, "x"))
        east.links.send_frame("west-1", 1, 1, session, bytes(60_000))
    await until(lambda: west.messages == list(range(20)) and west.frame_bytes == 1_200_000)
    answer = await west.links.call("east-1", "hello", {}, 5)
    assert answer == {"method": "hello", "peer": "west-1"}


async def test_a_cut_tls_link_comes_back(pair: tuple[Node, Node]) -> None:
    east, west = pair
    for connection in list(west.links._peers["east-1"]._open):
        connection._transport.abort()
    await until(lambda: "down" in east.changes and "down" in west.changes)
    await until(lambda: east.changes[-1] == west.changes[-1] == "up")
    east.links.send_message("west-1", 7, SessionRefuse(7, 1, "x"))
    await until(lambda: west.messages == [7])
    assert east.changes == west.changes == ["up", "down", "up"]


@pytest.mark.system
async def test_tls_frames_go_faster_than_any_wide_area_link(pair: tuple[Node, Node]) -> None:
    east, west = pair
    body = bytes(65_536)
    total, sent = 3000, 0

    def fill() -> None:
        nonlocal sent
        while sent < total and east.links.writable_bytes("west-1") >= len(body) + 32:
            east.links.send_frame("west-1", sent % 3, 1, sent, body)
            sent += 1

    east.on_writable = fill
    started_ns = CLOCK.now_ns()
    fill()
    await until(lambda: west.frame_bytes == total * len(body), 60)
    rate = west.frame_bytes * 8 * SECOND / (CLOCK.now_ns() - started_ns)
    print(f"{rate / 1e9:.2f} Gbit/s")
    assert rate > 200e6  # 1.5 to 3 Gbit/s with both ends on one quiet core
    assert east.changes[-1] == west.changes[-1] == "up"
