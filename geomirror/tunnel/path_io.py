"""Opens the way of a path: a connected socket, at whose other end the peer speaks TLS."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass

from geomirror.environment import Entropy
from geomirror.errors import LinkError
from geomirror.limits import Limits
from geomirror.tunnel.connect_proxy import (
    ConnectAnswer,
    Credentials,
    ProxyAnswer,
    connect_request,
)
from geomirror.tunnel.link_path import LinkPath
from geomirror.tunnel.names import split_endpoint
from geomirror.tunnel.tcp_io import open_tcp
from geomirror.tunnel.websocket_io import open_websocket

READ_BYTES = 4096


@dataclass
class WayOut:
    """What this node needs to get out, besides the paths themselves."""

    credentials: Credentials | None = None
    """For the proxy."""


async def open_path(
    path: LinkPath,
    way_out: WayOut,
    limits: Limits,
    entropy: Entropy,
    connected: Callable[[], None] = lambda: None,
) -> socket.socket:
    """Open it; how long that may take is the caller's.

    :param connected: called when somebody has answered at the far end; who, is not known.
    :raises LinkError: the proxy or the web server does not let us through; says which, and why.
    :raises RemoteProtocolError: one of them sends nonsense.
    :raises OSError: nobody answers.
    """
    if path.proxy:
        sock, answer = await ask_proxy(path, way_out, limits)
        try:
            answer.check(path.proxy, path.target)
        except LinkError:
            sock.close()
            raise
    else:
        sock = await open_tcp(path.host, path.port, limits.tcp_segment_bytes)
    if path.scheme:
        sock = await open_websocket(path, sock, limits, entropy)
    connected()
    return sock


async def ask_proxy(
    path: LinkPath, way_out: WayOut, limits: Limits
) -> tuple[socket.socket, ProxyAnswer]:
    """Ask the path's proxy for a connection; the connection to it, and what it said.

    :raises LinkError: the proxy cannot be reached, or closes without an answer.
    :raises RemoteProtocolError: its answer is none, or endless.
    """
    loop = asyncio.get_running_loop()
    host, port = split_endpoint(path.proxy)
    try:
        sock = await open_tcp(host, port, limits.tcp_segment_bytes)
    except OSError as error:
        raise LinkError(
            f"the proxy {path.proxy} cannot be reached: {error.strerror or error}",
            hint='check "links.proxy" in the configuration',
        ) from None
    try:
        await loop.sock_sendall(sock, connect_request(path.target, way_out.credentials))
        reading = ConnectAnswer()
        while True:
            data = await loop.sock_recv(sock, READ_BYTES)
            if not data:
                raise LinkError(f"the proxy {path.proxy} closed the connection without an answer")
            answer = reading.receive(data)
            if answer is not None:
                return sock, answer
    except OSError as error:
        sock.close()
        cause = error.strerror or str(error)
        raise LinkError(f"the proxy {path.proxy} broke off: {cause}") from None
    except BaseException:
        with contextlib.suppress(OSError):
            sock.close()
        raise
