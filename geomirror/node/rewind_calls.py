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
from geomirror.volume.epoch_directory import EpochInfo
from geomirror.volume.points import At

REWIND_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 30.0
FOLLOW_S_MAX = 30.0
"""The command waits so long for the copies; they go on by themselves afterwards."""
POLL_S = 0.1


class Rewind(Parameters, frozen=True, omit_defaults=True):
    """`rewind RES --to T`"""

    name: str
    epoch: int | None = None
    wall_ns: int | None = None
    mark: str | None = None
    is_dry_run: bool = False
    is_quick: bool = False
    """Of a dry run: the rewind follows, so undo is left for it to read."""


class EndRewind(Parameters, frozen=True, omit_defaults=True):
    """`rewind commit|rollback RES`"""

    name: str
    is_dry_run: bool = False


class CheckRewind(Parameters, frozen=True, omit_defaults=True):
    """From the primary to a copy: could it go back to this epoch?"""

    resource_id: str
    epoch: int
    chain_hash: str
    tail_bytes: int = 0
    """That it would cut off, at most; 0: an older version did not say it."""


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
        service = self.calls.host.get(request.name)
        at = At(request.epoch, request.wall_ns, request.mark)
        found = self._answer(request.name, is_dry_run=request.is_dry_run)
        found["branch"] = None
        try:
            self._require_quiet(definition)
            target = service.branches.target(at)
            reads_undo = request.is_dry_run and not request.is_quick
            cut = await service.plan().cut_off(target, reads_undo=reads_undo)
            await self._require_copies(definition, target, cut["cut_off"]["bytes"])
        except GeomirrorError as error:
            if not request.is_dry_run:
                raise
            return {**found, "is_possible": False, "refusal": error_object(error)}
        wall = rfc3339(target.wall_ns) if target.wall_ns else None
        found |= {"epoch": target.number, "time": wall, **cut}
        if request.is_dry_run:
            return found
        context = self.calls.host.context
        branch = await self._while_closed(
            definition, lambda engine: rewind(engine, context, target.number)
        )
        fields = {"resource": request.name, "epoch": target.number, "by": caller.name}
        context.emit("rewound", {**fields, "branch": branch.name if branch else ""})
        found["behind"] = await self._followed(definition)
        if branch is None:
            return found
        plan = self.calls.host.get(request.name).plan()
        return {**found, "branch": branch.name, "rollback": await plan.returns(branch)}

    async def commit(self, caller: Caller, request: EndRewind) -> Result:
        """Keep what the resource is now: the branch of its last rewind is dropped."""
        definition = self.calls.store.get(request.name).definition
        if definition.primary != self._self:
            return await self._forward(caller, definition, "rewind.commit", request)
        desk = self.calls.host.get(request.name).branches
        found = self._answer(request.name, is_dry_run=request.is_dry_run)
        try:
            record = desk.rewound()
            desk.check_unseen(record.name)
        except GeomirrorError as error:
            if not request.is_dry_run:
                raise
            refusal = error_object(error)
            return {**found, "is_possible": False, "refusal": refusal, "branch": None}
        found |= {"branch": record.name, "bytes": record.raw_bytes}
        if request.is_dry_run:
            away = [n for n in definition.secondaries if not self.calls.is_connected(n)]
            return {**found, "kept_at": away}
        await desk.drop(record.name)
        fields = {"resource": request.name, "branch": record.name, "by": caller.name}
        self.calls.host.context.emit("rewind_committed", fields)
        kept_at = await self._forget_at(definition, definition.secondaries, record.name)
        return {**found, "kept_at": kept_at}

    async def roll_back(self, caller: Caller, request: EndRewind) -> Result:
        """Go back to what the last rewind cut off; what was written since becomes a branch."""
        definition = self.calls.store.get(request.name).definition
        if definition.primary != self._self:
            return await self._forward(caller, definition, "rewind.rollback", request)
        found = self._answer(request.name, is_dry_run=request.is_dry_run)
        found |= {"returned": None, "branch": None}
        try:
            record, cut = await self._plan_return(definition, reads_undo=request.is_dry_run)
        except GeomirrorError as error:
            if not request.is_dry_run:
                raise
            return {**found, "is_possible": False, "refusal": error_object(error)}
        found |= {"returned": record.name, "bytes": record.raw_bytes, "cut_off": cut}
        if request.is_dry_run:
            return found
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
        found |= {"branch": branch.name if branch else None, "behind": behind}
        return {**found, "kept_at": sorted([*behind, *kept_at])}

    async def _plan_return(
        self, definition: ResourceDefinition, *, reads_undo: bool
    ) -> tuple[BranchRecord, dict[str, Any]]:
        """What the last rewind left, and what was written since.

        :raises GeomirrorError: it cannot be taken back now.
        """
        self._require_quiet(definition)
        service = self.calls.host.get(definition.name)
        record, plan = service.branches.rewound(), service.plan()
        base = service.branches.base_of(record)
        cut = (await plan.cut_off(base, reads_undo=reads_undo))["cut_off"]
        await plan.check_return(record, cut["bytes"] or 0)
        await self._require_copies(definition, base, cut["bytes"])
        return record, cut

    def _answer(self, name: str, *, is_dry_run: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"resource": name, "node": self._self, "is_dry_run": is_dry_run}
        return {**found, "is_possible": True, "refusal": None}

    # Copies.

    async def _require_copies(
        self, definition: ResourceDefinition, target: EpochInfo, tail_bytes: int | None
    ) -> None:
        """Refuse unless every copy is there and can go back, too.

        :param tail_bytes: that each of them would make a branch of; None: not known.
        :raises RefusedError: one is away, is being made, does not keep that state, or has no room
            for the branch.
        """
        epoch, chain_hash, name = target.number, target.chain_hash.hex(), definition.name
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
            wanted = CheckRewind(definition.resource_id, epoch, chain_hash, tail_bytes or 0)
            try:
                await self._call(node, "rewind.check", wanted)
            except GeomirrorError as error:
                text = f"{node} cannot go back to epoch {epoch}: {error.message}"
                raise RefusedError(text, hint=error.hint or view) from None

    async def check(self, caller: Caller, request: CheckRewind) -> Result:
        """Whether this copy could go back. :raises RefusedError: it could not."""
        definition = self.calls.store.asked_by(caller.peer, request.resource_id)
        desk = self.calls.host.get(definition.name).branches
        chain_hash = bytes.fromhex(request.chain_hash)
        desk.check_retreat(request.epoch, chain_hash, request.tail_bytes)
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
        definition = self.calls.store.asked_by(caller.peer, request.resource_id)
        if not request.branch.startswith(REWIND_PREFIX):
            raise RefusedError(f'"{request.branch}" is no branch of a rewind')
        with contextlib.suppress(NotFoundError):
            await self.calls.host.get(definition.name).branches.drop(request.branch)
        return {"node": self._self}

    async def _call(self, node: str, method: str, request: Parameters) -> Result:
        raw = msgspec.to_builtins(request)
        return await self.calls.links.call(node, method, raw, CALL_TIMEOUT_S)

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
