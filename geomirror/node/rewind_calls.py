"""Methods that rewind a resource: they run on its primary, while nobody is connected to it.

```
 primary      every copy streams and can go back? ─▶ rewind ─▶ generation "rewound", offered to all
 secondaries  outranked by a rewind ─▶ the same tail as the same branch ─▶ follow (`rejoiner`)
```
`commit` and `rollback` let the copies forget that branch, too; where one cannot be told it stays.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from geomirror.errors import GeomirrorError, InUseError, NotFoundError, RefusedError
from geomirror.node.branch_desk import REWIND_PREFIX
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
CALL_TIMEOUT_S = 30.0
FOLLOW_S_MAX = 30.0
"""The command waits so long for the copies; they go on by themselves afterwards."""
POLL_S = 0.1


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


class CheckRewind(Parameters, frozen=True):
    """From the primary to a copy: could it go back to this epoch?"""

    resource_id: str
    epoch: int
    chain_hash: str


class ForgetRewound(Parameters, frozen=True):
    """From the primary to a copy: the operator ended the rewind that left this branch."""

    resource_id: str
    branch: str


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
        methods.add("rewind.check", CheckRewind, self.check, from_peers=True)
        methods.add("rewind.forget", ForgetRewound, self.forget, from_peers=True)

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
            await self._require_copies(definition, target.number, target.chain_hash)
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
        behind = await self._followed(definition)
        return {**found, "branch": branch.name if branch else None, "behind": behind}

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
        kept_at = await self._forget_at(definition, definition.secondaries, name)
        return {"resource": request.name, "node": self._self, "branch": name, "kept_at": kept_at}

    async def roll_back(self, caller: Caller, request: EndRewind) -> Result:
        """Go back to what the last rewind cut off; what was written since becomes a branch."""
        definition = self.calls.store.get(request.name).definition
        if definition.primary != self._self:
            return await self._forward(caller, definition, "rewind.rollback", request)
        self._require_quiet(definition)
        record = self.calls.host.get(request.name).branches.rewound()
        base_hash = bytes.fromhex(record.base_hash)
        await self._require_copies(definition, record.base_epoch, base_hash)
        context = self.calls.host.context
        branch = await self._while_closed(
            definition, lambda engine: begin_return(engine, context, record)
        )
        fields = {"resource": request.name, "branch": record.name, "by": caller.name}
        context.emit("rewind_rolled_back", fields)
        behind = await self._followed(definition)
        # Who has followed has what was in the branch.
        there = [node for node in definition.secondaries if node not in behind]
        kept_at = await self._forget_at(definition, there, record.name)
        return {
            "resource": request.name,
            "node": self._self,
            "returned": record.name,
            "branch": branch.name if branch else None,
            "behind": behind,
            "kept_at": sorted([*behind, *kept_at]),
        }

    # Copies.

    async def _require_copies(
        self, definition: ResourceDefinition, epoch: int, chain_hash: bytes
    ) -> None:
        """Refuse unless every copy is there and can go back, too.

        :raises RefusedError: one is away, is being made, or does not keep that state.
        """
        name = definition.name
        peers = {p["node"]: p for p in self.calls.host.get(name).status()["peers"]}
        view = f"geomirror view create {name} --at T --writable gives that state beside it"
        for node in definition.secondaries:
            peer = peers.get(node)
            state = peer["state"] if peer is not None else "unknown"
            if peer is None or state not in ("Stream", "Fold"):
                raise RefusedError(f'the copy of "{name}" at {node} is {state}', hint=view)
            if peer["disk_state"] not in ("UpToDate", "Consistent"):
                raise RefusedError(
                    f'the copy of "{name}" at {node} is {peer["disk_state"]}', hint=view
                )
            wanted = CheckRewind(definition.resource_id, epoch, chain_hash.hex())
            try:
                await self._call(node, "rewind.check", wanted)
            except GeomirrorError as error:
                text = f"{node} cannot go back to epoch {epoch}: {error.message}"
                raise RefusedError(text, hint=error.hint or view) from None

    async def check(self, caller: Caller, request: CheckRewind) -> Result:
        """Whether this copy could go back. :raises RefusedError: it could not."""
        definition = self._member(caller, request.resource_id)
        desk = self.calls.host.get(definition.name).branches
        desk.check_retreat(request.epoch, bytes.fromhex(request.chain_hash))
        return {"node": self._self}

    async def _followed(self, definition: ResourceDefinition) -> list[str]:
        """Wait for the copies; those that have not followed in time."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + FOLLOW_S_MAX
        while True:
            peers = self.calls.host.get(definition.name).status()["peers"]
            there = {p["node"] for p in peers if p["state"] in ("Stream", "Fold")}
            there &= {p["node"] for p in peers if p["lag"]["epochs"] == 0}
            behind = [node for node in definition.secondaries if node not in there]
            if not behind or loop.time() > give_up:
                return behind
            await asyncio.sleep(POLL_S)

    async def _forget_at(
        self, definition: ResourceDefinition, nodes: Sequence[str], branch: str
    ) -> list[str]:
        """Let copies drop the branch of a rewind; those where it stays."""
        kept: list[str] = []
        for node in nodes:
            try:
                wanted = ForgetRewound(definition.resource_id, branch)
                await self._call(node, "rewind.forget", wanted)
            except GeomirrorError:
                kept.append(node)
        return kept

    async def forget(self, caller: Caller, request: ForgetRewound) -> Result:
        """Drop what this copy has of a rewind that the operator ended."""
        definition = self._member(caller, request.resource_id)
        if not request.branch.startswith(REWIND_PREFIX):
            raise RefusedError(f'"{request.branch}" is no branch of a rewind')
        with contextlib.suppress(NotFoundError):
            await self.calls.host.get(definition.name).branches.drop(request.branch)
        return {"node": self._self}

    async def _call(self, node: str, method: str, request: Parameters) -> Result:
        raw = msgspec.to_builtins(request)
        return await self.calls.links.call(node, method, raw, CALL_TIMEOUT_S)

    def _member(self, caller: Caller, resource_id: str) -> ResourceDefinition:
        entry = self.calls.store.by_id(resource_id)
        if entry is None or entry.state == "deleting":
            raise NotFoundError("no such resource on this node")
        if caller.peer is not None and caller.peer not in entry.definition.members:
            raise RefusedError(f'node "{caller.peer}" is no member of "{entry.definition.name}"')
        return entry.definition

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

        :raises InUseError: a client is connected.
        """
        name = definition.name
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
