"""What a rewind, and its return, would take out of the volumes, before anything is closed.

Everything that the primary would refuse later is found here: no room for the branch, undo that is
damaged or leads through too many blocks, a branch that could not be taken back.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from geomirror.errors import GeomirrorError
from geomirror.node.branch_desk import BranchDesk
from geomirror.node.branch_intake import (
    check_return,
    one_epoch_bytes_max,
    return_bytes_max,
    return_refusal,
)
from geomirror.node.context import NodeContext
from geomirror.node.error_json import error_object
from geomirror.volume.branches import BranchRecord
from geomirror.volume.engine import Engine
from geomirror.volume.epoch_directory import EpochInfo
from geomirror.volume.rollback_foresight import ForesightJob


class RewindPlan:
    """Of one resource at its primary; on the event loop."""

    def __init__(self, engine: Engine, desk: BranchDesk, node: NodeContext) -> None:
        self._engine = engine
        self._desk = desk
        self._node = node

    async def cut_off(self, target: EpochInfo, *, reads_undo: bool) -> dict[str, Any]:
        """What going back to an epoch takes out, and whether that could be taken back.

        :param reads_undo: read all undo since it through, too; the rewind does that itself.
        :raises GeomirrorError: the rewind would be refused for this reason.
        """
        cut = self._desk.cut_off(target)
        if not cut["epochs"]:
            return {"cut_off": {**cut, "bytes": 0, "is_exact": True}, "rollback": None}
        exact_bytes = return_bytes_max(self._engine)
        job = ForesightJob(self._engine, target, exact_bytes=exact_bytes, reads_undo=reads_undo)
        try:
            await asyncio.get_running_loop().run_in_executor(self._node.executor, job.run)
        finally:
            job.release()
        size = job.size
        if size is None:
            return {"cut_off": {**cut, "bytes": None, "is_exact": False}, "rollback": None}
        known = {"bytes": size.data_bytes, "is_exact": size.is_exact}
        refusal = return_refusal(self._engine, size)
        return {"cut_off": {**cut, **known}, "rollback": self._rollback(size.data_bytes, refusal)}

    async def returns(self, branch: BranchRecord) -> dict[str, Any]:
        """`rollback` of `rewind --json`, of a branch that is there."""
        refusal: GeomirrorError | None = None
        try:
            await self.check_return(branch)
        except GeomirrorError as error:
            refusal = error
        return self._rollback(branch.raw_bytes, refusal)

    async def check_return(self, branch: BranchRecord, since_bytes: int = 0) -> None:
        """:raises GeomirrorError: the branch cannot be taken back, for this reason.

        :param since_bytes: written since, which becomes a branch first.
        """
        loop, engine = asyncio.get_running_loop(), self._engine
        check = partial(check_return, engine, branch, since_bytes)
        await loop.run_in_executor(self._node.executor, check)

    def _rollback(self, data_bytes: int, refusal: GeomirrorError | None) -> dict[str, Any]:
        one_epoch_bytes = one_epoch_bytes_max(self._engine)
        return {
            "is_possible": refusal is None,
            "refusal": None if refusal is None else error_object(refusal),
            "one_epoch_bytes_max": one_epoch_bytes,
            "has_resync": refusal is None and data_bytes > one_epoch_bytes,
        }
