"""Attempts of one node to reach its peer: when the next one begins, which one gives way.

```
 begin ──▶ waits for the peer's host ──connected──▶ handshakes ──▶ end: a set exists, or it failed
```
A packet that is lost in an outage is sent again by TCP after 1, 3, 7 s: what the end of an outage
finds is the next attempt, not the last one. So attempts come four times a second, which costs one
small packet each, and slower with time. As soon as the peer's host answers one of them (only its
daemon is slow, or hangs), they come once a second.
Deliberately not here: what is done with a connection that is up (`link`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from geomirror.environment import SECOND, Entropy
from geomirror.limits import Limits

OPEN_NS_MAX = 10 * SECOND
"""An attempt, or a set that never had a data connection, is given up after this time."""
SILENT_MAX = 12
"""Attempts at once that nothing answered: with four a second, a path may take 3 s to answer."""
ANSWERED_MAX = 6
"""Attempts at once that the peer's host answered."""
PAUSES = ((60 * SECOND, 1), (300 * SECOND, 4), (3600 * SECOND, 20))
"""Failing for less than so long: so many reconnect intervals between attempts; then the cap."""
ANSWERED_PAUSE = 4
"""Intervals between attempts while one is answered."""


@dataclass(slots=True)
class Attempt:
    """A control connection being made, and its first data connection beside it."""

    link: bytes
    endpoint: str
    started_ns: int
    is_answered: bool = False
    is_data_dialled: bool = False


class Attempts:
    """The attempts under way, oldest first; the endpoints are tried in turn."""

    def __init__(
        self, limits: Limits, entropy: Entropy, endpoints: Sequence[str], now_ns: int
    ) -> None:
        self._limits = limits
        self._entropy = entropy
        self._endpoints = list(endpoints)
        self._turn = 0
        self._attempts: dict[bytes, Attempt] = {}
        self.due_ns = now_ns
        """When the next one may begin."""
        self.failing_since_ns = now_ns

    @property
    def has_endpoints(self) -> bool:
        """Whether this node can dial at all."""
        return bool(self._endpoints)

    @property
    def links(self) -> list[bytes]:
        """Their sets."""
        return list(self._attempts)

    def set_endpoints(self, endpoints: Sequence[str], now_ns: int) -> bool:
        """Use others from now on; whether they are others."""
        if list(endpoints) == self._endpoints:
            return False
        self._endpoints, self._turn = list(endpoints), 0
        self.due_ns = min(self.due_ns, now_ns)
        return True

    def succeeded(self, endpoint: str, now_ns: int) -> None:
        """Begin with this one next time, and not at once if the set dies as soon as it is up."""
        if endpoint in self._endpoints:
            self._turn = self._endpoints.index(endpoint)
        self.due_ns = max(self.due_ns, now_ns + self._jittered(ANSWERED_PAUSE))

    def get(self, link: bytes) -> Attempt | None:
        """The attempt of this set, if it is under way."""
        return self._attempts.get(link)

    def begin(self, now_ns: int) -> Attempt:
        """A new attempt; there must be an endpoint."""
        endpoint = self._endpoints[self._turn % len(self._endpoints)]
        self._turn += 1
        attempt = Attempt(self._entropy.token_bytes(16), endpoint, now_ns)
        self._attempts[attempt.link] = attempt
        self.due_ns = now_ns + self._pause_ns(now_ns)
        return attempt

    def surplus(self) -> Attempt | None:
        """The one that gives way to the next, if there are too many."""
        for is_answered, most in ((False, SILENT_MAX), (True, ANSWERED_MAX)):
            some = [item for item in self._attempts.values() if item.is_answered == is_answered]
            if len(some) >= most:
                return some[0]
        return None

    def expired(self, now_ns: int) -> list[Attempt]:
        """Those that took too long."""
        return [a for a in self._attempts.values() if now_ns >= a.started_ns + OPEN_NS_MAX]

    def answered(self, link: bytes, now_ns: int) -> Attempt | None:
        """The peer's host answers; the attempt, if that is news."""
        attempt = self._attempts.get(link)
        if attempt is None or attempt.is_answered:
            return None
        attempt.is_answered = True
        self.due_ns = max(self.due_ns, now_ns + self._jittered(ANSWERED_PAUSE))
        return attempt

    def end(self, link: bytes) -> Attempt | None:
        """It is over, well or not."""
        return self._attempts.pop(link, None)

    def deadlines_ns(self) -> list[int]:
        """When each of them is given up."""
        return [attempt.started_ns + OPEN_NS_MAX for attempt in self._attempts.values()]

    def _pause_ns(self, now_ns: int) -> int:
        if any(attempt.is_answered for attempt in self._attempts.values()):
            return self._jittered(ANSWERED_PAUSE)
        failing_ns = now_ns - self.failing_since_ns
        for until_ns, intervals in PAUSES:
            if failing_ns < until_ns:
                return self._jittered(intervals)
        limits = self._limits
        return self._jittered(limits.reconnect_interval_ns_max // limits.reconnect_interval_ns)

    def _jittered(self, intervals: int) -> int:
        pause_ns = intervals * self._limits.reconnect_interval_ns
        pause_ns = min(pause_ns, self._limits.reconnect_interval_ns_max)
        return int(pause_ns * self._entropy.uniform(0.8, 1.2))
