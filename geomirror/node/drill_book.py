"""What drills came to: a file for each resource, kept by the node whose copy was tried."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from geomirror.environment import SECOND
from geomirror.errors import IntegrityError, NotFoundError, StorageError
from geomirror.node.context import NodeContext
from geomirror.node.json_file import load_json
from geomirror.node.paths import write_file_atomic
from geomirror.node.rfc3339 import rfc3339

FILE = "drills.json"
RUNNING, PASSED, FAILED = "running", "passed", "failed"
TIMEOUT, ERROR, INTERRUPTED = "timeout", "error", "interrupted"
OUTCOMES = (PASSED, FAILED, TIMEOUT, ERROR, INTERRUPTED)
LOST = "its command was ended before it could say anything"


class Drill(msgspec.Struct):
    """One drill; unknown keys of a newer version are ignored."""

    number: int
    started_wall_ns: int
    deadline_wall_ns: int
    """Its view has expired by then; a drill that is still running was killed."""
    runs_on: str
    """Node whose operator started it."""
    check: str
    result: str = RUNNING
    reason: str = ""
    view: str = ""
    epoch: int | None = None
    wall_ns: int | None = None
    """When that epoch was cut."""
    exit_code: int | None = None
    seconds: float | None = None
    """Of the check alone."""
    rto_seconds: float | None = None
    """From the start until the URI could be read."""
    mount_seconds: float | None = None
    """From the start until it was mounted."""
    file_system: str | None = None
    """What was mounted; None: nothing, see `mount_reason`."""
    mount_reason: str = ""
    output: str = ""
    """The end of what the check printed."""
    ended_wall_ns: int | None = None


class _File(msgspec.Struct):
    next_number: int = 1
    last_passed_wall_ns: int | None = None
    drills: list[Drill] = msgspec.field(default_factory=list)


class DrillBook:
    """The drills of all resources of this node. On the event loop; writing is durable."""

    def __init__(self, node: NodeContext) -> None:
        self._node = node
        self._known: dict[str, tuple[str, _File]] = {}
        self._writing = asyncio.Lock()

    async def begin(
        self, name: str, resource_id: str, *, check: str, runs_on: str, expires_s: float
    ) -> Drill:
        """Note that a drill has begun."""
        file = self._file(name, resource_id)
        now_ns = self._node.clock.wall_ns()
        drill = Drill(
            number=file.next_number,
            started_wall_ns=now_ns,
            deadline_wall_ns=now_ns + int(expires_s * SECOND),
            runs_on=runs_on,
            check=check,
        )
        file.next_number += 1
        file.drills.append(drill)
        del file.drills[: -self._node.limits.drills_kept]
        await self._write(name, file)
        return drill

    async def end(self, name: str, resource_id: str, drill: Drill) -> None:
        """Note what became of it; `drill` has its result."""
        assert drill.result in OUTCOMES, drill.result
        file = self._file(name, resource_id)
        drill.ended_wall_ns = self._node.clock.wall_ns()
        if drill.result == PASSED:
            file.last_passed_wall_ns = drill.started_wall_ns
        await self._write(name, file)

    async def save(self, name: str, resource_id: str) -> None:
        """Make changed drills durable."""
        await self._write(name, self._file(name, resource_id))

    def running(self, name: str, resource_id: str) -> list[Drill]:
        """Drills without a result."""
        return [each for each in self._file(name, resource_id).drills if each.result == RUNNING]

    def find(self, name: str, resource_id: str, number: int) -> Drill:
        """The drill of this number. :raises NotFoundError: it is not kept."""
        for each in self._file(name, resource_id).drills:
            if each.number == number:
                return each
        raise NotFoundError(f'"{name}" has no drill {number} here')

    def list_all(self, name: str, resource_id: str) -> list[dict[str, Any]]:
        """All that are kept, oldest first."""
        return [self._described(each) for each in self._file(name, resource_id).drills]

    def last(self, name: str, resource_id: str) -> dict[str, Any] | None:
        """`last_drill` of `status --json`: the newest one that is over."""
        keys = ("result", "reason", "started_at", "epoch", "time", "rto_seconds", "exit_code")
        try:
            file = self._file(name, resource_id)
        except (IntegrityError, StorageError) as error:
            found = {"result": ERROR, "reason": error.message, "last_passed_at": None}
            return dict.fromkeys(keys) | found
        over = [self._described(each) for each in file.drills]
        over = [each for each in over if each["result"] != RUNNING]
        if not over:
            return None
        passed_ns = file.last_passed_wall_ns
        passed_at = None if passed_ns is None else rfc3339(passed_ns)
        return {**{key: over[-1][key] for key in keys}, "last_passed_at": passed_at}

    def describe(self, drill: Drill) -> dict[str, Any]:
        """A drill's object."""
        return self._described(drill)

    def _described(self, drill: Drill) -> dict[str, Any]:
        result, reason = drill.result, drill.reason
        if result == RUNNING and self._node.clock.wall_ns() > drill.deadline_wall_ns:
            result, reason = INTERRUPTED, LOST
        return {
            "number": drill.number,
            "node": self._node.name,
            "runs_on": drill.runs_on,
            "started_at": rfc3339(drill.started_wall_ns),
            "ended_at": None if drill.ended_wall_ns is None else rfc3339(drill.ended_wall_ns),
            "epoch": drill.epoch,
            "time": None if drill.wall_ns is None else rfc3339(drill.wall_ns),
            "check": drill.check,
            "result": result,
            "reason": reason,
            "exit_code": drill.exit_code,
            "seconds": drill.seconds,
            "rto_seconds": drill.rto_seconds,
            "mount_seconds": drill.mount_seconds,
            "file_system": drill.file_system,
            "mount_reason": drill.mount_reason,
            "output": drill.output,
        }

    def _file(self, name: str, resource_id: str) -> _File:
        """:raises IntegrityError, StorageError: it cannot be read."""
        known = self._known.get(name)
        if known is not None and known[0] == resource_id:
            return known[1]
        path = self._node.resource_dir(name) / FILE
        file = load_json(path, _File, "move it away; it holds only past drills") or _File()
        self._known[name] = resource_id, file
        return file

    async def _write(self, name: str, file: _File) -> None:
        path = self._node.resource_dir(name) / FILE
        async with self._writing:
            data = msgspec.json.encode(file)
            await asyncio.get_running_loop().run_in_executor(
                self._node.executor, write_file_atomic, path, data
            )
