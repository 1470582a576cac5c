"""Executes the decisions of one peer's `LinkCore` and carries its messages and frames.

Every callback is a direct call: no queue and no task per message or frame.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from functools import partial
from typing import Any

import structlog

from geomirror.environment import SECOND
from geomirror.errors import GeomirrorError, RemoteProtocolError
from geomirror.wan_protocol.data_progress import StallRecord
from geomirror.wan_protocol.frame import KIND_MESSAGE, KIND_PADDING, KIND_RESYNC_FRAME, Packet
from geomirror.wan_protocol.frame_sender_io import FrameSender
from geomirror.wan_protocol.link import LinkCore
from geomirror.wan_protocol.link_decisions import (
    Close,
    CloseData,
    Decision,
    Dial,
    Down,
    SendPing,
    SendUse,
    Up,
)
from geomirror.wan_protocol.link_events import LinkContext, LinkStatus
from geomirror.wan_protocol.link_set_io import LinkSet, OpenConnections, check_place, shown
from geomirror.wan_protocol.loop_timer_io import LoopTimer
from geomirror.wan_protocol.messages import (
    Call,
    Goodbye,
    Hello,
    Message,
    Ping,
    Pong,
    Reply,
    Use,
    decode_message,
)
from geomirror.wan_protocol.negotiation import CONTROL_INDEX, make_hello, read_hello
from geomirror.wan_protocol.pacing import data_connections
from geomirror.wan_protocol.peer_calls_io import PeerCalls
from geomirror.wan_protocol.stream_connection_io import LinkConnection
from geomirror.wan_protocol.twins import Twins

UNGREETED_MAX = 32
"""Accepted connections of one peer that have not said hello yet."""
GOODBYE_SECONDS_MAX = 1.0

_log = structlog.get_logger(component="links")


class PeerLink:
    """The connections to one peer."""

    def __init__(self, context: LinkContext, peer: str) -> None:
        self.peer = peer
        self._context = context
        self._clock = context.clock
        self._events = context.events
        now_ns = context.clock.now_ns()
        self.core = LinkCore(
            node=context.node,
            peer=peer,
            limits=context.limits,
            entropy=context.entropy,
            endpoints=[],
            now_ns=now_ns,
        )
        self.calls = PeerCalls(peer, context.limits, partial(self.send_message, 0), self._serve)
        self.frames = FrameSender(context.limits, self._writable)
        self._sets: dict[bytes, LinkSet] = {}
        self._current: LinkSet | None = None
        self._since_ns = now_ns
        self._bytes_received = 0
        self._twins = Twins(peer)
        self._rate_bytes_per_second: int | None = None
        self._open = OpenConnections()
        self._stall = StallRecord()
        self._timer = LoopTimer(context.clock, self._timer_due)
        self._is_executing = False
        self._is_stopped = False

    # For PeerLinks.

    @property
    def is_up(self) -> bool:
        """Whether messages and frames can be sent."""
        return self._current is not None

    def status(self) -> LinkStatus:
        """How the link is now."""
        return LinkStatus(
            since_ns=self._since_ns,
            bytes_sent=self._open.bytes_sent,
            bytes_received=self._bytes_received,
            queued_bytes=self.frames.queued_bytes,
            incarnation=self._twins.last,
            **shown(self.core, self._current, self._stall.shown(self._clock.now_ns())),
        )

    def set_rate(self, bytes_per_second: int | None) -> None:
        """Pace the data connections for a link of this rate; `None`: unpaced."""
        _log.debug("link_paced", peer=self.peer, bytes_per_second=bytes_per_second)
        self._rate_bytes_per_second = bytes_per_second
        self.core.data_connections = data_connections(
            self._context.limits, bytes_per_second, self.core.round_trip.smoothed_ns
        )
        for item in self._sets.values():
            item.pace(self._rate_bytes_per_second)

    def set_endpoints(self, endpoints: list[str]) -> None:
        """Dial these from now on."""
        self.core.set_endpoints(endpoints, self._clock.now_ns())
        self._execute()

    def accept(self) -> LinkConnection:
        """A connection of this peer has been authenticated."""
        connection = LinkConnection(self, self._context.limits)
        if self._is_stopped or self._open.ungreeted >= UNGREETED_MAX:
            connection.drop()
        return connection

    def send_message(self, session: int, message: Message) -> None:
        """Send on the control connection; dropped when the link is down."""
        if self._current is not None and self._current.control is not None:
            self._current.control.send(session, message)

    async def stop(self, reason: str) -> None:
        """Say goodbye and close everything."""
        self._is_stopped = True
        await self.calls.stop()
        for item in self._sets.values():
            if item.control is not None and not item.control.is_closed:
                item.control.send(0, Goodbye(reason))
                item.control.drop(is_graceful=True)
        tasks = [task for item in self._sets.values() for task in item.dialling]
        self.core.close(reason, self._clock.now_ns())
        self._execute()
        self._open.drop()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._open.gone(GOODBYE_SECONDS_MAX)
        await asyncio.sleep(0)

    # ConnectionOwner.

    def connection_open(self, connection: LinkConnection) -> None:
        """Remember it until its transport is gone."""
        self._open.add(connection)
        if self._is_stopped or (connection.is_dialled and connection.link not in self._sets):
            connection.drop()

    def connection_ready(self, connection: LinkConnection) -> None:
        """A dialled connection says hello first; a data connection when its set exists."""
        if connection.is_dialled:
            connection.tune()
            item = self._sets.get(connection.link)
            if item is None or connection.index == CONTROL_INDEX or item.control is not None:
                self._send_hello(connection)
            else:
                item.waiting.append(connection)

    def connection_gone(self, connection: LinkConnection) -> None:
        """Forget it."""
        self._open.forget(connection)

    def connection_closed(self, connection: LinkConnection, reason: str) -> None:
        """Tell the core what is lost with it."""
        now_ns = self._clock.now_ns()
        item = self._sets.get(connection.link)
        is_stranger = not connection.is_greeted and not connection.is_dialled
        if connection.is_refused:
            _log.warning("link_connection_refused", peer=self.peer, reason=reason)
        if item is None or is_stranger:
            return
        if item.control is connection:
            self.core.set_lost(connection.link, reason, now_ns)
            self._drop_set(connection.link)
        elif item.data.get(connection.index) is connection:
            del item.data[connection.index]
            self.core.data_lost(connection.link, connection.index, reason, now_ns)
            item.pace(self._rate_bytes_per_second)
        elif not connection.is_greeted:
            self.core.dial_failed(connection.link, connection.index, reason, now_ns)
            if connection.index < 0:
                self._drop_set(connection.link)
        self._execute()

    def connection_writable(self, connection: LinkConnection) -> None:
        """A data connection takes more frames: the other side took some."""
        if connection.index >= 0:
            self.core.moved(connection.link, self._clock.now_ns())
            self.frames.pump()

    def packets(self, connection: LinkConnection, packets: list[Packet], count: int) -> None:
        """Dispatch what arrived. Raises `ProtocolError`."""
        if self._is_stopped:
            return
        self._bytes_received += count
        if connection.is_greeted:
            is_bulk = connection.index >= 0
            self.core.heard(connection.link, self._clock.now_ns(), is_bulk=is_bulk)
        for packet in packets:
            if connection.is_closed:
                return
            if packet.kind == KIND_PADDING:
                continue
            if not connection.is_greeted:
                self._greet(connection, packet)
            elif packet.kind == KIND_MESSAGE:
                self._message(connection, packet)
            else:
                self._frame(connection, packet)

    # Hello.

    def _send_hello(self, connection: LinkConnection) -> None:
        node, incarnation = self._context.node, self._context.incarnation
        wall_ns, link = self._clock.wall_ns(), connection.link
        after, rank = self.core.given_up, self.core.rank(link)
        hello = make_hello(node, incarnation, link, connection.index, wall_ns, after, rank)
        connection.send(0, hello)

    def _greet(self, connection: LinkConnection, packet: Packet) -> None:
        hello = read_hello(packet, self.peer, self._context.limits)
        now_ns = self._clock.now_ns()
        in_use = self.core.current.incarnation if self.core.current is not None else None
        if twins := self._twins.heard(hello.incarnation, in_use, now_ns):
            self._stalled(twins)
            raise RemoteProtocolError(twins)
        if connection.is_dialled:
            if (hello.link, hello.index) != (connection.link, connection.index):
                raise RemoteProtocolError("hello answers another connection")
        else:
            item = self._sets.get(hello.link)
            check_place(item, hello)
            if item is not None and hello.index in item.data:
                item.data[hello.index].close("replaced by a new connection of the same number")
            connection.link, connection.index = hello.link, hello.index
            connection.tune()
            self._send_hello(connection)
        connection.greeted()
        item = self._sets.setdefault(connection.link, LinkSet())
        if connection.index == CONTROL_INDEX:
            item.control = connection
            for waiting in item.waiting:
                self._send_hello(waiting)
            item.waiting.clear()
            self.core.control_up(
                connection.link,
                now_ns,
                is_dialled=connection.is_dialled,
                incarnation=hello.incarnation,
                after=hello.after,
                rank=hello.rank,
            )
        else:
            item.data[connection.index] = connection
            self.core.data_up(connection.link, connection.index, now_ns)
            item.pace(self._rate_bytes_per_second)
            self.frames.pump()
        self._execute()

    # Packets.

    def _message(self, connection: LinkConnection, packet: Packet) -> None:
        if connection.index >= 0:
            raise RemoteProtocolError("control message on a data connection")
        message = decode_message(packet.body)
        if isinstance(message, Ping):
            connection.send(0, Pong(message.now_ns), is_followed=False)
        elif isinstance(message, Pong):
            self.core.pong(connection.link, message.now_ns, self._clock.now_ns())
            self._execute()
        elif isinstance(message, Goodbye):
            connection.close(f"the peer says goodbye: {message.reason[:200]}")
        elif isinstance(message, Hello):
            raise RemoteProtocolError("a second hello")
        elif isinstance(message, Use):
            self.core.use_received(connection.link, message.number, self._clock.now_ns())
            self._execute()
        elif self._sets[connection.link] is not self._current:
            raise RemoteProtocolError("a message on connections that are not in use")
        elif isinstance(message, Call | Reply):
            self.calls.received(message)
        else:
            self._events.message(self.peer, packet.session, message)

    def _frame(self, connection: LinkConnection, packet: Packet) -> None:
        if connection.index < 0:
            raise RemoteProtocolError("data frame on a control connection")
        if self._sets[connection.link] is self._current:
            is_resync = packet.kind == KIND_RESYNC_FRAME
            self._events.frame(
                self.peer, packet.session, packet.epoch, packet.sequence, is_resync, packet.body
            )

    def _serve(self, method: str, parameters: dict[str, Any]) -> Awaitable[dict[str, Any]]:
        return self._events.call(self.peer, method, parameters)

    def _writable(self) -> None:
        self._events.writable(self.peer)

    # Decisions.

    def _execute(self) -> None:
        """Run what the core decided, then wait for its timer. Not re-entered by callbacks."""
        if self._is_executing:
            return
        self._is_executing = True
        try:
            while (decision := self.core.next_decision()) is not None:
                self._run(decision)
        finally:
            self._is_executing = False
        self._timer.arm(None if self._is_stopped else self.core.get_timer())

    def _run(self, decision: Decision) -> None:
        match decision:
            case Dial(link, _, index):
                if index == CONTROL_INDEX:
                    self._sets[link] = LinkSet()
                elif link not in self._sets:
                    return  # lost while the decision waited; the core knows
                item = self._sets[link]
                item.begin(self._dial(decision, item))
            case Close(link, _):
                self._drop_set(link)
            case CloseData(link, index, reason) if link in self._sets:
                self._sets[link].give_up(index, self._rate_bytes_per_second)
                self._stalled(reason)
            case SendPing(link, now_ns) if link in self._sets:
                self._ping(self._sets[link], link, now_ns)
            case SendUse(link, number) if link in self._sets:
                if (control := self._sets[link].control) is not None:
                    control.send(0, Use(number))
            case Up(link) if link in self._sets:
                self._current = self._sets[link]
                self.frames.use(self._current.data)
                self._since_ns = self._clock.now_ns()
                self._events.link_up(self.peer, self._since_ns)
            case Down(reason) if self._current is not None:
                self._current = None
                self.frames.use(None)
                self._since_ns = self._clock.now_ns()
                self.calls.link_lost(reason)
                self._events.link_down(self.peer, reason, self._since_ns)

    def _ping(self, item: LinkSet, link: bytes, now_ns: int) -> None:
        if item.control is not None:
            item.control.send(0, Ping(now_ns), is_followed=False)
        for index, reading in item.progress():
            self.core.data_sampled(link, index, reading, now_ns)

    def _stalled(self, reason: str) -> None:
        now_ns = self._clock.now_ns()
        if self._stall.note(reason, now_ns):
            self._events.link_stalled(self.peer, reason, now_ns)

    async def _dial(self, decision: Dial, item: LinkSet) -> None:
        def factory() -> LinkConnection:
            return LinkConnection(
                self, self._context.limits, link=decision.link, index=decision.index
            )

        def answered() -> None:
            if decision.index == CONTROL_INDEX:
                self.core.dial_answered(decision.link, self._clock.now_ns())
                self._execute()

        endpoint, index = decision.endpoint, decision.index
        _log.debug("link_dialled", peer=self.peer, endpoint=endpoint, index=index)
        try:
            await self._context.driver.dial(self.peer, decision.endpoint, factory, answered)
        except (GeomirrorError, OSError) as error:
            if self._sets.get(decision.link) is item:
                reason = f"{decision.endpoint}: {error}"
                now_ns = self._clock.now_ns()
                self.core.dial_failed(decision.link, decision.index, reason, now_ns)
                next_s = ((self.core.get_timer() or now_ns) - now_ns) / SECOND
                _log.debug("link_not_made", peer=self.peer, reason=reason, next_s=round(next_s, 1))
                if decision.index == CONTROL_INDEX:
                    del self._sets[decision.link]
                self._execute()

    def _drop_set(self, link: bytes) -> None:
        item = self._sets.pop(link, None)
        if item is not None:
            item.cancel_dialling()
        self._open.discard(link)

    def _timer_due(self) -> None:
        self.core.handle_timer(self._clock.now_ns())
        self._execute()
