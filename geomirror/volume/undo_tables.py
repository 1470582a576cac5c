"""The tables of one undo file and nothing else: what an index of thousands needs of each.

One read from the end finds footer and tables of most files. They are as they were written, by their
check; that they fit the contents is looked at when these are read.
Deliberately not here: whether the whole file is sound (`undo_file`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

from geomirror.limits import KIB
from geomirror.volume.store import File
from geomirror.volume.undo_chunks import CHUNK, ChunkMap, damage
from geomirror.volume.undo_file import ENTRY
from geomirror.volume.undo_header import FOOTER, FOOTER_MAGIC, HEADER_BYTES

_TAIL_BYTES = 16 * KIB
"""Tables of some hundred runs."""


class PassTables:
    """Reads them at once; the file may be closed afterwards.

    :raises IntegrityError: footer or tables are not as they were written.
    """

    def __init__(self, file: File, name: str) -> None:
        size = file.size()
        if size < HEADER_BYTES + FOOTER.size:
            raise damage(name, "is too short")
        tail_start = max(size - _TAIL_BYTES, 0)
        tail = file.pread(size - tail_start, tail_start)
        start, chunk_start, check, magic = FOOTER.unpack(tail[-FOOTER.size :])
        end = size - FOOTER.size
        is_laid_out = HEADER_BYTES <= start <= chunk_start <= end
        is_laid_out &= not (chunk_start - start) % ENTRY.itemsize
        if magic != FOOTER_MAGIC or not is_laid_out or (end - chunk_start) % CHUNK.itemsize:
            raise damage(name, "has a damaged footer")
        if start >= tail_start:
            tables = tail[start - tail_start : end - tail_start]
        else:
            tables = file.pread(end - start, start)
        if xxhash.xxh3_64_intdigest(tables) != check:
            raise damage(name, "has a damaged table")
        # Cut apart, so that a view, which keeps the chunks, does not keep the entries.
        self.runs: npt.NDArray[np.void] = np.frombuffer(tables[: chunk_start - start], dtype=ENTRY)
        """As `UndoReader.runs`."""
        chunks = np.frombuffer(tables[chunk_start - start :], dtype=CHUNK)
        self.chunks = ChunkMap(name, chunks, HEADER_BYTES)
