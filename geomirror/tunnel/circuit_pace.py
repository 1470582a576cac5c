"""How fast the circuits to one peer may send together, so that replication comes first.

```
 frames wait for the link ──▶ circuits get a quarter of what the link carries, together
 none waited for a second ──▶ no limit
```
Without it the kernel shares a link by connection: replication has four, and ten circuits would take
five sevenths of it from them. Deliberately not here: other peers behind the same uplink, and what
the other side sends, which it paces itself.
"""

from __future__ import annotations

from geomirror.environment import MS, SECOND
from geomirror.limits import KIB

HOLD_NS = 1 * SECOND
"""How long a limit stays after frames last waited: an epoch comes every 250 ms."""
SHARE = 0.25
RATE_MIN = 64 * KIB
"""Bytes per second that circuits have in any case: a shell must stay usable on a slow link."""
SMOOTHING_NS = 500 * MS
FADING = 8
"""The capacity that was seen loses this part a sample while less goes through: links get slower."""


class CircuitPace:
    """Of one peer. Call `sample` a few times a second."""

    def __init__(self, now_ns: int) -> None:
        self._at_ns = now_ns
        self._waited_ns: int | None = None
        self._capacity = 0.0
        """Bytes per second, replication and circuits together."""

    def sample(self, now_ns: int, carried_bytes: int, *, is_waiting: bool) -> int | None:
        """The limit from now on, bytes per second of all circuits together; None: none.

        :param carried_bytes: sent to the peer since the last sample, frames and circuits.
        :param is_waiting: frames wait for the link now.
        """
        elapsed_ns = now_ns - self._at_ns
        if elapsed_ns > 0:
            self._at_ns = now_ns
            rate = carried_bytes * SECOND / elapsed_ns
            weight = min(1.0, elapsed_ns / SMOOTHING_NS)
            fading = (self._capacity - rate) / FADING
            step = (rate - self._capacity) * weight if rate > self._capacity else -fading
            self._capacity += step
        if is_waiting:
            self._waited_ns = now_ns
        if self._waited_ns is None or now_ns - self._waited_ns > HOLD_NS:
            self._waited_ns = None
            return None
        return max(RATE_MIN, int(self._capacity * SHARE))
