"""Changes of a resource while it is in use: settings and secondaries, one version after the other.

The primary checks a change, writes it down, acts on it, and brings it to the others: whoever is
away gets it when it is back. A removed secondary forgets its part then, too.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import msgspec

from geomirror.errors import NotFoundError, RefusedError
from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.definition_store import ResourceEntry
from geomirror.node.resource_calls import ResourceCalls
from geomirror.node.resource_definition import ResourceDefinition
from geomirror.node.resource_requests import AddSecondary, RemoveSecondary, SetSettings


@dataclass
class ResourceChanges:
    """Handlers beside those of `ResourceCalls`."""

    calls: ResourceCalls

    def register(self, methods: MethodRegistry) -> None:
        """Add every method."""
        methods.add("resource.set", SetSettings, self.set, from_peers=True)
        methods.add("resource.add_secondary", AddSecondary, self.add, from_peers=True)
        methods.add("resource.remove_secondary", RemoveSecondary, self.remove, from_peers=True)

    async def set(self, caller: Caller, request: SetSettings) -> Result:
        """Change settings; flushes that wait are judged by the new ones at once, but for those that
        members rely on: these end when the members know."""
        entry = self.calls.store.get(request.name)
        if not self._is_here(entry):
            return await self._forward(caller, entry, "resource.set", request)
        settings = {**entry.definition.settings, **request.settings}
        settings = {key: value for key, value in settings.items() if value}
        definition = self._next(entry, settings=settings)
        self._install(entry, definition, is_untold=request.is_forced)
        fields = {"resource": request.name, "settings": settings, "by": caller.name}
        self.calls.host.context.emit("resource_changed", fields)
        sync = self.calls.describe(request.name).get("sync") or {}
        return {
            "name": request.name,
            "settings": settings,
            "version": definition.version,
            "waits_for": (sync.get("pending") or {}).get("waits_for", []),
        }

    async def add(self, caller: Caller, request: AddSecondary) -> Result:
        """Add a secondary; it is filled while writers go on."""
        entry = self.calls.store.get(request.name)
        if not self._is_here(entry):
            return await self._forward(caller, entry, "resource.add_secondary", request)
        node, before = request.node, entry.definition
        self.calls.check_nodes([node])
        if node in before.members:
            raise RefusedError(f'node "{node}" is a member of "{request.name}" already')
        if node in entry.leaving:
            raise RefusedError(
                f'node "{node}" still has its part of "{request.name}" from before',
                hint="start its daemon, so that it forgets it (geomirror link list)",
            )
        backings = dict(before.backings)
        if request.backings:
            backings[node] = request.backings
        definition = self._next(entry, secondaries=[*before.secondaries, node], backings=backings)
        await self.calls.check_backing_of(definition, node, request.is_forced)
        self._install(entry, definition, is_forced=request.is_forced)
        fields = {"resource": request.name, "peer": node, "by": caller.name}
        self.calls.host.context.emit("secondary_added", fields)
        return {"name": request.name, "node": node, "pending": self._pending(request.name)}

    async def remove(self, caller: Caller, request: RemoveSecondary) -> Result:
        """Remove a secondary; nothing is kept for it any more."""
        entry = self.calls.store.get(request.name)
        if not self._is_here(entry):
            return await self._forward(caller, entry, "resource.remove_secondary", request)
        node, before = request.node, entry.definition
        if node not in before.secondaries:
            raise NotFoundError(f'resource "{request.name}" has no secondary "{node}"')
        definition = self._next(
            entry,
            secondaries=[name for name in before.secondaries if name != node],
            backings={name: paths for name, paths in before.backings.items() if name != node},
            settings={k: v for k, v in before.settings.items() if k != f"ack.{node}"},
        )
        leaving = dict(entry.leaving)
        # A node that is in the network no more would never say that it has forgotten.
        if node in self.calls.known_nodes():
            leaving[node] = request.keep_data
        self._install(entry, definition, leaving=leaving)
        fields = {"resource": request.name, "peer": node, "by": caller.name}
        self.calls.host.context.emit("secondary_removed", fields)
        return {"name": request.name, "node": node, "pending": self._pending(request.name)}

    def _is_here(self, entry: ResourceEntry) -> bool:
        return entry.definition.primary == self.calls.host.context.name

    async def _forward(
        self, caller: Caller, entry: ResourceEntry, method: str, request: Parameters
    ) -> Result:
        return await self.calls.forward(caller, entry.definition.primary, method, request)

    def _next(self, entry: ResourceEntry, **changes: object) -> ResourceDefinition:
        """The definition with changes, checked."""
        version = entry.definition.version + 1
        definition = msgspec.structs.replace(entry.definition, version=version, **changes)
        definition.validate()
        return definition

    def _install(
        self,
        entry: ResourceEntry,
        definition: ResourceDefinition,
        *,
        is_untold: bool = False,
        **changes: object,
    ) -> None:
        """Durable first, then in force, then told to the others."""
        self.calls.store.put(msgspec.structs.replace(entry, definition=definition, **changes))
        # One that is not served now takes the definition when it is opened.
        with contextlib.suppress(KeyError):
            service = self.calls.host.services[definition.name]
            service.set_definition(definition, is_forced=is_untold)
        self.calls.push.changed()

    def _pending(self, name: str) -> list[str]:
        return self.calls.store.get(name).pending_peers()
