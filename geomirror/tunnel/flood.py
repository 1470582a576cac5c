"""Which neighbours are to be told when the network's signed records have changed, and when again.

    fingerprint of our records  ≠  the one that a neighbour is known to hold   →   exchange with it

An exchange carries all records both ways, so both hold the union afterwards. Merging gives the same
in any order, so nodes that are connected, however indirectly, end with the same records. It ends
by itself: nobody is asked that is known to hold the same.

Not done here: what records are and which one is newer (`membership`), and the calls.
"""

from __future__ import annotations

from dataclasses import dataclass

from geomirror.environment import SECOND

RETRY_NS_MIN = SECOND
RETRY_NS_MAX = 60 * SECOND
"""A neighbour that refuses records over an established link is asked again, but not often."""


@dataclass
class _Neighbour:
    known: bytes | None = None
    """Fingerprint of what it holds; None: not known."""
    is_busy: bool = False
    retry_ns: int | None = None
    delay_ns: int = RETRY_NS_MIN


class Flood:
    """What the neighbours hold, as far as it is known here."""

    def __init__(self) -> None:
        self._neighbours: dict[str, _Neighbour] = {}

    def link_up(self, peer: str) -> None:
        """A neighbour is reachable again; what it holds by now is not known."""
        self._neighbours[peer] = _Neighbour()

    def link_down(self, peer: str) -> None:
        """It is not; it will be told when it is again."""
        self._neighbours.pop(peer, None)

    def heard(self, peer: str, fingerprint: bytes) -> None:
        """A neighbour holds records of this fingerprint."""
        neighbour = self._neighbours.get(peer)
        if neighbour is not None:
            neighbour.known = fingerprint
            neighbour.retry_ns, neighbour.delay_ns = None, RETRY_NS_MIN

    def failed(self, peer: str, now_ns: int) -> None:
        """An exchange did not come to its end: try again later, less and less often."""
        neighbour = self._neighbours.get(peer)
        if neighbour is not None:
            # If only the answer was lost it counts us as told, and may hold more than we knew of.
            neighbour.known = None
            neighbour.retry_ns = now_ns + neighbour.delay_ns
            neighbour.delay_ns = min(2 * neighbour.delay_ns, RETRY_NS_MAX)

    def ended(self, peer: str) -> None:
        """An exchange is over, whatever came of it."""
        neighbour = self._neighbours.get(peer)
        if neighbour is not None:
            neighbour.is_busy = False

    def next_exchange(self, fingerprint: bytes, now_ns: int) -> str | None:
        """A neighbour to exchange with now; it counts as busy until `ended`."""
        for peer, neighbour in self._neighbours.items():
            is_due = neighbour.retry_ns is None or now_ns >= neighbour.retry_ns
            if neighbour.known != fingerprint and not neighbour.is_busy and is_due:
                neighbour.is_busy = True
                return peer
        return None

    def get_timer(self, fingerprint: bytes) -> int | None:
        """When `next_exchange` should be asked again though nothing happens."""
        waiting = [
            neighbour.retry_ns
            for neighbour in self._neighbours.values()
            if neighbour.retry_ns is not None
            and neighbour.known != fingerprint
            and not neighbour.is_busy
        ]
        return min(waiting, default=None)

    def told(self, fingerprint: bytes) -> list[str]:
        """Neighbours that are known to hold these records, sorted."""
        return sorted(p for p, n in self._neighbours.items() if n.known == fingerprint)

    def untold(self, fingerprint: bytes) -> list[str]:
        """Neighbours that are not, sorted."""
        return sorted(p for p, n in self._neighbours.items() if n.known != fingerprint)
