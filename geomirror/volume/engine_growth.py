"""Growing volumes and adding some while the resource is in use.

```
 primary    backing extended ─▶ RESIZE record ─▶ index grown, its new bytes zeros ─▶ cut, seal, …
 secondary  EPOCH record names the change ─▶ backing extended ─▶ apply ─▶ image has the new size
```
Invariants: a RESIZE record is the whole change, its zeros included, so it is there or it is not; a
backing is large enough, and one that is new is in a checkpoint, before an image grows; the size of
an image changes with its applied epoch, in one checkpoint.
Deliberately not here: which backing is allowed (the node), when a pass may begin (`replica`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from geomirror.errors import GeomirrorError, RefusedError
from geomirror.volume.dirty_index import DirtyIndex
from geomirror.volume.engine_base import MakeBacking
from geomirror.volume.engine_writes import WritePath, record_room_bytes
from geomirror.volume.image import Image
from geomirror.volume.record import RecordType
from geomirror.volume.store import File, Store
from geomirror.volume.superblock import BODY_BYTES_MAX, VolumeRecord, body_bytes
from geomirror.volume.volume_change import VolumeChange, change_problem, encode_changes

VOLUMES_DIRECTORY = "volumes"
_SUPERBLOCK_SPARE_BYTES = 8 * 1024
"""Of a superblock that volumes must leave to positions of peers and the like."""


def volume_file_name(index: int) -> str:
    """Name in the store of a volume's own backing file."""
    return f"{VOLUMES_DIRECTORY}/{index}.img"


class GrowJob:
    """Makes what lies under volumes large enough; `run` blocks, and may be run again.

    :param files: of the volumes that have one.
    """

    def __init__(
        self,
        store: Store,
        changes: Sequence[VolumeChange],
        files: dict[int, File],
        make_backing: MakeBacking | None,
    ) -> None:
        self.changes = changes
        self.made: dict[int, tuple[str, File]] = {}
        """After `run`: path ("" for a file in the store) and file of those that had none."""
        self._store = store
        self._files = files
        self._make_backing = make_backing

    def run(self) -> None:
        """Extend and make.

        :raises NoSpaceError: a device is too small, or a file system is full: again later.
        :raises GeomirrorError: a backing may not be used.
        """
        try:
            for change in self.changes:
                file = self._files.get(change.index)
                if file is None:
                    self.made[change.index] = self._make(change)
                elif file.size() < change.size_bytes:
                    file.truncate(change.size_bytes)
                    file.fdatasync()
        except BaseException:
            self.close()
            raise

    def _make(self, change: VolumeChange) -> tuple[str, File]:
        made = self._make_backing(change) if self._make_backing is not None else None
        if made is not None:
            return made
        name = volume_file_name(change.index)
        # Of an addition that never came to be: whatever it holds, it is of no epoch.
        self._store.unlink(name)
        file = self._store.create(name, change.size_bytes)
        try:
            file.fdatasync()
            self._store.sync_directory(VOLUMES_DIRECTORY)
        except GeomirrorError:
            file.close()
            raise
        return "", file

    def close(self) -> None:
        """Close what was made: it will not be used."""
        for _, file in self.made.values():
            file.close()
        self.made.clear()


class VolumeGrowth(WritePath):
    """The part of `Engine` that is about sizes."""

    def grow_job(self, through_epoch: int) -> GrowJob | None:
        """A job that prepares for the volumes of an epoch; None when they have all they need.

        Run one at a time, and `complete_grow` before another is asked for.
        """
        return self._grow_job(self.sizes.between(self.applied_epoch, through_epoch))

    def grow_job_for(self, changes: Sequence[VolumeChange]) -> GrowJob | None:
        """The same for changes that are in no epoch here."""
        return self._grow_job(changes)

    def _grow_job(self, changes: Sequence[VolumeChange]) -> GrowJob | None:
        lacking = [each for each in changes if self._prepared.get(each.index, 0) < each.size_bytes]
        if not lacking:
            return None
        files = {index: image.file for index, image in self.images.items()}
        return GrowJob(self.store, lacking, files, self._make_backing)

    def complete_grow(self, job: GrowJob) -> bool:
        """Take note of what was prepared; True when a checkpoint has to follow before it is used.

        A new backing is in the checkpoint, with size 0, before anything is written to it.
        """
        for change in job.changes:
            self._prepared[change.index] = change.size_bytes
            if change.index not in job.made:
                self._rename_claim(change)
                continue
            path, file = job.made[change.index]
            self.images[change.index] = Image(change.index, change.name, 0, file)
            self._index_of(change.index)
            record = VolumeRecord(
                change.index, change.name, 0, path, dict(change.backings), change.is_forced
            )
            self.superblock.volumes.append(record)
        return bool(job.made)

    def _rename_claim(self, change: VolumeChange) -> None:
        """An addition that did not come to be may have had another name."""
        for record in self.superblock.volumes:
            if record.index == change.index and change.is_addition:
                record.name, record.peers = change.name, dict(change.backings)
                record.is_forced = change.is_forced

    def prepare_now(self) -> None:
        """Prepare for everything that is in the journal. Blocking, before anything else runs."""
        job = self.grow_job(1 << 62)
        if job is not None:
            job.run()
            self.complete_grow(job)

    def _redo_pass(self, found: tuple[int, int]) -> None:
        job = self.grow_job(found[1])
        if job is not None:
            # The superblock may be an older copy, which does not know of a new volume.
            job.run()
            self.complete_grow(job)
        super()._redo_pass(found)

    # Primary.

    def check_growth(self, change: VolumeChange) -> None:
        """Refuse a change that cannot be. :raises RefusedError: with its cause."""
        what = change_problem(change, self.sizes.names, self.sizes.now, self.limits)
        if what:
            raise RefusedError(f'resource "{self.superblock.name}": {what}')
        record = VolumeRecord(change.index, change.name, 0, "", change.backings)
        room = BODY_BYTES_MAX - _SUPERBLOCK_SPARE_BYTES - body_bytes(self.superblock)
        # Twice: a path of this node is in it once more.
        if change.is_addition and 2 * len(encode_changes([change])) > room:
            raise RefusedError(
                f'resource "{self.superblock.name}" has no room for another volume with '
                f"{len(record.peers)} backings",
                hint="make another resource",
            )

    def forget_addition(self, index: int) -> None:
        """Let go of the backing of an addition that did not come to be. No job may be running."""
        if index in self.sizes.now or index not in self.images:
            return
        with contextlib.suppress(GeomirrorError):
            self.images[index].file.close()
        del self.images[index], self.indexes[index], self._prepared[index]
        volumes = self.superblock.volumes
        self.superblock.volumes = [each for each in volumes if each.index != index]

    def _shrink_images(self) -> None:
        """Let images have the sizes that the superblock says, after a rollback. Blocking."""
        records = {each.index: each for each in self.superblock.volumes}
        for index, image in list(self.images.items()):
            record = records.get(index)
            if record is None:
                with contextlib.suppress(GeomirrorError):
                    image.file.close()
                    self.store.unlink(volume_file_name(index))
                del self.images[index], self._prepared[index]
            elif record.size_bytes < image.size_bytes:
                self.images[index] = image.grown(record.size_bytes)
                if not record.backing:
                    image.file.truncate(record.size_bytes)
                    self._prepared[index] = record.size_bytes

    def grow(self, change: VolumeChange, wall_ns: int) -> int:
        """Journal a change that is checked and prepared; returns the epoch that will hold it.

        Durable after a sync. The volume has its new size on return.

        :raises JournalFullError, NoSpaceError: nothing changed.
        """
        assert self._prepared[change.index] >= change.size_bytes
        payload = encode_changes([change])
        self._take_room(record_room_bytes(len(payload)), 0, 2)
        lsn = self.journal.append_record(
            RecordType.RESIZE,
            [payload],
            volume=change.index,
            offset=change.old_size_bytes,
            length=change.size_bytes,
            flags=self._cut_number & 0xFF,
            wall_ns=wall_ns,
        )
        self._index_of(change.index).grow(change.size_bytes, lsn)
        epoch = self._open
        epoch.changes.append(change)
        self.sizes.add(epoch.number, [change])
        if epoch.since_wall_ns is None:
            epoch.since_wall_ns = wall_ns
        epoch.last_wall_ns = wall_ns
        return epoch.number

    def _index_of(self, volume: int) -> DirtyIndex:
        index = self.indexes.get(volume)
        if index is None:
            # Replaced, never changed: others may look at it on their way.
            index = DirtyIndex(0, self.limits.zero_run_blocks_min)
            self.indexes = {**self.indexes, volume: index}
        return index
