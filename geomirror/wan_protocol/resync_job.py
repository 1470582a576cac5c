"""Reads and encodes one step of a plain resync, from a snapshot of where the content lies.

The snapshot (pieces) is taken on the loop and holds sealed content only; blocks whose newest record
is not sealed are left to their epoch (I3). While the step runs, the journal is pinned and images
change only by applying epochs after the base of the resync, all of which are streamed to the peer
afterwards, so that a mix of old and new inside one block is always overwritten.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from geomirror.limits import BLOCK_BYTES
from geomirror.volume.dirty_index import IMAGE, ZERO, Piece
from geomirror.volume.engine import Engine
from geomirror.wan_protocol.epoch_encode import encode_blocks


@dataclass
class Run:
    """A block-aligned range of one volume (the volume's end may be short) and its pieces."""

    volume: int
    offset: int
    length: int
    pieces: list[Piece]


@dataclass
class ResyncReadJob:
    """Encode up to `bytes_max` of data from `runs` into frames.

    After `run`: `frames`, `consumed` (bytes of the runs that were covered, in order), `data_bytes`.
    """

    engine: Engine
    runs: list[Run]
    bytes_max: int
    level: int
    frames: list[bytes] = field(default_factory=list)
    consumed: int = 0
    data_bytes: int = 0

    def run(self) -> None:
        """Read, find zeros, encode. Raises StorageError, IntegrityError."""
        ranges: list[tuple[int, int, bytearray]] = []
        holes: list[tuple[int, int, int]] = []
        for item in self.runs:
            done = self._read_run(item, ranges, holes)
            self.consumed += done
            if done < item.length:
                break
        self.frames = encode_blocks(ranges, holes, level=self.level)

    def _read_run(
        self,
        item: Run,
        ranges: list[tuple[int, int, bytearray]],
        holes: list[tuple[int, int, int]],
    ) -> int:
        """Cover `item` as far as the byte bound allows; returns the bytes covered."""
        position, end = item.offset, item.offset + item.length
        for start, stop, is_hole in self._areas(item):
            assert start == position
            if is_hole:
                count = -(-(stop - start) // BLOCK_BYTES)
                holes.append((item.volume, start // BLOCK_BYTES, count))
                position = stop
                continue
            room = (self.bytes_max - self.data_bytes) // BLOCK_BYTES * BLOCK_BYTES
            step = min(stop - position, room)
            if step:
                content = self._content(item, position, step)
                ranges.append((item.volume, position // BLOCK_BYTES, content))
                self.data_bytes += step
                position += step
            if position < stop:
                return position - item.offset
        assert position == end
        return item.length

    def _areas(self, item: Run) -> list[tuple[int, int, bool]]:
        """Split into (start, stop, is_hole), block-aligned: holes hold nothing but zeros."""
        solid: list[tuple[int, int]] = []
        image = self.engine.images[item.volume]
        for piece in item.pieces:
            if piece.source == ZERO:
                continue
            if piece.source == IMAGE:
                ranges = image.data_ranges(piece.offset, piece.length)
                solid.extend((offset, offset + length) for offset, length in ranges)
            else:
                solid.append((piece.offset, piece.offset + piece.length))
        areas: list[tuple[int, int, bool]] = []
        position, end = item.offset, item.offset + item.length
        for start, stop in sorted(solid):
            first = max(position, start // BLOCK_BYTES * BLOCK_BYTES)
            last = min(end, -(-stop // BLOCK_BYTES) * BLOCK_BYTES)
            if first > position:
                areas.append((position, first, True))
            if last > max(position, first):
                areas.append((max(position, first), last, False))
                position = last
        if position < end:
            areas.append((position, end, True))
        return areas

    def _content(self, item: Run, offset: int, length: int) -> bytearray:
        content = bytearray(length)
        for piece in item.pieces:
            start = max(piece.offset, offset)
            stop = min(piece.offset + piece.length, offset + length)
            if start >= stop or piece.source == ZERO:
                continue
            if piece.source == IMAGE:
                part = self.engine.images[item.volume].read(start, stop - start)
            else:
                part = self.engine.journal.read(piece.source + start - piece.offset, stop - start)
            content[start - offset : stop - offset] = part
        return content
