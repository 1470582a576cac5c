"""The link driver: what the WAN protocol needs of a transport, and nothing more.

A driver gives authenticated, encrypted, ordered byte streams between two named nodes. `tls` is the
embedded one; which way its streams go is in the endpoint (`link_path`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # types only: a core does not load the event loop
    import asyncio

LINK_PROTOCOL = "geomirror/1"
"""ALPN of a link; both sides show a certificate of the network."""
JOIN_PROTOCOL = "geomirror-join/1"
"""ALPN of the join exchange; the joiner has no certificate yet."""
CIRCUIT_PROTOCOL = "geomirror-circuit/1"
"""ALPN of one forwarded TCP connection; otherwise as a link's."""


class Listener(Protocol):
    """An open listening endpoint."""

    endpoint: str
    """`HOST:PORT` really bound; the port is never 0."""

    async def stop(self) -> None:
        """Close the socket and what is not yet authenticated; established links stay."""


class LinkDriver(Protocol):
    """Dials and accepts authenticated streams."""

    name: str

    async def dial(
        self,
        peer: str,
        endpoint: str,
        factory: Callable[[], asyncio.BaseProtocol],
        connected: Callable[[], None] = lambda: None,
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        """Connect and authenticate the other side as exactly `peer`, which has accepted us too.

        :param endpoint: a path (`link_path`).
        :param connected: called when something there has answered at all, before it is known who.
        :raises AuthError: it is not `peer`, not of this network, or it refuses this node.
        :raises LinkError: unreachable, or it does not speak our protocol.
        """

    async def listen(
        self, endpoint: str, factory: Callable[[str], asyncio.BaseProtocol]
    ) -> Listener:
        """Accept links; `factory(peer name)` is called for each, before any of its data.

        :param endpoint: `HOST:PORT`, or a URL of `link_path` for WebSockets.
        :raises InUseError: another process listens there.
        :raises ConfigError: the endpoint is not an address of this machine.
        """
