"""Merging adjacent undo passes into one file that restores the state before the first of them.

```
 (40,41]  b1 b5        of a block that several hold, the oldest content
 (41,45]     b5 b9  ─▶ (40,45]  b1 b5 b9
```
The merged file is durable before the others are unlinked; whatever a crash leaves of them is
recognised at the next start, because the merged pass covers them.
When the budget is nearly used up, the finest history is merged before its time, from its oldest end
on, as far as that gains room: before a whole old pass is dropped for a new one.
Memory: the tables, and 64 MiB of contents (`old_contents`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import closing, suppress

import numpy as np

from geomirror.errors import (
    IntegrityError,
    LimitExceededError,
    NoSpaceError,
    NotFoundError,
    StorageError,
)
from geomirror.limits import BLOCK_BYTES, Limits
from geomirror.volume.epoch_table import KIND_DATA
from geomirror.volume.store import Store
from geomirror.volume.undo import StoppedError, UndoStore
from geomirror.volume.undo_contents import old_contents
from geomirror.volume.undo_file import PassInfo, PassLabel, UndoWriter
from geomirror.volume.undo_levels import Level, expired, next_merge, squeezed
from geomirror.volume.undo_tables import PassTables
from geomirror.volume.view_index import ViewIndex

GAIN_MIN = 0.2
"""Merging rewrites all of it: before its time only for so much less."""
TRIES_MAX = 8
"""Groups that one job looks at for such a gain; each costs reading its tables."""
TABLES_PER_JOB = 512
"""Files whose tables one job reads that the start left out. Those of the points of the default
levels (`Limits.undo_points`) are read by 17 jobs, one every ten seconds."""


class ThinJob:
    """Makes history coarser with age: drops what is too old, merges one group of passes.

    :param pinned: epochs that stay boundaries, besides those of views.
    :param scrub_bytes: with nothing else to do, read through so much of what is kept.
    """

    def __init__(
        self,
        store: Store,
        undo: UndoStore,
        limits: Limits,
        pinned: Collection[int],
        scrub_bytes: int = 0,
    ) -> None:
        self.has_changed = False
        """After `run`: something was done; there may be more to do."""
        self.is_scrubbed = False
        """After `run`: everything kept was read through once since the last time."""
        self._scrub_bytes = scrub_bytes
        self._store = store
        self._undo = undo
        self._limits = limits
        self._pinned = pinned
        self._is_stop_wanted = False

    def stop(self) -> None:
        """Somebody waits: end `run` soon; history stays as fine as it is. Any thread."""
        self._is_stop_wanted = True

    def _check_stop(self) -> None:
        if self._is_stop_wanted:
            raise StoppedError

    def run(self) -> None:
        """Blocking; nothing else may change the undo meanwhile.

        A pass that turns out to be damaged becomes a gap: replication goes on.

        :raises StorageError: the undo restores what it did before.
        """
        with suppress(StoppedError):
            self._run()

    def _run(self) -> None:
        self._undo.check_suspects(self._check_stop)
        self._undo.look_at_tables(TABLES_PER_JOB, self._check_stop)
        pinned = {*self._pinned, *self._undo.pinned_epochs()}
        needed = {*pinned, *self._undo.needed_epochs()}
        history, levels = self._undo.history, self._limits.undo_levels
        drops = expired(history.whole, needed, levels, history.columns)
        self._undo.drop_oldest(drops)
        group = self._due(pinned, levels) or self._pressed(pinned)
        self.has_changed = bool(drops or group)
        if self._scrub_bytes and not self.has_changed:
            self.is_scrubbed = self._undo.scrub(self._scrub_bytes, self._check_stop)
        while len(group) > 1:
            try:
                self.merge(group)
            except LimitExceededError:
                group = group[: len(group) // 2]
            except NoSpaceError:
                raise
            except (IntegrityError, NotFoundError, StorageError):
                if not self._check(group):
                    raise
                return
            else:
                return

    def _due(self, pinned: Collection[int], levels: Sequence[Level]) -> list[PassInfo]:
        limits, history = self._limits, self._undo.history
        bounds = (limits.undo_merge_bytes_max, levels, limits.undo_settled_ns)
        return next_merge(history.whole, pinned, *bounds, history.columns)

    def _pressed(self, pinned: Collection[int]) -> list[PassInfo]:
        """Passes to merge before their time, because that gains room that is short."""
        undo, limits = self._undo, self._limits
        pressure, whole = limits.undo_pressure_fraction, undo.history.whole
        are_many = len(whole) > pressure * limits.undo_passes_max
        if not are_many and undo.stored_bytes() <= pressure * limits.undo_bytes_max:
            return []
        undo.hopeless &= {each.to_epoch for each in whole}
        tries = 0
        for levels in squeezed(limits.undo_levels):
            while group := self._due({*pinned, *undo.hopeless}, levels):
                if are_many or self._gain(group) >= GAIN_MIN:
                    return group
                undo.hopeless.update(each.to_epoch for each in group)
                tries += 1
                if tries >= TRIES_MAX:
                    return []
        return []

    def _gain(self, group: Sequence[PassInfo]) -> float:
        """Part of the old contents that would go if these were one."""
        raw_bytes = sum(each.raw_bytes for each in group)
        try:
            table = self._index(group).table()
        except (LimitExceededError, IntegrityError, NotFoundError, StorageError):
            return 0.0
        left = int((table["kind"] == KIND_DATA).sum()) * BLOCK_BYTES
        return 1 - left / raw_bytes if raw_bytes else 0.0

    def _index(self, passes: Sequence[PassInfo]) -> ViewIndex:
        index = ViewIndex(passes[0].from_epoch)
        return index.extended(passes, self._read, self._limits.view_entries_max)

    def _read(self, info: PassInfo) -> PassTables:
        self._check_stop()
        with closing(self._store.open(info.name)) as file:
            return PassTables(file, info.name)

    def _check(self, group: Sequence[PassInfo]) -> bool:
        """Whether one of them cannot be read, and is a gap from now on."""
        for each in group:
            self._undo.check(each, self._check_stop)
        ends = {each.to_epoch for each in group}
        return any(each.is_gap and each.to_epoch in ends for each in self._undo.passes())

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
        index = self._index(passes)
        for part in old_contents(index, self._store.open, self._check_stop):
            self._check_stop()
            if part.contents is None:
                writer.add_zero(part.volume, part.blocks[0], part.block_count)
            else:
                blocks = np.array(part.blocks)
                writer.add_blocks(part.volume, blocks, b"".join(part.contents))
        for volume, size_bytes in index.sizes.items():
            writer.add_size(volume, size_bytes)
