"""Simulated time: an event heap. Ties are broken by order of scheduling, so a seed repeats exactly."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

MS = 1_000_000
SECOND = 1_000_000_000


class World:
    """Clock, events and chance of one simulation."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now_ns = SECOND
        self.wall_offset_ns = 1_700_000_000 * SECOND
        self.trace: list[str] = []
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
        heap = self._heap
        while heap and heap[0][0] <= end_ns:
            when_ns, _, action = heapq.heappop(heap)
            self.now_ns = when_ns
            action()
        self.now_ns = end_ns

    def between(self, low_ns: int, high_ns: int) -> int:
        """A time span by chance, small ones as likely as large ones in ratio."""
        return int(low_ns * (high_ns / low_ns) ** self.random.random())

    def note(self, text: str) -> None:
        """One line of the story; the last ones are printed with a failure."""
        self.trace.append(f"{self.now_ns / SECOND:10.4f} {text}")
        if len(self.trace) > 4000:
            del self.trace[:2000]
