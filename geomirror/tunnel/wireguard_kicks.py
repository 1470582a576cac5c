"""Which neighbours' handshakes are overdue: WireGuard itself waits 5 s before another hello.

A first hello that got lost (the neighbour's interface was not there yet) costs all of these; a peer
that is removed and added again says it at once. So a handshake that is not there after
300 ms is begun anew, then after twice as long each time: a neighbour that is away costs little.
"""

from __future__ import annotations

from dataclasses import dataclass

from geomirror.environment import MS, SECOND
from geomirror.tunnel.wireguard_actual import PeerState
from geomirror.tunnel.wireguard_plan import is_alive

FIRST_NS = 300 * MS
"""A handshake takes one round trip; that of a link around the world is 300 ms."""
LAST_NS = 30 * SECOND
"""Longest pause between two of our own attempts; WireGuard goes on with its own in between."""


@dataclass
class _Overdue:
    at_ns: int
    pause_ns: int


class Kicks:
    """Of all neighbours of a node; fed with what was seen, asked before something is done."""

    def __init__(self) -> None:
        self._overdue: dict[str, _Overdue] = {}
        self._received: dict[str, int] = {}
        self._heard_ns: dict[str, int] = {}

    def saw(self, node: str, peer: PeerState | None, now_ns: int, wall_s: int) -> None:
        """What WireGuard said of a neighbour; None: it is not configured."""
        if peer is None:
            self._overdue.pop(node, None)
            return
        if peer.bytes_received != self._received.get(node, 0) and peer.bytes_received:
            self._heard_ns[node] = now_ns
        self._received[node] = peer.bytes_received
        if is_alive(peer.handshake_s, wall_s):
            self._overdue.pop(node, None)
        elif node not in self._overdue:
            self._overdue[node] = _Overdue(now_ns + FIRST_NS, FIRST_NS)

    def take(self, node: str, now_ns: int, jitter: float) -> bool:
        """Whether to begin a handshake anew now; the next time is later then.

        :param jitter: at least 1: two neighbours must not undo each other's attempts in step.
        """
        overdue = self._overdue.get(node)
        if overdue is None or now_ns < overdue.at_ns:
            return False
        overdue.pause_ns = min(2 * overdue.pause_ns, LAST_NS)
        overdue.at_ns = now_ns + int(overdue.pause_ns * jitter)
        return True

    def delay_s(self, now_ns: int) -> float | None:
        """Seconds until `take` may say yes; None: nothing is overdue."""
        if not self._overdue:
            return None
        return max(0.0, (min(o.at_ns for o in self._overdue.values()) - now_ns) / SECOND)

    def heard_ns(self, node: str) -> int | None:
        """When bytes of a neighbour were last seen to have arrived."""
        return self._heard_ns.get(node)
