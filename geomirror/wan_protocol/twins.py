"""Notices two daemons that run with one identity: a data directory was copied and started twice.

```
 incarnations heard    A ─ B            a restart
                       A ─ B ─ A ─ B    two of them: each takes the other's place, for ever
```
An incarnation never comes back by itself: it is new at each start. One late hello of a daemon that
is gone may look like it, so the second comeback counts. From then on whoever has the link keeps it,
and the other one is turned away, so that what a copy is sent goes to one disk.
Deliberately not here: connections (`link`), who is right (nobody can know).
"""

from __future__ import annotations

from collections import deque

from geomirror.environment import SECOND

COMEBACKS_MIN = 2
FORGET_NS = 60 * SECOND
"""Comebacks that are older do not count any more."""
KNOWN_MAX = 8


class Twins:
    """What is known of the incarnations of one peer."""

    def __init__(self, peer: str) -> None:
        self.last = b""
        """The one heard last, empty before the first."""
        self._peer = peer
        self._known: deque[bytes] = deque(maxlen=KNOWN_MAX)
        self._comebacks: deque[int] = deque(maxlen=COMEBACKS_MIN)

    def heard(self, incarnation: bytes, in_use: bytes | None, now_ns: int) -> str:
        """A hello of this incarnation. Why its connection has to be refused, "" for not at all.

        :param in_use: incarnation that the link is up with.
        """
        if incarnation != self.last and incarnation in self._known:
            self._comebacks.append(now_ns)
        if incarnation not in self._known:
            self._known.append(incarnation)
        are_two = len(self._comebacks) == COMEBACKS_MIN
        are_two = are_two and now_ns < self._comebacks[0] + FORGET_NS
        if are_two and in_use is not None and in_use != incarnation:
            return (
                f'two daemons run as "{self._peer}": its data directory was copied; stop one of '
                "them, and let it join under a name of its own"
            )
        self.last = incarnation
        return ""
