"""Reads of one volume: at once when the pages are in memory, else by a job for a worker thread."""

from __future__ import annotations

from dataclasses import dataclass, field

from geomirror.volume.dirty_index import IMAGE, ZERO, Piece
from geomirror.volume.engine import Engine
from geomirror.volume.journal import Pin

READ_NOW_BYTES_MAX = 1 << 20
"""Longer reads go to a worker thread: copying them would hold up everybody's writes."""


@dataclass
class ReadJob:
    """A read whose places were looked up on the loop; the journal stays pinned until it ends."""

    engine: Engine
    volume: int
    pieces: list[Piece]
    pin: Pin | None
    buffers: list[bytes] = field(default_factory=list)

    def run(self) -> list[bytes]:
        """Blocking. Raises StorageError."""
        image, journal = self.engine.images[self.volume], self.engine.journal
        for piece in self.pieces:
            if piece.source == ZERO:
                self.buffers.append(bytes(piece.length))
            elif piece.source == IMAGE:
                self.buffers.append(image.read(piece.offset, piece.length))
            else:
                self.buffers.append(journal.read(piece.source, piece.length))
        return self.buffers

    def release(self) -> None:
        """Let go of the journal; on the loop."""
        if self.pin is not None:
            self.pin.release()
            self.pin = None


class VolumeReader:
    """Reads of one volume of an engine."""

    def __init__(self, engine: Engine, volume: int) -> None:
        self._engine = engine
        self._volume = volume

    def read_now(self, offset: int, length: int) -> list[bytes] | None:
        """The bytes, or None when a disk would have to be waited for."""
        if length > READ_NOW_BYTES_MAX:
            return None
        engine = self._engine
        image, journal = engine.images[self._volume], engine.journal
        buffers: list[bytes] = []
        for piece in engine.read_pieces(self._volume, offset, length):
            if piece.source == ZERO:
                buffers.append(bytes(piece.length))
                continue
            if piece.source == IMAGE:
                part = image.try_read(piece.offset, piece.length)
            else:
                part = journal.try_read(piece.source, piece.length)
            if part is None:
                return None
            buffers.append(part)
        return buffers

    def read_later(self, offset: int, length: int) -> ReadJob:
        """A job for a worker thread; `release` it afterwards."""
        pieces = self._engine.read_pieces(self._volume, offset, length)
        sources = [piece.source for piece in pieces if piece.source > 0]
        pin = self._engine.journal.pin(min(sources), "read") if sources else None
        return ReadJob(self._engine, self._volume, pieces, pin)

    def image_status(self, offset: int, length: int, hole: int) -> list[tuple[int, int]]:
        """(length, state) of a range of the image: `hole` or 0."""
        extents: list[tuple[int, int]] = []
        position, end = offset, offset + length
        for start, size in self._engine.images[self._volume].data_ranges(offset, length):
            if start > position:
                extents.append((start - position, hole))
            extents.append((size, 0))
            position = start + size
        if position < end:
            extents.append((end - position, hole))
        return extents
