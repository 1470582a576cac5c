"""Methods that change who is in the network: revoke, rename. Only the authority's node has them.

Each signs a new record, durable here before anything else happens, then acts on it here, then
brings it to all neighbours, which do the same. What could not be told yet is in the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from geomirror.errors import GeomirrorError, NotFoundError, RefusedError, UsageError
from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.definition_store import DefinitionStore
from geomirror.node.network_calls import NetworkCalls
from geomirror.tunnel.authority_io import rename_node, revoke_node
from geomirror.tunnel.membership import Member

SETTLE_S = 3.0
"""How long an answer waits until the neighbours know; whoever is slower is told all the same."""
ASK_S = 5.0


class OfNode(Parameters, frozen=True):
    """A node by its name."""

    name: str


class Renaming(Parameters, frozen=True):
    """`node.rename`"""

    name: str
    new_name: str


@dataclass
class LifecycleCalls:
    """Handlers, on the event loop."""

    network: NetworkCalls
    store: DefinitionStore
    members_changed: Callable[[], None]
    """Act on new records here: peers, live sessions, neighbours."""

    def register(self, methods: MethodRegistry) -> None:
        """Add every method."""
        methods.add("node.revoke", OfNode, self.revoke)
        methods.add("node.rename", Renaming, self.rename)
        methods.add("node.uses", OfNode, self.uses, from_peers=True)

    async def revoke(self, _caller: Caller, request: OfNode) -> Result:
        """Refuse a node's key for ever, everywhere."""
        state, clock = self.network.state, self.network.context.clock
        member = revoke_node(state, request.name, wall_ns=clock.wall_ns())
        self.members_changed()
        held = held_resources(self.store, request.name)
        return {**await self._told(member), "resources": held}

    async def rename(self, _caller: Caller, request: Renaming) -> Result:
        """Give a node another name."""
        state = self.network.state
        state.require_authority()
        await self._refuse_if_used(request.name)
        member = rename_node(state, request.name, request.new_name)
        # Told over the links that still have the old name: the node itself has to learn of it
        # before they are cut, else it would only with its next renewal.
        self.network.spread.changed()
        await self.network.spread.settled(SETTLE_S)
        self.members_changed()
        return {**await self._told(member), "old_name": request.name}

    async def uses(self, _caller: Caller, request: OfNode) -> Result:
        """Which resources of this node name another one, or itself, as a member."""
        entries = self.store.entries()
        names = [e.definition.name for e in entries if request.name in e.definition.members]
        return {"resources": names}

    async def _told(self, member: Member) -> Result:
        told, _ = await self.network.spread.settled(SETTLE_S)
        others = [m.name for m in self.network.state.membership.active() if m.name != member.name]
        own = self.network.state.node
        return {
            "node": member.name,
            "node_id": member.node_id,
            "told": [name for name in told if name in others],
            "not_told": [name for name in others if name not in told and name != own],
        }

    async def _refuse_if_used(self, name: str) -> None:
        """A resource knows its members by name, so a name that is in use stays."""
        state, context = self.network.state, self.network.context
        if state.membership.find(name) is None:
            raise NotFoundError(
                f'no node "{name[:64]}" in the network', hint='see "geomirror node list"'
            )
        used = set((await self.uses(Caller(), OfNode(name)))["resources"])
        for member in state.membership.active():
            is_target = member.name == name
            if member.name == state.node:
                continue
            if not context.links.state(member.name).is_established:
                if is_target:
                    raise RefusedError(
                        f'the node "{name}" is not connected: it could not learn its new name',
                        hint='start its daemon; see "geomirror link list"',
                    )
                continue
            used.update(await self._ask(member.name, name))
        if used:
            resource = min(used)
            raise RefusedError(
                f'the node "{name}" is a member of the resource "{resource}", which knows it by '
                "this name",
                hint=f'"geomirror resource remove-secondary {resource} {name}", rename it, then '
                f'"geomirror resource add-secondary {resource} NEW"',
            )

    async def _ask(self, peer: str, name: str) -> list[str]:
        try:
            answer = await self.network.context.links.call(peer, "node.uses", {"name": name}, ASK_S)
        except UsageError:
            raise RefusedError(
                f'the node "{peer}" runs a version that cannot say whether it uses this name',
                hint="install this version there",
            ) from None
        except GeomirrorError as error:
            raise RefusedError(
                f'the node "{peer}" does not say whether it uses this name: {error.message}',
                hint="try again",
            ) from None
        return [str(found) for found in answer.get("resources", [])]


def held_resources(store: DefinitionStore, node: str) -> list[dict[str, Any]]:
    """Resources known here of which a node is a member, and what to do about each."""
    found = []
    for entry in store.entries():
        definition = entry.definition
        if entry.state == "deleting" or node not in definition.members:
            continue
        is_primary = definition.primary == node
        others = [name for name in definition.members if name != node]
        if is_primary:
            to = others[0] if others else "NODE"
            command = f"geomirror failover {definition.name} --to {to}"
        else:
            command = f"geomirror resource remove-secondary {definition.name} {node}"
        role = "primary" if is_primary else "secondary"
        found.append({"name": definition.name, "role": role, "next": command})
    return found
