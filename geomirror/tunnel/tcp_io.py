"""TCP sockets of links: bound, connected, and kept to packets that every path carries.

A path that loses large packets without a word (a tunnel in a tunnel, filtered ICMP) lets handshakes
and heartbeats through and swallows the data. Hence packets are small from the beginning: 1220 bytes
of TCP make 1280 with IPv6, which every path must carry, and cost 0.8 % of a link against 1460.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from geomirror.errors import ConfigError, InUseError
from geomirror.tunnel.names import join_endpoint

BACKLOG = 128
"""Connections that the kernel completes before we accept them."""
RETRY_S = 0.1
"""Until accepting is tried again where descriptors or memory were short."""
_TCP_MAXSEG = getattr(socket, "TCP_MAXSEG", 2)


def limit_segments(sock: socket.socket, segment_bytes: int) -> None:
    """Send and ask for TCP segments of at most this size, options included; 0: the kernel's own.

    Has to come before `connect` or `listen`: it is told to the other side in the handshake.
    """
    if segment_bytes:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_MAXSEG, segment_bytes)


async def open_tcp(host: str, port: int, segment_bytes: int) -> socket.socket:
    """A connected socket, to the first address of the host that answers.

    :param segment_bytes: see `limit_segments`.
    :raises OSError: no address answers; of the last one.
    """
    loop = asyncio.get_running_loop()
    failure = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in await loop.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            limit_segments(sock, segment_bytes)
            await loop.sock_connect(sock, address)
        except OSError as error:
            sock.close()
            # The loop's own words for it name the call, not the cause.
            code = error.errno or errno.EIO
            failure = OSError(code, os.strerror(code))
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure


async def bind_tcp(host: str, port: int, segment_bytes: int) -> list[socket.socket]:
    """Listening sockets on every address of the host.

    :param segment_bytes: see `limit_segments`; connections inherit it, for both directions.
    :raises InUseError: another process listens there.
    :raises ConfigError: the endpoint is not an address of this machine.
    """
    loop = asyncio.get_running_loop()
    where = join_endpoint(host, port)
    sockets: list[socket.socket] = []
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # Port 0 is a different port for each address; one is enough then.
        for family, kind, protocol, _, address in found if port else found[:1]:
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
            limit_segments(sock, segment_bytes)
            sock.bind(address)
            sock.listen(BACKLOG)
    except OSError as error:
        for sock in sockets:
            sock.close()
        cause = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            raise InUseError(
                f"cannot listen on {where}: {cause}", hint="another process listens there"
            ) from None
        hint = "give an address of this machine"
        if error.errno in (errno.EACCES, errno.EPERM):
            hint = "ports below 1024 are for root; choose another one"
        raise ConfigError(f"cannot listen on {where}: {cause}", hint=hint) from None
    return sockets


async def accept_each(
    listening: socket.socket,
    take: Callable[[socket.socket, str], None],
    failed: Callable[[OSError], None],
) -> None:
    """Accept connections until cancelled; nothing that accepting can meet ends it.

    :param take: gets a connection and its source address.
    :param failed: told when there are no descriptors or no memory for one more.
    """
    while True:
        await _acceptable(listening)
        try:
            connection, address = listening.accept()
        except (BlockingIOError, ConnectionError):
            continue  # the client was gone before we looked
        except OSError as error:
            failed(error)
            await asyncio.sleep(RETRY_S)
        else:
            connection.setblocking(False)
            take(connection, str(address[0]))


async def _acceptable(listening: socket.socket) -> None:
    """Wait for a connection, but do not take it: the loop's `sock_accept` loses the one that comes
    while its task is cancelled."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(listening, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(listening)


def start_owner(
    sock: socket.socket, work: Callable[[], Coroutine[Any, Any, None]]
) -> asyncio.Task[None]:
    """A task that owns a socket: one that is cancelled before it has begun closes it."""
    has_begun = False

    async def run() -> None:
        nonlocal has_begun
        has_begun = True
        await work()

    def close_unused(_task: asyncio.Task[None]) -> None:
        if not has_begun:
            sock.close()

    task = asyncio.get_running_loop().create_task(run())
    task.add_done_callback(close_unused)
    return task
