"""The circuits of a node: how many there may be, and which connection belongs to which.

```
 open ──▶ opening ──claim(peer, number), once──▶ joined ──▶ close
             └───── refused, too late ─────▶ close
```
Invariant: a number is good for one connection, of the peer that it was agreed with;
there are never more circuits than the limits say, those being opened included.
Deliberately not here: connections, bytes, who may use what.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from geomirror.errors import RefusedError
from geomirror.limits import Limits


@dataclass(eq=False)
class CircuitEntry:
    """One circuit."""

    number: bytes
    peer: str
    service: str
    is_forwarded: bool
    """This node has the application that connects; otherwise the service."""
    place: str
    """`HOST:PORT` here: that the application connected to, or of the service."""
    opened_ns: int
    incarnation: bytes
    """Of the peer's daemon: another one knows nothing of this circuit."""
    is_joined: bool = False
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass
class Tally:
    """What became of the circuits of one exposure or forward since the daemon's start."""

    circuits: int = 0
    refused: int = 0
    """That did not come to be."""
    reset: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    last_error: str = ""
    last_error_wall_ns: int = 0


@dataclass
class CircuitTable:
    """All circuits of a node, by peer and number."""

    limits: Limits
    _entries: dict[tuple[str, bytes], CircuitEntry] = field(default_factory=dict)

    def open(self, entry: CircuitEntry, node_max: int) -> None:
        """Add one that is being opened.

        :param node_max: as many as there may be now, at most `circuits_max`.
        :raises RefusedError: too many, or the peer uses a number twice.
        """
        peer_max = self.limits.circuits_peer_max
        if len(self._entries) >= node_max:
            raise RefusedError(f"{node_max} circuits are open already, as many as this node has")
        if self.count(entry.peer) >= peer_max:
            raise RefusedError(f'{peer_max} circuits with "{entry.peer}" are open already')
        if (entry.peer, entry.number) in self._entries:
            raise RefusedError("the number of a circuit was used before")
        self._entries[entry.peer, entry.number] = entry

    def claim(self, peer: str, number: bytes) -> CircuitEntry | None:
        """The circuit that a connection of this peer belongs to; None if there is none, or if it
        has one."""
        entry = self._entries.get((peer, number))
        if entry is None or entry.is_joined:
            return None
        entry.is_joined = True
        return entry

    def close(self, entry: CircuitEntry) -> bool:
        """Forget one; whether it was there."""
        return self._entries.pop((entry.peer, entry.number), None) is entry

    def has(self, entry: CircuitEntry) -> bool:
        """Whether it is still open, or being opened."""
        return self._entries.get((entry.peer, entry.number)) is entry

    def count(self, peer: str) -> int:
        """How many there are with a peer."""
        return sum(1 for known, _ in self._entries if known == peer)

    def entries(self) -> list[CircuitEntry]:
        """All, oldest first."""
        return list(self._entries.values())
