"""The NBD server: listens on Unix and TCP sockets and keeps the list of connections.

Exports are looked up in a mapping that is asked for at each handshake, so that volumes, views and
aliases come and go without telling the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from geomirror.errors import (
    GeomirrorError,
    InUseError,
    RefusedError,
    StorageError,
    UnreachableError,
    UsageError,
)
from geomirror.limits import PRODUCTION, Limits
from geomirror.nbd.connection_io import DRAIN_S_MAX, NbdConnection
from geomirror.nbd.protocol import Export, canonical_names
from geomirror.nbd.registry import Registry
from geomirror.nbd.tls_io import ServerTls

SOCKET_PATH_BYTES_MAX = 107
"""`sun_path` of Linux without its terminating zero."""


class NbdServer(Registry):
    """Serves exports to NBD clients on any number of sockets. Belongs to one event loop.

    :param exports: name → export, aliases included; a new size is seen by the next client.
    :param default: name that the empty export name stands for.
    :param on_disconnect: told of every connection that ends: export name or "", and the error.
    """

    def __init__(
        self,
        exports: Callable[[], Mapping[str, Export]],
        *,
        limits: Limits = PRODUCTION,
        default: str | None = None,
        on_disconnect: Callable[[str, Exception | None], None] | None = None,
    ) -> None:
        self.limits = limits
        self.tls: ServerTls | None = None
        """Of TCP clients that connect from now on; a Unix socket is its user's own."""
        self._exports = exports
        self._default = default
        self._on_disconnect = on_disconnect
        self._connections: dict[int, NbdConnection] = {}
        self._listeners: list[asyncio.Server] = []
        self._paths: list[tuple[Path, int]] = []
        self._is_stopping = False
        self._all_gone: asyncio.Future[None] | None = None

    async def start_unix(self, path: str | Path) -> None:
        """Listen on a Unix socket that only this user may open (mode 0600).

        A socket that nobody listens on any more is replaced.

        :raises UsageError: the path is longer than a socket address can hold.
        :raises InUseError: somebody listens there, or it is not a socket.
        """
        path = Path(path)
        if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
            raise UsageError(
                f'socket path "{path}" is longer than {SOCKET_PATH_BYTES_MAX} bytes',
                hint="choose a shorter --data-dir",
            )
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(path))
            # Nobody can connect before listen(), so there is no moment with a wider mode.
            path.chmod(0o600)
            self._paths.append((path, path.stat().st_ino))
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            raise StorageError.from_os(error, operation="listen on", path=str(path)) from error
        await self.start_socket(listener)

    async def start_socket(self, listener: socket.socket) -> None:
        """Serve a listening socket of any family; it is closed, and nothing unlinked, by `stop`."""
        loop = asyncio.get_running_loop()
        if listener.family == socket.AF_UNIX:
            # From Python 3.13 on a loop would unlink the path when it closes the socket.
            keep: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
            server = await loop.create_unix_server(self._connection, sock=listener, **keep)
        else:
            server = await loop.create_server(self._tcp_connection, sock=listener)
        self._listeners.append(server)

    async def serve(self, connected: socket.socket) -> None:
        """Serve one client that is connected already, as over a pair of sockets."""
        connected.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(self._connection, connected)

    def _connection(self) -> NbdConnection:
        return NbdConnection(self)

    def _tcp_connection(self) -> NbdConnection:
        return NbdConnection(self, self.tls)

    async def start_tcp(self, host: str, port: int) -> tuple[str, int]:
        """Listen on TCP, with `tls` if it is set; returns the address, with the port if it was 0.

        :raises UnreachableError: the address cannot be listened on.
        """
        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(self._tcp_connection, host, port)
        except OSError as error:
            raise UnreachableError(
                f"cannot listen on {host}:{port}: {error.strerror or error}",
                hint="is another process listening there?",
            ) from error
        self._listeners.append(server)
        address = server.sockets[0].getsockname()
        return address[0], address[1]

    def disconnect_export(self, name: str) -> int:
        """End every connection of an export after the requests in flight; returns how many.

        For a new size, a demotion or a deleted view: clients that reconnect see what is new.
        """
        ended = [
            connection
            for connection in self._connections.values()
            if connection.export is not None and connection.export.name == name
        ]
        for connection in ended:
            connection.end()
        return len(ended)

    def connection_count(self, name: str) -> int:
        """Clients attached to an export now."""
        return sum(
            connection.export is not None and connection.export.name == name
            for connection in self._connections.values()
        )

    async def stop(self) -> None:
        """Stop listening, finish the requests in flight, close all connections."""
        self._is_stopping = True
        for listener in self._listeners:
            listener.close()
        for path, inode in self._paths:
            with contextlib.suppress(OSError):
                if path.stat().st_ino == inode:
                    path.unlink()
        self._paths.clear()
        if self._connections:
            self._all_gone = asyncio.get_running_loop().create_future()
            for connection in list(self._connections.values()):
                connection.end()
            # The connections' own timers abort what does not finish.
            await asyncio.wait_for(self._all_gone, DRAIN_S_MAX + 5)
        for listener in self._listeners:
            await listener.wait_closed()
        self._listeners.clear()

    # ---- what connections ask for

    def resolve(self, name: str) -> Export | None:
        """The export of a name; the empty name is the default export."""
        if not name and self._default is not None:
            name = self._default
        return self._exports().get(name)

    def names(self) -> list[tuple[str, str]]:
        """(name, description) of all exports, aliases left out."""
        return canonical_names(self._exports().items())

    def admit(self, connection: NbdConnection, export: Export) -> None:
        """Refuse what is over the export's connection limit, or comes while we stop."""
        if self._is_stopping:
            raise GeomirrorError("the server is stopping")
        if self.connection_count(export.name) >= self.limits.nbd_connections_max:
            raise RefusedError(
                f'export "{export.name}" has {self.limits.nbd_connections_max} clients already'
            )

    def connected(self, connection: NbdConnection) -> bool:
        """Keep a new connection, unless too many are still negotiating."""
        self._connections[id(connection)] = connection
        waiting = sum(other.export is None for other in self._connections.values())
        return waiting <= self.limits.nbd_connections_max and not self._is_stopping

    def disconnected(self, connection: NbdConnection, error: Exception | None) -> None:
        """Forget a connection."""
        del self._connections[id(connection)]
        if self._on_disconnect is not None:
            self._on_disconnect(connection.export.name if connection.export else "", error)
        if self._all_gone is not None and not self._connections and not self._all_gone.done():
            self._all_gone.set_result(None)


def _remove_stale(path: Path) -> None:
    """Unlink a socket that nobody listens on; refuse anything else that is there."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise InUseError(f'"{path}" exists and is not a socket', hint="remove it first")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise InUseError(f'"{path}" cannot be probed: {error}') from error
    raise InUseError(f'another process listens on "{path}"', hint="is a daemon already running?")
