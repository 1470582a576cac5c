"""The views of one resource on this node: made, found again after a restart, expired, deleted.

A view is a small JSON file under `views/` in the resource's directory, and a scratch overlay beside
it if it is writable. It pins the undo that it needs; a view whose undo is gone says so and is kept
until it is deleted or expires.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from geomirror.environment import SECOND
from geomirror.errors import GeomirrorError, NotFoundError, RefusedError
from geomirror.nbd.protocol import Export
from geomirror.node.context import NodeContext
from geomirror.node.history_report import marks_ahead, undo_object
from geomirror.node.rfc3339 import rfc3339
from geomirror.node.view_export import ViewExport, ViewQueue
from geomirror.volume.branch_view import BranchView
from geomirror.volume.engine import Engine
from geomirror.volume.generations import is_on_chain
from geomirror.volume.points import At, Located, Point, Points, locate, points_of
from geomirror.volume.scratch import DIRECTORY, Scratch, data_name, map_name
from geomirror.volume.store_io import DirectoryStore
from geomirror.volume.superblock import VolumeRecord
from geomirror.volume.view import View


class ViewRecord(msgspec.Struct, forbid_unknown_fields=True):
    """`views/NAME.view`: what a restart needs to serve the view again."""

    name: str
    generation: str
    epoch: int
    wall_ns: int
    """When the epoch was cut."""
    created_wall_ns: int
    expires_wall_ns: int | None
    is_writable: bool
    quota_bytes: int
    sizes: dict[int, int]
    """Bytes of each volume at the epoch, by index."""
    branch: str = ""
    """Of a branch: its name; `epoch` is that of its base then."""


class OpenView:
    """One view."""

    def __init__(self, record: ViewRecord) -> None:
        self.record = record
        self.queue: ViewQueue | None = None
        self.exports: dict[str, Export] = {}
        self.connections = 0
        self.reason = ""
        """Why it is not served."""
        self.ends_ns: int | None = None
        """When it expires, by the monotonic clock: one that is set changes nothing of it."""
        self.why = ""
        """Why there is no point nearer to what was asked for."""
        self.later: Point | None = None
        """The next one after what was asked for."""


class ViewHost:
    """All views of a resource here. On the event loop, but for `open_all`."""

    def __init__(
        self, resource: str, engine: Engine, store: DirectoryStore, node: NodeContext
    ) -> None:
        self._resource = resource
        self._engine = engine
        self._store = store
        self._node = node
        self._views: dict[str, OpenView] = {}

    def points(self) -> Points:
        """Every point in time that can be looked at here now, oldest first."""
        engine = self._engine
        epoch = engine.state_epoch
        if epoch is None:
            return Points.of([])
        history = engine.undo.history
        return points_of(history, epoch, engine.state_wall_ns, engine.marks.table)

    def marks_ahead(self) -> list[dict[str, Any]]:
        """Marks that can be looked at here as soon as their epochs are applied."""
        return marks_ahead(self._engine.marks.table, self._engine.state_epoch)

    def undo_state(self) -> dict[str, Any]:
        """What history costs, and why it does not reach back further."""
        return undo_object(self._engine, self._node.limits)

    def epoch_of(self, epoch: int | None, mark: str | None) -> int | None:
        """The epoch, or that of the mark. :raises NotFoundError: no such mark."""
        return epoch if mark is None else self._engine.marks.table.get(mark).epoch

    def open_all(self) -> None:
        """Find the views of the last life again. Blocking; before anything is applied."""
        for name in self._store.list(DIRECTORY):
            if not name.endswith(".view"):
                continue
            file = self._store.open(f"{DIRECTORY}/{name}")
            try:
                text = file.pread(file.size(), 0)
            finally:
                file.close()
            try:
                view = OpenView(msgspec.json.decode(text, type=ViewRecord))
            except (msgspec.MsgspecError, ValueError, RecursionError):
                self._remove_files(name.removesuffix(".view"))  # Its name was never answered.
                continue
            self._views[view.record.name] = view
            self._set_end(view)
            try:
                self._open(view, is_new=False)
            except GeomirrorError as error:
                view.reason = error.message

    async def create(
        self, at: At, *, is_writable: bool, quota_bytes: int, expires_s: float | None
    ) -> OpenView:
        """Make a view of the point meant by `at`.

        :raises NotFoundError: no such point. :raises RefusedError: too many views, or this copy is
            not consistent. :raises LimitExceededError: too much was changed since.
        """
        self._check_room()
        found = self.locate(at)
        view = await self._create(
            found.point, is_writable=is_writable, quota_bytes=quota_bytes, expires_s=expires_s
        )
        view.why, view.later = found.why, found.later
        return view

    def locate(self, at: At) -> Located:
        """The point meant by `at`. :raises NotFoundError, UsageError: see `points.locate`."""
        now_ns = self._node.clock.wall_ns()
        return locate(self.points(), at, self._engine.marks.table, now_ns)

    async def create_of_branch(self, branch: str, *, expires_s: float | None) -> OpenView:
        """Make a read-only view of the end of a branch.

        :raises NotFoundError: no such branch, or what it lies on is not kept any more.
        :raises RefusedError, LimitExceededError: as `create`.
        """
        self._check_room()
        record = self._engine.branches.get(branch)
        point = Point(record.base_epoch, record.end_wall_ns)
        return await self._create(
            point, is_writable=False, quota_bytes=0, expires_s=expires_s, branch=branch
        )

    async def _create(
        self,
        point: Point,
        *,
        is_writable: bool,
        quota_bytes: int,
        expires_s: float | None,
        branch: str = "",
    ) -> OpenView:
        now_ns = self._node.clock.wall_ns()
        record = ViewRecord(
            name=self._new_name(),
            generation=self._engine.generation.hex(),
            epoch=point.epoch,
            wall_ns=point.wall_ns,
            created_wall_ns=now_ns,
            expires_wall_ns=None if expires_s is None else now_ns + int(expires_s * SECOND),
            is_writable=is_writable,
            quota_bytes=quota_bytes,
            sizes={},
            branch=branch,
        )
        view = self._views[record.name] = OpenView(record)
        self._set_end(view)
        self._engine.undo.pin(_owner(record.name), record.epoch)
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._node.executor, self._make, view)
        except GeomirrorError:
            self._forget(view)
            await loop.run_in_executor(self._node.executor, self._remove_files, record.name)
            raise
        return view

    def _check_room(self) -> None:
        if self._engine.state_epoch is None:
            raise RefusedError(f'"{self._resource}" is Inconsistent here: its first sync goes on')
        if len(self._views) >= self._node.limits.views_max:
            raise RefusedError(
                f'"{self._resource}" has {len(self._views)} views here already',
                hint=f'delete one: "geomirror view list {self._resource}"',
            )

    def views_of_branch(self, branch: str) -> list[str]:
        """Names of the views of a branch."""
        return [name for name, view in self._views.items() if view.record.branch == branch]

    async def delete(self, name: str) -> None:
        """End a view and forget what was written to it. :raises NotFoundError: no such view."""
        view = self._views.get(name)
        if view is None:
            raise NotFoundError(
                f'no view "{name}" of "{self._resource}" here',
                hint=f'see "geomirror view list {self._resource}"',
            )
        await self._end(view, "it was deleted")

    def wall_ns_of(self, name: str) -> int | None:
        """When the epoch that a view shows was cut; None when it is gone."""
        view = self._views.get(name)
        return None if view is None else view.record.wall_ns

    async def expire(self) -> list[str]:
        """End the views whose time is over; their names."""
        now_ns = self._node.clock.now_ns()
        over = [
            view
            for view in self._views.values()
            if view.ends_ns is not None and view.ends_ns <= now_ns
        ]
        for view in over:
            await self._end(view, "its time is over")
        return [view.record.name for view in over]

    def _set_end(self, view: OpenView) -> None:
        """From the wall clock, once in each life: it may have been set while the node was away, but
        no view lives longer for that than it was meant to."""
        record, clock = view.record, self._node.clock
        if record.expires_wall_ns is not None:
            lifetime_ns = record.expires_wall_ns - record.created_wall_ns
            left_ns = min(max(record.expires_wall_ns - clock.wall_ns(), 0), lifetime_ns)
            view.ends_ns = clock.now_ns() + left_ns

    async def stop(self) -> None:
        """Serve nothing more; the views stay."""
        for view in self._views.values():
            if view.queue is not None:
                await view.queue.stop("the node stops")

    def exports(self) -> dict[str, Export]:
        """NBD exports of all views: `RES@VIEW/VOLUME`, and `RES@VIEW` for the first volume."""
        found: dict[str, Export] = {}
        for view in self._views.values():
            found.update(view.exports)
        return found

    def describe(self, view: OpenView) -> dict[str, Any]:
        """The view's object of `view list --json`, without its URIs."""
        record, scratch = view.record, view.queue.scratch if view.queue else None
        return {
            "name": record.name,
            "resource": self._resource,
            "node": self._node.name,
            "generation": record.generation,
            "epoch": record.epoch,
            "branch": record.branch or None,
            "time": timestamp(record.wall_ns),
            "created_at": timestamp(record.created_wall_ns),
            "expires_at": timestamp(record.expires_wall_ns),
            "why": view.why,
            "later": None
            if view.later is None
            else {"epoch": view.later.epoch, "time": timestamp(view.later.wall_ns)},
            "is_writable": record.is_writable,
            "quota_bytes": record.quota_bytes if record.is_writable else None,
            "written_bytes": scratch.used_bytes if scratch is not None else 0,
            "connections": view.connections,
            "state": "lost" if view.reason else "served",
            "reason": view.reason,
            "volumes": [volume.name for volume in self._volumes(record)],
        }

    def describe_all(self) -> list[dict[str, Any]]:
        """All views, the oldest first."""
        ordered = sorted(self._views.values(), key=lambda view: view.record.created_wall_ns)
        return [self.describe(view) for view in ordered]

    def _new_name(self) -> str:
        number = 1
        while f"v{number}" in self._views:
            number += 1
        return f"v{number}"

    def _volumes(self, record: ViewRecord) -> list[VolumeRecord]:
        volumes = {each.index: each for each in self._engine.superblock.volumes}
        if record.branch:
            # Some may have been added in the tail: then they are only there.
            found = [b for b in self._engine.branches.records() if b.name == record.branch]
            for each in (volume for branch in found for volume in branch.volumes):
                volumes[each.index] = VolumeRecord(each.index, each.name, each.size_bytes)
        return [volumes[index] for index in sorted(volumes) if index in record.sizes]

    def _make(self, view: OpenView) -> None:
        """Blocking."""
        self._open(view, is_new=True)
        content = msgspec.json.encode(view.record)
        path = f"{DIRECTORY}/{view.record.name}.view"
        file = self._store.create(path + ".new", 0)
        try:
            file.pwritev([content], 0)
            file.fdatasync()
        finally:
            file.close()
        self._store.rename(path + ".new", path)
        self._store.sync_directory(DIRECTORY)

    def _open(self, view: OpenView, *, is_new: bool) -> None:
        """Blocking. :raises GeomirrorError: it cannot be served."""
        record, engine, store = view.record, self._engine, self._store
        if not record.branch and not is_on_chain(
            engine.superblock.chain, record.generation, record.epoch
        ):
            raise NotFoundError("it is of another history than this copy has now")
        newest = engine.state_epoch
        if newest is None or record.epoch > newest:
            raise NotFoundError("this copy was made anew since")
        physical = engine.physical_images
        images = {i: e for i, e in physical.items() if is_new or i in record.sizes}
        undo, entries_max = engine.undo, self._node.limits.view_entries_max
        seen: View | BranchView
        if record.branch:
            seen = engine.view_branch(record.branch)
        else:
            seen = View(
                record.epoch, images, lambda: undo.history, store.open, entries_max, undo.suspect
            )
        undo.pin(_owner(record.name), record.epoch)
        seen.prepare()
        if is_new:
            added = seen.record.volumes if isinstance(seen, BranchView) else []
            numbers = {*images, *(each.index for each in added)}
            sizes = {index: seen.size_of(index) for index in sorted(numbers)}
            record.sizes = {index: size for index, size in sizes.items() if size}
        scratch = None
        if record.is_writable and is_new:
            scratch = Scratch.create(
                store, record.name, record.sizes, record.epoch, record.quota_bytes
            )
        elif record.is_writable:
            scratch = Scratch.open(store, record.name, record.quota_bytes)
        view.queue = ViewQueue(seen, scratch, self._node.executor)
        self._add_exports(view, view.queue)

    def _add_exports(self, view: OpenView, queue: ViewQueue) -> None:
        record = view.record
        prefix = f"{self._resource}@{record.name}"

        def attached(change: int) -> None:
            view.connections += change

        kind = "writable view" if record.is_writable else "view"
        exports: dict[str, Export] = {}
        for volume in self._volumes(record):
            export = ViewExport(
                name=f"{prefix}/{volume.name}",
                volume=volume.index,
                size_bytes=record.sizes[volume.index],
                queue=queue,
                description=f"{kind} of {self._resource}/{volume.name} at epoch {record.epoch}",
                is_read_only=not record.is_writable,
                on_attach=attached,
            )
            exports[export.name] = export
            exports.setdefault(prefix, export)
        view.exports = exports

    async def _end(self, view: OpenView, reason: str) -> None:
        self._forget(view)
        if view.queue is not None:
            await view.queue.stop(reason)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._node.executor, self._remove_files, view.record.name)

    def _forget(self, view: OpenView) -> None:
        self._views.pop(view.record.name, None)
        self._engine.undo.unpin(_owner(view.record.name))

    def _remove_files(self, name: str) -> None:
        """Blocking. The record first: without it the rest is nothing."""
        store = self._store
        store.unlink(f"{DIRECTORY}/{name}.view")
        store.sync_directory(DIRECTORY)
        for volume in self._engine.superblock.volumes:
            store.unlink(data_name(name, volume.index))
        store.unlink(map_name(name))


def _owner(name: str) -> str:
    return f"view {name}"


def timestamp(wall_ns: int | None) -> str | None:
    """RFC 3339, None for no time."""
    return None if wall_ns is None else rfc3339(wall_ns)
