"""One connection of a node pair: bytes to packets and back. What they mean is `peer_link_io`'s."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol, cast

from geomirror.errors import ProtocolError
from geomirror.limits import KIB, MIB, Limits
from geomirror.wan_protocol.frame import (
    KIND_MESSAGE,
    KIND_PADDING,
    Packet,
    PacketReader,
    pack_header,
)
from geomirror.wan_protocol.messages import Message, encode_message
from geomirror.wan_protocol.stream_socket_io import discard_unsent, tune

WRITE_BUFFER_BYTES = 256 * KIB
"""Handed to a transport before it is done with the last; larger writes gain nothing."""
CONTROL_BUFFER_BYTES_MAX = 16 * MIB
"""Messages that a peer has not taken yet; a peer so far behind is disconnected."""
HELLO_SECONDS_MAX = 10.0
FOLLOW_SECONDS = 0.008
"""A packet is followed by another within this time: TCP learns of a lost last packet from what
comes after it, a lone one waits for a timer of RTT + 200 ms."""
_FOLLOWER = pack_header(KIND_PADDING, 0)


class ConnectionOwner(Protocol):
    """Who is told what a connection sees."""

    def connection_open(self, connection: LinkConnection) -> None:
        """The transport is there."""

    def connection_ready(self, connection: LinkConnection) -> None:
        """It may be written to: a dialled one says hello."""

    def packets(self, connection: LinkConnection, packets: list[Packet], count: int) -> None:
        """`count` bytes arrived, and with them these packets. May raise `ProtocolError`."""

    def connection_closed(self, connection: LinkConnection, reason: str) -> None:
        """The connection is gone; called once, not after `drop`."""

    def connection_writable(self, connection: LinkConnection) -> None:
        """The transport takes more again."""

    def connection_gone(self, connection: LinkConnection) -> None:
        """The transport is gone too; called last, once for each `connection_open`."""


class LinkConnection(asyncio.BufferedProtocol):
    """A control or data connection, dialled or accepted. It never stops reading.

    :param link, index: the set it belongs to and its number, −1 for the control connection; of an
        accepted one they are known from its hello.
    """

    def __init__(
        self, owner: ConnectionOwner, limits: Limits, *, link: bytes = b"", index: int = -1
    ) -> None:
        self.link = link
        self.index = index
        self.is_dialled = link != b""
        self.is_greeted = False
        """Hellos were exchanged."""
        self.is_paused = False
        self.is_closed = False
        self.is_refused = False
        """Closed because of what the peer did or did not say."""
        self.congestion = ""
        self.bytes_sent = 0
        self._owner = owner
        self._reader = PacketReader(limits)
        self._transport: asyncio.Transport | None = None
        self._hello_timer: asyncio.TimerHandle | None = None
        self._follow_timer: asyncio.TimerHandle | None = None
        self._written_at = 0.0

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop or the link driver."""
        self._transport = cast(asyncio.Transport, transport)
        self._owner.connection_open(self)
        if self.is_closed:
            self._transport.abort()
            return
        loop = asyncio.get_running_loop()
        self._hello_timer = loop.call_later(HELLO_SECONDS_MAX, self._not_greeted)
        self._owner.connection_ready(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Room for the next read."""
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have been read."""
        if self.is_closed:
            return
        packets = self._reader.advance(nbytes)
        try:
            self._owner.packets(self, packets, nbytes)
            if self._reader.failure is not None:
                raise self._reader.failure
        except ProtocolError as error:
            self.is_refused = True
            self.close(f"protocol error: {error}")

    def eof_received(self) -> bool:
        """The peer closed."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is gone."""
        is_reset = isinstance(exc, ConnectionResetError)
        self.close("reset by the peer" if is_reset else str(exc or "closed by the peer"))
        self._owner.connection_gone(self)

    def pause_writing(self) -> None:
        """The transport has enough."""
        self.is_paused = True

    def resume_writing(self) -> None:
        """The transport takes more."""
        self.is_paused = False
        self._owner.connection_writable(self)

    def _not_greeted(self) -> None:
        self.is_refused = True
        self.close(f"no hello within {HELLO_SECONDS_MAX:g} s")

    # For the owner.

    def tune(self) -> None:
        """Set the socket options, once it is known what the connection is for."""
        assert self._transport is not None
        self.congestion = tune(self._transport.get_extra_info("socket"), is_data=self.index >= 0)
        if self.index >= 0:
            # One less, so that no room always means that `resume_writing` will come.
            self._transport.set_write_buffer_limits(
                high=WRITE_BUFFER_BYTES - 1, low=WRITE_BUFFER_BYTES // 4
            )

    def greeted(self) -> None:
        """Hellos have been exchanged: no more hurry."""
        self.is_greeted = True
        if self._hello_timer is not None:
            self._hello_timer.cancel()

    @property
    def socket(self) -> Any:
        """The socket for its options, or None."""
        return self._transport.get_extra_info("socket") if self._transport else None

    @property
    def remote_address(self) -> str:
        """`HOST:PORT` of the other end, if it has one."""
        name = self._transport.get_extra_info("peername") if self._transport else None
        return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else ""

    @property
    def room_bytes(self) -> int:
        """What may be handed over now."""
        if self.is_paused or self.is_closed or not self.is_greeted or self._transport is None:
            return 0
        return max(0, WRITE_BUFFER_BYTES - self._transport.get_write_buffer_size())

    def write(self, data: bytes, *, is_followed: bool = True) -> None:
        """Send packed packets, and a padding packet after them unless more comes soon."""
        if self._transport is None or self.is_closed:
            return
        self.bytes_sent += len(data)
        self._transport.write(data)
        if is_followed:
            loop = asyncio.get_running_loop()
            self._written_at = loop.time()
            if self._follow_timer is None:
                self._follow_timer = loop.call_later(FOLLOW_SECONDS, self._follow)

    def send(self, session: int, message: Message, *, is_followed: bool = True) -> None:
        """Send a control message."""
        body = encode_message(message)
        header = pack_header(KIND_MESSAGE, len(body), session=session)
        self.write(header + body, is_followed=is_followed)
        if self._transport is None or self.is_closed:
            return
        if self._transport.get_write_buffer_size() > CONTROL_BUFFER_BYTES_MAX:
            self.close("the peer does not take its messages")

    def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        due = self._written_at + FOLLOW_SECONDS
        self._follow_timer = None
        if loop.time() < due:
            self._follow_timer = loop.call_at(due, self._follow)
        else:
            self.write(_FOLLOWER, is_followed=False)

    def close(self, reason: str) -> None:
        """Close at once and tell the owner."""
        if not self.is_closed:
            self.drop()
            self._owner.connection_closed(self, reason)

    def discard(self) -> None:
        """Close without telling the owner, and forget what the kernel has not sent yet."""
        # Else megabytes for a session that is over go before what its successor sends.
        discard_unsent(self.socket)
        self.drop()

    def drop(self, *, is_graceful: bool = False) -> None:
        """Close without telling the owner; graceful: what was written goes out first."""
        self.is_closed = True
        if self._hello_timer is not None:
            self._hello_timer.cancel()
        if self._follow_timer is not None:
            self._follow_timer.cancel()
        if self._transport is None:
            return
        if is_graceful:
            self._transport.close()
        else:
            # Not `close`: TLS would wait for the answer of a peer that may be gone.
            self._transport.abort()
