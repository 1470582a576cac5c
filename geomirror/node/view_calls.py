"""Methods about points in time: the timeline, and views. They run on the node that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from geomirror.errors import NotFoundError, UsageError
from geomirror.limits import GIB
from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.history_report import timeline_object
from geomirror.node.resource_calls import ResourceCalls
from geomirror.node.view_host import OpenView, ViewHost
from geomirror.volume.points import At

VIEW_TIMEOUT_S = 60.0
QUOTA_BYTES_DEFAULT = 10 * GIB


class OnNode(Parameters, frozen=True):
    """A resource, on a member; None: the node that is asked."""

    name: str
    node: str | None = None


class Moment(Parameters, frozen=True):
    """One of these."""

    epoch: int | None = None
    wall_ns: int | None = None
    mark: str | None = None


class Timeline(OnNode, frozen=True):
    """`timeline`: the newest points from `first` to `last`, or those before one known already."""

    first: Moment | None = None
    last: Moment | None = None
    before_epoch: int | None = None
    count_max: int | None = None
    """Points wanted; None: as many as one answer has."""


class CreateView(Parameters, frozen=True):
    """`view create`"""

    name: str
    node: str | None = None
    epoch: int | None = None
    wall_ns: int | None = None
    mark: str | None = None
    is_writable: bool = False
    quota_bytes: int = QUOTA_BYTES_DEFAULT
    expires_s: float | None = None


class DeleteView(Parameters, frozen=True):
    """`view delete`"""

    name: str
    view: str
    node: str | None = None


@dataclass
class ViewCalls:
    """Handlers beside those of `ResourceCalls`."""

    calls: ResourceCalls
    addresses: Callable[[str, str], dict[str, str]]
    """URIs of (export, volume)."""

    def register(self, methods: MethodRegistry) -> None:
        """Add every method."""
        methods.add("resource.timeline", Timeline, self.timeline, from_peers=True)
        methods.add("view.create", CreateView, self.create, from_peers=True)
        methods.add("view.list", OnNode, self.list_all, from_peers=True)
        methods.add("view.delete", DeleteView, self.delete, from_peers=True)

    async def timeline(self, caller: Caller, request: Timeline) -> Result:
        """The points in time that can be looked at there, as many as one answer holds."""
        other = self.elsewhere(request.name, request.node)
        if other is not None:
            return await self.forward(caller, other, "resource.timeline", request)
        if request.count_max is not None and request.count_max < 0:
            raise UsageError("a number of points is not less than zero")
        host = self._host(request.name)
        first, last = request.first or Moment(), request.last or Moment()
        found = timeline_object(
            host.points(),
            self.calls.host.context.limits,
            earliest=(host.epoch_of(first.epoch, first.mark) or 0, first.wall_ns or 0),
            latest=(host.epoch_of(last.epoch, last.mark), last.wall_ns),
            before_epoch=request.before_epoch,
            count_max=request.count_max,
        )
        more = {"marks_ahead": host.marks_ahead(), "undo": host.undo_state()}
        return {"resource": request.name, "node": self._self, **found, **more}

    async def create(self, caller: Caller, request: CreateView) -> Result:
        """Make a view."""
        other = self.elsewhere(request.name, request.node)
        if other is not None:
            return await self.forward(caller, other, "view.create", request)
        if request.quota_bytes <= 0 or (request.expires_s or 1) <= 0:
            raise UsageError("a quota and an expiry are greater than zero")
        host = self._host(request.name)
        view = await host.create(
            At(request.epoch, request.wall_ns, request.mark),
            is_writable=request.is_writable,
            quota_bytes=request.quota_bytes,
            expires_s=request.expires_s,
        )
        fields = {"resource": request.name, "view": view.record.name, "by": caller.name}
        self.calls.host.context.emit("view_created", {**fields, "epoch": view.record.epoch})
        return self.described(host, view)

    async def list_all(self, caller: Caller, request: OnNode) -> Result:
        """The views of a resource there."""
        other = self.elsewhere(request.name, request.node)
        if other is not None:
            return await self.forward(caller, other, "view.list", request)
        found = self._host(request.name).describe_all()
        return {"resource": request.name, "views": [self._with_uris(each) for each in found]}

    async def delete(self, caller: Caller, request: DeleteView) -> Result:
        """End a view; what was written to it is gone."""
        other = self.elsewhere(request.name, request.node)
        if other is not None:
            return await self.forward(caller, other, "view.delete", request)
        await self._host(request.name).delete(request.view)
        fields = {"resource": request.name, "view": request.view, "by": caller.name}
        self.calls.host.context.emit("view_deleted", fields)
        return {"resource": request.name, "view": request.view, "node": self._self}

    @property
    def _self(self) -> str:
        return self.calls.host.context.name

    def _host(self, name: str) -> ViewHost:
        self.calls.store.get(name)
        return self.calls.host.get(name).views

    def elsewhere(self, name: str, node: str | None) -> str | None:
        """The other member that is meant, None for this one."""
        if node is None or node == self._self:
            return None
        members = self.calls.store.get(name).definition.members
        if node not in members:
            raise NotFoundError(
                f'node "{node}" is no member of "{name}"', hint=f"it has {', '.join(members)}"
            )
        return node

    async def forward(self, caller: Caller, node: str, method: str, request: Parameters) -> Result:
        """Let another member do it."""
        return await self.calls.forward(caller, node, method, request, VIEW_TIMEOUT_S)

    def described(self, host: ViewHost, view: OpenView) -> dict[str, Any]:
        """The view's object, with its URIs."""
        return self._with_uris(host.describe(view))

    def _with_uris(self, found: dict[str, Any]) -> dict[str, Any]:
        export = f"{found['resource']}@{found['name']}"
        volumes = [
            {"name": volume, **self.addresses(export, volume)} for volume in found["volumes"]
        ]
        return {**found, "volumes": volumes, "nbd_uri": volumes[0]["nbd_uri"]}
