"""Moves the bytes of one direction of one connection at the times that `link_model` decides.

Backpressure, not drops: a pump stops reading its source when its own window or the direction's
queue is full, so the sender's socket fills as it would on a slow line.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable

from geomirror.environment import MS, SECOND, Clock, Entropy
from geomirror.lab.link_model import DirectionModel, StreamModel
from geomirror.lab.scenario import LinkSettings

SLICE_BYTES = 16 * 1024
"""Bytes that are timed together: 1.3 ms at 100 Mbit/s, and few enough events at 1 Gbit/s."""
EARLY_NS = 300_000
"""Deliver what is due this soon, so that one wake-up serves neighbours (timers tick at 1 ms)."""

END = b"end"
"""Queue item: the source closed its side. Compared by identity, never by content."""
RESET = b"reset"
"""Queue item: the source's connection broke."""


def reset_transport(transport: asyncio.Transport) -> None:
    """Close with a TCP reset instead of an orderly end."""
    connection = transport.get_extra_info("socket")
    if connection is not None and not transport.is_closing():
        linger = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()


class Direction:
    """One direction of a link: its model, its pumps, its counters."""

    def __init__(self, name: str, settings: LinkSettings, clock: Clock, entropy: Entropy) -> None:
        self.name = name
        self.model = DirectionModel(settings, entropy)
        self.clock = clock
        self.pumps: set[Pump] = set()
        self.bytes_delivered = 0
        self._waiting: list[Pump] = []
        self._room_timer: asyncio.TimerHandle | None = None

    def take_down(self) -> None:
        """Swallow everything, also what is under way."""
        if self.model.is_up:
            self.model.take_down()
            for pump in list(self.pumps):
                pump.hold()

    def bring_up(self) -> None:
        """Pass bytes again: connections without bytes under way at once, others when they retry."""
        if not self.model.is_up:
            self.model.bring_up()
            for pump in list(self.pumps):
                pump.retry()

    def wait_for_room(self, pump: Pump) -> None:
        """Let `pump` read again when half of the queue is free."""
        self._waiting.append(pump)
        if self._room_timer is None:
            now_ns = self.clock.now_ns()
            delay_ns = max(MS, self.model.room_ns(now_ns) - now_ns)
            loop = asyncio.get_running_loop()
            self._room_timer = loop.call_later(delay_ns / SECOND, self._give_room)

    def _give_room(self) -> None:
        self._room_timer = None
        waiting, self._waiting = self._waiting, []
        for pump in waiting:
            pump.room_again()

    def close(self) -> None:
        """Cancel the timer; pumps are closed by their connections."""
        if self._room_timer is not None:
            self._room_timer.cancel()

    def to_json(self) -> dict[str, object]:
        """State and counters."""
        return {
            "name": self.name,
            "is_up": self.model.is_up,
            "bytes_offered": self.model.bytes_offered,
            "bytes_delivered": self.bytes_delivered,
            "bytes_under_way": sum(pump.stream.bytes_in_flight for pump in self.pumps),
            "lost_packets": self.model.lost_packets,
            "connections": len(self.pumps),
            "stalled_connections": sum(pump.is_stalled for pump in self.pumps),
            "settings": self.model.settings.to_json(),
        }


class Pump:
    """Bytes of one connection in one direction, from `source` to `sink`."""

    def __init__(self, direction: Direction, on_end: Callable[[bytes], None]) -> None:
        """`on_end(END or RESET)` is called when that item has crossed the link."""
        self.stream = StreamModel()
        self.source: asyncio.Transport | None = None
        self.sink: asyncio.Transport | None = None
        self._direction = direction
        self._on_end = on_end
        self._under_way: deque[tuple[int, bytes]] = deque()
        self._held: deque[bytes] = deque()
        # A pump starts held: the handshake has to cross first.
        self._is_held = True
        self._is_sink_full = False
        self._is_paused = False
        self._is_waiting_for_room = False
        self._is_closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._retry_timer: asyncio.TimerHandle | None = None
        direction.pumps.add(self)

    @property
    def is_stalled(self) -> bool:
        """Whether it backs off because of a time when the link was down."""
        return self.stream.stalled_since_ns is not None

    def receive(self, data: bytes) -> None:
        """Bytes from the source, or one of the two end items."""
        if self._is_closed:
            return
        if data is not END and data is not RESET:
            self.stream.bytes_in_flight += len(data)
        if self._is_held:
            self._held.append(data)
            if not self._direction.model.is_up and self.stream.stalled_since_ns is None:
                self.stream.stalled_since_ns = self._direction.clock.now_ns()
        else:
            self._send(data)
        self._pause_if_full()

    def hold(self) -> None:
        """The direction went down: what is under way is lost and has to be sent again."""
        self._cancel_timers()
        if self.stream.stalled_since_ns is None and (self._under_way or self._held):
            self.stream.stalled_since_ns = self._direction.clock.now_ns()
        self._held.extendleft(data for _, data in reversed(self._under_way))
        self._under_way.clear()
        self._is_held = True

    def retry(self) -> None:
        """The direction is up again: send what is held at the connection's next retry."""
        if self.sink is None or not self._is_held:
            return
        now_ns = self._direction.clock.now_ns()
        wait_ns = self._direction.model.resume_ns(self.stream, now_ns) - now_ns
        if wait_ns <= 0:
            self.release()
        else:
            loop = asyncio.get_running_loop()
            self._retry_timer = loop.call_later(wait_ns / SECOND, self.release)

    def release(self) -> None:
        """Send what is held; nothing happens while the direction is down."""
        if not self._direction.model.is_up or self._is_closed:
            return
        self._is_held = False
        self.stream.stalled_since_ns = None
        held, self._held = self._held, deque()
        for data in held:
            self._send(data)
        self._pause_if_full()

    def sink_full(self, is_full: bool) -> None:
        """The sink's own socket takes no more, or takes bytes again."""
        self._is_sink_full = is_full
        if not is_full:
            self._deliver()

    def room_again(self) -> None:
        """The direction's queue has room."""
        self._is_waiting_for_room = False
        self._read_on()

    def _read_on(self) -> None:
        if self._is_paused and self.source is not None and not self._is_closed:
            self._is_paused = False
            if not self.source.is_closing():
                self.source.resume_reading()
            self._pause_if_full()

    def close(self) -> None:
        """Forget everything under way."""
        self._is_closed = True
        self._cancel_timers()
        self._under_way.clear()
        self._held.clear()
        self._direction.pumps.discard(self)

    def _send(self, data: bytes) -> None:
        clock, model = self._direction.clock, self._direction.model
        now_ns = clock.now_ns()
        if len(data) <= SLICE_BYTES or not model.settings.rate_bits_per_second:
            is_end = data is END or data is RESET
            size = 0 if is_end else len(data)
            self._under_way.append((model.offer(self.stream, size, now_ns), data))
        else:
            for start in range(0, len(data), SLICE_BYTES):
                part = data[start : start + SLICE_BYTES]
                self._under_way.append((model.offer(self.stream, len(part), now_ns), part))
        self._arm()

    def _arm(self) -> None:
        if self._timer is None and self._under_way and not self._is_sink_full:
            wait_ns = self._under_way[0][0] - self._direction.clock.now_ns()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0, wait_ns) / SECOND, self._deliver)

    def _deliver(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due_ns = self._direction.clock.now_ns() + EARLY_NS
        ready: list[bytes] = []
        end: bytes | None = None
        while self._under_way and self._under_way[0][0] <= due_ns and end is None:
            data = self._under_way.popleft()[1]
            if data is END or data is RESET:
                end = data
            else:
                ready.append(data)
        if ready and self.sink is not None:
            block = ready[0] if len(ready) == 1 else b"".join(ready)
            self.stream.bytes_in_flight -= len(block)
            self._direction.bytes_delivered += len(block)
            if not self.sink.is_closing():
                self.sink.write(block)
        if end is not None:
            self._on_end(end)
        self._arm()
        if self._is_paused and not self._is_waiting_for_room and self._has_window():
            self._read_on()

    def _has_window(self) -> bool:
        return self.stream.bytes_in_flight < self._direction.model.window_bytes()

    def _pause_if_full(self) -> None:
        if self._is_paused or self.source is None or self.source.is_closing():
            return
        model = self._direction.model
        has_room = (
            self._is_held
            or model.backlog_bytes(self._direction.clock.now_ns()) < model.settings.queue_bytes
        )
        if has_room and self._has_window():
            return
        self._is_paused = True
        self.source.pause_reading()
        if not has_room:
            self._is_waiting_for_room = True
            self._direction.wait_for_room(self)

    def _cancel_timers(self) -> None:
        for timer in (self._timer, self._retry_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._retry_timer = None
