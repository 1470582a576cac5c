"""Giving a connected socket to the event loop, which alone owns its descriptor from then on.

uvloop (0.23 at least) runs a connection on the descriptor's number, and ties the socket object to
it one turn after `connection_made`. If the connection is lost within that turn, the descriptor is
closed and the object keeps its number. When the object is collected it closes that number again,
whose it may be by then: another connection's, or that of a file of the journal.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any


async def connect_stream(
    factory: Callable[[], asyncio.BaseProtocol], sock: socket.socket, **options: Any
) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
    """Run a protocol over a connected socket, of TCP or a Unix one.

    :param sock: taken over, whatever happens; closing it afterwards does nothing.
    :param options: as of `loop.create_connection`: `ssl` and what belongs to it.
    :raises OSError: the connection, or the handshake of TLS on it, failed.
    """
    loop = asyncio.get_running_loop()
    connect: Any = (
        loop.create_unix_connection if sock.family == socket.AF_UNIX else loop.create_connection
    )
    try:
        transport, protocol = await connect(factory, sock=sock, **options)
    finally:
        # asyncio's own loop closes through the object, and needs it.
        if not isinstance(loop, asyncio.BaseEventLoop):
            sock.detach()
    return transport, protocol


async def open_streams(
    sock: socket.socket, limit_bytes: int, **options: Any
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A reader and a writer over a connected socket; see `connect_stream`.

    :param limit_bytes: of what is buffered for the reader, and of a line.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit_bytes, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await connect_stream(lambda: protocol, sock, **options)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
