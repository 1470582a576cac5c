"""What a range of a volume holds, from a snapshot of where it lies: journal, zeros or image.

The snapshot is taken on the loop; reading may be done on any thread while the journal is pinned.
While images change meanwhile, by applying epochs, a block may be found half old and half new.
"""

from __future__ import annotations

from dataclasses import dataclass

from geomirror.volume.dirty_index import IMAGE, ZERO, DirtyIndex, Piece
from geomirror.volume.image import Image
from geomirror.volume.journal import Journal
from geomirror.volume.store import Buffer

_BLOCK_SHIFT = 12
SPARSE_INDEX_ENTRIES = 1024
"""With fewer entries than this a long range is looked up by them, not block by block."""


@dataclass
class SealedContent:
    """Contents of one range. Pieces are ascending and gapless."""

    image: Image
    journal: Journal
    pieces: list[Piece]

    def data_ranges(
        self, offset: int, length: int, count_max: int | None = None
    ) -> list[tuple[int, int]]:
        """The (offset, length) parts that may hold anything but zeros, ascending."""
        found: list[tuple[int, int]] = []
        for piece in self.pieces:
            start, stop = max(piece.offset, offset), min(sum(piece[:2]), offset + length)
            if start >= stop or piece.source == ZERO:
                continue
            if count_max is not None and len(found) >= count_max:
                return [*found, (start, offset + length - start)]
            if piece.source == IMAGE:
                found += self.image.data_ranges(start, stop - start, count_max)
            else:
                found.append((start, stop - start))
        return found

    def read(self, offset: int, length: int) -> Buffer:
        """Exactly these bytes. :raises StorageError, IntegrityError: they cannot be read."""
        if len(self.pieces) == 1 and self.pieces[0].source == IMAGE:
            return self.image.read(offset, length)
        content = bytearray(length)
        for piece in self.pieces:
            start = max(piece.offset, offset)
            stop = min(piece.offset + piece.length, offset + length)
            if start >= stop or piece.source == ZERO:
                continue
            if piece.source == IMAGE:
                part = self.image.read(start, stop - start)
            else:
                part = self.journal.read(piece.source + start - piece.offset, stop - start)
            content[start - offset : stop - offset] = part
        return content

    def expect_reads(self, offset: int, length: int) -> None:
        """A hint: this range is read next."""
        ranges: list[tuple[int, int]] = []
        for piece in self.pieces:
            start, stop = max(piece.offset, offset), min(sum(piece[:2]), offset + length)
            if start < stop and piece.source == IMAGE:
                ranges.append((start, stop - start))
        self.image.expect_reads(ranges)


def pieces_of(index: DirtyIndex, offset: int, length: int) -> list[Piece]:
    """Where the bytes of a range lie now, as `DirtyIndex.lookup`; cheap for a long range with few
    entries in it."""
    count, end = index.entry_count, offset + length
    if count >= SPARSE_INDEX_ENTRIES or length <= count << _BLOCK_SHIFT:
        return index.lookup(offset, length)
    found: list[Piece] = []
    position = offset
    for block in sorted(
        b for b in index.entries if offset >> _BLOCK_SHIFT <= b <= (end - 1) >> _BLOCK_SHIFT
    ):
        start = max(offset, block << _BLOCK_SHIFT)
        stop = min(end, (block + 1) << _BLOCK_SHIFT)
        found += _between(index, position, start)
        found += index.lookup(start, stop - start)
        position = stop
    return found + _between(index, position, end)


def _between(index: DirtyIndex, offset: int, end: int) -> list[Piece]:
    """Pieces of a range that has no entries: long runs of zeros, and image."""
    found: list[Piece] = []
    position = offset
    for first, last, _ in index.extents if offset < end else ():
        start, stop = max(position, first << _BLOCK_SHIFT), min(end, last << _BLOCK_SHIFT)
        if start >= stop:
            continue
        if start > position:
            found.append(Piece(position, start - position, IMAGE))
        found.append(Piece(start, stop - start, ZERO))
        position = stop
    if position < end:
        found.append(Piece(position, end - position, IMAGE))
    return found
