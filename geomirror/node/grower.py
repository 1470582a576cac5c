"""Grows the volumes of a primary: backing first, then the journal, then the seal."""

from __future__ import annotations

import asyncio

from geomirror.errors import GeomirrorError, JournalFullError, NoSpaceError, RefusedError
from geomirror.node.context import NodeContext
from geomirror.node.replica_runner import ReplicaRunner
from geomirror.volume.volume_change import VolumeChange
from geomirror.wan_protocol.primary import Primary

POLL_S = 0.02
ROOM_S_MAX = 15.0
"""How long a change waits for room in the journal."""
SEAL_S_MAX = 60.0
"""How long it is waited for until it is sealed; it is in the journal then."""


class Grower:
    """One change at a time of one resource."""

    def __init__(self, core: Primary, runner: ReplicaRunner, node: NodeContext) -> None:
        self._core = core
        self._runner = runner
        self._node = node
        self._lock = asyncio.Lock()

    async def grow(self, change: VolumeChange) -> int:
        """Returns the epoch that has the change, once it is sealed.

        :raises RefusedError: it cannot be, or its backing is too small: nothing changed.
        :raises JournalFullError, NoSpaceError: no room: nothing changed.
        """
        async with self._lock:
            engine = self._core.engine
            engine.check_growth(change)
            engine.forget_addition(change.index)
            job = engine.grow_job_for([change])
            if job is not None:
                loop = asyncio.get_running_loop()
                try:
                    await loop.run_in_executor(self._node.executor, job.run)
                except NoSpaceError as error:
                    raise RefusedError(
                        error.message, hint=error.hint or "make room there first"
                    ) from error
                self._require_serving()
                self._core.prepared(job)
            number = await self._journal(change)
            async with asyncio.timeout(SEAL_S_MAX):
                while engine.sealed_epoch < number:
                    self._require_serving()
                    await asyncio.sleep(POLL_S)
            return number

    async def _journal(self, change: VolumeChange) -> int:
        clock = self._runner.clock
        for attempt in range(int(ROOM_S_MAX / POLL_S)):
            self._require_serving()
            try:
                number = self._core.grow(change, clock.now_ns(), clock.wall_ns())
            except JournalFullError:
                if attempt + 1 == int(ROOM_S_MAX / POLL_S):
                    raise
                self._runner.drive()
                await asyncio.sleep(POLL_S)
                continue
            self._runner.drive()
            return number
        raise AssertionError

    def _require_serving(self) -> None:
        """:raises GeomirrorError: the resource was stopped meanwhile."""
        if self._core.fenced is not None:
            raise self._core.fenced
        if self._runner.is_stopped:
            raise GeomirrorError(
                "the resource was stopped meanwhile", hint="look at its size before you go on"
            )
