"""The connections of one set."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any

from geomirror.errors import RemoteProtocolError
from geomirror.wan_protocol.data_progress import Reading
from geomirror.wan_protocol.link import LinkCore
from geomirror.wan_protocol.messages import Hello
from geomirror.wan_protocol.negotiation import CONTROL_INDEX
from geomirror.wan_protocol.pacing import connection_rate
from geomirror.wan_protocol.stream_connection_io import LinkConnection
from geomirror.wan_protocol.stream_socket_io import UNPACED, read_progress, set_pace


class LinkSet:
    """One control connection, some data connections, and dial attempts for more."""

    def __init__(self) -> None:
        self.control: LinkConnection | None = None
        self.data: dict[int, LinkConnection] = {}
        self.waiting: list[LinkConnection] = []
        """Data connections that say hello as soon as the control connection has done."""
        self.dialling: set[asyncio.Task[None]] = set()

    def begin(self, dialling: Coroutine[Any, Any, None]) -> None:
        """Run an attempt, which `cancel_dialling` ends."""
        task = asyncio.get_running_loop().create_task(dialling)
        self.dialling.add(task)
        task.add_done_callback(self.dialling.discard)

    def cancel_dialling(self) -> None:
        """Give up the attempts under way."""
        for task in self.dialling:
            task.cancel()

    def progress(self) -> list[tuple[int, Reading]]:
        """What TCP says of each connection; the control connection is −1."""
        found = []
        every = [(CONTROL_INDEX, self.control), *self.data.items()]
        for index, connection in every:
            if connection is None:
                continue
            reading = read_progress(connection.socket)
            if reading is not None:
                found.append((index, reading))
        return found

    def give_up(self, index: int, bytes_per_second: int | None) -> None:
        """Close a data connection and what it still has to send."""
        connection = self.data.pop(index, None)
        if connection is not None:
            connection.discard()
            self.pace(bytes_per_second)

    def pace(self, bytes_per_second: int | None) -> None:
        """Divide the configured rate of the link over the data connections that are up."""
        for connection in self.data.values():
            if bytes_per_second is None:
                set_pace(connection.socket, UNPACED)
            else:
                pace = connection_rate(bytes_per_second, len(self.data))
                set_pace(connection.socket, pace)

    @property
    def remote_address(self) -> str:
        """`HOST:PORT` of the other end, if known."""
        return self.control.remote_address if self.control is not None else ""


class OpenConnections:
    """Every connection of a node pair whose transport is there, whatever it is good for."""

    def __init__(self) -> None:
        self._open: set[LinkConnection] = set()
        self._closed_bytes_sent = 0
        self._all_gone: asyncio.Event | None = None

    def __iter__(self) -> Iterator[LinkConnection]:
        return iter(self._open)

    @property
    def bytes_sent(self) -> int:
        """In total, by those that are gone too."""
        return self._closed_bytes_sent + sum(item.bytes_sent for item in self._open)

    @property
    def ungreeted(self) -> int:
        """How many have not exchanged hellos."""
        return sum(not item.is_greeted for item in self._open)

    def add(self, connection: LinkConnection) -> None:
        """Remember it until `forget`."""
        self._open.add(connection)

    def forget(self, connection: LinkConnection) -> None:
        """Its transport is gone."""
        self._open.discard(connection)
        self._closed_bytes_sent += connection.bytes_sent
        if not self._open and self._all_gone is not None:
            self._all_gone.set()

    def discard(self, link: bytes) -> None:
        """Close those of a set without telling the owner."""
        for connection in list(self._open):
            if connection.link == link and not connection.is_closed:
                connection.discard()

    def drop(self) -> None:
        """Close all; what was written goes out first where it is wanted so."""
        for connection in list(self._open):
            if not connection.is_closed:
                connection.drop()

    async def gone(self, seconds_max: float) -> None:
        """Until every transport is gone, or the time is up; then those left are aborted."""
        if self._open:
            self._all_gone = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_gone.wait(), seconds_max)
        for connection in list(self._open):
            connection.drop()


def check_place(item: LinkSet | None, hello: Hello) -> None:
    """Whether an accepted connection may join `item`, the set that its hello names.

    :raises RemoteProtocolError: the control connection is there already, or is missing.
    """
    if hello.index == CONTROL_INDEX:
        if item is not None:
            raise RemoteProtocolError("hello of a control connection that is there already")
    elif item is None or item.control is None or item.control.is_dialled:
        raise RemoteProtocolError("hello of a data connection without its control connection")


def shown(core: LinkCore, current: LinkSet | None, stall: str) -> dict[str, Any]:
    """The fields of `LinkStatus` that say which connections are in use.

    :param stall: what holds data up, if anything does.
    """
    chosen = core.current
    is_up = chosen is not None and current is not None
    connections = list(current.data.values()) if current is not None else []
    return {
        "is_established": is_up,
        "rtt_ns": core.round_trip.smoothed_ns,
        "connections": len(connections),
        "congestion": connections[0].congestion if connections else "",
        "last_error": core.last_error,
        "endpoint": (chosen.endpoint or current.remote_address) if chosen and current else "",
        "is_dialled": chosen is not None and chosen.is_dialled,
        "trouble": stall if is_up else core.last_error,
        "rank": chosen.rank if chosen is not None else 0,
        "path_reason": core.choice.reason() if is_up else "",
    }
