"""Processes that are surely the ones we started: by pid and start time, and gone with us."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1


def death_signal() -> Callable[[], None] | None:
    """For `preexec_fn`: the child gets SIGKILL when the thread that starts it is gone."""
    # Loaded before the fork: the child between fork and exec must not import or allocate much.
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def set_death_signal() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # the parent died before the line above

    return set_death_signal


def start_time(pid: int) -> str:
    """When a process began, as the kernel counts; empty when there is no such process.

    A pid alone may have been given to somebody else since; a pid with its start time has not.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]
