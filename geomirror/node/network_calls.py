"""Methods about the network, and its upkeep: exchange of entries, renewal of certificates."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import structlog

from geomirror.environment import SECOND
from geomirror.errors import GeomirrorError, UnreachableError
from geomirror.limits import PRODUCTION
from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.context import NodeContext
from geomirror.node.membership_spread import MembershipSpread
from geomirror.node.network_view import (
    address_fields,
    network_object,
    own_object,
    revoked_objects,
)
from geomirror.node.sightings import Sightings
from geomirror.tunnel.authority_io import install_renewal, renew, renew_own, renewal_request
from geomirror.tunnel.join_io import renew_by_join
from geomirror.tunnel.link_path import KINDS
from geomirror.tunnel.membership import Member
from geomirror.tunnel.network_state_io import NetworkState
from geomirror.tunnel.path_io import WayOut

_log = structlog.get_logger(component="network")

CALL_TIMEOUT_S = 20.0
RENEWAL_CHECK_S = 600.0
"""Between two looks at our certificate's age; a lifetime is 24 h."""
RENEWAL_RETRY_S = 30.0
"""After an authority could not be asked."""
ENTRIES_MAX = 4 * PRODUCTION.peers_max + 1
"""Records in one exchange: four entries per possible node, and the list of revoked keys."""


class Exchange(Parameters, frozen=True):
    """Entries that the caller knows."""

    updates: list[dict[str, Any]] = msgspec.field(default_factory=list)


class Renewal(Parameters, frozen=True):
    """A request for a new certificate."""

    request: str


@dataclass
class NetworkCalls:
    """Handlers and upkeep; on the event loop, files on worker threads."""

    state: NetworkState
    context: NodeContext
    on_changed: Callable[[], None]
    """Members changed: look at peers, routes and live sessions again."""
    certificate_ends_ns: Callable[[str], int | None] = lambda node_id: None
    """When the newest certificate ends that a node has shown."""
    paths_of: Callable[[Member], Sequence[str]] = lambda member: member.endpoints
    """On which a node is dialled."""
    way_out: Callable[[], WayOut] = WayOut
    _look: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.spread = MembershipSpread(self.state, self.context, self._apply)
        self.sightings = Sightings(self.state, self.context, self.certificate_ends_ns)

    def register(self, methods: MethodRegistry) -> None:
        """Add every method."""
        methods.add("network.show", Parameters, self.network_show)
        methods.add("node.show", Parameters, self.node_show)
        methods.add("node.list", Parameters, self.node_list)
        methods.add("link.list", Parameters, self.link_list)
        methods.add("membership.exchange", Exchange, self.exchange, from_peers=True)
        methods.add("certificate.renew", Renewal, self.renew, from_peers=True)

    async def network_show(self, _caller: Caller, _request: Parameters) -> Result:
        """The network."""
        return {**network_object(self.state), **self._nodes()}

    async def node_show(self, _caller: Caller, _request: Parameters) -> Result:
        """This node."""
        return own_object(self.state)

    async def node_list(self, _caller: Caller, _request: Parameters) -> Result:
        """Every node, with the state of our link to it."""
        return {**self._nodes(), "revoked": revoked_objects(self.state)}

    def _nodes(self) -> Result:
        self.sightings.look()
        nodes = self.sightings.nodes()
        for found in nodes:
            link = None if found["is_self"] else self.context.links.state(found["node"])
            found["is_connected"] = bool(link and link.is_established)
        return {"nodes": nodes}

    async def link_list(self, _caller: Caller, _request: Parameters) -> Result:
        """Every link of this node."""
        now_ns = self.context.clock.now_ns()
        links = []
        for member in self.state.membership.active():
            if member.name == self.context.name:
                continue
            link = self.context.links.state(member.name)
            links.append(
                {
                    "node": member.name,
                    "site": member.site,
                    **address_fields(self.state, member),
                    "is_established": link.is_established,
                    "rtt_seconds": link.rtt_ns / SECOND if link.rtt_ns else None,
                    "since_seconds": (now_ns - link.since_ns) / SECOND if link.since_ns else None,
                    "connections": link.connections,
                    "congestion": link.congestion,
                    "bytes_sent": link.bytes_sent,
                    "bytes_received": link.bytes_received,
                    "endpoint": link.endpoint,
                    "way": KINDS[link.rank] if link.is_established else None,
                    "way_reason": link.path_reason,
                    "last_error": link.last_error,
                    "trouble": link.trouble,
                }
            )
        return {"links": links}

    async def exchange(self, caller: Caller, request: Exchange) -> Result:
        """Take over newer entries and answer with ours."""
        self._apply(caller.name, request.updates, is_asked=True)
        return {"updates": self.state.export_updates()}

    async def renew(self, caller: Caller, request: Renewal) -> Result:
        """Sign a new certificate for the caller, if the authority's key is here."""
        clock, entropy = self.context.clock, self.context.entropy
        return await asyncio.to_thread(
            renew,
            self.state,
            caller.peer or self.context.name,
            {"request": request.request},
            wall_ns=clock.wall_ns(),
            entropy=entropy,
        )

    def link_up(self, peer: str) -> None:
        """Exchange entries with a node that is reachable again."""
        self.spread.link_up(peer)
        self.sightings.look()

    async def keep_certificate(self) -> None:
        """Renew our certificate in time, and when members changed, for ever."""
        while True:
            self._look.clear()
            delay_s = RENEWAL_CHECK_S
            if self.state.is_renewal_due(self.context.clock.wall_ns()):
                before = self.state.membership.fingerprint()
                delay_s = RENEWAL_CHECK_S if await self._renew_own() else RENEWAL_RETRY_S
                if self.state.membership.fingerprint() != before:
                    self._changed("the authority")  # records come with a certificate
            # Not wait_for: Python 3.11's loses a cancellation that comes with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._look.wait()

    def look_at_certificate(self) -> None:
        """Its name may be out of date: a rename came with the members."""
        self._look.set()

    async def stop(self) -> None:
        """Cancel exchanges under way."""
        await self.spread.stop()
        await self.sightings.stop()

    def _apply(self, source: str, updates: list[dict[str, Any]], *, is_asked: bool = False) -> None:
        # On the loop: the state is read by everybody here; a merge is a few signatures.
        before = self.state.membership.fingerprint()
        try:
            self.state.apply_updates(updates[:ENTRIES_MAX])
            if is_asked:
                self.spread.answered(source)
        finally:
            # Also where a full disk did not take them: they are in force.
            if self.state.membership.fingerprint() != before:
                self._changed(source)

    def _changed(self, source: str) -> None:
        _log.info("members_changed", source=source)
        self.on_changed()

    async def _renew_own(self) -> bool:
        clock, entropy = self.context.clock, self.context.entropy
        try:
            if self.state.authority is not None:
                renew_own(self.state, wall_ns=clock.wall_ns(), entropy=entropy)
                return True
            for name in self.state.authority_names():
                if await self._renew_by(name):
                    return True
            await renew_by_join(
                self.state,
                clock=clock,
                entropy=entropy,
                paths_of=self.paths_of,
                way_out=self.way_out(),
            )
            return True
        except GeomirrorError as error:
            _log.warning("renewal_failed", reason=str(error))
        return False

    async def _renew_by(self, authority: str) -> bool:
        """Over the link; a node that has just been renamed loses it, maybe in the middle."""
        if not self.context.links.state(authority).is_established:
            return False
        request = renewal_request(self.state)
        try:
            reply = await self.context.links.call(
                authority, "certificate.renew", request, CALL_TIMEOUT_S
            )
        except UnreachableError as error:
            _log.info("renewal_interrupted", reason=str(error))
            return False
        install_renewal(self.state, reply, wall_ns=self.context.clock.wall_ns())
        _log.info("certificate_renewed", by=authority)
        return True
