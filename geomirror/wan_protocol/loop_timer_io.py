"""The one timer of a core, on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from geomirror.environment import Clock


class LoopTimer:
    """Calls `due` once, at the time that it was armed for last."""

    def __init__(self, clock: Clock, due: Callable[[], None]) -> None:
        self._clock = clock
        self._due = due
        self._handle: asyncio.TimerHandle | None = None
        self._at_ns = -1

    def arm(self, at_ns: int | None) -> None:
        """Call at this monotonic time, at once if it is past; `None`: not at all."""
        if self._handle is not None:
            if at_ns == self._at_ns:
                return
            self._handle.cancel()
            self._handle = None
        if at_ns is not None:
            self._at_ns = at_ns
            delay_s = max(0, at_ns - self._clock.now_ns()) / 1e9
            self._handle = asyncio.get_running_loop().call_later(delay_s, self._fire)

    def _fire(self) -> None:
        self._handle = None
        self._due()
