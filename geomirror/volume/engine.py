"""The storage of one resource on one node: journal, index, epochs, images.

```
 primary    write ─▶ journal + index ─▶ cut ─▶ SealJob ─▶ FILL, EPOCH ─┐
 secondary  spool ─▶ BLOCKS ─────────────────▶ commit ───▶ EPOCH ──────┴─▶ sync ─▶ apply ─▶ …
```
Invariants: a write is in the index exactly when it is in the journal (one batch, one append); an
epoch is sealed only when the journal is durable through its EPOCH record (I3); there is always room
to seal what was taken in, because writers are held back earlier than sealing is.
All methods belong to the event loop unless they say *blocking*; whatever may take long is a job.
Deliberately not here: when to do what (`wan_protocol.primary`, `wan_protocol.secondary`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

from geomirror.environment import Entropy
from geomirror.errors import GeomirrorError, StorageError
from geomirror.limits import Limits
from geomirror.volume.block_runs import BlockRuns
from geomirror.volume.engine_base import MakeBacking
from geomirror.volume.engine_one_step import OneStep
from geomirror.volume.engine_recovery import info_of, lowest_address, read_epoch, record_start
from geomirror.volume.engine_roles import RoleChanges
from geomirror.volume.engine_rollback import RollbackJob
from geomirror.volume.engine_setup import NewResource, VolumeSpec, create_parts, open_parts
from geomirror.volume.epoch_directory import EpochInfo
from geomirror.volume.epoch_record import encode_epoch
from geomirror.volume.epoch_table import Epoch, Table
from geomirror.volume.journal import Write
from geomirror.volume.marks import Mark
from geomirror.volume.open_epoch import (
    EpochDraft,
    OpenEpoch,
    cut,
    draft_changes,
    open_changes,
)
from geomirror.volume.record import HEADER_BYTES, RecordType
from geomirror.volume.seal import SealJob
from geomirror.volume.store import Buffer, File, Store
from geomirror.volume.superblock import GenerationRecord, Role, VolumeRecord

__all__ = ["Engine", "VolumeSpec", "Write"]


class Engine(OneStep, RoleChanges):
    """See the module; `create` and `open` are the ways to get one."""

    @classmethod
    def create(
        cls,
        store: Store,
        limits: Limits,
        entropy: Entropy,
        *,
        name: str,
        resource_id: bytes,
        volumes: Sequence[VolumeSpec],
        journal_bytes: int,
        role: Role,
        chain: Sequence[GenerationRecord],
        wall_ns: int,
        make_backing: MakeBacking | None = None,
    ) -> Engine:
        """Make a resource's storage, durable on return. Blocking.

        :param journal_bytes: a multiple of the segment size is used.
        :param chain: generation chain, oldest first; empty on a secondary before first contact.
        :param make_backing: for volumes that are added later; without it they get a file in the
            store.
        :raises StorageError: no space, or files are there already.
        :raises UsageError: a size is not allowed. :raises RefusedError: a backing is too small.
        """
        new = NewResource(name, resource_id, volumes, journal_bytes, role, chain, wall_ns)
        parts = create_parts(store, limits, entropy, new)
        parts.make_backing = make_backing
        return cls(parts)

    @classmethod
    def open(
        cls,
        store: Store,
        limits: Limits,
        entropy: Entropy,
        open_backing: Callable[[VolumeRecord], File],
        make_backing: MakeBacking | None = None,
    ) -> Engine:
        """Recover a resource's storage after a stop or a crash. Blocking.

        A pass that the crash left half applied is applied again, at most `dirty_bytes_max` of data:
        blocks that were being written may hold anything, also where nothing new was to be.

        :param open_backing: opens a backing that lies outside the store.
        :param make_backing: as for `create`.

        Epochs that peers may need, as the superblock knows them, are retained in their names.

        :raises FencedError: the journal is damaged, or does not fit the superblock.
        :raises IntegrityError: both superblock copies are damaged.
        :raises StorageError: a device failed; nothing is lost.
        """
        parts = open_parts(store, limits, entropy, open_backing)
        parts.make_backing = make_backing
        engine = cls(parts)
        try:
            engine.resume_rollback()
            if engine.superblock.role == "primary":
                engine.prepare_now()  # A secondary waits until a pass needs it.
            engine._redo()
            engine._finish_return()
            if engine.unapplied_promotion is not None:
                engine.lay_unapplied()
        except GeomirrorError:
            engine.close()
            raise
        return engine

    # Primary: sealing.

    @property
    def open_epoch_since_wall_ns(self) -> int | None:
        """Wall clock of the open epoch's first write, None while it is empty."""
        return self._open.since_wall_ns

    @property
    def last_wall_ns(self) -> int:
        """Wall clock of the last write."""
        return self._open.last_wall_ns

    def cut(self, wall_ns: int, *, is_mark: bool = False) -> EpochDraft | None:
        """End the open epoch; None when it is empty (unless it is a mark).

        The draft has to be sealed before the next cut.
        """
        assert self._draft is None, "the epoch before is not sealed yet"
        epoch = self._open
        if epoch.since_wall_ns is None and not is_mark:
            return None
        end_lsn = self.journal.end_lsn
        draft = cut(epoch, self.indexes, end_lsn=end_lsn, wall_ns=wall_ns, is_mark=is_mark)
        self._draft = draft
        self._draft_cut_number = self._cut_number
        self._cut_number += 1
        self._retention.begin_seal()
        self._open = OpenEpoch(epoch.number + 1, end_lsn, end_lsn, last_wall_ns=epoch.last_wall_ns)
        self._draft_lsn = epoch.boundary_lsn
        return draft

    def seal_job(self, draft: EpochDraft) -> SealJob:
        """A job that makes the draft's table."""
        assert draft is self._draft
        return SealJob(
            draft,
            previous_hash=self.committed_hash,
            generation=self.generation,
            read=self.journal.read,
            images=self.images,
            segment_bytes=self.limits.segment_bytes,
        )

    def complete_seal(self, job: SealJob, mark: Mark | None = None) -> None:
        """Append the draft's FILL and EPOCH records: committed, and sealed after a sync.

        :param mark: names the epoch; it comes into force with it.

        :raises NoSpaceError: the disk is full; call again later with the same job.
        """
        draft = job.draft
        assert draft is self._draft
        self._room_budget = 0
        assert self.applied_epoch < draft.number == self.committed_epoch + 1
        self._append_fills(job, draft.wall_ns)
        if mark is not None:
            self.marks.name_next(mark)
        epoch = Epoch(
            draft.number,
            draft.number,
            job.generation,
            draft.first_lsn,
            draft.end_lsn,
            draft.wall_ns,
            job.chain_hash,
            job.table,
            is_mark=draft.is_mark,
            changes=draft.changes,
        )
        self._append_epoch(
            epoch,
            cut_number=self._draft_cut_number,
            boundary_lsn=draft.boundary_lsn,
            data_lsn_min=self._draft_lsn,
            wall_ns=draft.wall_ns,
        )
        self._draft = None
        self._retention.end_seal()

    def _append_fills(self, job: SealJob, wall_ns: int) -> None:
        """Append the fills in records of bounded size and enter their addresses in the table."""
        addresses: list[int] = []
        at = 0
        while at < len(job.fills):
            end, size = at, 0
            while end < len(job.fills):
                size += len(job.fills[end])
                if size > self.limits.record_payload_bytes_max:
                    break
                end += 1
            lsn = self.journal.append_record(RecordType.FILL, job.fills[at:end], wall_ns=wall_ns)
            address = lsn + HEADER_BYTES
            for content in job.fills[at:end]:
                addresses.append(address)
                address += len(content)
            at = end
        if addresses:
            job.table["address"][job.fill_rows] = addresses

    def _append_epoch(
        self, epoch: Epoch, *, cut_number: int, boundary_lsn: int, data_lsn_min: int, wall_ns: int
    ) -> None:
        last = self._directory.last()
        previous_lsn = last.record_lsn if last else self.superblock.last_epoch_lsn
        record_lsn = self.journal.append_record(
            RecordType.EPOCH,
            [encode_epoch(epoch, previous_lsn)],
            flags=cut_number & 0xFF,
            wall_ns=wall_ns,
        )
        self._enter(
            epoch,
            info_of(
                epoch,
                record_lsn=record_lsn,
                boundary_lsn=boundary_lsn,
                data_lsn_min=min(data_lsn_min, record_lsn),
                previous_lsn=previous_lsn,
                cut_number=cut_number,
            ),
        )

    # Going back, on an engine that nobody runs.

    def seal_all(self, wall_ns: int) -> None:
        """Make an epoch of what is in none yet, durably. Blocking.

        :raises NoSpaceError, StorageError: it is not sealed.
        """
        # One that was cut before, and then the disk was full, comes first.
        while (draft := self._draft or self.cut(wall_ns)) is not None:
            job = self.seal_job(draft)
            job.run()
            self.complete_seal(job)
        sync = self.sync_job()
        sync.run()
        self.complete_sync(sync)

    def apply_through(self, epoch: int) -> None:
        """Bring the images to a sealed epoch, pass by pass as while running. Blocking.

        :raises StorageError: a device failed; open the resource again.
        """
        while self.applied_epoch < epoch:
            grow = self.grow_job(self.pass_end(epoch))
            if grow is not None:
                grow.run()
                self.complete_grow(grow)
            self._checkpoint_now()
            job = self.apply_job(self.pass_end(epoch))
            job.run()
            self.complete_apply(job)

    def roll_back(
        self,
        to_epoch: int,
        branch_name: str,
        *,
        wall_ns: int,
        chain_hash: bytes | None = None,
        chain: Sequence[GenerationRecord] | None = None,
        may_shrink: bool = False,
    ) -> RollbackJob:
        """Everything that `rollback_job` wants and does, at once. Blocking.

        :raises GeomirrorError: as there. With `must_reopen`, or a StorageError: close the engine
            and open it again, which ends what was begun. Else nothing has changed.
        """
        self.finish_return()
        self.seal_all(wall_ns)
        self.rollback_target(to_epoch, chain_hash, may_shrink=may_shrink)
        if self.half_applied_through is not None:
            self._checkpoint_now()
            self._redo()
        self.apply_through(to_epoch)
        self._checkpoint_now()
        job = self.rollback_job(
            to_epoch,
            branch_name,
            wall_ns=wall_ns,
            chain_hash=chain_hash,
            chain=chain,
            may_shrink=may_shrink,
        )
        try:
            job.run()
        except GeomirrorError as error:
            self.must_reopen = job.is_begun or isinstance(error, StorageError)
            if job.is_synced and not job.is_begun and job.sync is not None:
                self.journal.complete_sync(job.sync)
            raise
        self.complete_rollback(job)
        return job

    def _checkpoint_now(self) -> None:
        checkpoint = self.checkpoint_job()
        if checkpoint is not None:
            checkpoint.run()
            self.complete_checkpoint(checkpoint)

    # What changed since when, for block status.

    def epochs_after(self, epoch: int, count_max: int) -> list[EpochInfo]:
        """The oldest committed epochs > `epoch` that are in the journal."""
        return self._directory.after(epoch, count_max)

    def table_of(self, info: EpochInfo) -> Table:
        """The table of an epoch whose EPOCH record is pinned. Blocking; for any thread.

        :raises IntegrityError: it is damaged. :raises StorageError: the device failed.
        """
        return read_epoch(self.journal, self.limits, info.record_lsn)[0].table

    def uncommitted_changes(self, volume: int) -> list[BlockRuns]:
        """Blocks that the open epoch and the draft change: what is in no epoch record yet."""
        found = open_changes(self.indexes[volume], self._open.boundary_lsn)
        if self._draft is not None:
            drafts = [each for each in self._draft.volumes if each.volume == volume]
            found += [runs for draft in drafts for runs in draft_changes(draft)]
        return found

    # Secondary.

    def spool(self, parts: Sequence[Buffer], wall_ns: int) -> int:
        """Append received contents (one BLOCKS record) and return the address of the first byte.

        Kept until `keep_spooled` says otherwise or an epoch takes it over.

        :raises JournalFullError: no room; nothing changed. :raises NoSpaceError: the disk is full.
        """
        size = sum(map(len, parts))
        lsn = self.journal.append_record(RecordType.BLOCKS, parts, length=size, wall_ns=wall_ns)
        self._spooled.append(lsn)
        return lsn + HEADER_BYTES

    def keep_spooled(self, lowest_address: int) -> None:
        """Of what is spooled only this address and above is needed by later epochs; 0: nothing."""
        if lowest_address:
            del self._spooled[: max(0, bisect_right(self._spooled, lowest_address) - 1)]
        else:
            self._spooled.clear()

    def commit(self, epoch: Epoch, wall_ns: int, mark: Mark | None = None) -> None:
        """Append the EPOCH record of an epoch whose table has local addresses.

        It is durable when a sync after this call has completed (`sealed_epoch`), and with it the
        mark that names it.

        :raises JournalFullError, NoSpaceError: nothing changed.
        """
        assert epoch.first_number == self.committed_epoch + 1
        assert self._draft is None
        end_lsn = self.journal.end_lsn
        lowest = record_start(self._spooled, lowest_address(epoch, end_lsn))
        if mark is not None:
            self.marks.name_next(mark)
        self._append_epoch(
            epoch,
            cut_number=self._cut_number,
            boundary_lsn=end_lsn,
            data_lsn_min=lowest,
            wall_ns=wall_ns,
        )
        self._cut_number += 1
        self.sizes.add(epoch.number, epoch.changes)
        self._open = OpenEpoch(epoch.number + 1, epoch.end_lsn, end_lsn)
