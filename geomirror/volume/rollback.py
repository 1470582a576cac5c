"""Rolling a resource's storage back to an earlier epoch p, as one job that a crash cannot spoil.

```
 1 sync the journal          5 images: undo to the boundary b <= p, journal on to p, fdatasync
 2 tail ─▶ branch, durable   6 superblock: position p, journal cut, "restored"
 3 joint (b, p], durable     7 undo past p is dropped, the joint takes its place; the branch exists
 4 superblock: intent        8 superblock: done
```
A crash before 4 leaves the resource as it was. After it, opening the resource goes on at 5 or 7:
both only repeat what depends on nothing that they change. So what 5 reads (undo past b, the journal
in (b, p]) is kept until 6.
Invariants: the tail is durable before anything of it is overwritten (I13); the images are at one
epoch whenever the superblock names no rollback.
A volume that has grown in (p, end] is smaller afterwards, one that was added is gone: what it held
is in the branch. That is for tails that another history replaces (`may_shrink`), never by choice.
Deliberately not here: where p can be (`engine_rollback`), what a tail is (`rollback_tail`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import msgspec

from geomirror.errors import IntegrityError, NotFoundError, RefusedError
from geomirror.limits import Limits
from geomirror.volume.apply import ApplyJob
from geomirror.volume.branches import BranchRecord, BranchStore, BranchVolume
from geomirror.volume.epoch_table import Epoch
from geomirror.volume.image import Image
from geomirror.volume.journal import Journal, SyncJob
from geomirror.volume.marks_file import SaveMarksJob
from geomirror.volume.merge import merge_tables
from geomirror.volume.rollback_position import shrink
from geomirror.volume.rollback_tail import fill_branch, fill_joint, grown_table, tail_table
from geomirror.volume.store import Store
from geomirror.volume.superblock import RollbackRecord, Superblock, SuperblockFile
from geomirror.volume.undo import UndoStore
from geomirror.volume.undo_contents import OldPart, old_contents, within
from geomirror.volume.undo_file import PassInfo, PassLabel, UndoWriter
from geomirror.volume.undo_tables import PassTables
from geomirror.volume.view_index import ViewIndex
from geomirror.volume.volume_change import VolumeChange, merge_changes


@dataclass(frozen=True)
class RollbackParts:
    """The parts of an engine that a rollback works on."""

    store: Store
    limits: Limits
    journal: Journal
    images: Mapping[int, Image]
    undo: UndoStore
    branches: BranchStore
    superblock_file: SuperblockFile


@dataclass(frozen=True)
class Tail:
    """What is cut off: loads the tables when the job runs."""

    record: BranchRecord
    in_image: Callable[[], Sequence[Epoch]] | None
    """The applied epochs of it; None: what undo after `record.base_epoch` names."""
    in_journal: Callable[[], Sequence[Epoch]]
    sizes: Mapping[int, int]
    """Bytes of the volumes at its end."""
    names: Mapping[int, str]
    may_shrink: bool
    """Volumes may have grown in it, or been added."""


@dataclass(frozen=True)
class Versions:
    """The superblock at each step; `restored` and `done` are completed while the job runs."""

    intent: Superblock | None
    """None: it is durable already."""
    restored: Superblock | None
    done: Superblock


class RollbackJob:
    """Rolls back; blocking, for a worker thread. Nothing else may use the engine meanwhile."""

    def __init__(
        self,
        parts: RollbackParts,
        record: RollbackRecord,
        applied_epoch: int,
        versions: Versions,
        forward: Callable[[], Sequence[Epoch]],
        tail: Tail | None,
        sync: SyncJob | None,
        marks: SaveMarksJob,
    ) -> None:
        """:param applied_epoch: that the images held before; the target is not above it.
        :param forward: the epochs (boundary, target], loaded when they are needed.
        """
        assert record.boundary_epoch <= record.to_epoch <= applied_epoch
        self.record = record
        self.versions = versions
        self.sync = sync
        self.branch: BranchRecord | None = None
        """After `run`: the branch that the tail became, if there was one."""
        self.is_begun = versions.intent is None
        """Whether the intent may be durable: then the resource has to be opened again if `run`
        raised; before, it is as it was."""
        self.is_synced = False
        """Whether `sync` has run."""
        self._parts = parts
        self._applied_epoch = applied_epoch
        self._forward = forward
        self._tail = tail
        self._marks = marks
        self._sizes_at_boundary = {i: image.size_bytes for i, image in parts.images.items()}

    @property
    def to_epoch(self) -> int:
        """The epoch that the resource is at afterwards."""
        return self.record.to_epoch

    def run(self) -> None:
        """Roll back; durable on return.

        :raises RefusedError: the tail is too large for what is left for branches, or a volume has
            grown in it and may not shrink. :raises IntegrityError: undo is damaged; as it was.
        :raises StorageError: see `is_begun`.
        """
        if self.sync is not None:
            self.sync.run()
            self.is_synced = True
        self._find_sizes()
        if self.versions.intent is not None:
            self._check_undo()
            self._save_tail()
            self._save_joint()
            self.is_begun = True
            self._write(self.versions.intent)
        if self.versions.restored is not None:
            self._restore()
            self._marks.run()
            self._write(self.versions.restored)
        self._finish()

    # Step by step.

    def _find_sizes(self) -> None:
        """How large the volumes are at the boundary and at the target; a resumed job knows."""
        record, versions = self.record, self.versions
        if record.is_restored or (versions.intent is None and not record.sizes):
            return
        found = {index: image.size_bytes for index, image in self._parts.images.items()}
        if record.boundary_epoch < self._applied_epoch:
            found.update(self._index(record.boundary_epoch).sizes)
        self._sizes_at_boundary = found
        changes = self._changes()
        record.sizes = {**found, **{each.index: each.size_bytes for each in changes}}
        if self._tail is not None and not self._tail.may_shrink:
            before = {index: size for index, size in record.sizes.items() if size}
            if before != self._tail.sizes:
                raise grown_since(record.to_epoch)
        for version in (versions.restored, versions.done):
            if version is not None:
                shrink(version, record.sizes)
        if versions.restored is not None and versions.restored.rollback is not None:
            versions.restored.rollback.sizes = record.sizes

    def _changes(self) -> tuple[VolumeChange, ...]:
        """What the volumes went through on the way from the boundary to the target."""
        if not self._is_within_pass:
            return ()
        return merge_changes(each for epoch in self._forward() for each in epoch.changes)

    def _save_tail(self) -> None:
        tail, parts = self._tail, self._parts
        if tail is None:
            return
        room = parts.branches.room_bytes()
        in_journal = merge_tables([epoch.table for epoch in tail.in_journal()])
        if tail.in_image is not None:
            in_image = merge_tables([epoch.table for epoch in tail.in_image()])
        else:
            index = self._index(tail.record.base_epoch)
            in_image = merge_tables([index.table(), grown_table(index.sizes, parts.images)])
        table = tail_table(in_image, in_journal)
        before = self.record.sizes
        volumes = [
            BranchVolume(index, tail.names[index], size)
            for index, size in sorted(tail.sizes.items())
            if size != before.get(index, 0)
        ]
        self.branch = parts.branches.save(
            msgspec.structs.replace(tail.record, volumes=volumes),
            lambda writer: fill_branch(
                writer, table, parts.images, tail.sizes, parts.journal.read, room
            ),
        )

    def _check_undo(self) -> None:
        """Read all undo of the way back through: once begun, a rollback has to end.

        :raises IntegrityError: some of it is damaged, and a gap from now on; nothing changed.
        """
        parts = self._parts
        for info in parts.undo.history.since(self.record.boundary_epoch):
            if not info.is_part:
                parts.undo.check(info)
        try:
            parts.undo.history.since(self.record.boundary_epoch)
        except NotFoundError as error:
            raise IntegrityError(error.message, hint=error.hint) from None

    def _save_joint(self) -> None:
        record, undo = self.record, self._parts.undo
        undo.drop_joint()
        if not self._is_within_pass:
            return
        epochs = self._forward()
        changed = merge_tables([epoch.table for epoch in epochs])
        last = epochs[-1]
        label = PassLabel(
            last.generation, record.boundary_epoch, last.number, last.wall_ns, last.chain_hash
        )

        index = self._index(record.boundary_epoch)

        def fill(writer: UndoWriter) -> None:
            sizes = self._sizes_at_boundary
            old = old_contents(index, self._parts.store.open)
            fill_joint(writer, within(old, sizes), changed)
            for change in self._changes():
                writer.add_size(change.index, sizes.get(change.index, 0))

        undo.save_joint(label, fill)

    def _restore(self) -> None:
        parts, record = self._parts, self.record
        boundary, sizes = record.boundary_epoch, self._sizes_at_boundary
        images = {index: i.grown(sizes.get(index, 0)) for index, i in parts.images.items()}
        parts.undo.close_after(boundary)
        if boundary < self._applied_epoch:
            old = old_contents(self._index(boundary), parts.store.open)
            for part in within(old, sizes):
                _put_back(images[part.volume], part)
        if boundary < record.to_epoch:
            ApplyJob(
                boundary,
                record.to_epoch,
                self._forward,
                parts.journal.read_into,
                images,
                parts.undo,
                parts.limits,
                with_undo=False,
            ).run()
        for image in parts.images.values():
            image.fdatasync()

    def _finish(self) -> None:
        parts, done = self._parts, self.versions.done
        parts.undo.roll_back(self.record.to_epoch)
        if self.record.branch:
            parts.branches.confirm(self.record.branch)
            self.branch = parts.branches.get(self.record.branch)
        done.undo_next = parts.undo.next_counter
        self._write(done)

    # Helpers.

    @property
    def _is_within_pass(self) -> bool:
        """Whether images go back by undo, and a part of the way forward again."""
        return self.record.boundary_epoch < self.record.to_epoch

    def _index(self, epoch: int) -> ViewIndex:
        parts = self._parts

        def read(info: PassInfo) -> PassTables:
            with closing(parts.store.open(info.name)) as file:
                return PassTables(file, info.name)

        passes = parts.undo.history.since(epoch)
        return ViewIndex(epoch).extended(passes, read, parts.limits.rollback_entries_max)

    def _write(self, version: Superblock) -> None:
        self._parts.superblock_file.write_job(version).run()


def _put_back(image: Image, part: OldPart) -> None:
    if part.contents is None:
        # Punched: a discarded run may be larger than what the disk has room for.
        image.zero(part.blocks[0], part.block_count, punch=True)
        return
    last = part.contents[-1][: image.block_bytes(part.blocks[-1])]
    contents = [*part.contents[:-1], last]
    image.write_blocks(list(zip(part.blocks, contents, strict=True)))


def grown_since(epoch: int) -> RefusedError:
    """Volumes never shrink by choice, so nothing is rewound to before one has grown."""
    return RefusedError(
        f"a volume has grown or was added since epoch {epoch}, and volumes never shrink",
        hint='look at that state instead: "geomirror view create"',
    )
