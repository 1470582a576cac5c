"""Commands that change who is the primary, and what members ask of each other for them.

```
 failover    any member ─ask all─▶ verdict ─▶ `promotion.take` at the heir
 switchover  any member ─▶ the primary: drain, become a secondary ─▶ `promotion.take` at the heir
```
The heir's superblock is the commit point; the definition that names it follows, and is brought to
the others as any change of it. A node that finds itself primary by its superblock and not by its
definition (it stopped in between) makes the definition then.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from geomirror.errors import (
    GeomirrorError,
    NotFoundError,
    NotPrimaryError,
    RefusedError,
    StorageError,
    UnreachableError,
)
from geomirror.limits import MIB
from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.definition_store import ResourceEntry
from geomirror.node.failover_calls import Assess, FailoverCalls
from geomirror.node.resource_calls import ResourceCalls
from geomirror.node.resource_definition import ResourceDefinition
from geomirror.node.service import Service
from geomirror.node.volume_changes import with_volumes
from geomirror.volume.superblock import GenerationRecord

DRAIN_TIMEOUT_S = 60.0
"""An heir that does not catch up in this time keeps the primary where it is."""
_USABLE = ("UpToDate", "Consistent")
TAKE_TIMEOUT_S = 30.0
"""A promotion takes well under a second, unless much that is durable has to be applied first."""


class Switchover(Parameters, frozen=True):
    """`switchover`"""

    name: str
    to: str
    timeout_s: float = DRAIN_TIMEOUT_S
    is_dry_run: bool = False


class Demote(Parameters, frozen=True):
    """`demote`"""

    name: str
    timeout_s: float = DRAIN_TIMEOUT_S
    is_dry_run: bool = False


class Take(Parameters, frozen=True):
    """From a member to the heir."""

    resource_id: str
    reason: str
    generation: str = ""
    """With a hand over: the position at which the primary stopped."""
    epoch: int = 0


@dataclass
class PromotionCalls:
    """Handlers beside those of `ResourceCalls` and `FailoverCalls`."""

    calls: ResourceCalls
    failover: FailoverCalls

    def register(self, methods: MethodRegistry) -> None:
        """Add every method."""
        methods.add("promotion.failover", Assess, self.fail_over)
        methods.add("promotion.switchover", Switchover, self.switch_over, from_peers=True)
        methods.add("promotion.demote", Demote, self.demote, from_peers=True)
        methods.add("promotion.take", Take, self.take, from_peers=True)

    @property
    def _self(self) -> str:
        return self.calls.host.context.name

    # Commands.

    async def fail_over(self, caller: Caller, request: Assess) -> Result:
        """Promote a copy without its primary.

        :raises RefusedError: the copy cannot be promoted, or a primary answers; unless the copy is
            here and refuses it because it has lost epochs that are here.
        """
        found = await self.failover.assess(caller, request)
        writers = [m["node"] for m in found["members"] if m["role"] == "primary"]
        writers = [m for m in writers if m != request.to and self._answers(found, m)]
        if request.to == self._self:
            refused = self.calls.host.get(request.name).put_back_primary
            writers = [m for m in writers if m != refused]
        if found["refusal"]:
            raise RefusedError(found["refusal"]["message"], hint=found["refusal"]["hint"])
        if writers:
            hint = f"geomirror switchover {request.name} --to {request.to} loses nothing"
            if found["primary"]["is_put_back"]:
                hint = f"its disk was put back to an older state: give the command at {request.to}"
            raise RefusedError(
                f'"{writers[0]}" is the primary of "{request.name}" and answers', hint=hint
            )
        definition = self.calls.store.get(request.name).definition
        taken = await self._take_at(request.to, Take(definition.resource_id, "forced"))
        return {**found, **taken, "is_dry_run": False}

    def _answers(self, found: dict[str, Any], node: str) -> bool:
        return any(m["node"] == node and m["is_reachable"] for m in found["members"])

    async def switch_over(self, caller: Caller, request: Switchover) -> Result:
        """Hand the primary's role over to a secondary; nothing is lost."""
        definition = self._definition(request.name, request.to)
        if definition.primary != self._self:
            return await self._forward(caller, definition, "promotion.switchover", request)
        service = self.calls.host.get(request.name)
        behind = self._behind(service, request.to)
        if request.is_dry_run:
            return {"name": request.name, "to": request.to, "is_dry_run": True, **behind}
        if behind["refusal"]:
            text = f'{request.to} cannot take over "{request.name}": {behind["refusal"]}'
            raise RefusedError(text, hint=f"geomirror status {request.name}")
        position = await service.hand_over([request.to], request.timeout_s)
        self._disconnect(definition)
        wanted = Take(definition.resource_id, "promoted", position["generation"], position["epoch"])
        try:
            taken = await self._take_at(request.to, wanted)
        except (RefusedError, StorageError) as error:
            # It said no, so nobody is the primary: go on here, by a generation of its own.
            await self.take_here(definition, "promoted")
            raise RefusedError(
                f'"{request.name}" stays at {self._self}: {error.message}', hint=error.hint
            ) from None
        except GeomirrorError as error:
            raise UnreachableError(
                f'"{request.name}" is a secondary at {self._self} now, and {request.to} has not '
                f"answered whether it took over: {error.message}",
                hint=f"geomirror status {request.name} at {request.to}; if it is no primary there: "
                f"geomirror failover {request.name} --to {request.to}",
            ) from None
        return {"name": request.name, "to": request.to, "is_dry_run": False, **behind, **taken}

    def _behind(self, service: Service, to: str) -> dict[str, Any]:
        """How far the heir is behind, from the primary's status; why it cannot be the heir."""
        status = service.status()
        peer = next((p for p in status["peers"] if p["node"] == to), None)
        refusal = self._cannot_leave(status)
        if to == self._self:
            refusal = f'it is the primary of "{status["name"]}" already'
        elif not refusal and (peer is None or peer["state"] not in ("Stream", "Fold")):
            state = peer["state"] if peer else "unknown"
            refusal = f"{to} is {state}, and has to stream"
        elif not refusal and peer is not None and peer["disk_state"] not in _USABLE:
            refusal = f"the copy at {to} is {peer['disk_state']}"
        return {
            "refusal": refusal,
            "is_possible": not refusal,
            "lag": peer["lag"] if peer else None,
            "from": self._self,
        }

    def _cannot_leave(self, status: dict[str, Any]) -> str:
        """Why this node cannot stop being the primary now, whoever follows; "" when it can."""
        if status["role"] != "primary" or status["reason"]:
            return str(status["reason"] or f"{self._self} is a secondary")
        behind = status["behind"]
        if behind is None or behind["kind"] != "return":
            return ""
        # It would be nobody's for as long as that takes.
        return (
            f"{self._self} is still going back to epoch {behind['epoch']}, "
            f"{behind['bytes_left'] / MIB:.1f} MiB are left"
        )

    async def demote(self, caller: Caller, request: Demote) -> Result:
        """Make the primary a secondary; nobody is the primary then until one is promoted."""
        definition = self.calls.store.get(request.name).definition
        if definition.primary != self._self:
            return await self._forward(caller, definition, "promotion.demote", request)
        service = self.calls.host.get(request.name)
        status = service.status()
        peers = [p for p in status["peers"] if p["state"] in ("Stream", "Fold")]
        peers = [p for p in peers if p["disk_state"] in _USABLE]
        heirs = [p["node"] for p in peers]
        refusal = self._cannot_leave(status)
        if not refusal and not heirs:
            refusal = "no copy is streaming: what is here would be nowhere else"
        found: Result = {"name": request.name, "node": self._self, "heirs": heirs}
        found |= {"is_dry_run": request.is_dry_run, "is_possible": not refusal, "refusal": refusal}
        if request.is_dry_run:
            return {**found, "lag": {p["node"]: p["lag"] for p in peers}}
        if refusal:
            text = f'"{request.name}" stays at {self._self}: {refusal}'
            raise RefusedError(text, hint=f"geomirror status {request.name}")
        position = await service.hand_over(heirs, request.timeout_s)
        self._disconnect(definition)
        return {**found, "epoch": position["epoch"]}

    # What the heir does.

    async def take(self, caller: Caller, request: Take) -> Result:
        """Become the primary. :raises RefusedError: this copy is not what the caller thinks."""
        definition = self.calls.store.asked_by(caller.peer, request.resource_id)
        service = self.calls.host.get(definition.name)
        if request.generation:
            answer = await service.answer()
            have, wanted = (answer.generation, answer.epoch), (request.generation, request.epoch)
            if have != wanted:
                raise RefusedError(
                    f'"{definition.name}" is at epoch {have[1]} of {have[0][:8]} at {self._self}, '
                    f"epoch {wanted[1]} of {wanted[0][:8]} was handed over"
                )
        return await self.take_here(definition, request.reason)

    async def take_here(self, definition: ResourceDefinition, reason: str) -> Result:
        """Become the primary of a new generation, by whatever role this member has.

        :raises GeomirrorError: it is what it was.
        """
        service, name = self.calls.host.get(definition.name), definition.name
        try:
            generation = await service.promote(reason, partial(self._install, name))
        except StorageError:
            # The superblock has the role that counts: read it.
            await self.calls.host.close(name)
            await self.calls.host.open(self.calls.store.get(name).definition)
            raise
        self._disconnect(definition)
        self.calls.push.changed()
        volumes = self.calls.describe(name)["volumes"]
        return {
            "primary_now": self._self,
            "generation": generation.identity,
            "token": generation.token,
            "epoch": generation.parent_epoch,
            "nbd_uri": volumes[0]["nbd_uri"],
        }

    def _install(self, name: str, generation: GenerationRecord) -> ResourceDefinition:
        entry = self.calls.store.get(name)
        definition = entry.definition.with_primary(self._self, generation.token)
        # What it never had of volumes that grew, or were added, is not there any more.
        definition = with_volumes(definition, self.calls.host.get(name).volumes()) or definition
        self.calls.store.put(ResourceEntry(definition, "active"))
        return definition

    def started(self, service: Service) -> None:
        """A resource is served: its definition follows its superblock."""
        definition = service.definition
        token = service.primary_token
        if token is not None and definition.primary != self._self:
            changed = definition.with_primary(self._self, token)
            self.calls.store.put(ResourceEntry(changed, "active"))
            service.set_definition(changed)

    # The rest.

    def _definition(self, name: str, member: str) -> ResourceDefinition:
        definition = self.calls.store.get(name).definition
        if member not in definition.members:
            raise NotFoundError(
                f'node "{member}" has no copy of "{name}"',
                hint=f"members are {', '.join(definition.members)}",
            )
        return definition

    async def _forward(
        self,
        caller: Caller,
        definition: ResourceDefinition,
        method: str,
        request: Switchover | Demote,
    ) -> Result:
        timeout_s = request.timeout_s + TAKE_TIMEOUT_S
        if not self.calls.is_connected(definition.primary):
            raise NotPrimaryError(
                f'no link to {definition.primary}, the primary of "{definition.name}"',
                hint=f"geomirror failover {definition.name} --to NODE --dry-run",
            )
        return await self.calls.forward(caller, definition.primary, method, request, timeout_s)

    async def _take_at(self, node: str, request: Take) -> Result:
        if node == self._self:
            return await self.take(Caller(), request)
        parameters = msgspec.to_builtins(request)
        return await self.calls.links.call(node, "promotion.take", parameters, TAKE_TIMEOUT_S)

    def _disconnect(self, definition: ResourceDefinition) -> None:
        for volume in definition.volumes:
            self.calls.disconnect(f"{definition.name}/{volume.name}")
