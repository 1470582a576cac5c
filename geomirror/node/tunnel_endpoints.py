"""Where a neighbour's tunnel is: at the address at which its link is, while there was one."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from geomirror.tunnel.link_path import is_url
from geomirror.tunnel.membership import Member
from geomirror.tunnel.names import split_endpoint
from geomirror.tunnel.wireguard_desired import usable_host

if TYPE_CHECKING:
    from geomirror.wan_protocol.streams_io import PeerLinks

RESOLVE_S_MAX = 2.0
"""A resolver that does not answer must not hold everything else up."""


class Endpoints:
    """Addresses of all neighbours. On the event loop.

    :param endpoints_of: `HOST:PORT` texts of a member, for those that have no link yet.
    :param ranges: addresses of the overlay, at which no tunnel can end.
    """

    def __init__(
        self,
        links: PeerLinks,
        endpoints_of: Callable[[Member], Sequence[str]],
        ranges: Sequence[str],
    ) -> None:
        self._links = links
        self._endpoints_of = endpoints_of
        self._ranges = ranges
        self._last: dict[str, str] = {}
        """Node id → the host of its last link: better than what is only said of it."""

    async def hosts(self, members: Iterable[Member], own: str) -> dict[str, str]:
        """Node id → IP address, of those for which one can be found."""
        others = [member for member in members if member.name != own]
        found = await asyncio.gather(*(self._host(member) for member in others))
        return {m.node_id: host for m, host in zip(others, found, strict=True) if host}

    async def _host(self, member: Member) -> str | None:
        link = self._links.state(member.name)
        # Behind a proxy or a front end there is no tunnel's end.
        if link.is_established and link.endpoint and link.rank == 0:
            host = await self._resolve(_host_of(link.endpoint))
            if host is not None:
                self._last[member.node_id] = host
        if member.node_id in self._last:
            return self._last[member.node_id]
        for endpoint in self._endpoints_of(member):
            if is_url(endpoint):
                continue
            host = await self._resolve(split_endpoint(endpoint)[0])
            if host is not None:
                return host
        return None

    async def _resolve(self, host: str) -> str | None:
        if usable_host(host, ()) is not None:
            return usable_host(host, self._ranges)
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError, TimeoutError, UnicodeError):
            async with asyncio.timeout(RESOLVE_S_MAX):
                answers = await loop.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
            for answer in answers:
                found = usable_host(str(answer[4][0]), self._ranges)
                if found is not None:
                    return found
        return None


def _host_of(address: str) -> str:
    # Of an accepted connection it is the socket's address, whose IPv6 form has no brackets.
    return address.rpartition(":")[0].strip("[]")
