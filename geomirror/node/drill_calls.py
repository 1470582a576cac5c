"""Methods about drills. The check itself is run by the command, never by a daemon."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from geomirror.errors import GeomirrorError, RefusedError, UnreachableError, UsageError
from geomirror.node import drill_book as book
from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.drill_book import Drill, DrillBook
from geomirror.node.resource_calls import ResourceCalls
from geomirror.node.view_calls import VIEW_TIMEOUT_S, CreateView, OnNode, ViewCalls

SETUP_S = 600.0
"""How much longer than its check a drill's view lives: mounting, and saying what came of it."""
CHECK_S_MAX = 7 * 86400.0
Check = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
Words = Annotated[str, msgspec.Meta(max_length=1000)]
Output = Annotated[str, msgspec.Meta(max_length=2048)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class BeginDrill(Parameters, frozen=True):
    """The first half of `drill`: a view to try."""

    name: str
    check: Check
    timeout_s: float
    quota_bytes: int
    node: str | None = None
    epoch: int | None = None
    wall_ns: int | None = None
    mark: str | None = None


class EndDrill(Parameters, frozen=True):
    """The second half: what came of it. The view goes."""

    name: str
    number: int
    result: str
    node: str | None = None
    reason: Words = ""
    exit_code: int | None = None
    seconds: Seconds | None = None
    rto_seconds: Seconds | None = None
    mount_seconds: Seconds | None = None
    file_system: Words | None = None
    mount_reason: Words = ""
    output: Output = ""


_SAID = ("result", "reason", "exit_code", "seconds", "rto_seconds", "mount_seconds")
_SEEN = ("file_system", "mount_reason", "output")


@dataclass
class DrillCalls:
    """Handlers beside those of `ViewCalls`."""

    calls: ResourceCalls
    views: ViewCalls
    book: DrillBook

    def register(self, methods: MethodRegistry) -> None:
        """Add every method."""
        methods.add("drill.begin", BeginDrill, self.begin, from_peers=True)
        methods.add("drill.end", EndDrill, self.end, from_peers=True)
        methods.add("drill.list", OnNode, self.list_all, from_peers=True)

    async def begin(self, caller: Caller, request: BeginDrill) -> Result:
        """Make a view, and note that a drill has begun. A view that cannot be made fails it."""
        other = self.views.elsewhere(request.name, request.node)
        if other is not None:
            return await self._forward(caller, other, "drill.begin", request)
        if not 0 < request.timeout_s <= CHECK_S_MAX:
            raise UsageError(f"a check takes at most {CHECK_S_MAX:g} s, and more than none")
        name, resource_id = request.name, self._id(request.name)
        expires_s = request.timeout_s + SETUP_S
        runs_on = caller.peer or self._self
        await self._give_up(name, resource_id, runs_on)
        drill = await self.book.begin(
            name, resource_id, check=request.check, runs_on=runs_on, expires_s=expires_s
        )
        try:
            view = await self.views.create(caller, _view(request, expires_s))
        except GeomirrorError as error:
            drill.result, drill.reason = book.ERROR, str(error)[:1000]
            await self._ended(name, resource_id, drill)
            raise
        drill.view, drill.epoch = view["name"], view["epoch"]
        drill.wall_ns = self.calls.host.get(name).views.wall_ns_of(drill.view)
        await self.book.save(name, resource_id)
        return {"number": drill.number, "node": self._self, "view": view}

    async def end(self, caller: Caller, request: EndDrill) -> Result:
        """Note what a drill came to.

        :raises NotFoundError, RefusedError: there is no such drill, or it is over already.
        :raises UnreachableError: not yet.
        """
        other = self.views.elsewhere(request.name, request.node)
        if other is not None:
            return await self._forward(caller, other, "drill.end", request)
        if request.result not in book.OUTCOMES:
            raise UsageError(f'"{request.result}" is no result of a drill')
        name, resource_id = request.name, self._id(request.name)
        drill = self.book.find(name, resource_id, request.number)
        if drill.result != book.RUNNING and (drill.result, drill.reason) == _told(request):
            return {"name": name, "drill": self.book.describe(drill)}  # The answer was lost.
        if drill.result != book.RUNNING:
            raise RefusedError(f'drill {request.number} of "{name}" was given up: {drill.reason}')
        if name in self.calls.host.opening:
            raise UnreachableError(f'"{name}" is being opened, and the view of the drill with it')
        for key in (*_SAID, *_SEEN):
            setattr(drill, key, getattr(request, key))
        await self._ended(name, resource_id, drill)
        return {"name": name, "drill": self.book.describe(drill)}

    async def list_all(self, caller: Caller, request: OnNode) -> Result:
        """The drills of a copy, oldest first."""
        other = self.views.elsewhere(request.name, request.node)
        if other is not None:
            return await self._forward(caller, other, "drill.list", request)
        resource_id = self._id(request.name)
        drills = self.book.list_all(request.name, resource_id)
        return {"name": request.name, "node": self._self, "drills": drills}

    async def _give_up(self, name: str, resource_id: str, runs_on: str) -> None:
        """A node runs one drill of a resource at a time, so others that it began were killed."""
        for drill in self.book.running(name, resource_id):
            if drill.runs_on == runs_on:
                drill.result, drill.reason = book.INTERRUPTED, book.LOST
                await self._ended(name, resource_id, drill)

    async def _ended(self, name: str, resource_id: str, drill: Drill) -> None:
        await self.book.end(name, resource_id, drill)
        fields: dict[str, Any] = {"resource": name, "drill": drill.number, "result": drill.result}
        if drill.reason:
            fields["reason"] = drill.reason
        self.calls.host.context.emit("drill_ended", fields)
        if drill.view:
            # Expired, deleted by hand, or not served now: then it expires.
            with contextlib.suppress(GeomirrorError):
                await self.calls.host.get(name).views.delete(drill.view)

    @property
    def _self(self) -> str:
        return self.calls.host.context.name

    def _id(self, name: str) -> str:
        return self.calls.store.get(name).definition.resource_id

    async def _forward(self, caller: Caller, node: str, method: str, request: Parameters) -> Result:
        return await self.calls.forward(caller, node, method, request, VIEW_TIMEOUT_S)


def _told(request: EndDrill) -> tuple[str, str]:
    return request.result, request.reason


def _view(request: BeginDrill, expires_s: float) -> CreateView:
    return CreateView(
        name=request.name,
        epoch=request.epoch,
        wall_ns=request.wall_ns,
        mark=request.mark,
        is_writable=True,
        quota_bytes=request.quota_bytes,
        expires_s=expires_s,
    )
