"""What a resource's storage does on both sides: sync, apply, checkpoint, retain, read epochs.

```
 committed ──sync──▶ sealed (durable) ──apply──▶ applied (image) ──checkpoint──▶ persisted ─▶ trim
```
Invariants: sealed <= committed; applied <= sealed (I14); pins follow durable checkpoints only, so a
crash at any point finds everything it needs.
Deliberately not here: writing and sealing, spooling and committing (`engine`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from geomirror.environment import Entropy
from geomirror.errors import FencedError
from geomirror.limits import Limits
from geomirror.volume.apply import ApplyJob
from geomirror.volume.dirty_index import DirtyIndex
from geomirror.volume.engine_jobs import CheckpointJob
from geomirror.volume.engine_recovery import needed_after, read_epoch
from geomirror.volume.epoch_directory import EpochDirectory, EpochInfo
from geomirror.volume.epoch_table import Epoch
from geomirror.volume.image import Image
from geomirror.volume.journal import Journal, SyncJob
from geomirror.volume.mark_log import MarkLog
from geomirror.volume.marks import MarkTable
from geomirror.volume.open_epoch import EpochDraft, OpenEpoch
from geomirror.volume.retention import Retention
from geomirror.volume.store import File, Store
from geomirror.volume.superblock import Superblock, SuperblockFile, copy_of
from geomirror.volume.undo import UndoStore
from geomirror.volume.undo_open import OpenPass
from geomirror.volume.volume_change import VolumeChange
from geomirror.volume.volume_sizes import VolumeSizes
from geomirror.volume.way_back import WAY_BACK, way_back

MakeBacking = Callable[[VolumeChange], tuple[str, File] | None]
"""Path and file of an added volume's backing on this node; None for a file in the store. Blocking.
Raises GeomirrorError: it is missing, in use, or holds data that must not be overwritten."""

NO_GENERATION = bytes(16)
"""Generation of a secondary that no primary has spoken to yet."""


@dataclass
class EngineParts:
    """What an engine is made of; see `engine_setup`."""

    store: Store
    limits: Limits
    entropy: Entropy
    superblock: Superblock
    superblock_file: SuperblockFile
    journal: Journal
    images: dict[int, Image]
    indexes: dict[int, DirtyIndex]
    undo: UndoStore
    directory: EpochDirectory
    open_epoch: OpenEpoch
    cut_number: int
    sealed_epoch: int
    sealed_hash: bytes
    marks: MarkTable
    sizes: VolumeSizes
    make_backing: MakeBacking | None = None
    open_pass: OpenPass | None = None
    spooled: list[int] = field(default_factory=list)
    moved: list[tuple[int, int]] = field(default_factory=list)


class EngineBase:
    """The shared half of `Engine`."""

    def __init__(self, parts: EngineParts) -> None:
        self.store = parts.store
        self.limits = parts.limits
        self.superblock = parts.superblock
        self.journal = parts.journal
        self.images = parts.images
        self.indexes = parts.indexes
        self.undo = parts.undo
        self.sizes = parts.sizes
        """Of the volumes: now, and at earlier epochs; an image has its own, of the applied one."""
        self._make_backing = parts.make_backing
        self._prepared = {index: image.size_bytes for index, image in self.images.items()}
        """Sizes that what lies under the volumes surely has."""
        self.open_pass = parts.open_pass
        """Of a resync under way, when there is a state to go back to."""
        self.moved = parts.moved
        """(old LSN, new LSN) of records that recovery wrote again."""
        self.marks = MarkLog(parts.journal, parts.store, parts.marks)
        self.sealed_epoch = parts.sealed_epoch
        self.sealed_hash = parts.sealed_hash
        self.committed_epoch = parts.sealed_epoch
        """Newest epoch whose EPOCH record is appended; durable when `sealed_epoch` reaches it."""
        self.committed_hash = parts.sealed_hash
        self._superblock_file = parts.superblock_file
        self._written = copy_of(parts.superblock)
        self._directory = parts.directory
        self._open = parts.open_epoch
        self._draft: EpochDraft | None = None
        self._draft_lsn = 0
        """Where the draft's records begin."""
        self._draft_cut_number = 0
        self._cut_number = parts.cut_number
        self._spooled = parts.spooled
        self._unsealed: deque[tuple[int, bytes, int]] = deque()
        """(number, hash, end LSN of the EPOCH record) of committed epochs that are not durable."""
        self._retention = Retention(self.journal, self._directory, self.superblock.scan_lsn)
        for peer, record in self.superblock.peers.items():
            self.retain(peer, needed_after(record))
        self._retain_way_back()
        self._retention.checkpointed(self.applied_epoch, self.superblock.scan_lsn)

    # Positions.

    @property
    def generation(self) -> bytes:
        """Identity of the current history; `NO_GENERATION` before the first contact."""
        chain = self.superblock.chain
        return bytes.fromhex(chain[-1].identity) if chain else NO_GENERATION

    @property
    def applied_epoch(self) -> int:
        """The epoch that the images hold."""
        return self.superblock.applied_epoch

    @property
    def half_applied_through(self) -> int | None:
        """The epoch of a pass that failed half-way: exactly it has to be repeated next (I6)."""
        if self.superblock.data_state != "consistent":
            return None  # Without undo there is nothing to go back to, nor to damage.
        found = self.undo.pending_pass(self.applied_epoch)
        return None if found is None else found[1]

    @property
    def applied_hash(self) -> bytes:
        """H(applied_epoch)."""
        return bytes.fromhex(self.superblock.applied_hash)

    @property
    def completed_lsn(self) -> int:
        """Everything completed lies below."""
        return self.journal.end_lsn

    @property
    def scan_lsn(self) -> int:
        """What is not applied lies at or above it: a pin here keeps all that can be read now."""
        return self._retention.scan_lsn

    @property
    def sealed_end_lsn(self) -> int:
        """Changes of the local journal below this position are in sealed epochs."""
        if self.sealed_epoch < self.committed_epoch:
            return self._directory.info(self.sealed_epoch + 1).data_lsn_min
        return self._uncommitted_lsn

    @property
    def last_changed_epoch(self) -> int:
        """No change so far is in a later epoch; it is sealed or will be without another write."""
        is_empty = self._open.since_wall_ns is None
        return self._open.number - 1 if is_empty else self._open.number

    # Epochs.

    def epoch_numbers(self) -> list[int]:
        """The epochs in the journal, ascending; a fold by its last number."""
        return self._directory.numbers()

    def unapplied_epochs(self) -> list[EpochInfo]:
        """Committed epochs that the images do not hold yet, ascending; bounded like dirty data."""
        return self._directory.after(self.applied_epoch)

    def epoch_info(self, number: int) -> EpochInfo:
        """Where an epoch (or the fold that covers it) lies. :raises NotFoundError: not here."""
        return self._directory.info(number)

    def load_epoch(self, number: int) -> Epoch:
        """An epoch (or the fold that covers it) with its table. Blocking; for any thread.

        :raises NotFoundError: it is not in the journal. :raises IntegrityError: it is damaged.
        """
        return read_epoch(self.journal, self.limits, self._directory.info(number).record_lsn)[0]

    def bytes_backlog(self, epoch: int) -> int:
        """Journal bytes, about, that are kept for epochs > `epoch`."""
        floor = self._directory.floor_after(epoch)
        return 0 if floor is None else min(self.journal.end_lsn - floor, self.journal.bytes_used)

    def retain(self, owner: str, epoch: int) -> None:
        """Keep every epoch > `epoch` readable for `owner`; replaces what it retained before."""
        self._retention.retain(owner, epoch, self._uncommitted_lsn)

    def release(self, owner: str) -> None:
        """`owner` needs no epochs any more."""
        self._retention.release(owner)

    # Sync.

    def sync_job(self) -> SyncJob:
        """A job that makes everything appended so far durable."""
        return self.journal.begin_sync()

    def complete_sync(self, job: SyncJob) -> None:
        """Move `journal.durable_lsn`, and `sealed_epoch` to the last epoch that is durable now."""
        self.journal.complete_sync(job)
        while self._unsealed and self._unsealed[0][2] <= self.journal.durable_lsn:
            self.sealed_epoch, self.sealed_hash, _ = self._unsealed.popleft()
        self.marks.complete_sync(self.journal.durable_lsn)

    # Apply.

    def apply_job(self, through_epoch: int) -> ApplyJob:
        """A job that brings the images to `through_epoch`, which is sealed.

        The pass before has to be checkpointed: after a crash, undo tells one half-applied pass from
        the image, not two.
        """
        assert self._written.applied_epoch == self.applied_epoch, "checkpoint the pass before first"
        first, last = self.applied_epoch, through_epoch
        assert first < last <= self.sealed_epoch
        assert self._directory.info(last).number == last, "a fold is applied as a whole"
        infos = [info for info in self._directory.after(first) if info.number <= last]
        lsns = [info.record_lsn for info in infos]

        def load() -> Sequence[Epoch]:
            return [read_epoch(self.journal, self.limits, lsn)[0] for lsn in lsns]

        return ApplyJob(
            first,
            last,
            load,
            self.journal.read_into,
            {index: image.physical for index, image in self.images.items()},
            self.undo,
            self.limits,
            with_undo=self.superblock.data_state == "consistent",
            open_pass=self.open_pass,
        )

    def pass_end(self, through_epoch: int) -> int:
        """The sealed epoch, at most `through_epoch`, that a bounded apply pass from here reaches.

        Bounded, because writers that wait for room and readers that wait for a pass to end wait
        for the whole of it.
        """
        total, reached = 0, self.applied_epoch
        for info in self.unapplied_epochs():
            total += info.raw_bytes
            is_enough = reached > self.applied_epoch and total > self.limits.apply_pass_bytes_max
            if info.number > min(through_epoch, self.sealed_epoch) or is_enough:
                break
            reached = info.number
            if info.is_mark:
                break  # What was marked must be a state that the images were in.
        return reached

    def complete_apply(self, job: ApplyJob) -> None:
        """Take note that the images hold `job.to_epoch`; persisted by the next checkpoint."""
        assert job.from_epoch == self.applied_epoch
        info = self._directory.info(job.to_epoch)
        assert info.chain_hash == job.chain_hash
        for volume, index in self.indexes.items():
            if index.entry_count:
                low, high = np.searchsorted(job.table["volume"], [volume, volume + 1]).tolist()
                index.forget(job.table[low:high], info.boundary_lsn)
        superblock = self.superblock
        self._grow_images(job.changes)
        superblock.applied_epoch = info.number
        superblock.applied_hash = info.chain_hash.hex()
        superblock.applied_first_epoch = info.first_number
        superblock.applied_end_lsn = info.end_lsn
        superblock.applied_wall_ns = info.wall_ns
        superblock.applied_cut = info.cut
        superblock.last_epoch_lsn = info.record_lsn

    def _grow_images(self, changes: Sequence[VolumeChange]) -> None:
        """The images hold an epoch in which the volumes have these sizes."""
        sizes = {each.index: each.size_bytes for each in changes}
        for index, size_bytes in sizes.items():
            assert self._prepared[index] >= size_bytes
            self.images[index] = self.images[index].grown(size_bytes)
            self.indexes[index].size_bytes = max(self.indexes[index].size_bytes, size_bytes)
        for record in self.superblock.volumes:
            record.size_bytes = sizes.get(record.index, record.size_bytes)

    # Checkpoint.

    def checkpoint_job(self) -> CheckpointJob | None:
        """A job that makes the superblock durable; None when nothing in it has changed.

        Run one at a time, and never beside an apply job.
        """
        superblock = self.superblock
        floor = self._directory.floor_after(self.applied_epoch)
        start = self._uncommitted_lsn
        scan_lsn = start if floor is None else min(floor, start)
        scan_lsn = min(scan_lsn, self.marks.lowest_lsn or scan_lsn)
        # A floor is a lower bound; the position of an earlier checkpoint is one, too.
        superblock.scan_lsn = max(scan_lsn, self.scan_lsn)
        superblock.undo_next = self.undo.next_counter
        if self.half_applied_through is None:
            superblock.undo_settled = superblock.undo_next
        same = {"known_durable_lsn": superblock.known_durable_lsn, "sequence": superblock.sequence}
        is_same = msgspec.structs.replace(self._written, **same) == superblock
        has_due = self.undo.is_void or bool(self.undo.left_over)
        if is_same and not has_due and not self._is_segment_unknown:
            return None
        superblock.known_durable_lsn = self.journal.durable_lsn
        version = copy_of(superblock)
        undo = self.undo if has_due else None
        write = self._superblock_file.write_job(version)
        return CheckpointJob(version, write, undo, self.marks.save_job())

    def complete_checkpoint(self, job: CheckpointJob) -> None:
        """The checkpoint is durable: the journal below it is not needed by recovery any more."""
        self._written = job.superblock
        if job.marks is not None:
            self.marks.complete_save(job.marks)
        self.marks.table.forget_former()
        self._retain_way_back()
        self._retention.checkpointed(job.superblock.applied_epoch, job.superblock.scan_lsn)

    def close(self) -> None:
        """Close all files; nothing is synced."""
        self.journal.close()
        self._superblock_file.close()
        for image in self.images.values():
            image.close()

    def _retain_way_back(self) -> None:
        """Keep the journal from the boundary on that a rollback may have to begin at."""
        wanted = way_back(self.undo.history, self.superblock, self._directory, self.limits)
        self.retain(WAY_BACK, wanted)
        self.yield_way_back()

    def yield_way_back(self) -> None:
        """Going on is worth more than going back by parts of a pass: give that up for room.

        What is under way can need two segments, whatever part of the last one is left.
        """
        is_scarce = self.journal.room_bytes() < self.limits.segment_bytes
        if is_scarce and self.superblock.rollback is None:
            self.retain(WAY_BACK, self.applied_epoch)

    @property
    def _is_segment_unknown(self) -> bool:
        """The log is durable into a segment that nothing outside of it tells of."""
        known_lsn, size = self._written.known_durable_lsn, self.limits.segment_bytes
        return self.journal.durable_lsn // size > known_lsn // size

    @property
    def _uncommitted_lsn(self) -> int:
        """Nothing that an epoch without EPOCH record can need lies below."""
        if self.superblock.role == "primary":
            return self._open.boundary_lsn if self._draft is None else self._draft_lsn
        return self._spooled[0] if self._spooled else self.journal.end_lsn

    @property
    def _open_entries(self) -> int:
        return sum([len(index.touched) for index in self.indexes.values()])

    def _enter(self, epoch: Epoch, info: EpochInfo) -> None:
        """An EPOCH record was appended."""
        self._directory.append(info)
        self._unsealed.append((epoch.number, epoch.chain_hash, self.journal.end_lsn))
        self.marks.epoch_appended(epoch, info.record_lsn, self.superblock)
        self.committed_epoch, self.committed_hash = epoch.number, epoch.chain_hash

    def _redo(self) -> None:
        """Repeat exactly the passes that the image may hold a part of (I6). Blocking.

        One that a crash left half applied; more when the newer superblock copy is damaged and the
        older one speaks of an earlier state.
        """
        if self.superblock.data_state != "consistent":
            return
        while (found := self.undo.pending_pass(self.applied_epoch)) is not None:
            self._redo_pass(found)

    def _redo_pass(self, found: tuple[int, int]) -> None:
        if found[1] > self.sealed_epoch or found[1] not in self._directory.numbers():
            raise FencedError(
                f'resource "{self.superblock.name}": epochs {found} are half applied and not in '
                f"the journal, which ends at epoch {self.sealed_epoch}",
                hint="the journal is damaged; keep the data directory and make this copy anew",
            )
        job = self.apply_job(found[1])
        job.run()
        self.complete_apply(job)
        checkpoint = self.checkpoint_job()
        assert checkpoint is not None
        checkpoint.run()
        self.complete_checkpoint(checkpoint)
