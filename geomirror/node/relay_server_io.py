"""The process behind `geomirror nbd`: relays of clients to the daemon, for one volume."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

from geomirror.errors import GeomirrorError
from geomirror.limits import PRODUCTION
from geomirror.nbd.relay_io import DescriptorChannel, SocketChannel, relay

_LOOK_S = 1.0
"""Between two looks at whether our parent, for whom we serve, is still there."""


def relay_standard_streams(path: str, export: str) -> None:
    """Serve the client at descriptors 0 and 1 until it, or the daemon, ends the connection.

    Whatever else is printed goes to stderr from here on.

    :raises GeomirrorError: as `relay`.
    """
    source, target = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    relay(DescriptorChannel(source, target), path, export)


class RelayServer:
    """Accepts clients on one socket and relays each of them, until SIGTERM or an orphan's end.

    :param report: told of clients that could not be served.
    """

    def __init__(
        self,
        listener: socket.socket,
        path: str,
        export: str,
        report: Callable[[GeomirrorError], object],
    ) -> None:
        self._listener, self._path, self._export = listener, path, export
        self._report = report
        self._parent = os.getppid()
        self._free = threading.BoundedSemaphore(PRODUCTION.nbd_connections_max)
        self._lock = threading.Lock()
        self._active = 0

    def run(self) -> None:
        """Serve; returns when the process that started us is gone and no client is left.

        :raises SystemExit: SIGTERM came; libnbd sends it when it is done.
        """
        signal.signal(signal.SIGTERM, _leave)
        self._listener.settimeout(_LOOK_S)
        while not self._is_orphan():
            if not self._free.acquire(timeout=_LOOK_S):
                continue
            try:
                connection, _ = self._listener.accept()
            except OSError:
                # Nobody came in time, or who came is gone already.
                self._free.release()
                continue
            with self._lock:
                self._active += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _is_orphan(self) -> bool:
        return not self._active and os.getppid() != self._parent

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                relay(SocketChannel(connection), self._path, self._export)
        except GeomirrorError as error:
            self._report(error)
        finally:
            with self._lock:
                self._active -= 1
            self._free.release()


def _leave(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)
