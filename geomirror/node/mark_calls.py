"""Methods about marks. They are made at the resource's primary; any member forwards."""

from __future__ import annotations

from dataclasses import dataclass

from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.mark_desk import MARK_S_MAX, describe_mark
from geomirror.node.resource_calls import ResourceCalls
from geomirror.node.resource_requests import Name


class MarkName(Parameters, frozen=True):
    """`mark RES NAME`"""

    name: str
    mark: str


@dataclass
class MarkCalls:
    """Handlers beside those of `ResourceCalls`."""

    calls: ResourceCalls

    def register(self, methods: MethodRegistry) -> None:
        """Add every method."""
        methods.add("mark.create", MarkName, self.create, from_peers=True)
        methods.add("mark.delete", MarkName, self.delete, from_peers=True)
        methods.add("mark.list", Name, self.list_all, from_peers=True)

    async def create(self, caller: Caller, request: MarkName) -> Result:
        """Name the state of this instant."""
        primary = self._elsewhere(request.name)
        if primary is not None:
            timeout_s = MARK_S_MAX + 10
            return await self.calls.forward(caller, primary, "mark.create", request, timeout_s)
        mark = await self.calls.host.get(request.name).marks.create(request.mark)
        return {"resource": request.name, **describe_mark(mark)}

    async def delete(self, caller: Caller, request: MarkName) -> Result:
        """Take a mark back, everywhere."""
        primary = self._elsewhere(request.name)
        if primary is not None:
            return await self.calls.forward(caller, primary, "mark.delete", request)
        mark = await self.calls.host.get(request.name).marks.delete(request.mark)
        fields = {"resource": request.name, "mark": mark.name, "by": caller.name}
        self.calls.host.context.emit("mark_deleted", fields)
        return {"resource": request.name, **describe_mark(mark)}

    async def list_all(self, _caller: Caller, request: Name) -> Result:
        """The marks as the copy here knows them."""
        self.calls.store.get(request.name)
        marks = self.calls.host.get(request.name).marks.describe()
        return {"resource": request.name, "node": self.calls.host.context.name, "marks": marks}

    def _elsewhere(self, name: str) -> str | None:
        primary = self.calls.store.get(name).definition.primary
        return None if primary == self.calls.host.context.name else primary
