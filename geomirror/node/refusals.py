"""How many refused strangers are worth an event.

Whoever reaches a port can cause refusals at will; each costs a log line and a place in the event
ring. So the first ones are told in full, a flood as one in a while, with the number left out.
"""

from __future__ import annotations

from geomirror.environment import SECOND

BURST = 20
"""Refusals told at once after a quiet time."""
INTERVAL_NS = 10 * SECOND
"""In a flood one is told per interval."""


class RefusalAllowance:
    """A token bucket: `BURST` deep, one token an interval."""

    def __init__(self) -> None:
        self._tokens = BURST
        self._at_ns = 0
        self._untold = 0

    def admit(self, now_ns: int) -> int | None:
        """Whether this refusal is told: how many before it were not, or None for not."""
        fresh = (now_ns - self._at_ns) // INTERVAL_NS
        if fresh > 0:
            self._tokens = min(BURST, self._tokens + fresh)
            self._at_ns = now_ns
        if self._tokens == 0:
            self._untold += 1
            return None
        self._tokens -= 1
        untold, self._untold = self._untold, 0
        return untold
