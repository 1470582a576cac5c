"""A fresh primary whose images go back to the state from before a resync, behind its writers.

```
 secondary at E0 ─promoted─▶ primary at E0: reads through undo ─┬─ steps:  before-images ─▶ image
                                                                └─ passes: newer epochs ──▶ image
```
Invariant: a pass supersedes the before-images of its blocks. Its undo, which is durable before it
writes, names them, and is kept until the superblock says that all is back: so nothing newer is ever
overwritten, also after a crash. Passes and steps take turns.
Deliberately not here: who is promoted, and when steps and passes run (`wan_protocol.primary`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

from geomirror.errors import FencedError
from geomirror.limits import MIB
from geomirror.volume.apply import ApplyJob
from geomirror.volume.engine_held import HeldCopy
from geomirror.volume.engine_jobs import CheckpointJob
from geomirror.volume.held_layer import HeldLayer
from geomirror.volume.image import Image
from geomirror.volume.saved_blocks import SavedBlocks
from geomirror.volume.superblock import HeldRecord
from geomirror.volume.undo_file import UndoReader
from geomirror.volume.undo_open import OpenPass
from geomirror.volume.view import View

RETURN_STEP_BYTES = 64 * MIB
"""Before-images that one step of going back behind writers writes: a fraction of a second."""
_NO_BOUND = 1 << 62
"""Of what readers need to know of the undo; a bound would be an error to them."""


class ReturnStepJob:
    """Writes some before-images back; the rest is left to the next one."""

    def __init__(
        self,
        open_pass: OpenPass,
        images: Mapping[int, Image],
        first: int,
        superseded: SavedBlocks,
    ) -> None:
        self._superseded = superseded
        self.next_group = first
        """After `run`: the first one that is left."""
        self._open_pass = open_pass
        self._images = images

    def run(self) -> None:
        """Blocking. :raises StorageError: run another one."""
        self.next_group = self._open_pass.restore_some(
            self._images, self.next_group, RETURN_STEP_BYTES, self._superseded
        )


class ReturningPrimary(HeldCopy):
    """The part of `Engine` that goes back while it is written to."""

    _next_group = 0
    """Of the open pass, while a primary goes back."""
    _superseded = SavedBlocks()
    """Blocks that were applied since its promotion."""

    @property
    def bytes_to_return(self) -> int:
        """Before-images that a returning primary has yet to write back."""
        has_left = self.is_returning and self.open_pass is not None
        return self.open_pass.bytes_from(self._next_group) if has_left and self.open_pass else 0

    def take_held(self) -> None:
        """Be at the held state at once; `promote`, which comes next, makes it durable.

        The images are read through undo from here on, and go back step by step.

        :raises RefusedError: a volume has grown meanwhile; nothing changed.
        """
        self.begin_return()
        self._take_held_position()
        self._lay_held()

    def _lay_held(self) -> None:
        held, undo = self.superblock.held, self.undo
        assert held is not None
        assert self.open_pass is not None
        self._superseded = self._applied_since(held)
        view = View(
            held.epoch,
            self.physical_images,
            lambda: undo.history,
            self.store.open,
            _NO_BOUND,
            undo.suspect,
        )
        undo.kept_after = held.epoch
        self._set_layer(HeldLayer(view, self.open_pass.saved, self._superseded))
        self._next_group = 0

    def _applied_since(self, held: HeldRecord) -> SavedBlocks:
        """The blocks of all passes since the promotion, by their undo. Blocking.

        :raises FencedError, IntegrityError: it is not all there.
        """
        found, reached = SavedBlocks(), held.epoch
        for each in self.undo.history.passes:
            if each.from_epoch < held.epoch or each.is_part:
                continue
            if each.from_epoch != reached or each.is_gap:
                break
            with closing(UndoReader(self.store.open(each.name), each.name)) as reader:
                found.add(reader.located(0))
            reached = each.to_epoch
        if reached < self.applied_epoch:
            raise FencedError(
                f'resource "{self.superblock.name}": undo of epochs after {reached} is missing or '
                f"damaged, so it is not known what must not go back to epoch {held.epoch}",
                hint="keep the data directory; promote another copy, or make this one anew",
            )
        return found

    def apply_job(self, through_epoch: int) -> ApplyJob:
        """See `EngineBase`."""
        job = super().apply_job(through_epoch)
        if self.is_returning:
            job.old_images = self.images
        return job

    def complete_apply(self, job: ApplyJob) -> None:
        """See `EngineBase`."""
        if self.is_returning:
            self._superseded.add(job.table)
        super().complete_apply(job)

    def return_step_job(self) -> ReturnStepJob:
        """A job that brings the images of a returning primary back a step further."""
        assert self.is_returning
        assert self.open_pass is not None
        return ReturnStepJob(
            self.open_pass, self.physical_images, self._next_group, self._superseded
        )

    def complete_return_step(self, job: ReturnStepJob) -> bool:
        """Take note of it; whether the images are back. The next checkpoint persists that."""
        assert self.open_pass is not None
        self._next_group = job.next_group
        if job.next_group < self.open_pass.group_count:
            return False
        self.superblock.held = None
        self._set_layer(None)
        self._drop_open_pass()
        return True

    def complete_checkpoint(self, job: CheckpointJob) -> None:
        """See `EngineBase`."""
        super().complete_checkpoint(job)
        if job.superblock.held is None:
            self.undo.kept_after = None

    def finish_return(self) -> None:
        """Bring the images of a returning primary back, all the way; else nothing. Blocking.

        :raises StorageError: a device failed; it is returning still.
        """
        while self.is_returning:
            job = self.return_step_job()
            job.run()
            if self.complete_return_step(job):
                self._checkpoint_now()

    def _finish_return(self) -> None:
        if self.is_returning:
            self._lay_held()
        else:
            super()._finish_return()
