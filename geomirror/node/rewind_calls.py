"""Methods that rewind a resource: they run on its primary, while nobody is connected to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from geomirror.errors import GeomirrorError, InUseError, RefusedError
from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.error_json import error_object
from geomirror.node.replica_storage import open_engine
from geomirror.node.resource_calls import ResourceCalls
from geomirror.node.resource_definition import ResourceDefinition
from geomirror.node.rewinding import begin_return, rewind
from geomirror.node.rfc3339 import rfc3339
from geomirror.volume.branches import BranchRecord
from geomirror.volume.engine import Engine
from geomirror.volume.points import At

REWIND_TIMEOUT_S = 600.0


class Rewind(Parameters, frozen=True):
    """`rewind RES --to T`"""

    name: str
    epoch: int | None = None
    wall_ns: int | None = None
    mark: str | None = None
    is_dry_run: bool = False


class EndRewind(Parameters, frozen=True):
    """`rewind commit|rollback RES`"""

    name: str


@dataclass
class RewindCalls:
    """Handlers beside those of `ResourceCalls`."""

    calls: ResourceCalls
    connection_count: Callable[[str], int]
    """NBD clients of an export."""

    def register(self, methods: MethodRegistry) -> None:
        """Add every method."""
        methods.add("rewind.begin", Rewind, self.begin, from_peers=True)
        methods.add("rewind.commit", EndRewind, self.commit, from_peers=True)
        methods.add("rewind.rollback", EndRewind, self.roll_back, from_peers=True)

    async def begin(self, caller: Caller, request: Rewind) -> Result:
        """Go back, or say whether that is possible and what it takes out."""
        definition = self.calls.store.get(request.name).definition
        if definition.primary != self._self:
            return await self._forward(caller, definition, "rewind.begin", request)
        desk = self.calls.host.get(request.name).branches
        at = At(request.epoch, request.wall_ns, request.mark)
        found: dict[str, Any] = {"resource": request.name, "node": self._self}
        found |= {"is_dry_run": request.is_dry_run, "refusal": None, "branch": None}
        try:
            self._require_quiet(definition)
            target = desk.target(at)
        except GeomirrorError as error:
            if not request.is_dry_run:
                raise
            return {**found, "is_possible": False, "refusal": error_object(error)}
        wall = rfc3339(target.wall_ns) if target.wall_ns else None
        found |= {"is_possible": True, "epoch": target.number, "time": wall}
        found |= {"cut_off": desk.cut_off(target)}
        if request.is_dry_run:
            return found
        context = self.calls.host.context
        branch = await self._while_closed(
            definition, lambda engine: rewind(engine, context, target.number)
        )
        fields = {"resource": request.name, "epoch": target.number, "by": caller.name}
        context.emit("rewound", {**fields, "branch": branch.name if branch else ""})
        return {**found, "branch": branch.name if branch else None}

    async def commit(self, caller: Caller, request: EndRewind) -> Result:
        """Keep what the resource is now: the branch of its last rewind is dropped."""
        definition = self.calls.store.get(request.name).definition
        if definition.primary != self._self:
            return await self._forward(caller, definition, "rewind.commit", request)
        desk = self.calls.host.get(request.name).branches
        name = desk.rewound().name
        await desk.drop(name)
        fields = {"resource": request.name, "branch": name, "by": caller.name}
        self.calls.host.context.emit("rewind_committed", fields)
        return {"resource": request.name, "node": self._self, "branch": name}

    async def roll_back(self, caller: Caller, request: EndRewind) -> Result:
        """Go back to what the last rewind cut off; what was written since becomes a branch."""
        definition = self.calls.store.get(request.name).definition
        if definition.primary != self._self:
            return await self._forward(caller, definition, "rewind.rollback", request)
        self._require_quiet(definition)
        record = self.calls.host.get(request.name).branches.rewound()
        context = self.calls.host.context
        branch = await self._while_closed(
            definition, lambda engine: begin_return(engine, context, record)
        )
        fields = {"resource": request.name, "branch": record.name, "by": caller.name}
        context.emit("rewind_rolled_back", fields)
        return {
            "resource": request.name,
            "node": self._self,
            "returned": record.name,
            "branch": branch.name if branch else None,
        }

    @property
    def _self(self) -> str:
        return self.calls.host.context.name

    async def _forward(
        self, caller: Caller, definition: ResourceDefinition, method: str, request: Parameters
    ) -> Result:
        return await self.calls.forward(
            caller, definition.primary, method, request, REWIND_TIMEOUT_S
        )

    def _require_quiet(self, definition: ResourceDefinition) -> None:
        """Refuse while somebody would see volumes change under a file system.

        :raises InUseError: a client is connected. :raises RefusedError: a copy cannot follow.
        """
        name = definition.name
        if definition.secondaries:
            raise RefusedError(
                f'"{name}" has copies on other nodes, which cannot follow a rewind yet',
                hint=f"geomirror view create {name} --at T --writable gives that state beside it",
            )
        exports = [export for export in self.calls.host.exports() if "@" not in export]
        for export in exports:
            if export.partition("/")[0] == name and self.connection_count(export):
                raise InUseError(
                    f'"{name}" has clients, which would see it change under them',
                    hint=f"geomirror detach {name}, or end them, and try again",
                )

    async def _while_closed(
        self, definition: ResourceDefinition, work: Callable[[Engine], BranchRecord | None]
    ) -> BranchRecord | None:
        """Stop serving, do it, serve again; whatever happens, opening the resource ends it."""
        host = self.calls.host
        for export in host.get(definition.name).exports():
            self.calls.disconnect(export)
        await host.close(definition.name)
        loop = asyncio.get_running_loop()

        def run() -> BranchRecord | None:
            store, engine = open_engine(definition, host.context)
            try:
                return work(engine)
            finally:
                engine.close()
                store.close()

        try:
            return await loop.run_in_executor(host.context.executor, run)
        finally:
            await host.open(definition)
