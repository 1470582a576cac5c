"""The branches of one resource on this node, as operators see them."""

from __future__ import annotations

import asyncio
from typing import Any

from geomirror.errors import NotFoundError, RefusedError
from geomirror.node.context import NodeContext
from geomirror.node.rfc3339 import rfc3339
from geomirror.node.view_host import ViewHost
from geomirror.volume.branches import BranchRecord
from geomirror.volume.engine import Engine
from geomirror.volume.epoch_directory import EpochInfo
from geomirror.volume.points import At, Point, find_point
from geomirror.volume.rollback_tail import too_large

REWOUND = "rewound"
"""Reason of a generation that began in the past; its tail is still a branch until `commit`."""
REWIND_PREFIX = "rewind-"
ALMOST_FULL = 0.8
"""Part of the budget at which the operator is told."""


def rewind_branch(generation: str) -> str:
    """Name of the branch that a rewind leaves, from the generation that it began."""
    return f"{REWIND_PREFIX}{generation[:8]}"


class BranchDesk:
    """On the event loop."""

    def __init__(self, resource: str, engine: Engine, views: ViewHost, node: NodeContext) -> None:
        self._resource = resource
        self._engine = engine
        self._views = views
        self._node = node

    def describe(self) -> dict[str, Any]:
        """All branches, the oldest first, and what they cost."""
        branches = self._engine.branches
        summary = self.summary()
        del summary["count"]
        return {
            "branches": [self._branch(each) for each in branches.records()],
            "damaged": list(branches.damaged),
            **summary,
        }

    def summary(self) -> dict[str, Any]:
        """`branches` of a resource in `status --json`."""
        branches, limits = self._engine.branches, self._node.limits
        stored, count = branches.stored_bytes(), len(branches.records())
        is_almost_full = (
            stored >= ALMOST_FULL * limits.branches_bytes_max
            or count >= ALMOST_FULL * limits.branches_max
        )
        alarm = "branches have almost no room left: a node that has to go back will stop and ask"
        return {
            "count": count,
            "stored_bytes": stored,
            "budget_bytes": limits.branches_bytes_max,
            "alarm": alarm if is_almost_full else "",
        }

    async def drop(self, name: str) -> None:
        """Forget a branch for good.

        :raises NotFoundError: there is none. :raises RefusedError: it is looked at.
        """
        self.check_unseen(name)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._node.executor, self._engine.drop_branch, name)

    def check_unseen(self, name: str) -> None:
        """:raises RefusedError: a view shows this branch."""
        views = self._views.views_of_branch(name)
        if views:
            raise RefusedError(
                f'branch "{name}" of "{self._resource}" is looked at by view {views[0]}',
                hint=f"geomirror view delete {self._resource} {views[0]}",
            )

    def check_needless(self, name: str) -> None:
        """Refuse the branch that `rewind rollback` would go back with: that it is not wanted any
        more is said by `rewind commit`, to the copies too.

        :raises RefusedError: it is that one.
        """
        if name == self._rewound_name() and any(r.name == name for r in self._records()):
            raise RefusedError(
                f'branch "{name}" is the way back of the last rewind of "{self._resource}"',
                hint=f"geomirror rewind commit {self._resource} gives it up, here and at the "
                "copies; rewind rollback goes back",
            )

    def check_retreat(self, epoch: int, chain_hash: bytes, tail_bytes: int = 0) -> None:
        """Refuse what this copy cannot go back to (or before, to be sent the rest), or leave a
        branch of.

        :param tail_bytes: that the branch may hold.
        :raises RefusedError: no such state is kept, or branches leave no room.
        """
        engine = self._engine
        if engine.committed_epoch > epoch:
            engine.retreat_point(epoch, chain_hash)
            room_bytes = engine.branches.room_bytes()
            if tail_bytes > room_bytes:
                raise too_large(room_bytes)

    # Rewinding: what there is to know while the resource runs.

    def target(self, at: At) -> EpochInfo:
        """The epoch that a rewind to `at` goes back to: the nearest at or before it.

        :raises NotFoundError: there is none; names the nearest ones.
        """
        engine = self._engine
        marks = engine.marks.table
        names: dict[int, list[str]] = {}
        for mark in marks.marks():
            names.setdefault(mark.epoch, []).append(mark.name)
        points = [
            Point(each.number, each.wall_ns, tuple(names.get(each.number, ())))
            for each in engine.rollback_targets()
        ]
        found = find_point(points, at, marks, self._node.clock.wall_ns())
        return engine.rollback_target(found.epoch)

    def cut_off(self, target: EpochInfo) -> dict[str, Any]:
        """What going back to it takes out of the volumes."""
        engine = self._engine
        unsealed = engine.open_epoch_since_wall_ns is not None
        last = engine.committed_epoch + unsealed
        newest_ns = max(engine.last_wall_ns, engine.superblock.applied_wall_ns)
        is_known = 0 < target.wall_ns <= newest_ns
        return {
            "epochs": last - target.number,
            "first_epoch": target.number + 1 if last > target.number else None,
            "last_epoch": last if last > target.number else None,
            "seconds": (newest_ns - target.wall_ns) / 1e9 if is_known else None,
        }

    def rewound(self) -> BranchRecord:
        """The branch that the last rewind left. :raises NotFoundError: nothing is rewound."""
        name = self._rewound_name()
        for each in self._records():
            if each.name == name:
                return each
        raise NotFoundError(
            f'"{self._resource}" is not rewound, or that was committed',
            hint=f"geomirror branch list {self._resource}",
        )

    def _rewound_name(self) -> str:
        """What the branch of a rewind that was not ended is called; "" without one."""
        chain = self._engine.superblock.chain
        is_rewound = bool(chain) and chain[-1].reason == REWOUND
        return rewind_branch(chain[-1].identity) if is_rewound else ""

    def _records(self) -> list[BranchRecord]:
        return self._engine.branches.records()

    def base_of(self, record: BranchRecord) -> EpochInfo:
        """The epoch that a branch lies on.

        :raises NotFoundError, RefusedError: nothing can go back to it any more.
        """
        return self._engine.rollback_target(record.base_epoch, bytes.fromhex(record.base_hash))

    def _branch(self, record: BranchRecord) -> dict[str, Any]:
        return {
            "name": record.name,
            "base": {
                "generation": record.base_generation,
                "epoch": record.base_epoch,
                "time": rfc3339(record.base_wall_ns) if record.base_wall_ns else None,
            },
            "end": {
                "generation": record.generation,
                "epoch": record.end_epoch,
                "time": rfc3339(record.end_wall_ns) if record.end_wall_ns else None,
            },
            "created_at": rfc3339(record.created_wall_ns),
            "raw_bytes": record.raw_bytes,
            "stored_bytes": record.stored_bytes,
            "marks": [name for name, _ in record.marks],
            "volumes": [{"name": v.name, "size_bytes": v.size_bytes} for v in record.volumes],
            "is_viewable": self._is_viewable(record),
        }

    def _is_viewable(self, record: BranchRecord) -> bool:
        """Whether the state at its base is still there (in this history, and kept by undo)."""
        engine = self._engine
        try:
            engine.undo.history.since(record.base_epoch)
        except NotFoundError:
            return False
        return engine.has_base_of(record) and record.base_epoch <= engine.applied_epoch
