"""Methods about branches. They run on the node that is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from geomirror.errors import UsageError
from geomirror.node.branch_desk import BranchDesk
from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.resource_calls import ResourceCalls
from geomirror.node.view_calls import OnNode, ViewCalls


class OfBranch(Parameters, frozen=True):
    """`branch drop`"""

    name: str
    branch: str
    node: str | None = None


class ViewBranch(Parameters, frozen=True):
    """`branch view`"""

    name: str
    branch: str
    node: str | None = None
    expires_s: float | None = None


@dataclass
class BranchCalls:
    """Handlers beside those of `ResourceCalls`."""

    calls: ResourceCalls
    views: ViewCalls

    def register(self, methods: MethodRegistry) -> None:
        """Add every method."""
        methods.add("branch.list", OnNode, self.list_all, from_peers=True)
        methods.add("branch.view", ViewBranch, self.view, from_peers=True)
        methods.add("branch.drop", OfBranch, self.drop, from_peers=True)

    async def list_all(self, caller: Caller, request: OnNode) -> Result:
        """The branches of a resource there."""
        other = self.views.elsewhere(request.name, request.node)
        if other is not None:
            return await self.views.forward(caller, other, "branch.list", request)
        found = self._desk(request.name).describe()
        return {"resource": request.name, "node": self._self, **found}

    async def view(self, caller: Caller, request: ViewBranch) -> Result:
        """Make a read-only view of the end of a branch."""
        other = self.views.elsewhere(request.name, request.node)
        if other is not None:
            return await self.views.forward(caller, other, "branch.view", request)
        if (request.expires_s or 1) <= 0:
            raise UsageError("an expiry is greater than zero")
        self._desk(request.name)
        host = self.calls.host.get(request.name).views
        view = await host.create_of_branch(request.branch, expires_s=request.expires_s)
        fields = {"resource": request.name, "view": view.record.name, "by": caller.name}
        self.calls.host.context.emit("view_created", {**fields, "branch": request.branch})
        return self.views.described(host, view)

    async def drop(self, caller: Caller, request: OfBranch) -> Result:
        """Forget a branch.

        :raises RefusedError: it is looked at, or the way back of the last rewind.
        """
        other = self.views.elsewhere(request.name, request.node)
        if other is not None:
            return await self.views.forward(caller, other, "branch.drop", request)
        desk, service = self._desk(request.name), self.calls.host.get(request.name)
        if service.role == "primary":
            desk.check_needless(request.branch)
        await desk.drop(request.branch)
        if service.is_outranked:
            service.on_outranked()  # There may be room for its tail now.
        fields = {"resource": request.name, "branch": request.branch, "by": caller.name}
        self.calls.host.context.emit("branch_dropped", fields)
        return {"resource": request.name, "branch": request.branch, "node": self._self}

    @property
    def _self(self) -> str:
        return self.calls.host.context.name

    def _desk(self, name: str) -> BranchDesk:
        self.calls.store.get(name)
        return self.calls.host.get(name).branches
