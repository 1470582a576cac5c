"""One daemon per data directory: a lock that dies with its process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time

from geomirror.errors import InUseError, StorageError
from geomirror.node.paths import DataDir

TRIES = 10
TRY_S = 0.02


class DaemonLock:
    """Holds the data directory until `release` or the end of the process, however it ends."""

    def __init__(self, data_dir: DataDir) -> None:
        """Take the lock and write our pid into it.

        :raises InUseError: another daemon holds it.
        """
        path = data_dir.lock
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError.from_os(error, operation="open", path=str(path)) from error
        try:
            self._take()
        except OSError as error:
            holder = os.pread(self._descriptor, 32, 0).decode("ascii", "replace").strip() or "?"
            os.close(self._descriptor)
            raise InUseError(
                f"{data_dir.root} is served by process {holder}",
                hint=f'"geomirror --data-dir {data_dir.root} status" asks it',
            ) from error
        # For people only: on a full disk the lock holds without it.
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def _take(self) -> None:
        # A command that looks whether a daemon runs holds the lock, shared, for an instant.
        for _ in range(TRIES):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(TRY_S)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        """Let another daemon in."""
        os.close(self._descriptor)
