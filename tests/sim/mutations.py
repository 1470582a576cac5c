"""Ways to break the product, each of which the simulator has to find.

A mutation is a list of patches; `mutated(name)` applies them for a while. What none of them does is
raise an error by itself: a wrong result has to be noticed by the oracle, or by a check that is in
the product for that very purpose (`proof`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from geomirror.limits import BLOCK_BYTES, REGION_BYTES
from geomirror.volume import recovery
from geomirror.volume.apply import ApplyJob
from geomirror.volume.block_runs import EMPTY
from geomirror.volume.dirty_bitmap import DirtyBitmap
from geomirror.volume.engine import Engine
from geomirror.volume.epoch_table import chain_hash
from geomirror.volume.image import Image
from geomirror.volume.journal import Journal
from geomirror.volume.open_epoch import open_changes
from geomirror.volume.seal import SealJob
from geomirror.volume.superblock import SuperblockFile
from geomirror.volume.undo_file import UndoWriter
from geomirror.wan_protocol.block_status import BlockStatus
from geomirror.wan_protocol.decisions import FlushDone
from geomirror.wan_protocol.epoch_intake import EpochIntake
from geomirror.wan_protocol.replica import Replica
from geomirror.wan_protocol.resync_receiver import ResyncReceiver
from geomirror.wan_protocol.resync_sender import ResyncSender
from geomirror.wan_protocol.secondary import Secondary
from tests.sim.growth_mutations import GROWTH_MUTATIONS
from tests.sim.history_mutations import HISTORY_MUTATIONS
from tests.sim.mark_mutations import MARK_MUTATIONS
from tests.sim.put_back_mutations import PUT_BACK_MUTATIONS
from tests.sim.resync_mutations import RESYNC_MUTATIONS
from tests.sim.rewind_mutations import REWIND_MUTATIONS
from tests.sim.succession_mutations import SUCCESSION_MUTATIONS
from tests.sim.sync_mutations import SYNC_MUTATIONS, Patch
from tests.sim.verify_mutations import VERIFY_MUTATIONS

DROP_EVERY = 97


def ship_before_fsync() -> list[Patch]:
    """An epoch counts as sealed when its record is appended, not when it is durable."""
    real = Engine.complete_seal

    def complete_seal(self: Engine, job: SealJob, *rest: Any) -> None:
        real(self, job, *rest)
        self.sealed_epoch, self.sealed_hash = self.committed_epoch, self.committed_hash

    return [(Engine, "complete_seal", complete_seal)]


def drop_last_write() -> list[Patch]:
    """Every 97th epoch lacks the last of its blocks; its hash is right for what is left."""
    real = SealJob.run

    def run(self: SealJob) -> None:
        real(self)
        draft = self.draft
        if draft.number % DROP_EVERY or not len(self.table):
            return
        self.table = self.table[:-1]
        kept = self.fill_rows < len(self.table)
        self.fills = [fill for fill, is_kept in zip(self.fills, kept, strict=True) if is_kept]
        self.fill_rows = self.fill_rows[kept]
        first, end = draft.first_lsn, draft.end_lsn
        self.chain_hash = chain_hash(
            self._previous_hash,
            self.generation,
            draft.number,
            first,
            end,
            self.table,
            draft.changes,
        )

    return [(SealJob, "run", run)]


def trim_early() -> list[Patch]:
    """The segment of the lowest pin is recycled too."""
    real = Journal.trim_job

    def trim_job(self: Journal) -> Any:
        pins = self._pins
        lowest = min((pin.lsn for pin in pins.values()), default=0)
        shifted = {0: mock.Mock(lsn=lowest + self._segment_bytes)}
        self._pins = shifted if pins else {}
        try:
            return real(self)
        finally:
            self._pins = pins

    return [(Journal, "trim_job", trim_job)]


def durable_before_fsync() -> list[Patch]:
    """A secondary reports an epoch as durable when its record is appended."""
    real = Engine.commit

    def commit(self: Engine, epoch: Any, wall_ns: int, *rest: Any) -> None:
        real(self, epoch, wall_ns, *rest)
        self.sealed_epoch, self.sealed_hash = self.committed_epoch, self.committed_hash

    return [(Engine, "commit", commit)]


def cut_durable_tail() -> list[Patch]:
    """Recovery cuts one record below the LSN that is proven durable, and what follows it."""
    real = recovery._prove

    def prove(log: Any, scan: Any, known_durable_lsn: int, resource_id: bytes) -> int:
        durable_lsn = real(log, scan, known_durable_lsn, resource_id)
        kept = sum(record.end_lsn <= durable_lsn for record in scan.records) - 1
        if kept > 0:
            del scan.records[kept:], scan.payload_checks[kept:]
        return durable_lsn

    return [(recovery, "_prove", prove)]


def destage_unsealed() -> list[Patch]:
    """Destaging writes blocks of the open epoch along."""
    real = Engine.apply_job

    def apply_job(self: Engine, through_epoch: int) -> ApplyJob:
        job = real(self, through_epoch)
        real_run = job.run

        def run() -> None:
            real_run()
            for volume, index in self.indexes.items():
                image = self.images[volume]
                for block in list(index.touched)[:4]:
                    length = image.block_bytes(block)
                    content = self.read(volume, block * BLOCK_BYTES, length)
                    image.write_blocks([(block, content)])
                image.fdatasync()

        job.run = run  # type: ignore[method-assign]
        return job

    return [(Engine, "apply_job", apply_job)]


def lose_bitmap_bit() -> list[Patch]:
    """The bit of an epoch's last entry is not set for a peer that is away."""
    real = DirtyBitmap.set_table

    def set_table(self: DirtyBitmap, table: Any, through_epoch: int | None = None) -> None:
        if not len(table):
            real(self, table, through_epoch)
            return
        volume = int(table["volume"][-1])
        region = int(table["block"][-1]) * BLOCK_BYTES // REGION_BYTES
        was_dirty = self.is_dirty(volume, region)
        real(self, table, through_epoch)
        if not was_dirty:
            self.clear_range(volume, region, 1)

    return [(DirtyBitmap, "set_table", set_table)]


class _Unsynced:
    """A file whose `fdatasync` does nothing."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def fdatasync(self) -> None:
        """Nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def undo_not_synced() -> list[Patch]:
    """The image is changed before the undo is durable."""
    real = UndoWriter.__init__

    def init(self: UndoWriter, file: Any, *rest: Any) -> None:
        real(self, _Unsynced(file), *rest)  # type: ignore[arg-type]

    return [(UndoWriter, "__init__", init)]


def image_not_synced() -> list[Patch]:
    """The checkpoint says that an epoch is applied before the image holds it durably."""
    return [(Image, "fdatasync", lambda self: None)]


def flush_before_sync() -> list[Patch]:
    """A flush is answered at once."""

    def flush(self: Replica, token: object, now_ns: int) -> None:
        self._sync_wanted = True
        self._decide(FlushDone(token))
        self._pump()

    return [(Replica, "flush", flush)]


def frames_not_asked_for() -> list[Patch]:
    """Frames that were lost with their connection are never asked for."""
    return [(EpochIntake, "awaited", property(lambda self: None))]


def bits_cleared_early() -> list[Patch]:
    """Regions count as clean when they are read, not when the peer has them durable."""
    real = ResyncSender.read_done

    def read_done(self: ResyncSender, job: Any) -> None:
        real(self, job)
        for _, parts in self._chunks:
            for volume, first, stop in parts:
                self.bitmap.clear_range(volume, first, stop - first)

    return [(ResyncSender, "read_done", read_done)]


def inconsistent_not_said() -> list[Patch]:
    """A copy that is being made anew says that it is consistent."""
    real = Engine.reset_position

    def reset_position(self: Engine, *position: Any, **options: Any) -> None:
        real(self, *position, **{**options, "data_state": "consistent"})

    return [(Engine, "reset_position", reset_position)]


def consistent_early() -> list[Patch]:
    """After a resync the copy counts as consistent at the epoch where it began."""
    real = ResyncReceiver.needs_checkpoint

    def needs_checkpoint(self: ResyncReceiver) -> bool:
        is_needed = real(self)
        if self._is_end_recorded:
            self.engine.superblock.consistent_from = self.begin.epoch
        return is_needed

    return [(ResyncReceiver, "needs_checkpoint", needs_checkpoint)]


def superblock_not_synced() -> list[Patch]:
    """A checkpoint counts before it is durable."""
    real = SuperblockFile.write_slot

    def write_slot(self: SuperblockFile, data: bytes) -> None:
        file = self._file
        self._file = _Unsynced(file)  # type: ignore[assignment]
        try:
            real(self, data)
        finally:
            self._file = file

    return [(SuperblockFile, "write_slot", write_slot)]


def apply_while_held() -> list[Patch]:
    """Applying goes on under readers that hold the image."""
    real = Secondary._apply_target

    def apply_target(self: Secondary) -> int | None:
        hold, self.hold_apply = self.hold_apply, False
        try:
            return real(self)
        finally:
            self.hold_apply = hold

    return [(Secondary, "_apply_target", apply_target)]


def index_forgets_newer() -> list[Patch]:
    """Destaging an epoch makes the index forget newer contents of the same blocks too."""
    real = Engine.complete_apply

    def complete_apply(self: Engine, job: ApplyJob) -> None:
        real(self, job)
        for volume, index in self.indexes.items():
            for block in job.table["block"][job.table["volume"] == volume].tolist()[:1]:
                index.entries.pop(block, None)

    return [(Engine, "complete_apply", complete_apply)]


def status_of_what_was_received() -> list[Patch]:
    """Block status counts what a peer has in memory as held."""
    real = BlockStatus._stand

    def stand(self: BlockStatus, name: str, *rest: Any) -> Any:
        standing = real(self, name, *rest)
        sender = self._primary.senders.get(name)
        if sender is not None and standing.position == sender.durable_epoch:
            standing.position = max(sender.received_epoch, sender.durable_epoch)
        return standing

    return [(BlockStatus, "_stand", stand)]


def status_without_the_draft() -> list[Patch]:
    """Block status forgets the epoch that is being sealed."""

    def uncommitted_changes(self: Engine, volume: int) -> list[Any]:
        return open_changes(self.indexes[volume], self._open.boundary_lsn)

    return [(Engine, "uncommitted_changes", uncommitted_changes)]


def status_without_the_bitmap() -> list[Patch]:
    """Block status looks into the journal only."""

    def blocks_within(self: DirtyBitmap, volume: int, first: int, end: int) -> Any:
        return EMPTY

    return [(DirtyBitmap, "blocks_within", blocks_within)]


def undo_after_image() -> list[Patch]:
    """The undo of a pass is made when the image is changed already."""
    real_save, real_write = ApplyJob._save_old, ApplyJob._write_data

    def save(self: ApplyJob, last: Any) -> None:
        self._last = last  # type: ignore[attr-defined]

    def write(self: ApplyJob) -> None:
        real_write(self)
        if self.with_undo:
            real_save(self, self._last)  # type: ignore[attr-defined]

    return [(ApplyJob, "_save_old", save), (ApplyJob, "_write_data", write)]


MUTATIONS: dict[str, Callable[[], list[Patch]]] = {
    make.__name__: make
    for make in (
        *SYNC_MUTATIONS,
        *HISTORY_MUTATIONS,
        ship_before_fsync,
        drop_last_write,
        trim_early,
        durable_before_fsync,
        cut_durable_tail,
        destage_unsealed,
        lose_bitmap_bit,
        undo_not_synced,
        image_not_synced,
        flush_before_sync,
        frames_not_asked_for,
        bits_cleared_early,
        inconsistent_not_said,
        consistent_early,
        superblock_not_synced,
        apply_while_held,
        index_forgets_newer,
        status_of_what_was_received,
        status_without_the_draft,
        status_without_the_bitmap,
        undo_after_image,
        *MARK_MUTATIONS,
        *RESYNC_MUTATIONS,
        *GROWTH_MUTATIONS,
        *SUCCESSION_MUTATIONS,
        *REWIND_MUTATIONS,
        *VERIFY_MUTATIONS,
        *PUT_BACK_MUTATIONS,
    )
}


@contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """Break the product in this way, or not at all."""
    with ExitStack() as stack:
        for target, attribute, replacement in MUTATIONS[name]() if name else []:
            stack.enter_context(mock.patch.object(target, attribute, replacement))
        yield
