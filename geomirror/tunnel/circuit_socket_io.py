"""Sockets of circuits: whether they are read, and options that the kernel may lack or refuse."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from typing import Any

from geomirror.tunnel.carrier_io import carrier_of

_TCP_INFO = getattr(socket, "TCP_INFO", 11)
_TCP_CONGESTION = getattr(socket, "TCP_CONGESTION", 13)
_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)
NOT_SENT_BYTES = 128 * 1024
"""Unsent bytes in the kernel before it takes no more: a change of pace comes late to them."""
RETRANSMITS_MAX = 8
"""Timers of one segment that ran out in a row, each twice as long: about a minute from 0.2 s on.
The link beside it is well.
Not TCP_USER_TIMEOUT, which also ends a connection whose application takes nothing for so long."""
KEEPALIVE = (
    (getattr(socket, "TCP_KEEPIDLE", 4), 60),
    (getattr(socket, "TCP_KEEPINTVL", 5), 15),
    (getattr(socket, "TCP_KEEPCNT", 6), 4),
)
"""Seconds, seconds, probes. NATs forget a connection that is silent for some minutes."""


def hold_reading(transport: asyncio.Transport | None, is_held: bool) -> None:
    """Do not read for now, or read on; of one that is closing or gone there is nothing to say."""
    if transport is None or transport.is_closing():
        return
    if is_held:
        transport.pause_reading()
    else:
        transport.resume_reading()


def tune_application(sock: Any) -> None:
    """Options of the application's connection, and `arm_reset`."""
    _set(sock, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _keep_alive(sock)
    arm_reset(sock)


def tune_peer(sock: Any) -> None:
    """Options of the connection to the peer."""
    _set(sock, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _set(sock, socket.IPPROTO_TCP, _TCP_CONGESTION, b"bbr")
    _set(sock, socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, NOT_SENT_BYTES)
    _keep_alive(sock)


def arm_reset(sock: Any) -> None:
    """Closing this socket resets its connection from now on, whoever closes it: the kernel, too,
    when the daemon is killed."""
    _set(sock, socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def disarm_reset(sock: Any) -> None:
    """Closing this socket ends its connection in good order again."""
    _set(sock, socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))


def failure_of(sock: Any) -> str:
    """What happened to a connection that is not read at present; empty if nothing did."""
    sock = carrier_of(sock)
    if sock is None:
        return ""
    try:
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            return os.strerror(code)
        retransmits = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 8)[2]
    except (OSError, IndexError):
        return ""  # closed meanwhile, or not TCP
    return "nothing gets through any more" if retransmits >= RETRANSMITS_MAX else ""


def _keep_alive(sock: Any) -> None:
    _set(sock, socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        _set(sock, socket.IPPROTO_TCP, option, value)


def _set(sock: Any, level: int, option: int, value: int | bytes) -> None:
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, value)
