"""Methods about verifies; they run at the primary, whoever asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec

from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.resource_calls import ResourceCalls
from geomirror.node.verify_desk import VerifyDesk

TIMEOUT_S = 30.0
Rate = Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]


class StartVerify(Parameters, frozen=True):
    """`verify RES`"""

    name: str
    bytes_per_second: Rate
    peer: str | None = None
    heals: bool = True


class StopVerify(Parameters, frozen=True):
    """`verify RES --stop`"""

    name: str
    peer: str | None = None


class ShowVerify(Parameters, frozen=True):
    """Where it is, and what it came to."""

    name: str


@dataclass
class VerifyCalls:
    """Handlers beside those of `ResourceCalls`."""

    calls: ResourceCalls

    def register(self, methods: MethodRegistry) -> None:
        """Add every method."""
        methods.add("verify.start", StartVerify, self.start, from_peers=True)
        methods.add("verify.stop", StopVerify, self.stop, from_peers=True)
        methods.add("verify.show", ShowVerify, self.show, from_peers=True)

    async def start(self, caller: Caller, request: StartVerify) -> Result:
        """Begin to compare; answers at once."""
        desk = self._desk_here(request.name)
        if desk is None:
            return await self._forward(caller, "verify.start", request)
        await desk.start(request.peer, request.bytes_per_second, heals=request.heals)
        return desk.describe_all()

    async def stop(self, caller: Caller, request: StopVerify) -> Result:
        """End what runs."""
        desk = self._desk_here(request.name)
        if desk is None:
            return await self._forward(caller, "verify.stop", request)
        await desk.stop(request.peer)
        return desk.describe_all()

    async def show(self, caller: Caller, request: ShowVerify) -> Result:
        """All peers."""
        desk = self._desk_here(request.name)
        if desk is None:
            return await self._forward(caller, "verify.show", request)
        return desk.describe_all()

    def _desk_here(self, name: str) -> VerifyDesk | None:
        definition = self.calls.store.get(name).definition
        if definition.primary != self.calls.host.context.name:
            return None
        return self.calls.host.get(name).verifies

    async def _forward(
        self, caller: Caller, method: str, request: StartVerify | StopVerify | ShowVerify
    ) -> Result:
        primary = self.calls.store.get(request.name).definition.primary
        return await self.calls.forward(caller, primary, method, request, TIMEOUT_S)
