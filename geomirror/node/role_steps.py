"""The steps that changes of a role are made of: stop the core, make durable, apply, write.

Deliberately not here: in which order, and for what (`replica_roles`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from geomirror.node.context import NodeContext
from geomirror.node.replica_runner import ReplicaRunner
from geomirror.node.secondary_export import ReaderPins
from geomirror.volume.engine import Engine
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.secondary import Secondary

_Result = TypeVar("_Result")


class RoleSteps:
    """The part of `ReplicaRoles` that works on the engine, which nobody else does meanwhile."""

    _node: NodeContext
    _engine: Engine
    _core: Primary | Secondary
    _runner: ReplicaRunner
    _pins: ReaderPins | None
    _is_changing: bool = False
    """Nothing is exported: a role ends."""

    async def _freeze(self, *, is_tail_kept: bool = True) -> None:
        """Stop everything that the core does and bring what is durable into the images, unless it
        is about to be rolled back."""
        await self._stop_core()
        if not is_tail_kept:
            return
        if isinstance(self._core, Primary):
            # One that was outranked may have writes that no epoch holds.
            await self._call(partial(self._engine.seal_all, self._node.clock.wall_ns()))
        await self._apply_all()

    async def _stop_core(self, *, is_urgent: bool = False) -> None:
        """:param is_urgent: what takes seconds is not waited for; the images may be in the middle
        of a pass."""
        core = self._core
        self._is_changing = True
        if self._pins is not None:
            self._pins.retire()
        core.freeze()
        if is_urgent:
            core.hurry()
        if isinstance(core, Secondary):
            core.close_session()
        await self._runner.idle()
        await self._runner.stop()

    async def _prepare_promotion(self) -> None:
        """Stop the core at its durable epoch, and do what cannot be done behind the writers."""
        engine = self._engine
        if isinstance(self._core, Primary):
            await self._freeze()
        else:
            await self._stop_core(is_urgent=True)
            await self._sync()
        if engine.held is not None:
            engine.take_held()
        elif engine.has_growth_to_apply:
            await self._apply_all()

    async def _sync(self) -> None:
        """Make durable what is committed."""
        engine = self._engine
        if engine.committed_epoch > engine.sealed_epoch:
            sync = engine.sync_job()
            await self._execute(sync)
            engine.complete_sync(sync)

    async def _apply_all(self) -> None:
        """Bring everything into the images."""
        engine = self._engine
        while engine.is_returning:
            step = engine.return_step_job()
            await self._execute(step)
            engine.complete_return_step(step)
        while True:
            await self._sync()
            await self._checkpoint()
            target = engine.half_applied_through or engine.pass_end(engine.sealed_epoch)
            if target <= engine.applied_epoch:
                return
            grow = engine.grow_job(target)
            if grow is not None:
                await self._execute(grow)
                engine.complete_grow(grow)
                continue
            apply = engine.apply_job(target)
            await self._execute(apply)
            engine.complete_apply(apply)

    async def _return(self) -> None:
        """Go back to the state from before a resync that is under way, all the way.

        :raises StorageError: open the resource again, which goes on with it.
        """
        engine = self._engine
        engine.begin_return()
        await self._checkpoint()
        await self._execute(engine.return_job())
        engine.complete_return()
        await self._checkpoint()
        self._runner.tell("returned", {"epoch": engine.applied_epoch})

    async def _execute(self, job: Any) -> None:
        await self._call(job.run)

    async def _call(self, function: Callable[[], _Result]) -> _Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._node.executor, function)

    async def _checkpoint(self) -> None:
        job = self._engine.checkpoint_job()
        if job is not None:
            await self._execute(job)
            self._engine.complete_checkpoint(job)
