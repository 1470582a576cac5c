"""One set of connections of a node pair: a control connection and the data connections beside it.

```
 OPENING ──control + a data connection──▶ ESTABLISHED ──all data lost──▶ OPENING
                                            │   ▲
                                    silence ▼   │ anything heard
                                          SILENT           RETIRED: lost the choice, closed soon
```
Holds what is measured on it (round trip, last sign of life) and decides which of several sets a
node pair uses. Both sides choose by the same rule, so that they choose alike without asking.
Deliberately not here: when to dial and what to close (`link`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from geomirror.environment import SECOND
from geomirror.limits import Limits

YOUNG_NS = 5 * SECOND
"""Two sets up within this time come from both sides dialling at once, not from a replacement."""
ECHO_FIRST_NS = 10 * SECOND
"""Patience for the first answer to a ping, while nothing is known about the round trip."""


@dataclass
class RoundTrip:
    """Smoothed round trip and its variation, as RFC 6298 section 2 computes them."""

    smoothed_ns: int = 0
    """0 while unknown."""
    variation_ns: int = 0

    def add(self, sample_ns: int) -> None:
        """Take one measurement into account."""
        sample_ns = max(1, sample_ns)
        if self.smoothed_ns == 0:
            self.smoothed_ns, self.variation_ns = sample_ns, sample_ns // 2
            return
        difference = abs(self.smoothed_ns - sample_ns)
        self.variation_ns += (difference - self.variation_ns) // 4
        self.smoothed_ns += (sample_ns - self.smoothed_ns) // 8

    def interval_ns(self, limits: Limits) -> int:
        """Time between heartbeats: not more than two per round trip."""
        return max(limits.hello_interval_ns, self.smoothed_ns // 2)

    def patience_ns(self, limits: Limits) -> int:
        """Silence after which the other side counts as gone; 750 ms on short paths."""
        measured_ns = 3 * self.smoothed_ns + 4 * self.variation_ns
        return max(limits.hello_misses_max * self.interval_ns(limits), measured_ns)


@dataclass(eq=False)
class ConnectionSet:
    """State of one set; times are monotonic ns."""

    link: bytes
    """16 bytes that name it on both sides."""
    is_dialled: bool
    """By this node; otherwise accepted."""
    endpoint: str
    opened_ns: int
    """When the control connection came up, or the last data connection was lost."""
    heard_ns: int
    echo_ns: int
    """When a ping was last answered."""
    round_trip: RoundTrip
    ping_ns: int = 0
    """When the next ping is due."""
    data: dict[int, int] = field(default_factory=dict)
    """Data connections that are up, and since when."""
    data_due_ns: dict[int, int] = field(default_factory=dict)
    """Data connections to be dialled, and when."""
    established_ns: int | None = None
    is_silent: bool = False
    retire_ns: int | None = None
    """When a set that lost the choice is to be closed."""
    has_echo: bool = False

    @property
    def is_healthy(self) -> bool:
        """Up and heard of."""
        return self.established_ns is not None and not self.is_silent

    def silence_deadline_ns(self, limits: Limits) -> int:
        """When it has to count as silent, unless something arrives before.

        Twice the patience without an echo means silence too: the other direction is dead.
        """
        patience_ns = self.round_trip.patience_ns(limits)
        echo_ns = 2 * patience_ns if self.has_echo else max(2 * patience_ns, ECHO_FIRST_NS)
        return min(self.heard_ns + patience_ns, self.echo_ns + echo_ns)


def choose(sets: Iterable[ConnectionSet], *, node: str, peer: str) -> ConnectionSet | None:
    """The set to use: the newest; of two young ones from both sides the smaller name's."""
    healthy = [item for item in sets if item.is_healthy]
    candidates = [item for item in healthy if item.retire_ns is None] or healthy
    best: ConnectionSet | None = None
    for item in sorted(candidates, key=lambda item: (item.established_ns or 0, item.link)):
        if best is None:
            best = item
            continue
        assert best.established_ns is not None
        assert item.established_ns is not None
        is_young = item.established_ns - best.established_ns < YOUNG_NS
        if best.is_dialled != item.is_dialled and is_young:
            best = item if item.is_dialled == (node < peer) else best
        else:
            best = item
    return best
