"""Open files of the daemon: each journal segment that is kept holds one."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable

from geomirror.errors import RefusedError
from geomirror.limits import Limits

FILES_ASIDE = 256
"""For everything but segments: links, clients, images, undo, logs."""


def raise_file_limit() -> int:
    """Allow this process as many open files as it may have; returns how many (`file_limit`)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return file_limit()


def file_limit() -> int:
    """Open files that this process may have now."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


CIRCUIT_FILES_ASIDE = FILES_ASIDE // 2
"""Of these, what circuits may have."""


def circuits_that_fit(journals_bytes: Iterable[int], limits: Limits, files_max: int) -> int:
    """Forwarded connections, of two sockets each, that leave the journals all files that they may
    need one day: at most `circuits_max`."""
    spare = files_max - FILES_ASIDE - _segments(journals_bytes, limits)
    return max(0, min(limits.circuits_max, (spare + CIRCUIT_FILES_ASIDE) // 2))


def _segments(journals_bytes: Iterable[int], limits: Limits) -> int:
    # Bookkeeping may go one segment over a journal's bound.
    return sum(size // limits.segment_bytes + 1 for size in journals_bytes)


def require_files(journals_bytes: Iterable[int], limits: Limits, files_max: int) -> None:
    """Refuse journals that could not be kept open when they are full.

    :raises RefusedError: they need more files than `files_max`.
    """
    segments = _segments(journals_bytes, limits)
    if segments + FILES_ASIDE > files_max:
        raise RefusedError(
            f"{segments} journal segments are too many for {files_max} open files",
            hint='choose a smaller "--journal-size", or raise LimitNOFILE of the service',
        )
