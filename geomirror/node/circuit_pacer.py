"""Holds circuits back while replication to the same peer waits for the link."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from geomirror.node.circuit_desk import CircuitDesk
from geomirror.node.context import NodeContext
from geomirror.tunnel.circuit_io import Splice
from geomirror.tunnel.circuit_pace import CircuitPace
from geomirror.wan_protocol.stream_socket_io import UNPACED, set_pace

SAMPLE_S = 0.25
BUSY_SAMPLES = 8
"""A circuit counts as busy for so long after it took bytes: one that is paced takes them in lumps
of a socket's buffer. Counting it out in between gave the others twice what they may have."""


@dataclass
class _Peer:
    pace: CircuitPace
    link_bytes: int
    limit: int | None = None
    seen: dict[Splice, int] = field(default_factory=dict)
    """Bytes that each circuit had sent at the last sample."""
    idle: dict[Splice, int] = field(default_factory=dict)
    """Samples since it last took any."""


class CircuitPacer:
    """Sets the kernel's pacing of the circuits' connections; on the event loop."""

    def __init__(self, context: NodeContext, desk: CircuitDesk) -> None:
        self._context = context
        self._desk = desk
        self._peers: dict[str, _Peer] = {}

    async def keep(self) -> None:
        """Look a few times a second, for ever."""
        while True:
            await asyncio.sleep(SAMPLE_S)
            by_peer = self._desk.by_peer()
            for name in [name for name in self._peers if name not in by_peer]:
                del self._peers[name]
            for name, splices in by_peer.items():
                self._look(name, splices)

    def limits(self) -> dict[str, int]:
        """Peers whose circuits are held back now: bytes per second, together."""
        return {name: peer.limit for name, peer in self._peers.items() if peer.limit is not None}

    def _look(self, name: str, splices: list[Splice]) -> None:
        now_ns, status = self._context.clock.now_ns(), self._context.links.state(name)
        peer = self._peers.get(name)
        if peer is None:
            peer = self._peers[name] = _Peer(CircuitPace(now_ns), status.bytes_sent)
        sent = {splice: splice.circuit.bytes_sent for splice in splices}
        news = {splice: count - peer.seen.get(splice, 0) for splice, count in sent.items()}
        idle = {s: 0 if count else peer.idle.get(s, 0) + 1 for s, count in news.items()}
        carried = sum(news.values()) + max(0, status.bytes_sent - peer.link_bytes)
        limit = peer.pace.sample(now_ns, carried, is_waiting=status.queued_bytes > 0)
        if limit is not None or peer.limit is not None:
            busy = sum(1 for samples in idle.values() if samples < BUSY_SAMPLES)
            rate = UNPACED if limit is None else max(1, limit // max(1, busy))
            for splice in splices:
                set_pace(splice.peer.socket, rate)
        peer.limit, peer.seen, peer.idle = limit, sent, idle
        peer.link_bytes = status.bytes_sent
