"""Carries what the links report to the resources and methods that it is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from geomirror.errors import GeomirrorError, NotFoundError
from geomirror.limits import PRODUCTION
from geomirror.node.calls import Caller, MethodRegistry
from geomirror.node.definition_push import DefinitionPush
from geomirror.node.resource_host import ResourceHost
from geomirror.node.service import Service
from geomirror.wan_protocol.messages import AnyMessage, Message, SessionOpen, SessionRefuse

HELD_MAX = PRODUCTION.resources_max
"""Sessions that wait for their resource to be opened."""


class LinkRouter:
    """The node's side of `PeerLinks`; every call is on the event loop and returns at once.

    Made before the links, which report to it, and bound to the rest before they start.
    """

    _host: ResourceHost
    _push: DefinitionPush
    _methods: MethodRegistry

    def __init__(self) -> None:
        self.on_link_up: Callable[[str], None] = lambda peer: None
        self._up: set[str] = set()
        self._held: dict[tuple[str, int], SessionOpen] = {}
        """(peer, session) -> what waits for its resource to be opened; one per session."""

    def bind(self, host: ResourceHost, push: DefinitionPush, methods: MethodRegistry) -> None:
        """Say where everything goes."""
        self._host = host
        self._push = push
        self._methods = methods

    def is_up(self, peer: str) -> bool:
        """Whether the link to a node is established."""
        return peer in self._up

    def service_started(self, service: Service) -> None:
        """A resource is served from now on: tell it which links are there already."""
        for peer in service.definition.peers_of(self._host.context.name):
            if peer in self._up:
                self._connect(service, peer)
                held = self._held.pop((peer, service.definition.session), None)
                if held is not None:
                    service.message(peer, held.session, held)

    def link_up(self, peer: str, now_ns: int) -> None:
        """A link is established."""
        self._up.add(peer)
        self._host.context.emit("link_up", {"peer": peer})
        self.on_link_up(peer)
        for service in self._host.with_peer(peer):
            self._connect(service, peer)
        self._push.link_up(peer)

    def link_down(self, peer: str, reason: str, now_ns: int) -> None:
        """A link is gone; it is tried again for ever."""
        self._up.discard(peer)
        self._host.context.emit("link_down", {"peer": peer, "reason": reason})
        self._push.link_down(peer)
        for key in [key for key in self._held if key[0] == peer]:
            del self._held[key]
        for service in self._host.with_peer(peer):
            service.link_down(peer)

    def link_stalled(self, peer: str, reason: str, now_ns: int) -> None:
        """A link is up, but data does not get through."""
        self._host.context.emit("link_stalled", {"peer": peer, "reason": reason})

    def message(self, peer: str, session: int, message: Message) -> None:
        """A control message of some session."""
        service = self._host.by_session(session, peer)
        if service is None:
            if isinstance(message, SessionOpen):
                self._hold_or_refuse(peer, session, message)
            return
        if (
            isinstance(message, SessionRefuse)
            and message.error_code == NotFoundError.wire_code
            and service.definition.primary == self._host.context.name
        ):
            # The secondary lost its part, or was made anew: it needs the definition again.
            self._push.forgotten(service.definition.name, peer)
        service.message(peer, session, cast("AnyMessage", message))

    def frame(
        self, peer: str, session: int, epoch: int, sequence: int, is_resync: bool, body: bytes
    ) -> None:
        """A data frame of some session; one of an unknown session is dropped."""
        service = self._host.by_session(session, peer)
        if service is not None:
            service.frame(peer, session, epoch, sequence, is_resync, body)

    def writable(self, peer: str) -> None:
        """A link's queues have room again."""
        for service in self._host.with_peer(peer):
            service.writable(peer)

    async def call(self, peer: str, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """A peer calls one of our methods."""
        return await self._methods.dispatch(Caller(peer), method, parameters)

    def _connect(self, service: Service, peer: str) -> None:
        is_primary = service.role == "primary"
        if not is_primary or self._push.is_confirmed(service.definition.name, peer):
            service.link_up(peer)

    def _hold_or_refuse(self, peer: str, session: int, message: SessionOpen) -> None:
        if message.name in self._host.opening and len(self._held) < HELD_MAX:
            self._held[peer, session] = message
            return
        error: GeomirrorError = NotFoundError(f'no resource "{message.name}" here')
        try:
            self._host.get(message.name)
        except GeomirrorError as found:
            error = found
        refusal = SessionRefuse(session, error.wire_code, str(error))
        self._host.context.links.send_message(peer, session, refusal)
