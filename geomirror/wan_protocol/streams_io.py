"""The links of a node to all its peers: what the rest of the node uses of this package."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from geomirror.environment import Clock, Entropy
from geomirror.errors import AuthError, NotFoundError, UnreachableError
from geomirror.limits import Limits
from geomirror.tunnel.driver import LinkDriver, Listener
from geomirror.wan_protocol.link_events import LinkContext, LinkEvents, LinkStatus, PeerAddress
from geomirror.wan_protocol.messages import Message
from geomirror.wan_protocol.peer_link_io import PeerLink
from geomirror.wan_protocol.stream_connection_io import LinkConnection

__all__ = ["LinkEvents", "LinkStatus", "PeerAddress", "PeerLinks"]

NO_LINK = LinkStatus(
    is_established=False,
    rtt_ns=0,
    since_ns=0,
    connections=0,
    congestion="",
    bytes_sent=0,
    bytes_received=0,
    last_error="",
    endpoint="",
)


class PeerLinks:
    """One link per peer, made and kept for ever. Everything runs on the event loop.

    :param node: this node's name.
    :param driver: gives authenticated connections.
    :param events: told what happens, by direct calls.
    """

    def __init__(
        self,
        node: str,
        limits: Limits,
        clock: Clock,
        entropy: Entropy,
        driver: LinkDriver,
        events: LinkEvents,
    ) -> None:
        self._node = node
        self._clock = clock
        self._driver = driver
        self._context = LinkContext(
            node, limits, clock, entropy, driver, events, incarnation=entropy.token_bytes(16)
        )
        self._peers: dict[str, PeerLink] = {}
        self._listeners: list[Listener] = []
        self._stopping: set[asyncio.Task[None]] = set()

    @property
    def endpoint(self) -> str | None:
        """`HOST:PORT` bound first by `start`, if this node listens."""
        return self._listeners[0].endpoint if self._listeners else None

    async def start(self, *listen: str | None) -> None:
        """Accept peers at these endpoints (`None`: one that is not there) and begin to dial.

        :raises InUseError: another process listens there.
        :raises ConfigError: the endpoint is not an address of this machine.
        """
        for endpoint in listen:
            if endpoint is not None:
                self._listeners.append(await self._driver.listen(endpoint, self._accept))

    async def stop(self, reason: str = "the node stops") -> None:
        """Say goodbye to every peer and close everything; at most about a second."""
        for listener in self._listeners:
            await listener.stop()
        links = list(self._peers.values())
        await asyncio.gather(*(link.stop(reason) for link in links), *self._stopping)
        self._peers.clear()

    def set_peers(self, peers: Sequence[PeerAddress]) -> None:
        """Connect to exactly these peers from now on; links to others are closed."""
        wanted = {peer.name: peer for peer in peers if peer.name != self._node}
        for name in [name for name in self._peers if name not in wanted]:
            link = self._peers.pop(name)
            task = asyncio.get_running_loop().create_task(link.stop("no longer a peer"))
            self._stopping.add(task)
            task.add_done_callback(self._stopping.discard)
        for name, peer in wanted.items():
            if name not in self._peers:
                self._peers[name] = PeerLink(self._context, name)
            self._peers[name].set_endpoints(list(peer.endpoints))

    def rename(self, node: str) -> None:
        """This node has another name: all links are closed, `set_peers` makes them anew."""
        self.set_peers([])
        self._node = node
        self._context = replace(self._context, node=node)

    def set_rate(self, peer: str, bytes_per_second: int | None) -> None:
        """Pace for a link of this rate (bytes of the link, headers included); `None`: unpaced.

        :raises NotFoundError: no such peer.
        """
        self._link(peer).set_rate(bytes_per_second)

    def send_message(self, peer: str, session: int, message: Message) -> None:
        """Send on the control connection; dropped silently when the link is down."""
        link = self._peers.get(peer)
        if link is not None:
            link.send_message(session, message)

    def send_frame(
        self,
        peer: str,
        session: int,
        epoch: int,
        sequence: int,
        body: bytes,
        *,
        is_resync: bool = False,
    ) -> None:
        """Send on one of the data connections; dropped silently when the link is down."""
        link = self._peers.get(peer)
        if link is not None:
            link.frames.send(session, epoch, sequence, body, is_resync=is_resync)

    def writable_bytes(self, peer: str) -> int:
        """Frame bytes that may be handed over now; `LinkEvents.writable` says when it is more."""
        link = self._peers.get(peer)
        return link.frames.room_bytes if link is not None else 0

    def state(self, peer: str) -> LinkStatus:
        """How the link to a peer is; down for a node that is not a peer (yet)."""
        link = self._peers.get(peer)
        return link.status() if link is not None else NO_LINK

    def peers(self) -> list[str]:
        """Names of all peers, sorted."""
        return sorted(self._peers)

    async def call(
        self, peer: str, method: str, parameters: dict[str, Any], timeout_s: float
    ) -> dict[str, Any]:
        """Call a method of a peer and wait for its result, up to 1 MiB of JSON.

        :raises NotFoundError: no such peer.
        :raises UnreachableError: not connected, no answer in time, or the link was lost on the way;
            in the last two cases the peer may have acted.
        :raises GeomirrorError: whatever the peer raised.
        """
        link = self._link(peer)
        if not link.is_up:
            raise UnreachableError(
                f'node "{peer}" is not connected: {link.core.last_error or "not reached yet"}',
                hint='see "geomirror link list"',
            )
        return await link.calls.call(method, parameters, timeout_s)

    def _link(self, peer: str) -> PeerLink:
        link = self._peers.get(peer)
        if link is None:
            raise NotFoundError(f'no node "{peer}" among the peers of "{self._node}"')
        return link

    def _accept(self, peer: str) -> LinkConnection:
        """Called by the driver for each authenticated connection; it tells and logs a refusal."""
        link = self._peers.get(peer)
        if link is None:
            raise AuthError(f'"{peer}" is not a peer of "{self._node}"')
        return link.accept()
