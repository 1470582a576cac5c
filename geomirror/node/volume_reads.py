"""Reads of one volume: at once when the pages are in memory, else by a job for a worker thread."""

from __future__ import annotations

from collections.abc import Sequence

from geomirror.nbd.protocol import Request
from geomirror.volume.dirty_index import IMAGE, ZERO
from geomirror.volume.engine import Engine
from geomirror.volume.engine_jobs import ReadJob
from geomirror.volume.store import Buffer

READ_NOW_BYTES_MAX = 1 << 20
"""Longer reads go to a worker thread: copying them would hold up everybody's writes."""


class VolumeReader:
    """Reads of one volume of an engine."""

    def __init__(self, engine: Engine, volume: int) -> None:
        self._engine = engine
        self._volume = volume

    def read_each(self, requests: Sequence[Request]) -> list[Buffer | None]:
        """Of each READ the bytes if they lie in one place and in memory, else None: `read_now` may
        know more."""
        engine, volume = self._engine, self._volume
        only_source = engine.indexes[volume].only_source
        try_image, try_journal = engine.images[volume].try_read, engine.journal.try_read
        found: list[Buffer | None] = []
        for request in requests:
            offset, length = request.offset, request.length
            source = only_source(offset, length)
            if length > READ_NOW_BYTES_MAX or not source:
                found.append(None)
            elif source == IMAGE:
                found.append(try_image(offset, length))
            else:
                found.append(try_journal(source, length))
        return found

    def read_now(self, offset: int, length: int) -> list[Buffer] | None:
        """The bytes, or None when a disk would have to be waited for."""
        if length > READ_NOW_BYTES_MAX:
            return None
        engine = self._engine
        image, journal = engine.images[self._volume], engine.journal
        buffers: list[Buffer] = []
        for piece in engine.read_pieces(self._volume, offset, length):
            if piece.source == ZERO:
                buffers.append(bytes(piece.length))
                continue
            if piece.source == IMAGE:
                part: Buffer | None = image.try_read(piece.offset, piece.length)
            else:
                part = journal.try_read(piece.source, piece.length)
            if part is None:
                return None
            buffers.append(part)
        return buffers

    def read_later(self, offset: int, length: int) -> ReadJob:
        """A job for a worker thread; `release` it afterwards."""
        return self._engine.read_job(self._volume, offset, length)

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
