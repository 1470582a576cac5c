"""The frames of all sessions of a node pair that wait for a data connection.

```
 live:    session 1 [f f f]   session 4 [f]        served first, by turns of 64 KiB
 resync:  session 2 [f f f f f]                    served when no live frame waits
```
Frames wait here and not in the kernel, so that the classes can be told apart until the last moment
and a stalled connection holds up nothing but what it already has.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from geomirror.limits import KIB

TURN_BYTES = 64 * KIB
"""What a session may send before the next one's turn: one full frame."""


class _Class:
    """Sessions of one class, served by turns (deficit round robin)."""

    def __init__(self) -> None:
        self.sessions: OrderedDict[int, deque[tuple[bytes, bytes]]] = OrderedDict()
        self.allowance = 0

    def pop(self) -> tuple[bytes, bytes]:
        """The next frame; there must be one."""
        session, frames = next(iter(self.sessions.items()))
        if self.allowance <= 0:
            self.allowance = TURN_BYTES
        header, body = frames.popleft()
        self.allowance -= len(header) + len(body)
        if not frames:
            del self.sessions[session]
            self.allowance = 0
        elif self.allowance <= 0:
            self.sessions.move_to_end(session)
        return header, body


class FrameQueue:
    """Bounded queue, fair between sessions, live frames before resync frames."""

    def __init__(self) -> None:
        self._live = _Class()
        self._resync = _Class()
        self.queued_bytes = 0

    def push(self, session: int, header: bytes, body: bytes, *, is_resync: bool) -> None:
        """Add a frame behind the others of its session; the caller observes the bound."""
        queue = self._resync if is_resync else self._live
        queue.sessions.setdefault(session, deque()).append((header, body))
        self.queued_bytes += len(header) + len(body)

    def pop(self, bytes_wanted: int) -> list[bytes]:
        """Headers and bodies of the next frames, at least one if any waits, until it is enough."""
        parts: list[bytes] = []
        taken = 0
        while taken < bytes_wanted and self.queued_bytes > 0:
            queue = self._live if self._live.sessions else self._resync
            header, body = queue.pop()
            parts += (header, body)
            taken += len(header) + len(body)
            self.queued_bytes -= len(header) + len(body)
        return parts

    def clear(self) -> None:
        """Drop everything: the link is down, sessions resume later."""
        self._live, self._resync = _Class(), _Class()
        self.queued_bytes = 0
