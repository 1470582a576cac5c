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
No volume may have grown in (p, end]: volumes never shrink.
Deliberately not here: where p can be (`engine_rollback`), what a tail is (`rollback_tail`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from geomirror.errors import RefusedError
from geomirror.limits import Limits
from geomirror.volume.apply import ApplyJob
from geomirror.volume.branches import BranchRecord, BranchStore
from geomirror.volume.epoch_table import Epoch
from geomirror.volume.image import Image
from geomirror.volume.journal import Journal, SyncJob
from geomirror.volume.marks_file import SaveMarksJob
from geomirror.volume.merge import merge_tables
from geomirror.volume.rollback_tail import fill_branch, fill_joint, tail_table
from geomirror.volume.store import File, Store
from geomirror.volume.superblock import RollbackRecord, Superblock, SuperblockFile
from geomirror.volume.undo import UndoStore
from geomirror.volume.undo_contents import OldPart, old_contents
from geomirror.volume.undo_file import PassInfo, PassLabel, UndoReader, UndoWriter
from geomirror.volume.view_index import ViewIndex


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
        self._parts = parts
        self._applied_epoch = applied_epoch
        self._forward = forward
        self._tail = tail
        self._marks = marks

    @property
    def to_epoch(self) -> int:
        """The epoch that the resource is at afterwards."""
        return self.record.to_epoch

    def run(self) -> None:
        """Roll back; durable on return.

        :raises RefusedError: the tail is too large for what is left for branches, or a volume has
            grown in it.
        :raises StorageError: see `is_begun`.
        """
        if self.sync is not None:
            self.sync.run()
        if self.versions.intent is not None:
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

    def _save_tail(self) -> None:
        tail, parts = self._tail, self._parts
        if tail is None:
            return
        room = parts.branches.room_bytes()
        later = list(tail.in_journal())
        in_journal = merge_tables([epoch.table for epoch in later])
        if tail.in_image is not None:
            applied = tail.in_image()
            later += applied
            in_image = merge_tables([epoch.table for epoch in applied])
            is_grown = False
        else:
            index = self._index(tail.record.base_epoch)[0]
            in_image, is_grown = index.table(), bool(index.sizes)
        if is_grown or any(epoch.changes for epoch in later):
            raise grown_since(tail.record.base_epoch)
        table = tail_table(in_image, in_journal)
        self.branch = parts.branches.save(
            tail.record,
            lambda writer: fill_branch(writer, table, parts.images, parts.journal.read, room),
        )

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

        index, passes = self._index(record.boundary_epoch)
        files = self._open(passes)

        def fill(writer: UndoWriter) -> None:
            fill_joint(writer, old_contents(index, files), changed)
            # No volume has grown after the target, so all of these have grown within this pass.
            for volume, size_bytes in index.sizes.items():
                writer.add_size(volume, size_bytes)

        try:
            undo.save_joint(label, fill)
        finally:
            _close(files)

    def _restore(self) -> None:
        parts, record = self._parts, self.record
        boundary = record.boundary_epoch
        parts.undo.close_after(boundary)
        if boundary < self._applied_epoch:
            index, passes = self._index(boundary)
            files = self._open(passes)
            try:
                for part in old_contents(index, files):
                    self._put_back(part)
            finally:
                _close(files)
        if boundary < record.to_epoch:
            ApplyJob(
                boundary,
                record.to_epoch,
                self._forward,
                parts.journal.read_into,
                parts.images,
                parts.undo,
                parts.limits,
                with_undo=False,
            ).run()
        for image in parts.images.values():
            image.fdatasync()

    def _put_back(self, part: OldPart) -> None:
        image = self._parts.images[part.volume]
        if part.contents is None:
            # Punched: a discarded run may be larger than what the disk has room for.
            image.zero(part.blocks[0], part.block_count, punch=True)
            return
        last = part.contents[-1][: image.block_bytes(part.blocks[-1])]
        contents = [*part.contents[:-1], last]
        image.write_blocks(list(zip(part.blocks, contents, strict=True)))

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

    def _index(self, epoch: int) -> tuple[ViewIndex, Sequence[PassInfo]]:
        parts = self._parts
        passes = parts.undo.history.since(epoch)
        index = ViewIndex(epoch).extended(
            passes,
            lambda info: UndoReader(parts.store.open(info.name), info.name),
            parts.limits.rollback_entries_max,
        )
        return index, passes

    def _open(self, passes: Sequence[PassInfo]) -> list[File]:
        return [self._parts.store.open(each.name) for each in passes]

    def _write(self, version: Superblock) -> None:
        self._parts.superblock_file.write_job(version).run()


def _close(files: Sequence[File]) -> None:
    for file in files:
        file.close()


def grown_since(epoch: int) -> RefusedError:
    """Volumes never shrink, so nothing goes back to an epoch before one has grown."""
    return RefusedError(
        f"a volume has grown or was added since epoch {epoch}, and volumes never shrink",
        hint='look at that state instead: "geomirror view create"',
    )
