"""Attempts of one node to reach its peer: when the next one begins, which one gives way.

```
 begin ──▶ waits for the peer's host ──connected──▶ handshakes ──▶ end: a set exists, or it failed
```
A packet that is lost in an outage is sent again by TCP after 1, 3, 7 s: what the end of an outage
finds is the next attempt, not the last one. So attempts come four times a second, which costs one
small packet each, and slower with time. As soon as the peer's host answers one of them (only its
daemon is slow, or hangs), they come once a second.
Deliberately not here: which path an attempt takes (`path_choice`), and what is done with a
connection that is up (`link`).
"""

from __future__ import annotations

from dataclasses import dataclass

from geomirror.environment import SECOND, Entropy
from geomirror.limits import Limits
from geomirror.wan_protocol.path_choice import PathChoice

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
    rank: int
    started_ns: int
    is_answered: bool = False
    is_data_dialled: bool = False


class Attempts:
    """The attempts under way, oldest first.

    :param choice: says which path each of them takes.
    """

    def __init__(self, limits: Limits, entropy: Entropy, choice: PathChoice, now_ns: int) -> None:
        self._limits = limits
        self._entropy = entropy
        self._choice = choice
        self._attempts: dict[bytes, Attempt] = {}
        self.due_ns = now_ns
        """When the next one may begin."""
        self.failing_since_ns = now_ns

    @property
    def links(self) -> list[bytes]:
        """Their sets."""
        return list(self._attempts)

    def hurry(self, now_ns: int) -> None:
        """There are other paths: do not wait for them."""
        self.due_ns = min(self.due_ns, now_ns)

    def succeeded(self, endpoint: str, now_ns: int) -> None:
        """Begin with this one next time, and not at once if the set dies as soon as it is up."""
        self._choice.answered(endpoint)
        self.due_ns = max(self.due_ns, now_ns + self._jittered(ANSWERED_PAUSE))

    def get(self, link: bytes) -> Attempt | None:
        """The attempt of this set, if it is under way."""
        return self._attempts.get(link)

    def begin(self, now_ns: int) -> Attempt:
        """A new attempt; there must be a path."""
        attempt = self._add(self._choice.choose(now_ns), now_ns)
        self.due_ns = now_ns + self._pause_ns(now_ns)
        self._heed_fallback(now_ns)
        return attempt

    def begin_probe(self, now_ns: int) -> Attempt:
        """A new attempt on a better path than that in use; there must be one."""
        return self._add(self._choice.choose_probe(now_ns), now_ns)

    def _add(self, endpoint: str, now_ns: int) -> Attempt:
        rank = self._choice.rank_of(endpoint)
        attempt = Attempt(self._entropy.token_bytes(16), endpoint, rank, now_ns)
        self._attempts[attempt.link] = attempt
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
        self._heed_fallback(now_ns)
        return attempt

    def end(self, link: bytes, failure: str = "") -> Attempt | None:
        """It is over, well or not.

        :param failure: why its path is of no use now; empty: that is not known.
        """
        attempt = self._attempts.pop(link, None)
        if attempt is not None and failure:
            self._choice.failed(attempt.endpoint, failure)
            self._heed_fallback(attempt.started_ns)
        return attempt

    def deadlines_ns(self) -> list[int]:
        """When each of them is given up."""
        return [attempt.started_ns + OPEN_NS_MAX for attempt in self._attempts.values()]

    def _heed_fallback(self, now_ns: int) -> None:
        """The next attempt is not later than the first one on a worse path may be."""
        fallback_ns = self._choice.fallback_due_ns()
        if fallback_ns is not None:
            self.due_ns = min(self.due_ns, max(fallback_ns, now_ns))

    def _pause_ns(self, now_ns: int) -> int:
        if any(attempt.is_answered for attempt in self._attempts.values()):
            return self._jittered(ANSWERED_PAUSE)
        failing_ns = now_ns - self.failing_since_ns
        for until_ns, intervals in PAUSES:
            if failing_ns < until_ns:
                return self._shared(intervals)
        limits = self._limits
        return self._shared(limits.reconnect_interval_ns_max // limits.reconnect_interval_ns)

    def _shared(self, intervals: int) -> int:
        # Each rank is tried as often as the only one would be, once attempts are rare.
        return self._jittered(max(1, intervals // self._choice.open_ranks))

    def _jittered(self, intervals: int) -> int:
        pause_ns = intervals * self._limits.reconnect_interval_ns
        pause_ns = min(pause_ns, self._limits.reconnect_interval_ns_max)
        return int(pause_ns * self._entropy.uniform(0.8, 1.2))
