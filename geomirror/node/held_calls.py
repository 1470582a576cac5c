"""Giving up the state from before a resync, for who wants the copy made at any price."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from geomirror.errors import RefusedError
from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.replica_storage import open_engine
from geomirror.node.resource_calls import ResourceCalls
from geomirror.node.view_calls import ViewCalls
from geomirror.volume.engine import Engine

IN_PLACE_TIMEOUT_S = 60.0


class InPlace(Parameters, frozen=True):
    """`resync RES --in-place`"""

    name: str
    node: str | None = None
    is_dry_run: bool = False


@dataclass
class HeldCalls:
    """Handlers beside those of `ResourceCalls`."""

    calls: ResourceCalls
    views: ViewCalls

    def register(self, methods: MethodRegistry) -> None:
        """Add every method."""
        methods.add("resync.in_place", InPlace, self.in_place, from_peers=True)

    async def in_place(self, caller: Caller, request: InPlace) -> Result:
        """Let a resync go on without undo: the copy is Inconsistent until its end.

        :raises RefusedError: nothing is held there.
        """
        other = self.views.elsewhere(request.name, request.node)
        if other is not None:
            return await self.calls.forward(
                caller, other, "resync.in_place", request, IN_PLACE_TIMEOUT_S
            )
        host, name = self.calls.host, request.name
        status = host.get(name).status()
        resyncs = [peer["resync"] for peer in status["peers"] if peer["resync"]]
        if status["role"] != "secondary" or not resyncs:
            raise RefusedError(
                f'the copy of "{name}" at {host.context.name} holds no state from before a resync',
                hint=f"geomirror status {name}",
            )
        found = {
            "name": name,
            "node": host.context.name,
            "epoch": resyncs[0]["held_epoch"],
            "views": len(host.get(name).views.describe_all()),
            "is_dry_run": request.is_dry_run,
        }
        if request.is_dry_run:
            return found
        await self._reopen(name)
        fields = {"resource": name, "epoch": found["epoch"], "by": caller.name}
        host.context.emit("held_given_up", fields)
        return found

    async def _reopen(self, name: str) -> None:
        """Close the resource, give up what it holds, and open it again, whatever comes of that."""
        host = self.calls.host
        definition = self.calls.store.get(name).definition
        for export in host.get(name).exports():
            self.calls.disconnect(export)
        # Jobs that wait for room have the undo in their hands: nothing of them is left by this. The
        # primary would go on with a session that nobody has here; what it offers meanwhile waits.
        host.get(name).leave(RefusedError("the copy is opened again, to be made anew in place"))
        host.opening.add(name)

        def run() -> None:
            store, engine = open_engine(definition, host.context)
            try:
                _give_up(engine)
            finally:
                engine.close()
                store.close()

        try:
            await host.close(name)
            await asyncio.get_running_loop().run_in_executor(host.context.executor, run)
        finally:
            await host.open(definition)


def _give_up(engine: Engine) -> None:
    """Blocking; durable on return. Nothing happens when the resync ended meanwhile."""
    if engine.held is None:
        return
    engine.give_up_held()
    checkpoint = engine.checkpoint_job()
    assert checkpoint is not None
    checkpoint.run()
    engine.complete_checkpoint(checkpoint)
