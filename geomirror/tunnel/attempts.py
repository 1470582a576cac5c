"""Counts refused join attempts per source, so that guessing and hammering end quickly.

Secrets have 256 bits; this bounds noise and work, it is not what keeps a guesser out. Bounded: at
most `SOURCES_MAX` sources are remembered, the one with the oldest last failure is forgotten first.
"""

from __future__ import annotations

from collections import deque

from geomirror.environment import SECOND
from geomirror.errors import RefusedError
from geomirror.limits import Limits

WINDOW_NS = 60 * SECOND
SOURCES_MAX = 1024


class AttemptLimiter:
    """Remembers when which source failed."""

    def __init__(self, limits: Limits) -> None:
        self._failures_max = limits.join_failures_max
        self._failures: dict[str, deque[int]] = {}

    def check(self, source: str, now_ns: int) -> None:
        """:raises RefusedError: the source has used up its failures of the last minute."""
        failures = self._failures.get(source)
        if failures is not None and len(failures) == self._failures_max:
            remaining_ns = failures[0] + WINDOW_NS - now_ns
            if remaining_ns > 0:
                raise RefusedError(
                    "too many failed attempts to join from this address",
                    hint=f"try again in {remaining_ns // SECOND + 1} s",
                )

    def failed(self, source: str, now_ns: int) -> None:
        """Count one failure."""
        failures = self._failures.pop(source, None)
        if failures is None:
            failures = deque(maxlen=self._failures_max)
            if len(self._failures) >= SOURCES_MAX:
                del self._failures[next(iter(self._failures))]
        failures.append(now_ns)
        self._failures[source] = failures
