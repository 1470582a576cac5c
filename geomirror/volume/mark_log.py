"""Marks on their way to the disk: MARK records in the journal, then the file `marks`.

```
 MARK (names the next epoch) ─▶ EPOCH, flag 2 ─┐
 MARK (sets or removes a name) ────────────────┴─sync─▶ table ─checkpoint─▶ file `marks`
```
Invariants: a name comes into force with its epoch, by the same sync; the table has only what is
durable; no checkpoint lets recovery skip a record whose change is not in the file.
Deliberately not here: who makes marks (the primary's core), who tells them (`wan_protocol`).
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from geomirror.errors import IntegrityError
from geomirror.volume.epoch_record import EPOCH_HEADER_BYTES, peek_epoch
from geomirror.volume.epoch_table import Epoch
from geomirror.volume.journal import Journal
from geomirror.volume.marks import Mark, MarkTable
from geomirror.volume.marks_file import SaveMarksJob
from geomirror.volume.record import HEADER_BYTES, RecordInfo, RecordType
from geomirror.volume.store import Store
from geomirror.volume.superblock import Superblock

FLAG_NEXT = 1
"""The record names the EPOCH record that follows; without one it means nothing."""
FLAG_REMOVED = 2
FLAG_QUIESCED = 4
_GENERATION = struct.Struct("<16s")


class _Change(NamedTuple):
    """What becomes true once the journal is durable up to `end_lsn`."""

    lsn: int
    end_lsn: int
    name: str = ""
    mark: Mark | None = None
    """The mark of this name from then on, None: it is removed."""
    boundary: int = 0
    """A marked epoch that is a state of this copy from then on, 0: none."""

    def apply(self, table: MarkTable) -> None:
        if self.boundary:
            table.add_boundary(self.boundary)
        if self.mark is not None:
            table.put(self.mark)
        elif self.name:
            table.remove(self.name)


def holds_state(superblock: Superblock, epoch: int) -> bool:
    """Whether this copy is a whole image at `epoch`, or was: it is not during a resync."""
    if superblock.former_from <= epoch <= superblock.former_until:
        return True
    is_known = superblock.data_state == "consistent" or superblock.consistent_from >= 0
    return is_known and superblock.consistent_from <= epoch


class MarkLog:
    """The marks of an engine; for the event loop only."""

    def __init__(self, journal: Journal, store: Store, table: MarkTable) -> None:
        self.table = table
        """What is durable."""
        self._journal = journal
        self._store = store
        self._changes: deque[_Change] = deque()
        self._names = {mark.name: mark for mark in table.marks()}
        self._naming: tuple[int, Mark] | None = None
        self._saved_version = 0

    def latest(self) -> dict[str, Mark]:
        """The marks by name with what is not durable yet."""
        return dict(self._names)

    @property
    def is_settled(self) -> bool:
        """Every change is durable."""
        return not self._changes

    @property
    def lowest_lsn(self) -> int | None:
        """Where the oldest change lies that only the journal has, None without one."""
        return self._changes[0].lsn if self._changes else None

    # Changes.

    def name_next(self, mark: Mark) -> None:
        """Name the epoch whose EPOCH record is appended next; both count together.

        :raises JournalFullError, NoSpaceError: nothing changed.
        """
        self._naming = (self._append(mark, FLAG_NEXT), mark)

    def put(self, mark: Mark) -> int:
        """Name an epoch that is committed already, or say more of it; returns where that ends.

        It is durable once the journal is durable up to there.
        :raises JournalFullError, NoSpaceError: nothing changed.
        """
        lsn = self._append(mark, 0)
        self._enter(_Change(lsn, self._journal.end_lsn, mark.name, mark))
        return self._journal.end_lsn

    def remove(self, mark: Mark) -> int:
        """Take a mark back; as `put`."""
        lsn = self._append(mark, FLAG_REMOVED)
        self._enter(_Change(lsn, self._journal.end_lsn, mark.name))
        return self._journal.end_lsn

    def epoch_appended(self, epoch: Epoch, record_lsn: int, superblock: Superblock) -> None:
        """The EPOCH record of an epoch lies at the end of the journal now."""
        naming, self._naming = self._naming, None
        if not epoch.is_mark:
            return
        lsn, mark = record_lsn, None
        if naming is not None and naming[1].epoch == epoch.number:
            lsn, mark = naming
        boundary = epoch.number if holds_state(superblock, epoch.number) else 0
        name = "" if mark is None else mark.name
        self._enter(_Change(lsn, self._journal.end_lsn, name, mark, boundary))

    def became_consistent(self, epoch: int) -> None:
        """A copy made anew is whole from this epoch on: its mark is held, though no commit of it
        came. The checkpoint that says so saves that, too."""
        if any(mark.epoch == epoch for mark in self._names.values()):
            self.table.add_boundary(epoch)

    def complete_sync(self, durable_lsn: int) -> None:
        """Put what is durable now into the table."""
        while self._changes and self._changes[0].end_lsn <= durable_lsn:
            self._changes.popleft().apply(self.table)

    def _enter(self, change: _Change) -> None:
        self._changes.append(change)
        if change.mark is not None:
            self._names[change.name] = change.mark
        elif change.name:
            self._names.pop(change.name, None)

    def _append(self, mark: Mark, flags: int) -> int:
        return self._journal.append_record(
            RecordType.MARK,
            [_GENERATION.pack(mark.generation), mark.name.encode()],
            offset=mark.epoch,
            flags=flags | FLAG_QUIESCED * mark.is_quiesced,
            wall_ns=mark.wall_ns,
        )

    def table_through(self, epoch: int) -> MarkTable:
        """The marks up to an epoch, and which of them are states of this copy."""
        table = self.table
        marks = [mark for mark in table.marks() if mark.epoch <= epoch]
        return MarkTable(marks, [each for each in table.boundaries() if each <= epoch])

    def leave_others(self, superblock: Superblock) -> None:
        """A new history begins here: marks of epochs that are not of it are forgotten. Saved by
        the next checkpoint."""
        for mark in self.table.marks():
            if not _is_of(superblock, mark):
                self.table.remove(mark.name)
        self._changes = deque(
            each for each in self._changes if each.mark is None or _is_of(superblock, each.mark)
        )
        self._names = {n: mark for n, mark in self._names.items() if _is_of(superblock, mark)}

    def reset(self, table: MarkTable) -> None:
        """`table` is what is durable, in the file: nothing else is known any more."""
        self.table = table
        self._changes.clear()
        self._names = {mark.name: mark for mark in table.marks()}
        self._naming = None
        self._saved_version = table.version

    # Saving.

    def save_job(self) -> SaveMarksJob | None:
        """A job that makes the table durable, None when it is."""
        return SaveMarksJob(self._store, self.table) if self._is_changed else None

    def complete_save(self, job: SaveMarksJob) -> None:
        """The job has run."""
        self._saved_version = job.version

    @property
    def _is_changed(self) -> bool:
        return self.table.version != self._saved_version


def replay_marks(
    table: MarkTable, superblock: Superblock, journal: Journal, records: Sequence[RecordInfo]
) -> None:
    """Do to the table of the file what the log says; all of it is durable. Blocking.

    The file may still name states from before this copy was made anew; the superblock decides.
    :raises IntegrityError: a MARK record cannot be understood.
    """
    table.keep_boundaries(lambda epoch: holds_state(superblock, epoch))
    naming: Mark | None = None
    kinds = (RecordType.EPOCH, RecordType.MARK)
    for record in [each for each in records if each.kind in kinds]:
        if record.kind == RecordType.EPOCH:
            header = journal.read(record.lsn + HEADER_BYTES, EPOCH_HEADER_BYTES)
            number, is_mark = peek_epoch(header)
            if is_mark and holds_state(superblock, number):
                table.add_boundary(number)
            if is_mark and naming is not None and naming.epoch == number:
                table.put(naming)
            naming = None
        else:
            mark = _decode(record, journal.read(record.address, record.payload_length))
            if record.flags & FLAG_NEXT:
                naming = mark
            elif record.flags & FLAG_REMOVED:
                table.remove(mark.name)
            elif _is_of(superblock, mark):
                table.put(mark)


def _is_of(superblock: Superblock, mark: Mark) -> bool:
    """Whether no generation of the chain began before the marked epoch, but for its own."""
    return all(
        entry.parent_epoch >= mark.epoch or bytes.fromhex(entry.identity) == mark.generation
        for entry in superblock.chain[-1:]
        if entry.parent
    )


def _decode(record: RecordInfo, payload: bytes) -> Mark:
    try:
        name = payload[_GENERATION.size :].decode("ascii")
    except UnicodeDecodeError:
        name = ""
    if not name or record.flags & ~(FLAG_NEXT | FLAG_REMOVED | FLAG_QUIESCED):
        raise IntegrityError(
            f"MARK record at LSN {record.lsn} is not one that this software writes",
            hint="install the version of geomirror that wrote it",
        )
    generation = payload[: _GENERATION.size]
    is_quiesced = bool(record.flags & FLAG_QUIESCED)
    return Mark(name, generation, record.offset, record.wall_ns, is_quiesced)
