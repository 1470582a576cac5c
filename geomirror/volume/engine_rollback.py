"""Rolling an engine back: to which epochs it can be, and its state afterwards.

```
 boundaries  ├────b0──────b1──────b2──────a       undo leads to each
 journal             [ epochs f … a … end ]       kept from a boundary on: any epoch from the first
 possible     b0  b1.…………………………………… end        boundary at or above f-1 on can be the target
```
Invariant: afterwards the images hold the target, nothing of the journal is needed to know it, and
recovery begins behind everything that was cut off.
Deliberately not here: the steps and their order (`rollback`), when to roll back (`cluster`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from geomirror.errors import NotFoundError, RefusedError
from geomirror.volume.branch_view import BranchView
from geomirror.volume.branches import BranchRecord, BranchStore
from geomirror.volume.dirty_index import DirtyIndex
from geomirror.volume.engine_base import EngineParts
from geomirror.volume.engine_growth import VolumeGrowth
from geomirror.volume.engine_recovery import read_epoch
from geomirror.volume.epoch_directory import EpochInfo
from geomirror.volume.epoch_table import Epoch
from geomirror.volume.marks_file import SaveMarksJob
from geomirror.volume.open_epoch import OpenEpoch
from geomirror.volume.rollback import RollbackJob, RollbackParts, Tail, Versions, grown_since
from geomirror.volume.rollback_position import clamped, nearest
from geomirror.volume.superblock import GenerationRecord, RollbackRecord, Superblock, copy_of

__all__ = ["RollbackJob", "RollbackPath"]


class RollbackPath(VolumeGrowth):
    """The part of `Engine` that goes back."""

    def __init__(self, parts: EngineParts) -> None:
        super().__init__(parts)
        pending = self.superblock.rollback
        self._pinned: dict[str, int] = {}
        self.must_reopen = False
        """A rollback failed half-way: opening the resource again ends it."""
        self.branches = BranchStore(self.store, self.limits, pending.branch if pending else "")
        if pending is None:
            self.undo.drop_joint()
        self._pin_branches()

    def rollback_points(self, *, may_shrink: bool = False) -> list[int]:
        """The epochs that `rollback_job` can go back to now, ascending; of a fold, its end.

        :param may_shrink: also to before a volume has grown or was added.
        """
        if self.superblock.data_state != "consistent":
            return []
        boundaries = self._boundaries()
        numbers = self._directory.numbers()
        low = max(boundaries[0], self.superblock.consistent_from)
        if not may_shrink:
            low = max(low, self.sizes.newest_change)
        # Each but the first is where a pass ends, so that its label is there.
        found = set(boundaries[1:])
        if self._info_of(boundaries[0]) is not None:
            found.add(boundaries[0])
        if numbers:
            start = self._directory.info(numbers[0]).first_number - 1
            base = next((each for each in boundaries if each >= start), None)
            if base is not None:
                found.update(number for number in numbers if number >= base)
        found.add(self.applied_epoch)
        return sorted(each for each in found if each >= low)

    def rollback_targets(self) -> list[EpochInfo]:
        """What is known of each of `rollback_points`, ascending."""
        found = [self._info_of(each) for each in self.rollback_points()]
        return [each for each in found if each is not None]

    def rollback_target(
        self, epoch: int, chain_hash: bytes | None = None, *, may_shrink: bool = False
    ) -> EpochInfo:
        """What is known of an epoch that `rollback_job` can go back to.

        :raises NotFoundError, RefusedError: as there.
        """
        superblock = self.superblock
        if superblock.data_state != "consistent":
            raise RefusedError(
                f'resource "{superblock.name}" is Inconsistent here: its first sync or a resync is '
                "not over, so there is nothing to go back from"
            )
        if epoch < self.sizes.newest_change and not may_shrink:
            raise grown_since(epoch)
        points = self.rollback_points(may_shrink=may_shrink)
        found = self._info_of(epoch, chain_hash)
        # One whose hash only the caller knows is none of the points.
        is_boundary = epoch in self._boundaries() and epoch >= superblock.consistent_from
        if found is None or not (epoch in points or is_boundary):
            raise NotFoundError(
                f'resource "{self.superblock.name}" cannot go back to epoch {epoch}: '
                + nearest(points, epoch),
                hint='"geomirror timeline" shows what is kept',
            )
        if chain_hash is not None and chain_hash != found.chain_hash:
            raise RefusedError(
                f'resource "{self.superblock.name}": epoch {epoch} is not the same here and there, '
                "so the histories differ before it"
            )
        return found

    def retreat_point(
        self, epoch: int, chain_hash: bytes | None = None
    ) -> tuple[int, bytes | None]:
        """Where to go back to so that nothing after `epoch` is left: to it, or to the newest state
        before it that is kept; and the hash that is to be compared there, None for none.

        :raises RefusedError: none is kept; or the epoch has another hash here.
        """
        try:
            self.rollback_target(epoch, chain_hash, may_shrink=True)
        except NotFoundError:
            points = [e for e in self.rollback_points(may_shrink=True) if e < epoch]
            if points:
                return points[-1], None
            name = self.superblock.name
            raise RefusedError(
                f'resource "{name}": no state at or before epoch {epoch}, where the histories '
                "part, is kept here any more",
                hint=f'make this copy anew: "geomirror resource remove-secondary {name}", then add',
            ) from None
        return epoch, chain_hash

    def rollback_job(
        self,
        to_epoch: int,
        branch_name: str,
        *,
        wall_ns: int,
        chain_hash: bytes | None = None,
        chain: Sequence[GenerationRecord] | None = None,
        may_shrink: bool = False,
    ) -> RollbackJob:
        """A job that makes `to_epoch` the newest epoch here; what came later becomes a branch.

        No other job may run until `complete_rollback`, and everything has to be sealed and applied
        up to `to_epoch` (`roll_back` sees to that). A tail without any epoch leaves no branch.

        :param branch_name: a number is added to a name that is taken; see `job.branch`.
        :param wall_ns: the branch was made then, Unix ns.
        :param chain_hash: H(to_epoch) as somebody else has it, to be compared.
        :param chain: the generation chain afterwards; None: what is left of this one.
        :raises NotFoundError: the state is not kept; names the nearest ones that are.
        :param may_shrink: volumes that have grown since are what they were, added ones are gone.
        :raises RefusedError: H differs, a volume has grown since, this copy is not consistent, or
            branches leave no room.
        """
        info = self.rollback_target(to_epoch, chain_hash, may_shrink=may_shrink)
        assert self.half_applied_through is None
        assert self._draft is None, "seal the draft first"
        assert not self._open_entries, "seal the open epoch first"
        assert to_epoch <= self.applied_epoch, "apply up to the target first"
        boundary = max(each for each in self._boundaries() if each <= to_epoch)
        superblock = self.superblock
        tail = self._tail(info, branch_name, wall_ns, may_shrink)
        record = RollbackRecord(
            to_epoch,
            info.chain_hash.hex(),
            info.first_number,
            info.wall_ns,
            info.end_lsn,
            boundary,
            tail.record.name if tail else "",
            list(chain_through(superblock.chain, to_epoch) if chain is None else chain),
        )
        intent = copy_of(superblock)
        intent.rollback = record
        return self._make_job(record, intent, tail)

    def complete_rollback(self, job: RollbackJob) -> None:
        """The job has run: go on at its epoch. The caller compares chains and takes a role."""
        if job.sync is not None:
            self.journal.complete_sync(job.sync)
        done = job.versions.done
        for name in done.__struct_fields__:
            setattr(self.superblock, name, getattr(done, name))
        self._written = copy_of(done)
        epoch, end_lsn = done.applied_epoch, self.journal.end_lsn
        self._directory.drop_after(epoch)
        self._spooled.clear()
        self._unsealed.clear()
        self.marks.reset(self.marks.table_through(epoch))
        self._set_layer(None)
        self._shrink_images()
        self.sizes.cut(epoch, {each.index: each.size_bytes for each in self.superblock.volumes})
        run_min = self.limits.zero_run_blocks_min
        self.indexes = {i: DirtyIndex(each.size_bytes, run_min) for i, each in self.images.items()}
        self.sealed_epoch = self.committed_epoch = epoch
        self.sealed_hash = self.committed_hash = bytes.fromhex(done.applied_hash)
        self._open = OpenEpoch(epoch + 1, done.applied_end_lsn or end_lsn, end_lsn)
        self._room_budget = self._entry_budget = 0
        for owner, kept in self._retention.owners().items():
            self.retain(owner, min(kept, epoch))
        self._retention.checkpointed(epoch, done.scan_lsn)
        self._pin_branches()

    def resume_rollback(self) -> None:
        """Finish the rollback that the superblock names, if it does. Blocking."""
        record = self.superblock.rollback
        if record is None:
            return
        job = self._make_job(record, None, None)
        job.run()
        self.complete_rollback(job)

    def view_branch(self, name: str) -> BranchView:
        """The volumes as they were at the end of a branch; to be closed. Blocking.

        :raises NotFoundError: no such branch, or what it lies on is not kept any more.
        :raises IntegrityError: it is damaged.
        """
        record = self.branches.get(name)
        if not self.has_base_of(record):
            raise NotFoundError(
                f'branch "{name}" lies on epoch {record.base_epoch} of a history that was given up',
                hint=f"geomirror branch list {self.superblock.name}",
            )
        return BranchView.open(self, name, self.limits.rollback_entries_max)

    def has_base_of(self, record: BranchRecord) -> bool:
        """Whether the epoch that a branch lies on is one of this history: numbers are not enough,
        as another history has other epochs of the same ones."""
        at_base = chain_through(self.superblock.chain, record.base_epoch)
        return (at_base[-1].identity if at_base else "") == record.base_generation

    def drop_branch(self, name: str) -> None:
        """Forget a branch, durably: what is only in it is lost. Blocking.

        :raises NotFoundError: there is none.
        """
        self.branches.drop(name)
        self._pin_branches()

    # Preparing.

    def _make_job(
        self, record: RollbackRecord, intent: Superblock | None, tail: Tail | None
    ) -> RollbackJob:
        sync = None if intent is None else self.sync_job()
        superblock, end_lsn = self.superblock, self.journal.end_lsn
        done = copy_of(superblock)
        if not record.is_restored:
            self._set_position(done, record, end_lsn)
        done.rollback = None
        restored = None
        if not record.is_restored:
            restored = copy_of(done)
            restored.rollback = msgspec.structs.replace(record, is_restored=True)
        parts = RollbackParts(
            self.store,
            self.limits,
            self.journal,
            self.physical_images,
            self.undo,
            self.branches,
            self._superblock_file,
        )
        return RollbackJob(
            parts,
            record,
            self.applied_epoch,
            Versions(intent, restored, done),
            self._loader(record.boundary_epoch, record.to_epoch),
            tail,
            sync,
            SaveMarksJob(self.store, self.marks.table_through(record.to_epoch)),
        )

    def _set_position(self, superblock: Superblock, record: RollbackRecord, end_lsn: int) -> None:
        """Make a superblock one at the target, with everything in the journal behind it."""
        rows = self._directory.after(record.to_epoch - 1, 1)
        if record.to_epoch != superblock.applied_epoch:
            is_here = bool(rows) and rows[0].number == record.to_epoch
            superblock.last_epoch_lsn = rows[0].record_lsn if is_here else 0
        superblock.applied_epoch = record.to_epoch
        superblock.applied_hash = record.to_hash
        superblock.applied_first_epoch = record.to_first_epoch
        superblock.applied_wall_ns = record.to_wall_ns
        # A primary goes on with LSNs above all that it gave out.
        superblock.applied_end_lsn = end_lsn if superblock.role == "primary" else record.to_end_lsn
        # Records that are cut off have lower cut numbers, whatever they were.
        superblock.applied_cut = (self._cut_number - 1) & 0xFF
        superblock.scan_lsn = superblock.known_durable_lsn = end_lsn
        superblock.chain = list(record.chain)
        for name, peer in superblock.peers.items():
            superblock.peers[name] = clamped(peer, record)

    def _tail(self, info: EpochInfo, name: str, wall_ns: int, may_shrink: bool) -> Tail | None:
        base, end = info.number, self.committed_epoch
        if end == base:
            return None
        last = self._directory.last()
        if last is None or last.number != end:
            assert end == self.applied_epoch
            end_lsn, end_wall_ns = self.superblock.applied_end_lsn, self.superblock.applied_wall_ns
        else:
            end_lsn, end_wall_ns = last.end_lsn, last.wall_ns
        chain = self.superblock.chain
        at_base = chain_through(chain, base)
        record = BranchRecord(
            self.branches.free_name(name),
            at_base[-1].identity if at_base else "",
            base,
            info.chain_hash.hex(),
            info.wall_ns,
            self.generation.hex(),
            end,
            self.committed_hash.hex(),
            end_lsn,
            end_wall_ns,
            wall_ns,
            marks=[(m.name, m.epoch) for m in self.marks.table.marks() if m.epoch > base],
        )
        self.branches.room_bytes()
        return Tail(
            record,
            self._loader(base, self.applied_epoch) if self._has_epochs_after(base) else None,
            self._loader(self.applied_epoch, end),
            dict(self.sizes.now),
            dict(self.sizes.names),
            may_shrink,
        )

    def _loader(self, after: int, through: int) -> Callable[[], Sequence[Epoch]]:
        rows = [row for row in self._directory.after(after) if row.number <= through]
        lsns = [row.record_lsn for row in rows]
        return lambda: [read_epoch(self.journal, self.limits, lsn)[0] for lsn in lsns]

    def _has_epochs_after(self, epoch: int) -> bool:
        """Whether every epoch after it is in the journal."""
        first = self._directory.first_after(epoch)
        return first is not None and first.first_number == epoch + 1

    # Looking up.

    def _boundaries(self) -> list[int]:
        """The states that undo leads to from the images, and that of the images, ascending."""
        return self.undo.history.boundaries(self.applied_epoch)

    def _info_of(self, epoch: int, chain_hash: bytes | None = None) -> EpochInfo | None:
        """What is known of an epoch; one that is in no record and no label by its hash alone."""
        superblock = self.superblock
        if epoch == superblock.applied_epoch:
            return _info(
                epoch,
                superblock.applied_first_epoch,
                bytes.fromhex(superblock.applied_hash),
                superblock.applied_wall_ns,
                superblock.applied_end_lsn,
            )
        rows = self._directory.after(epoch - 1, 1)
        if rows and rows[0].number == epoch:
            return rows[0]
        label = self.undo.history.ending_at(epoch)
        if label is not None:
            return _info(epoch, epoch, label.chain_hash, label.wall_ns)
        for entry in superblock.chain:
            if entry.parent and entry.parent_epoch == epoch:
                return _info(epoch, epoch, bytes.fromhex(entry.parent_hash), entry.wall_ns)
        if epoch == 0:
            return _info(0, 0, bytes(32), 0)
        return None if chain_hash is None else _info(epoch, epoch, chain_hash, 0)

    def _pin_branches(self) -> None:
        """What a branch lies on is kept as long as there is room for it."""
        owners = {f"branch {each.name}": each.base_epoch for each in self.branches.records()}
        for owner in self._pinned.keys() - owners.keys():
            self.undo.unpin(owner)
        for owner, epoch in owners.items():
            self.undo.pin(owner, epoch)
        self._pinned = owners


def _info(epoch: int, first: int, chain_hash: bytes, wall_ns: int, end_lsn: int = 0) -> EpochInfo:
    return EpochInfo(epoch, first, 0, 0, end_lsn, 0, 0, 0, 0, wall_ns, 0, 0, chain_hash)


def chain_through(chain: Sequence[GenerationRecord], epoch: int) -> list[GenerationRecord]:
    """The chain of a position at `epoch`: without generations that began there or later."""
    return [entry for entry in chain if not entry.parent or entry.parent_epoch < epoch]
