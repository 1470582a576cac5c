"""What systemd does with a .socket unit, for the tests: a command that gets a listening socket."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

_HAND_OVER = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); "
    "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES=sys.argv[2]); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)


def listen_unix(path: Path) -> socket.socket:
    """A listening Unix socket."""
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    found.bind(str(path))
    found.listen()
    return found


def start_with_socket(
    command: list[str],
    listener: socket.socket,
    *,
    name: str = "nbd",
    stderr: IO[Any] | int | None = None,
) -> subprocess.Popen[bytes]:
    """Start a command that finds the socket as descriptor 3."""
    fd = listener.fileno()
    return subprocess.Popen(
        [sys.executable, "-c", _HAND_OVER, str(fd), name, *command],
        pass_fds=[fd],
        stderr=stderr,
        stdin=subprocess.DEVNULL,
    )
