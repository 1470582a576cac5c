"""Which requests of a disk's users are unanswered while its server comes and goes.

    add ──> queued ──next_to_send──> sent ──answered──> (forgotten)
              ^ │                     │
              │ └─overlaps─> held     │ disconnected: in the order of arrival
              └───────────────────────┘  and before all that was never sent

What is sent again may have taken effect already, before the server died. That is harmless because
of one rule: *of the changes that are under way no two overlap*; a later one is held until the
earlier one is answered. So a change that is repeated finds what it wrote itself, or what was there
before it, and nothing newer; repeating it in any order makes the same disk. It goes ahead of what
was held, although that may be older: somebody may have read it. FLUSH covers only what was answered
before it came, and answered changes survive the server's crash in its journal, so a repeated FLUSH
promises what the first one did. READs are unanswered, so they may be of any moment up to their
answer.

A server that stays away longer than `timeout_ns` fails what waits and what comes, until it is back.
Not done here: deciding whether the server that came back serves the same disk.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass

from geomirror.nbd.constants import CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES

_CHANGING = frozenset((CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES))


@dataclass(slots=True, eq=False)
class Unanswered:
    """One request and whose it is."""

    number: int
    """Order of arrival."""
    owner: object
    """The shell's; compared by identity only."""
    cookie: int
    command: int
    flags: int
    offset: int
    length: int
    payload: bytes | None
    """Of a WRITE: kept until its answer."""
    has_owner: bool = True
    may_be_in_effect: bool = False
    """It was sent at least once."""


class ReplayQueue:
    """The unanswered requests of one disk. Its server is away until `connected` is called.

    :param timeout_ns: how long an absence may last before requests fail; None: for ever.
    """

    def __init__(self, timeout_ns: int | None, now_ns: int) -> None:
        self._timeout_ns = timeout_ns
        self._away_since_ns: int | None = now_ns
        self._next_number = 0
        self._queued: deque[Unanswered] = deque()
        self._held: list[Unanswered] = []
        self._sent: dict[int, Unanswered] = {}
        # Ranges of sent changes; disjoint, so starts and ends are sorted alike.
        self._starts: list[int] = []
        self._ends: dict[int, int] = {}
        self.payload_bytes = 0
        """Of all unanswered WRITEs: memory."""
        self.replayed = 0
        """Requests that were sent more than once."""

    def __len__(self) -> int:
        return len(self._queued) + len(self._held) + len(self._sent)

    @property
    def is_connected(self) -> bool:
        """A server takes requests."""
        return self._away_since_ns is None

    @property
    def away_since_ns(self) -> int | None:
        """When the server went away; None while it is there."""
        return self._away_since_ns

    def add(
        self,
        owner: object,
        cookie: int,
        command: int,
        flags: int,
        offset: int,
        length: int,
        payload: bytes | None,
    ) -> None:
        """A request has come; `next_to_send` or `take_overdue` gives it back."""
        number, self._next_number = self._next_number, self._next_number + 1
        self._queued.append(
            Unanswered(number, owner, cookie, command, flags, offset, length, payload)
        )
        self.payload_bytes += len(payload) if payload is not None else 0

    def next_to_send(self) -> Unanswered | None:
        """The next request that may go to the server now."""
        while self._queued and self.is_connected:
            request = self._queued.popleft()
            if request.command in _CHANGING:
                if self._overlaps(request.offset, request.offset + request.length):
                    self._held.append(request)
                    continue
                insort(self._starts, request.offset)
                self._ends[request.offset] = request.offset + request.length
            self._sent[request.number] = request
            request.may_be_in_effect = True
            return request
        return None

    def answered(self, request: Unanswered) -> None:
        """The server has answered a sent request, with whatever result."""
        del self._sent[request.number]
        self._forget(request)
        if request.command in _CHANGING:
            self._release(request)
            if self._held:
                self._queued.extendleft(reversed(self._held))
                self._held.clear()

    def connected(self) -> None:
        """A server is there, and serves the same disk."""
        self._away_since_ns = None

    def disconnected(self, now_ns: int) -> None:
        """The server is gone: what it has not answered will be sent to the next one."""
        if self._away_since_ns is None:
            self._away_since_ns = now_ns
        again = [request for request in self._sent.values() if request.has_owner]
        for request in self._sent.values():
            if not request.has_owner:
                self._forget(request)
        self.replayed += len(again)
        waiting = [*again, *self._held, *self._queued]
        waiting.sort(key=lambda found: (not found.may_be_in_effect, found.number))
        self._queued = deque(waiting)
        self._held.clear()
        self._sent.clear()
        self._starts.clear()
        self._ends.clear()

    def disown(self, owner: object) -> None:
        """A user is gone: what was not sent never happens; what was sent is not repeated."""
        for request in self._sent.values():
            if request.owner is owner:
                request.has_owner = False
        for request in (*self._queued, *self._held):
            if request.owner is owner:
                self._forget(request)
        self._queued = deque(found for found in self._queued if found.owner is not owner)
        self._held = [found for found in self._held if found.owner is not owner]

    def get_timer(self) -> int | None:
        """When `take_overdue` has something to give, or None."""
        if self._away_since_ns is None or self._timeout_ns is None or not self._queued:
            return None
        return self._away_since_ns + self._timeout_ns

    def take_overdue(self, now_ns: int) -> list[Unanswered]:
        """What has to fail now because the server is away for too long."""
        timer = self.get_timer()
        return self.take_all() if timer is not None and now_ns >= timer else []

    def take_all(self) -> list[Unanswered]:
        """Give everything back that is not with a server: it has to fail."""
        taken = [*self._held, *self._queued]
        self._held.clear()
        self._queued.clear()
        for request in taken:
            self._forget(request)
        return taken

    def _forget(self, request: Unanswered) -> None:
        self.payload_bytes -= len(request.payload) if request.payload is not None else 0

    def _release(self, request: Unanswered) -> None:
        del self._starts[bisect_left(self._starts, request.offset)]
        del self._ends[request.offset]

    def _overlaps(self, start: int, end: int) -> bool:
        """Whether a sent change touches the range."""
        at = bisect_left(self._starts, end) - 1
        # Of those that begin before `end` the last one ends last: they are disjoint.
        return at >= 0 and self._ends[self._starts[at]] > start
