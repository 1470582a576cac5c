"""The marks of one resource on this node: made and removed at the primary, listed anywhere."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from geomirror.errors import RefusedError
from geomirror.node.rfc3339 import rfc3339
from geomirror.volume.engine import Engine
from geomirror.volume.marks import Mark
from geomirror.wan_protocol.primary import Primary

if TYPE_CHECKING:
    from geomirror.node.replica_runner import ReplicaRunner

POLL_S = 0.01
MARK_S_MAX = 30.0
"""A mark that cannot be cut for so long (a full journal) is given up."""


class MarkDesk:
    """Beside the core of a running resource."""

    def __init__(self, resource: str, engine: Engine, runner: ReplicaRunner) -> None:
        self._resource = resource
        self._engine = engine
        self._runner = runner

    async def create(self, name: str) -> Mark:
        """Name the state of this instant; durable here on return.

        :raises UsageError, RefusedError, LimitExceededError: as `Primary.mark`.
        :raises WaitTimeoutError: it was not cut in time; nothing is named.
        """
        core, clock = self._primary(), self._runner.clock
        request = core.mark(name, clock.now_ns(), clock.wall_ns())
        self._runner.drive()
        loop = asyncio.get_running_loop()
        give_up = loop.time() + MARK_S_MAX
        while not request.is_done:
            if loop.time() > give_up:
                core.withdraw_mark(request)
            await asyncio.sleep(POLL_S)
        if request.error is not None:
            raise request.error
        assert request.mark is not None
        return request.mark

    async def delete(self, name: str) -> Mark:
        """Take a mark back, durably; its epoch is an ordinary point from now on.

        :raises NotFoundError: there is none.
        """
        core = self._primary()
        mark, end_lsn = core.delete_mark(name, self._runner.now_ns())
        self._runner.drive()
        while self._engine.journal.durable_lsn < end_lsn:
            if core.fenced is not None:
                raise core.fenced
            await asyncio.sleep(POLL_S)
        return mark

    def describe(self) -> list[dict[str, Any]]:
        """The marks as this copy knows them, ascending by epoch."""
        table, engine = self._engine.marks.table, self._engine
        horizon = engine.undo.history.horizon(engine.applied_epoch)
        return [
            {
                **describe_mark(mark),
                "held": table.is_held(mark),
                "viewable": table.is_held(mark) and horizon <= mark.epoch <= engine.applied_epoch,
            }
            for mark in table.marks()
        ]

    def _primary(self) -> Primary:
        core = self._runner.core
        if not isinstance(core, Primary):
            raise RefusedError(f'"{self._resource}" is a secondary here; marks are made elsewhere')
        return core


def describe_mark(mark: Mark) -> dict[str, Any]:
    """A mark's object."""
    return {
        "name": mark.name,
        "generation": mark.generation.hex(),
        "epoch": mark.epoch,
        "time": rfc3339(mark.wall_ns),
    }
