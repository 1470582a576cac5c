"""Listening sockets handed over by systemd, or by a client like libnbd's `[ COMMAND ]`.

The protocol of sd_listen_fds(3): sockets lie at descriptors 3, 4, …, `LISTEN_FDS` counts them,
`LISTEN_PID` says for which process they are, `LISTEN_FDNAMES` names them.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from geomirror.errors import UsageError

FIRST_DESCRIPTOR = 3
SOCKETS_MAX = 64
"""More listening sockets than anybody has; bounds what a wrong variable makes us look at."""
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)


@dataclass(frozen=True)
class ActivatedSocket:
    """One listening stream socket, ours to close; not inherited by children."""

    name: str
    """`FileDescriptorName=` of the unit; "unknown" when nobody gave one."""
    listener: socket.socket


def take_activated_sockets() -> list[ActivatedSocket]:
    """The sockets handed to this process; none when there are none, or they are another's.

    The variables are taken out of the environment, so that a second call, and every child, finds
    nothing. Call it before anything else opens descriptors.

    :raises UsageError: a variable is malformed, or a descriptor is no listening socket.
    """
    count_text = os.environ.pop("LISTEN_FDS", "")
    pid_text = os.environ.pop("LISTEN_PID", "")
    names_text = os.environ.pop("LISTEN_FDNAMES", None)
    os.environ.pop("LISTEN_PIDFDID", None)
    if not count_text or not pid_text:
        return []
    if _number(pid_text, "LISTEN_PID") != os.getpid():
        return []  # Meant for a process between the service manager and us.
    count = _number(count_text, "LISTEN_FDS")
    if count > SOCKETS_MAX:
        raise UsageError(f"LISTEN_FDS={count}: at most {SOCKETS_MAX} sockets can be handed over")
    names = ["unknown"] * count if names_text is None else names_text.split(":")
    if count and len(names) != count:
        raise UsageError(f"LISTEN_FDNAMES has {len(names)} names for LISTEN_FDS={count} sockets")
    taken: list[ActivatedSocket] = []
    try:
        for index in range(count):
            listener = _take(FIRST_DESCRIPTOR + index, names[index])
            taken.append(ActivatedSocket(names[index] or "unknown", listener))
    except UsageError:
        close_all(taken)
        raise
    return taken


def close_all(activated: list[ActivatedSocket]) -> None:
    """Close what is not going to be served; the service manager keeps its own descriptors."""
    for entry in activated:
        entry.listener.close()


def describe_address(listener: socket.socket) -> str:
    """Where a socket listens, for people: a path or HOST:PORT."""
    address = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        if isinstance(address, bytes):
            return "@" + address.lstrip(b"\0").decode(errors="replace")
        return str(address) or "(unnamed)"
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _take(descriptor: int, name: str) -> socket.socket:
    """Our socket object of a descriptor, with what systemd may have left on it put right."""
    try:
        os.set_inheritable(descriptor, False)
        listener = socket.socket(fileno=descriptor)
    except OSError as error:
        text = error.strerror or str(error)
        raise _wrong(descriptor, name, f"is no socket ({text})") from error
    reason = _refusal(listener)
    if reason:
        listener.close()
        raise _wrong(descriptor, name, reason)
    listener.setblocking(False)
    return listener


def _refusal(listener: socket.socket) -> str:
    if listener.family not in _FAMILIES:
        return f"is a socket of address family {int(listener.family)}, not Unix or TCP"
    if listener.type != socket.SOCK_STREAM:
        return "is not a stream socket"
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "does not listen"
    return ""


def _wrong(descriptor: int, name: str, reason: str) -> UsageError:
    return UsageError(
        f'the descriptor {descriptor} ("{name}") that LISTEN_FDS hands over {reason}',
        hint="use ListenStream= and Accept=no in the .socket unit",
    )


def _number(text: str, variable: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError(f'{variable} is "{text[:40]}", not a number')
    return int(text)
