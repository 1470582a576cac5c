"""`node.leave`: this node takes its copies out of resources, says goodbye for ever, and ends.

Nothing is lost by it unless `--force` says what: a node that is the primary of a resource, or whose
copy may be the only one, stays. The rest, on the disk, is `leaving.finish_leaving`.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import structlog

from geomirror.errors import GeomirrorError, NotFoundError, RefusedError, UsageError
from geomirror.node.attach_state import attachments
from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.definition_store import DefinitionStore, ResourceEntry
from geomirror.node.leaving import Leaving, begin_leaving
from geomirror.node.network_calls import NetworkCalls
from geomirror.node.paths import DataDir
from geomirror.tunnel.authority_io import revoke_node

_log = structlog.get_logger(component="network")

CALL_S = 30.0
FORGET_LOOK_S = 0.05
FORGET_LOOKS = 1200
"""A minute, until a primary has told us to forget our copy."""
ANSWER_S = 0.5
"""After an answer: it has to be sent before the link, or the daemon, goes."""


class Leave(Parameters, frozen=True):
    """`node.leave`"""

    is_forced: bool = False


@dataclass(frozen=True)
class Obstacle:
    """Why this node should not leave now."""

    reason: str
    next: str
    lost: str
    """What leaving all the same loses."""


@dataclass
class LeaveCalls:
    """Handlers of both sides, on the event loop."""

    network: NetworkCalls
    store: DefinitionStore
    members_changed: Callable[[], None]
    take_tunnels_down: Callable[[], Awaitable[list[str]]]

    def register(self, methods: MethodRegistry) -> None:
        """Add every method."""
        methods.add("node.leave", Leave, self.leave)
        methods.add("membership.leave", Parameters, self.let_go, from_peers=True)

    async def leave(self, _caller: Caller, request: Leave) -> Result:
        """Leave the network; the daemon ends soon after the answer.

        :raises RefusedError: something would be lost, or nobody could be told; nothing changed.
        """
        state = self.network.state
        authority = self._authority()
        obstacles = self._obstacles(authority)
        if obstacles and not request.is_forced:
            first = obstacles[0]
            hint = f"{first.next}; or --force: {'; '.join(o.lost for o in obstacles)}"
            raise RefusedError(first.reason, hint=hint)
        copies = await self._give_copies_back(is_forced=request.is_forced)
        leaving = Leaving(state.network, state.node, state.identity.node_id, is_told=False)
        begin_leaving(state.data_dir, leaving)
        try:
            if authority is not None:
                await self.network.context.links.call(authority, "membership.leave", {}, CALL_S)
                leaving.is_told = True
                begin_leaving(state.data_dir, leaving)
        except GeomirrorError as error:
            # Begun is begun: what is on the disk goes; what is still listed can be revoked.
            _log.warning("leaving_not_told", peer=authority, reason=str(error))
        removed = await self.take_tunnels_down()
        loop = asyncio.get_running_loop()
        loop.call_later(ANSWER_S, os.kill, os.getpid(), signal.SIGTERM)
        return {
            "network": leaving.network,
            "node": leaving.node,
            "is_told": leaving.is_told,
            "copies": copies,
            "removed": removed,
            "lost": [obstacle.lost for obstacle in obstacles],
        }

    async def let_go(self, caller: Caller, _request: Parameters) -> Result:
        """A node leaves: its key is refused from now on, its name is free."""
        if caller.peer is None:
            raise UsageError("only a node can say that it leaves")
        state, clock = self.network.state, self.network.context.clock
        member = revoke_node(state, caller.peer, wall_ns=clock.wall_ns(), is_left=True)
        asyncio.get_running_loop().call_later(ANSWER_S, self.members_changed)
        return {"node": member.name, "node_id": member.node_id}

    def _authority(self) -> str | None:
        """A connected node that can sign that we have left."""
        links = self.network.context.links
        names = [n for n in self.network.state.authority_names() if n != self.network.state.node]
        return next((name for name in names if links.state(name).is_established), None)

    def _obstacles(self, authority: str | None) -> list[Obstacle]:
        state = self.network.state
        others = [m.name for m in state.membership.active() if m.name != state.node]
        found: list[Obstacle] = []
        if state.authority is not None and others:
            reason = (
                f'the node "{state.node}" holds the key of the network authority: without it '
                "nobody joins, and within a day no certificate is good any more"
            )
            # Not even by force: the others would find out tomorrow.
            raise RefusedError(reason, hint=f"let {', '.join(others)} leave first")
        attached = [found.load() for found in attachments(DataDir(state.data_dir))]
        for name in sorted(found.name for found in attached if found is not None):
            raise RefusedError(
                f'the volume "{name}" is attached to this host', hint=f"geomirror detach {name}"
            )
        for entry in self.store.entries():
            obstacle = self._obstacle(entry)
            if obstacle is not None:
                found.append(obstacle)
        if others and authority is None:
            names = ", ".join(state.authority_names()) or "the authority"
            found.append(
                Obstacle(
                    f"the authority's node {names} is not connected: nobody could be told",
                    'see "geomirror link list"',
                    f'the network still lists "{state.node}" until it is revoked there',
                )
            )
        return found

    def _obstacle(self, entry: ResourceEntry) -> Obstacle | None:
        definition, here = entry.definition, self.network.state.node
        name = definition.name
        if entry.state == "deleting" or here not in definition.members:
            return None
        if definition.primary == here:
            others = definition.peers_of(here)
            if others:
                return Obstacle(
                    f'this node is the primary of "{name}"',
                    f"geomirror switchover {name} --to {others[0]}",
                    f'what of "{name}" no other copy has yet',
                )
            return Obstacle(
                f'this node has the only copy of "{name}"',
                f"geomirror resource add-secondary {name} NODE, or resource delete {name}",
                f'all of "{name}"',
            )
        if not self.network.context.links.state(definition.primary).is_established:
            return Obstacle(
                f'the primary of "{name}", {definition.primary}, is not connected: the copy here '
                "may be the only one left",
                f"geomirror status {name}",
                f'the copy of "{name}" here, which may be the only one left',
            )
        return None

    async def _give_copies_back(self, *, is_forced: bool) -> list[str]:
        """Have each primary remove our copy; the names of the resources."""
        here, names = self.network.state.node, []
        for entry in self.store.entries():
            definition = entry.definition
            if entry.state == "deleting" or here not in definition.secondaries:
                continue
            parameters = {"name": definition.name, "node": here, "keep_data": False}
            try:
                await self._remove_copy(definition.primary, parameters, definition.resource_id)
            except GeomirrorError as error:
                if not is_forced:
                    raise
                _log.warning("copy_not_taken_out", resource=definition.name, reason=str(error))
            names.append(definition.name)
        return names

    async def _remove_copy(
        self, primary: str, parameters: dict[str, Any], resource_id: str
    ) -> None:
        links = self.network.context.links
        try:
            await links.call(primary, "resource.remove_secondary", parameters, CALL_S)
        except NotFoundError as error:
            _log.info("copy_not_listed", peer=primary, reason=str(error))  # from a try before
            return
        for _ in range(FORGET_LOOKS):
            if self.store.by_id(resource_id) is None:
                return
            await asyncio.sleep(FORGET_LOOK_S)
        raise RefusedError(
            f'the primary of "{parameters["name"]}" did not have the copy here removed in time',
            hint="try again",
        )
