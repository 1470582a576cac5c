"""Accepts connections of strangers: counted, and the oldest is ended when there are too many."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from geomirror.errors import LinkError
from geomirror.tunnel.join_server_io import Refused
from geomirror.tunnel.names import join_endpoint
from geomirror.tunnel.tcp_io import accept_each, start_owner

Handle = Callable[[socket.socket, str], Coroutine[Any, Any, None]]


class Door:
    """Listening sockets, and a task for each connection until it is known who that is.

    :param handle: takes a connection and its source address; returns when it is no stranger any
        more, or gone.
    :param pending_max: handled at once; one more ends the oldest.
    """

    def __init__(
        self, sockets: list[socket.socket], handle: Handle, refused: Refused, pending_max: int
    ) -> None:
        self._sockets = sockets
        self._handle = handle
        self._refused = refused
        self._pending_max = pending_max
        self._pending: dict[asyncio.Task[None], None] = {}
        self._accepting: list[asyncio.Task[None]] = []
        self.endpoint = join_endpoint(*sockets[0].getsockname()[:2])

    def start(self) -> None:
        """Begin to accept."""
        loop = asyncio.get_running_loop()
        self._accepting = [
            loop.create_task(accept_each(sock, self._take, self._failed)) for sock in self._sockets
        ]

    async def stop(self) -> None:
        """Close the sockets and what is handled; what was let in stays."""
        tasks = [*self._accepting, *self._pending]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sock in self._sockets:
            sock.close()

    def _failed(self, error: OSError) -> None:
        self._refused("", LinkError(f"accepting on {self.endpoint}: {error}"))

    def _take(self, connection: socket.socket, address: str) -> None:
        if len(self._pending) >= self._pending_max:
            # The oldest is the likeliest to be a stranger that only holds the place.
            next(iter(self._pending)).cancel()
        task = start_owner(connection, lambda: self._handle(connection, address))
        self._pending[task] = None
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._pending.pop(task, None)
