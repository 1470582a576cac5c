"""The marks of one resource on this node: made and removed at the primary, listed anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from geomirror.errors import NotFoundError, RefusedError, WaitTimeoutError
from geomirror.node.rfc3339 import rfc3339
from geomirror.volume.engine import Engine
from geomirror.volume.marks import Mark
from geomirror.wan_protocol.primary import Primary

if TYPE_CHECKING:
    from geomirror.node.replica_runner import ReplicaRunner

POLL_S = 0.01
"""How often it is looked whether a mark is durable: an application may be frozen meanwhile."""


class MarkDesk:
    """Beside the core of a running resource."""

    def __init__(self, resource: str, engine: Engine, runner: ReplicaRunner) -> None:
        self._resource = resource
        self._engine = engine
        self._runner = runner

    async def create(self, name: str, timeout_s: float) -> Mark:
        """Name the state of this instant; durable here on return.

        :raises UsageError, RefusedError, LimitExceededError: as `Primary.mark`.
        :raises WaitTimeoutError: nothing was made, or (it says so) the mark is not durable yet.
        """
        core, clock = self._primary(), self._runner.clock
        request = core.mark(name, clock.now_ns(), clock.wall_ns())
        self._runner.drive()
        try:
            await self._until(lambda: request.is_done, timeout_s)
        except TimeoutError:
            if not core.withdraw_mark(request):
                assert request.mark is not None
                raise WaitTimeoutError(
                    f'mark "{name}" is cut at epoch {request.mark.epoch}, and not durable after '
                    f"{timeout_s:g} s",
                    hint="the disk is slow or full: it comes into being when it can",
                ) from None
        except asyncio.CancelledError:
            core.withdraw_mark(request)
            raise
        if request.error is not None:
            raise request.error
        assert request.mark is not None
        return request.mark

    async def confirm(self, name: str, epoch: int, timeout_s: float) -> Mark:
        """Note durably that the application was quiet when the mark was cut.

        :raises NotFoundError, RefusedError: that mark is not there any more.
        """
        core = self._primary()
        mark = self._engine.marks.table.get(name)
        if mark.epoch != epoch:
            raise NotFoundError(f'mark "{name}" is at epoch {mark.epoch} now, not {epoch}')
        await self._durable(core.confirm_mark(mark, self._runner.now_ns()), timeout_s)
        return mark._replace(is_quiesced=True)

    async def delete(self, name: str, timeout_s: float) -> Mark:
        """Take a mark back, durably; its epoch is an ordinary point from now on.

        :raises NotFoundError: there is none.
        """
        mark, end_lsn = self._primary().delete_mark(name, self._runner.now_ns())
        await self._durable(end_lsn, timeout_s)
        return mark

    async def _durable(self, end_lsn: int, timeout_s: float) -> None:
        core, journal = self._runner.core, self._engine.journal
        self._runner.drive()
        try:
            await self._until(
                lambda: journal.durable_lsn >= end_lsn or core.fenced is not None, timeout_s
            )
        except TimeoutError:
            raise WaitTimeoutError(
                f"the change of the mark is not durable after {timeout_s:g} s",
                hint="the disk is slow or full: it may still become so",
            ) from None
        if journal.durable_lsn < end_lsn and core.fenced is not None:
            raise core.fenced

    async def _until(self, is_done: Callable[[], bool], timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s):
            while True:
                if is_done():
                    return
                await asyncio.sleep(POLL_S)

    def describe(self) -> dict[str, Any]:
        """This copy's newest durable epoch, and the marks that it knows, ascending by epoch."""
        marks = []
        for mark in self._engine.marks.table.marks():
            reason = self._why_not_held(mark)
            is_viewable = not reason and mark.epoch <= (self._engine.state_epoch or 0)
            state = {"held": not reason, "viewable": is_viewable, "reason": reason}
            marks.append({**describe_mark(mark), **state})
        return {"epoch": self._engine.sealed_epoch, "marks": marks}

    def _why_not_held(self, mark: Mark) -> str:
        """Why the state at a mark cannot be had here, now or once it is applied; "" if it can."""
        engine = self._engine
        if engine.state_epoch is None:
            return "this copy is not consistent: its first sync is not over"
        if not engine.marks.table.is_held(mark):
            return "a first sync or a resync brought this copy past it"
        applied = engine.state_epoch
        if mark.epoch >= applied:
            return ""  # It is the image, or in the journal, and an apply pass will end there.
        if engine.undo.history.reaches(mark.epoch, applied):
            return ""
        return "the history that leads back to it was dropped for want of room"

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
        "consistency": "application" if mark.is_quiesced else "crash",
    }
