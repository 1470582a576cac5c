"""When bytes come out of an emulated link. Decides times only; the shell moves the bytes.

    connection --offer(n, t)--> [ rate: one virtual clock per direction ] -> delay, jitter, loss
                                                    |
                                       busy_until: end of the last byte on the wire

Invariants: a connection's bytes leave in order; a direction never passes more than its rate; equal
seeds and equal offers give equal times. A lost packet stalls its own connection for the time TCP
needs to send it again, never another one. While a direction is down, connections that have bytes
under way back off as TCP does (their next try doubles), so that after it is up a *new* connection
passes at once and an old one may wait for seconds. It does not model congestion control: a
connection is as fast as its window, the rate and `loss_cut` allow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from geomirror.environment import MS, SECOND, Entropy
from geomirror.lab.scenario import PACKET_BYTES, LinkSettings
from geomirror.limits import KIB

RETRANSMISSION_NS_MIN = 200 * MS
"""Linux adds at least this to the round trip before it takes an unanswered packet for lost."""
RETRANSMISSION_NS_MAX = 120 * SECOND
"""Longest pause between two tries of an old connection."""
WINDOW_BYTES_MIN = 128 * KIB
"""Smallest window of a connection."""
CONNECT_RETRY_NS = 1 * SECOND
"""First retry of a lost connection request; it doubles."""


@dataclass(slots=True)
class StreamModel:
    """One direction of one connection."""

    not_before_ns: int = 0
    """Nothing is delivered earlier: the handshake, and order behind what was stalled."""
    bytes_in_flight: int = 0
    stalled_since_ns: int | None = None
    """When the oldest byte that a down link swallowed was first sent."""
    cut_until_ns: int = 0
    paced_until_ns: int = 0


def next_try_ns(since_ns: int, now_ns: int, first_ns: int) -> int:
    """First of the doubling retries of something sent at `since_ns` that is not before `now_ns`."""
    try_ns, interval_ns = since_ns, first_ns
    while try_ns < now_ns:
        try_ns += interval_ns
        interval_ns = min(interval_ns * 2, RETRANSMISSION_NS_MAX)
    return try_ns


class DirectionModel:
    """One direction of a link: rate, delay, jitter and loss, from a seed."""

    def __init__(self, settings: LinkSettings, entropy: Entropy) -> None:
        self.settings = settings
        self.rtt_ns = 2 * settings.delay_ns
        self.is_up = True
        self.lost_packets = 0
        self.bytes_offered = 0
        self._entropy = entropy
        self._busy_until_ns = 0
        self._packets_to_loss = self._draw_packets_to_loss()

    def change(self, settings: LinkSettings) -> None:
        """Take new settings from now on; what is under way keeps its times."""
        is_redrawn = settings.loss != self.settings.loss
        self.settings = settings
        if is_redrawn:
            self._packets_to_loss = self._draw_packets_to_loss()

    def offer(self, stream: StreamModel, size: int, now_ns: int) -> int:
        """Put `size` bytes of a connection on the wire; the time at which they arrive.

        Only while up. The caller adds to `bytes_in_flight` what it has not delivered yet.
        """
        assert self.is_up
        settings = self.settings
        sent_ns = now_ns
        if settings.rate_bits_per_second:
            wire_ns = size * 8 * SECOND // settings.rate_bits_per_second
            begin_ns = max(now_ns, self._busy_until_ns)
            if stream.cut_until_ns > now_ns:
                # A cut connection uses only part of its time; the others may have the rest.
                begin_ns = max(begin_ns, stream.paced_until_ns)
                stream.paced_until_ns = begin_ns + int(wire_ns / (1.0 - settings.loss_cut))
            self._busy_until_ns = max(now_ns, self._busy_until_ns) + wire_ns
            sent_ns = begin_ns + wire_ns
        jitter_ns = settings.jitter_ns
        if jitter_ns:
            jitter_ns = int(self._entropy.uniform(-jitter_ns, jitter_ns))
        arrives_ns = sent_ns + max(0, settings.delay_ns + jitter_ns)
        if settings.loss and self._is_packet_lost(size):
            arrives_ns += self._repair_ns(stream, size)
            if settings.loss_cut:
                stream.cut_until_ns = now_ns + 10 * self.rtt_ns
        arrives_ns = max(arrives_ns, stream.not_before_ns)
        stream.not_before_ns = arrives_ns
        self.bytes_offered += size
        return arrives_ns

    def backlog_bytes(self, now_ns: int) -> int:
        """Bytes that still wait for the rate."""
        waiting_ns = max(0, self._busy_until_ns - now_ns)
        return waiting_ns * self.settings.rate_bits_per_second // (8 * SECOND)

    def window_bytes(self) -> int:
        """Bytes that one connection may have under way.

        TCP's window grows with what the path carries: a slow line never has megabytes under way,
        and so a connection that dies there does not take megabytes with it.
        """
        settings = self.settings
        if not settings.rate_bits_per_second:
            return settings.window_bytes
        carried = settings.rate_bits_per_second * self.rtt_ns // (8 * SECOND)
        return min(settings.window_bytes, max(WINDOW_BYTES_MIN, carried + settings.queue_bytes))

    def room_ns(self, now_ns: int) -> int:
        """When the queue will be half empty, for senders that are held back."""
        rate = self.settings.rate_bits_per_second
        if not rate:
            return now_ns
        half_ns = self.settings.queue_bytes * 4 * SECOND // rate
        return max(now_ns, self._busy_until_ns - half_ns)

    def take_down(self) -> None:
        """Swallow everything from now on, also what is under way."""
        self.is_up = False
        self._busy_until_ns = 0

    def bring_up(self) -> None:
        """Pass bytes again."""
        self.is_up = True

    def resume_ns(self, stream: StreamModel, now_ns: int) -> int:
        """When a connection that was stalled sends again, now that the direction is up."""
        if stream.stalled_since_ns is None:
            return now_ns
        return next_try_ns(stream.stalled_since_ns, now_ns, self.rtt_ns + RETRANSMISSION_NS_MIN)

    def _repair_ns(self, stream: StreamModel, size: int) -> int:
        # With later packets under way the receiver reports the gap after one round trip; a lone
        # packet is only missed by the sender's timer.
        is_followed = stream.bytes_in_flight + size > 3 * PACKET_BYTES
        return self.rtt_ns + (0 if is_followed else RETRANSMISSION_NS_MIN)

    def _is_packet_lost(self, size: int) -> bool:
        self._packets_to_loss -= -(-size // PACKET_BYTES)
        if self._packets_to_loss > 0:
            return False
        while self._packets_to_loss <= 0:
            self.lost_packets += 1
            self._packets_to_loss += self._draw_packets_to_loss()
        return True

    def _draw_packets_to_loss(self) -> int:
        # The geometric distribution in one draw instead of one draw per packet.
        loss = self.settings.loss
        if loss <= 0.0:
            return 1
        chance = max(self._entropy.uniform(0.0, 1.0), 1e-12)
        return 1 + int(math.log(chance) / math.log(1.0 - loss))
