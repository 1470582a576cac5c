"""One set of connections of a node pair: a control connection and the data connections beside it.

```
 OPENING ──a data connection──▶ READY ──chosen by the leader──▶ IN USE
    └─────────────┴──────── silence, loss, another choice ────────┴──▶ closed, never used again
```
Holds what is measured on it: round trip, signs of life, and from them when it counts as dead.
Deliberately not here: when to dial, which set to use, what to close (`link`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from geomirror.environment import MS, SECOND
from geomirror.limits import Limits
from geomirror.wan_protocol.data_progress import DataProgress, Reading

ECHO_FIRST_NS = 10 * SECOND
"""Patience for the first answer to a ping, while nothing is known about the round trip."""
MOVING_FACTOR = 3
"""A set whose bulk data moves gets up to this many times the patience: the other side takes what we
send, its answers wait behind a lost packet or a busy machine. Bounded, because a proxy on the way
takes bytes for a dead peer too."""
PATIENCE_NS_MAX = 3 * SECOND
"""Unless the round trip itself is so long, no measurement asks for more: patience that grows with
the stalls that it endures would grow without end."""
WORST_DECAY = 128
"""The worst round trip loses this part with each sample: half of it within about 15 s."""


@dataclass
class RoundTrip:
    """Smoothed round trip and its variation, as RFC 6298 section 2 computes them."""

    smoothed_ns: int = 0
    """0 while unknown."""
    variation_ns: int = 0
    last_ns: int = 0
    """The newest measurement."""
    worst_ns: int = 0
    """Slowly decaying maximum: a queue that fills or a machine that stalls does so again, and the
    variation has forgotten it after a second."""

    def add(self, sample_ns: int) -> None:
        """Take one measurement into account."""
        self.last_ns = sample_ns = max(1, sample_ns)
        self.worst_ns = max(sample_ns, self.worst_ns - self.worst_ns // WORST_DECAY)
        if self.smoothed_ns == 0:
            self.smoothed_ns, self.variation_ns = sample_ns, sample_ns // 2
            return
        difference = abs(self.smoothed_ns - sample_ns)
        self.variation_ns += (difference - self.variation_ns) // 4
        self.smoothed_ns += (sample_ns - self.smoothed_ns) // 8

    def interval_ns(self, limits: Limits) -> int:
        """Time between heartbeats: not more than two per round trip."""
        return max(limits.hello_interval_ns, self.smoothed_ns // 2)

    def patience_ns(self, limits: Limits, path_ns: int = 0) -> int:
        """Silence after which the other side counts as gone; 750 ms on short paths.

        :param path_ns: what bulk data needs for a round trip: pings wait in the same queues.
        """
        interval_ns = self.interval_ns(limits)
        varying_ns = 3 * self.smoothed_ns + 4 * self.variation_ns
        measured_ns = max(varying_ns, 2 * self.worst_ns + interval_ns)
        least_ns = max(limits.hello_misses_max * interval_ns, 2 * path_ns + interval_ns)
        return max(least_ns, min(measured_ns, PATIENCE_NS_MAX))


@dataclass(eq=False)
class ConnectionSet:
    """State of one set; times are monotonic ns."""

    link: bytes
    """16 bytes that name it on both sides."""
    is_dialled: bool
    """By this node; otherwise accepted."""
    endpoint: str
    rank: int
    """Of the path that it takes; 0 is the best."""
    incarnation: bytes
    """Of the peer's daemon, as its hello said."""
    opened_ns: int
    """When the control connection came up, or the last data connection was lost."""
    heard_ns: int
    echo_ns: int
    """When a ping was last answered."""
    ping_ns: int
    """When the next ping is due."""
    moved_ns: int
    """When bulk data last got through: the other side acknowledged some, or some arrived, which
    goes on only while our acknowledgements arrive."""
    round_trip: RoundTrip = field(default_factory=RoundTrip)
    has_echo: bool = False
    data: dict[int, int] = field(default_factory=dict)
    """Data connections that are up, and since when."""
    progress: dict[int, DataProgress] = field(default_factory=dict)
    """Of data connections, once there is a reading."""
    path_ns: int = 0
    """What data needed for a round trip lately."""
    data_due_ns: dict[int, int] = field(default_factory=dict)
    """Data connections to be dialled, and when."""

    def forgive(self, late_ns: int, now_ns: int) -> None:
        """This node itself did not run for so long: what arrived meanwhile may be unread."""
        self.heard_ns = min(now_ns, self.heard_ns + late_ns)
        self.echo_ns = min(now_ns, self.echo_ns + late_ns)

    def sampled(self, index: int, reading: Reading, now_ns: int) -> DataProgress:
        """A reading of a connection; −1 is the control connection, whose round trip a node that
        only receives goes by."""
        progress = self.progress.setdefault(index, DataProgress(now_ns))
        if progress.sample(reading, now_ns) and index >= 0:
            # Not of pings: the kernel of a hung daemon takes them for hours.
            self.moved_ns = now_ns
        self.path_ns = max(item.path_ns(now_ns) for item in self.progress.values())
        return progress

    def is_stuck(self, progress: DataProgress, now_ns: int, limits: Limits) -> bool:
        """Whether a data connection gets nothing through a path that is well."""
        is_answering = self.has_echo and now_ns - self.echo_ns <= self.patience_ns(limits)
        return is_answering and progress.is_stuck(self.round_trip.last_ns, now_ns)

    def patience_ns(self, limits: Limits) -> int:
        """Silence after which the other side counts as gone."""
        return self.round_trip.patience_ns(limits, self.path_ns)

    def heard_deadline_ns(self, limits: Limits) -> int:
        """When it counts as dead unless something is heard."""
        return self._deadline_ns(self.heard_ns, self.patience_ns(limits), limits)

    def echo_deadline_ns(self, limits: Limits) -> int:
        """When it counts as dead unless a ping is answered: the way to the peer is dead."""
        patience_ns = 2 * self.patience_ns(limits)
        if not self.has_echo:
            patience_ns = max(patience_ns, ECHO_FIRST_NS)
        return self._deadline_ns(self.echo_ns, patience_ns, limits)

    def silence(self, now_ns: int, limits: Limits) -> str:
        """Why it counts as dead now; empty while it does not."""
        heard_ms, echo_ms = (now_ns - self.heard_ns) // MS, (now_ns - self.echo_ns) // MS
        if now_ns >= self.heard_deadline_ns(limits):
            return f"nothing heard for {heard_ms} ms"
        if now_ns >= self.echo_deadline_ns(limits):
            return f"pings not answered for {echo_ms} ms, peer heard {heard_ms} ms ago"
        return ""

    def _deadline_ns(self, since_ns: int, patience_ns: int, limits: Limits) -> int:
        moving_ns = self.moved_ns + self.patience_ns(limits)
        return max(since_ns + patience_ns, min(moving_ns, since_ns + MOVING_FACTOR * patience_ns))
