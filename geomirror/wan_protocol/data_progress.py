"""Whether a data connection gets its bytes through, by what TCP itself says of it.

A peer that answers pings may get no data nevertheless: the path swallows large packets, or one
connection was forgotten by something on the way. The screen would say that all is well. And the
other way round: where pings wait behind seconds of bulk data in a deep queue, acknowledged bytes
are the sign of life. Pure; `stream_socket_io` takes the readings.
"""

from __future__ import annotations

from dataclasses import dataclass

from geomirror.environment import SECOND

STUCK_NS_MIN = 3 * SECOND
"""Nothing acknowledged for so long: four of TCP's own tries on a short path."""
STUCK_PINGS = 4
"""On a long one so many times what a ping takes now."""
STALL_SHOWN_NS, STALL_TOLD_NS = 10 * SECOND, 60 * SECOND
"""A stall is shown for so long, since the next one is noticed sooner; one a minute is an event."""


PATH_NS_MAX = 6 * SECOND
"""Longest round trip of data that asks for patience: a queue of a megabyte at 1 Mbit/s."""
PATH_KNOWN_NS = 5 * SECOND
"""So long after a connection's last acknowledgement its round trip is one of the past."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What TCP says of a connection."""

    acked_bytes: int
    """Acknowledged by the other side's kernel so far."""
    is_waiting: bool
    """More was sent than that."""
    rtt_ns: int
    """Smoothed, between the kernels: a daemon that hangs does not make it longer, a queue does."""


@dataclass(slots=True)
class DataProgress:
    """Of one data connection."""

    since_ns: int
    """Since when what was sent waits for its acknowledgement; moves on while nothing does."""
    acked_bytes: int = 0
    rtt_ns: int = 0
    moved_ns: int = -PATH_KNOWN_NS

    def sample(self, reading: Reading, now_ns: int) -> bool:
        """Take a reading; whether bytes were acknowledged since the last one."""
        has_moved = reading.acked_bytes > self.acked_bytes
        if has_moved or not reading.is_waiting:
            self.since_ns = now_ns
        if has_moved:
            self.moved_ns, self.rtt_ns = now_ns, min(reading.rtt_ns, PATH_NS_MAX)
        self.acked_bytes = reading.acked_bytes
        return has_moved

    def path_ns(self, now_ns: int) -> int:
        """The round trip of data now; 0 if none went lately."""
        return self.rtt_ns if now_ns < self.moved_ns + PATH_KNOWN_NS else 0

    def is_stuck(self, ping_ns: int, now_ns: int) -> bool:
        """Whether it had time enough, on a path on which the last ping took `ping_ns`.

        Not what data took before: after a queue has drained, TCP waits on for its old timer.
        """
        return now_ns - self.since_ns >= max(STUCK_NS_MIN, STUCK_PINGS * ping_ns)


@dataclass(slots=True)
class StallRecord:
    """The last stall of a link, for those who look and those who are told."""

    reason: str = ""
    seen_ns: int = 0
    told_ns: int = -STALL_TOLD_NS

    def note(self, reason: str, now_ns: int) -> bool:
        """There is one; whether it is news."""
        self.reason, self.seen_ns = reason, now_ns
        if now_ns < self.told_ns + STALL_TOLD_NS:
            return False
        self.told_ns = now_ns
        return True

    def shown(self, now_ns: int) -> str:
        """The reason, while it is not old."""
        return self.reason if now_ns < self.seen_ns + STALL_SHOWN_NS else ""
