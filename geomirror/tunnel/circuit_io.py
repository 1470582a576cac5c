"""Runs a `Circuit` over two connections: the application's and the peer's.

Backpressure is TCP's own: a side that takes nothing fills its socket, then our buffer of
`circuit_buffer_bytes`, and then the other side is not read any more, of this circuit alone.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, cast

from geomirror.environment import SECOND
from geomirror.limits import Limits
from geomirror.tunnel.circuit import (
    Circuit,
    Decision,
    EndApplication,
    Finish,
    Reset,
    ToApplication,
    ToPeer,
)
from geomirror.tunnel.circuit_pieces import NUMBER_BYTES, PIECE_BYTES_MAX
from geomirror.tunnel.circuit_socket_io import (
    arm_reset,
    disarm_reset,
    failure_of,
    hold_reading,
    tune_application,
    tune_peer,
)

_SCRATCH = memoryview(bytearray(PIECE_BYTES_MAX))
"""All circuits read into it: what was read is passed on, or copied, before the next read."""


class PeerSide(asyncio.BufferedProtocol):
    """The connection to the peer.

    :param greeted: of an accepted one: called with the number that it begins with; None: dialled.
    :param gone: called when the transport is gone, once.
    """

    def __init__(
        self,
        limits: Limits,
        greeted: Callable[[PeerSide, bytes], None] | None = None,
        gone: Callable[[PeerSide], None] = lambda side: None,
    ) -> None:
        self._limits = limits
        self._greeted = greeted
        self._gone = gone
        self._early = b""
        """Bytes that came before the circuit was there: of the number, or after it."""
        self._timer: asyncio.TimerHandle | None = None
        self._splice: Splice | None = None
        self._transport: asyncio.Transport | None = None
        self._lost: str | None = None

    @property
    def is_greeted(self) -> bool:
        """Whether it is known which circuit it is for."""
        return self._greeted is None

    @property
    def socket(self) -> Any:
        """For its options, or None."""
        return self._transport.get_extra_info("socket") if self._transport else None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Authenticated, and accepted by both sides."""
        self._transport = cast(asyncio.Transport, transport)
        tune_peer(self.socket)
        self._transport.set_write_buffer_limits(high=self._limits.circuit_buffer_bytes)
        if self._greeted is None:
            self._transport.pause_reading()
        else:
            seconds = self._limits.circuit_open_ns_max / SECOND
            self._timer = asyncio.get_running_loop().call_later(seconds, self.reset)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Room for the next read."""
        return _SCRATCH

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes of the peer."""
        if self._splice is not None:
            self._splice.peer_sent(_SCRATCH[:nbytes])
            return
        self._early += bytes(_SCRATCH[:nbytes])
        if self._greeted is None or len(self._early) < NUMBER_BYTES or self._transport is None:
            return
        self._transport.pause_reading()
        if self._timer is not None:
            self._timer.cancel()
        number, self._early = self._early[:NUMBER_BYTES], self._early[NUMBER_BYTES:]
        greeted, self._greeted = self._greeted, None
        greeted(self, number)

    def attach(self, splice: Splice) -> None:
        """The circuit is there: read on."""
        if self._lost is not None or self._transport is None:
            splice.peer_lost(self._lost or "closed")
            return
        self._splice = splice
        # Before the early bytes are handed over: the application may not take them, and then
        # nothing must be read.
        self._transport.resume_reading()
        early, self._early = self._early, b""
        if early:
            splice.peer_sent(memoryview(early))

    def hold(self, is_held: bool) -> None:
        """Do not read for now, or read on."""
        hold_reading(self._transport, is_held)

    def write(self, data: bytes) -> None:
        """Send."""
        if self._transport is not None:
            self._transport.write(data)

    def close(self) -> None:
        """Close in good order; nothing is under way any more."""
        self._splice = None
        if self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        """Reset the connection: the peer sees it at once, nothing more is sent."""
        self._splice = None
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            arm_reset(self.socket)
            self._transport.abort()

    def pause_writing(self) -> None:
        """The transport has enough."""
        if self._splice is not None:
            self._splice.application.hold(is_held=True)

    def resume_writing(self) -> None:
        """The transport takes more."""
        if self._splice is not None:
            self._splice.application.hold(is_held=False)

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is gone."""
        self._lost = str(exc or "closed by the peer")
        if self._timer is not None:
            self._timer.cancel()
        splice, self._splice = self._splice, None
        if splice is not None:
            splice.peer_lost(self._lost)
        self._gone(self)


class ApplicationSide(asyncio.BufferedProtocol):
    """The application's connection. Until it has ended well, closing it resets it."""

    def __init__(self, splice: Splice, limits: Limits) -> None:
        self._splice = splice
        self._limits = limits
        self._transport: asyncio.Transport | None = None
        self._is_ended = False
        """It has closed its sending side: there is nothing to read."""
        self._is_flushing = False

    @property
    def socket(self) -> Any:
        """For its options, or None."""
        return self._transport.get_extra_info("socket") if self._transport else None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=self._limits.circuit_buffer_bytes)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Room for the next read."""
        return _SCRATCH

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes of the application."""
        self._splice.application_sent(_SCRATCH[:nbytes])

    def eof_received(self) -> bool:
        """The application has closed its sending side; the other one stays open."""
        self._is_ended = True
        self._splice.application_ended()
        return True

    def hold(self, is_held: bool) -> None:
        """Do not read for now, or read on."""
        if not self._is_ended:
            hold_reading(self._transport, is_held)

    def write(self, data: bytes) -> None:
        """Hand over."""
        if self._transport is not None:
            self._transport.write(data)

    def end(self) -> None:
        """Close our sending side after what was written, and say when all of it is out."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self._is_flushing = True
        try:
            transport.write_eof()
        except OSError as error:  # reset a moment ago: the loop has not looked yet
            self._splice.application_lost(f"the application: {error.strerror or error}")
            return
        # So that `resume_writing` is called when nothing is left.
        transport.set_write_buffer_limits(high=0)
        if transport.get_write_buffer_size() == 0:
            self._splice.application_flushed()

    def pause_writing(self) -> None:
        """The application does not take what it gets."""
        self._splice.peer.hold(is_held=True)

    def resume_writing(self) -> None:
        """It takes more."""
        self._splice.peer.hold(is_held=False)
        if self._is_flushing:
            self._splice.application_flushed()

    def close(self) -> None:
        """Close in good order; all was handed over."""
        if self._transport is not None:
            disarm_reset(self.socket)
            self._transport.close()

    def reset(self) -> None:
        """The application sees a reset, not an end."""
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is gone."""
        self._splice.application_lost(f"the application: {exc or 'closed'}")


class Splice:
    """The two connections of one circuit.

    :param ended: called once, with why it was reset, or "".
    """

    def __init__(self, limits: Limits, peer: PeerSide, ended: Callable[[str], None]) -> None:
        self.circuit = Circuit()
        self.peer = peer
        self.application = ApplicationSide(self, limits)
        self._ended = ended
        self._is_executing = False

    async def start(self, sock: socket.socket) -> None:
        """Carry bytes from now on; `sock` is the application's connection, and is taken over."""
        sock.setblocking(False)
        tune_application(sock)
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: self.application, sock)
        if self.circuit.is_over:
            self.application.reset()
        else:
            self.peer.attach(self)

    def reset(self, reason: str) -> None:
        """Reset both connections, unless it is over."""
        self.circuit.abort(reason)
        self._execute()

    def look(self) -> None:
        """Reset it if one of its connections was lost while it was not read."""
        failure = failure_of(self.application.socket)
        reason = f"the application: {failure}" if failure else failure_of(self.peer.socket)
        if reason:
            self.reset(reason)

    # What the two sides tell.

    def application_sent(self, data: memoryview) -> None:
        """Bytes of the application."""
        self.circuit.application_sent(data)
        self._execute()

    def application_ended(self) -> None:
        """The application has closed its sending side."""
        self.circuit.application_ended()
        self._execute()

    def application_flushed(self) -> None:
        """The application was handed everything, and the end."""
        self.circuit.application_flushed()
        self._execute()

    def application_lost(self, reason: str) -> None:
        """The application's connection is gone."""
        self.circuit.application_lost(reason)
        self._execute()

    def peer_sent(self, data: memoryview) -> None:
        """Bytes of the peer."""
        self.circuit.peer_sent(data)
        self._execute()

    def peer_lost(self, reason: str) -> None:
        """The connection to the peer is gone."""
        self.circuit.peer_lost(reason)
        self._execute()

    def _execute(self) -> None:
        if self._is_executing:
            return
        self._is_executing = True
        try:
            while (decision := self.circuit.next_decision()) is not None:
                self._run(decision)
        finally:
            self._is_executing = False

    def _run(self, decision: Decision) -> None:
        match decision:
            case ToPeer(data):
                self.peer.write(data)
            case ToApplication(data):
                self.application.write(bytes(data))
            case EndApplication():
                self.application.end()
            case Finish():
                self.application.close()
                self.peer.close()
                self._ended("")
            case Reset(reason):
                self.application.reset()
                self.peer.reset()
                self._ended(reason)
