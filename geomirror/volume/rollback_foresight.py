"""What a rollback would cut off, and what would stop it, found while the resource is in use.

```
 undo on the way back ─▶ read through, as the rollback does
 blocks changed since ─▶ named by epochs in the journal, and by undo: at most so many hold data
      more than a bound allows? ─▶ their contents are read, as the rollback does: zeros are no data
```
Nothing is changed and nobody waits: the journal is pinned, and passes that go on only add blocks.
Deliberately not here: the rollback (`rollback`), what an operator is told of it (the node).
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from geomirror.errors import IntegrityError, NotFoundError, RefusedError, StorageError
from geomirror.limits import BLOCK_BYTES
from geomirror.volume.epoch_directory import EpochInfo
from geomirror.volume.epoch_table import KIND_DATA, Table
from geomirror.volume.merge import Keys, merge_tables
from geomirror.volume.rollback_tail import fill_branch, is_in_image, tail_table
from geomirror.volume.store import Buffer
from geomirror.volume.undo_file import PassInfo, UndoReader
from geomirror.volume.undo_tables import PassTables
from geomirror.volume.view_index import ViewIndex
from geomirror.volume.zero_blocks import with_holes, zero_mask

if TYPE_CHECKING:
    from geomirror.volume.engine import Engine

_ATTEMPTS_MAX = 100
"""Merges of passes happen every few seconds, and an index takes less than one."""


@dataclass(frozen=True)
class TailSize:
    """How much a tail holds."""

    blocks: int
    """Blocks with data."""
    zero_runs: int = 0
    """Runs of zeros."""
    zero_blocks: int = 0
    """Blocks in them."""
    is_exact: bool = True
    """False: at most so much; what is zero by now is counted as data."""

    @property
    def data_bytes(self) -> int:
        """Of the blocks with data."""
        return self.blocks * BLOCK_BYTES


class ForesightJob:
    """For a worker thread; to be made and released on the event loop.

    :param exact_bytes: whether the tail holds more than this has to be known exactly.
    :param reads_undo: find damage, too, which takes as long as reading all undo since the target.
    """

    def __init__(
        self, engine: Engine, target: EpochInfo, *, exact_bytes: int, reads_undo: bool
    ) -> None:
        self.size: TailSize | None = None
        """After `run`; None: not known while a promotion is made good behind the writers."""
        self._engine = engine
        self._is_known = not engine.is_returning
        self._owner = f"foresight {id(self)}"
        self._exact_bytes = exact_bytes
        self._reads_undo = reads_undo
        applied = engine.applied_epoch
        rows = engine.epochs_after(target.number, engine.committed_epoch)
        self._is_in_journal = target.number >= applied or (
            bool(rows) and rows[0].first_number == target.number + 1
        )
        self._in_image = [row for row in rows if row.number <= applied]
        self._in_journal = [row for row in rows if row.number > applied]
        self._open_blocks = engine.open_epoch_entries
        self._sizes = dict(engine.sizes.now)
        boundaries = engine.undo.history.boundaries(applied)
        self._boundary = max((e for e in boundaries if e <= target.number), default=target.number)
        lowest = min((row.data_lsn_min for row in rows), default=engine.journal.end_lsn)
        self._pin = engine.journal.pin(lowest, self._owner)
        engine.undo.pin(self._owner, self._boundary)

    def run(self) -> None:
        """Find it out; blocking.

        :raises IntegrityError: undo on the way back is damaged. :raises NotFoundError: it is gone.
        :raises LimitExceededError: more blocks than a rollback can go through were changed since.
        :raises RefusedError: branches have no room for the tail.
        """
        engine = self._engine
        if not self._is_known:
            return
        room = engine.branches.room_bytes()
        if self._reads_undo:
            self._read_undo()
        table = self._table()
        upper = self._counted(table)
        self.size = upper
        is_over = upper.data_bytes > room
        bound = room if is_over else self._exact_bytes
        if upper.data_bytes <= bound:
            return
        counter = _Counter()
        try:
            fill_branch(
                counter, table, engine.physical_images, self._sizes, engine.journal.read, bound
            )
        except RefusedError:
            if is_over:
                raise
            return
        self.size = TailSize(
            counter.raw_bytes // BLOCK_BYTES + self._open_blocks,
            counter.zero_runs,
            counter.zero_blocks,
            is_exact=not self._open_blocks,
        )

    def release(self) -> None:
        """Let journal and undo be trimmed again."""
        self._pin.release()
        self._engine.undo.unpin(self._owner)

    def _table(self) -> Table:
        """The blocks of the tail, as `rollback_tail.tail_table` has them."""
        table_of = self._engine.table_of
        index = self._index()  # Its bound holds for every rollback.
        in_journal = merge_tables([table_of(row) for row in self._in_journal])
        in_image = index.table()
        if self._is_in_journal:
            in_image = merge_tables([table_of(row) for row in self._in_image])
        return tail_table(in_image, in_journal)

    def _index(self) -> ViewIndex:
        undo, limits = self._engine.undo, self._engine.limits
        for _ in range(_ATTEMPTS_MAX):
            history = undo.history
            try:
                passes = history.since(self._boundary)
                index = ViewIndex(self._boundary)
                return index.extended(passes, self._read_tables, limits.rollback_entries_max)
            except (NotFoundError, StorageError):
                if undo.history is history:
                    raise
        raise StorageError("the undo changes too fast to be read")

    def _read_tables(self, info: PassInfo) -> PassTables:
        with closing(self._engine.store.open(info.name)) as file:
            try:
                return PassTables(file, info.name)
            except IntegrityError:
                self._engine.undo.suspect(info.name)
                raise

    def _reader(self, info: PassInfo) -> UndoReader:
        file = self._engine.store.open(info.name)
        try:
            return UndoReader(file, info.name)
        except IntegrityError:
            file.close()
            self._engine.undo.suspect(info.name)
            raise

    def _read_undo(self) -> None:
        """Read every pass of the way back through. Merged ones are looked at again."""
        undo, read = self._engine.undo, set[str]()
        while True:
            history = undo.history
            left = [each for each in history.since(self._boundary) if each.name not in read]
            if not left:
                return
            for each in left:
                try:
                    self._read_pass(each)
                except (NotFoundError, StorageError):
                    if undo.history is history:
                        raise
                read.add(each.name)
                if undo.history is not history:
                    break

    def _read_pass(self, info: PassInfo) -> None:
        reader = self._reader(info)
        try:
            reader.verify()
        except IntegrityError as error:
            self._engine.undo.suspect(info.name)
            raise IntegrityError(
                f"undo that leads back to epoch {self._boundary} is damaged: {error.message}",
                hint='"geomirror timeline" shows what can be had after its next look',
            ) from None
        finally:
            reader.close()

    def _counted(self, table: Table) -> TailSize:
        """What the blocks hold at most, without reading any of them."""
        is_data = (table["kind"] == KIND_DATA) | is_in_image(table)
        blocks = int(table["count"][is_data].sum(dtype=np.int64)) + self._open_blocks
        zeros = table["count"][~is_data]
        return TailSize(blocks, len(zeros), int(zeros.sum(dtype=np.int64)), is_exact=not blocks)


class _Counter:
    """Counts what a branch would hold (`ContentsWriter`)."""

    def __init__(self) -> None:
        self.raw_bytes = 0
        self.zero_runs = 0
        self.zero_blocks = 0

    def add_blocks(
        self,
        volume: int,
        blocks: Keys,
        data: Buffer,
        are_holes: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """See `UndoWriter.add_blocks`."""
        zero = zero_mask(data)
        self.raw_bytes += int(np.count_nonzero(~zero)) * BLOCK_BYTES
        zeros = np.asarray(blocks)[with_holes(zero, are_holes)]
        self.zero_runs += bool(len(zeros)) + int(np.count_nonzero(zeros[1:] - zeros[:-1] != 1))
        self.zero_blocks += len(zeros)

    def add_zero(self, volume: int, block: int, count: int) -> None:
        """See `UndoWriter.add_zero`."""
        self.zero_runs += 1
        self.zero_blocks += count
