"""The engine while its copy is made anew: the state from before stays, held by an open undo pass.

```
 consistent at E0 ─begin─▶ held at E0, image inconsistent ─┬─ all copied and applied ─▶ at L1
                                ▲ crash, link down: goes on │        undo (E0, L1]
                                                            ├─ return ─▶ consistent at E0
                                                            ├─ promotion (`engine_return`)
                                                            └─ give up (asked for) ─▶ inconsistent
```
Invariants: no block is overwritten before its before-image is durable (I6); the superblock says
"held at E0" before the first one is, and until the pass is closed durably (I11). A return, once
begun, is finished before anything else: an image that is half restored is no base for a resync.
Deliberately not here: how before-images are kept (`undo_open`), who asks (`wan_protocol`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from geomirror.errors import RefusedError
from geomirror.limits import MIB
from geomirror.volume.engine_copy import CopyPosition
from geomirror.volume.image import Image
from geomirror.volume.mark_log import holds_state
from geomirror.volume.superblock import HeldRecord
from geomirror.volume.undo_file import PassInfo, PassLabel
from geomirror.volume.undo_open import OpenPass, open_pass_of
from geomirror.volume.volume_change import VolumeChange

HELD_CHECK_BYTES = 64 * MIB
"""Of stored before-images that a promotion reads through first: a fraction of a second."""


class CloseHeldJob:
    """Makes an ordinary undo pass of the open one; the image is at its `to_epoch`."""

    def __init__(self, open_pass: OpenPass, label: PassLabel, grown: dict[int, int]) -> None:
        """:param grown: sizes before, of volumes that are larger now or were not there."""
        self.closed: PassInfo | None = None
        """After `run`; None when the copy is at the epoch that it was held at."""
        self._open_pass = open_pass
        self._label = label
        self._grown = grown

    def run(self) -> None:
        """Blocking. :raises StorageError: it is still open; run another one."""
        if self._label.from_epoch < self._label.to_epoch:
            self.closed = self._open_pass.close(self._label, self._grown)


class ReturnJob:
    """Writes all before-images back: afterwards the image is at the state that was held."""

    def __init__(self, open_pass: OpenPass, images: Mapping[int, Image]) -> None:
        self._open_pass = open_pass
        self._images = images

    def run(self) -> None:
        """Blocking. :raises StorageError: run another one before anything else."""
        self._open_pass.restore(self._images)


class HeldCopy(CopyPosition):
    """The part of `Engine` that is about a copy that is made anew."""

    @property
    def held(self) -> HeldRecord | None:
        """The state from before a resync that is under way, if it can be restored.

        None at a primary: it is at that state.
        """
        return None if self.superblock.role == "primary" else self.superblock.held

    @property
    def has_all_of_resync(self) -> bool:
        """Everything of the resync is durable here: applied, it is the state of one epoch, and the
        state that is held need not be gone back to."""
        return self.held is not None and self.sealed_epoch >= self.superblock.consistent_from >= 0

    @property
    def is_returning(self) -> bool:
        """At a primary that was promoted in the middle of a resync: it serves the state from before
        it through undo, and its images are on their way back there."""
        return self.superblock.role == "primary" and self.superblock.held is not None

    @property
    def state_epoch(self) -> int | None:
        """The epoch whose state this copy has whole: None for a copy that has none."""
        held = self.held
        if held is not None:
            return held.epoch
        is_whole = self.superblock.data_state == "consistent"
        return self.applied_epoch if is_whole else None

    @property
    def state_wall_ns(self) -> int:
        """When `state_epoch` was cut at the primary."""
        held = self.held
        return self.superblock.applied_wall_ns if held is None else held.wall_ns

    def begin_resync(
        self,
        generation: bytes,
        epoch: int,
        chain_hash: bytes,
        changes: Sequence[VolumeChange] = (),
    ) -> None:
        """The images are being given `epoch` of the primary; forget all epochs here.

        A consistent copy is held at its applied epoch from now on; one that is held stays so. No
        job may be running. The next checkpoint persists it; before that no image may be written.

        :param changes: what leads from the volumes' sizes here to those there; prepared.
        :raises RefusedError: `generation` is not the current one here, or a return is not over.
        """
        superblock, held = self.superblock, self.superblock.held
        if held is not None and held.is_returning:
            raise RefusedError(f'"{superblock.name}" is going back to epoch {held.epoch}')
        if generation == self.generation and superblock.data_state == "consistent":
            held = HeldRecord(
                generation=self.generation.hex(),
                epoch=superblock.applied_epoch,
                chain_hash=superblock.applied_hash,
                first_epoch=superblock.applied_first_epoch,
                end_lsn=superblock.applied_end_lsn,
                wall_ns=superblock.applied_wall_ns,
                consistent_from=superblock.consistent_from,
                former_from=superblock.former_from,
                former_until=superblock.former_until,
                undo_number=self.undo.reserve(),
                sizes={v.index: v.size_bytes for v in superblock.volumes},
            )
        self.reset_position(
            generation, epoch, chain_hash, changes=changes, is_held=held is not None
        )
        superblock.consistent_from = -1
        if held is not None and superblock.held is None:
            superblock.held = held
            if superblock.former_until < 0:
                superblock.former_from = max(held.consistent_from, 0)
            superblock.former_until = held.epoch
            self.open_pass = open_pass_of(self.store, self.undo, held, self.limits)
        # An earlier resync had come to its end but for applying: what was streamed then never was
        # a state that undo leads to.
        self.marks.table.keep_boundaries(lambda epoch: holds_state(superblock, epoch))

    # The end of a resync.

    def close_held_job(self) -> CloseHeldJob:
        """A job to run when the images hold one epoch again, with nothing else running."""
        assert self.open_pass is not None
        superblock = self.superblock
        label = PassLabel(
            self.generation,
            self.open_pass.label.from_epoch,
            superblock.applied_epoch,
            superblock.applied_wall_ns,
            self.applied_hash,
        )
        assert superblock.held is not None
        before = superblock.held.sizes
        grown = {
            v.index: before.get(v.index, 0)
            for v in superblock.volumes
            if before.get(v.index) != v.size_bytes
        }
        return CloseHeldJob(self.open_pass, label, grown)

    def complete_close_held(self, job: CloseHeldJob) -> None:
        """The copy is consistent at its applied epoch; persisted by the next checkpoint."""
        self.superblock.held = None
        self.superblock.data_state = "consistent"
        if job.closed is None:
            self._drop_open_pass()
        else:
            self.undo.show_open([], job.closed)
            self.open_pass = None

    # Back to where it was.

    @property
    def can_return(self) -> bool:
        """A state is held, and no volume has grown since."""
        held = self.superblock.held
        now = {v.index: v.size_bytes for v in self.superblock.volumes}
        return held is not None and held.sizes == now

    def check_held(self) -> None:
        """Read some of what a return would write back through, as much as takes no time worth
        speaking of: a promotion waits for it. Blocking, and jobs may run meanwhile.

        :raises IntegrityError: some of it is damaged; nothing changed.
        """
        open_pass = self.open_pass
        if open_pass is not None:
            open_pass.verify(HELD_CHECK_BYTES)

    def check_return(self) -> None:
        """:raises RefusedError: a volume has grown since the state that is held."""
        held = self.superblock.held
        if held is not None and not self.can_return:
            raise RefusedError(
                f'"{self.superblock.name}" is in a resync and had smaller volumes at epoch '
                f"{held.epoch}, which it holds: nothing is rolled back to before a volume grew",
                hint="wait for the end of the resync, or promote another copy",
            )

    def begin_return(self) -> None:
        """Decide to go back to the held state; durable by a checkpoint, which comes first.

        :raises RefusedError: as `check_return`.
        """
        held = self.superblock.held
        assert held is not None
        self.check_return()
        held.is_returning = True

    def return_job(self) -> ReturnJob:
        """A job that restores the held state; `begin_return` is durable."""
        assert self.open_pass is not None
        assert self._written.held is not None
        assert self._written.held.is_returning
        return ReturnJob(self.open_pass, self.images)

    def complete_return(self) -> None:
        """The copy is consistent at the held epoch; persisted by the next checkpoint."""
        self._take_held_position()
        self.superblock.held = None
        self._drop_open_pass()

    def _take_held_position(self) -> None:
        superblock, held = self.superblock, self.superblock.held
        assert held is not None
        assert self.open_pass is not None
        self.reset_position(
            self.generation, held.epoch, bytes.fromhex(held.chain_hash), is_held=True
        )
        superblock.data_state = "consistent"
        superblock.applied_first_epoch = held.first_epoch
        superblock.applied_end_lsn = held.end_lsn
        superblock.applied_wall_ns = held.wall_ns
        superblock.consistent_from = held.consistent_from
        superblock.former_from, superblock.former_until = held.former_from, held.former_until

    def _checkpoint_now(self) -> None:
        checkpoint = self.checkpoint_job()
        assert checkpoint is not None
        checkpoint.run()
        self.complete_checkpoint(checkpoint)

    def give_up_held(self) -> None:
        """Forget the held state and all earlier ones: the operator wants the copy made at any
        price. Persisted by the next checkpoint."""
        assert self.superblock.held is not None
        self.superblock.held = None
        self.superblock.former_until = -1
        self.undo.void()
        self.marks.table.drop_boundaries()
        self._drop_open_pass()

    def _drop_open_pass(self) -> None:
        assert self.open_pass is not None
        self.undo.left_over.append(self.open_pass.name)
        self.undo.show_open([])
        self.open_pass.stop()
        self.open_pass = None

    def _finish_return(self) -> None:
        """Finish what a crash interrupted. Blocking."""
        held = self.superblock.held
        if held is None or not held.is_returning:
            return
        self.return_job().run()
        self.complete_return()
        self._checkpoint_now()

    def close(self) -> None:
        """Close all files; nothing is synced."""
        if self.open_pass is not None:
            self.open_pass.stop()
        super().close()
