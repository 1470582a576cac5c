"""The write path of an engine, and reading what was written.

```
 batch ─▶ room? ─▶ Journal.append (one pwritev) ─▶ DirtyIndex ─▶ completed
            └ no: JournalFullError, nothing changed: the writer waits for the journal and the local
              disk's sustained rate, never for a link
```
Invariant: what `write` takes in can always be sealed: the room that fills and tables of the open
epoch and of the draft will need is kept back from later writes.
Deliberately not here: epochs (`engine`), durability (`engine_base`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from geomirror.errors import JournalFullError
from geomirror.limits import BLOCK_BYTES
from geomirror.volume.dirty_index import Piece
from geomirror.volume.engine_jobs import ReadJob, read_pieces
from geomirror.volume.engine_return import ReturningPrimary
from geomirror.volume.epoch_record import EPOCH_HEADER_BYTES
from geomirror.volume.epoch_table import ENTRY
from geomirror.volume.journal import Write
from geomirror.volume.record import HEADER_BYTES, RecordType
from geomirror.volume.segment import SEGMENT_HEADER_BYTES
from geomirror.volume.volume_change import encode_changes

_WRITE, _TRIM = int(RecordType.WRITE), int(RecordType.TRIM)
_BLOCK_MASK = BLOCK_BYTES - 1
_RECORD_BYTES = HEADER_BYTES + 8
"""Header and padding of one record, at most."""
_PARTS_MAX = 4
"""Index entries and parts that one partly written block adds, at most."""


def record_room_bytes(payload_length: int) -> int:
    """Journal bytes that a record takes, at most."""
    return payload_length + _RECORD_BYTES


class WritePath(ReturningPrimary):
    """The part of `Engine` that NBD requests reach."""

    _room_budget = 0
    _entry_budget = 0

    def write(self, writes: Sequence[Write], wall_ns: int) -> int:
        """Journal and index a batch; it is *completed* on return, and durable after a sync.

        :param writes: WRITE, ZERO or TRIM, validated: ranges lie in their volumes, payloads have
            the given length; longer ones than a record's bound are split. Payloads are not kept.
        :returns: the end LSN.
        :raises JournalFullError: held back by the journal's or the index's bound; nothing changed.
        :raises NoSpaceError: the disk is full; nothing changed.
        """
        size = mask = kinds = 0
        for kind, _, offset, length, _ in writes:
            size += length
            mask |= offset | length
            kinds |= kind
        count = len(writes)
        if kinds == _WRITE and not mask & _BLOCK_MASK:
            self._take_room(size + _RECORD_BYTES * count, size >> 12, 0)
        else:
            self._take_room(*self._measure(writes))
        if size > self.limits.record_payload_bytes_max:
            writes = list(_split(writes, self.limits.record_payload_bytes_max))

        lsns = self.journal.append(writes, wall_ns, flags=self._cut_number & 0xFF)

        last = -1
        for (kind, volume, offset, length, _), lsn in zip(writes, lsns, strict=True):
            if volume != last:
                last, index = volume, self.indexes[volume]
                entries, touched = index.entries, index.touched
            if kind == _WRITE:
                if length == BLOCK_BYTES and not offset & _BLOCK_MASK:
                    # `DirtyIndex.write` for the one case that counts: one whole block.
                    block = offset >> 12
                    touched[block] = entries[block] = lsn + HEADER_BYTES
                else:
                    index.write(offset, length, lsn + HEADER_BYTES)
            else:
                index.zero(offset, length, lsn, punch=kind == _TRIM)
        epoch = self._open
        if epoch.since_wall_ns is None and writes:
            epoch.since_wall_ns = wall_ns
        epoch.last_wall_ns = wall_ns
        return self.journal.end_lsn

    def has_room(self, size: int) -> bool:
        """Whether a batch with `size` bytes of payload would be taken now."""
        blocks = size // BLOCK_BYTES + 2
        return self._lacks(size + _RECORD_BYTES * blocks, blocks, 2) == ""

    def _measure(self, writes: Sequence[Write]) -> tuple[int, int, int]:
        """Journal bytes, whole blocks at most, and partly written blocks at most of a batch."""
        run_min = self.limits.zero_run_blocks_min
        size = blocks = parts = 0
        for kind, _, offset, length, _ in writes:
            if kind == _WRITE:
                size += length
                blocks += length >> 12
            else:
                blocks += min(length >> 12, run_min)
            if (offset | length) & _BLOCK_MASK:
                parts += 2
        return size + _RECORD_BYTES * len(writes), blocks, parts

    def _take_room(self, needed: int, blocks: int, parts: int) -> None:
        """Admit a batch or hold it back.

        Budgets are lower bounds of what is free, so that most batches are admitted without looking
        at journal and indexes; sealing resets them, because it uses the journal as well.
        """
        needed += _RECORD_BYTES * (needed // self.limits.record_payload_bytes_max)
        bookkeeping = parts * BLOCK_BYTES + 2 * (blocks + parts) * ENTRY.itemsize
        entries = blocks + _PARTS_MAX * parts
        if needed + bookkeeping > self._room_budget or entries > self._entry_budget:
            lacking = self._lacks(needed, blocks, parts)
            if lacking:
                name = self.superblock.name
                raise JournalFullError(f'resource "{name}" holds writes back: {lacking}')
            limits = self.limits
            self._room_budget = self.journal.room_bytes() - self._reserve_bytes(0, 0)
            self._entry_budget = min(
                limits.dirty_entries_max - self.dirty_entries,
                (limits.dirty_bytes_max - self.dirty_bytes) // BLOCK_BYTES,
            )
        self._room_budget -= needed + bookkeeping
        self._entry_budget -= entries

    def _lacks(self, needed: int, blocks: int, parts: int) -> str:
        """Why a batch cannot be taken, "" if it can."""
        limits = self.limits
        if self.journal.room_bytes() - self._reserve_bytes(blocks, parts) < needed:
            return "the journal is full until peers or the local disk catch up"
        entries = self.dirty_entries
        # One batch is always taken by an empty index, or it would wait for ever.
        if entries and entries + blocks + _PARTS_MAX * parts > limits.dirty_entries_max:
            return f"{entries} index entries wait for the local disk"
        if entries and self.dirty_bytes + blocks * BLOCK_BYTES > limits.dirty_bytes_max:
            return f"{self.dirty_bytes} bytes wait for the local disk"
        return ""

    def _reserve_bytes(self, blocks: int, parts: int) -> int:
        """Journal bytes that sealing what is taken in (and this batch) may need beyond its own.

        The journal keeps two segments for bookkeeping records. Fills fill one but for its tail,
        a table fits in the other.
        """
        for index in self.indexes.values():
            blocks += len(index.touched) + index.extent_count
            parts += len(index.open_partial)
        reserve = parts * BLOCK_BYTES + 2 * (blocks + parts) * ENTRY.itemsize
        if self._draft is not None:
            reserve += self._draft.reserve_bytes + EPOCH_HEADER_BYTES
        if self._open.changes:
            reserve += len(encode_changes(self._open.changes))
        kept = self.limits.segment_bytes - SEGMENT_HEADER_BYTES
        return max(0, reserve - (kept - 2 * self.limits.record_payload_bytes_max))

    @property
    def open_epoch_entries(self) -> int:
        """Blocks and zero extents that the open epoch has so far, about."""
        count = 0
        for index in self.indexes.values():  # Every batch asks, and a generator costs more.
            count += len(index.touched)
        return count

    @property
    def open_epoch_bytes(self) -> int:
        """Data bytes of the open epoch, about."""
        return self.open_epoch_entries * BLOCK_BYTES

    @property
    def dirty_entries(self) -> int:
        """Entries of all indexes: what is in the journal and not in the images."""
        return sum(index.entry_count for index in self.indexes.values())

    @property
    def dirty_bytes(self) -> int:
        """Bytes of the blocks in all indexes."""
        return sum(len(index.entries) for index in self.indexes.values()) * BLOCK_BYTES

    # Primary: reading. Reads of an image on a secondary go to `images` directly.

    def read_pieces(self, volume: int, offset: int, length: int) -> list[Piece]:
        """Where the bytes of a range lie now. Pin the journal to read them later."""
        return self.indexes[volume].lookup(offset, length)

    def read(self, volume: int, offset: int, length: int) -> bytes:
        """The bytes of a range. Blocking, on the event loop's thread."""
        pieces = self.indexes[volume].lookup(offset, length)
        contents = read_pieces(pieces, self.journal.read, self.images[volume])
        return contents[0] if len(contents) == 1 else b"".join(contents)

    def read_job(self, volume: int, offset: int, length: int) -> ReadJob:
        """A job that reads a range; call its `release` on the loop when it is done."""
        pieces = self.indexes[volume].lookup(offset, length)
        has_journal = self.has_layer or any(piece.source > 0 for piece in pieces)
        pin = self.journal.pin(self.scan_lsn, "read") if has_journal else None
        return ReadJob(pieces, self.journal.read, self.images[volume], pin)

    def unsealed_blocks(self, volume: int, first_block: int, count: int) -> list[int]:
        """Blocks of a range with changes that are in no sealed epoch yet, ascending."""
        return self.indexes[volume].blocks_since(first_block, count, self.sealed_end_lsn)


def _split(writes: Iterable[Write], payload_max: int) -> Iterable[Write]:
    """Writes with payloads of at most `payload_max`, split between blocks."""
    for write in writes:
        kind, volume, offset, length, payload = write
        if kind != _WRITE or length <= payload_max:
            yield write
            continue
        assert payload is not None
        view = memoryview(payload)
        start = 0
        while start < length:
            end = min(start + payload_max - ((offset + start) & _BLOCK_MASK), length)
            yield kind, volume, offset + start, end - start, view[start:end]
            start = end
