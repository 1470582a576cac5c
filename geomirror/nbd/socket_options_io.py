"""Options of an accepted NBD connection's socket."""

from __future__ import annotations

import socket

_SEND_BUFFER_BYTES = 2 << 20
"""Asked for; the kernel grants at most twice `net.core.wmem_max`."""


def tune_socket(sock: socket.socket) -> None:
    """Large buffers on a Unix socket; on TCP no delays, and a dead client is found out."""
    if sock.family == socket.AF_UNIX:
        # TCP tunes its buffers itself; a Unix socket's 208 KiB means five rounds a MiB.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A host that died must not stay the only writer: found out after 30 + 3 x 10 s.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
