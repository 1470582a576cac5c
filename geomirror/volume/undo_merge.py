"""Merging adjacent undo passes into one file that restores the state before the first of them.

```
 (40,41]  b1 b5        of a block that several hold, the oldest content
 (41,45]     b5 b9  ─▶ (40,45]  b1 b5 b9
```
The merged file is durable before the others are unlinked; whatever a crash leaves of them is
recognised at the next start, because the merged pass covers them.
Memory: one chunk of each file, the tables, 1 MiB of contents.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from geomirror.errors import IntegrityError, LimitExceededError
from geomirror.limits import Limits
from geomirror.volume.store import Store
from geomirror.volume.undo import StoppedError, UndoStore
from geomirror.volume.undo_contents import old_contents
from geomirror.volume.undo_file import PassInfo, PassLabel, UndoReader, UndoWriter
from geomirror.volume.undo_levels import expired, next_merge
from geomirror.volume.view_index import ViewIndex


class ThinJob:
    """Makes history coarser with age: drops what is too old, merges one group of passes.

    :param pinned: epochs that stay boundaries, besides those of views.
    """

    def __init__(
        self, store: Store, undo: UndoStore, limits: Limits, pinned: Collection[int]
    ) -> None:
        self.has_changed = False
        """After `run`: something was done; there may be more to do."""
        self._store = store
        self._undo = undo
        self._limits = limits
        self._pinned = pinned
        self._is_stop_wanted = False

    def stop(self) -> None:
        """Somebody waits: end `run` soon; history stays as fine as it is. Any thread."""
        self._is_stop_wanted = True

    def run(self) -> None:
        """Blocking; nothing else may change the undo meanwhile.

        A pass that turns out to be damaged becomes a gap: replication goes on.

        :raises StorageError: the undo restores what it did before.
        """
        passes = self._undo.history.passes
        pinned = [*self._pinned, *self._undo.pinned_epochs()]
        limits = self._limits
        drops = expired(passes, pinned, limits.undo_levels)
        self._undo.drop_oldest(drops)
        group = next_merge(
            passes[drops:],
            pinned,
            limits.undo_merge_bytes_max,
            limits.undo_levels,
            limits.undo_settled_ns,
        )
        self.has_changed = bool(drops or group)
        while len(group) > 1:
            try:
                self.merge(group)
            except LimitExceededError:
                group = group[: len(group) // 2]
            except StoppedError:
                return
            except IntegrityError:
                for each in group:
                    self._undo.check(each)
                return
            else:
                return

    def merge(self, passes: Sequence[PassInfo]) -> None:
        """Merge adjacent passes, oldest first. Blocking.

        :raises IntegrityError: one is damaged; nothing changed.
        """
        first, last = passes[0], passes[-1]
        label = PassLabel(
            last.generation, first.from_epoch, last.to_epoch, last.wall_ns, last.chain_hash
        )
        self._undo.replace(passes, label, lambda writer: self._copy(passes, writer))

    def _copy(self, passes: Sequence[PassInfo], writer: UndoWriter) -> None:
        index = ViewIndex(passes[0].from_epoch).extended(
            passes,
            lambda info: UndoReader(self._store.open(info.name), info.name),
            self._limits.view_entries_max,
        )
        files = [self._store.open(each.name) for each in passes]
        try:
            for part in old_contents(index, files):
                if self._is_stop_wanted:
                    raise StoppedError
                if part.contents is None:
                    writer.add_zero(part.volume, part.blocks[0], part.block_count)
                else:
                    blocks = np.array(part.blocks)
                    writer.add_blocks(part.volume, blocks, b"".join(part.contents))
            for volume, size_bytes in index.sizes.items():
                writer.add_size(volume, size_bytes)
        finally:
            for file in files:
                file.close()
