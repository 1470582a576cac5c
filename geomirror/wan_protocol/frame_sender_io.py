"""Gives the queued frames of a node pair to its data connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from geomirror.limits import KIB, Limits
from geomirror.wan_protocol.frame import KIND_FRAME, KIND_RESYNC_FRAME, pack_header
from geomirror.wan_protocol.frame_queue import FrameQueue
from geomirror.wan_protocol.stream_connection_io import LinkConnection

CHUNK_BYTES = 128 * KIB
"""Frames joined into one write."""


class FrameSender:
    """Frames wait in the `FrameQueue` until a data connection takes them, most room first.

    :param writable: called when half of the queue is free after it was fuller.
    """

    def __init__(self, limits: Limits, writable: Callable[[], None]) -> None:
        self._limits = limits
        self._writable = writable
        self._queue = FrameQueue()
        self._connections: dict[int, LinkConnection] | None = None
        self._was_fuller = False
        self._is_pump_due = False

    @property
    def queued_bytes(self) -> int:
        """Frames that wait for a data connection."""
        return self._queue.queued_bytes

    @property
    def room_bytes(self) -> int:
        """What may be queued now; 0 when the link is down."""
        return max(0, self._bytes_max() - self._queue.queued_bytes)

    def use(self, connections: dict[int, LinkConnection] | None) -> None:
        """Send over these connections from now on (`None`: the link is down); drop the queue."""
        self._connections = connections
        self._queue.clear()
        self._was_fuller = False

    def send(
        self, session: int, epoch: int, sequence: int, body: bytes, *, is_resync: bool
    ) -> None:
        """Queue a frame; dropped when the link is down."""
        if self._connections is None:
            return
        kind = KIND_RESYNC_FRAME if is_resync else KIND_FRAME
        header = pack_header(kind, len(body), session=session, epoch=epoch, sequence=sequence)
        self._queue.push(session, header, body, is_resync=is_resync)
        self._was_fuller |= 2 * self._queue.queued_bytes > self._bytes_max()
        if not self._is_pump_due:
            # Once per turn of the loop, so that frames sent together are written together.
            self._is_pump_due = True
            asyncio.get_running_loop().call_soon(self.pump)

    def pump(self) -> None:
        """Write what the data connections take."""
        self._is_pump_due = False
        while self._connections and self._queue.queued_bytes > 0:
            connection = max(self._connections.values(), key=lambda item: item.room_bytes)
            room_bytes = connection.room_bytes
            if room_bytes == 0:
                break
            connection.write(b"".join(self._queue.pop(min(CHUNK_BYTES, room_bytes))))
        if self._was_fuller and 2 * self._queue.queued_bytes <= self._bytes_max():
            self._was_fuller = False
            self._writable()

    def _bytes_max(self) -> int:
        if self._connections is None:
            return 0
        return self._limits.queue_bytes_max * max(1, len(self._connections))
