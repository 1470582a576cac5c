"""Methods about resources. A method runs on the resource's primary; any member forwards to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from geomirror.errors import (
    GeomirrorError,
    NotFoundError,
    NotPrimaryError,
    RefusedError,
    StorageError,
    SupersededError,
    UsageError,
)
from geomirror.node.backing_check import backing_size, check_backing, zero_backing
from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.definition_push import Calls, DefinitionPush
from geomirror.node.definition_store import DefinitionStore, ResourceEntry
from geomirror.node.resource_definition import ResourceDefinition, VolumeDefinition
from geomirror.node.resource_host import ResourceHost
from geomirror.node.resource_requests import (
    CheckBacking,
    Create,
    Define,
    Delete,
    Forget,
    ForPeer,
    Name,
    Wait,
)

CREATE_TIMEOUT_S = 60.0
"""Answer of a primary on another node: it zeroes two journal segments first."""
CHECK_TIMEOUT_S = 5.0


@dataclass
class ResourceCalls:
    """Handlers; the node's parts that they act on are given once."""

    host: ResourceHost
    store: DefinitionStore
    push: DefinitionPush
    links: Calls
    known_nodes: Callable[[], Iterable[str]]
    is_connected: Callable[[str], bool]
    describe: Callable[[str], dict[str, Any]]
    """Status object of a resource, with its URIs."""
    disconnect: Callable[[str], object]
    """End the NBD connections of an export."""

    def register(self, methods: MethodRegistry) -> None:
        """Add every method."""
        methods.add("resource.create", Create, self.create, from_peers=True)
        methods.add("resource.check_backing", CheckBacking, self.check, from_peers=True)
        methods.add("resource.define", Define, self.define, from_peers=True)
        methods.add("resource.forget", Forget, self.forget, from_peers=True)
        methods.add("resource.delete", Delete, self.delete, from_peers=True)
        methods.add("resource.list", Parameters, self.list)
        methods.add("resource.show", Name, self.show)
        methods.add("resource.pause", ForPeer, self.pause, from_peers=True)
        methods.add("resource.resume", ForPeer, self.resume, from_peers=True)
        methods.add("resource.wait", Wait, self.wait, from_peers=True)

    @property
    def _self(self) -> str:
        return self.host.context.name

    async def create(self, caller: Caller, request: Create) -> Result:
        """Make a resource; answers when the primary serves it."""
        if request.primary != self._self:
            return await self.forward(caller, request.primary, "resource.create", request)
        self.check_nodes([request.primary, *request.secondaries])
        if self.store.find(request.name) is not None:
            raise RefusedError(f'resource "{request.name}" exists already')
        definition = await self._define_new(request)
        definition.validate()
        await self._check_backings(definition, request.is_forced)
        entry = await self._make(definition, request.is_forced)
        self.push.changed()
        self.host.context.emit("resource_created", {"resource": request.name, "by": caller.name})
        return {"resource": self.describe(request.name), "pending": entry.pending_peers()}

    async def check(self, _caller: Caller, request: CheckBacking) -> Result:
        """Whether this node's backings could take a resource."""
        for volume, path in request.paths.items():
            await asyncio.to_thread(
                check_backing,
                path,
                request.sizes.get(volume, 0),
                is_adopted=False,
                is_forced=request.is_forced,
            )
        return {}

    async def define(self, caller: Caller, request: Define) -> Result:
        """Take over a definition from its primary; a new one makes the resource here."""
        definition = request.definition
        definition.validate()
        if caller.peer is not None and caller.peer != definition.primary:
            raise RefusedError(f'definition of "{definition.name}" from {caller.peer}, no primary')
        if self._self not in definition.secondaries:
            raise RefusedError(f'node "{self._self}" is no member of "{definition.name}"')
        known = self.store.by_id(definition.resource_id)
        if known is None:
            await self._take_new(definition, request.is_forced)
        elif definition.primary not in known.definition.members:
            raise RefusedError(f'"{definition.primary}" is no member of "{definition.name}" here')
        elif definition.version < known.definition.version and (
            definition.primary != known.definition.primary
        ):
            raise SupersededError(
                f'"{known.definition.primary}" is the primary of "{definition.name}" by now',
                hint=f"geomirror status {definition.name}",
            )
        elif definition.version > known.definition.version:
            known.definition = definition
            self.store.put(known)
            if definition.name in self.host.services:
                self.host.services[definition.name].set_definition(definition)
        self.host.get(definition.name)  # raises why it is not served
        return {"version": definition.version}

    async def forget(self, caller: Caller, request: Forget) -> Result:
        """Delete this node's part of a resource that its primary has deleted."""
        entry = self.store.by_id(request.resource_id)
        if entry is None:
            return {}
        if caller.peer is not None and caller.peer != entry.definition.primary:
            raise NotPrimaryError(f'"{entry.definition.name}" can only be deleted by its primary')
        kept = await self.remove_local(entry, keep_data=request.keep_data)
        self.store.remove(request.resource_id)
        self.host.context.emit("resource_deleted", {"resource": request.name, "kept": kept})
        return {"kept": kept}

    async def delete(self, caller: Caller, request: Delete) -> Result:
        """Delete a resource everywhere; members that are away forget it when they are back."""
        entry = self.store.get(request.name)
        if entry.definition.primary != self._self:
            primary = entry.definition.primary
            return await self.forward(caller, primary, "resource.delete", request)
        if request.name in self.host.opening:
            self.host.get(request.name)
        if request.keep_data:
            self._disconnect_all(entry)
            await self.host.destage(entry.definition)
        entry.state, entry.keep_data = "deleting", request.keep_data
        self.store.put(entry)
        kept = await self.remove_local(entry, keep_data=request.keep_data)
        self.push.members_changed(set(self.known_nodes()))
        pending = entry.pending_peers()
        if not pending:
            self.store.remove(entry.definition.resource_id)
        self.push.changed()
        fields = {"resource": request.name, "by": caller.name, "kept": kept}
        self.host.context.emit("resource_deleted", fields)
        return {"name": request.name, "kept": kept, "pending": pending}

    async def remove_local(self, entry: ResourceEntry, *, keep_data: bool) -> list[str]:
        """Stop a resource and remove its state here; paths of images that stay."""
        definition = entry.definition
        self._disconnect_all(entry)
        await self.host.close(definition.name)
        kept = list(definition.backings.get(self._self, {}).values())
        if keep_data:
            kept += await self.host.keep_images(definition.name)
        await self.host.remove_state(definition.name)
        return kept

    async def list(self, _caller: Caller, _request: Parameters) -> Result:
        """Every resource of which this node is a member."""
        found = []
        for entry in self.store.entries():
            definition = entry.definition
            found.append(
                {
                    "name": definition.name,
                    "resource_id": definition.resource_id,
                    "primary": definition.primary,
                    "secondaries": definition.secondaries,
                    "size_bytes": definition.size_bytes,
                    "state": "deleting" if entry.state == "deleting" else "active",
                    "pending": entry.pending_peers() if definition.primary == self._self else [],
                }
            )
        return {"resources": found}

    async def show(self, _caller: Caller, request: Name) -> Result:
        """The definition of a resource, and its status here."""
        entry = self.store.get(request.name)
        definition = msgspec.to_builtins(entry.definition)
        return {"definition": definition, "status": self.describe(request.name)}

    async def pause(self, caller: Caller, request: ForPeer) -> Result:
        """Hold replication back, to one peer or all; writers do not notice."""
        return await self._pause(caller, request, "resource.pause")

    async def resume(self, caller: Caller, request: ForPeer) -> Result:
        """Go on where `pause` stopped."""
        return await self._pause(caller, request, "resource.resume")

    async def wait(self, caller: Caller, request: Wait) -> Result:
        """Answer when every peer has all that is completed now."""
        entry = self.store.get(request.name)
        primary = entry.definition.primary
        if primary != self._self:
            timeout_s = request.timeout_s + CHECK_TIMEOUT_S
            return await self.forward(caller, primary, "resource.wait", request, timeout_s)
        service = self.host.get(request.name)
        await service.wait(request.kind, request.timeout_s)
        return {"name": request.name, "position": service.position()}

    def _disconnect_all(self, entry: ResourceEntry) -> None:
        for volume in entry.definition.volumes:
            self.disconnect(f"{entry.definition.name}/{volume.name}")

    async def _pause(self, caller: Caller, request: ForPeer, method: str) -> Result:
        definition = self.store.get(request.name).definition
        if definition.primary != self._self:
            return await self.forward(caller, definition.primary, method, request)
        if request.peer is not None and request.peer not in definition.secondaries:
            raise NotFoundError(f'resource "{request.name}" has no secondary "{request.peer}"')
        service = self.host.get(request.name)
        is_pause = method == "resource.pause"
        (service.pause if is_pause else service.resume)(request.peer)
        kind = "replication_paused" if is_pause else "replication_resumed"
        fields = {"resource": request.name, "peer": request.peer, "by": caller.name}
        self.host.context.emit(kind, fields)
        return {"name": request.name, "peer": request.peer, "is_paused": is_pause}

    async def _take_new(self, definition: ResourceDefinition, is_forced: bool) -> None:
        if self.store.find(definition.name) is not None:
            raise RefusedError(f'node "{self._self}" has another resource "{definition.name}"')
        await self._check_own_backings(definition, is_forced)
        await self._make(definition, is_forced)
        self.host.context.emit("resource_defined", {"resource": definition.name})

    async def _make(self, definition: ResourceDefinition, is_forced: bool) -> ResourceEntry:
        """Make and serve this node's part of a resource; a failure leaves nothing of it."""
        self.store.put(ResourceEntry(definition, "creating", is_forced=is_forced))
        try:
            if is_forced:
                await self._zero_forced(definition)
            await self.host.create(definition)
            entry = ResourceEntry(definition, "active", is_forced=is_forced)
            try:
                self.store.put(entry)
            except StorageError:
                await self.host.close(definition.name)
                await self.host.remove_state(definition.name)
                raise
        except BaseException:
            # Also when the caller gave up: an entry that is never served must not stay. One that
            # is left on a full disk, still `creating`, is undone at the next start.
            with contextlib.suppress(StorageError):
                self.store.remove(definition.resource_id)
            raise
        return entry

    async def _define_new(self, request: Create) -> ResourceDefinition:
        if request.adopt not in (None, request.primary):
            raise UsageError(
                f"--adopt {request.adopt}: only the primary's content can be adopted",
                hint=f"make {request.adopt} the primary",
            )
        for node in request.backings:
            if node not in (request.primary, *request.secondaries):
                raise UsageError(f'--backing {node}: "{node}" is no member of the resource')
        own = request.backings.get(request.primary, {})
        if request.adopt is not None and not own:
            raise UsageError("--adopt needs --backing for the same node")
        sizes = request.sizes or [await self._size_of_backing(own)]
        context = self.host.context
        return ResourceDefinition(
            name=request.name,
            resource_id=context.entropy.token_bytes(16).hex(),
            version=1,
            primary=request.primary,
            secondaries=list(request.secondaries),
            volumes=[VolumeDefinition(i, str(i), size) for i, size in enumerate(sizes)],
            backings=request.backings,
            adopt=request.adopt,
            journal_bytes=self._journal_bytes(request.journal_bytes),
            settings=request.settings,
        )

    async def _size_of_backing(self, own: dict[str, str]) -> int:
        path = own.get("0")
        size = await asyncio.to_thread(backing_size, path) if path else None
        if not size:
            raise UsageError("the size is not known", hint="give --size, for example --size 10G")
        return size

    def _journal_bytes(self, wanted: int | None) -> int | None:
        limits = self.host.context.limits
        if wanted is None:
            return None
        if wanted < limits.journal_bytes_min:
            raise UsageError(f"--journal-size: at least {limits.journal_bytes_min} bytes")
        return wanted - wanted % limits.segment_bytes

    async def _check_backings(self, definition: ResourceDefinition, is_forced: bool) -> None:
        await self._check_own_backings(definition, is_forced)
        for node in definition.secondaries:
            await self.check_backing_of(definition, node, is_forced)

    async def check_backing_of(
        self, definition: ResourceDefinition, node: str, is_forced: bool
    ) -> None:
        """Ask a secondary whether its backings would do; one that is away is not asked."""
        paths = definition.backings.get(node, {})
        if not paths or not self.is_connected(node):
            return
        sizes = {volume.name: volume.size_bytes for volume in definition.volumes}
        parameters = {"paths": paths, "sizes": sizes, "is_forced": is_forced}
        try:
            await self.links.call(node, "resource.check_backing", parameters, CHECK_TIMEOUT_S)
        except GeomirrorError as error:
            raise type(error)(f'node "{node}": {error.message}', hint=error.hint) from None

    async def _check_own_backings(self, definition: ResourceDefinition, is_forced: bool) -> None:
        volumes = {volume.name: volume.size_bytes for volume in definition.volumes}
        for name, path in definition.backings.get(self._self, {}).items():
            if name not in volumes:
                raise UsageError(f"--backing {self._self}/{name}: no such volume")
            await asyncio.to_thread(
                check_backing,
                path,
                volumes[name],
                is_adopted=definition.adopt == self._self,
                is_forced=is_forced,
            )

    async def _zero_forced(self, definition: ResourceDefinition) -> None:
        if definition.adopt == self._self:
            return
        for path in definition.backings.get(self._self, {}).values():
            await asyncio.to_thread(zero_backing, path)

    def check_nodes(self, names: Iterable[str]) -> None:
        """:raises NotFoundError: a name that no node of the network has."""
        known = set(self.known_nodes())
        for name in names:
            if name not in known:
                raise NotFoundError(
                    f'no node "{name}" in this network', hint='see "geomirror node list"'
                )

    async def forward(
        self,
        caller: Caller,
        owner: str,
        method: str,
        request: Parameters,
        timeout_s: float = CREATE_TIMEOUT_S,
    ) -> Result:
        """Let the primary do it. :raises NotPrimaryError: a peer asked this node for it."""
        # One hop only: a peer that asks the wrong node has an old view, and is told so.
        if caller.peer is not None:
            raise NotPrimaryError(f'node "{self._self}" is not the primary, "{owner}" is')
        self.check_nodes([owner])
        return await self.links.call(owner, method, msgspec.to_builtins(request), timeout_s)
