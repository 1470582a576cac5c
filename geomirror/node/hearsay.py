"""What other members say of a resource, asked for when somebody looks at its status.

```
 primary     asks its copies   ─▶ when their last drill was        (at most every 10 s each)
 outranked   asks the other    ─▶ what that has since they parted  (each time)
```
Who does not answer within a second is not waited for; what was heard before stays.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from geomirror.environment import SECOND
from geomirror.errors import GeomirrorError
from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.definition_store import ResourceEntry
from geomirror.node.resource_calls import ResourceCalls
from geomirror.node.service import Service
from geomirror.node.status import StatusReport
from geomirror.node.tail_size import UNKNOWN_TAIL

SAY_TIMEOUT_S = 1.0
DRILLS_NS = 10 * SECOND
"""What is known of a copy's drills may be as old as this."""
METHOD = "resource.say"
_Said = TypeVar("_Said")


class Say(Parameters, frozen=True):
    """From one member to another."""

    resource_id: str
    epoch: int | None = None
    """What is there since this epoch."""


class _Since(msgspec.Struct, frozen=True):
    """As `tail_size` says it."""

    epochs: int | None
    seconds: float | None
    bytes: int | None


class _LastDrill(msgspec.Struct, frozen=True):
    """As `DrillBook.last` says it."""

    result: str
    reason: str
    started_at: str | None
    epoch: int | None
    time: str | None
    rto_seconds: float | None
    exit_code: int | None
    last_passed_at: str | None


@dataclass
class Hearsay:
    """Of one node. On the event loop."""

    calls: ResourceCalls
    status: StatusReport
    """Is told of drills."""
    _asked_ns: dict[tuple[str, str], int] = field(default_factory=dict)

    def register(self, methods: MethodRegistry) -> None:
        """Add every method."""
        methods.add(METHOD, Say, self.say, from_peers=True)

    async def say(self, caller: Caller, request: Say) -> Result:
        """What this member can say."""
        definition = self.calls.store.asked_by(caller.peer, request.resource_id)
        since: dict[str, Any] | None = None
        if request.epoch is not None:
            since = self.calls.host.get(definition.name).since(request.epoch)
        last = self.status.drills.last(definition.name, definition.resource_id)
        return {"node": self.calls.host.context.name, "last_drill": last, "since": since}

    async def ask_since(self, node: str, resource_id: str, epoch: int | None) -> dict[str, Any]:
        """What a member has since an epoch: `epochs`, `seconds`, `bytes`; null: not known."""
        if epoch is None:
            return dict(UNKNOWN_TAIL)
        try:
            if node == self.calls.host.context.name:
                found = await self.say(Caller(), Say(resource_id, epoch))
            else:
                found = await self._ask(node, {"resource_id": resource_id, "epoch": epoch})
        except GeomirrorError:
            return dict(UNKNOWN_TAIL)
        since = _checked(found.get("since"), _Since)
        return dict(UNKNOWN_TAIL) if since is None else msgspec.to_builtins(since)

    async def refresh(self, name: str | None) -> None:
        """Ask before a status is shown, of one resource or of all."""
        asking = []
        for entry in self.calls.store.entries():
            service = self.calls.host.services.get(entry.definition.name)
            if service is None or name not in (None, entry.definition.name):
                continue
            if service.is_outranked and service.history()["superseded_by"]:
                asking.append(self._hear_tail(entry, service))
            elif service.role == "primary":
                nodes = entry.definition.secondaries
                asking += [self._hear_drill(entry, node) for node in nodes]
        await asyncio.gather(*asking)

    async def _hear_tail(self, entry: ResourceEntry, service: Service) -> None:
        tail = service.tail()
        node, epoch = tail["other"]["node"], tail["branch_epoch"]
        if self.calls.is_connected(node):
            found = await self.ask_since(node, entry.definition.resource_id, epoch)
            if found != UNKNOWN_TAIL:
                service.other_since = found

    async def _hear_drill(self, entry: ResourceEntry, node: str) -> None:
        key, now_ns = (entry.definition.resource_id, node), self.calls.host.context.clock.now_ns()
        is_known = now_ns < self._asked_ns.get(key, -DRILLS_NS) + DRILLS_NS
        if is_known or not self.calls.is_connected(node):
            return
        self._asked_ns[key] = now_ns
        try:
            found = await self._ask(node, {"resource_id": entry.definition.resource_id})
        except GeomirrorError:
            return
        last = _checked(found.get("last_drill"), _LastDrill)
        if last is not None:
            self.status.heard_drills[key] = msgspec.to_builtins(last)

    async def _ask(self, node: str, parameters: dict[str, Any]) -> dict[str, Any]:
        return await self.calls.links.call(node, METHOD, parameters, SAY_TIMEOUT_S)


def _checked(raw: object, kind: type[_Said]) -> _Said | None:
    """What another node said, if it has the right shape."""
    try:
        return msgspec.convert(raw, kind)
    except (msgspec.ValidationError, ValueError):
        return None
