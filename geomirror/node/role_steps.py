"""How this node carries out the steps of a change of role: the core stopped, each job on a thread.

Deliberately not here: the steps themselves (`wan_protocol.role_change`), which the simulator takes
too; in which order roles follow each other, and for what (`replica_roles`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from geomirror.errors import GeomirrorError
from geomirror.node.context import NodeContext
from geomirror.node.replica_runner import ReplicaRunner
from geomirror.node.secondary_export import ReaderPins
from geomirror.node.verify_desk import VerifyDesk
from geomirror.volume.engine import Engine
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.role_change import Change, Steps
from geomirror.wan_protocol.secondary import Secondary

_Result = TypeVar("_Result")


class RoleSteps:
    """The part of `ReplicaRoles` that works on the engine, which nobody else does meanwhile."""

    _node: NodeContext
    _engine: Engine
    _core: Primary | Secondary
    _runner: ReplicaRunner
    verifies: VerifyDesk
    _pins: ReaderPins | None
    _is_changing: bool = False
    """Nothing is exported: a role ends."""

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
        await self.verifies.close()
        await self._runner.stop()

    async def _take(self, steps: Steps[_Result]) -> _Result:
        """Take all steps of a change, one after the other.

        :raises GeomirrorError: that was the end; what the role is by now, the superblock says.
        """
        change = Change(steps)
        job = change.next_job()
        while job is not None:
            error: GeomirrorError | None = None
            try:
                await self._execute(job)
            except GeomirrorError as failure:
                error = failure
            job = change.next_job(error)
        return change.result

    async def _execute(self, job: Any) -> None:
        await self._call(job.run)

    async def _call(self, function: Callable[[], _Result]) -> _Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._node.executor, function)
