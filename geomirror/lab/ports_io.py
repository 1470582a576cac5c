"""Free loopback ports."""

from __future__ import annotations

import contextlib
import secrets
import socket
from pathlib import Path

LOWEST = 10_000
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
TRIES_MAX = 200


def free_ports(count: int) -> list[int]:
    """`count` different loopback ports that nobody listens on now.

    They lie below those that the kernel gives to outgoing connections: such a connection, of
    anybody on the machine, would take one before the daemon binds it, or while that is restarted.
    They are chosen by chance, so that two who choose at the same time do not meet, and held
    together until all are chosen, so that they differ.

    :raises OSError: none was found.
    """
    below = int(EPHEMERAL.read_text().split()[0])
    with contextlib.ExitStack() as held:
        return [_hold_one(held, below) for _ in range(count)]


def free_port() -> int:
    """One of these."""
    return free_ports(1)[0]


def _hold_one(held: contextlib.ExitStack, below: int) -> int:
    sock = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    for _ in range(TRIES_MAX if below > LOWEST else 0):
        port = LOWEST + secrets.randbelow(below - LOWEST)
        with contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    sock.bind(("127.0.0.1", 0))  # The range begins too low on this machine, or all are taken.
    return int(sock.getsockname()[1])
