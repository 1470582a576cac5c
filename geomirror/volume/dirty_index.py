"""Where the newest content of a volume lies, as far as it is not yet in the image.

```
 block ─▶ entries: 7 → 81992                    whole block at this journal address
                   9 → -(LSN | punch)           zeros, by a ZERO or TRIM record
                  12 → ((0,512,A),(600,700,B))  pieces (start, end, source); the rest: image
          extents: [4096, 1052672) → -(LSN | punch)   long zero runs, sorted, disjoint
                   an entry inside an extent is newer than it, otherwise the extent removed it
```
A source is an address (> 0) or minus the LSN of a zeroing record. LSNs are multiples of 8, so bit 0
of a negated zero source says whether the range may be punched. Every source therefore tells its
age: whatever lies below the boundary LSN of an epoch was written in that epoch or before, and
`forget` drops exactly that, once the epoch is in the image. Final contents of partly written blocks
(FILL records) are never entered: they lie above their epoch's boundary.
`touched` has the sources of the blocks changed whole since the last cut: it is the open epoch, but
for blocks changed in part (0 there) and extents, whose values at the cut are looked up.
Deliberately not here: reading contents, durability, bounds (the engine counts `entry_count`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from itertools import compress, repeat
from typing import NamedTuple

import numpy as np

from geomirror.limits import BLOCK_BYTES
from geomirror.volume.epoch_table import KIND_DATA, Table

ZERO = -1
"""`Piece.source`: the bytes are zeros."""
IMAGE = -2
"""`Piece.source`: the bytes are in the image."""
Part = tuple[int, int, int]
"""(start, end, source) within a block."""
Parts = tuple[Part, ...]
"""Ascending, disjoint; bytes that no part covers are in the image."""
Entry = int | Parts
_BLOCK_SHIFT = 12
_BLOCK_MASK = BLOCK_BYTES - 1
assert 1 << _BLOCK_SHIFT == BLOCK_BYTES


class Piece(NamedTuple):
    """A part of a read: `source` is a journal address, `ZERO` or `IMAGE`."""

    offset: int
    length: int
    source: int


def source_lsn(source: int) -> int:
    """A position within the record that a source stems from (its LSN or an address in it)."""
    return source if source > 0 else -source & ~1


def zero_source(lsn: int, *, punch: bool) -> int:
    """The source of a range zeroed by the record at `lsn`."""
    assert lsn > 0
    assert lsn % 8 == 0
    return -(lsn | punch)


def overlay(parts: Parts, start: int, end: int, source: int) -> Parts:
    """`parts` with [start, end) replaced by `source`."""
    merged: list[Part] = []
    for low, high, old in parts:
        if low < start:
            merged.append((low, min(high, start), old))
    merged.append((start, end, source))
    for low, high, old in parts:
        if high > end:
            skipped = max(low, end) - low
            merged.append((low + skipped, high, old + skipped if old > 0 else old))
    return tuple(merged)


class DirtyIndex:
    """The index of one volume. Not thread-safe: for the event loop only."""

    def __init__(self, size_bytes: int, zero_run_blocks_min: int) -> None:
        self.size_bytes = size_bytes
        self.zero_run_blocks_min = zero_run_blocks_min
        self.entries: dict[int, Entry] = {}
        self.touched: dict[int, int] = {}
        """Blocks changed since the last cut → source, 0 when changed in part last."""
        self.partial: set[int] = set()
        """Blocks that were given parts; may name blocks that were written whole since."""
        self.open_partial: set[int] = set()
        """Those of them that were given parts since the last cut."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._sources: list[int] = []
        self._part_count = 0

    @property
    def entry_count(self) -> int:
        """What the index costs: entries, extents, and parts (an upper bound between cuts)."""
        return len(self.entries) + len(self._starts) + self._part_count

    @property
    def extents(self) -> list[tuple[int, int, int]]:
        """Zero extents (first block, end block, source), ascending."""
        return list(zip(self._starts, self._ends, self._sources, strict=True))

    @property
    def extent_count(self) -> int:
        """How many zero extents there are."""
        return len(self._starts)

    # Writing. The range lies in the volume; the caller has checked it.

    def write(self, offset: int, length: int, address: int) -> None:
        """The bytes of [offset, offset + length) lie at `address` in the journal now."""
        if not (offset | length) & _BLOCK_MASK:
            first = offset >> _BLOCK_SHIFT
            if length == BLOCK_BYTES:
                self.entries[first] = self.touched[first] = address
            else:
                self._write_whole(first, (offset + length) >> _BLOCK_SHIFT, address)
            return
        if not length:
            return
        end_offset = offset + length
        first = -(-offset // BLOCK_BYTES)
        end = end_offset // BLOCK_BYTES
        if end_offset == self.size_bytes:
            end = -(-end_offset // BLOCK_BYTES)
        if first < end:
            self._write_whole(first, end, address + first * BLOCK_BYTES - offset)
        for block, start, stop in self._edges(offset, end_offset, first, end):
            self._write_part(block, start, stop, address + block * BLOCK_BYTES + start - offset)

    def zero(self, offset: int, length: int, lsn: int, *, punch: bool) -> None:
        """[offset, offset + length) reads as zeros since the record at `lsn`."""
        if not length:
            return
        source = zero_source(lsn, punch=punch)
        end_offset = offset + length
        first = -(-offset // BLOCK_BYTES)
        end = end_offset // BLOCK_BYTES
        if end_offset == self.size_bytes:
            end = -(-end_offset // BLOCK_BYTES)
        if end - first >= self.zero_run_blocks_min:
            self._add_extent(first, end, source)
        elif first < end:
            self.entries.update(dict.fromkeys(range(first, end), source))
            self.touched.update(dict.fromkeys(range(first, end), source))
        for block, start, stop in self._edges(offset, end_offset, first, end):
            self._write_part(block, start, stop, source)

    def grow(self, size_bytes: int, lsn: int) -> None:
        """The volume has another size since the record at `lsn`; the new bytes are zeros."""
        old_size_bytes, self.size_bytes = self.size_bytes, size_bytes
        # A last block that was short is changed in part, so its new content is in the epoch, too.
        self.zero(old_size_bytes, size_bytes - old_size_bytes, lsn, punch=True)

    def _edges(
        self, offset: int, end_offset: int, first: int, end: int
    ) -> list[tuple[int, int, int]]:
        """(block, start, stop) of the blocks that the range covers only in part."""
        edges: list[tuple[int, int, int]] = []
        head, tail = offset >> _BLOCK_SHIFT, (end_offset - 1) >> _BLOCK_SHIFT
        for block in (head,) if head == tail else (head, tail):
            if not first <= block < end:
                base = block << _BLOCK_SHIFT
                edges.append((block, max(offset - base, 0), min(end_offset - base, BLOCK_BYTES)))
        return edges

    def _write_whole(self, first: int, end: int, address: int) -> None:
        addresses = range(address, address + ((end - first) << _BLOCK_SHIFT), BLOCK_BYTES)
        self.entries.update(zip(range(first, end), addresses, strict=True))
        self.touched.update(zip(range(first, end), addresses, strict=True))

    def _write_part(self, block: int, start: int, end: int, source: int) -> None:
        old = self.entries.get(block)
        parts: Parts
        if isinstance(old, tuple):
            parts = old
            self._part_count -= len(parts)
        else:
            base = old if old is not None else self._extent_source(block)
            parts = ((0, self._block_bytes(block), base),) if base else ()
        parts = overlay(parts, start, end, source)
        self.entries[block] = parts
        self.touched[block] = 0
        self.partial.add(block)
        self.open_partial.add(block)
        self._part_count += len(parts)

    def _block_bytes(self, block: int) -> int:
        return min(BLOCK_BYTES, self.size_bytes - block * BLOCK_BYTES)

    def _add_extent(self, first: int, end: int, source: int) -> None:
        for blocks in (self.entries, self.touched):
            if end - first < len(blocks):
                for block in range(first, end):
                    blocks.pop(block, None)
            else:
                for block in [b for b in blocks if first <= b < end]:
                    del blocks[block]
        starts, ends, sources = self._starts, self._ends, self._sources
        low = bisect_right(ends, first)
        high = bisect_left(starts, end)
        new = [(first, end, source)]
        if low < high:
            if starts[low] < first:
                new.insert(0, (starts[low], first, sources[low]))
            if ends[high - 1] > end:
                new.append((end, ends[high - 1], sources[high - 1]))
        starts[low:high] = [extent[0] for extent in new]
        ends[low:high] = [extent[1] for extent in new]
        sources[low:high] = [extent[2] for extent in new]

    def _extent_source(self, block: int) -> int:
        """Source of the zero extent over a block, 0 for none."""
        at = bisect_right(self._starts, block) - 1
        return self._sources[at] if at >= 0 and block < self._ends[at] else 0

    # Reading.

    def lookup(self, offset: int, length: int) -> list[Piece]:
        """Where the bytes of a range lie now; ascending, gapless, adjacent whole blocks joined."""
        if not length:
            return []
        source = self.only_source(offset, length)
        return [Piece(offset, length, source)] if source else self._lookup(offset, offset + length)

    def only_source(self, offset: int, length: int) -> int:
        """An address or `IMAGE` if all bytes of a range lie there one after the other, as those of
        nearly every random read do; 0: `lookup` has to tell."""
        first = offset >> _BLOCK_SHIFT
        if (offset + length - 1) >> _BLOCK_SHIFT != first:
            return 0 if self.entries or self._starts else IMAGE
        entry = self.entries.get(first)
        if entry is None:
            return 0 if self._starts else IMAGE
        return entry + (offset & _BLOCK_MASK) if isinstance(entry, int) and entry > 0 else 0

    def _lookup(self, offset: int, stop: int) -> list[Piece]:
        found: list[Piece] = []
        get, has_extents = self.entries.get, bool(self._starts)
        # The run under way: from `start`, with `source`, and what would continue it at `position`.
        position = start = offset
        source = follows = 0
        while position < stop:
            block = position >> _BLOCK_SHIFT
            end = min(stop, (block + 1) << _BLOCK_SHIFT)
            entry = get(block)
            if entry is None:
                own = IMAGE if not has_extents or not self._extent_source(block) else ZERO
            elif isinstance(entry, int):
                own = entry + (position & _BLOCK_MASK) if entry > 0 else ZERO
            else:
                if position > start:
                    found.append(Piece(start, position - start, source))
                self._lookup_parts(found, block, entry, position, end)
                position = start = end
                follows = 0
                continue
            if own != follows:
                if position > start:
                    found.append(Piece(start, position - start, source))
                start, source, follows = position, own, own
            if own > 0:
                follows += end - position
            position = end
        if position > start:
            found.append(Piece(start, position - start, source))
        return found

    def _lookup_parts(
        self, found: list[Piece], block: int, parts: Parts, position: int, stop: int
    ) -> None:
        base = block << _BLOCK_SHIFT
        low, high = position - base, stop - base
        for start, end, source in self._fill_gaps(block, parts):
            if start < high and end > low:
                cut = max(low, start)
                at = source + cut - start if source > 0 else source
                found.append(Piece(base + cut, min(end, high) - cut, at))

    def _fill_gaps(self, block: int, parts: Parts) -> list[Part]:
        """Parts over the whole block, with public sources where it is zeros or image."""
        filled: list[Part] = []
        position = 0
        for start, end, source in parts:
            if position < start:
                filled.append((position, start, IMAGE))
            filled.append((start, end, source if source > 0 else ZERO))
            position = end
        if position < self._block_bytes(block):
            filled.append((position, self._block_bytes(block), IMAGE))
        return filled

    def blocks_since(self, first: int, count: int, lsn: int) -> list[int]:
        """Blocks of [first, first + count) with content from records at or above `lsn`, sorted."""
        end = first + count
        found: set[int] = set()
        blocks = self.entries.keys() if len(self.entries) < count else range(first, end)
        for block in blocks:
            if first <= block < end:
                entry = self.entries.get(block)
                if isinstance(entry, tuple):
                    if any(source_lsn(source) >= lsn for _, _, source in entry):
                        found.add(block)
                elif entry is not None and source_lsn(entry) >= lsn:
                    found.add(block)
        for start, stop, source in self._extents_in(first, end):
            if source_lsn(source) >= lsn:
                found.update(range(max(start, first), min(stop, end)))
        return sorted(found)

    def is_all_image(self, first: int, count: int) -> bool:
        """Nothing of a short range lies anywhere else: the cheap half of `lookup` and
        `blocks_since`."""
        if not self.entries.keys().isdisjoint(range(first, first + count)):
            return False
        return bisect_right(self._ends, first) == bisect_left(self._starts, first + count)

    def _extents_in(self, first: int, end: int) -> list[tuple[int, int, int]]:
        low, high = bisect_right(self._ends, first), bisect_left(self._starts, end)
        return list(
            zip(
                self._starts[low:high],
                self._ends[low:high],
                self._sources[low:high],
                strict=True,
            )
        )

    # Forgetting.

    def forget(self, table: Table, boundary_lsn: int) -> None:
        """Drop what is in the image now: everything from records below `boundary_lsn`.

        :param table: entries of this volume only, of the epochs just applied, merged.
        :param boundary_lsn: where the records of later epochs begin in this journal.
        """
        for block in self.partial:
            entry = self.entries.get(block)
            if isinstance(entry, tuple):
                parts = tuple(part for part in entry if source_lsn(part[2]) >= boundary_lsn)
                if parts:
                    self.entries[block] = parts
                else:
                    del self.entries[block]
        self._forget_whole(self._entries_of(table), boundary_lsn)
        kept = [i for i, s in enumerate(self._sources) if source_lsn(s) >= boundary_lsn]
        if len(kept) < len(self._sources):
            self._starts = [self._starts[i] for i in kept]
            self._ends = [self._ends[i] for i in kept]
            self._sources = [self._sources[i] for i in kept]
        self.recount()

    def _forget_whole(self, blocks: list[int], boundary_lsn: int) -> None:
        """Drop whole entries of these blocks that are old enough."""
        if self.partial:
            blocks = [b for b in blocks if not isinstance(self.entries.get(b), tuple)]
        sources = np.fromiter(map(self.entries.get, blocks, repeat(0)), np.int64, len(blocks))
        lsns = np.where(sources > 0, sources, -sources & ~1)
        is_old = (lsns > 0) & (lsns < boundary_lsn)
        # A deque of length 0 runs the iterator dry without a loop in Python.
        deque(map(self.entries.pop, compress(blocks, is_old.tolist())), maxlen=0)

    def _entries_of(self, table: Table) -> list[int]:
        """Blocks of a table, those of its zero runs only if they have an entry."""
        is_data = table["kind"] == KIND_DATA
        blocks: list[int] = table["block"][is_data].tolist()
        if bool(is_data.all()):
            return blocks
        runs = table[~is_data]
        if int(runs["count"].sum()) <= len(self.entries):
            pairs = zip(runs["block"].tolist(), runs["count"].tolist(), strict=True)
            return blocks + [b for first, count in pairs for b in range(first, first + count)]
        known = np.fromiter(self.entries.keys(), np.int64, len(self.entries))
        starts = runs["block"].astype(np.int64)
        ends = starts + runs["count"].astype(np.int64)
        at = np.searchsorted(starts, known, side="right") - 1
        blocks += known[(at >= 0) & (known < ends[np.maximum(at, 0)])].tolist()
        return blocks

    def recount(self) -> None:
        """Make `entry_count` and `partial` exact again."""
        parts = {b: len(e) for b in self.partial if isinstance(e := self.entries.get(b), tuple)}
        self.partial = set(parts)
        self._part_count = sum(parts.values())
