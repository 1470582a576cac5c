"""What users of the links see of them: the events, the status, the address of a peer."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, Protocol

from geomirror.environment import Clock, Entropy
from geomirror.limits import Limits
from geomirror.tunnel.driver import LinkDriver
from geomirror.wan_protocol.messages import Message


@dataclass(frozen=True)
class PeerAddress:
    """A peer and where it can be dialled; without endpoints it is only waited for."""

    name: str
    endpoints: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LinkStatus:
    """State of the link to one peer."""

    is_established: bool
    rtt_ns: int
    """Smoothed round trip; of the last connections while down; 0 if never measured."""
    since_ns: int
    """Monotonic time of the last change between up and down."""
    connections: int
    """Data connections that are up."""
    congestion: str
    """Congestion control of the data connections, empty while down."""
    bytes_sent: int
    bytes_received: int
    last_error: str
    """Why the last connection or attempt failed; kept while the link is up."""
    endpoint: str
    """Address of the peer, dialled or seen; empty while down."""
    is_dialled: bool = False
    """By this node."""
    trouble: str = ""
    """Why nothing, or too little, gets through now; empty while all is well."""
    queued_bytes: int = 0
    """Frames that wait for a data connection."""
    rank: int = 0
    """Of the path in use (`tunnel.link_path`)."""
    path_reason: str = ""
    """Why it is not a better one; empty where there is none."""
    incarnation: bytes = b""
    """Of the peer's daemon, 16 bytes, new at each of its starts; empty before the first contact."""


class LinkEvents(Protocol):
    """What a node does with its links; all calls are on the event loop and return at once."""

    def link_up(self, peer: str, now_ns: int) -> None:
        """Messages and frames can be sent; sessions have to be opened or resumed."""

    def link_down(self, peer: str, reason: str, now_ns: int) -> None:
        """What was sent last may be lost; always between two `link_up`."""

    def link_stalled(self, peer: str, reason: str, now_ns: int) -> None:
        """The link is up, but data does not get through; told once in a while, not each time."""

    def message(self, peer: str, session: int, message: Message) -> None:
        """A control message. May raise `ProtocolError`: the connections are closed."""

    def frame(
        self, peer: str, session: int, epoch: int, sequence: int, is_resync: bool, body: bytes
    ) -> None:
        """A data frame, unchecked. May raise `ProtocolError`: the connection is closed."""

    def writable(self, peer: str) -> None:
        """Half of the queue is free after it was fuller."""

    def call(self, peer: str, method: str, parameters: dict[str, Any]) -> Awaitable[dict[str, Any]]:
        """Serve a call; raises `GeomirrorError` to answer with an error."""


@dataclass(frozen=True)
class LinkContext:
    """What all links of a node have in common."""

    node: str
    limits: Limits
    clock: Clock
    entropy: Entropy
    driver: LinkDriver
    events: LinkEvents
    incarnation: bytes
    """16 random bytes, new at each start."""
