"""Where the old contents of one undo file lie, apart from which blocks they are of.

Small (16 to 24 bytes for 256 KiB of contents) and never changed, so that a view keeps it and opens
the file only to read: files of merged passes go away while views look at them.
Deliberately not here: the file's tables (`undo_file`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from geomirror.errors import IntegrityError
from geomirror.limits import BLOCK_BYTES, KIB
from geomirror.volume.store import File

CHUNK_BYTES = 256 * KIB
"""Raw bytes of a chunk: what reading one old block costs to decompress."""
BLOCKS_PER_CHUNK = CHUNK_BYTES // BLOCK_BYTES
CHUNK = np.dtype([("raw", "<u4"), ("stored", "<u4"), ("check", "<u8")])
"""One row of a file's chunk table."""
assert CHUNK.itemsize == 16


@dataclass(frozen=True)
class ChunkMap:
    """The chunks of one undo file."""

    name: str
    """Of the file."""
    chunks: npt.NDArray[np.void] = field(repr=False)
    """Rows of `CHUNK`."""
    start: int
    """Where the first one begins in the file."""

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where each begins. Of most of the thousands that a view has, nobody asks."""
        stored = self.chunks["stored"].astype(np.int64)
        found: npt.NDArray[np.int64] = self.start + stored.cumsum() - stored
        return found

    def read(self, file: File, index: int) -> bytes:
        """The raw bytes of one chunk, verified. Blocking.

        :raises IntegrityError: it is damaged, or there is none.
        """
        if index >= len(self.chunks):
            raise self._damaged(index)
        chunk = self.chunks[index]
        stored = file.pread(int(chunk["stored"]), int(self.offsets[index]))
        try:
            # The size in the frame is trusted by the library: it is compared before it allocates.
            if zstandard.frame_content_size(stored) != int(chunk["raw"]):
                raise self._damaged(index)
            raw = zstandard.ZstdDecompressor().decompress(stored)
        except zstandard.ZstdError as error:
            raise self._damaged(index) from error
        if xxhash.xxh3_64_intdigest(raw) != int(chunk["check"]):
            raise self._damaged(index)
        return raw

    def _damaged(self, index: int) -> IntegrityError:
        return damage(self.name, f"has a damaged chunk {index}")


def damage(name: str, what: str) -> IntegrityError:
    """An undo file is not as it was written."""
    return IntegrityError(
        f"undo file {name} {what}",
        hint='earlier states cannot be restored from it; "geomirror timeline" shows what is left',
    )
