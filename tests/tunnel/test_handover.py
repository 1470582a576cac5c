"""A socket that is given to the loop: nobody else ever closes its number."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop

from geomirror.tunnel.handover_io import connect_stream, open_streams
from geomirror.tunnel.tls_context_io import joiner_context

TURNS = 5
Run = Callable[[Coroutine[Any, Any, None]], None]


class LostAtOnce(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest) -> Run:
    return {"uvloop": uvloop.run, "asyncio": asyncio.run}[request.param]


@pytest.fixture(params=["tcp", "unix"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    if request.param == "unix":
        near, far = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            near = socket.create_connection(listening.getsockname())
            far = listening.accept()[0]
    near.setblocking(False)
    with far:
        yield near, far


async def reuse(number: int, path: Path) -> None:
    """Open files until one has the number; it is not closed when the garbage is."""
    descriptors = [os.open(path, os.O_CREAT | os.O_RDWR)]
    while descriptors[-1] < number:
        descriptors.append(os.dup(descriptors[0]))
    try:
        assert number in descriptors  # else it is still open, and nothing is shown
        for _ in range(TURNS):
            gc.collect()
            await asyncio.sleep(0)
        for descriptor in descriptors:
            os.fstat(descriptor)
    finally:
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def test_a_connection_that_is_lost_within_its_first_turn(run: Run, ends, tmp_path: Path):
    near, _ = ends
    number = near.fileno()

    async def story() -> None:
        await connect_stream(LostAtOnce, near)
        await asyncio.sleep(0)
        near.close()
        await reuse(number, tmp_path / "file")

    run(story())


def test_a_handshake_that_fails(run: Run, ends, tmp_path: Path):
    near, far = ends
    number = near.fileno()

    async def story() -> None:
        far.close()  # with the greeting unread: a reset, as from a daemon that was killed
        with pytest.raises(OSError):
            await open_streams(near, 1 << 10, ssl=joiner_context(), server_hostname="a")
        for _ in range(TURNS):
            await asyncio.sleep(0)
        near.close()
        await reuse(number, tmp_path / "file")

    run(story())


def test_it_is_cancelled(run: Run, ends, tmp_path: Path):
    near, _ = ends
    number = near.fileno()

    async def story() -> None:
        asking = asyncio.ensure_future(
            open_streams(near, 1 << 10, ssl=joiner_context(), server_hostname="a")
        )
        for _ in range(TURNS):
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        for _ in range(TURNS):
            await asyncio.sleep(0)
        near.close()
        await reuse(number, tmp_path / "file")

    run(story())


def test_both_directions(run: Run, ends):
    near, far = ends

    async def story() -> None:
        reader, writer = await open_streams(near, 1 << 10)
        writer.write(b"there\n")
        await writer.drain()
        assert far.recv(6) == b"there\n"
        far.send(b"back\n")
        assert await reader.readline() == b"back\n"
        writer.close()
        await writer.wait_closed()
        assert far.recv(1) == b""

    run(story())
