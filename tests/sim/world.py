"""Simulated time: an event heap. Ties go by order of scheduling, so a seed repeats exactly."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

from xxhash import xxh3_64

MS = 1_000_000
SECOND = 1_000_000_000
WALL_OFFSET_NS = 1_700_000_000 * SECOND
TRACE_LINES_MAX = 4000


class World:
    """Clock, events and chance of one simulation."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now_ns = SECOND
        self.trace: list[str] = []
        self.events = 0
        self._digest = xxh3_64()
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0

    def at(self, when_ns: int, action: Callable[[], None]) -> None:
        """Run `action` at a time, not before now."""
        self._order += 1
        heapq.heappush(self._heap, (max(when_ns, self.now_ns), self._order, action))

    def after(self, delay_ns: int, action: Callable[[], None]) -> None:
        """Run `action` after a delay."""
        self.at(self.now_ns + delay_ns, action)

    def run_until(self, end_ns: int) -> None:
        """Run all events up to a time."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= end_ns:
            self.now_ns, _, action = pop(heap)
            self.events += 1
            action()
        self.now_ns = end_ns

    def between(self, low_ns: int, high_ns: int) -> int:
        """A time span by chance, small ones as likely as large ones in ratio."""
        return int(low_ns * (high_ns / low_ns) ** self.random.random())

    def note(self, text: str) -> None:
        """One line of the story; the last ones are printed with a failure."""
        line = f"{self.now_ns / SECOND:10.4f} {text}"
        self._digest.update(line.encode())
        self.trace.append(line)
        if len(self.trace) > TRACE_LINES_MAX:
            del self.trace[: TRACE_LINES_MAX // 2]

    def mix(self, data: bytes) -> None:
        """Make something that happened part of the fingerprint, without a line for it."""
        self._digest.update(b"%d %d" % (self.now_ns, len(data)))
        self._digest.update(data)

    def fingerprint(self) -> str:
        """Two runs with equal ones did the same things at the same times."""
        return self._digest.hexdigest()
