"""Which node exposes which service: told to each peer that may use it, and learnt from them.

A list replaces the one before it. What a peer said is kept while its link is down, and forgotten
with this daemon: nothing of it decides who may connect.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import structlog

from geomirror.errors import GeomirrorError, UsageError
from geomirror.node.calls import Caller, Parameters, Result
from geomirror.node.context import NodeContext
from geomirror.tunnel.network_state_io import NetworkState
from geomirror.tunnel.service_rules import Holder, ServiceRules, check_service

_log = structlog.get_logger(component="services")

CALL_TIMEOUT_S = 10.0
RETRY_S = 2.0


class Announce(Parameters, frozen=True):
    """`service.announce`"""

    services: list[str]


class ServiceDirectory:
    """On the event loop."""

    def __init__(
        self, context: NodeContext, state: NetworkState, rules: Callable[[], ServiceRules]
    ) -> None:
        self._context = context
        self._state = state
        self._rules = rules
        self._known: dict[str, list[str]] = {}
        self._told: dict[str, list[str]] = {}
        self._telling: dict[str, asyncio.Task[None]] = {}
        self._strangers: set[str] = set()
        """Peers whose version knows no services."""

    def link_up(self, peer: str) -> None:
        """Tell a node that is reachable again; it may be another daemon, or another version."""
        self._told.pop(peer, None)
        self._strangers.discard(peer)
        self._tell(peer)

    def changed(self) -> None:
        """The rules have changed: tell whom it concerns."""
        for member in self._state.membership.active():
            if member.name != self._context.name and self._is_up(member.name):
                self._tell(member.name)

    async def announce(self, caller: Caller, request: Announce) -> Result:
        """A peer says what this node may use there."""
        if caller.peer is None:
            raise UsageError("only a node announces its services")
        if len(request.services) > self._context.limits.services_max:
            raise UsageError("more services than a node may expose")
        self._known[caller.peer] = [check_service(name) for name in request.services]
        return {}

    def forget(self, peer: str, name: str) -> None:
        """A peer says that it has no such service, or not for us."""
        if name in self._known.get(peer, []):
            self._known[peer].remove(name)

    def holders(self, name: str) -> list[Holder]:
        """Other nodes that expose a service, as they said it last."""
        return [self._holder(peer) for peer, names in self._seen().items() if name in names]

    def by_name(self) -> dict[str, list[Holder]]:
        """Every service that another node exposes."""
        found: dict[str, list[Holder]] = {}
        for peer, names in self._seen().items():
            for name in names:
                found.setdefault(name, []).append(self._holder(peer))
        return found

    def strangers(self) -> list[str]:
        """Connected nodes whose version knows no services."""
        return sorted(peer for peer in self._strangers if self._is_up(peer))

    async def stop(self) -> None:
        """Say nothing any more."""
        tasks = list(self._telling.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _seen(self) -> dict[str, list[str]]:
        """Of members only: a node that was revoked, or renamed, holds nothing under its name."""
        names = {member.name for member in self._state.membership.active()}
        return {peer: found for peer, found in self._known.items() if peer in names}

    def _holder(self, peer: str) -> Holder:
        member = self._state.membership.find(peer)
        status = self._context.links.state(peer)
        node_id = member.node_id if member is not None else ""
        return Holder(peer, node_id, status.is_established, status.rtt_ns)

    def _is_up(self, peer: str) -> bool:
        return self._context.links.state(peer).is_established

    def _tell(self, peer: str) -> None:
        if peer not in self._telling:
            task = asyncio.get_running_loop().create_task(self._keep_told(peer))
            self._telling[peer] = task
            task.add_done_callback(lambda _: self._telling.pop(peer, None))

    async def _keep_told(self, peer: str) -> None:
        while self._is_up(peer):
            names = self._names_for(peer)
            if self._told.get(peer) == names:
                return
            parameters: dict[str, Any] = {"services": names}
            links = self._context.links
            try:
                await links.call(peer, "service.announce", parameters, CALL_TIMEOUT_S)
            except UsageError as error:
                self._strangers.add(peer)
                _log.info("services_not_known", peer=peer, reason=str(error))
                return
            except GeomirrorError as error:
                _log.info("services_not_told", peer=peer, reason=str(error))
                await asyncio.sleep(RETRY_S)
                continue
            self._told[peer] = names

    def _names_for(self, peer: str) -> list[str]:
        member = self._state.membership.find(peer)
        return self._rules().names_for(member.node_id) if member is not None else []
