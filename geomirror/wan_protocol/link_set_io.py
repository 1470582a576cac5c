"""The connections of one set."""

from __future__ import annotations

import asyncio

from geomirror.errors import RemoteProtocolError
from geomirror.wan_protocol.messages import Hello
from geomirror.wan_protocol.negotiation import CONTROL_INDEX
from geomirror.wan_protocol.pacing import connection_rate
from geomirror.wan_protocol.stream_connection_io import LinkConnection
from geomirror.wan_protocol.stream_socket_io import UNPACED, set_pace


class LinkSet:
    """One control connection, some data connections, and dial attempts for more."""

    def __init__(self) -> None:
        self.control: LinkConnection | None = None
        self.data: dict[int, LinkConnection] = {}
        self.dialling: set[asyncio.Task[None]] = set()

    def cancel_dialling(self) -> None:
        """Give up the attempts under way."""
        for task in self.dialling:
            task.cancel()

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


def check_place(item: LinkSet | None, hello: Hello) -> None:
    """Whether an accepted connection may join `item`, the set that its hello names.

    :raises RemoteProtocolError: the control connection is there already, or is missing.
    """
    if hello.index == CONTROL_INDEX:
        if item is not None:
            raise RemoteProtocolError("hello of a control connection that is there already")
    elif item is None or item.control is None or item.control.is_dialled:
        raise RemoteProtocolError("hello of a data connection without its control connection")
