"""Several epochs of a primary that nobody serves become one step: nobody sees what lies between.

```
 undo      (p, p+1]  (p+1, p+2]  (p+2, p+3] ─▶ (p, p+3]      no view, no rewind, to p+1 or p+2
 journal   p+1  p+2  p+3                    ─▶ –             no stream from p, but a resync
```
Deliberately not here: when that is wanted (the node's `branch_intake`).
"""

from __future__ import annotations

from dataclasses import replace

from geomirror.volume.engine_rollback import RollbackPath
from geomirror.volume.undo_merge import ThinJob

_NO_BOUND = 1 << 40


class OneStep(RollbackPath):
    """The part of `Engine` that hides steps."""

    def release_applied(self) -> None:
        """Let the journal go as far as the images are durable: nobody needs it, neither peers (as
        the superblock has to say before the engine is opened again) nor the way back. Blocking."""
        for owner in self._retention.owners():
            self.retain(owner, self.applied_epoch)
        trim = self.journal.trim_job()
        if trim is not None:
            trim.run()
            self.journal.complete_trim(trim)

    def join_steps(self, base_epoch: int) -> None:
        """Make one step of what lies between an epoch and the newest, which the images hold and a
        checkpoint knows. The next checkpoint makes it durable. Blocking.

        :raises StorageError, IntegrityError: some steps are still there.
        """
        assert self.applied_epoch == self.committed_epoch
        kept = self.undo.history.kept(self.applied_epoch)
        steps = [each for each in kept if each.from_epoch >= base_epoch]
        if len(steps) > 1:
            limits = replace(self.limits, view_entries_max=_NO_BOUND)
            ThinJob(self.store, self.undo, limits, ()).merge(steps)
        self.release_applied()
        # Nothing leads back from the applied epoch to those before it at the next start.
        self.superblock.last_epoch_lsn = 0
