"""Socket options of a node pair's connections; all optional, the kernel may lack or refuse them.

Inside a WebSocket they are those of the TCP connection that carries it: to the peer, or as far as
the front end that ends it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Any

from geomirror.environment import US
from geomirror.tunnel.carrier_io import carrier_of
from geomirror.wan_protocol.data_progress import Reading

USER_TIMEOUT_MS = 30_000
"""Keepalive never notices a dead busy connection, as it asks on idle ones only; this does, should
the heartbeats not have done so long before. Shorter than a few round trips of a deep queue it would
cut what only waits."""
NOT_SENT_BYTES = 128 * 1024
"""Unsent bytes in the kernel before it takes no more: frames wait in our queue instead."""
UNPACED = 2**32 - 1
"""The kernel's value for no limit."""
_SO_MAX_PACING_RATE = 47
_TCP_USER_TIMEOUT = getattr(socket, "TCP_USER_TIMEOUT", 18)
_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)
_TCP_INFO = getattr(socket, "TCP_INFO", 11)
_INFO_UNACKED, _INFO_RTT, _INFO_BYTES_ACKED, _INFO_BYTES = 24, 68, 120, 128
"""Places in Linux's `struct tcp_info`, which only ever grows at its end."""
_TCP_CONGESTION = getattr(socket, "TCP_CONGESTION", 13)


def tune(sock: Any, *, is_data: bool) -> str:
    """Set the options of one connection and return its congestion control ("" if not TCP).

    Buffer sizes are left alone: setting them switches the kernel's auto-tuning off.
    """
    sock = carrier_of(sock)
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return ""
    options: list[tuple[int, int | bytes]] = [
        (socket.TCP_NODELAY, 1),
        (_TCP_USER_TIMEOUT, USER_TIMEOUT_MS),
        (_TCP_CONGESTION, b"bbr"),
    ]
    if is_data:
        options.append((_TCP_NOTSENT_LOWAT, NOT_SENT_BYTES))
    for option, value in options:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    try:
        name: bytes = sock.getsockopt(socket.IPPROTO_TCP, _TCP_CONGESTION, 16)
    except OSError:
        return "unknown"
    return name.split(b"\0", 1)[0].decode("ascii", "replace")


def read_progress(sock: Any) -> Reading | None:
    """What TCP says of a connection; None if it is not known."""
    sock = carrier_of(sock)
    try:
        found: bytes = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _INFO_BYTES)
        (unacked,) = struct.unpack_from("=I", found, _INFO_UNACKED)
        (rtt_us,) = struct.unpack_from("=I", found, _INFO_RTT)
        (acked_bytes,) = struct.unpack_from("=Q", found, _INFO_BYTES_ACKED)
    except (OSError, AttributeError, struct.error):
        return None
    return Reading(acked_bytes, unacked > 0, rtt_us * US)


def set_pace(sock: Any, bytes_per_second: int) -> None:
    """Limit what the kernel sends on this connection; works without the fq qdisc."""
    sock = carrier_of(sock)
    if sock is not None:
        with contextlib.suppress(OSError):
            # A 32-bit option on every kernel: 4.3 GB/s and above is no limit.
            value = struct.pack("=I", min(bytes_per_second, UNPACED))
            sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, value)


def discard_unsent(sock: Any) -> None:
    """Closing this connection will reset it: the peer hears at once, nothing more is sent."""
    sock = carrier_of(sock)
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
