"""The application's side of a circuit on real sockets; the peer is a list of what it was sent."""

from __future__ import annotations

import asyncio
import socket
import struct

import pytest

from geomirror.limits import PRODUCTION
from geomirror.tunnel.circuit_io import PeerSide, Splice
from geomirror.tunnel.circuit_pieces import DATA, DONE, END, pack


class Peer(PeerSide):
    """Remembers."""

    def __init__(self) -> None:
        super().__init__(PRODUCTION)
        self.sent = b""
        self.said: list[str] = []

    def attach(self, splice: Splice) -> None:
        self.said.append("attached")

    def write(self, data: bytes) -> None:
        self.sent += data

    def hold(self, is_held: bool) -> None:
        self.said.append("held" if is_held else "read on")

    def close(self) -> None:
        self.said.append("closed")

    def reset(self) -> None:
        self.said.append("reset")


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        accepted, _ = listening.accept()
    client.setblocking(False)
    return client, accepted


async def begin() -> tuple[socket.socket, Splice, Peer, list[str]]:
    client, accepted = tcp_pair()
    peer, ends = Peer(), []
    splice = Splice(PRODUCTION, peer, ends.append)
    await splice.start(accepted)
    return client, splice, peer, ends


def test_an_application_that_takes_nothing_holds_the_peer_until_it_does(
    runner: asyncio.Runner,
) -> None:
    async def story() -> None:
        client, splice, peer, ends = await begin()
        count = 0
        while "held" not in peer.said:
            splice.peer_sent(memoryview(pack(DATA, bytes(65536))))
            count += 65536
            await asyncio.sleep(0)
        splice.peer_sent(memoryview(pack(END)))
        assert pack(DONE) not in peer.sent, "nothing is done before it is handed over"
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(client, 1 << 20):
            count -= len(data)
        assert count == 0
        while pack(DONE) not in peer.sent:
            await asyncio.sleep(0.01)
        assert peer.said[-1] == "read on"
        client.shutdown(socket.SHUT_WR)
        while pack(END) not in peer.sent:
            await asyncio.sleep(0.01)
        splice.peer_sent(memoryview(pack(DONE)))
        assert (ends, peer.said[-1]) == ([""], "closed")
        client.close()
        await asyncio.sleep(0.05)

    runner.run(story())


def test_an_end_for_an_application_that_was_reset_a_moment_ago_is_a_reset(
    runner: asyncio.Runner,
) -> None:
    async def story() -> None:
        client, splice, peer, ends = await begin()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        splice.peer_sent(memoryview(pack(END)))  # the loop knows nothing of it yet
        while not ends:
            await asyncio.sleep(0.01)
        assert ends[0].startswith("the application:")
        assert peer.said[-1] == "reset"
        await asyncio.sleep(0.05)

    runner.run(story())


def test_an_application_that_is_dropped_by_anybody_sees_a_reset(runner: asyncio.Runner) -> None:
    async def story() -> None:
        client, splice, _, ends = await begin()
        splice.peer_sent(memoryview(pack(DATA, b"half")))
        splice.reset("because")
        assert ends == ["because"]
        loop = asyncio.get_running_loop()
        with pytest.raises(ConnectionResetError):
            while await loop.sock_recv(client, 100):
                pass
        client.close()

    runner.run(story())
