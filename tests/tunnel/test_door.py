"""The listening sockets of links: what is accepted while they are closed stays nobody's."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import warnings

import pytest

from geomirror.tunnel.door_io import Door
from geomirror.tunnel.tcp_io import bind_tcp


def refused(source: str, error: Exception) -> None:
    raise AssertionError(error)


async def wait_for_ever(connection: socket.socket, address: str) -> None:
    with connection:
        await asyncio.Event().wait()


@pytest.mark.parametrize("turns", range(8))
async def test_whatever_the_moment_a_closing_door_leaves_no_connection_open(turns: int) -> None:
    sockets = await bind_tcp("127.0.0.1", 0, 0)
    address = sockets[0].getsockname()
    door = Door(sockets, wait_for_ever, refused, 4)
    door.start()
    await asyncio.sleep(0)
    with warnings.catch_warnings(record=True) as told, socket.create_connection(address) as client:
        warnings.simplefilter("always")
        for _ in range(turns):
            await asyncio.sleep(0)
        await door.stop()
        gc.collect()
        client.settimeout(10)
        with contextlib.suppress(ConnectionResetError):  # As of one that waits in the kernel.
            assert client.recv(1) == b"", "it was accepted, and is closed"
    assert [str(each.message) for each in told] == []


async def test_more_than_may_wait_ends_the_oldest_even_one_that_has_not_begun() -> None:
    sockets = await bind_tcp("127.0.0.1", 0, 0)
    door = Door(sockets, wait_for_ever, refused, 2)
    ours = [socket.socketpair() for _ in range(3)]
    try:
        for mine, _ in ours:
            door._take(mine, "10.0.0.1")  # In one turn, as after a busy moment.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        ours[0][1].setblocking(False)
        assert ours[0][1].recv(1) == b""
        with pytest.raises(BlockingIOError):
            ours[1][1].setblocking(False)
            ours[1][1].recv(1)
    finally:
        await door.stop()
        for _, other in ours:
            other.close()
    assert all(mine.fileno() == -1 for mine, _ in ours)
